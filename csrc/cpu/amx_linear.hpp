// Linear layers in AMX's tile registers, bfloat16: out[n][row] = w · xᵀ, so that the weights go into the registers from
// their ordinary rows, once, and only x is packed. Bound by the bytes of the weights up to some dozens of rows.
//
// An output element is the same sum in the same order whatever stands beside it.
#pragma once

#include "cpu/amx.hpp"
#include "cpu/unit.hpp"

namespace anabranch::cpu {
namespace {

ANABRANCH_INLINE int64_t padded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// More than SIDE rows of x go by two registers.
ANABRANCH_INLINE int64_t padded_rows(int64_t rows) { return padded(rows, rows > SIDE ? 2 * SIDE : SIDE); }

size_t amx_wide(int64_t rows, int64_t k) { return size_t(padded_rows(rows) * padded(k, DEPTH) / 2); }  // floats

// Rows of x as registers [row / SIDE][K / DEPTH] of pairs of channels × rows, zeros past either end.
void amx_pack(const Linear& l) {
  const int64_t steps = padded(l.k, DEPTH) / DEPTH;
  pair* to = reinterpret_cast<pair*>(l.wide);
  for (int64_t begin = 0; begin < padded_rows(l.rows); begin += SIDE)
    for (int64_t c = 0; c < steps * DEPTH; c += DEPTH, to += AREA) {
      const auto row = [&](int r) {
        return begin + r < l.rows ? static_cast<const bf16*>(l.x) + (begin + r) * l.x_row + c : nullptr;
      };
      pack_across(row, int(smaller(int64_t(DEPTH), l.k - c)), to, SIDE);
    }
}

// Sixteen rows of the weights from row n on.
struct Weights {
  const Linear& l;
  int64_t n;

  // Their next DEPTH channels from c on, as they lie or, at an end of the matrix, in `copy` with zeros.
  template <int T>
  ANABRANCH_INLINE void take(int64_t c, bf16* copy) const {
    const bf16* from = static_cast<const bf16*>(l.w) + n * l.w_row + c;
    if (n + SIDE <= l.n && c + DEPTH <= l.k) return tile_load<T>(from, l.w_row * 2);
    memset(static_cast<void*>(copy), 0, 64 * SIDE);
    for (int64_t r = 0; r < SIDE && n + r < l.n; ++r)
      memcpy(static_cast<void*>(copy + r * DEPTH), from + r * l.w_row,
             size_t(smaller(int64_t(DEPTH), l.k - c)) * sizeof(bf16));
    tile_load<T>(copy, 64);
  }
};

// A register's sums [n][row] to rows `row` … of the output, columns [n, end).
ANABRANCH_INLINE void amx_put(const Linear& l, const float* sums, int64_t n, int64_t end, int64_t row) {
  vu x[W];
  for (int i = 0; i < W; ++i) x[i] = (vu)load(sums + i * W);
  transpose(x);
  const int count = int(smaller(int64_t(SIDE), end - n));
  vf add = {};
  if (l.bias)
    for (int i = 0; i < count; ++i) add[i] = to_float(static_cast<const bf16*>(l.bias)[n + i]);
  for (int64_t r = 0; r < SIDE && row + r < l.rows; ++r) {
    const vh y = to_nearest((vf)x[r] + add);
    bf16* to = static_cast<bf16*>(l.out) + (row + r) * l.out_row + n;
    if (count == SIDE) memcpy(static_cast<void*>(to), &y, sizeof y);  // of a size that is known: no call
    else memcpy(static_cast<void*>(to), &y, size_t(count) * sizeof(bf16));
  }
}

// Sixteen columns for NR · SIDE rows. The weights go by once, and the hardware's prefetcher follows them: prefetches of our
// own made a step a quarter slower. One chain of products is enough, memory takes longer than it.
template <int NR>
ANABRANCH_INLINE void amx_block(const Linear& l, int64_t n, int64_t end, int64_t row) {
  const int64_t steps = padded(l.k, DEPTH) / DEPTH;
  const pair *x = reinterpret_cast<const pair*>(l.wide) + row / SIDE * steps * AREA, *y = x + steps * AREA;
  alignas(64) bf16 copy[SIDE * DEPTH];
  alignas(64) float sums[AREA];
  const Weights w = {l, n};
  tile_zero<0>();
  if constexpr (NR == 2) tile_zero<1>();
  for (int64_t c = 0; c < l.k; c += DEPTH, x += AREA, y += AREA) {
    w.take<6>(c, copy);
    tile_load<4>(x, 64);
    tile_multiply_add<0, 6, 4>();
    if constexpr (NR == 2) {
      tile_load<5>(y, 64);
      tile_multiply_add<1, 6, 5>();
    }
  }
  tile_store<0>(sums, 64);
  amx_put(l, sums, n, end, row);
  if constexpr (NR == 2) {
    tile_store<1>(sums, 64);
    amx_put(l, sums, n, end, row + SIDE);
  }
}

// Output columns [begin, end) of all rows.
void amx_columns(const Linear& l, int64_t begin, int64_t end) {
  const TileRegisters registers;
  for (int64_t n = begin; n < end; n += SIDE)
    for (int64_t row = 0; row < l.rows; row += 2 * SIDE) {
      if (l.rows <= SIDE) amx_block<1>(l, n, end, row);
      else amx_block<2>(l, n, end, row);
    }
}

}  // namespace
}  // namespace anabranch::cpu
