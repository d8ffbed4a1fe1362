// Softmax attention on CUDA: see softmax.cuh.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <tuple>

#include "softmax.cuh"

namespace t2t {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr const char* kName = "token_attention";

struct ForwardParams {
  SoftmaxInputs in;
  void* y;
  float *attended, *maximum, *normalizer;
};

template <typename T>
__global__ void __launch_bounds__(kForwardWarps* kLanes, kForwardBlocks)
    softmax_kernel(const ForwardParams p) {
  const ForwardBlock<T> block(p.in);
  const StagedRows rows = attend<T>(p.in, block, p.maximum, p.normalizer);
  rows.store(static_cast<T*>(p.y), kWidest, block);
  rows.store(p.attended, kWidest, block);
}

void check(const Tensor& q, const Tensor& k, const Tensor& v) {
  check_values(kName, v, kWidest);
  check_tensor(kName, "q", q, {v.size(0), v.size(1), kWidest}, v.scalar_type());
  check_tensor(kName, "k", k, {v.size(0), v.size(1), kWidest}, v.scalar_type());
}

Tensor new_statistic(const Tensor& v) {
  return torch::stable::new_empty(v, {v.size(0), v.size(1)}, ScalarType::Float);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> token_attention(Tensor q, Tensor k, Tensor v,
                                                           double scale) {
  check(q, k, v);
  const DeviceScope device(v);
  const int64_t images = v.size(0), tokens = v.size(1);
  Tensor y = torch::stable::new_empty(v, {images, tokens, kWidest});
  Tensor attended = torch::stable::new_empty(v, {images, tokens, kWidest}, ScalarType::Float);
  Tensor maximum = new_statistic(v), normalizer = new_statistic(v);
  if (images == 0) return {y, attended, maximum, normalizer};
  with_half_type(kName, "v", v.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    q = vector_rows<T>(q);
    k = vector_rows<T>(k);
    v = vector_rows<T>(v);
    const ForwardParams params = {softmax_inputs<T>(q, k, v, scale), y.mutable_data_ptr(),
                                  floats_of(attended), floats_of(maximum), floats_of(normalizer)};
    launch_softmax<ForwardBlock<T>>(device, "token_attention", softmax_kernel<T>, images, params);
  });
  return {y, attended, maximum, normalizer};
}

std::tuple<Tensor, Tensor, Tensor> token_attention_backward(Tensor grad, Tensor q, Tensor k,
                                                            Tensor v, Tensor attended,
                                                            Tensor maximum, Tensor normalizer,
                                                            double scale) {
  check(q, k, v);
  const DeviceScope device(v);
  const int64_t images = v.size(0), tokens = v.size(1);
  check_tensor(kName, "grad", grad, {images, tokens, kWidest}, v.scalar_type());
  check_tensor(kName, "attended", attended, {images, tokens, kWidest}, ScalarType::Float);
  check_tensor(kName, "maximum", maximum, {images, tokens}, ScalarType::Float);
  check_tensor(kName, "normalizer", normalizer, {images, tokens}, ScalarType::Float);
  const auto rows = [&] { return torch::stable::new_empty(v, {images, tokens, kWidest}); };
  Tensor grad_q = rows(), grad_k = rows(), grad_v = rows();
  if (images == 0) return {grad_q, grad_k, grad_v};
  attended = torch::stable::contiguous(attended);
  maximum = torch::stable::contiguous(maximum);
  normalizer = torch::stable::contiguous(normalizer);
  const Tensor shifts = new_shifts(v, images, tokens);
  with_half_type(kName, "v", v.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    q = vector_rows<T>(q);
    k = vector_rows<T>(k);
    v = vector_rows<T>(v);
    grad = vector_rows<T>(grad);
    const SoftmaxBackwardParams params = {softmax_inputs<T>(q, k, v, scale),
                                          rows_of<T>(grad),
                                          floats_of(attended),
                                          floats_of(maximum),
                                          floats_of(normalizer),
                                          shifts_of(shifts),
                                          grad_q.mutable_data_ptr(),
                                          grad_k.mutable_data_ptr(),
                                          grad_v.mutable_data_ptr(),
                                          kWidest,
                                          false};
    launch_softmax_backward<T>(device, images, params);
  });
  return {grad_q, grad_k, grad_v};
}

STABLE_TORCH_LIBRARY_IMPL(t2t_cuda, T2T_DISPATCH_KEY, m) {
  m.impl("token_attention", TORCH_BOX(&token_attention));
  m.impl("token_attention_backward", TORCH_BOX(&token_attention_backward));
}

}  // namespace
}  // namespace t2t
