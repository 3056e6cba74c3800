// Attention under a branch mask, forward and backward: row tiles × the columns that some row of the tile sees.
//
// Scores come out as S[column][row lane], as in packed.hpp: softmax is vertical, and the same array, read the other way,
// is the left factor of every product that follows. The backward makes one pass: a row tile stays, K and V go by, dQ
// gathers in the tile, dK and dV in float32 rows of the unit's own (a unit is one KV head × a range of row tiles; the
// units' sums are added in their order). Five products, no atomics.
#pragma once

#include "plan/branch_plan.hpp"
#include "cpu/packed.hpp"

namespace anabranch::cpu {
namespace {

// Row lanes a tile: what a tile holds of Q, dO (both ways) and dQ beside K and V stays in a second-level cache of 512 KB.
inline int branch_lanes(int d) {
  const int wish = 8192 / d / PANEL * PANEL;
  return wish < 32 ? 32 : wish > 128 ? 128 : wish;
}

// A tile's rows: lane = (token − first) · heads + (head − first head).
struct BranchRows {
  int begin, tokens, heads, first_head, lanes, padded;
  BranchRows(const Branch& a, const BranchTile& t, int kv_head, int chunk) {
    begin = t.begin;
    tokens = t.end - t.begin;
    const int from = a.group * chunk / a.chunks;
    heads = a.group * (chunk + 1) / a.chunks - from;
    first_head = kv_head * a.group + from;
    lanes = tokens * heads;
    padded = round_up(lanes, PANEL);
  }
  int token(int lane) const { return begin + lane / heads; }
  int head(int lane) const { return first_head + lane % heads; }
};

struct BranchScratch {
  int rows, dk, dv;  // rows, and the head_dims of K and of V, padded
  float *qt, *q, *dot, *dout, *k, *v, *kp, *s, *g, *o, *m, *l, *delta, *alpha, *ones;
  float** sums;                           // TILE rows of dK, then of dV
  int32_t *row, *position, *seen, *column, *run;  // seen: lane masks, one [rows] a run of the tile of columns
  const void** from;                      // TILE rows of K, then of V
  const void** ahead;                     // rows of K and V, then of the sums, that probably come next

  BranchScratch(void* base, int lanes, int d, int v_dim, bool backward, size_t* bytes = nullptr) {
    Scratch take(base);
    rows = round_up(lanes, PANEL);
    dk = round_up(d, W);
    dv = round_up(v_dim, W);
    const size_t tile = size_t(TILE) * PANEL;
    qt = take.take<float>(size_t(rows) * d);
    dot = take.take<float>(backward ? size_t(rows) * v_dim : 0);
    q = take.take<float>(backward ? size_t(rows) * dk : 0);
    dout = take.take<float>(backward ? size_t(rows) * dv : 0);
    o = take.take<float>(size_t(rows) * (backward ? dk : dv));
    k = take.take<float>(size_t(TILE) * d);
    v = take.take<float>(backward ? size_t(TILE) * v_dim : 0);
    kp = take.take<float>(size_t(TILE) * (backward ? dk : dv));
    s = take.take<float>(backward ? tile * (rows / PANEL) : tile);
    g = take.take<float>(backward ? tile * (rows / PANEL) : 0);
    m = take.take<float>(rows);
    l = take.take<float>(rows);
    delta = take.take<float>(rows);
    alpha = take.take<float>(rows);
    ones = take.take<float>(PANEL);
    sums = take.take<float*>(2 * TILE);
    row = take.take<int32_t>(rows);
    position = take.take<int32_t>(rows);
    seen = take.take<int32_t>(size_t(TILE) * rows);
    column = take.take<int32_t>(TILE);
    run = take.take<int32_t>(TILE);
    from = take.take<const void*>(2 * TILE);
    ahead = take.take<const void*>(3 * TILE);
    if (bytes) *bytes = size_t(take.next - static_cast<char*>(base));
  }
};

// Walks a tile's pieces and hands out up to TILE columns at a time, those alone that the window leaves to some row.
class BranchColumns {
 public:
  int n = 0;
  bool limited = false;   // some row comes before some column
  bool parted = false;    // some column is not seen by all tokens, causality apart
  bool windowed = false;  // some row has lost some column to the window

  BranchColumns(const Branch& a, const BranchTile& t, const BranchRows& r, const BranchScratch& w)
      : a_(a), r_(r), w_(w), piece_(a.pieces + t.piece_begin), end_(a.pieces + t.piece_end) {
    if (piece_ < end_) at_ = piece_->begin;
    if (!a.windowed) return;
    least_ = most_ = a.positions[r.begin];
    for (int i = 1; i < r.tokens; ++i) {
      const int64_t p = a.positions[r.begin + i];
      least_ = p < least_ ? p : least_;
      most_ = p > most_ ? p : most_;
    }
  }

  bool next() {
    n = 0;
    runs_ = 0;
    limited = parted = windowed = false;
    for (; piece_ < end_; ++piece_, at_ = piece_ < end_ ? piece_->begin : 0) {
      const int before = n;
      for (; at_ < piece_->end && n < TILE; ++at_) {
        if (a_.windowed) {
          if (at_ % BRANCH_BLOCK == 0 && least_ - a_.latest[at_ / BRANCH_BLOCK] >= a_.window) {  // nothing in this block
            at_ = smaller(piece_->end, at_ + BRANCH_BLOCK) - 1;
            continue;
          }
          const int64_t p = a_.positions[at_];
          if (least_ - p >= a_.window) continue;
          windowed = windowed || most_ - p >= a_.window;
        }
        w_.run[n] = piece_->whole ? -1 : runs_;
        w_.column[n++] = at_;
      }
      if (n > before && !piece_->whole) {
        parted = true;
        expand(*piece_, w_.seen + int64_t(runs_++) * w_.rows);
      }
      if (at_ < piece_->end) break;
    }
    if (n == 0) return false;
    limited = w_.column[n - 1] > r_.begin;
    return true;
  }

  // The columns that rows up to this token may see: a prefix, since columns are in order.
  int upto(int token) const {
    if (!limited) return n;
    int count = n;
    while (count > 0 && w_.column[count - 1] > token) --count;
    return count;
  }

  bool visible(int lane, int j) const {
    return lane < r_.lanes && w_.column[j] <= w_.row[lane] &&
           (w_.run[j] < 0 || w_.seen[int64_t(w_.run[j]) * w_.rows + lane]) &&
           (!a_.windowed || int64_t(w_.position[lane]) - a_.positions[w_.column[j]] < a_.window);
  }

 private:
  void expand(const BranchPiece& p, int32_t* to) const {
    for (int t = 0, lane = 0; t < r_.tokens; ++t) {
      const int32_t x = (p.bits[t / 32] >> (t % 32)) & 1 ? -1 : 0;
      for (int h = 0; h < r_.heads; ++h) to[lane++] = x;
    }
    for (int lane = r_.lanes; lane < r_.padded; ++lane) to[lane] = 0;
  }

  const Branch& a_;
  const BranchRows& r_;
  const BranchScratch& w_;
  const BranchPiece *piece_, *end_;
  int32_t at_ = 0;
  int runs_ = 0;
  int64_t least_ = 0, most_ = 0;
};

// Hidden scores of one panel of lanes become −inf. Lanes past the last row are hidden everywhere.
inline void branch_mask(const Branch& a, const BranchColumns& c, const BranchScratch& w, int lane, int n, float* s) {
  for (int j = 0; j < n; ++j) {
    const int32_t column = w.column[j];
    const int32_t* seen = c.parted && w.run[j] >= 0 ? w.seen + int64_t(w.run[j]) * w.rows + lane : nullptr;
    for (int i = 0; i < 2; ++i) {
      vf x = load(s + (j * 2 + i) * W);
      x = splat(column) <= load(w.row + lane + i * W) ? x : splat(-INF);
      if (seen) x = load(seen + i * W) != 0 ? x : splat(-INF);
      if (c.windowed) {
        vi distance = load(w.position + lane + i * W) - int32_t(a.positions[column]);
        x = distance < a.window ? x : splat(-INF);
      }
      store(s + (j * 2 + i) * W, x);
    }
  }
}

inline void branch_cap(float cap, int n, float* s) {
  for (int j = 0; j < n * PANEL; j += W) store(s + j, tanh_(load(s + j)) * cap);
}

// Rows [lanes][D] of a strided tensor, float32 times `factor`: as panels of lanes [lanes / PANEL][D][PANEL], and, where
// wanted, as panels of channels [D / PANEL][padded][PANEL].
template <class T>
void branch_pack(const BranchRows& r, const void* data, int64_t stride, int64_t head_stride, int d, int dv, float factor,
                 float* lanes, float* channels) {
  for (int lane = 0; lane < r.padded; ++lane) {
    const T* from = static_cast<const T*>(data);
    const bool real = lane < r.lanes;
    if (real) from += int64_t(r.token(lane)) * stride + int64_t(r.head(lane)) * head_stride;
    float* to = lanes + int64_t(lane / PANEL * PANEL) * d + lane % PANEL;
    for (int c = 0; c < d; ++c) to[c * PANEL] = real ? to_float(from[c]) * factor : 0;
    if (!channels) continue;
    for (int c = 0; c < dv; c += PANEL) {
      const int width = smaller(PANEL, dv - c);
      float* x = channels + int64_t(c) * r.padded + int64_t(lane) * width;
      for (int i = 0; i < width; ++i) x[i] = real && c + i < d ? to_float(from[c + i]) * factor : 0;
    }
  }
}

inline void branch_lanes_of(const Branch& a, const BranchRows& r, const BranchScratch& w) {
  for (int lane = 0; lane < r.padded; ++lane) {
    const bool real = lane < r.lanes;
    w.row[lane] = real ? r.token(lane) : -1;
    w.position[lane] = real && a.windowed ? int32_t(a.positions[w.row[lane]]) : 0;
  }
}

// Rows of K or V for the next columns: where they lie if float32, else converted.
template <class T>
void branch_rows_of(const Strided& x, int kv_head, int d, const BranchScratch& w, int n, const void** rows, float* copy) {
  const T* base = static_cast<const T*>(x.data) + int64_t(kv_head) * x.head;
  for (int j = 0; j < n; ++j) {
    rows[j] = base + int64_t(w.column[j]) * x.row;
    if constexpr (sizeof(T) == 2) {
      copy_row(static_cast<const T*>(rows[j]), d, copy + int64_t(j) * d);
      rows[j] = copy + int64_t(j) * d;
    }
  }
  for (int j = n; j < TILE; ++j) rows[j] = rows[0];  // surplus keys of the last block
}

// Fetches what the next tile of columns will read, a little at each block of scores: most often the columns right behind
// these. K and V alternate in `ahead`, the sums' rows follow.
template <class T>
struct BranchFetch {
  int n;  // tokens of the next tile
  Fetcher rows, sums;
  BranchFetch(const Branch& a, const BranchTile& t, int kv_head, int panels, int last_column, const BranchScratch& w,
              const float* sums_of_next)
      : n(smaller(TILE, a.pieces[t.piece_end - 1].end - last_column - 1)),
        rows(w.ahead, 2 * n, a.head_dim * int(sizeof(T)), fetch_steps<float>(a.head_dim, panels)),
        sums(w.ahead + 2 * TILE, sums_of_next ? n : 0, (w.dk + w.dv) * 4, fetch_steps<float>(a.head_dim, panels)) {
    const T* k = static_cast<const T*>(a.k.data) + int64_t(kv_head) * a.k.head + int64_t(last_column + 1) * a.k.row;
    const T* v = static_cast<const T*>(a.v.data) + int64_t(kv_head) * a.v.head + int64_t(last_column + 1) * a.v.row;
    for (int j = 0; j < n; ++j) {
      w.ahead[2 * j] = k + j * a.k.row;
      w.ahead[2 * j + 1] = v + j * a.v.row;
      if (sums_of_next) w.ahead[2 * TILE + j] = sums_of_next + int64_t(j) * (w.dk + w.dv);
    }
  }
};

inline bool finite(const float* x, int64_t n) {  // n: a multiple of W
  vf bad = {};
  for (int64_t i = 0; i < n; i += W) bad += load(x + i) * 0.0f;
  return sum(bad) == 0;
}

inline bool rows_finite(const void* const* rows, int n, int d) {
  for (int j = 0; j < n; ++j) {
    const float* row = static_cast<const float*>(rows[j]);
    float bad = 0;
    for (int c = d / W * W; c < d; ++c) bad += row[c] * 0.0f;
    if (!(bad == 0) || !finite(row, d / W * W)) return false;
  }
  return true;
}

template <class T>
void branch_forward_unit(const Branch& a, int tile, int kv_head, int chunk, void* base) {
  const int d = a.head_dim, v_dim = a.v_dim;
  const BranchTile& t = a.tiles[tile];
  const BranchRows r(a, t, kv_head, chunk);
  const BranchScratch w(base, a.lanes, d, v_dim, false);
  const float factor = a.softcap > 0 ? a.scale / a.softcap : a.scale;
  branch_pack<T>(r, a.q.data, a.q.row, a.q.head, d, w.dk, factor, w.qt, nullptr);
  branch_lanes_of(a, r, w);
  for (int lane = 0; lane < r.padded; ++lane) {
    w.m[lane] = -INF;
    w.l[lane] = 0;
  }
  memset(w.o, 0, size_t(r.padded) * w.dv * 4);
  BranchColumns c(a, t, r, w);
  while (c.next()) {
    branch_rows_of<T>(a.k, kv_head, d, w, c.n, w.from, w.k);
    const T* v = static_cast<const T*>(a.v.data) + int64_t(kv_head) * a.v.head;
    for (int j = 0; j < c.n; ++j) pack_value(v + int64_t(w.column[j]) * a.v.row, v_dim, w.dv, j, w.kp);
    const bool cut = c.limited || c.parted || c.windowed, exact = cut && !all_finite(w.kp, c.n, w.dv);
    BranchFetch<T> fetch(a, t, kv_head, r.padded / PANEL, w.column[c.n - 1], w, nullptr);
    for (int lane = 0; lane < r.padded; lane += PANEL) {
      const int real = smaller(PANEL, r.lanes - lane), last = r.token(lane + real - 1), n = c.upto(last);
      if (n == 0) continue;
      scores<2>(w.qt + int64_t(lane) * d, d, w.from, n, w.s, fetch.rows);
      if (a.softcap > 0) branch_cap(a.softcap, n, w.s);
      if (c.parted || c.windowed || w.column[n - 1] > r.token(lane)) branch_mask(a, c, w, lane, n, w.s);
      online_softmax<2>(w.s, n, w.m + lane, w.l + lane, w.alpha + lane);
      float* o = w.o + int64_t(lane) * w.dv;
      if (exact) {
        weigh_visible(real, w.s, PANEL, w.kp, n, o, w.dv, w.alpha + lane);
        continue;
      }
      const int parts = (real + LONG - 1) / LONG;
      for (int b = 0; b < parts; ++b) {
        const int from = real * b / parts, to = real * (b + 1) / parts;
        weigh(to - from, w.s + from, PANEL, w.kp, n, o + int64_t(from) * w.dv, w.dv, w.alpha + lane + from);
      }
    }
  }
  for (int lane = 0; lane < r.lanes; ++lane) {
    const int h = r.head(lane);
    const int64_t at = int64_t(r.token(lane)) * a.num_q_heads + h;
    float top = w.m[lane], l = w.l[lane], shrink = 1;
    if (a.sinks && a.sinks[h] != -INF) {
      top = larger(w.m[lane], a.sinks[h]);
      shrink = expf(w.m[lane] - top);
      l = l * shrink + expf(a.sinks[h] - top);
    }
    const float inverse = l == 0 ? 0 : shrink / l;
    T* out = static_cast<T*>(a.out) + at * v_dim;
    for (int i = 0; i < v_dim; ++i) put(out + i, w.o[int64_t(lane) * w.dv + i] * inverse);
    a.lse[at] = top == -INF ? -INF : top + logf(l);
  }
}

// ------------------------------------------------------------------------------------------------ backward

// One panel of lanes: S becomes P, G (grad · V) becomes dS, the derivative by q · k · factor. CUT: S is −inf where
// hidden, and nothing there may come out but 0.
template <bool CUT, bool CAP>
void branch_slopes(const Branch& a, int n, const float* lse, const float* delta, float* s, float* g) {
  const vf base[2] = {load(lse), load(lse + W)}, less[2] = {load(delta), load(delta + W)};
  const float inverse = CAP ? 1 / a.softcap : 0;
  for (int j = 0; j < n; ++j)
    for (int i = 0; i < 2; ++i) {
      const int at = (j * 2 + i) * W;
      vf x = load(s + at), p = exp_(x - base[i]), y = p * (load(g + at) - less[i]);
      if (CAP) {  // the score is cap · tanh(u): its slope by u is cap − score² / cap
        y = y * (a.softcap - x * x * inverse);
      }
      if (CUT) {
        vi hidden = x == -INF;
        p = hidden ? (vf){} : p;
        y = hidden ? (vf){} : y;
      }
      store(s + at, p);
      store(g + at, y);
    }
}

// to[R rows][NV · W channels] += Σ over lanes x[row][lane] · y[lane][channels], lanes of the panels [first, last).
template <int R, int NV>
ANABRANCH_INLINE void gather_block(const float* x, int first, int last, const float* y, float* const* to, int c) {
  vf acc[R][NV] = {};
  for (int p = first; p < last; ++p) {
    const float* from = x + int64_t(p) * TILE * PANEL;
    const float* panel = y + int64_t(p) * PANEL * NV * W;
#pragma GCC unroll 4
    for (int m = 0; m < PANEL; ++m) {
      vf b[NV];
      for (int i = 0; i < NV; ++i) b[i] = load(panel + m * NV * W + i * W);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        vf e = splat(from[r * PANEL + m]);
#pragma GCC unroll 2
        for (int i = 0; i < NV; ++i) acc[r][i] += b[i] * e;
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < NV; ++i) store(to[r] + c + i * W, load(to[r] + c + i * W) + acc[r][i]);
}

template <int R = LONG, int NV>
void gather_rows(int r, const float* x, int first, int last, const float* y, float* const* to, int c) {
  if (r == R) return gather_block<R, NV>(x, first, last, y, to, c);
  if constexpr (R > 1) gather_rows<R - 1, NV>(r, x, first, last, y, to, c);
}

// sums[n columns][width] += Xᵀ · y; panels of lanes from `since[block]` on see a block of columns.
inline void gather(const float* x, const float* y, int n, int width, int panels, const int* since, float* const* sums) {
  for (int c = 0; c < width; c += PANEL) {
    const float* panel = y + int64_t(c) * panels * PANEL;
    for (int j = 0, b = 0; j < n; j += LONG, ++b) {
      const int rows = smaller(LONG, n - j);
      if (since[b] == panels) continue;
      if (width - c >= PANEL)
        gather_rows<LONG, 2>(rows, x + j * PANEL, since[b], panels, panel, sums + j, c);
      else
        gather_rows<LONG, 1>(rows, x + j * PANEL, since[b], panels, panel, sums + j, c);
    }
  }
}

// The three sums of a tile of columns pair by pair, for tiles where some pair is hidden and some number is not finite.
inline void branch_exact(const BranchColumns& c, const BranchRows& r, const BranchScratch& w, int d,
                         int v_dim) {
  for (int lane = 0; lane < r.lanes; ++lane)
    for (int j = 0; j < c.n; ++j) {
      if (!c.visible(lane, j)) continue;
      const int64_t at = (int64_t(lane / PANEL) * TILE + j) * PANEL + lane % PANEL;
      const float p = w.s[at], g = w.g[at];
      const int panel = lane / PANEL * PANEL;
      for (int i = 0; i < d; ++i) {
        const float x = w.qt[int64_t(panel) * d + i * PANEL + lane % PANEL];
        w.o[int64_t(lane) * w.dk + i] += g * static_cast<const float*>(w.from[j])[i];
        w.sums[j][i] += g * x;
      }
      for (int i = 0; i < v_dim; ++i)
        w.sums[TILE + j][i] += p * w.dot[int64_t(panel) * v_dim + i * PANEL + lane % PANEL];
    }
}

// One row tile: dQ, written out; dK and dV added to the unit's sums, [columns from `base_column`][dk + dv].
template <class T>
void branch_backward_tile(const Branch& a, const BranchTile& t, int kv_head, int chunk, int base_column, float* sums,
                          const BranchScratch& w) {
  const int d = a.head_dim, v_dim = a.v_dim;
  const BranchRows r(a, t, kv_head, chunk);
  const float factor = a.softcap > 0 ? a.scale / a.softcap : a.scale;
  branch_pack<T>(r, a.q.data, a.q.row, a.q.head, d, w.dk, factor, w.qt, w.q);
  branch_pack<T>(r, a.grad.data, a.grad.row, a.grad.head, v_dim, w.dv, 1, w.dot, w.dout);
  branch_lanes_of(a, r, w);
  const bool rows_are_finite = finite(w.q, int64_t(r.padded) * w.dk) && finite(w.dout, int64_t(r.padded) * w.dv);
  for (int lane = 0; lane < r.padded; ++lane) {
    w.l[lane] = w.delta[lane] = 0;
    if (lane >= r.lanes) continue;
    const int64_t at = int64_t(r.token(lane)) * a.num_q_heads + r.head(lane);
    const T* out = static_cast<const T*>(a.out) + at * v_dim;
    const T* grad = static_cast<const T*>(a.grad.data) + int64_t(r.token(lane)) * a.grad.row;
    grad += int64_t(r.head(lane)) * a.grad.head;
    float x = 0;
    for (int i = 0; i < v_dim; ++i) x += to_float(out[i]) * to_float(grad[i]);
    if (a.grad_lse) x -= a.grad_lse[at];
    w.delta[lane] = a.delta[at] = x;
    w.l[lane] = a.lse[at] == -INF ? 0 : a.lse[at];
  }
  memset(w.o, 0, size_t(r.padded) * w.dk * 4);
  for (int i = 0; i < PANEL; ++i) w.ones[i] = 1;
  const int panels = r.padded / PANEL;
  constexpr int BLOCKS = (TILE + LONG - 1) / LONG;
  BranchColumns c(a, t, r, w);
  while (c.next()) {
    branch_rows_of<T>(a.k, kv_head, d, w, c.n, w.from, w.k);
    branch_rows_of<T>(a.v, kv_head, v_dim, w, c.n, w.from + TILE, w.v);
    for (int j = 0; j < c.n; ++j) {
      pack_value(static_cast<const float*>(w.from[j]), d, w.dk, j, w.kp);
      w.sums[j] = sums + int64_t(w.column[j] - base_column) * (w.dk + w.dv);
      w.sums[TILE + j] = w.sums[j] + w.dk;
    }
    const bool cut = c.limited || c.parted || c.windowed;
    const bool exact = cut && !(rows_are_finite && all_finite(w.kp, c.n, w.dk) && rows_finite(w.from + TILE, c.n, v_dim));
    BranchFetch<T> fetch(a, t, kv_head, panels, w.column[c.n - 1], w, w.sums[c.n - 1] + w.dk + w.dv);
    int since[BLOCKS];
    for (int b = 0; b < BLOCKS; ++b) since[b] = panels;
    for (int p = panels - 1; p >= 0; --p) {
      const int lane = p * PANEL, real = smaller(PANEL, r.lanes - lane), n = c.upto(r.token(lane + real - 1));
      float *s = w.s + int64_t(p) * TILE * PANEL, *g = w.g + int64_t(p) * TILE * PANEL;
      scores<2>(w.qt + int64_t(lane) * d, d, w.from, n, s, fetch.rows);
      scores<2>(w.dot + int64_t(lane) * v_dim, v_dim, w.from + TILE, n, g, fetch.sums);
      if (a.softcap > 0) branch_cap(a.softcap, n, s);
      const bool masked = c.parted || c.windowed || real < PANEL || (n > 0 && w.column[n - 1] > r.token(lane));
      if (masked) branch_mask(a, c, w, lane, n, s);
      if (a.softcap > 0)
        masked ? branch_slopes<true, true>(a, n, w.l + lane, w.delta + lane, s, g)
               : branch_slopes<false, true>(a, n, w.l + lane, w.delta + lane, s, g);
      else
        masked ? branch_slopes<true, false>(a, n, w.l + lane, w.delta + lane, s, g)
               : branch_slopes<false, false>(a, n, w.l + lane, w.delta + lane, s, g);
      const int end = smaller((n + LONG - 1) / LONG * LONG, c.n);  // of the last block that this panel takes part in
      for (int j = n * PANEL; j < end * PANEL; j += W) {
        store(s + j, (vf){});
        store(g + j, (vf){});
      }
      for (int b = 0; b * LONG < n; ++b) since[b] = p;
      if (exact || n == 0) continue;
      float* o = w.o + int64_t(lane) * w.dk;
      const int parts = (real + LONG - 1) / LONG;
      for (int b = 0; b < parts; ++b) {
        const int from = real * b / parts, to = real * (b + 1) / parts;
        weigh(to - from, g + from, PANEL, w.kp, n, o + int64_t(from) * w.dk, w.dk, w.ones);
      }
    }
    if (exact) {
      branch_exact(c, r, w, d, v_dim);
      continue;
    }
    gather(w.g, w.q, c.n, w.dk, panels, since, w.sums);
    gather(w.s, w.dout, c.n, w.dv, panels, since, w.sums + TILE);
  }
  T* dq = static_cast<T*>(a.dq);
  for (int lane = 0; lane < r.lanes; ++lane)
    for (int i = 0; i < d; ++i)
      put(dq + (int64_t(r.token(lane)) * a.num_q_heads + r.head(lane)) * d + i, w.o[int64_t(lane) * w.dk + i] * factor);
}

template <class T>
void branch_backward_unit(const Branch& a, const BranchPart& part, int kv_head, float* sums, void* base) {
  const BranchScratch w(base, a.lanes, a.head_dim, a.v_dim, true);
  memset(sums, 0, size_t(part.column_end - part.column_begin) * (w.dk + w.dv) * 4);
  for (int tile = part.tile_begin; tile < part.tile_end; ++tile)
    for (int chunk = 0; chunk < a.chunks; ++chunk)
      branch_backward_tile<T>(a, a.tiles[tile], kv_head, chunk, part.column_begin, sums, w);
}

// dK and dV of tokens [begin, end): the parts' sums, in their order.
template <class T>
void branch_reduce_of(const Branch& a, int64_t begin, int64_t end) {
  const int dims[2] = {a.head_dim, a.v_dim}, first[2] = {0, round_up(a.head_dim, W)};
  const int row = first[1] + round_up(a.v_dim, W);
  T* out[2] = {static_cast<T*>(a.dk), static_cast<T*>(a.dv)};
  for (int64_t t = begin; t < end; ++t)
    for (int h = 0; h < a.num_kv_heads; ++h)
      for (int x = 0; x < 2; ++x) {
        const int d = dims[x];
        float total[MAX_HEAD_DIM];
        memset(total, 0, size_t(d) * sizeof(float));
        for (int p = 0; p < a.num_parts; ++p) {
          const BranchPart& part = a.parts[p];
          if (t < part.column_begin || t >= part.column_end) continue;
          const int64_t rows = part.column_end - part.column_begin;
          const float* from = part.sums + (h * rows + t - part.column_begin) * row + first[x];
          for (int i = 0; i < d; ++i) total[i] += from[i];
        }
        for (int i = 0; i < d; ++i) put(out[x] + (t * a.num_kv_heads + h) * d + i, total[i]);
      }
}

size_t branch_scratch(int lanes, int head_dim, int v_dim, bool backward) {
  size_t bytes;
  BranchScratch(nullptr, lanes, head_dim, v_dim, backward, &bytes);
  return bytes;
}

int branch_row_bytes(int head_dim, int v_dim) { return (round_up(head_dim, W) + round_up(v_dim, W)) * 4; }

void branch_forward(const Branch& a, int tile, int kv_head, int chunk, void* scratch) {
  switch (a.type) {
    case Type::f32: return branch_forward_unit<float>(a, tile, kv_head, chunk, scratch);
    case Type::bf16: return branch_forward_unit<bf16>(a, tile, kv_head, chunk, scratch);
    case Type::f16: return branch_forward_unit<f16>(a, tile, kv_head, chunk, scratch);
  }
}

void branch_backward(const Branch& a, const BranchPart& part, int kv_head, float* sums, void* scratch) {
  switch (a.type) {
    case Type::f32: return branch_backward_unit<float>(a, part, kv_head, sums, scratch);
    case Type::bf16: return branch_backward_unit<bf16>(a, part, kv_head, sums, scratch);
    case Type::f16: return branch_backward_unit<f16>(a, part, kv_head, sums, scratch);
  }
}

void branch_reduce(const Branch& a, int64_t begin, int64_t end) {
  switch (a.type) {
    case Type::f32: return branch_reduce_of<float>(a, begin, end);
    case Type::bf16: return branch_reduce_of<bf16>(a, begin, end);
    case Type::f16: return branch_reduce_of<f16>(a, begin, end);
  }
}

}  // namespace
}  // namespace anabranch::cpu
