// Softmax attention on tiles of queries and blocks of keys; no whole row of scores is stored.
//
// With t = scale·(q·k), a tile of queries runs over blocks of keys with a running maximum m, which
// starts at −infinity: P = e^(t − m), y = Σ P v / Σ P. The backward uses the saved m and Z = Σ P,
// recomputes P/Z, and with D_t = dy_t·y_t
//   dV = (P/Z)ᵀ dY, dS = P/Z ∘ (dY Vᵀ − D), dQ = scale·dS K, dK = scale·dSᵀ Q.
#pragma once

#include "tail.h"

namespace t2t {
namespace {

// Keys per block, so that its scores and a panel of keys stay in the first-level cache.
constexpr int64_t kKeys = 128;
static_assert(kKeys % kOperandPanel == 0 && kOperandPanel % kPanel == 0 && kTile % 2 == 0);

// --- operands of an image ---

// Rows from `token` on as the operand A.
template <typename E>
inline Left<E> rows_from(const Operand& of, int64_t embed, int64_t token) {
  const int64_t row = padded(embed) / kDepth<E>;
  return {static_cast<const E*>(of.rows) + token * row, row, 1};
}
// The transpose from `token` on, which is a multiple of kPanel, as the operand B.
template <typename E>
inline Right<E> columns_from(const Operand& of, int64_t embed, int64_t token) {
  Right<E> all = packed<E>(of.columns, embed);
  all.p += token / kPanel * all.panel;
  return all;
}
// Rows from `token` on, which is even, as the operand B.
template <typename E>
inline Right<E> depth_from(const Operand& of, int64_t embed, int64_t token) {
  const int64_t row = padded(embed);
  return right_of_pairs(static_cast<const E*>(of.depth) + token / kDepth<E> * row, row);
}

// Writes the tokens of a range as those of the three operands that are not null. The range begins
// at a multiple of kOperandPanel.
template <typename S, typename E>
void operand_of(const Softmax& s, const Rows& from, const Operand& to, const Range& range,
                Arena& arena) {
  const int64_t row = padded(s.embed), steps = (s.embed + kDepth<E> - 1) / kDepth<E>;
  float *tile = arena.tile(row), *buffer = arena.tile(row);
  auto* columns = static_cast<E*>(to.columns);
  for (int64_t token = range.first; token < range.last; token += kTile) {
    const int64_t count = least(kTile, range.last - token);
    load_rows<S>(from, token, count, s.embed, tile, row);
    const Left<E> left = left_of<E>(tile, row, count, row, buffer);
    if (to.rows) {
      std::memcpy(static_cast<E*>(to.rows) + token * left.row, left.p,
                  count * left.row * sizeof(E));
    }
    if (columns) {
      for (int64_t i = 0; i < count; ++i) {
        E* column = columns + (token + i) / kPanel * steps * kPanel + (token + i) % kPanel;
        for (int64_t k = 0; k < steps; ++k) column[k * kPanel] = left.p[i * left.row + k];
      }
    }
    if (to.depth) {
      auto* depth = static_cast<E*>(to.depth) + token / kDepth<E> * row;
      if constexpr (std::is_same_v<E, Pair>) {
        paired<E>(tile, row, count, depth);
      } else {
        std::memcpy(depth, tile, count * row * sizeof(float));
      }
    }
  }
  // Whole panels are multiplied.
  if (columns && range.last == s.tokens) {
    for (int64_t token = s.tokens; token % kPanel; ++token) {
      E* column = columns + token / kPanel * steps * kPanel + token % kPanel;
      for (int64_t k = 0; k < steps; ++k) column[k * kPanel] = E{};
    }
  }
}

// --- tiles ---

struct SoftmaxBuffers {
  Tile scores, grads;
  float *buffer, *other_buffer;

  SoftmaxBuffers(bool backward, Arena& arena)
      : scores(tile_of(arena)),
        grads{nullptr, 0},
        buffer(arena.tile(kKeys)),
        other_buffer(nullptr) {
    if (!backward) return;
    grads = tile_of(arena);
    other_buffer = arena.tile(kKeys);
  }

  static Tile tile_of(Arena& arena) { return {arena.tile(kKeys), kKeys}; }
};

// Computes q·k for the tile's queries and a block of keys.
template <typename E>
inline void scores_of(const Softmax& s, const Operand& q, const Operand& k, int64_t token,
                      int64_t rows, int64_t key, int64_t keys, Tile to) {
  product<E>(rows, round_up(keys, kLanes), s.embed, rows_from<E>(q, s.embed, token),
             columns_from<E>(k, s.embed, key), nullptr, 0, to.p, to.row);
}

// Writes the attention of the queries [token, token + rows) to `y`, and their maxima and
// normalisers.
template <typename E>
void softmax_tile(const Softmax& s, const Operand& q, const Operand& k, const Operand& v,
                  int64_t token, int64_t rows, Tile y, const SoftmaxRows& statistics,
                  SoftmaxBuffers& m) {
  constexpr int64_t kCount = padded(kTile);
  float maximum[kCount], larger[kCount], shift[kCount], shrink[kCount], total[kCount] = {};
  for (float& top : maximum) top = -__builtin_inff();
  for (int64_t i = 0; i < rows; ++i) std::memset(y[i], 0, padded(s.embed) * sizeof(float));
  for (int64_t key = 0; key < s.tokens; key += kKeys) {
    const int64_t keys = least(kKeys, s.tokens - key);
    scores_of<E>(s, q, k, token, rows, key, keys, m.scores);
    for (int64_t i = 0; i < rows; ++i) {
      float* row = m.scores[i];
      // Padding after the last key copies the first one, which does not change the maximum.
      for (int64_t j = keys; j < round_up(keys, kLanes); ++j) row[j] = row[0];
      Vec tops = all(maximum[i]);
      for (int64_t j = 0; j < keys; j += kLanes) tops = max(load(row + j) * s.scale, tops);
      larger[i] = largest(tops);
    }
    for (int64_t i = rows; i < kCount; ++i) larger[i] = maximum[i];
    // As long as all scores are −infinity, all weights are zero.
    for (int64_t i = 0; i < kCount; ++i) {
      shift[i] = larger[i] == -__builtin_inff() ? 0.f : larger[i];
    }
    for (int64_t i = 0; i < kCount; i += kLanes) {
      store(shrink + i, exp_of_negative(load(maximum + i) - load(shift + i)));
    }
    for (int64_t i = 0; i < rows; ++i) {
      float* row = m.scores[i];
      Vec sums{};
      for_vectors(keys, [&](int64_t j, auto keep) {
        const Vec p = keep(exp_of_negative(load(row + j) * s.scale - shift[i]));
        sums += p;
        store(row + j, p);
      });
      total[i] = total[i] * shrink[i] + sum(sums);
      maximum[i] = larger[i];
      if (shrink[i] == 1.f) continue;
      for (int64_t e = 0; e < padded(s.embed); e += kLanes)
        store(y[i] + e, load(y[i] + e) * shrink[i]);
    }
    product<E>(rows, padded(s.embed), keys, left_of<E>(m.scores.p, kKeys, rows, keys, m.buffer),
               depth_from<E>(v, s.embed, key), y.p, y.row, y.p, y.row);
  }
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t e = 0; e < padded(s.embed); e += kLanes)
      store(y[i] + e, load(y[i] + e) / total[i]);
    statistics.maximum[token + i] = maximum[i];
    statistics.normalizer[token + i] = total[i];
  }
}

// Adds the gradients from a block of keys: of the tile's queries to grad_q, of the keys and values
// to grad_k and grad_v, whose rows begin at the block. dQ and dK are not multiplied by the scale
// yet.
template <typename E>
void softmax_backward_block(const Softmax& s, const Operand& q, const Operand& k, const Operand& v,
                            const Operand& grad, const SoftmaxRows& statistics, const float* delta,
                            int64_t token, int64_t rows, int64_t key, int64_t keys, float* grad_q,
                            float* grad_k, float* grad_v, SoftmaxBuffers& m) {
  const int64_t embed = padded(s.embed);
  scores_of<E>(s, q, k, token, rows, key, keys, m.scores);
  scores_of<E>(s, grad, v, token, rows, key, keys, m.grads);
  for (int64_t i = 0; i < rows; ++i) {
    float *p = m.scores[i], *g = m.grads[i];
    const float top = statistics.maximum[token + i], share = 1 / statistics.normalizer[token + i];
    const float mean = delta[token + i];
    for_vectors(keys, [&](int64_t j, auto keep) {
      const Vec weight = keep(exp_of_negative(load(p + j) * s.scale - top) * share);
      store(p + j, weight);
      store(g + j, keep(weight * (load(g + j) - mean)));
    });
  }
  const E* weights = paired<E>(m.scores.p, kKeys, rows, m.buffer);
  product<E>(keys, embed, rows, left_of_pairs(weights, kKeys), depth_from<E>(grad, s.embed, token),
             grad_v, embed, grad_v, embed);
  const E* grads = paired<E>(m.grads.p, kKeys, rows, m.buffer);
  product<E>(keys, embed, rows, left_of_pairs(grads, kKeys), depth_from<E>(q, s.embed, token),
             grad_k, embed, grad_k, embed);
  product<E>(rows, embed, keys, left_of<E>(m.grads.p, kKeys, rows, keys, m.other_buffer),
             depth_from<E>(k, s.embed, key), grad_q, embed, grad_q, embed);
}

}  // namespace
}  // namespace t2t
