// Attention of an item with few packed rows (a lone chain, branches without sharing): bound by memory, so K and V are read
// straight from their pages and nothing is packed. A page holds one head's tokens behind another's, and the heads of an
// item are done side by side, tile by tile: so K and V are each read in one long run, which is what hardware prefetchers
// follow. (Head after head, every 8 KB lie 64 KB apart; read like that, a Zen 4 core gets 12 GB/s of its 32.)
#pragma once

#include "cpu/unit.hpp"

namespace anabranch::cpu {
namespace {

constexpr int STREAM_BLOCK = 4;  // rows that share a load of K or V
constexpr int STREAM_TILE = 16;  // tokens: those of a head stay in the first-level cache

template <class E>
struct StreamScratch {
  int dk, dv;  // the head_dims of K and of V padded to vectors of E
  E* q;        // [heads, STREAM_ROWS, dk / STEP]
  float *o, *m, *l, *s;
  const void **k, **v;  // the tile's rows for the first head, and behind them the next tile's
  void *k_pad, *v_pad;  // zero-padded copies where vectors do not divide D
  void* zeros;

  StreamScratch(void* base, int d, int v_dim, int heads, size_t* bytes = nullptr) {
    Scratch take(base);
    dk = round_up(d, W * STEP<E>);
    dv = round_up(v_dim, W * STEP<E>);
    q = take.take<E>(size_t(heads) * STREAM_ROWS * dk);
    o = take.take<float>(size_t(heads) * STREAM_ROWS * dv);
    m = take.take<float>(size_t(heads) * STREAM_ROWS);
    l = take.take<float>(size_t(heads) * STREAM_ROWS);
    s = take.take<float>(size_t(STREAM_ROWS) * STREAM_TILE);
    k = take.take<const void*>(2 * STREAM_TILE);
    v = take.take<const void*>(2 * STREAM_TILE);
    k_pad = take.take<float>(dk == d ? 0 : size_t(STREAM_TILE) * dk);
    v_pad = take.take<float>(dv == v_dim ? 0 : size_t(STREAM_TILE) * dv);
    zeros = take.take<float>(dv);
    if (bytes) *bytes = size_t(take.next - static_cast<char*>(base));
  }
};

// From channel c on: VB vectors of V's row (of two rows if by pairs).
template <int VB, class T>
ANABRANCH_INLINE void values(const T* const* v, int c, vf* x) {
  for (int i = 0; i < VB; ++i) x[i] = load(v[0] + c + i * W);
}
template <int VB>
ANABRANCH_INLINE void values(const bf16* const* v, int c, vu* x) {
  for (int i = 0; i < VB; i += 2) zip(v[0] + c + i * W, v[1] + c + i * W, x + i);
}

// s[r][b] = q_r · k_b for KB tokens, times `factor` if of pairs; fetches the rows `next`.
template <class T, class E, int R, int KB, bool FETCH>
ANABRANCH_INLINE void dots(const E* q, int dk, const T* const* k, const T* const* next, float* s, float factor) {
  vf acc[W] = {};
  const T* row[KB];
#pragma GCC unroll 16
  for (int b = 0; b < KB; ++b) row[b] = k[b];
  for (int c = 0; c < dk; c += W * STEP<E>) {
    decltype(load(q)) x[R];
    for (int r = 0; r < R; ++r) x[r] = load(q + (r * dk + c) / STEP<E>);
#pragma GCC unroll 16
    for (int b = 0; b < KB; ++b) {
      if (FETCH && c * sizeof(T) % LINE == 0) fetch(next[b] + c, 1);  // one by one: a burst would fill the miss buffers
      auto y = load_as<E>(row[b] + c);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) acc[r * KB + b] = multiply_add(x[r], y, acc[r * KB + b]);
    }
  }
  vf all = sums(acc);
  if (STEP<E> == 2) all *= factor;
  for (int r = 0; r < R; ++r)
    __builtin_memcpy(s + r * STREAM_TILE, reinterpret_cast<const float*>(&all) + r * KB, KB * sizeof(float));
}

// o[r][c : c + VB · W] = alpha_r · o + Σ p v over the tile; fetches the same bytes of the rows `next`.
template <class T, class E, int R, int VB, bool FETCH>
ANABRANCH_INLINE void weigh_stream(const E* p, const T* const* v, int n, const T* const* next, float* o, int dv, int c,
                                   const float* alpha) {
  vf acc[R][VB] = {};
  for (int j = 0; j < n; j += STEP<E>) {
    if (FETCH)
      for (int t = 0; t < STEP<E>; ++t) fetch(next[j + t] + c, VB * W * int(sizeof(T)));
    decltype(splat(*p)) x[VB];
    values<VB>(v + j, c, x);
    for (int r = 0; r < R; ++r) {
      auto y = splat(p[r * STREAM_TILE + j / STEP<E>]);
      for (int i = 0; i < VB; ++i) acc[r][i] = multiply_add(x[i], y, acc[r][i]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < VB; ++i) {
      float* to = o + r * dv + c + i * W;
      store(to, load(to) * alpha[r] + acc[r][i]);
    }
}

template <class T, class E, int R, int VB, bool FETCH>
ANABRANCH_INLINE void weigh_stream_all(const E* p, const T* const* v, int n, const T* const* next, float* o, int dv,
                                       int c, const float* alpha) {
  for (; c + VB * W <= dv; c += VB * W) weigh_stream<T, E, R, VB, FETCH>(p, v, n, next, o, dv, c, alpha);
  if constexpr (VB > STEP<E>) {
    if (c < dv) weigh_stream_all<T, E, R, VB / 2, FETCH>(p, v, n, next, o, dv, c, alpha);
  }
}

template <class T>
bool all_finite(const T* const* v, int n, int dv) {
  vf bad = {};
  for (int j = 0; j < n; ++j)
    for (int c = 0; c < dv; c += W) bad += load(v[j] + c) * 0.0f;
  return sum(bad) == 0;
}

ANABRANCH_INLINE void put_weights(float* p, vf x) { store(p, x); }
ANABRANCH_INLINE void put_weights(pair* p, vf x) {
  vh rounded = __builtin_convertvector((vu)to_bf16(x) >> 16, vh);
  __builtin_memcpy(p, &rounded, sizeof rounded);
}

// Softcap, visibility and the online softmax of one row's scores, which become weights in place; returns alpha.
template <class E>
float online_softmax_row(const Attention& a, const Unit& u, const Tile& tile, int packed, float* s, float* m, float* l) {
  const int end = round_up(tile.n, W), r = packed / a.group;
  E* p = reinterpret_cast<E*>(s);
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
      if (position - tile.positions[j] >= a.window) s[j] = -INF;
  }
  vf tops = splat(*m);
  for (int j = 0; j < end; j += W) tops = larger(tops, load(s + j));
  const float top = largest(tops), base = top == -INF ? 0 : top;
  vf total = {};
  for (int j = 0; j < end; j += W) {
    vf x = exp_(load(s + j) - base);
    put_weights(p + j / STEP<E>, x);
    total += x;
  }
  const float alpha = *m == top ? 1 : expf(*m - base);
  *l = *l * alpha + sum(total);
  *m = top;
  return alpha;
}

// What R rows do with a tile's K: scores. Keys past n, up to a block, are valid addresses whose scores are not read.
template <class T, class E, int R, bool FETCH>
void dots_all(const E* q, int dk, const T* const* k, const T* const* next, int n, float* s, float factor) {
  constexpr int KB = R == 1 ? W : R == 2 ? W / 2 : W / 4;
  for (int j = 0; j < n; j += KB) dots<T, E, R, KB, FETCH>(q, dk, k + j, next + j, s + j, factor);
}

// … and with its V.
template <class T, class E, int R, bool FETCH>
void weigh_all(const E* p, const T* const* v, int n, const T* const* next, float* o, int dv, const float* alpha) {
  constexpr int VB = R == 1 ? 8 : (R == 2 ? 4 : 2) * (LONG == 12 ? 2 : 1);
  weigh_stream_all<T, E, R, VB, FETCH>(p, v, n, next, o, dv, 0, alpha);
}

// The first block of rows does the prefetching for all.
template <class T, class E>
struct StreamSteps {
  decltype(&dots_all<T, E, 1, true>) dots;
  decltype(&weigh_all<T, E, 1, true>) weigh;
};
template <class T, class E>
ANABRANCH_INLINE StreamSteps<T, E> steps_for(int rows, bool first) {
  static constexpr StreamSteps<T, E> table[2][STREAM_BLOCK] = {
      {{dots_all<T, E, 1, false>, weigh_all<T, E, 1, false>},
       {dots_all<T, E, 2, false>, weigh_all<T, E, 2, false>},
       {dots_all<T, E, 3, false>, weigh_all<T, E, 3, false>},
       {dots_all<T, E, 4, false>, weigh_all<T, E, 4, false>}},
      {{dots_all<T, E, 1, true>, weigh_all<T, E, 1, true>},
       {dots_all<T, E, 2, true>, weigh_all<T, E, 2, true>},
       {dots_all<T, E, 3, true>, weigh_all<T, E, 3, true>},
       {dots_all<T, E, 4, true>, weigh_all<T, E, 4, true>}}};
  return table[first][rows - 1];
}

template <class T, class E>
void stream_queries(const Attention& a, const Unit& u, int dk, E* q) {
  const int d = a.head_dim;
  const float factor = query_factor(a);
  for (int r = 0; r < u.packed; ++r) {
    const T* from = query<T>(a, u, r);
    for (int c = 0; c < dk; c += STEP<E>, ++q) {
      if constexpr (STEP<E> == 1) *q = c < d ? to_float(from[c]) * factor : 0;
      else *q = pair_of(from[c], from[c + 1]);  // not scaled: the scores are
    }
  }
}

// A tile's scores of one row times its tokens' factors; …
ANABRANCH_INLINE void scale_scores(const float* factors, float* s) {
  for (int j = 0; j < STREAM_TILE; j += W) store(s + j, load(s + j) * load(factors + j));
}

// … its weights likewise. A weight of 0 stays 0: a token that is not seen may have NaN for its factor.
ANABRANCH_INLINE void scale_weights(const float* factors, float* p) {
  for (int j = 0; j < STREAM_TILE; j += W) {
    const vf x = load(p + j);
    store(p + j, x == 0 ? x : x * load(factors + j));
  }
}

// Rows of `d` numbers become copies of `padded`, zeros behind.
template <class S>
void pad_rows(const S** rows, int n, int d, int padded, S* copies) {
  for (int j = 0; j < n; ++j, copies += padded) {
    memcpy(static_cast<void*>(copies), rows[j], size_t(d) * sizeof(S));
    memset(static_cast<void*>(copies + d), 0, size_t(padded - d) * sizeof(S));
    rows[j] = copies;
  }
}

// The steps of at most STREAM_ROWS rows: one block of up to four, or two of nearly equal size.
template <class S, class E>
struct StreamBlocks {
  int rows, cut;
  StreamSteps<S, E> head, tail;
  explicit StreamBlocks(int rows)
      : rows(rows), cut(rows <= STREAM_BLOCK ? rows : (rows + 1) / 2), head(steps_for<S, E>(cut, true)),
        tail(steps_for<S, E>(rows > cut ? rows - cut : 1, false)) {}
};

// The rows of a tile's tokens for one head, and those that are read next.
template <class S>
struct StreamRows {
  const S *k[STREAM_TILE], *v[STREAM_TILE], *next_k[STREAM_TILE], *next_v[STREAM_TILE];
};

// What one head of a unit does with a tile. q, o, m, l: its rows'.
template <class E, class S>
ANABRANCH_INLINE void stream_tile(const Attention& a, const Unit& u, const Tile& tile, const StreamBlocks<S, E>& blocks,
                                  StreamRows<S>& at, const int32_t* slots, const StreamScratch<E>& w, const E* q,
                                  float* o, float* m, float* l) {
  const int d = a.head_dim, v_dim = a.v_dim, dk = w.dk, dv = w.dv, rows = blocks.rows, cut = blocks.cut;
  const float factor = query_factor(a);
  const S **k = at.k, **v = at.v;
  if (dk != d) {
    pad_rows(k, tile.n, d, dk, static_cast<S*>(w.k_pad));
    for (int j = tile.n; j < STREAM_TILE; ++j) k[j] = k[0];
  }
  if (dv != v_dim) pad_rows(v, tile.n, v_dim, dv, static_cast<S*>(w.v_pad));
  float k_scale[STREAM_TILE] = {}, v_scale[STREAM_TILE] = {};
  if constexpr (QUANTISED<S>)
    for (int j = 0; j < tile.n; ++j) {
      k_scale[j] = scale_at<S>(a.k, a, u.head, slots[j]);
      v_scale[j] = scale_at<S>(a.v, a, u.head, slots[j]);
    }
  float alpha[STREAM_ROWS];
  blocks.head.dots(q, dk, k, at.next_k, tile.n, w.s, factor);
  if (rows > cut) blocks.tail.dots(q + cut * dk / STEP<E>, dk, k, at.next_k, tile.n, w.s + cut * STREAM_TILE, factor);
  for (int r = 0; r < rows; ++r) {
    float* s = w.s + r * STREAM_TILE;
    if constexpr (QUANTISED<S>) scale_scores(k_scale, s);
    alpha[r] = online_softmax_row<E>(a, u, tile, r, s, m + r, l + r);
    if constexpr (QUANTISED<S>) scale_weights(v_scale, s);
  }
  const E* p = reinterpret_cast<const E*>(w.s);
  if (tile.cut() && !all_finite(v, tile.n, dv)) {  // 0 · NaN must not reach the rows that do not see it
    for (int r = 0; r < rows; ++r)
      for (int c = 0; c < v_dim; ++c) {
        float x = 0;
        for (int j = 0; j < tile.n; ++j) {
          const float weight = part(p[r * STREAM_TILE + j / STEP<E>], j);
          if (weight != 0) x += weight * to_float(v[j][c]);
        }
        o[r * dv + c] = o[r * dv + c] * alpha[r] + x;
      }
    return;
  }
  blocks.head.weigh(p, v, tile.n, at.next_v, o, dv, alpha);
  if (rows > cut) blocks.tail.weigh(p + cut * STREAM_TILE, v, tile.n, at.next_v, o + cut * dv, dv, alpha + cut);
}

// An item for KV heads [u.head, head_end).
//
// Quantised K and V (of type S) go through the products as the numbers they are stored as. A token's factor for K
// multiplies its scores, the one for V its weights: so both products are exact, and the factors cost nothing a channel.
template <class T, class E, class S = T>
void stream_unit(const Attention& a, Unit& u, int head_end, void* scratch) {
  const int d = a.head_dim, v_dim = a.v_dim, rows = u.packed, first = u.head, heads = head_end - first;
  const StreamScratch<E> w(scratch, d, v_dim, heads);
  const int dk = w.dk, dv = w.dv, q_each = STREAM_ROWS * dk, o_each = STREAM_ROWS * dv;  // of a head's Q and output
  for (int h = 0; h < heads; ++h) {
    u.head = first + h;
    stream_queries<T, E>(a, u, dk, w.q + h * (q_each / STEP<E>));
    memset(w.o + h * o_each, 0, size_t(rows) * dv * sizeof(float));
    for (int r = 0; r < rows; ++r) {
      w.m[h * STREAM_ROWS + r] = -INF;
      w.l[h * STREAM_ROWS + r] = 0;
    }
  }
  memset(w.zeros, 0, size_t(dv) * sizeof(S));
  const StreamBlocks<S, E> blocks(rows);
  StreamRows<S> at_rows;
  int32_t slots[2 * STREAM_TILE], positions[STREAM_TILE];
  const auto locate = [&](int begin, int half) {  // past the last token: any valid address, for prefetches and blocks
    const int n = smaller(STREAM_TILE, u.n - begin);
    if (n > 0) u.slots(begin, n, slots + half);
    for (int j = 0; j < n; ++j) {
      w.k[half + j] = at<S>(a.k, a, first, slots[half + j]);
      w.v[half + j] = at<S>(a.v, a, first, slots[half + j]);
    }
    const int valid = n > 0 ? half : STREAM_TILE - half;
    for (int j = n > 0 ? n : 0; j < STREAM_TILE; ++j) {
      w.k[half + j] = w.k[valid];
      w.v[half + j] = w.v[valid];
    }
  };
  if (u.n > 0) locate(0, 0);
  int half = 0;
  for (int begin = 0; begin < u.n; begin += STREAM_TILE, half = STREAM_TILE - half) {
    const Tile tile(a, u, begin, smaller(STREAM_TILE, u.n - begin), positions);
    locate(begin + STREAM_TILE, STREAM_TILE - half);
    if (tile.hidden) continue;
    for (int h = 0; h < heads; ++h) {
      u.head = first + h;
      const bool turn = h + 1 == heads;  // what is read next: the next head of this tile, or the first of the next
      const int coming = turn ? STREAM_TILE - half : half;
      const int64_t k_at = h * a.k.head, v_at = h * a.v.head, k_next = turn ? 0 : k_at + a.k.head,
                    v_next = turn ? 0 : v_at + a.v.head;
      for (int j = 0; j < STREAM_TILE; ++j) {
        at_rows.k[j] = static_cast<const S*>(w.k[half + j]) + k_at;
        at_rows.v[j] = j < tile.n ? static_cast<const S*>(w.v[half + j]) + v_at : static_cast<const S*>(w.zeros);
        at_rows.next_k[j] = static_cast<const S*>(w.k[coming + j]) + k_next;
        at_rows.next_v[j] = static_cast<const S*>(w.v[coming + j]) + v_next;
      }
      stream_tile(a, u, tile, blocks, at_rows, slots + half, w, w.q + h * (q_each / STEP<E>), w.o + h * o_each,
                  w.m + h * STREAM_ROWS, w.l + h * STREAM_ROWS);
    }
  }
  for (int h = 0; h < heads; ++h) {
    u.head = first + h;
    for (int r = 0; r < rows; ++r)
      emit<T>(a, u, r, w.m[h * STREAM_ROWS + r], w.l[h * STREAM_ROWS + r], w.o + h * o_each + r * dv);
  }
}

}  // namespace
}  // namespace anabranch::cpu
