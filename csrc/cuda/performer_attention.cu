// Performer attention on CUDA, for half types, 64 elements and 32 features: see performer.cuh.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <tuple>

#include "performer.cuh"

namespace t2t {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr const char* kName = "performer_attention";

struct QueriesParams {
  const float* w;
  float log_eps;
  Rows queries;
  Means means;
  TileLoop loop;
  void* y;
};

constexpr int kQueriesBlocks = 4;

template <typename T>
__global__ void __launch_bounds__(kAttentionWarps* kLanes, kQueriesBlocks)
    queries_kernel(const QueriesParams p) {
  load_features<T>(dynamic_shared, p.w);
  __syncthreads();
  p.loop([&](int64_t image, int first) {
    const int tokens = p.loop.tokens;
    const QueryFeatures queries =
        features_of<T>(limited<T>(load_operand<T>(p.queries, image, first, tokens), first),
                       dynamic_shared, p.log_eps, p.means.logs + image * kFeatures);
    store_operand(attended<T>(queries, p.means.as_is + image * kMeanVectors),
                  static_cast<T*>(p.y) + (image * tokens + first) * kEmbed, kEmbed, tokens - first);
  });
}

struct BackwardParams {
  QueriesBackwardParams queries;
  Rows grads;  // of y
};

template <typename T>
__global__ void __launch_bounds__(kBlockWarps* kLanes, 1)
    queries_backward_kernel(const BackwardParams p) {
  QueriesBackward<T> backward(p.queries, dynamic_shared);
  backward([&](int64_t image, int first, auto, auto use) {
    use(sums_of<T>(load_operand<T>(p.grads, image, first, p.queries.chunks.tokens)));
  });
}

void check(const Tensor& k, const Tensor& q, const Tensor& v) {
  check_values(kName, v, kEmbed);
  check_tensor(kName, "k", k, {v.size(0), v.size(1), kEmbed}, v.scalar_type());
  check_tensor(kName, "q", q, {v.size(0), v.size(1), kEmbed}, v.scalar_type());
}

std::tuple<Tensor, Tensor, Tensor, Tensor> performer_attention(Tensor k, Tensor q, Tensor v,
                                                               Tensor w, double eps) {
  check(k, q, v);
  const DeviceScope device(v);
  const RandomFeatures features(kName, w, eps);
  const int64_t images = v.size(0), tokens = v.size(1);
  Tensor y = torch::stable::new_empty(v, {images, tokens, kEmbed});
  Tensor maximum = torch::stable::new_empty(v, {images, kFeatures}, ScalarType::Float);
  Tensor normalizer = torch::stable::new_empty(v, {images, kFeatures}, ScalarType::Float);
  Tensor sums = torch::stable::new_empty(v, {images, kFeatures, kEmbed}, ScalarType::Float);
  if (images == 0) return {y, maximum, normalizer, sums};
  with_half_type(kName, "v", v.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    k = vector_rows<T>(k), q = vector_rows<T>(q), v = vector_rows<T>(v);
    const KeyMeans<T> means(v, images, false);
    PerformerPasses<T>{features, images, tokens, device}.keys(
        rows_of<T>(k), rows_of<T>(v), v,
        {floats_of(maximum), floats_of(normalizer), floats_of(sums)}, means);
    QueriesParams p = {};
    p.w = features.floats();
    p.log_eps = features.log_eps();
    p.queries = rows_of<T>(q);
    p.means = means();
    p.loop = make_tile_loop(images, tokens);
    p.y = y.mutable_data_ptr();
    device.launch("performer_queries", queries_kernel<T>,
                  grid_of_tiles(p.loop, kAttentionWarps, kQueriesBlocks, device),
                  kAttentionWarps * kLanes, kMatrixVectors * 16, p);
  });
  return {y, maximum, normalizer, sums};
}

std::tuple<Tensor, Tensor, Tensor> performer_attention_backward(Tensor grad, Tensor k, Tensor q,
                                                                Tensor v, Tensor w, Tensor maximum,
                                                                Tensor normalizer, Tensor sums,
                                                                double eps) {
  check(k, q, v);
  const DeviceScope device(v);
  const RandomFeatures features(kName, w, eps);
  const int64_t images = v.size(0), tokens = v.size(1);
  check_tensor(kName, "grad", grad, {images, tokens, kEmbed}, v.scalar_type());
  check_sums(kName, images, maximum, normalizer, sums);
  Tensor grad_k = torch::stable::new_empty(v, {images, tokens, kEmbed});
  Tensor grad_q = torch::stable::new_empty(v, {images, tokens, kEmbed});
  Tensor grad_v = torch::stable::new_empty(v, {images, tokens, kEmbed});
  if (images == 0) return {grad_k, grad_q, grad_v};
  maximum = torch::stable::contiguous(maximum);
  normalizer = torch::stable::contiguous(normalizer);
  sums = torch::stable::contiguous(sums);
  const Parts saved = {floats_of(maximum), floats_of(normalizer), floats_of(sums)};
  with_half_type(kName, "v", v.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    k = vector_rows<T>(k), q = vector_rows<T>(q), v = vector_rows<T>(v);
    grad = vector_rows<T>(grad);
    const KeyMeans<T> means(v, images, true);
    means.load(saved, device);
    const PerformerPasses<T> passes{features, images, tokens, device};
    const QueryParts parts(v, images, tokens, device);
    const BackwardParams p = {
        passes.queries_backward(rows_of<T>(q), means, parts, grad_q.mutable_data_ptr(), kEmbed),
        rows_of<T>(grad)};
    device.launch("performer_queries_backward", queries_backward_kernel<T>, parts.grid(),
                  kBlockWarps * kLanes, kQueriesBackwardBytes, p);
    passes.keys_backward(rows_of<T>(k), rows_of<T>(v), Rows{}, v, saved, parts,
                         grad_k.mutable_data_ptr(), grad_v.mutable_data_ptr(), kEmbed);
  });
  return {grad_k, grad_q, grad_v};
}

STABLE_TORCH_LIBRARY_IMPL(t2t_cuda, T2T_DISPATCH_KEY, m) {
  m.impl("performer_attention", TORCH_BOX(&performer_attention));
  m.impl("performer_attention_backward", TORCH_BOX(&performer_attention_backward));
}

}  // namespace
}  // namespace t2t
