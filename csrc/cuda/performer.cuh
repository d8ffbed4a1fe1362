// Performer attention of half types with 64 elements and 32 features, on the matrix unit.
//
// Keys, queries and features are rounded to the type; log-features, maxima and sums are float32. w
// is multiplied in two parts, so that the log-features of the rounded keys and queries have only
// float32 errors. With a = w·k − |k|²/2, b = w·q and the maxima c_i = max_s a_si:
//   Z_i = Σ_s φ_si, S_i = Σ_s φ_si v_s, φ_si = e^(a_si − c_i), rounded once for both
//   y_t = Σ_i f_ti S̄_i / D_t, S̄_i = S_i / Z_i, f_ti = e^(b_ti + l_i − g_t), l_i = c_i + log Z_i,
//   D_t = Σ_i f_ti + e^(h_t − g_t), h_t = |q_t|²/2 + log(eps·m), g_t = max(h_t, max_i (b_ti + l_i))
// The means S̄ are no larger than the largest value, whatever the type.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>

#include "geometry.h"
#include "launch.h"
#include "operands.cuh"

namespace t2t {

constexpr int kFeatures = 32, kEmbed = 64;

// Sums of parts of an image's tokens: (part, feature[, embed]).
struct Parts {
  float *maximum, *normalizer, *sums;
};

// Memory for them, in one piece.
class PartMemory {
 public:
  PartMemory(const torch::stable::Tensor& like, int64_t parts)
      : memory_(new_floats(like, parts * kFeatures * (2 + kEmbed))) {
    float* at = floats_of(memory_);
    parts_ = {at, at + parts * kFeatures, at + 2 * parts * kFeatures};
  }
  const Parts& parts() const { return parts_; }

 private:
  torch::stable::Tensor memory_;
  Parts parts_;
};

// Two numbers rounded, or the remainders of rounding.
template <typename T>
__device__ uint32_t part_of_pair(const float* pair, bool remainder) {
  return remainder ? round_pair<T>(remainder_of<T>(pair[0]), remainder_of<T>(pair[1]))
                   : round_pair<T>(pair[0], pair[1]);
}

// w in its two parts, features by embed, as one matrix: rows rounded, then their remainders.
template <typename T>
__device__ void load_features(uint4* to, const float* w) {
  for (int i = threadIdx.x; i < kMatrixVectors; i += blockDim.x) {
    const int row = i / 8;
    const float* from = w + row % kFeatures * kEmbed + i % 8 * 8;
    uint32_t pairs[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      pairs[j] = part_of_pair<T>(from + 2 * j, row >= kFeatures);
    }
    store_in_matrix(to, row, i % 8 / 4, i % 4, pairs);
  }
  if constexpr (kHasWarpgroups) show_to_products();
}

// rows·Mᵀ, rows·M of a matrix M of features by embed in two such parts.
template <typename T>
__device__ Sums<1> times_embed(const Operand<2>& rows, const uint4* parts) {
  return times_matrix<T, false, 1>(rows, parts);
}
template <typename T>
__device__ Sums<2> times_features(const Operand<1>& rows, const uint4* parts) {
  Operand<2> twice;
#pragma unroll
  for (int i = 0; i < 16; ++i) twice.at[i / 8][i / 4 % 2][i % 4] = rows.at[0][i / 4 % 2][i % 4];
  return times_matrix<T, true>(twice, parts);
}

// The rows that an iteration loads. float16 needs no limit, but separate registers for products.
template <typename T>
__device__ Operand<2> limited(Operand<2> operand, int iteration) {
  if constexpr (kHasWarpgroups && std::is_same_v<T, torch::headeronly::Half>) {
    keep_in_loop(operand.at, iteration);
  }
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    uint32_t& pair = operand.pair(i / 8, i / 4 % 2, i % 4);
    pair = limit_pair<T>(pair);
  }
  return operand;
}

// |x|²/2 of rows g and g + 8.
template <typename T>
__device__ void half_squares(const Operand<2>& rows, float (&half)[2]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float sums[2] = {};
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float2 pair = elements_of<T>(rows.pair(j / 4, i, j % 4));
      sums[0] += pair.x * pair.x;
      sums[1] += pair.y * pair.y;
    }
    half[i] = sum_of_row(sums[0] + sums[1]) / 2;
  }
}

// w as a left operand: [part][16 features][group of 32][row g, row g + 8][lane].
constexpr int kFeatureRowVectors = 2 * 2 * 2 * 2 * kLanes;

template <typename T>
__device__ void pack_feature_rows(uint4* to, const float* w) {
  for (int i = threadIdx.x; i < kFeatureRowVectors; i += blockDim.x) {
    const int lane = i % kLanes;
    const int feature = i / 128 % 2 * 16 + i / 32 % 2 * 8 + lane / 4;
    const float* from = w + feature * kEmbed + i / 64 % 2 * kGroup + lane % 4 * 8;
    uint32_t pairs[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      pairs[j] = part_of_pair<T>(from + 2 * j, i >= kFeatureRowVectors / 2);
    }
    to[i] = {pairs[0], pairs[1], pairs[2], pairs[3]};
  }
}

// Equal shares of an image's tokens for the warps or blocks that sum over them.
struct Chunks {
  int tokens, chunk, chunks;  // tokens of an image and of a share; shares of an image
  int64_t images;

  __host__ __device__ int64_t count() const { return images * chunks; }
};

// A share: tokens begin … end − 1 of an image.
struct Chunk {
  int64_t image;
  int begin, end;

  __device__ Chunk(const Chunks& chunks, int64_t part)
      : image(static_cast<uint32_t>(part) / static_cast<uint32_t>(chunks.chunks)),
        begin(static_cast<int>(part - image * chunks.chunks) * chunks.chunk),
        end(min(begin + chunks.chunk, chunks.tokens)) {}
};

// Equal shares for blocks that take `at_once` tokens at a time, a multiple of which each share is,
// with one block per multiprocessor: the number of shares with which the last block ends earliest.
inline Chunks make_block_chunks(int64_t images, int64_t tokens, int at_once,
                                const DeviceScope& device) {
  const int64_t steps = divide_up(tokens, at_once);
  const auto time = [&](int64_t chunks) {
    return divide_up(images * chunks, device.multiprocessors()) * divide_up(steps, chunks);
  };
  int64_t best = 1;
  for (int64_t chunks = 2; chunks <= steps; ++chunks) {
    if (time(chunks) < time(best)) best = chunks;
  }
  const int64_t chunk = divide_up(steps, best) * at_once;
  return {static_cast<int>(tokens), static_cast<int>(chunk),
          static_cast<int>(divide_up(tokens, chunk)), images};
}

// As many warps as are resident at a time, with equal work, but of 16 tiles at most.
inline Chunks make_chunks(int64_t images, int64_t tokens, int warps_per_multiprocessor,
                          const DeviceScope& device) {
  const int64_t tiles = divide_up(tokens, kRows);
  const int64_t warps = int64_t(warps_per_multiprocessor) * device.multiprocessors();
  const int64_t per_image = std::clamp<int64_t>(warps / images, divide_up(tiles, 16), tiles);
  const int64_t tiles_of_chunk = divide_up(tiles, per_image);
  return {static_cast<int>(tokens), static_cast<int>(tiles_of_chunk * kRows),
          static_cast<int>(divide_up(tiles, tiles_of_chunk)), images};
}

struct KeysParams {
  const float* w;
  Rows keys, values;
  Chunks chunks;
  Parts parts;
};

constexpr int kAttentionWarps = 4;
constexpr int kTileBytes = kRows * kEmbed * 2;
constexpr int kKeysWarpBytes = 2 * kTileBytes + kRows * 4;
constexpr int kKeysBytes = kFeatureRowVectors * 16 + kAttentionWarps * kKeysWarpBytes;

// Log-features are transposed: features are the rows of the sums, so that these are the left
// operand of the sums over tokens without any exchange.
template <typename T>
__global__ void __launch_bounds__(kAttentionWarps* kLanes, 3) keys_kernel(const KeysParams p) {
  uint4* w = dynamic_shared;
  pack_feature_rows<T>(w, p.w);
  __syncthreads();
  const int64_t part = int64_t(blockIdx.x) * kAttentionWarps + warp_index();
  if (part >= p.chunks.count()) return;
  const auto [image, begin, end] = Chunk(p.chunks, part);
  const int tokens = p.chunks.tokens;
  // Two tiles of values: one is loaded while the other is used.
  T* tiles = reinterpret_cast<T*>(reinterpret_cast<char*>(w + kFeatureRowVectors) +
                                  warp_index() * kKeysWarpBytes);
  auto* halves = reinterpret_cast<float*>(tiles + 2 * kRows * kEmbed);
  const int lane = lane_index();

  OuterSums<2, kEmbed / 8> sums;
  float maximum[2][2], normalizer[2][2] = {};
  sums.clear();
#pragma unroll
  for (int i = 0; i < 4; ++i) maximum[i / 2][i % 2] = -INFINITY;

  Operand<2> next_keys = load_operand<T>(p.keys, image, begin, tokens);
  copy_tile(p.values, image, begin, tokens, tiles);
#pragma unroll 1
  for (int at = begin, turn = 0; at < end; at += kRows, turn ^= 1) {
    T* values = tiles + turn * kRows * kEmbed;
    const Operand<2> keys = limited<T>(next_keys, at);
    next_keys = load_operand<T>(p.keys, image, at + kRows, tokens);
    float half[2];
    half_squares<T>(keys, half);
    // The other tile has been read by all lanes.
    __syncwarp();
    copy_tile(p.values, image, at + kRows, tokens, tiles + (turn ^ 1) * kRows * kEmbed);
    if (lane % 4 == 0) {
      halves[lane / 4] = half[0];
      halves[lane / 4 + 8] = half[1];
    }
    wait_for_copies<1>();
    __syncwarp();

    // [16 features][8 tokens]: rows g and g + 8, tokens 2t and 2t + 1.
    float logs[2][2][2][2] = {};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int tall = i / 2 % 2, group = i % 2;
      const uint4* from = w + (i * 2) * kLanes + lane;
      const uint4 top = from[0], bottom = from[kLanes];
      const uint32_t left[2][4] = {{top.x, bottom.x, top.y, bottom.y},
                                   {top.z, bottom.z, top.w, bottom.w}};
#pragma unroll
      for (int wide = 0; wide < 2; ++wide) {
        float (&d)[2][2] = logs[tall][wide];
#pragma unroll
        for (int step = 0; step < 2; ++step) {
          mma<T>(d[0][0], d[0][1], d[1][0], d[1][1], left[step], keys.pair(group, wide, 2 * step),
                 keys.pair(group, wide, 2 * step + 1));
        }
      }
    }
#pragma unroll
    for (int wide = 0; wide < 2; ++wide) {
      const int token = wide * 8 + lane % 4 * 2;
      const float2 of_token = *reinterpret_cast<const float2*>(halves + token);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float (&pair)[2] = logs[i / 2][wide][i % 2];
        pair[0] = at + token < tokens ? pair[0] - of_token.x : -INFINITY;
        pair[1] = at + token + 1 < tokens ? pair[1] - of_token.y : -INFINITY;
      }
    }
    float factor[2][2];
    bool grown = false;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int tall = i / 2, row = i % 2;
      float largest = maximum[tall][row];
#pragma unroll
      for (int j = 0; j < 4; ++j) largest = fmaxf(largest, logs[tall][j / 2][row][j % 2]);
      largest = largest_of_row(largest);
      factor[tall][row] = fast_exp2((maximum[tall][row] - largest) * kLog2E);
      grown = grown || largest > maximum[tall][row];
      maximum[tall][row] = largest;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        float& log = logs[tall][j / 2][row][j % 2];
        log = fast_exp2((log - largest) * kLog2E);
      }
    }
    if (grown) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        normalizer[i / 2][i % 2] *= factor[i / 2][i % 2];
#pragma unroll
        for (int j = 0; j < kEmbed / 8; ++j) {
          sums.at[i / 2][j][i % 2][0] *= factor[i / 2][i % 2];
          sums.at[i / 2][j][i % 2][1] *= factor[i / 2][i % 2];
        }
      }
    }
    __syncwarp();
    uint32_t features[2][4];
    const uint32_t ones = round_pair<T>(1.f, 1.f);
#pragma unroll
    for (int tall = 0; tall < 2; ++tall) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float (&pair)[2] = logs[tall][i / 2][i % 2];
        features[tall][i] = round_pair<T>(pair[0], pair[1]);
      }
      float unused[2] = {};
      mma<T>(normalizer[tall][0], unused[0], normalizer[tall][1], unused[1], features[tall], ones,
             ones);
    }
#pragma unroll
    for (int j = 0; j < kEmbed / 8; j += 2) {
      uint32_t right[4];
      load_right(right, values, 0, j);
#pragma unroll
      for (int tall = 0; tall < 2; ++tall) {
        auto& d = sums.at[tall][j];
        auto& e = sums.at[tall][j + 1];
        mma<T>(d[0][0], d[0][1], d[1][0], d[1][1], features[tall], right[0], right[1]);
        mma<T>(e[0][0], e[0][1], e[1][0], e[1][1], features[tall], right[2], right[3]);
      }
    }
  }

#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t feature = part * kFeatures + sums.row(i / 2, i % 2);
    if (lane % 4 == 0) {
      p.parts.maximum[feature] = maximum[i / 2][i % 2];
      p.parts.normalizer[feature] = normalizer[i / 2][i % 2];
    }
#pragma unroll
    for (int j = 0; j < kEmbed / 8; ++j) {
      *reinterpret_cast<float2*>(p.parts.sums + feature * kEmbed + sums.column(j)) = {
          sums.at[i / 2][j][i % 2][0], sums.at[i / 2][j][i % 2][1]};
    }
  }
}

// Matrices of features by embed of each image in two parts, as right operands: as they are, and
// transposed.
constexpr int kMeanVectors = 4 * kBlockVectors;

struct Means {
  float* logs;  // (images, features): l; of a gradient, that of Z
  uint4 *as_is, *transposed;
};

// The sums of an image from those of its parts. Without maxima (for gradients) the parts are added.
struct MeansParams {
  Parts parts;
  int parts_per_image;
  int64_t images;
  float *maximum, *normalizer, *sums;  // null: not wanted
  const float* of_normalizer;          // of gradients: Z
  Means means;
};

// A warp per image and feature.
template <typename T, bool kGradients>
__global__ void __launch_bounds__(kAttentionWarps* kLanes) means_kernel(const MeansParams p) {
  const int64_t item = int64_t(blockIdx.x) * kAttentionWarps + warp_index();
  const int64_t image = item / kFeatures;
  const int feature = static_cast<int>(item - image * kFeatures);
  if (image >= p.images) return;
  float maximum = -INFINITY, normalizer = 0.f, sums[2] = {};
  for (int i = 0; i < p.parts_per_image; ++i) {
    const int64_t at = (image * p.parts_per_image + i) * kFeatures + feature;
    float shrink = 1.f, shrink_other = 1.f;
    if (!kGradients) {
      const float larger = fmaxf(maximum, p.parts.maximum[at]);
      shrink = expf(maximum - larger);
      shrink_other = expf(p.parts.maximum[at] - larger);
      maximum = larger;
    }
    normalizer = normalizer * shrink + p.parts.normalizer[at] * shrink_other;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      sums[j] =
          sums[j] * shrink + p.parts.sums[at * kEmbed + lane_index() + j * kLanes] * shrink_other;
    }
  }
  if (!kGradients && p.sums) {
    if (lane_index() == 0) {
      p.maximum[item] = maximum;
      p.normalizer[item] = normalizer;
    }
    p.sums[item * kEmbed + lane_index()] = sums[0];
    p.sums[item * kEmbed + lane_index() + kLanes] = sums[1];
  }
  const float scale = 1.f / (kGradients ? p.of_normalizer[item] : normalizer);
  if (lane_index() == 0) {
    p.means.logs[item] = kGradients ? normalizer * scale : maximum + logf(normalizer);
  }
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const float mean = sums[j] * scale;
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      const T element = static_cast<T>(part == 0 ? mean : remainder_of<T>(mean));
      const int block = part * 2 + j;
      if (p.means.as_is) {
        reinterpret_cast<T*>(p.means.as_is + image * kMeanVectors +
                             block * kBlockVectors)[block_place(feature, lane_index())] = element;
      }
      if (p.means.transposed) {
        reinterpret_cast<T*>(p.means.transposed + image * kMeanVectors +
                             block * kBlockVectors)[block_place(lane_index(), feature)] = element;
      }
    }
  }
}

// sums += left·means, by both parts; they lie in global memory, one image's for many tiles.
template <typename T, int kRowGroups, int kColumnGroups>
__device__ void multiply_parts(Sums<kColumnGroups>& sums, const Operand<kRowGroups>& left,
                               const uint4* blocks) {
  multiply_blocks<T>(sums, left, blocks);
  multiply_blocks<T>(sums, left, blocks + 2 * kBlockVectors);
}

// A tile of queries against the keys of an image.
struct QueryFeatures {
  Operand<1> features;  // f
  float slope[2];       // e^(h − g)
  float inverse[2];     // 1/D
};

// `queries` are within range; `w` is the feature matrix.
template <typename T>
__device__ QueryFeatures features_of(const Operand<2>& queries, const uint4* w, float log_eps,
                                     const float* logs_of_keys) {
  QueryFeatures result;
  float half[2];
  half_squares<T>(queries, half);
  Sums<1> logs = times_embed<T>(queries, w);
  float of_keys[8];
  load_eight(of_keys, logs_of_keys + lane_index() % 4 * 8);
  float top[2] = {half[0] + log_eps, half[1] + log_eps};
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    float& log = logs.at[0][i / 8][i % 8];
    log += of_keys[i % 8];
    top[i / 8] = fmaxf(top[i / 8], log);
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) top[i] = largest_of_row(top[i]);
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    float& log = logs.at[0][i / 8][i % 8];
    log = fast_exp2((log - top[i / 8]) * kLog2E);
  }
  result.features = rounded_operand<T>(logs);
  float divisor[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    result.slope[i] = fast_exp2((half[i] + log_eps - top[i]) * kLog2E);
    divisor[i] = result.slope[i];
  }
  add_row_sums<T>(divisor, result.features.at[0]);
#pragma unroll
  for (int i = 0; i < 2; ++i) result.inverse[i] = fast_reciprocal(divisor[i]);
  return result;
}

__device__ inline void scale_rows(Sums<2>& sums, const float (&factor)[2]) {
#pragma unroll
  for (int i = 0; i < 32; ++i) sums.at[i / 16][i / 8 % 2][i % 8] *= factor[i / 8 % 2];
}

// y = Σ f S̄ / D, rounded.
template <typename T>
__device__ Operand<2> rounded_y(Sums<2> y, const QueryFeatures& queries) {
  scale_rows(y, queries.inverse);
  return rounded_operand<T>(y);
}

// The same by an image's means in global memory.
template <typename T>
__device__ Operand<2> attended(const QueryFeatures& queries, const uint4* means) {
  Sums<2> y;
  y.clear();
  multiply_parts<T>(y, queries.features, means);
  return rounded_y<T>(y, queries);
}

// What the attention derives from w and the keys of all images, in the order of a call's kernels.
template <typename T>
class KeyMeans {
 public:
  KeyMeans(const torch::stable::Tensor& like, int64_t images, bool transposed)
      : images_(images),
        logs_(new_floats(like, images * kFeatures)),
        blocks_(torch::stable::new_empty(
            like, {(transposed ? 2 : 1) * images * kMeanVectors * Vec<T>::size})) {
    auto* at = static_cast<uint4*>(blocks_.mutable_data_ptr());
    means_ = {floats_of(logs_), at, transposed ? at + images * kMeanVectors : nullptr};
  }
  const Means& operator()() const { return means_; }

  // From parts, whose sums go to `maximum`, `normalizer` and `sums`.
  void combine(const Parts& parts, int parts_per_image, float* maximum, float* normalizer,
               float* sums, const DeviceScope& device) const {
    launch<false>({parts, parts_per_image, images_, maximum, normalizer, sums, nullptr, means_},
                  device);
  }
  // From the sums themselves.
  void load(const Parts& sums, const DeviceScope& device) const {
    launch<false>({sums, 1, images_, nullptr, nullptr, nullptr, nullptr, means_}, device);
  }
  // Gradients of sums from parts of them, over the normaliser.
  void combine_gradients(const Parts& parts, int parts_per_image, const float* normalizer,
                         const DeviceScope& device) const {
    launch<true>({parts, parts_per_image, images_, nullptr, nullptr, nullptr, normalizer, means_},
                 device);
  }

 private:
  template <bool kGradients>
  void launch(const MeansParams& p, const DeviceScope& device) const {
    device.launch("performer_means", means_kernel<T, kGradients>,
                  dim3(grid_size(divide_up(images_ * kFeatures, kAttentionWarps))),
                  kAttentionWarps * kLanes, 0, p);
  }

  int64_t images_;
  torch::stable::Tensor logs_, blocks_;
  Means means_;
};

// ---- backward

// The gradient of a clamped element is zero, the derivative of the clamp.
template <typename T>
__device__ void stop_at_limit(Sums<2>& gradients, const Operand<2>& limited) {
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const float2 pair = elements_of<T>(limited.pair(i / 8, i / 4 % 2, i % 4));
    float* to = &gradients.at[i / 8][i / 4 % 2][i % 4 * 2];
    if (!(fabsf(pair.x) < 0x1p50f)) to[0] = 0.f;
    if (!(fabsf(pair.y) < 0x1p50f)) to[1] = 0.f;
  }
}

// dz = logs' gradients·w + z·factor.
template <typename T>
__device__ Sums<2> through_features(const Operand<1>& log_gradients, const uint4* w,
                                    const Operand<2>& z, const float (&factor)[2]) {
  Sums<2> result = times_features<T>(log_gradients, w);
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const int half = i / 4 % 2;
    const float2 pair = elements_of<T>(z.pair(i / 8, half, i % 4));
    float* to = &result.at[i / 8][half][i % 4 * 2];
    to[0] += pair.x * factor[half];
    to[1] += pair.y * factor[half];
  }
  stop_at_limit<T>(result, z);
  return result;
}

struct QueriesBackwardParams {
  const float* w;
  float log_eps;
  Rows queries;
  Means means;
  Chunks chunks;
  Parts parts;  // gradients of the sums over Z
  void* grad_queries;
  int64_t grad_stride;  // from a token to the next
};

// w, the means, two tiles of the block's tokens, and each warp's sums for Z.
constexpr int kQueriesBackwardBytes =
    2 * kMatrixVectors * 16 + 2 * kTokenTileElements * 2 + kBlockWarps * kFeatures * 4;

// A block's backward of queries, a chunk of an image after the other. All its warps take part.
template <typename T>
class QueriesBackward {
 public:
  __device__ QueriesBackward(const QueriesBackwardParams& p, uint4* shared)
      : p_(p),
        w_(shared),
        means_(shared + kMatrixVectors),
        grads_(reinterpret_cast<T*>(shared + 2 * kMatrixVectors)),
        features_(grads_ + kTokenTileElements),
        of_normalizer_(reinterpret_cast<float*>(features_ + kTokenTileElements)) {
    load_features<T>(w_, p.w);
  }
  // Two tiles that are free while a tile's gradient is made.
  __device__ T* tiles() const { return grads_; }

  // Calls `gradient(image, first, y, use)` for all tiles of 16 tokens per warp. It must call `use`
  // with the gradient of the result of `y()`. Tokens beyond the image's last one are zeros.
  template <typename Gradient>
  __device__ void operator()(Gradient gradient) {
    for (int64_t part = blockIdx.x; part < p_.chunks.count(); part += gridDim.x) {
      const Chunk chunk(p_.chunks, part);
      load_means(chunk.image);
      __syncthreads();
      sums_.clear();
      of_normalizer_[threadIdx.x] = 0.f;
      // Loaded a tile ahead, because the tile begins with them.
      const int own = warp_index() * kRows;
      Operand<2> upcoming = load_queries(chunk.image, chunk.begin + own);
#pragma unroll 1
      for (int at = chunk.begin; at < chunk.end; at += kBlockTokens) {
        const int first = at + own;
        const QueryFeatures of_queries = features_of<T>(limited<T>(upcoming, first), w_, p_.log_eps,
                                                        p_.means.logs + chunk.image * kFeatures);
        gradient(
            chunk.image, first,
            [&] {
              return rounded_y<T>(times_features<T>(of_queries.features, means_), of_queries);
            },
            [&](const Sums<2>& grad_y) {
              const Operand<2> grad = use(chunk.image, first, of_queries, grad_y);
              upcoming = load_queries(chunk.image, first + kBlockTokens);
              add(grad, of_queries.features);
            });
      }
      store(part);
    }
  }

 private:
  __device__ Operand<2> load_queries(int64_t image, int first) const {
    return load_operand<T>(p_.queries, image, first, p_.chunks.tokens);
  }

  // An image's means as a matrix like w.
  __device__ void load_means(int64_t image) const {
    const uint4* from = p_.means.transposed + image * kMeanVectors;
    for (int i = threadIdx.x; i < kMeanVectors; i += blockDim.x) {
      const int block = i / kBlockVectors, vector = i % kBlockVectors;
      const uint4 eight = from[i];
      store_in_matrix(means_, block / 2 * kFeatures + block_column(vector), block % 2, vector % 4,
                      {eight.x, eight.y, eight.z, eight.w});
    }
    if constexpr (kHasWarpgroups) show_to_products();
  }

  // The gradient of the queries to memory; that of y over D is returned.
  __device__ Operand<2> use(int64_t image, int first, const QueryFeatures& of_queries,
                            Sums<2> grad_y) {
    scale_rows(grad_y, of_queries.inverse);
    const Operand<2> grad = rounded_operand<T>(grad_y);
    Sums<1> log_gradients = times_embed<T>(grad, means_);
    // −grad·y, from the same rounded factors, so that both terms of a log-feature's gradient
    // cancel.
    float of_divisor[2] = {}, of_normalizer[8] = {};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float2 pair = elements_of<T>(of_queries.features.pair(0, i / 4, i % 4));
      const float* at = &log_gradients.at[0][i / 4][i % 4 * 2];
      of_divisor[i / 4] -= pair.x * at[0] + pair.y * at[1];
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) of_divisor[i] = sum_of_row(of_divisor[i]) * of_queries.inverse[i];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int half = i / 4;
      const float2 pair = elements_of<T>(of_queries.features.pair(0, half, i % 4));
      float* to = &log_gradients.at[0][half][i % 4 * 2];
      to[0] = pair.x * (to[0] + of_divisor[half]);
      to[1] = pair.y * (to[1] + of_divisor[half]);
      of_normalizer[i % 4 * 2] += pair.x * of_divisor[half];
      of_normalizer[i % 4 * 2 + 1] += pair.y * of_divisor[half];
    }
    // The elements of this thread.
    of_normalizer_[threadIdx.x] += sum_of_columns(of_normalizer);
    const float factor[2] = {of_divisor[0] * of_queries.slope[0],
                             of_divisor[1] * of_queries.slope[1]};
    const Sums<2> grad_queries = through_features<T>(rounded_operand<T>(log_gradients), w_,
                                                     load_queries(image, first), factor);
    const int tokens = p_.chunks.tokens;
    store_operand(rounded_operand<T>(grad_queries),
                  static_cast<T*>(p_.grad_queries) + (image * tokens + first) * p_.grad_stride,
                  p_.grad_stride, tokens - first);
    return grad;
  }

  // Adds features·grad of all warps to the gradients of the sums.
  __device__ void add(const Operand<2>& grad, const Operand<1>& features) {
    // The tiles have been multiplied by all warps.
    __syncthreads();
    const int row = warp_index() * kRows * kEmbed;
    keep_operand(grad, grads_ + row);
    keep_operand(features, features_ + row);
    __syncthreads();
    multiply_tiles(sums_, features_, feature() / 8, grads_, column() / 8, kBlockTokens);
  }

  // A part of the gradients of the sums consists of 16 features by 16 columns of each warp.
  __device__ static int feature() { return warp_index() % 2 * 16; }
  __device__ static int column() { return warp_index() / 2 * 16; }

  __device__ void store(int64_t part) const {
    if (threadIdx.x < kFeatures) {
      const int feature = threadIdx.x, lane = feature % 8 * 4 + feature / 8;
      float total = 0.f;
      for (int i = 0; i < kBlockWarps; ++i) total += of_normalizer_[i * kLanes + lane];
      p_.parts.normalizer[part * kFeatures + feature] = total;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t row = part * kFeatures + feature() + sums_.row(0, i % 2);
      *reinterpret_cast<float2*>(p_.parts.sums + row * kEmbed + column() + sums_.column(i / 2)) = {
          sums_.at[0][i / 2][i % 2][0], sums_.at[0][i / 2][i % 2][1]};
    }
  }

  const QueriesBackwardParams& p_;
  uint4 *w_, *means_;
  T *grads_, *features_;
  float* of_normalizer_;
  OuterSums<1, 2> sums_;
};

// The parts of the gradients of the sums, written by the blocks of the queries' backward.
class QueryParts {
 public:
  QueryParts(const torch::stable::Tensor& like, int64_t images, int64_t tokens,
             const DeviceScope& device)
      : chunks_(make_block_chunks(images, tokens, kBlockTokens, device)),
        grid_(grid_size(std::min<int64_t>(chunks_.count(), device.multiprocessors()))),
        memory_(like, chunks_.count()) {}

  const Chunks& chunks() const { return chunks_; }
  dim3 grid() const { return grid_; }
  const Parts& parts() const { return memory_.parts(); }

 private:
  Chunks chunks_;
  dim3 grid_;
  PartMemory memory_;
};

struct KeysBackwardParams {
  const float* w;
  Rows keys, values, skip;  // skip: a gradient of the values that is added; may be null
  const float* maximum;
  Means grads;  // of the sums over Z
  TileLoop loop;
  void *grad_keys, *grad_values;
  int64_t grad_stride;  // from a token to the next
};

// float16 needs a few more registers than three resident blocks allow.
template <typename T>
__global__ void __launch_bounds__(kAttentionWarps* kLanes,
                                  std::is_same_v<T, torch::headeronly::Half> ? 2 : 3)
    keys_backward_kernel(const KeysBackwardParams p) {
  uint4* w = dynamic_shared;
  load_features<T>(w, p.w);
  __syncthreads();
  p.loop([&](int64_t image, int first) {
    const int tokens = p.loop.tokens;
    const Operand<2> keys = limited<T>(load_operand<T>(p.keys, image, first, tokens), first);
    const Operand<2> values = load_operand<T>(p.values, image, first, tokens);
    float half[2], column[8];
    half_squares<T>(keys, half);
    Sums<1> logs = times_embed<T>(keys, w), log_gradients;
    load_eight(column, p.maximum + image * kFeatures + sum_column(0));
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      float& log = logs.at[0][i / 8][i % 8];
      log = fast_exp2((log - half[i / 8] - column[i % 8]) * kLog2E);
    }
    const Operand<1> features = rounded_operand<T>(logs);
    log_gradients.clear();
    multiply_parts<T>(log_gradients, values, p.grads.transposed + image * kMeanVectors);
    load_eight(column, p.grads.logs + image * kFeatures + sum_column(0));
    float factor[2] = {};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float2 pair = elements_of<T>(features.pair(0, i / 4, i % 4));
      float* to = &log_gradients.at[0][i / 4][i % 4 * 2];
      to[0] = pair.x * (to[0] + column[i % 4 * 2]);
      to[1] = pair.y * (to[1] + column[i % 4 * 2 + 1]);
      factor[i / 4] -= to[0] + to[1];
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) factor[i] = sum_of_row(factor[i]);
    const int64_t to = (image * tokens + first) * p.grad_stride;
    store_operand(
        rounded_operand<T>(through_features<T>(rounded_operand<T>(log_gradients), w, keys, factor)),
        static_cast<T*>(p.grad_keys) + to, p.grad_stride, tokens - first);
    Sums<2> grad_values;
    grad_values.clear();
    multiply_parts<T>(grad_values, features, p.grads.as_is + image * kMeanVectors);
    if (p.skip.at) add_operand<T>(grad_values, load_operand<T>(p.skip, image, first, tokens));
    store_operand(rounded_operand<T>(grad_values), static_cast<T*>(p.grad_values) + to,
                  p.grad_stride, tokens - first);
  });
}

// Tensors that the forward saves for the backward.
inline void check_sums(const char* name, int64_t images, const torch::stable::Tensor& maximum,
                       const torch::stable::Tensor& normalizer, const torch::stable::Tensor& sums) {
  constexpr auto kFloat = torch::headeronly::ScalarType::Float;
  check_tensor(name, "maximum", maximum, {images, kFeatures}, kFloat);
  check_tensor(name, "normalizer", normalizer, {images, kFeatures}, kFloat);
  check_tensor(name, "sums", sums, {images, kFeatures, kEmbed}, kFloat);
}

// w in float32, and the values derived from w and eps that kernels use.
class RandomFeatures {
 public:
  RandomFeatures(const char* name, const torch::stable::Tensor& w, double eps)
      : floats_(
            torch::stable::contiguous(torch::stable::to(w, torch::headeronly::ScalarType::Float))),
        log_eps_(eps > 0 ? static_cast<float>(std::log(eps) + std::log(kFeatures)) : -INFINITY) {
    T2T_CHECK(w.dim() == 2 && w.size(0) == kFeatures && w.size(1) == kEmbed, name,
              ": w: got shape ", shape_text(w.sizes()), ", expected (", kFeatures, ", ", kEmbed,
              ")");
  }
  const float* floats() const { return static_cast<const float*>(floats_.const_data_ptr()); }
  float log_eps() const { return log_eps_; }

 private:
  torch::stable::Tensor floats_;
  float log_eps_;
};

// The sums over keys that an operator saves, and its passes over tokens.
template <typename T>
struct PerformerPasses {
  const RandomFeatures& features;
  int64_t images, tokens;
  const DeviceScope& device;

  // Maximum, normaliser and sums of each image.
  void keys(const Rows& keys, const Rows& values, const torch::stable::Tensor& like,
            const Parts& saved, const KeyMeans<T>& means) const {
    KeysParams p = {};
    p.w = features.floats();
    p.keys = keys;
    p.values = values;
    p.chunks = make_chunks(images, tokens, 3 * kAttentionWarps, device);
    const PartMemory parts(like, p.chunks.count());
    p.parts = parts.parts();
    device.launch("performer_keys", keys_kernel<T>,
                  dim3(grid_size(divide_up(p.chunks.count(), kAttentionWarps))),
                  kAttentionWarps * kLanes, kKeysBytes, p);
    means.combine(p.parts, p.chunks.chunks, saved.maximum, saved.normalizer, saved.sums, device);
  }

  QueriesBackwardParams queries_backward(const Rows& queries, const KeyMeans<T>& means,
                                         const QueryParts& parts, void* grad_queries,
                                         int64_t grad_stride) const {
    return {features.floats(), features.log_eps(), queries,      means(),
            parts.chunks(),    parts.parts(),      grad_queries, grad_stride};
  }

  // Gradients of k and v, from the parts of the gradients of the sums. `skip` is added to the
  // gradient of v.
  void keys_backward(const Rows& keys, const Rows& values, const Rows& skip,
                     const torch::stable::Tensor& like, const Parts& saved, const QueryParts& parts,
                     void* grad_keys, void* grad_values, int64_t grad_stride) const {
    const KeyMeans<T> grads(like, images, true);
    grads.combine_gradients(parts.parts(), parts.chunks().chunks, saved.normalizer, device);
    KeysBackwardParams k = {};
    k.w = features.floats();
    k.keys = keys;
    k.values = values;
    k.skip = skip;
    k.maximum = saved.maximum;
    k.grads = grads();
    k.loop = make_tile_loop(images, tokens);
    k.grad_keys = grad_keys;
    k.grad_values = grad_values;
    k.grad_stride = grad_stride;
    device.launch("performer_keys_backward", keys_backward_kernel<T>,
                  grid_of_tiles(k.loop, kAttentionWarps, 3, device), kAttentionWarps * kLanes,
                  kMatrixVectors * 16, k);
  }
};

}  // namespace t2t
