// Merging partials, for each (row, query head) in the plan's order, so every run gives the same bits.
#pragma once

#include <type_traits>

#include "cuda/results.cuh"

namespace anabranch::cuda {

// Columns that a thread sums, and partials whose columns are on their way to it at once. One warp for a (row, head) is
// enough where there are many; where there are few, all warps of a block share its columns, never its list: the order
// of the sum, and so its bits, are the same.
template <int WARPS>
struct MergeShape {
  static constexpr int kColumns = WARPS == 1 ? 4 : 1, kBatch = WARPS == 1 ? 8 : 32;
};

ANABRANCH_DEVICE void add_partial(Float4& acc, float weight, const Float4& x) {
  acc = Float4{acc.x + weight * x.x, acc.y + weight * x.y, acc.z + weight * x.z, acc.w + weight * x.w};
}
ANABRANCH_DEVICE void add_partial(float& acc, float weight, const float& x) { acc += weight * x; }
ANABRANCH_DEVICE Float4 times(const Float4& v, float f) { return Float4{v.x * f, v.y * f, v.z * f, v.w * f}; }
ANABRANCH_DEVICE float times(float v, float f) { return v * f; }

template <class T, int WARPS>
ANABRANCH_KERNEL(kThreads, 4)
void merge_kernel(const Attention a) {
  using M = MergeShape<WARPS>;
  using Columns = std::conditional_t<M::kColumns == 4, Float4, float>;
  const int lane = ptx::thread() & 31;
  const u32 heads = static_cast<u32>(a.num_q_heads), per_block = kWarps / WARPS;
  const u32 units = static_cast<u32>(a.counts == nullptr ? a.num_merge : ptx::load(a.counts + 2)) * heads;
  const Float2* const stats = reinterpret_cast<const Float2*>(a.part_ml);
  const u32 first = static_cast<u32>(ptx::block()) * per_block + ptx::thread() / (32 * WARPS);
  // What the plan says of a unit is looked up a unit ahead, of the first one while the attention kernel still runs.
  struct Where {
    int begin, end, row;
  };
  const auto look_up = [&](u32 unit) {
    if (unit >= units) return Where{0, 0, 0};
    const int i = static_cast<int>(unit / heads);
    return Where{ptx::load(a.merge_ptr + i), ptx::load(a.merge_ptr + i + 1), ptx::load(a.merge_rows + i)};
  };
  Where next = look_up(first);
  ptx::wait_for_launch_before(Site::launch_before);
  for (u32 unit = first, step = static_cast<u32>(ptx::blocks()) * per_block; unit < units; unit += step) {
    const int q_head = static_cast<int>(unit % heads), begin = next.begin, end = next.end;
    const i64 row = static_cast<i64>(next.row) * a.num_q_heads + q_head;
    next = look_up(unit + step);
    // A lane keeps m and l of one partial of each 32; the others get them from it.
    const auto stat_of = [&](int p) {
      return p < end ? ptx::load(stats + static_cast<i64>(p) * a.num_q_heads + q_head) : Float2{minus_infinity(), 0};
    };
    const Float2 nearest = stat_of(begin + lane);
    float m = nearest.x;
    for (int p = begin + lane + 32; p < end; p += 32) m = larger(m, stat_of(p).x);
    ANABRANCH_UNROLL
    for (int d = 16; d > 0; d >>= 1) m = larger(m, ptx::shuffle_xor(m, d));

    for (int base = 0; base < a.head_dim; base += WARPS * 32 * M::kColumns) {
      const int column = base + ptx::thread() % (32 * WARPS) * M::kColumns;
      const bool mine = column < a.head_dim;
      float l = 0;
      Columns acc{};
      for (int some = begin; some < end; some += 32) {
        const Float2 stat = some == begin ? nearest : stat_of(some + lane);
        const float weight = stat.x == minus_infinity() ? -1 : ptx::exp2(stat.x - m);  // −1: empty, it has no acc
        ANABRANCH_NO_UNROLL
        for (int batch = some; batch < smaller(end, some + 32); batch += M::kBatch) {
          Columns x[M::kBatch];
          const float* from = a.part_acc + (static_cast<i64>(batch) * a.num_q_heads + q_head) * a.head_dim + column;
          ANABRANCH_UNROLL
          for (int n = 0; n < M::kBatch; ++n, from += static_cast<i64>(a.num_q_heads) * a.head_dim) {
            x[n] = Columns{};
            if (mine && batch + n < end) x[n] = ptx::load(reinterpret_cast<const Columns*>(from));
          }
          ANABRANCH_UNROLL
          for (int n = 0; n < M::kBatch; ++n) {
            const float w = ptx::shuffle(weight, batch - some + n), part = ptx::shuffle(stat.y, batch - some + n);
            if (w < 0) continue;
            l += w * part;
            add_partial(acc, w, x[n]);
          }
        }
      }
      const Final f(a, q_head, m, l);
      if (column == 0 && a.lse != nullptr) ptx::store(a.lse + row, f.lse);
      if (mine) store_columns(static_cast<T*>(a.out) + row * a.head_dim + column, times(acc, f.weight));
    }
  }
}

}  // namespace anabranch::cuda
