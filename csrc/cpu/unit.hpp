// What both attention paths share: an item's visible tokens, row results, and the final division.
#pragma once

#include <cmath>
#include <cstring>

#include "cpu/kernels.hpp"
#include "cpu/simd.hpp"

namespace anabranch::cpu {
namespace {

constexpr int LINE = 64;  // bytes

ANABRANCH_INLINE int round_up(int n, int to) { return (n + to - 1) / to * to; }
ANABRANCH_INLINE int smaller(int a, int b) { return b < a ? b : a; }
ANABRANCH_INLINE int64_t smaller(int64_t a, int64_t b) { return b < a ? b : a; }

// One (item × KV head): the tokens [0, n) that some row sees, and packed rows r · group + g.
struct Unit {
  const int32_t *strips, *spelled, *rows, *limits, *dest;
  int shift, first;  // log2 of the tokens of a strip; the first token's place in `strips`
  int n, row_count, packed, head;
  int least;  // tokens that every row sees (of those inside the window)
  bool masked;
  int row_pos_min, row_pos_max;  // with a window only

  Unit(const Attention& a, int item, int kv_head) {
    const int32_t* it = a.items + 8 * int64_t(item);
    shift = a.strip_shift;
    strips = a.kv_strips + 2 * int64_t(it[0] >> shift);
    first = it[0] & ((1 << shift) - 1);
    spelled = a.kv_spelled;
    n = it[1];
    rows = a.rows + it[2];
    limits = a.limits + it[2];
    dest = a.dest + it[2];
    row_count = it[3];
    packed = row_count * a.group;
    head = kv_head;
    masked = it[4] != 0;
    least = n;
    if (masked) {
      int most = 0;
      for (int r = 0; r < row_count; ++r) {
        least = smaller(least, limits[r]);
        if (limits[r] > most) most = limits[r];
      }
      n = smaller(n, most);
    }
    row_pos_min = row_pos_max = 0;
    if (a.windowed) {
      row_pos_min = row_pos_max = a.row_positions[rows[0]];
      for (int r = 1; r < row_count; ++r) {
        int p = a.row_positions[rows[r]];
        row_pos_min = smaller(row_pos_min, p);
        if (p > row_pos_max) row_pos_max = p;
      }
      if (int64_t(it[6]) - it[5] >= a.window) n = 0;
    }
  }

  // Of tokens [begin, begin + count); there may be none.
  void slots(int begin, int count, int32_t* to) const { tell<0>(begin, count, to); }
  void positions(int begin, int count, int32_t* to) const { tell<1>(begin, count, to); }

 private:
  template <int PART>
  void tell(int begin, int count, int32_t* to) const {
    if (shift == 0) {
      for (int j = 0; j < count; ++j) to[j] = strips[2 * int64_t(begin + j) + PART];
      return;
    }
    const int size = 1 << shift;
    for (int64_t place = int64_t(first) + begin; count > 0;) {
      const int32_t* entry = strips + 2 * (place >> shift);
      const int at = int(place & (size - 1)), n = smaller(count, size - at);
      if (entry[0] >= 0) {
        for (int j = 0; j < n; ++j) to[j] = entry[PART] + at + j;
      } else {
        const int32_t* token = spelled + 2 * (~int64_t(entry[0]) + at) + PART;
        for (int j = 0; j < n; ++j) to[j] = token[2 * j];
      }
      to += n;
      place += n;
      count -= n;
    }
  }
};

// How a tile of tokens [begin, begin + n) stands to the unit's rows.
struct Tile {
  int begin, n;
  bool limited, windowed;  // some row is cut by its limit, by the window
  bool hidden;             // no row sees any of it
  const int32_t* positions;  // of its tokens, with a window only

  // room: for `count` positions
  Tile(const Attention& a, const Unit& u, int first, int count, int32_t* room) : begin(first), n(count), positions(room) {
    limited = u.masked && first + count > u.least;
    windowed = hidden = false;
    if (!a.windowed) return;
    u.positions(first, count, room);
    int lo = room[0], hi = lo;
    for (int j = 1; j < count; ++j) {
      int p = room[j];
      lo = smaller(lo, p);
      if (p > hi) hi = p;
    }
    windowed = int64_t(u.row_pos_max) - lo >= a.window;
    hidden = int64_t(u.row_pos_min) - hi >= a.window;
  }
  bool cut() const { return limited || windowed; }
};

struct Place {
  int64_t page, offset;
  Place(const Attention& a, int32_t slot) {
    if (a.page_shift >= 0) {
      page = slot >> a.page_shift;
      offset = slot & (a.page_size - 1);
    } else {
      page = slot / a.page_size;
      offset = slot % a.page_size;
    }
  }
};

template <class T>
ANABRANCH_INLINE const T* at(const Pool& pool, const Attention& a, int head, int32_t slot) {
  const Place p(a, slot);
  return static_cast<const T*>(pool.data) + p.page * pool.page + p.offset * pool.slot + head * pool.head;
}

// The factor of a token's quantised K or V; 1 for other types.
template <class T>
ANABRANCH_INLINE float scale_at(const Pool& pool, const Attention& a, int head, int32_t slot) {
  if constexpr (!QUANTISED<T>) return 1;
  const Place p(a, slot);
  return pool.scales[p.page * pool.scale_page + p.offset * pool.scale_slot + head * pool.scale_head];
}

// Into the second-level cache: a Zen 4 core reads twice as fast as with prefetches into the first.
ANABRANCH_INLINE void fetch(const void* row, int bytes) {
  for (int b = 0; b < bytes; b += LINE) __builtin_prefetch(static_cast<const char*>(row) + b, 0, 2);
}

// l, m and acc of one row and query head into the output: the sink joins here, once.
template <class T>
inline void finish(const Attention& a, int row, int h, float m, float l, const float* acc) {
  float top = m, shrink = 1;
  if (a.sinks && a.sinks[h] != -INF) {
    top = larger(m, a.sinks[h]);
    shrink = expf(m - top);
    l = l * shrink + expf(a.sinks[h] - top);
  }
  float inverse = l == 0 ? 0 : shrink / l;  // l is 0 only where nothing was visible; NaN stays NaN
  T* out = static_cast<T*>(a.out) + (int64_t(row) * a.num_q_heads + h) * a.head_dim;
  for (int d = 0; d < a.head_dim; ++d) put(out + d, acc[d] * inverse);
  if (a.lse) a.lse[int64_t(row) * a.num_q_heads + h] = top == -INF ? -INF : top + logf(l);
}

// A packed row's result: to its partial, or straight to the output.
template <class T>
inline void emit(const Attention& a, const Unit& u, int packed, float m, float l, const float* acc) {
  int r = packed / a.group, h = u.head * a.group + packed % a.group;
  if (u.dest[r] < 0) {
    finish<T>(a, u.rows[r], h, m, l, acc);
    return;
  }
  int64_t p = int64_t(u.dest[r]) * a.num_q_heads + h;
  a.part_m[p] = m;
  a.part_l[p] = l;
  memcpy(a.part_acc + p * a.head_dim, acc, size_t(a.head_dim) * 4);
}

// The query vector of a packed row, float32, times `factor`.
template <class T>
ANABRANCH_INLINE const T* query(const Attention& a, const Unit& u, int packed) {
  int r = packed / a.group, h = u.head * a.group + packed % a.group;
  return static_cast<const T*>(a.q) + int64_t(u.rows[r]) * a.q_row + int64_t(h) * a.q_head;
}

// Scores leave the dot product in units of `softcap` when there is one.
ANABRANCH_INLINE float query_factor(const Attention& a) { return a.softcap > 0 ? a.scale / a.softcap : a.scale; }

// Bump allocation in the thread's scratch; each piece on its own cache line.
struct Scratch {
  char* next;
  explicit Scratch(void* base) : next(static_cast<char*>(base)) {}
  template <class X>
  X* take(size_t count) {
    char* p = next;
    next += (count * sizeof(X) + LINE - 1) / LINE * LINE;
    return reinterpret_cast<X*>(p);
  }
};

}  // namespace
}  // namespace anabranch::cpu
