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

constexpr int kGradientWarps = 3 * kWarpgroup;
constexpr int kGradientTokens = kGradientWarps * 8;
// Their gradients pass through a ring of buffers of half as many.
constexpr int kGradientHalf = kGradientTokens / 2, kGradientBuffers = 3;
constexpr int kGradientColumns = kProjectGroups * kGroup;
constexpr int kGradientPitch = padded_row<uint16_t>(kGradientColumns);
constexpr int kGradientBuffer = kGradientHalf * kGradientPitch;
// Elements of a block: three tiles of 64, whose rows are tokens.
constexpr int kTapsOfBlock = 3, kPatchTile = kGradientTokens * kWidest;
constexpr int kWeightGradientBytes =
    2 * (kTapsOfBlock * kPatchTile + kGradientBuffers * kGradientBuffer);

struct WeightGradientParams {
  PatchMap map;
  const void* grad;
  const float2* moments;  // null without a norm
  int outputs;
  float* slots;  // (blockIdx.x, 1 + elements in blocks, outputs in blocks); Σ dy first
};

// Eight elements of a token of a tile, as a warpgroup's product takes them (see operand_at).
template <typename T>
__device__ T* patch_part(T* tiles, int token, int part) {
  return tiles + part / 8 * kPatchTile + token * kWidest + (part % 8 ^ token % 8) * 8;
}

// The elements of one token, row g of eight, that a lane gathers and stores normalised in shared
// memory: a third of the block's elements. These are a whole patch in rows order, and three taps in
// taps order.
template <typename T, int kPatchRows, bool kVectors>
struct TokenElements {
  static constexpr bool kTaps = kPatchRows == 0;
  // Half of the largest patch, by blockIdx.y: the sums of all of it would not fit in registers.
  static constexpr bool kSplit = kPatchRows == kMostRows / 2;
  static constexpr int kElements = kTaps ? kTapsOfBlock * kTapChannels : kPatchRows * kRowColumns;
  static constexpr int kPairs = kTaps ? 8 : (kPatchRows + 2) / 3;
  uint32_t pairs[kPairs];

  __device__ void load(const PatchMap& p, const Corners& corners, int third) {
#pragma unroll
    for (int i = 0; i < kPairs; ++i) pairs[i] = 0;
    const int t = lane_index() % 4;
    // Only the first of the two rows of a lane's corners is used.
    const T* x = static_cast<const T*>(p.x) + corners.offset[0];
    if constexpr (kTaps) {
      const int channels = p.elements / (p.kernel * p.kernel);
      const int element = (blockIdx.y * kTapsOfBlock + third) * kTapChannels;
      const int tap = element / channels;
      const int row = tap / p.kernel, column = tap - row * p.kernel;
      if (element >= p.elements || !corners.has_row(p, 0, row) ||
          !corners.has_column(p, 0, column)) {
        return;
      }
      const T* from = x + row * p.row_stride + column * p.column_stride +
                      (element - tap * channels + t * 8) * p.channel_stride;
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        uint32_t* to = pairs + j * 4;
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
    } else {
      const int column = t * 2;
      const T* from = x + column * p.column_stride;
      const bool first = corners.has_column(p, 0, column) && column < p.kernel;
      const bool second = corners.has_column(p, 0, column + 1) && column + 1 < p.kernel;
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        const int of_block = third * kPairs + i;
        if (of_block >= kPatchRows) break;
        const int row = of_block + (kSplit ? blockIdx.y * kPatchRows : 0);
        const T* at = from + p.row_offset[row];
        const bool exists = row < p.rows && corners.has_row(p, 0, p.row_of_kernel[row]);
        if constexpr (kVectors) {
          if (exists && first) pairs[i] = *reinterpret_cast<const uint32_t*>(at);
        } else {
          const auto* bits = reinterpret_cast<const uint16_t*>(at);
          if (exists && first) pairs[i] = bits[0];
          if (exists && second) pairs[i] |= uint32_t(bits[p.column_stride]) << 16;
        }
      }
    }
  }

  // Places beyond the kernel may hold any finite number: their results are not used.
  __device__ void keep(const PatchMap& p, const float2& moments, bool normalized, int third,
                       T* tiles, int token) {
    const int t = lane_index() % 4;
    const uint32_t within =
        kTaps ? 0xFFFFFFFFu
              : (2 * t < p.kernel ? 0xFFFFu : 0) | (2 * t + 1 < p.kernel ? 0xFFFF0000u : 0);
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      pairs[i] &= within;
      if (normalized) pairs[i] = normalized_pair<T>(pairs[i], moments.x, moments.y);
    }
    if constexpr (kTaps) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const uint32_t* from = pairs + 4 * j;
        *reinterpret_cast<uint4*>(patch_part(tiles, token, third * 8 + j * 4 + t)) = {
            from[0], from[1], from[2], from[3]};
      }
    } else {
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        const int of_block = third * kPairs + i;
        if (of_block >= kPatchRows) break;
        *reinterpret_cast<uint32_t*>(patch_part(tiles, token, of_block) + 2 * t) = pairs[i];
      }
    }
  }
};

// A warp has 48 outputs by 64 elements; with warpgroup products, 16 by all elements of the block.
// While a tile is multiplied, the gradients of the next one are copied and, if there are enough
// registers, its patches are gathered.
template <typename T, int kPatchRows, bool kVectors>
__global__ void __launch_bounds__(kGradientWarps* kLanes, 1)
    weight_gradient_kernel(const WeightGradientParams p) {
  using Elements = TokenElements<T, kPatchRows, kVectors>;
  constexpr int kTall = kHasWarpgroups ? 1 : 3, kWide = kHasWarpgroups ? 3 : 1;
  constexpr bool kAhead = kVectors && kHasWarpgroups;
  T* patches = reinterpret_cast<T*>(dynamic_shared);
  T* buffers = patches + kTapsOfBlock * kPatchTile;
  const int first_output = blockIdx.z * kGradientColumns;
  const int tall = kHasWarpgroups ? warp_index() * 16 : warp_index() / 3 * 48;
  const int wide = kHasWarpgroups ? 0 : warp_index() % 3 * kWidest;
  const int lane = lane_index(), row = warp_index() * 8 + lane / 4;
  const bool normalized = p.moments != nullptr;

  float sums[kTall][kWide][8][2][2] = {};
  // Of 16 of the warp's outputs.
  float bias[2] = {};
  const int of_bias = kHasWarpgroups ? 0 : warp_index() % 3;
  // All thirds where they are gathered ahead, else one after the other.
  Elements elements[kAhead ? 3 : 1];
  float2 moments;
  const auto load_moments = [&](int token) {
    moments = {0.f, 1.f};
    if (normalized && token < p.map.token_count) moments = p.moments[token];
  };
  const auto load = [&](int first_token) {
    const Corners corners(p.map, first_token + warp_index() * 8);
    load_moments(first_token + row);
#pragma unroll
    for (int third = 0; third < 3; ++third) elements[third].load(p.map, corners, third);
  };
  int next_buffer = 0, buffer = 0;
  const auto start_loading = [&](int first) {
    constexpr int kVectorsOfRow = kGradientColumns / 8;
    constexpr int kRowsAtOnce = kGradientWarps * kLanes / kVectorsOfRow;
    static_assert(kGradientHalf % kRowsAtOnce == 0);
    const int of = threadIdx.x / kVectorsOfRow, column = threadIdx.x % kVectorsOfRow * 8;
    const auto* grad = static_cast<const T*>(p.grad);
    const T* from = grad + int64_t(first + of) * p.outputs + first_output + column;
    T* to = buffers + next_buffer * kGradientBuffer + of * kGradientPitch + column;
#pragma unroll(kHasWarpgroups ? kGradientHalf / kRowsAtOnce : 1)
    for (int i = 0; i < kGradientHalf; i += kRowsAtOnce) {
      const bool exists = first + of + i < p.map.token_count && first_output + column < p.outputs;
      copy_async(to + i * kGradientPitch, exists ? from + int64_t(i) * p.outputs : grad, exists);
    }
    commit_copies();
    next_buffer = next_buffer + 1 < kGradientBuffers ? next_buffer + 1 : 0;
  };
  const auto load_outputs = [&](uint32_t (&left)[4], const T* grads, int token, int output) {
    load_matrices_transposed(left, grads + (token + lane % 8 + lane / 16 * 8) * kGradientPitch +
                                       output + lane / 8 % 2 * 8);
  };
  const auto add_bias = [&](const uint32_t (&left)[4]) {
    const uint32_t ones = round_pair<T>(1.f, 1.f);
    float unused[2] = {};
    mma<T>(bias[0], unused[0], bias[1], unused[1], left, ones, ones);
  };
  const int step = gridDim.x * kGradientTokens;
  int first_token = blockIdx.x * kGradientTokens;
  start_loading(first_token);
  start_loading(first_token + kGradientHalf);
  if constexpr (kAhead) load(first_token);
#pragma unroll 1
  for (; first_token < p.map.token_count; first_token += step) {
    if constexpr (kAhead) {
#pragma unroll
      for (int third = 0; third < 3; ++third) {
        elements[third].keep(p.map, moments, normalized, third, patches, row);
      }
    } else {
      const Corners corners(p.map, first_token + warp_index() * 8);
      load_moments(first_token + row);
#pragma unroll 1
      for (int third = 0; third < 3; ++third) {
        elements[0].load(p.map, corners, third);
        elements[0].keep(p.map, moments, normalized, third, patches, row);
      }
    }
    if constexpr (kHasWarpgroups) show_to_products();
#pragma unroll 1
    for (int half = 0; half < kGradientTokens; half += kGradientHalf) {
      wait_for_copies<1>();
      // The half is loaded for all warps, and all have finished multiplying the previous one.
      __syncthreads();
      start_loading(first_token + step + half);
      if constexpr (kAhead) {
        if (half == 0) load(first_token + step);
      }
      const T* grads = buffers + buffer * kGradientBuffer;
      buffer = buffer + 1 < kGradientBuffers ? buffer + 1 : 0;
      if constexpr (kHasWarpgroups) {
        constexpr int kSteps = kGradientHalf / 16;
        uint32_t left[kSteps][4];
#pragma unroll
        for (int k = 0; k < kSteps; ++k) load_outputs(left[k], grads, k * 16, tall);
#pragma unroll
        for (int k = 0; k < kSteps && blockIdx.y == 0; ++k) add_bias(left[k]);
        start_products(sums, left);
#pragma unroll
        for (int i = 0; i < kWide * kSteps; ++i) {
          const T* right = patches + i % kWide * kPatchTile + (half + i / kWide * 16) * kWidest;
          multiply_async<T, true>(sums[0][i % kWide], left[i / kWide], operand_at(right), true);
        }
        commit_products();
        wait_for_products(sums);
      } else {
#pragma unroll 1
        for (int k = 0; k < kGradientHalf; k += 16) {
          uint32_t left[kTall][4];
#pragma unroll
          for (int i = 0; i < kTall; ++i) load_outputs(left[i], grads, k, tall + i * 16);
#pragma unroll
          for (int i = 0; i < kTall; ++i) {
            if (blockIdx.y == 0 && i == of_bias) add_bias(left[i]);
          }
#pragma unroll
          for (int j = 0; j < 8; j += 2) {
            uint32_t right[4];
            load_matrices_transposed(
                right, patch_part(patches, half + k + lane % 16, wide / 8 + j + lane / 16));
#pragma unroll
            for (int i = 0; i < kTall; ++i) {
              auto& d = sums[i][0][j];
              auto& e = sums[i][0][j + 1];
              mma<T>(d[0][0], d[0][1], d[1][0], d[1][1], left[i], right[0], right[1]);
              mma<T>(e[0][0], e[0][1], e[1][0], e[1][1], left[i], right[2], right[3]);
            }
          }
        }
      }
    }
    // All warps have finished multiplying the patches.
    __syncthreads();
  }
  wait_for_copies<0>();

  // (elements, outputs): a lane has two elements of each of two outputs.
  const int64_t columns = int64_t(gridDim.z) * kGradientColumns;
  const int64_t rows = 1 + int64_t(gridDim.y) * Elements::kElements;
  float* slot = p.slots + blockIdx.x * rows * columns + first_output + tall;
#pragma unroll
  for (int i = 0; i < 2 * kTall; ++i) {
    const int output = i / 2 * 16 + i % 2 * 8 + lane / 4;
    if (blockIdx.y == 0 && i / 2 == of_bias && lane % 4 == 0) slot[output] = bias[i % 2];
#pragma unroll
    for (int j = 0; j < 8 * kWide; ++j) {
      const int element = wide + j * 8 + lane % 4 * 2;
      if (element >= Elements::kElements) continue;
      float* to =
          slot + (1 + int64_t(blockIdx.y) * Elements::kElements + element) * columns + output;
      to[0] = sums[i / 2][j / 8][j % 8][i % 2][0];
      to[columns] = sums[i / 2][j / 8][j % 8][i % 2][1];
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
void weight_gradients(const Geometry& map, const torch::stable::Tensor& x,
                      const torch::stable::Tensor& grad, const float2* moments, WeightSumsParams s,
                      const DeviceScope& device) {
  WeightGradientParams p = {};
  const PatchSource source = make_patch_source(map, x);
  p.map = source.map;
  p.grad = grad.const_data_ptr();
  p.moments = moments;
  p.outputs = s.outputs;
  const bool taps = source.taps;
  const int pieces = map.token_width() / kTapChannels;
  // Of an image all of a patch with up to 21 rows, else halves of 14.
  const int rows = p.map.rows <= 21 ? 21 : kMostRows / 2;
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
  const auto launch = [&](void (*kernel)(WeightGradientParams)) {
    if (slots == 0) return;
    device.launch("soft_split_linear_weight_gradient", kernel,
                  dim3(grid_size(slots), static_cast<unsigned>(wide), static_cast<unsigned>(tall)),
                  kGradientWarps * kLanes, kWeightGradientBytes, p);
  };
  const bool vectors = source.vectors;
  if (taps) {
    launch(vectors ? weight_gradient_kernel<T, 0, true> : weight_gradient_kernel<T, 0, false>);
  } else if (rows == 21) {
    launch(vectors ? weight_gradient_kernel<T, 21, true> : weight_gradient_kernel<T, 21, false>);
  } else {
    launch(vectors ? weight_gradient_kernel<T, kMostRows / 2, true>
                   : weight_gradient_kernel<T, kMostRows / 2, false>);
  }
  s.map = p.map;
  s.channels = map.channels;
  s.slots = p.slots;
  s.slot_count = static_cast<int>(slots);
  device.launch("soft_split_linear_weight_sums", weight_sums_kernel<T>,
                dim3(grid_size(s.slot_rows)), kSumsThreads, 0, s);
}

// ---- the gradient of the map

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
    load_eight(grad, static_cast<const T*>(p.grad) + token * p.outputs + column);
    load_eight(y, static_cast<const T*>(p.y) + token * p.outputs + column);
    load_eight(constants, p.constants + column);
    load_eight(sums, p.row_sums + column);
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
  // y − c has the factor r, which dx needs a second time.
  const float slope = moments.y * mean_of_product;
  p.scalars[token] = {moments.y, moments.y * (mean - slope * moments.x), moments.y * slope, 0.f};
}

// The pixels whose row and column leave the remainders of `index` by the stride: their taps are the
// first of each axis and those a stride further.
struct PixelClass {
  int first_y, first_x, height, width;  // the first pixel, and how many there are in an image
  int first_ky, first_kx, taps_high, taps_wide;

  __host__ __device__ PixelClass(const Geometry& map, int index) {
    const int columns = map.stride < map.width ? map.stride : map.width;
    first_y = index / columns;
    first_x = index - first_y * columns;
    height = (map.height - first_y + map.stride - 1) / map.stride;
    width = (map.width - first_x + map.stride - 1) / map.stride;
    first_ky = (first_y + map.padding) % map.stride;
    first_kx = (first_x + map.padding) % map.stride;
    taps_high = taps_from(map, first_ky);
    taps_wide = taps_from(map, first_kx);
  }
  __host__ __device__ int taps() const { return taps_high * taps_wide; }
  // The last token of each axis that covers the first pixel.
  __device__ int last_row(const Geometry& map) const {
    return (first_y + map.padding - first_ky) / map.stride;
  }
  __device__ int last_column(const Geometry& map) const {
    return (first_x + map.padding - first_kx) / map.stride;
  }

 private:
  __host__ __device__ static int taps_from(const Geometry& map, int first) {
    return first < map.kernel ? (map.kernel - first + map.stride - 1) / map.stride : 0;
  }
};
inline int pixel_classes(const Geometry& map) {
  return std::min(map.stride, map.height) * std::min(map.stride, map.width);
}

constexpr int kMapWarps = 2 * kWarpgroup;
constexpr int kMapPixels = kMapWarps * kRows;  // of a round of a block
constexpr int kMostStride = 8;
// The part of a tap's weight that is loaded into shared memory at a time: 64 channels by 192
// outputs.
constexpr int kMapTiles = kProjectTiles, kMapOutputs = kMapTiles * kWidest;
constexpr int kMapStages = 4, kMapStageVectors = kMapTiles * kWideTileVectors;

struct MapGradientParams {
  Geometry map;
  const void *x, *grad;
  const uint4* packed;    // (64 channels, tap, 192 outputs), in tiles
  const float4* scalars;  // null without a norm
  void* grad_x;
  int64_t x_strides[4], grad_x_strides[4];
  bool x_vectors, grad_x_vectors;
  int outputs, pieces;                             // of 192 outputs
  int first_block[kMostStride * kMostStride + 1];  // of a class
};

struct FoldTapsParams {
  const void *weight, *gain;
  int outputs, channels, area;
  uint4* packed;
};

// blockIdx.x: 64 channels of a tap; blockIdx.y: 64 outputs.
template <typename T>
__global__ void __launch_bounds__(kFoldWarps* kLanes) fold_taps_kernel(const FoldTapsParams p) {
  const int tap = blockIdx.x % p.area, first_channel = blockIdx.x / p.area * kTapChannels;
  uint4* tile = p.packed + (int64_t(blockIdx.x) * gridDim.y + blockIdx.y) * kWideTileVectors;
  for (int i = threadIdx.x; i < kWideTileVectors; i += kFoldWarps * kLanes) {
    const int column = i % kTapChannels, rows = i / kTapChannels;
    const int channel = first_channel + column;
    const int64_t element = channel * p.area + tap;
    const float gain = p.gain && channel < p.channels
                           ? static_cast<float>(static_cast<const T*>(p.gain)[element])
                           : 1.f;
    float weights[8];
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const int64_t output = blockIdx.y * kWidest + rows * 8 + e;
      const bool exists = output < p.outputs && channel < p.channels;
      const T* weight = static_cast<const T*>(p.weight) + output * p.channels * p.area + element;
      weights[e] = exists ? static_cast<float>(*weight) * gain : 0.f;
    }
    const uint32_t pairs[4] = {
        round_pair<T>(weights[0], weights[1]), round_pair<T>(weights[2], weights[3]),
        round_pair<T>(weights[4], weights[5]), round_pair<T>(weights[6], weights[7])};
    store_in_tile(tile, rows / 4, rows % 4, column, pairs);
  }
}

// Eight adjacent channels of a pixel, of which `count` exist.
template <typename T>
__device__ uint4 load_channels(const T* from, int64_t stride, int count, bool vectors) {
  if (vectors) return count > 0 ? *reinterpret_cast<const uint4*>(from) : uint4{};
  const auto* bits = reinterpret_cast<const uint16_t*>(from);
  uint32_t pairs[4] = {};
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    if (e < count) pairs[e / 2] |= uint32_t(bits[e * stride]) << (e % 2 * 16);
  }
  return {pairs[0], pairs[1], pairs[2], pairs[3]};
}

// A warp has 16 pixels of a class. If the weights of the class fit, they stay in shared memory;
// else they are streamed through a ring of stages, once for every round of pixels.
template <typename T>
__global__ void __launch_bounds__(kMapWarps* kLanes, 1)
    map_gradient_kernel(const MapGradientParams p) {
  const Geometry& map = p.map;
  int index = 0;
  while (static_cast<int>(blockIdx.x) >= p.first_block[index + 1]) ++index;
  const int block = static_cast<int>(blockIdx.x) - p.first_block[index];
  const int blocks = p.first_block[index + 1] - p.first_block[index];
  const PixelClass of(map, index);
  const int steps = of.taps() * p.pieces;
  const bool resident = steps <= kMapStages;
  const int first_channel = blockIdx.y * kTapChannels;

  // Step after step, the pieces of a tap and then those of the next tap.
  int next_step = 0, next_stage = 0, stage = 0;
  const auto start_loading = [&] {
    const int tap = next_step / p.pieces, high = tap / of.taps_wide;
    const int ky = of.first_ky + high * map.stride;
    const int kx = of.first_kx + (tap - high * of.taps_wide) * map.stride;
    const int64_t of_map = int64_t(blockIdx.y) * map.kernel * map.kernel + ky * map.kernel + kx;
    const uint4* from =
        p.packed + (of_map * p.pieces + next_step - tap * p.pieces) * kMapStageVectors;
    for (int i = threadIdx.x; i < kMapStageVectors; i += kMapWarps * kLanes) {
      copy_async(dynamic_shared + next_stage * kMapStageVectors + i, from + i, true);
    }
    commit_copies();
    next_step = next_step + 1 < steps ? next_step + 1 : 0;
    next_stage = next_stage + 1 < kMapStages ? next_stage + 1 : 0;
  };
  for (int i = 0; i < (resident ? steps : kMapStages - 1); ++i) start_loading();
  if (resident) {
    wait_for_copies<0>();
    if constexpr (kHasWarpgroups) show_to_products();
    __syncthreads();
  }

  const int pixels = static_cast<int>(map.batch) * of.height * of.width;
  const int shift_y = of.last_row(map), shift_x = of.last_column(map);
  // Pixels g and g + 8 of a tile: the last token of each axis that covers them.
  struct Place {
    int image, row, column;
    bool exists;
  } places[2];
  const auto find = [&](int first_pixel) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int pixel = first_pixel + sum_row(half);
      const auto number = static_cast<uint32_t>(pixel < pixels ? pixel : 0);
      const uint32_t image = number / static_cast<uint32_t>(of.height * of.width);
      const uint32_t in_image = number - image * of.height * of.width;
      const uint32_t row = in_image / static_cast<uint32_t>(of.width);
      places[half] = {static_cast<int>(image), static_cast<int>(row) + shift_y,
                      static_cast<int>(in_image - row * of.width) + shift_x, pixel < pixels};
    }
  };
  // A piece of the gradients of the tokens that cover the pixels at a tap, and the norm's scalars
  // of these tokens.
  Operand<2> grads[kMapTiles];
  float factors[2], constants[2], slopes[2];
  int high = 0, wide = 0, piece = 0;
  const auto load = [&] {
    const int first_output = piece * kMapOutputs + lane_index() % 4 * 8;
#pragma unroll
    for (int i = 0; i < kMapTiles; ++i) grads[i].clear();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Place& at = places[half];
      const int row = at.row - high, column = at.column - wide;
      const bool covers =
          at.exists && row >= 0 && row < map.rows && column >= 0 && column < map.columns;
      factors[half] = 1.f;
      constants[half] = slopes[half] = 0.f;
      if (!covers) continue;
      const int64_t token = (int64_t(at.image) * map.rows + row) * map.columns + column;
      const T* from = static_cast<const T*>(p.grad) + token * p.outputs + first_output;
#pragma unroll
      for (int i = 0; i < 2 * kMapTiles; ++i) {
        if (first_output + i * kGroup < p.outputs) {
          set_eight(grads[i / 2], i % 2, half, *reinterpret_cast<const uint4*>(from + i * kGroup));
        }
      }
      if (p.scalars) {
        const float4 scalars = p.scalars[token];
        factors[half] = scalars.x;
        if (piece == 0) {
          constants[half] = scalars.y;
          slopes[half] = scalars.z;
        }
      }
    }
    if (++piece < p.pieces) return;
    piece = 0;
    if (++wide < of.taps_wide) return;
    wide = 0;
    if (++high == of.taps_high) high = 0;
  };

  const int first_of_warp = warp_index() * kRows;
  find(block * kMapPixels + first_of_warp);
  if (steps > 0) load();
#pragma unroll 1
  for (int of_block = block * kMapPixels; of_block < pixels; of_block += blocks * kMapPixels) {
    bool exists[2];
    int64_t to[2];
    uint4 x[2][2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Place& at = places[half];
      const int64_t row = of.first_y + int64_t(at.row - shift_y) * map.stride;
      const int64_t column = of.first_x + int64_t(at.column - shift_x) * map.stride;
      exists[half] = at.exists;
      to[half] =
          at.image * p.grad_x_strides[0] + row * p.grad_x_strides[2] + column * p.grad_x_strides[3];
#pragma unroll
      for (int group = 0; group < 2 && p.scalars != nullptr; ++group) {
        const int channel = first_channel + sum_column(group);
        const T* from = static_cast<const T*>(p.x) + at.image * p.x_strides[0] +
                        row * p.x_strides[2] + column * p.x_strides[3] + channel * p.x_strides[1];
        x[group][half] = load_channels<T>(from, p.x_strides[1],
                                          at.exists ? map.channels - channel : 0, p.x_vectors);
      }
    }
    float constant[2] = {}, slope[2] = {};
    Sums<2> total;
    total.clear();
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      if (!resident) {
        wait_for_copies<kMapStages - 2>();
        if constexpr (kHasWarpgroups) show_to_products();
        // The stage is there for all warps, and the one before it has been multiplied by all.
        __syncthreads();
        start_loading();
      }
      const uint4* tiles = dynamic_shared + stage * kMapStageVectors;
      stage = stage + 1 < (resident ? steps : kMapStages) ? stage + 1 : 0;
      Sums<2> sums;
      if constexpr (kHasWarpgroups) {
        float products[8][2][2];
#pragma unroll
        for (int i = 0; i < kMapTiles; ++i) keep_in_loop(grads[i].at, step);
        start_products(products, grads[0].at, grads[1].at, grads[2].at);
#pragma unroll
        for (int i = 0; i < kMapTiles; ++i) {
          start_wide_products<T, 4>(products, grads[i], tiles + i * kWideTileVectors, 0, i > 0);
        }
        commit_products();
        wait_for_products(products);
        take_wide(products, sums);
      } else {
        sums.clear();
#pragma unroll
        for (int i = 0; i < kMapTiles; ++i) {
          multiply_blocks<T>(sums, grads[i], tiles + i * kWideTileVectors);
          // Loads of the next tile would not fit in registers.
          __syncwarp();
        }
      }
      const float factor[2] = {factors[0], factors[1]};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        constant[half] += constants[half];
        slope[half] += slopes[half];
      }
      // The gradients of the next step, or of the first step of the next tile, during this step.
      if (step + 1 == steps) find(of_block + blocks * kMapPixels + first_of_warp);
      load();
#pragma unroll
      for (int i = 0; i < 32; ++i) {
        total.at[i / 16][i / 8 % 2][i % 8] += factor[i / 8 % 2] * sums.at[i / 16][i / 8 % 2][i % 8];
      }
    }
    if (steps == 0) find(of_block + blocks * kMapPixels + first_of_warp);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int group = i / 2, half = i % 2, channel = first_channel + sum_column(group);
      if (!exists[half]) continue;
      float (&sums)[8] = total.at[group][half];
      if (p.scalars) {
        const uint4& pairs = x[group][half];
        const float2 values[4] = {elements_of<T>(pairs.x), elements_of<T>(pairs.y),
                                  elements_of<T>(pairs.z), elements_of<T>(pairs.w)};
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          sums[2 * e] -= constant[half] + values[e].x * slope[half];
          sums[2 * e + 1] -= constant[half] + values[e].y * slope[half];
        }
      }
      T* at = static_cast<T*>(p.grad_x) + to[half] + channel * p.grad_x_strides[1];
      if (p.grad_x_vectors) {
        store_eight(at, sums, map.channels - channel);
      } else {
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          if (channel + e < map.channels) at[e * p.grad_x_strides[1]] = static_cast<T>(sums[e]);
        }
      }
    }
  }
  wait_for_copies<0>();
}

// The gradient of the map. With a norm y, moments and constants are the forward's, else null.
template <typename T>
void map_gradient(const Geometry& map, const torch::stable::Tensor& x,
                  const torch::stable::Tensor& grad, const torch::stable::Tensor& weight,
                  const void* gain, const void* y, const float2* moments, const float* constants,
                  const torch::stable::Tensor& grad_x, const DeviceScope& device) {
  const int outputs = static_cast<int>(weight.size(0)), area = map.kernel * map.kernel;
  const int64_t tokens = map.batch * map.rows * map.columns;
  const int64_t wide = divide_up(map.channels, kTapChannels),
                pieces = divide_up(outputs, kMapOutputs);
  const torch::stable::Tensor packed =
      torch::stable::new_empty(grad, {wide * area * pieces * kMapStageVectors * Vec<T>::size});
  const FoldTapsParams fold = {weight.const_data_ptr(),
                               gain,
                               outputs,
                               map.channels,
                               area,
                               static_cast<uint4*>(packed.mutable_data_ptr())};
  device.launch("soft_split_linear_fold_taps", fold_taps_kernel<T>,
                dim3(grid_size(wide * area), static_cast<unsigned>(pieces * kMapTiles)),
                kFoldWarps * kLanes, 0, fold);
  const torch::stable::Tensor scalars = new_floats(grad, moments ? 4 * tokens : 0);
  MapGradientParams p = {};
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
  const auto vectors = [&](const torch::stable::Tensor& tensor) {
    return tensor.stride(1) == 1 && map.channels % 8 == 0 && tensor.stride(0) % 8 == 0 &&
           tensor.stride(2) % 8 == 0 && tensor.stride(3) % 8 == 0 &&
           reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0;
  };
  for (int i = 0; i < 4; ++i) {
    p.x_strides[i] = x.stride(i);
    p.grad_x_strides[i] = grad_x.stride(i);
  }
  p.x_vectors = vectors(x);
  p.grad_x_vectors = vectors(grad_x);
  p.outputs = outputs;
  p.pieces = static_cast<int>(pieces);
  // Blocks of a class in proportion to its pixels and to the cost of a pixel: its steps, plus about
  // two for its loads and stores, and more if the weight is streamed through the ring.
  const int classes = pixel_classes(map);
  const auto pixels = [&](const PixelClass& of) { return map.batch * of.height * of.width; };
  const auto cost = [&](const PixelClass& of) {
    const int64_t steps = of.taps() * pieces;
    return pixels(of) * (steps + 2) * (steps > kMapStages ? 3 : 2);
  };
  int64_t all = 0, most_taps = 1;
  for (int i = 0; i < classes; ++i) {
    const PixelClass of(map, i);
    most_taps = std::max<int64_t>(most_taps, of.taps());
    all += cost(of);
  }
  const int64_t blocks = std::max<int64_t>(classes, device.multiprocessors() / wide);
  int64_t before = 0;
  for (int i = 0; i < classes; ++i) {
    const PixelClass of(map, i);
    before += cost(of);
    const int64_t last = (blocks * before + all / 2) / all, first = p.first_block[i];
    p.first_block[i + 1] =
        static_cast<int>(std::clamp(last, first + 1, first + divide_up(pixels(of), kMapPixels)));
  }
  const int64_t stages = std::min<int64_t>(kMapStages, most_taps * pieces);
  device.launch("soft_split_linear_map_gradient", map_gradient_kernel<T>,
                dim3(static_cast<unsigned>(p.first_block[classes]), static_cast<unsigned>(wide)),
                kMapWarps * kLanes, static_cast<size_t>(stages) * kMapStageVectors * sizeof(uint4),
                p);
}

}  // namespace t2t
