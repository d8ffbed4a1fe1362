// The backward of soft split + LayerNorm + Linear, the last part of a layer's backward.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <utility>

namespace t2t {

// The forward, with results that its backward would otherwise recompute (only with a norm): mean
// and 1/σ of every token, and the constants of the norm for each output.
struct Projected {
  torch::stable::Tensor y;
  std::optional<torch::stable::Tensor> moments, constants;
};
Projected project(torch::stable::Tensor x, torch::stable::Tensor weight,
                  std::optional<torch::stable::Tensor> bias,
                  std::optional<torch::stable::Tensor> norm_weight,
                  std::optional<torch::stable::Tensor> norm_bias, int64_t kernel_size,
                  int64_t stride, int64_t padding, double eps, bool moments);

// The same of 192 outputs, 64 to each of three contiguous tensors (B, T, 64).
void project_into(const torch::stable::Tensor& x, const torch::stable::Tensor& weight,
                  const torch::stable::Tensor& norm_weight, const torch::stable::Tensor& norm_bias,
                  int64_t kernel_size, int64_t stride, int64_t padding, double eps,
                  const torch::stable::Tensor (&sections)[3]);

// Images and tokens of an image.
std::pair<int64_t, int64_t> tokens_of(const torch::stable::Tensor& x,
                                      const torch::stable::Tensor& weight, int64_t kernel_size,
                                      int64_t stride, int64_t padding);

// y (B, T, outputs).
torch::stable::Tensor soft_split_linear(torch::stable::Tensor x, torch::stable::Tensor weight,
                                        std::optional<torch::stable::Tensor> bias,
                                        std::optional<torch::stable::Tensor> norm_weight,
                                        std::optional<torch::stable::Tensor> norm_bias,
                                        int64_t kernel_size, int64_t stride, int64_t padding,
                                        double eps);

// Gradients of the map (empty unless `need_x`), weight, bias, and the norm's parameters (empty
// without a norm) from that of the result. `known` may be null.
std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor,
           torch::stable::Tensor, torch::stable::Tensor>
soft_split_linear_backward(torch::stable::Tensor grad, torch::stable::Tensor x,
                           torch::stable::Tensor weight,
                           std::optional<torch::stable::Tensor> norm_weight,
                           std::optional<torch::stable::Tensor> norm_bias, int64_t kernel_size,
                           int64_t stride, int64_t padding, double eps, bool need_x,
                           const Projected* known);

}  // namespace t2t
