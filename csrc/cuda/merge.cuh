// Merging partials: a warp a (row, query head), partials in the plan's order, so every run gives the same bits.
#pragma once

#include "cuda/attention.cuh"

namespace anabranch::cuda {

template <class T>
ANABRANCH_KERNEL(kThreads, 4)
void merge_kernel(const Attention a) {
  const int lane = ptx::thread() & 31;
  const i64 units = static_cast<i64>(a.counts == nullptr ? a.num_merge : ptx::load(a.counts + 2)) * a.num_q_heads;
  for (i64 unit = static_cast<i64>(ptx::block()) * kWarps + ptx::thread() / 32; unit < units;
       unit += static_cast<i64>(ptx::blocks()) * kWarps) {
    const int i = static_cast<int>(unit / a.num_q_heads), q_head = static_cast<int>(unit % a.num_q_heads);
    const int begin = ptx::load(a.merge_ptr + i), end = ptx::load(a.merge_ptr + i + 1);
    const Float2* const stats = reinterpret_cast<const Float2*>(a.part_ml);
    float m = minus_infinity();
    for (int p = begin + lane; p < end; p += 32)
      m = larger(m, ptx::load(stats + static_cast<i64>(p) * a.num_q_heads + q_head).x);
    ANABRANCH_UNROLL
    for (int d = 16; d > 0; d >>= 1) m = larger(m, ptx::shuffle_xor(m, d));
    const i64 row = static_cast<i64>(ptx::load(a.merge_rows + i)) * a.num_q_heads + q_head;
    for (int column = lane * 4; column < a.head_dim; column += 128) {
      float l = 0;
      Float4 acc{0, 0, 0, 0};
      for (int p = begin; p < end; ++p) {
        const i64 part = static_cast<i64>(p) * a.num_q_heads + q_head;
        const Float2 stat = ptx::load(stats + part);
        if (stat.x == minus_infinity()) continue;  // empty: it has no acc
        const float weight = ptx::exp2(stat.x - m);
        const Float4 x = ptx::load(reinterpret_cast<const Float4*>(a.part_acc + part * a.head_dim + column));
        l += weight * stat.y;
        acc = Float4{acc.x + weight * x.x, acc.y + weight * x.y, acc.z + weight * x.z, acc.w + weight * x.w};
      }
      const Final f(a, q_head, m, l);
      if (column == 0 && a.lse != nullptr) ptx::store(a.lse + row, f.lse);
      store_columns(static_cast<T*>(a.out) + row * a.head_dim + column,
                    Float4{acc.x * f.weight, acc.y * f.weight, acc.z * f.weight, acc.w * f.weight});
    }
  }
}

}  // namespace anabranch::cuda
