// Checks of the operators' arguments, on every device. Operators can be called without the public
// functions, whose checks are the same; without checks a kernel would read out of bounds. Each
// error names the argument, what it got and what it expected.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>

// Like STD_TORCH_CHECK, but without the path of the source file in messages.
#define T2T_CHECK(condition, ...)             \
  do {                                        \
    if (!(condition)) t2t::fail(__VA_ARGS__); \
  } while (false)

namespace t2t {

template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// A dtype's name in Python.
inline const char* dtype_name(torch::headeronly::ScalarType dtype) {
  using torch::headeronly::ScalarType;
  switch (dtype) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Long: return "int64";
    default: return torch::headeronly::toString(dtype);
  }
}

// "(2, 3)", and "(2,)" as in Python.
template <typename Sizes>
std::string shape_text(const Sizes& sizes) {
  std::string text;
  for (const int64_t size : sizes) text += (text.empty() ? "" : ", ") + std::to_string(size);
  return "(" + text + (sizes.size() == 1 ? ",)" : ")");
}

inline void check_dims(const char* name, const char* argument, const torch::stable::Tensor& tensor,
                       int64_t dims, const char* expected) {
  T2T_CHECK(tensor.dim() == dims, name, ": ", argument, ": got shape ", shape_text(tensor.sizes()),
            ", expected ", expected);
}

inline void check_tensor(const char* name, const char* argument,
                         const torch::stable::Tensor& tensor, std::initializer_list<int64_t> shape,
                         torch::headeronly::ScalarType dtype) {
  bool same = tensor.dim() == static_cast<int64_t>(shape.size());
  int64_t i = 0;
  for (const int64_t size : shape) same = same && tensor.size(i++) == size;
  T2T_CHECK(same, name, ": ", argument, ": got shape ", shape_text(tensor.sizes()), ", expected ",
            shape_text(shape));
  T2T_CHECK(tensor.scalar_type() == dtype, name, ": ", argument, ": got ",
            dtype_name(tensor.scalar_type()), ", expected ", dtype_name(dtype));
}

inline void check_kernel_fits(const char* name, int64_t height, int64_t width, int64_t kernel,
                              int64_t padding) {
  T2T_CHECK(height + 2 * padding >= kernel && width + 2 * padding >= kernel, name,
            ": x: got a map of ", height, "x", width, ", expected at least ", kernel - 2 * padding,
            " in each direction for kernel_size ", kernel, " and padding ", padding);
}

// The seed of dropout; it is not read if there is no dropout.
template <typename Seed>
void check_seed(const char* name, const Seed& seed) {
  T2T_CHECK(seed.has_value(), name, ": seed: got None, expected an int64 tensor of one ",
            "element, since dropout_p is above 0");
  T2T_CHECK(seed->numel() == 1 && seed->scalar_type() == torch::headeronly::ScalarType::Long, name,
            ": seed: got ", dtype_name(seed->scalar_type()), " of shape ",
            shape_text(seed->sizes()), ", expected int64 and one element");
}

template <typename Parameter>
void check_norm(const char* name, const Parameter& weight, const Parameter& bias) {
  T2T_CHECK(weight.has_value() == bias.has_value(), name, ": ",
            weight.has_value() ? "norm_bias" : "norm_weight",
            ": got None, expected both of norm_weight and norm_bias or neither");
}

// The names of a layer's parameters after its attention.
struct TailNames {
  const char *proj_weight, *proj_bias, *norm_weight, *norm_bias, *mlp_in_weight, *mlp_in_bias,
      *mlp_out_weight, *mlp_out_bias;
};
inline constexpr TailNames kPerformerTail = {"proj_weight",  "proj_bias",    "norm2_weight",
                                             "norm2_bias",   "mlp_0_weight", "mlp_0_bias",
                                             "mlp_2_weight", "mlp_2_bias"};
inline constexpr TailNames kTransformerTail = {"attn_proj_weight", "attn_proj_bias", "norm2_weight",
                                               "norm2_bias",       "mlp_fc1_weight", "mlp_fc1_bias",
                                               "mlp_fc2_weight",   "mlp_fc2_bias"};

}  // namespace t2t
