// Kernels with planted faults, each of which the host runtime has to show.

#include <cuda_runtime.h>
#include <ptx_on_cpu.h>

extern __shared__ uint4 dynamic_shared[];

enum Fault {
  kNone,
  kNoBarrier,
  kExit,
  kOtherBarrier,
  kOverrun,
  kMisaligned,
  kTooMuchShared,
  kNoWait,
  kNoLane,
  kCopyMisaligned
};

// Reverses the elements of each block in static shared memory, then negates them in dynamic.
__global__ void reverse_and_negate(float* values, int fault) {
  __shared__ float reversed[64];
  auto* negated = reinterpret_cast<float*>(dynamic_shared);
  const int i = threadIdx.x;
  const int last = blockDim.x - 1;
  float* block = values + blockIdx.x * blockDim.x;

  reversed[last - i] = block[i];
  if (fault == kExit && i == 3) return;
  if (fault == kOtherBarrier && i % 2 == 0) {
    __syncthreads();
  } else if (fault != kNoBarrier) {
    __syncthreads();
  }
  negated[fault == kOverrun ? i + 1 : i] = -reversed[i];
  __syncthreads();
  if (fault == kMisaligned) {
    if (i == 1) block[0] = reinterpret_cast<uint4*>(negated + i)->x;
  } else {
    block[i] = negated[i];
  }
}

extern "C" __attribute__((visibility("default"))) const char* run(float* values, int blocks,
                                                                  int threads, int fault) {
  cudaLaunchConfig_t config;
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = fault == kTooMuchShared ? 49 * 1024 : threads * sizeof(float);
  return cudaGetErrorString(cudaLaunchKernelEx(&config, reverse_and_negate, values, fault));
}

// Copies 16 bytes a lane through shared memory, then gives each lane's to its neighbour's place.
__global__ void copy_and_exchange(float* values, int fault) {
  auto* copied = reinterpret_cast<float*>(dynamic_shared);
  const int i = threadIdx.x;
  float* own = values + 4 * i;
  t2t::copy_async(copied + 4 * i, fault == kCopyMisaligned ? own + 1 : own, true);
  t2t::commit_copies();
  if (fault != kNoWait) t2t::wait_for_copies<0>();
  if (fault == kNoLane && i == 5) return;
  for (int j = 0; j < 4; ++j) own[j] = __shfl_xor_sync(0xFFFFFFFF, copied[4 * i + j], 1);
}

// `values` are 128 floats, aligned to 16 bytes.
extern "C" __attribute__((visibility("default"))) const char* run_warp(float* values, int fault) {
  cudaLaunchConfig_t config;
  config.gridDim = dim3(1);
  config.blockDim = dim3(32);
  config.dynamicSmemBytes = 512;
  return cudaGetErrorString(cudaLaunchKernelEx(&config, copy_and_exchange, values, fault));
}
