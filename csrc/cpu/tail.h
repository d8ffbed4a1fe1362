// The tail of a T2T layer on tiles: a = v + dropout(proj(y)), out = a + dropout(mlp(norm(a))).
#pragma once

#include "performer.h"

namespace t2t {
namespace {

constexpr float kNormEps = 1e-5f;

// Factors of a tile's elements; element (i, e) is at p[i·embed + e].
struct Factors {
  const float* p;
  int64_t embed;
  bool drop;

  Factors(const Dropout& d, int64_t first_token, int64_t rows, int64_t embed, float* buffer)
      : p(nullptr), embed(embed), drop(d.kept != 1.f) {
    if (!drop) return;
    const int64_t first = first_token * embed, block = first / 8;
    const int64_t elements = first - block * 8 + rows * embed + kPad;
    for (int64_t i = 0; i < elements; i += 4 * kLanes) dropout_blocks(d, block + i / 8, buffer + i);
    p = buffer + (first - block * 8);
  }

  Vec operator()(Vec v, int64_t i, int64_t e) const {
    return drop ? v * load(p + i * embed + e) : v;
  }

  static int64_t floats(int64_t embed) { return kTile * embed + 8 * kPad; }
};

struct TailBuffers {
  Tile a, normalized, hidden, activated, result;
  Tile grad_hidden, grad;
  float *proj_factors, *mlp_factors, *buffer, *other_buffer;

  TailBuffers(const Tail& t, bool backward, Arena& arena) {
    const int64_t embed = padded(t.embed), wide = padded(t.hidden), most_wide = most(embed, wide);
    const auto tile = [&](int64_t row) { return Tile{arena.tile(row), row}; };
    a = tile(embed), normalized = tile(embed), result = tile(embed);
    hidden = tile(wide), activated = tile(wide);
    proj_factors = arena.floats(Factors::floats(t.embed));
    mlp_factors = arena.floats(Factors::floats(t.embed));
    buffer = arena.tile(most_wide);
    if (!backward) return;
    grad_hidden = tile(wide), grad = tile(embed);
    other_buffer = arena.tile(most_wide);
  }
};

template <typename E>
inline void linear(int64_t rows, int64_t outputs, int64_t inputs, Tile x, const void* weight,
                   const float* bias, void* buffer, Tile y) {
  product<E>(rows, padded(outputs), inputs, left_of<E>(x.p, x.row, rows, inputs, buffer),
             packed<E>(weight, inputs), bias, 0, y.p, y.row);
}

// Σ gradᵀ x: the gradient of a weight (outputs × inputs).
template <typename E>
inline void weight_gradient(int64_t rows, int64_t outputs, int64_t inputs, Tile grad, Tile x,
                            void* grad_buffer, void* x_buffer, float* sums, float* bias) {
  add_columns(grad.p, grad.row, rows, padded(outputs), bias);
  const E* left = paired<E>(grad.p, grad.row, rows, grad_buffer);
  const E* right = paired<E>(x.p, x.row, rows, x_buffer);
  product<E>(outputs, padded(inputs), rows, left_of_pairs(left, grad.row),
             right_of_pairs(right, x.row), sums, padded(inputs), sums, padded(inputs));
}

// Computes a, its norm (to `normalized`, with gain and offset) and the hidden units before the
// activation. `r` receives the norm's factors, `centred` the norm without gain and offset unless it
// is null.
template <typename E>
inline void tail_begin(const Tail& t, int64_t rows, Tile y, Tile v, const Factors& after_proj,
                       TailBuffers& m, float* r, float* centred) {
  const int64_t embed = padded(t.embed);
  linear<E>(rows, t.embed, t.embed, y, t.proj, t.proj_bias, m.buffer, m.a);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t e = 0; e < embed; e += kLanes) {
      const Vec a = load(v[i] + e) + after_proj(load(m.a[i] + e), i, e);
      store(m.a[i] + e, a);
      store(m.normalized[i] + e, a);
    }
    r[i] = normalize(m.normalized[i], t.embed, kNormEps, nullptr, nullptr);
  }
  if (centred) std::memcpy(centred, m.normalized.p, rows * embed * sizeof(float));
  scale_rows(m.normalized.p, embed, rows, t.norm_gain, t.norm_offset);
  linear<E>(rows, t.hidden, t.embed, m.normalized, t.mlp_in, t.mlp_in_bias, m.buffer, m.hidden);
}

// Writes the layer's result, from the attention's y and the values, to m.result.
template <typename E>
inline void tail_forward(const Tail& t, int64_t first_token, int64_t rows, Tile y, Tile v,
                         TailBuffers& m) {
  float r[kTile];
  const Factors after_proj(t.after_proj, first_token, rows, t.embed, m.proj_factors);
  tail_begin<E>(t, rows, y, v, after_proj, m, r, nullptr);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < m.hidden.row; j += kLanes) {
      const Vec u = load(m.hidden[i] + j);
      store(m.activated[i] + j, u * normal(u).integral);
    }
  }
  linear<E>(rows, t.embed, t.hidden, m.activated, t.mlp_out, t.mlp_out_bias, m.buffer, m.result);
  const Factors after_mlp(t.after_mlp, first_token, rows, t.embed, m.mlp_factors);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t e = 0; e < padded(t.embed); e += kLanes) {
      store(m.result[i] + e, load(m.a[i] + e) + after_mlp(load(m.result[i] + e), i, e));
    }
  }
}

// Takes the gradient of the result in m.grad. Writes the gradient of v to m.grad and that of y to
// `grad_y`, and adds those of the parameters to the sums.
template <typename E>
inline void tail_backward(const Tail& t, int64_t first_token, int64_t rows, Tile y, Tile v,
                          const TailSums& sums, TailBuffers& m, Tile grad_y) {
  const int64_t embed = padded(t.embed);
  float r[kTile];
  // m.result first has the norm without gain and offset, then the gradient at the second dropout.
  const Tile centred = grad_y, dropped = m.result;
  const Factors after_proj(t.after_proj, first_token, rows, t.embed, m.proj_factors);
  tail_begin<E>(t, rows, y, v, after_proj, m, r, centred.p);

  const Factors after_mlp(t.after_mlp, first_token, rows, t.embed, m.mlp_factors);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t e = 0; e < embed; e += kLanes) {
      store(dropped[i] + e, after_mlp(load(m.grad[i] + e), i, e));
    }
  }
  linear<E>(rows, t.hidden, t.embed, dropped, t.mlp_out_t, nullptr, m.buffer, m.grad_hidden);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < m.hidden.row; j += kLanes) {
      const Vec u = load(m.hidden[i] + j);
      const Normal n = normal(u);
      store(m.activated[i] + j, u * n.integral);
      store(m.grad_hidden[i] + j, load(m.grad_hidden[i] + j) * (n.integral + u * n.density));
    }
  }
  weight_gradient<E>(rows, t.embed, t.hidden, dropped, m.activated, m.buffer, m.other_buffer,
                     sums.mlp_out, sums.mlp_out_bias);
  weight_gradient<E>(rows, t.hidden, t.embed, m.grad_hidden, m.normalized, m.buffer, m.other_buffer,
                     sums.mlp_in, sums.mlp_in_bias);
  linear<E>(rows, t.embed, t.hidden, m.grad_hidden, t.mlp_in_t, nullptr, m.buffer, m.normalized);

  add_columns(m.normalized.p, embed, rows, embed, sums.norm_offset);
  for (int64_t i = 0; i < rows; ++i) {
    float* g = m.normalized[i];
    for (int64_t e = 0; e < embed; e += kLanes) {
      const Vec product = load(g + e) * load(centred[i] + e);
      store(sums.norm_gain + e, load(sums.norm_gain + e) + product);
      store(g + e, load(g + e) * load(t.norm_gain + e));
    }
    normalize_backward(centred[i], r[i], t.embed, g);
    for (int64_t e = 0; e < embed; e += kLanes) {
      const Vec a = load(m.grad[i] + e) + load(g + e);
      store(m.grad[i] + e, a);
      store(dropped[i] + e, after_proj(a, i, e));
    }
  }
  weight_gradient<E>(rows, t.embed, t.embed, dropped, y, m.buffer, m.other_buffer, sums.proj,
                     sums.proj_bias);
  linear<E>(rows, t.embed, t.embed, dropped, t.proj_t, nullptr, m.buffer, grad_y);
}

}  // namespace
}  // namespace t2t
