// AMX's tile registers: eight of 16 rows × 64 bytes. A product takes 16 × 32 bfloat16 from one, 16 × 16 pairs of them from
// another, and adds 16 × 16 float32 to a third. Where there is no AMX (tests only) arrays stand for the registers.
#pragma once

#include <cstring>

#include "cpu/simd.hpp"

namespace anabranch::cpu {
namespace {

constexpr int SIDE = 16;             // rows of a register, 32-bit elements of a row
constexpr int DEPTH = 32;            // bfloat16 of a row: what a product sums over
constexpr int AREA = SIDE * SIDE;    // 32-bit elements of a register

static_assert(W == SIDE, "a vector is a row of a tile register");

#ifdef __AMX_BF16__

// Whoever used the registers before (a library's matrix products do) had them in a shape of its own.
struct TileRegisters {
  TileRegisters() {
    alignas(64) struct {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } shape;
    __asm__ volatile("ldtilecfg %0" : : "m"(shape));
  }
  ~TileRegisters() { __asm__ volatile("tilerelease"); }
};

// (The intrinsics want the register's number as a literal.)
template <int T>
ANABRANCH_INLINE void tile_zero() {
  __asm__ volatile("tilezero %%tmm%c0" : : "i"(T));
}
template <int T>
ANABRANCH_INLINE void tile_load(const void* from, int64_t row_bytes) {
  __asm__ volatile("tileloadd (%1,%2,1), %%tmm%c0" : : "i"(T), "r"(from), "r"(row_bytes) : "memory");
}
template <int T>
ANABRANCH_INLINE void tile_store(void* to, int64_t row_bytes) {
  __asm__ volatile("tilestored %%tmm%c0, (%1,%2,1)" : : "i"(T), "r"(to), "r"(row_bytes) : "memory");
}
// C += A · B
template <int C, int A, int B>
ANABRANCH_INLINE void tile_multiply_add() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
}

#else

inline thread_local uint32_t tile_register[8][SIDE][SIDE];

struct TileRegisters {
  TileRegisters() { memset(tile_register, 0x7f, sizeof tile_register); }  // NaN as bfloat16: nothing is to rely on it
  ~TileRegisters() {}
};

template <int T>
void tile_zero() {
  memset(tile_register[T], 0, sizeof tile_register[T]);
}
template <int T>
void tile_load(const void* from, int64_t row_bytes) {
  for (int i = 0; i < SIDE; ++i) memcpy(tile_register[T][i], static_cast<const char*>(from) + i * row_bytes, 64);
}
template <int T>
void tile_store(void* to, int64_t row_bytes) {
  for (int i = 0; i < SIDE; ++i) memcpy(static_cast<char*>(to) + i * row_bytes, tile_register[T][i], 64);
}
template <int C, int A, int B>
void tile_multiply_add() {
  for (int i = 0; i < SIDE; ++i) {
    vf sum;
    memcpy(&sum, tile_register[C][i], 64);
    for (int k = 0; k < SIDE; ++k)
      sum = multiply_add(tile_register[A][i][k] - (vu){}, load(reinterpret_cast<const pair*>(tile_register[B][k])), sum);
    memcpy(tile_register[C][i], &sum, 64);
  }
}

#endif

// What is the lower half of every 2·H lanes stays in a's, and comes from b's; the upper likewise into b.
template <int H, int... I>
ANABRANCH_INLINE void exchange(vu& a, vu& b, std::integer_sequence<int, I...>) {
  const vu first = ANABRANCH_SHUFFLE(vi, a, b, (I / H % 2 ? W + I - H : I)...);
  b = ANABRANCH_SHUFFLE(vi, a, b, (I / H % 2 ? W + I : I + H)...);
  a = first;
}
template <int H = W / 2>
ANABRANCH_INLINE void transpose(vu* x) {
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i)
    if (i / H % 2 == 0) exchange<H>(x[i], x[i + H], std::make_integer_sequence<int, W>());
  if constexpr (H > 1) transpose<H / 2>(x);
}

// `count` channels (DEPTH at most) of SIDE rows as pairs [channels / 2][rows], `stride` from line to line. Zeros past
// count, and for rows that are null.
template <class Row>
ANABRANCH_INLINE void pack_across(Row row, int count, pair* to, int64_t stride) {
  vu x[W];
  for (int r = 0; r < W; ++r) {
    const bf16* from = row(r);
    bf16 line[DEPTH] = {};
    if (from && count == DEPTH) memcpy(static_cast<void*>(line), from, sizeof line);  // of a size that is known: no call
    else if (from) memcpy(static_cast<void*>(line), from, size_t(count) * sizeof(bf16));
    x[r] = load(reinterpret_cast<const pair*>(line));
  }
  transpose(x);
  for (int i = 0; i < W; ++i) store(to + i * stride, x[i]);
}

}  // namespace
}  // namespace anabranch::cpu
