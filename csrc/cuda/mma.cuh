// Matrix products of a warp.
//
// Half types go to the matrix unit. float32 stays on the ordinary one: three TF32 products would be
// faster, but the errors that they add are those of hardware which no test here has seen. Both
// leave their sums in the same lanes, so that what follows a product is written once.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "ptx.cuh"
#include "vec.cuh"

namespace t2t {

constexpr int kLanes = 32;
// Tokens, or pixels, of a warp: the rows of one product.
constexpr int kRows = 16;
// Columns of a product that share a fragment's loads.
constexpr int kGroup = 32;
constexpr unsigned kAllLanes = 0xFFFFFFFF;

__device__ inline int lane_index() { return threadIdx.x % kLanes; }
__device__ inline int warp_index() { return threadIdx.x / kLanes; }

// Elements from a row of shared memory to the next, such that 16 bytes of eight rows that follow
// one another lie in different banks.
template <typename T>
__host__ __device__ constexpr int padded_row(int elements) {
  return (elements + 15) / 16 * 16 + Vec<T>::size;
}

// Sums of a product: 16 rows, kGroups·32 columns. A lane holds of rows g and g +
// 8 eight adjacent columns 8t … 8t + 7 of each group.
template <int kGroups>
struct Sums {
  float at[kGroups][2][8];

  __device__ void clear() {
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
#pragma unroll
      for (int j = 0; j < 16; ++j) at[i][j / 8][j % 8] = 0.f;
    }
  }
};
__device__ inline int sum_row(int half) { return lane_index() / 4 + 8 * half; }
__device__ inline int sum_column(int group) { return group * kGroup + lane_index() % 4 * 8; }

// Sums of a product of two matrices that both lie in shared memory, a row per token: (Aᵀ·B),
// 16·kTall rows by 8·kWide columns.
template <int kTall, int kWide>
struct OuterSums {
  float at[kTall][kWide][2][2];

  __device__ void clear() {
#pragma unroll
    for (int i = 0; i < kTall; ++i) {
#pragma unroll
      for (int j = 0; j < 4 * kWide; ++j) at[i][j / 4][j / 2 % 2][j % 2] = 0.f;
    }
  }
  // A lane holds rows `row`, columns `column` and the next one.
  __device__ static int row(int tall, int half) { return tall * 16 + half * 8 + lane_index() / 4; }
  __device__ static int column(int wide) { return wide * 8 + lane_index() % 4 * 2; }
};

// sums += Aᵀ·B over `tokens` tokens, a multiple of 16.
template <int kTall, int kWide, typename T>
__device__ void multiply_tokens(OuterSums<kTall, kWide>& sums, const T* a, int a_pitch, const T* b,
                                int b_pitch, int tokens) {
  const int lane = lane_index();
  if constexpr (std::is_same_v<T, float>) {
    OuterSums<kTall, kWide> part;
    part.clear();
#pragma unroll 2
    for (int k = 0; k < tokens; ++k) {
      float left[kTall][2];
#pragma unroll
      for (int i = 0; i < 2 * kTall; ++i) left[i / 2][i % 2] = a[k * a_pitch + i * 8 + lane / 4];
#pragma unroll
      for (int j = 0; j < kWide; ++j) {
        const auto right = *reinterpret_cast<const float2*>(b + k * b_pitch + j * 8 + lane % 4 * 2);
#pragma unroll
        for (int i = 0; i < 2 * kTall; ++i) {
          part.at[i / 2][j][i % 2][0] += left[i / 2][i % 2] * right.x;
          part.at[i / 2][j][i % 2][1] += left[i / 2][i % 2] * right.y;
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 4 * kTall * kWide; ++i) {
      sums.at[i / 4 / kWide][i / 4 % kWide][i / 2 % 2][i % 2] +=
          part.at[i / 4 / kWide][i / 4 % kWide][i / 2 % 2][i % 2];
    }
  } else {
    static_assert(kWide % 2 == 0);
#pragma unroll 1
    for (int k = 0; k < tokens; k += 16) {
      uint32_t left[kTall][4];
#pragma unroll
      for (int i = 0; i < kTall; ++i) {
        load_matrices_transposed(
            left[i], a + (k + lane % 8 + lane / 16 * 8) * a_pitch + i * 16 + lane / 8 % 2 * 8);
      }
#pragma unroll
      for (int j = 0; j < kWide; j += 2) {
        uint32_t right[4];
        load_matrices_transposed(right, b + (k + lane % 16) * b_pitch + j * 8 + lane / 16 * 8);
#pragma unroll
        for (int i = 0; i < kTall; ++i) {
          auto& d = sums.at[i][j];
          auto& e = sums.at[i][j + 1];
          mma<T>(d[0][0], d[0][1], d[1][0], d[1][1], left[i], right[0], right[1]);
          mma<T>(e[0][0], e[0][1], e[1][0], e[1][1], left[i], right[2], right[3]);
        }
      }
    }
  }
}

template <typename T>
__device__ Vec<T> rounded(const float* from) {
  Vec<T> vector;
#pragma unroll
  for (int e = 0; e < Vec<T>::size; ++e) vector.at[e] = static_cast<T>(from[e]);
  return vector;
}

// wgmma's descriptor of a right operand: rows of 64 elements of 16 bits in shared memory that begin
// at a multiple of 1024, the eight 16-byte parts of row i at their index ^ i % 8. To it can be
// added the distance to where the rows, or columns, of the next 16 terms of the sums begin.
constexpr uint64_t kOperandRows = 16 * 128 / 16, kOperandColumns = 16 * 2 / 16;
__device__ inline uint64_t operand_at(const void* rows) {
  constexpr uint64_t kToNextEightRows = 8 * 128 / 16, kSwizzledOver128Bytes = 1;
  return shared_address(rows) / 16 | kToNextEightRows << 16 | kToNextEightRows << 32 |
         kSwizzledOver128Bytes << 62;
}

// Eight adjacent elements from memory, zero beyond `count`; `vectors`: they are aligned.
template <typename T>
__device__ void load_eight(float (&to)[8], const T* from, int count, bool vectors) {
  if (vectors && count >= 8) {
#pragma unroll
    for (int i = 0; i < 8; i += Vec<T>::size) {
      const auto vector = *reinterpret_cast<const Vec<T>*>(from + i);
#pragma unroll
      for (int e = 0; e < Vec<T>::size; ++e) to[i + e] = static_cast<float>(vector.at[e]);
    }
  } else {
#pragma unroll
    for (int e = 0; e < 8; ++e) to[e] = e < count ? static_cast<float>(from[e]) : 0.f;
  }
}

// The opposite, rounded, and to global memory only: see store_vector.
template <typename T>
__device__ void store_eight(T* to, const float (&from)[8], int count, bool vectors) {
  if (vectors && count >= 8) {
#pragma unroll
    for (int i = 0; i < 8; i += Vec<T>::size) store_vector(to + i, rounded<T>(from + i));
  } else {
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      if (e < count) to[e] = static_cast<T>(from[e]);
    }
  }
}

}  // namespace t2t
