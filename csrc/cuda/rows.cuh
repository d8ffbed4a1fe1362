// A matrix of tokens as an operator is given it, and reductions of a row that four lanes share.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#include "mma.cuh"

namespace t2t {

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

// The sum over the four lanes that share a row.
__device__ inline float sum_of_row(float value) {
  value += __shfl_xor_sync(kAllLanes, value, 1);
  return value + __shfl_xor_sync(kAllLanes, value, 2);
}
__device__ inline float largest_of_row(float value) {
  value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, 1));
  return fmaxf(value, __shfl_xor_sync(kAllLanes, value, 2));
}

}  // namespace t2t
