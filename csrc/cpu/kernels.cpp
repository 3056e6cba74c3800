// The kernels of one instruction set: this file is compiled once for each (see CMakeLists.txt).
#include "cpu/kernels.hpp"

#include <type_traits>

#include "cpu/branch.hpp"
#include "cpu/isa.hpp"
#include "cpu/linear.hpp"
#include "cpu/packed.hpp"
#include "cpu/quantise.hpp"
#include "cpu/scores.hpp"
#include "cpu/stream.hpp"
#include "cpu/subtree.hpp"

#ifndef ANABRANCH_ISA
#define ANABRANCH_ISA plain
#endif

namespace anabranch::cpu {
namespace {

// As many as leave their Q and output half of a second-level cache of 512 KB.
int stream_heads(int head_dim, int v_dim) {
  const int heads =
      (256 << 10) / (STREAM_ROWS * (round_up(head_dim, W) + round_up(v_dim, W)) * int(sizeof(float)));
  return heads > 1 ? heads : 1;
}

// As many as leave their Q, twice, and output in the same.
int subtree_heads(int packed_rows, int head_dim, int v_dim) {
  const int each = packed_rows * (2 * round_up(head_dim, W) + round_up(v_dim, W)) * int(sizeof(float));
  return (256 << 10) / each > 1 ? (256 << 10) / each : 1;
}

size_t subtree_scratch(int packed_rows, int head_dim, int v_dim, int heads) {
  size_t bytes;
  SubtreeScratch<float>(nullptr, packed_rows, head_dim, v_dim, heads, &bytes);
  return bytes;
}

size_t scratch_bytes(int packed_rows, int head_dim, int v_dim, int heads) {
  size_t packed, stream;
  PackedScratch<float>(nullptr, packed_rows, head_dim, v_dim, &packed);  // pairs need no more
  StreamScratch<float>(nullptr, head_dim, v_dim, heads, &stream);
  return packed > stream ? packed : stream;
}

template <class T>
void subtree_of(const Attention& a, int item, int begin, int end, void* scratch) {
  if (a.stored == Stored::i8) return subtree_unit<T, float, i8>(a, item, begin, end, scratch);
  if (a.stored == Stored::e4m3) return subtree_unit<T, float, e4m3>(a, item, begin, end, scratch);
#ifdef ANABRANCH_BF16_PAIRS
  if constexpr (std::is_same_v<T, bf16>)
    if (a.head_dim % (2 * W) == 0 && a.v_dim % (2 * W) == 0) return subtree_unit<T, pair>(a, item, begin, end, scratch);
#endif
  subtree_unit<T, float>(a, item, begin, end, scratch);
}

template <class T>
void unit_of(const Attention& a, int item, int begin, int end, void* scratch) {
  if (parts_of(a, item) > 0) return subtree_of<T>(a, item, begin, end, scratch);
  Unit u(a, item, begin);
  const bool few = u.packed <= STREAM_ROWS;
  if (a.stored == Stored::i8)
    return few ? stream_unit<T, float, i8>(a, u, end, scratch) : packed_unit<T, float, i8>(a, u, scratch);
  if (a.stored == Stored::e4m3)
    return few ? stream_unit<T, float, e4m3>(a, u, end, scratch) : packed_unit<T, float, e4m3>(a, u, scratch);
#ifdef ANABRANCH_BF16_PAIRS
  if constexpr (std::is_same_v<T, bf16>) {
    if (few && a.head_dim % (2 * W) == 0 && a.v_dim % (2 * W) == 0) return stream_unit<T, pair>(a, u, end, scratch);
    if (!few && a.head_dim % 2 == 0) return packed_unit<T, pair>(a, u, scratch);
  }
#endif
  if (few) return stream_unit<T, float>(a, u, end, scratch);
  packed_unit<T, float>(a, u, scratch);
}

void unit(const Attention& a, int item, int begin, int end, void* scratch) {
  switch (a.type) {
    case Type::f32: return unit_of<float>(a, item, begin, end, scratch);
    case Type::bf16: return unit_of<bf16>(a, item, begin, end, scratch);
    case Type::f16: return unit_of<f16>(a, item, begin, end, scratch);
  }
}

// Partials of one row and query head, in the plan's order, so that a result does not depend on who finished first.
template <class T>
void merge_of(const Attention& a, int64_t begin, int64_t end) {
  const int heads = a.num_q_heads, d = a.v_dim;
  for (int64_t e = begin; e < end; ++e) {
    int i = int(e / heads), h = int(e % heads);
    float m = -INF, l = 0, acc[MAX_HEAD_DIM];
    memset(acc, 0, size_t(d) * sizeof(float));
    for (int32_t p = a.merge_ptr[i]; p < a.merge_ptr[i + 1]; ++p) m = larger(m, a.part_m[int64_t(p) * heads + h]);
    for (int32_t p = a.merge_ptr[i]; p < a.merge_ptr[i + 1]; ++p) {
      int64_t at = int64_t(p) * heads + h;
      if (a.part_m[at] == -INF) continue;  // an empty partial
      float weight = expf(a.part_m[at] - m);
      l += a.part_l[at] * weight;
      const float* from = a.part_acc + at * d;
      for (int c = 0; c < d; ++c) acc[c] += from[c] * weight;
    }
    finish<T>(a, a.merge_rows[i], h, m, l, acc);
  }
}

void merge(const Attention& a, int64_t begin, int64_t end) {
  switch (a.type) {
    case Type::f32: return merge_of<float>(a, begin, end);
    case Type::bf16: return merge_of<bf16>(a, begin, end);
    case Type::f16: return merge_of<f16>(a, begin, end);
  }
}

}  // namespace

const Kernels& ANABRANCH_NAMED(kernels_, ANABRANCH_ISA)() {
  static constexpr Kernels table = {ANABRANCH_STRING(ANABRANCH_ISA), ANABRANCH_VECTOR_BYTES, stream_heads,
                                    scratch_bytes, subtree_heads, subtree_scratch, unit, merge, quantise, linear_wide, linear_scratch, linear_pack, linear,
                                    branch_lanes, PANEL, branch_scratch, branch_row_bytes, branch_forward,
                                    branch_backward, branch_reduce, score_peaks, score_masses, score_read,
                                    exponentials};
  return table;
}

}  // namespace anabranch::cpu
