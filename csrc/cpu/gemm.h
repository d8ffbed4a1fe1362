// A small matrix product: C (M×N) from A (M×K) and B (K×N), all in the cache of one core.
//
// A block of kRows × up to kPanel columns of C stays in registers during the loop over K: a row of
// B is loaded as vectors, and an element of A is broadcast. Both operands have strides, so that a
// transposed A (for gradients of weights) needs no copy. An element of an operand is a float or, if
// the CPU multiplies bfloat16, a pair of adjacent elements along K. Sums are always float.
#pragma once

#include "vec.h"

namespace t2t {
namespace {

#if T2T_ISA >= T2T_AVX512
constexpr int kRows = 6, kVectors = 4;
#else
constexpr int kRows = 6, kVectors = 2;
#endif
constexpr int64_t kPanel = kVectors * kLanes;

// Two bfloat16, the first along K in the lower half.
struct Pair {
  uint32_t words;
};

#if T2T_ISA == T2T_AVX512_BF16
template <typename T>
using Element = std::conditional_t<std::is_same_v<T, bf16>, Pair, float>;
#else
template <typename T>
using Element = float;
#endif

// The number of steps along K per element.
template <typename E>
constexpr int64_t kDepth = std::is_same_v<E, Pair> ? 2 : 1;

// Elements along K that are summed at a time. For K floats in segments of L, rounding errors grow
// as √(K (L + K/L)): a third of those of one long sum. For pairs, the rounding of the operands
// dominates.
template <typename E>
constexpr int64_t kSegment = std::is_same_v<E, Pair> ? 96 : 32;

// A(i, k) = p[i·row + k·depth]; for pairs k counts pairs.
template <typename E>
struct Left {
  const E* p;
  int64_t row, depth;
};

// B(k, j) = p[j / kPanel · panel + k·depth + j % kPanel].
template <typename E>
struct Right {
  const E* p;
  int64_t depth, panel;
};

template <int R, int V, typename E>
__attribute__((always_inline)) inline void block(int64_t steps, const E* a, int64_t a_row,
                                                 int64_t a_depth, const E* b, int64_t b_depth,
                                                 const float* start, int64_t start_row, float* c,
                                                 int64_t c_row) {
  Vec sums[R][V];
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) sums[i][j] = Vec{};
  }
  for (int64_t k = 0; k < steps; ++k) {
    if constexpr (std::is_same_v<E, Pair>) {
#if T2T_ISA == T2T_AVX512_BF16
      __m512bh row[V];
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j) {
        row[j] = bits<__m512bh>(_mm512_loadu_si512(&b[k * b_depth + j * kLanes]));
      }
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) {
        const auto left = bits<__m512bh>(_mm512_set1_epi32(a[i * a_row + k * a_depth].words));
#pragma GCC unroll 4
        for (int j = 0; j < V; ++j) {
          sums[i][j] = (Vec)_mm512_dpbf16_ps((__m512)sums[i][j], left, row[j]);
        }
      }
#endif
    } else {
      Vec row[V];
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j) row[j] = load(b + k * b_depth + j * kLanes);
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) {
        const Vec left = all(a[i * a_row + k * a_depth]);
#pragma GCC unroll 4
        for (int j = 0; j < V; ++j) sums[i][j] += left * row[j];
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) {
      if (start) sums[i][j] += load(start + i * start_row + j * kLanes);
      store(c + i * c_row + j * kLanes, sums[i][j]);
    }
  }
}

// Rows [0, rows) of one panel of V vectors.
template <int V, typename E>
__attribute__((noinline)) void panel(int64_t rows, int64_t steps, Left<E> a, const E* b,
                                     int64_t b_depth, const float* start, int64_t start_row,
                                     float* c, int64_t c_row) {
  int64_t i = 0;
  for (; i + kRows <= rows; i += kRows) {
    block<kRows, V, E>(steps, a.p + i * a.row, a.row, a.depth, b, b_depth,
                       start ? start + i * start_row : nullptr, start_row, c + i * c_row, c_row);
  }
  const E* p = a.p + i * a.row;
  start = start ? start + i * start_row : nullptr;
  c += i * c_row;
  switch (rows - i) {
    case 1: return block<1, V, E>(steps, p, a.row, a.depth, b, b_depth, start, start_row, c, c_row);
    case 2: return block<2, V, E>(steps, p, a.row, a.depth, b, b_depth, start, start_row, c, c_row);
    case 3: return block<3, V, E>(steps, p, a.row, a.depth, b, b_depth, start, start_row, c, c_row);
    case 4: return block<4, V, E>(steps, p, a.row, a.depth, b, b_depth, start, start_row, c, c_row);
    case 5: return block<5, V, E>(steps, p, a.row, a.depth, b, b_depth, start, start_row, c, c_row);
  }
}

// C = start + A·B. `columns` is a multiple of kLanes. `start` is C itself, a row to add to every
// row (start_row = 0), or null for zero. K is divided into segments, so that their part of a panel
// stays in the first-level cache.
template <typename E>
void product(int64_t rows, int64_t columns, int64_t depth, Left<E> a, Right<E> b,
             const float* start, int64_t start_row, float* c, int64_t c_row) {
  const int64_t all_steps = (depth + kDepth<E> - 1) / kDepth<E>;
  for (int64_t j = 0; j < columns; j += kPanel) {
    const int64_t vectors = least(kPanel, columns - j) / kLanes;
    const float* first = start ? start + j : nullptr;
    int64_t first_row = start_row;
    for (int64_t k = 0; k < all_steps || k == 0; k += kSegment<E>) {
      const int64_t steps = least(kSegment<E>, all_steps - k);
      const Left<E> left{a.p + k * a.depth, a.row, a.depth};
      const E* right = b.p + j / kPanel * b.panel + k * b.depth;
      switch (vectors) {
        case 1:
          panel<1, E>(rows, steps, left, right, b.depth, first, first_row, c + j, c_row);
          break;
        case 2:
          panel<2, E>(rows, steps, left, right, b.depth, first, first_row, c + j, c_row);
          break;
#if T2T_ISA >= T2T_AVX512
        case 3:
          panel<3, E>(rows, steps, left, right, b.depth, first, first_row, c + j, c_row);
          break;
        case 4:
          panel<4, E>(rows, steps, left, right, b.depth, first, first_row, c + j, c_row);
          break;
#endif
      }
      first = c + j;
      first_row = c_row;
    }
  }
}

// --- operands from tiles ---

// A tile is a row-major matrix of floats with one row per token; the row stride is a multiple of
// kLanes. As an operand of floats it is used in place. As pairs it is written to `buffer`, which
// has as many bytes as the tile (rows rounded up to an even number) and is otherwise unused.

// Rounds to bfloat16 in the low half of each lane. The instruction treats denormal numbers as zero,
// as the products do.
inline Words pair_half(Vec v) {
#if T2T_ISA == T2T_AVX512_BF16
  return (Words)_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)v));
#else
  return to_bf16(v);
#endif
}

// The tile as the operand A, with K along its rows.
template <typename E>
inline Left<E> left_of(const float* tile, int64_t row, int64_t rows, int64_t depth, void* buffer) {
  if constexpr (std::is_same_v<E, float>) {
    return {tile, row, 1};
  } else {
    auto* to = static_cast<Pair*>(buffer);
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t k = 0; k < round_up(depth, kLanes); k += kLanes) {
        const Vec v = load(tile + i * row + k);
        const Words words = pair_half(k + kLanes <= depth ? v : first_lanes(v, depth - k));
        const Shorts shorts = __builtin_convertvector(words, Shorts);
        std::memcpy(reinterpret_cast<bf16*>(to + i * row / 2) + k, &shorts, sizeof shorts);
      }
    }
    return {to, row / 2, 1};
  }
}

// Rows of the tile in pairs: the form of both operands if K is the token dimension.
template <typename E>
inline const E* paired(const float* tile, int64_t row, int64_t rows, void* buffer) {
  if constexpr (std::is_same_v<E, float>) {
    return tile;
  } else {
    auto* to = static_cast<Pair*>(buffer);
    for (int64_t i = 0; i < rows; i += 2) {
      for (int64_t j = 0; j < row; j += kLanes) {
        const Words low = pair_half(load(tile + i * row + j));
        const Words high = i + 1 < rows ? pair_half(load(tile + (i + 1) * row + j)) : Words{};
        const Words both = low | (high << 16);
        std::memcpy(to + i / 2 * row + j, &both, sizeof both);
      }
    }
    return to;
  }
}
template <typename E>
inline Left<E> left_of_pairs(const E* rows, int64_t row) {
  return {rows, 1, row};
}
template <typename E>
inline Right<E> right_of_pairs(const E* rows, int64_t row) {
  return {rows, row, kPanel};
}

// --- packed weights ---
// [panel][K][kPanel], zeros where a panel is not full.

template <typename E>
inline Right<E> packed(const void* p, int64_t depth) {
  const int64_t steps = (depth + kDepth<E> - 1) / kDepth<E>;
  return {static_cast<const E*>(p), kPanel, steps * kPanel};
}

}  // namespace
}  // namespace t2t
