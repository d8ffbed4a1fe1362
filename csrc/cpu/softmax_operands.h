// Shared by the operators of softmax attention: the operands of a group of images.
#pragma once

#include "operators.h"

namespace t2t {

// Memory of one of q, k, v and the gradient of the result, for `images` images.
class Operands {
 public:
  enum Parts { kRows = 1, kColumns = 2, kDepth = 4 };

  Operands(const Softmax& s, int64_t images, int parts)
      : size_(operand_floats(s.tokens, s.embed)),
        rows_(memory(images, parts & kRows)),
        columns_(memory(images, parts & kColumns)),
        depth_(memory(images, parts & kDepth)) {}

  Operand operator[](int64_t image) const {
    const auto at = [&](const std::optional<Memory>& memory) {
      return memory ? memory->floats() + image * size_ : nullptr;
    };
    return {at(rows_), at(columns_), at(depth_)};
  }

 private:
  std::optional<Memory> memory(int64_t images, int wanted) const {
    if (!wanted) return std::nullopt;
    return Memory::floats(images * size_);
  }

  int64_t size_;
  std::optional<Memory> rows_, columns_, depth_;
};

// The statistics of the queries in the tensors that are saved for the backward, (B, T) each.
struct SavedStatistics {
  Tensor maximum, normalizer;

  SavedStatistics(const Tensor& like, int64_t batch, int64_t tokens)
      : maximum(new_floats(like, {batch, tokens})), normalizer(new_floats(like, {batch, tokens})) {}
  SavedStatistics(const char* name, int64_t batch, int64_t tokens, const Tensor& maximum,
                  const Tensor& normalizer)
      : maximum(torch::stable::contiguous(maximum)),
        normalizer(torch::stable::contiguous(normalizer)) {
    check_tensor(name, "maximum", maximum, {batch, tokens}, ScalarType::Float);
    check_tensor(name, "normalizer", normalizer, {batch, tokens}, ScalarType::Float);
  }

  SoftmaxRows operator[](int64_t image) const {
    const int64_t at = image * maximum.size(1);
    return {mutable_floats_of(maximum) + at, mutable_floats_of(normalizer) + at};
  }
};

// The number of images at a time in a forward: enough chunks to keep the threads evenly busy.
inline int64_t forward_group(int64_t batch, int64_t chunks) {
  return std::min(batch, std::max<int64_t>(1, 32 * threads() / chunks));
}

// The number of keys per work item of a backward. Each item has its own memory for dQ.
struct KeyChunks {
  int64_t tokens, size, count;

  explicit KeyChunks(int64_t tokens) : tokens(tokens) {
    constexpr int64_t kMost = 512, kMostChunks = 32;  // at most so many copies of dQ in memory
    const int64_t wanted = std::min(kMostChunks, (tokens + kMost - 1) / kMost);
    size = ((tokens + wanted - 1) / wanted + kOperandPanel - 1) / kOperandPanel * kOperandPanel;
    count = (tokens + size - 1) / size;
  }

  Range range(int64_t image, int64_t chunk) const {
    return {image, chunk * size, std::min(tokens, (chunk + 1) * size)};
  }
  int64_t group(int64_t batch) const {
    return std::min(batch, std::max<int64_t>(1, (4 * threads() + count - 1) / count));
  }
};

}  // namespace t2t
