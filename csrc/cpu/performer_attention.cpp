// Performer attention on the CPU: a pass over keys and values computes an image's sums, and a
// second one processes the queries. Each chunk of tokens has its own sums, which are merged in
// order.

#include "operators.h"

#include <cmath>
#include <limits>

namespace t2t {

void merge_key_sums(const Features& w, const KeySumsMemory& chunks, int64_t first, int64_t count,
                    const KeySums& to) {
  const int64_t embed = padded(w.embed);
  // Padding after the last feature has no weight in the queries' sums.
  std::fill_n(to.maximum, padded(w.count), -std::numeric_limits<float>::infinity());
  std::fill_n(to.normalizer, padded(w.count), 0.f);
  std::fill_n(to.sums, w.count * embed, 0.f);
  for (int64_t i = 0; i < w.count; ++i) {
    float& maximum = to.maximum[i];
    for (int64_t c = first; c < first + count; ++c)
      maximum = std::max(maximum, chunks[c].maximum[i]);
    for (int64_t c = first; c < first + count; ++c) {
      const KeySums chunk = chunks[c];
      const float share = std::exp(chunk.maximum[i] - maximum);
      to.normalizer[i] += share * chunk.normalizer[i];
      for (int64_t e = 0; e < embed; ++e)
        to.sums[i * embed + e] += share * chunk.sums[i * embed + e];
    }
  }
}

void add_key_sums(const Features& w, const KeySumsMemory& chunks, int64_t first, int64_t count,
                  const KeySums& to) {
  std::fill_n(to.normalizer, padded(w.count), 0.f);
  std::fill_n(to.sums, w.count * padded(w.embed), 0.f);
  for (int64_t c = first; c < first + count; ++c) {
    const KeySums chunk = chunks[c];
    for (int64_t i = 0; i < w.count; ++i) to.normalizer[i] += chunk.normalizer[i];
    for (int64_t i = 0; i < w.count * padded(w.embed); ++i) to.sums[i] += chunk.sums[i];
  }
}

SavedSums::SavedSums(const char* name, int64_t batch, const Features& w, const Tensor& maximum,
                     const Tensor& normalizer, const Tensor& sums)
    : maximum(as_floats(maximum)), normalizer(as_floats(normalizer)), sums(as_floats(sums)) {
  check_tensor(name, "maximum", maximum, {batch, w.count}, ScalarType::Float);
  check_tensor(name, "normalizer", normalizer, {batch, w.count}, ScalarType::Float);
  check_tensor(name, "sums", sums, {batch, w.count, w.embed}, ScalarType::Float);
}

void SavedSums::store(int64_t image, const Features& w, const KeySums& from) const {
  std::copy_n(from.maximum, w.count, mutable_floats_of(maximum) + image * w.count);
  std::copy_n(from.normalizer, w.count, mutable_floats_of(normalizer) + image * w.count);
  for (int64_t i = 0; i < w.count; ++i) {
    std::copy_n(from.sums + i * padded(w.embed), w.embed,
                mutable_floats_of(sums) + (image * w.count + i) * w.embed);
  }
}

void SavedSums::load(int64_t image, const Features& w, const KeySums& to) const {
  std::fill_n(to.maximum, padded(w.count), -std::numeric_limits<float>::infinity());
  std::fill_n(to.normalizer, padded(w.count), 0.f);
  std::fill_n(to.sums, w.count * padded(w.embed), 0.f);
  std::copy_n(floats_of(maximum) + image * w.count, w.count, to.maximum);
  std::copy_n(floats_of(normalizer) + image * w.count, w.count, to.normalizer);
  for (int64_t i = 0; i < w.count; ++i) {
    std::copy_n(floats_of(sums) + (image * w.count + i) * w.embed, w.embed,
                to.sums + i * padded(w.embed));
  }
}

namespace {

constexpr const char* kName = "performer_attention";

void check_tokens(const Tensor& k, const Tensor& q, const Tensor& v, const Tensor& w) {
  check_dims(kName, "v", v, 3, "3 dimensions (B, T, E)");
  T2T_CHECK(v.size(1) >= 1 && v.size(2) >= 1, kName, ": v: got shape ", shape_text(v.sizes()),
            ", expected (B, T, E) with T and E at least 1");
  check_tensor(kName, "k", k, {v.size(0), v.size(1), v.size(2)}, v.scalar_type());
  check_tensor(kName, "q", q, {v.size(0), v.size(1), v.size(2)}, v.scalar_type());
  T2T_CHECK(w.dim() == 2 && w.size(0) >= 1 && w.size(1) == v.size(2), kName, ": w: got shape ",
            shape_text(w.sizes()), ", expected (m, ", v.size(2), ") with m at least 1");
}

std::tuple<Tensor, Tensor, Tensor, Tensor> performer_attention(const Tensor& k, const Tensor& q,
                                                               const Tensor& v, const Tensor& w,
                                                               double eps) {
  const TypedKernels& kernels = typed_kernels(kName, "v", v);
  check_tokens(k, q, v, w);
  const FeatureParameters parameters(w, eps);
  const Features& f = parameters.features();
  const int64_t batch = v.size(0), tokens = v.size(1), chunks = forward_chunks(tokens);
  const Tensor y = torch::stable::new_empty(v, {batch, tokens, f.embed});
  const SavedSums saved(v, batch, f);
  const KeySumsMemory partial(f, batch * chunks), sums(f, batch);
  const int64_t scratch_bytes = kernels.attention_scratch(f);
  parallel(batch * chunks, scratch_bytes, [&](int64_t item, void* scratch) {
    const Range range = forward_range(tokens, item / chunks, item % chunks);
    kernels.attention_keys(f, rows_of(k, range.image), rows_of(v, range.image), partial[item],
                           range, scratch);
  });
  for (int64_t image = 0; image < batch; ++image) {
    merge_key_sums(f, partial, image * chunks, chunks, sums[image]);
    saved.store(image, f, sums[image]);
  }
  parallel(batch * chunks, scratch_bytes, [&](int64_t item, void* scratch) {
    const Range range = forward_range(tokens, item / chunks, item % chunks);
    kernels.attention_queries(f, rows_of(q, range.image), sums[range.image],
                              rows_of(y, range.image), range, scratch);
  });
  return {y, saved.maximum, saved.normalizer, saved.sums};
}

std::tuple<Tensor, Tensor, Tensor> performer_attention_backward(
    const Tensor& grad, const Tensor& k, const Tensor& q, const Tensor& v, const Tensor& w,
    const Tensor& maximum, const Tensor& normalizer, const Tensor& sums, double eps) {
  const TypedKernels& kernels = typed_kernels(kName, "v", v);
  check_tokens(k, q, v, w);
  check_tensor(kName, "grad", grad, {v.size(0), v.size(1), v.size(2)}, v.scalar_type());
  const FeatureParameters parameters(w, eps);
  const Features& f = parameters.features();
  const int64_t batch = v.size(0), tokens = v.size(1), chunks = forward_chunks(tokens);
  const SavedSums saved(kName, batch, f, maximum, normalizer, sums);
  const auto like_v = [&] { return torch::stable::new_empty(v, {batch, tokens, f.embed}); };
  const Tensor grad_k = like_v(), grad_q = like_v(), grad_v = like_v();
  const KeySumsMemory partial(f, batch * chunks), keys(f, batch), grads(f, batch);
  const int64_t scratch_bytes = kernels.attention_scratch(f);
  for (int64_t image = 0; image < batch; ++image) saved.load(image, f, keys[image]);
  parallel(batch * chunks, scratch_bytes, [&](int64_t item, void* scratch) {
    const Range range = forward_range(tokens, item / chunks, item % chunks);
    const int64_t image = range.image;
    kernels.attention_queries_backward(f, rows_of(q, image), keys[image], rows_of(grad, image),
                                       rows_of(grad_q, image), partial[item], range, scratch);
  });
  for (int64_t image = 0; image < batch; ++image) {
    add_key_sums(f, partial, image * chunks, chunks, grads[image]);
  }
  parallel(batch * chunks, scratch_bytes, [&](int64_t item, void* scratch) {
    const Range range = forward_range(tokens, item / chunks, item % chunks);
    const int64_t image = range.image;
    kernels.attention_keys_backward(f, rows_of(k, image), rows_of(v, image), keys[image],
                                    grads[image], rows_of(grad_k, image), rows_of(grad_v, image),
                                    range, scratch);
  });
  return {grad_k, grad_q, grad_v};
}

}  // namespace
}  // namespace t2t

STABLE_TORCH_LIBRARY_IMPL(t2t_cpu, CPU, library) {
  library.impl("performer_attention", TORCH_BOX(&t2t::performer_attention));
  library.impl("performer_attention_backward", TORCH_BOX(&t2t::performer_attention_backward));
}
