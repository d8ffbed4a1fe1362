// The Performer layer on CUDA: soft split, norm, projection to k, q and v, attention, tail.
//
// Forward, two passes over the patches: warps make k and v of their tokens and the sums over keys;
// then, with an image's sums combined, q and v, the attention and the tail, 16 tokens a warp.
// Making q and v a second time costs less than writing and reading them, and no token reaches
// memory but the layer's own result.
//
// Backward, three such passes lead to the gradient of k, q and v, the only memory per token, and
// what remains is the backward of soft_split_linear:
//   tail      forward again up to the MLP, then back through the tail: the gradient of y (to q's
//   place),
//             that of the skip (to v's), and a slot of the tail's own gradients per block
//   queries   that of y becomes that of q, and parts of those of the sums
//   keys      that of k, and the rest of that of v
// Operands of the tail's products are rounded to the map's type, as plain PyTorch rounds every
// intermediate; the attention is float32 (see performer.cuh).

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "patches.cuh"
#include "performer.cuh"
#include "philox.cuh"
#include "soft_split_linear.h"

namespace t2t {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Wide = Sums<kWidestGroups>;

constexpr const char* kName = "performer_layer";
constexpr float kNormEps = 1e-5f;
// The dropouts' sites, as in the reference.
constexpr uint32_t kAfterProj = 0, kAfterMlp = 1;
enum Section { kKey, kQuery, kValue };

// From patches to k, q and v.
struct Projection {
  Patches patches;
  Norm norm;
  const void *packed, *bias;
  int depth, chunk, embed, groups;  // groups of a section
  int tokens, tiles;                // of an image
  int64_t images;
};

// Sections of tokens first … of an image, float32, zero beyond the image and the section.
template <typename T, int kSections>
__device__ void project(const Projection& p, void* shared, int64_t image, int first,
                        const Section (&sections)[kSections], Wide (&to)[kSections]) {
  TokenTile<T> tile(shared, p.chunk);
  tile.start(p.patches, true, p.norm.eps, image * p.tokens + first);
#pragma unroll
  for (int i = 0; i < kSections; ++i) to[i].clear();
  const int64_t group_stride = int64_t(p.depth) * kGroup;
  for (int at = 0; at < p.depth; at += p.chunk) {
    tile.ready(p.patches, true, p.norm, at, false);
#pragma unroll
    for (int i = 0; i < kSections; ++i) {
      multiply(to[i], tile.elements, tile.pitch,
               static_cast<const T*>(p.packed) + sections[i] * p.groups * group_stride +
                   int64_t(at) * kGroup,
               group_stride, tile.columns(p.patches, at), p.groups);
    }
  }
#pragma unroll
  for (int i = 0; i < kSections; ++i) {
#pragma unroll
    for (int j = 0; j < 2 * kWidestGroups; ++j) {
      const int column = sum_column(j / 2);
      const int count = first + sum_row(j % 2) < p.tokens ? p.embed - column : 0;
      float bias[8];
      load_eight(bias, static_cast<const T*>(p.bias) + sections[i] * p.embed + column, count,
                 false);
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        float& value = to[i].at[j / 2][j % 2][e];
        value = e < count ? value + bias[e] : 0.f;
      }
    }
  }
  // The tile is done with, and its place may be used.
  __syncwarp();
}

__device__ inline void limit(Wide& sums) {
#pragma unroll
  for (int i = 0; i < 16 * kWidestGroups; ++i) {
    float& value = sums.at[i / 16][i / 8 % 2][i % 8];
    value = within_range(value);
  }
}

// The tail's parameters. Weights are packed as inputs × outputs, those of the backward transposed.
struct Tail {
  const void *proj, *mlp_in, *mlp_out;
  const void *proj_t, *mlp_in_t, *mlp_out_t;
  const void *proj_bias, *norm_gain, *norm_offset, *mlp_in_bias, *mlp_out_bias;
  int embed, hidden;
  Dropout dropout;

  __host__ __device__ int embed_depth() const { return (embed + 15) / 16 * 16; }
  __host__ __device__ int hidden_depth() const { return (hidden + 15) / 16 * 16; }
};

// The sums of a product whose left operand is a tile of type T.
template <typename T>
__device__ Wide times(const T* tile, const void* packed, int depth, int columns) {
  Wide sums;
  sums.clear();
  multiply_short(sums, tile, padded_row<T>(kWidest), static_cast<const T*>(packed), depth * kGroup,
                 depth, (columns + kGroup - 1) / kGroup);
  return sums;
}

// sums·gain + bias by column, zero beyond `columns`; either may be null.
template <typename T>
__device__ void scale_and_shift(Wide& sums, const void* gain, const void* bias, int columns) {
#pragma unroll
  for (int group = 0; group < kWidestGroups; ++group) {
    const int column = sum_column(group);
    float factor[8], addend[8];
    if (gain) load_eight(factor, static_cast<const T*>(gain) + column, columns - column, false);
    if (bias) load_eight(addend, static_cast<const T*>(bias) + column, columns - column, false);
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      float& value = sums.at[group][i / 8][i % 8];
      if (gain) value *= factor[i % 8];
      if (bias) value += addend[i % 8];
      if (column + i % 8 >= columns) value = 0.f;
    }
  }
}

// Dropout of the elements of tokens first_token … of all images.
__device__ inline void drop(const Tail& t, uint32_t site, int64_t first_token, Wide& sums) {
#pragma unroll
  for (int i = 0; i < 2 * kWidestGroups; ++i) {
    const int64_t token = first_token + sum_row(i % 2);
    drop_eight(t.dropout, site, token * t.embed + sum_column(i / 2), sums.at[i / 2][i % 2]);
  }
}

__device__ inline void add(Wide& to, const Wide& other) {
#pragma unroll
  for (int i = 0; i < 16 * kWidestGroups; ++i) {
    to.at[i / 16][i / 8 % 2][i % 8] += other.at[i / 16][i / 8 % 2][i % 8];
  }
}

// Means over the columns that exist, of rows g and g + 8.
__device__ inline void row_means(const Wide& sums, int columns, float (&mean)[2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float total = 0.f;
#pragma unroll
    for (int i = 0; i < 8 * kWidestGroups; ++i) {
      if (sum_column(i / 8) + i % 8 < columns) total += sums.at[i / 8][half][i % 8];
    }
    mean[half] = sum_of_row(total) / static_cast<float>(columns);
  }
}

// Normalises rows without gain and offset; 1/σ goes to `rstd`. Columns beyond the last are zero.
__device__ inline void normalize_rows(Wide& sums, int columns, float (&rstd)[2]) {
  float mean[2], variance[2];
  row_means(sums, columns, mean);
  Wide squares;
#pragma unroll
  for (int i = 0; i < 16 * kWidestGroups; ++i) {
    float& value = sums.at[i / 16][i / 8 % 2][i % 8];
    value = sum_column(i / 16) + i % 8 < columns ? value - mean[i / 8 % 2] : 0.f;
    squares.at[i / 16][i / 8 % 2][i % 8] = value * value;
  }
  row_means(squares, columns, variance);
#pragma unroll
  for (int half = 0; half < 2; ++half) rstd[half] = 1.f / sqrtf(variance[half] + kNormEps);
#pragma unroll
  for (int i = 0; i < 16 * kWidestGroups; ++i) {
    sums.at[i / 16][i / 8 % 2][i % 8] *= rstd[i / 8 % 2];
  }
}

// Φ of the exact GELU x·Φ(x).
__device__ inline float normal_integral(float x) { return 0.5f * (1.f + erff(x * 0.70710678f)); }
__device__ inline float normal_density(float x) { return 0.39894228f * expf(-0.5f * x * x); }

template <typename T>
__device__ void keep_rounded(const Wide& sums, T* tile) {
  keep_sums(sums, tile, padded_row<T>(kWidest));
}

struct KeysParams {
  Projection projection;
  Features w;
  int chunk, chunks;  // tokens of a warp; warps of an image
  Parts parts;
  int warp_bytes;
};

constexpr int kWarps = 4;
constexpr int kKeysBytes = (2 * kTileFloats + kRows * kFeaturePitch + kGroup) * sizeof(float);

// blockIdx.y: 32 features.
template <typename T>
__global__ void __launch_bounds__(kWarps* kLanes) layer_keys_kernel(const KeysParams p) {
  const int64_t part = int64_t(blockIdx.x) * (blockDim.x / kLanes) + warp_index();
  if (part >= p.projection.images * p.chunks) return;
  const int64_t image = part / p.chunks;
  const int first = static_cast<int>(part - image * p.chunks) * p.chunk;
  const int tokens = p.projection.tokens;
  char* shared = reinterpret_cast<char*>(dynamic_shared) + warp_index() * p.warp_bytes;
  auto* keys = reinterpret_cast<float*>(shared);
  float* values = keys + kTileFloats;
  float* features = values + kTileFloats;

  RunningSums running;
  running.sums.clear();
  for (int at = first; at < min(first + p.chunk, tokens); at += kRows) {
    Wide made[2];
    project<T, 2>(p.projection, shared, image, at, {kKey, kValue}, made);
    limit(made[0]);
    keep_sums(made[0], keys, kTilePitch);
    keep_sums(made[1], values, kTilePitch);
    __syncwarp();
    running.add(p.w, keys, values, blockIdx.y, tokens - at, features,
                features + kRows * kFeaturePitch);
  }
  running.store(p.w, p.parts, part, blockIdx.y);
}

struct QueriesParams {
  Projection projection;
  Features w;
  Tail tail;
  const float *maximum, *normalizer, *packed;
  void* out;
  int warp_bytes;
  bool vectors;  // of out
};

constexpr int kQueriesBytes = kTileFloats * sizeof(float);

template <typename T>
__global__ void __launch_bounds__(kWarps* kLanes, 2) layer_queries_kernel(const QueriesParams p) {
  const Projection& projection = p.projection;
  const Tail& t = p.tail;
  const int64_t tile = int64_t(blockIdx.x) * (blockDim.x / kLanes) + warp_index();
  if (tile >= projection.images * projection.tiles) return;
  const int64_t image = tile / projection.tiles;
  const int first = static_cast<int>(tile - image * projection.tiles) * kRows;
  const int64_t first_token = image * projection.tokens + first;
  char* shared = reinterpret_cast<char*>(dynamic_shared) + warp_index() * p.warp_bytes;
  auto* queries = reinterpret_cast<float*>(shared);
  T* operand = reinterpret_cast<T*>(shared);

  Wide made[2];
  project<T, 2>(projection, shared, image, first, {kQuery, kValue}, made);
  limit(made[0]);
  keep_sums(made[0], queries, kTilePitch);
  __syncwarp();
  const KeySums keys = {p.maximum + image * p.w.count, p.normalizer + image * p.w.count,
                        p.packed + image * p.w.packed_floats(), nullptr};
  const Attended attended = attend(p.w, keys, queries, queries);

  // a = v + dropout(proj(y)). The features have been multiplied by all lanes.
  __syncwarp();
  keep_rounded(attended.y, operand);
  __syncwarp();
  Wide a = times(operand, t.proj, t.embed_depth(), t.embed);
  scale_and_shift<T>(a, nullptr, t.proj_bias, t.embed);
  drop(t, kAfterProj, first_token, a);
  add(a, made[1]);

  Wide normalized = a;
  float rstd[2];
  normalize_rows(normalized, t.embed, rstd);
  scale_and_shift<T>(normalized, t.norm_gain, t.norm_offset, t.embed);
  __syncwarp();
  keep_rounded(normalized, operand);
  __syncwarp();
  Wide hidden = times(operand, t.mlp_in, t.embed_depth(), t.hidden);
  scale_and_shift<T>(hidden, nullptr, t.mlp_in_bias, t.hidden);
#pragma unroll
  for (int i = 0; i < 16 * kWidestGroups; ++i) {
    float& value = hidden.at[i / 16][i / 8 % 2][i % 8];
    value *= normal_integral(value);
  }
  __syncwarp();
  keep_rounded(hidden, operand);
  __syncwarp();
  Wide out = times(operand, t.mlp_out, t.hidden_depth(), t.embed);
  scale_and_shift<T>(out, nullptr, t.mlp_out_bias, t.embed);
  drop(t, kAfterMlp, first_token, out);
  add(out, a);
  store_rows(out, static_cast<T*>(p.out) + first_token * t.embed, projection.tokens - first,
             t.embed, t.embed, p.vectors);
}

// A block's share in the gradients of the tail: three matrices of 64 × 64 (outputs × inputs), each
// thread's elements a block's threads apart, then vectors of 64. Kept in registers it would leave
// too few for the rest; in this order a warp adds to it 128 bytes at a time, in the L2 cache.
struct TailSlot {
  static constexpr int kThreads = kWarps * kLanes;
  static constexpr int kProj = 0, kMlpIn = 1, kMlpOut = 2;
  static constexpr int kMatrix = kWidest * kWidest;
  static constexpr int kProjBias = 3 * kMatrix, kNormGain = kProjBias + kWidest,
                       kNormOffset = kNormGain + kWidest, kMlpInBias = kNormOffset + kWidest,
                       kMlpOutBias = kMlpInBias + kWidest, kFloats = kMlpOutBias + kWidest;
};

struct TailBackwardParams {
  Projection projection;
  Features w;
  Tail tail;
  const float *maximum, *normalizer, *packed;
  Rows grad;
  void* grad_kqv;  // (image, token, 3·embed); q's place receives that of y, v's that of the skip
  float* slots;
  int warp_bytes;
};

// Besides each warp's own memory: the left and right operands of a block's 64 tokens.
template <typename T>
__host__ __device__ constexpr int tail_operand_elements() {
  return kWarps * kRows * padded_row<T>(kWidest);
}
// Of a warp, when it has left the attention: y, and the normalised rows.
template <typename T>
__host__ __device__ constexpr int tail_bytes() {
  return kRows * padded_row<T>(kWidest) * sizeof(T) + kTileFloats * sizeof(float);
}

template <typename T>
__global__ void __launch_bounds__(kWarps* kLanes, 2)
    tail_backward_kernel(const TailBackwardParams p) {
  constexpr int kPitch = padded_row<T>(kWidest);
  const Projection& projection = p.projection;
  const Tail& t = p.tail;
  T* lefts = reinterpret_cast<T*>(dynamic_shared);
  T* rights = lefts + tail_operand_elements<T>();
  T* left = lefts + warp_index() * kRows * kPitch;
  T* right = rights + warp_index() * kRows * kPitch;
  char* shared =
      reinterpret_cast<char*>(rights + tail_operand_elements<T>()) + warp_index() * p.warp_bytes;
  auto* queries = reinterpret_cast<float*>(shared);
  T* kept_y = reinterpret_cast<T*>(shared);
  auto* kept_norm = reinterpret_cast<float*>(kept_y + kRows * kPitch);

  // A warp has 16 rows of each matrix, a thread one column of each vector: of the left operand the
  // first 64 threads, of the right one the others.
  float* slot = p.slots + int64_t(blockIdx.x) * TailSlot::kFloats;
  float columns[4] = {};
  const auto column_sum = [&](const T* tile) {
    float total = 0.f;
    for (int row = 0; row < kWarps * kRows; ++row) {
      total += static_cast<float>(tile[row * kPitch + threadIdx.x % kWidest]);
    }
    return total;
  };
  const auto add_product = [&](int matrix, bool first) {
    OuterSums<1, kWidest / 8> sums;
    sums.clear();
    multiply_tokens(sums, lefts + warp_index() * 16, kPitch, rights, kPitch, kWarps * kRows);
    float* at = slot + matrix * TailSlot::kMatrix + threadIdx.x;
#pragma unroll
    for (int i = 0; i < kWidest / 2; ++i) {
      const float sum = sums.at[0][i / 4][i / 2 % 2][i % 2];
      at[i * TailSlot::kThreads] = first ? sum : at[i * TailSlot::kThreads] + sum;
    }
  };

  const int64_t groups = (projection.tokens + kWarps * kRows - 1) / (kWarps * kRows);
  for (int64_t item = blockIdx.x; item < projection.images * groups; item += gridDim.x) {
    const int64_t image = item / groups;
    const int first =
        static_cast<int>(item - image * groups) * kWarps * kRows + warp_index() * kRows;
    const int64_t first_token = image * projection.tokens + first;
    Wide hidden;
    float rstd[2];
    {
      Wide made[2];
      project<T, 2>(projection, shared, image, first, {kQuery, kValue}, made);
      limit(made[0]);
      keep_sums(made[0], queries, kTilePitch);
      __syncwarp();
      const KeySums keys = {p.maximum + image * p.w.count, p.normalizer + image * p.w.count,
                            p.packed + image * p.w.packed_floats(), nullptr};
      const Attended attended = attend(p.w, keys, queries, queries);
      // The features have been multiplied by all lanes.
      __syncwarp();
      keep_rounded(attended.y, kept_y);
      __syncwarp();
      Wide a = times(kept_y, t.proj, t.embed_depth(), t.embed);
      scale_and_shift<T>(a, nullptr, t.proj_bias, t.embed);
      drop(t, kAfterProj, first_token, a);
      add(a, made[1]);
      normalize_rows(a, t.embed, rstd);
      keep_sums(a, kept_norm, kTilePitch);
      scale_and_shift<T>(a, t.norm_gain, t.norm_offset, t.embed);
      keep_rounded(a, left);
      __syncwarp();
      hidden = times(left, t.mlp_in, t.embed_depth(), t.hidden);
      scale_and_shift<T>(hidden, nullptr, t.mlp_in_bias, t.hidden);
      __syncwarp();
    }

    // mlp_out: dropout's gradient by the activated units.
    {
      Wide grad, activated = hidden;
      load_sums<T>(p.grad, image, first, projection.tokens, t.embed, grad);
      drop(t, kAfterMlp, first_token, grad);
      keep_rounded(grad, left);
#pragma unroll
      for (int i = 0; i < 16 * kWidestGroups; ++i) {
        float& value = activated.at[i / 16][i / 8 % 2][i % 8];
        value *= normal_integral(value);
      }
      keep_rounded(activated, right);
    }
    __syncthreads();
    add_product(TailSlot::kMlpOut, item == blockIdx.x);
    columns[0] += column_sum(lefts);
    Wide grad_hidden = times(left, t.mlp_out_t, t.embed_depth(), t.hidden);
    __syncthreads();

    // mlp_in: the hidden units' gradient by the norm's result.
#pragma unroll
    for (int i = 0; i < 16 * kWidestGroups; ++i) {
      const float value = hidden.at[i / 16][i / 8 % 2][i % 8];
      grad_hidden.at[i / 16][i / 8 % 2][i % 8] *=
          normal_integral(value) + value * normal_density(value);
    }
    keep_rounded(grad_hidden, left);
    {
      Wide normalized;
      take_sums(kept_norm, normalized);
      scale_and_shift<T>(normalized, t.norm_gain, t.norm_offset, t.embed);
      keep_rounded(normalized, right);
    }
    __syncthreads();
    add_product(TailSlot::kMlpIn, item == blockIdx.x);
    columns[1] += column_sum(lefts);
    Wide grad = times(left, t.mlp_in_t, t.hidden_depth(), t.embed);
    __syncthreads();

    // The norm: its offset's gradient and, times the normalised rows, its gain's.
    Wide normalized;
    take_sums(kept_norm, normalized);
    keep_rounded(grad, left);
    {
      Wide product = grad;
#pragma unroll
      for (int i = 0; i < 16 * kWidestGroups; ++i) {
        product.at[i / 16][i / 8 % 2][i % 8] *= normalized.at[i / 16][i / 8 % 2][i % 8];
      }
      keep_rounded(product, right);
    }
    __syncthreads();
    columns[2] += column_sum(threadIdx.x < kWidest ? lefts : rights);
    __syncthreads();
    scale_and_shift<T>(grad, t.norm_gain, nullptr, t.embed);
    {
      float mean[2], mean_of_product[2];
      row_means(grad, t.embed, mean);
      Wide product = grad;
#pragma unroll
      for (int i = 0; i < 16 * kWidestGroups; ++i) {
        product.at[i / 16][i / 8 % 2][i % 8] *= normalized.at[i / 16][i / 8 % 2][i % 8];
      }
      row_means(product, t.embed, mean_of_product);
      Wide skip;
      load_sums<T>(p.grad, image, first, projection.tokens, t.embed, skip);
#pragma unroll
      for (int i = 0; i < 16 * kWidestGroups; ++i) {
        const int half = i / 8 % 2;
        float& value = grad.at[i / 16][half][i % 8];
        value = (value - mean[half] - normalized.at[i / 16][half][i % 8] * mean_of_product[half]) *
                    rstd[half] +
                skip.at[i / 16][half][i % 8];
      }
    }
    T* grad_kqv = static_cast<T*>(p.grad_kqv) + first_token * 3 * t.embed;
    const int left_tokens = projection.tokens - first;
    const bool vectors = t.embed % Vec<T>::size == 0;
    store_rows(grad, grad_kqv + kValue * t.embed, left_tokens, t.embed, 3 * t.embed, vectors);

    // proj: dropout's gradient by y.
    drop(t, kAfterProj, first_token, grad);
    keep_rounded(grad, left);
    {
      T* from = kept_y;
      Wide y;
#pragma unroll
      for (int i = 0; i < 2 * kWidestGroups; ++i) {
        load_eight(y.at[i / 2][i % 2], from + sum_row(i % 2) * kPitch + sum_column(i / 2), 8, true);
      }
      keep_rounded(y, right);
    }
    __syncthreads();
    add_product(TailSlot::kProj, item == blockIdx.x);
    columns[3] += column_sum(lefts);
    const Wide grad_y = times(left, t.proj_t, t.embed_depth(), t.embed);
    store_rows(grad_y, grad_kqv + kQuery * t.embed, left_tokens, t.embed, 3 * t.embed, vectors);
    __syncthreads();
  }

  const int column = threadIdx.x % kWidest;
  if (threadIdx.x < kWidest) {
    slot[TailSlot::kMlpOutBias + column] = columns[0];
    slot[TailSlot::kMlpInBias + column] = columns[1];
    slot[TailSlot::kNormOffset + column] = columns[2];
    slot[TailSlot::kProjBias + column] = columns[3];
  } else {
    slot[TailSlot::kNormGain + column] = columns[2];
  }
}

struct TailFinishParams {
  const float* slots;
  int slot_count, embed, hidden;
  void *proj, *proj_bias, *norm_gain, *norm_offset, *mlp_in, *mlp_in_bias, *mlp_out, *mlp_out_bias;
};

constexpr int kFinishThreads = 128;

// Adds the slots one after the other.
template <typename T>
__global__ void __launch_bounds__(kFinishThreads) tail_finish_kernel(const TailFinishParams p) {
  const int at = blockIdx.x * kFinishThreads + threadIdx.x;
  if (at >= TailSlot::kFloats) return;
  float total = 0.f;
  for (int i = 0; i < p.slot_count; ++i) total += p.slots[int64_t(i) * TailSlot::kFloats + at];
  const auto store = [&](void* to, int row, int column, int rows, int columns) {
    if (row < rows && column < columns) {
      static_cast<T*>(to)[row * columns + column] = static_cast<T>(total);
    }
  };
  if (at < 3 * TailSlot::kMatrix) {
    // Element i of a thread's OuterSums<1, 8>.
    const int i = at % TailSlot::kMatrix / TailSlot::kThreads, thread = at % TailSlot::kThreads;
    const int row = thread / kLanes * 16 + i / 2 % 2 * 8 + thread % kLanes / 4;
    const int column = i / 4 * 8 + thread % 4 * 2 + i % 2;
    const int matrix = at / TailSlot::kMatrix;
    if (matrix == TailSlot::kProj) store(p.proj, row, column, p.embed, p.embed);
    if (matrix == TailSlot::kMlpIn) store(p.mlp_in, row, column, p.hidden, p.embed);
    if (matrix == TailSlot::kMlpOut) store(p.mlp_out, row, column, p.embed, p.hidden);
  } else {
    const int column = at % kWidest, vector = at - column;
    if (vector == TailSlot::kProjBias) store(p.proj_bias, 0, column, 1, p.embed);
    if (vector == TailSlot::kNormGain) store(p.norm_gain, 0, column, 1, p.embed);
    if (vector == TailSlot::kNormOffset) store(p.norm_offset, 0, column, 1, p.embed);
    if (vector == TailSlot::kMlpInBias) store(p.mlp_in_bias, 0, column, 1, p.hidden);
    if (vector == TailSlot::kMlpOutBias) store(p.mlp_out_bias, 0, column, 1, p.embed);
  }
}

struct QueriesBackwardParams {
  Projection projection;
  Features w;
  const float *maximum, *normalizer, *packed, *packed_t;
  void* grad_kqv;
  int chunk, chunks;  // tokens of a block; blocks of an image
  Parts parts;
  int warp_bytes;
};

// Each warp takes 16 of a block's 32 tokens; the gradients of the sums are then shared out the
// other way, by features.
template <typename T>
__global__ void __launch_bounds__(kGradientWarps* kLanes)
    layer_queries_backward_kernel(const QueriesBackwardParams p) {
  const Projection& projection = p.projection;
  const int64_t image = blockIdx.x / p.chunks;
  const int begin = blockIdx.x % p.chunks * p.chunk;
  auto* all_features = reinterpret_cast<float*>(dynamic_shared);
  float* all_grads = all_features + kGradientWarps * kTileFloats;
  float* of_normalizer = all_grads + kGradientWarps * kTileFloats;
  float* features = all_features + warp_index() * kTileFloats;
  float* grads = all_grads + warp_index() * kTileFloats;
  char* shared =
      reinterpret_cast<char*>(of_normalizer + kGradientWarps * kRows) + warp_index() * p.warp_bytes;
  auto* queries = reinterpret_cast<float*>(shared);
  const KeySums keys = {p.maximum + image * p.w.count, p.normalizer + image * p.w.count,
                        p.packed + image * p.w.packed_floats(),
                        p.packed_t + image * p.w.packed_t_floats()};
  const int64_t row = 3 * p.w.embed;
  const bool vectors = p.w.embed % Vec<T>::size == 0;
  const Rows grad_y = {static_cast<const T*>(p.grad_kqv) + kQuery * p.w.embed,
                       projection.tokens * row, row, 1, vectors};
  SumGradients sums;
  sums.clear();
  for (int block_at = begin; block_at < min(begin + p.chunk, projection.tokens);
       block_at += kGradientWarps * kRows) {
    const int first = block_at + warp_index() * kRows;
    {
      Wide made[1];
      project<T, 1>(projection, shared, image, first, {kQuery}, made);
      limit(made[0]);
      keep_sums(made[0], queries, kTilePitch);
    }
    __syncwarp();
    const Attended attended = attend(p.w, keys, queries, features);
    Wide grad;
    load_sums<T>(grad_y, image, first, projection.tokens, p.w.embed, grad);
    const Wide grad_queries = attend_backward(p.w, keys, attended, grad, queries, features, grads,
                                              of_normalizer + warp_index() * kRows);
    store_rows(grad_queries,
               static_cast<T*>(p.grad_kqv) + (image * projection.tokens + first) * row +
                   kQuery * p.w.embed,
               projection.tokens - first, p.w.embed, row, vectors);
    __syncthreads();
    sums.add(p.w, all_features, all_grads, of_normalizer);
    __syncthreads();
  }
  sums.store(p.w, p.parts, blockIdx.x);
}

struct KeysBackwardParams {
  Projection projection;
  Features w;
  const float *maximum, *normalizer, *packed, *packed_t;  // the last three are gradients
  void* grad_kqv;
  int warp_bytes;
};

template <typename T>
__global__ void __launch_bounds__(kWarps* kLanes, 2)
    layer_keys_backward_kernel(const KeysBackwardParams p) {
  const Projection& projection = p.projection;
  const int64_t tile = int64_t(blockIdx.x) * (blockDim.x / kLanes) + warp_index();
  if (tile >= projection.images * projection.tiles) return;
  const int64_t image = tile / projection.tiles;
  const int first = static_cast<int>(tile - image * projection.tiles) * kRows;
  char* shared = reinterpret_cast<char*>(dynamic_shared) + warp_index() * p.warp_bytes;
  auto* keys = reinterpret_cast<float*>(shared);
  float* values = keys + kTileFloats;
  {
    Wide made[2];
    project<T, 2>(projection, shared, image, first, {kKey, kValue}, made);
    limit(made[0]);
    keep_sums(made[0], keys, kTilePitch);
    keep_sums(made[1], values, kTilePitch);
  }
  __syncwarp();
  const KeySums sums = {p.maximum + image * p.w.count, nullptr, nullptr, nullptr};
  const KeySums grads = {nullptr, p.normalizer + image * p.w.count,
                         p.packed + image * p.w.packed_floats(),
                         p.packed_t + image * p.w.packed_t_floats()};
  Wide grad_keys, grad_values;
  keys_backward(p.w, sums, grads, keys, values, grad_keys, grad_values);
  const int64_t row = 3 * p.w.embed;
  const bool vectors = p.w.embed % Vec<T>::size == 0;
  T* to = static_cast<T*>(p.grad_kqv) + (image * projection.tokens + first) * row;
  store_rows(grad_keys, to + kKey * p.w.embed, projection.tokens - first, p.w.embed, row, vectors);
  Wide skip;
  load_sums<T>({static_cast<const T*>(p.grad_kqv) + kValue * p.w.embed, projection.tokens * row,
                row, 1, vectors},
               image, first, projection.tokens, p.w.embed, skip);
  add(grad_values, skip);
  store_rows(grad_values, to + kValue * p.w.embed, projection.tokens - first, p.w.embed, row,
             vectors);
}

struct TailTensors {
  Tensor proj_weight, proj_bias, norm_weight, norm_bias, mlp_in_weight, mlp_in_bias, mlp_out_weight,
      mlp_out_bias;
};

// Everything that both directions need, checked and packed. It owns the packed forms.
class Layer {
 public:
  Layer(const Tensor& x, const Tensor& w, Tensor norm_weight, Tensor norm_bias, Tensor kqv_weight,
        Tensor kqv_bias, TailTensors tail, const std::optional<Tensor>& seed, int64_t kernel_size,
        int64_t stride, int64_t padding, double eps, double dropout_p, bool backward)
      : device_(x), packed_w_(kName, w, eps, backward, device_), seed_(seed) {
    STD_TORCH_CHECK(x.dim() == 4, kName, ": x must have 4 dimensions, got ", x.dim());
    map_ = make_geometry(kName, x.size(0), x.size(1), x.size(2), x.size(3), kernel_size, stride,
                         padding);
    const int64_t width = map_.token_width(), embed = w.size(1);
    const int64_t hidden = tail.mlp_in_weight.dim() == 2 ? tail.mlp_in_weight.size(0) : 0;
    STD_TORCH_CHECK(hidden >= 1 && hidden <= kWidest, kName, ": expected 1 to ", kWidest,
                    " hidden units, got ", hidden);
    STD_TORCH_CHECK(map_.batch * map_.rows * map_.columns <= std::numeric_limits<int>::max(), kName,
                    ": more than 2^31 tokens");
    STD_TORCH_CHECK(
        dropout_p == 0 || (seed && seed->scalar_type() == ScalarType::Long && seed->numel() == 1),
        kName, ": seed must be an int64 tensor of one element");
    const auto checked = [&](const char* argument, const Tensor& tensor,
                             std::initializer_list<int64_t> shape) -> const void* {
      bool same = tensor.dim() == static_cast<int64_t>(shape.size()) &&
                  tensor.scalar_type() == x.scalar_type();
      int64_t i = 0;
      for (int64_t size : shape) same = same && tensor.size(i++) == size;
      STD_TORCH_CHECK(same, kName, ": ", argument, " has the wrong shape or dtype");
      kept_.push_back(torch::stable::contiguous(tensor));
      return kept_.back().const_data_ptr();
    };
    projection.norm = {checked("norm1_weight", norm_weight, {width}),
                       checked("norm1_bias", norm_bias, {width}), kNormEps};
    const void* kqv = checked("kqv_weight", kqv_weight, {3 * embed, width});
    projection.bias = checked("kqv_bias", kqv_bias, {3 * embed});
    projection.embed = static_cast<int>(embed);
    projection.groups = features().embed_groups();
    projection.depth = static_cast<int>(divide_up(width, 16) * 16);
    projection.images = map_.batch;
    projection.tokens = map_.rows * map_.columns;
    projection.tiles = static_cast<int>(divide_up(projection.tokens, kRows));
    this->tail.embed = static_cast<int>(embed);
    this->tail.hidden = static_cast<int>(hidden);
    this->tail.dropout = make_dropout(
        dropout_p, seed ? static_cast<const int64_t*>(seed->const_data_ptr()) : nullptr);
    this->tail.proj_bias = checked("proj_bias", tail.proj_bias, {embed});
    this->tail.norm_gain = checked("norm2_weight", tail.norm_weight, {embed});
    this->tail.norm_offset = checked("norm2_bias", tail.norm_bias, {embed});
    this->tail.mlp_in_bias = checked("mlp_0_bias", tail.mlp_in_bias, {hidden});
    this->tail.mlp_out_bias = checked("mlp_2_bias", tail.mlp_out_bias, {embed});
    const void* proj = checked("proj_weight", tail.proj_weight, {embed, embed});
    const void* mlp_in = checked("mlp_0_weight", tail.mlp_in_weight, {hidden, embed});
    const void* mlp_out = checked("mlp_2_weight", tail.mlp_out_weight, {embed, hidden});
    if (map_.batch == 0) return;
    with_element_type(kName, x.scalar_type(), [&](auto zero) {
      using T = decltype(zero);
      projection.patches = make_patches<T>(map_, x);
      projection.packed = packed_kqv<T>(x, kqv);
      this->tail.proj = packed_linear<T>(x, proj, embed, embed, false);
      this->tail.mlp_in = packed_linear<T>(x, mlp_in, hidden, embed, false);
      this->tail.mlp_out = packed_linear<T>(x, mlp_out, embed, hidden, false);
      if (!backward) return;
      this->tail.proj_t = packed_linear<T>(x, proj, embed, embed, true);
      this->tail.mlp_in_t = packed_linear<T>(x, mlp_in, hidden, embed, true);
      this->tail.mlp_out_t = packed_linear<T>(x, mlp_out, embed, hidden, true);
    });
  }

  const DeviceScope& device() const { return device_; }
  const Features& features() const { return packed_w_.features(); }

  // The projection with a chunk such that `warps` warps, each of at least `least` bytes, fit beside
  // `fixed` bytes. Fewer warps are better than chunks, if there may be fewer.
  template <typename T>
  Projection in_shared(int& warps, int least, int fixed, int& warp_bytes, bool fewer) const {
    Projection result = projection;
    result.chunk = projection.depth;
    const auto bytes = [&] { return std::max<int>(least, TokenTile<T>::bytes(result.chunk)); };
    // Two blocks of a multiprocessor with 164 KiB, one where it has 100 KiB.
    const int most = fewer ? 48 * 1024 : 80 * 1024;
    const int all = warps;
    while (fewer && warps > 1 && warps * bytes() > most) warps /= 2;
    if (fixed + warps * int64_t(bytes()) > most) {
      warps = all;
      while (fixed + warps * int64_t(bytes()) > most && result.chunk > 16) {
        result.chunk = static_cast<int>(divide_up(result.chunk, 32) * 16);
      }
    }
    warp_bytes = bytes();
    return result;
  }

  Projection projection = {};
  Tail tail = {};

 private:
  template <typename T>
  const void* packed_kqv(const Tensor& like, const void* weight) {
    const Patches& patches = projection.patches;
    PackParams p = {};
    p.from = weight;
    p.depth = patches.width();
    p.columns = 3 * projection.embed;
    p.section = projection.embed;
    p.column_stride = patches.width();
    p.inner = patches.by_tap ? map_.channels : std::max(1, p.depth);
    p.outer_stride = 1;
    p.inner_stride = patches.by_tap ? map_.kernel * map_.kernel : 1;
    p.groups_per_section = projection.groups;
    p.groups = 3 * projection.groups;
    return pack<T>(like, p);
  }
  // The weight (outputs × inputs) of a linear map as inputs × outputs, or as it is.
  template <typename T>
  const void* packed_linear(const Tensor& like, const void* weight, int64_t outputs, int64_t inputs,
                            bool transposed) {
    PackParams p = {};
    p.from = weight;
    p.depth = static_cast<int>(transposed ? outputs : inputs);
    p.columns = p.section = static_cast<int>(transposed ? inputs : outputs);
    p.inner = 1;
    p.outer_stride = transposed ? inputs : 1;
    p.column_stride = transposed ? 1 : inputs;
    p.groups = p.groups_per_section = static_cast<int>(divide_up(p.columns, kGroup));
    return pack<T>(like, p);
  }
  template <typename T>
  const void* pack(const Tensor& like, PackParams p) {
    kept_.push_back(torch::stable::new_empty(like, {packed_size(p.depth, p.groups)}));
    p.to = kept_.back().mutable_data_ptr();
    launch_pack<T>(p, 1, device_);
    return p.to;
  }

  DeviceScope device_;
  PackedFeatures packed_w_;
  std::optional<Tensor> seed_;
  Geometry map_ = {};
  std::vector<Tensor> kept_;
};

std::tuple<Tensor, Tensor, Tensor, Tensor> performer_layer(
    Tensor x, Tensor w, Tensor norm1_weight, Tensor norm1_bias, Tensor kqv_weight, Tensor kqv_bias,
    Tensor proj_weight, Tensor proj_bias, Tensor norm2_weight, Tensor norm2_bias,
    Tensor mlp_0_weight, Tensor mlp_0_bias, Tensor mlp_2_weight, Tensor mlp_2_bias,
    std::optional<Tensor> seed, int64_t kernel_size, int64_t stride, int64_t padding, double eps,
    double dropout_p) {
  const Layer layer(x, w, norm1_weight, norm1_bias, kqv_weight, kqv_bias,
                    {proj_weight, proj_bias, norm2_weight, norm2_bias, mlp_0_weight, mlp_0_bias,
                     mlp_2_weight, mlp_2_bias},
                    seed, kernel_size, stride, padding, eps, dropout_p, false);
  const Features& f = layer.features();
  const DeviceScope& device = layer.device();
  const int64_t images = layer.projection.images, tokens = layer.projection.tokens;
  const int64_t tiles = layer.projection.tiles;
  Tensor out = torch::stable::new_empty(x, {images, tokens, f.embed});
  Tensor maximum = torch::stable::new_empty(x, {images, f.count}, ScalarType::Float);
  Tensor normalizer = torch::stable::new_empty(x, {images, f.count}, ScalarType::Float);
  Tensor sums = torch::stable::new_empty(x, {images, f.count, f.embed}, ScalarType::Float);
  if (images == 0) return {out, maximum, normalizer, sums};
  const int64_t chunk = kRows * tiles_of_part(images * tiles * f.groups(), device);
  const int64_t chunks = divide_up(tokens, chunk);
  const PartMemory parts(x, f, images * chunks);
  const Tensor packed = new_floats(x, images * f.packed_floats());
  with_element_type(kName, x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    KeysParams keys = {};
    int warps = kWarps;
    keys.projection = layer.in_shared<T>(warps, kKeysBytes, 0, keys.warp_bytes, true);
    keys.w = f;
    keys.chunk = static_cast<int>(chunk);
    keys.chunks = static_cast<int>(chunks);
    keys.parts = parts.parts();
    device.launch("performer_layer_keys", layer_keys_kernel<T>,
                  dim3(static_cast<unsigned>(divide_up(images * chunks, warps)),
                       static_cast<unsigned>(f.groups())),
                  warps * kLanes, warps * keys.warp_bytes, keys);
    launch_combine<true>({f, parts.parts(), keys.chunks, images, floats_of(maximum),
                          floats_of(normalizer), floats_of(sums), floats_of(packed), nullptr},
                         device);
    QueriesParams queries = {};
    warps = kWarps;
    queries.projection = layer.in_shared<T>(warps, kQueriesBytes, 0, queries.warp_bytes, true);
    queries.w = f;
    queries.tail = layer.tail;
    queries.maximum = floats_of(maximum);
    queries.normalizer = floats_of(normalizer);
    queries.packed = floats_of(packed);
    queries.out = out.mutable_data_ptr();
    queries.vectors = f.embed % Vec<T>::size == 0;
    device.launch("performer_layer_queries", layer_queries_kernel<T>,
                  dim3(static_cast<unsigned>(divide_up(images * tiles, warps))), warps * kLanes,
                  warps * queries.warp_bytes, queries);
  });
  return {out, maximum, normalizer, sums};
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                             Tensor, Tensor, Tensor, Tensor>;

Gradients performer_layer_backward(Tensor grad, Tensor x, Tensor w, Tensor norm1_weight,
                                   Tensor norm1_bias, Tensor kqv_weight, Tensor kqv_bias,
                                   Tensor proj_weight, Tensor proj_bias, Tensor norm2_weight,
                                   Tensor norm2_bias, Tensor mlp_0_weight, Tensor mlp_0_bias,
                                   Tensor mlp_2_weight, Tensor mlp_2_bias,
                                   std::optional<Tensor> seed, Tensor maximum, Tensor normalizer,
                                   Tensor sums, int64_t kernel_size, int64_t stride,
                                   int64_t padding, double eps, double dropout_p, bool need_x) {
  const Layer layer(x, w, norm1_weight, norm1_bias, kqv_weight, kqv_bias,
                    {proj_weight, proj_bias, norm2_weight, norm2_bias, mlp_0_weight, mlp_0_bias,
                     mlp_2_weight, mlp_2_bias},
                    seed, kernel_size, stride, padding, eps, dropout_p, true);
  const Features& f = layer.features();
  const DeviceScope& device = layer.device();
  const int64_t images = layer.projection.images, tokens = layer.projection.tokens;
  const int64_t tiles = layer.projection.tiles, hidden = layer.tail.hidden, embed = f.embed;
  STD_TORCH_CHECK(grad.dim() == 3 && grad.size(0) == images && grad.size(1) == tokens &&
                      grad.size(2) == embed && grad.scalar_type() == x.scalar_type(),
                  kName, ": grad has the wrong shape or dtype");
  const auto like = [&](std::initializer_list<int64_t> shape) {
    return torch::stable::new_empty(x, shape);
  };
  Tensor grad_kqv = like({images, tokens, 3 * embed});
  Tensor grad_proj = like({embed, embed}), grad_proj_bias = like({embed});
  Tensor grad_gain = like({embed}), grad_offset = like({embed});
  Tensor grad_mlp_in = like({hidden, embed}), grad_mlp_in_bias = like({hidden});
  Tensor grad_mlp_out = like({embed, hidden}), grad_mlp_out_bias = like({embed});

  maximum = torch::stable::contiguous(maximum);
  normalizer = torch::stable::contiguous(normalizer);
  sums = torch::stable::contiguous(sums);
  // Blocks that run at the same time, twice over; each has a slot.
  const int64_t items = images * divide_up(tokens, kWarps * kRows);
  const int64_t slots = std::min<int64_t>(items, std::max(1, device.enough_blocks() / 8));
  const Tensor slot_memory = new_floats(x, slots * TailSlot::kFloats);
  const int64_t chunk = kGradientWarps * kRows * tiles_of_part(images * tiles, device);
  const int64_t chunks = divide_up(tokens, chunk);
  const PartMemory parts(x, f, images * chunks);
  const Tensor of_normalizer = new_floats(x, images * f.count);
  const Tensor of_packed = new_floats(x, images * f.packed_floats());
  const Tensor of_packed_t = new_floats(x, images * f.packed_t_floats());
  std::optional<Tensor> packed, packed_t;
  if (images > 0) {
    packed = packed_floats(sums, images, f.count, f.embed, false, device);
    packed_t = packed_floats(sums, images, f.count, f.embed, true, device);
  }
  with_element_type(kName, x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    if (images > 0) {
      TailBackwardParams tail = {};
      int warps = kWarps;
      const int operands = 2 * tail_operand_elements<T>() * static_cast<int>(sizeof(T));
      tail.projection = layer.in_shared<T>(warps, std::max(kQueriesBytes, tail_bytes<T>()),
                                           operands, tail.warp_bytes, false);
      tail.w = f;
      tail.tail = layer.tail;
      tail.maximum = floats_of(maximum);
      tail.normalizer = floats_of(normalizer);
      tail.packed = floats_of(*packed);
      tail.grad = rows_of<T>(grad);
      tail.grad_kqv = grad_kqv.mutable_data_ptr();
      tail.slots = floats_of(slot_memory);
      device.launch("performer_layer_tail_backward", tail_backward_kernel<T>,
                    dim3(static_cast<unsigned>(slots)), kWarps * kLanes,
                    operands + kWarps * tail.warp_bytes, tail);

      QueriesBackwardParams queries = {};
      warps = kGradientWarps;
      const int shared_tiles =
          kGradientWarps * (2 * kTileFloats + kRows) * static_cast<int>(sizeof(float));
      queries.projection = layer.in_shared<T>(warps, kTileFloats * static_cast<int>(sizeof(float)),
                                              shared_tiles, queries.warp_bytes, false);
      queries.w = f;
      queries.maximum = tail.maximum;
      queries.normalizer = tail.normalizer;
      queries.packed = tail.packed;
      queries.packed_t = floats_of(*packed_t);
      queries.grad_kqv = tail.grad_kqv;
      queries.chunk = static_cast<int>(chunk);
      queries.chunks = static_cast<int>(chunks);
      queries.parts = parts.parts();
      device.launch("performer_layer_queries_backward", layer_queries_backward_kernel<T>,
                    dim3(static_cast<unsigned>(images * chunks)), kGradientWarps * kLanes,
                    shared_tiles + kGradientWarps * queries.warp_bytes, queries);
      launch_combine<false>(
          {f, parts.parts(), queries.chunks, images, nullptr, floats_of(of_normalizer), nullptr,
           floats_of(of_packed), floats_of(of_packed_t)},
          device);

      KeysBackwardParams keys = {};
      warps = kWarps;
      keys.projection = layer.in_shared<T>(warps, 2 * kQueriesBytes, 0, keys.warp_bytes, true);
      keys.w = f;
      keys.maximum = tail.maximum;
      keys.normalizer = floats_of(of_normalizer);
      keys.packed = floats_of(of_packed);
      keys.packed_t = floats_of(of_packed_t);
      keys.grad_kqv = tail.grad_kqv;
      device.launch("performer_layer_keys_backward", layer_keys_backward_kernel<T>,
                    dim3(static_cast<unsigned>(divide_up(images * tiles, warps))), warps * kLanes,
                    warps * keys.warp_bytes, keys);
    }
    TailFinishParams finish = {
        floats_of(slot_memory),          static_cast<int>(slots),
        static_cast<int>(embed),         static_cast<int>(hidden),
        grad_proj.mutable_data_ptr(),    grad_proj_bias.mutable_data_ptr(),
        grad_gain.mutable_data_ptr(),    grad_offset.mutable_data_ptr(),
        grad_mlp_in.mutable_data_ptr(),  grad_mlp_in_bias.mutable_data_ptr(),
        grad_mlp_out.mutable_data_ptr(), grad_mlp_out_bias.mutable_data_ptr()};
    device.launch("performer_layer_tail_finish", tail_finish_kernel<T>,
                  dim3(static_cast<unsigned>(divide_up(TailSlot::kFloats, kFinishThreads))),
                  kFinishThreads, 0, finish);
  });
  auto [grad_x, grad_kqv_weight, grad_kqv_bias, grad_norm_weight, grad_norm_bias] =
      soft_split_linear_backward(grad_kqv, x, kqv_weight, norm1_weight, norm1_bias, kernel_size,
                                 stride, padding, kNormEps, need_x);
  return {grad_x,           grad_norm_weight, grad_norm_bias,   grad_kqv_weight, grad_kqv_bias,
          grad_proj,        grad_proj_bias,   grad_gain,        grad_offset,     grad_mlp_in,
          grad_mlp_in_bias, grad_mlp_out,     grad_mlp_out_bias};
}

STABLE_TORCH_LIBRARY_IMPL(t2t_cuda, T2T_DISPATCH_KEY, m) {
  m.impl("performer_layer", TORCH_BOX(&performer_layer));
  m.impl("performer_layer_backward", TORCH_BOX(&performer_layer_backward));
}

}  // namespace
}  // namespace t2t
