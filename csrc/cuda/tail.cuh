// The tail of a T2T layer after the attention's result y, for half types and 64 elements, forward
// and backward:
//   a = v + dropout(proj(y)), out = a + dropout(mlp_out(gelu(mlp_in(norm(a)))))
// Operands are in registers, rounded as plain PyTorch rounds every intermediate, and weights in
// shared memory.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "operands.cuh"
#include "philox.cuh"

namespace t2t {

constexpr float kNormEps = 1e-5f;
// The dropouts' sites, as in the reference.
constexpr uint32_t kAfterProj = 0, kAfterMlp = 1;

// The tail's parameters, or their gradients.
struct TailTensors {
  torch::stable::Tensor proj_weight, proj_bias, norm_weight, norm_bias, mlp_in_weight, mlp_in_bias,
      mlp_out_weight, mlp_out_bias;
};

// The weight of a linear map, outputs × inputs, as a matrix.
template <typename T>
__device__ void load_weight(uint4* to, const void* weight) {
  const auto* from = static_cast<const uint16_t*>(weight);
  for (int i = threadIdx.x; i < kMatrixVectors; i += blockDim.x) {
    uint32_t pairs[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      pairs[e] = from[i * 8 + 2 * e] | uint32_t(from[i * 8 + 2 * e + 1]) << 16;
    }
    store_in_matrix(to, i / 8, i % 8 / 4, i % 4, pairs);
  }
}

// The weights of the tail: proj, mlp_in, mlp_out.
constexpr int kTailVectors = 3 * kMatrixVectors;

// The tail's tensors in memory, all contiguous and of 64 rows and columns.
struct TailPointers {
  const void *proj, *proj_bias, *norm_gain, *norm_offset, *mlp_in, *mlp_in_bias, *mlp_out,
      *mlp_out_bias;
  Dropout dropout;
};

// The checked tail arguments of an operator; it keeps contiguous copies alive.
class TailArguments {
 public:
  TailArguments(const char* name, const TailNames& names, const TailTensors& tensors,
                const torch::stable::Tensor& like, Dropout dropout)
      : name_(name), dtype_(like.scalar_type()) {
    pointers_ = {checked(names.proj_weight, tensors.proj_weight, {kWidest, kWidest}),
                 checked(names.proj_bias, tensors.proj_bias, {kWidest}),
                 checked(names.norm_weight, tensors.norm_weight, {kWidest}),
                 checked(names.norm_bias, tensors.norm_bias, {kWidest}),
                 checked(names.mlp_in_weight, tensors.mlp_in_weight, {kWidest, kWidest}),
                 checked(names.mlp_in_bias, tensors.mlp_in_bias, {kWidest}),
                 checked(names.mlp_out_weight, tensors.mlp_out_weight, {kWidest, kWidest}),
                 checked(names.mlp_out_bias, tensors.mlp_out_bias, {kWidest}),
                 dropout};
  }
  const TailPointers& operator()() const { return pointers_; }

 private:
  const void* checked(const char* argument, const torch::stable::Tensor& tensor,
                      std::initializer_list<int64_t> shape) {
    check_tensor(name_, argument, tensor, shape, dtype_);
    kept_.push_back(torch::stable::contiguous(tensor));
    return kept_.back().const_data_ptr();
  }

  const char* name_;
  torch::headeronly::ScalarType dtype_;
  std::vector<torch::stable::Tensor> kept_;
  TailPointers pointers_ = {};
};

// Vectors in shared memory, as floats.
struct TailVectors {
  float proj_bias[kWidest], norm_gain[kWidest], norm_offset[kWidest], mlp_in_bias[kWidest],
      mlp_out_bias[kWidest];

  template <typename T>
  __device__ void load(const TailPointers& p) {
    for (int i = threadIdx.x; i < kWidest; i += blockDim.x) {
      const auto at = [&](const void* from) {
        return static_cast<float>(static_cast<const T*>(from)[i]);
      };
      proj_bias[i] = at(p.proj_bias);
      norm_gain[i] = at(p.norm_gain);
      norm_offset[i] = at(p.norm_offset);
      mlp_in_bias[i] = at(p.mlp_in_bias);
      mlp_out_bias[i] = at(p.mlp_out_bias);
    }
  }
};

// Loads both from memory; a barrier must follow.
template <typename T>
__device__ void load_tail(uint4* weights, TailVectors& vectors, const TailPointers& tail) {
  load_weight<T>(weights, tail.proj);
  load_weight<T>(weights + kMatrixVectors, tail.mlp_in);
  load_weight<T>(weights + 2 * kMatrixVectors, tail.mlp_out);
  vectors.load<T>(tail);
  if constexpr (kHasWarpgroups) show_to_products();
}

__device__ inline void add_columns(Sums<2>& sums, const float* vector) {
#pragma unroll
  for (int group = 0; group < 2; ++group) {
    float addends[8];
    load_eight(addends, vector + sum_column(group));
#pragma unroll
    for (int i = 0; i < 16; ++i) sums.at[group][i / 8][i % 8] += addends[i % 8];
  }
}

// The elements of a lane's 32 in a tile that dropout keeps: bit 16·group + 8·half + e.
struct Kept {
  uint32_t bits;

  // Of tokens first_token … of all images. A block's numbers are those of a lane's eight elements.
  __device__ Kept(const Dropout& dropout, uint32_t site, int64_t first_token) : bits(~0u) {
    if (dropout.seed == nullptr) return;
    const auto seed = static_cast<uint64_t>(*dropout.seed);
    constexpr int kBlocksOfToken = kWidest / 8, kBlocksOfGroup = kGroup / 8;
    const uint64_t first = (first_token + lane_index() / 4) * kBlocksOfToken + lane_index() % 4;
    const uint64_t below = first + 8 * kBlocksOfToken;
    uint32_t words[4][4];
    philox(seed, site, {first, below, first + kBlocksOfGroup, below + kBlocksOfGroup}, words);
    bits = 0;
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const uint32_t word = words[i / 4][i % 4];
      if ((word & 0xFFFF) >= dropout.threshold) bits |= 1u << 2 * i;
      if ((word >> 16) >= dropout.threshold) bits |= 2u << 2 * i;
    }
  }
  __device__ void apply(const Dropout& dropout, Sums<2>& sums) const {
    if (dropout.seed == nullptr) return;
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      // The scale if the bit is set, else zero.
      const int kept = static_cast<int>(bits << (31 - i)) >> 31;
      sums.at[i / 16][i / 8 % 2][i % 8] *= __int_as_float(kept & __float_as_int(dropout.scale));
    }
  }
};

// Means of rows g and g + 8.
__device__ inline void row_means(const Sums<2>& sums, float (&mean)[2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float totals[2] = {};
#pragma unroll
    for (int i = 0; i < 16; ++i) totals[i % 2] += sums.at[i / 8][half][i % 8];
    mean[half] = sum_of_row(totals[0] + totals[1]) / kWidest;
  }
}

// Normalises rows without gain and offset; 1/σ goes to `rstd`.
__device__ inline void normalize_rows(Sums<2>& sums, float (&rstd)[2]) {
  float mean[2];
  row_means(sums, mean);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float squares[2] = {};
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      float& value = sums.at[i / 8][half][i % 8];
      value -= mean[half];
      squares[i % 2] += value * value;
    }
    rstd[half] = fast_rsqrt(sum_of_row(squares[0] + squares[1]) / kWidest + kNormEps);
#pragma unroll
    for (int i = 0; i < 16; ++i) sums.at[i / 8][half][i % 8] *= rstd[half];
  }
}

// normalised·gain + offset, rounded.
template <typename T>
__device__ Operand<2> scaled_rows(const Sums<2>& normalized, const TailVectors& vectors) {
  Sums<2> scaled;
#pragma unroll
  for (int group = 0; group < 2; ++group) {
    float gain[8], offset[8];
    load_eight(gain, vectors.norm_gain + sum_column(group));
    load_eight(offset, vectors.norm_offset + sum_column(group));
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      scaled.at[group][i / 8][i % 8] =
          normalized.at[group][i / 8][i % 8] * gain[i % 8] + offset[i % 8];
    }
  }
  return rounded_operand<T>(scaled);
}

// Φ(x) and the density of the normal distribution, the former to 1e-7 (Abramowitz and Stegun,
// 7.1.26), far below a half type's rounding.
__device__ inline float2 normal_distribution(float x) {
  const float t = fast_reciprocal(fmaf(0.3275911f * 0.70710678f, fabsf(x), 1.f));
  const float power = fast_exp2(x * x * (-0.5f * 1.44269504f));
  float series = fmaf(1.061405429f, t, -1.453152027f);
  series = fmaf(series, t, 1.421413741f);
  series = fmaf(series, t, -0.284496736f);
  series = fmaf(series, t, 0.254829592f);
  const float beyond = 0.5f * t * series * power;
  return {x < 0.f ? beyond : 1.f - beyond, 0.39894228f * power};
}

__device__ inline void apply_gelu(Sums<2>& sums) {
#pragma unroll
  for (int i = 0; i < 32; ++i) {
    float& value = sums.at[i / 16][i / 8 % 2][i % 8];
    value *= normal_distribution(value).x;
  }
}

// The tail of y, with packed weights: proj, mlp_in, mlp_out.
template <typename T>
__device__ Sums<2> tail_of(const Operand<2>& y, const Operand<2>& v, const uint4* weights,
                           const TailVectors& vectors, const Dropout& dropout,
                           int64_t first_token) {
  Sums<2> a = times_matrix<T, false>(y, weights);
  add_columns(a, vectors.proj_bias);
  Kept(dropout, kAfterProj, first_token).apply(dropout, a);
  add_operand<T>(a, v);

  Operand<2> operand;
  {
    Sums<2> normalized = a;
    float rstd[2];
    normalize_rows(normalized, rstd);
    operand = scaled_rows<T>(normalized, vectors);
  }
  Sums<2> hidden = times_matrix<T, false>(operand, weights + kMatrixVectors);
  add_columns(hidden, vectors.mlp_in_bias);
  apply_gelu(hidden);
  operand = rounded_operand<T>(hidden);
  Sums<2> out = times_matrix<T, false>(operand, weights + 2 * kMatrixVectors);
  add_columns(out, vectors.mlp_out_bias);
  Kept(dropout, kAfterMlp, first_token).apply(dropout, out);
#pragma unroll
  for (int i = 0; i < 32; ++i) {
    out.at[i / 16][i / 8 % 2][i % 8] += a.at[i / 16][i / 8 % 2][i % 8];
  }
  return out;
}

// ---- backward

// A block's part of the gradients of the tail: matrices (outputs × inputs), then vectors.
enum TailVector { kProjBias, kNormGain, kNormOffset, kMlpInBias, kMlpOutBias, kTailVectorCount };
struct TailGradients {
  float proj[kWidest][kWidest], mlp_in[kWidest][kWidest], mlp_out[kWidest][kWidest];
  float vectors[kTailVectorCount][kWidest];
};
constexpr int kTailGradientFloats = sizeof(TailGradients) / sizeof(float);

struct TailBackwardParams {
  TailPointers tail;
  Rows grad;  // of the tail's result
  int tokens;
  void* grad_v;  // (image, token, …), from a token to the next so many elements
  int64_t v_stride;
  TailGradients* slots;  // of each block
};

// A warp's part of a product of two tiles of all warps' tokens, 64 × 64.
using SharedSums = OuterSums<2, 2>;
__device__ inline int shared_row() { return warp_index() % 2 * 32; }
__device__ inline int shared_column() { return warp_index() / 2 * 16; }

template <typename T>
__device__ void add_shared(SharedSums& sums, T* left, T* right) {
  multiply_tiles(sums, left, shared_row() / 8, right, shared_column() / 8, kBlockTokens);
}
__device__ inline void store_shared(const SharedSums& sums, float (&to)[kWidest][kWidest]) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int row = shared_row() + sums.row(i / 4, i / 2 % 2);
    *reinterpret_cast<float2*>(&to[row][shared_column() + sums.column(i % 2)]) = {
        sums.at[i / 4][i % 2][i / 2 % 2][0], sums.at[i / 4][i % 2][i / 2 % 2][1]};
  }
}

// Gradients of vectors, sums over tokens: in shared memory, of either half of the block's tokens.
struct TailVectorSums {
  float at[kTailVectorCount][2][kWidest];

  __device__ void clear() {
    for (int i = threadIdx.x; i < kTailVectorCount * 2 * kWidest; i += blockDim.x)
      at[0][0][i] = 0.f;
  }
};

constexpr int kTailTilesBytes = 2 * kTokenTileElements * 2;
constexpr int kTailBackwardBytes =
    kTailVectors * 16 + static_cast<int>(sizeof(TailVectors) + sizeof(TailVectorSums));

// Adds a tile's columns: a warp adds up 16 of them, over half of the tokens.
template <typename T>
__device__ void add_columns_of(T* tile, float (&sums)[2][kWidest]) {
  const int half = warp_index() / 4, part = warp_index() % 4 * 2, lane = lane_index();
  const uint32_t ones = round_pair<T>(1.f, 1.f);
  float totals[2] = {}, unused[2] = {};
#pragma unroll
  for (int i = 0; i < kBlockTokens / 2; i += kRows) {
    uint32_t left[4];
    load_left(left, tile, half * (kBlockTokens / 2) + i, part);
    mma<T>(totals[0], unused[0], totals[1], unused[1], left, ones, ones);
  }
  if (lane % 4 == 0) {
    float* at = sums[half] + part * 8 + lane / 4;
    at[0] += totals[0];
    at[8] += totals[1];
  }
}

// A block's backward of the tail. All warps of a block take part in each tile.
template <typename T>
class TailBackward {
 public:
  // Shared memory: the weights, sums, and two tiles of the block's tokens. A barrier has to follow.
  __device__ TailBackward(const TailBackwardParams& p, const Rows& values, const uint4* weights,
                          const TailVectors& vectors, TailVectorSums& vector_sums, T* tiles)
      : p_(p),
        values_(values),
        weights_(weights),
        vectors_(vectors),
        vector_sums_(vector_sums),
        lefts_(tiles),
        rights_(tiles + kTokenTileElements) {
    proj_.clear();
    mlp_in_.clear();
    mlp_out_.clear();
    vector_sums_.clear();
  }

  // Tokens `first` … of an image, 16 of each warp: `y()` gives the attention's result, and
  // `use(grad)` takes its gradient. The gradient of the skip goes to memory. Gradients of tokens
  // beyond the image's last are zero.
  template <typename Attended, typename Use>
  __device__ void tile(int64_t image, int first, Attended y, Use use) {
    const int tokens = p_.tokens, first_token = static_cast<int>(image) * tokens + first;
    const Dropout& dropout = p_.tail.dropout;
    T* left = left_of_warp();
    T* right = rights_ + (left - lefts_);
    const Operand<2> skip = load_operand<T>(values_, image, first, tokens);
    const Operand<2> grad_out = load_operand<T>(p_.grad, image, first, tokens);

    // Forward, up to the hidden units.
    const Kept kept_proj(dropout, kAfterProj, first_token);
    float rstd[2];
    Sums<2> normalized = times_matrix<T, false>(y(), weights_);
    add_columns(normalized, vectors_.proj_bias);
    kept_proj.apply(dropout, normalized);
    add_operand<T>(normalized, skip);
    normalize_rows(normalized, rstd);
    Sums<2> hidden =
        times_matrix<T, false>(scaled_rows<T>(normalized, vectors_), weights_ + kMatrixVectors);
    add_columns(hidden, vectors_.mlp_in_bias);
    // Rounded, to halve the registers; plain PyTorch also normalises rounded rows.
    const Operand<2> kept_rows = rounded_operand<T>(normalized);

    // mlp_out: dropout's gradient by the activated units.
    Operand<2> grad;
    {
      Sums<2> dropped = sums_of<T>(grad_out);
      Kept(dropout, kAfterMlp, first_token).apply(dropout, dropped);
      grad = rounded_operand<T>(dropped);
    }
    Sums<2> slopes;
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      float& value = hidden.at[i / 16][i / 8 % 2][i % 8];
      const float2 normal = normal_distribution(value);
      slopes.at[i / 16][i / 8 % 2][i % 8] = fmaf(value, normal.y, normal.x);
      value *= normal.x;
    }
    keep_operand(grad, left);
    keep_operand(rounded_operand<T>(hidden), right);
    __syncthreads();
    add_shared(mlp_out_, lefts_, rights_);
    add_columns_of(lefts_, vector_sums_.at[kMlpOutBias]);
    hidden = times_matrix<T, true>(grad, weights_ + 2 * kMatrixVectors);
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      hidden.at[i / 16][i / 8 % 2][i % 8] *= slopes.at[i / 16][i / 8 % 2][i % 8];
    }
    grad = rounded_operand<T>(hidden);
    __syncthreads();

    // mlp_in: the hidden units' gradient by the norm's result.
    keep_operand(grad, left);
    keep_operand(scaled_rows<T>(sums_of<T>(kept_rows), vectors_), right);
    __syncthreads();
    add_shared(mlp_in_, lefts_, rights_);
    add_columns_of(lefts_, vector_sums_.at[kMlpInBias]);
    Sums<2> grads = times_matrix<T, true>(grad, weights_ + kMatrixVectors);
    __syncthreads();

    // The norm: its offset's gradient and, times the normalised rows, its gain's.
    keep_operand(rounded_operand<T>(grads), left);
    {
      Sums<2> product = sums_of<T>(kept_rows);
#pragma unroll
      for (int i = 0; i < 32; ++i) {
        product.at[i / 16][i / 8 % 2][i % 8] *= grads.at[i / 16][i / 8 % 2][i % 8];
      }
      keep_operand(rounded_operand<T>(product), right);
    }
    __syncthreads();
    add_columns_of(lefts_, vector_sums_.at[kNormOffset]);
    add_columns_of(rights_, vector_sums_.at[kNormGain]);
    through_norm(grads, sums_of<T>(kept_rows), rstd);
    add_operand<T>(grads, load_operand<T>(p_.grad, image, first, tokens));
    store_operand(rounded_operand<T>(grads),
                  static_cast<T*>(p_.grad_v) + int64_t(first_token) * p_.v_stride, p_.v_stride,
                  tokens - first);

    // proj: dropout's gradient by y.
    kept_proj.apply(dropout, grads);
    grad = rounded_operand<T>(grads);
    __syncthreads();
    keep_operand(grad, left);
    keep_operand(y(), right);
    __syncthreads();
    add_shared(proj_, lefts_, rights_);
    add_columns_of(lefts_, vector_sums_.at[kProjBias]);
    use(times_matrix<T, true>(grad, weights_));
    __syncthreads();
  }

  // The sums over all tiles to the block's slot.
  __device__ void store() {
    TailGradients& slot = p_.slots[blockIdx.x];
    store_shared(proj_, slot.proj);
    store_shared(mlp_in_, slot.mlp_in);
    store_shared(mlp_out_, slot.mlp_out);
    for (int i = threadIdx.x; i < kTailVectorCount * kWidest; i += blockDim.x) {
      const float (&halves)[2][kWidest] = vector_sums_.at[i / kWidest];
      slot.vectors[i / kWidest][i % kWidest] = halves[0][i % kWidest] + halves[1][i % kWidest];
    }
  }

 private:
  __device__ T* left_of_warp() const { return lefts_ + warp_index() * kRows * kWidest; }

  // Turns the gradient of the norm's result into that of its rows.
  __device__ void through_norm(Sums<2>& grads, const Sums<2>& rows, const float (&rstd)[2]) const {
    float mean[2], mean_of_product[2] = {};
#pragma unroll
    for (int group = 0; group < 2; ++group) {
      float gain[8];
      load_eight(gain, vectors_.norm_gain + sum_column(group));
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        float& value = grads.at[group][i / 8][i % 8];
        value *= gain[i % 8];
        mean_of_product[i / 8] += value * rows.at[group][i / 8][i % 8];
      }
    }
    row_means(grads, mean);
#pragma unroll
    for (int i = 0; i < 2; ++i) mean_of_product[i] = sum_of_row(mean_of_product[i]) / kWidest;
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      const int half = i / 8 % 2;
      float& value = grads.at[i / 16][half][i % 8];
      value =
          (value - mean[half] - rows.at[i / 16][half][i % 8] * mean_of_product[half]) * rstd[half];
    }
  }

  const TailBackwardParams& p_;
  const Rows& values_;
  const uint4* weights_;
  const TailVectors& vectors_;
  TailVectorSums& vector_sums_;
  T *lefts_, *rights_;
  SharedSums proj_, mlp_in_, mlp_out_;
};

constexpr int kTailSumsThreads = 128;

struct TailSumsParams {
  const float* slots;
  int slot_count;
  void* to[8];  // proj, mlp_in, mlp_out, then the vectors, in the order of the slot
};

// Adds the slots one after the other.
template <typename T>
__global__ void __launch_bounds__(kTailSumsThreads) tail_sums_kernel(const TailSumsParams p) {
  const int at = blockIdx.x * kTailSumsThreads + threadIdx.x;
  if (at >= kTailGradientFloats) return;
  // Sums side by side, so that loads do not wait for one another.
  constexpr int kSide = 12;
  float sums[kSide] = {};
  for (int i = 0; i < p.slot_count; i += kSide) {
#pragma unroll
    for (int j = 0; j < kSide; ++j) {
      if (i + j < p.slot_count) sums[j] += p.slots[int64_t(i + j) * kTailGradientFloats + at];
    }
  }
  float total = 0.f;
#pragma unroll
  for (int j = 0; j < kSide; ++j) total += sums[j];
  constexpr int kMatrix = kWidest * kWidest;
  const int which = at < 3 * kMatrix ? at / kMatrix : 3 + (at - 3 * kMatrix) / kWidest;
  const int begin = which < 3 ? which * kMatrix : 3 * kMatrix + (which - 3) * kWidest;
  static_cast<T*>(p.to[which])[at - begin] = static_cast<T>(total);
}

// The slots of a backward's blocks, and their sums.
class TailSlots {
 public:
  TailSlots(const torch::stable::Tensor& like, dim3 grid, const DeviceScope& device)
      : grid_(grid), memory_(new_floats(like, int64_t(grid_.x) * kTailGradientFloats)) {}

  dim3 grid() const { return grid_; }
  TailGradients* slots() const { return reinterpret_cast<TailGradients*>(floats_of(memory_)); }

  // The gradients of the tail's parameters; zeros if nothing has been added.
  template <typename T>
  TailTensors finish(const torch::stable::Tensor& like, const DeviceScope& device) const {
    const auto empty = [&](std::initializer_list<int64_t> shape) {
      return torch::stable::new_empty(like, shape);
    };
    constexpr int64_t E = kWidest;
    TailTensors to = {empty({E, E}), empty({E}), empty({E}),    empty({E}),
                      empty({E, E}), empty({E}), empty({E, E}), empty({E})};
    const TailSumsParams params = {
        floats_of(memory_),
        static_cast<int>(grid_.x),
        {to.proj_weight.mutable_data_ptr(), to.mlp_in_weight.mutable_data_ptr(),
         to.mlp_out_weight.mutable_data_ptr(), to.proj_bias.mutable_data_ptr(),
         to.norm_weight.mutable_data_ptr(), to.norm_bias.mutable_data_ptr(),
         to.mlp_in_bias.mutable_data_ptr(), to.mlp_out_bias.mutable_data_ptr()}};
    device.launch("tail_sums", tail_sums_kernel<T>,
                  dim3(grid_size(divide_up(kTailGradientFloats, kTailSumsThreads))),
                  kTailSumsThreads, 0, params);
    return to;
  }

 private:
  dim3 grid_;
  torch::stable::Tensor memory_;
};

}  // namespace t2t
