// Soft split on CUDA, forward and backward.
//
// Both only move data, so they are memory-bound, and each reads and writes device memory once, in
// 16-byte vectors. Tokens are not aligned to vectors: with 147 elements, a token can start anywhere
// in a vector, and its elements have the order (channel, row, column) in any layout of the map.
// Data is rearranged in shared memory.
//
// In the forward, a block computes consecutive tokens of one token row. It loads the patch of the
// map that they cover, rearranges it into tokens, and stores these as one contiguous span. In the
// backward, a block computes a rectangle of the map's gradient. It loads the tokens that cover it
// as contiguous spans, and each pixel sums its at most ⌈k/s⌉² elements in a fixed order, without
// atomics.

#include <algorithm>
#include <cstdint>
#include <limits>
#include <type_traits>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "geometry.h"
#include "launch.h"
#include "vec.cuh"

namespace t2t {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Six blocks are resident on a Hopper multiprocessor, three if it has 100 KiB: enough loads in
// flight to hide their latency.
constexpr int64_t kSharedBytes = 32 * 1024;

// Along a token of 147 elements 160 of them have work, and 576 elements are three rounds of all.
// Eight such blocks, 1,536 threads, are what every device can hold.
constexpr int kSplitThreads = 192;
// At 64 registers a thread, four such blocks fill a multiprocessor's register file.
constexpr int kGatherThreads = 256;

struct SplitParams {
  Geometry map;
  const void* x;
  void* tokens;
  int64_t batch_stride, channel_stride, row_stride, column_stride;  // of x, in elements
  // A block makes `tile_tokens` tokens at a time, and of each the elements of `chunk_lines` lines.
  // A line is one row of a patch in one channel; a chunk is the whole token unless too large.
  int tile_tokens, tiles_wide;
  int chunk_lines, chunks;
  int patch_elements;    // of shared memory; the tokens follow
  bool channel_vectors;  // the map's channels can be loaded by vectors
};

// T is an unsigned integer of the elements' size.
template <typename T>
__global__ void __launch_bounds__(kSplitThreads, 8) split_kernel(const SplitParams p) {
  constexpr int V = Vec<T>::size;
  const Geometry& map = p.map;
  const int kernel = map.kernel;
  const int chunk = blockIdx.x % p.chunks;
  const int tile = blockIdx.x / p.chunks;
  const int token_row = tile / p.tiles_wide;
  const int first_token = tile % p.tiles_wide * p.tile_tokens;
  const int tokens = min(p.tile_tokens, map.columns - first_token);
  const int first_line = chunk * p.chunk_lines;
  const int lines = min(p.chunk_lines, map.channels * kernel - first_line);

  // The patch is (ky, x, channel) or (channel, ky, x) in shared memory. The pitches avoid bank
  // conflicts between neighbouring threads.
  const int top = token_row * map.stride - map.padding;
  const int left = first_token * map.stride - map.padding;
  const int patch_width = (tokens - 1) * map.stride + kernel;
  const int pixel_pitch = map.channels + V;
  const int line_pitch = patch_width | 1;
  const int token_step = p.channel_vectors ? map.stride * pixel_pitch : map.stride;
  T* patch = reinterpret_cast<T*>(dynamic_shared);
  T* made = patch + p.patch_elements;

  // Threads are arranged along a token, in as many groups as fit; each group processes every
  // groups-th token.
  const int length = lines * kernel;
  const int lanes = min((length + 31) / 32 * 32, static_cast<int>(blockDim.x));
  const int groups = blockDim.x / lanes;
  const int group = threadIdx.x / lanes;

  for (int64_t image = blockIdx.y; image < map.batch; image += gridDim.y) {
    const T* x = static_cast<const T*>(p.x) + image * p.batch_stride;
    if (p.channel_vectors) {
      const int pixel_vectors = map.channels / V;
      for (int i = threadIdx.x; i < kernel * patch_width * pixel_vectors; i += blockDim.x) {
        const int pixel = i / pixel_vectors;
        const int c = (i - pixel * pixel_vectors) * V;
        const int py = pixel / patch_width;
        const int row = top + py;
        const int column = left + pixel - py * patch_width;
        Vec<T> loaded = {};
        if (row >= 0 && row < map.height && column >= 0 && column < map.width) {
          loaded = *reinterpret_cast<const Vec<T>*>(x + row * p.row_stride +
                                                    column * p.column_stride + c);
        }
        *reinterpret_cast<Vec<T>*>(patch + pixel * pixel_pitch + c) = loaded;
      }
    } else {
      // A warp loads a line, so that loads are coalesced if the map's rows are contiguous, with
      // several loads in flight.
      constexpr int kLoads = 4;
      const int right = min(left + patch_width, map.width);
      for (int i = threadIdx.x / 32; i < lines; i += blockDim.x / 32) {
        const int c = (first_line + i) / kernel;
        const int row = top + first_line + i - c * kernel;
        const bool inside = row >= 0 && row < map.height;
        const T* from = x + c * p.channel_stride + row * p.row_stride;
        for (int px = threadIdx.x % 32; px < patch_width; px += 32 * kLoads) {
          T loaded[kLoads];
#pragma unroll
          for (int j = 0; j < kLoads; ++j) {
            const int column = left + px + 32 * j;
            loaded[j] =
                inside && column >= 0 && column < right ? from[column * p.column_stride] : T(0);
          }
#pragma unroll
          for (int j = 0; j < kLoads; ++j) {
            if (px + 32 * j < patch_width) patch[i * line_pitch + px + 32 * j] = loaded[j];
          }
        }
      }
    }
    __syncthreads();

    // More than one token in a tile are whole tokens: the tile is one span of the result.
    const int64_t token = (image * map.rows + token_row) * map.columns + first_token;
    T* span = static_cast<T*>(p.tokens) + token * map.token_width() + first_line * kernel;
    const int phase = phase_of(span);
    for (int j = threadIdx.x % lanes; j < length && group < groups; j += lanes) {
      const int line = j / kernel;
      const int kx = j - line * kernel;
      const int c = line / kernel;
      const int ky = line - c * kernel;
      const int at =
          p.channel_vectors ? (ky * patch_width + kx) * pixel_pitch + c : line * line_pitch + kx;
#pragma unroll 4
      for (int t = group; t < tokens; t += groups) {
        made[phase + t * length + j] = patch[at + t * token_step];
      }
    }
    __syncthreads();

    // The next image's patch may be loaded during this loop: the tokens that it reads are only
    // overwritten after the next barrier.
    for (int i = threadIdx.x; i < vectors_in<T>(phase, tokens * length); i += blockDim.x) {
      copy_vector(span, made + phase, i, phase, tokens * length);
    }
  }
}

struct GatherParams {
  Geometry map;
  const void* grad;
  void* result;
  int64_t batch_stride, token_stride, element_stride;  // of grad, in elements
  int tile_height, tile_width, tiles_wide;             // a block makes such rectangles of pixels
  int staged_elements;                                 // of shared memory; the reaches follow
  bool channels_last;
  bool pixel_vectors;  // every vector of the result lies in one pixel
};

// The tokens that cover a pixel along one axis: `count` of them, or none if it is not positive. The
// pixel is at `tap` of the first one's patch, and `stride` earlier in each further one.
struct Cover {
  int first, count, tap;

  __device__ Cover(int pixel, int tokens, const Geometry& map) {
    const int at = pixel + map.padding;
    first = at < map.kernel ? 0 : (at - map.kernel) / map.stride + 1;
    count = min(at / map.stride, tokens - 1) - first + 1;
    tap = at - first * map.stride;
  }
};

// The same as an offset into the tokens that a block reads.
template <typename Offset>
struct Reach {
  Offset offset;
  int count;
};

// From a pixel's element in one token to the same pixel's in the next one below, in the next one to
// the right, and to that of the next channel.
template <typename Offset>
struct Steps {
  Offset row, column, channel;
};

// The sums of `N` consecutive channels of a pixel over the tokens that cover it.
template <int N, typename T, typename Offset>
__device__ void sum_tokens(T* sums, const T* from, int rows, int columns,
                           const Steps<Offset>& step) {
  float sum[N] = {};
#pragma unroll 1
  for (int row = 0; row < rows; ++row) {
#pragma unroll 1
    for (int column = 0; column < columns; ++column) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const Offset at = row * step.row + column * step.column + i * step.channel;
        sum[i] += static_cast<float>(from[at]);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < N; ++i) sums[i] = static_cast<T>(sum[i]);
}

// If `staged`, tokens are first loaded into shared memory: the elements that a thread sums are
// scattered, and 16-byte loads need an eighth of the requests of single loads. This requires
// contiguous tokens that fit; others are read in place.
template <typename T, bool kStaged>
__global__ void __launch_bounds__(kGatherThreads, 4) gather_kernel(const GatherParams p) {
  using Offset = std::conditional_t<kStaged, int, int64_t>;
  constexpr int V = Vec<T>::size;
  const Geometry& map = p.map;
  const int top = blockIdx.x / p.tiles_wide * p.tile_height;
  const int left = blockIdx.x % p.tiles_wide * p.tile_width;
  const int height = min(p.tile_height, map.height - top);
  const int width = min(p.tile_width, map.width - left);

  // The rectangle of tokens that cover the tile.
  const Cover below(top + height - 1, map.rows, map);
  const Cover right(left + width - 1, map.columns, map);
  const int first_row = Cover(top, map.rows, map).first;
  const int first_column = Cover(left, map.columns, map).first;
  const int rows = max(0, below.first + below.count - first_row);
  const int columns = max(0, right.first + right.count - first_column);

  // Staged rows keep the phase that they have in memory, hence the gap between them.
  const int64_t between_rows = map.columns * p.token_stride;
  const Offset token_stride = static_cast<Offset>(p.token_stride);
  const Offset span = columns * token_stride;
  const Offset row_stride =
      static_cast<Offset>(kStaged ? span + (between_rows - span) % V : between_rows);
  const Offset element_stride = kStaged ? 1 : static_cast<Offset>(p.element_stride);
  const Offset line_stride = map.kernel * element_stride;
  const Steps<Offset> step = {row_stride - map.stride * line_stride,
                              token_stride - map.stride * element_stride, map.kernel * line_stride};

  T* staged = reinterpret_cast<T*>(dynamic_shared);
  auto* row_reach = reinterpret_cast<Reach<Offset>*>(staged + p.staged_elements);
  auto* column_reach = row_reach + p.tile_height;
  for (int y = threadIdx.x; y < height; y += blockDim.x) {
    const Cover cover(top + y, map.rows, map);
    row_reach[y] = {(cover.first - first_row) * row_stride + cover.tap * line_stride, cover.count};
  }
  for (int x = threadIdx.x; x < width; x += blockDim.x) {
    const Cover cover(left + x, map.columns, map);
    column_reach[x] = {(cover.first - first_column) * token_stride + cover.tap * element_stride,
                       cover.count};
  }

  // A run is a piece of the result that is contiguous in memory: a row of the tile, of all channels
  // or of one.
  const int run_channels = p.channels_last ? map.channels : 1;
  const int run = width * run_channels;
  const int runs = p.channels_last ? height : height * map.channels;
  const int run_vectors = vectors_in<T>(p.pixel_vectors ? 0 : V - 1, run);

  for (int64_t image = blockIdx.y; image < map.batch; image += gridDim.y) {
    const T* tokens = static_cast<const T*>(p.grad) + image * p.batch_stride +
                      first_row * between_rows + first_column * p.token_stride;
    if constexpr (kStaged) {
      const int phase = phase_of(tokens);
      const int vectors = vectors_in<T>(V - 1, span);
      for (int i = threadIdx.x; i < rows * vectors; i += blockDim.x) {
        const int row = i / vectors;
        const T* from = tokens + row * between_rows;
        copy_vector(staged + phase + row * row_stride, from, i - row * vectors, phase_of(from),
                    span);
      }
      tokens = staged + phase;
    }
    __syncthreads();

    for (int i = threadIdx.x; i < runs * run_vectors; i += blockDim.x) {
      const int r = i / run_vectors;
      const int plane = r / height;
      const int y = r - plane * height;
      const int64_t plane_row = (image * (p.channels_last ? 1 : map.channels) + plane) * map.height;
      T* result =
          static_cast<T*>(p.result) + ((plane_row + top + y) * map.width + left) * run_channels;
      const int begin = (i - r * run_vectors) * V - phase_of(result);
      int x = max(begin, 0) / run_channels;
      int c = max(begin, 0) - x * run_channels;
      const Reach<Offset> row = row_reach[y];
      Vec<T> sums;
      if (p.pixel_vectors) {
        const Reach<Offset> column = column_reach[x];
        sum_tokens<V>(sums.at, tokens + row.offset + column.offset + c * step.channel, row.count,
                      column.count, step);
      } else {
#pragma unroll
        for (int e = 0; e < V; ++e) {
          if (begin + e < 0 || begin + e >= run) continue;
          const Reach<Offset> column = column_reach[x];
          sum_tokens<1>(sums.at + e,
                        tokens + row.offset + column.offset + (plane + c) * step.channel, row.count,
                        column.count, step);
          if (++c == run_channels) {
            c = 0;
            ++x;
          }
        }
      }
      if (begin >= 0 && begin + V <= run) {
        store_vector(result + begin, sums);
      } else {
#pragma unroll
        for (int e = 0; e < V; ++e) {
          if (begin + e >= 0 && begin + e < run) result[begin + e] = sums.at[e];
        }
      }
    }
    // The next image's tokens overwrite those that were summed.
    __syncthreads();
  }
}

// A row of blocks for the tiles of an image, and as many rows as keep the device busy; where there
// are more images, a block takes several.
dim3 grid_of(int64_t tiles, int64_t batch, int enough_blocks) {
  T2T_CHECK(tiles <= std::numeric_limits<int>::max(), "soft_split: x: got a map of ", tiles,
            " tiles, expected fewer than 2^31");
  const int64_t images_per_block = divide_up(batch * tiles, enough_blocks);
  return dim3(static_cast<unsigned>(tiles),
              static_cast<unsigned>(divide_up(batch, images_per_block)));
}

// The largest tile whose patch and tokens fit into shared memory; its bytes are the return value.
template <typename T>
int64_t choose_tile(SplitParams& p) {
  constexpr int64_t V = Vec<T>::size;
  const Geometry& map = p.map;
  const auto patch_vectors = [&] {
    const int64_t patch_width = (p.tile_tokens - 1) * int64_t(map.stride) + map.kernel;
    return divide_up(p.channel_vectors ? map.kernel * patch_width * (map.channels + V)
                                       : p.chunk_lines * (patch_width | 1),
                     V);
  };
  const auto bytes = [&] {
    const int64_t made = int64_t(p.tile_tokens) * p.chunk_lines * map.kernel;
    return 16 * (patch_vectors() + divide_up(made + V - 1, V));
  };
  const auto halve = [](int& size) { size = (size + 1) / 2; };
  p.tile_tokens = map.columns;
  p.chunk_lines = map.channels * map.kernel;
  while (bytes() > kSharedBytes && p.tile_tokens > 1) halve(p.tile_tokens);
  if (bytes() > kSharedBytes) p.channel_vectors = false;
  while (bytes() > kSharedBytes && p.chunk_lines > 1) halve(p.chunk_lines);
  T2T_CHECK(bytes() <= kSharedBytes, "soft_split: kernel_size: got ", map.kernel,
            ", whose patches need ", bytes(), " bytes of shared memory, expected at most ",
            kSharedBytes);
  p.tiles_wide = static_cast<int>(divide_up(map.columns, p.tile_tokens));
  p.chunks = static_cast<int>(divide_up(map.channels * map.kernel, p.chunk_lines));
  p.patch_elements = static_cast<int>(patch_vectors() * V);
  return bytes();
}

template <typename T>
void launch_split(SplitParams p, const DeviceScope& device) {
  constexpr int64_t V = Vec<T>::size;
  p.channel_vectors = p.channel_stride == 1 && p.map.channels % V == 0 &&
                      reinterpret_cast<uintptr_t>(p.x) % 16 == 0 && p.batch_stride % V == 0 &&
                      p.row_stride % V == 0 && p.column_stride % V == 0;
  const int64_t bytes = choose_tile<T>(p);
  const int64_t tiles = int64_t(p.map.rows) * p.tiles_wide * p.chunks;
  device.launch("soft_split", split_kernel<T>, grid_of(tiles, p.map.batch, device.enough_blocks()),
                kSplitThreads, bytes, p);
}

Tensor soft_split(Tensor x, int64_t kernel_size, int64_t stride, int64_t padding) {
  check_dims("soft_split", "x", x, 4, "4 dimensions (B, C, H, W)");
  SplitParams p = {};
  p.map = make_geometry("soft_split", x.size(0), x.size(1), x.size(2), x.size(3), kernel_size,
                        stride, padding);
  const DeviceScope device(x);
  Tensor tokens = torch::stable::new_empty(
      x, {p.map.batch, int64_t(p.map.rows) * p.map.columns, p.map.token_width()});
  if (tokens.numel() == 0) return tokens;
  p.x = x.const_data_ptr();
  p.tokens = tokens.mutable_data_ptr();
  p.batch_stride = x.stride(0);
  p.channel_stride = x.stride(1);
  p.row_stride = x.stride(2);
  p.column_stride = x.stride(3);
  switch (x.scalar_type()) {
    case ScalarType::Float: launch_split<uint32_t>(p, device); break;
    case ScalarType::BFloat16:
    case ScalarType::Half: launch_split<uint16_t>(p, device); break;
    default:
      T2T_CHECK(false, "soft_split: x: got ", dtype_name(x.scalar_type()),
                ", expected float32, bfloat16 or float16");
  }
  return tokens;
}

// The largest tile of pixels whose tokens, if staged, fit into shared memory; its bytes are the
// return value. Tiles end where a token's stride does, so that few tokens are read by two of them,
// and are about four times as wide as high, so that the runs to be written are long.
template <typename T>
int64_t choose_tile(GatherParams& p, bool staged) {
  constexpr int64_t V = Vec<T>::size;
  const Geometry& map = p.map;
  const int stride = map.stride;
  const auto touched = [&](int64_t pixels, int tokens) {
    return std::min<int64_t>((pixels + map.kernel - 2) / stride + 1, tokens);
  };
  const auto staged_vectors = [&] {
    const int64_t row = touched(p.tile_width, map.columns) * map.token_width();
    return staged ? touched(p.tile_height, map.rows) * divide_up(row + V - 1, V) + 1 : 0;
  };
  const auto bytes = [&] {
    const int64_t reach = staged ? sizeof(Reach<int>) : sizeof(Reach<int64_t>);
    return 16 * staged_vectors() + reach * (int64_t(p.tile_height) + p.tile_width);
  };
  const auto fits = [&] {
    // With more pixels there would be too few blocks.
    constexpr int64_t most_elements = 16384;
    const int64_t pixels = int64_t(p.tile_height) * p.tile_width;
    return bytes() <= kSharedBytes && (pixels == 1 || pixels * map.channels <= most_elements);
  };
  const auto halve = [&](int& size) {
    const int half = (size + 1) / 2;
    size = half > stride ? (half + stride - 1) / stride * stride : half;
  };
  p.tile_height = map.height;
  p.tile_width = map.width;
  while (!fits() && (p.tile_height > 1 || p.tile_width > 1)) {
    const bool too_high = p.tile_height > 1 && int64_t(p.tile_height) * 4 > p.tile_width;
    halve(too_high ? p.tile_height : p.tile_width);
  }
  p.tiles_wide = static_cast<int>(divide_up(map.width, p.tile_width));
  p.staged_elements = static_cast<int>(staged_vectors() * V);
  return bytes();
}

template <typename T>
void launch_gather(GatherParams p, const DeviceScope& device) {
  const Geometry& map = p.map;
  const int64_t tokens = int64_t(map.rows) * map.columns;
  const bool contiguous = (map.token_width() == 1 || p.element_stride == 1) &&
                          (tokens == 1 || p.token_stride == map.token_width());
  if (contiguous) p.token_stride = map.token_width();
  int64_t bytes = choose_tile<T>(p, contiguous);
  const bool staged = contiguous && bytes <= kSharedBytes;
  if (!staged) bytes = choose_tile<T>(p, false);
  const int64_t tiles = divide_up(map.height, p.tile_height) * p.tiles_wide;
  p.pixel_vectors = p.channels_last && map.channels % Vec<T>::size == 0;
  device.launch("soft_split_backward", staged ? gather_kernel<T, true> : gather_kernel<T, false>,
                grid_of(tiles, map.batch, device.enough_blocks()), kGatherThreads, bytes, p);
}

Tensor soft_split_backward(Tensor grad, int64_t height, int64_t width, int64_t kernel_size,
                           int64_t stride, int64_t padding, bool channels_last) {
  check_dims("soft_split_backward", "grad", grad, 3, "3 dimensions (B, T, C*k*k)");
  const int64_t channels = grad.size(2) / std::max<int64_t>(1, kernel_size * kernel_size);
  GatherParams p = {};
  p.map = make_geometry("soft_split", grad.size(0), channels, height, width, kernel_size, stride,
                        padding);
  check_tensor("soft_split_backward", "grad", grad,
               {grad.size(0), int64_t(p.map.rows) * p.map.columns, p.map.token_width()},
               grad.scalar_type());
  const DeviceScope device(grad);
  Tensor result = torch::stable::empty({p.map.batch, channels, height, width}, grad.scalar_type(),
                                       std::nullopt, grad.device(), std::nullopt,
                                       channels_last ? torch::headeronly::MemoryFormat::ChannelsLast
                                                     : torch::headeronly::MemoryFormat::Contiguous);
  if (result.numel() == 0) return result;
  p.grad = grad.const_data_ptr();
  p.result = result.mutable_data_ptr();
  p.batch_stride = grad.stride(0);
  p.token_stride = grad.stride(1);
  p.element_stride = grad.stride(2);
  p.channels_last = channels_last;
  switch (grad.scalar_type()) {
    case ScalarType::Float: launch_gather<float>(p, device); break;
    case ScalarType::BFloat16: launch_gather<torch::headeronly::BFloat16>(p, device); break;
    case ScalarType::Half: launch_gather<torch::headeronly::Half>(p, device); break;
    default:
      T2T_CHECK(false, "soft_split_backward: grad: got ", dtype_name(grad.scalar_type()),
                ", expected float32, bfloat16 or float16");
  }
  return result;
}

STABLE_TORCH_LIBRARY_IMPL(t2t_cuda, T2T_DISPATCH_KEY, m) {
  m.impl("soft_split", TORCH_BOX(&soft_split));
  m.impl("soft_split_backward", TORCH_BOX(&soft_split_backward));
}

}  // namespace
}  // namespace t2t
