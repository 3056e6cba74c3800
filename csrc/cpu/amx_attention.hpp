// Attention of a unit with many packed rows, bfloat16, in AMX's tile registers.
//
// S[token][row] = K · Qᵀ: K goes from its page into the registers as it lies, sixteen tokens at a time; Q is packed once as
// pairs of channels. Maxima and sums of the softmax are vertical, as in packed.hpp. P is rounded to bfloat16 and turned
// round, sixteen by sixteen, into P[row][token]; V is packed as pairs of tokens, and O = P · V adds up in float32.
#pragma once

#include "cpu/amx.hpp"
#include "cpu/packed.hpp"

namespace anabranch::cpu {
namespace {

constexpr int SPAN = 256;              // tokens of a tile; a multiple of DEPTH
constexpr int BLOCKS = SPAN / DEPTH;   // products that P · V sums over
constexpr int GROUPS = SPAN / SIDE;    // tokens go into the registers by so many groups
constexpr int FETCH_STEP = 4;          // pairs of tokens in the softmax between steps of the fetcher

// Sixteen rows of K or of V; data is null where they do not lie side by side, or not in whole registers.
struct Rows {
  const bf16* data;
  int64_t stride;  // elements
};

// A tile's K and V.
struct Span {
  int begin, n;
  int32_t slots[SPAN];
  Rows rows[2 * GROUPS];  // of K, then of V
};

struct AmxScratch {
  int rows, dk, dv;  // padded: rows to SIDE, the head_dims of K and of V to DEPTH
  pair* q;       // panels [D / 2][PANEL rows], the last one perhaps of SIDE rows
  pair *v, *p;   // registers [D / SIDE][BLOCKS], [PANEL / SIDE][BLOCKS]
  float *s, *o, *m, *l, *alpha;
  int32_t *limit, *position, *positions;  // positions: of a tile's tokens
  bf16 *k_copies, *v_copies, *zeros;  // of rows that have no data, [SPAN, dk], [SPAN, dv]; as many as either
  Span *here, *next;

  AmxScratch(void* base, int packed, int d, int v_dim, size_t* bytes = nullptr) {
    Scratch take(base);
    rows = round_up(packed, SIDE);
    dk = round_up(d, DEPTH);
    dv = round_up(v_dim, DEPTH);
    q = take.take<pair>(size_t(rows) * dk / 2);
    v = take.take<pair>(size_t(SPAN) * dv / 2);
    p = take.take<pair>(size_t(SPAN) * PANEL / 2);
    o = take.take<float>(size_t(rows) * dv);
    m = take.take<float>(size_t(rows));
    l = take.take<float>(size_t(rows));
    s = take.take<float>(size_t(SPAN) * PANEL);
    alpha = take.take<float>(rows);
    limit = take.take<int32_t>(rows);
    position = take.take<int32_t>(rows);
    positions = take.take<int32_t>(SPAN);
    k_copies = take.take<bf16>(size_t(SPAN) * dk);
    v_copies = take.take<bf16>(size_t(SPAN) * dv);
    zeros = take.take<bf16>(size_t(dk > dv ? dk : dv));
    here = take.take<Span>(1);
    next = take.take<Span>(1);
    if (bytes) *bytes = size_t(take.next - static_cast<char*>(base));
  }
};

// Whether every token of the pool is as far from the next as within a page.
ANABRANCH_INLINE bool even(const Attention& a, const Pool& pool) { return pool.page == a.page_size * pool.slot; }

// Whether the rows of W slots are evenly spaced.
ANABRANCH_INLINE bool side_by_side(const Attention& a, const int32_t* slots) {
  vi expected;
  for (int i = 0; i < W; ++i) expected[i] = i;
  const vi odd = load(slots) - slots[0] != expected;
  uint64_t parts[8], any = 0;
  memcpy(parts, &odd, sizeof odd);
  for (uint64_t x : parts) any |= x;
  if (any) return false;
  const int offset = a.page_shift >= 0 ? slots[0] & (a.page_size - 1) : slots[0] % a.page_size;
  return offset + W <= a.page_size || (even(a, a.k) && even(a, a.v));
}

ANABRANCH_INLINE void locate(const Attention& a, const Unit& u, int begin, Span& span) {
  const int n = smaller(SPAN, u.n - begin);  // not above zero behind the last one
  span.begin = begin;
  span.n = n > 0 ? n : 0;
  u.slots(begin, span.n, span.slots);
  for (int g = 0; g * SIDE < n; ++g) {
    const int32_t* slots = span.slots + g * SIDE;
    const bool together = (g + 1) * SIDE <= n && side_by_side(a, slots);
    const bool whole_k = together && a.head_dim % DEPTH == 0, whole_v = together && a.v_dim % DEPTH == 0;
    span.rows[g] = {whole_k ? at<bf16>(a.k, a, u.head, slots[0]) : nullptr, a.k.slot};
    span.rows[GROUPS + g] = {whole_v ? at<bf16>(a.v, a, u.head, slots[0]) : nullptr, a.v.slot};
  }
}

// Copies for rows without data; whole groups of `zeros` behind them, up to `groups`.
ANABRANCH_INLINE void gather(const Attention& a, const Unit& u, int groups, const AmxScratch& w, Span& span) {
  for (int half = 0; half < 2; ++half) {
    const int d = half ? a.v_dim : a.head_dim, padded = half ? w.dv : w.dk;
    bf16* copies = half ? w.v_copies : w.k_copies;
    for (int g = 0; g < groups; ++g) {
      Rows& rows = span.rows[half * GROUPS + g];
      if (g * SIDE >= span.n) rows = {w.zeros, 0};
      else if (!rows.data) {
        rows = {copies + int64_t(g * SIDE) * padded, padded};
        for (int j = g * SIDE; j < (g + 1) * SIDE; ++j) {
          bf16* to = copies + int64_t(j) * padded;
          const int real = j < span.n ? d : 0;
          if (real)
            memcpy(static_cast<void*>(to), at<bf16>(half ? a.v : a.k, a, u.head, span.slots[j]),
                   size_t(d) * sizeof(bf16));
          memset(static_cast<void*>(to + real), 0, size_t(padded - real) * sizeof(bf16));
        }
      }
    }
  }
}

// Brings the next tile's rows into the second-level cache while this one is worked on, a few at a time: pages lie far
// apart, where the hardware's own prefetcher does not follow, and many lines at once would wait for the memory.
struct SpanFetcher {
  const Attention& a;
  const Unit& u;
  const Span& span;
  int at = 0, end, each;  // rows, K's and then V's

  SpanFetcher(const Attention& a, const Unit& u, const Span& span, int steps)
      : a(a), u(u), span(span), end(2 * span.n), each((end + steps - 1) / steps) {}

  ANABRANCH_INLINE void step() {
    for (int i = 0; i < each && at < end; ++i, ++at) {
      const bool value = at >= span.n;
      const int token = value ? at - span.n : at;
      const Rows& rows = span.rows[(value ? GROUPS : 0) + token / SIDE];
      fetch(rows.data ? rows.data + token % SIDE * rows.stride
                      : cpu::at<bf16>(value ? a.v : a.k, a, u.head, span.slots[token]),
            2 * (value ? a.v_dim : a.head_dim));
    }
  }
};

// Two rows' next 2·W channels as pairs. Within every eight channels the first four go to x[0], the others to x[1]: what
// one instruction does. `natural` puts the output's channels back.
template <int... I>
ANABRANCH_INLINE void interleave(const bf16* a, const bf16* b, vu* x, std::integer_sequence<int, I...>) {
  const vh2 first = *reinterpret_cast<const vh2_at*>(a), second = *reinterpret_cast<const vh2_at*>(b);
  x[0] = (vu)ANABRANCH_SHUFFLE(vh2, first, second, (I % 2 * 2 * W + I / 8 * 8 + I % 8 / 2)...);
  x[1] = (vu)ANABRANCH_SHUFFLE(vh2, first, second, (I % 2 * 2 * W + I / 8 * 8 + I % 8 / 2 + 4)...);
}
ANABRANCH_INLINE int place(int channel) {  // of an output's row, four after four side by side
  return channel / DEPTH * DEPTH + channel / 4 % 2 * SIDE + channel % DEPTH / 8 * 4 + channel % 4;
}
ANABRANCH_INLINE void natural(const float* o, int dv, float* to) {
  for (int c = 0; c < dv; c += 4) memcpy(to + c, o + place(c), 4 * sizeof(float));
}

ANABRANCH_INLINE void pack_values(const Rows* v_rows, int n, int dv, pair* v) {
  for (int j = 0; j < round_up(n, DEPTH); j += 2) {
    const Rows& rows = v_rows[j / SIDE];
    const bf16* from = rows.data + j % SIDE * rows.stride;
    pair* to = v + j / DEPTH * AREA + j % DEPTH / 2 * SIDE;
    for (int c = 0; c < dv; c += DEPTH) {
      vu x[2];
      interleave(from + c, from + rows.stride + c, x, std::make_integer_sequence<int, 2 * W>());
      store(to + c / SIDE * BLOCKS * AREA, x[0]);
      store(to + (c / SIDE + 1) * BLOCKS * AREA, x[1]);
    }
  }
}

void pack_pairs(const Attention& a, const Unit& u, const AmxScratch& w) {
  for (int begin = 0; begin < w.rows; begin += SIDE) {
    const int panel = begin / PANEL * PANEL, width = smaller(PANEL, w.rows - panel);
    pair* to = w.q + int64_t(panel) * w.dk / 2 + begin - panel;
    for (int c = 0; c < w.dk; c += DEPTH, to += SIDE * width) {
      const auto row = [&](int r) { return begin + r < u.packed ? query<bf16>(a, u, begin + r) + c : nullptr; };
      pack_across(row, smaller(DEPTH, a.head_dim - c), to, width);
    }
  }
}

// s[32 or 64 tokens][NV · SIDE rows] = K · Qᵀ
template <int NV>
ANABRANCH_INLINE void amx_scores(const pair* q, int dk, const Rows* k, int n, float* s) {
  constexpr int64_t WIDTH = NV * SIDE * 4;  // bytes
  constexpr int ACROSS_TOKENS = NV == 2 ? 2 : 4;
  for (int j = 0; j < n; j += ACROSS_TOKENS * SIDE, k += ACROSS_TOKENS, s += ACROSS_TOKENS * SIDE * NV * SIDE) {
    tile_zero<0>();
    tile_zero<1>();
    tile_zero<2>();
    tile_zero<3>();
    for (int c = 0; c < dk; c += DEPTH) {
      const auto token = [&](int g) { return k[g].data + c; };
      const pair* x = q + int64_t(c / 2) * NV * SIDE;
      tile_load<4>(x, WIDTH);
      tile_load<6>(token(0), k[0].stride * 2);
      tile_multiply_add<0, 6, 4>();
      if constexpr (NV == 2) {
        tile_load<5>(x + SIDE, WIDTH);
        tile_multiply_add<1, 6, 5>();
        tile_load<7>(token(1), k[1].stride * 2);
        tile_multiply_add<2, 7, 4>();
        tile_multiply_add<3, 7, 5>();
      } else {
        tile_load<7>(token(1), k[1].stride * 2);
        tile_multiply_add<1, 7, 4>();
        tile_load<5>(token(2), k[2].stride * 2);
        tile_multiply_add<2, 5, 4>();
        tile_load<6>(token(3), k[3].stride * 2);
        tile_multiply_add<3, 6, 4>();
      }
    }
    if constexpr (NV == 2) {
      tile_store<0>(s, WIDTH);
      tile_store<1>(s + SIDE, WIDTH);
      tile_store<2>(s + SIDE * 2 * SIDE, WIDTH);
      tile_store<3>(s + SIDE * 2 * SIDE + SIDE, WIDTH);
    } else {
      tile_store<0>(s, WIDTH);
      tile_store<1>(s + AREA, WIDTH);
      tile_store<2>(s + 2 * AREA, WIDTH);
      tile_store<3>(s + 3 * AREA, WIDTH);
    }
  }
}

// Online softmax of a panel, as in packed.hpp; its scores times `factor`. P goes into registers' shape, zeros past n.
template <int NV>
ANABRANCH_INLINE void amx_online_softmax(float* s, int n, float factor, float* m, float* l, float* alpha, pair* p,
                                 SpanFetcher& fetcher) {
  vf old[NV], top[NV], base[NV], total[NV];
  for (int i = 0; i < NV; ++i) top[i] = old[i] = load(m + i * W);
  for (int j = 0; j < n; ++j)
    for (int i = 0; i < NV; ++i) {
      const vf x = load(s + (j * NV + i) * W) * factor;
      store(s + (j * NV + i) * W, x);
      top[i] = larger(top[i], x);
    }
  for (int i = 0; i < NV; ++i) {
    base[i] = top[i] == -INF ? (vf){} : top[i];  // nothing visible yet: e^(−inf − 0) = 0 and no NaN
    total[i] = (vf){};
  }
  for (int j = n; j < round_up(n, DEPTH); ++j)
    for (int i = 0; i < NV; ++i) store(s + (j * NV + i) * W, splat(-INF));
  for (int j = 0; j < n; j += DEPTH)
    for (int i = 0; i < NV; ++i) {
      vu x[W];
#pragma GCC unroll 16
      for (int t = 0; t < W; ++t) {
        const float* from = s + ((j + 2 * t) * NV + i) * W;
        const vf first = exp_(load(from) - base[i]), second = exp_(load(from + NV * W) - base[i]);
        total[i] += first + second;
        x[t] = (vu)to_bf16(first) >> 16 | (vu)to_bf16(second);
        if (t % FETCH_STEP == 0) fetcher.step();
      }
      transpose(x);
      pair* to = p + (i * BLOCKS + j / DEPTH) * AREA;
      for (int t = 0; t < W; ++t) store(to + t * W, x[t]);
    }
  for (int i = 0; i < NV; ++i) {
    const vf shrink = exp_(old[i] - base[i]);
    store(alpha + i * W, shrink);
    store(m + i * W, top[i]);
    store(l + i * W, load(l + i * W) * shrink + total[i]);
  }
}

// o[NV · SIDE rows][dv] = alpha · o + P · V
template <int NV>
ANABRANCH_INLINE void amx_weigh(const pair* p, const pair* v, int n, float* o, int dv, const float* alpha) {
  for (int r = 0; r < NV * SIDE; ++r)
    if (alpha[r] != 1)
      for (int c = 0; c < dv; c += W) store(o + r * dv + c, load(o + r * dv + c) * alpha[r]);
  const int64_t width = dv * 4;
  const int blocks = (n + DEPTH - 1) / DEPTH;
  for (int c = 0; c < dv; c += DEPTH, v += 2 * BLOCKS * AREA, o += DEPTH) {
    tile_load<0>(o, width);
    tile_load<1>(o + SIDE, width);
    if constexpr (NV == 2) {
      tile_load<2>(o + SIDE * dv, width);
      tile_load<3>(o + SIDE * dv + SIDE, width);
    }
    for (int b = 0; b < blocks; ++b) {
      tile_load<6>(v + b * AREA, 64);
      tile_load<4>(p + b * AREA, 64);
      tile_multiply_add<0, 4, 6>();
      tile_load<7>(v + (BLOCKS + b) * AREA, 64);
      tile_multiply_add<1, 4, 7>();
      if constexpr (NV == 2) {
        tile_load<5>(p + (BLOCKS + b) * AREA, 64);
        tile_multiply_add<2, 5, 6>();
        tile_multiply_add<3, 5, 7>();
      }
    }
    tile_store<0>(o, width);
    tile_store<1>(o + SIDE, width);
    if constexpr (NV == 2) {
      tile_store<2>(o + SIDE * dv, width);
      tile_store<3>(o + SIDE * dv + SIDE, width);
    }
  }
}

ANABRANCH_INLINE bool all_finite(const Rows* v, int n, int dv) {
  vf bad = {};
  for (int j = 0; j < n; ++j)
    for (int c = 0; c < dv; c += W) bad += load(v[j / SIDE].data + j % SIDE * v[j / SIDE].stride + c) * 0.0f;
  return sum(bad) == 0;
}

// A tile that hides tokens from some rows and whose V holds an infinity or a NaN: 0 · NaN must not reach those rows.
void amx_weigh_visible(const pair* p, const Rows* v, int rows, int n, float* o, int dv, const float* alpha) {
  for (int r = 0; r < rows; ++r)
    for (int c = 0; c < dv; ++c) {
      float x = 0;
      for (int j = 0; j < n; ++j) {
        const float weight = part(p[(r / SIDE * BLOCKS + j / DEPTH) * AREA + r % SIDE * SIDE + j % DEPTH / 2], j);
        const Rows& values = v[j / SIDE];
        if (weight != 0) x += weight * to_float(values.data[j % SIDE * values.stride + c]);
      }
      float& to = o[r * dv + place(c)];
      to = to * alpha[r] + x;
    }
}

// Rows [row, row + NV · SIDE).
template <int NV>
void amx_panel(const Attention& a, const Unit& u, const Tile& tile, const AmxScratch& w, int row, bool exact,
               SpanFetcher& fetcher) {
  const int rows = smaller(NV * SIDE, u.packed - row);
  int n = tile.n;
  if (tile.limited) {  // tokens that no row of this panel sees
    int most = 0;
    for (int i = 0; i < rows; ++i) most = w.limit[row + i] > most ? w.limit[row + i] : most;
    n = smaller(n, most - tile.begin);
    if (n <= 0) return;
  }
  const Rows *k = w.here->rows, *v = k + GROUPS;
  float factor = query_factor(a), *o = w.o + int64_t(row) * w.dv, *alpha = w.alpha + row;
  amx_scores<NV>(w.q + int64_t(row) * w.dk / 2, w.dk, k, n, w.s);
  if (a.softcap > 0 || tile.cut()) {
    cap_and_mask<NV>(a, tile, w, row, n, w.s, factor);
    factor = 1;
  }
  amx_online_softmax<NV>(w.s, n, factor, w.m + row, w.l + row, alpha, w.p, fetcher);
  if (exact) amx_weigh_visible(w.p, v, rows, n, o, w.dv, alpha);
  else amx_weigh<NV>(w.p, w.v, n, o, w.dv, alpha);
}

void amx_unit(const Attention& a, const Unit& u, void* base) {
  AmxScratch w(base, u.packed, a.head_dim, a.v_dim);
  const TileRegisters registers;
  pack_pairs(a, u, w);
  start_rows(a, u, w);
  memset(static_cast<void*>(w.zeros), 0, size_t(w.dk > w.dv ? w.dk : w.dv) * sizeof(bf16));
  locate(a, u, 0, *w.next);
  for (int begin = 0; begin < u.n; begin += SPAN) {
    std::swap(w.here, w.next);
    locate(a, u, begin + SPAN, *w.next);
    const Tile tile(a, u, begin, w.here->n, w.positions);
    if (tile.hidden) continue;
    SpanFetcher fetcher(a, u, *w.next, w.rows / SIDE * (round_up(tile.n, DEPTH) / DEPTH) * (SIDE / FETCH_STEP));
    gather(a, u, round_up(tile.n, 4 * SIDE) / SIDE, w, *w.here);  // what a step of amx_scores takes
    const Rows* v = w.here->rows + GROUPS;
    pack_values(v, tile.n, w.dv, w.v);
    const bool exact = tile.cut() && !all_finite(v, tile.n, w.dv);
    for (int row = 0; row < w.rows; row += PANEL) {
      if (w.rows - row >= PANEL) amx_panel<2>(a, u, tile, w, row, exact, fetcher);
      else amx_panel<1>(a, u, tile, w, row, exact, fetcher);
    }
  }
  float acc[MAX_HEAD_DIM];
  for (int row = 0; row < u.packed; ++row) {
    natural(w.o + int64_t(row) * w.dv, w.dv, acc);
    emit<bf16>(a, u, row, w.m[row], w.l[row], acc);
  }
}

}  // namespace
}  // namespace anabranch::cpu
