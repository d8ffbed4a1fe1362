// Tokens of a map as rows of shared memory: gathered, and normalised.
//
// With a multiple of 16 channels a token's elements are ordered by tap, then channel: a
// channels-last map holds the channels of a tap side by side, and they are copied 16 bytes at a
// time, without passing through registers. With any other number, an image's three above all, they
// are in the token's own order (channel, row, column) and are loaded one by one.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "geometry.h"
#include "mma.cuh"

namespace t2t {

// Division by a number known only at launch, exact for all of 32 bits (Lemire, Kaser and Kurz,
// 2019).
struct Divisor {
  uint32_t divisor;
  uint64_t factor;  // 0 for a divisor of 1

  __device__ uint32_t operator()(uint32_t number) const {
    return factor == 0 ? number : static_cast<uint32_t>(__umul64hi(factor, number));
  }
};
inline Divisor make_divisor(uint32_t by) { return {by, by == 1 ? 0 : ~0ULL / by + 1}; }

struct Patches {
  Geometry map;
  const void* x;
  int64_t batch_stride, channel_stride, row_stride, column_stride;  // of x, in elements
  bool by_tap;
  bool vectors;  // taps can be copied 16 bytes at a time
  Divisor inner, kernel;

  __host__ __device__ int width() const { return map.token_width(); }
  __host__ __device__ int64_t tokens() const { return int64_t(map.rows) * map.columns; }

  // Place of element `element` of a token in the order above, as the token's own.
  __device__ int own(int element) const {
    if (!by_tap) return element;
    const int tap = inner(element);
    return (element - tap * map.channels) * map.kernel * map.kernel + tap;
  }
};

template <typename T>
Patches make_patches(const Geometry& map, const torch::stable::Tensor& x) {
  constexpr int64_t V = Vec<T>::size;
  Patches p = {};
  p.map = map;
  p.x = x.const_data_ptr();
  p.batch_stride = x.stride(0);
  p.channel_stride = x.stride(1);
  p.row_stride = x.stride(2);
  p.column_stride = x.stride(3);
  p.by_tap = map.channels % 16 == 0 && map.channels > 0;
  p.vectors = p.by_tap && p.channel_stride == 1 && reinterpret_cast<uintptr_t>(p.x) % 16 == 0 &&
              p.batch_stride % V == 0 && p.row_stride % V == 0 && p.column_stride % V == 0;
  p.inner = make_divisor(p.by_tap ? map.channels : map.kernel * map.kernel);
  p.kernel = make_divisor(map.kernel);
  return p;
}

// Where a token's patch begins in the map. A token that does not exist lies outside of it.
struct alignas(16) Corner {
  int64_t offset;
  int y, x;

  __device__ Corner(const Patches& p, int64_t token) : offset(0), y(-0x40000000), x(0) {
    const int64_t image = token / p.tokens();
    if (image >= p.map.batch) return;
    const int in_image = static_cast<int>(token - image * p.tokens());
    const int row = in_image / p.map.columns;
    y = row * p.map.stride - p.map.padding;
    x = (in_image - row * p.map.columns) * p.map.stride - p.map.padding;
    offset = image * p.batch_stride + y * p.row_stride + x * p.column_stride;
  }
};

// The threads that share the work on a tile: each takes the columns first_unit, first_unit +
// unit_step, … (in vectors or elements) of the rows first_row, first_row + row_step, …
struct Share {
  int first_unit, unit_step, first_row, row_step;
};
__device__ inline Share share_of_warp() { return {lane_index(), kLanes, 0, 1}; }

// Elements first … first + count of the tokens at `corners`, zero beyond the token's width. `count`
// is a multiple of 16. Ends with copies under way that the caller has to wait for.
template <int kTokens, typename T>
__device__ void load_patches(const Patches& p, const Corner* corners, int first, int count, T* tile,
                             int pitch, Share share, Share share_of_elements) {
  const auto decompose = [&](int element, int& ky, int& kx) {
    const int quotient = p.inner(element);
    const int rest = element - quotient * static_cast<int>(p.inner.divisor);
    const int tap = p.by_tap ? quotient : rest;
    ky = p.kernel(tap);
    kx = tap - ky * p.map.kernel;
    return (p.by_tap ? rest : quotient) * p.channel_stride + ky * p.row_stride +
           kx * p.column_stride;
  };
  const auto inside = [&](const Corner& corner, int ky, int kx) {
    return static_cast<unsigned>(corner.y + ky) < static_cast<unsigned>(p.map.height) &&
           static_cast<unsigned>(corner.x + kx) < static_cast<unsigned>(p.map.width);
  };
  const T* x = static_cast<const T*>(p.x);
  int ky, kx;
  if (p.vectors) {
    constexpr int V = Vec<T>::size;
    for (int unit = share.first_unit; unit < count / V; unit += share.unit_step) {
      const bool exists = first + unit * V < p.width();
      const int64_t offset = decompose(first + unit * V, ky, kx);
#pragma unroll 4
      for (int row = share.first_row; row < kTokens; row += share.row_step) {
        const Corner corner = corners[row];
        const bool copied = exists && inside(corner, ky, kx);
        copy_async(tile + row * pitch + unit * V, copied ? x + corner.offset + offset : x, copied);
      }
    }
    commit_copies();
  } else {
    share = share_of_elements;
    for (int unit = share.first_unit; unit < count; unit += share.unit_step) {
      const bool exists = first + unit < p.width();
      const int64_t offset = decompose(first + unit, ky, kx);
#pragma unroll 4
      for (int row = share.first_row; row < kTokens; row += share.row_step) {
        const Corner corner = corners[row];
        tile[row * pitch + unit] =
            exists && inside(corner, ky, kx) ? x[corner.offset + offset] : T(0.f);
      }
    }
  }
}

// Mean and squared deviations of a token's elements, merged chunk by chunk (Chan, Golub and
// LeVeque): a flat token must come out as exactly its mean and zero. Two lanes share a row.
struct Moments {
  float seen = 0.f, mean = 0.f, squares = 0.f;

  template <typename T>
  __device__ void add(const T* row, int count) {
    constexpr int V = Vec<T>::size;
    // An addend for each place of a vector: shorter sums have smaller errors.
    const auto sum_of = [&](auto&& term) {
      float sums[V] = {};
      for (int unit = lane_index() % 2; unit * V < count; unit += 2) {
        const auto vector = *reinterpret_cast<const Vec<T>*>(row + unit * V);
#pragma unroll
        for (int e = 0; e < V; ++e) {
          if (unit * V + e < count) sums[e] += term(static_cast<float>(vector.at[e]));
        }
      }
#pragma unroll
      for (int e = 1; e < V; ++e) sums[0] += sums[e];
      return sums[0] + __shfl_xor_sync(kAllLanes, sums[0], 1);
    };
    const float size = static_cast<float>(count);
    const float centre = sum_of([](float value) { return value; }) / size;
    const float deviation = sum_of([&](float value) { return value - centre; });
    float squared = sum_of([&](float value) { return (value - centre) * (value - centre); });
    // The deviations would sum to zero but for the rounding of the centre.
    const float own_mean = centre + deviation / size;
    squared -= deviation * deviation / size;
    const float share = size / (seen + size);
    const float shift = own_mean - mean;
    squares += squared + shift * shift * (seen * share);
    mean += shift * share;
    seen += size;
  }

  // Mean and 1/√(variance + eps).
  __device__ float2 finish(float eps) const { return {mean, 1.f / sqrtf(squares / seen + eps)}; }
};

// The norm's parameters in the tokens' own order.
struct Norm {
  const void *gain, *offset;  // null: 1 and 0
  float eps;
};

// Elements first … first + count of tokens, normalised in place and rounded as plain PyTorch rounds
// them; the moments are (mean, 1/σ) of each row.
template <int kTokens, typename T>
__device__ void normalize(const Patches& p, const Norm& norm, const float2* moments, int first,
                          int count, T* tile, int pitch, Share share) {
  constexpr int V = Vec<T>::size;
  const T* gains = static_cast<const T*>(norm.gain);
  const T* offsets = static_cast<const T*>(norm.offset);
  for (int unit = share.first_unit; unit < count / V; unit += share.unit_step) {
    float gain[V], offset[V];
#pragma unroll
    for (int e = 0; e < V; ++e) {
      const int element = first + unit * V + e;
      // Beyond the token's width there are zeros, and remain.
      const bool exists = element < p.width();
      const int own = exists ? p.own(element) : 0;
      gain[e] = !exists ? 0.f : gains ? static_cast<float>(gains[own]) : 1.f;
      offset[e] = exists && offsets ? static_cast<float>(offsets[own]) : 0.f;
    }
#pragma unroll 2
    for (int row = share.first_row; row < kTokens; row += share.row_step) {
      auto* at = reinterpret_cast<Vec<T>*>(tile + row * pitch + unit * V);
      Vec<T> vector = *at;
      const float2 moment = moments[row];
#pragma unroll
      for (int e = 0; e < V; ++e) {
        const float centred = (static_cast<float>(vector.at[e]) - moment.x) * moment.y;
        vector.at[e] = static_cast<T>(centred * gain[e] + offset[e]);
      }
      *at = vector;
    }
  }
}

// A warp's tile of 16 tokens. All of a token is kept where shared memory allows; else it is loaded
// in chunks, once for the moments and once more for every use.
template <typename T>
struct TokenTile {
  Corner* corners;
  float2* moments;
  T* elements;
  int chunk, pitch;

  __host__ __device__ static int bytes(int chunk) {
    return kRows * (sizeof(Corner) + sizeof(float2) + padded_row<T>(chunk) * sizeof(T));
  }
  __device__ TokenTile(void* shared, int chunk)
      : corners(static_cast<Corner*>(shared)),
        moments(reinterpret_cast<float2*>(corners + kRows)),
        elements(reinterpret_cast<T*>(moments + kRows)),
        chunk(chunk),
        pitch(padded_row<T>(chunk)) {}

  __device__ int columns(const Patches& p, int first) const {
    return min(chunk, (p.width() - first + 15) / 16 * 16);
  }
  __device__ bool whole(const Patches& p) const { return chunk >= p.width(); }

  __device__ void load(const Patches& p, int first) {
    // What was there may still be read by other lanes.
    __syncwarp();
    load_patches<kRows>(p, corners, first, columns(p, first), elements, pitch, share_of_warp(),
                        share_of_warp());
    wait_for_copies<0>();
    __syncwarp();
  }

  // Tokens first_token … of all images; with a norm also their moments. The first chunk is loaded
  // if it is the only one.
  __device__ void start(const Patches& p, bool norm, float eps, int64_t first_token) {
    const int lane = lane_index();
    __syncwarp();
    if (lane < kRows) corners[lane] = Corner(p, first_token + lane);
    if (!norm) {
      if (whole(p)) load(p, 0);
      return;
    }
    Moments moment;
    for (int first = 0; first < p.width(); first += chunk) {
      load(p, first);
      moment.add(elements + lane / 2 * pitch, min(chunk, p.width() - first));
    }
    if (lane % 2 == 0) moments[lane / 2] = moment.finish(eps);
    __syncwarp();
  }

  // The chunk that begins at `first`, ready to be multiplied. A whole token is normalised only
  // once.
  __device__ void ready(const Patches& p, bool normalized, const Norm& norm, int first,
                        bool again) {
    if (whole(p) && again) return;
    if (!whole(p)) load(p, first);
    if (normalized) {
      normalize<kRows>(p, norm, moments, first, columns(p, first), elements, pitch,
                       share_of_warp());
    }
    __syncwarp();
  }
};

}  // namespace t2t
