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

static_assert(PACK_ROWS % SIDE == 0, "whole registers");

// Rows [first, last) of x as registers [row / SIDE][K / DEPTH] of pairs of channels × rows, zeros past either end.
void amx_pack(const Linear& l, int64_t first, int64_t last) {
  const int64_t steps = padded(l.k, DEPTH) / DEPTH;
  pair* to = reinterpret_cast<pair*>(l.wide) + first / SIDE * steps * AREA;
  if (last == l.rows) last = padded_rows(l.rows);
  for (int64_t begin = first; begin < last; begin += SIDE)
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
ANABRANCH_INLINE void amx_put_one(const Linear& l, const float* sums, int64_t n, int64_t end, int64_t row) {
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

// The same of two registers, whose columns are side by side: rounded in pairs, they are transposed as one, and go out in
// whole lines (rows of the output may all lie in one set of a cache).
ANABRANCH_INLINE void amx_put_two(const Linear& l, const float* sums, int64_t n, int64_t row) {
  vu x[W];
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) {
    vf low = load(sums + 2 * i * W), high = load(sums + (2 * i + 1) * W);
    if (l.bias) {
      const bf16* bias = static_cast<const bf16*>(l.bias) + n + 2 * i;
      low += to_float(bias[0]), high += to_float(bias[1]);
    }
    x[i] = nearest_bits(low) >> 16 | (nearest_bits(high) & 0xffff0000u);
  }
  transpose(x);
  char* to = reinterpret_cast<char*>(static_cast<bf16*>(l.out) + row * l.out_row + n);
  const int64_t rows = smaller(int64_t(SIDE), l.rows - row);
  for (int64_t r = 0; r < rows; ++r) memcpy(to + r * l.out_row * 2, &x[r], sizeof x[r]);
}

template <int NW, int FIRST, int SECOND>
ANABRANCH_INLINE void amx_put(const Linear& l, int64_t n, int64_t end, int64_t row) {
  alignas(64) float sums[NW * AREA];
  tile_store<FIRST>(sums, 64);
  if constexpr (NW == 2) {
    tile_store<SECOND>(sums + AREA, 64);
    amx_put_two(l, sums, n, row);
  } else {
    amx_put_one(l, sums, n, end, row);
  }
}

// SIDE · NW columns for SIDE · NR rows: a register of weights and one of x serve two products each. The weights go by
// once, and the hardware's prefetcher follows them: prefetches of our own made a step a quarter slower.
template <int NW, int NR>
ANABRANCH_INLINE void amx_block(const Linear& l, int64_t n, int64_t end, int64_t row) {
  const int64_t steps = padded(l.k, DEPTH) / DEPTH;
  const pair *x = reinterpret_cast<const pair*>(l.wide) + row / SIDE * steps * AREA, *y = x + steps * AREA;
  alignas(64) bf16 copy[SIDE * DEPTH];
  const Weights w = {l, n}, v = {l, n + SIDE};
  tile_zero<0>();
  if constexpr (NR == 2) tile_zero<1>();
  if constexpr (NW == 2) tile_zero<2>();
  if constexpr (NW == 2 && NR == 2) tile_zero<3>();
  for (int64_t c = 0; c < l.k; c += DEPTH, x += AREA, y += AREA) {
    w.take<6>(c, copy);
    tile_load<4>(x, 64);
    tile_multiply_add<0, 6, 4>();
    if constexpr (NR == 2) {
      tile_load<5>(y, 64);
      tile_multiply_add<1, 6, 5>();
    }
    if constexpr (NW == 2) {
      v.take<7>(c, copy);
      tile_multiply_add<2, 7, 4>();
      if constexpr (NR == 2) tile_multiply_add<3, 7, 5>();
    }
  }
  amx_put<NW, 0, 2>(l, n, end, row);
  if constexpr (NR == 2) amx_put<NW, 1, 3>(l, n, end, row + SIDE);
}

template <int NW>
ANABRANCH_INLINE void amx_rows(const Linear& l, int64_t n, int64_t end) {
  if (l.rows <= SIDE) return amx_block<NW, 1>(l, n, end, 0);
  for (int64_t row = 0; row < l.rows; row += 2 * SIDE) amx_block<NW, 2>(l, n, end, row);
}

// Output columns [begin, end) of all rows.
void amx_columns(const Linear& l, int64_t begin, int64_t end) {
  const TileRegisters registers;
  int64_t n = begin;
  for (; n + 2 * SIDE <= end; n += 2 * SIDE) amx_rows<2>(l, n, end);
  for (; n < end; n += SIDE) amx_rows<1>(l, n, end);
}

}  // namespace
}  // namespace anabranch::cpu
