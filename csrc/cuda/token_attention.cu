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
  float *attended, *maximum, *normalizer;  // no `attended` for float32
};

template <typename T>
__global__ void __launch_bounds__(kForwardWarps* kLanes) softmax_kernel(const ForwardParams p) {
  const Block<T, kForwardWarps> block(p.in);
  const StagedRows rows = attend<T>(p.in, block, p.maximum, p.normalizer);
  rows.store(static_cast<T*>(p.y), block.embed, block);
  if constexpr (!kExact<T>) rows.store(p.attended, block.embed, block);
}

void check(const Tensor& q, const Tensor& k, const Tensor& v) {
  check_alike(kName, v, {&q, &k});
  STD_TORCH_CHECK(v.size(1) >= 1 && v.size(2) >= 1 && v.size(2) <= kWidest, kName,
                  ": v must be (B, T, E) with E up to ", kWidest);
}

Tensor new_statistic(const Tensor& v) {
  return torch::stable::new_empty(v, {v.size(0), v.size(1)}, ScalarType::Float);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> token_attention(Tensor q, Tensor k, Tensor v,
                                                           double scale) {
  check(q, k, v);
  const DeviceScope device(v);
  const int64_t images = v.size(0), tokens = v.size(1), embed = v.size(2);
  const bool apart = v.scalar_type() != ScalarType::Float;
  Tensor y = torch::stable::new_empty(v, {images, tokens, embed});
  Tensor attended = apart ? torch::stable::new_empty(v, {images, tokens, embed}, ScalarType::Float)
                          : torch::stable::new_empty(v, {0}, ScalarType::Float);
  Tensor maximum = new_statistic(v), normalizer = new_statistic(v);
  if (images == 0) return {y, attended, maximum, normalizer};
  with_element_type(kName, v.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    launch_softmax<T, kForwardWarps>(
        device, "token_attention", softmax_kernel<T>, images,
        {softmax_inputs<T>(q, k, v, scale), y.mutable_data_ptr(), floats_of(attended),
         floats_of(maximum), floats_of(normalizer)});
  });
  return {y, attended, maximum, normalizer};
}

std::tuple<Tensor, Tensor, Tensor> token_attention_backward(Tensor grad, Tensor q, Tensor k,
                                                            Tensor v, Tensor attended,
                                                            Tensor maximum, Tensor normalizer,
                                                            double scale) {
  check(q, k, v);
  check(grad, k, v);
  const DeviceScope device(v);
  const int64_t images = v.size(0), tokens = v.size(1), embed = v.size(2);
  Tensor grad_q = torch::stable::new_empty(v, {images, tokens, embed});
  Tensor grad_k = torch::stable::new_empty(v, {images, tokens, embed});
  Tensor grad_v = torch::stable::new_empty(v, {images, tokens, embed});
  if (images == 0) return {grad_q, grad_k, grad_v};
  attended = torch::stable::contiguous(attended);
  maximum = torch::stable::contiguous(maximum);
  normalizer = torch::stable::contiguous(normalizer);
  const Tensor delta = new_statistic(v), logarithm = new_statistic(v);
  with_element_type(kName, v.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const SoftmaxBackwardParams params = {softmax_inputs<T>(q, k, v, scale),
                                          rows_of<T>(grad),
                                          floats_of(attended),
                                          floats_of(maximum),
                                          floats_of(normalizer),
                                          floats_of(delta),
                                          floats_of(logarithm),
                                          grad_q.mutable_data_ptr(),
                                          grad_k.mutable_data_ptr(),
                                          grad_v.mutable_data_ptr(),
                                          static_cast<int>(embed),
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
