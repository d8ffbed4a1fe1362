// Gathers patches of a map as a tile of normalised tokens, and adds their gradients to the map.
#pragma once

#include "gemm.h"

namespace t2t {
namespace {

// Tokens per tile: a tile and its patches use a part of the second-level cache.
constexpr int64_t kTile = 48;

// Scratch memory, allocated in order.
struct Arena {
  uintptr_t next;

  float* floats(int64_t n) {
    auto* p = reinterpret_cast<float*>(next);
    next += padded(n) * 4;
    return p;
  }
  // A tile's rows and one more vector, because writes of whole vectors may exceed the tile.
  float* tile(int64_t row) { return floats(kTile * row + kPad); }
};

struct KeepAll {
  Vec operator()(Vec v) const { return v; }
};
struct KeepFirst {
  int64_t n;
  Vec operator()(Vec v) const { return first_lanes(v, n); }
};

// Calls f(j, keep) for each vector of n floats; keep(v) is v with zeros after the n floats.
template <typename F>
__attribute__((always_inline)) inline void for_vectors(int64_t n, const F& f) {
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) f(j, KeepAll{});
  if (j < n) f(j, KeepFirst{n - j});
}

// Copies n elements as floats, followed by at most a vector of zeros.
template <typename T>
inline void copy_run(const T* from, int64_t stride, int64_t n, float* to) {
  int64_t i = 0;
  if (stride == 1) {
    for (; i + kLanes <= n; i += kLanes) store(to + i, load(from + i));
    if (i < n) store(to + i, load_first(from + i, n - i));
  } else {
    for (; i < n; ++i) to[i] = load_one(from + i * stride);
  }
}

// The part [begin, end) of the kernel that is inside a map of `size` for a patch starting at `at`.
struct Span {
  int64_t begin, end;
  Span(int64_t at, int64_t kernel, int64_t size)
      : begin(least(kernel, most(0, -at))), end(most(begin, least(kernel, size - at))) {}
};

template <typename T>
void gather(const Split& s, const T* image, int64_t token, float* to) {
  const int64_t y = s.band_start(token / s.columns), x = s.band_start(token % s.columns);
  const Span ys(y, s.kernel, s.height), xs(x, s.kernel, s.width);
  if (ys.end - ys.begin < s.kernel || xs.end - xs.begin < s.kernel) {
    for (int64_t j = 0; j < s.patch(); ++j) to[j] = 0.f;
  }
  const int64_t inside = xs.end - xs.begin;
  const T* corner = image + y * s.strides[2] + (x + xs.begin) * s.strides[3];
  // In the order of the patch, because a run may write zeros where the next one begins.
  if (!s.by_tap) {
    for (int64_t c = 0; c < s.channels; ++c) {
      for (int64_t ky = ys.begin; ky < ys.end; ++ky) {
        copy_run(corner + c * s.strides[1] + ky * s.strides[2], s.strides[3], inside,
                 to + (c * s.kernel + ky) * s.kernel + xs.begin);
      }
    }
    return;
  }
  for (int64_t ky = ys.begin; ky < ys.end; ++ky) {
    const T* from = corner + ky * s.strides[2];
    float* row = to + (ky * s.kernel + xs.begin) * s.channels;
    if (s.strides[3] == s.channels) {
      copy_run(from, 1, inside * s.channels, row);
      continue;
    }
    for (int64_t kx = 0; kx < inside; ++kx) {
      copy_run(from + kx * s.strides[3], 1, s.channels, row + kx * s.channels);
    }
  }
}

// Σ f(j) over the vectors of n floats, four of them at a time; see for_vectors.
template <typename F>
__attribute__((always_inline)) inline double sum_of(int64_t n, const F& f) {
  Vec sums[4]{};
  int64_t j = 0;
  for (; j + 4 * kLanes <= n; j += 4 * kLanes) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) sums[i] += f(j + i * kLanes, KeepAll{});
  }
  for (; j + kLanes <= n; j += kLanes) sums[0] += f(j, KeepAll{});
  if (j < n) sums[1] += f(j, KeepFirst{n - j});
  return wide_sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// Normalises a row: x becomes x̂ = (x − mean)·r, r = 1/√(variance + eps), then x̂·gain + offset if
// they are not null. Returns r. The mean is computed from the differences to the first element, so
// that the rows of a flat patch become exactly zero. r is applied as the sum of two floats, because
// its rounding error would be common to all elements of a row, while those of the elements average
// out.
inline float normalize(float* row, int64_t n, float eps, const float* gain, const float* offset) {
  const Vec first = all(row[0]);
  const double count = static_cast<double>(n);
  const auto mean = static_cast<float>(
      sum_of(n, [&](int64_t j, auto keep) { return keep(load(row + j) - first); }) / count);
  const double squares = sum_of(n, [&](int64_t j, auto keep) {
    const Vec centred = keep(load(row + j) - first - mean);
    store(row + j, centred);
    return centred * centred;
  });
  const double r = 1 / __builtin_sqrt(squares / count + eps);
  const auto high = static_cast<float>(r), low = static_cast<float>(r - high);
  for (int64_t j = 0; j < n; j += kLanes) {
    const Vec x = load(row + j), scaled = x * low + x * high;
    store(row + j, gain ? scaled * load(gain + j) + load(offset + j) : scaled);
  }
  return high;
}

// The gradient of the input of `normalize` from that of its output: r (g − mean(g) − x̂·mean(g·x̂)).
inline void normalize_backward(const float* row, float r, int64_t n, float* grad) {
  const double count = static_cast<double>(n);
  const auto mean = static_cast<float>(
      sum_of(n, [&](int64_t j, auto keep) { return keep(load(grad + j)); }) / count);
  const auto slope = static_cast<float>(
      sum_of(n, [&](int64_t j, auto keep) { return keep(load(grad + j)) * keep(load(row + j)); }) /
      count);
  for_vectors(n, [&](int64_t j, auto keep) {
    store(grad + j, keep((load(grad + j) - mean - load(row + j) * slope) * r));
  });
}

// x·gain + offset over a tile.
inline void scale_rows(float* tile, int64_t row, int64_t rows, const float* gain,
                       const float* offset) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < row; j += kLanes) {
      store(tile + i * row + j, load(tile + i * row + j) * load(gain + j) + load(offset + j));
    }
  }
}

// Fills a tile with patches, normalised if there is a norm; with its gain and offset if requested.
// Writes the factors of the rows to `r` unless it is null.
template <typename T>
void patches(const Projection& p, const void* x, int64_t image, int64_t token, int64_t rows,
             bool scaled, float* tile, float* r) {
  const Split& s = p.split;
  const int64_t n = s.patch(), row = padded(n);
  const T* from = static_cast<const T*>(x) + image * s.strides[0];
  for (int64_t i = 0; i < rows; ++i) {
    float* to = tile + i * row;
    gather(s, from, token + i, to);
    for (int64_t j = n; j < row; ++j) to[j] = 0.f;
    if (!p.gain) continue;
    const float factor = normalize(to, n, p.eps, scaled ? p.gain : nullptr, p.offset);
    if (r) r[i] = factor;
  }
}

// Writes linear(norm(patches)) of a tile to `y`, with rows of p.outputs.
template <typename T>
void project(const Projection& p, const void* x, int64_t image, int64_t token, int64_t rows,
             float* tile, float* buffer, float* y) {
  const int64_t n = p.split.patch(), row = padded(n);
  patches<T>(p, x, image, token, rows, true, tile, nullptr);
  using E = Element<T>;
  product<E>(rows, p.outputs, n, left_of<E>(tile, row, rows, n, buffer), packed<E>(p.weight, n),
             p.bias, 0, y, p.outputs);
}

// to[i] += from[i]
inline void add_run(const float* from, int64_t n, float* to) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(to + i, load(to + i) + load(from + i));
  for (; i < n; ++i) to[i] += from[i];
}

// Sums of the columns of a tile.
inline void add_columns(const float* tile, int64_t row, int64_t rows, int64_t columns, float* to) {
  for (int64_t j = 0; j < columns; j += kLanes) {
    Vec sums{};
    for (int64_t i = 0; i < rows; ++i) sums += load(tile + i * row + j);
    store(to + j, load(to + j) + sums);
  }
}

// Adds the gradient of a patch to the band of pixel rows that begins at `start`.
inline void scatter(const Split& s, int64_t token, const float* from, float* band, int64_t start,
                    int64_t band_rows) {
  const int64_t y = s.band_start(token / s.columns), x = s.band_start(token % s.columns);
  const Span ys(y, s.kernel, s.height), xs(x, s.kernel, s.width);
  const int64_t inside = xs.end - xs.begin;
  for (int64_t ky = ys.begin; ky < ys.end; ++ky) {
    const int64_t pixel = (y + ky - start) * s.width + x + xs.begin;
    if (s.by_tap) {
      add_run(from + (ky * s.kernel + xs.begin) * s.channels, inside * s.channels,
              band + pixel * s.channels);
    } else {
      for (int64_t c = 0; c < s.channels; ++c) {
        add_run(from + (c * s.kernel + ky) * s.kernel + xs.begin, inside,
                band + c * band_rows * s.width + pixel);
      }
    }
  }
}

// Work memory of `project` and `project_backward`.
struct ProjectionBuffers {
  float *tile, *buffer, *grad_buffer, *grad_tile;

  ProjectionBuffers(const Projection& p, Arena& arena)
      : tile(arena.tile(padded(p.split.patch()))),
        buffer(arena.tile(padded(p.split.patch()))),
        grad_buffer(arena.tile(p.outputs)),
        grad_tile(p.weight_t ? arena.tile(padded(p.split.patch())) : nullptr) {}
};

// Adds a tile's gradient of the weight and, unless `band` is null, its gradient of the map.
// `grad` is the gradient of the projection's result, with rows of p.outputs.
template <typename T>
void project_backward(const Projection& p, const void* x, int64_t image, int64_t token,
                      int64_t rows, const float* grad, ProjectionSums sums, float* band,
                      int64_t band_start, int64_t band_rows, ProjectionBuffers& memory) {
  using E = Element<T>;
  const int64_t n = p.split.patch(), row = padded(n), outputs = p.outputs;
  float r[kTile] = {};
  patches<T>(p, x, image, token, rows, false, memory.tile, r);
  add_columns(grad, outputs, rows, outputs, sums.bias);
  const E* left = paired<E>(memory.tile, row, rows, memory.buffer);
  const E* right = paired<E>(grad, outputs, rows, memory.grad_buffer);
  product<E>(n, outputs, rows, left_of_pairs(left, row), right_of_pairs(right, outputs),
             sums.weight, outputs, sums.weight, outputs);
  if (band == nullptr) return;
  product<E>(rows, row, outputs, left_of<E>(grad, outputs, rows, outputs, memory.grad_buffer),
             packed<E>(p.weight_t, outputs), nullptr, 0, memory.grad_tile, row);
  for (int64_t i = 0; i < rows; ++i) {
    float* g = memory.grad_tile + i * row;
    if (p.gain) {
      for (int64_t j = 0; j < row; j += kLanes) store(g + j, load(g + j) * load(p.gain + j));
      normalize_backward(memory.tile + i * row, r[i], n, g);
    }
    scatter(p.split, token + i, g, band, band_start, band_rows);
  }
}

// --- rows of tensors ---

// Loads `rows` tokens of n channels as rows of padded(n) floats, with zeros after n.
template <typename T>
void load_rows(const Rows& from, int64_t token, int64_t rows, int64_t n, float* to, int64_t row) {
  for (int64_t i = 0; i < rows; ++i) {
    const T* p = static_cast<const T*>(from.p) + (token + i) * from.token;
    if (from.channel == 1) {
      for (int64_t j = 0; j < row; j += kLanes) {
        store(to + i * row + j, j + kLanes <= n ? load(p + j)
                                : j < n         ? load_first(p + j, n - j)
                                                : Vec{});
      }
    } else {
      for (int64_t j = 0; j < row; ++j)
        to[i * row + j] = j < n ? load_one(p + j * from.channel) : 0.f;
    }
  }
}

// Stores rows of floats as tokens of n adjacent channels.
template <typename T>
void store_rows(const float* from, int64_t row, int64_t rows, int64_t n, const Rows& to,
                int64_t token) {
  for (int64_t i = 0; i < rows; ++i) {
    T* p = static_cast<T*>(to.p) + (token + i) * to.token;
    int64_t j = 0;
    for (; j + kLanes <= n; j += kLanes) store(p + j, load(from + i * row + j));
    if (j < n) store_first(p + j, load(from + i * row + j), n - j);
  }
}

}  // namespace
}  // namespace t2t
