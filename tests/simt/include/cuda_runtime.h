// Stands in for CUDA's header so that the sources in csrc/cuda compile as plain C++ and run on the
// CPU, thread by thread: see simt.cpp. Only what the sources use is here.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>

#define __host__
#define __device__
#define __global__
#define __launch_bounds__(...)
// A block runs alone, on one thread of the CPU: a thread-local variable is the block's own.
#define __shared__ thread_local
#define __syncthreads() simt::barrier(__LINE__)
#define __syncwarp() simt::together(simt::only_wait, nullptr)

using std::max;
using std::min;

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

extern dim3 threadIdx, blockIdx, blockDim, gridDim;

inline void __stwb(uint4* to, uint4 value) { *to = value; }
inline uint4 __ldca(const uint4* from) { return *from; }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned __int128>(a) * b >> 64;
}
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline unsigned __umulhi(unsigned a, unsigned b) { return uint64_t(a) * b >> 32; }

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorLaunchFailure = 719
};
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
using cudaStream_t = struct CUstream_st*;

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

namespace simt {

// Suspends the calling thread until all threads of its block wait at the same line.
void barrier(int line);

// A barrier that has a number: it opens when `threads` have come to it, of which some only arrive.
void arrive_at(size_t number, size_t threads);
void wait_at(size_t number, size_t threads);

// What the lanes of a warp, or warpgroup, do together; it is given the operands of all of them.
using Collective = void (*)(void* const* of_lanes);

// Suspends the calling thread until all lanes of its warp, or all 128 of its warpgroup, are here,
// and does it once for all.
void together(Collective collective, void* operands, size_t count = 32);
inline void only_wait(void* const*) {}

// Ends the launch.
void fail(const char* why);

// Fails the launch if 16 bytes cannot be accessed there.
void expect_aligned(const void* p);

// A copy of 16 bytes, or of zeros, that arrives when its group is waited for.
void copy_later(void* to, const void* from, bool inside);
void commit_copies();
void wait_for_copies(size_t groups_left);

// A product of the calling thread's part of a warpgroup: `multiply` is given the 32 sums when it is
// waited for; until then they are NaN.
void start_products();
void multiply_later(float* sums, std::function<void(float*)> multiply);
void commit_products();
void wait_for_products();

// The 32-bit address of a place in dynamic shared memory.
uint32_t shared_address(const void* p);

// Dynamic shared memory as products see it: as it was at the latest barrier to which every thread
// came after it had shown what it wrote.
void show_to_products();
const void* seen_by_products(uint32_t address);

// Lets `kernel` have more shared memory than it may without asking, as far as a GPU goes.
cudaError_t allow_shared(const void* kernel, size_t bytes);

// Runs `thread` of `kernel` for every thread of the grid, block after block.
cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel,
                   const std::function<void()>& thread);

}  // namespace simt

template <typename T>
T __shfl_xor_sync(unsigned, T value, int distance) {
  struct Operands {
    T given, taken;
    int distance;
  } own = {value, value, distance};
  simt::together(
      [](void* const* lanes) {
        for (int i = 0; i < 32; ++i) {
          auto* lane = static_cast<Operands*>(lanes[i]);
          lane->taken = static_cast<Operands*>(lanes[i ^ lane->distance])->given;
        }
      },
      &own);
  return own.taken;
}

template <typename T>
T __shfl_sync(unsigned, T value, int from) {
  struct Operands {
    T given, taken;
    int from;
  } own = {value, value, from};
  simt::together(
      [](void* const* lanes) {
        for (int i = 0; i < 32; ++i) {
          auto* lane = static_cast<Operands*>(lanes[i]);
          lane->taken = static_cast<Operands*>(lanes[lane->from])->given;
        }
      },
      &own);
  return own.taken;
}

inline bool __any_sync(unsigned, bool value) {
  struct Operands {
    bool given, taken;
  } own = {value, false};
  simt::together(
      [](void* const* lanes) {
        bool any = false;
        for (int i = 0; i < 32; ++i) any |= static_cast<Operands*>(lanes[i])->given;
        for (int i = 0; i < 32; ++i) static_cast<Operands*>(lanes[i])->taken = any;
      },
      &own);
  return own.taken;
}

template <typename... Params, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...),
                               const Arguments&... arguments) {
  return simt::launch(*config, reinterpret_cast<const void*>(kernel),
                      [&] { kernel(arguments...); });
}

template <typename... Params>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Params...), cudaFuncAttribute, int bytes) {
  return simt::allow_shared(reinterpret_cast<const void*>(kernel), bytes);
}

// The reason of the latest cudaErrorLaunchFailure is part of its text.
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetLastError();
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
