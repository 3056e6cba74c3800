// Attention of a unit with many packed rows: two register-blocked products a tile of tokens.
//
// Q is packed once as panels [D][2·W rows], scaled, float32. Scores come out as S[token][row]: the vector lanes are
// query rows, so that maxima, exponentials and sums of the softmax are vertical and need no reduction across lanes.
// For P·V the lanes are channels of V, packed as panels [token][2·W channels] that stay in the first-level cache.
// 16-bit K and V are converted to float32 once a tile, for all rows; float32 K is read where it lies.
#pragma once

#include "cpu/unit.hpp"

namespace anabranch::cpu {
namespace {

constexpr int TILE = 96;     // tokens; a multiple of every key block below
constexpr int PANEL = 2 * W;  // rows of a Q panel, channels of a V panel

struct PackedScratch {
  int rows, dv;  // padded to W
  float *q, *k, *v, *s, *o, *m, *l, *alpha;
  int32_t *limit, *position;
  const void **here, **next;  // the K rows of a tile, then its V rows

  PackedScratch(void* base, int packed, int d, size_t* bytes = nullptr) {
    Scratch take(base);
    rows = round_up(packed, W);
    dv = round_up(d, W);
    q = take.take<float>(size_t(rows) * d);
    k = take.take<float>(size_t(TILE) * d);
    v = take.take<float>(size_t(TILE) * dv);
    s = take.take<float>(size_t(TILE) * PANEL);
    o = take.take<float>(size_t(rows) * dv);
    m = take.take<float>(rows);
    l = take.take<float>(rows);
    alpha = take.take<float>(rows);
    limit = take.take<int32_t>(rows);
    position = take.take<int32_t>(rows);
    here = take.take<const void*>(2 * TILE);
    next = take.take<const void*>(2 * TILE);
    if (bytes) *bytes = size_t(take.next - static_cast<char*>(base));
  }
};

// Brings the next tile's rows into the second-level cache while this one is worked on, a few at each block of scores:
// rows of a page pool lie far apart, where the hardware's own prefetcher does not follow.
struct Fetcher {
  const void* const* row;
  const void* const* end;
  int bytes, each;  // of a row; rows a block
  ANABRANCH_INLINE void step() {
    for (int i = 0; i < each && row < end; ++i, ++row)
      for (int b = 0; b < bytes; b += LINE) __builtin_prefetch(static_cast<const char*>(*row) + b, 0, 2);
  }
};

// s[KB tokens][NV · W rows] = K · Qᵀ
template <int NV, int KB>
ANABRANCH_INLINE void score_block(const float* q, int d, const void* const* k, float* s) {
  vf acc[KB][NV] = {};
  const float* row[KB];
#pragma GCC unroll 16
  for (int b = 0; b < KB; ++b) row[b] = static_cast<const float*>(k[b]);
  for (int64_t c = 0; c < d; ++c) {
    vf x[NV];
    for (int i = 0; i < NV; ++i) x[i] = load(q + c * NV * W + i * W);
#pragma GCC unroll 16
    for (int b = 0; b < KB; ++b) {
      vf y = splat(row[b][c]);
#pragma GCC unroll 2
      for (int i = 0; i < NV; ++i) acc[b][i] += x[i] * y;
    }
  }
#pragma GCC unroll 16
  for (int b = 0; b < KB; ++b)
    for (int i = 0; i < NV; ++i) store(s + b * NV * W + i * W, acc[b][i]);
}

// The last block may run past n: its surplus keys are valid addresses and its surplus scores are never read.
template <int NV>
void scores(const float* q, int d, const void* const* k, int n, float* s, Fetcher& fetcher) {
  constexpr int KB = NV == 2 ? LONG : LONG == 6 ? 8 : 12;
  for (int j = 0; j < n; j += KB) {
    fetcher.step();
    score_block<NV, KB>(q, d, k + j, s + int64_t(j) * NV * W);
  }
}

template <int NV>
void cap_and_mask(const Attention& a, const Unit& u, const Tile& tile, const PackedScratch& w, int row, int n,
                  float* s) {
  const int32_t* positions = u.positions + tile.begin;
  for (int j = 0; j < n; ++j)
    for (int i = 0; i < NV; ++i) {
      vf x = load(s + (j * NV + i) * W);
      if (a.softcap > 0) x = tanh_(x) * a.softcap;
      if (tile.limited) x = splat(int32_t(tile.begin + j)) < load(w.limit + row + i * W) ? x : splat(-INF);
      if (tile.windowed) x = load(w.position + row + i * W) - positions[j] < a.window ? x : splat(-INF);
      store(s + (j * NV + i) * W, x);
    }
}

// Online softmax of a panel: S becomes P = e^(S − m); m and l move on; alpha = what the past is to be scaled by.
template <int NV>
void soften(float* s, int n, float* m, float* l, float* alpha) {
  vf old[NV], top[NV], base[NV], total[NV];
  for (int i = 0; i < NV; ++i) top[i] = old[i] = load(m + i * W);
  for (int j = 0; j < n; ++j)
    for (int i = 0; i < NV; ++i) top[i] = larger(top[i], load(s + (j * NV + i) * W));
  for (int i = 0; i < NV; ++i) {
    base[i] = top[i] == -INF ? (vf){} : top[i];  // nothing visible yet: e^(−inf − 0) = 0 and no NaN
    total[i] = (vf){};
  }
  for (int j = 0; j < n; ++j)
    for (int i = 0; i < NV; ++i) {
      vf p = exp_(load(s + (j * NV + i) * W) - base[i]);
      store(s + (j * NV + i) * W, p);
      total[i] += p;
    }
  for (int i = 0; i < NV; ++i) {
    vf shrink = exp_(old[i] - base[i]);
    store(alpha + i * W, shrink);
    store(m + i * W, top[i]);
    store(l + i * W, load(l + i * W) * shrink + total[i]);
  }
}

// o[R rows][NV · W channels] = alpha · o + P · V
template <int R, int NV>
ANABRANCH_INLINE void weigh_block(const float* p, int p_stride, const float* v, int n, float* o, int o_stride,
                                  const float* alpha) {
  vf acc[R][NV] = {};
  for (int j = 0; j < n; ++j) {
    vf x[NV];
    for (int i = 0; i < NV; ++i) x[i] = load(v + (int64_t(j) * NV + i) * W);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      vf y = splat(p[j * p_stride + r]);
#pragma GCC unroll 2
      for (int i = 0; i < NV; ++i) acc[r][i] += x[i] * y;
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < NV; ++i) {
      float* to = o + int64_t(r) * o_stride + i * W;
      store(to, load(to) * alpha[r] + acc[r][i]);
    }
}

template <int R>
void weigh_rows(const float* p, int p_stride, const float* v, int n, float* o, int dv, const float* alpha) {
  int c = 0;
  for (; c + PANEL <= dv; c += PANEL) weigh_block<R, 2>(p, p_stride, v + int64_t(c) * TILE, n, o + c, dv, alpha);
  if (c < dv) weigh_block<R, 1>(p, p_stride, v + int64_t(c) * TILE, n, o + c, dv, alpha);
}

template <int R = LONG>
void weigh(int r, const float* p, int p_stride, const float* v, int n, float* o, int dv, const float* alpha) {
  if (r == R) return weigh_rows<R>(p, p_stride, v, n, o, dv, alpha);
  if constexpr (R > 1) weigh<R - 1>(r, p, p_stride, v, n, o, dv, alpha);
}

// A tile that hides tokens from some rows and whose V holds an infinity or a NaN: 0 · NaN must not reach those rows.
inline void weigh_visible(int rows, const float* p, int p_stride, const float* v, int n, float* o, int dv,
                          const float* alpha) {
  for (int r = 0; r < rows; ++r)
    for (int c = 0; c < dv; ++c) {
      int panel = c / PANEL * PANEL, width = smaller(PANEL, dv - panel);
      float x = 0;
      for (int j = 0; j < n; ++j)
        if (p[j * p_stride + r] != 0) x += p[j * p_stride + r] * v[int64_t(panel) * TILE + j * width + c - panel];
      o[int64_t(r) * dv + c] = o[int64_t(r) * dv + c] * alpha[r] + x;
    }
}

inline bool all_finite(const float* v, int n, int dv) {
  vf bad = {};
  for (int c = 0; c < dv; c += PANEL) {
    int width = smaller(PANEL, dv - c);
    const float* panel = v + int64_t(c) * TILE;
    for (int i = 0; i < n * width; i += W) bad += load(panel + i) * 0.0f;
  }
  return sum(bad) == 0;
}

// Row j of V into the panels; channels past D are zeros.
template <class T>
ANABRANCH_INLINE void pack_value(const T* from, int d, int dv, int j, float* v) {
  int c = 0;
  for (; c + PANEL <= d; c += PANEL) {
    float* to = v + int64_t(c) * TILE + j * PANEL;
    store(to, load(from + c));
    store(to + W, load(from + c + W));
  }
  if (c == dv) return;
  int width = smaller(PANEL, dv - c);
  float* to = v + int64_t(c) * TILE + j * width;
  for (int i = 0; i < width; ++i) to[i] = c + i < d ? to_float(from[c + i]) : 0;
}

template <class T>
ANABRANCH_INLINE void copy_row(const T* from, int d, float* to) {
  int c = 0;
  for (; c + W <= d; c += W) store(to + c, load(from + c));
  for (; c < d; ++c) to[c] = to_float(from[c]);
}

template <class T>
void pack_queries(const Attention& a, const Unit& u, const PackedScratch& w) {
  const int d = a.head_dim;
  const float factor = query_factor(a);
  for (int row = 0; row < w.rows; ++row) {
    int panel = row / PANEL * PANEL, width = smaller(PANEL, w.rows - panel);
    float* to = w.q + int64_t(panel) * d + row - panel;
    if (row >= u.packed) {
      for (int c = 0; c < d; ++c) to[c * width] = 0;
      continue;
    }
    const T* from = query<T>(a, u, row);
    for (int c = 0; c < d; ++c) to[c * width] = to_float(from[c]) * factor;
  }
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

template <class T>
void packed_unit(const Attention& a, const Unit& u, void* base) {
  const int d = a.head_dim;
  PackedScratch w(base, u.packed, d);
  const auto locate = [&](int begin, const void** rows) {  // returns the end of the pointers that are rows
    int n = smaller(TILE, u.n - begin);
    if (n <= 0) return 0;
    for (int j = 0; j < n; ++j) {
      rows[j] = at<T>(a.k, a, u.head, u.slots[begin + j]);
      rows[TILE + j] = at<T>(a.v, a, u.head, u.slots[begin + j]);
    }
    for (int j = n; j < TILE; ++j) rows[j] = rows[0];  // surplus keys of the last block
    return TILE + n;
  };
  const int blocks = w.rows >= PANEL ? w.rows / PANEL * (TILE / LONG) : TILE / 12;  // of scores in a tile
  locate(0, w.next);
  pack_queries<T>(a, u, w);
  for (int begin = 0; begin < u.n; begin += TILE) {
    const void** spent = w.here;
    w.here = w.next;
    w.next = spent;
    const int coming = locate(begin + TILE, w.next);
    Tile tile(a, u, begin, smaller(TILE, u.n - begin));
    if (tile.hidden) continue;
    Fetcher fetcher{w.next, w.next + coming, d * int(sizeof(T)), (coming + blocks - 1) / blocks};
    for (int j = 0; j < tile.n; ++j) {
      if constexpr (sizeof(T) == 2) copy_row(static_cast<const T*>(w.here[j]), d, w.k + int64_t(j) * d);
      pack_value(static_cast<const T*>(w.here[TILE + j]), d, w.dv, j, w.v);
    }
    if constexpr (sizeof(T) == 2)  // float32 rows are read where they lie
      for (int j = 0; j < TILE; ++j) w.here[j] = w.k + int64_t(j) * d;
    bool exact = tile.cut() && !all_finite(w.v, tile.n, w.dv);
    for (int row = 0; row < w.rows; row += PANEL) {
      int width = smaller(PANEL, w.rows - row), rows = smaller(width, u.packed - row), n = tile.n;
      if (tile.limited) {  // tokens that no row of this panel sees
        int most = 0;
        for (int i = 0; i < rows; ++i) most = w.limit[row + i] > most ? w.limit[row + i] : most;
        n = smaller(n, most - begin);
        if (n <= 0) continue;
      }
      const float* q = w.q + int64_t(row) * d;
      if (width == PANEL) {
        scores<2>(q, d, w.here, n, w.s, fetcher);
        if (a.softcap > 0 || tile.cut()) cap_and_mask<2>(a, u, tile, w, row, n, w.s);
        soften<2>(w.s, n, w.m + row, w.l + row, w.alpha + row);
      } else {
        scores<1>(q, d, w.here, n, w.s, fetcher);
        if (a.softcap > 0 || tile.cut()) cap_and_mask<1>(a, u, tile, w, row, n, w.s);
        soften<1>(w.s, n, w.m + row, w.l + row, w.alpha + row);
      }
      float* o = w.o + int64_t(row) * w.dv;
      if (exact) {
        weigh_visible(rows, w.s, width, w.v, n, o, w.dv, w.alpha + row);
        continue;
      }
      int parts = (rows + LONG - 1) / LONG;
      for (int b = 0; b < parts; ++b) {
        int from = rows * b / parts, to = rows * (b + 1) / parts;
        weigh(to - from, w.s + from, width, w.v, n, o + int64_t(from) * w.dv, w.dv, w.alpha + row + from);
      }
    }
  }
  for (int row = 0; row < u.packed; ++row) emit<T>(a, u, row, w.m[row], w.l[row], w.o + int64_t(row) * w.dv);
}

}  // namespace
}  // namespace anabranch::cpu
