// Soft split on the CPU, forward and backward.
//
// Both are memory-bound, so they make a single pass over input and output. A thread owns whole rows
// of the result (tokens in the forward, pixels in the backward), so there are no atomics, and the
// sums are the same for any number of threads. All strides are supported without a copy.

#include "operators.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct Geometry {
  int64_t batch, channels, height, width;  // of the map
  int64_t rows, columns;                   // of the grid of tokens
  int64_t kernel, stride, padding;

  int64_t token_width() const { return channels * kernel * kernel; }
};

Geometry make_geometry(int64_t batch, int64_t channels, int64_t height, int64_t width,
                       int64_t kernel, int64_t stride, int64_t padding) {
  t2t::check_split("soft_split", channels, height, width, kernel, stride, padding);
  return {batch,
          channels,
          height,
          width,
          (height + 2 * padding - kernel) / stride + 1,
          (width + 2 * padding - kernel) / stride + 1,
          kernel,
          stride,
          padding};
}

// The part [begin, end) of the kernel that is inside a map of `size` for a patch starting at `at`.
struct Span {
  int64_t begin, end;
  Span(int64_t at, int64_t kernel, int64_t size)
      : begin(std::min(kernel, std::max<int64_t>(0, -at))),
        end(std::max(begin, std::min(kernel, size - at))) {}
};

// Rows of tokens [first, last), numbered through the batch.
template <typename T>
void split_rows(const Geometry& g, const T* x, const int64_t (&strides)[4], T* tokens,
                int64_t first, int64_t last) {
  const int64_t area = g.kernel * g.kernel;
  for (int64_t row = first; row < last; ++row) {
    const int64_t y = row % g.rows * g.stride - g.padding;
    const T* image = x + row / g.rows * strides[0];
    const Span ys(y, g.kernel, g.height);
    for (int64_t column = 0; column < g.columns; ++column) {
      const int64_t left = column * g.stride - g.padding;
      const Span xs(left, g.kernel, g.width);
      T* token = tokens + (row * g.columns + column) * g.token_width();
      if (ys.end - ys.begin < g.kernel || xs.end - xs.begin < g.kernel) {
        std::fill_n(token, g.token_width(), T(0));
      }
      // The innermost loop is over channels if they are adjacent in memory, else over pixels.
      if (strides[1] == 1) {
        for (int64_t ky = ys.begin; ky < ys.end; ++ky) {
          for (int64_t kx = xs.begin; kx < xs.end; ++kx) {
            const T* from = image + (y + ky) * strides[2] + (left + kx) * strides[3];
            T* to = token + ky * g.kernel + kx;
            for (int64_t c = 0; c < g.channels; ++c) to[c * area] = from[c];
          }
        }
      } else {
        for (int64_t c = 0; c < g.channels; ++c) {
          for (int64_t ky = ys.begin; ky < ys.end; ++ky) {
            const T* from = image + c * strides[1] + (y + ky) * strides[2] + left * strides[3];
            T* to = token + c * area + ky * g.kernel;
            for (int64_t kx = xs.begin; kx < xs.end; ++kx) to[kx] = from[kx * strides[3]];
          }
        }
      }
    }
  }
}

// Rows of pixels [first, last), numbered through the batch. Each row sums the tokens that cover it
// in a float row `sum`, (W, C) or (C, W) as in the result, which stays in the cache.
template <typename T>
void gather_rows(const Geometry& g, const T* grad, const int64_t (&strides)[3], bool channels_last,
                 T* result, int64_t first, int64_t last) {
  const int64_t area = g.kernel * g.kernel;
  const int64_t step_x = channels_last ? g.channels : 1;
  const int64_t step_c = channels_last ? 1 : g.width;
  std::vector<float> sum(g.channels * g.width);
  for (int64_t row = first; row < last; ++row) {
    const int64_t b = row / g.height;
    const int64_t y = row % g.height;
    std::fill(sum.begin(), sum.end(), 0.f);
    // Token rows whose patches contain y: 0 <= y + padding - token_row * stride < kernel.
    const int64_t below = y + g.padding - g.kernel + 1;
    const int64_t first_token = below <= 0 ? 0 : (below + g.stride - 1) / g.stride;
    const int64_t last_token = std::min(g.rows - 1, (y + g.padding) / g.stride);
    for (int64_t token_row = first_token; token_row <= last_token; ++token_row) {
      const int64_t ky = y + g.padding - token_row * g.stride;
      for (int64_t column = 0; column < g.columns; ++column) {
        const int64_t left = column * g.stride - g.padding;
        const Span xs(left, g.kernel, g.width);
        const T* token = grad + b * strides[0] + (token_row * g.columns + column) * strides[1] +
                         ky * g.kernel * strides[2];
        for (int64_t c = 0; c < g.channels; ++c) {
          const T* from = token + c * area * strides[2];
          float* to = sum.data() + c * step_c + left * step_x;
          for (int64_t kx = xs.begin; kx < xs.end; ++kx) {
            to[kx * step_x] += static_cast<float>(from[kx * strides[2]]);
          }
        }
      }
    }
    if (channels_last) {
      T* to = result + row * g.width * g.channels;
      for (size_t i = 0; i < sum.size(); ++i) to[i] = static_cast<T>(sum[i]);
    } else {
      for (int64_t c = 0; c < g.channels; ++c) {
        T* to = result + ((b * g.channels + c) * g.height + y) * g.width;
        for (int64_t i = 0; i < g.width; ++i) to[i] = static_cast<T>(sum[c * g.width + i]);
      }
    }
  }
}

// Calls f with a value of the tensor's element type.
template <typename F>
void with_element_type(const char* argument, ScalarType dtype, const F& f) {
  switch (dtype) {
    case ScalarType::Float: return f(float{});
    case ScalarType::BFloat16: return f(torch::headeronly::BFloat16{});
    case ScalarType::Half: return f(torch::headeronly::Half{});
    default:
      T2T_CHECK(false, "soft_split: ", argument, ": got ", t2t::dtype_name(dtype),
                ", expected float32, bfloat16 or float16");
  }
}

// A second thread does not pay off below some thousands of elements.
int64_t rows_per_thread(int64_t elements_per_row) {
  return std::max<int64_t>(1, 16384 / std::max<int64_t>(1, elements_per_row));
}

Tensor soft_split(const Tensor& x, int64_t kernel_size, int64_t stride, int64_t padding) {
  t2t::check_dims("soft_split", "x", x, 4, "4 dimensions (B, C, H, W)");
  const Geometry g =
      make_geometry(x.size(0), x.size(1), x.size(2), x.size(3), kernel_size, stride, padding);
  Tensor tokens = torch::stable::new_empty(x, {g.batch, g.rows * g.columns, g.token_width()});
  const int64_t strides[4] = {x.stride(0), x.stride(1), x.stride(2), x.stride(3)};
  with_element_type("x", x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const T* from = static_cast<const T*>(x.const_data_ptr());
    T* to = static_cast<T*>(tokens.mutable_data_ptr());
    torch::stable::parallel_for(
        0, g.batch * g.rows, rows_per_thread(g.columns * g.token_width()),
        [&](int64_t first, int64_t last) { split_rows(g, from, strides, to, first, last); });
  });
  return tokens;
}

Tensor soft_split_backward(const Tensor& grad, int64_t height, int64_t width, int64_t kernel_size,
                           int64_t stride, int64_t padding, bool channels_last) {
  t2t::check_dims("soft_split_backward", "grad", grad, 3, "3 dimensions (B, T, C*k*k)");
  T2T_CHECK(kernel_size >= 1 && kernel_size <= 32767, "soft_split_backward: kernel_size: got ",
            kernel_size, ", expected from 1 to 32767");
  const Geometry g = make_geometry(grad.size(0), grad.size(2) / (kernel_size * kernel_size), height,
                                   width, kernel_size, stride, padding);
  t2t::check_tensor("soft_split_backward", "grad", grad,
                    {grad.size(0), g.rows * g.columns, g.token_width()}, grad.scalar_type());
  Tensor result = torch::stable::empty({g.batch, g.channels, height, width}, grad.scalar_type(),
                                       std::nullopt, grad.device(), std::nullopt,
                                       channels_last ? torch::headeronly::MemoryFormat::ChannelsLast
                                                     : torch::headeronly::MemoryFormat::Contiguous);
  const int64_t strides[3] = {grad.stride(0), grad.stride(1), grad.stride(2)};
  with_element_type("grad", grad.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const T* from = static_cast<const T*>(grad.const_data_ptr());
    T* to = static_cast<T*>(result.mutable_data_ptr());
    torch::stable::parallel_for(0, g.batch * height, rows_per_thread(g.channels * width),
                                [&](int64_t first, int64_t last) {
                                  gather_rows(g, from, strides, channels_last, to, first, last);
                                });
  });
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(t2t_cpu, CPU, library) {
  library.impl("soft_split", TORCH_BOX(&soft_split));
  library.impl("soft_split_backward", TORCH_BOX(&soft_split_backward));
}
