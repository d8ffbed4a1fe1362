// Products of half types whose left operand is in registers and whose right operand is packed in
// blocks of 32 × 32.
//
// A lane's sums are adjacent columns 8t … 8t + 7 of each group of 32, of rows g and g + 8. Once
// rounded, they are the left operand of the next product without any exchange between lanes,
// because the rows of the right operand have the same order. Rows of tokens are loaded and stored
// 16 bytes at a time.
#pragma once

#include <algorithm>

#include "geometry.h"
#include "launch.h"
#include "rows.cuh"

namespace t2t {

// 16 rows by 32·kGroups columns of 16-bit elements, in registers in the layout of `mma`: two
// fragments per group.
template <int kGroups>
struct Operand {
  uint32_t at[kGroups][2][4];

  // Elements 2i and 2i + 1 of a lane's eight of a group, of row g or g + 8.
  __device__ uint32_t& pair(int group, int half, int i) {
    return at[group][i / 2][i % 2 * 2 + half];
  }
  __device__ uint32_t pair(int group, int half, int i) const {
    return at[group][i / 2][i % 2 * 2 + half];
  }
  __device__ void clear() {
#pragma unroll
    for (int i = 0; i < 8 * kGroups; ++i) at[i / 8][i / 4 % 2][i % 4] = 0;
  }
};

// A lane's eight elements of a group, in memory order.
template <int kGroups>
__device__ void set_eight(Operand<kGroups>& operand, int group, int half, const uint4& eight) {
  operand.pair(group, half, 0) = eight.x;
  operand.pair(group, half, 1) = eight.y;
  operand.pair(group, half, 2) = eight.z;
  operand.pair(group, half, 3) = eight.w;
}
template <int kGroups>
__device__ uint4 eight_of(const Operand<kGroups>& operand, int group, int half) {
  return {operand.pair(group, half, 0), operand.pair(group, half, 1), operand.pair(group, half, 2),
          operand.pair(group, half, 3)};
}

template <typename T, int kGroups>
__device__ Operand<kGroups> rounded_operand(const Sums<kGroups>& sums) {
  Operand<kGroups> operand;
#pragma unroll
  for (int i = 0; i < 8 * kGroups; ++i) {
    const float* pair = &sums.at[i / 8][i / 4 % 2][i % 4 * 2];
    operand.pair(i / 8, i / 4 % 2, i % 4) = round_pair<T>(pair[0], pair[1]);
  }
  return operand;
}

// A block of a right operand: 32 rows by 32 columns. A lane's elements of eight columns are one
// 16-byte vector.
constexpr int kBlockVectors = 128;
constexpr int kBlockBytes = kBlockVectors * 16;

// The element (row, column) that element `e` of vector `i` of a block holds.
__device__ inline int block_row(int i, int e) { return i % 4 * 8 + e; }
__device__ inline int block_column(int i) {
  return i % kLanes / 4 / 2 * 8 + i / kLanes * 2 + i / 4 % 2;
}

// The inverse: the index of an element among a block's elements.
__device__ inline int block_place(int row, int column) {
  const int lane = (column / 8 * 2 + column % 2) * 4 + row / 8;
  return (column % 8 / 2 * kLanes + lane) * 8 + row % 8;
}

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
      pairs[j] =
          round_pair<T>(element(row + block_row(vector, 2 * j), column + block_column(vector)),
                        element(row + block_row(vector, 2 * j + 1), column + block_column(vector)));
    }
    to[i] = {pairs[0], pairs[1], pairs[2], pairs[3]};
  }
}

// The remainder of rounding a number to T. The products by both parts add up to the product by the
// number.
template <typename T>
__device__ float remainder_of(float x) {
  const float2 kept = elements_of<T>(round_pair<T>(x, 0.f));
  return x - kept.x;
}

// Four blocks are a tile of 64 rows by 64 columns. For warpgroup products, a tile has their layout
// (see operand_at), with a row per column of the operand. Rows and columns are ordered so that left
// operand and sums are in the lanes as above.
constexpr int kWideTileVectors = 4 * kBlockVectors;

// The sums of a warpgroup product in the layout of other products; if they have one group, both are
// added.
template <int kGroups>
__device__ void take_wide(const float (&from)[8][2][2], Sums<kGroups>& to) {
#pragma unroll
  for (int i = 0; i < 32; ++i) {
    const float sum = from[i / 16 * 4 + i % 8 / 2][i / 8 % 2][i % 2];
    float& total = to.at[i / 16 % kGroups][i / 8 % 2][i % 8];
    total = i < 16 * kGroups ? sum : total + sum;
  }
}

// A matrix of 64 by 64 elements in shared memory for products in both directions: rows of 128
// bytes, whose 16-byte parts have wgmma's swizzle (see operand_at). Rows and columns are ordered so
// that left operands and sums are in the lanes as above. It begins at a multiple of 1024 bytes.
constexpr int kMatrixVectors = 64 * 8;

// The place of row or column `i` of a matrix.
__device__ inline int dealt(int i) {
  const int in_group = i % kGroup;
  return i / kGroup * kGroup + in_group % 8 / 2 * 8 + in_group / 8 * 2 + i % 2;
}

// Stores columns 32·group + 8·t … of a row: a lane's eight of a left operand.
__device__ inline void store_in_matrix(uint4* matrix, int row, int group, int t,
                                       const uint32_t (&pairs)[4]) {
  const int at = dealt(row);
  auto* words = reinterpret_cast<uint32_t*>(matrix + at * 8);
#pragma unroll
  for (int i = 0; i < 4; ++i) words[((group * 4 + i) ^ (at % 8)) * 4 + t] = pairs[i];
}

// left·matrixᵀ, or left·matrix if kTransposed. With one group, both groups of 32 columns are added.
// On Hopper the four warps of a group multiply together.
template <typename T, bool kTransposed, int kGroups = 2>
__device__ Sums<kGroups> times_matrix(const Operand<2>& left, const uint4* matrix) {
  Sums<kGroups> sums;
  if constexpr (kHasWarpgroups) {
    float wide[8][2][2];
    Operand<2> operand = left;
    start_products(wide, operand.at);
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      const uint64_t right = operand_at(matrix + step * (kTransposed ? 16 * 8 : 2));
      multiply_async<T, kTransposed>(wide, operand.at[step / 2][step % 2], right, step > 0);
    }
    commit_products();
    wait_for_products(wide, operand.at);
    take_wide(wide, sums);
  } else {
    sums.clear();
    const int lane = lane_index(), row = lane % 8;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        // Two fragments: of a row's tile of eight columns and steps 2i and 2i + 1; of step i and
        // columns 16j ….
        uint32_t right[4];
        if constexpr (kTransposed) {
          load_matrices_transposed(right,
                                   matrix + (i * 16 + lane % 16) * 8 + ((j * 2 + lane / 16) ^ row));
        } else {
          load_matrices(right,
                        matrix + ((i % 2 * 4 + j) * 8 + row) * 8 + ((i / 2 * 4 + lane / 8) ^ row));
        }
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          const int step = kTransposed ? i : i / 2 * 2 + k;
          const int tile = kTransposed ? j * 2 + k : i % 2 * 4 + j;
          auto& d = sums.at[tile / 4 % kGroups];
          const int e = tile % 4 * 2;
          mma<T>(d[0][e], d[0][e + 1], d[1][e], d[1][e + 1], left.at[step / 2][step % 2],
                 right[2 * k], right[2 * k + 1]);
        }
      }
    }
  }
  return sums;
}

// Stores eight rows t·8 … of a group of 32 in a column of a tile: a lane's eight of a left operand.
__device__ inline void store_in_tile(uint4* tile, int group, int t, int column,
                                     const uint32_t (&pairs)[4]) {
  if constexpr (kHasWarpgroups) {
    store_in_matrix(tile, column, group, t, pairs);
  } else {
    uint4* block = tile + (group * 2 + column / kGroup) * kBlockVectors;
    block[block_place(t * 8, column % kGroup) / 8] = {pairs[0], pairs[1], pairs[2], pairs[3]};
  }
}

// sums (+)= left·tiles for one warpgroup: 64 rows, 64 columns, `kSteps` fragments of the left
// operand. Pairs of groups of rows are `stride` vectors apart. All 128 threads take part.
template <typename T, int kSteps, int kGroups>
__device__ void start_wide_products(float (&sums)[8][2][2], const Operand<kGroups>& left,
                                    const uint4* tiles, int stride, bool add) {
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    multiply_async<T, false>(sums, left.at[step / 2][step % 2],
                             operand_at(tiles + step / 4 * stride + step % 4 * 2), add || step > 0);
  }
}
// sums += left·block; `kSteps` of 1 takes the first fragment of the left operand only.
template <typename T, int kSteps = 2>
__device__ void multiply_block(float (&d)[2][8], const uint32_t (&left)[2][4], const uint4* block) {
#pragma unroll
  for (int tile = 0; tile < 4; ++tile) {
    const uint4 right = block[tile * kLanes + lane_index()];
    const int i = 2 * tile;
    mma<T>(d[0][i], d[0][i + 1], d[1][i], d[1][i + 1], left[0], right.x, right.y);
    if constexpr (kSteps == 2) {
      mma<T>(d[0][i], d[0][i + 1], d[1][i], d[1][i + 1], left[1], right.z, right.w);
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
    mma<T>(sums[0], unused[0], sums[1], unused[1], left[step], ones, ones);
  }
}

// Rows g and g + 8 of a tile of tokens first … of an image, 64 elements each; zeros beyond
// `tokens`. The rows must be vectors (see vector_rows).
template <typename T>
__device__ Operand<2> load_operand(const Rows& rows, int64_t image, int first, int tokens) {
  Operand<2> operand;
  operand.clear();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int token = first + sum_row(half);
    if (token >= tokens) continue;
#pragma unroll
    for (int group = 0; group < 2; ++group) {
      set_eight(operand, group, half,
                load_vector(static_cast<const T*>(rows.at) + image * rows.batch_stride +
                            token * rows.token_stride + sum_column(group)));
    }
  }
  return operand;
}

// Stores them to rows of global memory that begin at multiples of 16 bytes.
template <typename T>
__device__ void store_operand(const Operand<2>& operand, T* to, int64_t token_stride, int tokens) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = sum_row(i % 2);
    if (row < tokens) {
      store_vector(to + row * token_stride + sum_column(i / 2), eight_of(operand, i / 2, i % 2));
    }
  }
}

// A backward's block, whose warps multiply tiles of all its tokens together.
constexpr int kBlockWarps = 8;
constexpr int kBlockTokens = kBlockWarps * kRows;
constexpr int kTokenTileElements = kBlockTokens * kWidest;

// Tokens in shared memory, 64 elements each: rows of 128 bytes, whose eight 16-byte parts are
// swizzled so that neither stores of eight rows by a warp nor loads of a column of parts have bank
// conflicts.
template <typename T>
__device__ T* part_of(T* tile, int row, int part) {
  const int swizzle = row % 2 * 4 + row / 2 % 4;
  return tile + row * kWidest + (part ^ swizzle) * 8;
}
template <typename T, int kGroups>
__device__ void keep_operand(const Operand<kGroups>& operand, T* tile) {
#pragma unroll
  for (int i = 0; i < 2 * kGroups; ++i) {
    *reinterpret_cast<uint4*>(part_of(tile, sum_row(i % 2), i / 2 * 4 + lane_index() % 4)) =
        eight_of(operand, i / 2, i % 2);
  }
}

// Starts to load a warp's tile of tokens first … of an image; zeros beyond `tokens`.
template <typename T>
__device__ void copy_tile(const Rows& rows, int64_t image, int first, int tokens, T* tile) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = sum_row(i % 2), part = i / 2 * 4 + lane_index() % 4;
    const int token = first + row;
    copy_async(part_of(tile, row, part),
               static_cast<const T*>(rows.at) + image * rows.batch_stride +
                   token * rows.token_stride + part * 8,
               row < tokens - first);
  }
  commit_copies();
}

// Fragments of a tile's columns part·8 …: of 16 tokens from `token` on as the left operand of a
// product over tokens, or of 16 columns as its right operand.
template <typename T>
__device__ void load_left(uint32_t (&left)[4], T* tile, int token, int part) {
  const int lane = lane_index();
  load_matrices_transposed(left,
                           part_of(tile, token + lane % 8 + lane / 16 * 8, part + lane / 8 % 2));
}
template <typename T>
__device__ void load_right(uint32_t (&right)[4], T* tile, int token, int part) {
  load_matrices_transposed(right,
                           part_of(tile, token + lane_index() % 16, part + lane_index() / 16));
}

// sums += Aᵀ·B over `tokens` tokens, of columns that begin at the given parts.
template <int kTall, int kWide, typename T>
__device__ void multiply_tiles(OuterSums<kTall, kWide>& sums, T* a, int a_part, T* b, int b_part,
                               int tokens) {
#pragma unroll 1
  for (int token = 0; token < tokens; token += kRows) {
    uint32_t left[kTall][4];
#pragma unroll
    for (int i = 0; i < kTall; ++i) load_left(left[i], a, token, a_part + 2 * i);
#pragma unroll
    for (int j = 0; j < kWide; j += 2) {
      uint32_t right[4];
      load_right(right, b, token, b_part + j);
#pragma unroll
      for (int i = 0; i < kTall; ++i) {
        auto& d = sums.at[i][j];
        auto& e = sums.at[i][j + 1];
        mma<T>(d[0][0], d[0][1], d[1][0], d[1][1], left[i], right[0], right[1]);
        mma<T>(e[0][0], e[0][1], e[1][0], e[1][1], left[i], right[2], right[3]);
      }
    }
  }
}

// Adds the elements of `operand`.
template <typename T>
__device__ void add_operand(Sums<2>& sums, const Operand<2>& operand) {
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const float2 pair = elements_of<T>(operand.pair(i / 8, i / 4 % 2, i % 4));
    float* to = &sums.at[i / 8][i / 4 % 2][i % 4 * 2];
    to[0] += pair.x;
    to[1] += pair.y;
  }
}

template <typename T>
__device__ Sums<2> sums_of(const Operand<2>& operand) {
  Sums<2> sums;
  sums.clear();
  add_operand<T>(sums, operand);
  return sums;
}

// Tiles of 16 tokens of all images, assigned to the warps of the grid in turn.
struct TileLoop {
  int tokens, tiles;  // of an image
  int64_t images;

  // All warps of a block iterate together. A warp without a tile has one beyond the image's tokens.
  template <typename Work>
  __device__ void operator()(Work work) const {
    const int warps = blockDim.x / kLanes;
    const int64_t all = images * tiles;
#pragma unroll 1
    for (int64_t first = int64_t(blockIdx.x) * warps; first < all;
         first += int64_t(gridDim.x) * warps) {
      const int64_t tile = min(first + warp_index(), all - 1);
      const int64_t image = static_cast<uint32_t>(tile) / static_cast<uint32_t>(tiles);
      work(image,
           first + warp_index() < all ? static_cast<int>(tile - image * tiles) * kRows : tokens);
    }
  }
};
inline TileLoop make_tile_loop(int64_t images, int64_t tokens) {
  return {static_cast<int>(tokens), static_cast<int>(divide_up(tokens, kRows)), images};
}

// Blocks of `warps` warps, as many as are resident at a time with `per_multiprocessor` of them.
inline dim3 grid_of_tiles(const TileLoop& loop, int warps, int per_multiprocessor,
                          const DeviceScope& device) {
  const int64_t needed = divide_up(loop.images * loop.tiles, warps);
  return dim3(
      grid_size(std::min<int64_t>(needed, int64_t(per_multiprocessor) * device.multiprocessors())));
}

}  // namespace t2t
