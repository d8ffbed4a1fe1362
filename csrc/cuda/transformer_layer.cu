// The T2T layer with softmax attention on CUDA, for half types and the models' sizes: soft split,
// norm, projection to q, k and v, attention, tail.
//
// Forward: soft_split_linear's kernel writes q, k and v; then the attention, whose blocks pass
// their rows of y to the tail. T×T weights and tokens are never written to memory.
//
// Backward: q, k and v again, then
//   tail     back through the tail: the gradient of y, that of the skip (to v's place), a slot of
//            the tail's own gradients per block
//   softmax  the gradients of q; then those of k and, on top of the skip's, of v (see softmax.cuh)
// and finally the backward of soft_split_linear.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <tuple>

#include "soft_split_linear.h"
#include "softmax.cuh"
#include "tail.cuh"

namespace t2t {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr const char* kName = "transformer_layer";
constexpr int64_t kEmbed = kWidest;
enum Section { kQuery, kKey, kValue };

struct AttendParams {
  SoftmaxInputs in;
  TailPointers tail;
  void* out;
  float *attended, *maximum, *normalizer;
  size_t weights;  // where in shared memory the tail's begin
};

constexpr size_t kTailForwardBytes = kTailVectors * sizeof(uint4) + sizeof(TailVectors);

template <typename T>
__global__ void __launch_bounds__(kForwardWarps* kLanes, kForwardBlocks)
    layer_attend_kernel(const AttendParams p) {
  auto* weights = reinterpret_cast<uint4*>(reinterpret_cast<char*>(dynamic_shared) + p.weights);
  auto& vectors = *reinterpret_cast<TailVectors*>(weights + kTailVectors);
  // The attention's first barrier is the weights', too.
  load_tail<T>(weights, vectors, p.tail);
  const ForwardBlock<T> block(p.in);
  const StagedRows rows = attend<T>(p.in, block, p.maximum, p.normalizer);
  rows.store(p.attended, kWidest, block);
  Sums<2> y;
  take_sums(rows.rows, y);
  const int64_t first_token = block.row(block.first);
  const Sums<2> out = tail_of<T>(
      rounded_operand<T>(y), load_operand<T>(p.in.values, block.image, block.first, block.tokens),
      weights, vectors, p.tail.dropout, first_token);
  store_operand(rounded_operand<T>(out), static_cast<T*>(p.out) + first_token * kEmbed, kEmbed,
                block.tokens - block.first);
}

struct TailParams {
  const float* attended;
  Rows values;
  TileLoop loop;
  void* grad_y;
  TailBackwardParams backward;
};

template <typename T>
__global__ void __launch_bounds__(kBlockWarps* kLanes, 1)
    transformer_tail_backward_kernel(const TailParams p) {
  uint4* weights = dynamic_shared;
  T* tiles = reinterpret_cast<T*>(weights + kTailVectors);
  auto& vectors = *reinterpret_cast<TailVectors*>(tiles + 2 * kTokenTileElements);
  auto& vector_sums = *reinterpret_cast<TailVectorSums*>(&vectors + 1);
  load_tail<T>(weights, vectors, p.backward.tail);
  TailBackward<T> tail(p.backward, p.values, weights, vectors, vector_sums, tiles);
  __syncthreads();
  p.loop([&](int64_t image, int first) {
    const int tokens = p.loop.tokens;
    tail.tile(
        image, first,
        [&] {
          Sums<2> y;
          y.clear();
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int token = first + sum_row(i % 2);
            if (token < tokens) {
              load_eight(y.at[i / 2][i % 2],
                         p.attended + (image * tokens + token) * kEmbed + sum_column(i / 2));
            }
          }
          return rounded_operand<T>(y);
        },
        [&](const Sums<2>& grad) {
          store_operand(rounded_operand<T>(grad),
                        static_cast<T*>(p.grad_y) + (image * tokens + first) * kEmbed, kEmbed,
                        tokens - first);
        });
  });
  tail.store();
}

TailTensors tail_tensors(const Tensor& proj_weight, const Tensor& proj_bias,
                         const Tensor& norm_weight, const Tensor& norm_bias,
                         const Tensor& fc1_weight, const Tensor& fc1_bias, const Tensor& fc2_weight,
                         const Tensor& fc2_bias) {
  return {proj_weight, proj_bias, norm_weight, norm_bias,
          fc1_weight,  fc1_bias,  fc2_weight,  fc2_bias};
}

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Results transformer_layer(Tensor x, Tensor norm1_weight, Tensor norm1_bias, Tensor qkv_weight,
                          Tensor proj_weight, Tensor proj_bias, Tensor norm2_weight,
                          Tensor norm2_bias, Tensor mlp_fc1_weight, Tensor mlp_fc1_bias,
                          Tensor mlp_fc2_weight, Tensor mlp_fc2_bias, int64_t kernel_size,
                          int64_t stride, int64_t padding, double scale) {
  const DeviceScope device(x);
  const TailArguments tail(kName, kTransformerTail,
                           tail_tensors(proj_weight, proj_bias, norm2_weight, norm2_bias,
                                        mlp_fc1_weight, mlp_fc1_bias, mlp_fc2_weight, mlp_fc2_bias),
                           x, Dropout{});
  const auto [images, tokens] = tokens_of(x, qkv_weight, kernel_size, stride, padding);
  const auto rows = [&] { return torch::stable::new_empty(x, {images, tokens, kEmbed}); };
  Tensor out = rows(), q = rows(), k = rows(), v = rows();
  Tensor attended = torch::stable::new_empty(x, {images, tokens, kEmbed}, ScalarType::Float);
  Tensor maximum = torch::stable::new_empty(x, {images, tokens}, ScalarType::Float);
  Tensor normalizer = torch::stable::new_empty(x, {images, tokens}, ScalarType::Float);
  if (images == 0) return {out, q, k, attended, maximum, normalizer};
  project_into(x, qkv_weight, norm1_weight, norm1_bias, kernel_size, stride, padding, kNormEps,
               {q, k, v});
  with_half_type(kName, "x", x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    constexpr size_t weights = ForwardBlock<T>::kSharedBytes;
    const AttendParams p = {softmax_inputs<T>(q, k, v, scale),
                            tail(),
                            out.mutable_data_ptr(),
                            floats_of(attended),
                            floats_of(maximum),
                            floats_of(normalizer),
                            weights};
    launch_softmax<ForwardBlock<T>>(device, "transformer_layer_attend", layer_attend_kernel<T>,
                                    images, p, kTailForwardBytes);
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
  const DeviceScope device(x);
  const TailArguments tail(kName, kTransformerTail,
                           tail_tensors(proj_weight, proj_bias, norm2_weight, norm2_bias,
                                        mlp_fc1_weight, mlp_fc1_bias, mlp_fc2_weight, mlp_fc2_bias),
                           x, Dropout{});
  const Projected projected = project(x, qkv_weight, std::nullopt, norm1_weight, norm1_bias,
                                      kernel_size, stride, padding, kNormEps, true);
  const Tensor& qkv = projected.y;
  const int64_t images = qkv.size(0), tokens = qkv.size(1);
  T2T_CHECK(qkv.size(2) == 3 * kEmbed, kName, ": attn_qkv_weight: got ", qkv.size(2),
            " rows, expected ", 3 * kEmbed);
  check_tensor(kName, "grad", grad, {images, tokens, kEmbed}, x.scalar_type());
  check_tensor(kName, "q", q, {images, tokens, kEmbed}, x.scalar_type());
  check_tensor(kName, "k", k, {images, tokens, kEmbed}, x.scalar_type());
  check_tensor(kName, "attended", attended, {images, tokens, kEmbed}, ScalarType::Float);
  check_tensor(kName, "maximum", maximum, {images, tokens}, ScalarType::Float);
  check_tensor(kName, "normalizer", normalizer, {images, tokens}, ScalarType::Float);
  Tensor grad_qkv = torch::stable::new_empty(x, {images, tokens, 3 * kEmbed});
  std::optional<TailTensors> grads;
  with_half_type(kName, "x", x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const TileLoop loop = make_tile_loop(images, tokens);
    const TailSlots slots(x, grid_of_tiles(loop, kBlockWarps, 1, device), device);
    if (images > 0) {
      grad = vector_rows<T>(grad);
      attended = torch::stable::contiguous(attended);
      maximum = torch::stable::contiguous(maximum);
      normalizer = torch::stable::contiguous(normalizer);
      const Tensor grad_y = torch::stable::new_empty(x, {images, tokens, kEmbed});
      const Tensor shifts = new_shifts(x, images, tokens);
      T* to = static_cast<T*>(grad_qkv.mutable_data_ptr());
      const Rows values = section_of<T>(qkv, kValue, kEmbed);
      const TailParams p = {
          floats_of(attended),
          values,
          loop,
          grad_y.mutable_data_ptr(),
          {tail(), rows_of<T>(grad), loop.tokens, to + kValue * kEmbed, 3 * kEmbed, slots.slots()}};
      device.launch("transformer_layer_tail_backward", transformer_tail_backward_kernel<T>,
                    slots.grid(), kBlockWarps * kLanes, kTailBackwardBytes + kTailTilesBytes, p);
      q = vector_rows<T>(q);
      k = vector_rows<T>(k);
      SoftmaxInputs in = softmax_inputs<T>(q, k, q, scale);
      in.values = values;
      launch_softmax_backward<T>(
          device, images,
          {in, rows_of<T>(grad_y), floats_of(attended), floats_of(maximum), floats_of(normalizer),
           shifts_of(shifts), to + kQuery * kEmbed, to + kKey * kEmbed, to + kValue * kEmbed,
           static_cast<int>(3 * kEmbed), true});
    }
    grads = slots.finish<T>(x, device);
  });
  auto [grad_x, grad_weight, grad_bias, grad_norm_weight, grad_norm_bias] =
      soft_split_linear_backward(grad_qkv, x, qkv_weight, norm1_weight, norm1_bias, kernel_size,
                                 stride, padding, kNormEps, need_x, &projected);
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
