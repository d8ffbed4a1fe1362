// Performer attention on tiles of tokens, finite for all finite inputs. All of it is float32,
// because the absolute error of an exponent is the relative error of a feature.
//
// With log-features a = w·k − |k|²/2 of the keys and b = w·q of the queries, the maxima
// c_i = max_s a_si and g_t = max_i (b_ti + c_i) are subtracted in the exponentials:
//   Z_i = Σ_s e^(a_si − c_i), S_i = Σ_s e^(a_si − c_i) v_s, f_ti = e^(b_ti + c_i − g_t),
//   y_t = Σ_i f_ti S_i / D_t, D_t = Σ_i f_ti Z_i + e^(h_t − g_t), h_t = |q_t|²/2 + log(eps·m).
// g_t is at least h_t, so that D_t is finite and at least 1.
#pragma once

#include <algorithm>

#include "patches.h"

namespace t2t {
namespace {

constexpr float kLargest = 1e15f;

// A tile inside a wider matrix: `row` floats from one token to the next.
struct Tile {
  float* p;
  int64_t row;

  float* operator[](int64_t i) const { return p + i * row; }
};
inline Left<float> left(Tile t) { return {t.p, t.row, 1}; }
inline Left<float> left_transposed(Tile t) { return {t.p, 1, t.row}; }
inline Right<float> right(Tile t) { return {t.p, t.row, kPanel}; }

inline void clamp_rows(Tile x, int64_t rows, int64_t embed) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < padded(embed); j += kLanes) {
      store(x[i] + j, clamp(load(x[i] + j), -kLargest, kLargest));
    }
  }
}

// |x|²/2 as the sum of two floats: rounding it to one would dominate the error of large exponents.
struct HalfSquare {
  float high, low;

  HalfSquare(const float* x, int64_t embed) {
    typedef float Narrow __attribute__((vector_size(kVectorBytes / 2)));
    typedef double Wide __attribute__((vector_size(kVectorBytes)));
    Wide sums{};
    for (int64_t j = 0; j < padded(embed); j += kLanes / 2) {
      Narrow v;
      std::memcpy(&v, x + j, sizeof v);
      const Wide wide = __builtin_convertvector(v, Wide);
      sums += wide * wide;
    }
    double total = 0;
    for (int i = 0; i < kLanes / 2; ++i) total += sums[i];
    high = static_cast<float>(total / 2);
    low = static_cast<float>(total / 2 - high);
    // For huge norms it exceeds the shift that keeps the exponents in range.
    if (low > 1.f || low < -1.f) low = 0.f;
  }
};

// w·k − |k|²/2 of keys that are within range.
inline void key_logs(const Features& w, Tile k, int64_t rows, Tile logs) {
  product<float>(rows, padded(w.count), w.embed, left(k), packed<float>(w.weight, w.embed), nullptr,
                 0, logs.p, logs.row);
  for (int64_t i = 0; i < rows; ++i) {
    const HalfSquare half(k[i], w.embed);
    for (int64_t j = 0; j < logs.row; j += kLanes) {
      store(logs[i] + j, load(logs[i] + j) - half.high - half.low);
    }
  }
}

// Adds keys and values to the sums under a running maximum, which starts at −infinity.
inline void add_keys(const Features& w, Tile k, Tile v, int64_t rows, const KeySums& to,
                     Tile logs) {
  const int64_t embed = padded(w.embed);
  clamp_rows(k, rows, w.embed);
  key_logs(w, k, rows, logs);
  for (int64_t j = 0; j < logs.row; j += kLanes) {
    const Vec before = load(to.maximum + j);
    Vec larger = before;
    for (int64_t i = 0; i < rows; ++i) larger = max(larger, load(logs[i] + j));
    const Vec shrink = exp(before - larger);
    Vec total = load(to.normalizer + j) * shrink;
    for (int64_t i = 0; i < rows; ++i) {
      const Vec phi = exp(load(logs[i] + j) - larger);
      total += phi;
      store(logs[i] + j, phi);
    }
    store(to.maximum + j, larger);
    store(to.normalizer + j, total);
    for (int64_t i = 0; i < kLanes && j + i < w.count; ++i) {
      if (shrink[i] == 1.f) continue;
      float* row = to.sums + (j + i) * embed;
      for (int64_t e = 0; e < embed; e += kLanes) store(row + e, load(row + e) * shrink[i]);
    }
  }
  product<float>(w.count, embed, rows, left_transposed(logs), right(v), to.sums, embed, to.sums,
                 embed);
}

// Values besides y that the backward of a tile of queries needs.
struct QueryState {
  Tile features;                      // f
  float inverse[padded(kTile)] = {};  // 1 / D
  float slope[padded(kTile)] = {};    // the derivative of D by |q|²/2
};

// Computes y for queries, which are clamped to the range.
inline void attend(const Features& w, Tile q, int64_t rows, const KeySums& keys, QueryState& state,
                   Tile y) {
  const Tile f = state.features;
  clamp_rows(q, rows, w.embed);
  product<float>(rows, f.row, w.embed, left(q), packed<float>(w.weight, w.embed), nullptr, 0, f.p,
                 f.row);
  for (int64_t i = 0; i < rows; ++i) {
    const HalfSquare half(q[i], w.embed);
    Vec tops = all(-__builtin_inff());
    // For padding after the last feature, the maximum of the keys is −infinity.
    for (int64_t j = 0; j < f.row; j += kLanes) {
      const Vec log = load(f[i] + j) + load(keys.maximum + j);
      store(f[i] + j, log);
      tops = max(log, tops);
    }
    float top = largest(tops);
    // −infinity without eps.
    const float own = half.high + w.log_eps;
    top = std::max(top, own);
    Vec sums{};
    for (int64_t j = 0; j < f.row; j += kLanes) {
      const Vec feature = exp(load(f[i] + j) - top);
      store(f[i] + j, feature);
      sums += feature * load(keys.normalizer + j);
    }
    state.inverse[i] = sum(sums);
    state.slope[i] = (own - top) + half.low;
  }
  for (int64_t i = 0; i < rows; i += kLanes) {
    const Vec term = exp(load(state.slope + i));
    store(state.slope + i, term);
    store(state.inverse + i, 1.f / (load(state.inverse + i) + term));
  }
  const Tile sums{keys.sums, padded(w.embed)};
  product<float>(rows, padded(w.embed), w.count, left(f), right(sums), nullptr, 0, y.p, y.row);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t e = 0; e < padded(w.embed); e += kLanes) {
      store(y[i] + e, load(y[i] + e) * state.inverse[i]);
    }
  }
}

// (count, padded embed) as (embed, padded count): the sums as the right operand of the gradients.
inline void transpose_sums(const Features& w, const float* from, Tile to) {
  for (int64_t e = 0; e < w.embed; ++e) {
    for (int64_t i = 0; i < to.row; ++i) {
      to[e][i] = i < w.count ? from[i * padded(w.embed) + e] : 0.f;
    }
  }
}

// grad − z·factor if z is within range, else 0: the gradient of the clamp is zero.
inline void finish_gradient(const float* z, float factor, int64_t embed, const float* from,
                            float* to) {
  for (int64_t e = 0; e < padded(embed); e += kLanes) {
    const Vec v = load(z + e), g = load(from + e) + v * factor;
    store(to + e, (v < kLargest) & (v > -kLargest) ? g : Vec{});
  }
}

// The gradients of queries that `attend` clamped, and of the sums. `grad` is the gradient of y and
// is overwritten; `work` has the size of features, `product_tile` that of embeddings.
inline void attend_backward(const Features& w, Tile q, int64_t rows, const KeySums& keys,
                            Tile sums_transposed, const QueryState& state, Tile y, Tile grad,
                            const KeySums& grads, Tile work, Tile product_tile, Tile grad_q) {
  const Tile f = state.features;
  const int64_t embed = padded(w.embed);
  float grad_d[kTile];
  for (int64_t i = 0; i < rows; ++i) {
    Vec sums{};
    for (int64_t e = 0; e < embed; e += kLanes) {
      const Vec g = load(grad[i] + e) * state.inverse[i];
      sums += g * load(y[i] + e);
      store(grad[i] + e, g);
    }
    grad_d[i] = -sum(sums);
  }
  product<float>(w.count, embed, rows, left_transposed(f), right(grad), grads.sums, embed,
                 grads.sums, embed);
  product<float>(rows, f.row, w.embed, left(grad), right(sums_transposed), nullptr, 0, work.p,
                 work.row);
  for (int64_t j = 0; j < f.row; j += kLanes) {
    Vec total = load(grads.normalizer + j);
    const Vec normalizer = load(keys.normalizer + j);
    for (int64_t i = 0; i < rows; ++i) {
      const Vec feature = load(f[i] + j);
      total += feature * grad_d[i];
      store(work[i] + j, feature * (load(work[i] + j) + normalizer * grad_d[i]));
    }
    store(grads.normalizer + j, total);
  }
  product<float>(rows, embed, w.count, left(work), packed<float>(w.weight_t, w.count), nullptr, 0,
                 product_tile.p, product_tile.row);
  for (int64_t i = 0; i < rows; ++i) {
    finish_gradient(q[i], grad_d[i] * state.slope[i], w.embed, product_tile[i], grad_q[i]);
  }
}

// The gradients of clamped keys and of values, from those of the sums. The gradient of the values
// is added to `start` (null for zero). `logs` and `work` have the size of features.
inline void add_keys_backward(const Features& w, Tile k, Tile v, int64_t rows, const float* maximum,
                              const KeySums& grads, Tile grad_sums_transposed, Tile start,
                              Tile logs, Tile work, Tile product_tile, Tile grad_k, Tile grad_v) {
  const int64_t embed = padded(w.embed);
  float total[kTile];
  key_logs(w, k, rows, logs);
  product<float>(rows, work.row, w.embed, left(v), right(grad_sums_transposed), nullptr, 0, work.p,
                 work.row);
  for (int64_t i = 0; i < rows; ++i) {
    Vec sums{};
    for_vectors(w.count, [&](int64_t j, auto keep) {
      const Vec phi = keep(exp(load(logs[i] + j) - load(maximum + j)));
      const Vec g = phi * keep(load(work[i] + j) + load(grads.normalizer + j));
      store(logs[i] + j, phi);
      store(work[i] + j, g);
      sums += g;
    });
    total[i] = sum(sums);
  }
  product<float>(rows, embed, w.count, left(logs), right({grads.sums, embed}), start.p, start.row,
                 grad_v.p, grad_v.row);
  product<float>(rows, embed, w.count, left(work), packed<float>(w.weight_t, w.count), nullptr, 0,
                 product_tile.p, product_tile.row);
  for (int64_t i = 0; i < rows; ++i) {
    finish_gradient(k[i], -total[i], w.embed, product_tile[i], grad_k[i]);
  }
}

}  // namespace
}  // namespace t2t
