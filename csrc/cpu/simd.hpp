// Vectors by GCC's vector extensions: one source for every instruction set. Everything here sits in an unnamed
// namespace, so that no function compiled for one instruction set can be linked into another's code.
#pragma once

#include <cstdint>
#include <utility>

#if defined(__F16C__) || defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#ifndef ANABRANCH_VECTOR_BYTES
#if defined(__AVX512F__)
#define ANABRANCH_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define ANABRANCH_VECTOR_BYTES 32
#else
#define ANABRANCH_VECTOR_BYTES 16
#endif
#endif

#ifdef __AVX512BF16__
#define ANABRANCH_BF16_PAIRS 1
#endif

#define ANABRANCH_INLINE inline __attribute__((always_inline))
#ifdef __clang__
#define ANABRANCH_SHUFFLE(kind, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define ANABRANCH_SHUFFLE(kind, a, b, ...) __builtin_shuffle(a, b, kind{__VA_ARGS__})
#endif

namespace anabranch::cpu {
namespace {

constexpr int W = ANABRANCH_VECTOR_BYTES / 4;  // float32 lanes
#if ANABRANCH_VECTOR_BYTES == 64 || defined(__aarch64__)
constexpr int LONG = 12;  // 32 vector registers: 12 × 2 accumulators
#else
constexpr int LONG = 6;  // 16 vector registers: 6 × 2 accumulators
#endif

typedef float vf __attribute__((vector_size(ANABRANCH_VECTOR_BYTES)));
typedef int32_t vi __attribute__((vector_size(ANABRANCH_VECTOR_BYTES)));
typedef uint32_t vu __attribute__((vector_size(ANABRANCH_VECTOR_BYTES)));
typedef uint16_t vh __attribute__((vector_size(ANABRANCH_VECTOR_BYTES / 2)));
typedef uint16_t vh2 __attribute__((vector_size(ANABRANCH_VECTOR_BYTES)));
typedef vf vf_at __attribute__((aligned(4), may_alias));
typedef vi vi_at __attribute__((aligned(4), may_alias));
typedef vh vh_at __attribute__((aligned(2), may_alias));
typedef vh2 vh2_at __attribute__((aligned(2), may_alias));

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

struct i8 {  // of K and V in a page; what it stands for is this times a factor
  int8_t bits;
};
struct e4m3 {  // likewise: 8-bit floats without infinities. Its NaN is never stored
  uint8_t bits;
};
template <class T>
constexpr bool QUANTISED = sizeof(T) == 1;

struct __attribute__((packed, aligned(2), may_alias)) pair {  // two bfloat16, the first in the lower half
  uint32_t bits;
};

// An element of a product, float or `pair`, stands for so many channels (of Q and K) or tokens (of P and V).
template <class E>
constexpr int STEP = 1;
template <>
constexpr int STEP<pair> = 2;

constexpr float INF = __builtin_inff();

ANABRANCH_INLINE vf splat(float x) { return x - (vf){}; }
ANABRANCH_INLINE vi splat(int32_t x) { return x - (vi){}; }
ANABRANCH_INLINE vf load(const float* p) { return *reinterpret_cast<const vf_at*>(p); }
ANABRANCH_INLINE vi load(const int32_t* p) { return *reinterpret_cast<const vi_at*>(p); }
ANABRANCH_INLINE void store(float* p, vf x) { *reinterpret_cast<vf_at*>(p) = x; }

ANABRANCH_INLINE vf load(const bf16* p) {
  vh h = *reinterpret_cast<const vh_at*>(p);
  return (vf)(__builtin_convertvector(h, vu) << 16);
}

ANABRANCH_INLINE vf load(const f16* p) {
#if defined(__F16C__) && ANABRANCH_VECTOR_BYTES >= 32
  vf x;
  for (int i = 0; i < W; i += 8) {
    __m256 part = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + i)));
    __builtin_memcpy(reinterpret_cast<float*>(&x) + i, &part, sizeof part);
  }
  return x;
#else
  vu h = __builtin_convertvector(*reinterpret_cast<const vh_at*>(p), vu);
  vu sign = (h & 0x8000u) << 16;
  vu magnitude = (h & 0x7fffu) << 13;
  vf scaled = (vf)magnitude * 0x1p112f;  // re-biases the exponent; exact for subnormals too
  vi special = (vi)magnitude >= 0x0f800000;  // infinities and NaN
  return (vf)(sign | (special ? (magnitude | 0x7f800000u) : (vu)scaled));
#endif
}

typedef int8_t vb __attribute__((vector_size(ANABRANCH_VECTOR_BYTES / 4)));
typedef uint8_t vub __attribute__((vector_size(ANABRANCH_VECTOR_BYTES / 4)));
ANABRANCH_INLINE vf load(const i8* p) {
  vb x;
  __builtin_memcpy(&x, p, sizeof x);
  return __builtin_convertvector(__builtin_convertvector(x, vi), vf);
}
ANABRANCH_INLINE vf load(const e4m3* p) {
  vub x;
  __builtin_memcpy(&x, p, sizeof x);
  const vu bits = __builtin_convertvector(x, vu);
  const vf magnitude = (vf)((bits & 0x7fu) << 20) * 0x1p120f;  // re-biases the exponent; exact for subnormals too
  return (vf)((vu)magnitude | (bits & 0x80u) << 24);
}

typedef vu vu_at __attribute__((aligned(4), may_alias));
ANABRANCH_INLINE vu load(const pair* p) { return *reinterpret_cast<const vu_at*>(p); }
ANABRANCH_INLINE void store(pair* p, vu x) { *reinterpret_cast<vu_at*>(p) = x; }
// The next elements of a row as a product takes them: W channels, or W pairs of them.
template <class E, class T>
ANABRANCH_INLINE auto load_as(const T* p) {
  if constexpr (STEP<E> == 1) return load(p);
  else return load(reinterpret_cast<const pair*>(p));
}
ANABRANCH_INLINE vu splat(pair x) { return x.bits - (vu){}; }
ANABRANCH_INLINE pair pair_of(bf16 a, bf16 b) { return {uint32_t(b.bits) << 16 | a.bits}; }
ANABRANCH_INLINE vf low(vu x) { return (vf)(x << 16); }
ANABRANCH_INLINE vf high(vu x) { return (vf)(x & 0xffff0000u); }

ANABRANCH_INLINE vf multiply_add(vf x, vf y, vf sum) { return x * y + sum; }

// The instruction takes subnormals for zeros. Without it (tests only) they count, and there is one rounding more.
ANABRANCH_INLINE vf multiply_add(vu x, vu y, vf sum) {
#ifdef __AVX512BF16__
  return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)y);
#else
  return high(x) * high(y) + (low(x) * low(y) + sum);
#endif
}

ANABRANCH_INLINE float to_float(float x) { return x; }
ANABRANCH_INLINE float to_float(bf16 x) {
  uint32_t bits = uint32_t(x.bits) << 16;
  float y;
  __builtin_memcpy(&y, &bits, 4);
  return y;
}
ANABRANCH_INLINE float to_float(f16 x) {
  uint32_t magnitude = uint32_t(x.bits & 0x7fff) << 13, bits;
  float y;
  __builtin_memcpy(&y, &magnitude, 4);
  y *= 0x1p112f;
  __builtin_memcpy(&bits, &y, 4);
  if (magnitude >= 0x0f800000u) bits = magnitude | 0x7f800000u;
  bits |= uint32_t(x.bits & 0x8000) << 16;
  __builtin_memcpy(&y, &bits, 4);
  return y;
}

ANABRANCH_INLINE float to_float(i8 x) { return x.bits; }
ANABRANCH_INLINE float to_float(e4m3 x) {
  uint32_t bits = uint32_t(x.bits & 0x7f) << 20;
  float y;
  __builtin_memcpy(&y, &bits, 4);
  return x.bits & 0x80 ? y * -0x1p120f : y * 0x1p120f;
}

// To nearest, ties to even.
ANABRANCH_INLINE void put(i8* p, float x) { p->bits = int8_t(__builtin_rintf(x)); }  // |x| ≤ 127
ANABRANCH_INLINE void put(e4m3* p, float x) {                                        // |x| ≤ 448
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  const uint32_t sign = bits >> 24 & 0x80u;
  bits &= 0x7fffffffu;
  uint32_t code;
  if (bits < 0x3c800000u) {  // subnormal: below 2^-6, in units of 2^-9
    float y;
    __builtin_memcpy(&y, &bits, 4);
    code = uint32_t(__builtin_rintf(y * 512.0f));
  } else {
    code = ((bits + 0x7ffffu + (bits >> 20 & 1)) >> 20) - (120u << 3);
  }
  p->bits = uint8_t(sign | code);
}
ANABRANCH_INLINE void put(float* p, float x) { *p = x; }
ANABRANCH_INLINE void put(bf16* p, float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16;
  p->bits = uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? (bits >> 16) | 0x40u : rounded);
}
ANABRANCH_INLINE void put(f16* p, float x) {
  uint32_t bits, half;
  __builtin_memcpy(&bits, &x, 4);
  uint32_t sign = (bits >> 16) & 0x8000u;
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) {
    half = 0x7e00u;
  } else if (bits >= 0x477ff000u) {  // 65520 and above round to infinity
    half = 0x7c00u;
  } else if (bits < 0x38800000u) {  // subnormal: adding 0.5 leaves units of 2^-24, rounded by the hardware
    float y;
    __builtin_memcpy(&y, &bits, 4);
    y += 0.5f;
    __builtin_memcpy(&bits, &y, 4);
    half = bits - 0x3f000000u;
  } else {
    half = (bits + 0xc8000fffu + ((bits >> 13) & 1)) >> 13;
  }
  p->bits = uint16_t(sign | half);
}

// To the nearest bfloat16, ties to even, as put() below.
ANABRANCH_INLINE vu nearest_bits(vf x) {  // in the upper halves; anything in the lower
  vu bits = (vu)x, rounded = bits + 0x7fffu + ((bits >> 16) & 1);
  vi nan = (vi)(bits & 0x7fffffffu) > 0x7f800000;
  return nan ? bits | 0x400000u : rounded;
}
ANABRANCH_INLINE vh to_nearest(vf x) {
#ifdef __AVX512BF16__
  return (vh)_mm512_cvtneps_pbh((__m512)x);  // subnormals come out as zeros, as from the product's instruction
#else
  return __builtin_convertvector(nearest_bits(x) >> 16, vh);
#endif
}

// Element j of what an element of a product stands for (see STEP).
ANABRANCH_INLINE float part(float x, int) { return x; }
ANABRANCH_INLINE float part(pair x, int j) { return to_float(bf16{uint16_t(x.bits >> (j % 2 * 16))}); }

// To the nearest bfloat16 of finite x, as float32; halves away from zero.
ANABRANCH_INLINE vf to_bf16(vf x) { return (vf)(((vu)x + 0x8000u) & 0xffff0000u); }

ANABRANCH_INLINE vf larger(vf a, vf b) { return b > a ? b : a; }
ANABRANCH_INLINE float larger(float a, float b) { return b > a ? b : a; }

ANABRANCH_INLINE float sum(vf x) {
  typedef float v4 __attribute__((vector_size(16)));
  v4 parts[W / 4];
  __builtin_memcpy(parts, &x, sizeof x);
  v4 s = parts[0];
  for (int i = 1; i < W / 4; ++i) s += parts[i];
  return (s[0] + s[2]) + (s[1] + s[3]);
}

// N vectors, each combined over its lanes by `op`, as the first N lanes of one; N is a power of two. fold: a block of 2·H
// lanes in `a` and in `b` becomes H lanes of a's and H of b's; half of them stay where they are.
template <int H, class Op, int... I>
ANABRANCH_INLINE vf fold(vf a, vf b, Op op, std::integer_sequence<int, I...>) {
  return op(ANABRANCH_SHUFFLE(vi, a, b, (I / H % 2 ? W + I : I)...),
            ANABRANCH_SHUFFLE(vi, a, b, (I / H % 2 ? W + I - H : I + H)...));
}
template <int N, int H, class Op, int... I>
ANABRANCH_INLINE vf folds(vf* x, Op op, std::integer_sequence<int, I...> lanes) {
  constexpr int PAIRS = N > 1 ? N / 2 : 1;  // a vector alone, folded with itself, comes to hold each result twice
#pragma GCC unroll 8
  for (int i = 0; i < PAIRS; ++i) x[i] = fold<H>(x[i], x[N > 1 ? i + PAIRS : i], op, lanes);
  if constexpr (H > 1) return folds<PAIRS, H / 2>(x, op, lanes);
  else return x[0];
}
template <int N, int... I>
ANABRANCH_INLINE vf one_of_each(vf x, std::integer_sequence<int, I...>) {  // N results in equally many lanes each
  return ANABRANCH_SHUFFLE(vi, x, x, (I % N * (W / N))...);
}
template <int N = W, class Op>
ANABRANCH_INLINE vf across(vf* x, Op op) {
  const auto lanes = std::make_integer_sequence<int, W>();
  const vf y = folds<N, W / 2>(x, op, lanes);
  if constexpr (N == W) return y;
  else return one_of_each<N>(y, lanes);
}
template <int N = W>
ANABRANCH_INLINE vf sums(vf* x) {
  return across<N>(x, [](vf a, vf b) { return a + b; });
}

// 2·W bfloat16 of each of two rows, as pairs.
template <int... I>
ANABRANCH_INLINE void zip(const bf16* a, const bf16* b, vu* x, std::integer_sequence<int, I...>) {
  const vh2 first = *reinterpret_cast<const vh2_at*>(a), second = *reinterpret_cast<const vh2_at*>(b);
  x[0] = (vu)ANABRANCH_SHUFFLE(vh2, first, second, (I % 2 * 2 * W + I / 2)...);
  x[1] = (vu)ANABRANCH_SHUFFLE(vh2, first, second, (I % 2 * 2 * W + I / 2 + W)...);
}
ANABRANCH_INLINE void zip(const bf16* a, const bf16* b, vu* x) {
  zip(a, b, x, std::make_integer_sequence<int, 2 * W>());
}

ANABRANCH_INLINE float largest(vf x) {  // no lane is NaN
  typedef float v4 __attribute__((vector_size(16)));
  v4 parts[W / 4];
  __builtin_memcpy(parts, &x, sizeof x);
  v4 s = parts[0];
  for (int i = 1; i < W / 4; ++i) s = parts[i] > s ? parts[i] : s;
  return larger(larger(s[0], s[2]), larger(s[1], s[3]));
}

#if defined(__FMA__) || defined(__aarch64__)
constexpr bool FUSED = true;
#else
constexpr bool FUSED = false;
#endif

// e^x for x ≤ 88 within about 2 ulp; 0 below −87.33 (e^−inf = 0); NaN stays NaN. x = n · ln 2 + r, and a polynomial that
// is 1e-7 from e^r for |r| ≤ ln 2 / 2 (minimax, relative; the first two coefficients are held at 1).
ANABRANCH_INLINE vf exp_(vf x) {
  const float magic = 12582912.0f + 127.0f;  // 1.5·2^23: adding it rounds to an integer; + the exponent's bias
  vf t = x * 1.44269504088896341f + magic;
  vf n = t - magic;
  vf r;
  if constexpr (FUSED) r = x - n * 0.693147182f;
  else r = x - n * 0.693359375f + n * 2.12194440e-4f;  // the first product is exact
  vf p = r * 8.3125010e-3f + 4.1890330e-2f;
  p = p * r + 1.6667116e-1f;
  p = p * r + 4.9999231e-1f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  vf y = p * (vf)((vu)t << 23);
  return x < -87.33f ? (vf){} : y;
}

ANABRANCH_INLINE vf tanh_(vf x) {
  vf z = x * x;
  vf p = z * -5.70498872745e-3f + 2.06390887954e-2f;
  p = p * z + -5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z + -3.33332819422e-1f;
  vf small = p * z * x + x;
  vf twice = (vf)((vu)(x + x) & 0x7fffffffu);
  twice = twice > 20.0f ? splat(20.0f) : twice;  // tanh is 1 there; a NaN fails the test and passes through
  vf big = 1.0f - 2.0f / (exp_(twice) + 1.0f);
  big = (vf)((vu)big | ((vu)x & 0x80000000u));
  return twice < 1.25f ? small : big;
}

}  // namespace
}  // namespace anabranch::cpu
