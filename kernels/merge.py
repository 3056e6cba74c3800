"""Merging partials: one program a (row, query head); partials in the plan's order, so every run gives the same bits."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(
    do_not_specialize=["num_merge", "num_q_heads"],
    do_not_specialize_on_alignment=["merge_rows_ptr", "merge_ptr_ptr", "lse_ptr", "sinks_ptr", "counts_ptr"],
)
def merge_kernel(
    part_acc_ptr,  # float32 [partials, Hq, E], contiguous
    part_ml_ptr,  # float32 [partials, Hq, 2], contiguous: m, l
    merge_rows_ptr,  # int32 [num_merge]
    merge_ptr_ptr,  # int32 [num_merge + 1]
    out_ptr,  # [rows, Hq, E], contiguous
    lse_ptr,  # float32 [rows, Hq], contiguous
    sinks_ptr,  # [Hq], read when HAS_SINKS
    counts_ptr,  # int32 [>= 3], counts[2] = num_merge, read when HAS_COUNTS
    num_merge,
    num_q_heads,
    HEAD_DIM: tl.constexpr,  # E, of V
    BLOCK_D: tl.constexpr,  # head_dim rounded up to a power of two
    BLOCK_P: tl.constexpr,  # partials at once: a long chain has hundreds, and a serial walk would wait for each
    HAS_SINKS: tl.constexpr,
    HAS_COUNTS: tl.constexpr,
):
    at = tl.program_id(0) // num_q_heads
    q_head = tl.program_id(0) % num_q_heads
    if HAS_COUNTS:
        num_merge = tl.load(counts_ptr + 2)
    if at >= num_merge:
        return
    row = tl.load(merge_rows_ptr + at).to(tl.int64)
    begin = tl.load(merge_ptr_ptr + at)
    end = tl.load(merge_ptr_ptr + at + 1)
    d = tl.arange(0, BLOCK_D)
    in_d = d < HEAD_DIM

    # The sink is the first term of the sum, counted here and nowhere else.
    if HAS_SINKS:
        m = tl.load(sinks_ptr + q_head).to(tl.float32)
        l = tl.where(m > float("-inf"), 1.0, 0.0)  # noqa: E741
    else:
        m = tl.full([], float("-inf"), tl.float32)
        l = tl.full([], 0.0, tl.float32)  # noqa: E741
    acc = tl.zeros([BLOCK_D], tl.float32)
    for start in range(begin, end, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        part = p.to(tl.int64) * num_q_heads + q_head
        part_m = tl.load(part_ml_ptr + part * 2, mask=p < end, other=float("-inf"))
        part_l = tl.load(part_ml_ptr + part * 2 + 1, mask=p < end, other=0.0)
        # An empty partial (m = −inf) has no acc: what lies there is whatever the memory held.
        has = part_m > float("-inf")
        part_acc = tl.load(
            part_acc_ptr + part[:, None] * HEAD_DIM + d[None, :], mask=has[:, None] & in_d[None, :], other=0.0
        )
        m_new = tl.maximum(m, tl.max(part_m, axis=0))
        m_ref = tl.where(m_new == float("-inf"), 0.0, m_new)
        alpha = tl.exp(m - m_ref)
        weight = tl.exp(part_m - m_ref)
        l = l * alpha + tl.sum(weight * part_l, axis=0)  # noqa: E741
        acc = acc * alpha + tl.sum(weight[:, None] * part_acc, axis=0)
        m = m_new

    some = l > 0
    total = tl.where(some, l, 1.0)
    lse = tl.where(some, m + tl.log(total), float("-inf"))
    out = tl.where(some, acc / total, 0.0)
    of_row = row * num_q_heads + q_head
    tl.store(lse_ptr + of_row, lse)
    tl.store(out_ptr + of_row * HEAD_DIM + d, out.to(out_ptr.dtype.element_ty), mask=in_d)
