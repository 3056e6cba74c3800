// What a warp computes with: 16 packed rows of queries, their scores against one tile of K, and the sums over V.
#pragma once

#include "cuda/shape.cuh"

namespace anabranch::cuda {

// Which of an item's tokens a lane's two rows see: the first `limit` and, with a window, those that are near enough.
struct Sight {
  int end;          // no row of the pass sees a token from here on; there are none
  int limit[2];     // at most end
  int position[2];  // of the rows; with a window only
  int least;        // limit of the warp's rows
  int window;

  ANABRANCH_DEVICE bool sees(bool windowed, int row, int token, int token_position) const {
    return token < limit[row] && (!windowed || position[row] - token_position < window);
  }
};

// A lane has two of the 16 rows (g = lane / 4 and g + 8), and of each 8 columns it has two. STEPS: how often the warp
// multiplies kKeys tokens of a tile; the tile's other tokens are other warps'.
template <class T, int D, int STEPS>
struct Tile {
  using S = Shape<T, D>;
  static constexpr int kScores = STEPS * S::kKeys / 8;
  using Scores = float[kScores][4];
  float m[2], l[2];     // l: this lane's columns only, until the end
  float acc[D / 8][4];  // [8 columns][row g: 2, row g + 8: 2]
  u32 q[S::kKeepQ ? D / 16 : 1][4];
  u32 p[STEPS][4];  // probabilities: 16 tokens as the A operand of mma, or 8 as float32 bits
  int warp_m, first_key;

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

  // s[i]: 8 tokens from first_key + 8 i on.
  ANABRANCH_DEVICE void multiply_keys(Scores& s, const char* keys, const char* queries) {
    const int lane = ptx::thread() & 31;
    ANABRANCH_UNROLL
    for (int i = 0; i < kScores; ++i) s[i][0] = s[i][1] = s[i][2] = s[i][3] = 0;
    if constexpr (S::kHalf) {
      const char* key = keys + (first_key + right(lane)) * S::kPitch + right_down(lane);
      const char* query = queries + (warp_m * 16 + down(lane)) * S::kPitch + down_right(lane);
      ANABRANCH_UNROLL
      for (int k = 0; k < D / 16; ++k) {
        if constexpr (!S::kKeepQ) ptx::ldmatrix_x4(q[0], query + k * 32);
        ANABRANCH_UNROLL
        for (int step = 0; step < STEPS; ++step) {
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
        for (int step = 0; step < STEPS; ++step) {
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

  // Units of log 2, after the cap where there is one.
  static ANABRANCH_DEVICE void scale(Scores& s, float factor, bool capped, float cap) {
    ANABRANCH_UNROLL
    for (int i = 0; i < kScores; ++i)
      ANABRANCH_UNROLL
      for (int c = 0; c < 4; ++c) s[i][c] *= factor;
    if (!capped) return;
    ANABRANCH_UNROLL
    for (int i = 0; i < kScores; ++i)
      ANABRANCH_UNROLL
      for (int c = 0; c < 4; ++c) s[i][c] = cap * tanh_of(s[i][c]);
  }

  // −inf for what a row does not see. block: the item's token that the tile begins with; positions: of the tile's tokens.
  // Returns whether some row of the warp does not see some token that is there.
  template <bool WINDOWED>
  ANABRANCH_DEVICE bool mask(Scores& s, const Sight& sight, int block, const i32* positions) const {
    const int key = first_key + 2 * (ptx::thread() & 3);
    bool hidden = false;
    ANABRANCH_UNROLL
    for (int i = 0; i < kScores; ++i) {
      Int2 at{0, 0};
      if constexpr (WINDOWED) at = ptx::load(reinterpret_cast<const Int2*>(positions + key + 8 * i));
      ANABRANCH_UNROLL
      for (int c = 0; c < 4; ++c) {
        const int token = block + key + 8 * i + (c & 1);
        const bool visible = sight.sees(WINDOWED, c >> 1, token, c & 1 ? at.y : at.x);
        s[i][c] = visible ? s[i][c] : minus_infinity();
        if constexpr (WINDOWED) hidden |= !visible & (token < sight.end);
      }
    }
    if constexpr (WINDOWED) return ptx::any(hidden);
    return sight.least < smaller(sight.end, block + S::kBlock);
  }

  // Scores in units of log 2 → p, m, l; what was summed before is brought to the new maximum.
  ANABRANCH_DEVICE void online_softmax(Scores& s) {
    float top[2] = {m[0], m[1]}, reference[2], alpha[2];
    ANABRANCH_UNROLL
    for (int i = 0; i < kScores; ++i)
      ANABRANCH_UNROLL
      for (int c = 0; c < 4; ++c) top[c >> 1] = larger(top[c >> 1], s[i][c]);
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
    for (int i = 0; i < kScores; ++i) {
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

  // GUARDED, for FMAs: they leave out what has probability 0, for 0 · NaN is NaN. Tensor cores cannot; see below.
  template <bool GUARDED>
  ANABRANCH_DEVICE void add_values(const char* values) {
    const int lane = ptx::thread() & 31;
    if constexpr (S::kHalf) {
      const char* value = values + (first_key + down(lane)) * S::kPitch + down_right(lane);
      ANABRANCH_UNROLL
      for (int step = 0; step < STEPS; ++step) {
        ANABRANCH_UNROLL
        for (int i = 0; i < D / 16; ++i) {
          u32 b[4];
          ptx::ldmatrix_x4_trans(b, value + step * 16 * S::kPitch + i * 32);
          ptx::mma(T{}, acc[2 * i], p[step], b[0], b[1]);
          ptx::mma(T{}, acc[2 * i + 1], p[step], b[2], b[3]);
        }
      }
    } else {
      const char* value = values + first_key * S::kPitch + (lane & 3) * 8;
      ANABRANCH_UNROLL
      for (int step = 0; step < STEPS; ++step) {
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
  }

  // Of 16-bit types: whether this warp's tokens of a tile of V hold infinities or NaN, which a product with probability 0
  // would give to rows that do not see them.
  ANABRANCH_DEVICE bool holds_infinities(const char* values) const {
    u32 zeros = 0;  // sums of x · 0: NaN for those alone
    ANABRANCH_UNROLL_BY_4
    for (int at = ptx::thread() & 31; at < STEPS * S::kKeys * S::kGranules; at += 32) {
      const char* from = values + (first_key + at / S::kGranules) * S::kPitch + at % S::kGranules * 16;
      const Int4 x = ptx::load(reinterpret_cast<const Int4*>(from));
      zeros = ptx::plus_zero_times(T{}, zeros, static_cast<u32>(x.x));
      zeros = ptx::plus_zero_times(T{}, zeros, static_cast<u32>(x.y));
      zeros = ptx::plus_zero_times(T{}, zeros, static_cast<u32>(x.z));
      zeros = ptx::plus_zero_times(T{}, zeros, static_cast<u32>(x.w));
    }
    return ptx::any((zeros & 0x7fff7fffu) != 0);
  }
  // What add_values adds, token by token, for such tiles: a row gets the infinities that it sees and no others.
  ANABRANCH_DEVICE void add_seen_values(const char* values, const Sight& sight, bool windowed, int block,
                                        const i32* positions) {
    const int lane = ptx::thread() & 31;
    ANABRANCH_UNROLL
    for (int i = 0; i < kScores; ++i) {
      ANABRANCH_NO_UNROLL
      for (int key = 0; key < 8; ++key) {
        const int token = first_key + 8 * i + key, holder = (lane & ~3) | (key >> 1), shift = (key & 1) * 16;
        const int at = windowed ? ptx::load(positions + token) : 0;
        float weight[2];
        bool sees[2];
        ANABRANCH_UNROLL
        for (int r = 0; r < 2; ++r) {
          weight[r] = ptx::widen(T{}, ptx::shuffle(p[i / 2][i % 2 * 2 + r], holder) >> shift);
          sees[r] = sight.sees(windowed, r, block + token, at);
        }
        const char* value = values + token * S::kPitch + (lane & 3) * 4;
        ANABRANCH_UNROLL
        for (int c = 0; c < D / 8; ++c) {
          const u32 pair = ptx::load(reinterpret_cast<const u32*>(value + c * 16));
          ANABRANCH_UNROLL
          for (int e = 0; e < 2; ++e) {
            const float x = ptx::widen(T{}, pair >> (16 * e));
            const bool finite = x - x == 0;
            ANABRANCH_UNROLL
            for (int r = 0; r < 2; ++r)
              if (sees[r]) acc[c][2 * r + e] += finite ? weight[r] * x : x;
          }
        }
      }
    }
  }
};

}  // namespace anabranch::cuda
