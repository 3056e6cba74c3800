// Attention of a unit with few packed rows (a lone chain, heads without sharing): bound by memory, so K and V are read
// straight from their pages, nothing is packed, and each phase prefetches what the next one reads.
#pragma once

#include "cpu/unit.hpp"

namespace anabranch::cpu {
namespace {

constexpr int STREAM_ROWS = 8;   // at most so many packed rows take this path
constexpr int STREAM_BLOCK = 4;  // of which so many share a load of K or V
constexpr int STREAM_TILE = 16;  // tokens: what is prefetched stays in the first-level cache

template <class T>
struct StreamScratch {
  int dv;  // D padded to W
  float *q, *s, *o;
  const T **k, **v;  // the tile's rows, and behind them the next tile's
  T *k_pad, *v_pad;  // zero-padded copies where W does not divide D

  StreamScratch(void* base, int d, size_t* bytes = nullptr) {
    Scratch take(base);
    dv = round_up(d, W);
    q = take.take<float>(size_t(STREAM_ROWS) * dv);
    s = take.take<float>(size_t(STREAM_ROWS) * STREAM_TILE);
    o = take.take<float>(size_t(STREAM_ROWS) * dv);
    k = take.take<const T*>(2 * STREAM_TILE);
    v = take.take<const T*>(2 * STREAM_TILE);
    k_pad = take.take<T>(dv == d ? 0 : size_t(STREAM_TILE) * dv);
    v_pad = take.take<T>(dv == d ? 0 : size_t(STREAM_TILE) * dv);
    if (bytes) *bytes = size_t(take.next - static_cast<char*>(base));
  }
};

// s[r][b] = q_r · k_b for KB tokens; fetches the same tokens' V.
template <class T, int R, int KB, bool FETCH>
ANABRANCH_INLINE void dots(const float* q, int dv, const T* const* k, const T* const* v, float* s) {
  vf acc[R][KB] = {};
  const T* row[KB];
  for (int b = 0; b < KB; ++b) {
    row[b] = k[b];
    if (FETCH) fetch(v[b], dv * int(sizeof(T)));
  }
  for (int c = 0; c < dv; c += W) {
    vf x[KB];
    for (int b = 0; b < KB; ++b) x[b] = load(row[b] + c);
    for (int r = 0; r < R; ++r) {
      vf y = load(q + r * dv + c);
      for (int b = 0; b < KB; ++b) acc[r][b] += x[b] * y;
    }
  }
  for (int r = 0; r < R; ++r)
    for (int b = 0; b < KB; ++b) s[r * STREAM_TILE + b] = sum(acc[r][b]);
}

// o[r][c : c + VB · W] = alpha_r · o + Σ p v over the tile; fetches the same bytes of the next tile's K.
template <class T, int R, int VB, bool FETCH>
ANABRANCH_INLINE void weigh_stream(const float* p, const T* const* v, int n, const T* const* next, float* o, int dv,
                                   int c, const float* alpha) {
  vf acc[R][VB] = {};
  for (int j = 0; j < n; ++j) {
    if (FETCH) fetch(next[j] + c, VB * W * int(sizeof(T)));
    vf x[VB];
    for (int i = 0; i < VB; ++i) x[i] = load(v[j] + c + i * W);
    for (int r = 0; r < R; ++r) {
      vf y = splat(p[r * STREAM_TILE + j]);
      for (int i = 0; i < VB; ++i) acc[r][i] += x[i] * y;
    }
  }
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < VB; ++i) {
      float* to = o + r * dv + c + i * W;
      store(to, load(to) * alpha[r] + acc[r][i]);
    }
}

template <class T, int R, int VB, bool FETCH>
ANABRANCH_INLINE void weigh_stream_all(const float* p, const T* const* v, int n, const T* const* next, float* o, int dv,
                                       int c, const float* alpha) {
  for (; c + VB * W <= dv; c += VB * W) weigh_stream<T, R, VB, FETCH>(p, v, n, next, o, dv, c, alpha);
  if constexpr (VB > 1) {
    if (c < dv) weigh_stream_all<T, R, VB / 2, FETCH>(p, v, n, next, o, dv, c, alpha);
  }
}

template <class T>
bool all_finite(const T* const* v, int n, int dv) {
  vf bad = {};
  for (int j = 0; j < n; ++j)
    for (int c = 0; c < dv; c += W) bad += load(v[j] + c) * 0.0f;
  return sum(bad) == 0;
}

// Softcap, visibility and the online softmax of one row's scores; returns alpha.
inline float soften_row(const Attention& a, const Unit& u, const Tile& tile, int packed, float* s, float* m, float* l) {
  const int end = round_up(tile.n, W), r = packed / a.group;
  for (int j = tile.n; j < end; ++j) s[j] = -INF;
  if (a.softcap > 0)
    for (int j = 0; j < end; j += W) store(s + j, tanh_(load(s + j)) * a.softcap);
  for (int j = tile.n; j < end; ++j) s[j] = -INF;  // the cap made −softcap of them
  if (tile.limited)
    for (int j = 0; j < tile.n; ++j)
      if (tile.begin + j >= u.limits[r]) s[j] = -INF;
  if (tile.windowed) {
    int position = a.row_positions[u.rows[r]];
    for (int j = 0; j < tile.n; ++j)
      if (position - u.positions[tile.begin + j] >= a.window) s[j] = -INF;
  }
  vf tops = splat(*m);
  for (int j = 0; j < end; j += W) tops = larger(tops, load(s + j));
  float top = *m;
  for (int i = 0; i < W; ++i) top = larger(top, tops[i]);
  const float base = top == -INF ? 0 : top;
  vf total = {};
  for (int j = 0; j < end; j += W) {
    vf p = exp_(load(s + j) - base);
    store(s + j, p);
    total += p;
  }
  float alpha = expf(*m - base);
  *l = *l * alpha + sum(total);
  *m = top;
  return alpha;
}

// What R rows do with a tile's K: scores. Keys past n, up to a block, are valid addresses whose scores are not read.
template <class T, int R, bool FETCH>
void dots_all(const float* q, int dv, const T* const* k, const T* const* v, int n, float* s) {
  constexpr int KB = R == 1 ? 8 : R == 2 ? 4 : 2;
  for (int j = 0; j < n; j += KB) dots<T, R, KB, FETCH>(q, dv, k + j, v + j, s + j);
}

// … and with its V.
template <class T, int R, bool FETCH>
void weigh_all(const float* p, const T* const* v, int n, const T* const* next, float* o, int dv, const float* alpha) {
  constexpr int VB = R == 1 ? 8 : R == 2 ? 4 : 2;
  weigh_stream_all<T, R, VB, FETCH>(p, v, n, next, o, dv, 0, alpha);
}

// The first block of rows does the prefetching for all.
template <class T>
struct StreamSteps {
  decltype(&dots_all<T, 1, true>) dots;
  decltype(&weigh_all<T, 1, true>) weigh;
};
template <class T>
ANABRANCH_INLINE StreamSteps<T> steps_for(int rows, bool first) {
  static constexpr StreamSteps<T> table[2][STREAM_BLOCK] = {
      {{dots_all<T, 1, false>, weigh_all<T, 1, false>},
       {dots_all<T, 2, false>, weigh_all<T, 2, false>},
       {dots_all<T, 3, false>, weigh_all<T, 3, false>},
       {dots_all<T, 4, false>, weigh_all<T, 4, false>}},
      {{dots_all<T, 1, true>, weigh_all<T, 1, true>},
       {dots_all<T, 2, true>, weigh_all<T, 2, true>},
       {dots_all<T, 3, true>, weigh_all<T, 3, true>},
       {dots_all<T, 4, true>, weigh_all<T, 4, true>}}};
  return table[first][rows - 1];
}

template <class T>
void stream_unit(const Attention& a, const Unit& u, void* scratch) {
  const int d = a.head_dim, rows = u.packed;
  StreamScratch<T> w(scratch, d);
  const float factor = query_factor(a);
  float m[STREAM_ROWS], l[STREAM_ROWS], alpha[STREAM_ROWS];
  for (int r = 0; r < rows; ++r) {
    const T* from = query<T>(a, u, r);
    for (int c = 0; c < w.dv; ++c) {
      w.q[r * w.dv + c] = c < d ? to_float(from[c]) * factor : 0;
      w.o[r * w.dv + c] = 0;
    }
    m[r] = -INF;
    l[r] = 0;
  }
  // One block of up to four rows, or two of nearly equal size.
  const int cut = rows <= STREAM_BLOCK ? rows : (rows + 1) / 2;
  const StreamSteps<T> head = steps_for<T>(cut, true), tail = steps_for<T>(rows > cut ? rows - cut : 1, false);
  auto locate = [&](int begin, int half) {
    int n = smaller(STREAM_TILE, u.n - begin);
    for (int j = 0; j < n; ++j) {
      w.k[half + j] = at<T>(a.k, a, u.head, u.slots[begin + j]);
      w.v[half + j] = at<T>(a.v, a, u.head, u.slots[begin + j]);
    }
    for (int j = n > 0 ? n : 0; j < STREAM_TILE; ++j) {  // no tokens; valid addresses for prefetch and blocks
      w.k[half + j] = n > 0 ? w.k[half] : w.k[STREAM_TILE - half];
      w.v[half + j] = n > 0 ? w.v[half] : w.v[STREAM_TILE - half];
    }
  };
  if (u.n > 0) locate(0, 0);
  int half = 0;
  for (int begin = 0; begin < u.n; begin += STREAM_TILE, half = STREAM_TILE - half) {
    Tile tile(a, u, begin, smaller(STREAM_TILE, u.n - begin));
    locate(begin + STREAM_TILE, STREAM_TILE - half);
    if (tile.hidden) continue;
    const T **k = w.k + half, **v = w.v + half;
    if (w.dv != d) {
      for (int j = 0; j < STREAM_TILE; ++j) {
        T *to_k = w.k_pad + j * w.dv, *to_v = w.v_pad + j * w.dv;
        memcpy(to_k, k[j], size_t(d) * sizeof(T));
        memcpy(to_v, v[j], size_t(d) * sizeof(T));
        memset(static_cast<void*>(to_k + d), 0, size_t(w.dv - d) * sizeof(T));
        memset(static_cast<void*>(to_v + d), 0, size_t(w.dv - d) * sizeof(T));
        k[j] = to_k;
        v[j] = to_v;
      }
    }
    head.dots(w.q, w.dv, k, v, tile.n, w.s);
    if (rows > cut) tail.dots(w.q + cut * w.dv, w.dv, k, v, tile.n, w.s + cut * STREAM_TILE);
    for (int r = 0; r < rows; ++r) alpha[r] = soften_row(a, u, tile, r, w.s + r * STREAM_TILE, m + r, l + r);
    if (tile.cut() && !all_finite(v, tile.n, w.dv)) {  // 0 · NaN must not reach the rows that do not see it
      for (int r = 0; r < rows; ++r)
        for (int c = 0; c < d; ++c) {
          float x = 0, *s = w.s + r * STREAM_TILE;
          for (int j = 0; j < tile.n; ++j)
            if (s[j] != 0) x += s[j] * to_float(v[j][c]);
          w.o[r * w.dv + c] = w.o[r * w.dv + c] * alpha[r] + x;
        }
      continue;
    }
    head.weigh(w.s, v, tile.n, w.k + STREAM_TILE - half, w.o, w.dv, alpha);
    if (rows > cut)
      tail.weigh(w.s + cut * STREAM_TILE, v, tile.n, nullptr, w.o + cut * w.dv, w.dv, alpha + cut);
  }
  for (int r = 0; r < rows; ++r) emit<T>(a, u, r, m[r], l[r], w.o + r * w.dv);
}

}  // namespace
}  // namespace anabranch::cpu
