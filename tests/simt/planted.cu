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
  kCopyMisaligned,
  kNotShown,
  kNotFenced,
  kNotCommitted,
  kNotAwaited,
  kNoWarp,
  kOtherMatrix,
  kOffPattern,
  kOverwritten,
  kNotArrived,
  kNotWaited,
  kOtherCount
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

// Writes 16 rows of 64 numbers four times: a warpgroup's product, each of whose warps has the unit
// matrix as its left operand.
__global__ void multiply_by_unit(float* values, int fault) {
  using T = torch::headeronly::BFloat16;
  auto* rows = reinterpret_cast<T*>(dynamic_shared);
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  for (int i = threadIdx.x; i < 16 * 64; i += 128) {
    const int row = i / 64, column = i % 64;
    rows[row * 64 + (column / 8 ^ row % 8) * 8 + column % 8] = values[i];
  }
  if (fault != kNotShown) t2t::show_to_products();
  __syncthreads();

  const uint32_t one_of_two = g / 2 == t ? 0x3F80u << g % 2 * 16 : 0;
  const uint32_t unit[4] = {one_of_two, 0, 0, one_of_two};
  const uint64_t eight_rows = 1024 / 16, first = t2t::shared_address(rows) / 16;
  uint64_t right = first | eight_rows << 32 | uint64_t(1) << 62;
  if (fault == kOffPattern) right += 128 / 16;
  if (fault == kOtherMatrix && warp == 2) right += 2;
  if (fault == kNoWarp && warp == 2) return;
  float sums[8][2][2];
  if (fault != kNotFenced) t2t::start_products(sums);
  t2t::multiply_async<T, true>(sums, unit, right, false);
  if (fault != kNotCommitted) t2t::commit_products();
  if (fault == kOverwritten) rows[threadIdx.x] = -1.f;
  if (fault != kNotAwaited) t2t::wait_for_products(sums);
  for (int i = 0; i < 32; ++i) {
    const int row = warp * 16 + i / 2 % 2 * 8 + g, column = i / 4 * 8 + t * 2 + i % 2;
    values[row * 64 + column] = sums[i / 4][i / 2 % 2][i % 2];
  }
}

// `values` are 64 rows of 64 floats, the first 16 of them the operand.
extern "C" __attribute__((visibility("default"))) const char* run_group(float* values, int fault) {
  cudaLaunchConfig_t config;
  config.gridDim = dim3(1);
  config.blockDim = dim3(128);
  config.dynamicSmemBytes = 2048;
  return cudaGetErrorString(cudaLaunchKernelEx(&config, multiply_by_unit, values, fault));
}

// The first warp hands a number to each lane of the second one, which negates it.
__global__ void hand_over(float* values, int fault) {
  auto* handed = reinterpret_cast<float*>(dynamic_shared);
  const int lane = threadIdx.x % 32;
  constexpr int kBarrier = 3, kThreads = 64;
  if (threadIdx.x < 32) {
    handed[lane] = values[lane];
    if (fault == kNotArrived) return;
    t2t::arrive_at(kBarrier, fault == kOtherCount ? 96 : kThreads);
  } else {
    if (fault != kNotWaited) t2t::wait_at(kBarrier, kThreads);
    values[lane] = -handed[lane];
  }
}

// `values` are 32 floats.
extern "C" __attribute__((visibility("default"))) const char* run_two_warps(float* values,
                                                                            int fault) {
  cudaLaunchConfig_t config;
  config.gridDim = dim3(1);
  config.blockDim = dim3(64);
  config.dynamicSmemBytes = 128;
  return cudaGetErrorString(cudaLaunchKernelEx(&config, hand_over, values, fault));
}
