// Soft split, LayerNorm and Linear on CUDA, for half types: an implicit matrix product over
// patches.
//
// Forward, in projection.cuh: a warp gathers 16 tokens into its registers, computes mean and
// variance, normalises them and multiplies them by the weight. Tokens are never written to memory.
// Backward, in projection_gradient.cuh: the gradient of the weight as sums over the tokens in
// registers, that of the map as a gather by its pixels.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <limits>

#include "projection_gradient.cuh"
#include "soft_split_linear.h"

namespace t2t {
namespace {

using torch::stable::Tensor;

constexpr const char* kName = "soft_split_linear";

// The map of a call whose sizes the kernels take: `why_not_projected` in
// t2t_kernels/soft_split_linear/ops.py says the same of all but the number of tokens and pixels.
Geometry geometry_of(const Tensor& x, const Tensor& weight, int64_t kernel_size, int64_t stride,
                     int64_t padding) {
  check_dims(kName, "x", x, 4, "4 dimensions (B, C, H, W)");
  check_dims(kName, "weight", weight, 2, "a matrix (O, C*k*k)");
  const Geometry map = make_geometry(kName, x.size(0), x.size(1), x.size(2), x.size(3), kernel_size,
                                     stride, padding);
  const bool taken = takes_taps(map) || takes_rows(map);
  T2T_CHECK(taken && map.stride <= kMostStride && weight.size(0) % 8 == 0, kName,
            ": no kernel for this map and weight: got ", map.channels, " channels, kernel_size ",
            map.kernel, ", stride ", map.stride, " and ", weight.size(0),
            " outputs, expected a multiple of 64 channels, or kernel_size up ",
            "to 8 and channels * kernel_size up to 28; stride up to ", kMostStride,
            "; a multiple of 8 outputs");
  // Counted in 32 bits, those of a last round beyond the last included.
  constexpr int64_t kMost = int64_t(1) << 30;
  T2T_CHECK(
      map.batch * map.rows * map.columns <= kMost && map.batch * map.height * map.width <= kMost,
      kName, ": x: got ", map.batch, " maps of ", map.height, "x", map.width,
      ", expected at most 2^30 tokens and pixels in all; split the batch");
  return map;
}

// A contiguous parameter of the expected shape and dtype, so that kernels do not read out of
// bounds.
Tensor checked(const char* argument, const Tensor& tensor, std::initializer_list<int64_t> shape,
               const Tensor& like) {
  check_tensor(kName, argument, tensor, shape, like.scalar_type());
  return torch::stable::contiguous(tensor);
}

}  // namespace

Projected project(Tensor x, Tensor weight, std::optional<Tensor> bias,
                  std::optional<Tensor> norm_weight, std::optional<Tensor> norm_bias,
                  int64_t kernel_size, int64_t stride, int64_t padding, double eps, bool moments) {
  const Geometry map = geometry_of(x, weight, kernel_size, stride, padding);
  const int64_t width = map.token_width(), tokens = int64_t(map.rows) * map.columns;
  check_norm(kName, norm_weight, norm_bias);
  const DeviceScope device(x);
  const int64_t outputs = weight.size(0);
  weight = checked("weight", weight, {outputs, width}, x);
  if (bias) bias = checked("bias", *bias, {outputs}, x);
  if (norm_weight) {
    norm_weight = checked("norm_weight", *norm_weight, {width}, x);
    norm_bias = checked("norm_bias", *norm_bias, {width}, x);
  }
  Projected result = {torch::stable::new_empty(x, {map.batch, tokens, outputs}), {}, {}};
  if (result.y.numel() == 0) return result;
  with_half_type(kName, "x", x.scalar_type(), [&](auto zero) {
    Projection<decltype(zero)> projection(map, x, weight, bias ? bias->const_data_ptr() : nullptr,
                                          norm_weight ? norm_weight->const_data_ptr() : nullptr,
                                          norm_bias ? norm_bias->const_data_ptr() : nullptr,
                                          float(eps), device);
    float2* to = nullptr;
    if (moments && norm_weight) {
      result.moments = new_floats(x, map.batch * tokens * 2);
      result.constants = projection.constants();
      to = static_cast<float2*>(result.moments->mutable_data_ptr());
    }
    projection(result.y, to, device);
  });
  return result;
}

std::pair<int64_t, int64_t> tokens_of(const Tensor& x, const Tensor& weight, int64_t kernel_size,
                                      int64_t stride, int64_t padding) {
  const Geometry map = geometry_of(x, weight, kernel_size, stride, padding);
  return {map.batch, int64_t(map.rows) * map.columns};
}

void project_into(const Tensor& x, const Tensor& weight, const Tensor& norm_weight,
                  const Tensor& norm_bias, int64_t kernel_size, int64_t stride, int64_t padding,
                  double eps, const Tensor (&sections)[3]) {
  const Geometry map = geometry_of(x, weight, kernel_size, stride, padding);
  const int64_t width = map.token_width();
  const DeviceScope device(x);
  const Tensor w = checked("weight", weight, {3 * kWidest, width}, x);
  const Tensor gain = checked("norm_weight", norm_weight, {width}, x);
  const Tensor offset = checked("norm_bias", norm_bias, {width}, x);
  with_half_type(kName, "x", x.scalar_type(), [&](auto zero) {
    Projection<decltype(zero)> projection(map, x, w, nullptr, gain.const_data_ptr(),
                                          offset.const_data_ptr(), float(eps), device);
    projection(sections, device);
  });
}

Tensor soft_split_linear(Tensor x, Tensor weight, std::optional<Tensor> bias,
                         std::optional<Tensor> norm_weight, std::optional<Tensor> norm_bias,
                         int64_t kernel_size, int64_t stride, int64_t padding, double eps) {
  return project(x, weight, bias, norm_weight, norm_bias, kernel_size, stride, padding, eps, false)
      .y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> soft_split_linear_backward(
    Tensor grad, Tensor x, Tensor weight, std::optional<Tensor> norm_weight,
    std::optional<Tensor> norm_bias, int64_t kernel_size, int64_t stride, int64_t padding,
    double eps, bool need_x, const Projected* known) {
  const Geometry map = geometry_of(x, weight, kernel_size, stride, padding);
  const int64_t width = map.token_width(), tokens = int64_t(map.rows) * map.columns;
  check_norm(kName, norm_weight, norm_bias);
  const DeviceScope device(x);
  const int64_t outputs = weight.size(0);
  weight = checked("weight", weight, {outputs, width}, x);
  grad = checked("grad", grad, {map.batch, tokens, outputs}, x);
  // Its rows are read 16 bytes at a time.
  if (reinterpret_cast<uintptr_t>(grad.const_data_ptr()) % 16 != 0) {
    grad = torch::stable::clone(grad);
  }
  if (norm_weight) {
    norm_weight = checked("norm_weight", *norm_weight, {width}, x);
    norm_bias = checked("norm_bias", *norm_bias, {width}, x);
  }
  const bool channels_last = x.stride(1) == 1 && map.channels > 1;
  Tensor grad_x =
      need_x ? torch::stable::empty({map.batch, map.channels, map.height, map.width},
                                    x.scalar_type(), std::nullopt, x.device(), std::nullopt,
                                    channels_last ? torch::headeronly::MemoryFormat::ChannelsLast
                                                  : torch::headeronly::MemoryFormat::Contiguous)
             : torch::stable::new_empty(x, {0});
  Tensor grad_weight = torch::stable::new_empty(x, {outputs, width});
  Tensor grad_bias = torch::stable::new_empty(x, {outputs});
  Tensor grad_gain = torch::stable::new_empty(x, {norm_weight ? width : 0});
  Tensor grad_offset = torch::stable::new_empty(x, {norm_weight ? width : 0});
  with_half_type(kName, "x", x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const bool normalized = norm_weight && grad.numel() > 0;
    std::optional<Projected> own;
    if (normalized && (known == nullptr || !known->moments)) {
      own = project(x, weight, std::nullopt, norm_weight, norm_bias, kernel_size, stride, padding,
                    eps, true);
      known = &*own;
    }
    const auto* moments =
        normalized ? static_cast<const float2*>(known->moments->const_data_ptr()) : nullptr;
    WeightSumsParams s = {};
    s.outputs = static_cast<int>(outputs);
    s.weight = weight.const_data_ptr();
    s.gain = norm_weight ? norm_weight->const_data_ptr() : nullptr;
    s.offset = norm_weight ? norm_bias->const_data_ptr() : nullptr;
    s.grad_weight = grad_weight.mutable_data_ptr();
    s.grad_bias = grad_bias.mutable_data_ptr();
    s.grad_gain = grad_gain.mutable_data_ptr();
    s.grad_offset = grad_offset.mutable_data_ptr();
    weight_gradients<T>(map, x, grad, moments, s, device);
    if (!need_x || map.batch == 0) return;
    map_gradient<T>(map, x, grad, weight, s.gain, normalized ? known->y.const_data_ptr() : nullptr,
                    moments, normalized ? floats_of(*known->constants) : nullptr, grad_x, device);
  });
  return {grad_x, grad_weight, grad_bias, grad_gain, grad_offset};
}

namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(Tensor grad, Tensor x, Tensor weight,
                                                            std::optional<Tensor> norm_weight,
                                                            std::optional<Tensor> norm_bias,
                                                            int64_t kernel_size, int64_t stride,
                                                            int64_t padding, double eps,
                                                            bool need_x) {
  return soft_split_linear_backward(grad, x, weight, norm_weight, norm_bias, kernel_size, stride,
                                    padding, eps, need_x, nullptr);
}

STABLE_TORCH_LIBRARY_IMPL(t2t_cuda, T2T_DISPATCH_KEY, m) {
  m.impl("soft_split_linear", TORCH_BOX(&soft_split_linear));
  m.impl("soft_split_linear_backward", TORCH_BOX(&backward));
}

}  // namespace

}  // namespace t2t
