// What a T2T layer does with the attention's result y, on tiles of 16 tokens, forward and backward:
//   a = v + dropout(proj(y)), out = a + dropout(mlp_out(gelu(mlp_in(norm(a)))))
// Operands of products are rounded to the map's type, as plain PyTorch rounds every intermediate.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>

#include "geometry.h"
#include "launch.h"
#include "philox.cuh"
#include "rows.cuh"

namespace t2t {

constexpr float kNormEps = 1e-5f;
// The dropouts' sites, as in the reference.
constexpr uint32_t kAfterProj = 0, kAfterMlp = 1;
// Of a block that works on tails.
constexpr int kWarps = 4;

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

// out of the tokens first_token … of all images; `add_v(a)` adds v, `operand` is the warp's work
// space.
template <typename T, bool kDropout, typename AddV>
__device__ Wide tail_forward(const Tail& t, const Wide& y, AddV add_v, int64_t first_token,
                             T* operand) {
  // What was there may still be read by other lanes.
  __syncwarp();
  keep_rounded(y, operand);
  __syncwarp();
  Wide a = times(operand, t.proj, t.embed_depth(), t.embed);
  scale_and_shift<T>(a, nullptr, t.proj_bias, t.embed);
  if (kDropout) drop(t, kAfterProj, first_token, a);
  add_v(a);

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
  if (kDropout) drop(t, kAfterMlp, first_token, out);
  add(out, a);
  return out;
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

struct TailBackward {
  Tail tail;
  int64_t images;
  int tokens;  // of an image
  Rows grad;
  // (image, token, …), with so many elements from a token to the next.
  void *grad_y, *grad_v;
  int y_stride, v_stride;
  float* slots;
  int warp_bytes;
};

// Besides each warp's own memory: the left and right operands of a block's 64 tokens.
template <typename T>
__host__ __device__ constexpr int tail_operand_elements() {
  return kWarps * kRows * padded_row<T>(kWidest);
}
template <typename T>
constexpr int tail_operand_bytes() {
  return 2 * tail_operand_elements<T>() * static_cast<int>(sizeof(T));
}
// Of a warp, when it has left the attention: y, and the normalised rows.
template <typename T>
__host__ __device__ constexpr int tail_bytes() {
  return kRows * padded_row<T>(kWidest) * sizeof(T) + kTileFloats * sizeof(float);
}

// `attend(image, first, shared, kept_y)` leaves y of a warp's tokens, rounded, in `kept_y`, where
// its memory `shared` begins, and returns v. Gradients: those of y and v to memory, those of the
// parameters to the block's slot.
template <typename T, bool kDropout, typename Attend>
__device__ void tail_backward(const TailBackward& p, Attend attend) {
  constexpr int kPitch = padded_row<T>(kWidest);
  const Tail& t = p.tail;
  T* lefts = reinterpret_cast<T*>(dynamic_shared);
  T* rights = lefts + tail_operand_elements<T>();
  T* left = lefts + warp_index() * kRows * kPitch;
  T* right = rights + warp_index() * kRows * kPitch;
  char* shared =
      reinterpret_cast<char*>(rights + tail_operand_elements<T>()) + warp_index() * p.warp_bytes;
  T* kept_y = reinterpret_cast<T*>(shared);
  auto* kept_norm = reinterpret_cast<float*>(kept_y + kRows * kPitch);

  // A warp has 16 rows of each matrix, a thread one column of each vector: of the left operand the
  // first 64 threads, of the right one the others.
  float* slot = p.slots + int64_t(blockIdx.x) * TailSlot::kFloats;
  const auto add_columns = [&](int vector, const T* tile, bool first) {
    float total = 0.f;
    for (int row = 0; row < kWarps * kRows; ++row) {
      total += static_cast<float>(tile[row * kPitch + threadIdx.x % kWidest]);
    }
    float& at = slot[vector + threadIdx.x % kWidest];
    at = first ? total : at + total;
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

  const bool upper = threadIdx.x < kWidest;
  const int64_t groups = (p.tokens + kWarps * kRows - 1) / (kWarps * kRows);
  for (int64_t item = blockIdx.x; item < p.images * groups; item += gridDim.x) {
    const bool begins = item == blockIdx.x;
    const int64_t image = item / groups;
    const int first =
        static_cast<int>(item - image * groups) * kWarps * kRows + warp_index() * kRows;
    const int64_t first_token = image * p.tokens + first;
    Wide hidden;
    float rstd[2];
    {
      const Wide v = attend(image, first, shared, kept_y);
      __syncwarp();
      Wide a = times(kept_y, t.proj, t.embed_depth(), t.embed);
      scale_and_shift<T>(a, nullptr, t.proj_bias, t.embed);
      if (kDropout) drop(t, kAfterProj, first_token, a);
      add(a, v);
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
      load_rows<T>(p.grad, image, first, p.tokens, t.embed, grad);
      if (kDropout) drop(t, kAfterMlp, first_token, grad);
      keep_rounded(grad, left);
#pragma unroll
      for (int i = 0; i < 16 * kWidestGroups; ++i) {
        float& value = activated.at[i / 16][i / 8 % 2][i % 8];
        value *= normal_integral(value);
      }
      keep_rounded(activated, right);
    }
    __syncthreads();
    add_product(TailSlot::kMlpOut, begins);
    if (upper) add_columns(TailSlot::kMlpOutBias, lefts, begins);
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
    add_product(TailSlot::kMlpIn, begins);
    if (upper) add_columns(TailSlot::kMlpInBias, lefts, begins);
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
    add_columns(upper ? TailSlot::kNormOffset : TailSlot::kNormGain, upper ? lefts : rights,
                begins);
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
#pragma unroll
      for (int i = 0; i < 16 * kWidestGroups; ++i) {
        const int half = i / 8 % 2;
        float& value = grad.at[i / 16][half][i % 8];
        value = (value - mean[half] - normalized.at[i / 16][half][i % 8] * mean_of_product[half]) *
                rstd[half];
      }
      add_rows<T>(p.grad, image, first, p.tokens, t.embed, grad);
    }
    const int left_tokens = p.tokens - first;
    store_rows(grad, static_cast<T*>(p.grad_v) + first_token * p.v_stride, left_tokens, t.embed,
               p.v_stride);

    // proj: dropout's gradient by y.
    if (kDropout) drop(t, kAfterProj, first_token, grad);
    keep_rounded(grad, left);
    {
      Wide y;
      take_sums(kept_y, y);
      keep_rounded(y, right);
    }
    __syncthreads();
    add_product(TailSlot::kProj, begins);
    if (upper) add_columns(TailSlot::kProjBias, lefts, begins);
    const Wide grad_y = times(left, t.proj_t, t.embed_depth(), t.embed);
    store_rows(grad_y, static_cast<T*>(p.grad_y) + first_token * p.y_stride, left_tokens, t.embed,
               p.y_stride);
    __syncthreads();
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

struct TailTensors {
  torch::stable::Tensor proj_weight, proj_bias, norm_weight, norm_bias, mlp_in_weight, mlp_in_bias,
      mlp_out_weight, mlp_out_bias;
};

// The slots of the blocks of a backward, and what becomes of them.
class TailSlots {
 public:
  // Blocks that run at the same time, twice over.
  TailSlots(const torch::stable::Tensor& like, int64_t images, int64_t tokens,
            const DeviceScope& device)
      : count_(std::min<int64_t>(images * divide_up(tokens, kWarps * kRows),
                                 std::max(1, device.enough_blocks() / 8))),
        memory_(new_floats(like, count_ * TailSlot::kFloats)) {}

  int count() const { return static_cast<int>(count_); }
  float* floats() const { return floats_of(memory_); }

  // The gradients of the tail's parameters.
  template <typename T>
  TailTensors finish(int64_t embed, int64_t hidden, const torch::stable::Tensor& like,
                     const DeviceScope& device) const {
    const auto empty = [&](std::initializer_list<int64_t> shape) {
      return torch::stable::new_empty(like, shape);
    };
    TailTensors to = {empty({embed, embed}),  empty({embed}),         empty({embed}),
                      empty({embed}),         empty({hidden, embed}), empty({hidden}),
                      empty({embed, hidden}), empty({embed})};
    const TailFinishParams params = {floats(),
                                     count(),
                                     static_cast<int>(embed),
                                     static_cast<int>(hidden),
                                     to.proj_weight.mutable_data_ptr(),
                                     to.proj_bias.mutable_data_ptr(),
                                     to.norm_weight.mutable_data_ptr(),
                                     to.norm_bias.mutable_data_ptr(),
                                     to.mlp_in_weight.mutable_data_ptr(),
                                     to.mlp_in_bias.mutable_data_ptr(),
                                     to.mlp_out_weight.mutable_data_ptr(),
                                     to.mlp_out_bias.mutable_data_ptr()};
    device.launch("tail_finish", tail_finish_kernel<T>,
                  dim3(static_cast<unsigned>(divide_up(TailSlot::kFloats, kFinishThreads))),
                  kFinishThreads, 0, params);
    return to;
  }

 private:
  int64_t count_;
  torch::stable::Tensor memory_;
};

template <typename T, typename Params>
void launch_tail_backward(void (*kernel)(Params), const TailSlots& slots, const Params& params,
                          const DeviceScope& device) {
  device.launch("tail_backward", kernel, dim3(static_cast<unsigned>(slots.count())),
                kWarps * kLanes, tail_operand_bytes<T>() + kWarps * params.backward.warp_bytes,
                params);
}

}  // namespace t2t
