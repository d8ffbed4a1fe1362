// Shared by the operators of the fused kernels: conversion of tensors to the kernels' arguments,
// memory, and the division of a backward into chunks.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <memory>
#include <new>
#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "../cuda/checks.h"
#include "isa.h"

namespace t2t {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// 64-byte aligned memory.
class Memory {
 public:
  explicit Memory(int64_t bytes) : p_(std::aligned_alloc(64, (bytes + 127) / 64 * 64)) {
    if (!p_) throw std::bad_alloc();
  }
  static Memory floats(int64_t n) { return Memory(n * 4); }
  static Memory zeros(int64_t n) {
    Memory memory(n * 4);
    std::memset(memory.get(), 0, n * 4);
    return memory;
  }
  void* get() const { return p_.get(); }
  float* floats() const { return static_cast<float*>(p_.get()); }

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<void, Free> p_;
};

inline const TypedKernels& typed_kernels(const char* name, const char* argument, const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return kernels().of_float;
    case ScalarType::BFloat16: return kernels().of_bf16;
    case ScalarType::Half: return kernels().of_half;
    default:
      T2T_CHECK(false, name, ": ", argument, ": got ", dtype_name(x.scalar_type()),
                ", expected float32, bfloat16 or float16");
  }
}

// A parameter as contiguous floats.
inline Tensor as_floats(const Tensor& tensor) {
  return torch::stable::contiguous(torch::stable::to(tensor, ScalarType::Float));
}
inline const float* floats_of(const Tensor& tensor) {
  return static_cast<const float*>(tensor.const_data_ptr());
}
inline float* mutable_floats_of(const Tensor& tensor) {
  return static_cast<float*>(tensor.mutable_data_ptr());
}
inline Tensor new_floats(const Tensor& like, std::initializer_list<int64_t> shape) {
  return torch::stable::new_empty(like, shape, ScalarType::Float);
}

// Checks the sizes of a soft split. Within the bounds, products of two sizes do not overflow.
inline void check_split(const char* name, int64_t channels, int64_t height, int64_t width,
                        int64_t kernel, int64_t stride, int64_t padding) {
  constexpr int64_t largest = std::numeric_limits<int32_t>::max();
  constexpr int64_t largest_step = std::numeric_limits<int16_t>::max();
  T2T_CHECK(kernel >= 1 && kernel <= largest_step && stride >= 1 && stride <= largest_step &&
                padding >= 0 && padding <= largest_step,
            name, ": got kernel_size ", kernel, ", stride ", stride, " and padding ", padding,
            ", expected kernel_size and stride from 1, padding from 0, and each up to ",
            largest_step);
  T2T_CHECK(channels <= largest / (kernel * kernel) && height <= largest && width <= largest, name,
            ": x: got ", channels, " channels of ", height, "x", width, ", expected at most ",
            largest / (kernel * kernel), " channels and ", largest, " in each direction");
  check_kernel_fits(name, height, width, kernel, padding);
}

inline Split make_split(const char* name, const Tensor& x, int64_t kernel, int64_t stride,
                        int64_t padding) {
  check_dims(name, "x", x, 4, "4 dimensions (B, C, H, W)");
  const int64_t height = x.size(2), width = x.size(3);
  check_split(name, x.size(1), height, width, kernel, stride, padding);
  return {x.size(0),
          x.size(1),
          height,
          width,
          {x.stride(0), x.stride(1), x.stride(2), x.stride(3)},
          (height + 2 * padding - kernel) / stride + 1,
          (width + 2 * padding - kernel) / stride + 1,
          kernel,
          stride,
          padding,
          x.stride(1) == 1 && x.size(1) > 1};
}

// For each place of a patch in the kernels' order, the element of a token.
inline std::vector<int64_t> patch_order(const Split& s) {
  std::vector<int64_t> order(s.patch());
  const int64_t area = s.kernel * s.kernel;
  for (int64_t j = 0; j < s.patch(); ++j) {
    order[j] = s.by_tap ? j % s.channels * area + j / s.channels : j;
  }
  return order;
}

// Offsets of `groups` groups of n elements `stride` apart, each group padded with −1.
inline std::vector<int64_t> offsets(int64_t n, int64_t stride, int64_t groups = 1) {
  std::vector<int64_t> result(groups * padded(n), -1);
  for (int64_t g = 0; g < groups; ++g) {
    for (int64_t i = 0; i < n; ++i) result[g * padded(n) + i] = (g * n + i) * stride;
  }
  return result;
}
inline std::vector<int64_t> scaled(std::vector<int64_t> offsets, int64_t stride) {
  for (int64_t& offset : offsets) offset *= stride;
  return offsets;
}

// A vector in the order of `offsets`, with zeros for negative ones.
inline Memory gathered(const float* from, const std::vector<int64_t>& offsets) {
  const int64_t n = offsets.size();
  Memory memory = Memory::zeros(padded(n));
  for (int64_t i = 0; i < n; ++i) {
    if (offsets[i] >= 0) memory.floats()[i] = from[offsets[i]];
  }
  return memory;
}

// depth × columns, see TypedKernels::pack.
inline Memory packed(const TypedKernels& kernels, const float* from,
                     const std::vector<int64_t>& depth, const std::vector<int64_t>& columns) {
  Memory memory(kernels.packed_bytes(depth.size(), columns.size()));
  kernels.pack(from, depth.data(), depth.size(), columns.data(), columns.size(), memory.get());
  return memory;
}
// The weight (outputs × inputs) of a linear map as inputs × outputs, and as outputs × inputs.
inline Memory packed_linear(const TypedKernels& kernels, const Tensor& weight) {
  const int64_t outputs = weight.size(0), inputs = weight.size(1);
  std::vector<int64_t> depth = offsets(inputs, 1);
  depth.resize(inputs);
  return packed(kernels, floats_of(weight), depth, offsets(outputs, inputs));
}
inline Memory packed_linear_t(const TypedKernels& kernels, const Tensor& weight) {
  const int64_t outputs = weight.size(0), inputs = weight.size(1);
  std::vector<int64_t> depth = offsets(outputs, inputs);
  depth.resize(outputs);
  return packed(kernels, floats_of(weight), depth, offsets(inputs, 1));
}

// A projection's parameters in the kernels' layout. The outputs are `groups` equal groups, each
// padded.
class ProjectionParameters {
 public:
  ProjectionParameters(const TypedKernels& kernels, const Split& split, const Tensor& weight,
                       const std::optional<Tensor>& bias, const std::optional<Tensor>& norm_weight,
                       const std::optional<Tensor>& norm_bias, int64_t groups, float eps,
                       bool for_map_gradient)
      : order_(patch_order(split)),
        columns_(offsets(weight.size(0) / groups, 1, groups)),
        weight_(as_floats(weight)) {
    const int64_t n = split.patch();
    projection_ = {
        split,  static_cast<int64_t>(columns_.size()), nullptr, nullptr, eps, nullptr, nullptr,
        nullptr};
    projection_.weight = keep(packed(kernels, floats_of(weight_), order_, scaled_columns(n)));
    if (for_map_gradient) {
      std::vector<int64_t> columns = order_;
      columns.resize(padded(n), -1);
      projection_.weight_t = keep(packed(kernels, floats_of(weight_), scaled_columns(n), columns));
    }
    if (bias) projection_.bias = vector(*bias, columns_);
    if (norm_weight) {
      projection_.gain = vector(*norm_weight, order_);
      projection_.offset = vector(*norm_bias, order_);
    }
  }

  const Projection& projection() const { return projection_; }
  const std::vector<int64_t>& order() const { return order_; }
  const std::vector<int64_t>& columns() const { return columns_; }
  const Tensor& weight() const { return weight_; }

 private:
  const float* keep(Memory memory) {
    memory_.push_back(std::move(memory));
    return memory_.back().floats();
  }
  const float* vector(const Tensor& tensor, const std::vector<int64_t>& offsets) {
    return keep(gathered(floats_of(as_floats(tensor)), offsets));
  }
  std::vector<int64_t> scaled_columns(int64_t stride) const {
    std::vector<int64_t> result = columns_;
    for (int64_t& offset : result) offset = offset < 0 ? -1 : offset * stride;
    return result;
  }

  std::vector<int64_t> order_, columns_;
  Tensor weight_;
  std::vector<Memory> memory_;
  Projection projection_;
};

// The division of a backward. A chunk is some rows of tokens of one image. Sums over all tokens are
// partial sums in slots: the chunks of a slot are added in order, then the slots, so that the
// result does not depend on the number of threads. Images are processed in groups, which limits the
// memory; the images of a group use different slots.
struct Cut {
  int64_t rows, chunk_rows, chunks, sharing, group;

  Cut(const Split& s, int64_t threads) : rows(s.rows) {
    constexpr int64_t kChunkTokens = 512;
    // So that only neighbours have common pixel rows.
    const int64_t fewest = std::max<int64_t>(1, (s.kernel - 1) / s.stride);
    chunk_rows = std::max(fewest, (kChunkTokens + s.columns - 1) / s.columns);
    chunks = (rows + chunk_rows - 1) / chunk_rows;
    chunk_rows = std::max(fewest, (rows + chunks - 1) / chunks);
    chunks = (rows + chunk_rows - 1) / chunk_rows;
    // Enough slots for some cores; more only if they are a small part of the work.
    const int64_t tokens = s.batch * s.tokens();
    const int64_t slots =
        std::max({std::min<int64_t>(4, tokens / 128), std::min<int64_t>(16, tokens / 512),
                  std::min<int64_t>(64, tokens / 2048)});
    sharing = std::max<int64_t>(1, std::min(s.batch, slots / chunks));
    group = std::min(sharing, std::max<int64_t>(1, (8 * threads + chunks - 1) / chunks));
  }

  int64_t slots() const { return sharing * chunks; }
  int64_t slot(int64_t image, int64_t chunk) const { return image % sharing * chunks + chunk; }
  Range range(const Split& s, int64_t image, int64_t chunk) const {
    return {image, chunk * chunk_rows * s.columns,
            std::min(rows, (chunk + 1) * chunk_rows) * s.columns};
  }
  int64_t band_floats(const Split& s) const {
    return padded(s.band_rows(chunk_rows) * s.map_row());
  }
};

// One image of a (B, T, channels) tensor.
inline Rows rows_of(const Tensor& tensor, int64_t image) {
  const int64_t bytes = tensor.scalar_type() == ScalarType::Float ? 4 : 2;
  char* p = static_cast<char*>(const_cast<void*>(tensor.const_data_ptr()));
  return {p + image * tensor.stride(0) * bytes, tensor.stride(1), tensor.stride(2)};
}

// Calls f(item, scratch) for the items [0, n) in parallel; each thread has its own scratch memory.
template <typename F>
void parallel(int64_t n, int64_t scratch_bytes, const F& f) {
  torch::stable::parallel_for(0, n, 1, [&](int64_t first, int64_t last) {
    const Memory scratch(scratch_bytes);
    for (int64_t item = first; item < last; ++item) f(item, scratch.get());
  });
}

// Adds slots of `size` floats to the first one.
inline void add_slots(float* slots, int64_t count, int64_t size) {
  constexpr int64_t kBlock = 4096;
  torch::stable::parallel_for(0, (size + kBlock - 1) / kBlock, 1, [&](int64_t first, int64_t last) {
    const int64_t end = std::min(size, last * kBlock);
    for (int64_t i = 1; i < count; ++i) {
      const float* from = slots + i * size;
      for (int64_t j = first * kBlock; j < end; ++j) slots[j] += from[j];
    }
  });
}

// Random features in the kernels' layout.
class FeatureParameters {
 public:
  FeatureParameters(const Tensor& w, double eps)
      : w_(as_floats(w)),
        weight_(packed_linear(kernels().of_float, w_)),
        weight_t_(packed_linear_t(kernels().of_float, w_)),
        features_{w.size(0), w.size(1), weight_.get(), weight_t_.get(),
                  static_cast<float>(std::log(eps) + std::log(static_cast<double>(w.size(0))))} {}

  const Features& features() const { return features_; }

 private:
  Tensor w_;
  Memory weight_, weight_t_;
  Features features_;
};

// Sums over the keys (KeySums), or their gradients, for `count` chunks or images.
class KeySumsMemory {
 public:
  KeySumsMemory(const Features& w, int64_t count)
      : features_(padded(w.count)),
        size_(2 * features_ + w.count * padded(w.embed)),
        memory_(Memory::floats(count * size_)) {}

  KeySums operator[](int64_t i) const {
    float* p = memory_.floats() + i * size_;
    return {p, p + features_, p + 2 * features_};
  }

 private:
  int64_t features_, size_;
  Memory memory_;
};

// Merges the sums of an image's chunks in order.
void merge_key_sums(const Features& w, const KeySumsMemory& chunks, int64_t first, int64_t count,
                    const KeySums& to);
// Gradients of the sums are simply added.
void add_key_sums(const Features& w, const KeySumsMemory& chunks, int64_t first, int64_t count,
                  const KeySums& to);

// The sums of an image in the tensors that are saved for the backward.
struct SavedSums {
  Tensor maximum, normalizer, sums;  // (B, m), (B, m), (B, m, E)

  SavedSums(const Tensor& like, int64_t batch, const Features& w)
      : maximum(new_floats(like, {batch, w.count})),
        normalizer(new_floats(like, {batch, w.count})),
        sums(new_floats(like, {batch, w.count, w.embed})) {}
  SavedSums(const char* name, int64_t batch, const Features& w, const Tensor& maximum,
            const Tensor& normalizer, const Tensor& sums);

  void store(int64_t image, const Features& w, const KeySums& from) const;
  void load(int64_t image, const Features& w, const KeySums& to) const;
};

// The gradient of a map, channels-last if the map is; empty if it is not needed.
Tensor new_map_gradient(const Tensor& x, const Split& split, bool needed);
// Adds the consecutive bands of a group's chunks to the rows of the maps.
void gather_bands(const TypedKernels& kernels, const Split& split, const Cut& cut,
                  const float* bands, int64_t first_image, int64_t images, const Tensor& grad_x);

// The gradients of a projection's parameters, from the sums in the kernels' order.
struct ProjectionGradients {
  Tensor weight, bias, norm_weight, norm_bias;
};
ProjectionGradients projection_gradients(const ProjectionParameters& parameters,
                                         const ProjectionSums& sums, const Tensor& weight,
                                         const std::optional<Tensor>& norm_weight,
                                         const std::optional<Tensor>& norm_bias);

inline int64_t threads() { return torch::stable::get_num_threads(); }

// In the forward, an image's tokens are divided into chunks of a few tiles.
constexpr int64_t kForwardChunk = 192;
inline int64_t forward_chunks(int64_t tokens) {
  return (tokens + kForwardChunk - 1) / kForwardChunk;
}
inline Range forward_range(int64_t tokens, int64_t image, int64_t chunk) {
  return {image, chunk * kForwardChunk, std::min(tokens, (chunk + 1) * kForwardChunk)};
}

}  // namespace t2t
