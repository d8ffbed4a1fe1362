// Softmax attention over tokens on the CPU. The operands of an image are written once in the order
// in which the products read them; then each chunk of queries runs over all keys. In the backward,
// each chunk of keys runs over all queries and writes its own part of the queries' gradient. The
// parts are added in order, so that the result does not depend on the number of threads.

#include "softmax_operands.h"

#include <cmath>

namespace t2t {
namespace {

constexpr const char* kName = "token_attention";

Softmax make_softmax(const Tensor& q, const Tensor& k, const Tensor& v, double scale) {
  check_dims(kName, "v", v, 3, "3 dimensions (B, T, E)");
  T2T_CHECK(v.size(1) >= 1 && v.size(2) >= 1, kName, ": v: got shape ", shape_text(v.sizes()),
            ", expected (B, T, E) with T and E at least 1");
  check_tensor(kName, "q", q, {v.size(0), v.size(1), v.size(2)}, v.scalar_type());
  check_tensor(kName, "k", k, {v.size(0), v.size(1), v.size(2)}, v.scalar_type());
  return {v.size(1), v.size(2), static_cast<float>(scale)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> token_attention(const Tensor& q, const Tensor& k,
                                                           const Tensor& v, double scale) {
  const TypedKernels& kernels = typed_kernels(kName, "v", v);
  const Softmax s = make_softmax(q, k, v, scale);
  const int64_t batch = v.size(0), chunks = forward_chunks(s.tokens);
  const Tensor y = torch::stable::new_empty(v, {batch, s.tokens, s.embed});
  const bool apart = v.scalar_type() != ScalarType::Float;
  const Tensor attended = apart ? new_floats(v, {batch, s.tokens, s.embed}) : new_floats(v, {0});
  const SavedStatistics statistics(v, batch, s.tokens);
  const int64_t group = forward_group(batch, chunks), scratch_bytes = kernels.softmax_scratch(s);
  const Operands of_q(s, group, Operands::kRows), of_k(s, group, Operands::kColumns),
      of_v(s, group, Operands::kDepth);
  for (int64_t first = 0; first < batch; first += group) {
    const int64_t items = std::min(group, batch - first) * chunks;
    parallel(items, scratch_bytes, [&](int64_t item, void* scratch) {
      const int64_t i = item / chunks;
      const Range range = forward_range(s.tokens, first + i, item % chunks);
      kernels.make_operand(s, rows_of(q, first + i), of_q[i], range, scratch);
      kernels.make_operand(s, rows_of(k, first + i), of_k[i], range, scratch);
      kernels.make_operand(s, rows_of(v, first + i), of_v[i], range, scratch);
    });
    parallel(items, scratch_bytes, [&](int64_t item, void* scratch) {
      const int64_t i = item / chunks;
      kernels.softmax_forward(
          s, of_q[i], of_k[i], of_v[i], rows_of(y, first + i),
          apart ? mutable_floats_of(attended) + (first + i) * s.tokens * s.embed : nullptr,
          statistics[first + i], forward_range(s.tokens, first + i, item % chunks), scratch);
    });
  }
  return {y, attended, statistics.maximum, statistics.normalizer};
}

std::tuple<Tensor, Tensor, Tensor> token_attention_backward(
    const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& attended,
    const Tensor& maximum, const Tensor& normalizer, double scale) {
  const TypedKernels& kernels = typed_kernels(kName, "v", v);
  const Softmax s = make_softmax(q, k, v, scale);
  const int64_t batch = v.size(0), chunks = forward_chunks(s.tokens);
  check_tensor(kName, "grad", grad, {batch, s.tokens, s.embed}, v.scalar_type());
  check_tensor(kName, "attended", attended, {batch, s.tokens, s.embed}, ScalarType::Float);
  const SavedStatistics statistics(kName, batch, s.tokens, maximum, normalizer);
  const auto like_v = [&] { return torch::stable::new_empty(v, {batch, s.tokens, s.embed}); };
  const Tensor grad_q = like_v(), grad_k = like_v(), grad_v = like_v();

  const KeyChunks keys(s.tokens);
  const int64_t group = keys.group(batch), scratch_bytes = kernels.softmax_scratch(s);
  const int64_t size = s.tokens * padded(s.embed);
  constexpr int kAll = Operands::kRows | Operands::kDepth;
  const Operands of_q(s, group, kAll), of_k(s, group, Operands::kColumns | Operands::kDepth),
      of_v(s, group, Operands::kColumns), of_grad(s, group, kAll);
  const Memory delta = Memory::floats(group * s.tokens);
  const Memory parts_q = Memory::floats(group * keys.count * size);
  const Memory sums_k = Memory::floats(group * size), sums_v = Memory::floats(group * size);
  for (int64_t first = 0; first < batch; first += group) {
    const int64_t images = std::min(group, batch - first);
    parallel(images * chunks, scratch_bytes, [&](int64_t item, void* scratch) {
      const int64_t i = item / chunks, image = first + i;
      const Range range = forward_range(s.tokens, image, item % chunks);
      kernels.make_operand(s, rows_of(q, image), of_q[i], range, scratch);
      kernels.make_operand(s, rows_of(k, image), of_k[i], range, scratch);
      kernels.make_operand(s, rows_of(v, image), of_v[i], range, scratch);
      kernels.make_operand(s, rows_of(grad, image), of_grad[i], range, scratch);
      kernels.softmax_delta(s, rows_of(attended, image), rows_of(grad, image),
                            delta.floats() + i * s.tokens, range, scratch);
    });
    std::fill_n(sums_k.floats(), images * size, 0.f);
    std::fill_n(sums_v.floats(), images * size, 0.f);
    parallel(images * keys.count, scratch_bytes, [&](int64_t item, void* scratch) {
      const int64_t i = item / keys.count;
      kernels.softmax_backward(s, of_q[i], of_k[i], of_v[i], of_grad[i], statistics[first + i],
                               delta.floats() + i * s.tokens, parts_q.floats() + item * size,
                               sums_k.floats() + i * size, sums_v.floats() + i * size,
                               keys.range(first + i, item % keys.count), scratch);
    });
    parallel(images * chunks, scratch_bytes, [&](int64_t item, void* scratch) {
      const int64_t i = item / chunks, image = first + i;
      const Range range = forward_range(s.tokens, image, item % chunks);
      kernels.softmax_gradient(s, parts_q.floats() + i * keys.count * size, keys.count, size,
                               s.scale, rows_of(grad_q, image), range, scratch);
      kernels.softmax_gradient(s, sums_k.floats() + i * size, 1, 0, s.scale, rows_of(grad_k, image),
                               range, scratch);
      kernels.softmax_gradient(s, sums_v.floats() + i * size, 1, 0, 1.f, rows_of(grad_v, image),
                               range, scratch);
    });
  }
  return {grad_q, grad_k, grad_v};
}

}  // namespace
}  // namespace t2t

STABLE_TORCH_LIBRARY_IMPL(t2t_cpu, CPU, library) {
  library.impl("token_attention", TORCH_BOX(&t2t::token_attention));
  library.impl("token_attention_backward", TORCH_BOX(&t2t::token_attention_backward));
}
