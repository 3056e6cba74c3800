"""Attention under a branch mask: the forward, and what it shares with the backward (branch_backward.py). Each program
writes what is its own: no atomics, the same bits every time.

A program's tile is a few consecutive tokens of one or several segments. Its pieces, from the host's table, are the runs
of tokens on the other axis that some of the tile sees, with one bit a token of the tile; nothing else is read. Within a
piece a row sees a column if its bit is set and the column does not come after it.

Infinities and NaN stay with who sees them: what is hidden has weight 0, and 0 · NaN is NaN, so a tile whose result
holds a NaN is computed once more, guarded, 16 tokens at a time (primitives.py).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .primitives import SCAN, any_nan, infinities, load_rows, store_rows, tanh, without_infinities

# Index arrays are read at each tile's own offset: variants for their alignment would not be faster.
INDEX_ARRAYS = ["tiles_ptr", "pieces_ptr", "positions_ptr"]
ROW_ARRAYS = ["lse_ptr", "delta_ptr", "sinks_ptr"]
# As in attention.py: how wide a load may be follows from ALIGN.
STRIDES = ["stride_q_row", "stride_q_head", "stride_k_row", "stride_k_head", "stride_v_row", "stride_v_head"]
GUARD = tl.constexpr(16)  # tokens of a guarded tile, and of a step over it


@triton.jit
def piece(pieces_ptr, p, lane):
    """Piece ``p``: its first token, one past its last, and which lanes of the tile see it."""
    at = pieces_ptr + p * 8
    word = tl.load(at + 4 + lane // 32)
    return tl.load(at), tl.load(at + 1), ((word >> (lane % 32)) & 1) != 0


@triton.jit
def within(positions_ptr, begin, end, low, high):
    """The first and one past the last token of [begin, end) whose position is between low and high, both exclusive."""
    first = end
    last = begin
    for start in range(begin, end, SCAN):
        n = start + tl.arange(0, SCAN)
        pos = tl.load(positions_ptr + n, mask=n < end, other=0)
        seen = (n < end) & (pos > low) & (pos < high)
        first = tl.minimum(first, tl.min(tl.where(seen, n, end), axis=0))
        last = tl.maximum(last, tl.max(tl.where(seen, n + 1, begin), axis=0))
    return first, last


@triton.jit
def add(acc, weights, x, visible, GUARDED: tl.constexpr):
    """acc [M, D] + weights [M, N] · x [N, D]; guarded, what a row does not see cannot make it NaN."""
    if GUARDED:
        x, kind = without_infinities(x)
        acc += infinities(visible, kind)
    return tl.dot(weights, x, acc, input_precision="ieee")


@triton.jit
def _forward_tile(
    pointers,
    strides,
    numbers,
    lane_begin,  # the first of the tile's tokens that this is about
    HEAD_DIM: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    V_DIM: tl.constexpr,
    V0: tl.constexpr,
    V1: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    UPCAST: tl.constexpr,
    GUARDED: tl.constexpr,
):
    """The rows of one tile and query head; returns whether some output is NaN."""
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, tile_ptr, pieces_ptr, positions_ptr, sinks_ptr = pointers
    stride_q_row, stride_q_head, stride_k_row, stride_k_head, stride_v_row, stride_v_head = strides
    q_head, num_q_heads, group, scale, softcap, window = numbers
    lane = lane_begin + tl.arange(0, BLOCK_M)
    row = tl.load(tile_ptr) + lane
    live = row < tl.load(tile_ptr + 1)

    D_PADDED: tl.constexpr = HEAD_DIM < D0 + D1
    d0 = tl.arange(0, D0)
    q_at = tl.multiple_of(row.to(tl.int64) * stride_q_row + q_head.to(tl.int64) * stride_q_head, [ALIGN])
    q0 = load_rows(q_ptr, q_at, d0, live, HEAD_DIM, D_PADDED and D1 == 0, UPCAST)
    if D1 > 0:
        d1 = D0 + tl.arange(0, D1)
        q1 = load_rows(q_ptr, q_at, d1, live, HEAD_DIM, D_PADDED, UPCAST)
    V_PADDED: tl.constexpr = V_DIM < V0 + V1
    v_d0 = tl.arange(0, V0)
    acc0 = tl.zeros([BLOCK_M, V0], tl.float32)
    if V1 > 0:
        v_d1 = V0 + tl.arange(0, V1)
        acc1 = tl.zeros([BLOCK_M, V1], tl.float32)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)  # noqa: E741
    if HAS_WINDOW:
        row_pos = tl.load(positions_ptr + row, mask=live, other=0)
        low = tl.min(tl.where(live, row_pos, 2147483647), axis=0) - window

    k_base = k_ptr + tl.multiple_of((q_head // group).to(tl.int64) * stride_k_head, ALIGN)
    v_base = v_ptr + tl.multiple_of((q_head // group).to(tl.int64) * stride_v_head, ALIGN)
    for p in range(tl.load(tile_ptr + 2), tl.load(tile_ptr + 3)):
        begin, end, sees = piece(pieces_ptr, p, lane)
        if HAS_WINDOW:
            begin, end = within(positions_ptr, begin, end, low, 2147483647)
        limit = tl.where(sees & live, tl.minimum(row + 1, end), 0)
        for start in range(begin, end, BLOCK_N):
            n = start + tl.arange(0, BLOCK_N)
            keep = n < end
            k_at = tl.multiple_of(n.to(tl.int64) * stride_k_row, [ALIGN])
            v_at = tl.multiple_of(n.to(tl.int64) * stride_v_row, [ALIGN])
            k0 = load_rows(k_base, k_at, d0, keep, HEAD_DIM, D_PADDED and D1 == 0, UPCAST)
            s = tl.dot(q0, tl.trans(k0), input_precision="ieee")
            if D1 > 0:
                k1 = load_rows(k_base, k_at, d1, keep, HEAD_DIM, D_PADDED, UPCAST)
                s = tl.dot(q1, tl.trans(k1), s, input_precision="ieee")
            s = s * scale
            if HAS_SOFTCAP:
                s = softcap * tanh(s / softcap)
            visible = n[None, :] < limit[:, None]
            if HAS_WINDOW:
                pos = tl.load(positions_ptr + n, mask=keep, other=0)
                visible = visible & (row_pos[:, None] - pos[None, :] < window)
            s = tl.where(visible, s, float("-inf"))
            m_new = tl.maximum(m, tl.max(s, axis=1))
            m_ref = tl.where(m_new == float("-inf"), 0.0, m_new)
            alpha = tl.exp(m - m_ref)
            w = tl.exp(s - m_ref[:, None])
            l = l * alpha + tl.sum(w, axis=1)  # noqa: E741
            v0 = load_rows(v_base, v_at, v_d0, keep, V_DIM, V_PADDED and V1 == 0, UPCAST)
            w_in = w.to(v0.dtype)
            acc0 = add(acc0 * alpha[:, None], w_in, v0, visible, GUARDED)
            if V1 > 0:
                v1 = load_rows(v_base, v_at, v_d1, keep, V_DIM, V_PADDED, UPCAST)
                acc1 = add(acc1 * alpha[:, None], w_in, v1, visible, GUARDED)
            m = m_new

    if HAS_SINKS:
        sink = tl.load(sinks_ptr + q_head).to(tl.float32)
        m_all = tl.maximum(m, sink)
        m_all = tl.where(m_all == float("-inf"), 0.0, m_all)
        weight = tl.exp(m - m_all)
        total = l * weight + tl.exp(sink - m_all)
    else:
        m_all = tl.where(m == float("-inf"), 0.0, m)
        weight = tl.full([BLOCK_M], 1.0, tl.float32)
        total = l
    some = total > 0
    total = tl.where(some, total, 1.0)
    lse = tl.where(some, m_all + tl.log(total), float("-inf"))
    weight = tl.where(some, weight / total, 0.0)
    of_row = row.to(tl.int64) * num_q_heads + q_head
    tl.store(lse_ptr + of_row, lse, mask=live)
    store_rows(out_ptr, of_row * V_DIM, v_d0, acc0 * weight[:, None], live, V_DIM, V_PADDED and V1 == 0)
    poisoned = any_nan(acc0, live)
    if V1 > 0:
        store_rows(out_ptr, of_row * V_DIM, v_d1, acc1 * weight[:, None], live, V_DIM, V_PADDED)
        poisoned = poisoned | any_nan(acc1, live)
    return poisoned


@triton.jit(
    do_not_specialize=["num_q_heads", "group", "window", *STRIDES],
    do_not_specialize_on_alignment=[*INDEX_ARRAYS, *ROW_ARRAYS],
)
def branch_forward_kernel(
    q_ptr,  # [T, Hq, D], any strides, the last 1
    k_ptr,  # [T, Hkv, D], likewise
    v_ptr,  # [T, Hkv, E]
    out_ptr,  # [T, Hq, E], contiguous
    lse_ptr,  # float32 [T, Hq], contiguous
    tiles_ptr,  # int32 [tiles, 4]: first row, one past the last, first piece, one past the last
    pieces_ptr,  # int32 [pieces, 8]: first column, one past the last, –, –, four words of bits
    positions_ptr,  # int32 [T], read when HAS_WINDOW
    sinks_ptr,  # [Hq], read when HAS_SINKS
    num_q_heads,
    group,
    scale,
    softcap,
    window,
    stride_q_row,
    stride_q_head,
    stride_k_row,
    stride_k_head,
    stride_v_row,
    stride_v_head,
    HEAD_DIM: tl.constexpr,
    D0: tl.constexpr,  # head_dim is D0 + D1 columns, as in the tree kernel
    D1: tl.constexpr,
    V_DIM: tl.constexpr,  # of V, in parts likewise
    V0: tl.constexpr,
    V1: tl.constexpr,
    ALIGN: tl.constexpr,  # a power of two that divides every stride, in elements
    BLOCK_M: tl.constexpr,  # tokens of a tile at most
    BLOCK_N: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    # Heads of a tile are neighbours: those of a group read the same K and V while these are in L2.
    tile_ptr = tiles_ptr + (tl.program_id(0) // num_q_heads).to(tl.int64) * 4
    q_head = tl.program_id(0) % num_q_heads
    pointers = (q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, tile_ptr, pieces_ptr, positions_ptr, sinks_ptr)
    strides = (stride_q_row, stride_q_head, stride_k_row, stride_k_head, stride_v_row, stride_v_head)
    numbers = (q_head, num_q_heads, group, scale, softcap, window)
    poisoned = _forward_tile(
        pointers, strides, numbers, 0, HEAD_DIM, D0, D1, V_DIM, V0, V1, ALIGN, BLOCK_M, BLOCK_N,
        HAS_SOFTCAP, HAS_WINDOW, HAS_SINKS, UPCAST, False,
    )  # fmt: skip
    if poisoned:
        tl.debug_barrier()  # what was just written is written once more, by other threads
        for lane_begin in tl.range(0, tl.load(tile_ptr + 1) - tl.load(tile_ptr), GUARD, num_stages=1):
            _forward_tile(
                pointers, strides, numbers, lane_begin, HEAD_DIM, D0, D1, V_DIM, V0, V1, ALIGN, GUARD, GUARD,
                HAS_SOFTCAP, HAS_WINDOW, HAS_SINKS, UPCAST, True,
            )  # fmt: skip
