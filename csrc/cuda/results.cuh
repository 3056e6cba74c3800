// From the sums of warps to partials or to the output.
#pragma once

#include "cuda/shape.cuh"

namespace anabranch::cuda {

// Four columns of the output, or one.
template <class T>
ANABRANCH_DEVICE void store_columns(T* to, const Float4& v) {
  if constexpr (sizeof(T) == 2)
    ptx::store(reinterpret_cast<Int2*>(to),
               Int2{static_cast<i32>(ptx::pack(T{}, v.x, v.y)), static_cast<i32>(ptx::pack(T{}, v.z, v.w))});
  else
    ptx::store(reinterpret_cast<Float4*>(to), v);
}
template <class T>
ANABRANCH_DEVICE void store_columns(T* to, float v) {
  if constexpr (sizeof(T) == 2)
    ptx::store(to, T{static_cast<uint16_t>(ptx::pack(T{}, v, 0.0f))});
  else
    ptx::store(to, v);
}

// m (units of log 2), l and what acc must be divided by, with the sink counted: here and nowhere else.
struct Final {
  float weight, lse;
  ANABRANCH_DEVICE Final(const Attention& a, int q_head, float m, float l) {
    float top = m, shrink = 1;
    if (a.sinks != nullptr) {
      const float sink = ptx::load(a.sinks + q_head) * kLog2e;
      if (sink != minus_infinity()) {
        top = larger(m, sink);
        shrink = ptx::exp2(m - top);
        l = l * shrink + ptx::exp2(sink - top);
      }
    }
    weight = l == 0 ? 0 : shrink / l;  // l is 0 only where nothing was visible; NaN stays NaN
    lse = top == minus_infinity() ? top : (top + ptx::log2(l)) * kLn2;
  }
};

// The results of all warps that share a row, in the order of their tokens, to the row's partial or to the output.
template <class T, int D>
ANABRANCH_DEVICE void emit(const Attention& a, const float* results, const Pass& pass, int warps_n) {
  using S = Shape<T, D>;
  const auto& front = S::front();
  const Float2* const stats = front.stats;
  const int warps_m = pass.warps_m;
  ANABRANCH_NO_UNROLL
  for (int e = ptx::thread_anew(); e < pass.rows * (D / 4); e += kThreads) {
    const int r = e / (D / 4), column = e % (D / 4) * 4;
    if (column >= a.head_dim) continue;
    float m = minus_infinity();
    for (int w = 0; w < warps_n; ++w) m = larger(m, ptx::load(stats + (w * warps_m + r / 16) * 16 + r % 16).x);
    const float reference = m == minus_infinity() ? 0 : m;
    float l = 0;
    Float4 acc{0, 0, 0, 0};
    for (int w = 0; w < warps_n; ++w) {
      const int at = (w * warps_m + r / 16) * 16 + r % 16;
      const Float2 stat = ptx::load(stats + at);
      const float weight = ptx::exp2(stat.x - reference);
      const Float4 part = ptx::load(reinterpret_cast<const Float4*>(results + at * S::kAccPitch + column));
      l += weight * stat.y;
      acc = Float4{acc.x + weight * part.x, acc.y + weight * part.y, acc.z + weight * part.z, acc.w + weight * part.w};
    }
    const int packed = pass.packed_begin + r, of_item = packed / a.group;
    const int q_head = pass.head * a.group + packed % a.group;
    const int dest = front.ahead.destination(a, pass, of_item);
    if (dest >= 0) {
      const i64 part = static_cast<i64>(dest) * a.num_q_heads + q_head;
      if (column == 0) ptx::store(reinterpret_cast<Float2*>(a.part_ml) + part, Float2{m, l});
      // (the merge never reads the acc of an empty partial, nor is it written)
      if (m != minus_infinity()) ptx::store(reinterpret_cast<Float4*>(a.part_acc + part * a.head_dim + column), acc);
    } else {
      const i64 row = static_cast<i64>(front.ahead.row(a, pass, of_item)) * a.num_q_heads + q_head;
      const Final f(a, q_head, m, l);
      if (column == 0 && a.lse != nullptr) ptx::store(a.lse + row, f.lse);
      store_columns(static_cast<T*>(a.out) + row * a.head_dim + column,
                    Float4{acc.x * f.weight, acc.y * f.weight, acc.z * f.weight, acc.w * f.weight});
    }
  }
}

}  // namespace anabranch::cuda
