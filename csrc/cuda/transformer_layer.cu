// The T2T layer with softmax attention on CUDA: soft split, norm, projection to q, k and v,
// attention, tail.
//
// Forward, two kernels: q, k and v of 16 tokens a warp; then the attention, whose block passes its
// rows of y on to the tail. The T×T weights never reach memory, nor do the tokens.
//
// Backward:
//   tail     v once more, and back through the tail: the gradient of y, that of the skip (to v's
//            place), a slot of the tail's own gradients per block
//   softmax  the gradients of q; then those of k and, on top of the skip's, of v (see softmax.cuh)
// and what remains is the backward of soft_split_linear.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <tuple>

#include "layer.cuh"
#include "soft_split_linear.h"
#include "softmax.cuh"

namespace t2t {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr const char* kName = "transformer_layer";
enum Section { kQuery, kKey, kValue };

struct ProjectParams {
  Projection projection;
  void* to[3];  // each (image, token, embed)
  int warp_bytes;
};

template <typename T>
__global__ void __launch_bounds__(kWarps* kLanes, 2) layer_project_kernel(const ProjectParams p) {
  const Projection& projection = p.projection;
  const int64_t tile = int64_t(blockIdx.x) * (blockDim.x / kLanes) + warp_index();
  if (tile >= projection.images * projection.tiles) return;
  const int64_t image = tile / projection.tiles;
  const int first = static_cast<int>(tile - image * projection.tiles) * kRows;
  const int embed = projection.embed;
  char* shared = reinterpret_cast<char*>(dynamic_shared) + warp_index() * p.warp_bytes;
  Wide made[3];
  project<T, 3>(projection, shared, image, first, {kQuery, kKey, kValue}, made);
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    store_rows(made[i], static_cast<T*>(p.to[i]) + (image * projection.tokens + first) * embed,
               projection.tokens - first, embed, embed);
  }
}

struct AttendParams {
  SoftmaxInputs in;
  Tail tail;
  void* out;
  float *attended, *maximum, *normalizer;
};

// Half types get along with the 128 registers of two blocks a multiprocessor; nvcc finds that by
// itself, and where it is told it spills on 10.0, unless it multiplies by warpgroup. float32 spills
// with two on 12.0; only 9.0 has the shared memory for a second block, and pays for it.
template <typename T>
__global__ void __launch_bounds__(kForwardWarps* kLanes, kExact<T>         ? 1
                                                         : kByWarpgroup<T> ? 2
                                                                           : 0)
    layer_attend_kernel(const AttendParams p) {
  const Block<T, kForwardWarps> block(p.in);
  const StagedRows rows = attend<T>(p.in, block, p.maximum, p.normalizer);
  if (block.first >= block.tokens) return;
  rows.store(p.attended, block.embed, block);
  Wide y;
  take_sums(rows.rows, y);
  const int64_t first_token = block.row(block.first);
  const auto add_v = [&](Wide& a) {
    add_rows<T>(p.in.values, block.image, block.first, block.tokens, block.embed, a);
  };
  T* operand = reinterpret_cast<T*>(rows.rows);
  const Wide out = tail_forward<T, false>(p.tail, y, add_v, first_token, operand);
  store_rows(out, static_cast<T*>(p.out) + first_token * block.embed, block.tokens - block.first,
             block.embed, block.embed);
}

struct TailBackwardParams {
  Projection projection;
  Rows attended;
  void* values;  // (image, token, embed)
  TailBackward backward;
};

template <typename T>
__global__ void __launch_bounds__(kWarps* kLanes, 2)
    transformer_tail_backward_kernel(const TailBackwardParams p) {
  const int embed = p.projection.embed, tokens = p.projection.tokens;
  tail_backward<T, false>(p.backward, [&](int64_t image, int first, char* shared, T* kept_y) {
    Wide v[1], y;
    project<T, 1>(p.projection, shared, image, first, {kValue}, v);
    store_rows(v[0], static_cast<T*>(p.values) + (image * tokens + first) * embed, tokens - first,
               embed, embed);
    // Rounded, as the forward read it.
#pragma unroll
    for (int i = 0; i < 16 * kWidestGroups; ++i) {
      float& value = v[0].at[i / 16][i / 8 % 2][i % 8];
      value = static_cast<float>(static_cast<T>(value));
    }
    load_rows<float>(p.attended, image, first, tokens, embed, y);
    keep_rounded(y, kept_y);
    return v[0];
  });
}

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Results transformer_layer(Tensor x, Tensor norm1_weight, Tensor norm1_bias, Tensor qkv_weight,
                          Tensor proj_weight, Tensor proj_bias, Tensor norm2_weight,
                          Tensor norm2_bias, Tensor mlp_fc1_weight, Tensor mlp_fc1_bias,
                          Tensor mlp_fc2_weight, Tensor mlp_fc2_bias, int64_t kernel_size,
                          int64_t stride, int64_t padding, double scale) {
  const Layer layer(kName, x, norm1_weight, norm1_bias, qkv_weight, std::nullopt,
                    {proj_weight, proj_bias, norm2_weight, norm2_bias, mlp_fc1_weight, mlp_fc1_bias,
                     mlp_fc2_weight, mlp_fc2_bias},
                    kernel_size, stride, padding, false);
  const DeviceScope& device = layer.device();
  const int64_t images = layer.projection.images, tokens = layer.projection.tokens;
  const int64_t embed = layer.projection.embed;
  const auto rows = [&] { return torch::stable::new_empty(x, {images, tokens, embed}); };
  Tensor out = rows(), q = rows(), k = rows(), v = rows();
  Tensor attended = torch::stable::new_empty(x, {images, tokens, embed}, ScalarType::Float);
  Tensor maximum = torch::stable::new_empty(x, {images, tokens}, ScalarType::Float);
  Tensor normalizer = torch::stable::new_empty(x, {images, tokens}, ScalarType::Float);
  if (images == 0) return {out, q, k, attended, maximum, normalizer};
  with_element_type(kName, x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    ProjectParams project = {};
    int warps = kWarps;
    project.projection = layer.in_shared<T>(warps, 0, 0, project.warp_bytes, true);
    project.to[kQuery] = q.mutable_data_ptr();
    project.to[kKey] = k.mutable_data_ptr();
    project.to[kValue] = v.mutable_data_ptr();
    device.launch("transformer_layer_project", layer_project_kernel<T>,
                  dim3(static_cast<unsigned>(divide_up(images * layer.projection.tiles, warps))),
                  warps * kLanes, warps * project.warp_bytes, project);
    const AttendParams attend = {softmax_inputs<T>(q, k, v, scale),
                                 layer.tail,
                                 out.mutable_data_ptr(),
                                 floats_of(attended),
                                 floats_of(maximum),
                                 floats_of(normalizer)};
    launch_softmax<T, kForwardWarps>(device, "transformer_layer_attend", layer_attend_kernel<T>,
                                     images, attend);
  });
  return {out, q, k, attended, maximum, normalizer};
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                             Tensor, Tensor, Tensor>;

Gradients transformer_layer_backward(Tensor grad, Tensor x, Tensor norm1_weight, Tensor norm1_bias,
                                     Tensor qkv_weight, Tensor proj_weight, Tensor proj_bias,
                                     Tensor norm2_weight, Tensor norm2_bias, Tensor mlp_fc1_weight,
                                     Tensor mlp_fc1_bias, Tensor mlp_fc2_weight,
                                     Tensor mlp_fc2_bias, Tensor q, Tensor k, Tensor attended,
                                     Tensor maximum, Tensor normalizer, int64_t kernel_size,
                                     int64_t stride, int64_t padding, double scale, bool need_x) {
  const Layer layer(kName, x, norm1_weight, norm1_bias, qkv_weight, std::nullopt,
                    {proj_weight, proj_bias, norm2_weight, norm2_bias, mlp_fc1_weight, mlp_fc1_bias,
                     mlp_fc2_weight, mlp_fc2_bias},
                    kernel_size, stride, padding, true);
  const DeviceScope& device = layer.device();
  const int64_t images = layer.projection.images, tokens = layer.projection.tokens;
  const int64_t embed = layer.projection.embed;
  check_alike(kName, grad, {&q, &k});
  layer.check_gradient(grad);
  Tensor grad_qkv = torch::stable::new_empty(x, {images, tokens, 3 * embed});
  const TailSlots slots(x, images, tokens, device);
  std::optional<TailTensors> grads;
  with_element_type(kName, x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    if (images > 0) {
      attended = torch::stable::contiguous(attended);
      maximum = torch::stable::contiguous(maximum);
      normalizer = torch::stable::contiguous(normalizer);
      const Tensor values = torch::stable::new_empty(x, {images, tokens, embed});
      const Tensor grad_y = torch::stable::new_empty(x, {images, tokens, embed});
      const Tensor delta = new_floats(x, images * tokens);
      const Tensor logarithm = new_floats(x, images * tokens);
      T* to = static_cast<T*>(grad_qkv.mutable_data_ptr());

      TailBackwardParams tail = {};
      tail.backward = layer.tail_backward_of<T>(grad, slots, grad_y.mutable_data_ptr(), embed,
                                                to + kValue * embed, 3 * embed);
      int warps = kWarps;
      tail.projection = layer.in_shared<T>(warps, tail_bytes<T>(), tail_operand_bytes<T>(),
                                           tail.backward.warp_bytes, false);
      tail.attended = rows_of<float>(attended);
      tail.values = values.mutable_data_ptr();
      launch_tail_backward<T>(transformer_tail_backward_kernel<T>, slots, tail, device);

      launch_softmax_backward<T>(
          device, images,
          {softmax_inputs<T>(q, k, values, scale), rows_of<T>(grad_y), floats_of(attended),
           floats_of(maximum), floats_of(normalizer), floats_of(delta), floats_of(logarithm),
           to + kQuery * embed, to + kKey * embed, to + kValue * embed, static_cast<int>(3 * embed),
           true});
    }
    grads = slots.finish<T>(embed, layer.tail.hidden, x, device);
  });
  auto [grad_x, grad_weight, grad_bias, grad_norm_weight, grad_norm_bias] =
      soft_split_linear_backward(grad_qkv, x, qkv_weight, norm1_weight, norm1_bias, kernel_size,
                                 stride, padding, kNormEps, need_x, nullptr);
  return {grad_x,
          grad_norm_weight,
          grad_norm_bias,
          grad_weight,
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
  m.impl("transformer_layer", TORCH_BOX(&transformer_layer));
  m.impl("transformer_layer_backward", TORCH_BOX(&transformer_layer_backward));
}

}  // namespace
}  // namespace t2t
