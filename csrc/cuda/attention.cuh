// Tree attention: a persistent grid over (work item × KV head), most expensive first.
//
// A block is four warps. A warp owns 16 packed query rows (row of the item × query head of the group) and a share of the
// tokens; how many warps go which way follows from the item: a leaf of few rows has its tokens split over all four warps
// (their results meet in shared memory), 64 rows give each warp 16 rows and all tokens. Registers are the same in every
// layout, so one kernel serves root and leaf, in one launch.
//
// K and V come through a ring of tiles in shared memory, one group of asynchronous copies a tile: K₀ V₀ K₁ V₁ …, one
// barrier each. Where a token lies is worked out once (slot → two offsets), some blocks ahead of its copies, so that no
// copy waits for an address. 16-bit types multiply on tensor cores; float32 by FMA, in the same register layout.
//
// Which block computes what is fixed by the plan and the grid alone: no atomics, nothing to reset between replays.
#pragma once

#include <cmath>

#include "cuda/params.hpp"
#include "cuda/ptx.cuh"

namespace anabranch::cuda {

constexpr int kWarps = kThreads / 32;
constexpr int kAhead = 4;  // blocks whose addresses are kept: (kMaxRing + 1) / 2
constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

ANABRANCH_DEVICE float minus_infinity() { return -INFINITY; }
ANABRANCH_DEVICE int smaller(int a, int b) { return a < b ? a : b; }
ANABRANCH_DEVICE int larger(int a, int b) { return a > b ? a : b; }
ANABRANCH_DEVICE float larger(float a, float b) { return ::fmaxf(a, b); }

// Sizes of one variant. D is head_dim rounded up to one that is compiled: columns past head_dim are zeros.
template <class T, int D>
struct Shape {
  static constexpr bool kHalf = sizeof(T) == 2;
  static constexpr int kBlock = kHalf ? 64 : 32;  // tokens a tile
  static constexpr int kKeys = kHalf ? 16 : 8;    // tokens a warp multiplies at once
  static constexpr int kRows = kHalf ? (D <= 128 ? 64 : 32) : (D <= 128 ? 32 : 16);  // packed rows a pass
  static constexpr int kSteps = kBlock / kKeys / (kWarps / (kRows / 16));            // at most, a warp and tile
  static constexpr int kGranule = 16 / static_cast<int>(sizeof(T));                  // elements a copy
  static constexpr int kGranules = D / kGranule;
  static constexpr int kPitch = (kGranules | 1) * 16;  // bytes a row; odd in units of 16: no bank conflicts
  static constexpr int kTile = kBlock * kPitch;
  static constexpr bool kKeepQ = kHalf && D <= 128;  // queries in registers, their bytes in the ring's last tile
  static constexpr int kQueries = kKeepQ ? 0 : kRows * kPitch;
  static constexpr int kAccPitch = D + 8;  // floats
  static constexpr int kResults = kWarps * 16 * kAccPitch * 4;
  static_assert(D % 16 == 0 && kRows <= kBlock * 2 && kSteps >= 1, "a shape that the kernel cannot lay out");

  // Shared memory: [ring | queries], over it the results of the warps; then what must outlive neither.
  static ANABRANCH_BOTH constexpr int ring_bytes(int ring) {
    const int streamed = ring * kTile + kQueries;
    return streamed > kResults ? streamed : kResults;
  }
  static constexpr int kOffsets = kAhead * 2 * kBlock * 8, kPositions = kAhead * kBlock * 4, kStats = kWarps * 16 * 8;
  static ANABRANCH_BOTH constexpr int shared_bytes(int ring) {
    return ring_bytes(ring) + kOffsets + kPositions + kStats + kWarps * 8;
  }
};

// tanh to about 1e-7 of its value.
ANABRANCH_DEVICE float tanh_of(float x) {
  const float x2 = x * x;
  // Near zero 1 − 2/(e^2x + 1) loses all its digits, and softcap leaves most scores exactly there.
  if (x2 < 0.0625f)
    return x * (1.0f + x2 * (-1.0f / 3 + x2 * (2.0f / 15 + x2 * (-17.0f / 315 + x2 * (62.0f / 2835)))));
  const float e = ptx::exp2(-2.0f * kLog2e * (x < 0 ? -x : x));
  const float y = (1.0f - e) / (1.0f + e);
  return x < 0 ? -y : y;
}

// Exponents of all ones, twice (of two 16-bit elements).
ANABRANCH_DEVICE constexpr u32 exponents(bf16) { return 0x7f807f80u; }
ANABRANCH_DEVICE constexpr u32 exponents(f16) { return 0x7c007c00u; }

// Puts 0 in the place of infinities and NaN; not 0 where there were some.
template <class T>
ANABRANCH_DEVICE u32 without_infinities(T, u32& pair) {
  constexpr u32 all = exponents(T{});
  const u32 top = ((pair & all) + (all & (~all << 1))) & 0x80008000u;  // the lowest bit of the exponents carries up
  pair &= ~((top >> 15) * 0xffffu);
  return top;
}
// 0 for what is finite.
template <class T>
ANABRANCH_DEVICE float infinity_of(T, u32 half) {
  constexpr u32 all = exponents(T{}) & 0xffffu;
  if ((half & all) != all) return 0;
  return ptx::number((half & 0x8000u) << 16 | 0x7f800000u | ((half & 0x7fffu) != all ? 0x400000u : 0u));
}

// The tokens of one pass on their way into the ring.
template <class T, int D>
struct Stream {
  using S = Shape<T, D>;
  const Attention& a;
  char* ring;
  i64* offsets;    // [kAhead][K, V][kBlock]; −1: no token there, zeros instead
  i32* positions;  // [kAhead][kBlock]
  i64 kv_begin;
  int head, first_block, first, end, row_pos_min;
  int tile, in_slot, out_slot;  // the round, and where in the ring it is read and written

  struct Entry {
    i32 slot, position;
  };

  // This thread's token of a block: threads 0 … kBlock − 1 work out where K lies, the next kBlock where V does.
  ANABRANCH_DEVICE Entry fetch(int block) const {
    const int which = ptx::thread() / S::kBlock;
    const int n = (first_block + block) * S::kBlock + ptx::thread() % S::kBlock;
    Entry e{-1, 0};
    if (which < 2 && n >= first && n < end) {
      e.slot = ptx::load(a.kv_slots + kv_begin + n);
      if (a.windowed) {
        e.position = ptx::load(a.kv_positions + kv_begin + n);
        if (row_pos_min - e.position >= a.window) e.slot = -1;  // nobody sees it, and it may be gone
      }
    }
    return e;
  }
  ANABRANCH_DEVICE void publish(int block, const Entry& e) const {
    const int which = ptx::thread() / S::kBlock, token = ptx::thread() % S::kBlock;
    if (which >= 2) return;
    i64 offset = -1;
    if (e.slot >= 0) {
      const int page = a.page_shift >= 0 ? e.slot >> a.page_shift : e.slot / a.page_size;
      const int within = e.slot - page * a.page_size;
      const Pages& pages = which == 0 ? a.k : a.v;
      offset = page * pages.page + within * pages.slot + head * pages.head;
    }
    const int at = block % kAhead;
    ptx::store(offsets + (at * 2 + which) * S::kBlock + token, offset);
    if (which == 0 && a.windowed) ptx::store(positions + at * S::kBlock + token, e.position);
  }
  // Starts the copies of a tile (even: K, odd: V of block tile / 2).
  ANABRANCH_DEVICE void issue(int which_tile, int tiles, int slot) const {
    if (which_tile < tiles) {
      const bool is_v = which_tile & 1;
      const T* base = static_cast<const T*>(is_v ? a.v.data : a.k.data);
      const i64* from = offsets + (((which_tile >> 1) % kAhead) * 2 + is_v) * S::kBlock;
      char* to = ring + slot * S::kTile;
      const int used = a.head_dim / S::kGranule;
      ANABRANCH_UNROLL_BY_4  // all at once, their addresses push the accumulator out of the registers
      for (int i = 0; i < S::kBlock * S::kGranules / kThreads; ++i) {
        const int at = i * kThreads + ptx::thread();
        const int row = at / S::kGranules, column = at % S::kGranules;
        const i64 offset = ptx::load(from + row);
        const bool keep = offset >= 0 && column < used;
        ptx::copy_async(to + row * S::kPitch + column * 16, keep ? base + offset + column * S::kGranule : base,
                        keep ? 16 : 0);
      }
    }
    ptx::copy_commit();  // an empty group counts too, so that waits can count groups
  }
  // One round: the tile that is due has landed, for everybody, and the next one is on its way into the slot that the
  // tile before this one has left.
  ANABRANCH_DEVICE const char* next(int tiles, Entry& ahead) {
    ptx::copy_wait(a.ring - 2, Site::tile_landed);
    ptx::sync_block(Site::tile_visible);
    const int t = tile++;
    if (((t + a.ring) & 1) == 0) {
      const int block = (t + a.ring) >> 1;
      publish(block, ahead);
      ahead = fetch(block + 1);
    }
    issue(t + a.ring - 1, tiles, in_slot);
    const char* due = ring + out_slot * S::kTile;
    in_slot = out_slot;
    out_slot = out_slot + 1 == a.ring ? 0 : out_slot + 1;
    return due;
  }
};

// What a warp holds: 16 rows, of which a lane has two (g = lane / 4 and g + 8), and of each 8 columns it has two.
template <class T, int D>
struct Tile {
  using S = Shape<T, D>;
  float m[2], l[2];          // l: this lane's columns only, until the end
  float acc[D / 8][4];       // [8 columns][row g: 2, row g + 8: 2]
  u32 q[S::kKeepQ ? D / 16 : 1][4];
  u32 p[S::kSteps][4];       // probabilities: 16 tokens as the A operand of mma, or 8 as float32 bits
  u32 seen;                  // of the block at hand, bit 4 i + c: the row of s[i][c] sees that token, or it is not there
  int warp_m, warp_n, steps;

  ANABRANCH_DEVICE void clear() {
    ANABRANCH_UNROLL
    for (int i = 0; i < D / 8; ++i)
      ANABRANCH_UNROLL
      for (int c = 0; c < 4; ++c) acc[i][c] = 0;
    m[0] = m[1] = minus_infinity();
    l[0] = l[1] = 0;
  }

  // Lane 8i + r addresses row r of 8×8 matrix i; matrices go down first (A: rows) or right first (B: K).
  static ANABRANCH_DEVICE int down(int lane) { return (lane & 7) + (lane & 8); }
  static ANABRANCH_DEVICE int down_right(int lane) { return (lane & 16) ? 16 : 0; }
  static ANABRANCH_DEVICE int right(int lane) { return (lane & 7) + ((lane & 16) ? 8 : 0); }
  static ANABRANCH_DEVICE int right_down(int lane) { return (lane & 8) ? 16 : 0; }

  ANABRANCH_DEVICE void load_queries(const char* queries) {
    if constexpr (S::kKeepQ) {
      const int lane = ptx::thread() & 31;
      const char* row = queries + (warp_m * 16 + down(lane)) * S::kPitch + down_right(lane);
      ANABRANCH_UNROLL
      for (int k = 0; k < D / 16; ++k) ptx::ldmatrix_x4(q[k], row + k * 32);
    }
  }

  // s[i]: 8 tokens from kKeys · (warp_n · steps) + 8 i on.
  ANABRANCH_DEVICE void multiply_keys(float (&s)[S::kSteps * S::kKeys / 8][4], const char* keys, const char* queries) {
    const int lane = ptx::thread() & 31, first_key = warp_n * steps * S::kKeys;
    ANABRANCH_UNROLL
    for (int i = 0; i < S::kSteps * S::kKeys / 8; ++i) s[i][0] = s[i][1] = s[i][2] = s[i][3] = 0;
    if constexpr (S::kHalf) {
      const char* key = keys + (first_key + right(lane)) * S::kPitch + right_down(lane);
      const char* query = queries + (warp_m * 16 + down(lane)) * S::kPitch + down_right(lane);
      ANABRANCH_UNROLL
      for (int k = 0; k < D / 16; ++k) {
        if constexpr (!S::kKeepQ) ptx::ldmatrix_x4(q[0], query + k * 32);
        ANABRANCH_UNROLL
        for (int step = 0; step < S::kSteps; ++step) {
          if (step >= steps) break;
          u32 b[4];
          ptx::ldmatrix_x4(b, key + step * 16 * S::kPitch + k * 32);
          ptx::mma(T{}, s[2 * step], q[S::kKeepQ ? k : 0], b[0], b[1]);
          ptx::mma(T{}, s[2 * step + 1], q[S::kKeepQ ? k : 0], b[2], b[3]);
        }
      }
    } else {
      const char* key = keys + (first_key + 2 * (lane & 3)) * S::kPitch;
      const char* query = queries + (warp_m * 16 + lane / 4) * S::kPitch;
      ANABRANCH_NO_UNROLL
      for (int k = 0; k < D / 4; ++k) {
        const Float4 q0 = ptx::load(reinterpret_cast<const Float4*>(query + k * 16));
        const Float4 q1 = ptx::load(reinterpret_cast<const Float4*>(query + 8 * S::kPitch + k * 16));
        ANABRANCH_UNROLL
        for (int step = 0; step < S::kSteps; ++step) {
          if (step >= steps) break;
          ANABRANCH_UNROLL
          for (int c = 0; c < 2; ++c) {
            const Float4 b = ptx::load(reinterpret_cast<const Float4*>(key + (step * 8 + c) * S::kPitch + k * 16));
            s[step][c] += q0.x * b.x + q0.y * b.y + q0.z * b.z + q0.w * b.w;
            s[step][2 + c] += q1.x * b.x + q1.y * b.y + q1.z * b.z + q1.w * b.w;
          }
        }
      }
    }
  }

  // Scores in units of log 2 → p, m, l; what was summed before is brought to the new maximum.
  ANABRANCH_DEVICE void soften(float (&s)[S::kSteps * S::kKeys / 8][4]) {
    float top[2] = {m[0], m[1]}, reference[2], alpha[2];
    ANABRANCH_UNROLL
    for (int i = 0; i < S::kSteps * S::kKeys / 8; ++i) {
      if (i >= steps * S::kKeys / 8) break;
      ANABRANCH_UNROLL
      for (int c = 0; c < 4; ++c) top[c >> 1] = larger(top[c >> 1], s[i][c]);
    }
    ANABRANCH_UNROLL
    for (int r = 0; r < 2; ++r) {
      top[r] = larger(top[r], ptx::shuffle_xor(top[r], 1));
      top[r] = larger(top[r], ptx::shuffle_xor(top[r], 2));
      reference[r] = top[r] == minus_infinity() ? 0 : top[r];  // −inf − (−inf) is NaN, −inf − 0 is not
      alpha[r] = ptx::exp2(m[r] - reference[r]);
      m[r] = top[r];
    }
    if (ptx::any(alpha[0] != 1 || alpha[1] != 1)) {
      ANABRANCH_UNROLL
      for (int i = 0; i < D / 8; ++i)
        ANABRANCH_UNROLL
        for (int c = 0; c < 4; ++c) acc[i][c] *= alpha[c >> 1];
      l[0] *= alpha[0];
      l[1] *= alpha[1];
    }
    ANABRANCH_UNROLL
    for (int i = 0; i < S::kSteps * S::kKeys / 8; ++i) {
      if (i >= steps * S::kKeys / 8) break;
      ANABRANCH_UNROLL
      for (int c = 0; c < 4; ++c) {
        s[i][c] = ptx::exp2(s[i][c] - reference[c >> 1]);
        l[c >> 1] += s[i][c];
      }
      if constexpr (S::kHalf) {
        p[i / 2][i % 2 * 2] = ptx::pack(T{}, s[i][0], s[i][1]);
        p[i / 2][i % 2 * 2 + 1] = ptx::pack(T{}, s[i][2], s[i][3]);
      } else {
        ANABRANCH_UNROLL
        for (int c = 0; c < 4; ++c) p[i][c] = ptx::bits(s[i][c]);
      }
    }
  }

  // A token that a row does not see has probability 0, and 0 · NaN is NaN: guarded, infinities and NaN are left out of
  // the tensor cores' product and given to the rows that see them. FMAs leave out what has probability 0.
  template <bool GUARDED>
  ANABRANCH_DEVICE void add_values(const char* values) {
    [[maybe_unused]] u32 odd = 0;
    const int lane = ptx::thread() & 31, first_key = warp_n * steps * S::kKeys;
    if constexpr (S::kHalf) {
      const char* value = values + (first_key + down(lane)) * S::kPitch + down_right(lane);
      ANABRANCH_UNROLL
      for (int step = 0; step < S::kSteps; ++step) {
        if (step >= steps) break;
        ANABRANCH_UNROLL
        for (int i = 0; i < D / 16; ++i) {
          u32 b[4];
          ptx::ldmatrix_x4_trans(b, value + step * 16 * S::kPitch + i * 32);
          if constexpr (GUARDED) {
            ANABRANCH_UNROLL
            for (int k = 0; k < 4; ++k) odd |= without_infinities(T{}, b[k]);
          }
          ptx::mma(T{}, acc[2 * i], p[step], b[0], b[1]);
          ptx::mma(T{}, acc[2 * i + 1], p[step], b[2], b[3]);
        }
      }
    } else {
      const char* value = values + first_key * S::kPitch + (lane & 3) * 8;
      ANABRANCH_UNROLL
      for (int step = 0; step < S::kSteps; ++step) {
        if (step >= steps) break;
        ANABRANCH_NO_UNROLL  // unrolled, the values of all eight keys want registers at once
        for (int key = 0; key < 8; ++key) {
          const int holder = (lane & ~3) | (key >> 1);
          const float p0 = ptx::shuffle(ptx::number(key & 1 ? p[step][1] : p[step][0]), holder);
          const float p1 = ptx::shuffle(ptx::number(key & 1 ? p[step][3] : p[step][2]), holder);
          ANABRANCH_UNROLL
          for (int i = 0; i < D / 8; ++i) {
            const Float2 v = ptx::load(reinterpret_cast<const Float2*>(value + (step * 8 + key) * S::kPitch + i * 32));
            if (!GUARDED || p0 != 0) {
              acc[i][0] += p0 * v.x;
              acc[i][1] += p0 * v.y;
            }
            if (!GUARDED || p1 != 0) {
              acc[i][2] += p1 * v.x;
              acc[i][3] += p1 * v.y;
            }
          }
        }
      }
    }
    if constexpr (GUARDED && S::kHalf)
      if (ptx::any(odd != 0)) add_infinities(values);
  }

  ANABRANCH_DEVICE void add_infinities(const char* values) {
    const int lane = ptx::thread() & 31;
    const char* value = values + warp_n * steps * S::kKeys * S::kPitch + (lane & 3) * 2 * sizeof(T);
    ANABRANCH_NO_UNROLL
    for (int key = 0; key < steps * S::kKeys; ++key, value += S::kPitch) {
      const u32 sees = ptx::shuffle(seen, (lane & ~3) | (key >> 1 & 3)) >> (key / 8 * 4 + (key & 1));
      ANABRANCH_UNROLL
      for (int i = 0; i < D / 8; ++i) {
        const u32 pair = ptx::load(reinterpret_cast<const u32*>(value + i * 16));
        const float x[2] = {infinity_of(T{}, pair & 0xffff), infinity_of(T{}, pair >> 16)};
        ANABRANCH_UNROLL
        for (int c = 0; c < 4; ++c)
          if (sees >> (c & 2) & 1) acc[i][c] += x[c & 1];
      }
    }
  }
};

// Four columns of the output.
template <class T>
ANABRANCH_DEVICE void store_columns(T* to, const Float4& v) {
  if constexpr (sizeof(T) == 2)
    ptx::store(reinterpret_cast<Int2*>(to),
               Int2{static_cast<i32>(ptx::pack(T{}, v.x, v.y)), static_cast<i32>(ptx::pack(T{}, v.z, v.w))});
  else
    ptx::store(reinterpret_cast<Float4*>(to), v);
}

// m (units of log 2), l and what acc must be divided by, with the sink counted: here and nowhere else.
struct Final {
  float weight, lse;
  ANABRANCH_DEVICE Final(const Attention& a, int q_head, float m, float l) {
    float top = m, shrink = 1;
    if (a.sinks != nullptr) {
      const float sink = ptx::load(a.sinks + q_head) * kLog2e;
      if (sink != minus_infinity()) {
        top = larger(m, sink);
        shrink = ptx::exp2(m - top);
        l = l * shrink + ptx::exp2(sink - top);
      }
    }
    weight = l == 0 ? 0 : shrink / l;  // l is 0 only where nothing was visible; NaN stays NaN
    lse = top == minus_infinity() ? top : (top + ptx::log2(l)) * kLn2;
  }
};

// The results of all warps that share a row, in the order of their tokens, to the row's partial or to the output.
template <class T, int D>
ANABRANCH_DEVICE void emit(const Attention& a, const float* results, const Float2* stats, int rows_here, int warps_m,
                           int warps_n, int row_begin, int packed_begin, int head) {
  using S = Shape<T, D>;
  ANABRANCH_NO_UNROLL
  for (int e = ptx::thread(); e < rows_here * (D / 4); e += kThreads) {
    const int r = e / (D / 4), column = e % (D / 4) * 4;
    if (column >= a.head_dim) continue;
    float m = minus_infinity();
    for (int w = 0; w < warps_n; ++w) m = larger(m, ptx::load(stats + (w * warps_m + r / 16) * 16 + r % 16).x);
    const float reference = m == minus_infinity() ? 0 : m;
    float l = 0;
    Float4 acc{0, 0, 0, 0};
    for (int w = 0; w < warps_n; ++w) {
      const int at = (w * warps_m + r / 16) * 16 + r % 16;
      const Float2 stat = ptx::load(stats + at);
      const float weight = ptx::exp2(stat.x - reference);
      const Float4 part = ptx::load(reinterpret_cast<const Float4*>(results + at * S::kAccPitch + column));
      l += weight * stat.y;
      acc = Float4{acc.x + weight * part.x, acc.y + weight * part.y, acc.z + weight * part.z, acc.w + weight * part.w};
    }
    const int packed = packed_begin + r, at = row_begin + packed / a.group;
    const int q_head = head * a.group + packed % a.group;
    const int dest = ptx::load(a.dest + at);
    if (dest >= 0) {
      const i64 part = static_cast<i64>(dest) * a.num_q_heads + q_head;
      if (column == 0) ptx::store(reinterpret_cast<Float2*>(a.part_ml) + part, Float2{m, l});
      // (the merge never reads the acc of an empty partial, nor is it written)
      if (m != minus_infinity()) ptx::store(reinterpret_cast<Float4*>(a.part_acc + part * a.head_dim + column), acc);
    } else {
      const i64 row = static_cast<i64>(ptx::load(a.rows + at)) * a.num_q_heads + q_head;
      const Final f(a, q_head, m, l);
      if (column == 0 && a.lse != nullptr) ptx::store(a.lse + row, f.lse);
      store_columns(static_cast<T*>(a.out) + row * a.head_dim + column,
                    Float4{acc.x * f.weight, acc.y * f.weight, acc.z * f.weight, acc.w * f.weight});
    }
  }
}

// kRows packed rows from `packed_begin` on of one (item × KV head), from its first token to its last.
template <class T, int D>
ANABRANCH_DEVICE void attend(const Attention& a, const Int4& kv, const Int4& seen, int head, int packed_begin) {
  using S = Shape<T, D>;
  char* const memory = ptx::shared_memory();
  char* const behind = memory + S::ring_bytes(a.ring);
  i64* const offsets = reinterpret_cast<i64*>(behind);
  i32* const positions = reinterpret_cast<i32*>(behind + S::kOffsets);
  Float2* const stats = reinterpret_cast<Float2*>(behind + S::kOffsets + S::kPositions);
  Int2* const ends = reinterpret_cast<Int2*>(behind + S::kOffsets + S::kPositions + S::kStats);

  const int kv_len = kv.y, row_begin = kv.z, packed = kv.w * a.group;
  const bool masked = seen.x != 0;
  const int rows_here = smaller(packed - packed_begin, S::kRows);
  const int thread = ptx::thread(), lane = thread & 31, warp = thread / 32;
  const int warps_m = (rows_here + 15) / 16, warps_n = kWarps / warps_m;
  Tile<T, D> tile;
  tile.warp_m = warp % warps_m;
  tile.warp_n = warp / warps_m;
  tile.steps = S::kBlock / S::kKeys / warps_n;
  const bool working = tile.warp_n < warps_n;

  // How far the rows see: this pass's at most, this warp's at least, this lane's two.
  int end = kv_len;
  if (masked) {
    end = 0;
    for (int i = packed_begin / a.group + lane; i <= (packed_begin + rows_here - 1) / a.group; i += 32)
      end = larger(end, ptx::load(a.limits + row_begin + i));
    ANABRANCH_UNROLL
    for (int d = 16; d > 0; d >>= 1) end = larger(end, ptx::shuffle_xor(end, d));
  }
  int first = 0;
  if (a.windowed) {
    // What the earliest row cannot see, none can: the first and the last visible token bound the stream.
    int last = 0;
    first = end;
    if (seen.z - seen.y < a.window)
      for (int n = thread; n < end; n += kThreads)
        if (seen.z - ptx::load(a.kv_positions + kv.x + n) < a.window) {
          first = smaller(first, n);
          last = n + 1;
        }
    ANABRANCH_UNROLL
    for (int d = 16; d > 0; d >>= 1) {
      first = smaller(first, ptx::shuffle_xor(first, d));
      last = larger(last, ptx::shuffle_xor(last, d));
    }
    if (lane == 0) ptx::store(ends + warp, Int2{first, last});
    ptx::sync_block(Site::window_reduced);
    ANABRANCH_UNROLL
    for (int w = 0; w < kWarps; ++w) {
      const Int2 other = ptx::load(ends + w);
      first = smaller(first, other.x);
      last = larger(last, other.y);
    }
    end = last;
  }
  int limit[2], position[2];
  ANABRANCH_UNROLL
  for (int i = 0; i < 2; ++i) {
    const int r = packed_begin + tile.warp_m * 16 + lane / 4 + 8 * i;  // a row past the last sees all: nobody asks it
    limit[i] = end;
    position[i] = 0;
    if (r >= packed) continue;
    if (masked) limit[i] = smaller(end, ptx::load(a.limits + row_begin + r / a.group));
    if (a.windowed) position[i] = ptx::load(a.row_positions + ptx::load(a.rows + row_begin + r / a.group));
  }
  int least = smaller(limit[0], limit[1]);
  ANABRANCH_UNROLL
  for (int d = 4; d < 32; d <<= 1) least = smaller(least, ptx::shuffle_xor(least, d));

  tile.clear();
  const int first_block = first / S::kBlock;
  const int tiles = end > first ? 2 * ((end + S::kBlock - 1) / S::kBlock - first_block) : 0;
  if (tiles > 0) {
    Stream<T, D> stream{a,   memory,      offsets, positions, kv.x, head, first_block,
                        first, end, seen.z, 0, a.ring - 1, 0};
    typename Stream<T, D>::Entry entries[kAhead], ahead;
    const int prepared = (a.ring + 1) / 2;
    ANABRANCH_UNROLL
    for (int b = 0; b < kAhead; ++b)
      if (b < prepared) entries[b] = stream.fetch(b);
    ANABRANCH_UNROLL
    for (int b = 0; b < kAhead; ++b)
      if (b < prepared) stream.publish(b, entries[b]);
    ahead = stream.fetch(prepared);
    ptx::sync_block(Site::offsets_visible);

    // Queries: into the ring's last tile, from where they go to registers before that tile is needed, or to their own.
    char* const queries = memory + (S::kKeepQ ? (a.ring - 1) * S::kTile : a.ring * S::kTile);
    const int used = a.head_dim / S::kGranule;
    ANABRANCH_NO_UNROLL
    for (int at = thread; at < warps_m * 16 * S::kGranules; at += kThreads) {
      const int r = at / S::kGranules, column = at % S::kGranules, p = packed_begin + r;
      const T* from = static_cast<const T*>(a.q);
      const bool keep = r < rows_here && column < used;
      if (keep)
        from += ptx::load(a.rows + row_begin + p / a.group) * a.q_row + (head * a.group + p % a.group) * a.q_head +
                column * S::kGranule;
      ptx::copy_async(queries + r * S::kPitch + column * 16, from, keep ? 16 : 0);
    }
    ptx::copy_commit();
    for (int t = 0; t < a.ring - 1; ++t) stream.issue(t, tiles, t);
    if constexpr (S::kKeepQ) {
      ptx::copy_wait(a.ring - 1, Site::queries_landed);
      ptx::sync_block(Site::queries_visible);
      tile.load_queries(queries);
    }

    const float factor = a.softcap > 0 ? a.scale / a.softcap : a.scale * kLog2e, cap = a.softcap * kLog2e;
    ANABRANCH_NO_UNROLL
    for (int block = 0; block < tiles / 2; ++block) {
      const char* keys = stream.next(tiles, ahead);
      bool hidden = false;  // some row of this warp does not see some token
      if (working) {
        float s[S::kSteps * S::kKeys / 8][4];
        tile.multiply_keys(s, keys, queries);
        ANABRANCH_UNROLL
        for (int i = 0; i < S::kSteps * S::kKeys / 8; ++i)
          ANABRANCH_UNROLL
          for (int c = 0; c < 4; ++c) s[i][c] *= factor;
        if (a.softcap > 0) {
          ANABRANCH_UNROLL
          for (int i = 0; i < S::kSteps * S::kKeys / 8; ++i)
            ANABRANCH_UNROLL
            for (int c = 0; c < 4; ++c) s[i][c] = cap * tanh_of(s[i][c]);
        }
        const int block_begin = (first_block + block) * S::kBlock;
        if (a.windowed || block_begin + S::kBlock > least) {
          tile.seen = ~0u;
          const int key = tile.warp_n * tile.steps * S::kKeys + 2 * (lane & 3);
          ANABRANCH_UNROLL
          for (int i = 0; i < S::kSteps * S::kKeys / 8; ++i) {
            if (i >= tile.steps * S::kKeys / 8) break;
            const int n = block_begin + key + 8 * i;
            Int2 at{0, 0};
            if (a.windowed)
              at = ptx::load(reinterpret_cast<const Int2*>(positions + block % kAhead * S::kBlock + key + 8 * i));
            ANABRANCH_UNROLL
            for (int c = 0; c < 4; ++c) {
              bool visible = n + (c & 1) < limit[c >> 1];
              if (a.windowed)
                visible = visible && n + (c & 1) >= first && position[c >> 1] - (c & 1 ? at.y : at.x) < a.window;
              if (!visible) s[i][c] = minus_infinity();
              if (!visible && n + (c & 1) < end) tile.seen &= ~(1u << (4 * i + c));
            }
          }
          hidden = ptx::any(tile.seen != ~0u);
        }
        tile.soften(s);
      }
      const char* values = stream.next(tiles, ahead);
      if (working) {
        if (hidden)
          tile.template add_values<true>(values);
        else
          tile.template add_values<false>(values);
      }
    }
  }

  ptx::sync_block(Site::ring_done);
  float* const results = reinterpret_cast<float*>(memory);
  ANABRANCH_UNROLL
  for (int r = 0; r < 2; ++r) {
    tile.l[r] += ptx::shuffle_xor(tile.l[r], 1);
    tile.l[r] += ptx::shuffle_xor(tile.l[r], 2);
  }
  if (working) {
    ANABRANCH_UNROLL
    for (int r = 0; r < 2; ++r) {
      const int at = warp * 16 + lane / 4 + 8 * r;
      if ((lane & 3) == 0) ptx::store(stats + at, Float2{tile.m[r], tile.l[r]});
      ANABRANCH_UNROLL
      for (int i = 0; i < D / 8; ++i)
        ptx::store(reinterpret_cast<Float2*>(results + at * S::kAccPitch + i * 8 + 2 * (lane & 3)),
                   Float2{tile.acc[i][2 * r], tile.acc[i][2 * r + 1]});
    }
  }
  ptx::sync_block(Site::results_visible);
  emit<T, D>(a, results, stats, rows_here, warps_m, warps_n, row_begin, packed_begin, head);
}

template <class T, int D>
ANABRANCH_KERNEL(kThreads, 2)
void attention_kernel(const Attention a) {
  const int num_items = a.counts == nullptr ? a.num_items : ptx::load(a.counts);
  const i64 units = static_cast<i64>(num_items) * a.num_kv_heads;
  // Back and forth over the sorted units: the block that had the dearest of one round has the cheapest of the next.
  for (i64 round = 0, begin = 0; begin < units; ++round, begin += ptx::blocks()) {
    const i64 unit = begin + (round & 1 ? ptx::blocks() - 1 - ptx::block() : ptx::block());
    if (unit >= units) continue;
    const i64 item = unit / a.num_kv_heads;  // heads of an item are neighbours: they read the same slots and rows
    const Int4 kv = ptx::load(reinterpret_cast<const Int4*>(a.items) + 2 * item);
    const Int4 seen = ptx::load(reinterpret_cast<const Int4*>(a.items) + 2 * item + 1);
    for (int p = 0; p < kv.w * a.group; p += Shape<T, D>::kRows)
      attend<T, D>(a, kv, seen, static_cast<int>(unit % a.num_kv_heads), p);
  }
}

}  // namespace anabranch::cuda
