// Attention of a unit with many packed rows: two register-blocked products a tile of tokens.
//
// Q is packed once as panels [D][2·W rows], scaled, float32. Scores come out as S[token][row]: the vector lanes are
// query rows, so that maxima, exponentials and sums of the softmax are vertical and need no reduction across lanes.
// For P·V the lanes are channels of V, packed as panels [token][2·W channels] that stay in the first-level cache.
// K and V of 16 bits or 8 are converted to float32 once a tile, for all rows; float32 K is read where it lies.
//
// With AVX512-BF16 both products of bfloat16 go by pairs, two multiply-adds a lane and instruction: Q and K two channels
// at a time (K where it lies), P and V two tokens. P is rounded to bfloat16 for that, as flash attention does on GPUs;
// its sum is not, so the LSE is float32's.
#pragma once

#include <utility>

#include "cpu/unit.hpp"

namespace anabranch::cpu {
namespace {

constexpr int TILE = 96;     // tokens; a multiple of every key block below
constexpr int PANEL = 2 * W;  // rows of a Q panel, channels of a V panel

template <class E>
constexpr int TILE_STEPS = TILE / STEP<E>;
template <class E>
ANABRANCH_INLINE int steps(int n) {
  return (n + STEP<E> - 1) / STEP<E>;
}

template <class E>
struct PackedScratch {
  int rows, dv;  // rows, and the head_dim of V, padded to W
  E *q, *v;
  float *k, *s, *o, *m, *l, *alpha;
  int32_t *limit, *position;
  int32_t *slots, *coming, *positions;  // of a tile's tokens, of the next one's; the tile's positions
  const void **here, **next;            // the K rows of a tile, then its V rows

  PackedScratch(void* base, int packed, int d, int v_dim, size_t* bytes = nullptr) {
    Scratch take(base);
    rows = round_up(packed, W);
    dv = round_up(v_dim, W);
    q = take.take<E>(size_t(rows) * d);
    v = take.take<E>(size_t(TILE) * dv);
    k = take.take<float>(size_t(TILE) * d);
    s = take.take<float>(size_t(TILE) * PANEL);
    o = take.take<float>(size_t(rows) * dv);
    m = take.take<float>(rows);
    l = take.take<float>(rows);
    alpha = take.take<float>(rows);
    limit = take.take<int32_t>(rows);
    position = take.take<int32_t>(rows);
    slots = take.take<int32_t>(TILE);
    coming = take.take<int32_t>(TILE);
    positions = take.take<int32_t>(TILE);
    here = take.take<const void*>(2 * TILE);
    next = take.take<const void*>(2 * TILE);
    if (bytes) *bytes = size_t(take.next - static_cast<char*>(base));
  }
};

// Brings the next tile's rows into the second-level cache while this one is worked on, a few lines at a time: rows of a
// page pool lie far apart, where the hardware's own prefetcher does not follow, and many lines at once would wait for the
// memory.
struct Fetcher {
  const void* const* row;
  const void* const* end;
  int bytes, each, at = 0;  // of a row; lines a step; where in *row

  Fetcher(const void* const* begin, int rows, int row_bytes, int steps)
      : row(begin), end(begin + rows), bytes(row_bytes) {
    each = (rows * ((bytes + LINE - 1) / LINE) + steps - 1) / steps;
  }
  ANABRANCH_INLINE void step() {
    for (int i = 0; i < each && row < end; ++i) {
      fetch(static_cast<const char*>(*row) + at, 1);
      at += LINE;
      if (at < bytes) continue;
      at = 0;
      ++row;
    }
  }
};

// Of scores(): steps of the fetcher in a tile's blocks for so many panels of rows.
constexpr int64_t FETCH_EVERY = 16;  // elements of a row
template <class E>
ANABRANCH_INLINE int fetch_steps(int d, int panels) {
  return panels * (TILE / LONG) * int((d / STEP<E> + FETCH_EVERY - 1) / FETCH_EVERY);
}

// s[KB tokens][NV · W rows] = K · Qᵀ; of pairs, times `factor`
template <int NV, int KB, class E>
ANABRANCH_INLINE void score_block(const E* q, int d, const void* const* k, float* s, Fetcher& fetcher, float factor) {
  vf acc[KB][NV] = {};
  const E* row[KB];
#pragma GCC unroll 16
  for (int b = 0; b < KB; ++b) row[b] = static_cast<const E*>(k[b]);
  const int64_t last = d / STEP<E>;
  for (int64_t c = 0; c < last;) {
    fetcher.step();
    const int64_t end = c + FETCH_EVERY < last ? c + FETCH_EVERY : last;
    for (; c < end; ++c) {
      decltype(load(q)) x[NV];
      for (int i = 0; i < NV; ++i) x[i] = load(q + c * NV * W + i * W);
#pragma GCC unroll 16
      for (int b = 0; b < KB; ++b) {
        auto y = splat(row[b][c]);
#pragma GCC unroll 2
        for (int i = 0; i < NV; ++i) acc[b][i] = multiply_add(x[i], y, acc[b][i]);
      }
    }
  }
#pragma GCC unroll 16
  for (int b = 0; b < KB; ++b)
    for (int i = 0; i < NV; ++i) store(s + b * NV * W + i * W, STEP<E> == 1 ? acc[b][i] : acc[b][i] * factor);
}

// The last block may run past n: its surplus keys are valid addresses and its surplus scores are never read.
template <int NV, class E>
void scores(const E* q, int d, const void* const* k, int n, float* s, Fetcher& fetcher, float factor = 1) {
  constexpr int KB = NV == 2 ? LONG : LONG == 6 ? 8 : 12;
  for (int j = 0; j < n; j += KB) score_block<NV, KB>(q, d, k + j, s + int64_t(j) * NV * W, fetcher, factor);
}

// `w`: whatever has the rows' limit and position.
template <int NV, class Rows>
void cap_and_mask(const Attention& a, const Tile& tile, const Rows& w, int row, int n, float* s,
                  float factor = 1) {
  for (int j = 0; j < n; ++j)
    for (int i = 0; i < NV; ++i) {
      vf x = load(s + (j * NV + i) * W) * factor;
      if (a.softcap > 0) x = tanh_(x) * a.softcap;
      if (tile.limited) x = splat(int32_t(tile.begin + j)) < load(w.limit + row + i * W) ? x : splat(-INF);
      if (tile.windowed) x = load(w.position + row + i * W) - tile.positions[j] < a.window ? x : splat(-INF);
      store(s + (j * NV + i) * W, x);
    }
}

// Online softmax of a panel: S becomes P = e^(S − m); m and l move on; alpha = what the past is to be scaled by.
// Pairs of tokens take the places of the first half.
template <int NV, class E = float>
E* online_softmax(float* s, int n, float* m, float* l, float* alpha) {
  E* p = reinterpret_cast<E*>(s);
  vf old[NV], top[NV], base[NV], total[NV];
  for (int i = 0; i < NV; ++i) top[i] = old[i] = load(m + i * W);
  for (int j = 0; j < n; ++j)
    for (int i = 0; i < NV; ++i) top[i] = larger(top[i], load(s + (j * NV + i) * W));
  for (int i = 0; i < NV; ++i) {
    base[i] = top[i] == -INF ? (vf){} : top[i];  // nothing visible yet: e^(−inf − 0) = 0 and no NaN
    total[i] = (vf){};
  }
  for (int j = 0; j < n; j += STEP<E>)
    for (int i = 0; i < NV; ++i) {
      vf first = exp_(load(s + (j * NV + i) * W) - base[i]);
      if constexpr (STEP<E> == 1) {
        store(p + (j * NV + i) * W, first);
        total[i] += first;
      } else {
        vf second = j + 1 < n ? exp_(load(s + ((j + 1) * NV + i) * W) - base[i]) : (vf){};
        total[i] += first + second;
        store(p + (j / 2 * NV + i) * W, (vu)to_bf16(first) >> 16 | (vu)to_bf16(second));
      }
    }
  for (int i = 0; i < NV; ++i) {
    vf shrink = exp_(old[i] - base[i]);
    store(alpha + i * W, shrink);
    store(m + i * W, top[i]);
    store(l + i * W, load(l + i * W) * shrink + total[i]);
  }
  return p;
}

// o[R rows][NV · W channels] = alpha · o + P · V
template <int R, int NV, class E>
ANABRANCH_INLINE void weigh_block(const E* p, int p_stride, const E* v, int n, float* o, int o_stride,
                                  const float* alpha) {
  vf acc[R][NV] = {};
  for (int j = 0; j < steps<E>(n); ++j) {
    decltype(load(v)) x[NV];
    for (int i = 0; i < NV; ++i) x[i] = load(v + (int64_t(j) * NV + i) * W);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      auto y = splat(p[j * p_stride + r]);
#pragma GCC unroll 2
      for (int i = 0; i < NV; ++i) acc[r][i] = multiply_add(x[i], y, acc[r][i]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < NV; ++i) {
      float* to = o + int64_t(r) * o_stride + i * W;
      store(to, load(to) * alpha[r] + acc[r][i]);
    }
}

template <int R, class E>
void weigh_rows(const E* p, int p_stride, const E* v, int n, float* o, int dv, const float* alpha) {
  int c = 0;
  for (; c + PANEL <= dv; c += PANEL)
    weigh_block<R, 2>(p, p_stride, v + int64_t(c) * TILE_STEPS<E>, n, o + c, dv, alpha);
  if (c < dv) weigh_block<R, 1>(p, p_stride, v + int64_t(c) * TILE_STEPS<E>, n, o + c, dv, alpha);
}

template <int R = LONG, class E>
void weigh(int r, const E* p, int p_stride, const E* v, int n, float* o, int dv, const float* alpha) {
  if (r == R) return weigh_rows<R>(p, p_stride, v, n, o, dv, alpha);
  if constexpr (R > 1) weigh<R - 1>(r, p, p_stride, v, n, o, dv, alpha);
}

// A tile that hides tokens from some rows and whose V holds an infinity or a NaN: 0 · NaN must not reach those rows.
template <class E>
void weigh_visible(int rows, const E* p, int p_stride, const E* v, int n, float* o, int dv, const float* alpha) {
  for (int r = 0; r < rows; ++r)
    for (int c = 0; c < dv; ++c) {
      int panel = c / PANEL * PANEL, width = smaller(PANEL, dv - panel);
      float x = 0;
      for (int j = 0; j < n; ++j) {
        int at = j / STEP<E>;
        float weight = part(p[at * p_stride + r], j);
        if (weight != 0) x += weight * part(v[int64_t(panel) * TILE_STEPS<E> + at * width + c - panel], j);
      }
      o[int64_t(r) * dv + c] = o[int64_t(r) * dv + c] * alpha[r] + x;
    }
}

template <class E>
bool all_finite(const E* v, int n, int dv) {
  vf bad = {};
  for (int c = 0; c < dv; c += PANEL) {
    int width = smaller(PANEL, dv - c);
    const E* panel = v + int64_t(c) * TILE_STEPS<E>;
    for (int i = 0; i < steps<E>(n) * width; i += W) {
      if constexpr (STEP<E> == 1) bad += load(panel + i) * 0.0f;
      else bad += low(load(panel + i)) * 0.0f + high(load(panel + i)) * 0.0f;
    }
  }
  return sum(bad) == 0;
}

template <class T>
ANABRANCH_INLINE vf load_scaled(const T* p, float scale) {
  if constexpr (QUANTISED<T>) return load(p) * scale;
  else return load(p);
}
template <class T>
ANABRANCH_INLINE float to_float_scaled(T x, float scale) {
  if constexpr (QUANTISED<T>) return to_float(x) * scale;
  else return to_float(x);
}

// Row j of V into the panels, times its factor where it is quantised; channels past D are zeros.
template <class T>
ANABRANCH_INLINE void pack_value(const T* from, int d, int dv, int j, float* v, float scale = 1) {
  int c = 0;
  for (; c + PANEL <= d; c += PANEL) {
    float* to = v + int64_t(c) * TILE + j * PANEL;
    store(to, load_scaled(from + c, scale));
    store(to + W, load_scaled(from + c + W, scale));
  }
  if (c == dv) return;
  int width = smaller(PANEL, dv - c);
  float* to = v + int64_t(c) * TILE + j * width;
  for (int i = 0; i < width; ++i) to[i] = c + i < d ? to_float_scaled(from[c + i], scale) : 0;
}

// Rows 2·j and 2·j + 1; the second may be null: zeros.
ANABRANCH_INLINE void pack_value(const bf16* from, const bf16* second, int d, int dv, int j, pair* v) {
  int c = 0;
  if (second)
    for (; c + PANEL <= d; c += PANEL) {
      vu x[2];
      zip(from + c, second + c, x);
      pair* to = v + int64_t(c) * TILE_STEPS<pair> + j * PANEL;
      store(to, x[0]);
      store(to + W, x[1]);
    }
  for (; c < dv; ++c) {
    const int panel = c / PANEL * PANEL, width = smaller(PANEL, dv - panel);
    v[int64_t(panel) * TILE_STEPS<pair> + j * width + c - panel] =
        c < d ? pair_of(from[c], second ? second[c] : bf16{}) : pair{};
  }
}

template <class T>
ANABRANCH_INLINE void copy_row(const T* from, int d, float* to, float scale = 1) {
  int c = 0;
  for (; c + W <= d; c += W) store(to + c, load_scaled(from + c, scale));
  for (; c < d; ++c) to[c] = to_float_scaled(from[c], scale);
}

// Floats are scaled here, once; pairs stay as they are, and their scores are scaled.
template <class T, class E>
void pack_queries(const Attention& a, const Unit& u, const PackedScratch<E>& w) {
  const int steps = a.head_dim / STEP<E>;
  const float factor = query_factor(a);
  for (int row = 0; row < w.rows; ++row) {
    int panel = row / PANEL * PANEL, width = smaller(PANEL, w.rows - panel);
    E* to = w.q + int64_t(panel) * steps + row - panel;
    if (row >= u.packed) {
      for (int c = 0; c < steps; ++c) to[c * width] = E{};
      continue;
    }
    const T* from = query<T>(a, u, row);
    for (int c = 0; c < steps; ++c) {
      if constexpr (STEP<E> == 1) to[c * width] = to_float(from[c]) * factor;
      else to[c * width] = pair_of(from[2 * c], from[2 * c + 1]);
    }
  }
}

// Nothing seen yet.
template <class Rows>
void start_rows(const Attention& a, const Unit& u, const Rows& w) {
  for (int row = 0; row < w.rows; ++row) {
    w.m[row] = -INF;
    w.l[row] = 0;
    int r = row / a.group;
    bool real = row < u.packed;
    w.limit[row] = real ? (u.masked ? u.limits[r] : u.n) : 0;
    w.position[row] = real && a.windowed ? a.row_positions[u.rows[r]] : 0;
  }
  memset(w.o, 0, size_t(w.rows) * w.dv * 4);
}

// What the packed rows [first, end) do with a tile of tokens, whose rows and slots are in w; those of other rows' m and l
// that share a panel with them stay as they are. S: the type of K and V.
template <class E, class S>
void packed_tile(const Attention& a, int head, const Tile& tile, const PackedScratch<E>& w, int first, int end,
                 Fetcher& fetcher) {
  const int d = a.head_dim;
  const float factor = query_factor(a);
  const auto value = [&](int j) { return static_cast<const S*>(w.here[TILE + j]); };
  if constexpr (STEP<E> == 2) {
    for (int j = 0; j < tile.n; j += 2)
      pack_value(value(j), j + 1 < tile.n ? value(j + 1) : nullptr, a.v_dim, w.dv, j / 2, w.v);
  } else {
    for (int j = 0; j < tile.n; ++j) {
      const int32_t slot = w.slots[j];
      if constexpr (sizeof(S) < sizeof(float))
        copy_row(static_cast<const S*>(w.here[j]), d, w.k + int64_t(j) * d, scale_at<S>(a.k, a, head, slot));
      pack_value(value(j), a.v_dim, w.dv, j, w.v, scale_at<S>(a.v, a, head, slot));
    }
    if constexpr (sizeof(S) < sizeof(float))
      for (int j = 0; j < TILE; ++j) w.here[j] = w.k + int64_t(j) * d;
  }
  const bool exact = tile.cut() && !all_finite(w.v, tile.n, w.dv);
  for (int row = first / PANEL * PANEL; row < end; row += PANEL) {
    const int width = smaller(PANEL, w.rows - row), from = first > row ? first - row : 0, to = smaller(width, end - row);
    int n = tile.n;
    if (tile.limited) {  // tokens that no row of this panel sees
      int most = 0;
      for (int i = from; i < to; ++i) most = w.limit[row + i] > most ? w.limit[row + i] : most;
      n = smaller(n, most - tile.begin);
      if (n <= 0) continue;
    }
    const E* q = w.q + int64_t(row) * d / STEP<E>;
    const E* p;
    float *m = w.m + row, *l = w.l + row, *alpha = w.alpha + row, kept[2][PANEL];
    const bool others = from > 0 || to < width;
    if (others) {
      memcpy(kept[0], m, size_t(width) * sizeof(float));
      memcpy(kept[1], l, size_t(width) * sizeof(float));
    }
    if (width == PANEL) {
      scores<2>(q, d, w.here, n, w.s, fetcher, factor);
      if (a.softcap > 0 || tile.cut()) cap_and_mask<2>(a, tile, w, row, n, w.s);
      p = online_softmax<2, E>(w.s, n, m, l, alpha);
    } else {
      scores<1>(q, d, w.here, n, w.s, fetcher, factor);
      if (a.softcap > 0 || tile.cut()) cap_and_mask<1>(a, tile, w, row, n, w.s);
      p = online_softmax<1, E>(w.s, n, m, l, alpha);
    }
    if (others)
      for (int i = 0; i < width; ++i) {
        if (i >= from && i < to) continue;
        m[i] = kept[0][i];
        l[i] = kept[1][i];
      }
    float* o = w.o + int64_t(row) * w.dv;
    const int rows = to - from;
    if (exact) {
      weigh_visible(rows, p + from, width, w.v, n, o + int64_t(from) * w.dv, w.dv, alpha + from);
      continue;
    }
    const int parts = (rows + LONG - 1) / LONG;
    for (int b = 0; b < parts; ++b) {
      const int begin = from + rows * b / parts, stop = from + rows * (b + 1) / parts;
      weigh(stop - begin, p + begin, width, w.v, n, o + int64_t(begin) * w.dv, w.dv, alpha + begin);
    }
  }
}

template <class T, class E, class S = T>
void packed_unit(const Attention& a, const Unit& u, void* base) {
  const int d = a.head_dim;
  PackedScratch<E> w(base, u.packed, d, a.v_dim);
  const auto locate = [&](int begin, const void** rows) {  // returns the end of the pointers that are rows
    int n = smaller(TILE, u.n - begin);
    if (n <= 0) return 0;
    u.slots(begin, n, w.coming);
    for (int j = 0; j < n; ++j) {
      rows[j] = at<S>(a.k, a, u.head, w.coming[j]);
      rows[TILE + j] = at<S>(a.v, a, u.head, w.coming[j]);
    }
    for (int j = n; j < TILE; ++j) rows[j] = rows[0];  // surplus keys of the last block
    return TILE + n;
  };
  const int steps = fetch_steps<E>(d, (w.rows + PANEL - 1) / PANEL);
  locate(0, w.next);
  pack_queries<T, E>(a, u, w);
  start_rows(a, u, w);
  for (int begin = 0; begin < u.n; begin += TILE) {
    const void** spent = w.here;
    w.here = w.next;
    w.next = spent;
    std::swap(w.slots, w.coming);
    const int coming = locate(begin + TILE, w.next);
    Tile tile(a, u, begin, smaller(TILE, u.n - begin), w.positions);
    if (tile.hidden) continue;
    // (of V's rows as many bytes as of K's: behind a row is the next one)
    Fetcher fetcher(w.next, coming, d * int(sizeof(S)), steps);
    packed_tile<E, S>(a, u.head, tile, w, 0, u.packed, fetcher);
  }
  for (int row = 0; row < u.packed; ++row) emit<T>(a, u, row, w.m[row], w.l[row], w.o + int64_t(row) * w.dv);
}

}  // namespace
}  // namespace anabranch::cpu
