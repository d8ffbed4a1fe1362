// Softmax attention of half types and 64 elements on tiles of 64 tokens, without a T×T matrix in
// memory: one pass in the forward, two in the backward.
//
// With t = scale·q·k, m its maximum and Z = Σ_s e^(t_s − m) of a query: p_s = e^(t_s − m) / Z and
// y = Σ_s p_s v_s. Backward, with d = dy·y and g_s = p_s (dy·v_s − d): dv_s = Σ p_s dy,
// dk_s = scale Σ g_s q over the queries, dq = scale Σ_s g_s k_s over the keys.
// A warp owns the 16 rows that it writes, queries forward and for dq, keys for dk and dv, and its
// block walks over all other rows in tiles of shared memory. Every sum has one order; no atomics.
//
// The weights p and g stay in registers: the sums are in the lanes in which the next product needs
// its left operand. Powers have base two: p_s = 2^(q·k_s·c − l) with c = scale·log₂e and, for each
// query, l = m·log₂e + log₂Z, one fused multiply-add.
// On Hopper four warps multiply together, by own rows and tiles in shared memory; elsewhere a
// warp's own rows are in registers. Each lane holds the same sums.
#pragma once

#include <cmath>

#include "launch.h"
#include "mma.cuh"
#include "rows.cuh"

namespace t2t {

constexpr int kTile = 64;
// Warps that multiply together, and whose own rows are a tile, too.
constexpr int kTogether = kTile / kRows;
constexpr int kGroupThreads = kTogether * kLanes;
// Columns of scores that the backward processes at a time; limited by registers on GPUs other than
// Hopper.
constexpr int kSlice = kHasWarpgroups ? kTile : 16;
constexpr int kForwardWarps = 8, kQueriesWarps = 8, kKeysWarps = 12;
// Pairs of tiles in shared memory: one in use, the next one, and one that is being fetched.
constexpr int kStages = 3;
// Resident blocks per multiprocessor: if a warp keeps its rows in registers, two blocks do not fit.
constexpr int kForwardBlocks = kHasWarpgroups ? 2 : 1;

// Sums of a warp's 16 rows and 64 columns, and scores of as many as a slice has.
using RowSums = OuterSums<1, kWidest / 8>;
using SliceScores = OuterSums<1, kSlice / 8>;

// Of warps that multiply together. Read from one lane, so that the compiler knows it to be the same
// in all lanes of a warp.
__device__ inline int group_index() { return __shfl_sync(kAllLanes, warp_index() / kTogether, 0); }

// The place of an element in rows of tokens, in wgmma's layout (see operand_at).
__device__ inline int place(int row, int column) { return row * kWidest + (column ^ row % 8 * 8); }

struct SoftmaxInputs {
  Rows queries, keys, values;
  int tokens;
  float scale;

  __host__ __device__ int blocks_per_image(int warps) const {
    return (tokens + warps * kRows - 1) / (warps * kRows);
  }
};

// A thread's part of loading rows of 64 elements into shared memory: 16 bytes of every kStep-th
// row, zeros beyond the last token.
template <typename T, int kStep>
struct RowsLoader {
  static_assert(kStep % 8 == 0, "a thread's rows are swizzled alike");
  const T* from;
  int64_t step;
  int row, to;  // the next one to load; where in a tile

  // `thread` of those that share the work.
  __device__ RowsLoader(const Rows& rows, int64_t image, int begin, int thread)
      : step(kStep * rows.token_stride), row(begin + thread / 8) {
    const int column = thread % 8 * 8;
    from = static_cast<const T*>(rows.at) + image * rows.batch_stride + row * rows.token_stride +
           column;
    to = place(thread / 8, column);
  }
  // Starts to load the next kCount rows.
  template <int kCount>
  __device__ void load(T* tile, int tokens) {
#pragma unroll
    for (int i = 0; i < kCount; i += kStep) {
      copy_async(tile + to + i * kWidest, from, row + i < tokens);
      from += step;
    }
    row += kCount;
  }
};

// Which rows of which image a block and its warps own, and how it fetches rows of that image. In
// shared memory are its own rows of `kMatrices` and pairs of tiles that take turns.
template <typename T, int kWarps, int kMatrices>
struct Block {
  static constexpr int kThreads = kWarps * kLanes;
  static constexpr int kOwned = kWarps * kRows;
  static constexpr int kSharedBytes =
      (kMatrices * kOwned + 2 * kStages * kTile) * kWidest * static_cast<int>(sizeof(T));
  int tokens;
  int image, first_of_block, first;

  __device__ explicit Block(const SoftmaxInputs& in)
      : tokens(in.tokens),
        image(blockIdx.x / in.blocks_per_image(kWarps)),
        first_of_block(blockIdx.x % in.blocks_per_image(kWarps) * kOwned),
        first(first_of_block + warp_index() * kRows) {}

  // A row of the image among those of all images.
  __device__ int64_t row(int of_image) const { return int64_t(image) * tokens + of_image; }

  __device__ static T* own_rows(int which) {
    return reinterpret_cast<T*>(dynamic_shared) + which * kOwned * kWidest;
  }
  __device__ static T* own_of_warp(int which) {
    return own_rows(which) + warp_index() * kRows * kWidest;
  }
  __device__ static T* tile_at(int stage, int which) {
    return own_rows(kMatrices) + (2 * stage + which) * kTile * kWidest;
  }

  __device__ void load_own(const Rows& rows, int which) const {
    RowsLoader<T, kThreads / 8>(rows, image, first_of_block, threadIdx.x)
        .template load<kOwned>(own_rows(which), tokens);
  }
  // A loader of pairs of tiles: the first four warps load the left one, the next four the right
  // one; other warps do not load.
  __device__ RowsLoader<T, kGroupThreads / 8> tiles_loader(const Rows& left,
                                                           const Rows& right) const {
    const int thread = threadIdx.x % kGroupThreads;
    return RowsLoader<T, kGroupThreads / 8>(group_index() == 0 ? left : right, image, 0, thread);
  }
  __device__ void load_tiles(RowsLoader<T, kGroupThreads / 8>& loader, int stage) const {
    const int which = group_index();
    if (which < 2) loader.template load<kTile>(tile_at(stage, which), tokens);
  }

  // What the calling thread has fetched is there, and products may see it after a barrier.
  __device__ static void wait_for_copies_of_thread() {
    commit_copies();
    wait_for_copies<0>();
    if constexpr (kHasWarpgroups) show_to_products();
  }
  __device__ static void wait_for_rows() {
    wait_for_copies_of_thread();
    __syncthreads();
  }

  __device__ static int following(int stage) { return stage == kStages - 1 ? 0 : stage + 1; }

  // Warps that have no rows, nor one that they multiply with, only help to fetch.
  __device__ bool has_rows() const { return first_of_block + group_index() * kTile < tokens; }

  // `use(begin, stage, next, turn)` for all tiles in order, the first of which is there; so is the
  // next one, perhaps beyond the last token, and the one after it is fetched meanwhile. `turn`
  // takes the values 0 and 1 and is known to the compiler.
  template <typename Load, typename Use>
  __device__ void walk_in_step(Load load, Use use) const {
    constexpr int kTurns = 2;
    const bool has_rows = this->has_rows();
    load(kTile, 1);
    int stage = 0;
#pragma unroll 1
    for (int first_of_turns = 0; first_of_turns < tokens; first_of_turns += kTurns * kTile) {
#pragma unroll
      for (int turn = 0; turn < kTurns; ++turn) {
        const int begin = first_of_turns + turn * kTile;
        if (begin >= tokens) break;
        const int next = following(stage);
        wait_for_rows();
        load(begin + 2 * kTile, following(next));
        if (has_rows) use(begin, stage, next, turn);
        stage = next;
      }
    }
    wait_for_rows();
  }

  // `use(begin, stage, done_before)` for all tiles in order, the first of which is there. A group
  // of warps may be almost a tile ahead of another one, so that the products of one fall into the
  // time in which another one weighs. `use` calls `done_before` once, late: when it does, the group
  // is done with the tile before this one, and what it has fetched of the next one has arrived.
  // Groups wait for each other only before they fetch.
  template <typename Load, typename Use>
  __device__ void walk_apart(Load load, Use use) const {
    constexpr int kGroups = kWarps / kTogether;
    const int group = group_index();
    const bool has_rows = this->has_rows();
    load(kTile, 1);
    // A group's barriers take turns: another one may arrive for the next tile before it has waited.
    int stage = 0, turn = 0;
#pragma unroll 1
    for (int begin = 0; begin < tokens; begin += kTile) {
      const int next = following(stage);
      const auto barrier_of = [&](int waiting) { return 1 + 2 * waiting + turn; };
      const auto done_before = [&] {
        wait_for_copies_of_thread();
#pragma unroll
        for (int i = 1; i < kGroups; ++i) arrive_at(barrier_of((group + i) % kGroups), kThreads);
      };
      if (has_rows) {
        use(begin, stage, done_before);
      } else {
        done_before();
      }
      wait_at(barrier_of(group), kThreads);
      load(begin + 2 * kTile, following(next));
      stage = next;
      turn ^= 1;
    }
    wait_for_rows();
  }
};

// A warp's own rows as left operand: on Hopper those of its group in shared memory.
template <typename T>
struct Left {
  const T* rows;
  uint32_t at[kWidest / 16][4];

  __device__ explicit Left(const T* own_rows) : rows(own_rows + group_index() * kTile * kWidest) {
    if constexpr (!kHasWarpgroups) {
      const T* of_warp = own_rows + warp_index() * kRows * kWidest;
#pragma unroll
      for (int k = 0; k < kWidest / 16; ++k) {
        load_matrices(at[k], of_warp + place(lane_index() % 16, k * 16 + lane_index() / 16 * 8));
      }
    }
  }
};

// sums = A·Bᵀ of a warp's own rows and rows of a tile, in steps of 16 terms; on Hopper not before
// they are waited for.
constexpr int kSteps = kWidest / 16;
template <int kWide, typename T>
__device__ void start_scores(OuterSums<1, kWide>& sums, const Left<T>& left, const T* rows,
                             int step) {
  if constexpr (kHasWarpgroups) {
    multiply_async<T>(sums.at[0], operand_at(left.rows, step * 2), operand_at(rows, step * 2),
                      step > 0);
  } else {
    if (step == 0) sums.clear();
    const int row = lane_index() % 8 + lane_index() / 16 * 8, column = lane_index() / 8 % 2 * 8;
#pragma unroll
    for (int j = 0; j < kWide; j += 2) {
      uint32_t right[4];
      load_matrices(right, rows + j * 8 * kWidest + place(row, step * 16 + column));
      auto& d = sums.at[0][j];
      auto& e = sums.at[0][j + 1];
      mma<T>(d[0][0], d[0][1], d[1][0], d[1][1], left.at[step], right[0], right[1]);
      mma<T>(e[0][0], e[0][1], e[1][0], e[1][1], left.at[step], right[2], right[3]);
    }
  }
}
template <int kWide, typename T>
__device__ void start_scores(OuterSums<1, kWide>& sums, const Left<T>& left, const T* rows) {
#pragma unroll
  for (int step = 0; step < kSteps; ++step) start_scores(sums, left, rows, step);
}

// sums += A·B of a warp's weights of 16 rows of a tile, from row `first` on, and these; likewise.
template <typename T>
__device__ void start_weighted(RowSums& sums, uint32_t (&weights)[4], const T* rows, int first) {
  if constexpr (kHasWarpgroups) {
    start_products(weights);
    multiply_async<T, true>(sums.at[0], weights, operand_at(rows, first * 8), true);
  } else {
    const int row = lane_index() % 16, column = lane_index() / 16 * 8;
#pragma unroll
    for (int j = 0; j < kWidest / 8; j += 2) {
      uint32_t right[4];
      load_matrices_transposed(right, rows + first * kWidest + place(row, j * 8 + column));
      auto& d = sums.at[0][j];
      auto& e = sums.at[0][j + 1];
      mma<T>(d[0][0], d[0][1], d[1][0], d[1][1], weights, right[0], right[1]);
      mma<T>(e[0][0], e[0][1], e[1][0], e[1][1], weights, right[2], right[3]);
    }
  }
}

// A fence between other uses of sums and products that add to them.
template <typename... Sums>
__device__ void release(Sums&... sums) {
  if constexpr (kHasWarpgroups) start_products(sums.at[0]...);
}
// Waits for all started products, whose results are `sums`.
template <typename... Sums>
__device__ void finish(Sums&... sums) {
  if constexpr (kHasWarpgroups) {
    commit_products();
    wait_for_products(sums.at[0]...);
  }
}

// Sums of own rows to memory, through shared memory so that lanes store adjacent elements. The
// tiles must be out of use.
struct StagedRows {
  float* rows = reinterpret_cast<float*>(dynamic_shared) + warp_index() * kTileFloats;

  __device__ StagedRows(const RowSums& sums, const float (&factor)[2]) {
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kWidest / 4; ++i) {
      const float (&pair)[2] = sums.at[0][i / 2][i % 2];
      *reinterpret_cast<float2*>(rows + sums.row(0, i % 2) * kTilePitch + sums.column(i / 2)) = {
          pair[0] * factor[i % 2], pair[1] * factor[i % 2]};
    }
    __syncwarp();
  }

  // To the block's image in (images, tokens, 64), or on top of what is there; from a token to the
  // next are `stride` elements.
  template <typename T, typename BlockOfRows>
  __device__ void store(T* to, int stride, const BlockOfRows& block, bool on_top = false) const {
    to += block.row(block.first) * stride;
#pragma unroll 2
    for (int i = lane_index(); i < kRows * kWidest / 8; i += kLanes) {
      const int row = i / (kWidest / 8), column = i % (kWidest / 8) * 8;
      if (block.first + row >= block.tokens) break;
      float values[8];
      load_eight(values, rows + row * kTilePitch + column);
      T* at = to + row * stride + column;
      if (on_top) {
        float below[8];
        load_eight(below, at);
#pragma unroll
        for (int e = 0; e < 8; ++e) values[e] += below[e];
      }
      store_eight(at, values, 8);
    }
  }
};

// c. In place of 0 a number so small that no power differs from 1: an infinite product, where there
// is no key, then has the weight 0.
__device__ inline float factor_of(float scale) {
  return (scale == 0.f ? 0x1p-126f : scale) * kLog2E;
}

template <typename T>
using ForwardBlock = Block<T, kForwardWarps, 1>;

// Attends for the block's queries: y of a warp's own ones is staged, their maxima and normalisers
// go to memory.
template <typename T>
__device__ StagedRows attend(const SoftmaxInputs& in, const ForwardBlock<T>& block,
                             float* to_maximum, float* to_normalizer) {
  auto loader = block.tiles_loader(in.keys, in.values);
  const auto load = [&](int, int stage) { block.load_tiles(loader, stage); };
  block.load_own(in.queries, 0);
  load(0, 0);
  block.wait_for_rows();
  const float factor = in.scale * kLog2E;
  const Left<T> queries(block.own_rows(0));

  RowSums y;
  y.clear();
  float maximum[2] = {-INFINITY, -INFINITY}, shift[2] = {}, normalizer[2] = {};
  RowSums both[2];
  if constexpr (kHasWarpgroups) {
    release();
    start_scores(both[0], queries, block.tile_at(0, 0));
    finish(both[0]);
  }
  block.walk_in_step(load, [&](int begin, int stage, int next, int turn) {
    RowSums& scores = both[turn];
    if constexpr (!kHasWarpgroups) start_scores(scores, queries, block.tile_at(stage, 0));
    auto& s = scores.at[0];
    // Rounded before the largest one is subtracted, so that 2^0 is 1 if one key has all the weight.
#pragma unroll
    for (int i = 0; i < kTile / 2; ++i) {
      float& score = s[i / 4][i / 2 % 2][i % 2];
      score = __fmul_rn(score, factor);
    }
    if (block.tokens - begin < kTile) {
#pragma unroll
      for (int i = 0; i < kTile / 2; ++i) {
        const int key = begin + scores.column(i / 4) + i % 2;
        if (key >= block.tokens) s[i / 4][i / 2 % 2][i % 2] = -INFINITY;
      }
    }
    float larger[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      larger[half] = maximum[half];
#pragma unroll
      for (int i = 0; i < kTile / 4; ++i) larger[half] = fmaxf(larger[half], s[i / 2][half][i % 2]);
      larger[half] = largest_of_row(larger[half]);
    }
    if (__any_sync(kAllLanes, larger[0] > maximum[0] || larger[1] > maximum[1])) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        // As long as all scores are −infinity, all weights are zero.
        const float before = shift[half];
        shift[half] = larger[half] == -INFINITY ? 0.f : larger[half];
        const float shrink = maximum[half] == -INFINITY ? 0.f : fast_exp2(before - shift[half]);
        maximum[half] = larger[half];
        normalizer[half] *= shrink;
#pragma unroll
        for (int i = 0; i < kWidest / 4; ++i) y.at[0][i / 2][half][i % 2] *= shrink;
      }
    }
    release(y);
#pragma unroll
    for (int key = 0; key < kTile; key += 16) {
      if constexpr (kHasWarpgroups) {
        start_scores(both[1 - turn], queries, block.tile_at(next, 0), key / 16);
      }
      uint32_t weights[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float (&pair)[2] = s[key / 8 + i / 2][i % 2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          pair[e] = fast_exp2(pair[e] - shift[i % 2]);
          normalizer[i % 2] += pair[e];
        }
        weights[i] = round_pair<T>(pair[0], pair[1]);
      }
      start_weighted(y, weights, block.tile_at(stage, 1), key);
    }
    finish(y, both[1 - turn]);
  });

  float inverse[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    normalizer[half] = sum_of_row(normalizer[half]);
    inverse[half] = 1.f / normalizer[half];
    const int row = y.row(0, half);
    if (lane_index() % 4 == 0 && block.first + row < block.tokens) {
      to_maximum[block.row(block.first + row)] = maximum[half] * kLn2;
      to_normalizer[block.row(block.first + row)] = normalizer[half];
    }
  }
  return StagedRows(y, inverse);
}

template <typename T>
using QueriesBlock = Block<T, kQueriesWarps, 2>;
template <typename T>
using KeysBlock = Block<T, kKeysWarps, 2>;

// l and d of a query, for the keys.
struct alignas(8) Shifts {
  float logarithm, delta;
};
// In memory an image has those of all rows of its blocks.
__host__ __device__ inline int64_t shifts_of_image(int64_t tokens) {
  constexpr int64_t kOwned = kQueriesWarps * kRows;
  return (tokens + kOwned - 1) / kOwned * kOwned;
}
inline torch::stable::Tensor new_shifts(const torch::stable::Tensor& like, int64_t images,
                                        int64_t tokens) {
  return new_floats(like, 2 * images * shifts_of_image(tokens));
}
inline Shifts* shifts_of(const torch::stable::Tensor& tensor) {
  return static_cast<Shifts*>(tensor.mutable_data_ptr());
}

struct SoftmaxBackwardParams {
  SoftmaxInputs in;
  Rows grads;
  const float *attended, *maximum, *normalizer;
  Shifts* shifts;
  void *grad_queries, *grad_keys, *grad_values;
  int grad_stride;  // of the three, from a token to the next
  bool on_top;      // the gradient of the values is added to what is there
};

template <typename T>
__global__ void __launch_bounds__(kQueriesWarps* kLanes, 2)
    softmax_queries_backward_kernel(const SoftmaxBackwardParams p) {
  const QueriesBlock<T> block(p.in);
  auto loader = block.tiles_loader(p.in.keys, p.in.values);
  const auto load = [&](int, int stage) { block.load_tiles(loader, stage); };
  block.load_own(p.in.queries, 0);
  block.load_own(p.grads, 1);
  load(0, 0);
  block.wait_for_rows();
  const Left<T> queries(block.own_rows(0)), grads(block.own_rows(1));

  RowSums grad_queries;
  grad_queries.clear();
  Shifts shifts[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = grad_queries.row(0, half);
    const bool inside = block.first + row < block.tokens;
    float delta = 0.f, logarithm = INFINITY;
    if (inside) {
      const int64_t query = block.row(block.first + row);
#pragma unroll
      for (int column = lane_index() % 4 * 8; column < kWidest; column += 32) {
        float attended[8], grad[8];
        load_eight(attended, p.attended + query * kWidest + column);
        load_eight(grad, block.own_of_warp(1) + place(row, column));
#pragma unroll
        for (int e = 0; e < 8; ++e) delta += grad[e] * attended[e];
      }
      logarithm = fmaf(p.maximum[query], kLog2E, log2f(p.normalizer[query]));
    }
    shifts[half] = {logarithm, sum_of_row(delta)};
    if (lane_index() % 4 == 0) {
      p.shifts[block.image * shifts_of_image(block.tokens) + block.first + row] = shifts[half];
    }
  }

  const float factor = factor_of(p.in.scale), nothing = copysignf(INFINITY, -factor);
  block.walk_apart(load, [&](int begin, int stage, auto done_before) {
#pragma unroll 1
    for (int slice = 0; slice < kTile; slice += kSlice) {
      const T* keys = block.tile_at(stage, 0) + slice * kWidest;
      const T* values = block.tile_at(stage, 1) + slice * kWidest;
      SliceScores scores, of_weights;
      release();
      start_scores(scores, queries, keys);
      start_scores(of_weights, grads, values);
      finish(scores, of_weights);
      auto& s = scores.at[0];
      // If there is no key, the score 0 may be far above the maximum.
      if (block.tokens - begin < kTile) {
#pragma unroll
        for (int i = 0; i < kSlice / 2; ++i) {
          const int key = begin + slice + scores.column(i / 4) + i % 2;
          if (key >= block.tokens) s[i / 4][i / 2 % 2][i % 2] = nothing;
        }
      }
#pragma unroll
      for (int key = 0; key < kSlice; key += 16) {
        uint32_t weights[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const auto& [logarithm, delta] = shifts[i % 2];
          float pair[2];
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const float product = s[key / 8 + i / 2][i % 2][e];
            pair[e] = fast_exp2(fmaf(product, factor, -logarithm)) *
                      (of_weights.at[0][key / 8 + i / 2][i % 2][e] - delta);
          }
          weights[i] = round_pair<T>(pair[0], pair[1]);
        }
        start_weighted(grad_queries, weights, keys, key);
      }
      if (slice + kSlice == kTile) done_before();
      finish(grad_queries);
    }
  });
  StagedRows(grad_queries, {p.in.scale, p.in.scale})
      .store(static_cast<T*>(p.grad_queries), p.grad_stride, block);
}

template <typename T>
__global__ void __launch_bounds__(kKeysWarps* kLanes, 1)
    softmax_keys_backward_kernel(const SoftmaxBackwardParams p) {
  const KeysBlock<T> block(p.in);
  // Of a tile's queries.
  __shared__ Shifts shifts[kStages][kTile];
  auto loader = block.tiles_loader(p.in.queries, p.grads);
  const int64_t rows_of_image = shifts_of_image(block.tokens);
  const auto load = [&](int begin, int stage) {
    block.load_tiles(loader, stage);
    // By a warp that does not load tiles.
    if (warp_index() == 2 * kTogether) {
      const int64_t query = begin + lane_index() * 2;
      copy_async(&shifts[stage][lane_index() * 2], p.shifts + block.image * rows_of_image + query,
                 query < rows_of_image);
    }
  };
  block.load_own(p.in.keys, 0);
  block.load_own(p.in.values, 1);
  load(0, 0);
  block.wait_for_rows();
  const Left<T> keys(block.own_rows(0)), values(block.own_rows(1));

  RowSums grad_keys, grad_values;
  grad_keys.clear();
  grad_values.clear();
  const float factor = factor_of(p.in.scale);
  block.walk_apart(load, [&](int, int stage, auto done_before) {
#pragma unroll 1
    for (int slice = 0; slice < kTile; slice += kSlice) {
      const T* queries = block.tile_at(stage, 0) + slice * kWidest;
      const T* grads = block.tile_at(stage, 1) + slice * kWidest;
      SliceScores scores, of_weights;
      release();
      start_scores(scores, keys, queries);
      start_scores(of_weights, values, grads);
      finish(scores, of_weights);
      release(grad_keys, grad_values);
#pragma unroll
      for (int query = 0; query < kSlice; query += 16) {
        uint32_t weights[4], gradients[4];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int wide = query / 8 + j;
          // Of both of a lane's columns.
          const auto both =
              *reinterpret_cast<const float4*>(&shifts[stage][slice + scores.column(wide)]);
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const float (&product)[2] = scores.at[0][wide][half];
            const float (&slope)[2] = of_weights.at[0][wide][half];
            const float weight[2] = {fast_exp2(fmaf(product[0], factor, -both.x)),
                                     fast_exp2(fmaf(product[1], factor, -both.z))};
            weights[2 * j + half] = round_pair<T>(weight[0], weight[1]);
            gradients[2 * j + half] =
                round_pair<T>(weight[0] * (slope[0] - both.y), weight[1] * (slope[1] - both.w));
          }
        }
        start_weighted(grad_values, weights, grads, query);
        start_weighted(grad_keys, gradients, queries, query);
      }
      if (slice + kSlice == kTile) done_before();
      finish(grad_keys, grad_values);
    }
  });
  StagedRows(grad_keys, {p.in.scale, p.in.scale})
      .store(static_cast<T*>(p.grad_keys), p.grad_stride, block);
  StagedRows(grad_values, {1.f, 1.f})
      .store(static_cast<T*>(p.grad_values), p.grad_stride, block, p.on_top);
}

// Of tensors of vector_rows.
template <typename T>
SoftmaxInputs softmax_inputs(const torch::stable::Tensor& q, const torch::stable::Tensor& k,
                             const torch::stable::Tensor& v, double scale) {
  return {rows_of<T>(q), rows_of<T>(k), rows_of<T>(v), static_cast<int>(v.size(1)),
          static_cast<float>(scale)};
}

template <typename BlockOfRows, typename Params>
void launch_softmax(const DeviceScope& device, const char* name, void (*kernel)(Params),
                    int64_t images, const Params& params, size_t further_bytes = 0) {
  const int64_t blocks = images * params.in.blocks_per_image(BlockOfRows::kThreads / kLanes);
  device.launch(name, kernel, dim3(grid_size(blocks)), BlockOfRows::kThreads,
                BlockOfRows::kSharedBytes + further_bytes, params);
}

template <typename T>
void launch_softmax_backward(const DeviceScope& device, int64_t images,
                             const SoftmaxBackwardParams& params) {
  launch_softmax<QueriesBlock<T>>(device, "softmax_queries_backward",
                                  softmax_queries_backward_kernel<T>, images, params);
  launch_softmax<KeysBlock<T>>(device, "softmax_keys_backward", softmax_keys_backward_kernel<T>,
                               images, params);
}

}  // namespace t2t
