// Matrices of tokens as an operator is given them, and reductions of a row that four lanes share.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <limits>

#include "checks.h"
#include "mma.cuh"

namespace t2t {

// Embeddings, features and hidden units are at most two groups of 32, padded with zeros, so that
// the sums of a product are 32 registers.
constexpr int kWidest = 64;
constexpr int kWidestGroups = kWidest / kGroup;
using Wide = Sums<kWidestGroups>;
constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
// Of a warp's tiles in shared memory.
constexpr int kTilePitch = padded_row<float>(kWidest);
constexpr int kTileFloats = kRows * kTilePitch;

// A matrix (T, E) per image.
struct Rows {
  const void* at;
  int64_t batch_stride, token_stride, element_stride;
  bool vectors;
};

template <typename T>
Rows rows_of(const torch::stable::Tensor& tensor) {
  constexpr int64_t V = Vec<T>::size;
  const bool vectors = tensor.stride(2) == 1 && tensor.stride(0) % V == 0 &&
                       tensor.stride(1) % V == 0 &&
                       reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0;
  return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2), vectors};
}

// `tensor` itself if its rows can be loaded 16 bytes at a time, else a copy.
template <typename T>
torch::stable::Tensor vector_rows(const torch::stable::Tensor& tensor) {
  if (rows_of<T>(tensor).vectors) return tensor;
  torch::stable::Tensor copy = torch::stable::new_empty(tensor, tensor.sizes());
  torch::stable::copy_(copy, tensor);
  return copy;
}

// Columns section·embed … of contiguous tokens: k, q or v of a joint tensor.
template <typename T>
Rows section_of(const torch::stable::Tensor& tokens, int64_t section, int64_t embed) {
  return {static_cast<const T*>(tokens.const_data_ptr()) + section * embed,
          tokens.size(1) * tokens.size(2), tokens.size(2), 1, true};
}

// v (B, T, `embed`), with tokens that 32 bits can count.
inline void check_values(const char* name, const torch::stable::Tensor& v, int64_t embed) {
  check_dims(name, "v", v, 3, "3 dimensions (B, T, E)");
  T2T_CHECK(v.size(1) >= 1 && v.size(2) == embed, name, ": v: got shape ", shape_text(v.sizes()),
            ", expected (B, T, ", embed, ") with T at least 1");
  T2T_CHECK(v.size(0) * v.size(1) <= std::numeric_limits<int>::max(), name, ": v: got ",
            v.size(0) * v.size(1), " tokens, expected fewer than 2^31; split the batch");
}

// The sum over the four lanes that share a row.
__device__ inline float sum_of_row(float value) {
  value += __shfl_xor_sync(kAllLanes, value, 1);
  return value + __shfl_xor_sync(kAllLanes, value, 2);
}
__device__ inline float largest_of_row(float value) {
  value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, 1));
  return fmaxf(value, __shfl_xor_sync(kAllLanes, value, 2));
}

// Of sums of columns 8t … that each lane has of its rows, the sum over all rows of column 8t + g.
__device__ inline float sum_of_columns(const float (&columns)[8]) {
  float sums[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) sums[i] = columns[i];
#pragma unroll
  for (int count = 4; count > 0; count /= 2) {
    // Lanes with this bit keep the upper half, the others the lower one.
    const bool upper = lane_index() & 4 * count;
#pragma unroll
    for (int i = 0; i < count; ++i) {
      const float given = upper ? sums[i] : sums[i + count];
      const float kept = upper ? sums[i + count] : sums[i];
      sums[i] = kept + __shfl_xor_sync(kAllLanes, given, 4 * count);
    }
  }
  return sums[0];
}

// A lane's sums of a product, loaded from a tile.
template <typename T>
__device__ void take_sums(const T* tile, Wide& to) {
#pragma unroll
  for (int i = 0; i < 2 * kWidestGroups; ++i) {
    const T* row = tile + sum_row(i % 2) * padded_row<T>(kWidest);
    load_eight(to.at[i / 2][i % 2], row + sum_column(i / 2));
  }
}

inline torch::stable::Tensor new_floats(const torch::stable::Tensor& like, int64_t count) {
  return torch::stable::new_empty(like, {count}, torch::headeronly::ScalarType::Float);
}
inline float* floats_of(const torch::stable::Tensor& tensor) {
  return static_cast<float*>(tensor.mutable_data_ptr());
}

}  // namespace t2t
