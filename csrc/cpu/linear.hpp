// Linear layers with 16-bit weights on machines that cannot multiply them: weights are widened in registers and read
// once, straight from their ordinary rows. The vector lanes run along K, so that neither x nor w has to be transposed.
//
// Up to 4 rows of x: weights go from memory into the products, bound by the bytes of w. More: the first 4 leave the
// widened weights, a few rows at a time, in the first-level cache for the others. Either way an output element is the
// same sum in the same order, so a row's result does not depend on the rows beside it.
#pragma once

#include <type_traits>

#include "cpu/linear_rows.hpp"

namespace anabranch::cpu {
namespace {

constexpr int ROWS = 4;             // rows of x in a register block
constexpr int COLS = LONG / 2;      // weight rows in a register block: ROWS × COLS accumulators
constexpr int GROUP = 6;            // weight rows widened at once; a multiple of COLS
constexpr int COLUMNS = 48;         // weight rows of a tile of output: a multiple of GROUP, and whole cache lines of it
constexpr int K_BLOCK = 640;        // at most; GROUP + ROWS float32 rows of it fit the first-level cache

static_assert(COLUMNS % GROUP == 0 && GROUP % COLS == 0, "blocks nest");

// K is cut by its length alone.
ANABRANCH_INLINE int64_t k_block(int64_t k) {
  const int64_t blocks = k > K_BLOCK ? (k + K_BLOCK - 1) / K_BLOCK : 1, each = (k + blocks - 1) / blocks;
  return (each + W - 1) / W * W;
}

// A line more than needed: rows a power of two apart would share the sets of the cache.
ANABRANCH_INLINE int64_t linear_stride(int64_t k) { return (k + W - 1) / W * W + LINE / 4; }

struct LinearScratch {
  float *w, *sums;  // [GROUP][K_BLOCK + a line], [COLUMNS][rows padded to ROWS]
  int64_t rows;
  LinearScratch(void* base, int64_t count, size_t* bytes = nullptr) {
    Scratch take(base);
    rows = (count + ROWS - 1) / ROWS * ROWS;
    w = take.take<float>(size_t(GROUP) * (K_BLOCK + W + LINE / 4));
    sums = take.take<float>(size_t(COLUMNS) * size_t(rows));
    if (bytes) *bytes = size_t(take.next - static_cast<char*>(base));
  }
};

size_t linear_scratch(int64_t rows) {
  size_t bytes;
  LinearScratch(nullptr, rows, &bytes);
  return bytes;
}

// [0, n) elements as float32, zeros up to `padded`.
template <class T>
ANABRANCH_INLINE void widen(const T* from, int64_t n, int64_t padded, float* to) {
  int64_t c = 0;
  for (; c + W <= n; c += W) store(to + c, load(from + c));
  for (; c < n; ++c) to[c] = to_float(from[c]);
  for (; c < padded; ++c) to[c] = 0;
}

template <class T>
void pack_of(const Linear& l, int64_t begin, int64_t end) {
  const int64_t stride = linear_stride(l.k);
  for (int64_t r = begin; r < end; ++r)
    widen(static_cast<const T*>(l.x) + r * l.x_row, l.k, stride, l.wide + r * stride);
}

typedef float v4 __attribute__((vector_size(16)));
typedef v4 v4_at __attribute__((aligned(4), may_alias));

typedef int32_t v4i __attribute__((vector_size(16)));

ANABRANCH_INLINE v4 fold(vf x) {
  v4 parts[W / 4];
  __builtin_memcpy(parts, &x, sizeof x);
  v4 s = parts[0];
  for (int i = 1; i < W / 4; ++i) s += parts[i];
  return s;
}

// to[r] (+)= sum(x[r]). Four at once take a transpose, and the order of sum(): to the bit the same.
template <int R>
ANABRANCH_INLINE void put_sums(const vf* x, float* to, bool add) {
  if constexpr (R == 4) {
    v4 a = fold(x[0]), b = fold(x[1]), c = fold(x[2]), d = fold(x[3]);
    v4 ab = ANABRANCH_SHUFFLE(v4i, a, b, 0, 4, 1, 5) + ANABRANCH_SHUFFLE(v4i, a, b, 2, 6, 3, 7);
    v4 cd = ANABRANCH_SHUFFLE(v4i, c, d, 0, 4, 1, 5) + ANABRANCH_SHUFFLE(v4i, c, d, 2, 6, 3, 7);
    v4 y = ANABRANCH_SHUFFLE(v4i, ab, cd, 0, 1, 4, 5) + ANABRANCH_SHUFFLE(v4i, ab, cd, 2, 3, 6, 7);
    v4_at* at = reinterpret_cast<v4_at*>(to);
    *at = add ? *at + y : y;
  } else {
    for (int r = 0; r < R; ++r) to[r] = add ? to[r] + sum(x[r]) : sum(x[r]);
  }
}

// sums[b][r] (+)= x_r · w_b over k elements. x is readable (zeros) up to the next multiple of W; w is not, unless it is
// scratch. FETCH: fetches the same elements of the rows `ahead` elements further on, which come next.
// SAVE: leaves the widened weights in `saved`, [NB][saved_row], for the other rows of x.
template <class X, int R, int NB, bool FETCH, bool SAVE>
ANABRANCH_INLINE void product(const float* x, int64_t x_row, const X* const* w, int64_t k, int64_t ahead, float* sums,
                              int64_t rows, bool add, float* saved = nullptr, int64_t saved_row = 0) {
  vf acc[NB][R] = {};
  const int64_t whole = sizeof(X) == 4 ? (k + W - 1) / W * W : k / W * W;
  for (int64_t c = 0; c < whole; c += W) {
    vf y[NB];
#pragma GCC unroll 16
    for (int b = 0; b < NB; ++b) {
      if (FETCH) __builtin_prefetch(w[b] + c + ahead, 0, 3);
      y[b] = load(w[b] + c);
      if (SAVE) store(saved + b * saved_row + c, y[b]);
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      vf v = load(x + r * x_row + c);
#pragma GCC unroll 16
      for (int b = 0; b < NB; ++b) acc[b][r] += v * y[b];
    }
  }
  if (whole < k) {
#pragma GCC unroll 16
    for (int b = 0; b < NB; ++b) {
      float rest[W] = {};
      for (int64_t c = whole; c < k; ++c) rest[c - whole] = to_float(w[b][c]);
      vf y = load(rest);
      if (SAVE) store(saved + b * saved_row + whole, y);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) acc[b][r] += load(x + r * x_row + whole) * y;
    }
  }
#pragma GCC unroll 16
  for (int b = 0; b < NB; ++b) put_sums<R>(acc[b], sums + b * rows, add);
}

// Weight rows straight from where they lie; R = all rows of x.
template <class T, int R>
void stream_columns(const Linear& l, int64_t begin, int64_t end, const LinearScratch& s) {
  constexpr int NB = R == 1 ? 8 : R == 2 ? 4 : COLS;
  static_assert(COLUMNS % NB == 0, "blocks nest");
  const int64_t block = k_block(l.k), stride = linear_stride(l.k);
  for (int64_t n = begin; n < end; n += NB) {
    const T* w[NB];
    for (int b = 0; b < NB; ++b)  // surplus rows: valid addresses, results never read
      w[b] = static_cast<const T*>(l.w) + (n + b < l.n ? n + b : l.n - 1) * l.w_row;
    for (int64_t c = 0; c < l.k; c += block) {
      product<T, R, NB, true, false>(l.wide + c, stride, w, l.k - c < block ? l.k - c : block, NB * l.w_row,
                                     s.sums + (n - begin) * s.rows, s.rows, c > 0);
      for (int b = 0; b < NB; ++b) w[b] += block;
    }
  }
}

// The sums of R rows of x and a group of weight rows; the first such rows widen the weights.
template <class X, int R>
ANABRANCH_INLINE void group_rows(const float* x, int64_t stride, const X* const* w, int64_t k, int64_t ahead,
                                 float* sums, int64_t rows, bool add, float* saved, int64_t saved_row) {
  constexpr bool FIRST = sizeof(X) == 2;
  for (int b = 0; b < GROUP; b += COLS)
    product<X, R, COLS, FIRST, FIRST>(x, stride, w + b, k, ahead, sums + b * rows, rows, add, saved + b * saved_row,
                                      saved_row);
}

// Weight rows widened a group at a time, for any number of rows of x.
template <class T>
void widen_columns(const Linear& l, int64_t begin, int64_t end, const LinearScratch& s) {
  const int64_t block = k_block(l.k), stride = linear_stride(l.k), w_row = block + LINE / 4;
  const int64_t parts = (l.rows + ROWS - 1) / ROWS, ahead = GROUP * l.w_row;
  const float* wide[GROUP];
  for (int b = 0; b < GROUP; ++b) wide[b] = s.w + b * w_row;
  for (int64_t c = 0; c < l.k; c += block) {
    const int64_t k = l.k - c < block ? l.k - c : block;
    for (int64_t n = begin; n < end; n += GROUP) {
      const T* w[GROUP];
      for (int b = 0; b < GROUP; ++b)
        w[b] = static_cast<const T*>(l.w) + (n + b < l.n ? n + b : l.n - 1) * l.w_row + c;
      float* sums = s.sums + (n - begin) * s.rows;
      for (int64_t p = 0; p < parts; ++p) {
        const int64_t r = l.rows * p / parts, count = l.rows * (p + 1) / parts - r;
        const float* x = l.wide + r * stride + c;
        const auto run = [&](auto width) {
          constexpr int R = decltype(width)::value;
          if (p == 0)
            group_rows<T, R>(x, stride, w, k, ahead, sums + r, s.rows, c > 0, s.w, w_row);
          else
            group_rows<float, R>(x, stride, wide, k, 0, sums + r, s.rows, c > 0, s.w, w_row);
        };
        if (count == 4)  // five rows or more in parts of at most four: never fewer than two
          run(std::integral_constant<int, 4>());
        else if (count == 3)
          run(std::integral_constant<int, 3>());
        else
          run(std::integral_constant<int, 2>());
      }
    }
  }
}

template <class T>
void linear_of(const Linear& l, int64_t first, int64_t last, void* base) {
  LinearScratch s(base, l.rows);
  for (int64_t begin = first; begin < last; begin += COLUMNS) {
    const int64_t end = last - begin < COLUMNS ? last : begin + COLUMNS;
    switch (l.rows) {
      case 1: stream_columns<T, 1>(l, begin, end, s); break;
      case 2: stream_columns<T, 2>(l, begin, end, s); break;
      case 3: stream_columns<T, 3>(l, begin, end, s); break;
      case 4: stream_columns<T, 4>(l, begin, end, s); break;
      default: widen_columns<T>(l, begin, end, s);
    }
    const T* bias = static_cast<const T*>(l.bias);
    for (int64_t r = 0; r < l.rows; ++r) {
      T* out = static_cast<T*>(l.out) + r * l.out_row;
      for (int64_t n = begin; n < end; ++n) {
        float y = l.k > 0 ? s.sums[(n - begin) * s.rows + r] : 0;
        put(out + n, bias ? y + to_float(bias[n]) : y);
      }
    }
  }
}

size_t linear_wide(const Linear& l) {
  bool there = false;
  switch (l.type) {
    case Type::f32: there = in_place<float, float>(l); break;
    case Type::f16: break;
#ifdef ANABRANCH_BF16_PAIRS
    case Type::bf16: there = in_place<bf16, pair>(l); break;
#else
    case Type::bf16: break;
#endif
  }
  return there ? 0 : size_t(l.rows * linear_stride(l.k));
}

void linear_pack(const Linear& l, int64_t begin, int64_t end) {
  switch (l.type) {
    case Type::f32: return pack_rows<float, float>(l, begin, end);
    case Type::f16: return pack_of<f16>(l, begin, end);
#ifdef ANABRANCH_BF16_PAIRS
    case Type::bf16: return pack_rows<bf16, pair>(l, begin, end);
#else
    case Type::bf16: return pack_of<bf16>(l, begin, end);
#endif
  }
}

void linear(const Linear& l, int64_t begin, int64_t end, void* scratch) {
  switch (l.type) {
    case Type::f32: return linear_rows<float, float>(l, begin, end);
    case Type::f16: return linear_of<f16>(l, begin, end, scratch);
#ifdef ANABRANCH_BF16_PAIRS
    case Type::bf16: return linear_rows<bf16, pair>(l, begin, end);
#else
    case Type::bf16: return linear_of<bf16>(l, begin, end, scratch);
#endif
  }
}

}  // namespace
}  // namespace anabranch::cpu
