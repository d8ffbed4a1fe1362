// The Performer layer on CUDA, for half types and the models' sizes: soft split, norm, projection
// to k, q and v, attention, tail.
//
// Forward: soft_split_linear writes k, q and v to scratch memory; a pass over keys and values
// computes the sums; a pass over queries and values computes y and, in registers, the tail.
// Backward: k, q and v again, then
//   queries   y again, the tail forward up to its hidden units and back, and the attention back to
//             q: the gradients of q and of the skip go to their places in that of k, q and v, those
//             of the tail's parameters to a slot per block, those of the sums to parts
//   keys      the gradient of k, and the rest of that of v
// and the backward of soft_split_linear with the gradient of k, q and v as its own.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <tuple>

#include "performer.cuh"
#include "soft_split_linear.h"
#include "tail.cuh"

namespace t2t {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr const char* kName = "performer_layer";
enum Section { kKey, kQuery, kValue };

struct AttendParams {
  const float* w;
  float log_eps;
  Rows queries, values;
  Means means;
  TailPointers tail;
  TileLoop loop;
  void* out;
};

constexpr int kAttendVectors = kTailVectors + kMatrixVectors;
constexpr int kAttendBytes = kAttendVectors * 16 + static_cast<int>(sizeof(TailVectors));
constexpr int kAttendBlocks = 3;

template <typename T>
__global__ void __launch_bounds__(kAttentionWarps* kLanes, kAttendBlocks)
    attend_kernel(const AttendParams p) {
  uint4* weights = dynamic_shared;
  uint4* w = weights + kTailVectors;
  auto& vectors = *reinterpret_cast<TailVectors*>(dynamic_shared + kAttendVectors);
  load_features<T>(w, p.w);
  load_tail<T>(weights, vectors, p.tail);
  __syncthreads();
  p.loop([&](int64_t image, int first) {
    const int tokens = p.loop.tokens;
    const Operand<2> values = load_operand<T>(p.values, image, first, tokens);
    const QueryFeatures queries =
        features_of<T>(limited<T>(load_operand<T>(p.queries, image, first, tokens), first), w,
                       p.log_eps, p.means.logs + image * kFeatures);
    const int64_t first_token = image * tokens + first;
    const Sums<2> out = tail_of<T>(attended<T>(queries, p.means.as_is + image * kMeanVectors),
                                   values, weights, vectors, p.tail.dropout, first_token);
    store_operand(rounded_operand<T>(out), static_cast<T*>(p.out) + first_token * kEmbed, kEmbed,
                  tokens - first);
  });
}

struct BackwardParams {
  QueriesBackwardParams queries;
  Rows values;
  TailBackwardParams tail;
};

constexpr int kBackwardBytes = kQueriesBackwardBytes + kTailBackwardBytes;

template <typename T>
__global__ void __launch_bounds__(kBlockWarps* kLanes, 1)
    layer_backward_kernel(const BackwardParams p) {
  uint4* weights = dynamic_shared + kQueriesBackwardBytes / 16;
  auto& vectors = *reinterpret_cast<TailVectors*>(weights + kTailVectors);
  auto& vector_sums = *reinterpret_cast<TailVectorSums*>(&vectors + 1);
  QueriesBackward<T> queries(p.queries, dynamic_shared);
  load_tail<T>(weights, vectors, p.tail.tail);
  TailBackward<T> tail(p.tail, p.values, weights, vectors, vector_sums, queries.tiles());
  queries([&](int64_t image, int first, auto y, auto use) { tail.tile(image, first, y, use); });
  tail.store();
}

void check_width(const Tensor& kqv) {
  T2T_CHECK(kqv.size(2) == 3 * kEmbed, kName, ": kqv_weight: got ", kqv.size(2), " rows, expected ",
            3 * kEmbed);
}

// The seed is missing without dropout.
Dropout dropout_of(const std::optional<Tensor>& seed, double p) {
  if (p != 0) check_seed(kName, seed);
  return make_dropout(p, seed ? static_cast<const int64_t*>(seed->const_data_ptr()) : nullptr);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> performer_layer(
    Tensor x, Tensor w, Tensor norm1_weight, Tensor norm1_bias, Tensor kqv_weight, Tensor kqv_bias,
    Tensor proj_weight, Tensor proj_bias, Tensor norm2_weight, Tensor norm2_bias,
    Tensor mlp_0_weight, Tensor mlp_0_bias, Tensor mlp_2_weight, Tensor mlp_2_bias,
    std::optional<Tensor> seed, int64_t kernel_size, int64_t stride, int64_t padding, double eps,
    double dropout_p) {
  const DeviceScope device(x);
  const TailArguments tail(kName, kPerformerTail,
                           {proj_weight, proj_bias, norm2_weight, norm2_bias, mlp_0_weight,
                            mlp_0_bias, mlp_2_weight, mlp_2_bias},
                           x, dropout_of(seed, dropout_p));
  const RandomFeatures features(kName, w, eps);
  const Tensor kqv = soft_split_linear(x, kqv_weight, kqv_bias, norm1_weight, norm1_bias,
                                       kernel_size, stride, padding, kNormEps);
  check_width(kqv);
  const int64_t images = kqv.size(0), tokens = kqv.size(1);
  Tensor out = torch::stable::new_empty(x, {images, tokens, kEmbed});
  Tensor maximum = torch::stable::new_empty(x, {images, kFeatures}, ScalarType::Float);
  Tensor normalizer = torch::stable::new_empty(x, {images, kFeatures}, ScalarType::Float);
  Tensor sums = torch::stable::new_empty(x, {images, kFeatures, kEmbed}, ScalarType::Float);
  if (images == 0) return {out, maximum, normalizer, sums};
  with_half_type(kName, "x", x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const KeyMeans<T> means(x, images, false);
    PerformerPasses<T>{features, images, tokens, device}.keys(
        section_of<T>(kqv, kKey, kEmbed), section_of<T>(kqv, kValue, kEmbed), x,
        {floats_of(maximum), floats_of(normalizer), floats_of(sums)}, means);
    AttendParams p = {};
    p.w = features.floats();
    p.log_eps = features.log_eps();
    p.queries = section_of<T>(kqv, kQuery, kEmbed);
    p.values = section_of<T>(kqv, kValue, kEmbed);
    p.means = means();
    p.tail = tail();
    p.loop = make_tile_loop(images, tokens);
    p.out = out.mutable_data_ptr();
    device.launch("performer_layer_attend", attend_kernel<T>,
                  grid_of_tiles(p.loop, kAttentionWarps, kAttendBlocks, device),
                  kAttentionWarps * kLanes, kAttendBytes, p);
  });
  return {out, maximum, normalizer, sums};
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                             Tensor, Tensor, Tensor, Tensor>;

Gradients performer_layer_backward(Tensor grad, Tensor x, Tensor w, Tensor norm1_weight,
                                   Tensor norm1_bias, Tensor kqv_weight, Tensor kqv_bias,
                                   Tensor proj_weight, Tensor proj_bias, Tensor norm2_weight,
                                   Tensor norm2_bias, Tensor mlp_0_weight, Tensor mlp_0_bias,
                                   Tensor mlp_2_weight, Tensor mlp_2_bias,
                                   std::optional<Tensor> seed, Tensor maximum, Tensor normalizer,
                                   Tensor sums, int64_t kernel_size, int64_t stride,
                                   int64_t padding, double eps, double dropout_p, bool need_x) {
  const DeviceScope device(x);
  const TailArguments tail(kName, kPerformerTail,
                           {proj_weight, proj_bias, norm2_weight, norm2_bias, mlp_0_weight,
                            mlp_0_bias, mlp_2_weight, mlp_2_bias},
                           x, dropout_of(seed, dropout_p));
  const RandomFeatures features(kName, w, eps);
  const Projected projected = project(x, kqv_weight, kqv_bias, norm1_weight, norm1_bias,
                                      kernel_size, stride, padding, kNormEps, true);
  const Tensor& kqv = projected.y;
  check_width(kqv);
  const int64_t images = kqv.size(0), tokens = kqv.size(1);
  check_tensor(kName, "grad", grad, {images, tokens, kEmbed}, x.scalar_type());
  check_sums(kName, images, maximum, normalizer, sums);
  Tensor grad_kqv = torch::stable::new_empty(x, {images, tokens, 3 * kEmbed});
  maximum = torch::stable::contiguous(maximum);
  normalizer = torch::stable::contiguous(normalizer);
  sums = torch::stable::contiguous(sums);
  const Parts saved = {floats_of(maximum), floats_of(normalizer), floats_of(sums)};
  std::optional<TailTensors> grads;
  with_half_type(kName, "x", x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const QueryParts parts(x, images, tokens, device);
    const TailSlots slots(x, parts.grid(), device);
    if (images > 0) {
      grad = vector_rows<T>(grad);
      const KeyMeans<T> means(x, images, true);
      means.load(saved, device);
      T* to = static_cast<T*>(grad_kqv.mutable_data_ptr());
      const PerformerPasses<T> passes{features, images, tokens, device};
      const Rows values = section_of<T>(kqv, kValue, kEmbed);
      const BackwardParams p = {passes.queries_backward(section_of<T>(kqv, kQuery, kEmbed), means,
                                                        parts, to + kQuery * kEmbed, 3 * kEmbed),
                                values,
                                {tail(), rows_of<T>(grad), static_cast<int>(tokens),
                                 to + kValue * kEmbed, 3 * kEmbed, slots.slots()}};
      device.launch("performer_layer_backward", layer_backward_kernel<T>, slots.grid(),
                    kBlockWarps * kLanes, kBackwardBytes, p);
      passes.keys_backward(section_of<T>(kqv, kKey, kEmbed), values,
                           section_of<T>(grad_kqv, kValue, kEmbed), x, saved, parts,
                           to + kKey * kEmbed, to + kValue * kEmbed, 3 * kEmbed);
    }
    grads = slots.finish<T>(x, device);
  });
  auto [grad_x, grad_kqv_weight, grad_kqv_bias, grad_norm_weight, grad_norm_bias] =
      soft_split_linear_backward(grad_kqv, x, kqv_weight, norm1_weight, norm1_bias, kernel_size,
                                 stride, padding, kNormEps, need_x, &projected);
  return {grad_x,
          grad_norm_weight,
          grad_norm_bias,
          grad_kqv_weight,
          grad_kqv_bias,
          grads->proj_weight,
          grads->proj_bias,
          grads->norm_weight,
          grads->norm_bias,
          grads->mlp_in_weight,
          grads->mlp_in_bias,
          grads->mlp_out_weight,
          grads->mlp_out_bias};
}

STABLE_TORCH_LIBRARY_IMPL(t2t_cuda, T2T_DISPATCH_KEY, m) {
  m.impl("performer_layer", TORCH_BOX(&performer_layer));
  m.impl("performer_layer_backward", TORCH_BOX(&performer_layer_backward));
}

}  // namespace
}  // namespace t2t
