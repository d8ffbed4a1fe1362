// The Performer layer on CUDA, for half types and the models' sizes: soft split, norm, projection
// to k, q and v, attention, tail.
//
// Forward: soft_split_linear writes k, q and v, scratch of the call; a pass over keys and values
// sums up the features; a pass over queries and values makes y and, in registers, the tail.
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

constexpr int kAttendVectors = 3 * kWideTileVectors + kFeatureBlocks * kBlockVectors;
constexpr int kAttendBytes = kAttendVectors * 16 + static_cast<int>(sizeof(TailVectors));
constexpr int kAttendBlocks = 3;

template <typename T>
__global__ void __launch_bounds__(kAttentionWarps* kLanes, kAttendBlocks)
    attend_kernel(const AttendParams p) {
  uint4* weights = dynamic_shared;
  uint4* w = weights + 3 * kWideTileVectors;
  auto& vectors = *reinterpret_cast<TailVectors*>(dynamic_shared + kAttendVectors);
  pack_features<T>(w, p.w, false);
  pack_linear<T>(weights, p.tail.proj, false);
  pack_linear<T>(weights + kWideTileVectors, p.tail.mlp_in, false);
  pack_linear<T>(weights + 2 * kWideTileVectors, p.tail.mlp_out, false);
  vectors.load<T>(p.tail);
  if constexpr (kHasWarpgroups) show_to_products();
  __syncthreads();
  p.loop([&](int64_t image, int first) {
    const int tokens = p.loop.tokens;
    const Operand<2> values = load_operand<T>(p.values, image, first, tokens);
    const QueryFeatures queries =
        features_of<T>(limited<T>(load_operand<T>(p.queries, image, first, tokens)), w, p.log_eps,
                       p.means.logs + image * kFeatures);
    const int64_t first_token = image * tokens + first;
    const Sums<2> out = tail_of<T>(attended<T>(queries, p.means.as_is + image * kMeanVectors),
                                   values, weights, vectors, p.tail.dropout, first_token);
    store_operand(rounded_operand<T>(out), static_cast<T*>(p.out) + first_token * kEmbed, kEmbed,
                  tokens - first);
  });
}

struct BackwardParams {
  const float* w;
  float log_eps;
  Rows queries, values;
  Means means;
  Chunks chunks;
  Parts parts;         // gradients of the sums over Z
  void* grad_queries;  // strided as the gradient of v
  TailBackwardParams tail;
};

constexpr int kBackwardBytes = kTailBackwardBytes + kBothFeatures * 16;

// The block's share of the gradients of the sums, Fᵀ·dy/D: 16 features by 16 columns of a warp.
using FeatureSums = OuterSums<1, 2>;

template <typename T>
__global__ void __launch_bounds__(kTailWarps* kLanes, 1)
    layer_backward_kernel(const BackwardParams p) {
  uint4* weights = dynamic_shared;
  uint4* w = weights + kTailBackwardVectors;
  uint4* w_transposed = w + kFeatureBlocks * kBlockVectors;
  T* lefts = reinterpret_cast<T*>(w_transposed + kFeatureBlocks * kBlockVectors);
  T* rights = lefts + kTailTileElements;
  auto& vectors = *reinterpret_cast<TailVectors*>(rights + kTailTileElements);
  pack_features<T>(w, p.w, false);
  pack_features<T>(w_transposed, p.w, true);
  pack_tail_backward<T>(weights, vectors, p.tail.tail);
  __syncthreads();
  TailBackward<T> tail(p.tail, p.values, weights, vectors, lefts);
  const int tokens = p.chunks.tokens;
  const int feature = warp_index() % 2 * 16, column = warp_index() / 2 * 16;

  for (int64_t part = blockIdx.x; part < p.chunks.count(); part += gridDim.x) {
    const Chunk chunk(p.chunks, part);
    const int64_t image = chunk.image;
    const uint4* means = p.means.as_is + image * kMeanVectors;
    FeatureSums sums;
    sums.clear();
    float of_normalizer[8] = {};
#pragma unroll 1
    for (int at = chunk.begin; at < chunk.end; at += kTailTokens) {
      // A warp without tokens has some beyond the image's last.
      const int own = at + warp_index() * kRows;
      const int first = own < chunk.end ? own : tokens;
      const auto load_queries = [&] {
        return limited<T>(load_operand<T>(p.queries, image, first, tokens));
      };
      const QueryFeatures queries =
          features_of<T>(load_queries(), w, p.log_eps, p.means.logs + image * kFeatures);
      tail.tile(
          image, first, [&] { return attended<T>(queries, means); },
          [&](const Sums<2>& grad_y) {
            const Operand<2> grad = over_divisor<T>(grad_y, queries);
            const Operand<2> grad_queries = gradient_of_queries<T>(
                load_queries(), queries, grad, p.means.transposed + image * kMeanVectors,
                w_transposed, of_normalizer);
            store_operand(
                grad_queries,
                static_cast<T*>(p.grad_queries) + (image * tokens + first) * p.tail.v_stride,
                p.tail.v_stride, tokens - first);
            // The tiles have been multiplied by all warps.
            __syncthreads();
            const int row = warp_index() * kRows * kEmbed;
            keep_operand(grad, lefts + row);
            keep_operand(queries.features, rights + row);
            __syncthreads();
            multiply_tiles(sums, rights, feature / 8, lefts, column / 8, kTailTokens);
          });
    }
    // Of all warps.
    auto* of_warps = reinterpret_cast<float*>(lefts);
    store_columns(of_normalizer, of_warps + warp_index() * kFeatures);
    __syncthreads();
    if (threadIdx.x < kFeatures) {
      float total = 0.f;
      for (int i = 0; i < kTailWarps; ++i) total += of_warps[i * kFeatures + threadIdx.x];
      p.parts.normalizer[part * kFeatures + threadIdx.x] = total;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t row = part * kFeatures + feature + sums.row(0, i % 2);
      *reinterpret_cast<float2*>(p.parts.sums + row * kEmbed + column + sums.column(i / 2)) = {
          sums.at[0][i / 2][i % 2][0], sums.at[0][i / 2][i % 2][1]};
    }
    __syncthreads();
  }
  tail.store();
}

// Without dropout there is no seed.
Dropout dropout_of(const std::optional<Tensor>& seed, double p) {
  STD_TORCH_CHECK(p == 0 || (seed && seed->scalar_type() == ScalarType::Long && seed->numel() == 1),
                  kName, ": seed must be an int64 tensor of one element");
  return make_dropout(p, seed ? static_cast<const int64_t*>(seed->const_data_ptr()) : nullptr);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> performer_layer(
    Tensor x, Tensor w, Tensor norm1_weight, Tensor norm1_bias, Tensor kqv_weight, Tensor kqv_bias,
    Tensor proj_weight, Tensor proj_bias, Tensor norm2_weight, Tensor norm2_bias,
    Tensor mlp_0_weight, Tensor mlp_0_bias, Tensor mlp_2_weight, Tensor mlp_2_bias,
    std::optional<Tensor> seed, int64_t kernel_size, int64_t stride, int64_t padding, double eps,
    double dropout_p) {
  const DeviceScope device(x);
  const TailArguments tail(kName,
                           {proj_weight, proj_bias, norm2_weight, norm2_bias, mlp_0_weight,
                            mlp_0_bias, mlp_2_weight, mlp_2_bias},
                           x, dropout_of(seed, dropout_p));
  const RandomFeatures features(kName, w, eps);
  const Tensor kqv = soft_split_linear(x, kqv_weight, kqv_bias, norm1_weight, norm1_bias,
                                       kernel_size, stride, padding, kNormEps);
  STD_TORCH_CHECK(kqv.size(2) == 3 * kEmbed, kName, ": kqv_weight has the wrong shape");
  const int64_t images = kqv.size(0), tokens = kqv.size(1);
  Tensor out = torch::stable::new_empty(x, {images, tokens, kEmbed});
  Tensor maximum = torch::stable::new_empty(x, {images, kFeatures}, ScalarType::Float);
  Tensor normalizer = torch::stable::new_empty(x, {images, kFeatures}, ScalarType::Float);
  Tensor sums = torch::stable::new_empty(x, {images, kFeatures, kEmbed}, ScalarType::Float);
  if (images == 0) return {out, maximum, normalizer, sums};
  with_half_type(kName, x.scalar_type(), [&](auto zero) {
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
  const TailArguments tail(kName,
                           {proj_weight, proj_bias, norm2_weight, norm2_bias, mlp_0_weight,
                            mlp_0_bias, mlp_2_weight, mlp_2_bias},
                           x, dropout_of(seed, dropout_p));
  const RandomFeatures features(kName, w, eps);
  const Projected projected = project(x, kqv_weight, kqv_bias, norm1_weight, norm1_bias,
                                      kernel_size, stride, padding, kNormEps, true);
  const Tensor& kqv = projected.y;
  const int64_t images = kqv.size(0), tokens = kqv.size(1);
  STD_TORCH_CHECK(grad.dim() == 3 && grad.size(0) == images && grad.size(1) == tokens &&
                      grad.size(2) == kEmbed && grad.scalar_type() == x.scalar_type(),
                  kName, ": grad has the wrong shape or dtype");
  Tensor grad_kqv = torch::stable::new_empty(x, {images, tokens, 3 * kEmbed});
  maximum = torch::stable::contiguous(maximum);
  normalizer = torch::stable::contiguous(normalizer);
  sums = torch::stable::contiguous(sums);
  const Parts saved = {floats_of(maximum), floats_of(normalizer), floats_of(sums)};
  std::optional<TailTensors> grads;
  with_half_type(kName, x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const Chunks chunks = make_block_chunks(images, tokens, kTailTokens, device);
    const TailSlots slots(
        x, dim3(grid_size(std::min<int64_t>(chunks.count(), device.multiprocessors()))), device);
    if (images > 0) {
      const KeyMeans<T> means(x, images, true);
      means.load(saved, device);
      T* to = static_cast<T*>(grad_kqv.mutable_data_ptr());
      const PartMemory parts(x, chunks.count());
      BackwardParams p = {};
      p.w = features.floats();
      p.log_eps = features.log_eps();
      p.queries = section_of<T>(kqv, kQuery, kEmbed);
      p.values = section_of<T>(kqv, kValue, kEmbed);
      p.means = means();
      p.chunks = chunks;
      p.parts = parts.parts();
      p.grad_queries = to + kQuery * kEmbed;
      p.tail = {tail(),     rows_of<T>(grad), static_cast<int>(tokens), to + kValue * kEmbed,
                3 * kEmbed, slots.slots()};
      device.launch("performer_layer_backward", layer_backward_kernel<T>, slots.grid(),
                    kTailWarps * kLanes, kBackwardBytes, p);
      PerformerPasses<T>{features, images, tokens, device}.keys_backward(
          section_of<T>(kqv, kKey, kEmbed), p.values, section_of<T>(grad_kqv, kValue, kEmbed), x,
          saved, p.parts, chunks.chunks, to + kKey * kEmbed, to + kValue * kEmbed, 3 * kEmbed);
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
