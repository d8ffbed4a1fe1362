// What csrc/cuda/ptx.cuh has for a GPU, computed from the operands of a warp's 32 lanes.
#pragma once

#include <cuda_runtime.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <array>
#include <cstring>

namespace t2t {

template <typename T>
float element_of(uint32_t pair, int i) {
  const auto bits = static_cast<uint16_t>(pair >> (16 * i));
  T value;
  std::memcpy(&value, &bits, 2);
  return static_cast<float>(value);
}

template <typename T>
void mma(float& d0, float& d1, float& d2, float& d3, const uint32_t (&a)[4], uint32_t b0,
         uint32_t b1) {
  struct Operands {
    float* d[4];
    const uint32_t* a;
    uint32_t b[2];
  } own = {{&d0, &d1, &d2, &d3}, a, {b0, b1}};
  simt::together(
      [](void* const* lanes) {
        float left[16][16], right[16][8];
        for (int lane = 0; lane < 32; ++lane) {
          const auto& o = *static_cast<const Operands*>(lanes[lane]);
          const int g = lane / 4, t = lane % 4;
          for (int i = 0; i < 2; ++i) {
            left[g][2 * t + i] = element_of<T>(o.a[0], i);
            left[g + 8][2 * t + i] = element_of<T>(o.a[1], i);
            left[g][2 * t + 8 + i] = element_of<T>(o.a[2], i);
            left[g + 8][2 * t + 8 + i] = element_of<T>(o.a[3], i);
            right[2 * t + i][g] = element_of<T>(o.b[0], i);
            right[2 * t + 8 + i][g] = element_of<T>(o.b[1], i);
          }
        }
        float sums[16][8] = {};
        for (int i = 0; i < 16; ++i) {
          for (int k = 0; k < 16; ++k) {
            for (int j = 0; j < 8; ++j) sums[i][j] += left[i][k] * right[k][j];
          }
        }
        for (int lane = 0; lane < 32; ++lane) {
          const auto& o = *static_cast<const Operands*>(lanes[lane]);
          const int g = lane / 4, t = lane % 4;
          *o.d[0] += sums[g][2 * t];
          *o.d[1] += sums[g][2 * t + 1];
          *o.d[2] += sums[g + 8][2 * t];
          *o.d[3] += sums[g + 8][2 * t + 1];
        }
      },
      &own);
}

inline uint32_t shared_address(const void* p) { return simt::shared_address(p); }

template <bool kTransposed>
void load_matrices_of_warp(uint32_t (&r)[4], const void* row) {
  struct Operands {
    uint32_t* r;
    const void* row;
  } own = {r, row};
  simt::expect_aligned(row);
  simt::together(
      [](void* const* lanes) {
        const auto of = [&](int lane) -> const Operands& {
          return *static_cast<const Operands*>(lanes[lane]);
        };
        for (int lane = 0; lane < 32; ++lane) {
          for (int matrix = 0; matrix < 4; ++matrix) {
            uint16_t pair[2];
            for (int i = 0; i < 2; ++i) {
              const int row = kTransposed ? lane % 4 * 2 + i : lane / 4;
              const int column = kTransposed ? lane / 4 : lane % 4 * 2 + i;
              pair[i] = static_cast<const uint16_t*>(of(8 * matrix + row).row)[column];
            }
            of(lane).r[matrix] = pair[0] | uint32_t(pair[1]) << 16;
          }
        }
      },
      &own);
}

inline void load_matrices(uint32_t (&r)[4], const void* row) {
  load_matrices_of_warp<false>(r, row);
}
inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  load_matrices_of_warp<true>(r, row);
}

inline void copy_async(void* to, const void* from, bool inside) {
  simt::expect_aligned(to);
  simt::expect_aligned(from);
  simt::copy_later(to, from, inside);
}
inline void commit_copies() { simt::commit_copies(); }
template <int kGroups>
void wait_for_copies() {
  simt::wait_for_copies(kGroups);
}

inline void arrive_at(int barrier, int threads) { simt::arrive_at(barrier, threads); }
inline void wait_at(int barrier, int threads) { simt::wait_at(barrier, threads); }

inline void show_to_products() { simt::show_to_products(); }

// Element (k, n) of a right operand in the canonical layout with rows of 128 bytes: 64 elements
// along k, or along n if transposed, eight such rows, and so on across them. A left operand's
// element (n, k) lies in the same place.
template <typename T>
float element_in_memory(uint64_t descriptor, bool transposed, uint32_t k, uint32_t n) {
  const auto bytes = [&](int bit) { return uint32_t(descriptor >> bit & 0x3FFF) * 16; };
  const uint32_t start = bytes(0), leading = bytes(16), stride = bytes(32);
  if (descriptor >> 62 != 1) simt::fail("a matrix is not swizzled over 128 bytes");
  if (descriptor >> 49 & 7 || start >> 7 & 7) {
    simt::fail("a matrix does not begin where its swizzle's pattern does");
  }
  const uint32_t along = transposed ? n : k, across = transposed ? k : n;
  const uint32_t address =
      start + along % 64 * 2 + along / 64 * leading + across % 8 * 128 + across / 8 * stride;
  const uint32_t swizzled = address ^ (address >> 7 & 7) << 4;
  uint16_t bits;
  std::memcpy(&bits, simt::seen_by_products(swizzled), 2);
  return element_of<T>(bits, 0);
}

template <int kCount>
void keep_in_loop(uint32_t (&)[kCount][4], int) {}
template <int kGroups, int kCount>
void keep_in_loop(uint32_t (&)[kGroups][kCount][4], int) {}
template <typename... Registers>
void start_products(Registers&...) {
  simt::start_products();
}
// Starts d (+)= A·B, of which `left(half, k)` gives A's elements of the thread's sums.
template <typename T, bool kTransposed, typename Left>
void multiply_from(float (&d)[8][2][2], Left left, uint64_t b, bool add) {
  const int first_column = threadIdx.x % 4 * 2;
  simt::multiply_later(&d[0][0][0], [=](float* sums) {
    float rows[2][16];
    for (int i = 0; i < 32; ++i) rows[i / 16][i % 16] = left(i / 16, i % 16);
    for (int i = 0; i < 16; ++i) {
      float sum[2] = {};
      for (int k = 0; k < 16; ++k) {
        const int column = i / 2 * 8 + first_column + i % 2;
        const float right = element_in_memory<T>(b, kTransposed, k, column);
        for (int half = 0; half < 2; ++half) sum[half] += rows[half][k] * right;
      }
      for (int half = 0; half < 2; ++half) {
        float& total = sums[i / 2 * 4 + half * 2 + i % 2];
        total = add ? total + sum[half] : sum[half];
      }
    }
  });
}
template <typename T, bool kTransposed>
void multiply_async(float (&d)[8][2][2], const uint32_t (&a)[4], uint64_t b, bool add) {
  struct Operands {
    const uint32_t* a;
    uint64_t b;
    bool add;
    std::array<float, 32> rows;  // of the left operand, 16 elements of each of the thread's sums'
  } own = {a, b, add, {}};
  simt::together(
      [](void* const* threads) {
        const auto of = [&](int i) -> Operands& { return *static_cast<Operands*>(threads[i]); };
        for (int i = 0; i < 128; ++i) {
          if (of(i).b != of(0).b || of(i).add != of(0).add) {
            simt::fail("warps of a group multiply by different matrices");
          }
          for (int k = 0; k < 32; ++k) {
            const auto& from = of(i / 4 * 4 + k / 2 % 4);
            of(i).rows[k] = element_of<T>(from.a[k / 8 % 2 * 2 + k / 16], k % 2);
          }
        }
      },
      &own, 128);
  multiply_from<T, kTransposed>(
      d, [rows = own.rows](int half, int k) { return rows[half * 16 + k]; }, b, add);
}
template <typename T>
void multiply_async(float (&d)[8][2][2], uint64_t a, uint64_t b, bool add) {
  struct Operands {
    uint64_t a, b;
    bool add;
  } own = {a, b, add};
  simt::together(
      [](void* const* threads) {
        const auto of = [&](int i) { return *static_cast<const Operands*>(threads[i]); };
        for (int i = 0; i < 128; ++i) {
          if (of(i).a != of(0).a || of(i).b != of(0).b || of(i).add != of(0).add) {
            simt::fail("warps of a group multiply different matrices");
          }
        }
      },
      &own, 128);
  const int first_row = threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
  multiply_from<T, false>(
      d, [=](int half, int k) { return element_in_memory<T>(a, false, k, first_row + 8 * half); },
      b, add);
}
inline void commit_products() { simt::commit_products(); }
template <typename... Sums>
void wait_for_products(Sums&...) {
  simt::wait_for_products();
}

inline float fast_exp2(float x) { return std::exp2(x); }
inline float fast_reciprocal(float x) { return 1 / x; }
inline float fast_rsqrt(float x) { return 1 / std::sqrt(x); }

template <typename T>
uint32_t round_pair(float first, float second) {
  const T elements[2] = {static_cast<T>(first), static_cast<T>(second)};
  uint32_t pair;
  std::memcpy(&pair, elements, 4);
  return pair;
}
template <typename T>
float2 elements_of(uint32_t pair) {
  return {element_of<T>(pair, 0), element_of<T>(pair, 1)};
}
template <typename T>
uint32_t limit_pair(uint32_t pair) {
  const auto limited = [&](int i) {
    const float x = element_of<T>(pair, i);
    return x > 0x1p50f ? 0x1p50f : x < -0x1p50f ? -0x1p50f : x;
  };
  return round_pair<T>(limited(0), limited(1));
}

}  // namespace t2t
