// Arguments of the fused CPU kernels, and a table of kernels for each instruction set.
//
// The kernels (vec.h, gemm.h, patches.h, performer.h, tail.h, softmax.h, kernels.h) are compiled
// once per instruction set by isa_*.cpp; the operators choose a table at run time. All calls work
// on a range of the tokens of one image, in memory that the caller provides. So the operators
// determine what runs in parallel, and in which order partial sums are added.
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

// Rows of floats in the kernels' memory begin at multiples of the widest vector.
constexpr int64_t kPad = 16;
constexpr int64_t padded(int64_t n) { return (n + kPad - 1) / kPad * kPad; }

// A soft split of a map, and the order of a patch in the kernels: (row, column, channel) if
// channels are adjacent in memory, else (channel, row, column), as in a token.
struct Split {
  int64_t batch, channels, height, width;
  int64_t strides[4];
  int64_t rows, columns;  // of the grid of tokens
  int64_t kernel, stride, padding;
  bool by_tap;

  int64_t tokens() const { return rows * columns; }
  int64_t patch() const { return channels * kernel * kernel; }
  int64_t map_row() const { return channels * width; }
  // The rows of pixels that `count` rows of tokens cover, and the first of them, which may be above
  // the map.
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
  float kept;  // the factor of kept elements; 1 means no dropout
};

// Random features of one head. The weights are packed as floats.
struct Features {
  int64_t count, embed;
  const void* weight;    // embed × count
  const void* weight_t;  // count × embed
  float log_eps;         // log(eps·m); −infinity without eps
};

// Per image: the maxima of the keys' log-features, and the sums over the keys relative to them; or
// the gradients of the sums, without a maximum. `sums` is (count, padded embed).
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

// Sums of the gradients of a tail's parameters; matrices as the weights, with padded rows.
struct TailSums {
  float *proj, *proj_bias, *norm_gain, *norm_offset, *mlp_in, *mlp_in_bias, *mlp_out, *mlp_out_bias;
};

// Sums of the gradients of a projection: Σ û dyᵀ (patch × outputs), where û is the norm without
// gain and offset, and Σ dy.
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

// For each query, the maximum of its scaled scores, and the sum of their exponentials relative to
// it.
struct SoftmaxRows {
  float *maximum, *normalizer;
};

// q, k, v or the gradient of the result of an image, in the order in which products read it, in
// float or in pairs of bfloat16: rows (tokens × embed) as a left operand, and the transpose (embed
// × tokens) and rows as right operands. Each needs at most operand_floats; null if it is not
// needed.
struct Operand {
  void *rows, *columns, *depth;
};
constexpr int64_t kOperandPanel = 64;
constexpr int64_t operand_floats(int64_t tokens, int64_t embed) {
  return (tokens + kOperandPanel - 1) / kOperandPanel * kOperandPanel * padded(embed);
}

// The kernels for one dtype. Scratch memory is 64-byte aligned and has `scratch` bytes.
struct TypedKernels {
  // Bytes of a packed depth × columns matrix, and packing: element (k, j) is
  // from[depth_offsets[k] + column_offsets[j]], or zero if either offset is negative.
  int64_t (*packed_bytes)(int64_t depth, int64_t columns);
  void (*pack)(const float* from, const int64_t* depth_offsets, int64_t depth,
               const int64_t* column_offsets, int64_t columns, void* to);

  int64_t (*projection_scratch)(const Projection&);
  void (*projection_forward)(const Projection&, const void* x, Rows y, int64_t columns, Range,
                             void* scratch);
  // The range has whole rows of tokens. `band` receives the gradient of the pixel rows that they
  // cover, in the layout of the map; null if it is not needed.
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
  // `kqv` is the image's workspace: (T, 3 × padded embed) floats. This call writes k, the gradient
  // of q, and v to it, and to `skip` the gradient of v except that from the sums.
  void (*layer_queries_backward)(const Projection&, const Features&, const Tail&, const void* x,
                                 KeySums, Rows grad, TailSums, KeySums grads, float* kqv,
                                 float* skip, Range, void* scratch);
  void (*layer_keys_backward)(const Projection&, const Features&, const void* x, KeySums,
                              KeySums grads, ProjectionSums, float* band, float* kqv,
                              const float* skip, Range, void* scratch);

  int64_t (*softmax_scratch)(const Softmax&);
  // From the tensor's dtype, and from floats. The range begins at a multiple of kOperandPanel.
  void (*make_operand)(const Softmax&, Rows from, Operand, Range, void* scratch);
  void (*make_operand_of_floats)(const Softmax&, Rows from, Operand, Range, void* scratch);
  // `attended` receives the result in float; null if it is not needed.
  void (*softmax_forward)(const Softmax&, Operand q, Operand k, Operand v, Rows y, float* attended,
                          SoftmaxRows statistics, Range, void* scratch);
  // D of the queries; `attended` is in float.
  void (*softmax_delta)(const Softmax&, Rows attended, Rows grad, float* delta, Range,
                        void* scratch);
  // The gradients from the keys of the range, which begins at a multiple of kOperandPanel: writes
  // dQ/scale of all queries, and adds to dK/scale and dV of the keys. All are (T, padded embed)
  // floats.
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
  // Projects only v. Writes the values, the gradients of the attention's result and of v through
  // the skip, and D.
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

// The table of the widest instruction set of this CPU, or of the one in T2T_CPU_ISA. An unknown
// name, or one that the CPU does not support, is an error at the first call.
const Kernels& kernels();

}  // namespace t2t
