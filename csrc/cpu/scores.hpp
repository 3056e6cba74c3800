// Passes over one row of scores, a vocabulary long: what is read once, in vectors. scores.cpp makes choices of them.
#pragma once

#include "cpu/kernels.hpp"
#include "cpu/simd.hpp"

namespace anabranch::cpu {
namespace {

static_assert(SCORE_BLOCK % (2 * W) == 0, "a block is whole vectors");

// W scores from `at` on, −inf behind the row's end.
template <class T>
ANABRANCH_INLINE vf load_scores(const T* x, int64_t at, int64_t size) {
  if (at + W <= size) return load(x + at);
  vf v = splat(-INF);
  for (int64_t i = at; i < size; ++i) v[i - at] = to_float(x[i]);
  return v;
}

// to[b] = what `across` makes of the vector block(begin) of each block of scores, W blocks at a time.
template <class Block, class Across>
ANABRANCH_INLINE void over_blocks(int64_t size, float* to, Block block, Across across) {
  for (int64_t first = 0; first < size; first += W * SCORE_BLOCK) {
    vf each[W] = {};
    const int64_t count = smaller((size - first + SCORE_BLOCK - 1) / SCORE_BLOCK, int64_t(W));
    for (int64_t b = 0; b < count; ++b) each[b] = block(first + b * SCORE_BLOCK);
    const vf y = across(each);
    memcpy(to, &y, size_t(count) * sizeof(float));
    to += count;
  }
}

template <class T>
float score_peaks_of(const T* x, int64_t size, float* peaks) {
  vi nan = {};
  vf best = splat(-INF);
  over_blocks(
      size, peaks,
      [&](int64_t begin) {
        vf most = splat(-INF);
        for (int64_t at = begin; at < begin + SCORE_BLOCK && at < size; at += W) {
          const vf v = load_scores(x, at, size);
          nan |= v != v;
          most = larger(most, v);
        }
        best = larger(best, most);
        return most;
      },
      [](vf* each) { return across(each, [](vf a, vf b) { return larger(a, b); }); });
  for (int i = 0; i < W; ++i)
    if (nan[i]) return __builtin_nanf("");
  return largest(best);
}

template <bool DIVIDED, class T>
void score_masses_by(const T* x, int64_t size, float temperature, float best, float* masses) {
  over_blocks(
      size, masses,
      [&](int64_t begin) {
        vf mass = {};
        for (int64_t at = begin; at < begin + SCORE_BLOCK && at < size; at += W) {
          const vf v = load_scores(x, at, size);
          mass += exp_((DIVIDED ? v / temperature : v) - best);
        }
        return mass;
      },
      [](vf* each) { return sums(each); });
}

template <class T>
void score_masses_of(const T* x, int64_t size, float temperature, float best, float* masses) {
  // Divisions take a sixth of the time.
  if (temperature == 1) score_masses_by<false>(x, size, temperature, best, masses);
  else score_masses_by<true>(x, size, temperature, best, masses);
}

template <class T>
void score_read_of(const T* x, int64_t begin, int64_t end, float* to) {
  for (int64_t i = begin; i < end; ++i) *to++ = to_float(x[i]);
}

template <class T>
const T* score_row(const Scores& s, int64_t row) {
  return static_cast<const T*>(s.data) + row * s.row;
}

float score_peaks(const Scores& s, int64_t row, float* peaks) {
  switch (s.type) {
    case Type::f32: return score_peaks_of(score_row<float>(s, row), s.size, peaks);
    case Type::bf16: return score_peaks_of(score_row<bf16>(s, row), s.size, peaks);
    case Type::f16: return score_peaks_of(score_row<f16>(s, row), s.size, peaks);
  }
  return 0;
}

void score_masses(const Scores& s, int64_t row, float temperature, float best, float* masses) {
  switch (s.type) {
    case Type::f32: return score_masses_of(score_row<float>(s, row), s.size, temperature, best, masses);
    case Type::bf16: return score_masses_of(score_row<bf16>(s, row), s.size, temperature, best, masses);
    case Type::f16: return score_masses_of(score_row<f16>(s, row), s.size, temperature, best, masses);
  }
}

void score_read(const Scores& s, int64_t row, int64_t begin, int64_t end, float* to) {
  switch (s.type) {
    case Type::f32: return score_read_of(score_row<float>(s, row), begin, end, to);
    case Type::bf16: return score_read_of(score_row<bf16>(s, row), begin, end, to);
    case Type::f16: return score_read_of(score_row<f16>(s, row), begin, end, to);
  }
}

void exponentials(const float* x, int64_t count, float temperature, float best, float* to) {
  const vf divisor = splat(temperature);
  int64_t at = 0;
  for (; at + W <= count; at += W) store(to + at, exp_(load(x + at) / divisor - best));
  if (at == count) return;
  const vf rest = exp_(load_scores(x, at, count) / divisor - best);
  for (int64_t i = at; i < count; ++i) to[i] = rest[i - at];
}

}  // namespace
}  // namespace anabranch::cpu
