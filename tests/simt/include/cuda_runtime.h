// Stands in for CUDA's header so that the sources in csrc/cuda compile as plain C++ and run on the
// CPU, thread by thread: see simt.cpp. Only what the sources use is here.
#pragma once

#include <algorithm>
#include <cstddef>
#include <functional>

#define __host__
#define __device__
#define __global__
#define __launch_bounds__(...)
// A block runs alone, on one thread of the CPU: a thread-local variable is the block's own.
#define __shared__ thread_local
#define __syncthreads() simt::barrier(__LINE__)

using std::max;
using std::min;

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

extern dim3 threadIdx, blockIdx, blockDim, gridDim;

inline void __stwb(uint4* to, uint4 value) { *to = value; }

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorLaunchFailure = 719
};
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16 };
using cudaStream_t = struct CUstream_st*;

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

namespace simt {

// Suspends the calling thread until all threads of its block wait at the same line.
void barrier(int line);

// Runs `thread` for every thread of the grid, block after block.
cudaError_t launch(const cudaLaunchConfig_t& config, const std::function<void()>& thread);

}  // namespace simt

template <typename... Params, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...),
                               const Arguments&... arguments) {
  return simt::launch(*config, [&] { kernel(arguments...); });
}

// The reason of the latest cudaErrorLaunchFailure is part of its text.
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetLastError();
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
