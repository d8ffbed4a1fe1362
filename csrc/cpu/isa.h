// What the fused CPU kernels are called with, and the table of them for each instruction set.
//
// The kernels (vec.h, gemm.h, patches.h, performer.h, tail.h, softmax.h, kernels.h) are compiled
// once per instruction set by isa_*.cpp; the operators choose a table at run time. All calls here
// work on a range of one image's tokens in memory that the caller provides, so that the operators
// decide what runs in parallel and in which order partial sums are added.
#pragma once

#include <cstdint>

#define T2T_PORTABLE 0
#define T2T_AVX2 1
#define T2T_AVX512 2
#define T2T_AVX512_BF16 3

namespace t2t {

struct bf16 {
  uint16_t word;
};
struct half {
  uint16_t word;
};

// Rows of floats in the kernels' memory begin at multiples of this many: the widest vector.
constexpr int64_t kPad = 16;
constexpr int64_t padded(int64_t n) { return (n + kPad - 1) / kPad * kPad; }

// A soft split of a map, and the order in which the kernels hold a patch: its taps (row, column)
// with all channels of each, where channels are adjacent in memory; else channel by channel, as a
// token.
struct Split {
  int64_t batch, channels, height, width;
  int64_t strides[4];
  int64_t rows, columns;  // of the grid of tokens
  int64_t kernel, stride, padding;
  bool by_tap;

  int64_t tokens() const { return rows * columns; }
  int64_t patch() const { return channels * kernel * kernel; }
  int64_t map_row() const { return channels * width; }
  // Rows of pixels under `count` rows of tokens, and the first of them, which may lie above the
  // map.
  int64_t band_rows(int64_t count) const { return (count - 1) * stride + kernel; }
  int64_t band_start(int64_t row) const { return row * stride - padding; }
};

// linear(norm(patch)). Vectors are padded with zeros; weights are packed by the table's `pack`.
struct Projection {
  Split split;
  int64_t outputs;    // padded
  const float* gain;  // of the norm, in the order of the patch; null without a norm
  const float* offset;
  float eps;
  const void* weight;  // patch × outputs
  const float* bias;
  const void* weight_t;  // outputs × patch, for the gradient of the map
};

struct Dropout {
  uint64_t seed;
  uint64_t site;
  uint32_t threshold;
  float kept;  // the factor of what is kept; nothing is dropped if it is 1
};

// Random features of one head. The weights are packed as floats.
struct Features {
  int64_t count, embed;
  const void* weight;    // embed × count
  const void* weight_t;  // count × embed
  float log_eps;         // log(eps·m); −infinity without eps
};

// Per image: the maxima of the keys' log-features, and under them the sums over the keys; or, with
// an unused maximum, their gradients. `sums` is (count, padded embed).
struct KeySums {
  float* maximum;
  float* normalizer;
  float* sums;
};

// a = v + dropout(proj(y)), out = a + dropout(mlp(norm(a))).
struct Tail {
  int64_t embed, hidden;
  const float *norm_gain, *norm_offset;
  const void *proj, *mlp_in, *mlp_out;
  const float *proj_bias, *mlp_in_bias, *mlp_out_bias;
  const void *proj_t, *mlp_in_t, *mlp_out_t;  // for the backward
  Dropout after_proj, after_mlp;
};

// Where the gradients of a tail's parameters are added up: matrices as the weights', rows padded.
struct TailSums {
  float *proj, *proj_bias, *norm_gain, *norm_offset, *mlp_in, *mlp_in_bias, *mlp_out, *mlp_out_bias;
};

// Where those of a projection are: Σ û dyᵀ (patch × outputs), û without the norm's gain and offset,
// and Σ dy.
struct ProjectionSums {
  float *weight, *bias;
};

// (T, embed) tensors of one image with the strides of token and channel.
struct Rows {
  void* p;
  int64_t token, channel;
};

// Tokens [first, last) of an image.
struct Range {
  int64_t image, first, last;
};

// softmax(scale·q kᵀ) v over one image's tokens.
struct Softmax {
  int64_t tokens, embed;
  float scale;
};

// Of each query, the maximum of its scaled scores and under it the sum of their exponentials.
struct SoftmaxRows {
  float *maximum, *normalizer;
};

// q, k, v or the result's gradient of an image as the products take them, in float or in pairs of
// bfloat16: its rows (tokens × embed) as a left operand, its transpose (embed × tokens) and its
// rows again as right operands. Each takes at most operand_floats; null where it is not needed.
struct Operand {
  void *rows, *columns, *depth;
};
constexpr int64_t kOperandPanel = 64;
constexpr int64_t operand_floats(int64_t tokens, int64_t embed) {
  return (tokens + kOperandPanel - 1) / kOperandPanel * kOperandPanel * padded(embed);
}

// The kernels for one type of tensor. Scratch memory is 64-byte aligned, `scratch` bytes of it.
struct TypedKernels {
  // Bytes of a packed depth × columns matrix, and the packing: element (k, j) is
  // from[depth_offsets[k] + column_offsets[j]], zero where either is negative.
  int64_t (*packed_bytes)(int64_t depth, int64_t columns);
  void (*pack)(const float* from, const int64_t* depth_offsets, int64_t depth,
               const int64_t* column_offsets, int64_t columns, void* to);

  int64_t (*projection_scratch)(const Projection&);
  void (*projection_forward)(const Projection&, const void* x, Rows y, int64_t columns, Range,
                             void* scratch);
  // The range holds whole rows of tokens. `band` receives the gradient of the pixel rows under it,
  // laid out as the map; null where it is not asked for.
  void (*projection_backward)(const Projection&, const void* x, Rows grad, int64_t columns,
                              ProjectionSums, float* band, Range, void* scratch);
  // Adds rows of floats and stores them in the tensor's type.
  void (*store_sum)(const float* const* rows, int64_t count, int64_t n, void* to);

  int64_t (*attention_scratch)(const Features&);
  void (*attention_keys)(const Features&, Rows k, Rows v, KeySums, Range, void* scratch);
  void (*attention_queries)(const Features&, Rows q, KeySums, Rows y, Range, void* scratch);
  void (*attention_queries_backward)(const Features&, Rows q, KeySums, Rows grad, Rows grad_q,
                                     KeySums grads, Range, void* scratch);
  void (*attention_keys_backward)(const Features&, Rows k, Rows v, KeySums, KeySums grads,
                                  Rows grad_k, Rows grad_v, Range, void* scratch);

  int64_t (*layer_scratch)(const Projection&, const Features&, const Tail&);
  // `queries` and `values` are the image's workspace: (T, padded embed) floats each.
  void (*layer_keys)(const Projection&, const Features&, const void* x, KeySums, float* queries,
                     float* values, Range, void* scratch);
  void (*layer_queries)(const Projection&, const Features&, const Tail&, KeySums, float* queries,
                        float* values, void* y, Range, void* scratch);
  // `kqv` is the image's workspace: (T, 3 × padded embed) floats. This call leaves k, the gradient
  // of q, v in it, and in `skip` the gradient of v that does not come through the sums.
  void (*layer_queries_backward)(const Projection&, const Features&, const Tail&, const void* x,
                                 KeySums, Rows grad, TailSums, KeySums grads, float* kqv,
                                 float* skip, Range, void* scratch);
  void (*layer_keys_backward)(const Projection&, const Features&, const void* x, KeySums,
                              KeySums grads, ProjectionSums, float* band, float* kqv,
                              const float* skip, Range, void* scratch);

  int64_t (*softmax_scratch)(const Softmax&);
  // From the tensor's type, and from floats. The range begins at a multiple of kOperandPanel.
  void (*make_operand)(const Softmax&, Rows from, Operand, Range, void* scratch);
  void (*make_operand_of_floats)(const Softmax&, Rows from, Operand, Range, void* scratch);
  // `attended` receives the result in float; null where it is not wanted.
  void (*softmax_forward)(const Softmax&, Operand q, Operand k, Operand v, Rows y, float* attended,
                          SoftmaxRows statistics, Range, void* scratch);
  // D of the queries; `attended` is in float.
  void (*softmax_delta)(const Softmax&, Rows attended, Rows grad, float* delta, Range,
                        void* scratch);
  // What the keys of the range, which begins at a multiple of kOperandPanel, contribute: to
  // dQ/scale of all queries, which is written, and to dK/scale and dV of the keys, which are added
  // to. All are (T, padded embed) floats.
  void (*softmax_backward)(const Softmax&, Operand q, Operand k, Operand v, Operand grad,
                           SoftmaxRows statistics, const float* delta, float* grad_q, float* grad_k,
                           float* grad_v, Range keys, void* scratch);
  // scale × the sum of `count` arrays of floats, `size` apart.
  void (*softmax_gradient)(const Softmax&, const float* from, int64_t count, int64_t size,
                           float scale, Rows to, Range, void* scratch);

  int64_t (*transformer_scratch)(const Projection&, const Softmax&, const Tail&);
  // `values` are the image's (T, padded embed) floats.
  void (*transformer_project)(const Projection&, const Softmax&, const void* x, Rows q, Rows k,
                              float* values, Range, void* scratch);
  void (*transformer_queries)(const Softmax&, const Tail&, Operand q, Operand k, Operand v,
                              const float* values, Rows attended, SoftmaxRows statistics, Rows y,
                              Range, void* scratch);
  // The projection is that of v alone. Leaves the values, and the gradients of attention's result,
  // of v through the skip, and D.
  void (*transformer_tail_backward)(const Projection&, const Softmax&, const Tail&, const void* x,
                                    Rows attended, Rows grad, TailSums, float* values,
                                    float* grad_y, float* grad_v, float* delta, Range,
                                    void* scratch);
  // From `count` arrays of dQ/scale, `size` floats apart, dK/scale and dV.
  void (*transformer_projection_backward)(const Projection&, const Softmax&, const void* x,
                                          const float* grad_q, int64_t count, int64_t size,
                                          const float* grad_k, const float* grad_v, ProjectionSums,
                                          float* band, Range, void* scratch);
};

struct Kernels {
  const char* name;
  TypedKernels of_float, of_bf16, of_half;
};

extern const Kernels kPortable;
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define T2T_X86_KERNELS
extern const Kernels kAvx2, kAvx512, kAvx512Bf16;
#endif

// The table of the widest instruction set that this CPU has, or that T2T_CPU_ISA names. An unknown
// name, or one that the CPU lacks, is an error at the first call.
const Kernels& kernels();

}  // namespace t2t
