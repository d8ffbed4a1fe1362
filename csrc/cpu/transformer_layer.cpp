// The transformer layer on the CPU: soft split, norm, projection to q, k and v, softmax attention,
// tail.
//
// In the forward, a pass over an image's patches computes q, k and v; then each chunk of queries
// runs over all keys and through the tail. In the backward, a pass over the patches recomputes v
// and computes the gradient of the attention's result from that of the layer's. Then chunks of keys
// run over all queries, and a last pass computes the gradients of the projection and the map.

#include "layer.h"
#include "softmax_operands.h"

#include <cmath>

namespace t2t {
namespace {

constexpr const char* kName = "transformer_layer";
constexpr Dropout kNoDropout{0, 0, 0, 1.f};

void check_parameters(const Split& split, const Tensor& x, const Tensor& norm_weight,
                      const Tensor& norm_bias, const Tensor& qkv_weight, const TailTensors& t) {
  check_dims(kName, "attn_proj_weight", t.proj_weight, 2, "a matrix (E, E)");
  check_dims(kName, "mlp_fc1_weight", t.mlp_in_weight, 2, "a matrix (M, E)");
  const int64_t n = split.patch(), embed = t.proj_weight.size(0);
  check_tensor(kName, "norm1_weight", norm_weight, {n}, x.scalar_type());
  check_tensor(kName, "norm1_bias", norm_bias, {n}, x.scalar_type());
  check_tensor(kName, "attn_qkv_weight", qkv_weight, {3 * embed, n}, x.scalar_type());
  check_tail(kName, kTransformerTail, t, x.scalar_type());
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> transformer_layer(
    const Tensor& x, const Tensor& norm1_weight, const Tensor& norm1_bias, const Tensor& qkv_weight,
    const Tensor& proj_weight, const Tensor& proj_bias, const Tensor& norm2_weight,
    const Tensor& norm2_bias, const Tensor& mlp_fc1_weight, const Tensor& mlp_fc1_bias,
    const Tensor& mlp_fc2_weight, const Tensor& mlp_fc2_bias, int64_t kernel_size, int64_t stride,
    int64_t padding, double scale) {
  const TypedKernels& kernels = typed_kernels(kName, "x", x);
  const Split split = make_split(kName, x, kernel_size, stride, padding);
  const TailTensors tensors{proj_weight,    proj_bias,    norm2_weight,   norm2_bias,
                            mlp_fc1_weight, mlp_fc1_bias, mlp_fc2_weight, mlp_fc2_bias};
  check_parameters(split, x, norm1_weight, norm1_bias, qkv_weight, tensors);
  const ProjectionParameters projection(kernels, split, qkv_weight, std::nullopt, norm1_weight,
                                        norm1_bias, 3, kSplitNormEps, false);
  const Projection& p = projection.projection();
  const TailParameters parameters(kernels, tensors, kNoDropout, kNoDropout, false);
  const Tail& tail = parameters.tail();
  const int64_t batch = split.batch, tokens = split.tokens(), chunks = forward_chunks(tokens);
  const Softmax s{tokens, tail.embed, static_cast<float>(scale)};

  const auto like_tokens = [&] { return torch::stable::new_empty(x, {batch, tokens, s.embed}); };
  const Tensor y = like_tokens(), q = like_tokens(), k = like_tokens();
  const Tensor attended = new_floats(x, {batch, tokens, s.embed});
  const SavedStatistics statistics(x, batch, tokens);
  const int64_t group = forward_group(batch, chunks), size = tokens * padded(s.embed);
  const int64_t scratch_bytes =
      std::max(kernels.transformer_scratch(p, s, tail), kernels.softmax_scratch(s));
  const Operands of_q(s, group, Operands::kRows), of_k(s, group, Operands::kColumns),
      of_v(s, group, Operands::kDepth);
  const Memory values = Memory::floats(group * size);
  for (int64_t first = 0; first < batch; first += group) {
    const int64_t items = std::min(group, batch - first) * chunks;
    parallel(items, scratch_bytes, [&](int64_t item, void* scratch) {
      const int64_t i = item / chunks, image = first + i;
      const Range range = forward_range(tokens, image, item % chunks);
      float* v = values.floats() + i * size;
      kernels.transformer_project(p, s, x.const_data_ptr(), rows_of(q, image), rows_of(k, image), v,
                                  range, scratch);
      kernels.make_operand(s, rows_of(q, image), of_q[i], range, scratch);
      kernels.make_operand(s, rows_of(k, image), of_k[i], range, scratch);
      kernels.make_operand_of_floats(s, {v, padded(s.embed), 1}, of_v[i], range, scratch);
    });
    parallel(items, scratch_bytes, [&](int64_t item, void* scratch) {
      const int64_t i = item / chunks, image = first + i;
      kernels.transformer_queries(s, tail, of_q[i], of_k[i], of_v[i], values.floats() + i * size,
                                  rows_of(attended, image), statistics[image], rows_of(y, image),
                                  forward_range(tokens, image, item % chunks), scratch);
    });
  }
  return {y, q, k, attended, statistics.maximum, statistics.normalizer};
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                             Tensor, Tensor, Tensor>;

Gradients transformer_layer_backward(const Tensor& grad, const Tensor& x,
                                     const Tensor& norm1_weight, const Tensor& norm1_bias,
                                     const Tensor& qkv_weight, const Tensor& proj_weight,
                                     const Tensor& proj_bias, const Tensor& norm2_weight,
                                     const Tensor& norm2_bias, const Tensor& mlp_fc1_weight,
                                     const Tensor& mlp_fc1_bias, const Tensor& mlp_fc2_weight,
                                     const Tensor& mlp_fc2_bias, const Tensor& q, const Tensor& k,
                                     const Tensor& attended, const Tensor& maximum,
                                     const Tensor& normalizer, int64_t kernel_size, int64_t stride,
                                     int64_t padding, double scale, bool need_x) {
  const TypedKernels& kernels = typed_kernels(kName, "x", x);
  const Split split = make_split(kName, x, kernel_size, stride, padding);
  const TailTensors tensors{proj_weight,    proj_bias,    norm2_weight,   norm2_bias,
                            mlp_fc1_weight, mlp_fc1_bias, mlp_fc2_weight, mlp_fc2_bias};
  check_parameters(split, x, norm1_weight, norm1_bias, qkv_weight, tensors);
  const ProjectionParameters projection(kernels, split, qkv_weight, std::nullopt, norm1_weight,
                                        norm1_bias, 3, kSplitNormEps, need_x);
  const Projection& p = projection.projection();
  const TailParameters parameters(kernels, tensors, kNoDropout, kNoDropout, true);
  const Tail& tail = parameters.tail();
  const int64_t batch = split.batch, tokens = split.tokens(), n = split.patch();
  const Softmax s{tokens, tail.embed, static_cast<float>(scale)};
  Tensor v_weight = torch::stable::narrow(const_cast<Tensor&>(qkv_weight), 0, 2 * s.embed, s.embed);
  const ProjectionParameters projection_of_v(kernels, split, v_weight, std::nullopt, norm1_weight,
                                             norm1_bias, 1, kSplitNormEps, false);
  const Projection& p_v = projection_of_v.projection();
  check_tensor(kName, "grad", grad, {batch, tokens, s.embed}, x.scalar_type());
  check_tensor(kName, "q", q, {batch, tokens, s.embed}, x.scalar_type());
  check_tensor(kName, "k", k, {batch, tokens, s.embed}, x.scalar_type());
  check_tensor(kName, "attended", attended, {batch, tokens, s.embed}, ScalarType::Float);
  const SavedStatistics statistics(kName, batch, tokens, maximum, normalizer);

  const Cut cut(split, threads());
  const Tensor grad_x = new_map_gradient(x, split, need_x);
  const int64_t projection_size = (n + 1) * p.outputs;
  const int64_t slot_size = projection_size + parameters.slot_size();
  const Memory slots = Memory::zeros(cut.slots() * slot_size);
  const auto slot = [&](const Range& range, int64_t chunk) {
    return slots.floats() + cut.slot(range.image, chunk) * slot_size;
  };
  const auto projection_sums = [&](float* at) { return ProjectionSums{at, at + n * p.outputs}; };

  const KeyChunks keys(tokens);
  const int64_t group = std::min(cut.group, keys.group(batch)), chunks = forward_chunks(tokens);
  const int64_t size = tokens * padded(s.embed);
  const int64_t band_size = need_x ? cut.band_floats(split) : 0;
  const int64_t scratch_bytes =
      std::max(kernels.transformer_scratch(p, s, tail), kernels.softmax_scratch(s));
  constexpr int kAll = Operands::kRows | Operands::kDepth;
  const Operands of_q(s, group, kAll), of_k(s, group, Operands::kColumns | Operands::kDepth),
      of_v(s, group, Operands::kColumns), of_grad(s, group, kAll);
  const Memory bands = Memory::floats(group * cut.chunks * band_size);
  const Memory values = Memory::floats(group * size), grads_y = Memory::floats(group * size);
  const Memory delta = Memory::floats(group * tokens);
  const Memory parts_q = Memory::floats(group * keys.count * size);
  const Memory sums_k = Memory::floats(group * size), sums_v = Memory::floats(group * size);
  for (int64_t first = 0; first < batch; first += group) {
    const int64_t images = std::min(group, batch - first);
    parallel(images * cut.chunks, scratch_bytes, [&](int64_t item, void* scratch) {
      const int64_t i = item / cut.chunks, chunk = item % cut.chunks, image = first + i;
      const Range range = cut.range(split, image, chunk);
      kernels.transformer_tail_backward(
          p_v, s, tail, x.const_data_ptr(), rows_of(attended, image), rows_of(grad, image),
          parameters.sums_at(slot(range, chunk) + projection_size), values.floats() + i * size,
          grads_y.floats() + i * size, sums_v.floats() + i * size, delta.floats() + i * tokens,
          range, scratch);
    });
    parallel(images * chunks, scratch_bytes, [&](int64_t item, void* scratch) {
      const int64_t i = item / chunks, image = first + i, row = padded(s.embed);
      const Range range = forward_range(tokens, image, item % chunks);
      kernels.make_operand(s, rows_of(q, image), of_q[i], range, scratch);
      kernels.make_operand(s, rows_of(k, image), of_k[i], range, scratch);
      kernels.make_operand_of_floats(s, {values.floats() + i * size, row, 1}, of_v[i], range,
                                     scratch);
      kernels.make_operand_of_floats(s, {grads_y.floats() + i * size, row, 1}, of_grad[i], range,
                                     scratch);
    });
    std::fill_n(sums_k.floats(), images * size, 0.f);
    parallel(images * keys.count, scratch_bytes, [&](int64_t item, void* scratch) {
      const int64_t i = item / keys.count;
      kernels.softmax_backward(s, of_q[i], of_k[i], of_v[i], of_grad[i], statistics[first + i],
                               delta.floats() + i * tokens, parts_q.floats() + item * size,
                               sums_k.floats() + i * size, sums_v.floats() + i * size,
                               keys.range(first + i, item % keys.count), scratch);
    });
    parallel(images * cut.chunks, scratch_bytes, [&](int64_t item, void* scratch) {
      const int64_t i = item / cut.chunks, chunk = item % cut.chunks;
      const Range range = cut.range(split, first + i, chunk);
      kernels.transformer_projection_backward(
          p, s, x.const_data_ptr(), parts_q.floats() + i * keys.count * size, keys.count, size,
          sums_k.floats() + i * size, sums_v.floats() + i * size,
          projection_sums(slot(range, chunk)), need_x ? bands.floats() + item * band_size : nullptr,
          range, scratch);
    });
    if (need_x) gather_bands(kernels, split, cut, bands.floats(), first, images, grad_x);
  }
  add_slots(slots.floats(), cut.slots(), slot_size);
  const ProjectionGradients g = projection_gradients(projection, projection_sums(slots.floats()),
                                                     qkv_weight, norm1_weight, norm1_bias);
  const auto [proj, proj_b, norm, norm_b, mlp_in, mlp_in_b, mlp_out, mlp_out_b] =
      tail_gradients(parameters.sums_at(slots.floats() + projection_size), tensors);
  return {grad_x, g.norm_weight, g.norm_bias, g.weight, proj,    proj_b,
          norm,   norm_b,        mlp_in,      mlp_in_b, mlp_out, mlp_out_b};
}

}  // namespace
}  // namespace t2t

STABLE_TORCH_LIBRARY_IMPL(t2t_cpu, CPU, library) {
  library.impl("transformer_layer", TORCH_BOX(&t2t::transformer_layer));
  library.impl("transformer_layer_backward", TORCH_BOX(&t2t::transformer_layer_backward));
}
