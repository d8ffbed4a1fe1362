// Patches of half types as left operands of a product: gathered from the map into the registers of
// the lanes that multiply by them, and normalised there. Patches are not stored anywhere else.
//
// Two orders of a patch's elements, by the map:
//   rows   few channels, an image: (channel, row of the kernel, column), eight columns to a row. A
//          lane has two adjacent columns of each row
//   taps   a multiple of 64 channels: (tap, channel). A lane has eight adjacent channels
// Places of a row beyond the kernel hold the token's reference, which does not affect mean and
// variance, and are multiplied by zeros.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include "geometry.h"
#include "operands.cuh"
#include "rows.cuh"

namespace t2t {

// Division by a number known only at launch, exact for all of 32 bits (Lemire, Kaser and Kurz,
// 2019).
struct Divisor {
  uint32_t divisor;
  uint64_t factor;  // 0 for a divisor of 1

  __device__ uint32_t operator()(uint32_t number) const {
    return factor == 0 ? number : static_cast<uint32_t>(__umul64hi(factor, number));
  }
};
inline Divisor make_divisor(uint32_t by) { return {by, by == 1 ? 0 : ~0ULL / by + 1}; }

constexpr int kRowColumns = 8;
constexpr int kMostRows = 28;
// Elements of a tap that are loaded together: two groups.
constexpr int kTapChannels = 64;

// A map and its tokens, numbered through all images.
struct PatchMap {
  const void* x;
  int64_t batch_stride, channel_stride, row_stride, column_stride;
  int height, width, kernel, stride, padding, elements;
  Divisor tokens, columns;  // of an image, of a row of tokens
  int token_count;          // of all images
  // Rows order: where each row begins, and its row of the kernel.
  int rows;
  int64_t row_offset[kMostRows];
  int row_of_kernel[kMostRows];
};

inline bool takes_taps(const Geometry& map) {
  return map.channels > 0 && map.channels % kTapChannels == 0;
}
inline bool takes_rows(const Geometry& map) {
  return map.channels > 0 && map.kernel <= kRowColumns && map.channels * map.kernel <= kMostRows;
}

inline PatchMap make_patch_map(const Geometry& map, const torch::stable::Tensor& x) {
  PatchMap p = {};
  p.x = x.const_data_ptr();
  p.batch_stride = x.stride(0);
  p.channel_stride = x.stride(1);
  p.row_stride = x.stride(2);
  p.column_stride = x.stride(3);
  p.height = map.height;
  p.width = map.width;
  p.kernel = map.kernel;
  p.stride = map.stride;
  p.padding = map.padding;
  p.elements = map.token_width();
  p.tokens = make_divisor(map.rows * map.columns);
  p.columns = make_divisor(map.columns);
  p.token_count = static_cast<int>(map.batch * map.rows * map.columns);
  if (!takes_taps(map)) {
    p.rows = map.channels * map.kernel;
    for (int row = 0; row < p.rows; ++row) {
      p.row_of_kernel[row] = row % map.kernel;
      p.row_offset[row] = row / map.kernel * p.channel_stride + row % map.kernel * p.row_stride;
    }
  }
  return p;
}

// Rows that a kernel is compiled for: an image of one, three or four channels with a kernel of 7.
inline int compiled_rows(int rows) { return rows <= 8 ? 8 : rows <= 21 ? 21 : kMostRows; }

// Pairs of groups of 32 elements of a patch in its order, which may be more than the patch has.
inline int patch_pieces(const Geometry& map) {
  return takes_taps(map) ? map.token_width() / kTapChannels
                         : static_cast<int>(divide_up(compiled_rows(map.channels * map.kernel), 8));
}

// A map, with the properties that select a kernel and the width of its loads.
struct PatchSource {
  PatchMap map;
  bool taps, vectors;
};

inline PatchSource make_patch_source(const Geometry& map, const torch::stable::Tensor& x) {
  const auto aligned = [&](int64_t elements) {
    return reinterpret_cast<uintptr_t>(x.const_data_ptr()) % (2 * elements) == 0 &&
           x.stride(0) % elements == 0 && x.stride(2) % elements == 0;
  };
  const bool taps = takes_taps(map);
  const bool vectors = taps ? x.stride(1) == 1 && aligned(8) && x.stride(3) % 8 == 0
                            : x.stride(3) == 1 && aligned(2) && x.stride(1) % 2 == 0 &&
                                  map.stride % 2 == 0 && map.padding % 2 == 0 && map.width % 2 == 0;
  return {make_patch_map(map, x), taps, vectors};
}

// The place of an element of the patch's order in the token's own; −1 beyond the patch.
__host__ __device__ inline int own_element(const PatchMap& p, int channels, int element) {
  if (p.rows > 0) {
    const int row = element / kRowColumns, column = element % kRowColumns;
    return row < p.rows && column < p.kernel ? row * p.kernel + column : -1;
  }
  if (element >= p.elements) return -1;
  const int tap = element / channels;
  return (element - tap * channels) * p.kernel * p.kernel + tap;
}

// The element of the patch that is element `e` of lane t's eight in a group of an operand.
__host__ __device__ inline int element_of_lane(const PatchMap& p, int group, int t, int e) {
  return p.rows > 0 ? (group * 4 + e / 2) * kRowColumns + t * 2 + e % 2
                    : group * kGroup + t * 8 + e;
}

// The start of a lane's tokens, rows g and g + 8 of a tile. A token that does not exist is outside
// of the map.
struct Corners {
  int64_t offset[2];
  int y[2], x[2];

  __device__ Corners(const PatchMap& p, int first_token) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int token = first_token + sum_row(half);
      const uint32_t index = token < p.token_count ? token : 0;
      const uint32_t image = p.tokens(index);
      const uint32_t in_image = index - image * p.tokens.divisor;
      const uint32_t row = p.columns(in_image);
      y[half] = static_cast<int>(row) * p.stride - p.padding;
      x[half] = static_cast<int>(in_image - row * p.columns.divisor) * p.stride - p.padding;
      offset[half] = image * p.batch_stride + y[half] * p.row_stride + x[half] * p.column_stride;
      if (token >= p.token_count) y[half] = -0x40000000;
    }
  }
  __device__ bool has_row(const PatchMap& p, int half, int row) const {
    return static_cast<unsigned>(y[half] + row) < static_cast<unsigned>(p.height);
  }
  __device__ bool has_column(const PatchMap& p, int half, int column) const {
    return static_cast<unsigned>(x[half] + column) < static_cast<unsigned>(p.width);
  }
};

// Mean and 1/σ of rows g and g + 8.
struct RowMoments {
  float mean[2], rstd[2];
};

// Sums of a row's deviations from a reference, an element of the row itself, so that the mean of a
// flat patch is exactly its value and the variance is zero.
struct Deviations {
  float reference[2], sum[2], squares[2];

  // `first`: an element that lane t = 0 has.
  __device__ Deviations(float first, float second) : sum{}, squares{} {
    const bool has = lane_index() % 4 == 0;
    reference[0] = sum_of_row(has ? first : 0.f);
    reference[1] = sum_of_row(has ? second : 0.f);
  }
  template <typename T>
  __device__ void add(int half, uint32_t pair) {
    const float2 element = elements_of<T>(pair);
    const float first = element.x - reference[half], second = element.y - reference[half];
    sum[half] += first;
    sum[half] += second;
    squares[half] += first * first;
    squares[half] += second * second;
  }
  __device__ RowMoments finish(int count, float eps) {
    RowMoments moments;
    const float share = 1.f / static_cast<float>(count);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float mean = sum_of_row(sum[half]) * share;
      const float variance = sum_of_row(squares[half]) * share - mean * mean;
      moments.mean[half] = reference[half] + mean;
      moments.rstd[half] = fast_rsqrt(fmaxf(variance, 0.f) + eps);
    }
    return moments;
  }
};

template <typename T>
__device__ uint32_t normalized_pair(uint32_t pair, float mean, float rstd) {
  const float2 element = elements_of<T>(pair);
  return round_pair<T>((element.x - mean) * rstd, (element.y - mean) * rstd);
}

// The first `kPairs` pairs of each row.
template <typename T, int kPairs, int kGroups>
__device__ void normalize(Operand<kGroups>& patches, const RowMoments& moments) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      uint32_t& pair = patches.pair(i / 4, half, i % 4);
      pair = normalized_pair<T>(pair, moments.mean[half], moments.rstd[half]);
    }
  }
}

// Rows order. All of a patch, `kPatchRows` rows or fewer; pairs are loaded whole where `kPairs`.
template <typename T, int kPatchRows, bool kPairs>
struct PatchRows {
  static constexpr int kGroups = (kPatchRows + 3) / 4;
  Operand<kGroups> patches;

  __device__ void load(const PatchMap& p, int first_token) {
    const Corners corners(p, first_token);
    const int column = lane_index() % 4 * 2;
    patches.clear();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const T* from = static_cast<const T*>(p.x) + corners.offset[half] + column * p.column_stride;
      const bool first = corners.has_column(p, half, column) && column < p.kernel;
      const bool second = corners.has_column(p, half, column + 1) && column + 1 < p.kernel;
#pragma unroll
      for (int row = 0; row < kPatchRows; ++row) {
        uint32_t& pair = patches.pair(row / 4, half, row % 4);
        const T* at = from + p.row_offset[row];
        const bool exists = row < p.rows && corners.has_row(p, half, p.row_of_kernel[row]);
        if constexpr (kPairs) {
          if (exists && first) pair = *reinterpret_cast<const uint32_t*>(at);
        } else {
          const auto* bits = reinterpret_cast<const uint16_t*>(at);
          if (exists && first) pair = bits[0];
          if (exists && second) pair |= uint32_t(bits[p.column_stride]) << 16;
        }
      }
    }
  }

  // Elements beyond the kernel that a pair load includes.
  __device__ void clear_beyond(const PatchMap& p) {
    if (lane_index() % 4 * 2 + 1 != p.kernel) return;
#pragma unroll
    for (int i = 0; i < 2 * kPatchRows; ++i) {
      patches.pair(i / 2 / 4, i % 2, i / 2 % 4) &= 0xFFFFu;
    }
  }

  // Fills the places beyond the kernel; the moments are those of the rest.
  __device__ RowMoments take_moments(const PatchMap& p, float eps) {
    Deviations deviations(elements_of<T>(patches.pair(0, 0, 0)).x,
                          elements_of<T>(patches.pair(0, 1, 0)).x);
    const int column = lane_index() % 4 * 2;
    const uint32_t beyond =
        (column < p.kernel ? 0 : 0xFFFFu) | (column + 1 < p.kernel ? 0 : 0xFFFF0000u);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t reference =
          round_pair<T>(deviations.reference[half], deviations.reference[half]);
#pragma unroll
      for (int row = 0; row < kPatchRows; ++row) {
        uint32_t& pair = patches.pair(row / 4, half, row % 4);
        const uint32_t replaced = row < p.rows ? beyond : 0xFFFFFFFFu;
        pair = (pair & ~replaced) | (reference & replaced);
        deviations.template add<T>(half, pair);
      }
    }
    return deviations.finish(p.elements, eps);
  }
};

// Taps order. One after the other, 64 channels of a tap; `kVectors`: 16 bytes at a time.
template <typename T, bool kVectors>
class PatchTaps {
 public:
  __device__ PatchTaps(const PatchMap& p, const Corners& corners)
      : map_(p), corners_(corners), channels_(p.elements / (p.kernel * p.kernel)) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      from_[half] = static_cast<const T*>(p.x) + corners.offset[half] +
                    lane_index() % 4 * 8 * p.channel_stride;
    }
  }

  __device__ Operand<2> next() {
    Operand<2> operand;
    operand.clear();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (!corners_.has_row(map_, half, row_) || !corners_.has_column(map_, half, column_))
        continue;
      const T* from = from_[half] + offset_;
#pragma unroll
      for (int group = 0; group < 2; ++group) {
        if constexpr (kVectors) {
          set_eight(operand, group, half, *reinterpret_cast<const uint4*>(from + group * kGroup));
        } else {
          const auto* bits = reinterpret_cast<const uint16_t*>(from);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int64_t at = (group * kGroup + 2 * i) * map_.channel_stride;
            operand.pair(group, half, i) = bits[at] | uint32_t(bits[at + map_.channel_stride])
                                                          << 16;
          }
        }
      }
    }
    channel_ += kTapChannels;
    if (channel_ == channels_) {
      channel_ = 0;
      if (++column_ == map_.kernel) {
        column_ = 0;
        ++row_;
      }
    }
    offset_ =
        row_ * map_.row_stride + column_ * map_.column_stride + channel_ * map_.channel_stride;
    return operand;
  }

  __device__ const PatchMap& map() const { return map_; }

 private:
  const PatchMap& map_;
  const Corners& corners_;
  const T* from_[2];
  int channels_, row_ = 0, column_ = 0, channel_ = 0;
  int64_t offset_ = 0;
};

// Loads the whole patch once to compute mean and variance.
template <typename T, bool kVectors>
__device__ RowMoments moments_of_taps(PatchTaps<T, kVectors> taps, float eps) {
  Operand<2> loaded = taps.next();
  Deviations deviations(elements_of<T>(loaded.pair(0, 0, 0)).x,
                        elements_of<T>(loaded.pair(0, 1, 0)).x);
  const int pieces = taps.map().elements / kTapChannels;
#pragma unroll 1
  for (int piece = 0; piece < pieces; ++piece) {
    const Operand<2> current = loaded;
    if (piece + 1 < pieces) loaded = taps.next();
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      deviations.template add<T>(i / 4 % 2, current.pair(i / 8, i / 4 % 2, i % 4));
    }
  }
  return deviations.finish(taps.map().elements, eps);
}

}  // namespace t2t
