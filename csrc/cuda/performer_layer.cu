// The Performer layer on CUDA: soft split, norm, projection to k, q and v, attention, tail.
//
// Forward, two passes over the patches: warps make k and v of their tokens and the sums over keys;
// then, with an image's sums combined, q and v, the attention and the tail, 16 tokens a warp.
// Making q and v a second time costs less than writing and reading them, and no token reaches
// memory but the layer's own result.
//
// Backward, three such passes lead to the gradient of k, q and v, the only memory per token, and
// what remains is the backward of soft_split_linear:
//   tail      forward again up to the MLP, then back through the tail: the gradient of y goes to
//   q's
//             place, that of the skip to v's, the tail's own to a slot per block
//   queries   that of y becomes that of q, and parts of those of the sums
//   keys      that of k, and the rest of that of v
// Operands of the tail's products are rounded to the map's type, as plain PyTorch rounds every
// intermediate; the attention is float32 (see performer.cuh).

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "layer.cuh"
#include "performer.cuh"
#include "soft_split_linear.h"

namespace t2t {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr const char* kName = "performer_layer";
enum Section { kKey, kQuery, kValue };

__device__ inline void limit(Wide& sums) {
#pragma unroll
  for (int i = 0; i < 16 * kWidestGroups; ++i) {
    float& value = sums.at[i / 16][i / 8 % 2][i % 8];
    value = within_range(value);
  }
}

struct KeysParams {
  Projection projection;
  Features w;
  int chunk, chunks;  // tokens of a warp; warps of an image
  Parts parts;
  int warp_bytes;
};

constexpr int kKeysBytes = (2 * kTileFloats + kRows * kFeaturePitch + kGroup) * sizeof(float);

// blockIdx.y: 32 features.
template <typename T>
__global__ void __launch_bounds__(kWarps* kLanes) layer_keys_kernel(const KeysParams p) {
  const int64_t part = int64_t(blockIdx.x) * (blockDim.x / kLanes) + warp_index();
  if (part >= p.projection.images * p.chunks) return;
  const int64_t image = part / p.chunks;
  const int first = static_cast<int>(part - image * p.chunks) * p.chunk;
  const int tokens = p.projection.tokens;
  char* shared = reinterpret_cast<char*>(dynamic_shared) + warp_index() * p.warp_bytes;
  auto* keys = reinterpret_cast<float*>(shared);
  float* values = keys + kTileFloats;
  float* features = values + kTileFloats;

  RunningSums running;
  running.sums.clear();
  for (int at = first; at < min(first + p.chunk, tokens); at += kRows) {
    Wide made[2];
    project<T, 2>(p.projection, shared, image, at, {kKey, kValue}, made);
    limit(made[0]);
    keep_sums(made[0], keys, kTilePitch);
    keep_sums(made[1], values, kTilePitch);
    __syncwarp();
    running.add(p.w, keys, values, blockIdx.y, tokens - at, features,
                features + kRows * kFeaturePitch);
  }
  running.store(p.w, p.parts, part, blockIdx.y);
}

struct QueriesParams {
  Projection projection;
  Features w;
  Tail tail;
  const float *maximum, *normalizer, *packed;
  void* out;
  int warp_bytes;
};

constexpr int kQueriesBytes = kTileFloats * sizeof(float);

template <typename T>
__global__ void __launch_bounds__(kWarps* kLanes, 2) layer_queries_kernel(const QueriesParams p) {
  const Projection& projection = p.projection;
  const int64_t tile = int64_t(blockIdx.x) * (blockDim.x / kLanes) + warp_index();
  if (tile >= projection.images * projection.tiles) return;
  const int64_t image = tile / projection.tiles;
  const int first = static_cast<int>(tile - image * projection.tiles) * kRows;
  const int64_t first_token = image * projection.tokens + first;
  char* shared = reinterpret_cast<char*>(dynamic_shared) + warp_index() * p.warp_bytes;
  auto* queries = reinterpret_cast<float*>(shared);
  T* operand = reinterpret_cast<T*>(shared);

  Wide made[2];
  project<T, 2>(projection, shared, image, first, {kQuery, kValue}, made);
  limit(made[0]);
  keep_sums(made[0], queries, kTilePitch);
  __syncwarp();
  const KeySums keys = {p.maximum + image * p.w.count, p.normalizer + image * p.w.count,
                        p.packed + image * p.w.packed_floats(), nullptr};
  const Attended attended = attend(p.w, keys, queries, queries);

  const Wide out = tail_forward<T, true>(
      p.tail, attended.y, [&](Wide& a) { add(a, made[1]); }, first_token, operand);
  const int embed = projection.embed;
  store_rows(out, static_cast<T*>(p.out) + first_token * embed, projection.tokens - first, embed,
             embed);
}

struct TailBackwardParams {
  Projection projection;
  Features w;
  const float *maximum, *normalizer, *packed;
  TailBackward backward;
};

template <typename T>
__global__ void __launch_bounds__(kWarps* kLanes, 2)
    performer_tail_backward_kernel(const TailBackwardParams p) {
  tail_backward<T, true>(p.backward, [&](int64_t image, int first, char* shared, T* kept_y) {
    auto* queries = reinterpret_cast<float*>(shared);
    Wide made[2];
    project<T, 2>(p.projection, shared, image, first, {kQuery, kValue}, made);
    limit(made[0]);
    keep_sums(made[0], queries, kTilePitch);
    __syncwarp();
    const KeySums keys = {p.maximum + image * p.w.count, p.normalizer + image * p.w.count,
                          p.packed + image * p.w.packed_floats(), nullptr};
    const Attended attended = attend(p.w, keys, queries, queries);
    // The features have been multiplied by all lanes.
    __syncwarp();
    keep_rounded(attended.y, kept_y);
    return made[1];
  });
}

struct QueriesBackwardParams {
  Projection projection;
  Features w;
  const float *maximum, *normalizer, *packed, *packed_t;
  void* grad_kqv;
  int chunk, chunks;  // tokens of a block; blocks of an image
  Parts parts;
  int warp_bytes;
};

// Each warp takes 16 of a block's 32 tokens; the gradients of the sums are then shared out the
// other way, by features.
template <typename T>
__global__ void __launch_bounds__(kGradientWarps* kLanes)
    layer_queries_backward_kernel(const QueriesBackwardParams p) {
  const Projection& projection = p.projection;
  const int64_t image = blockIdx.x / p.chunks;
  const int begin = blockIdx.x % p.chunks * p.chunk;
  auto* all_features = reinterpret_cast<float*>(dynamic_shared);
  float* all_grads = all_features + kGradientWarps * kTileFloats;
  float* of_normalizer = all_grads + kGradientWarps * kTileFloats;
  float* features = all_features + warp_index() * kTileFloats;
  float* grads = all_grads + warp_index() * kTileFloats;
  char* shared =
      reinterpret_cast<char*>(of_normalizer + kGradientWarps * kRows) + warp_index() * p.warp_bytes;
  auto* queries = reinterpret_cast<float*>(shared);
  const KeySums keys = {p.maximum + image * p.w.count, p.normalizer + image * p.w.count,
                        p.packed + image * p.w.packed_floats(),
                        p.packed_t + image * p.w.packed_t_floats()};
  const int64_t row = 3 * p.w.embed;
  const bool vectors = p.w.embed % Vec<T>::size == 0;
  const Rows grad_y = {static_cast<const T*>(p.grad_kqv) + kQuery * p.w.embed,
                       projection.tokens * row, row, 1, vectors};
  SumGradients sums;
  sums.clear();
  for (int block_at = begin; block_at < min(begin + p.chunk, projection.tokens);
       block_at += kGradientWarps * kRows) {
    const int first = block_at + warp_index() * kRows;
    {
      Wide made[1];
      project<T, 1>(projection, shared, image, first, {kQuery}, made);
      limit(made[0]);
      keep_sums(made[0], queries, kTilePitch);
    }
    __syncwarp();
    const Attended attended = attend(p.w, keys, queries, features);
    Wide grad;
    load_rows<T>(grad_y, image, first, projection.tokens, p.w.embed, grad);
    const Wide grad_queries = attend_backward(p.w, keys, attended, grad, queries, features, grads,
                                              of_normalizer + warp_index() * kRows);
    store_rows(grad_queries,
               static_cast<T*>(p.grad_kqv) + (image * projection.tokens + first) * row +
                   kQuery * p.w.embed,
               projection.tokens - first, p.w.embed, row);
    __syncthreads();
    sums.add(p.w, all_features, all_grads, of_normalizer);
    __syncthreads();
  }
  sums.store(p.w, p.parts, blockIdx.x);
}

struct KeysBackwardParams {
  Projection projection;
  Features w;
  const float *maximum, *normalizer, *packed, *packed_t;  // the last three are gradients
  void* grad_kqv;
  int warp_bytes;
};

template <typename T>
__global__ void __launch_bounds__(kWarps* kLanes, 2)
    layer_keys_backward_kernel(const KeysBackwardParams p) {
  const Projection& projection = p.projection;
  const int64_t tile = int64_t(blockIdx.x) * (blockDim.x / kLanes) + warp_index();
  if (tile >= projection.images * projection.tiles) return;
  const int64_t image = tile / projection.tiles;
  const int first = static_cast<int>(tile - image * projection.tiles) * kRows;
  char* shared = reinterpret_cast<char*>(dynamic_shared) + warp_index() * p.warp_bytes;
  auto* keys = reinterpret_cast<float*>(shared);
  float* values = keys + kTileFloats;
  {
    Wide made[2];
    project<T, 2>(projection, shared, image, first, {kKey, kValue}, made);
    limit(made[0]);
    keep_sums(made[0], keys, kTilePitch);
    keep_sums(made[1], values, kTilePitch);
  }
  __syncwarp();
  const KeySums sums = {p.maximum + image * p.w.count, nullptr, nullptr, nullptr};
  const KeySums grads = {nullptr, p.normalizer + image * p.w.count,
                         p.packed + image * p.w.packed_floats(),
                         p.packed_t + image * p.w.packed_t_floats()};
  Wide grad_keys, grad_values;
  keys_backward(p.w, sums, grads, keys, values, grad_keys, grad_values);
  const int64_t row = 3 * p.w.embed;
  const bool vectors = p.w.embed % Vec<T>::size == 0;
  T* to = static_cast<T*>(p.grad_kqv) + (image * projection.tokens + first) * row;
  store_rows(grad_keys, to + kKey * p.w.embed, projection.tokens - first, p.w.embed, row);
  add_rows<T>({static_cast<const T*>(p.grad_kqv) + kValue * p.w.embed, projection.tokens * row, row,
               1, vectors},
              image, first, projection.tokens, p.w.embed, grad_values);
  store_rows(grad_values, to + kValue * p.w.embed, projection.tokens - first, p.w.embed, row);
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
  Layer layer(kName, x, norm1_weight, norm1_bias, kqv_weight, kqv_bias,
              {proj_weight, proj_bias, norm2_weight, norm2_bias, mlp_0_weight, mlp_0_bias,
               mlp_2_weight, mlp_2_bias},
              kernel_size, stride, padding, false);
  layer.tail.dropout = dropout_of(seed, dropout_p);
  const DeviceScope& device = layer.device();
  const PackedFeatures packed_w(kName, w, eps, false, device);
  const Features& f = packed_w.features();
  STD_TORCH_CHECK(f.embed == layer.tail.embed, kName, ": w must be (m, E)");
  const int64_t images = layer.projection.images, tokens = layer.projection.tokens;
  const int64_t tiles = layer.projection.tiles;
  Tensor out = torch::stable::new_empty(x, {images, tokens, f.embed});
  Tensor maximum = torch::stable::new_empty(x, {images, f.count}, ScalarType::Float);
  Tensor normalizer = torch::stable::new_empty(x, {images, f.count}, ScalarType::Float);
  Tensor sums = torch::stable::new_empty(x, {images, f.count, f.embed}, ScalarType::Float);
  if (images == 0) return {out, maximum, normalizer, sums};
  const int64_t chunk = kRows * tiles_of_part(images * tiles * f.groups(), device);
  const int64_t chunks = divide_up(tokens, chunk);
  const PartMemory parts(x, f, images * chunks);
  const Tensor packed = new_floats(x, images * f.packed_floats());
  with_element_type(kName, x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    KeysParams keys = {};
    int warps = kWarps;
    keys.projection = layer.in_shared<T>(warps, kKeysBytes, 0, keys.warp_bytes, true);
    keys.w = f;
    keys.chunk = static_cast<int>(chunk);
    keys.chunks = static_cast<int>(chunks);
    keys.parts = parts.parts();
    device.launch("performer_layer_keys", layer_keys_kernel<T>,
                  dim3(static_cast<unsigned>(divide_up(images * chunks, warps)),
                       static_cast<unsigned>(f.groups())),
                  warps * kLanes, warps * keys.warp_bytes, keys);
    launch_combine<true>({f, parts.parts(), keys.chunks, images, floats_of(maximum),
                          floats_of(normalizer), floats_of(sums), floats_of(packed), nullptr},
                         device);
    QueriesParams queries = {};
    warps = kWarps;
    queries.projection = layer.in_shared<T>(warps, kQueriesBytes, 0, queries.warp_bytes, true);
    queries.w = f;
    queries.tail = layer.tail;
    queries.maximum = floats_of(maximum);
    queries.normalizer = floats_of(normalizer);
    queries.packed = floats_of(packed);
    queries.out = out.mutable_data_ptr();
    device.launch("performer_layer_queries", layer_queries_kernel<T>,
                  dim3(static_cast<unsigned>(divide_up(images * tiles, warps))), warps * kLanes,
                  warps * queries.warp_bytes, queries);
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
  Layer layer(kName, x, norm1_weight, norm1_bias, kqv_weight, kqv_bias,
              {proj_weight, proj_bias, norm2_weight, norm2_bias, mlp_0_weight, mlp_0_bias,
               mlp_2_weight, mlp_2_bias},
              kernel_size, stride, padding, true);
  layer.tail.dropout = dropout_of(seed, dropout_p);
  const DeviceScope& device = layer.device();
  const PackedFeatures packed_w(kName, w, eps, true, device);
  const Features& f = packed_w.features();
  STD_TORCH_CHECK(f.embed == layer.tail.embed, kName, ": w must be (m, E)");
  const int64_t images = layer.projection.images, tokens = layer.projection.tokens;
  const int64_t tiles = layer.projection.tiles, hidden = layer.tail.hidden, embed = f.embed;
  layer.check_gradient(grad);
  Tensor grad_kqv = torch::stable::new_empty(x, {images, tokens, 3 * embed});
  maximum = torch::stable::contiguous(maximum);
  normalizer = torch::stable::contiguous(normalizer);
  sums = torch::stable::contiguous(sums);
  const TailSlots slots(x, images, tokens, device);
  const int64_t chunk = kGradientWarps * kRows * tiles_of_part(images * tiles, device);
  const int64_t chunks = divide_up(tokens, chunk);
  const PartMemory parts(x, f, images * chunks);
  const Tensor of_normalizer = new_floats(x, images * f.count);
  const Tensor of_packed = new_floats(x, images * f.packed_floats());
  const Tensor of_packed_t = new_floats(x, images * f.packed_t_floats());
  std::optional<Tensor> packed, packed_t;
  if (images > 0) {
    packed = packed_floats(sums, images, f.count, f.embed, false, device);
    packed_t = packed_floats(sums, images, f.count, f.embed, true, device);
  }
  std::optional<TailTensors> grads;
  with_element_type(kName, x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    if (images > 0) {
      TailBackwardParams tail = {};
      T* to = static_cast<T*>(grad_kqv.mutable_data_ptr());
      tail.backward = layer.tail_backward_of<T>(grad, slots, to + kQuery * embed, 3 * embed,
                                                to + kValue * embed, 3 * embed);
      int warps = kWarps;
      tail.projection =
          layer.in_shared<T>(warps, std::max(kQueriesBytes, tail_bytes<T>()),
                             tail_operand_bytes<T>(), tail.backward.warp_bytes, false);
      tail.w = f;
      tail.maximum = floats_of(maximum);
      tail.normalizer = floats_of(normalizer);
      tail.packed = floats_of(*packed);
      launch_tail_backward<T>(performer_tail_backward_kernel<T>, slots, tail, device);

      QueriesBackwardParams queries = {};
      warps = kGradientWarps;
      const int shared_tiles =
          kGradientWarps * (2 * kTileFloats + kRows) * static_cast<int>(sizeof(float));
      queries.projection = layer.in_shared<T>(warps, kTileFloats * static_cast<int>(sizeof(float)),
                                              shared_tiles, queries.warp_bytes, false);
      queries.w = f;
      queries.maximum = tail.maximum;
      queries.normalizer = tail.normalizer;
      queries.packed = tail.packed;
      queries.packed_t = floats_of(*packed_t);
      queries.grad_kqv = to;
      queries.chunk = static_cast<int>(chunk);
      queries.chunks = static_cast<int>(chunks);
      queries.parts = parts.parts();
      device.launch("performer_layer_queries_backward", layer_queries_backward_kernel<T>,
                    dim3(static_cast<unsigned>(images * chunks)), kGradientWarps * kLanes,
                    shared_tiles + kGradientWarps * queries.warp_bytes, queries);
      launch_combine<false>(
          {f, parts.parts(), queries.chunks, images, nullptr, floats_of(of_normalizer), nullptr,
           floats_of(of_packed), floats_of(of_packed_t)},
          device);

      KeysBackwardParams keys = {};
      warps = kWarps;
      keys.projection = layer.in_shared<T>(warps, 2 * kQueriesBytes, 0, keys.warp_bytes, true);
      keys.w = f;
      keys.maximum = tail.maximum;
      keys.normalizer = floats_of(of_normalizer);
      keys.packed = floats_of(of_packed);
      keys.packed_t = floats_of(of_packed_t);
      keys.grad_kqv = to;
      device.launch("performer_layer_keys_backward", layer_keys_backward_kernel<T>,
                    dim3(static_cast<unsigned>(divide_up(images * tiles, warps))), warps * kLanes,
                    warps * keys.warp_bytes, keys);
    }
    grads = slots.finish<T>(embed, hidden, x, device);
  });
  auto [grad_x, grad_kqv_weight, grad_kqv_bias, grad_norm_weight, grad_norm_bias] =
      soft_split_linear_backward(grad_kqv, x, kqv_weight, norm1_weight, norm1_bias, kernel_size,
                                 stride, padding, kNormEps, need_x);
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
