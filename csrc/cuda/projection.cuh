// Soft split, LayerNorm and Linear of half types: y = (W∘γ)·û + (W·β + b), û the patch normalised
// without gain and offset. Forward; the backward computes y again in the same way.
//
// A warp gathers and normalises 16 tokens in its registers, and multiplies them by a weight in
// shared memory: all of it for the rows order; for the taps order, pieces of 64 elements are
// streamed through three buffers. On Hopper four warps multiply together.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>

#include "launch.h"
#include "patch_operands.cuh"

namespace t2t {

constexpr int kProjectWarps = 12, kWarpgroup = 4;
// Columns of a block, in tiles of 64: k, q and v.
constexpr int kProjectTiles = 3, kProjectGroups = 2 * kProjectTiles;

// One block per output.
struct FoldParams {
  PatchMap map;
  int channels, pieces, outputs, column_tiles;
  const void *weight, *bias, *gain, *offset;  // all but the weight may be null
  uint4* packed;                              // W∘γ, (piece of 64 elements, tile of 64 outputs)
  float* constants;                           // W·β + b, padded to tiles
  float* row_sums;                            // of the rounded W∘γ, padded likewise
};

constexpr int kFoldWarps = 4;

template <typename T>
__global__ void __launch_bounds__(kFoldWarps* kLanes) fold_kernel(const FoldParams p) {
  __shared__ float parts[2][kFoldWarps];
  const int output = blockIdx.x;
  const bool exists = output < p.outputs;
  const T* weight = static_cast<const T*>(p.weight) + int64_t(output) * p.map.elements;
  float constant = 0.f, sum = 0.f;
  for (int i = threadIdx.x; i < p.pieces * 8; i += kFoldWarps * kLanes) {
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
    store_in_tile(
        p.packed + (int64_t(group / 2) * p.column_tiles + output / kWidest) * kWideTileVectors,
        group % 2, t, output % kWidest, pairs);
  }
  for (int distance = 1; distance < kLanes; distance *= 2) {
    constant += __shfl_xor_sync(kAllLanes, constant, distance);
    sum += __shfl_xor_sync(kAllLanes, sum, distance);
  }
  if (lane_index() == 0) {
    parts[0][warp_index()] = constant;
    parts[1][warp_index()] = sum;
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  constant = exists && p.bias ? static_cast<float>(static_cast<const T*>(p.bias)[output]) : 0.f;
  sum = 0.f;
  for (int i = 0; i < kFoldWarps; ++i) {
    constant += parts[0][i];
    sum += parts[1][i];
  }
  p.constants[output] = constant;
  p.row_sums[output] = sum;
}

struct ProjectionParams {
  PatchMap map;
  const uint4* packed;
  const float* constants;
  int pieces, column_tiles, outputs;
  bool normalized;
  float eps;
  // Where the columns of a block's tiles go, 192 columns further for each block; from a token to
  // the next so many elements, a multiple of eight. All begin at multiples of 16 bytes.
  void* y[kProjectTiles];
  int64_t y_stride;
  float2* moments;  // mean and 1/σ of every token; may be null
};

template <typename T>
__device__ void store_moments(const ProjectionParams& p, int first_token,
                              const RowMoments& moments) {
  if (p.moments == nullptr || blockIdx.y != 0 || lane_index() % 4 != 0) return;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int token = first_token + sum_row(half);
    if (token < p.map.token_count) p.moments[token] = {moments.mean[half], moments.rstd[half]};
  }
}

// Columns of the block's groups first_group …
template <typename T, int kGroups>
__device__ void store_projected(const ProjectionParams& p, int first_token, int first_group,
                                const Sums<kGroups>& sums) {
  const int before = blockIdx.y * kProjectGroups * kGroup;
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
    const int of_block = (first_group + group) * kGroup + lane_index() % 4 * 8;
    const int column = before + of_block;
    if (column >= p.outputs) continue;
    T* y = static_cast<T*>(p.y[of_block / kWidest]) + before + of_block % kWidest;
    float constants[8];
    load_eight(constants, p.constants + column);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t token = first_token + sum_row(half);
      if (token >= p.map.token_count) continue;
      float values[8];
#pragma unroll
      for (int e = 0; e < 8; ++e) values[e] = sums.at[group][half][e] + constants[e];
      T* to = y + token * p.y_stride;
      store_vector(to,
                   uint4{round_pair<T>(values[0], values[1]), round_pair<T>(values[2], values[3]),
                         round_pair<T>(values[4], values[5]), round_pair<T>(values[6], values[7])});
    }
  }
}

// Starts to copy a piece of the block's columns of the weight.
__device__ inline void copy_piece(uint4* to, const ProjectionParams& p, int piece,
                                  int column_tiles) {
  const uint4* from =
      p.packed + (int64_t(piece) * p.column_tiles + blockIdx.y * kProjectTiles) * kWideTileVectors;
  for (int i = threadIdx.x; i < column_tiles * kWideTileVectors; i += blockDim.x) {
    copy_async(to + i, from + i, true);
  }
}

// Two tiles of tokens per warp and twelve warps, if there are enough registers for both.
template <int kPatchRows, bool kPairs>
constexpr int kTiles = kPatchRows <= (kPairs ? 21 : 8) ? 2 : 1;
template <int kPatchRows, bool kPairs>
constexpr int kRowsWarps = kPatchRows <= (kPairs ? 21 : 8) ? kProjectWarps : 2 * kWarpgroup;

template <typename T, int kPatchRows, bool kPairs>
__global__ void __launch_bounds__(kRowsWarps<kPatchRows, kPairs>* kLanes, 1)
    project_rows_kernel(const ProjectionParams p) {
  using Patches = PatchRows<T, kPatchRows, kPairs>;
  constexpr int kSteps = (kPatchRows + 1) / 2;
  constexpr int kTiles = t2t::kTiles<kPatchRows, kPairs>;
  const int column_tiles =
      min(kProjectTiles, p.column_tiles - static_cast<int>(blockIdx.y) * kProjectTiles);
  const int stride = column_tiles * kWideTileVectors;
  for (int piece = 0; piece < p.pieces; ++piece) {
    copy_piece(dynamic_shared + piece * stride, p, piece, column_tiles);
  }
  commit_copies();
  wait_for_copies<0>();
  if constexpr (kHasWarpgroups) show_to_products();
  __syncthreads();

  const auto load = [&](Patches& tile, int token) {
    tile.load(p.map, token);
    if (p.normalized) {
      const RowMoments moments = tile.take_moments(p.map, p.eps);
      normalize<T, kPatchRows>(tile.patches, moments);
      store_moments<T>(p, token, moments);
    } else {
      tile.clear_beyond(p.map);
    }
  };
  const int block_tokens = blockDim.x / kLanes * kTiles * kRows;
  for (int of_block = blockIdx.x * block_tokens; of_block < p.map.token_count;
       of_block += gridDim.x * block_tokens) {
    const int token = of_block + warp_index() * kTiles * kRows;
    if constexpr (kHasWarpgroups) {
#pragma unroll 1
      for (int tile = 0; tile < kTiles; ++tile) {
        Patches patches;
        load(patches, token + tile * kRows);
#pragma unroll 1
        for (int column = 0; column < column_tiles; ++column) {
          keep_in_loop(patches.patches.at, column);
          float wide[8][2][2];
          start_products(wide, patches.patches.at);
          start_wide_products<T, kSteps>(wide, patches.patches,
                                         dynamic_shared + column * kWideTileVectors, stride, false);
          commit_products();
          wait_for_products(wide);
          Sums<2> sums;
          take_wide(wide, sums);
          store_projected<T>(p, token + tile * kRows, 2 * column, sums);
        }
      }
    } else {
      Patches tiles[kTiles];
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        load(tiles[tile], token + tile * kRows);
        // The addresses of one tile after the other, so that they fit in registers.
        __syncwarp();
      }
      // 32 columns at a time: both tiles use each load of the weight.
#pragma unroll 1
      for (int group = 0; group < 2 * column_tiles; ++group) {
        Sums<1> sums[kTiles];
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) sums[tile].clear();
#pragma unroll
        for (int i = 0; i < Patches::kGroups; ++i) {
          const uint4* block = dynamic_shared + i / 2 * stride + group / 2 * kWideTileVectors +
                               (i % 2 * 2 + group % 2) * kBlockVectors;
#pragma unroll
          for (int column = 0; column < 8; column += 2) {
            const uint4 right = block[column / 2 * kLanes + lane_index()];
#pragma unroll
            for (int tile = 0; tile < kTiles; ++tile) {
              auto& d = sums[tile].at[0];
              const auto& left = tiles[tile].patches.at[i];
              mma<T>(d[0][column], d[0][column + 1], d[1][column], d[1][column + 1], left[0],
                     right.x, right.y);
              if (2 * i + 1 < kSteps) {
                mma<T>(d[0][column], d[0][column + 1], d[1][column], d[1][column + 1], left[1],
                       right.z, right.w);
              }
            }
          }
        }
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          store_projected<T>(p, token + tile * kRows, group, sums[tile]);
        }
      }
    }
  }
}

// Pieces of the weight, 64 elements by the block's columns.
constexpr int kStages = 3;
constexpr int kStageVectors = kProjectTiles * kWideTileVectors;

// All sums of the block's columns need the registers of eight warps where warps multiply alone.
constexpr int kTapsWarps = 2 * kWarpgroup;

template <typename T, bool kVectors>
__global__ void __launch_bounds__(kTapsWarps* kLanes, 1)
    project_taps_kernel(const ProjectionParams p) {
  const int column_tiles =
      min(kProjectTiles, p.column_tiles - static_cast<int>(blockIdx.y) * kProjectTiles);

  // The pieces are streamed through a ring of stages, across rounds.
  int next_piece = 0, next_stage = 0, stage = 0;
  const auto start_loading = [&] {
    copy_piece(dynamic_shared + next_stage * kStageVectors, p, next_piece, column_tiles);
    commit_copies();
    next_piece = next_piece + 1 < p.pieces ? next_piece + 1 : 0;
    next_stage = next_stage + 1 < kStages ? next_stage + 1 : 0;
  };
  start_loading();
  start_loading();

  const int block_tokens = blockDim.x / kLanes * kRows;
  for (int of_block = blockIdx.x * block_tokens; of_block < p.map.token_count;
       of_block += gridDim.x * block_tokens) {
    const int token = of_block + warp_index() * kRows;
    const Corners corners(p.map, token);
    RowMoments moments = {{0.f, 0.f}, {1.f, 1.f}};
    if (p.normalized) {
      moments = moments_of_taps(PatchTaps<T, kVectors>(p.map, corners), p.eps);
      store_moments<T>(p, token, moments);
    }
    PatchTaps<T, kVectors> taps(p.map, corners);
    Operand<2> ahead = taps.next();
    float wide[kProjectTiles][8][2][2] = {};
    Sums<2> sums[kProjectTiles];
#pragma unroll
    for (int i = 0; i < kProjectTiles; ++i) sums[i].clear();
#pragma unroll 1
    for (int piece = 0; piece < p.pieces; ++piece) {
      Operand<2> patches = ahead;
      if (piece + 1 < p.pieces) ahead = taps.next();
      if (p.normalized) normalize<T, 8>(patches, moments);
      // New registers, in the order of the fragments: ptxas would copy them for every product.
      keep_in_loop(patches.at[0], piece);
      keep_in_loop(patches.at[1], piece);
      wait_for_copies<1>();
      if constexpr (kHasWarpgroups) show_to_products();
      // The piece is loaded for all warps, and all have finished multiplying the previous one.
      __syncthreads();
      start_loading();
      const uint4* tiles = dynamic_shared + stage * kStageVectors;
      stage = stage + 1 < kStages ? stage + 1 : 0;
      if constexpr (kHasWarpgroups) {
        start_products(wide, patches.at);
        // Also tiles that the weight does not have: ptxas would wait for each product of a branch.
#pragma unroll
        for (int i = 0; i < kProjectTiles; ++i) {
          start_wide_products<T, 4>(wide[i], patches, tiles + i * kWideTileVectors, 0, true);
        }
        commit_products();
        wait_for_products(wide);
      } else {
#pragma unroll
        for (int i = 0; i < kProjectTiles; ++i) {
          if (i >= column_tiles) break;
          multiply_blocks<T>(sums[i], patches, tiles + i * kWideTileVectors);
          // Loads of the next tile would not fit in registers.
          __syncwarp();
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kProjectTiles; ++i) {
      if (i >= column_tiles) break;
      if constexpr (kHasWarpgroups) take_wide(wide[i], sums[i]);
      store_projected<T>(p, token, 2 * i, sums[i]);
    }
  }
  wait_for_copies<0>();
}

// The weight with the norm folded in, which `params` then refer to.
template <typename T>
class Projection {
 public:
  Projection(const Geometry& map, const torch::stable::Tensor& x,
             const torch::stable::Tensor& weight, const void* bias, const void* gain,
             const void* offset, float eps, const DeviceScope& device) {
    FoldParams fold = {};
    source_ = make_patch_source(map, x);
    fold.map = source_.map;
    fold.channels = map.channels;
    fold.pieces = patch_pieces(map);
    fold.outputs = static_cast<int>(weight.size(0));
    fold.column_tiles = static_cast<int>(divide_up(fold.outputs, kWidest));
    fold.weight = weight.const_data_ptr();
    fold.bias = bias;
    fold.gain = gain;
    fold.offset = offset;
    packed_ = torch::stable::new_empty(
        weight, {int64_t(fold.pieces) * fold.column_tiles * kWidest * kWidest});
    constants_ = new_floats(weight, 2 * fold.column_tiles * kWidest);
    fold.packed = static_cast<uint4*>(packed_.mutable_data_ptr());
    fold.constants = floats_of(constants_);
    fold.row_sums = fold.constants + fold.column_tiles * kWidest;
    device.launch("soft_split_linear_fold", fold_kernel<T>,
                  dim3(grid_size(fold.column_tiles * kWidest)), kFoldWarps * kLanes, 0, fold);
    params_.map = fold.map;
    params_.packed = fold.packed;
    params_.constants = fold.constants;
    params_.pieces = fold.pieces;
    params_.column_tiles = fold.column_tiles;
    params_.outputs = fold.outputs;
    params_.normalized = gain != nullptr;
    params_.eps = eps;
  }

  // y (tokens of all images, outputs), newly made, and, if not null, the tokens' moments.
  void operator()(const torch::stable::Tensor& y, float2* moments, const DeviceScope& device) {
    for (int i = 0; i < kProjectTiles; ++i) {
      params_.y[i] = static_cast<T*>(y.mutable_data_ptr()) + i * kWidest;
    }
    params_.y_stride = params_.outputs;
    params_.moments = moments;
    launch(device);
  }
  // Each 64 of 192 columns to a new contiguous tensor of their own.
  void operator()(const torch::stable::Tensor (&sections)[kProjectTiles],
                  const DeviceScope& device) {
    for (int i = 0; i < kProjectTiles; ++i) params_.y[i] = sections[i].mutable_data_ptr();
    params_.y_stride = kWidest;
    launch(device);
  }

  // W·β + b and the sums of the rows of W∘γ, each padded to tiles.
  const torch::stable::Tensor& constants() const { return constants_; }

 private:
  void launch(const DeviceScope& device) const {
    if (source_.taps) {
      launch(source_.vectors ? project_taps_kernel<T, true> : project_taps_kernel<T, false>,
             kTapsWarps, kRows, kStages * kProjectTiles, device);
      return;
    }
    switch (compiled_rows(params_.map.rows)) {
      case 8: return launch_rows<8>(device);
      case 21: return launch_rows<21>(device);
      default: return launch_rows<kMostRows>(device);
    }
  }

  template <int kPatchRows>
  void launch_rows(const DeviceScope& device) const {
    const int tiles = params_.pieces * std::min(kProjectTiles, params_.column_tiles);
    if (source_.vectors) {
      launch(project_rows_kernel<T, kPatchRows, true>, kRowsWarps<kPatchRows, true>,
             kTiles<kPatchRows, true> * kRows, tiles, device);
    } else {
      launch(project_rows_kernel<T, kPatchRows, false>, kRowsWarps<kPatchRows, false>,
             kTiles<kPatchRows, false> * kRows, tiles, device);
    }
  }

  // One block a multiprocessor, of fewer warpgroups if there are few tokens.
  void launch(void (*kernel)(ProjectionParams), int most_warps, int warp_tokens,
              int tiles_of_weight, const DeviceScope& device) const {
    const int64_t groups = divide_up(params_.map.token_count, kWarpgroup * warp_tokens);
    const int64_t wide = divide_up(params_.column_tiles, kProjectTiles);
    const int64_t blocks = std::max<int64_t>(1, device.multiprocessors() / wide);
    const int64_t of_block =
        std::clamp<int64_t>(divide_up(groups, blocks), 1, most_warps / kWarpgroup);
    device.launch(
        "soft_split_linear", kernel,
        dim3(grid_size(std::min(blocks, divide_up(groups, of_block))), static_cast<unsigned>(wide)),
        static_cast<int>(of_block) * kWarpgroup * kLanes,
        static_cast<size_t>(tiles_of_weight) * kWideTileVectors * sizeof(uint4), params_);
  }

  torch::stable::Tensor packed_, constants_;
  PatchSource source_ = {};
  ProjectionParams params_ = {};
};

}  // namespace t2t
