// The 16-byte vector, the widest access of a thread, and copies with it.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

// One name for all kernels: CUDA gives every kernel the same block of dynamic shared memory. The
// alignment is that of the swizzle in operand_at.
alignas(1024) extern __shared__ uint4 dynamic_shared[];

namespace t2t {

template <typename T>
struct alignas(16) Vec {
  static constexpr int size = 16 / sizeof(T);
  T at[size];
};

// Stores to global memory. nvcc turns an assignment into narrow stores if the elements are in
// registers and the address depends on a phase.
template <typename T>
__device__ void store_vector(T* to, const Vec<T>& vector) {
  __stwb(reinterpret_cast<uint4*>(to), reinterpret_cast<const uint4&>(vector));
}

__device__ inline void store_vector(void* to, const uint4& vector) {
  __stwb(static_cast<uint4*>(to), vector);
}

// Loads from global memory, at a multiple of 16 bytes. nvcc also turns an assignment into narrow
// loads.
__device__ inline uint4 load_vector(const void* from) {
  return __ldca(static_cast<const uint4*>(from));
}

// Elements between the last 16-byte boundary and `pointer`.
template <typename T>
__device__ int phase_of(const T* pointer) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(pointer) / sizeof(T) % Vec<T>::size);
}

// The number of 16-byte vectors that contain a span of elements, the first and last possibly in
// part.
template <typename T>
__host__ __device__ int vectors_in(int phase, int length) {
  return (phase + length + Vec<T>::size - 1) / Vec<T>::size;
}

// Copies vector `i` of a span with the same phase at source and destination. A vector that is only
// partly in the span is copied element by element.
template <typename T>
__device__ void copy_vector(T* to, const T* from, int i, int phase, int length) {
  const int begin = i * Vec<T>::size - phase;
  const int end = begin + Vec<T>::size;
  if (begin >= 0 && end <= length) {
    *reinterpret_cast<Vec<T>*>(to + begin) = *reinterpret_cast<const Vec<T>*>(from + begin);
  } else {
#pragma unroll 1
    for (int e = max(begin, 0); e < min(end, length); ++e) to[e] = from[e];
  }
}

}  // namespace t2t
