// Device, stream and launches of all operators here.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "checks.h"

// The tests also compile these sources as plain C++. The operators then accept CPU tensors, and the
// tests' own cuda_runtime.h runs the kernels' threads on the CPU.
#ifdef T2T_CUDA_ON_CPU
#define T2T_DISPATCH_KEY CPU
#else
#define T2T_DISPATCH_KEY CUDA
#endif

namespace t2t {

// A count of blocks as the first dimension of a grid.
inline unsigned grid_size(int64_t blocks) {
  T2T_CHECK(blocks <= 0x7FFFFFFF, "the batch is too large: got ", blocks,
            " blocks of threads, expected at most ", 0x7FFFFFFF, "; split the batch");
  return static_cast<unsigned>(blocks);
}

// Sets the current device to the tensor's device during its lifetime, and gets its current stream.
class DeviceScope {
 public:
#ifdef T2T_CUDA_ON_CPU
  explicit DeviceScope(const torch::stable::Tensor&) {}
#else
  explicit DeviceScope(const torch::stable::Tensor& tensor)
      : device_(tensor.get_device_index()), guard_(device_) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
#endif

  int multiprocessors() const {
    int count = 0;
    check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device_),
          "device attributes");
    return count;
  }

  // Several times as many blocks as are resident, so that the last ones end close together.
  int enough_blocks() const { return 32 * multiprocessors(); }

  // Launches without waiting; throws if the launch itself was refused.
  template <typename Params>
  void launch(const char* name, void (*kernel)(Params), dim3 grid, int threads, size_t shared_bytes,
              const Params& params) const {
    T2T_CHECK(grid.y <= kMostRowsOfBlocks && grid.z <= kMostRowsOfBlocks, name,
              ": the batch is too large: got a grid of ", grid.x, "x", grid.y, "x", grid.z,
              " blocks, expected at most ", kMostRowsOfBlocks,
              " in the second and third dimension; split the batch");
    // More than a block may use without opting in, including static shared memory.
    if (shared_bytes + kMostStaticSharedBytes > 48 * 1024) {
      check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(shared_bytes)),
            name);
    }
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream_;
    check(cudaLaunchKernelEx(&config, kernel, params), name);
  }

 private:
  // The limit of a grid's second and third dimension.
  static constexpr unsigned kMostRowsOfBlocks = 65535;

  // No kernel here uses more; the tests compare this with ptxas's report.
  static constexpr size_t kMostStaticSharedBytes = 2048;

  static void check(cudaError_t error, const char* what) {
    if (error == cudaSuccess) return;
    // Clear the error, so that the next caller does not report it.
    cudaGetLastError();
    T2T_CHECK(false, what, ": ", cudaGetErrorString(error));
  }

  int device_ = 0;
#ifndef T2T_CUDA_ON_CPU
  torch::stable::accelerator::DeviceGuard guard_;
#endif
  cudaStream_t stream_ = nullptr;
};

// Calls `run` with a zero of the half type that the kernels have for a tensor's elements.
template <typename Run>
void with_half_type(const char* name, const char* argument, torch::headeronly::ScalarType type,
                    Run&& run) {
  using torch::headeronly::ScalarType;
  switch (type) {
    case ScalarType::BFloat16: return run(torch::headeronly::BFloat16());
    case ScalarType::Half: return run(torch::headeronly::Half());
    default:
      T2T_CHECK(false, name, ": ", argument, ": got ", dtype_name(type),
                ", expected bfloat16 or float16");
  }
}

}  // namespace t2t
