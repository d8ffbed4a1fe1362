// What the T2T layers have in common besides their tail: soft split, norm and projection to k, q
// and v of 16 tokens a warp, and what both directions of an operator check and pack.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <vector>

#include "pack.cuh"
#include "patches.cuh"
#include "tail.cuh"

namespace t2t {

// From patches to k, q and v: sections in the order of the weight, which differs between layers.
struct Projection {
  Patches patches;
  Norm norm;
  const void *packed, *bias;        // a bias may be null
  int depth, chunk, embed, groups;  // groups of a section
  int tokens, tiles;                // of an image
  int64_t images;
};

// Sections of tokens first … of an image, float32, zero beyond the image and the section.
template <typename T, int kSections>
__device__ void project(const Projection& p, void* shared, int64_t image, int first,
                        const int (&sections)[kSections], Wide (&to)[kSections]) {
  TokenTile<T> tile(shared, p.chunk);
  tile.start(p.patches, true, p.norm.eps, image * p.tokens + first);
#pragma unroll
  for (int i = 0; i < kSections; ++i) to[i].clear();
  const int64_t group_stride = int64_t(p.depth) * kGroup;
  for (int at = 0; at < p.depth; at += p.chunk) {
    tile.ready(p.patches, true, p.norm, at, false);
#pragma unroll
    for (int i = 0; i < kSections; ++i) {
      multiply(to[i], tile.elements, tile.pitch,
               static_cast<const T*>(p.packed) + sections[i] * p.groups * group_stride +
                   int64_t(at) * kGroup,
               group_stride, tile.columns(p.patches, at), p.groups);
    }
  }
#pragma unroll
  for (int i = 0; i < kSections; ++i) {
#pragma unroll
    for (int j = 0; j < 2 * kWidestGroups; ++j) {
      const int column = sum_column(j / 2);
      const int count = first + sum_row(j % 2) < p.tokens ? p.embed - column : 0;
      float bias[8] = {};
      if (p.bias) {
        load_eight(bias, static_cast<const T*>(p.bias) + sections[i] * p.embed + column, count,
                   false);
      }
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        float& value = to[i].at[j / 2][j % 2][e];
        value = e < count ? value + bias[e] : 0.f;
      }
    }
  }
  // The tile is done with, and its place may be used.
  __syncwarp();
}

// Everything that both directions need, checked and packed. It owns the packed forms.
class Layer {
 public:
  Layer(const char* name, const torch::stable::Tensor& x, const torch::stable::Tensor& norm_weight,
        const torch::stable::Tensor& norm_bias, const torch::stable::Tensor& weight,
        const std::optional<torch::stable::Tensor>& bias, const TailTensors& tail,
        int64_t kernel_size, int64_t stride, int64_t padding, bool backward)
      : name_(name), dtype_(x.scalar_type()), device_(x) {
    STD_TORCH_CHECK(x.dim() == 4, name, ": x must have 4 dimensions, got ", x.dim());
    map_ = make_geometry(name, x.size(0), x.size(1), x.size(2), x.size(3), kernel_size, stride,
                         padding);
    const int64_t width = map_.token_width();
    const int64_t embed = tail.proj_weight.dim() == 2 ? tail.proj_weight.size(0) : 0;
    const int64_t hidden = tail.mlp_in_weight.dim() == 2 ? tail.mlp_in_weight.size(0) : 0;
    STD_TORCH_CHECK(embed >= 1 && embed <= kWidest && hidden >= 1 && hidden <= kWidest, name,
                    ": expected E and M from 1 to ", kWidest, ", got ", embed, " and ", hidden);
    STD_TORCH_CHECK(map_.batch * map_.rows * map_.columns <= std::numeric_limits<int>::max(), name,
                    ": more than 2^31 tokens");
    const auto checked = [&](const char* argument, const torch::stable::Tensor& tensor,
                             std::initializer_list<int64_t> shape) -> const void* {
      bool same = tensor.dim() == static_cast<int64_t>(shape.size()) &&
                  tensor.scalar_type() == x.scalar_type();
      int64_t i = 0;
      for (int64_t size : shape) same = same && tensor.size(i++) == size;
      STD_TORCH_CHECK(same, name, ": ", argument, " has the wrong shape or dtype");
      kept_.push_back(torch::stable::contiguous(tensor));
      return kept_.back().const_data_ptr();
    };
    projection.norm = {checked("norm1_weight", norm_weight, {width}),
                       checked("norm1_bias", norm_bias, {width}), kNormEps};
    const void* sections = checked("the projection's weight", weight, {3 * embed, width});
    if (bias) projection.bias = checked("the projection's bias", *bias, {3 * embed});
    projection.embed = static_cast<int>(embed);
    projection.groups = static_cast<int>(divide_up(embed, kGroup));
    projection.depth = static_cast<int>(divide_up(width, 16) * 16);
    projection.images = map_.batch;
    projection.tokens = map_.rows * map_.columns;
    projection.tiles = static_cast<int>(divide_up(projection.tokens, kRows));
    this->tail.embed = static_cast<int>(embed);
    this->tail.hidden = static_cast<int>(hidden);
    this->tail.proj_bias = checked("proj_bias", tail.proj_bias, {embed});
    this->tail.norm_gain = checked("norm2_weight", tail.norm_weight, {embed});
    this->tail.norm_offset = checked("norm2_bias", tail.norm_bias, {embed});
    this->tail.mlp_in_bias = checked("mlp_in_bias", tail.mlp_in_bias, {hidden});
    this->tail.mlp_out_bias = checked("mlp_out_bias", tail.mlp_out_bias, {embed});
    const void* proj = checked("proj_weight", tail.proj_weight, {embed, embed});
    const void* mlp_in = checked("mlp_in_weight", tail.mlp_in_weight, {hidden, embed});
    const void* mlp_out = checked("mlp_out_weight", tail.mlp_out_weight, {embed, hidden});
    if (map_.batch == 0) return;
    with_element_type(name, x.scalar_type(), [&](auto zero) {
      using T = decltype(zero);
      projection.patches = make_patches<T>(map_, x);
      projection.packed = packed_sections(x, sections);
      this->tail.proj = packed_linear(x, proj, embed, embed, false);
      this->tail.mlp_in = packed_linear(x, mlp_in, hidden, embed, false);
      this->tail.mlp_out = packed_linear(x, mlp_out, embed, hidden, false);
      if (backward) {
        this->tail.proj_t = packed_linear(x, proj, embed, embed, true);
        this->tail.mlp_in_t = packed_linear(x, mlp_in, hidden, embed, true);
        this->tail.mlp_out_t = packed_linear(x, mlp_out, embed, hidden, true);
      }
      launch_pack<T>(packings_, 1, device_);
    });
  }

  const DeviceScope& device() const { return device_; }

  // The gradient of the layer's result; a kernel would read beyond any other.
  void check_gradient(const torch::stable::Tensor& grad) const {
    STD_TORCH_CHECK(grad.dim() == 3 && grad.size(0) == projection.images &&
                        grad.size(1) == projection.tokens && grad.size(2) == projection.embed &&
                        grad.scalar_type() == dtype_,
                    name_, ": grad has the wrong shape or dtype");
  }

  // The tail's backward of it; from a token to the next of `grad_y` and `grad_v` are so many
  // elements. Its `warp_bytes` are the caller's to choose.
  template <typename T>
  TailBackward tail_backward_of(const torch::stable::Tensor& grad, const TailSlots& slots,
                                void* grad_y, int64_t y_stride, void* grad_v,
                                int64_t v_stride) const {
    TailBackward p = {};
    p.tail = tail;
    p.images = projection.images;
    p.tokens = projection.tokens;
    p.grad = rows_of<T>(grad);
    p.grad_y = grad_y;
    p.grad_v = grad_v;
    p.y_stride = static_cast<int>(y_stride);
    p.v_stride = static_cast<int>(v_stride);
    p.slots = slots.floats();
    return p;
  }

  // The projection with a chunk such that `warps` warps, each of at least `least` bytes, fit beside
  // `fixed` bytes. Fewer warps are better than chunks, if there may be fewer.
  template <typename T>
  Projection in_shared(int& warps, int least, int fixed, int& warp_bytes, bool fewer) const {
    Projection result = projection;
    result.chunk = projection.depth;
    const auto bytes = [&] { return std::max<int>(least, TokenTile<T>::bytes(result.chunk)); };
    // Two blocks of a multiprocessor with 164 KiB, one where it has 100 KiB.
    const int most = fewer ? 48 * 1024 : 80 * 1024;
    const int all = warps;
    while (fewer && warps > 1 && warps * bytes() > most) warps /= 2;
    if (fixed + warps * int64_t(bytes()) > most) {
      warps = all;
      while (fixed + warps * int64_t(bytes()) > most && result.chunk > 16) {
        result.chunk = static_cast<int>(divide_up(result.chunk, 32) * 16);
      }
    }
    warp_bytes = bytes();
    return result;
  }

  Projection projection = {};
  Tail tail = {};

 private:
  const void* packed_sections(const torch::stable::Tensor& like, const void* weight) {
    const Patches& patches = projection.patches;
    Packing p = {};
    p.from = weight;
    p.depth = patches.width();
    p.columns = 3 * projection.embed;
    p.section = projection.embed;
    p.column_stride = patches.width();
    p.inner = patches.by_tap ? map_.channels : std::max(1, p.depth);
    p.outer_stride = 1;
    p.inner_stride = patches.by_tap ? map_.kernel * map_.kernel : 1;
    p.groups_per_section = projection.groups;
    p.groups = 3 * projection.groups;
    return packed(like, p);
  }
  // The weight (outputs × inputs) of a linear map as inputs × outputs, or as it is.
  const void* packed_linear(const torch::stable::Tensor& like, const void* weight, int64_t outputs,
                            int64_t inputs, bool transposed) {
    Packing p = {};
    p.from = weight;
    p.depth = static_cast<int>(transposed ? outputs : inputs);
    p.columns = p.section = static_cast<int>(transposed ? inputs : outputs);
    p.inner = 1;
    p.outer_stride = transposed ? inputs : 1;
    p.column_stride = transposed ? 1 : inputs;
    p.groups = p.groups_per_section = static_cast<int>(divide_up(p.columns, kGroup));
    return packed(like, p);
  }
  const void* packed(const torch::stable::Tensor& like, Packing p) {
    kept_.push_back(torch::stable::new_empty(like, {packed_size(p.depth, p.groups)}));
    p.to = kept_.back().mutable_data_ptr();
    packings_.push_back(p);
    return p.to;
  }

  const char* name_;
  torch::headeronly::ScalarType dtype_;
  DeviceScope device_;
  Geometry map_ = {};
  std::vector<torch::stable::Tensor> kept_;
  std::vector<Packing> packings_;
};

}  // namespace t2t
