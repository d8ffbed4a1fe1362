// Performer attention on CUDA: two passes over the tokens in each direction.
//
// Forward, warps take the sums over their tokens' keys under maxima of their own; these parts are
// combined per image, and a warp makes the result of 16 queries. Backward, the queries go first and
// leave, per block, a part of the sums' gradients; then the keys and values.
//
// Everything is float32 (see performer.cuh), hence no matrix unit; a token costs 2·4·E·m operations
// forward and reads 6 bytes an element in a half type, so that arithmetic is the limit.

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
// Four warps' tiles of keys, values and features are 43 KiB.
constexpr int kWarps = 4;

struct KeysParams {
  Features w;
  Rows keys, values;
  int tokens, chunk, chunks;  // tokens of an image and of a warp; warps of an image
  int64_t images;
  Parts parts;
};

constexpr int kKeysFloats = 2 * kTileFloats + kRows * kFeaturePitch + kGroup;

// blockIdx.y: 32 features.
template <typename T>
__global__ void __launch_bounds__(kWarps* kLanes) keys_kernel(const KeysParams p) {
  const int64_t part = int64_t(blockIdx.x) * kWarps + warp_index();
  if (part >= p.images * p.chunks) return;
  const int64_t image = part / p.chunks;
  const int first = static_cast<int>(part - image * p.chunks) * p.chunk;
  float* keys = reinterpret_cast<float*>(dynamic_shared) + warp_index() * kKeysFloats;
  float* values = keys + kTileFloats;
  float* features = values + kTileFloats;
  float* shrink = features + kRows * kFeaturePitch;

  RunningSums running;
  running.sums.clear();
  for (int at = first; at < min(first + p.chunk, p.tokens); at += kRows) {
    __syncwarp();
    load_tile<T>(p.keys, image, at, p.tokens, p.w.embed, true, keys);
    load_tile<T>(p.values, image, at, p.tokens, p.w.embed, false, values);
    __syncwarp();
    running.add(p.w, keys, values, blockIdx.y, p.tokens - at, features, shrink);
  }
  running.store(p.w, p.parts, part, blockIdx.y);
}

struct QueriesParams {
  Features w;
  Rows queries;
  const float *maximum, *normalizer, *packed;
  void* y;
  int tokens, tiles;
  int64_t images;
};

template <typename T>
__global__ void __launch_bounds__(kWarps* kLanes) queries_kernel(const QueriesParams p) {
  const int64_t tile = int64_t(blockIdx.x) * kWarps + warp_index();
  if (tile >= p.images * p.tiles) return;
  const int64_t image = tile / p.tiles;
  const int first = static_cast<int>(tile - image * p.tiles) * kRows;
  float* queries = reinterpret_cast<float*>(dynamic_shared) + warp_index() * kTileFloats;
  load_tile<T>(p.queries, image, first, p.tokens, p.w.embed, true, queries);
  __syncwarp();
  const KeySums keys = {p.maximum + image * p.w.count, p.normalizer + image * p.w.count,
                        p.packed + image * p.w.packed_floats(), nullptr};
  const Attended attended = attend(p.w, keys, queries, queries);
  store_rows(attended.y, static_cast<T*>(p.y) + (image * p.tokens + first) * p.w.embed,
             p.tokens - first, p.w.embed, p.w.embed);
}

struct QueriesBackwardParams {
  Features w;
  Rows queries, grads;
  const float *maximum, *normalizer, *packed, *packed_t;
  void* grad_queries;
  int tokens, chunk, chunks;  // tokens of an image and of a block; blocks of an image
  Parts parts;
};

constexpr int kQueriesBackwardFloats = kGradientWarps * (3 * kTileFloats + kRows);

// Each warp takes 16 of a block's 32 tokens; the gradients of the sums are then shared out the
// other way, by features.
template <typename T>
__global__ void __launch_bounds__(kGradientWarps* kLanes)
    queries_backward_kernel(const QueriesBackwardParams p) {
  const int64_t image = blockIdx.x / p.chunks;
  const int first = blockIdx.x % p.chunks * p.chunk;
  auto* all_features = reinterpret_cast<float*>(dynamic_shared);
  float* all_grads = all_features + kGradientWarps * kTileFloats;
  float* of_normalizer = all_grads + kGradientWarps * kTileFloats;
  float* features = all_features + warp_index() * kTileFloats;
  float* grads = all_grads + warp_index() * kTileFloats;
  float* queries = of_normalizer + kGradientWarps * kRows + warp_index() * kTileFloats;
  const KeySums keys = {p.maximum + image * p.w.count, p.normalizer + image * p.w.count,
                        p.packed + image * p.w.packed_floats(),
                        p.packed_t + image * p.w.packed_t_floats()};
  SumGradients sums;
  sums.clear();
  for (int block_at = first; block_at < min(first + p.chunk, p.tokens);
       block_at += kGradientWarps * kRows) {
    const int at = block_at + warp_index() * kRows;
    load_tile<T>(p.queries, image, at, p.tokens, p.w.embed, true, queries);
    __syncwarp();
    const Attended attended = attend(p.w, keys, queries, features);
    Wide grad;
    load_rows<T>(p.grads, image, at, p.tokens, p.w.embed, grad);
    const Wide grad_queries = attend_backward(p.w, keys, attended, grad, queries, features, grads,
                                              of_normalizer + warp_index() * kRows);
    store_rows(grad_queries, static_cast<T*>(p.grad_queries) + (image * p.tokens + at) * p.w.embed,
               p.tokens - at, p.w.embed, p.w.embed);
    __syncthreads();
    sums.add(p.w, all_features, all_grads, of_normalizer);
    __syncthreads();
  }
  sums.store(p.w, p.parts, blockIdx.x);
}

struct KeysBackwardParams {
  Features w;
  Rows keys, values;
  const float *maximum, *normalizer, *packed, *packed_t;  // the last three are gradients
  void *grad_keys, *grad_values;
  int tokens, tiles;
  int64_t images;
};

template <typename T>
__global__ void __launch_bounds__(kWarps* kLanes) keys_backward_kernel(const KeysBackwardParams p) {
  const int64_t tile = int64_t(blockIdx.x) * kWarps + warp_index();
  if (tile >= p.images * p.tiles) return;
  const int64_t image = tile / p.tiles;
  const int first = static_cast<int>(tile - image * p.tiles) * kRows;
  float* keys = reinterpret_cast<float*>(dynamic_shared) + warp_index() * 2 * kTileFloats;
  float* values = keys + kTileFloats;
  load_tile<T>(p.keys, image, first, p.tokens, p.w.embed, true, keys);
  load_tile<T>(p.values, image, first, p.tokens, p.w.embed, false, values);
  __syncwarp();
  const KeySums sums = {p.maximum + image * p.w.count, nullptr, nullptr, nullptr};
  const KeySums grads = {nullptr, p.normalizer + image * p.w.count,
                         p.packed + image * p.w.packed_floats(),
                         p.packed_t + image * p.w.packed_t_floats()};
  Wide grad_keys, grad_values;
  keys_backward(p.w, sums, grads, keys, values, grad_keys, grad_values);
  const int64_t at = (image * p.tokens + first) * p.w.embed;
  store_rows(grad_keys, static_cast<T*>(p.grad_keys) + at, p.tokens - first, p.w.embed, p.w.embed);
  store_rows(grad_values, static_cast<T*>(p.grad_values) + at, p.tokens - first, p.w.embed,
             p.w.embed);
}

void check(const Tensor& k, const Tensor& q, const Tensor& v, const Tensor& w) {
  check_alike(kName, v, {&k, &q});
  STD_TORCH_CHECK(w.dim() == 2 && w.size(1) == v.size(2), kName, ": w must be (m, E)");
}

std::tuple<Tensor, Tensor, Tensor, Tensor> performer_attention(Tensor k, Tensor q, Tensor v,
                                                               Tensor w, double eps) {
  check(k, q, v, w);
  const DeviceScope device(v);
  const int64_t images = v.size(0), tokens = v.size(1), embed = v.size(2), count = w.size(0);
  Tensor y = torch::stable::new_empty(v, {images, tokens, embed});
  Tensor maximum = torch::stable::new_empty(v, {images, count}, ScalarType::Float);
  Tensor normalizer = torch::stable::new_empty(v, {images, count}, ScalarType::Float);
  Tensor sums = torch::stable::new_empty(v, {images, count, embed}, ScalarType::Float);
  const PackedFeatures packed_w(kName, w, eps, false, device);
  const Features& f = packed_w.features();
  if (images == 0) return {y, maximum, normalizer, sums};
  const int64_t tiles = divide_up(tokens, kRows);
  const int64_t chunk = kRows * tiles_of_part(images * tiles * f.groups(), device);
  const int64_t chunks = divide_up(tokens, chunk);
  const PartMemory parts(v, f, images * chunks);
  const Tensor packed = new_floats(v, images * f.packed_floats());
  with_element_type(kName, v.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    KeysParams keys = {};
    keys.w = f;
    keys.keys = rows_of<T>(k);
    keys.values = rows_of<T>(v);
    keys.tokens = static_cast<int>(tokens);
    keys.chunk = static_cast<int>(chunk);
    keys.chunks = static_cast<int>(chunks);
    keys.images = images;
    keys.parts = parts.parts();
    device.launch("performer_attention_keys", keys_kernel<T>,
                  dim3(static_cast<unsigned>(divide_up(images * chunks, kWarps)),
                       static_cast<unsigned>(f.groups())),
                  kWarps * kLanes, kWarps * kKeysFloats * sizeof(float), keys);
    CombineParams combine = {f,
                             parts.parts(),
                             keys.chunks,
                             images,
                             floats_of(maximum),
                             floats_of(normalizer),
                             floats_of(sums),
                             floats_of(packed),
                             nullptr};
    launch_combine<true>(combine, device);
    QueriesParams queries = {};
    queries.w = f;
    queries.queries = rows_of<T>(q);
    queries.maximum = combine.maximum;
    queries.normalizer = combine.normalizer;
    queries.packed = combine.packed;
    queries.y = y.mutable_data_ptr();
    queries.tokens = keys.tokens;
    queries.tiles = static_cast<int>(tiles);
    queries.images = images;
    device.launch("performer_attention_queries", queries_kernel<T>,
                  dim3(static_cast<unsigned>(divide_up(images * tiles, kWarps))), kWarps * kLanes,
                  kWarps * kTileFloats * sizeof(float), queries);
  });
  return {y, maximum, normalizer, sums};
}

std::tuple<Tensor, Tensor, Tensor> performer_attention_backward(Tensor grad, Tensor k, Tensor q,
                                                                Tensor v, Tensor w, Tensor maximum,
                                                                Tensor normalizer, Tensor sums,
                                                                double eps) {
  check(k, q, v, w);
  check(grad, q, v, w);
  const DeviceScope device(v);
  const int64_t images = v.size(0), tokens = v.size(1), embed = v.size(2);
  Tensor grad_k = torch::stable::new_empty(v, {images, tokens, embed});
  Tensor grad_q = torch::stable::new_empty(v, {images, tokens, embed});
  Tensor grad_v = torch::stable::new_empty(v, {images, tokens, embed});
  if (images == 0) return {grad_k, grad_q, grad_v};
  const PackedFeatures packed_w(kName, w, eps, true, device);
  const Features& f = packed_w.features();
  maximum = torch::stable::contiguous(maximum);
  normalizer = torch::stable::contiguous(normalizer);
  sums = torch::stable::contiguous(sums);
  const Tensor packed = packed_floats(sums, images, f.count, f.embed, false, device);
  const Tensor packed_t = packed_floats(sums, images, f.count, f.embed, true, device);
  const int64_t tiles = divide_up(tokens, kRows);
  const int64_t chunk = kGradientWarps * kRows * tiles_of_part(images * tiles, device);
  const int64_t chunks = divide_up(tokens, chunk);
  const PartMemory parts(v, f, images * chunks);
  // The sums' gradients: normaliser and packed forms.
  const Tensor of_normalizer = new_floats(v, images * f.count);
  const Tensor of_packed = new_floats(v, images * f.packed_floats());
  const Tensor of_packed_t = new_floats(v, images * f.packed_t_floats());
  with_element_type(kName, v.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    QueriesBackwardParams queries = {};
    queries.w = f;
    queries.queries = rows_of<T>(q);
    queries.grads = rows_of<T>(grad);
    queries.maximum = floats_of(maximum);
    queries.normalizer = floats_of(normalizer);
    queries.packed = floats_of(packed);
    queries.packed_t = floats_of(packed_t);
    queries.grad_queries = grad_q.mutable_data_ptr();
    queries.tokens = static_cast<int>(tokens);
    queries.chunk = static_cast<int>(chunk);
    queries.chunks = static_cast<int>(chunks);
    queries.parts = parts.parts();
    device.launch("performer_attention_queries_backward", queries_backward_kernel<T>,
                  dim3(static_cast<unsigned>(images * chunks)), kGradientWarps * kLanes,
                  kQueriesBackwardFloats * sizeof(float), queries);
    launch_combine<false>(
        {f, parts.parts(), queries.chunks, images, nullptr, floats_of(of_normalizer), nullptr,
         floats_of(of_packed), floats_of(of_packed_t)},
        device);
    KeysBackwardParams keys = {};
    keys.w = f;
    keys.keys = rows_of<T>(k);
    keys.values = rows_of<T>(v);
    keys.maximum = queries.maximum;
    keys.normalizer = floats_of(of_normalizer);
    keys.packed = floats_of(of_packed);
    keys.packed_t = floats_of(of_packed_t);
    keys.grad_keys = grad_k.mutable_data_ptr();
    keys.grad_values = grad_v.mutable_data_ptr();
    keys.tokens = queries.tokens;
    keys.tiles = static_cast<int>(tiles);
    keys.images = images;
    device.launch("performer_attention_keys_backward", keys_backward_kernel<T>,
                  dim3(static_cast<unsigned>(divide_up(images * tiles, kWarps))), kWarps * kLanes,
                  kWarps * 2 * kTileFloats * sizeof(float), keys);
  });
  return {grad_k, grad_q, grad_v};
}

STABLE_TORCH_LIBRARY_IMPL(t2t_cuda, T2T_DISPATCH_KEY, m) {
  m.impl("performer_attention", TORCH_BOX(&performer_attention));
  m.impl("performer_attention_backward", TORCH_BOX(&performer_attention_backward));
}

}  // namespace
}  // namespace t2t
