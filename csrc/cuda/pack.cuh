// Weights in the order in which `multiply` loads them.
#pragma once

#include <algorithm>
#include <vector>

#include "geometry.h"
#include "launch.h"
#include "mma.cuh"

namespace t2t {

// A matrix B (depth × columns) in memory. Row k begins at k / inner · outer_stride +
// k % inner · inner_stride. The columns are equal sections, each of which begins a group when
// packed.
struct Packing {
  const void* from;
  void* to;
  int64_t batch_stride, outer_stride, inner_stride, column_stride;
  int depth, inner, columns, section;
  int padded_depth, groups, groups_per_section;
};

constexpr int kPackThreads = 256;
// Matrices of one launch: those of a T2T layer.
constexpr int kMostPackings = 7;

struct PackParams {
  Packing of[kMostPackings];
  int blocks_per_matrix;
};

// blockIdx.x: a part of one of a batch of matrices; blockIdx.y: which packing.
template <typename T>
__global__ void __launch_bounds__(kPackThreads) pack_kernel(const PackParams params) {
  const Packing& p = params.of[blockIdx.y];
  const int64_t matrix = blockIdx.x / params.blocks_per_matrix;
  const int64_t element =
      int64_t(blockIdx.x % params.blocks_per_matrix) * kPackThreads + threadIdx.x;
  const int column = element % kGroup;
  const int k = element / kGroup % p.padded_depth;
  const int group = element / kGroup / p.padded_depth;
  if (group >= p.groups) return;
  const int in_section = group % p.groups_per_section * kGroup + column;
  const int at = group / p.groups_per_section * p.section + in_section;
  T value = T(0.f);
  if (k < p.depth && in_section < p.section && at < p.columns) {
    value = static_cast<const T*>(p.from)[matrix * p.batch_stride + k / p.inner * p.outer_stride +
                                          k % p.inner * p.inner_stride + at * p.column_stride];
  }
  const int64_t size = int64_t(p.padded_depth) * kGroup;
  static_cast<T*>(p.to)[(matrix * p.groups + group) * size + packed_offset<T>(k, column)] = value;
}

// Elements of a packed matrix.
inline int64_t packed_size(int64_t depth, int64_t groups) {
  return divide_up(depth, 16) * 16 * groups * kGroup;
}

template <typename T>
void launch_pack(const std::vector<Packing>& packings, int64_t batches, const DeviceScope& device) {
  STD_TORCH_CHECK(packings.size() <= kMostPackings, "pack: too many matrices");
  PackParams params = {};
  int64_t blocks = 0;
  int count = 0;
  for (Packing p : packings) {
    blocks = std::max(blocks, divide_up(packed_size(p.depth, p.groups), kPackThreads));
    p.padded_depth = static_cast<int>(divide_up(p.depth, 16) * 16);
    params.of[count++] = p;
  }
  params.blocks_per_matrix = static_cast<int>(blocks);
  device.launch("pack", pack_kernel<T>,
                dim3(grid_size(batches * blocks), static_cast<unsigned>(count)), kPackThreads, 0,
                params);
}

}  // namespace t2t
