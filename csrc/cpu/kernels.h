// The kernels over a range of tokens, and their table, compiled by each isa_*.cpp.
#pragma once

#include "softmax.h"

namespace t2t {
namespace {

// Calls f(token, rows) for the tiles of a range.
template <typename F>
inline void for_tiles(const Range& range, const F& f) {
  for (int64_t token = range.first; token < range.last; token += kTile) {
    f(token, least(kTile, range.last - token));
  }
}

// The bytes of the buffers that f(arena) allocates, plus a cache line for alignment.
template <typename F>
inline int64_t bytes_of(const F& f) {
  Arena arena{0};
  f(arena);
  return static_cast<int64_t>(arena.next) + 64;
}
inline Arena arena_at(void* scratch) {
  return {(reinterpret_cast<uintptr_t>(scratch) + 63) / 64 * 64};
}

inline Tile tile_in(Arena& arena, int64_t row) { return {arena.tile(row), row}; }

template <typename E>
int64_t packed_bytes(int64_t depth, int64_t columns) {
  const int64_t steps = (depth + kDepth<E> - 1) / kDepth<E>;
  return steps * round_up(columns, kPanel) * static_cast<int64_t>(sizeof(E));
}

template <typename E>
void pack(const float* from, const int64_t* depth_offsets, int64_t depth,
          const int64_t* column_offsets, int64_t columns, void* to) {
  const int64_t steps = (depth + kDepth<E> - 1) / kDepth<E>;
  const auto element = [&](int64_t k, int64_t j) {
    if (k >= depth || j >= columns || depth_offsets[k] < 0 || column_offsets[j] < 0) return 0.f;
    return from[depth_offsets[k] + column_offsets[j]];
  };
  for (int64_t j = 0; j < round_up(columns, kPanel); ++j) {
    for (int64_t k = 0; k < steps; ++k) {
      const int64_t at = (j / kPanel * steps + k) * kPanel + j % kPanel;
      if constexpr (std::is_same_v<E, float>) {
        static_cast<float*>(to)[at] = element(k, j);
      } else {
        bf16 pair[kLanes];
        store(pair, Vec{element(2 * k, j), element(2 * k + 1, j)});
        std::memcpy(static_cast<Pair*>(to) + at, pair, sizeof(Pair));
      }
    }
  }
}

// --- soft split, norm, linear ---

struct ProjectionForwardBuffers {
  float *tile, *buffer, *y;

  ProjectionForwardBuffers(const Projection& p, Arena& arena)
      : tile(arena.tile(padded(p.split.patch()))),
        buffer(arena.tile(padded(p.split.patch()))),
        y(arena.tile(p.outputs)) {}
};

int64_t projection_scratch(const Projection& p) {
  const int64_t forward = bytes_of([&](Arena& arena) { ProjectionForwardBuffers(p, arena); });
  const int64_t backward = bytes_of([&](Arena& arena) {
    ProjectionBuffers(p, arena);
    arena.tile(p.outputs);
  });
  return most(forward, backward);
}

template <typename T>
void projection_forward(const Projection& p, const void* x, Rows y, int64_t columns, Range range,
                        void* scratch) {
  Arena arena = arena_at(scratch);
  const ProjectionForwardBuffers m(p, arena);
  for_tiles(range, [&](int64_t token, int64_t rows) {
    project<T>(p, x, range.image, token, rows, m.tile, m.buffer, m.y);
    store_rows<T>(m.y, p.outputs, rows, columns, y, token);
  });
}

// The band of pixel rows that a range of whole rows of tokens covers, filled with zeros.
struct Band {
  float* p;
  int64_t start, rows;

  Band(const Split& s, const Range& range, float* p)
      : p(p),
        start(s.band_start(range.first / s.columns)),
        rows(s.band_rows((range.last - range.first) / s.columns)) {
    if (p) std::memset(p, 0, rows * s.map_row() * sizeof(float));
  }
};

template <typename T>
void projection_backward(const Projection& p, const void* x, Rows grad, int64_t columns,
                         ProjectionSums sums, float* band, Range range, void* scratch) {
  Arena arena = arena_at(scratch);
  ProjectionBuffers m(p, arena);
  float* tile = arena.tile(p.outputs);
  const Band under(p.split, range, band);
  for_tiles(range, [&](int64_t token, int64_t rows) {
    load_rows<T>(grad, token, rows, columns, tile, p.outputs);
    project_backward<T>(p, x, range.image, token, rows, tile, sums, band, under.start, under.rows,
                        m);
  });
}

template <typename T>
void store_sum(const float* const* rows, int64_t count, int64_t n, void* to) {
  for (int64_t j = 0; j < n; j += kLanes) {
    const int64_t lanes = least(kLanes, n - j);
    Vec total{};
    for (int64_t i = 0; i < count; ++i) {
      total += lanes == kLanes ? load(rows[i] + j) : load_first(rows[i] + j, lanes);
    }
    if (lanes == kLanes) {
      store(static_cast<T*>(to) + j, total);
    } else {
      store_first(static_cast<T*>(to) + j, total, lanes);
    }
  }
}

// --- Performer attention ---

struct AttentionBuffers {
  Tile first, second, third, fourth;  // embeddings
  Tile logs, work;                    // features
  Tile transposed;                    // (embed, padded count)

  AttentionBuffers(const Features& w, Arena& arena)
      : first(tile_in(arena, padded(w.embed))),
        second(tile_in(arena, padded(w.embed))),
        third(tile_in(arena, padded(w.embed))),
        fourth(tile_in(arena, padded(w.embed))),
        logs(tile_in(arena, padded(w.count))),
        work(tile_in(arena, padded(w.count))),
        transposed{arena.floats(w.embed * padded(w.count)), padded(w.count)} {}
};

int64_t attention_scratch(const Features& w) {
  return bytes_of([&](Arena& arena) { AttentionBuffers(w, arena); });
}

// Empty sums.
inline void begin_sums(const Features& w, const KeySums& sums) {
  for (int64_t i = 0; i < padded(w.count); ++i) {
    sums.maximum[i] = -__builtin_inff();
    sums.normalizer[i] = 0.f;
  }
  std::memset(sums.sums, 0, w.count * padded(w.embed) * sizeof(float));
}

template <typename T>
void load_tile(const Rows& from, int64_t token, int64_t rows, int64_t n, Tile to) {
  load_rows<T>(from, token, rows, n, to.p, to.row);
}
template <typename T>
void store_tile(Tile from, int64_t rows, int64_t n, const Rows& to, int64_t token) {
  store_rows<T>(from.p, from.row, rows, n, to, token);
}

template <typename T>
void attention_keys(const Features& w, Rows k, Rows v, KeySums sums, Range range, void* scratch) {
  Arena arena = arena_at(scratch);
  const AttentionBuffers m(w, arena);
  begin_sums(w, sums);
  for_tiles(range, [&](int64_t token, int64_t rows) {
    load_tile<T>(k, token, rows, w.embed, m.first);
    load_tile<T>(v, token, rows, w.embed, m.second);
    add_keys(w, m.first, m.second, rows, sums, m.logs);
  });
}

template <typename T>
void attention_queries(const Features& w, Rows q, KeySums sums, Rows y, Range range,
                       void* scratch) {
  Arena arena = arena_at(scratch);
  const AttentionBuffers m(w, arena);
  QueryState state{m.logs};
  for_tiles(range, [&](int64_t token, int64_t rows) {
    load_tile<T>(q, token, rows, w.embed, m.first);
    attend(w, m.first, rows, sums, state, m.second);
    store_tile<T>(m.second, rows, w.embed, y, token);
  });
}

template <typename T>
void attention_queries_backward(const Features& w, Rows q, KeySums sums, Rows grad, Rows grad_q,
                                KeySums grads, Range range, void* scratch) {
  Arena arena = arena_at(scratch);
  const AttentionBuffers m(w, arena);
  QueryState state{m.logs};
  begin_sums(w, grads);
  transpose_sums(w, sums.sums, m.transposed);
  for_tiles(range, [&](int64_t token, int64_t rows) {
    load_tile<T>(q, token, rows, w.embed, m.first);
    load_tile<T>(grad, token, rows, w.embed, m.third);
    attend(w, m.first, rows, sums, state, m.second);
    attend_backward(w, m.first, rows, sums, m.transposed, state, m.second, m.third, grads, m.work,
                    m.fourth, m.fourth);
    store_tile<T>(m.fourth, rows, w.embed, grad_q, token);
  });
}

template <typename T>
void attention_keys_backward(const Features& w, Rows k, Rows v, KeySums sums, KeySums grads,
                             Rows grad_k, Rows grad_v, Range range, void* scratch) {
  Arena arena = arena_at(scratch);
  const AttentionBuffers m(w, arena);
  transpose_sums(w, grads.sums, m.transposed);
  for_tiles(range, [&](int64_t token, int64_t rows) {
    load_tile<T>(k, token, rows, w.embed, m.first);
    load_tile<T>(v, token, rows, w.embed, m.second);
    clamp_rows(m.first, rows, w.embed);
    add_keys_backward(w, m.first, m.second, rows, sums.maximum, grads, m.transposed, {nullptr, 0},
                      m.logs, m.work, m.fourth, m.fourth, m.third);
    store_tile<T>(m.fourth, rows, w.embed, grad_k, token);
    store_tile<T>(m.third, rows, w.embed, grad_v, token);
  });
}

// --- the Performer layer ---

struct LayerBuffers {
  ProjectionBuffers projection;
  Tile kqv, y, grad_y, product;  // kqv: three groups of padded(embed)
  Tile logs, work, transposed;
  TailBuffers tail;

  LayerBuffers(const Projection& p, const Features& w, const Tail& t, Arena& arena)
      : projection(p, arena),
        kqv(tile_in(arena, p.outputs)),
        y(tile_in(arena, padded(w.embed))),
        grad_y(tile_in(arena, padded(w.embed))),
        product(tile_in(arena, padded(w.embed))),
        logs(tile_in(arena, padded(w.count))),
        work(tile_in(arena, padded(w.count))),
        transposed{arena.floats(w.embed * padded(w.count)), padded(w.count)},
        tail(t, true, arena) {}
};

int64_t layer_scratch(const Projection& p, const Features& w, const Tail& t) {
  return bytes_of([&](Arena& arena) { LayerBuffers(p, w, t, arena); });
}

template <typename T>
void layer_keys(const Projection& p, const Features& w, const void* x, KeySums sums, float* queries,
                float* values, Range range, void* scratch) {
  Arena arena = arena_at(scratch);
  const ProjectionForwardBuffers m(p, arena);
  const Tile logs = tile_in(arena, padded(w.count));
  const int64_t embed = padded(w.embed);
  begin_sums(w, sums);
  for_tiles(range, [&](int64_t token, int64_t rows) {
    project<T>(p, x, range.image, token, rows, m.tile, m.buffer, m.y);
    for (int64_t i = 0; i < rows; ++i) {
      const float* from = m.y + i * p.outputs;
      std::memcpy(queries + (token + i) * embed, from + embed, embed * sizeof(float));
      std::memcpy(values + (token + i) * embed, from + 2 * embed, embed * sizeof(float));
    }
    add_keys(w, {m.y, p.outputs}, {m.y + 2 * embed, p.outputs}, rows, sums, logs);
  });
}

template <typename T>
void layer_queries(const Projection& p, const Features& w, const Tail& t, KeySums sums,
                   float* queries, float* values, void* y, Range range, void* scratch) {
  Arena arena = arena_at(scratch);
  const int64_t embed = padded(w.embed), tokens = p.split.tokens();
  const Tile attended = tile_in(arena, embed);
  QueryState state{tile_in(arena, padded(w.count))};
  TailBuffers m(t, false, arena);
  const Rows to{static_cast<T*>(y) + range.image * tokens * w.embed, w.embed, 1};
  for_tiles(range, [&](int64_t token, int64_t rows) {
    attend(w, {queries + token * embed, embed}, rows, sums, state, attended);
    const Tile v{values + token * embed, embed};
    tail_forward<Element<T>>(t, range.image * tokens + token, rows, attended, v, m);
    store_tile<T>(m.result, rows, w.embed, to, token);
  });
}

template <typename T>
void layer_queries_backward(const Projection& p, const Features& w, const Tail& t, const void* x,
                            KeySums sums, Rows grad, TailSums tail_sums, KeySums grads, float* kqv,
                            float* skip, Range range, void* scratch) {
  Arena arena = arena_at(scratch);
  LayerBuffers m(p, w, t, arena);
  const int64_t embed = padded(w.embed), tokens = p.split.tokens();
  QueryState state{m.logs};
  begin_sums(w, grads);
  transpose_sums(w, sums.sums, m.transposed);
  for_tiles(range, [&](int64_t token, int64_t rows) {
    const Tile tile{kqv + token * p.outputs, p.outputs};
    const Tile q{tile.p + embed, tile.row}, v{tile.p + 2 * embed, tile.row};
    project<T>(p, x, range.image, token, rows, m.projection.tile, m.projection.buffer, tile.p);
    attend(w, q, rows, sums, state, m.y);
    load_tile<T>(grad, token, rows, w.embed, m.tail.grad);
    tail_backward<Element<T>>(t, range.image * tokens + token, rows, m.y, v, tail_sums, m.tail,
                              m.grad_y);
    std::memcpy(skip + token * embed, m.tail.grad.p, rows * embed * sizeof(float));
    attend_backward(w, q, rows, sums, m.transposed, state, m.y, m.grad_y, grads, m.work, m.product,
                    q);
  });
}

template <typename T>
void layer_keys_backward(const Projection& p, const Features& w, const void* x, KeySums sums,
                         KeySums grads, ProjectionSums projection_sums, float* band, float* kqv,
                         const float* skip, Range range, void* scratch) {
  Arena arena = arena_at(scratch);
  ProjectionBuffers m(p, arena);
  const int64_t embed = padded(w.embed);
  const Tile logs = tile_in(arena, padded(w.count)), work = tile_in(arena, padded(w.count));
  const Tile product = tile_in(arena, embed);
  const Tile transposed{arena.floats(w.embed * padded(w.count)), padded(w.count)};
  transpose_sums(w, grads.sums, transposed);
  const Band under(p.split, range, band);
  for_tiles(range, [&](int64_t token, int64_t rows) {
    const Tile k{kqv + token * p.outputs, p.outputs}, v{k.p + 2 * embed, k.row};
    const Tile start{const_cast<float*>(skip) + token * embed, embed};
    clamp_rows(k, rows, w.embed);
    add_keys_backward(w, k, v, rows, sums.maximum, grads, transposed, start, logs, work, product, k,
                      v);
    project_backward<T>(p, x, range.image, token, rows, k.p, projection_sums, band, under.start,
                        under.rows, m);
  });
}

// --- softmax attention ---

struct AttentionTiles {
  SoftmaxBuffers softmax;
  Tile y, grad;

  AttentionTiles(const Softmax& s, Arena& arena)
      : softmax(true, arena),
        y(tile_in(arena, padded(s.embed))),
        grad(tile_in(arena, padded(s.embed))) {}
};

int64_t softmax_scratch(const Softmax& s) {
  return bytes_of([&](Arena& arena) { AttentionTiles(s, arena); });
}

template <typename S, typename E>
void make_operand(const Softmax& s, Rows from, Operand to, Range range, void* scratch) {
  Arena arena = arena_at(scratch);
  operand_of<S, E>(s, from, to, range, arena);
}

template <typename T>
void softmax_forward(const Softmax& s, Operand q, Operand k, Operand v, Rows y, float* attended,
                     SoftmaxRows statistics, Range range, void* scratch) {
  Arena arena = arena_at(scratch);
  AttentionTiles m(s, arena);
  for_tiles(range, [&](int64_t token, int64_t rows) {
    softmax_tile<Element<T>>(s, q, k, v, token, rows, m.y, statistics, m.softmax);
    store_tile<T>(m.y, rows, s.embed, y, token);
    if (attended) store_tile<float>(m.y, rows, s.embed, {attended, s.embed, 1}, token);
  });
}

template <typename T>
void round_tile(Tile x, int64_t rows) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < x.row; j += kLanes) {
      T rounded[kLanes];
      store(rounded, load(x[i] + j));
      store(x[i] + j, load(rounded));
    }
  }
}

// y·dy, added in the same order as in the products for v·dy, so that both cancel exactly if a query
// attends to a single key. Of a pair, the CPU adds the second element first.
template <typename E>
inline void delta_of(Tile y, Tile grad, int64_t rows, float* delta) {
  constexpr int64_t kSum = kSegment<E> * kDepth<E>;
  for (int64_t i = 0; i < rows; ++i) {
    Vec total{};
    for (int64_t j = 0; j < y.row; j += kSum) {
      Vec part{};
      for (int64_t e = j; e < least(j + kSum, y.row); ++e) {
        const int64_t at = e ^ (kDepth<E> - 1);
        part += all(grad[i][at]) * load(y[i] + at);  // the first lane counts
      }
      total = j == 0 ? part : part + total;
    }
    delta[i] = total[0];
  }
}

template <typename T>
void softmax_delta(const Softmax& s, Rows attended, Rows grad, float* delta, Range range,
                   void* scratch) {
  Arena arena = arena_at(scratch);
  const AttentionTiles m(s, arena);
  for_tiles(range, [&](int64_t token, int64_t rows) {
    load_tile<float>(attended, token, rows, s.embed, m.y);
    load_tile<T>(grad, token, rows, s.embed, m.grad);
    delta_of<Element<T>>(m.y, m.grad, rows, delta + token);
  });
}

template <typename T>
void softmax_backward(const Softmax& s, Operand q, Operand k, Operand v, Operand grad,
                      SoftmaxRows statistics, const float* delta, float* grad_q, float* grad_k,
                      float* grad_v, Range keys, void* scratch) {
  Arena arena = arena_at(scratch);
  AttentionTiles m(s, arena);
  const int64_t embed = padded(s.embed);
  for_tiles({keys.image, 0, s.tokens}, [&](int64_t token, int64_t rows) {
    float* to = grad_q + token * embed;
    std::memset(to, 0, rows * embed * sizeof(float));
    for (int64_t key = keys.first; key < keys.last; key += kKeys) {
      softmax_backward_block<Element<T>>(s, q, k, v, grad, statistics, delta, token, rows, key,
                                         least(kKeys, keys.last - key), to, grad_k + key * embed,
                                         grad_v + key * embed, m.softmax);
    }
  });
}

// scale × the sum of arrays, for the tokens of a tile.
inline void sum_arrays(const float* from, int64_t count, int64_t size, float scale, int64_t token,
                       int64_t rows, int64_t embed, Tile to) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t e = 0; e < embed; e += kLanes) {
      Vec total{};
      for (int64_t c = 0; c < count; ++c) total += load(from + c * size + (token + i) * embed + e);
      store(to[i] + e, total * scale);
    }
  }
}

template <typename T>
void softmax_gradient(const Softmax& s, const float* from, int64_t count, int64_t size, float scale,
                      Rows to, Range range, void* scratch) {
  Arena arena = arena_at(scratch);
  const AttentionTiles m(s, arena);
  for_tiles(range, [&](int64_t token, int64_t rows) {
    sum_arrays(from, count, size, scale, token, rows, padded(s.embed), m.grad);
    store_tile<T>(m.grad, rows, s.embed, to, token);
  });
}

// --- the transformer layer ---

struct TransformerBuffers {
  ProjectionBuffers projection;
  Tile qkv, y, grad_y;  // qkv: three groups of padded(embed)
  SoftmaxBuffers softmax;
  TailBuffers tail;

  TransformerBuffers(const Projection& p, const Softmax& s, const Tail& t, Arena& arena)
      : projection(p, arena),
        qkv(tile_in(arena, 3 * padded(s.embed))),
        y(tile_in(arena, padded(s.embed))),
        grad_y(tile_in(arena, padded(s.embed))),
        softmax(false, arena),
        tail(t, true, arena) {}
};

int64_t transformer_scratch(const Projection& p, const Softmax& s, const Tail& t) {
  return bytes_of([&](Arena& arena) { TransformerBuffers(p, s, t, arena); });
}

template <typename T>
void transformer_project(const Projection& p, const Softmax& s, const void* x, Rows q, Rows k,
                         float* values, Range range, void* scratch) {
  Arena arena = arena_at(scratch);
  const ProjectionForwardBuffers m(p, arena);
  const int64_t embed = padded(s.embed);
  for_tiles(range, [&](int64_t token, int64_t rows) {
    project<T>(p, x, range.image, token, rows, m.tile, m.buffer, m.y);
    store_tile<T>({m.y, p.outputs}, rows, s.embed, q, token);
    store_tile<T>({m.y + embed, p.outputs}, rows, s.embed, k, token);
    for (int64_t i = 0; i < rows; ++i) {
      std::memcpy(values + (token + i) * embed, m.y + i * p.outputs + 2 * embed,
                  embed * sizeof(float));
    }
  });
}

template <typename T>
void transformer_queries(const Softmax& s, const Tail& t, Operand q, Operand k, Operand v,
                         const float* values, Rows attended, SoftmaxRows statistics, Rows y,
                         Range range, void* scratch) {
  Arena arena = arena_at(scratch);
  const int64_t embed = padded(s.embed);
  SoftmaxBuffers softmax(false, arena);
  const Tile result = tile_in(arena, embed);
  TailBuffers m(t, false, arena);
  for_tiles(range, [&](int64_t token, int64_t rows) {
    softmax_tile<Element<T>>(s, q, k, v, token, rows, result, statistics, softmax);
    store_tile<float>(result, rows, s.embed, attended, token);
    const Tile skip{const_cast<float*>(values) + token * embed, embed};
    tail_forward<Element<T>>(t, token, rows, result, skip, m);
    store_tile<T>(m.result, rows, s.embed, y, token);
  });
}

template <typename T>
void transformer_tail_backward(const Projection& p, const Softmax& s, const Tail& t, const void* x,
                               Rows attended, Rows grad, TailSums sums, float* values,
                               float* grad_y, float* grad_v, float* delta, Range range,
                               void* scratch) {
  Arena arena = arena_at(scratch);
  TransformerBuffers m(p, s, t, arena);
  const int64_t embed = padded(s.embed);
  for_tiles(range, [&](int64_t token, int64_t rows) {
    const Tile v{values + token * embed, embed};
    project<T>(p, x, range.image, token, rows, m.projection.tile, m.projection.buffer, m.qkv.p);
    std::memcpy(v.p, m.qkv.p, rows * embed * sizeof(float));
    load_tile<float>(attended, token, rows, s.embed, m.y);
    load_tile<T>(grad, token, rows, s.embed, m.tail.grad);
    tail_backward<Element<T>>(t, token, rows, m.y, v, sums, m.tail, m.grad_y);
    // Rounded as in the products, so that D cancels against their results.
    round_tile<T>(m.grad_y, rows);
    delta_of<Element<T>>(m.y, m.grad_y, rows, delta + token);
    std::memcpy(grad_y + token * embed, m.grad_y.p, rows * embed * sizeof(float));
    std::memcpy(grad_v + token * embed, m.tail.grad.p, rows * embed * sizeof(float));
  });
}

template <typename T>
void transformer_projection_backward(const Projection& p, const Softmax& s, const void* x,
                                     const float* grad_q, int64_t count, int64_t size,
                                     const float* grad_k, const float* grad_v, ProjectionSums sums,
                                     float* band, Range range, void* scratch) {
  Arena arena = arena_at(scratch);
  ProjectionBuffers m(p, arena);
  const Tile qkv = tile_in(arena, p.outputs);
  const int64_t embed = padded(s.embed);
  const Band under(p.split, range, band);
  for_tiles(range, [&](int64_t token, int64_t rows) {
    sum_arrays(grad_q, count, size, s.scale, token, rows, embed, qkv);
    sum_arrays(grad_k, 1, 0, s.scale, token, rows, embed, {qkv.p + embed, qkv.row});
    sum_arrays(grad_v, 1, 0, 1.f, token, rows, embed, {qkv.p + 2 * embed, qkv.row});
    project_backward<T>(p, x, range.image, token, rows, qkv.p, sums, band, under.start, under.rows,
                        m);
  });
}

// --- the table ---

template <typename T>
constexpr TypedKernels typed_kernels() {
  return {packed_bytes<Element<T>>,
          pack<Element<T>>,
          projection_scratch,
          projection_forward<T>,
          projection_backward<T>,
          store_sum<T>,
          attention_scratch,
          attention_keys<T>,
          attention_queries<T>,
          attention_queries_backward<T>,
          attention_keys_backward<T>,
          layer_scratch,
          layer_keys<T>,
          layer_queries<T>,
          layer_queries_backward<T>,
          layer_keys_backward<T>,
          softmax_scratch,
          make_operand<T, Element<T>>,
          make_operand<float, Element<T>>,
          softmax_forward<T>,
          softmax_delta<T>,
          softmax_backward<T>,
          softmax_gradient<T>,
          transformer_scratch,
          transformer_project<T>,
          transformer_queries<T>,
          transformer_tail_backward<T>,
          transformer_projection_backward<T>};
}

constexpr Kernels make_kernels(const char* name) {
  return {name, typed_kernels<float>(), typed_kernels<bf16>(), typed_kernels<half>()};
}

}  // namespace
}  // namespace t2t
