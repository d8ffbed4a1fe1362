// Softmax attention on tiles of tokens, no T×T matrix in memory: one pass forward, two backward.
//
// With t = scale·q·k, m its maximum and Z = Σ_s e^(t_s − m) of a query: p_s = e^(t_s − m) / Z and
// y = Σ_s p_s v_s. Backward, with d = dy·y and g_s = p_s (dy·v_s − d): dv_s = Σ p_s dy,
// dk_s = scale Σ g_s q over the queries, dq = scale Σ_s g_s k_s over the keys.
// A warp owns the 16 rows that it writes, queries forward and for dq, keys for dk and dv, and its
// block walks over all other rows in tiles of shared memory. Every sum has one order; no atomics.
//
// Half types multiply on the matrix unit: own rows stay in registers as left operands, and so do
// the weights p and g, whose sums lie in the lanes where the next product wants its left operand.
// On Hopper four warps multiply together, so that a tile is read once for 64 rows instead of 16;
// each lane holds what it would hold on its warp's own.
#pragma once

#include <cmath>
#include <type_traits>

#include "launch.h"
#include "mma.cuh"
#include "rows.cuh"

namespace t2t {

constexpr int kTilesOfEight = kWidest / 8;

template <typename T>
constexpr bool kExact = std::is_same_v<T, float>;
// Whether warps multiply by group, and how many therefore stay together.
template <typename T>
constexpr bool kByWarpgroup = kHasWarpgroups && !kExact<T>;
template <typename T>
constexpr int kTogether = kByWarpgroup<T> ? 4 : 1;
// Rows of a tile, and those that the backward weighs at a time: what three blocks of a half type
// have registers for, but by warpgroup what a product is fast with, and registers for two. Of
// float32 two blocks fit in shared memory.
template <typename T>
constexpr int kTile = kExact<T> ? 32 : 64;
template <typename T>
constexpr int kSlice = kExact<T>         ? 32
                       : kByWarpgroup<T> ? 64
                                         : 16;
template <typename T>
constexpr int kBackwardBlocks = kExact<T> || kByWarpgroup<T> ? 2 : 3;
// From a row of shared memory to the next, of tokens and of float32's weights. Rows are padded, but
// wgmma wants them swizzled.
template <typename T>
constexpr int kPitch = kByWarpgroup<T> ? kWidest : padded_row<T>(kWidest);
constexpr int kWeightsPitch = padded_row<float>(kRows);

// Where an element lies in rows of tokens.
template <typename T>
__device__ int place(int row, int column) {
  return row * kPitch<T> + (kByWarpgroup<T> ? column ^ row % 8 * 8 : column);
}

// Forward, a block owns 128 rows of one matrix: 128 operations a byte that it reads from the L2
// cache, with 64 rows half of that. Backward it owns 64 of two.
constexpr int kForwardWarps = 8, kBackwardWarps = 4, kOwnRows = 128;

// Shared memory: two pairs of tiles that take turns; the block's own rows; float32's weights on the
// way to a product. Half types' own rows lie in the second pair until they are in registers.
template <typename T>
__device__ T* tile_at(int turn, int which) {
  return reinterpret_cast<T*>(dynamic_shared) + (2 * turn + which) * kTile<T> * kPitch<T>;
}
template <typename T>
__device__ T* own_rows() {
  static_assert(kExact<T> || kOwnRows == 2 * kTile<T>);
  return tile_at<T>(kExact<T> ? 2 : 1, 0);
}
__device__ inline float* weights_of_warp() {
  return own_rows<float>() + kOwnRows * kPitch<float> + warp_index() * kTile<float> * kWeightsPitch;
}
// The host's part does not know the device's pitch; no row takes more than a padded one.
template <typename T>
constexpr size_t shared_bytes(int warps) {
  const int elements = (4 * kTile<T> + (kExact<T> ? kOwnRows : 0)) * padded_row<T>(kWidest) +
                       (kExact<T> ? warps * kTile<T> * kWeightsPitch : 0);
  return elements * sizeof(T);
}

struct SoftmaxInputs {
  Rows queries, keys, values;
  int tokens, embed;
  float scale;

  __host__ __device__ int blocks_per_image(int warps) const {
    return (tokens + warps * kRows - 1) / (warps * kRows);
  }
};

// Which rows of which image a block and its warps own, and how it fetches rows of that image.
template <typename T, int kWarps>
struct Block {
  static constexpr int kThreads = kWarps * kLanes;
  static constexpr int kOwned = kWarps * kRows;
  int tokens, embed;
  int image, first_of_block, first;

  __device__ explicit Block(const SoftmaxInputs& in)
      : tokens(in.tokens),
        embed(in.embed),
        image(blockIdx.x / in.blocks_per_image(kWarps)),
        first_of_block(blockIdx.x % in.blocks_per_image(kWarps) * kOwned),
        first(first_of_block + warp_index() * kRows) {}

  // A row of the image among those of all images.
  __device__ int64_t row(int of_image) const { return int64_t(image) * tokens + of_image; }

  // Starts to bring kCount rows into shared memory, zero beyond `tokens` and `embed`. A thread
  // keeps to its column.
  template <int kCount>
  __device__ void load(const Rows& rows, int begin, T* to) const {
    const bool vectors = rows.vectors && embed % Vec<T>::size == 0;
    const int at_once = vectors ? Vec<T>::size : 1;
    const int column = threadIdx.x * at_once % kWidest;
    const int top = threadIdx.x * at_once / kWidest;
    const int count = column < embed ? tokens - begin - top : 0;
    const T* from = static_cast<const T*>(rows.at) + image * rows.batch_stride +
                    (begin + top) * rows.token_stride + column * rows.element_stride;
    if (vectors) {
      constexpr int kStep = kThreads * Vec<T>::size / kWidest;
      static_assert(kStep % 8 == 0, "a thread's rows are swizzled alike");
      to += place<T>(top, column);
#pragma unroll
      for (int i = 0; i < kCount; i += kStep) {
        copy_async(to + i * kPitch<T>, from, i < count);
        from += kStep * rows.token_stride;
      }
    } else {
      constexpr int kStep = kThreads / kWidest;
#pragma unroll 2
      for (int i = 0; i < kCount; i += kStep) {
        to[place<T>(top + i, column)] = i < count ? *from : static_cast<T>(0.f);
        from += kStep * rows.token_stride;
      }
    }
  }

  __device__ void load_own(const Rows& rows, int which) const {
    load<kOwned>(rows, first_of_block, own_rows<T>() + which * kOwned * kPitch<T>);
  }
  __device__ static const T* own_of_warp(int which) {
    return own_rows<T>() + (which * kOwned + warp_index() * kRows) * kPitch<T>;
  }

  __device__ void load_tiles(const Rows& left, const Rows& right, int begin, int turn) const {
    load<kTile<T>>(left, begin, tile_at<T>(turn, 0));
    load<kTile<T>>(right, begin, tile_at<T>(turn, 1));
  }

  __device__ static void wait_for_tiles() {
    commit_copies();
    wait_for_copies<0>();
    if constexpr (kByWarpgroup<T>) show_to_products();
    __syncthreads();
  }

  // `use(begin, turn)` for all tiles in order, the first of which is there; the next one is fetched
  // meanwhile. Warps that have no rows, nor one that they multiply with, only help to fetch.
  template <typename Load, typename Use>
  __device__ void walk(Load load, Use use) const {
    const int first_together = warp_index() / kTogether<T> * kTogether<T>;
    const bool has_rows = first_of_block + first_together * kRows < tokens;
#pragma unroll 1
    for (int begin = 0, turn = 0; begin < tokens; begin += kTile<T>, turn ^= 1) {
      wait_for_tiles();
      if (begin + kTile<T> < tokens) load(begin + kTile<T>, turn ^ 1);
      if (has_rows) use(begin, turn);
    }
    __syncthreads();
  }
};

// A warp's own rows as left operand: in registers, or for float32 where they are.
template <typename T>
struct Left {
  uint32_t at[kWidest / 16][4];

  __device__ explicit Left(const T* rows) {
#pragma unroll
    for (int k = 0; k < kWidest / 16; ++k) {
      load_matrices(at[k], rows + place<T>(lane_index() % 16, k * 16 + lane_index() / 16 * 8));
    }
  }
  // Must be called in each iteration of a loop that multiplies by these rows.
  __device__ void keep_in_loop(int iteration) {
    if constexpr (kByWarpgroup<T>) t2t::keep_in_loop(at, iteration);
  }
};
template <>
struct Left<float> {
  const float* rows;

  __device__ explicit Left(const float* rows) : rows(rows) {}
  __device__ void keep_in_loop(int) {}
};

// A·Bᵀ of a warp's own rows and rows of a tile.
template <int kWide, typename T>
__device__ OuterSums<1, kWide> multiply_rows(const Left<T>& left, const T* tile) {
  OuterSums<1, kWide> sums;
  if constexpr (kByWarpgroup<T>) {
    const uint64_t right = operand_at(tile);
    start_products();
#pragma unroll
    for (int k = 0; k < kWidest / 16; ++k) {
      multiply_async<T, false>(sums.at[0], left.at[k], right + k * kOperandColumns, k > 0);
    }
    commit_products();
    wait_for_products(sums.at[0]);
  } else if constexpr (kExact<T>) {
    sums.clear();
    const float* top = left.rows + sums.row(0, 0) * kPitch<T>;
    const float* bottom = left.rows + sums.row(0, 1) * kPitch<T>;
#pragma unroll 2
    for (int k = 0; k < kWidest; k += 4) {
      const auto upper = *reinterpret_cast<const Vec<float>*>(top + k);
      const auto lower = *reinterpret_cast<const Vec<float>*>(bottom + k);
#pragma unroll
      for (int i = 0; i < 2 * kWide; ++i) {
        const auto right = *reinterpret_cast<const Vec<float>*>(
            tile + (sums.column(i / 2) + i % 2) * kPitch<T> + k);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          sums.at[0][i / 2][0][i % 2] += upper.at[e] * right.at[e];
          sums.at[0][i / 2][1][i % 2] += lower.at[e] * right.at[e];
        }
      }
    }
  } else {
    sums.clear();
    const int lane = lane_index();
    const T* row = tile + place<T>(lane % 8 + lane / 16 * 8, lane / 8 % 2 * 8);
#pragma unroll
    for (int k = 0; k < kWidest / 16; ++k) {
#pragma unroll
      for (int j = 0; j < kWide; j += 2) {
        uint32_t right[4];
        load_matrices(right, row + j * 8 * kPitch<T> + k * 16);
        auto& d = sums.at[0][j];
        auto& e = sums.at[0][j + 1];
        mma<T>(d[0][0], d[0][1], d[1][0], d[1][1], left.at[k], right[0], right[1]);
        mma<T>(e[0][0], e[0][1], e[1][0], e[1][1], left.at[k], right[2], right[3]);
      }
    }
  }
  return sums;
}

// Two adjacent elements of an operand, rounded.
template <typename T>
__device__ uint32_t pair_of(const float (&pair)[2]) {
  struct alignas(4) {
    T at[2];
  } rounded = {{static_cast<T>(pair[0]), static_cast<T>(pair[1])}};
  return reinterpret_cast<const uint32_t&>(rounded);
}

// sums += A·B of weights and the rows of a tile that they weigh.
template <int kWide, typename T>
__device__ void add_weighted(OuterSums<1, kTilesOfEight>& sums, const OuterSums<1, kWide>& weights,
                             const T* tile) {
  if constexpr (kExact<T>) {
    float* transposed = weights_of_warp();
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 4 * kWide; ++i) {
      transposed[(weights.column(i / 4) + i % 2) * kWeightsPitch + weights.row(0, i / 2 % 2)] =
          weights.at[0][i / 4][i / 2 % 2][i % 2];
    }
    __syncwarp();
    multiply_tokens(sums, transposed, kWeightsPitch, tile, kPitch<T>, 8 * kWide);
  } else {
    uint32_t left[kWide / 2][4];
#pragma unroll
    for (int i = 0; i < 2 * kWide; ++i) {
      left[i / 4][i % 4] = pair_of<T>(weights.at[0][i / 2][i % 2]);
    }
    if constexpr (kByWarpgroup<T>) {
      const uint64_t right = operand_at(tile);
      start_products(sums.at[0], left);
#pragma unroll
      for (int k = 0; k < kWide / 2; ++k) {
        multiply_async<T, true>(sums.at[0], left[k], right + k * kOperandRows, true);
      }
      commit_products();
      wait_for_products(sums.at[0]);
    } else {
      const T* row = tile + place<T>(lane_index() % 16, lane_index() / 16 * 8);
#pragma unroll
      for (int k = 0; k < kWide / 2; ++k) {
#pragma unroll
        for (int j = 0; j < kTilesOfEight; j += 2) {
          uint32_t right[4];
          load_matrices_transposed(right, row + k * 16 * kPitch<T> + j * 8);
          auto& d = sums.at[0][j];
          auto& e = sums.at[0][j + 1];
          mma<T>(d[0][0], d[0][1], d[1][0], d[1][1], left[k], right[0], right[1]);
          mma<T>(e[0][0], e[0][1], e[1][0], e[1][1], left[k], right[2], right[3]);
        }
      }
    }
  }
}

// t. Kernels must agree on it to the last bit, so that e^0 is 1 where one key takes all: as a fused
// multiply-add with what follows it would not be rounded.
__device__ inline float score(float product, float scale) { return __fmul_rn(product, scale); }

__device__ inline float probability(float product, float scale, float maximum, float logarithm) {
  return fast_exp2((score(product, scale) - maximum) * kLog2E - logarithm);
}

// Sums of own rows to memory, through shared memory so that lanes store adjacent elements. The
// tiles must be out of use.
struct StagedRows {
  float* rows = reinterpret_cast<float*>(dynamic_shared) + warp_index() * kTileFloats;

  __device__ StagedRows(const OuterSums<1, kTilesOfEight>& sums, const float (&factor)[2]) {
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 2 * kTilesOfEight; ++i) {
      const float (&pair)[2] = sums.at[0][i / 2][i % 2];
      *reinterpret_cast<float2*>(rows + sums.row(0, i % 2) * kTilePitch + sums.column(i / 2)) = {
          pair[0] * factor[i % 2], pair[1] * factor[i % 2]};
    }
    __syncwarp();
  }

  // To the block's image in (images, tokens, embed), or on top of what is there; from a token to
  // the next are `stride` elements.
  template <typename T, typename BlockOfRows>
  __device__ void store(T* to, int stride, const BlockOfRows& block, bool on_top = false) const {
    const bool vectors = block.embed % Vec<T>::size == 0;
    to += block.row(block.first) * stride;
#pragma unroll 2
    for (int i = lane_index(); i < kRows * kTilesOfEight; i += kLanes) {
      const int row = i / kTilesOfEight, column = i % kTilesOfEight * 8;
      if (block.first + row >= block.tokens) break;
      float values[8];
      load_eight(values, rows + row * kTilePitch + column, 8, true);
      T* at = to + row * stride + column;
      if (on_top) {
        float below[8];
        load_eight(below, at, block.embed - column, vectors);
#pragma unroll
        for (int e = 0; e < 8; ++e) values[e] += below[e];
      }
      store_eight(at, values, block.embed - column, vectors);
    }
  }
};

// Attends for the block's queries: y of a warp's own ones is staged, their maxima and normalisers
// go to memory.
template <typename T>
__device__ StagedRows attend(const SoftmaxInputs& in, const Block<T, kForwardWarps>& block,
                             float* to_maximum, float* to_normalizer) {
  constexpr int kWide = kTile<T> / 8;
  const auto load = [&](int begin, int turn) { block.load_tiles(in.keys, in.values, begin, turn); };
  block.load_own(in.queries, 0);
  load(0, 0);
  block.wait_for_tiles();
  Left<T> queries(block.own_of_warp(0));

  OuterSums<1, kTilesOfEight> y;
  y.clear();
  float maximum[2] = {-INFINITY, -INFINITY}, normalizer[2] = {};
  block.walk(load, [&](int begin, int turn) {
    queries.keep_in_loop(begin);
    auto weights = multiply_rows<kWide>(queries, tile_at<T>(turn, 0));
    auto& w = weights.at[0];
#pragma unroll
    for (int i = 0; i < 4 * kWide; ++i) {
      float& t = w[i / 4][i / 2 % 2][i % 2];
      t = score(t, in.scale);
    }
    if (block.tokens - begin < kTile<T>) {
#pragma unroll
      for (int i = 0; i < 4 * kWide; ++i) {
        const int key = begin + weights.column(i / 4) + i % 2;
        if (key >= block.tokens) w[i / 4][i / 2 % 2][i % 2] = -INFINITY;
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float larger = maximum[half];
#pragma unroll
      for (int i = 0; i < 2 * kWide; ++i) larger = fmaxf(larger, w[i / 2][half][i % 2]);
      larger = largest_of_row(larger);
      // While all scores are −infinity, all weights are zero.
      const float shift = larger == -INFINITY ? 0.f : larger;
      const float shrink = fast_exp2((maximum[half] - shift) * kLog2E);
      maximum[half] = larger;
      normalizer[half] *= shrink;
#pragma unroll
      for (int i = 0; i < 2 * kTilesOfEight; ++i) y.at[0][i / 2][half][i % 2] *= shrink;
#pragma unroll
      for (int i = 0; i < 2 * kWide; ++i) {
        float& t = w[i / 2][half][i % 2];
        t = fast_exp2((t - shift) * kLog2E);
        normalizer[half] += t;
      }
    }
    add_weighted(y, weights, tile_at<T>(turn, 1));
  });

  float inverse[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    normalizer[half] = sum_of_row(normalizer[half]);
    inverse[half] = 1.f / normalizer[half];
    const int row = y.row(0, half);
    if (lane_index() % 4 == 0 && block.first + row < block.tokens) {
      to_maximum[block.row(block.first + row)] = maximum[half];
      to_normalizer[block.row(block.first + row)] = normalizer[half];
    }
  }
  return StagedRows(y, inverse);
}

struct SoftmaxBackwardParams {
  SoftmaxInputs in;
  Rows grads;
  const float *attended, *maximum, *normalizer;
  float *delta, *logarithm;  // d and log₂ Z of each query, for the keys
  void *grad_queries, *grad_keys, *grad_values;
  int grad_stride;  // of the three, from a token to the next
  bool on_top;      // the gradient of the values is added to what is there
};

template <typename T>
__global__ void __launch_bounds__(kBackwardWarps* kLanes, kBackwardBlocks<T>)
    softmax_queries_backward_kernel(const SoftmaxBackwardParams p) {
  constexpr int kWide = kSlice<T> / 8;
  const Block<T, kBackwardWarps> block(p.in);
  const auto load = [&](int begin, int turn) {
    block.load_tiles(p.in.keys, p.in.values, begin, turn);
  };
  block.load_own(p.in.queries, 0);
  block.load_own(p.grads, 1);
  load(0, 0);
  block.wait_for_tiles();
  Left<T> queries(block.own_of_warp(0)), grads(block.own_of_warp(1));

  OuterSums<1, kTilesOfEight> grad_queries;
  grad_queries.clear();
  float delta[2] = {}, maximum[2] = {}, logarithm[2] = {};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = grad_queries.row(0, half);
    const bool inside = block.first + row < block.tokens;
    if (inside) {
      const float* attended = p.attended + block.row(block.first + row) * block.embed;
      for (int e = lane_index() % 4; e < block.embed; e += 4) {
        delta[half] += static_cast<float>(block.own_of_warp(1)[place<T>(row, e)]) * attended[e];
      }
      maximum[half] = p.maximum[block.row(block.first + row)];
      logarithm[half] = log2f(p.normalizer[block.row(block.first + row)]);
    }
    delta[half] = sum_of_row(delta[half]);
    if (inside && lane_index() % 4 == 0) {
      p.delta[block.row(block.first + row)] = delta[half];
      p.logarithm[block.row(block.first + row)] = logarithm[half];
    }
  }

  block.walk(load, [&](int begin, int turn) {
    queries.keep_in_loop(begin);
    grads.keep_in_loop(begin);
#pragma unroll 1
    for (int slice = 0; slice < kTile<T>; slice += kSlice<T>) {
      const T* keys = tile_at<T>(turn, 0) + slice * kPitch<T>;
      const T* values = tile_at<T>(turn, 1) + slice * kPitch<T>;
      auto weights = multiply_rows<kWide>(queries, keys);
      const auto of_weights = multiply_rows<kWide>(grads, values);
#pragma unroll
      for (int i = 0; i < 4 * kWide; ++i) {
        const int half = i / 2 % 2, key = begin + slice + weights.column(i / 4) + i % 2;
        float& weight = weights.at[0][i / 4][half][i % 2];
        weight = probability(weight, p.in.scale, maximum[half], logarithm[half]) *
                 (of_weights.at[0][i / 4][half][i % 2] - delta[half]);
        // Where there is no key, the score 0 may be far above the maximum.
        if (key >= block.tokens) weight = 0.f;
      }
      add_weighted(grad_queries, weights, keys);
    }
  });
  StagedRows(grad_queries, {p.in.scale, p.in.scale})
      .store(static_cast<T*>(p.grad_queries), p.grad_stride, block);
}

template <typename T>
__global__ void __launch_bounds__(kBackwardWarps* kLanes, kBackwardBlocks<T>)
    softmax_keys_backward_kernel(const SoftmaxBackwardParams p) {
  constexpr int kWide = kSlice<T> / 8;
  // Of a tile's queries.
  __shared__ float maximum[2][kTile<T>], logarithm[2][kTile<T>], delta[2][kTile<T>];
  const Block<T, kBackwardWarps> block(p.in);
  const auto load = [&](int begin, int turn) {
    block.load_tiles(p.in.queries, p.grads, begin, turn);
    const int i = threadIdx.x;
    if (i < kTile<T>) {
      const int64_t query = block.row(begin + i);
      const bool inside = begin + i < block.tokens;
      // Whose maximum is infinite attends to nothing.
      maximum[turn][i] = inside ? p.maximum[query] : INFINITY;
      logarithm[turn][i] = inside ? p.logarithm[query] : 0.f;
      delta[turn][i] = inside ? p.delta[query] : 0.f;
    }
  };
  block.load_own(p.in.keys, 0);
  block.load_own(p.in.values, 1);
  load(0, 0);
  block.wait_for_tiles();
  Left<T> keys(block.own_of_warp(0)), values(block.own_of_warp(1));

  OuterSums<1, kTilesOfEight> grad_keys, grad_values;
  grad_keys.clear();
  grad_values.clear();
  block.walk(load, [&](int begin, int turn) {
    keys.keep_in_loop(begin);
    values.keep_in_loop(begin);
#pragma unroll 1
    for (int slice = 0; slice < kTile<T>; slice += kSlice<T>) {
      const T* queries = tile_at<T>(turn, 0) + slice * kPitch<T>;
      const T* grads = tile_at<T>(turn, 1) + slice * kPitch<T>;
      auto weights = multiply_rows<kWide>(keys, queries);
#pragma unroll
      for (int i = 0; i < 4 * kWide; ++i) {
        const int query = slice + weights.column(i / 4) + i % 2;
        float& weight = weights.at[0][i / 4][i / 2 % 2][i % 2];
        weight = probability(weight, p.in.scale, maximum[turn][query], logarithm[turn][query]);
      }
      add_weighted(grad_values, weights, grads);
      const auto of_weights = multiply_rows<kWide>(values, grads);
#pragma unroll
      for (int i = 0; i < 4 * kWide; ++i) {
        const int query = slice + weights.column(i / 4) + i % 2;
        weights.at[0][i / 4][i / 2 % 2][i % 2] *=
            of_weights.at[0][i / 4][i / 2 % 2][i % 2] - delta[turn][query];
      }
      add_weighted(grad_keys, weights, queries);
    }
  });
  StagedRows(grad_keys, {p.in.scale, p.in.scale})
      .store(static_cast<T*>(p.grad_keys), p.grad_stride, block);
  StagedRows(grad_values, {1.f, 1.f})
      .store(static_cast<T*>(p.grad_values), p.grad_stride, block, p.on_top);
}

template <typename T>
SoftmaxInputs softmax_inputs(const torch::stable::Tensor& q, const torch::stable::Tensor& k,
                             const torch::stable::Tensor& v, double scale) {
  return {rows_of<T>(q),
          rows_of<T>(k),
          rows_of<T>(v),
          static_cast<int>(v.size(1)),
          static_cast<int>(v.size(2)),
          static_cast<float>(scale)};
}

template <typename T, int kWarpsOfBlock, typename Params>
void launch_softmax(const DeviceScope& device, const char* name, void (*kernel)(Params),
                    int64_t images, const Params& params, size_t further_bytes = 0) {
  const int64_t blocks = images * params.in.blocks_per_image(kWarpsOfBlock);
  device.launch(name, kernel, dim3(static_cast<unsigned>(blocks)), kWarpsOfBlock * kLanes,
                shared_bytes<T>(kWarpsOfBlock) + further_bytes, params);
}

template <typename T>
void launch_softmax_backward(const DeviceScope& device, int64_t images,
                             const SoftmaxBackwardParams& params) {
  launch_softmax<T, kBackwardWarps>(device, "softmax_queries_backward",
                                    softmax_queries_backward_kernel<T>, images, params);
  launch_softmax<T, kBackwardWarps>(device, "softmax_keys_backward",
                                    softmax_keys_backward_kernel<T>, images, params);
}

}  // namespace t2t
