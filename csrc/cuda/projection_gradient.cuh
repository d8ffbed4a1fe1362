// Gradients of soft split, LayerNorm and Linear of half types (see projection.cuh).
//
//   weight    G = Σ_t dy_t û_tᵀ over a block's share of the tokens, in registers; û is normalised
//             again from the moments that the forward leaves. Slots of all blocks are added in
//             their order: dW = γ∘G + β·Σdyᵀ, dγ = Σ W∘G, dβ = W·Σdy
//   map       dx = Σ over the tokens t that cover a pixel of r_t (W∘γ)ᵀdy_t − r_t m1_t
//             − (x − μ_t) r_t² m2_t, with m1 = dy·s/n, s the sums of the rows of W∘γ, and
//             m2 = dy·(y − c)/n. Pixels whose row and column leave the same remainders by the
//             stride are covered by the same taps, whose weights a block keeps in shared memory
#pragma once

#include <algorithm>

#include "projection.cuh"

namespace t2t {

constexpr int kGradientWarps = 12;
constexpr int kGradientTokens = kGradientWarps * 8;
constexpr int kGradientColumns = kProjectGroups * kGroup;
constexpr int kGradientPitch = padded_row<uint16_t>(kGradientColumns);
// Of a block: a third of its elements, and a quarter of its columns, are a warp's.
constexpr int kTapsOfBlock = 3;

struct WeightGradientParams16 {
  PatchMap map;
  const void* grad;
  const float2* moments;  // null without a norm
  int outputs;
  float* slots;  // (blockIdx.x, 1 + elements in blocks, outputs in blocks); Σ dy first
};

// From one row of elements to the next of a tile of `elements`, such that neither 4-byte columns
// nor 16-byte rows meet in a bank.
__host__ __device__ constexpr int patch_pitch(int elements) {
  return elements / 2 % 8 == 4 ? elements : elements + 8;
}

// What a lane gathers of one token, row g of eight, and leaves normalised in shared memory. In rows
// order all of a patch; in taps order three taps.
template <typename T, int kPatchRows, bool kVectors>
struct TokenElements {
  static constexpr bool kTaps = kPatchRows == 0;
  // Half of the largest patch, by blockIdx.y: the sums of all of it would not fit in registers.
  static constexpr bool kSplit = kPatchRows == kMostRows / 2;
  static constexpr int kElements = kTaps ? kTapsOfBlock * kTapChannels : kPatchRows * kRowColumns;
  static constexpr int kPairs = kTaps ? kTapsOfBlock * 8 : kPatchRows;
  uint32_t pairs[kPairs];

  // `first_piece` of the taps order's pieces of 64 elements.
  __device__ void load(const PatchMap& p, const Corners& corners, int first_piece) {
#pragma unroll
    for (int i = 0; i < kPairs; ++i) pairs[i] = 0;
    const int t = lane_index() % 4;
    const T* x = static_cast<const T*>(p.x) + corners.offset[0];
    if constexpr (kTaps) {
      const int channels = p.elements / (p.kernel * p.kernel);
#pragma unroll
      for (int i = 0; i < kTapsOfBlock; ++i) {
        const int element = (first_piece + i) * kTapChannels, tap = element / channels;
        const int row = tap / p.kernel, column = tap - row * p.kernel;
        if (element >= p.elements || !corners.has_row(p, 0, row) ||
            !corners.has_column(p, 0, column)) {
          continue;
        }
        const T* from = x + row * p.row_stride + column * p.column_stride +
                        (element - tap * channels + t * 8) * p.channel_stride;
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          uint32_t* to = pairs + i * 8 + j * 4;
          if constexpr (kVectors) {
            const uint4 vector = *reinterpret_cast<const uint4*>(from + j * kGroup);
            to[0] = vector.x;
            to[1] = vector.y;
            to[2] = vector.z;
            to[3] = vector.w;
          } else {
            const auto* bits = reinterpret_cast<const uint16_t*>(from);
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              const int64_t at = (j * kGroup + 2 * e) * p.channel_stride;
              to[e] = bits[at] | uint32_t(bits[at + p.channel_stride]) << 16;
            }
          }
        }
      }
    } else {
      const int column = t * 2;
      const T* from = x + column * p.column_stride;
      const bool first = corners.has_column(p, 0, column) && column < p.kernel;
      const bool second = corners.has_column(p, 0, column + 1) && column + 1 < p.kernel;
      const int first_row = kSplit ? blockIdx.y * kPatchRows : 0;
#pragma unroll
      for (int row = 0; row < kPatchRows; ++row) {
        const T* at = from + p.row_offset[first_row + row];
        const bool exists =
            first_row + row < p.rows && corners.has_row(p, 0, p.row_of_kernel[first_row + row]);
        if constexpr (kVectors) {
          if (exists && first) pairs[row] = *reinterpret_cast<const uint32_t*>(at);
        } else {
          const auto* bits = reinterpret_cast<const uint16_t*>(at);
          if (exists && first) pairs[row] = bits[0];
          if (exists && second) pairs[row] |= uint32_t(bits[p.column_stride]) << 16;
        }
      }
    }
  }

  // Places beyond the kernel may hold anything finite: nobody reads what becomes of them.
  __device__ void keep(const PatchMap& p, float mean, float rstd, bool normalized, T* row) {
    const int t = lane_index() % 4;
    if constexpr (kTaps) {
#pragma unroll
      for (int i = 0; i < 2 * kTapsOfBlock; ++i) {
        uint32_t* from = pairs + 4 * i;
#pragma unroll
        for (int e = 0; e < 4 && normalized; ++e) {
          from[e] = normalized_pair<T>(from[e], mean, rstd);
        }
        *reinterpret_cast<uint4*>(row + i * kGroup + t * 8) = {from[0], from[1], from[2], from[3]};
      }
    } else {
      const uint32_t within =
          (2 * t < p.kernel ? 0xFFFFu : 0) | (2 * t + 1 < p.kernel ? 0xFFFF0000u : 0);
#pragma unroll
      for (int i = 0; i < kPatchRows; ++i) {
        uint32_t pair = pairs[i] & within;
        if (normalized) pair = normalized_pair<T>(pair, mean, rstd);
        *reinterpret_cast<uint32_t*>(row + i * kRowColumns + 2 * t) = pair;
      }
    }
  }
};

template <typename T, int kPatchRows, bool kVectors>
__global__ void __launch_bounds__(kGradientWarps* kLanes, 1)
    weight_gradient16_kernel(const WeightGradientParams16 p) {
  using Elements = TokenElements<T, kPatchRows, kVectors>;
  constexpr int kPitch = patch_pitch(Elements::kElements);
  constexpr int kWide = Elements::kElements / 24;  // tiles of eight elements a warp
  static_assert(Elements::kElements % 24 == 0 || Elements::kElements == 64 ||
                Elements::kElements == 112);
  constexpr int kWideTiles = Elements::kElements % 24 == 0 ? kWide : kWide + 1;
  T* patches = reinterpret_cast<T*>(dynamic_shared);
  T* grads = patches + kGradientTokens * kPitch;
  const int first_piece = blockIdx.y * kTapsOfBlock;
  const int first_output = blockIdx.z * kGradientColumns;
  const int tall = warp_index() / 3 * 48, wide = warp_index() % 3 * (kWideTiles * 8);
  const int lane = lane_index(), row = warp_index() * 8 + lane / 4;
  const bool normalized = p.moments != nullptr;

  float sums[3][kWideTiles][2][2] = {};
  float bias[3][2] = {};
  Elements elements;
  // Only the first of the two rows of a lane's corners is used.
  const auto load = [&](int first_token) {
    elements.load(p.map, Corners(p.map, first_token + warp_index() * 8), first_piece);
  };
  const int step = gridDim.x * kGradientTokens;
  int first_token = blockIdx.x * kGradientTokens;
  // Ahead of its turn where registers do.
  constexpr bool kAhead = kVectors && !Elements::kTaps;
  if (kAhead && first_token < p.map.token_count) load(first_token);
#pragma unroll 1
  for (; first_token < p.map.token_count; first_token += step) {
    constexpr int kVectorsOfRow = kGradientColumns / 8;
    for (int i = threadIdx.x; i < kGradientTokens * kVectorsOfRow; i += kGradientWarps * kLanes) {
      const int of = i / kVectorsOfRow, column = i % kVectorsOfRow * 8;
      const int64_t token = first_token + of;
      const bool exists = token < p.map.token_count && first_output + column < p.outputs;
      const T* grad = static_cast<const T*>(p.grad);
      copy_async(grads + of * kGradientPitch + column,
                 exists ? grad + token * p.outputs + first_output + column : grad, exists);
    }
    commit_copies();
    if (!kAhead) load(first_token);
    float2 moments = {0.f, 1.f};
    if (normalized && first_token + row < p.map.token_count) moments = p.moments[first_token + row];
    elements.keep(p.map, moments.x, moments.y, normalized, patches + row * kPitch);
    wait_for_copies<0>();
    __syncthreads();
    if (kAhead && first_token + step < p.map.token_count) load(first_token + step);

#pragma unroll 1
    for (int k = 0; k < kGradientTokens; k += 16) {
      uint32_t left[3][4];
#pragma unroll
      for (int i = 0; i < 3; ++i) {
        load_matrices_transposed(left[i], grads + (k + lane % 8 + lane / 16 * 8) * kGradientPitch +
                                              tall + i * 16 + lane / 8 % 2 * 8);
      }
      if (blockIdx.y == 0 && wide == 0) {
        const uint32_t ones = round_pair<T>(1.f, 1.f);
        float unused[2] = {};
#pragma unroll
        for (int i = 0; i < 3; ++i) {
          mma<T>(bias[i][0], unused[0], bias[i][1], unused[1], left[i], ones, ones);
        }
      }
#pragma unroll
      for (int j = 0; j < kWideTiles; j += 2) {
        uint32_t right[4];
        // An odd last tile takes its neighbour's columns along, within the row or its padding.
        const int second = j + 1 < kWideTiles ? 8 : 0;
        load_matrices_transposed(
            right, patches + (k + lane % 16) * kPitch + wide + j * 8 + lane / 16 * second);
#pragma unroll
        for (int i = 0; i < 3; ++i) {
          auto& d = sums[i][j];
          mma<T>(d[0][0], d[0][1], d[1][0], d[1][1], left[i], right[0], right[1]);
          if (j + 1 < kWideTiles) {
            auto& e = sums[i][j + 1 < kWideTiles ? j + 1 : j];
            mma<T>(e[0][0], e[0][1], e[1][0], e[1][1], left[i], right[2], right[3]);
          }
        }
      }
    }
    // The tiles have been multiplied by all warps.
    __syncthreads();
  }

  // (elements, outputs): a lane has two elements of each of two outputs.
  const int64_t columns = int64_t(gridDim.z) * kGradientColumns;
  const int64_t rows = 1 + int64_t(gridDim.y) * Elements::kElements;
  float* slot = p.slots + blockIdx.x * rows * columns + first_output + tall;
#pragma unroll
  for (int i = 0; i < 6; ++i) {
    const int output = i / 2 * 16 + i % 2 * 8 + lane / 4;
    if (blockIdx.y == 0 && wide == 0 && lane % 4 == 0) slot[output] = bias[i / 2][i % 2];
#pragma unroll
    for (int j = 0; j < kWideTiles; ++j) {
      const int element = wide + j * 8 + lane % 4 * 2;
      if (element >= Elements::kElements) continue;
      float* to =
          slot + (1 + int64_t(blockIdx.y) * Elements::kElements + element) * columns + output;
      to[0] = sums[i / 2][j][i % 2][0];
      to[columns] = sums[i / 2][j][i % 2][1];
    }
  }
}

struct WeightSumsParams {
  PatchMap map;
  int channels;
  const float* slots;
  int slot_count;
  int64_t slot_rows, slot_columns;
  int outputs;
  const void *weight, *gain, *offset;
  void *grad_weight, *grad_bias, *grad_gain, *grad_offset;
};

constexpr int kSumsThreads = 192;

// A block per element of a patch in its order, and one more for the bias.
template <typename T>
__global__ void __launch_bounds__(kSumsThreads) weight_sums_kernel(const WeightSumsParams p) {
  __shared__ float parts[2][kSumsThreads / kLanes];
  const bool bias_only = blockIdx.x == 0;
  const int element = static_cast<int>(blockIdx.x) - 1;
  const int own = bias_only ? 0 : own_element(p.map, p.channels, element);
  if (own < 0) return;
  const float gain =
      p.gain && !bias_only ? static_cast<float>(static_cast<const T*>(p.gain)[own]) : 1.f;
  const float offset =
      p.offset && !bias_only ? static_cast<float>(static_cast<const T*>(p.offset)[own]) : 0.f;
  float grad_gain = 0.f, grad_offset = 0.f;
  for (int output = threadIdx.x; output < p.outputs; output += kSumsThreads) {
    const auto total = [&](int64_t row) {
      // Sums side by side, so that loads do not wait for one another.
      constexpr int kSide = 8;
      float sums[kSide] = {};
      const float* from = p.slots + row * p.slot_columns + output;
      const int64_t slot = p.slot_rows * p.slot_columns;
      for (int i = 0; i < p.slot_count; i += kSide) {
#pragma unroll
        for (int j = 0; j < kSide; ++j) {
          if (i + j < p.slot_count) sums[j] += from[(i + j) * slot];
        }
      }
#pragma unroll
      for (int j = 1; j < kSide; ++j) sums[0] += sums[j];
      return sums[0];
    };
    const float bias = bias_only || p.gain ? total(0) : 0.f;
    if (bias_only) {
      static_cast<T*>(p.grad_bias)[output] = static_cast<T>(bias);
      continue;
    }
    const float sum = total(1 + element);
    const int64_t at = int64_t(output) * p.map.elements + own;
    static_cast<T*>(p.grad_weight)[at] = static_cast<T>(gain * sum + offset * bias);
    if (p.gain) {
      const float weight = static_cast<float>(static_cast<const T*>(p.weight)[at]);
      grad_gain += weight * sum;
      grad_offset += weight * bias;
    }
  }
  if (!p.gain || bias_only) return;
  for (int distance = 1; distance < kLanes; distance *= 2) {
    grad_gain += __shfl_xor_sync(kAllLanes, grad_gain, distance);
    grad_offset += __shfl_xor_sync(kAllLanes, grad_offset, distance);
  }
  if (lane_index() == 0) {
    parts[0][warp_index()] = grad_gain;
    parts[1][warp_index()] = grad_offset;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    grad_gain = grad_offset = 0.f;
    for (int i = 0; i < kSumsThreads / kLanes; ++i) {
      grad_gain += parts[0][i];
      grad_offset += parts[1][i];
    }
    static_cast<T*>(p.grad_gain)[own] = static_cast<T>(grad_gain);
    static_cast<T*>(p.grad_offset)[own] = static_cast<T>(grad_offset);
  }
}

// Gradients of the parameters. `grad` is contiguous, its rows begin at multiples of 16 bytes.
template <typename T>
void weight_gradients16(const Geometry& map, const PatchSource& source,
                        const torch::stable::Tensor& grad, const float2* moments,
                        WeightSumsParams s, const DeviceScope& device) {
  WeightGradientParams16 p = {};
  p.map = source.map;
  p.grad = grad.const_data_ptr();
  p.moments = moments;
  p.outputs = s.outputs;
  const bool taps = source.order == PatchOrder::kTaps;
  const int pieces = map.token_width() / kTapChannels;
  const int compiled = compiled_rows(p.map.rows);
  const int rows = compiled == kMostRows ? kMostRows / 2 : compiled;
  const int elements = taps ? kTapsOfBlock * kTapChannels : rows * kRowColumns;
  const int64_t wide = taps ? divide_up(pieces, kTapsOfBlock) : divide_up(p.map.rows, rows);
  const int64_t tall = divide_up(p.outputs, kGradientColumns);
  s.slot_rows = 1 + wide * elements;
  s.slot_columns = tall * kGradientColumns;
  const int64_t slots =
      std::clamp<int64_t>(divide_up(p.map.token_count, kGradientTokens), p.map.token_count > 0,
                          std::max<int64_t>(1, device.multiprocessors() / (wide * tall)));
  const torch::stable::Tensor memory = new_floats(grad, slots * s.slot_rows * s.slot_columns);
  p.slots = floats_of(memory);
  const auto launch = [&](void (*kernel)(WeightGradientParams16)) {
    if (slots == 0) return;
    const int bytes = kGradientTokens * (patch_pitch(elements) + kGradientPitch) * 2;
    device.launch("soft_split_linear_weight_gradient", kernel,
                  dim3(grid_size(slots), static_cast<unsigned>(wide), static_cast<unsigned>(tall)),
                  kGradientWarps * kLanes, bytes, p);
  };
  const bool vectors = source.vectors;
  if (taps) {
    launch(vectors ? weight_gradient16_kernel<T, 0, true> : weight_gradient16_kernel<T, 0, false>);
  } else if (rows == 8) {
    launch(vectors ? weight_gradient16_kernel<T, 8, true> : weight_gradient16_kernel<T, 8, false>);
  } else if (rows == 21) {
    launch(vectors ? weight_gradient16_kernel<T, 21, true>
                   : weight_gradient16_kernel<T, 21, false>);
  } else {
    launch(vectors ? weight_gradient16_kernel<T, kMostRows / 2, true>
                   : weight_gradient16_kernel<T, kMostRows / 2, false>);
  }
  s.map = p.map;
  s.channels = map.channels;
  s.slots = p.slots;
  s.slot_count = static_cast<int>(slots);
  device.launch("soft_split_linear_weight_sums", weight_sums_kernel<T>,
                dim3(grid_size(s.slot_rows)), kSumsThreads, 0, s);
}

// ---- the gradient of the map, of 64 channels a tap and stride 1 or 2

// r, r m1 − r² m2 μ and r² m2 of every token; without a norm 1, 0 and 0 are not needed.
struct TokenScalarsParams {
  const void *grad, *y;
  const float *constants, *row_sums;
  const float2* moments;
  int64_t tokens;
  int outputs, elements;
  float4* scalars;
};

constexpr int kScalarWarps = 8;

// Eight tokens a warp.
template <typename T>
__global__ void __launch_bounds__(kScalarWarps* kLanes)
    token_scalars_kernel(const TokenScalarsParams p) {
  const int64_t token = (int64_t(blockIdx.x) * kScalarWarps + warp_index()) * 8 + lane_index() / 4;
  float mean = 0.f, mean_of_product = 0.f;
  for (int column = lane_index() % 4 * 8; column < p.outputs && token < p.tokens;
       column += kGroup) {
    float grad[8], y[8], constants[8], sums[8];
    load_eight(grad, static_cast<const T*>(p.grad) + token * p.outputs + column, 8, true);
    load_eight(y, static_cast<const T*>(p.y) + token * p.outputs + column, 8, true);
    load_eight(constants, p.constants + column, 8, true);
    load_eight(sums, p.row_sums + column, 8, true);
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      mean += grad[e] * sums[e];
      mean_of_product += grad[e] * (y[e] - constants[e]);
    }
  }
  const float share = 1.f / static_cast<float>(p.elements);
  mean = sum_of_row(mean) * share;
  mean_of_product = sum_of_row(mean_of_product) * share;
  if (token >= p.tokens || lane_index() % 4 != 0) return;
  const float2 moments = p.moments[token];
  // y − c is r times what dx has r for a second time.
  const float slope = moments.y * mean_of_product;
  p.scalars[token] = {moments.y, moments.y * (mean - slope * moments.x), moments.y * slope, 0.f};
}

constexpr int kMapWarps16 = 12;
constexpr int kMostTaps = 4, kMostClasses = 4;
constexpr int kTapBlocks = kProjectGroups * 2;  // of a tap's weight: outputs by 64 channels

struct MapGradientParams16 {
  Geometry map;
  const void *x, *grad;
  const uint4* packed;    // (64 channels, tap), in blocks
  const float4* scalars;  // null without a norm
  void* grad_x;
  int64_t x_strides[4], grad_x_strides[4];
  bool x_vectors, grad_x_vectors;
  int outputs, classes;
  int first_block[kMostClasses + 1];  // of a class
};

struct FoldTapsParams {
  const void *weight, *gain;
  int outputs, channels, area;
  uint4* packed;
};

// blockIdx.x: 64 channels of a tap; blockIdx.y: 32 outputs.
template <typename T>
__global__ void __launch_bounds__(kFoldWarps* kLanes) fold_taps_kernel(const FoldTapsParams p) {
  const int tap = blockIdx.x % p.area, first_channel = blockIdx.x / p.area * kTapChannels;
  const int first_output = blockIdx.y * kGroup;
  pack_blocks<T>(p.packed + (int64_t(blockIdx.x) * kTapBlocks + blockIdx.y * 2) * kBlockVectors, 1,
                 2, threadIdx.x, blockDim.x, [&](int row, int channel) {
                   const int output = first_output + row;
                   if (output >= p.outputs) return 0.f;
                   const int element = (first_channel + channel) * p.area + tap;
                   const float weight = static_cast<float>(static_cast<const T*>(
                       p.weight)[int64_t(output) * p.channels * p.area + element]);
                   return p.gain
                              ? weight * static_cast<float>(static_cast<const T*>(p.gain)[element])
                              : weight;
                 });
}

template <typename T>
__global__ void __launch_bounds__(kMapWarps16* kLanes, 1)
    map_gradient16_kernel(const MapGradientParams16 p) {
  const Geometry& map = p.map;
  int of_class = 0;
  while (static_cast<int>(blockIdx.x) >= p.first_block[of_class + 1]) ++of_class;
  const int block = static_cast<int>(blockIdx.x) - p.first_block[of_class];
  const int blocks = p.first_block[of_class + 1] - p.first_block[of_class];
  const int columns_of_classes = min(map.stride, map.width);
  const int first_y = of_class / columns_of_classes, first_x = of_class % columns_of_classes;
  const int height = (map.height - first_y + map.stride - 1) / map.stride;
  const int width = (map.width - first_x + map.stride - 1) / map.stride;
  const int first_ky = (first_y + map.padding) % map.stride;
  const int first_kx = (first_x + map.padding) % map.stride;
  const int taps_high = max(0, (map.kernel - first_ky + map.stride - 1) / map.stride);
  const int taps_wide = max(0, (map.kernel - first_kx + map.stride - 1) / map.stride);
  const int taps = taps_high * taps_wide;
  const int first_channel = blockIdx.y * kTapChannels;

  for (int tap = 0; tap < taps; ++tap) {
    const int ky = first_ky + tap / taps_wide * map.stride;
    const int kx = first_kx + tap % taps_wide * map.stride;
    const uint4* from =
        p.packed + (int64_t(blockIdx.y) * map.kernel * map.kernel + ky * map.kernel + kx) *
                       kTapBlocks * kBlockVectors;
    for (int i = threadIdx.x; i < kTapBlocks * kBlockVectors; i += blockDim.x) {
      copy_async(dynamic_shared + tap * kTapBlocks * kBlockVectors + i, from + i, true);
    }
  }
  commit_copies();
  wait_for_copies<0>();
  __syncthreads();

  const int64_t pixels = map.batch * height * width;
  const int64_t step = int64_t(blocks) * kMapWarps16 * kRows;
  for (int64_t first = (int64_t(block) * kMapWarps16 + warp_index()) * kRows; first < pixels;
       first += step) {
    // Pixels g and g + 8: where they are, and the first token along each axis that covers them.
    int image[2], row[2], column[2];
    bool exists[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t pixel = first + sum_row(half);
      exists[half] = pixel < pixels;
      const auto index = static_cast<uint32_t>(exists[half] ? pixel : 0);
      image[half] = index / static_cast<uint32_t>(height * width);
      const int in_image = index - image[half] * height * width;
      row[half] = in_image / width;
      column[half] = in_image - row[half] * width;
    }
    const int row_shift = (first_y + map.padding - first_ky) / map.stride;
    const int column_shift = (first_x + map.padding - first_kx) / map.stride;
    Sums<2> total;
    total.clear();
    float constant[2] = {}, slope[2] = {};
#pragma unroll 1
    for (int tap = 0; tap < taps; ++tap) {
      const T* from[2] = {};
      float factor[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int token_row = row[half] + row_shift - tap / taps_wide;
        const int token_column = column[half] + column_shift - tap % taps_wide;
        const bool covers = exists[half] && token_row >= 0 && token_row < map.rows &&
                            token_column >= 0 && token_column < map.columns;
        factor[half] = covers ? 1.f : 0.f;
        if (!covers) continue;
        const int64_t token = (image[half] * map.rows + token_row) * map.columns + token_column;
        from[half] = static_cast<const T*>(p.grad) + token * p.outputs + lane_index() % 4 * 8;
        if (p.scalars) {
          const float4 scalars = p.scalars[token];
          factor[half] = scalars.x;
          constant[half] += scalars.y;
          slope[half] += scalars.z;
        }
      }
      Sums<2> of_tap;
      of_tap.clear();
      // Half of the outputs at a time: with all of them registers would not do.
      constexpr int kHalf = kProjectGroups / 2;
#pragma unroll
      for (int first = 0; first < kProjectGroups; first += kHalf) {
        Operand<kHalf> grads;
        grads.clear();
#pragma unroll
        for (int i = 0; i < 2 * kHalf; ++i) {
          const int group = first + i / 2;
          if (from[i % 2] && group * kGroup + lane_index() % 4 * 8 < p.outputs) {
            set_eight(grads, i / 2, i % 2,
                      *reinterpret_cast<const uint4*>(from[i % 2] + group * kGroup));
          }
        }
        multiply_blocks<T>(of_tap, grads,
                           dynamic_shared + (tap * kTapBlocks + first * 2) * kBlockVectors);
      }
#pragma unroll
      for (int i = 0; i < 32; ++i) {
        total.at[i / 16][i / 8 % 2][i % 8] +=
            factor[i / 8 % 2] * of_tap.at[i / 16][i / 8 % 2][i % 8];
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int half = i % 2, channel = first_channel + sum_column(i / 2);
      if (!exists[half]) continue;
      const int64_t y = first_y + int64_t(row[half]) * map.stride;
      const int64_t x = first_x + int64_t(column[half]) * map.stride;
      float (&sums)[8] = total.at[i / 2][half];
      if (p.scalars) {
        float values[8];
        const T* from = static_cast<const T*>(p.x) + image[half] * p.x_strides[0] +
                        channel * p.x_strides[1] + y * p.x_strides[2] + x * p.x_strides[3];
        if (p.x_vectors) {
          load_eight(values, from, 8, true);
        } else {
#pragma unroll
          for (int e = 0; e < 8; ++e) values[e] = static_cast<float>(from[e * p.x_strides[1]]);
        }
#pragma unroll
        for (int e = 0; e < 8; ++e) sums[e] -= constant[half] + values[e] * slope[half];
      }
      T* to = static_cast<T*>(p.grad_x) + image[half] * p.grad_x_strides[0] +
              channel * p.grad_x_strides[1] + y * p.grad_x_strides[2] + x * p.grad_x_strides[3];
      if (p.grad_x_vectors) {
        store_eight(to, sums, 8, true);
      } else {
#pragma unroll
        for (int e = 0; e < 8; ++e) to[e * p.grad_x_strides[1]] = static_cast<T>(sums[e]);
      }
    }
  }
}

// Whether map_gradient16 serves a map: what it keeps of the weight fits in shared memory.
inline bool has_map_gradient16(const Geometry& map, int64_t outputs) {
  const int64_t taps = divide_up(map.kernel, map.stride);
  return patch_order(map) == PatchOrder::kTaps && outputs % 8 == 0 && outputs <= kGradientColumns &&
         std::min(map.stride, map.height) * std::min(map.stride, map.width) <= kMostClasses &&
         taps * taps <= kMostTaps;
}

// The gradient of the map. With a norm y, moments and constants are the forward's, else null.
template <typename T>
void map_gradient16(const Geometry& map, const PatchSource& source, const torch::stable::Tensor& x,
                    const torch::stable::Tensor& grad, const torch::stable::Tensor& weight,
                    const void* gain, const void* y, const float2* moments, const float* constants,
                    const torch::stable::Tensor& grad_x, const DeviceScope& device) {
  const int outputs = static_cast<int>(weight.size(0));
  const int area = map.kernel * map.kernel, pieces = map.channels / kTapChannels;
  const int64_t tokens = source.map.token_count;
  const torch::stable::Tensor packed = torch::stable::new_empty(
      grad, {int64_t(pieces) * area * kTapBlocks * kBlockVectors * Vec<T>::size});
  const FoldTapsParams fold = {weight.const_data_ptr(),
                               gain,
                               outputs,
                               map.channels,
                               area,
                               static_cast<uint4*>(packed.mutable_data_ptr())};
  device.launch("soft_split_linear_fold_taps", fold_taps_kernel<T>,
                dim3(grid_size(int64_t(pieces) * area), kProjectGroups), kFoldWarps * kLanes, 0,
                fold);
  const torch::stable::Tensor scalars = new_floats(grad, moments ? 4 * tokens : 0);
  MapGradientParams16 p = {};
  if (moments) {
    const TokenScalarsParams s = {grad.const_data_ptr(),
                                  y,
                                  constants,
                                  constants + divide_up(outputs, kWidest) * kWidest,
                                  moments,
                                  tokens,
                                  outputs,
                                  map.token_width(),
                                  static_cast<float4*>(scalars.mutable_data_ptr())};
    device.launch("soft_split_linear_token_scalars", token_scalars_kernel<T>,
                  dim3(grid_size(divide_up(tokens, kScalarWarps * 8))), kScalarWarps * kLanes, 0,
                  s);
    p.scalars = s.scalars;
  }
  p.map = map;
  p.x = x.const_data_ptr();
  p.grad = grad.const_data_ptr();
  p.packed = fold.packed;
  p.grad_x = grad_x.mutable_data_ptr();
  for (int i = 0; i < 4; ++i) {
    p.x_strides[i] = x.stride(i);
    p.grad_x_strides[i] = grad_x.stride(i);
  }
  p.x_vectors = source.vectors;
  p.grad_x_vectors = grad_x.stride(1) == 1;
  p.outputs = outputs;
  // Blocks of a class in proportion to its pixels and their taps, and to the loads and stores of a
  // pixel, which are worth about half a tap.
  const int rows = std::min(map.stride, map.height), columns = std::min(map.stride, map.width);
  p.classes = rows * columns;
  const auto size = [&](int length, int first) { return divide_up(length - first, map.stride); };
  const auto taps = [&](int first) {
    return std::max<int64_t>(
        0, divide_up(map.kernel - (first + map.padding) % map.stride, map.stride));
  };
  int64_t work[kMostClasses] = {}, all = 0, most_taps = 1;
  for (int i = 0; i < p.classes; ++i) {
    const int y0 = i / columns, x0 = i % columns;
    const int64_t of_class = taps(y0) * taps(x0);
    most_taps = std::max(most_taps, of_class);
    work[i] = size(map.height, y0) * size(map.width, x0) * (2 * of_class + 1);
    all += work[i];
  }
  const int64_t blocks = std::max<int64_t>(p.classes, device.multiprocessors() / pieces);
  for (int i = 0; i < p.classes; ++i) {
    const int y0 = i / columns, x0 = i % columns;
    const int64_t needed =
        divide_up(map.batch * size(map.height, y0) * size(map.width, x0), kMapWarps16 * kRows);
    const int64_t share = std::max<int64_t>(1, (blocks * work[i] + all / 2) / all);
    p.first_block[i + 1] = p.first_block[i] + static_cast<int>(std::min(needed, share));
  }
  device.launch(
      "soft_split_linear_map_gradient", map_gradient16_kernel<T>,
      dim3(static_cast<unsigned>(p.first_block[p.classes]), static_cast<unsigned>(pieces)),
      kMapWarps16 * kLanes, static_cast<size_t>(most_taps) * kTapBlocks * kBlockBytes, p);
}

}  // namespace t2t
