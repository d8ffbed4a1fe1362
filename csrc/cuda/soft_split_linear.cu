// Soft split, LayerNorm and Linear on CUDA: an implicit matrix product over patches.
//
// Forward, a warp works alone on 16 tokens: it gathers them into its part of shared memory, takes
// their moments, normalises them in place and multiplies them by the weight. No token reaches
// memory and no warp waits for another.
//
// Backward, four kernels:
//   scalars           mean, 1/σ and the norm's two means m1 = Σ g/n and m2 = Σ g·û/n of every
//   token,
//                     g = γ∘(Wᵀ·dy), û the patch before gain and offset; m2 = dy·(W·(γ∘û))/n, the
//                     forward's product once more
//   weight_gradient   G = Σ û·dyᵀ and Σ dy; a block keeps 64 × 192 of G in registers and runs over
//   a
//                     share of the tokens, into a slot of its own
//   finish            adds the slots in their order: dW = γ∘G + β·Σdyᵀ, dγ = Σ W∘G, dβ = W·Σdy
//   map_gradient      every pixel gathers: dx = Σ over the tokens that cover it of
//                     r·(γ∘(Wᵀ·dy) − m1 − û·m2). Pixels whose row and column leave the same
//                     remainders by the stride are covered by the same taps, and are the rows of
//                     one product per tap

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <vector>

#include "pack.cuh"
#include "patches.cuh"
#include "projection_gradient.cuh"
#include "soft_split_linear.h"

namespace t2t {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr const char* kName = "soft_split_linear";

// What a block has without asking for more.
constexpr int kSharedBytes = 48 * 1024;
// Four warps of 16 tokens fit with a layer-1 token of a half type (147 elements), two with one of
// layer 2 (576).
constexpr int kMostWarps = 4;
// 192 outputs, k, q and v of a layer, are one round: 96 registers of sums. float32 has its short
// sums beside them.
template <typename T>
constexpr int kRoundGroups = std::is_same_v<T, float> ? 3 : 6;

struct ProjectParams {
  Patches patches;
  Norm norm;
  bool normalized;
  const void* packed;
  const void* bias;
  void* y;
  int outputs, groups, depth, chunk;
  int64_t tokens;  // of all images
  bool vectors;    // rows of y, or of grad, begin at multiples of 16 bytes
  // Of the backward's scalars only:
  const void* grad;
  const float* gain_sums;  // Σ_j W_oj·γ_j; null: no need of m1 and m2
  float4* scalars;         // mean, 1/σ, m1, m2
};

// Three blocks a multiprocessor; two in float32, for which nvcc spills at three.
template <typename T, bool kScalars>
__global__ void __launch_bounds__(kMostWarps* kLanes, std::is_same_v<T, float> ? 2 : 3)
    project_kernel(const ProjectParams p) {
  const int warps = blockDim.x / kLanes;
  const int64_t first_token = (int64_t(blockIdx.x) * warps + warp_index()) * kRows;
  TokenTile<T> tile(
      reinterpret_cast<char*>(dynamic_shared) + warp_index() * TokenTile<T>::bytes(p.chunk),
      p.chunk);
  if (first_token >= p.tokens) return;
  tile.start(p.patches, p.normalized, p.norm.eps, first_token);

  constexpr int kGroups = kRoundGroups<T>;
  float mean[2] = {}, mean_of_product[2] = {};
  const int rounds = (p.groups + kGroups - 1) / kGroups;
  const bool products = !kScalars || p.gain_sums != nullptr;
  for (int round = blockIdx.y; round < rounds && products; round += gridDim.y) {
    const int groups = min(kGroups, p.groups - round * kGroups);
    const T* packed = static_cast<const T*>(p.packed) + int64_t(round) * kGroups * p.depth * kGroup;
    Sums<kGroups> sums;
    sums.clear();
    for (int first = 0; first < p.depth; first += p.chunk) {
      tile.ready(p.patches, p.normalized, p.norm, first, round != static_cast<int>(blockIdx.y));
      multiply(sums, tile.elements, tile.pitch, packed + first * kGroup, int64_t(p.depth) * kGroup,
               tile.columns(p.patches, first), groups);
    }
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      if (group >= groups) break;
      const int column = round * kGroups * kGroup + sum_column(group);
      const int count = p.outputs - column;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t token = first_token + sum_row(half);
        if (token >= p.tokens) continue;
        float (&values)[8] = sums.at[group][half];
        if constexpr (kScalars) {
          float grad[8];
          load_eight(grad, static_cast<const T*>(p.grad) + token * p.outputs + column, count,
                     p.vectors);
#pragma unroll
          for (int e = 0; e < 8; ++e) {
            mean_of_product[half] += grad[e] * values[e];
            if (e < count) mean[half] += grad[e] * p.gain_sums[column + e];
          }
        } else {
          if (p.bias) {
            float bias[8];
            load_eight(bias, static_cast<const T*>(p.bias) + column, count, false);
#pragma unroll
            for (int e = 0; e < 8; ++e) values[e] += bias[e];
          }
          store_eight(static_cast<T*>(p.y) + token * p.outputs + column, values, count, p.vectors);
        }
      }
    }
  }
  if constexpr (kScalars) {
    const float width = static_cast<float>(p.patches.width());
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      for (int distance = 1; distance < 4; distance *= 2) {
        mean[half] += __shfl_xor_sync(kAllLanes, mean[half], distance);
        mean_of_product[half] += __shfl_xor_sync(kAllLanes, mean_of_product[half], distance);
      }
      const int row = sum_row(half);
      if (lane_index() % 4 == 0 && first_token + row < p.tokens) {
        const float2 moment = tile.moments[row];
        p.scalars[first_token + row] = {moment.x, moment.y, mean[half] / width,
                                        mean_of_product[half] / width};
      }
    }
  }
}

struct GainSumParams {
  const void *weight, *gain;
  float* sums;
  int outputs, width;
};

// A warp per output.
template <typename T>
__global__ void __launch_bounds__(kMostWarps* kLanes) gain_sum_kernel(const GainSumParams p) {
  const int output = blockIdx.x * kMostWarps + warp_index();
  if (output >= p.outputs) return;
  const T* weight = static_cast<const T*>(p.weight) + int64_t(output) * p.width;
  const T* gain = static_cast<const T*>(p.gain);
  float sum = 0.f;
  for (int j = lane_index(); j < p.width; j += kLanes) {
    sum += static_cast<float>(weight[j]) * static_cast<float>(gain[j]);
  }
  for (int distance = 1; distance < kLanes; distance *= 2) {
    sum += __shfl_xor_sync(kAllLanes, sum, distance);
  }
  if (lane_index() == 0) p.sums[output] = sum;
}

// 64 elements by 192 outputs are 96 registers of sums for each of 128 threads, and 192 outputs need
// the patches gathered only once. float32 has its short sums beside them.
constexpr int kGradientElements = 64, kGradientTokens = 32;
template <typename T>
constexpr int kGradientOutputs = std::is_same_v<T, float> ? 96 : 192;
constexpr int kGradientThreads = 128;

struct WeightGradientParams {
  Patches patches;
  const void* grad;
  const float4* scalars;  // null without a norm
  float* slots;           // (blockIdx.z, 1 + elements, outputs), both padded; Σ dy first
  int outputs;
  int64_t tokens, tokens_per_slot;
  bool vectors;
};

template <typename T>
__host__ __device__ constexpr int gradient_tile_bytes() {
  return kGradientTokens *
         (sizeof(Corner) + sizeof(float2) +
          sizeof(T) * (padded_row<T>(kGradientElements) + padded_row<T>(kGradientOutputs<T>)));
}

template <typename T>
__global__ void __launch_bounds__(kGradientThreads)
    weight_gradient_kernel(const WeightGradientParams p) {
  constexpr int V = Vec<T>::size;
  constexpr int kOutputs = kGradientOutputs<T>;
  constexpr int kPatchPitch = padded_row<T>(kGradientElements);
  constexpr int kGradPitch = padded_row<T>(kOutputs);
  auto* corners = reinterpret_cast<Corner*>(dynamic_shared);
  auto* moments = reinterpret_cast<float2*>(corners + kGradientTokens);
  T* patches = reinterpret_cast<T*>(moments + kGradientTokens);
  T* grads = patches + kGradientTokens * kPatchPitch;

  const int first_element = blockIdx.x * kGradientElements;
  const int first_output = blockIdx.y * kOutputs;
  const int tall = warp_index() / 2 * (kGradientElements / 2);
  const int wide = warp_index() % 2 * (kOutputs / 2);
  constexpr int kUnits = kGradientElements / V;
  const int thread = threadIdx.x;
  const Share share = {thread % kUnits, kUnits, thread / kUnits, kGradientThreads / kUnits};
  const Share share_of_elements = {thread % kGradientElements, kGradientElements,
                                   thread / kGradientElements,
                                   kGradientThreads / kGradientElements};

  OuterSums<kGradientElements / 32, kOutputs / 16> sums;
  sums.clear();
  float bias[2] = {};
  const int64_t begin = blockIdx.z * p.tokens_per_slot;
  const int64_t end = min(begin + p.tokens_per_slot, p.tokens);
  for (int64_t first = begin; first < end; first += kGradientTokens) {
    if (thread < kGradientTokens) {
      const int64_t token = first + thread;
      corners[thread] = Corner(p.patches, token < end ? token : p.tokens);
      float2 moment = {0.f, 1.f};
      if (p.scalars && token < end) moment = {p.scalars[token].x, p.scalars[token].y};
      moments[thread] = moment;
    }
    // Also: the tiles that are loaded next have been multiplied.
    __syncthreads();
    for (int i = thread; i < kGradientTokens * (kOutputs / V); i += kGradientThreads) {
      const int row = i / (kOutputs / V);
      const int column = i % (kOutputs / V) * V;
      const int64_t token = first + row;
      const int left = token < end ? p.outputs - first_output - column : 0;
      const T* from = static_cast<const T*>(p.grad) + token * p.outputs + first_output + column;
      T* to = grads + row * kGradPitch + column;
      if (p.vectors) {
        copy_async(to, left > 0 ? from : static_cast<const T*>(p.grad), left > 0);
      } else {
#pragma unroll
        for (int e = 0; e < V; ++e) to[e] = e < left ? from[e] : T(0.f);
      }
    }
    load_patches<kGradientTokens>(p.patches, corners, first_element, kGradientElements, patches,
                                  kPatchPitch, share, share_of_elements);
    commit_copies();
    wait_for_copies<0>();
    __syncthreads();
    if (p.scalars) {
      normalize<kGradientTokens>(p.patches, Norm{}, moments, first_element, kGradientElements,
                                 patches, kPatchPitch, share);
      __syncthreads();
    }
    multiply_tokens(sums, patches + tall, kPatchPitch, grads + wide, kGradPitch, kGradientTokens);
    if (blockIdx.x == 0) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int output = thread + i * kGradientThreads;
        for (int row = 0; row < kGradientTokens && output < kOutputs; ++row) {
          bias[i] += static_cast<float>(grads[row * kGradPitch + output]);
        }
      }
    }
  }

  const int64_t columns = int64_t(gridDim.y) * kOutputs;
  float* slot =
      p.slots + first_output + blockIdx.z * (1 + int64_t(gridDim.x) * kGradientElements) * columns;
  if (blockIdx.x == 0) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int output = thread + i * kGradientThreads;
      if (output < kOutputs) slot[output] = bias[i];
    }
  }
#pragma unroll
  for (int i = 0; i < kGradientElements / 32; ++i) {
#pragma unroll
    for (int j = 0; j < kOutputs / 16; ++j) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = 1 + first_element + tall + sums.row(i, half);
        *reinterpret_cast<float2*>(slot + row * columns + wide + sums.column(j)) = {
            sums.at[i][j][half][0], sums.at[i][j][half][1]};
      }
    }
  }
}

constexpr int kFinishThreads = 128;

struct FinishParams {
  Patches patches;
  Norm norm;
  const float* slots;
  int slot_count;
  int64_t slot_size, slot_row;  // in floats
  int outputs;
  const void* weight;
  void *grad_weight, *grad_bias, *grad_gain, *grad_offset;
};

// A block per element of a token, and one more for the bias.
template <typename T>
__global__ void __launch_bounds__(kFinishThreads) finish_kernel(const FinishParams p) {
  __shared__ float parts[2][kFinishThreads / kLanes];
  const int width = p.patches.width();
  const int element = blockIdx.x;
  const bool bias_only = element == width;
  const int own = bias_only ? 0 : p.patches.own(element);
  const T* gains = static_cast<const T*>(p.norm.gain);
  const float gain = gains && !bias_only ? static_cast<float>(gains[own]) : 1.f;
  const float offset =
      gains && !bias_only ? static_cast<float>(static_cast<const T*>(p.norm.offset)[own]) : 0.f;
  float grad_gain = 0.f, grad_offset = 0.f;
  for (int output = threadIdx.x; output < p.outputs; output += kFinishThreads) {
    float bias = 0.f, sum = 0.f;
    for (int slot = 0; slot < p.slot_count; ++slot) {
      const float* from = p.slots + slot * p.slot_size + output;
      if (gains || bias_only) bias += *from;
      if (!bias_only) sum += from[(1 + element) * p.slot_row];
    }
    if (bias_only) {
      static_cast<T*>(p.grad_bias)[output] = static_cast<T>(bias);
      continue;
    }
    const int64_t at = int64_t(output) * width + own;
    static_cast<T*>(p.grad_weight)[at] = static_cast<T>(gain * sum + offset * bias);
    if (gains) {
      const float weight = static_cast<float>(static_cast<const T*>(p.weight)[at]);
      grad_gain += weight * sum;
      grad_offset += weight * bias;
    }
  }
  if (!gains || bias_only) return;
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
    for (int i = 0; i < kFinishThreads / kLanes; ++i) {
      grad_gain += parts[0][i];
      grad_offset += parts[1][i];
    }
    static_cast<T*>(p.grad_gain)[own] = static_cast<T>(grad_gain);
    static_cast<T*>(p.grad_offset)[own] = static_cast<T>(grad_offset);
  }
}

constexpr int kMapWarps = 4;
// 64 channels, those of a layer's output, are one round.
constexpr int kMapGroups = 2;
// Bytes of a token's gradient that are under way at a time. Two stages of four warps are 34 KiB.
constexpr int kMapDepthBytes = 256;

struct MapGradientParams {
  Geometry map;
  const void *x, *grad, *packed, *gain;
  const float4* scalars;  // null without a norm
  void* grad_x;
  int64_t x_strides[4], grad_x_strides[4];
  int outputs, depth, groups, rounds;
  int rows_of_classes, columns_of_classes;
  int tiles;     // of a class
  bool vectors;  // rows of grad begin at multiples of 16 bytes
  bool x_vectors, grad_x_vectors;
};

// Where a pixel is, and the first token that covers it along each axis, counted downwards.
struct alignas(16) Pixel {
  int64_t image;
  int y, x, row, column;
};

template <typename T>
__host__ __device__ constexpr int map_warp_bytes() {
  return kRows * (sizeof(Pixel) +
                  2 * sizeof(T) * padded_row<T>(kMapDepthBytes / static_cast<int>(sizeof(T))));
}

template <typename T>
__global__ void __launch_bounds__(kMapWarps* kLanes)
    map_gradient_kernel(const MapGradientParams p) {
  constexpr int kDepth = kMapDepthBytes / sizeof(T);
  constexpr int kPitch = padded_row<T>(kDepth);
  constexpr int V = Vec<T>::size;
  const Geometry& map = p.map;
  auto* pixels = reinterpret_cast<Pixel*>(reinterpret_cast<char*>(dynamic_shared) +
                                          warp_index() * map_warp_bytes<T>());
  T* stages = reinterpret_cast<T*>(pixels + kRows);
  const int lane = lane_index();

  // The class: its first pixel, how many there are, and its first tap along each axis.
  const int of_class = blockIdx.x / p.tiles;
  const int first_y = of_class / p.columns_of_classes, first_x = of_class % p.columns_of_classes;
  const int height = (map.height - first_y + map.stride - 1) / map.stride;
  const int width = (map.width - first_x + map.stride - 1) / map.stride;
  const int first_ky = (first_y + map.padding) % map.stride;
  const int first_kx = (first_x + map.padding) % map.stride;
  const int64_t first_pixel = (int64_t(blockIdx.x % p.tiles) * kMapWarps + warp_index()) * kRows;
  const int64_t pixel_count = map.batch * height * width;
  if (first_pixel >= pixel_count) return;
  if (lane < kRows) {
    const int64_t pixel = first_pixel + lane;
    Pixel at = {-1, 0, 0, 0, 0};
    if (pixel < pixel_count) {
      at.image = pixel / (int64_t(height) * width);
      const int in_image = static_cast<int>(pixel - at.image * height * width);
      at.y = first_y + in_image / width * map.stride;
      at.x = first_x + in_image % width * map.stride;
      at.row = (at.y + map.padding - first_ky) / map.stride;
      at.column = (at.x + map.padding - first_kx) / map.stride;
    }
    pixels[lane] = at;
  }
  __syncwarp();

  const int taps_high = max(0, (map.kernel - first_ky + map.stride - 1) / map.stride);
  const int taps_wide = max(0, (map.kernel - first_kx + map.stride - 1) / map.stride);
  // The token that has a pixel of the tile at tap i of the class, −1 if there is none.
  const auto token_of = [&](int row, int i) {
    const Pixel& pixel = pixels[row];
    const int high = i / taps_wide;
    const int token_row = pixel.row - high, token_column = pixel.column - (i - high * taps_wide);
    const bool exists = pixel.image >= 0 && token_row >= 0 && token_row < map.rows &&
                        token_column >= 0 && token_column < map.columns;
    return exists ? (pixel.image * map.rows + token_row) * map.columns + token_column : -1;
  };
  const int chunks = (p.depth + kDepth - 1) / kDepth;
  const int steps = taps_high * taps_wide * chunks;
  const auto start_loading = [&](int step) {
    if (step < steps) {
      const int tap = step / chunks;
      const int first = (step - tap * chunks) * kDepth;
      const int count = min(kDepth, p.depth - first);
      T* stage = stages + step % 2 * kRows * kPitch;
      const T* grad = static_cast<const T*>(p.grad);
      for (int i = lane; i < kRows * (count / V); i += kLanes) {
        const int row = i / (count / V);
        const int column = (i - row * (count / V)) * V;
        const int64_t token = token_of(row, tap);
        const int left = token >= 0 ? p.outputs - first - column : 0;
        const T* from = grad + token * p.outputs + first + column;
        T* to = stage + row * kPitch + column;
        if (p.vectors) {
          copy_async(to, left > 0 ? from : grad, left > 0);
        } else {
#pragma unroll
          for (int e = 0; e < V; ++e) to[e] = e < left ? from[e] : T(0.f);
        }
      }
    }
    commit_copies();
  };

  for (int round = blockIdx.y; round < p.rounds; round += gridDim.y) {
    const int groups = min(kMapGroups, p.groups - round * kMapGroups);
    const int first_channel = round * kMapGroups * kGroup;
    float x[kMapGroups][2][8];
    if (p.scalars) {
#pragma unroll
      for (int i = 0; i < 2 * kMapGroups; ++i) {
        const Pixel& pixel = pixels[sum_row(i % 2)];
        const int channel = first_channel + sum_column(i / 2);
        const T* from = static_cast<const T*>(p.x) + pixel.image * p.x_strides[0] +
                        channel * p.x_strides[1] + pixel.y * p.x_strides[2] +
                        pixel.x * p.x_strides[3];
        const int count = pixel.image >= 0 ? map.channels - channel : 0;
        if (p.x_vectors) {
          load_eight(x[i / 2][i % 2], from, count, true);
        } else {
#pragma unroll
          for (int e = 0; e < 8; ++e) {
            x[i / 2][i % 2][e] = e < count ? static_cast<float>(from[e * p.x_strides[1]]) : 0.f;
          }
        }
      }
    }
    Sums<kMapGroups> total, of_tap;
    total.clear();
    of_tap.clear();
    start_loading(0);
    for (int step = 0; step < steps; ++step) {
      start_loading(step + 1);
      wait_for_copies<1>();
      __syncwarp();
      const int tap = step / chunks;
      const int first = (step - tap * chunks) * kDepth;
      const int ky = first_ky + tap / taps_wide * map.stride;
      const int kx = first_kx + tap % taps_wide * map.stride;
      const T* packed =
          static_cast<const T*>(p.packed) +
          (int64_t(ky * map.kernel + kx) * p.groups + round * kMapGroups) * p.depth * kGroup;
      multiply(of_tap, stages + step % 2 * kRows * kPitch, kPitch, packed + first * kGroup,
               int64_t(p.depth) * kGroup, min(kDepth, p.depth - first), groups);
      // The next loads overwrite what was multiplied.
      __syncwarp();
      if (step - tap * chunks + 1 < chunks) continue;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t token = token_of(sum_row(half), tap);
        float4 scalars = {0.f, 0.f, 0.f, 0.f};
        if (p.scalars && token >= 0) scalars = p.scalars[token];
#pragma unroll
        for (int group = 0; group < kMapGroups; ++group) {
          if (group >= groups) break;
#pragma unroll
          for (int e = 0; e < 8; ++e) {
            float grad = of_tap.at[group][half][e];
            if (p.scalars) {
              const int channel = first_channel + sum_column(group) + e;
              if (channel >= map.channels) continue;
              const float gain = static_cast<float>(
                  static_cast<const T*>(p.gain)[(channel * map.kernel + ky) * map.kernel + kx]);
              const float normalized = (x[group][half][e] - scalars.x) * scalars.y;
              grad = scalars.y * (grad * gain - scalars.z - normalized * scalars.w);
            }
            total.at[group][half][e] += grad;
          }
        }
      }
      of_tap.clear();
    }
#pragma unroll
    for (int i = 0; i < 2 * kMapGroups; ++i) {
      const Pixel& pixel = pixels[sum_row(i % 2)];
      const int channel = first_channel + sum_column(i / 2);
      if (pixel.image < 0 || channel >= map.channels) continue;
      T* to = static_cast<T*>(p.grad_x) + pixel.image * p.grad_x_strides[0] +
              channel * p.grad_x_strides[1] + pixel.y * p.grad_x_strides[2] +
              pixel.x * p.grad_x_strides[3];
      if (p.grad_x_vectors) {
        store_eight(to, total.at[i / 2][i % 2], map.channels - channel, true);
      } else {
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          if (channel + e < map.channels) {
            to[e * p.grad_x_strides[1]] = static_cast<T>(total.at[i / 2][i % 2][e]);
          }
        }
      }
    }
  }
}

Geometry geometry_of(const Tensor& x, int64_t kernel_size, int64_t stride, int64_t padding) {
  STD_TORCH_CHECK(x.dim() == 4, kName, ": x must have 4 dimensions, got ", x.dim());
  return make_geometry(kName, x.size(0), x.size(1), x.size(2), x.size(3), kernel_size, stride,
                       padding);
}

// A contiguous parameter of the expected shape and type; a kernel would read beyond any other.
Tensor checked(const char* argument, const Tensor& tensor, std::initializer_list<int64_t> shape,
               const Tensor& like) {
  bool same = tensor.dim() == static_cast<int64_t>(shape.size()) &&
              tensor.scalar_type() == like.scalar_type();
  int64_t i = 0;
  for (int64_t size : shape) same = same && tensor.size(i++) == size;
  STD_TORCH_CHECK(same, kName, ": ", argument, " has the wrong shape or dtype");
  return torch::stable::contiguous(tensor);
}

template <typename T>
bool rows_are_vectors(const void* p, int64_t elements) {
  return elements % Vec<T>::size == 0 && reinterpret_cast<uintptr_t>(p) % 16 == 0;
}

// The forward's weight: depth in the order of the tokens' elements, columns are outputs.
template <typename T>
Tensor packed_weight(const Patches& patches, const Tensor& weight, const DeviceScope& device) {
  const int area = patches.map.kernel * patches.map.kernel;
  Packing p = {};
  p.from = weight.const_data_ptr();
  p.depth = patches.width();
  p.columns = p.section = static_cast<int>(weight.size(0));
  p.column_stride = patches.width();
  p.inner = patches.by_tap ? patches.map.channels : std::max(1, p.depth);
  p.outer_stride = 1;
  p.inner_stride = patches.by_tap ? area : 1;
  p.groups = p.groups_per_section = static_cast<int>(divide_up(p.columns, kGroup));
  Tensor packed = torch::stable::new_empty(weight, {packed_size(p.depth, p.groups)});
  p.to = packed.mutable_data_ptr();
  launch_pack<T>({p}, 1, device);
  return packed;
}

// Warps of a block and elements of a chunk: all of a token where at least one warp's fit.
template <typename T>
int choose_chunk(int width, int& warps) {
  int chunk = static_cast<int>(divide_up(std::max(width, 1), 16) * 16);
  warps = kMostWarps;
  while (warps > 1 && warps * int64_t(TokenTile<T>::bytes(chunk)) > kSharedBytes) warps /= 2;
  if (TokenTile<T>::bytes(chunk) > kSharedBytes) {
    warps = kMostWarps;
    while (warps * int64_t(TokenTile<T>::bytes(chunk)) > kSharedBytes) {
      chunk = static_cast<int>(divide_up(chunk, 32) * 16);
    }
  }
  return chunk;
}

template <typename T, bool kScalars>
void launch_project(ProjectParams p, const DeviceScope& device) {
  int warps = 0;
  p.chunk = choose_chunk<T>(p.patches.width(), warps);
  p.depth = static_cast<int>(divide_up(p.patches.width(), 16) * 16);
  p.groups = static_cast<int>(divide_up(p.outputs, kGroup));
  const int64_t blocks = divide_up(p.tokens, kRows * warps);
  // Few tokens leave the device idle unless several blocks share their outputs.
  const int64_t rounds = divide_up(p.groups, kRoundGroups<T>);
  const int64_t sharing = kScalars || blocks * 8 > device.enough_blocks() ? 1 : rounds;
  device.launch(kScalars ? "soft_split_linear_scalars" : kName, project_kernel<T, kScalars>,
                dim3(grid_size(blocks), static_cast<unsigned>(sharing)), warps * kLanes,
                warps * TokenTile<T>::bytes(p.chunk), p);
}

}  // namespace

Projected project(Tensor x, Tensor weight, std::optional<Tensor> bias,
                  std::optional<Tensor> norm_weight, std::optional<Tensor> norm_bias,
                  int64_t kernel_size, int64_t stride, int64_t padding, double eps, bool moments) {
  const Geometry map = geometry_of(x, kernel_size, stride, padding);
  const int64_t width = map.token_width(), tokens = int64_t(map.rows) * map.columns;
  STD_TORCH_CHECK(weight.dim() == 2, kName, ": weight must have 2 dimensions");
  STD_TORCH_CHECK(norm_weight.has_value() == norm_bias.has_value(), kName, ": half a norm");
  const DeviceScope device(x);
  const int64_t outputs = weight.size(0);
  weight = checked("weight", weight, {outputs, width}, x);
  if (bias) bias = checked("bias", *bias, {outputs}, x);
  if (norm_weight) {
    norm_weight = checked("norm_weight", *norm_weight, {width}, x);
    norm_bias = checked("norm_bias", *norm_bias, {width}, x);
  }
  Projected result = {torch::stable::new_empty(x, {map.batch, tokens, outputs}), {}, {}};
  const Tensor& y = result.y;
  if (y.numel() == 0) return result;
  with_element_type(kName, x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    if constexpr (!std::is_same_v<T, float>) {
      if (patch_order(map) != PatchOrder::kNeither) {
        Projection16<T> projection(map, x, weight, bias ? bias->const_data_ptr() : nullptr,
                                   norm_weight ? norm_weight->const_data_ptr() : nullptr,
                                   norm_bias ? norm_bias->const_data_ptr() : nullptr, float(eps),
                                   device);
        float2* to = nullptr;
        if (moments && norm_weight) {
          result.moments = new_floats(x, map.batch * tokens * 2);
          result.constants = projection.constants();
          to = static_cast<float2*>(result.moments->mutable_data_ptr());
        }
        projection(y, to, device);
        return;
      }
    }
    ProjectParams p = {};
    p.patches = make_patches<T>(map, x);
    const Tensor packed = packed_weight<T>(p.patches, weight, device);
    p.packed = packed.const_data_ptr();
    p.normalized = norm_weight.has_value();
    if (norm_weight)
      p.norm = {norm_weight->const_data_ptr(), norm_bias->const_data_ptr(), float(eps)};
    if (bias) p.bias = bias->const_data_ptr();
    p.y = y.mutable_data_ptr();
    p.outputs = static_cast<int>(outputs);
    p.tokens = map.batch * tokens;
    p.vectors = rows_are_vectors<T>(p.y, outputs);
    launch_project<T, false>(p, device);
  });
  return result;
}

std::pair<int64_t, int64_t> tokens_of(const Tensor& x, int64_t kernel_size, int64_t stride,
                                      int64_t padding) {
  const Geometry map = geometry_of(x, kernel_size, stride, padding);
  return {map.batch, int64_t(map.rows) * map.columns};
}

void project_into(const Tensor& x, const Tensor& weight, const Tensor& norm_weight,
                  const Tensor& norm_bias, int64_t kernel_size, int64_t stride, int64_t padding,
                  double eps, const Tensor (&sections)[3]) {
  const Geometry map = geometry_of(x, kernel_size, stride, padding);
  if (patch_order(map) == PatchOrder::kNeither) {
    Tensor y = project(x, weight, std::nullopt, norm_weight, norm_bias, kernel_size, stride,
                       padding, eps, false)
                   .y;
    for (int i = 0; i < 3; ++i) {
      Tensor section = sections[i];
      torch::stable::copy_(section, torch::stable::narrow(y, 2, i * kWidest, kWidest));
    }
    return;
  }
  const int64_t width = map.token_width();
  const DeviceScope device(x);
  const Tensor w = checked("weight", weight, {3 * kWidest, width}, x);
  const Tensor gain = checked("norm_weight", norm_weight, {width}, x);
  const Tensor offset = checked("norm_bias", norm_bias, {width}, x);
  with_half_type(kName, x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    Projection16<T> projection(map, x, w, nullptr, gain.const_data_ptr(), offset.const_data_ptr(),
                               float(eps), device);
    projection(sections, device);
  });
}

Tensor soft_split_linear(Tensor x, Tensor weight, std::optional<Tensor> bias,
                         std::optional<Tensor> norm_weight, std::optional<Tensor> norm_bias,
                         int64_t kernel_size, int64_t stride, int64_t padding, double eps) {
  return project(x, weight, bias, norm_weight, norm_bias, kernel_size, stride, padding, eps, false)
      .y;
}

namespace {

// Mean, 1/σ, m1 and m2 of every token; without `means` the last two are zero.
template <typename T>
Tensor token_scalars(const Patches& patches, const Tensor& grad, const Tensor& weight,
                     const Tensor& norm_weight, double eps, bool means, const DeviceScope& device) {
  ProjectParams p = {};
  p.patches = patches;
  p.normalized = true;
  p.norm = {norm_weight.const_data_ptr(), nullptr, float(eps)};
  p.outputs = static_cast<int>(weight.size(0));
  p.tokens = patches.map.batch * patches.tokens();
  p.grad = grad.const_data_ptr();
  p.vectors = rows_are_vectors<T>(p.grad, p.outputs);
  Tensor scalars = torch::stable::new_empty(grad, {p.tokens, 4}, ScalarType::Float);
  p.scalars = static_cast<float4*>(scalars.mutable_data_ptr());
  // They live until the launch that reads them.
  std::optional<Tensor> packed, gain_sums;
  if (means) {
    packed = packed_weight<T>(patches, weight, device);
    p.packed = packed->const_data_ptr();
    gain_sums = torch::stable::new_empty(grad, {p.outputs}, ScalarType::Float);
    GainSumParams s = {weight.const_data_ptr(), norm_weight.const_data_ptr(),
                       static_cast<float*>(gain_sums->mutable_data_ptr()), p.outputs,
                       patches.width()};
    p.gain_sums = s.sums;
    device.launch("soft_split_linear_gain_sums", gain_sum_kernel<T>,
                  dim3(grid_size(divide_up(p.outputs, kMostWarps))), kMostWarps * kLanes, 0, s);
  }
  launch_project<T, true>(p, device);
  return scalars;
}

template <typename T>
void weight_gradients(const Patches& patches, const Tensor& grad, const Tensor& weight,
                      const Norm& norm, const float4* scalars, FinishParams f,
                      const DeviceScope& device) {
  WeightGradientParams p = {};
  p.patches = patches;
  p.grad = grad.const_data_ptr();
  p.scalars = scalars;
  p.outputs = static_cast<int>(weight.size(0));
  p.tokens = patches.map.batch * patches.tokens();
  p.vectors = rows_are_vectors<T>(p.grad, p.outputs);
  const int64_t tall = divide_up(patches.width(), kGradientElements);
  const int64_t wide = divide_up(p.outputs, kGradientOutputs<T>);
  // As many slots as fill the device, but of some dozens of steps, and 256 MiB of them at most.
  f.slot_row = wide * kGradientOutputs<T>;
  f.slot_size = (1 + tall * kGradientElements) * f.slot_row;
  const int64_t steps = divide_up(p.tokens, kGradientTokens);
  const int64_t most =
      std::min({divide_up(device.enough_blocks(), 8 * tall * wide), divide_up(steps, 16),
                std::max<int64_t>(1, (1 << 26) / f.slot_size)});
  p.tokens_per_slot = divide_up(steps, std::max<int64_t>(1, most)) * kGradientTokens;
  const int64_t slots = p.tokens == 0 ? 0 : divide_up(p.tokens, p.tokens_per_slot);
  f.slot_count = static_cast<int>(slots);
  Tensor memory = torch::stable::new_empty(grad, {slots * f.slot_size}, ScalarType::Float);
  p.slots = static_cast<float*>(memory.mutable_data_ptr());
  if (slots > 0) {
    device.launch("soft_split_linear_weight_gradient", weight_gradient_kernel<T>,
                  dim3(grid_size(tall), static_cast<unsigned>(wide), static_cast<unsigned>(slots)),
                  kGradientThreads, gradient_tile_bytes<T>(), p);
  }
  f.patches = patches;
  f.norm = norm;
  f.slots = p.slots;
  f.outputs = p.outputs;
  f.weight = weight.const_data_ptr();
  device.launch("soft_split_linear_finish", finish_kernel<T>, dim3(grid_size(patches.width() + 1)),
                kFinishThreads, 0, f);
}

template <typename T>
void map_gradient(const Patches& patches, const Tensor& x, const Tensor& grad, const Tensor& weight,
                  const void* gain, const float4* scalars, const Tensor& grad_x,
                  const DeviceScope& device) {
  const Geometry& map = patches.map;
  const int area = map.kernel * map.kernel;
  MapGradientParams p = {};
  p.map = map;
  p.outputs = static_cast<int>(weight.size(0));
  p.depth = static_cast<int>(divide_up(p.outputs, 16) * 16);
  p.groups = static_cast<int>(divide_up(map.channels, kGroup));
  p.rounds = static_cast<int>(divide_up(p.groups, kMapGroups));

  // A matrix per tap: depth is the outputs, columns are channels.
  Packing pack = {};
  pack.from = weight.const_data_ptr();
  pack.depth = p.outputs;
  pack.inner = 1;
  pack.outer_stride = patches.width();
  pack.columns = pack.section = map.channels;
  pack.column_stride = area;
  pack.batch_stride = 1;
  pack.groups = pack.groups_per_section = p.groups;
  Tensor packed = torch::stable::new_empty(weight, {area * packed_size(p.outputs, p.groups)});
  pack.to = packed.mutable_data_ptr();
  launch_pack<T>({pack}, area, device);

  p.x = patches.x;
  p.grad = grad.const_data_ptr();
  p.packed = pack.to;
  p.gain = gain;
  p.scalars = scalars;
  p.grad_x = grad_x.mutable_data_ptr();
  for (int i = 0; i < 4; ++i) {
    p.x_strides[i] = x.stride(i);
    p.grad_x_strides[i] = grad_x.stride(i);
  }
  p.vectors = rows_are_vectors<T>(p.grad, p.outputs);
  p.x_vectors = patches.vectors;
  p.grad_x_vectors =
      map.channels > 1 && grad_x.stride(1) == 1 && rows_are_vectors<T>(p.grad_x, map.channels);
  p.rows_of_classes = std::min(map.stride, map.height);
  p.columns_of_classes = std::min(map.stride, map.width);
  const int64_t largest =
      map.batch * divide_up(map.height, map.stride) * divide_up(map.width, map.stride);
  const int64_t tiles = divide_up(largest, kRows * kMapWarps);
  const int64_t blocks = tiles * p.rows_of_classes * p.columns_of_classes;
  p.tiles = static_cast<int>(tiles);
  device.launch("soft_split_linear_map_gradient", map_gradient_kernel<T>,
                dim3(grid_size(blocks), static_cast<unsigned>(std::min(p.rounds, 65535))),
                kMapWarps * kLanes, kMapWarps * map_warp_bytes<T>(), p);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> soft_split_linear_backward(
    Tensor grad, Tensor x, Tensor weight, std::optional<Tensor> norm_weight,
    std::optional<Tensor> norm_bias, int64_t kernel_size, int64_t stride, int64_t padding,
    double eps, bool need_x, const Projected* known) {
  const Geometry map = geometry_of(x, kernel_size, stride, padding);
  const int64_t width = map.token_width(), tokens = int64_t(map.rows) * map.columns;
  STD_TORCH_CHECK(weight.dim() == 2, kName, ": weight must have 2 dimensions");
  STD_TORCH_CHECK(norm_weight.has_value() == norm_bias.has_value(), kName, ": half a norm");
  const DeviceScope device(x);
  const int64_t outputs = weight.size(0);
  weight = checked("weight", weight, {outputs, width}, x);
  grad = checked("grad", grad, {map.batch, tokens, outputs}, x);
  if (norm_weight) {
    norm_weight = checked("norm_weight", *norm_weight, {width}, x);
    norm_bias = checked("norm_bias", *norm_bias, {width}, x);
  }
  const bool channels_last = x.stride(1) == 1 && map.channels > 1;
  Tensor grad_x =
      need_x ? torch::stable::empty({map.batch, map.channels, map.height, map.width},
                                    x.scalar_type(), std::nullopt, x.device(), std::nullopt,
                                    channels_last ? torch::headeronly::MemoryFormat::ChannelsLast
                                                  : torch::headeronly::MemoryFormat::Contiguous)
             : torch::stable::new_empty(x, {0});
  Tensor grad_weight = torch::stable::new_empty(x, {outputs, width});
  Tensor grad_bias = torch::stable::new_empty(x, {outputs});
  Tensor grad_gain = torch::stable::new_empty(x, {norm_weight ? width : 0});
  Tensor grad_offset = torch::stable::new_empty(x, {norm_weight ? width : 0});
  if (outputs == 0) return {grad_x, grad_weight, grad_bias, grad_gain, grad_offset};

  with_element_type(kName, x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    if constexpr (!std::is_same_v<T, float>) {
      // Gradients whose rows begin at multiples of 16 bytes.
      if (patch_order(map) != PatchOrder::kNeither &&
          rows_are_vectors<T>(grad.const_data_ptr(), outputs)) {
        std::optional<Projected> own;
        if (norm_weight && map.batch > 0 && (known == nullptr || !known->moments)) {
          own = project(x, weight, std::nullopt, norm_weight, norm_bias, kernel_size, stride,
                        padding, eps, true);
          known = &*own;
        }
        const void* gain = norm_weight ? norm_weight->const_data_ptr() : nullptr;
        const PatchSource source = make_patch_source(map, x);
        const bool has_moments = norm_weight && map.batch > 0;
        const auto* moments =
            has_moments ? static_cast<const float2*>(known->moments->const_data_ptr()) : nullptr;
        WeightSumsParams s = {};
        s.outputs = static_cast<int>(outputs);
        s.weight = weight.const_data_ptr();
        s.gain = gain;
        s.offset = norm_weight ? norm_bias->const_data_ptr() : nullptr;
        s.grad_weight = grad_weight.mutable_data_ptr();
        s.grad_bias = grad_bias.mutable_data_ptr();
        s.grad_gain = grad_gain.mutable_data_ptr();
        s.grad_offset = grad_offset.mutable_data_ptr();
        weight_gradients16<T>(map, source, grad, moments, s, device);
        if (!need_x || map.batch == 0) return;
        if (has_map_gradient16(map, outputs)) {
          map_gradient16<T>(map, source, x, grad, weight, gain,
                            has_moments ? known->y.const_data_ptr() : nullptr, moments,
                            has_moments ? floats_of(*known->constants) : nullptr, grad_x, device);
        } else {
          const Patches patches = make_patches<T>(map, x);
          std::optional<Tensor> memory;
          if (norm_weight) {
            memory = token_scalars<T>(patches, grad, weight, *norm_weight, eps, true, device);
          }
          map_gradient<T>(patches, x, grad, weight, gain,
                          memory ? static_cast<const float4*>(memory->const_data_ptr()) : nullptr,
                          grad_x, device);
        }
        return;
      }
    }
    const Patches patches = make_patches<T>(map, x);
    Norm norm = {};
    const float4* scalars = nullptr;
    std::optional<Tensor> memory;
    if (norm_weight) {
      norm = {norm_weight->const_data_ptr(), norm_bias->const_data_ptr(), float(eps)};
      if (map.batch > 0) {
        memory = token_scalars<T>(patches, grad, weight, *norm_weight, eps, need_x, device);
        scalars = static_cast<const float4*>(memory->const_data_ptr());
      }
    }
    FinishParams f = {};
    f.grad_weight = grad_weight.mutable_data_ptr();
    f.grad_bias = grad_bias.mutable_data_ptr();
    f.grad_gain = grad_gain.mutable_data_ptr();
    f.grad_offset = grad_offset.mutable_data_ptr();
    weight_gradients<T>(patches, grad, weight, norm, scalars, f, device);
    if (need_x && map.batch > 0) {
      map_gradient<T>(patches, x, grad, weight, norm.gain, scalars, grad_x, device);
    }
  });
  return {grad_x, grad_weight, grad_bias, grad_gain, grad_offset};
}

namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(Tensor grad, Tensor x, Tensor weight,
                                                            std::optional<Tensor> norm_weight,
                                                            std::optional<Tensor> norm_bias,
                                                            int64_t kernel_size, int64_t stride,
                                                            int64_t padding, double eps,
                                                            bool need_x) {
  return soft_split_linear_backward(grad, x, weight, norm_weight, norm_bias, kernel_size, stride,
                                    padding, eps, need_x, nullptr);
}

STABLE_TORCH_LIBRARY_IMPL(t2t_cuda, T2T_DISPATCH_KEY, m) {
  m.impl("soft_split_linear", TORCH_BOX(&soft_split_linear));
  m.impl("soft_split_linear_backward", TORCH_BOX(&backward));
}

}  // namespace

}  // namespace t2t
