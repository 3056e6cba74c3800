// K and V into slots of one byte an element: each vector (a token's, of one head) has a factor of its own, so that its
// largest element becomes the largest number of the type and nothing overflows. python/anabranch/kv/formats.py says the
// same in torch; both give the same bits.
#pragma once

#include <type_traits>

#include "cpu/unit.hpp"

namespace anabranch::cpu {
namespace {

template <class S>
constexpr float LARGEST = std::is_same_v<S, i8> ? 127.0f : 448.0f;

// A vector with an infinity or a NaN has NaN for its factor, and reads back as NaN.
template <class T, class S>
void quantise_row(const T* from, int d, S* to, float* scale) {
  float most = 0;
  bool finite = true;
  for (int c = 0; c < d; ++c) {
    const float x = __builtin_fabsf(to_float(from[c]));
    finite &= x < INF;
    most = larger(most, x);
  }
  *scale = finite ? most / LARGEST<S> : __builtin_nanf("");
  for (int c = 0; c < d; ++c) {
    float x = *scale > 0 ? to_float(from[c]) / *scale : 0;
    x = x > LARGEST<S> ? LARGEST<S> : x < -LARGEST<S> ? -LARGEST<S> : x;
    put(to + c, x);
  }
}

template <class T>
void quantise_of(const Write& w, int64_t row, int head) {
  const int64_t page = w.slots[row] / w.page_size, offset = w.slots[row] % w.page_size;
  const T* from = static_cast<const T*>(w.src) + row * w.src_row + head * w.src_head;
  const int64_t to = page * w.dst.page + offset * w.dst.slot + head * w.dst.head;
  void* data = const_cast<void*>(w.dst.data);
  float* scale = const_cast<float*>(w.dst.scales) + page * w.dst.scale_page + offset * w.dst.scale_slot +
                 head * w.dst.scale_head;
  if (w.stored == Stored::i8) quantise_row(from, w.head_dim, static_cast<i8*>(data) + to, scale);
  else quantise_row(from, w.head_dim, static_cast<e4m3*>(data) + to, scale);
}

void quantise(const Write& w, int64_t row, int head) {
  switch (w.type) {
    case Type::f32: return quantise_of<float>(w, row, head);
    case Type::bf16: return quantise_of<bf16>(w, row, head);
    case Type::f16: return quantise_of<f16>(w, row, head);
  }
}

}  // namespace
}  // namespace anabranch::cpu
