// A map and the grid of tokens over it.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <limits>

#include "checks.h"

namespace t2t {

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Geometry {
  int64_t batch;
  int channels, height, width;  // of the map
  int rows, columns;            // of the grid of tokens
  int kernel, stride, padding;

  __host__ __device__ int token_width() const { return channels * kernel * kernel; }
};

inline Geometry make_geometry(const char* name, int64_t batch, int64_t channels, int64_t height,
                              int64_t width, int64_t kernel, int64_t stride, int64_t padding) {
  constexpr int64_t largest = std::numeric_limits<int>::max();
  T2T_CHECK(kernel >= 1 && stride >= 1 && padding >= 0 && padding <= largest, name,
            ": got kernel_size ", kernel, ", stride ", stride, " and padding ", padding,
            ", expected kernel_size and stride of at least 1 and padding of at least 0");
  check_kernel_fits(name, height, width, kernel, padding);
  // Within an image, pixels, tokens and the elements of a token are counted in 32 bits.
  const int64_t most_padding = (largest - std::max(height, width)) / 2;
  T2T_CHECK(padding <= most_padding, name, ": padding: got ", padding, ", expected at most ",
            most_padding, " for a map of ", height, "x", width);
  const int64_t most_channels = largest / (kernel * kernel);
  T2T_CHECK(channels <= most_channels, name, ": x: got ", channels, " channels, expected at most ",
            most_channels, " for kernel_size ", kernel);
  Geometry map = {};
  map.batch = batch;
  map.channels = static_cast<int>(channels);
  map.height = static_cast<int>(height);
  map.width = static_cast<int>(width);
  map.kernel = static_cast<int>(kernel);
  // From a stride of the padded map's size on, there is only one token.
  map.stride = static_cast<int>(std::min(stride, std::max(height, width) + 2 * padding));
  map.padding = static_cast<int>(padding);
  map.rows = static_cast<int>((height + 2 * padding - kernel) / stride + 1);
  map.columns = static_cast<int>((width + 2 * padding - kernel) / stride + 1);
  return map;
}

}  // namespace t2t
