// Soft split, LayerNorm and Linear on the CPU: an implicit matrix product over patches.
//
// In the forward, a tile of patches is gathered, normalised and multiplied while it is in the
// cache. In the backward it is gathered again, because only the inputs are saved. Each chunk of
// tokens adds its gradient of the map to a band of floats. The bands overlap by some rows and are
// added at the end.

#include "operators.h"

namespace t2t {

Tensor new_map_gradient(const Tensor& x, const Split& split, bool needed) {
  if (!needed) return torch::stable::new_empty(x, {0});
  return torch::stable::empty({x.size(0), x.size(1), x.size(2), x.size(3)}, x.scalar_type(),
                              std::nullopt, x.device(), std::nullopt,
                              split.by_tap ? torch::headeronly::MemoryFormat::ChannelsLast
                                           : torch::headeronly::MemoryFormat::Contiguous);
}

void gather_bands(const TypedKernels& kernels, const Split& split, const Cut& cut,
                  const float* bands, int64_t first_image, int64_t images, const Tensor& grad_x) {
  char* to = static_cast<char*>(grad_x.mutable_data_ptr());
  const int64_t bytes = grad_x.scalar_type() == ScalarType::Float ? 4 : 2;
  torch::stable::parallel_for(0, images * split.height, 8, [&](int64_t first, int64_t last) {
    std::vector<const float*> rows;
    std::vector<const float*> channel;
    for (int64_t row = first; row < last; ++row) {
      const int64_t image = row / split.height, y = row % split.height;
      // The distance between the channels of a band in channel-first layout.
      std::vector<int64_t> steps;
      rows.clear();
      for (int64_t chunk = 0; chunk < cut.chunks; ++chunk) {
        const int64_t first_row = chunk * cut.chunk_rows;
        const int64_t band_rows =
            split.band_rows(std::min(cut.rows, first_row + cut.chunk_rows) - first_row);
        const int64_t at = y - split.band_start(first_row);
        if (at < 0 || at >= band_rows) continue;
        const float* band = bands + (image * cut.chunks + chunk) * cut.band_floats(split);
        rows.push_back(band + at * (split.by_tap ? split.map_row() : split.width));
        steps.push_back(band_rows * split.width);
      }
      const int64_t map = (first_image + image) * split.map_row() * split.height;
      if (split.by_tap) {
        kernels.store_sum(rows.data(), rows.size(), split.map_row(),
                          to + (map + y * split.map_row()) * bytes);
        continue;
      }
      for (int64_t c = 0; c < split.channels; ++c) {
        channel.clear();
        for (size_t i = 0; i < rows.size(); ++i) channel.push_back(rows[i] + c * steps[i]);
        kernels.store_sum(channel.data(), channel.size(), split.width,
                          to + (map + (c * split.height + y) * split.width) * bytes);
      }
    }
  });
}

ProjectionGradients projection_gradients(const ProjectionParameters& parameters,
                                         const ProjectionSums& sums, const Tensor& weight,
                                         const std::optional<Tensor>& norm_weight,
                                         const std::optional<Tensor>& norm_bias) {
  const Projection& p = parameters.projection();
  const int64_t n = p.split.patch(), outputs = weight.size(0);
  const std::vector<int64_t>& order = parameters.order();
  std::vector<int64_t> column(outputs);  // of the sums, for each output
  for (size_t i = 0; i < parameters.columns().size(); ++i) {
    if (parameters.columns()[i] >= 0) column[parameters.columns()[i]] = i;
  }
  const Tensor grad_weight = new_floats(weight, {outputs, n}),
               grad_bias = new_floats(weight, {outputs});
  const Tensor grad_gain = new_floats(weight, {p.gain ? n : 0}),
               grad_offset = new_floats(weight, {p.gain ? n : 0});
  float *to = mutable_floats_of(grad_weight), *to_bias = mutable_floats_of(grad_bias);
  float *to_gain = mutable_floats_of(grad_gain), *to_offset = mutable_floats_of(grad_offset);
  const float* w = floats_of(parameters.weight());
  for (int64_t o = 0; o < outputs; ++o) to_bias[o] = sums.bias[column[o]];
  torch::stable::parallel_for(0, n, 16, [&](int64_t first, int64_t last) {
    for (int64_t o = 0; o < outputs; ++o) {
      for (int64_t j = first; j < last; ++j) {
        const float sum = sums.weight[j * p.outputs + column[o]];
        to[o * n + order[j]] = p.gain ? sum * p.gain[j] + to_bias[o] * p.offset[j] : sum;
      }
    }
    if (!p.gain) return;
    for (int64_t j = first; j < last; ++j) {
      double gain = 0, offset = 0;
      for (int64_t o = 0; o < outputs; ++o) {
        gain += static_cast<double>(w[o * n + order[j]]) * sums.weight[j * p.outputs + column[o]];
        offset += static_cast<double>(w[o * n + order[j]]) * to_bias[o];
      }
      to_gain[order[j]] = static_cast<float>(gain);
      to_offset[order[j]] = static_cast<float>(offset);
    }
  });
  const auto as_parameter = [&](const Tensor& t) {
    return torch::stable::to(t, weight.scalar_type());
  };
  return {as_parameter(grad_weight), as_parameter(grad_bias), as_parameter(grad_gain),
          as_parameter(grad_offset)};
}

namespace {

constexpr const char* kName = "soft_split_linear";

void check_parameters(const Split& split, const Tensor& x, const Tensor& weight,
                      const std::optional<Tensor>& norm_weight,
                      const std::optional<Tensor>& norm_bias) {
  check_dims(kName, "weight", weight, 2, "a matrix (O, C*k*k)");
  check_tensor(kName, "weight", weight, {weight.size(0), split.patch()}, x.scalar_type());
  check_norm(kName, norm_weight, norm_bias);
  if (norm_weight) {
    check_tensor(kName, "norm_weight", *norm_weight, {split.patch()}, x.scalar_type());
    check_tensor(kName, "norm_bias", *norm_bias, {split.patch()}, x.scalar_type());
  }
}

Tensor soft_split_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                         const std::optional<Tensor>& norm_weight,
                         const std::optional<Tensor>& norm_bias, int64_t kernel_size,
                         int64_t stride, int64_t padding, double eps) {
  const TypedKernels& kernels = typed_kernels(kName, "x", x);
  const Split split = make_split(kName, x, kernel_size, stride, padding);
  check_parameters(split, x, weight, norm_weight, norm_bias);
  const int64_t outputs = weight.size(0), chunks = forward_chunks(split.tokens());
  if (bias) check_tensor(kName, "bias", *bias, {outputs}, x.scalar_type());
  Tensor y = torch::stable::new_empty(x, {split.batch, split.tokens(), outputs});
  const ProjectionParameters parameters(kernels, split, weight, bias, norm_weight, norm_bias, 1,
                                        eps, false);
  const Projection& p = parameters.projection();
  parallel(split.batch * chunks, kernels.projection_scratch(p), [&](int64_t item, void* scratch) {
    const Range range = forward_range(split.tokens(), item / chunks, item % chunks);
    kernels.projection_forward(p, x.const_data_ptr(), rows_of(y, range.image), outputs, range,
                               scratch);
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> soft_split_linear_backward(
    const Tensor& grad, const Tensor& x, const Tensor& weight,
    const std::optional<Tensor>& norm_weight, const std::optional<Tensor>& norm_bias,
    int64_t kernel_size, int64_t stride, int64_t padding, double eps, bool need_x) {
  const TypedKernels& kernels = typed_kernels(kName, "x", x);
  const Split split = make_split(kName, x, kernel_size, stride, padding);
  check_parameters(split, x, weight, norm_weight, norm_bias);
  const int64_t outputs = weight.size(0), n = split.patch();
  check_tensor(kName, "grad", grad, {split.batch, split.tokens(), outputs}, x.scalar_type());
  const ProjectionParameters parameters(kernels, split, weight, std::nullopt, norm_weight,
                                        norm_bias, 1, eps, need_x);
  const Projection& p = parameters.projection();
  const Cut cut(split, threads());
  const Tensor grad_x = new_map_gradient(x, split, need_x);
  const int64_t slot_size = (n + 1) * p.outputs, band_size = need_x ? cut.band_floats(split) : 0;
  const Memory slots = Memory::zeros(cut.slots() * slot_size);
  const Memory bands = Memory::floats(cut.group * cut.chunks * band_size);
  const auto sums_of = [&](int64_t slot) {
    float* at = slots.floats() + slot * slot_size;
    return ProjectionSums{at, at + n * p.outputs};
  };
  for (int64_t image = 0; image < split.batch; image += cut.group) {
    const int64_t images = std::min(cut.group, split.batch - image);
    parallel(images * cut.chunks, kernels.projection_scratch(p), [&](int64_t item, void* scratch) {
      const int64_t chunk = item % cut.chunks;
      const Range range = cut.range(split, image + item / cut.chunks, chunk);
      kernels.projection_backward(p, x.const_data_ptr(), rows_of(grad, range.image), outputs,
                                  sums_of(cut.slot(range.image, chunk)),
                                  need_x ? bands.floats() + item * band_size : nullptr, range,
                                  scratch);
    });
    if (need_x) gather_bands(kernels, split, cut, bands.floats(), image, images, grad_x);
  }
  add_slots(slots.floats(), cut.slots(), slot_size);
  const ProjectionGradients g =
      projection_gradients(parameters, sums_of(0), weight, norm_weight, norm_bias);
  return {grad_x, g.weight, g.bias, g.norm_weight, g.norm_bias};
}

}  // namespace
}  // namespace t2t

STABLE_TORCH_LIBRARY_IMPL(t2t_cpu, CPU, library) {
  library.impl("soft_split_linear", TORCH_BOX(&t2t::soft_split_linear));
  library.impl("soft_split_linear_backward", TORCH_BOX(&t2t::soft_split_linear_backward));
}
