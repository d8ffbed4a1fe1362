// Shared by the products of a warp: the layout of sums, operands in shared memory, rows of eight.
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
// Columns of a product that use the same loads of a fragment.
constexpr int kGroup = 32;
constexpr unsigned kAllLanes = 0xFFFFFFFF;

__device__ inline int lane_index() { return threadIdx.x % kLanes; }
__device__ inline int warp_index() { return threadIdx.x / kLanes; }

// The row stride in shared memory, such that 16 bytes of eight consecutive rows are in different
// banks.
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

// Sums of a product as the matrix unit leaves them: 16·kTall rows by 8·kWide columns.
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

template <typename T>
__device__ Vec<T> rounded(const float* from) {
  Vec<T> vector;
#pragma unroll
  for (int e = 0; e < Vec<T>::size; ++e) vector.at[e] = static_cast<T>(from[e]);
  return vector;
}

// wgmma's descriptor of a right operand: rows of 64 elements of 16 bits in shared memory that begin
// at a multiple of 1024, the eight 16-byte parts of row i at their index ^ i % 8. The operand may
// begin so many parts behind `rows`, at a multiple of eight rows or within the first row.
__device__ inline uint64_t operand_at(const void* rows, int parts = 0) {
  constexpr uint32_t kToNextEightRows = 8 * 128 / 16, kSwizzledOver128Bytes = 1;
  // In halves: what is added to the lower one stays in it.
  const uint32_t lower = (shared_address(rows) / 16 | kToNextEightRows << 16) + parts;
  const uint32_t upper = kToNextEightRows | kSwizzledOver128Bytes << 30;
  return uint64_t(upper) << 32 | lower;
}

// Eight adjacent elements from memory, at a multiple of 16 bytes.
template <typename T>
__device__ void load_eight(float (&to)[8], const T* from) {
#pragma unroll
  for (int i = 0; i < 8; i += Vec<T>::size) {
    const auto vector = *reinterpret_cast<const Vec<T>*>(from + i);
#pragma unroll
    for (int e = 0; e < Vec<T>::size; ++e) to[i + e] = static_cast<float>(vector.at[e]);
  }
}

// Rounds and stores the first `count` of them, only to global memory: see store_vector.
template <typename T>
__device__ void store_eight(T* to, const float (&from)[8], int count) {
  if (count >= 8) {
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
