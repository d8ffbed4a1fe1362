// Instructions without a CUDA C++ function: matrix products, asynchronous copies, powers of two.
//
// Fragments have the layout of the PTX manual. With g = lane / 4 and t = lane % 4, a lane holds of
// A (16×16) rows g and g + 8, columns 2t, 2t + 1, 2t + 8, 2t + 9; of B (16×8) the same rows of
// column g; of the sums (16×8) rows g and g + 8, columns 2t and 2t + 1.
#pragma once

// Only Hopper has products by warpgroup: four warps, the first with an index divisible by four,
// with 16 rows each as above, and one right operand in shared memory.
namespace t2t {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
constexpr bool kHasWarpgroups = true;
#else
constexpr bool kHasWarpgroups = false;
#endif
}  // namespace t2t

#ifdef T2T_CUDA_ON_CPU
#include <ptx_on_cpu.h>
#else

#include <cuda_runtime.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <type_traits>

namespace t2t {

// d += A·B of elements of type T, accumulated in float32.
template <typename T>
__device__ void mma(float& d0, float& d1, float& d2, float& d3, const uint32_t (&a)[4], uint32_t b0,
                    uint32_t b1) {
  if constexpr (std::is_same_v<T, torch::headeronly::BFloat16>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d0), "+f"(d1), "+f"(d2), "+f"(d3)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    static_assert(std::is_same_v<T, torch::headeronly::Half>);
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d0), "+f"(d1), "+f"(d2), "+f"(d3)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

__device__ inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Four 8×8 matrices of 16-bit elements; lane i names row i % 8 of matrix i / 8, and receives of
// each matrix columns 2t and 2t + 1 of row g.
__device__ inline void load_matrices(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// The same of the transposed matrices.
__device__ inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// Starts to copy 16 bytes to shared memory; zeros, if not `inside`, and then nothing is read.
__device__ inline void copy_async(void* to, const void* from, bool inside) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(inside ? 16 : 0)
               : "memory");
}
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until the calling thread's copies have arrived, but for the latest `kGroups` groups of them.
template <int kGroups>
__device__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

// One of a block's barriers besides __syncthreads, numbered from 1 to 15. It opens when `threads`
// have come to it: those that only arrive, and those that wait.
__device__ inline void arrive_at(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
__device__ inline void wait_at(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// Prevents the compiler from moving uses of registers across a fence.
__device__ inline void settle(float& value) { asm volatile("" : "+f"(value)); }
__device__ inline void settle(uint32_t& value) { asm volatile("" : "+r"(value)); }
template <typename Element, int kCount>
__device__ void settle(Element (&values)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) settle(values[i]);
}

// A fence between uses of a product's registers by the warpgroup, which has written `registers`,
// and the product.
template <typename... Registers>
__device__ void start_products(Registers&... registers) {
  (settle(registers), ...);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

// ptxas 12.8 and 13.0 reuse the registers of a left operand that a loop does not change, without
// restoring them for the next iteration. Adding a zero that ptxas does not know changes the
// operand.
template <int kCount>
__device__ void keep_in_loop(uint32_t (&left)[kCount][4], int iteration) {
  uint32_t zero;
  asm volatile("shr.u32 %0, %1, 31;" : "=r"(zero) : "r"(iteration));
#pragma unroll
  for (int i = 0; i < 4 * kCount; ++i) {
    asm volatile("xor.b32 %0, %0, %1;" : "+r"(left[i / 4][i % 4]) : "r"(zero));
  }
}

template <int kGroups, int kCount>
__device__ void keep_in_loop(uint32_t (&left)[kGroups][kCount][4], int iteration) {
#pragma unroll
  for (int i = 0; i < kGroups; ++i) keep_in_loop(left[i], iteration);
}

// A warpgroup's sums of 16 rows a warp and 64 columns, in PTX and as operands.
#define T2T_SUMS(j) "+f"(d[j][0][0]), "+f"(d[j][0][1]), "+f"(d[j][1][0]), "+f"(d[j][1][1])
#define T2T_WGMMA(type, left, right, add, flags, ...)                                              \
  asm volatile(                                                                                    \
      "{ .reg .pred add; setp.ne.b32 add, " add                                                    \
      ", 0; wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type                             \
      " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,"   \
      "%24,%25,%26,%27,%28,%29,%30,%31}, " left ", " right ", add, 1, 1, " flags "; }"             \
      : T2T_SUMS(0), T2T_SUMS(1), T2T_SUMS(2), T2T_SUMS(3), T2T_SUMS(4), T2T_SUMS(5), T2T_SUMS(6), \
        T2T_SUMS(7)                                                                                \
      : __VA_ARGS__)
#define T2T_LEFT_IN_REGISTERS(type)                                                          \
  T2T_WGMMA(type, "{%32,%33,%34,%35}", "%36", "%37", "%38", "r"(a[0]), "r"(a[1]), "r"(a[2]), \
            "r"(a[3]), "l"(b), "r"(int(add)), "n"(int(kTransposed)))
#define T2T_LEFT_IN_MEMORY(type) \
  T2T_WGMMA(type, "%32", "%33", "%34", "0, 0", "l"(a), "l"(b), "r"(int(add)))

// Starts d += A·B, or d = A·B if not `add`, of 16 rows a warp and 64 columns; `b` describes the
// right operand (see operand_at), one of whose rows holds a column of B, or a row if kTransposed.
template <typename T, bool kTransposed>
__device__ void multiply_async(float (&d)[8][2][2], const uint32_t (&a)[4], uint64_t b, bool add) {
  if constexpr (std::is_same_v<T, torch::headeronly::BFloat16>) {
    T2T_LEFT_IN_REGISTERS("bf16");
  } else {
    static_assert(std::is_same_v<T, torch::headeronly::Half>);
    T2T_LEFT_IN_REGISTERS("f16");
  }
}

// The same for a left operand in shared memory with the layout of a right one: 64 rows of A.
template <typename T>
__device__ void multiply_async(float (&d)[8][2][2], uint64_t a, uint64_t b, bool add) {
  if constexpr (std::is_same_v<T, torch::headeronly::BFloat16>) {
    T2T_LEFT_IN_MEMORY("bf16");
  } else {
    static_assert(std::is_same_v<T, torch::headeronly::Half>);
    T2T_LEFT_IN_MEMORY("f16");
  }
}
#undef T2T_LEFT_IN_MEMORY
#undef T2T_LEFT_IN_REGISTERS
#undef T2T_WGMMA
#undef T2T_SUMS

__device__ inline void commit_products() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits for the committed products, to which `sums` belong.
template <typename... Sums>
__device__ void wait_for_products(Sums&... sums) {
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  (settle(sums), ...);
}

// Makes writes of the calling thread to shared memory visible to warpgroup products after the next
// barrier.
__device__ inline void show_to_products() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// 2^x within two units in the last place; 0 where exp2f would need further instructions, below
// 2^-126.
__device__ inline float fast_exp2(float x) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
}

// 1/x within one unit in the last place, for normal x whose reciprocal is normal.
__device__ inline float fast_reciprocal(float x) {
  float reciprocal;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(reciprocal) : "f"(x));
  return reciprocal;
}

// 1/√x within two units in the last place, for normal x.
__device__ inline float fast_rsqrt(float x) {
  float root;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(root) : "f"(x));
  return root;
}

// Two elements of a 16-bit type share a register, the first in its lower half.
template <typename T>
__device__ uint32_t round_pair(float first, float second) {
  uint32_t pair;
  if constexpr (std::is_same_v<T, torch::headeronly::BFloat16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  } else {
    static_assert(std::is_same_v<T, torch::headeronly::Half>);
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  }
  return pair;
}
template <typename T>
__device__ float2 elements_of(uint32_t pair) {
  float2 elements;
  if constexpr (std::is_same_v<T, torch::headeronly::BFloat16>) {
    elements.x = __uint_as_float(pair << 16);
    elements.y = __uint_as_float(pair & 0xFFFF0000u);
  } else {
    asm("{ .reg .f16 first, second; mov.b32 {first, second}, %2; cvt.f32.f16 %0, first; "
        "cvt.f32.f16 %1, second; }"
        : "=f"(elements.x), "=f"(elements.y)
        : "r"(pair));
  }
  return elements;
}

// Clamps both elements to -2^50 … 2^50, which float16 cannot exceed. NaN stays NaN.
template <typename T>
__device__ uint32_t limit_pair(uint32_t pair) {
  if constexpr (std::is_same_v<T, torch::headeronly::BFloat16>) {
    asm("min.NaN.bf16x2 %0, %0, %1;" : "+r"(pair) : "r"(0x58805880u));
    asm("max.NaN.bf16x2 %0, %0, %1;" : "+r"(pair) : "r"(0xD880D880u));
  }
  return pair;
}

}  // namespace t2t
#endif
