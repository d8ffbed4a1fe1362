// Products of half types whose left operand is in registers and whose right operand is packed in
// blocks of 32 × 32.
//
// A lane's sums are adjacent columns 8t … 8t + 7 of each group of 32, of rows g and g + 8. Rounded,
// they are the left operand of the next product as they lie: the right operand's rows are dealt to
// the matrix unit in the same order. Rows of tokens are loaded and stored 16 bytes at a time.
#pragma once

#include "mma.cuh"

namespace t2t {

// 16 rows by 32·kGroups columns of 16-bit elements: [group][row g, row g + 8][pair of elements].
template <int kGroups>
struct Operand {
  uint32_t at[kGroups][2][4];

  __device__ void clear() {
#pragma unroll
    for (int i = 0; i < 8 * kGroups; ++i) at[i / 8][i / 4 % 2][i % 4] = 0;
  }
};

template <typename T, int kGroups>
__device__ Operand<kGroups> rounded_operand(const Sums<kGroups>& sums) {
  Operand<kGroups> operand;
#pragma unroll
  for (int i = 0; i < 8 * kGroups; ++i) {
    const float* pair = &sums.at[i / 8][i / 4 % 2][i % 4 * 2];
    operand.at[i / 8][i / 4 % 2][i % 4] = round_pair<T>(pair[0], pair[1]);
  }
  return operand;
}

// Elements 2i and 2i + 1 of what a lane has of one row of a group.
template <typename T, int kGroups>
__device__ float2 elements_at(const Operand<kGroups>& operand, int group, int half, int i) {
  return elements_of<T>(operand.at[group][half][i]);
}

// A block of a right operand: 32 rows by 32 columns. Each lane finds what it needs of eight columns
// in one 16-byte vector.
constexpr int kBlockVectors = 128;
constexpr int kBlockBytes = kBlockVectors * 16;

// The element (row, column) that element `e` of vector `i` of a block holds.
__device__ inline int block_row(int i, int e) { return i % 4 * 8 + e; }
__device__ inline int block_column(int i) { return i % kLanes / 4 / 2 * 8 + i / kLanes * 2 + i / 4 % 2; }

// Fills blocks, row groups outermost; `element(row, column)` is a float.
template <typename T, typename Element>
__device__ void pack_blocks(uint4* to, int row_groups, int column_groups, int thread, int threads,
                            Element element) {
  for (int i = thread; i < row_groups * column_groups * kBlockVectors; i += threads) {
    const int block = i / kBlockVectors, vector = i % kBlockVectors;
    const int row = block / column_groups * kGroup, column = block % column_groups * kGroup;
    uint32_t pairs[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      pairs[j] = round_pair<T>(
          element(row + block_row(vector, 2 * j), column + block_column(vector)),
          element(row + block_row(vector, 2 * j + 1), column + block_column(vector)));
    }
    to[i] = {pairs[0], pairs[1], pairs[2], pairs[3]};
  }
}

// What rounding to T leaves of a number, so that a product by both parts is one by the number.
template <typename T>
__device__ float remainder_of(float x) {
  const float2 kept = elements_of<T>(round_pair<T>(x, 0.f));
  return x - kept.x;
}

// sums += left·block; `kSteps` of 1 takes the first two pairs of the left operand only.
template <typename T, int kSteps = 2>
__device__ void multiply_block(float (&sums)[2][8], const uint32_t (&left)[2][4],
                               const uint4* block) {
#pragma unroll
  for (int tile = 0; tile < 4; ++tile) {
    const uint4 right = block[tile * kLanes + lane_index()];
    float(&d)[2][8] = sums;
    const uint32_t first[4] = {left[0][0], left[1][0], left[0][1], left[1][1]};
    mma<T>(d[0][2 * tile], d[0][2 * tile + 1], d[1][2 * tile], d[1][2 * tile + 1], first, right.x,
           right.y);
    if constexpr (kSteps == 2) {
      const uint32_t second[4] = {left[0][2], left[1][2], left[0][3], left[1][3]};
      mma<T>(d[0][2 * tile], d[0][2 * tile + 1], d[1][2 * tile], d[1][2 * tile + 1], second,
             right.z, right.w);
    }
  }
}

// sums += left·blocks of kRows groups of rows and kColumns of columns.
template <typename T, int kRowGroups, int kColumnGroups>
__device__ void multiply_blocks(Sums<kColumnGroups>& sums, const Operand<kRowGroups>& left,
                                const uint4* blocks) {
#pragma unroll
  for (int i = 0; i < kRowGroups; ++i) {
#pragma unroll
    for (int j = 0; j < kColumnGroups; ++j) {
      multiply_block<T>(sums.at[j], left.at[i], blocks + (i * kColumnGroups + j) * kBlockVectors);
    }
  }
}

// Sums of each row over a group of columns, of elements that may be rounded; each lane has those of
// its rows.
template <typename T>
__device__ void add_row_sums(float (&sums)[2], const uint32_t (&left)[2][4]) {
  const uint32_t ones = round_pair<T>(1.f, 1.f);
  float unused[2] = {};
#pragma unroll
  for (int step = 0; step < 2; ++step) {
    const uint32_t part[4] = {left[0][2 * step], left[1][2 * step], left[0][2 * step + 1],
                              left[1][2 * step + 1]};
    mma<T>(sums[0], unused[0], sums[1], unused[1], part, ones, ones);
  }
}

}  // namespace t2t
