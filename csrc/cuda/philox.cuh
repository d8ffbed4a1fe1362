// Counter-based dropout: the masks of t2t_kernels/philox.py, bit for bit.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

namespace t2t {

struct Dropout {
  const int64_t* seed;  // null: nothing is dropped
  uint32_t threshold;   // the smallest number that keeps its element, of 16 bits
  float scale;          // of kept elements
};

inline Dropout make_dropout(double p, const int64_t* seed) {
  if (p == 0) return {nullptr, 0, 1.f};
  const double threshold = std::nearbyint(p * 65536);
  return {seed, static_cast<uint32_t>(threshold),
          threshold == 65536 ? 0.f : static_cast<float>(1 / (1 - threshold / 65536))};
}

// Philox-4x32-10 (Salmon et al., "Parallel random numbers", SC 2011) of several blocks side by
// side.
template <int kCount>
__device__ void philox(uint64_t seed, uint32_t site, const uint64_t (&blocks)[kCount],
                       uint32_t (&words)[kCount][4]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    words[i][0] = static_cast<uint32_t>(blocks[i]);
    words[i][1] = static_cast<uint32_t>(blocks[i] >> 32);
    words[i][2] = site;
    words[i][3] = 0;
  }
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      uint32_t (&c)[4] = words[i];
      const uint64_t one = uint64_t(0xD2511F53u) * c[0], other = uint64_t(0xCD9E8D57u) * c[2];
      c[0] = static_cast<uint32_t>(other >> 32) ^ c[1] ^ k0;
      c[1] = static_cast<uint32_t>(other);
      c[2] = static_cast<uint32_t>(one >> 32) ^ c[3] ^ k1;
      c[3] = static_cast<uint32_t>(one);
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

}  // namespace t2t
