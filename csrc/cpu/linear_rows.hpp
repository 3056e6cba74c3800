// Linear layers whose weights are multiplied where they lie: float32, and bfloat16 by pairs of channels with AVX512-BF16.
// Few rows of x, as decoding has them, are bound by the bytes of the weights, which are read once; a library's matrix
// product packs the weights first, and pays for it in every call.
//
// An output element is the same sum in the same order whatever stands beside it.
#pragma once

#include <type_traits>

#include "cpu/unit.hpp"

namespace anabranch::cpu {
namespace {

template <class E>
constexpr int64_t CHANNELS = W * STEP<E>;  // of a vector
// Weight rows beside R rows of x: as many sums as fit the registers beside R vectors of x and one of weights, but rows
// that stand alone wait for memory, and W streams of it are enough.
template <int R>
constexpr int ACROSS = R == 1 ? W : R == 2 ? W / 2 : 2 * LONG / R;

// A line more than needed: rows a power of two apart would share the sets of the cache.
template <class T, class E>
ANABRANCH_INLINE int64_t row_stride(int64_t k) {
  return (k + CHANNELS<E> - 1) / CHANNELS<E> * CHANNELS<E> + LINE / int64_t(sizeof(T));
}

// Whether rows of x serve as they lie: whole vectors, and not on the same sets of the cache.
template <class T, class E>
ANABRANCH_INLINE bool in_place(const Linear& l) {
  return l.k % CHANNELS<E> == 0 && (l.rows == 1 || l.x_row * int64_t(sizeof(T)) % 2048 != 0);
}

// Rows [begin, end) of x, zeros behind them up to whole vectors.
template <class T, class E>
void pack_rows(const Linear& l, int64_t begin, int64_t end) {
  const int64_t stride = row_stride<T, E>(l.k);
  for (int64_t r = begin; r < end; ++r) {
    T* to = reinterpret_cast<T*>(l.wide) + r * stride;
    memcpy(static_cast<void*>(to), static_cast<const T*>(l.x) + r * l.x_row, size_t(l.k) * sizeof(T));
    memset(static_cast<void*>(to + l.k), 0, size_t(stride - l.k) * sizeof(T));
  }
}

ANABRANCH_INLINE vf rounded_to(float, vf x) { return x; }
ANABRANCH_INLINE vh rounded_to(bf16, vf x) { return to_nearest(x); }

// out[r][b] = x_r · w_b for R rows of x and ACROSS<R> of the weights, of which `count` are real. Fetches F rows of the
// weights that come later. REST: k is no multiple of a vector's channels.
template <class T, class E, int R, int F, bool REST>
ANABRANCH_INLINE void row_block(const T* x, int64_t stride, const T* const* w, int64_t k, const T* const* next,
                                const T* bias, int count, T* out, int64_t out_row) {
  constexpr int NB = ACROSS<R>, GROUPS = (R * NB + W - 1) / W, LAST = R * NB - (GROUPS - 1) * W;
  static_assert(LAST == W || LAST == W / 2, "sums go by powers of two");
  vf acc[R * NB] = {};
  const int64_t whole = REST ? k / CHANNELS<E> * CHANNELS<E> : k;
  for (int64_t c = 0; c < whole; c += CHANNELS<E>) {
    decltype(load_as<E>(x)) v[R];
    for (int r = 0; r < R; ++r) v[r] = load_as<E>(x + r * stride + c);
#pragma GCC unroll 16
    for (int b = 0; b < NB; ++b) {
      if (b < F) fetch(next[b] + c, 1);
      auto y = load_as<E>(w[b] + c);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) acc[r * NB + b] = multiply_add(v[r], y, acc[r * NB + b]);
    }
  }
  if constexpr (REST)
#pragma GCC unroll 16
    for (int b = 0; b < NB; ++b) {
      T rest[CHANNELS<E>] = {};
      memcpy(static_cast<void*>(rest), w[b] + whole, size_t(k - whole) * sizeof(T));
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r)
        acc[r * NB + b] = multiply_add(load_as<E>(x + r * stride + whole), load_as<E>(rest), acc[r * NB + b]);
    }
  T all[GROUPS * W];
#pragma GCC unroll 4
  for (int g = 0; g < GROUPS; ++g) {
    vf y = g < GROUPS - 1 ? sums(acc + g * W) : sums<LAST>(acc + g * W);
    if (bias) {
      float add[W] = {};
      for (int i = 0; i < W; ++i)
        if ((g * W + i) % NB < count) add[i] = to_float(bias[(g * W + i) % NB]);
      y += load(add);
    }
    const auto rounded = rounded_to(T{}, y);
    memcpy(static_cast<void*>(all + g * W), &rounded, W * sizeof(T));
  }
  const T* from = all;
  for (int r = 0; r < R; ++r, from += NB, out += out_row) {
    if (count == NB) memcpy(static_cast<void*>(out), from, NB * sizeof(T));  // of a size that is known: no call
    else memcpy(static_cast<void*>(out), from, size_t(count) * sizeof(T));
  }
}

template <class T, class E, int R>
void row_columns(const Linear& l, int64_t begin, int64_t end) {
  constexpr int NB = ACROSS<R>;
  const int64_t stride = l.wide ? row_stride<T, E>(l.k) : l.x_row, parts = (l.rows + R - 1) / R;
  const int64_t each = (NB + parts - 1) / parts;  // of weights to come, fetched beside each part: evenly
  const int64_t ahead = R == 1 ? NB : 2 * NB;     // weight rows: a few hundred nanoseconds, what memory takes
  const bool rest = l.k % CHANNELS<E> != 0;
  const T *x = l.wide ? reinterpret_cast<const T*>(l.wide) : static_cast<const T*>(l.x);
  const T* bias = static_cast<const T*>(l.bias);
  const auto row = [&](int64_t n) { return static_cast<const T*>(l.w) + smaller(n, l.n - 1) * l.w_row; };
  for (int64_t n = begin; n < end; n += NB) {
    const T *w[NB], *next[2 * NB];
    for (int b = 0; b < NB; ++b) w[b] = row(n + b);  // surplus rows: valid addresses, results never stored
    for (int b = 0; b < 2 * NB; ++b) {
      const int64_t later = n + ahead + b;
      next[b] = row(later < end ? later : later + l.hop);
    }
    const int count = int(smaller(int64_t(NB), end - n));
    const T* add = bias ? bias + n : nullptr;
    for (int64_t p = 0; p < parts; ++p) {
      // R rows each; the last part may share rows with the one before it, which come out the same again.
      const int64_t r = smaller(p * R, l.rows - R);
      T* out = static_cast<T*>(l.out) + r * l.out_row + n;
      const auto run = [&](auto some) {
        constexpr int F = decltype(some)::value;
        const auto with = [&](auto odd) {
          row_block<T, E, R, F, decltype(odd)::value>(x + r * stride, stride, w, l.k, next + p * each, add, count, out,
                                                      l.out_row);
        };
        if (rest) with(std::true_type());
        else with(std::false_type());
      };
      if (p * each >= NB) run(std::integral_constant<int, 0>());
      else if (each == 1) run(std::integral_constant<int, 1>());
      else if (each == 2) run(std::integral_constant<int, 2>());
      else run(std::integral_constant<int, NB>());
    }
  }
}

template <class T, class E>
void linear_rows(const Linear& l, int64_t begin, int64_t end) {
  switch (l.rows) {
    case 0: return;
    case 1: return row_columns<T, E, 1>(l, begin, end);
    case 2: return row_columns<T, E, 2>(l, begin, end);
    case 3: return row_columns<T, E, 3>(l, begin, end);
    default: return row_columns<T, E, 4>(l, begin, end);
  }
}

}  // namespace
}  // namespace anabranch::cpu
