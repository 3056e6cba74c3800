// Linear layers with 16-bit weights on machines that cannot multiply them: weights are widened in registers and read
// once, straight from their ordinary rows. The vector lanes run along K, so that neither x nor w has to be transposed.
//
// Few rows of x (1 to 4, and 8): weights go from memory into the products, bound by the bytes of w. More: a few weight
// rows at a time are widened into the first-level cache and used by all rows of x. Either way an output element is the
// same sum in the same order, so a row's result does not depend on the rows beside it.
#pragma once

#include "cpu/unit.hpp"

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
int64_t linear_stride(int64_t k) { return (k + W - 1) / W * W + LINE / 4; }

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

// [0, n) elements as float32, zeros up to `padded`. Fetches the same elements `ahead` further on, if any.
template <class T>
ANABRANCH_INLINE void widen(const T* from, int64_t n, int64_t padded, float* to, int64_t ahead = 0) {
  int64_t c = 0;
  if (ahead)
    for (int64_t e = 0; e < n; e += LINE / int64_t(sizeof(T))) __builtin_prefetch(from + ahead + e, 0, 2);
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

// sums[b][r] (+)= x_r · w_b over k elements. x is readable (zeros) up to the next multiple of W; w is not, unless it is
// scratch. AHEAD: fetches the same elements of the rows `ahead` elements further on, which come next.
template <class X, int R, int NB, bool AHEAD>
ANABRANCH_INLINE void product(const float* x, int64_t x_row, const X* const* w, int64_t k, int64_t ahead, float* sums,
                              int64_t rows, bool add) {
  vf acc[NB][R] = {};
  const int64_t whole = sizeof(X) == 4 ? (k + W - 1) / W * W : k / W * W;
  for (int64_t c = 0; c < whole; c += W) {
    vf y[NB];
#pragma GCC unroll 16
    for (int b = 0; b < NB; ++b) {
      if (AHEAD) __builtin_prefetch(w[b] + c + ahead, 0, 3);
      y[b] = load(w[b] + c);
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
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) acc[b][r] += load(x + r * x_row + whole) * y;
    }
  }
#pragma GCC unroll 16
  for (int b = 0; b < NB; ++b)
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      float* to = sums + b * rows + r;
      *to = add ? *to + sum(acc[b][r]) : sum(acc[b][r]);
    }
}

// Weight rows straight from where they lie: R = all rows of x, or half of them (the second half finds them in cache).
template <class T, int R, int HALVES>
void stream_columns(const Linear& l, int64_t begin, int64_t end, const LinearScratch& s) {
  constexpr int NB = R == 1 ? 8 : R == 2 ? 4 : COLS;
  static_assert(COLUMNS % NB == 0, "blocks nest");
  const int64_t block = k_block(l.k), stride = linear_stride(l.k);
  for (int64_t n = begin; n < end; n += NB) {
    const T* w[NB];
    for (int b = 0; b < NB; ++b)  // surplus rows: valid addresses, results never read
      w[b] = static_cast<const T*>(l.w) + (n + b < l.n ? n + b : l.n - 1) * l.w_row;
    for (int64_t c = 0; c < l.k; c += block) {
      const int64_t k = l.k - c < block ? l.k - c : block;
      float* sums = s.sums + (n - begin) * s.rows;
      product<T, R, NB, true>(l.wide + c, stride, w, k, NB * l.w_row, sums, s.rows, c > 0);
      if (HALVES == 2)
        product<T, R, NB, false>(l.wide + (l.rows - R) * stride + c, stride, w, k, 0, sums + l.rows - R, s.rows, c > 0);
      for (int b = 0; b < NB; ++b) w[b] += block;
    }
  }
}

template <int R>
ANABRANCH_INLINE void group_rows(const float* x, int64_t stride, const float* const* w, int64_t k, float* sums,
                                 int64_t rows, bool add) {
  for (int b = 0; b < GROUP; b += COLS)
    product<float, R, COLS, false>(x, stride, w + b, k, 0, sums + b * rows, rows, add);
}

// Weight rows widened a group at a time, for any number of rows of x.
template <class T>
void widen_columns(const Linear& l, int64_t begin, int64_t end, const LinearScratch& s) {
  const int64_t block = k_block(l.k), stride = linear_stride(l.k), w_row = block + LINE / 4;
  const int64_t parts = (l.rows + ROWS - 1) / ROWS;
  for (int64_t c = 0; c < l.k; c += block) {
    const int64_t k = l.k - c < block ? l.k - c : block;
    for (int64_t n = begin; n < end; n += GROUP) {
      const float* w[GROUP];
      for (int b = 0; b < GROUP; ++b) {
        const int64_t from = n + b < l.n ? n + b : l.n - 1;
        w[b] = s.w + b * w_row;
        widen(static_cast<const T*>(l.w) + from * l.w_row + c, k, (k + W - 1) / W * W, s.w + b * w_row,
              GROUP * l.w_row);
      }
      float* sums = s.sums + (n - begin) * s.rows;
      for (int64_t p = 0; p < parts; ++p) {
        const int64_t r = l.rows * p / parts, count = l.rows * (p + 1) / parts - r;
        const float* x = l.wide + r * stride + c;
        switch (count) {
          case 1: group_rows<1>(x, stride, w, k, sums + r, s.rows, c > 0); break;
          case 2: group_rows<2>(x, stride, w, k, sums + r, s.rows, c > 0); break;
          case 3: group_rows<3>(x, stride, w, k, sums + r, s.rows, c > 0); break;
          default: group_rows<4>(x, stride, w, k, sums + r, s.rows, c > 0);
        }
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
      case 1: stream_columns<T, 1, 1>(l, begin, end, s); break;
      case 2: stream_columns<T, 2, 1>(l, begin, end, s); break;
      case 3: stream_columns<T, 3, 1>(l, begin, end, s); break;
      case 4: stream_columns<T, 4, 1>(l, begin, end, s); break;
      case 8: stream_columns<T, 4, 2>(l, begin, end, s); break;
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

void linear_pack(const Linear& l, int64_t begin, int64_t end) {
  l.type == Type::bf16 ? pack_of<bf16>(l, begin, end) : pack_of<f16>(l, begin, end);
}

void linear(const Linear& l, int64_t begin, int64_t end, void* scratch) {
  l.type == Type::bf16 ? linear_of<bf16>(l, begin, end, scratch) : linear_of<f16>(l, begin, end, scratch);
}

}  // namespace
}  // namespace anabranch::cpu
