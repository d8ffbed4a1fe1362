// The Performer layer on the CPU: soft split, norm, projection to k, q and v, attention, tail.
//
// In the forward, a pass over an image's patches computes k, q and v, adds k and v to the image's
// sums and keeps q and v; a second pass computes the result. The buffers hold a few images and are
// reused for the next ones. In the backward, a pass over the patches recomputes k, q and v, and
// computes the gradients of q, the sums and the tail's parameters from that of the result. When the
// gradients of the sums are complete, a second pass computes those of k and v, the projection and
// the map.

#include "layer.h"

#include <cmath>

namespace t2t {
namespace {

constexpr const char* kName = "performer_layer";
constexpr uint64_t kAfterProj = 0, kAfterMlp = 1;

Dropout make_dropout(double p, const std::optional<Tensor>& seed, uint64_t site) {
  if (p == 0) return {0, site, 0, 1.f};
  check_seed(kName, seed);
  const auto value = *static_cast<const int64_t*>(seed->const_data_ptr());
  const double threshold = std::nearbyint(p * 65536);
  return {static_cast<uint64_t>(value), site, static_cast<uint32_t>(threshold),
          threshold == 65536 ? 0.f : static_cast<float>(1 / (1 - threshold / 65536))};
}

void check_parameters(const Split& split, const Tensor& x, const Tensor& w,
                      const Tensor& norm_weight, const Tensor& norm_bias, const Tensor& kqv_weight,
                      const Tensor& kqv_bias, const TailTensors& t) {
  check_dims(kName, "proj_weight", t.proj_weight, 2, "a matrix (E, E)");
  check_dims(kName, "mlp_0_weight", t.mlp_in_weight, 2, "a matrix (M, E)");
  const int64_t n = split.patch(), embed = t.proj_weight.size(0);
  const ScalarType dtype = x.scalar_type();
  T2T_CHECK(w.dim() == 2 && w.size(0) >= 1 && w.size(1) == embed, kName, ": w: got shape ",
            shape_text(w.sizes()), ", expected (m, ", embed, ") with m at least 1");
  check_tensor(kName, "norm1_weight", norm_weight, {n}, dtype);
  check_tensor(kName, "norm1_bias", norm_bias, {n}, dtype);
  check_tensor(kName, "kqv_weight", kqv_weight, {3 * embed, n}, dtype);
  check_tensor(kName, "kqv_bias", kqv_bias, {3 * embed}, dtype);
  check_tail(kName, kPerformerTail, t, dtype);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> performer_layer(
    const Tensor& x, const Tensor& w, const Tensor& norm1_weight, const Tensor& norm1_bias,
    const Tensor& kqv_weight, const Tensor& kqv_bias, const Tensor& proj_weight,
    const Tensor& proj_bias, const Tensor& norm2_weight, const Tensor& norm2_bias,
    const Tensor& mlp_0_weight, const Tensor& mlp_0_bias, const Tensor& mlp_2_weight,
    const Tensor& mlp_2_bias, const std::optional<Tensor>& seed, int64_t kernel_size,
    int64_t stride, int64_t padding, double eps, double dropout_p) {
  const TypedKernels& kernels = typed_kernels(kName, "x", x);
  const Split split = make_split(kName, x, kernel_size, stride, padding);
  const TailTensors tensors{proj_weight,  proj_bias,  norm2_weight, norm2_bias,
                            mlp_0_weight, mlp_0_bias, mlp_2_weight, mlp_2_bias};
  check_parameters(split, x, w, norm1_weight, norm1_bias, kqv_weight, kqv_bias, tensors);
  const ProjectionParameters projection(kernels, split, kqv_weight, kqv_bias, norm1_weight,
                                        norm1_bias, 3, kSplitNormEps, false);
  const Projection& p = projection.projection();
  const FeatureParameters random(w, eps);
  const Features& f = random.features();
  const TailParameters parameters(kernels, tensors, make_dropout(dropout_p, seed, kAfterProj),
                                  make_dropout(dropout_p, seed, kAfterMlp), false);
  const Tail& tail = parameters.tail();

  const int64_t batch = split.batch, tokens = split.tokens(), chunks = forward_chunks(tokens);
  const int64_t embed = padded(f.embed);
  const Tensor y = torch::stable::new_empty(x, {batch, tokens, f.embed});
  const SavedSums saved(x, batch, f);
  // The number of images at a time: enough chunks to keep every thread busy.
  const int64_t group = std::min(batch, std::max<int64_t>(1, 16 * threads() / chunks));
  const KeySumsMemory partial(f, group * chunks), sums(f, group);
  const Memory queries = Memory::floats(group * tokens * embed),
               values = Memory::floats(group * tokens * embed);
  const int64_t scratch_bytes = kernels.layer_scratch(p, f, tail);
  for (int64_t first = 0; first < batch; first += group) {
    const int64_t images = std::min(group, batch - first);
    parallel(images * chunks, scratch_bytes, [&](int64_t item, void* scratch) {
      const int64_t at = item / chunks * tokens * embed;
      kernels.layer_keys(p, f, x.const_data_ptr(), partial[item], queries.floats() + at,
                         values.floats() + at,
                         forward_range(tokens, first + item / chunks, item % chunks), scratch);
    });
    for (int64_t i = 0; i < images; ++i) {
      merge_key_sums(f, partial, i * chunks, chunks, sums[i]);
      saved.store(first + i, f, sums[i]);
    }
    parallel(images * chunks, scratch_bytes, [&](int64_t item, void* scratch) {
      const int64_t at = item / chunks * tokens * embed;
      kernels.layer_queries(p, f, tail, sums[item / chunks], queries.floats() + at,
                            values.floats() + at, y.mutable_data_ptr(),
                            forward_range(tokens, first + item / chunks, item % chunks), scratch);
    });
  }
  return {y, saved.maximum, saved.normalizer, saved.sums};
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                             Tensor, Tensor, Tensor, Tensor>;

Gradients performer_layer_backward(
    const Tensor& grad, const Tensor& x, const Tensor& w, const Tensor& norm1_weight,
    const Tensor& norm1_bias, const Tensor& kqv_weight, const Tensor& kqv_bias,
    const Tensor& proj_weight, const Tensor& proj_bias, const Tensor& norm2_weight,
    const Tensor& norm2_bias, const Tensor& mlp_0_weight, const Tensor& mlp_0_bias,
    const Tensor& mlp_2_weight, const Tensor& mlp_2_bias, const std::optional<Tensor>& seed,
    const Tensor& maximum, const Tensor& normalizer, const Tensor& sums, int64_t kernel_size,
    int64_t stride, int64_t padding, double eps, double dropout_p, bool need_x) {
  const TypedKernels& kernels = typed_kernels(kName, "x", x);
  const Split split = make_split(kName, x, kernel_size, stride, padding);
  const TailTensors tensors{proj_weight,  proj_bias,  norm2_weight, norm2_bias,
                            mlp_0_weight, mlp_0_bias, mlp_2_weight, mlp_2_bias};
  check_parameters(split, x, w, norm1_weight, norm1_bias, kqv_weight, kqv_bias, tensors);
  const ProjectionParameters projection(kernels, split, kqv_weight, kqv_bias, norm1_weight,
                                        norm1_bias, 3, kSplitNormEps, need_x);
  const Projection& p = projection.projection();
  const FeatureParameters random(w, eps);
  const Features& f = random.features();
  const TailParameters parameters(kernels, tensors, make_dropout(dropout_p, seed, kAfterProj),
                                  make_dropout(dropout_p, seed, kAfterMlp), true);
  const Tail& tail = parameters.tail();
  check_tensor(kName, "grad", grad, {split.batch, split.tokens(), f.embed}, x.scalar_type());
  const SavedSums saved(kName, split.batch, f, maximum, normalizer, sums);

  const Cut cut(split, threads());
  const int64_t tokens = split.tokens(), embed = padded(f.embed), n = split.patch();
  const Tensor grad_x = new_map_gradient(x, split, need_x);
  const int64_t projection_size = (n + 1) * p.outputs;
  const int64_t slot_size = projection_size + parameters.slot_size();
  const Memory slots = Memory::zeros(cut.slots() * slot_size);
  const auto slot = [&](const Range& range, int64_t chunk) {
    return slots.floats() + cut.slot(range.image, chunk) * slot_size;
  };
  const auto projection_sums = [&](float* at) { return ProjectionSums{at, at + n * p.outputs}; };
  const int64_t band_size = need_x ? cut.band_floats(split) : 0;
  const Memory bands = Memory::floats(cut.group * cut.chunks * band_size);
  const Memory kqv = Memory::floats(cut.group * tokens * p.outputs);
  const Memory skip = Memory::floats(cut.group * tokens * embed);
  const KeySumsMemory partial(f, cut.group * cut.chunks), keys(f, cut.group), grads(f, cut.group);
  const int64_t scratch_bytes = kernels.layer_scratch(p, f, tail);
  for (int64_t first = 0; first < split.batch; first += cut.group) {
    const int64_t images = std::min(cut.group, split.batch - first);
    for (int64_t i = 0; i < images; ++i) saved.load(first + i, f, keys[i]);
    parallel(images * cut.chunks, scratch_bytes, [&](int64_t item, void* scratch) {
      const int64_t i = item / cut.chunks, chunk = item % cut.chunks;
      const Range range = cut.range(split, first + i, chunk);
      kernels.layer_queries_backward(p, f, tail, x.const_data_ptr(), keys[i],
                                     rows_of(grad, range.image),
                                     parameters.sums_at(slot(range, chunk) + projection_size),
                                     partial[item], kqv.floats() + i * tokens * p.outputs,
                                     skip.floats() + i * tokens * embed, range, scratch);
    });
    for (int64_t i = 0; i < images; ++i) {
      add_key_sums(f, partial, i * cut.chunks, cut.chunks, grads[i]);
    }
    parallel(images * cut.chunks, scratch_bytes, [&](int64_t item, void* scratch) {
      const int64_t i = item / cut.chunks, chunk = item % cut.chunks;
      const Range range = cut.range(split, first + i, chunk);
      kernels.layer_keys_backward(p, f, x.const_data_ptr(), keys[i], grads[i],
                                  projection_sums(slot(range, chunk)),
                                  need_x ? bands.floats() + item * band_size : nullptr,
                                  kqv.floats() + i * tokens * p.outputs,
                                  skip.floats() + i * tokens * embed, range, scratch);
    });
    if (need_x) gather_bands(kernels, split, cut, bands.floats(), first, images, grad_x);
  }
  add_slots(slots.floats(), cut.slots(), slot_size);
  const ProjectionGradients g = projection_gradients(projection, projection_sums(slots.floats()),
                                                     kqv_weight, norm1_weight, norm1_bias);
  const auto [proj, proj_b, norm, norm_b, mlp_in, mlp_in_b, mlp_out, mlp_out_b] =
      tail_gradients(parameters.sums_at(slots.floats() + projection_size), tensors);
  return {grad_x, g.norm_weight, g.norm_bias, g.weight, g.bias,  proj,     proj_b,
          norm,   norm_b,        mlp_in,      mlp_in_b, mlp_out, mlp_out_b};
}

}  // namespace
}  // namespace t2t

STABLE_TORCH_LIBRARY_IMPL(t2t_cpu, CPU, library) {
  library.impl("performer_layer", TORCH_BOX(&t2t::performer_layer));
  library.impl("performer_layer_backward", TORCH_BOX(&t2t::performer_layer_backward));
}
