// What csrc/cuda/ptx.cuh has for a GPU, computed from the operands of a warp's 32 lanes.
#pragma once

#include <cuda_runtime.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstring>

namespace t2t {

template <typename T>
void mma(float& d0, float& d1, float& d2, float& d3, const uint32_t (&a)[4], uint32_t b0,
         uint32_t b1) {
  struct Operands {
    float* d[4];
    const uint32_t* a;
    uint32_t b[2];
  } own = {{&d0, &d1, &d2, &d3}, a, {b0, b1}};
  simt::together(
      [](void* const* lanes) {
        const auto element = [](uint32_t pair, int i) {
          const auto bits = static_cast<uint16_t>(pair >> (16 * i));
          T value;
          std::memcpy(&value, &bits, 2);
          return static_cast<float>(value);
        };
        float left[16][16], right[16][8];
        for (int lane = 0; lane < 32; ++lane) {
          const auto& o = *static_cast<const Operands*>(lanes[lane]);
          const int g = lane / 4, t = lane % 4;
          for (int i = 0; i < 2; ++i) {
            left[g][2 * t + i] = element(o.a[0], i);
            left[g + 8][2 * t + i] = element(o.a[1], i);
            left[g][2 * t + 8 + i] = element(o.a[2], i);
            left[g + 8][2 * t + 8 + i] = element(o.a[3], i);
            right[2 * t + i][g] = element(o.b[0], i);
            right[2 * t + 8 + i][g] = element(o.b[1], i);
          }
        }
        float sums[16][8] = {};
        for (int i = 0; i < 16; ++i) {
          for (int k = 0; k < 16; ++k) {
            for (int j = 0; j < 8; ++j) sums[i][j] += left[i][k] * right[k][j];
          }
        }
        for (int lane = 0; lane < 32; ++lane) {
          const auto& o = *static_cast<const Operands*>(lanes[lane]);
          const int g = lane / 4, t = lane % 4;
          *o.d[0] += sums[g][2 * t];
          *o.d[1] += sums[g][2 * t + 1];
          *o.d[2] += sums[g + 8][2 * t];
          *o.d[3] += sums[g + 8][2 * t + 1];
        }
      },
      &own);
}

template <bool kTransposed>
void load_matrices_of_warp(uint32_t (&r)[4], const void* row) {
  struct Operands {
    uint32_t* r;
    const void* row;
  } own = {r, row};
  simt::expect_aligned(row);
  simt::together(
      [](void* const* lanes) {
        const auto of = [&](int lane) -> const Operands& {
          return *static_cast<const Operands*>(lanes[lane]);
        };
        for (int lane = 0; lane < 32; ++lane) {
          for (int matrix = 0; matrix < 4; ++matrix) {
            uint16_t pair[2];
            for (int i = 0; i < 2; ++i) {
              const int row = kTransposed ? lane % 4 * 2 + i : lane / 4;
              const int column = kTransposed ? lane / 4 : lane % 4 * 2 + i;
              pair[i] = static_cast<const uint16_t*>(of(8 * matrix + row).row)[column];
            }
            of(lane).r[matrix] = pair[0] | uint32_t(pair[1]) << 16;
          }
        }
      },
      &own);
}

inline void load_matrices(uint32_t (&r)[4], const void* row) {
  load_matrices_of_warp<false>(r, row);
}
inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  load_matrices_of_warp<true>(r, row);
}

inline void copy_async(void* to, const void* from, bool inside) {
  simt::expect_aligned(to);
  simt::expect_aligned(from);
  simt::copy_later(to, from, inside);
}
inline void commit_copies() { simt::commit_copies(); }
template <int kGroups>
void wait_for_copies() {
  simt::wait_for_copies(kGroups);
}

inline float fast_exp2(float x) { return std::exp2(x); }

}  // namespace t2t
