// Soft split, LayerNorm and Linear of half types: y = (W∘γ)·û + (W·β + b), û the patch normalised
// without gain and offset. Forward; the backward computes y again in the same way.
//
// A warp works alone on 16 tokens. It gathers and normalises them in registers, and multiplies them
// by a weight that lies in shared memory: all of it for the rows order, for the taps order in pieces
// of 64 elements that pass through three buffers.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>

#include "launch.h"
#include "patch_operands.cuh"

namespace t2t {

constexpr int kProjectWarps = 12;
// Columns of a block: k, q and v.
constexpr int kProjectGroups = 6;

// One warp per output.
struct FoldParams {
  PatchMap map;
  int channels, groups, outputs, column_groups;
  const void *weight, *bias, *gain, *offset;  // all but the weight may be null
  uint4* packed;                              // W∘γ, in blocks
  float* constants;                           // W·β + b, padded to groups
  float* row_sums;                            // of the rounded W∘γ, padded likewise
};

constexpr int kFoldWarps = 4;

template <typename T>
__global__ void __launch_bounds__(kFoldWarps* kLanes) fold_kernel(const FoldParams p) {
  const int output = blockIdx.x * kFoldWarps + warp_index();
  if (output >= p.column_groups * kGroup) return;
  const bool exists = output < p.outputs;
  const T* weight = static_cast<const T*>(p.weight) + int64_t(output) * p.map.elements;
  float constant = 0.f, sum = 0.f;
  for (int i = lane_index(); i < p.groups * 4; i += kLanes) {
    const int group = i / 4, t = i % 4;
    float elements[8];
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const int own =
          exists ? own_element(p.map, p.channels, element_of_lane(p.map, group, t, e)) : -1;
      elements[e] = own >= 0 ? static_cast<float>(weight[own]) : 0.f;
      if (own >= 0 && p.offset) {
        constant += elements[e] * static_cast<float>(static_cast<const T*>(p.offset)[own]);
      }
      if (own >= 0 && p.gain) elements[e] *= static_cast<float>(static_cast<const T*>(p.gain)[own]);
    }
    uint32_t pairs[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      pairs[e] = round_pair<T>(elements[2 * e], elements[2 * e + 1]);
      const float2 rounded = elements_of<T>(pairs[e]);
      sum += rounded.x + rounded.y;
    }
    p.packed[(int64_t(group) * p.column_groups + output / kGroup) * kBlockVectors +
             block_place(t * 8, output % kGroup) / 8] = {pairs[0], pairs[1], pairs[2], pairs[3]};
  }
  for (int distance = 1; distance < kLanes; distance *= 2) {
    constant += __shfl_xor_sync(kAllLanes, constant, distance);
    sum += __shfl_xor_sync(kAllLanes, sum, distance);
  }
  if (exists && p.bias) constant += static_cast<float>(static_cast<const T*>(p.bias)[output]);
  if (lane_index() == 0) {
    p.constants[output] = constant;
    p.row_sums[output] = sum;
  }
}

struct ProjectionParams {
  PatchMap map;
  const uint4* packed;
  const float* constants;
  int groups, column_groups, outputs;
  bool normalized;
  float eps;
  void* y;
  bool vectors;     // rows of y begin at multiples of 16 bytes
  float2* moments;  // mean and 1/σ of every token; may be null
};

template <typename T>
__device__ void store_moments(const ProjectionParams& p, int64_t first_token,
                              const RowMoments& moments) {
  if (p.moments == nullptr || blockIdx.y != 0 || lane_index() % 4 != 0) return;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t token = first_token + sum_row(half);
    if (token < p.map.token_count) p.moments[token] = {moments.mean[half], moments.rstd[half]};
  }
}

// Columns of groups first_group …
template <typename T, int kGroups>
__device__ void store_projected(const ProjectionParams& p, int64_t first_token, int first_group,
                                const Sums<kGroups>& sums) {
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
    const int column = (first_group + group) * kGroup + lane_index() % 4 * 8;
    if (column >= p.outputs) continue;
    float constants[8];
    load_eight(constants, p.constants + column, 8, true);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t token = first_token + sum_row(half);
      if (token >= p.map.token_count) continue;
      float values[8];
#pragma unroll
      for (int e = 0; e < 8; ++e) values[e] = sums.at[group][half][e] + constants[e];
      T* to = static_cast<T*>(p.y) + token * p.outputs + column;
      if (p.vectors) {
        store_vector(to, uint4{round_pair<T>(values[0], values[1]),
                               round_pair<T>(values[2], values[3]),
                               round_pair<T>(values[4], values[5]),
                               round_pair<T>(values[6], values[7])});
      } else {
        store_eight(to, values, p.outputs - column, false);
      }
    }
  }
}

// Sections of 32 columns, so that two tiles and the sums fit in the registers of twelve warps.
constexpr int kSectionGroups = 1;
constexpr int kTiles = 2, kTileTokens = kTiles * kRows;

// Fewer warps where two tiles need more registers.
template <int kPatchRows, bool kPairs>
constexpr int kRowsWarps = kPatchRows <= (kPairs ? 21 : 8) ? kProjectWarps : 8;

template <typename T, int kPatchRows, bool kPairs>
__global__ void __launch_bounds__(kRowsWarps<kPatchRows, kPairs>* kLanes, 1)
    project_rows_kernel(const ProjectionParams p) {
  using Patches = PatchRows<T, kPatchRows, kPairs>;
  const int first_group = blockIdx.y * kProjectGroups;
  const int column_groups = min(kProjectGroups, p.column_groups - first_group);
  const uint4* packed =
      p.packed + first_group * kBlockVectors;
  for (int i = threadIdx.x; i < p.groups * column_groups * kBlockVectors; i += blockDim.x) {
    const int group = i / (column_groups * kBlockVectors);
    copy_async(dynamic_shared + i,
               packed + group * (p.column_groups - column_groups) * kBlockVectors + i, true);
  }
  commit_copies();
  wait_for_copies<0>();
  __syncthreads();

  // Two tiles of 16 tokens share what is loaded of the weight.
  const int64_t step = int64_t(gridDim.x) * blockDim.x / kLanes * kTileTokens;
  for (int64_t token = (int64_t(blockIdx.x) * (blockDim.x / kLanes) + warp_index()) * kTileTokens;
       token < p.map.token_count; token += step) {
    Patches tiles[kTiles];
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      tiles[tile].load(p.map, token + tile * kRows);
      if (p.normalized) {
        const RowMoments moments = tiles[tile].take_moments(p.map, p.eps);
        normalize<T, kPatchRows>(tiles[tile].patches, moments);
        store_moments<T>(p, token + tile * kRows, moments);
      }
      // One tile's addresses after the other's, or they would not fit in registers.
      __syncwarp();
    }
#pragma unroll 1
    for (int section = 0; section < column_groups; section += kSectionGroups) {
      Sums<kSectionGroups> sums[kTiles];
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) sums[tile].clear();
#pragma unroll
      for (int i = 0; i < Patches::kGroups; ++i) {
        constexpr int kLastPairs = kPatchRows - 4 * (Patches::kGroups - 1);
        const int steps = i == Patches::kGroups - 1 && kLastPairs <= 2 ? 1 : 2;
#pragma unroll
        for (int j = 0; j < kSectionGroups; ++j) {
          if (section + j >= column_groups) continue;
          const uint4* block = dynamic_shared + (i * column_groups + section + j) * kBlockVectors;
#pragma unroll
          for (int column = 0; column < 8; column += 2) {
            const uint4 right = block[column / 2 * kLanes + lane_index()];
#pragma unroll
            for (int tile = 0; tile < kTiles; ++tile) {
              auto& d = sums[tile].at[j];
              const auto& left = tiles[tile].patches.at[i];
              mma<T>(d[0][column], d[0][column + 1], d[1][column], d[1][column + 1], left[0],
                     right.x, right.y);
              if (steps == 2) {
                mma<T>(d[0][column], d[0][column + 1], d[1][column], d[1][column + 1], left[1],
                       right.z, right.w);
              }
            }
          }
        }
      }
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        store_projected<T>(p, token + tile * kRows, first_group + section, sums[tile]);
      }
    }
  }
}

// Pieces of the weight, 64 elements by the block's columns.
constexpr int kStages = 3;
constexpr int kStageVectors = 2 * kProjectGroups * kBlockVectors;

template <typename T, bool kVectors>
__global__ void __launch_bounds__(kProjectWarps* kLanes, 1)
    project_taps_kernel(const ProjectionParams p) {
  const int first_group = blockIdx.y * kProjectGroups;
  const int column_groups = min(kProjectGroups, p.column_groups - first_group);
  const int pieces = p.groups / 2;
  const int piece_vectors = 2 * column_groups * kBlockVectors;
  const int64_t step = int64_t(gridDim.x) * blockDim.x / kLanes * kRows;
  const int64_t first = int64_t(blockIdx.x) * (blockDim.x / kLanes) * kRows;

  // The pieces follow one another in a ring of stages, across rounds.
  int next_piece = 0, next_stage = 0, stage = 0;
  const auto start_loading = [&] {
    uint4* to = dynamic_shared + next_stage * kStageVectors;
    const uint4* from =
        p.packed + (next_piece * 2 * p.column_groups + first_group) * kBlockVectors;
    for (int i = threadIdx.x; i < piece_vectors; i += blockDim.x) {
      const int second = i >= piece_vectors / 2;
      copy_async(to + i, from + i + second * (p.column_groups - column_groups) * kBlockVectors,
                 true);
    }
    commit_copies();
    next_piece = next_piece + 1 < pieces ? next_piece + 1 : 0;
    next_stage = next_stage + 1 < kStages ? next_stage + 1 : 0;
  };
  start_loading();
  start_loading();

  for (int64_t of_block = first; of_block < p.map.token_count; of_block += step) {
    const int64_t token = of_block + warp_index() * kRows;
    const Corners corners(p.map, token);
    RowMoments moments = {{0.f, 0.f}, {1.f, 1.f}};
    if (p.normalized) {
      moments = moments_of_taps(PatchTaps<T, kVectors>(p.map, corners), p.eps);
      store_moments<T>(p, token, moments);
    }
    PatchTaps<T, kVectors> taps(p.map, corners);
    Sums<kProjectGroups> sums;
    sums.clear();
#pragma unroll 1
    for (int piece = 0; piece < pieces; ++piece) {
      Operand<2> patches = taps.next();
      if (p.normalized) normalize<T, 8>(patches, moments);
      // New registers, in the order of the fragments: ptxas would copy them for every product.
      keep_in_loop(patches.at[0], piece);
      keep_in_loop(patches.at[1], piece);
      wait_for_copies<1>();
      // The piece is there for all warps, and the one before it has been multiplied by all.
      __syncthreads();
      start_loading();
      const uint4* blocks = dynamic_shared + stage * kStageVectors;
      stage = stage + 1 < kStages ? stage + 1 : 0;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int j = 0; j < kProjectGroups; ++j) {
          if (j >= column_groups) break;
          multiply_block<T>(sums.at[j], patches.at[i],
                            blocks + (i * column_groups + j) * kBlockVectors);
        }
      }
    }
    store_projected<T>(p, token, first_group, sums);
  }
  wait_for_copies<0>();
}

// The weight with the norm folded in, which `params` then refer to.
template <typename T>
class Projection16 {
 public:
  Projection16(const Geometry& map, const torch::stable::Tensor& x,
               const torch::stable::Tensor& weight, const void* bias, const void* gain,
               const void* offset, float eps, const DeviceScope& device) {
    FoldParams fold = {};
    source_ = make_patch_source(map, x);
    fold.map = source_.map;
    fold.channels = map.channels;
    fold.groups = patch_groups(map);
    fold.outputs = static_cast<int>(weight.size(0));
    fold.column_groups = static_cast<int>(divide_up(fold.outputs, kGroup));
    fold.weight = weight.const_data_ptr();
    fold.bias = bias;
    fold.gain = gain;
    fold.offset = offset;
    packed_ = torch::stable::new_empty(
        weight, {int64_t(fold.groups) * fold.column_groups * kGroup * kGroup});
    constants_ = new_floats(weight, 2 * fold.column_groups * kGroup);
    fold.packed = static_cast<uint4*>(packed_.mutable_data_ptr());
    fold.constants = floats_of(constants_);
    fold.row_sums = fold.constants + fold.column_groups * kGroup;
    device.launch("soft_split_linear_fold", fold_kernel<T>,
                  dim3(grid_size(divide_up(fold.column_groups * kGroup, kFoldWarps))),
                  kFoldWarps * kLanes, 0, fold);
    params_.map = fold.map;
    params_.packed = fold.packed;
    params_.constants = fold.constants;
    params_.groups = fold.groups;
    params_.column_groups = fold.column_groups;
    params_.outputs = fold.outputs;
    params_.normalized = gain != nullptr;
    params_.eps = eps;
  }

  // y (tokens of all images, outputs) and, if not null, the tokens' moments.
  void operator()(void* y, float2* moments, const DeviceScope& device) {
    params_.y = y;
    params_.moments = moments;
    params_.vectors = params_.outputs % 8 == 0 && reinterpret_cast<uintptr_t>(y) % 16 == 0;
    if (source_.order == PatchOrder::kTaps) {
      launch(source_.vectors ? project_taps_kernel<T, true> : project_taps_kernel<T, false>,
             kProjectWarps, kRows, kStages * 2 * kProjectGroups, device);
      return;
    }
    switch (compiled_rows(params_.map.rows)) {
      case 8: return launch_rows<8>(device);
      case 21: return launch_rows<21>(device);
      default: return launch_rows<kMostRows>(device);
    }
  }

  // W·β + b and the sums of the rows of W∘γ, each padded to groups.
  const torch::stable::Tensor& constants() const { return constants_; }

 private:
  template <int kPatchRows>
  void launch_rows(const DeviceScope& device) const {
    const int blocks = params_.groups * std::min(kProjectGroups, params_.column_groups);
    if (source_.vectors) {
      launch(project_rows_kernel<T, kPatchRows, true>, kRowsWarps<kPatchRows, true>, kTileTokens,
             blocks, device);
    } else {
      launch(project_rows_kernel<T, kPatchRows, false>, kRowsWarps<kPatchRows, false>, kTileTokens,
             blocks, device);
    }
  }

  // One block a multiprocessor, of fewer warps if there are few tokens.
  void launch(void (*kernel)(ProjectionParams), int most_warps, int warp_tokens,
              int blocks_of_weight, const DeviceScope& device) const {
    const int64_t tiles = divide_up(params_.map.token_count, warp_tokens);
    const int64_t wide = divide_up(params_.column_groups, kProjectGroups);
    const int64_t blocks = std::max<int64_t>(1, device.multiprocessors() / wide);
    const int warps = static_cast<int>(std::clamp<int64_t>(divide_up(tiles, blocks), 1, most_warps));
    device.launch("soft_split_linear", kernel,
                  dim3(grid_size(std::min(blocks, divide_up(tiles, warps))),
                       static_cast<unsigned>(wide)),
                  warps * kLanes, static_cast<size_t>(blocks_of_weight) * kBlockBytes, params_);
  }

  torch::stable::Tensor packed_, constants_;
  PatchSource source_ = {};
  ProjectionParams params_ = {};
};

}  // namespace t2t
