"""Attention under a branch mask: the forward, and a backward in two kernels (dQ by tiles of rows; dK and dV by tiles of
columns), each program writing what is its own: no atomics, the same bits every time.

A program's tile is a few consecutive tokens of one or several segments. Its pieces, from the host's table, are the runs
of tokens on the other axis that some of the tile sees, with one bit a token of the tile; nothing else is read. Within a
piece a row sees a column if its bit is set and the column does not come after it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .attention import SCAN, _load_rows, _store_rows, _tanh

# Index arrays are read at each tile's own offset: variants for their alignment would not be faster.
INDEX_ARRAYS = ["tiles_ptr", "pieces_ptr", "positions_ptr"]
ROW_ARRAYS = ["lse_ptr", "delta_ptr", "sinks_ptr"]


@triton.jit
def _piece(pieces_ptr, p, lane):
    """Piece ``p``: its first token, one past its last, and which lanes of the tile see it."""
    at = pieces_ptr + p * 8
    word = tl.load(at + 4 + lane // 32)
    return tl.load(at), tl.load(at + 1), ((word >> (lane % 32)) & 1) != 0


@triton.jit
def _within(positions_ptr, begin, end, low, high):
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


@triton.jit(do_not_specialize=["window"], do_not_specialize_on_alignment=[*INDEX_ARRAYS, *ROW_ARRAYS])
def branch_forward_kernel(
    q_ptr,  # [T, Hq, D], any strides, the last 1
    k_ptr,  # [T, Hkv, D], likewise
    v_ptr,
    out_ptr,  # [T, Hq, D]
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
    stride_out_row,
    stride_out_head,
    HEAD_DIM: tl.constexpr,
    D0: tl.constexpr,  # head_dim is D0 + D1 columns, as in the tree kernel
    D1: tl.constexpr,
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
    row_begin = tl.load(tile_ptr)
    lane = tl.arange(0, BLOCK_M)
    row = row_begin + lane
    live = row < tl.load(tile_ptr + 1)

    D_PADDED: tl.constexpr = HEAD_DIM < D0 + D1
    d0 = tl.arange(0, D0)
    q_at = row.to(tl.int64) * stride_q_row + q_head.to(tl.int64) * stride_q_head
    q0 = _load_rows(q_ptr, q_at, d0, live, HEAD_DIM, D_PADDED and D1 == 0, UPCAST)
    acc0 = tl.zeros([BLOCK_M, D0], tl.float32)
    if D1 > 0:
        d1 = D0 + tl.arange(0, D1)
        q1 = _load_rows(q_ptr, q_at, d1, live, HEAD_DIM, D_PADDED, UPCAST)
        acc1 = tl.zeros([BLOCK_M, D1], tl.float32)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)  # noqa: E741
    if HAS_WINDOW:
        row_pos = tl.load(positions_ptr + row, mask=live, other=0)
        low = tl.min(tl.where(live, row_pos, 2147483647), axis=0) - window

    k_base = k_ptr + (q_head // group).to(tl.int64) * stride_k_head
    v_base = v_ptr + (q_head // group).to(tl.int64) * stride_v_head
    for p in range(tl.load(tile_ptr + 2), tl.load(tile_ptr + 3)):
        begin, end, sees = _piece(pieces_ptr, p, lane)
        if HAS_WINDOW:
            begin, end = _within(positions_ptr, begin, end, low, 2147483647)
        limit = tl.where(sees & live, tl.minimum(row + 1, end), 0)
        for start in range(begin, end, BLOCK_N):
            n = start + tl.arange(0, BLOCK_N)
            keep = n < end
            k_at = n.to(tl.int64) * stride_k_row
            v_at = n.to(tl.int64) * stride_v_row
            k0 = _load_rows(k_base, k_at, d0, keep, HEAD_DIM, D_PADDED and D1 == 0, UPCAST)
            s = tl.dot(q0, tl.trans(k0), input_precision="ieee")
            if D1 > 0:
                k1 = _load_rows(k_base, k_at, d1, keep, HEAD_DIM, D_PADDED, UPCAST)
                s = tl.dot(q1, tl.trans(k1), s, input_precision="ieee")
            s = s * scale
            if HAS_SOFTCAP:
                s = softcap * _tanh(s / softcap)
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
            v0 = _load_rows(v_base, v_at, d0, keep, HEAD_DIM, D_PADDED and D1 == 0, UPCAST)
            w_in = w.to(v0.dtype)
            acc0 = tl.dot(w_in, v0, acc0 * alpha[:, None], input_precision="ieee")
            if D1 > 0:
                v1 = _load_rows(v_base, v_at, d1, keep, HEAD_DIM, D_PADDED, UPCAST)
                acc1 = tl.dot(w_in, v1, acc1 * alpha[:, None], input_precision="ieee")
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
    tl.store(lse_ptr + row.to(tl.int64) * num_q_heads + q_head, lse, mask=live)
    out_at = row.to(tl.int64) * stride_out_row + q_head.to(tl.int64) * stride_out_head
    _store_rows(out_ptr, out_at, d0, acc0 * weight[:, None], live, HEAD_DIM, D_PADDED and D1 == 0)
    if D1 > 0:
        _store_rows(out_ptr, out_at, d1, acc1 * weight[:, None], live, HEAD_DIM, D_PADDED)


@triton.jit(do_not_specialize=["window"], do_not_specialize_on_alignment=[*INDEX_ARRAYS, *ROW_ARRAYS])
def branch_dq_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    grad_ptr,  # [T, Hq, D], contiguous
    dq_ptr,  # [T, Hq, D], contiguous
    lse_ptr,  # float32 [T, Hq], contiguous
    delta_ptr,  # float32 [T, Hq], contiguous: grad · out − grad_lse
    tiles_ptr,
    pieces_ptr,
    positions_ptr,
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
    stride_grad_row,
    stride_grad_head,
    HEAD_DIM: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    UPCAST: tl.constexpr,
):
    tile_ptr = tiles_ptr + (tl.program_id(0) // num_q_heads).to(tl.int64) * 4
    q_head = tl.program_id(0) % num_q_heads
    lane = tl.arange(0, BLOCK_M)
    row = tl.load(tile_ptr) + lane
    live = row < tl.load(tile_ptr + 1)

    D_PADDED: tl.constexpr = HEAD_DIM < D0 + D1
    d0 = tl.arange(0, D0)
    q_at = row.to(tl.int64) * stride_q_row + q_head.to(tl.int64) * stride_q_head
    g_at = row.to(tl.int64) * stride_grad_row + q_head.to(tl.int64) * stride_grad_head
    q0 = _load_rows(q_ptr, q_at, d0, live, HEAD_DIM, D_PADDED and D1 == 0, UPCAST)
    g0 = _load_rows(grad_ptr, g_at, d0, live, HEAD_DIM, D_PADDED and D1 == 0, UPCAST)
    dq0 = tl.zeros([BLOCK_M, D0], tl.float32)
    if D1 > 0:
        d1 = D0 + tl.arange(0, D1)
        q1 = _load_rows(q_ptr, q_at, d1, live, HEAD_DIM, D_PADDED, UPCAST)
        g1 = _load_rows(grad_ptr, g_at, d1, live, HEAD_DIM, D_PADDED, UPCAST)
        dq1 = tl.zeros([BLOCK_M, D1], tl.float32)
    at = row.to(tl.int64) * num_q_heads + q_head
    lse = tl.load(lse_ptr + at, mask=live, other=0.0)
    lse = tl.where(lse == float("-inf"), 0.0, lse)
    delta = tl.load(delta_ptr + at, mask=live, other=0.0)
    if HAS_WINDOW:
        row_pos = tl.load(positions_ptr + row, mask=live, other=0)
        low = tl.min(tl.where(live, row_pos, 2147483647), axis=0) - window

    k_base = k_ptr + (q_head // group).to(tl.int64) * stride_k_head
    v_base = v_ptr + (q_head // group).to(tl.int64) * stride_v_head
    for p in range(tl.load(tile_ptr + 2), tl.load(tile_ptr + 3)):
        begin, end, sees = _piece(pieces_ptr, p, lane)
        if HAS_WINDOW:
            begin, end = _within(positions_ptr, begin, end, low, 2147483647)
        limit = tl.where(sees & live, tl.minimum(row + 1, end), 0)
        for start in range(begin, end, BLOCK_N):
            n = start + tl.arange(0, BLOCK_N)
            keep = n < end
            k_at = n.to(tl.int64) * stride_k_row
            v_at = n.to(tl.int64) * stride_v_row
            k0 = _load_rows(k_base, k_at, d0, keep, HEAD_DIM, D_PADDED and D1 == 0, UPCAST)
            v0 = _load_rows(v_base, v_at, d0, keep, HEAD_DIM, D_PADDED and D1 == 0, UPCAST)
            s = tl.dot(q0, tl.trans(k0), input_precision="ieee")
            ds = tl.dot(g0, tl.trans(v0), input_precision="ieee")
            if D1 > 0:
                k1 = _load_rows(k_base, k_at, d1, keep, HEAD_DIM, D_PADDED, UPCAST)
                v1 = _load_rows(v_base, v_at, d1, keep, HEAD_DIM, D_PADDED, UPCAST)
                s = tl.dot(q1, tl.trans(k1), s, input_precision="ieee")
                ds = tl.dot(g1, tl.trans(v1), ds, input_precision="ieee")
            s = s * scale
            ds = ds - delta[:, None]
            if HAS_SOFTCAP:
                t = _tanh(s / softcap)
                s = softcap * t
                ds = ds * (1.0 - t * t)
            visible = n[None, :] < limit[:, None]
            if HAS_WINDOW:
                pos = tl.load(positions_ptr + n, mask=keep, other=0)
                visible = visible & (row_pos[:, None] - pos[None, :] < window)
            ds = tl.where(visible, ds * tl.exp(s - lse[:, None]), 0.0).to(k0.dtype)
            dq0 = tl.dot(ds, k0, dq0, input_precision="ieee")
            if D1 > 0:
                dq1 = tl.dot(ds, k1, dq1, input_precision="ieee")

    # dq is contiguous, and so is the gradient: the same offsets
    _store_rows(dq_ptr, g_at, d0, dq0 * scale, live, HEAD_DIM, D_PADDED and D1 == 0)
    if D1 > 0:
        _store_rows(dq_ptr, g_at, d1, dq1 * scale, live, HEAD_DIM, D_PADDED)


@triton.jit(do_not_specialize=["window"], do_not_specialize_on_alignment=[*INDEX_ARRAYS, *ROW_ARRAYS])
def branch_dkdv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    grad_ptr,  # [T, Hq, D], contiguous
    dk_ptr,  # [T, Hkv, D], contiguous
    dv_ptr,  # likewise
    lse_ptr,
    delta_ptr,
    tiles_ptr,  # int32 [tiles, 4]: of columns
    pieces_ptr,  # int32 [pieces, 8]: of rows
    positions_ptr,
    num_kv_heads,
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
    stride_grad_row,
    stride_grad_head,
    stride_dk_row,
    stride_dk_head,
    HEAD_DIM: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BLOCK_M: tl.constexpr,  # rows a step
    BLOCK_N: tl.constexpr,  # columns of a tile at most
    HAS_SOFTCAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    UPCAST: tl.constexpr,
):
    tile_ptr = tiles_ptr + (tl.program_id(0) // num_kv_heads).to(tl.int64) * 4
    kv_head = tl.program_id(0) % num_kv_heads
    lane = tl.arange(0, BLOCK_N)
    col = tl.load(tile_ptr) + lane
    live = col < tl.load(tile_ptr + 1)

    D_PADDED: tl.constexpr = HEAD_DIM < D0 + D1
    d0 = tl.arange(0, D0)
    k_at = col.to(tl.int64) * stride_k_row + kv_head.to(tl.int64) * stride_k_head
    v_at = col.to(tl.int64) * stride_v_row + kv_head.to(tl.int64) * stride_v_head
    k0 = _load_rows(k_ptr, k_at, d0, live, HEAD_DIM, D_PADDED and D1 == 0, UPCAST)
    v0 = _load_rows(v_ptr, v_at, d0, live, HEAD_DIM, D_PADDED and D1 == 0, UPCAST)
    dk0 = tl.zeros([BLOCK_N, D0], tl.float32)
    dv0 = tl.zeros([BLOCK_N, D0], tl.float32)
    if D1 > 0:
        d1 = D0 + tl.arange(0, D1)
        k1 = _load_rows(k_ptr, k_at, d1, live, HEAD_DIM, D_PADDED, UPCAST)
        v1 = _load_rows(v_ptr, v_at, d1, live, HEAD_DIM, D_PADDED, UPCAST)
        dk1 = tl.zeros([BLOCK_N, D1], tl.float32)
        dv1 = tl.zeros([BLOCK_N, D1], tl.float32)
    if HAS_WINDOW:
        col_pos = tl.load(positions_ptr + col, mask=live, other=0)
        high = tl.max(tl.where(live, col_pos, -2147483647), axis=0) + window

    piece_begin = tl.load(tile_ptr + 2)
    pieces = tl.load(tile_ptr + 3) - piece_begin
    for i in range(group * pieces):
        q_head = kv_head * group + i // pieces
        begin, end, sees = _piece(pieces_ptr, piece_begin + i % pieces, lane)
        if HAS_WINDOW:
            begin, end = _within(positions_ptr, begin, end, -2147483647, high)
        since = tl.where(sees & live, col, 2147483647)
        q_base = q_ptr + q_head.to(tl.int64) * stride_q_head
        g_base = grad_ptr + q_head.to(tl.int64) * stride_grad_head
        for start in range(begin, end, BLOCK_M):
            m = start + tl.arange(0, BLOCK_M)
            keep = m < end
            q_at = m.to(tl.int64) * stride_q_row
            g_at = m.to(tl.int64) * stride_grad_row
            at = m.to(tl.int64) * num_kv_heads * group + q_head
            lse = tl.load(lse_ptr + at, mask=keep, other=0.0)
            lse = tl.where(lse == float("-inf"), 0.0, lse)
            q0 = _load_rows(q_base, q_at, d0, keep, HEAD_DIM, D_PADDED and D1 == 0, UPCAST)
            s = tl.dot(k0, tl.trans(q0), input_precision="ieee")  # [columns, rows]
            if D1 > 0:
                q1 = _load_rows(q_base, q_at, d1, keep, HEAD_DIM, D_PADDED, UPCAST)
                s = tl.dot(k1, tl.trans(q1), s, input_precision="ieee")
            s = s * scale
            if HAS_SOFTCAP:
                t = _tanh(s / softcap)
                s = softcap * t
            visible = (m[None, :] >= since[:, None]) & keep[None, :]
            if HAS_WINDOW:
                pos = tl.load(positions_ptr + m, mask=keep, other=0)
                visible = visible & (pos[None, :] - col_pos[:, None] < window)
            w = tl.where(visible, tl.exp(s - lse[None, :]), 0.0)
            g0 = _load_rows(g_base, g_at, d0, keep, HEAD_DIM, D_PADDED and D1 == 0, UPCAST)
            w_in = w.to(g0.dtype)
            dv0 = tl.dot(w_in, g0, dv0, input_precision="ieee")
            ds = tl.dot(v0, tl.trans(g0), input_precision="ieee")
            if D1 > 0:
                g1 = _load_rows(g_base, g_at, d1, keep, HEAD_DIM, D_PADDED, UPCAST)
                dv1 = tl.dot(w_in, g1, dv1, input_precision="ieee")
                ds = tl.dot(v1, tl.trans(g1), ds, input_precision="ieee")
            delta = tl.load(delta_ptr + at, mask=keep, other=0.0)
            ds = ds - delta[None, :]
            if HAS_SOFTCAP:
                ds = ds * (1.0 - t * t)
            ds = tl.where(visible, ds * w, 0.0).to(q0.dtype)
            dk0 = tl.dot(ds, q0, dk0, input_precision="ieee")
            if D1 > 0:
                dk1 = tl.dot(ds, q1, dk1, input_precision="ieee")

    out_at = col.to(tl.int64) * stride_dk_row + kv_head.to(tl.int64) * stride_dk_head
    _store_rows(dk_ptr, out_at, d0, dk0 * scale, live, HEAD_DIM, D_PADDED and D1 == 0)
    _store_rows(dv_ptr, out_at, d0, dv0, live, HEAD_DIM, D_PADDED and D1 == 0)
    if D1 > 0:
        _store_rows(dk_ptr, out_at, d1, dk1 * scale, live, HEAD_DIM, D_PADDED)
        _store_rows(dv_ptr, out_at, d1, dv1, live, HEAD_DIM, D_PADDED)
