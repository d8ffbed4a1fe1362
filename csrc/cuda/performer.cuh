// Performer attention on tiles of 16 tokens, finite for every finite input and in float32 whatever
// the tensors' type: an exponent's absolute error is a feature's relative one.
//
// With log-features a = w·k − |k|²/2 of the keys and b = w·q of the queries, the maxima
// c_i = max_s a_si and g_t = max_i (b_ti + c_i) leave the exponentials:
//   Z_i = Σ_s e^(a_si − c_i), S_i = Σ_s e^(a_si − c_i) v_s, f_ti = e^(b_ti + c_i − g_t),
//   y_t = Σ_i f_ti S_i / D_t, D_t = Σ_i f_ti Z_i + e^(h_t − g_t), h_t = |q_t|²/2 + log(eps·m).
// g_t is at least h_t, so that D_t is finite and at least 1.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <optional>

#include "pack.cuh"
#include "rows.cuh"

namespace t2t {

constexpr int kFeaturePitch = padded_row<float>(kGroup);

// Beyond it |x|² overflows float32; the features there differ by less than float32 resolves anyway.
constexpr float kLargest = 1e15f;

struct Features {
  const float* packed;    // w as E × m
  const float* packed_t;  // as m × E
  int count, embed;
  float log_eps;  // log(eps·m), −infinity without eps

  __host__ __device__ int groups() const { return (count + kGroup - 1) / kGroup; }
  __host__ __device__ int embed_groups() const { return (embed + kGroup - 1) / kGroup; }
  __host__ __device__ int depth() const { return (count + 15) / 16 * 16; }
  __host__ __device__ int embed_depth() const { return (embed + 15) / 16 * 16; }
  // Floats of one image's packed sums.
  __host__ __device__ int packed_floats() const { return embed_groups() * depth() * kGroup; }
  __host__ __device__ int packed_t_floats() const { return groups() * embed_depth() * kGroup; }
};

// Of one image: sums over its keys, or the gradients of those.
struct KeySums {
  const float *maximum, *normalizer;
  const float *packed, *packed_t;  // m × E, and transposed
};

// NaN stays NaN.
__device__ inline float within_range(float x) {
  return x > kLargest ? kLargest : x < -kLargest ? -kLargest : x;
}

// Tokens first … of an image, as floats, zero beyond `tokens` and `embed`; keys and queries are
// brought within range.
template <typename T>
__device__ void load_tile(const Rows& rows, int64_t image, int first, int tokens, int embed,
                          bool limit, float* tile) {
  const int units = (embed + 15) / 16 * 2;
  const T* from = static_cast<const T*>(rows.at) + image * rows.batch_stride;
  for (int i = lane_index(); i < kRows * units; i += kLanes) {
    const int row = i / units;
    const int column = (i - row * units) * 8;
    const int count = first + row < tokens ? embed - column : 0;
    const T* at = from + (first + row) * rows.token_stride + column * rows.element_stride;
    float values[8];
    if (rows.element_stride == 1) {
      load_eight(values, at, count, rows.vectors);
    } else {
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        values[e] = e < count ? static_cast<float>(at[e * rows.element_stride]) : 0.f;
      }
    }
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      tile[row * kTilePitch + column + e] = limit ? within_range(values[e]) : values[e];
    }
  }
}

// |x|²/2 of a tile's rows g and g + 8.
__device__ inline void half_squares(const float* tile, int embed, float (&half)[2]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float sums[4] = {};
    for (int e = lane_index() % 4 * 4; e < embed; e += 16) {
      const auto x = *reinterpret_cast<const Vec<float>*>(tile + sum_row(i) * kTilePitch + e);
#pragma unroll
      for (int j = 0; j < 4; ++j) sums[j] += x.at[j] * x.at[j];
    }
    half[i] = sum_of_row((sums[0] + sums[1]) + (sums[2] + sums[3])) / 2;
  }
}

// Log-features of the keys in a tile: kGroups groups of features from `first_group` on.
template <int kGroups>
__device__ void key_logs(const Features& w, const float* keys, int first_group,
                         Sums<kGroups>& logs) {
  float half[2];
  half_squares(keys, w.embed, half);
  logs.clear();
  multiply_short(logs, keys, kTilePitch, w.packed + first_group * w.embed_depth() * kGroup,
                 w.embed_depth() * kGroup, w.embed_depth(), w.groups() - first_group);
#pragma unroll
  for (int i = 0; i < 2 * kGroups; ++i) {
#pragma unroll
    for (int e = 0; e < 8; ++e) logs.at[i / 2][i % 2][e] -= half[i % 2];
  }
}

// Sums of parts of an image's tokens: (part, feature[, embed]).
struct Parts {
  float *maximum, *normalizer, *sums;
};

template <int kTall>
__device__ void store_outer(const OuterSums<kTall, kWidest / 8>& sums, float* to, int first_feature,
                            const Features& w) {
#pragma unroll
  for (int i = 0; i < 2 * kTall; ++i) {
    const int feature = first_feature + sums.row(i / 2, i % 2);
#pragma unroll
    for (int j = 0; j < kWidest / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int column = sums.column(j) + e;
        if (feature < w.count && column < w.embed) {
          to[feature * w.embed + column] = sums.at[i / 2][j][i % 2][e];
        }
      }
    }
  }
}

// A running maximum and the sums under it of 32 features: a lane has the maximum and normaliser of
// feature `lane`, and of the sums (32 × 64) its part of an outer product.
struct RunningSums {
  float maximum = -INFINITY, normalizer = 0.f;
  OuterSums<2, kWidest / 8> sums;

  // Adds keys and values. `features` (16 rows) and `shrink` (32 floats) are work space.
  __device__ void add(const Features& w, const float* keys, const float* values, int slice,
                      int tokens, float* features, float* shrink) {
    Sums<1> logs;
    key_logs(w, keys, slice, logs);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (sum_row(half) >= tokens) {
#pragma unroll
        for (int e = 0; e < 8; ++e) logs.at[0][half][e] = -INFINITY;
      }
    }
    keep_sums(logs, features, kFeaturePitch);
    __syncwarp();
    const int lane = lane_index();
    float larger = maximum;
#pragma unroll
    for (int row = 0; row < kRows; ++row)
      larger = fmaxf(larger, features[row * kFeaturePitch + lane]);
    float total = 0.f;
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      const float feature = expf(features[row * kFeaturePitch + lane] - larger);
      features[row * kFeaturePitch + lane] = feature;
      total += feature;
    }
    shrink[lane] = expf(maximum - larger);
    normalizer = normalizer * shrink[lane] + total;
    maximum = larger;
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float factor = shrink[sums.row(i / 2, i % 2)];
#pragma unroll
      for (int j = 0; j < kWidest / 8; ++j) {
        sums.at[i / 2][j][i % 2][0] *= factor;
        sums.at[i / 2][j][i % 2][1] *= factor;
      }
    }
    multiply_tokens(sums, features, kFeaturePitch, values, kTilePitch, kRows);
  }

  __device__ void store(const Features& w, const Parts& to, int64_t part, int slice) const {
    const int feature = slice * kGroup + lane_index();
    if (feature < w.count) {
      to.maximum[part * w.count + feature] = maximum;
      to.normalizer[part * w.count + feature] = normalizer;
    }
    store_outer(sums, to.sums + part * w.count * w.embed, slice * kGroup, w);
  }
};

// What the backward of a tile of queries needs besides the features.
struct Attended {
  Wide y;
  float inverse[2];  // 1 / D of rows g and g + 8
  float slope[2];    // the derivative of D by |q|²/2
};

// y of the queries in a tile; their features go to a tile, which may be the same.
__device__ inline Attended attend(const Features& w, const KeySums& keys, const float* queries,
                                  float* features) {
  Attended result;
  float half[2];
  half_squares(queries, w.embed, half);
  Wide logs;
  logs.clear();
  multiply_short(logs, queries, kTilePitch, w.packed, w.embed_depth() * kGroup, w.embed_depth(),
                 w.groups());
  float top[2] = {half[0] + w.log_eps, half[1] + w.log_eps};
#pragma unroll
  for (int group = 0; group < kWidestGroups; ++group) {
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const int feature = sum_column(group) + e;
      const float maximum = feature < w.count ? keys.maximum[feature] : -INFINITY;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        logs.at[group][i][e] += maximum;
        top[i] = fmaxf(top[i], logs.at[group][i][e]);
      }
    }
  }
  float divisor[2] = {};
#pragma unroll
  for (int i = 0; i < 2; ++i) top[i] = largest_of_row(top[i]);
#pragma unroll
  for (int group = 0; group < kWidestGroups; ++group) {
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const int feature = sum_column(group) + e;
      const float normalizer = feature < w.count ? keys.normalizer[feature] : 0.f;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        logs.at[group][i][e] = expf(logs.at[group][i][e] - top[i]);
        divisor[i] += logs.at[group][i][e] * normalizer;
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    result.slope[i] = expf(half[i] + w.log_eps - top[i]);
    result.inverse[i] = 1.f / (sum_of_row(divisor[i]) + result.slope[i]);
  }
  // The queries have been multiplied by all lanes.
  __syncwarp();
  keep_sums(logs, features, kTilePitch);
  __syncwarp();
  result.y.clear();
  multiply_short(result.y, features, kTilePitch, keys.packed, w.depth() * kGroup, w.depth(),
                 w.embed_groups());
#pragma unroll
  for (int i = 0; i < 16 * kWidestGroups; ++i) {
    result.y.at[i / 16][i / 8 % 2][i % 8] *= result.inverse[i / 8 % 2];
  }
  return result;
}

// Gradient of z from that of its features' logs. z is in `tile`, which is overwritten; `factor` is
// the gradient of |z|²/2. Where z is out of range the clamp passes no gradient.
__device__ inline Wide input_gradient(const Features& w, const Wide& log_gradients,
                                      const float (&factor)[2], float* tile) {
  Wide z, result;
  take_sums(tile, z);
  keep_sums(log_gradients, tile, kTilePitch);
  __syncwarp();
  result.clear();
  multiply_short(result, tile, kTilePitch, w.packed_t, w.depth() * kGroup, w.depth(),
                 w.embed_groups());
#pragma unroll
  for (int i = 0; i < 16 * kWidestGroups; ++i) {
    const float value = z.at[i / 16][i / 8 % 2][i % 8];
    float& gradient = result.at[i / 16][i / 8 % 2][i % 8];
    gradient = fabsf(value) < kLargest ? gradient + value * factor[i / 8 % 2] : 0.f;
  }
  return result;
}

// Gradient of the queries in a tile, which is overwritten, from that of y. What the gradients of
// the sums are made of stays: the features, the gradient of N = y·D in `kept_grads`, and that of D
// by row.
__device__ inline Wide attend_backward(const Features& w, const KeySums& keys,
                                       const Attended& attended, Wide& grads, float* queries,
                                       const float* features, float* kept_grads,
                                       float* normalizer_gradients) {
  float of_divisor[2] = {};
#pragma unroll
  for (int i = 0; i < 16 * kWidestGroups; ++i) {
    float& grad = grads.at[i / 16][i / 8 % 2][i % 8];
    grad *= attended.inverse[i / 8 % 2];
    of_divisor[i / 8 % 2] -= grad * attended.y.at[i / 16][i / 8 % 2][i % 8];
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    of_divisor[i] = sum_of_row(of_divisor[i]);
    if (lane_index() % 4 == 0) normalizer_gradients[sum_row(i)] = of_divisor[i];
  }
  keep_sums(grads, kept_grads, kTilePitch);
  __syncwarp();
  Wide log_gradients;
  log_gradients.clear();
  multiply_short(log_gradients, kept_grads, kTilePitch, keys.packed_t, w.embed_depth() * kGroup,
                 w.embed_depth(), w.groups());
#pragma unroll
  for (int i = 0; i < 2 * kWidestGroups; ++i) {
    float feature[8];
    load_eight(feature, features + sum_row(i % 2) * kTilePitch + sum_column(i / 2), 8, true);
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const int index = sum_column(i / 2) + e;
      const float normalizer = index < w.count ? keys.normalizer[index] : 0.f;
      float& gradient = log_gradients.at[i / 2][i % 2][e];
      gradient = feature[e] * (gradient + of_divisor[i % 2] * normalizer);
    }
  }
  const float factor[2] = {of_divisor[0] * attended.slope[0], of_divisor[1] * attended.slope[1]};
  return input_gradient(w, log_gradients, factor, queries);
}

// Gradients of the keys and values in tiles, which are overwritten, from those of the sums.
__device__ inline void keys_backward(const Features& w, const KeySums& keys, const KeySums& grads,
                                     float* key_tile, float* value_tile, Wide& key_gradients,
                                     Wide& value_gradients) {
  Wide features, log_gradients;
  key_logs(w, key_tile, 0, features);
  log_gradients.clear();
  multiply_short(log_gradients, value_tile, kTilePitch, grads.packed_t, w.embed_depth() * kGroup,
                 w.embed_depth(), w.groups());
  float total[2] = {};
#pragma unroll
  for (int i = 0; i < 2 * kWidestGroups; ++i) {
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const int index = sum_column(i / 2) + e;
      const bool exists = index < w.count;
      const float maximum = exists ? keys.maximum[index] : 0.f;
      const float normalizer = exists ? grads.normalizer[index] : 0.f;
      float& feature = features.at[i / 2][i % 2][e];
      float& gradient = log_gradients.at[i / 2][i % 2][e];
      feature = exists ? expf(feature - maximum) : 0.f;
      gradient = feature * (gradient + normalizer);
      total[i % 2] -= gradient;
    }
  }
  // The tiles have been multiplied by all lanes.
  __syncwarp();
  keep_sums(features, value_tile, kTilePitch);
  const float factor[2] = {sum_of_row(total[0]), sum_of_row(total[1])};
  key_gradients = input_gradient(w, log_gradients, factor, key_tile);
  value_gradients.clear();
  multiply_short(value_gradients, value_tile, kTilePitch, grads.packed, w.depth() * kGroup,
                 w.depth(), w.embed_groups());
}

// Gradients of the sums from the tokens of a block of two warps, each of which takes every other 16
// features.
constexpr int kGradientWarps = 2;

struct SumGradients {
  OuterSums<1, kWidest / 8> sums[2];
  float normalizer[2] = {};

  __device__ void clear() {
    sums[0].clear();
    sums[1].clear();
  }

  // Features and gradients of N are tiles of all warps, one after the other.
  __device__ void add(const Features& w, const float* features, const float* grads,
                      const float* normalizer_gradients) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int first = (warp_index() + i * kGradientWarps) * 16;
      if (first >= w.count) break;
      multiply_tokens(sums[i], features + first, kTilePitch, grads, kTilePitch,
                      kGradientWarps * kRows);
      float total = 0.f;
      for (int row = lane_index() / 16; row < kGradientWarps * kRows; row += 2) {
        total += features[row * kTilePitch + first + lane_index() % 16] * normalizer_gradients[row];
      }
      normalizer[i] += total + __shfl_xor_sync(kAllLanes, total, 16);
    }
  }

  __device__ void store(const Features& w, const Parts& to, int64_t part) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int first = (warp_index() + i * kGradientWarps) * 16;
      const int feature = first + lane_index() % 16;
      if (lane_index() < 16 && feature < w.count) {
        to.normalizer[part * w.count + feature] = normalizer[i];
      }
      store_outer(sums[i], to.sums + part * w.count * w.embed, first, w);
    }
  }
};

// The sums of each image from those of its parts, one after the other, and their packed forms.
struct CombineParams {
  Features w;
  Parts parts;
  int parts_per_image;
  int64_t images;
  float *maximum, *normalizer, *sums;  // without maxima the parts are simply added
  float *packed, *packed_t;            // null: not wanted
};

constexpr int kCombineWarps = 4;

// A warp per image and feature; features beyond the last are packed as zeros.
template <bool kMaxima>
__global__ void __launch_bounds__(kCombineWarps* kLanes) combine_kernel(const CombineParams p) {
  const int64_t item = int64_t(blockIdx.x) * kCombineWarps + warp_index();
  const int rows = p.w.groups() * kGroup;
  const int64_t image = item / rows;
  const int feature = static_cast<int>(item - image * rows);
  if (image >= p.images) return;
  float maximum = -INFINITY, normalizer = 0.f, sums[2] = {};
  for (int i = 0; i < p.parts_per_image && feature < p.w.count; ++i) {
    const int64_t at = (image * p.parts_per_image + i) * p.w.count + feature;
    float shrink = 1.f, shrink_other = 1.f;
    if (kMaxima) {
      const float larger = fmaxf(maximum, p.parts.maximum[at]);
      shrink = expf(maximum - larger);
      shrink_other = expf(p.parts.maximum[at] - larger);
      maximum = larger;
    }
    normalizer = normalizer * shrink + p.parts.normalizer[at] * shrink_other;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int column = lane_index() + j * kLanes;
      if (column < p.w.embed) {
        sums[j] = sums[j] * shrink + p.parts.sums[at * p.w.embed + column] * shrink_other;
      }
    }
  }
  const int64_t at = image * p.w.count + feature;
  if (feature < p.w.count && lane_index() == 0) {
    if (kMaxima) p.maximum[at] = maximum;
    p.normalizer[at] = normalizer;
  }
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const int column = lane_index() + j * kLanes;
    if (p.sums && feature < p.w.count && column < p.w.embed)
      p.sums[at * p.w.embed + column] = sums[j];
    if (p.packed && feature < p.w.depth() && j < p.w.embed_groups()) {
      p.packed[image * p.w.packed_floats() + (j * p.w.depth() + feature) * kGroup + lane_index()] =
          sums[j];
    }
    if (p.packed_t && column < p.w.embed_depth()) {
      p.packed_t[image * p.w.packed_t_floats() +
                 (feature / kGroup * p.w.embed_depth() + column) * kGroup + feature % kGroup] =
          sums[j];
    }
  }
}

// Matrices (batches, rows, columns) of contiguous floats, packed as they are or transposed.
inline torch::stable::Tensor packed_floats(const torch::stable::Tensor& from, int64_t batches,
                                           int rows, int columns, bool transposed,
                                           const DeviceScope& device) {
  Packing p = {};
  p.from = from.const_data_ptr();
  p.batch_stride = int64_t(rows) * columns;
  p.inner = 1;
  p.depth = transposed ? columns : rows;
  p.outer_stride = transposed ? 1 : columns;
  p.columns = p.section = transposed ? rows : columns;
  p.column_stride = transposed ? columns : 1;
  p.groups = p.groups_per_section = static_cast<int>(divide_up(p.columns, kGroup));
  torch::stable::Tensor to = new_floats(from, batches * packed_size(p.depth, p.groups));
  p.to = to.mutable_data_ptr();
  launch_pack<float>({p}, batches, device);
  return to;
}

// The random features as the kernels take them. It owns their packed forms.
class PackedFeatures {
 public:
  PackedFeatures(const char* name, const torch::stable::Tensor& w, double eps, bool backward,
                 const DeviceScope& device)
      : floats_(
            torch::stable::contiguous(torch::stable::to(w, torch::headeronly::ScalarType::Float))) {
    const int count = static_cast<int>(w.size(0)), embed = static_cast<int>(w.size(1));
    STD_TORCH_CHECK(count >= 1 && embed >= 1 && count <= kWidest && embed <= kWidest, name,
                    ": expected 1 to ", kWidest, " features and embeddings, got ", count, " and ",
                    embed);
    packed_ = packed_floats(floats_, 1, count, embed, true, device);
    if (backward) packed_t_ = packed_floats(floats_, 1, count, embed, false, device);
    features_ = {floats_of(packed_), backward ? floats_of(*packed_t_) : nullptr, count, embed,
                 eps > 0 ? static_cast<float>(std::log(eps) + std::log(count)) : -INFINITY};
  }
  const Features& features() const { return features_; }

 private:
  torch::stable::Tensor floats_, packed_;
  std::optional<torch::stable::Tensor> packed_t_;
  Features features_;
};

// Parts of the sums of so many images, in one piece of memory.
class PartMemory {
 public:
  PartMemory(const torch::stable::Tensor& like, const Features& w, int64_t parts)
      : memory_(new_floats(like, parts * w.count * (2 + w.embed))) {
    float* at = floats_of(memory_);
    parts_ = {at, at + parts * w.count, at + 2 * parts * w.count};
  }
  const Parts& parts() const { return parts_; }

 private:
  torch::stable::Tensor memory_;
  Parts parts_;
};

// Tiles of an image that a warp, or block, takes, such that about twelve warps of each
// multiprocessor have work: the fewer the parts, the cheaper to combine.
inline int64_t tiles_of_part(int64_t tiles, const DeviceScope& device) {
  return std::clamp<int64_t>(divide_up(tiles * 8, 3 * device.enough_blocks()), 1, 16);
}

template <bool kMaxima>
void launch_combine(const CombineParams& p, const DeviceScope& device) {
  const int64_t blocks = divide_up(p.images * p.w.groups() * kGroup, kCombineWarps);
  device.launch("performer_combine", combine_kernel<kMaxima>, dim3(static_cast<unsigned>(blocks)),
                kCombineWarps * kLanes, 0, p);
}

}  // namespace t2t
