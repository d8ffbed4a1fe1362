// Shared by the operators of both T2T layers: the tail's parameters and their gradients.
#pragma once

#include <array>

#include "operators.h"

namespace t2t {

constexpr float kSplitNormEps = 1e-5f;

struct TailTensors {
  const Tensor &proj_weight, &proj_bias, &norm_weight, &norm_bias, &mlp_in_weight, &mlp_in_bias,
      &mlp_out_weight, &mlp_out_bias;
};

// The tail's parameters in the kernels' layout, and the layout of a slot of their gradients.
class TailParameters {
 public:
  TailParameters(const TypedKernels& kernels, const TailTensors& t, const Dropout& after_proj,
                 const Dropout& after_mlp, bool backward) {
    const int64_t embed = t.proj_weight.size(0), hidden = t.mlp_in_weight.size(0);
    tail_ = {};
    tail_.embed = embed;
    tail_.hidden = hidden;
    tail_.after_proj = after_proj;
    tail_.after_mlp = after_mlp;
    linear(kernels, t.proj_weight, backward, tail_.proj, tail_.proj_t);
    linear(kernels, t.mlp_in_weight, backward, tail_.mlp_in, tail_.mlp_in_t);
    linear(kernels, t.mlp_out_weight, backward, tail_.mlp_out, tail_.mlp_out_t);
    tail_.proj_bias = vector(t.proj_bias);
    tail_.mlp_in_bias = vector(t.mlp_in_bias);
    tail_.mlp_out_bias = vector(t.mlp_out_bias);
    tail_.norm_gain = vector(t.norm_weight);
    tail_.norm_offset = vector(t.norm_bias);
  }

  const Tail& tail() const { return tail_; }

  int64_t slot_size() const {
    const int64_t e = padded(tail_.embed), h = padded(tail_.hidden);
    return tail_.embed * e + tail_.hidden * e + tail_.embed * h + 4 * e + h;
  }
  TailSums sums_at(float* p) const {
    const int64_t e = padded(tail_.embed), h = padded(tail_.hidden);
    TailSums sums;
    const auto take = [&](int64_t n) {
      float* at = p;
      p += n;
      return at;
    };
    sums.proj = take(tail_.embed * e);
    sums.mlp_in = take(tail_.hidden * e);
    sums.mlp_out = take(tail_.embed * h);
    sums.proj_bias = take(e), sums.norm_gain = take(e), sums.norm_offset = take(e);
    sums.mlp_out_bias = take(e), sums.mlp_in_bias = take(h);
    return sums;
  }

 private:
  const float* keep(Memory memory) {
    memory_.push_back(std::move(memory));
    return memory_.back().floats();
  }
  const float* vector(const Tensor& tensor) {
    return keep(gathered(floats_of(as_floats(tensor)), offsets(tensor.size(0), 1)));
  }
  void linear(const TypedKernels& kernels, const Tensor& weight, bool backward,
              const void*& forward, const void*& transposed) {
    const Tensor floats = as_floats(weight);
    forward = keep(packed_linear(kernels, floats));
    if (backward) transposed = keep(packed_linear_t(kernels, floats));
  }

  Tail tail_;
  std::vector<Memory> memory_;
};

inline void check_tail(const char* name, const TailNames& names, const TailTensors& t,
                       ScalarType dtype) {
  const int64_t embed = t.proj_weight.size(0), hidden = t.mlp_in_weight.size(0);
  check_tensor(name, names.proj_weight, t.proj_weight, {embed, embed}, dtype);
  check_tensor(name, names.proj_bias, t.proj_bias, {embed}, dtype);
  check_tensor(name, names.norm_weight, t.norm_weight, {embed}, dtype);
  check_tensor(name, names.norm_bias, t.norm_bias, {embed}, dtype);
  check_tensor(name, names.mlp_in_weight, t.mlp_in_weight, {hidden, embed}, dtype);
  check_tensor(name, names.mlp_in_bias, t.mlp_in_bias, {hidden}, dtype);
  check_tensor(name, names.mlp_out_weight, t.mlp_out_weight, {embed, hidden}, dtype);
  check_tensor(name, names.mlp_out_bias, t.mlp_out_bias, {embed}, dtype);
}

// Rows of padded floats as a parameter's gradient.
inline Tensor as_gradient(const float* from, const Tensor& parameter) {
  const bool matrix = parameter.dim() == 2;
  const int64_t rows = matrix ? parameter.size(0) : 1, columns = parameter.size(matrix ? 1 : 0);
  const Tensor floats =
      matrix ? new_floats(parameter, {rows, columns}) : new_floats(parameter, {columns});
  for (int64_t i = 0; i < rows; ++i) {
    std::copy_n(from + i * padded(columns), columns, mutable_floats_of(floats) + i * columns);
  }
  return torch::stable::to(floats, parameter.scalar_type());
}

// The gradients of a tail's parameters, in their order.
inline std::array<Tensor, 8> tail_gradients(const TailSums& sums, const TailTensors& t) {
  return {
      as_gradient(sums.proj, t.proj_weight),       as_gradient(sums.proj_bias, t.proj_bias),
      as_gradient(sums.norm_gain, t.norm_weight),  as_gradient(sums.norm_offset, t.norm_bias),
      as_gradient(sums.mlp_in, t.mlp_in_weight),   as_gradient(sums.mlp_in_bias, t.mlp_in_bias),
      as_gradient(sums.mlp_out, t.mlp_out_weight), as_gradient(sums.mlp_out_bias, t.mlp_out_bias)};
}

}  // namespace t2t
