"""The backward of attention under a branch mask in two kernels: dQ by tiles of rows, dK and dV by tiles of columns.

Tiles, pieces and the guard against what is hidden are the forward's (branch.py).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .branch import GUARD, INDEX_ARRAYS, ROW_ARRAYS, STRIDES, add, piece, within
from .primitives import any_nan, load_rows, store_rows, tanh


@triton.jit
def _dq_tile(
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
    UPCAST: tl.constexpr,
    GUARDED: tl.constexpr,
):
    """dQ of the rows of one tile and query head; returns whether some of it is NaN."""
    q_ptr, k_ptr, v_ptr, grad_ptr, dq_ptr, lse_ptr, delta_ptr, tile_ptr, pieces_ptr, positions_ptr = pointers
    stride_q_row, stride_q_head, stride_k_row, stride_k_head, stride_v_row, stride_v_head = strides
    q_head, num_q_heads, group, scale, softcap, window = numbers
    lane = lane_begin + tl.arange(0, BLOCK_M)
    row = tl.load(tile_ptr) + lane
    live = row < tl.load(tile_ptr + 1)

    D_PADDED: tl.constexpr = HEAD_DIM < D0 + D1
    d0 = tl.arange(0, D0)
    q_at = tl.multiple_of(row.to(tl.int64) * stride_q_row + q_head.to(tl.int64) * stride_q_head, [ALIGN])
    at = row.to(tl.int64) * num_q_heads + q_head
    q0 = load_rows(q_ptr, q_at, d0, live, HEAD_DIM, D_PADDED and D1 == 0, UPCAST)
    dq0 = tl.zeros([BLOCK_M, D0], tl.float32)
    if D1 > 0:
        d1 = D0 + tl.arange(0, D1)
        q1 = load_rows(q_ptr, q_at, d1, live, HEAD_DIM, D_PADDED, UPCAST)
        dq1 = tl.zeros([BLOCK_M, D1], tl.float32)
    V_PADDED: tl.constexpr = V_DIM < V0 + V1
    v_d0 = tl.arange(0, V0)
    g_at = at * V_DIM  # the gradient is contiguous, and so is dq
    g0 = load_rows(grad_ptr, g_at, v_d0, live, V_DIM, V_PADDED and V1 == 0, UPCAST)
    if V1 > 0:
        v_d1 = V0 + tl.arange(0, V1)
        g1 = load_rows(grad_ptr, g_at, v_d1, live, V_DIM, V_PADDED, UPCAST)
    lse = tl.load(lse_ptr + at, mask=live, other=0.0)
    lse = tl.where(lse == float("-inf"), 0.0, lse)
    delta = tl.load(delta_ptr + at, mask=live, other=0.0)
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
            v0 = load_rows(v_base, v_at, v_d0, keep, V_DIM, V_PADDED and V1 == 0, UPCAST)
            s = tl.dot(q0, tl.trans(k0), input_precision="ieee")
            ds = tl.dot(g0, tl.trans(v0), input_precision="ieee")
            if D1 > 0:
                k1 = load_rows(k_base, k_at, d1, keep, HEAD_DIM, D_PADDED, UPCAST)
                s = tl.dot(q1, tl.trans(k1), s, input_precision="ieee")
            if V1 > 0:
                v1 = load_rows(v_base, v_at, v_d1, keep, V_DIM, V_PADDED, UPCAST)
                ds = tl.dot(g1, tl.trans(v1), ds, input_precision="ieee")
            s = s * scale
            ds = ds - delta[:, None]
            if HAS_SOFTCAP:
                t = tanh(s / softcap)
                s = softcap * t
                ds = ds * (1.0 - t * t)
            visible = n[None, :] < limit[:, None]
            if HAS_WINDOW:
                pos = tl.load(positions_ptr + n, mask=keep, other=0)
                visible = visible & (row_pos[:, None] - pos[None, :] < window)
            ds = tl.where(visible, ds * tl.exp(s - lse[:, None]), 0.0).to(k0.dtype)
            dq0 = add(dq0, ds, k0, visible, GUARDED)
            if D1 > 0:
                dq1 = add(dq1, ds, k1, visible, GUARDED)

    dq_at = at * HEAD_DIM
    store_rows(dq_ptr, dq_at, d0, dq0 * scale, live, HEAD_DIM, D_PADDED and D1 == 0)
    poisoned = any_nan(dq0, live)
    if D1 > 0:
        store_rows(dq_ptr, dq_at, d1, dq1 * scale, live, HEAD_DIM, D_PADDED)
        poisoned = poisoned | any_nan(dq1, live)
    return poisoned


@triton.jit(
    do_not_specialize=["num_q_heads", "group", "window", *STRIDES],
    do_not_specialize_on_alignment=[*INDEX_ARRAYS, *ROW_ARRAYS],
)
def branch_dq_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    grad_ptr,  # [T, Hq, E], contiguous
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
    UPCAST: tl.constexpr,
):
    tile_ptr = tiles_ptr + (tl.program_id(0) // num_q_heads).to(tl.int64) * 4
    q_head = tl.program_id(0) % num_q_heads
    pointers = (q_ptr, k_ptr, v_ptr, grad_ptr, dq_ptr, lse_ptr, delta_ptr, tile_ptr, pieces_ptr, positions_ptr)
    strides = (stride_q_row, stride_q_head, stride_k_row, stride_k_head, stride_v_row, stride_v_head)
    numbers = (q_head, num_q_heads, group, scale, softcap, window)
    poisoned = _dq_tile(
        pointers, strides, numbers, 0, HEAD_DIM, D0, D1, V_DIM, V0, V1, ALIGN, BLOCK_M, BLOCK_N,
        HAS_SOFTCAP, HAS_WINDOW, UPCAST, False,
    )  # fmt: skip
    if poisoned:
        tl.debug_barrier()  # what was just written is written once more, by other threads
        for lane_begin in tl.range(0, tl.load(tile_ptr + 1) - tl.load(tile_ptr), GUARD, num_stages=1):
            _dq_tile(
                pointers, strides, numbers, lane_begin, HEAD_DIM, D0, D1, V_DIM, V0, V1, ALIGN, GUARD, GUARD,
                HAS_SOFTCAP, HAS_WINDOW, UPCAST, True,
            )  # fmt: skip


@triton.jit
def _dkdv_tile(
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
    UPCAST: tl.constexpr,
    GUARDED: tl.constexpr,
):
    """dK and dV of the columns of one tile and KV head; returns whether some of it is NaN."""
    q_ptr, k_ptr, v_ptr, grad_ptr, dk_ptr, dv_ptr, lse_ptr, delta_ptr, tile_ptr, pieces_ptr, positions_ptr = pointers
    stride_q_row, stride_q_head, stride_k_row, stride_k_head, stride_v_row, stride_v_head = strides
    kv_head, num_kv_heads, group, scale, softcap, window = numbers
    lane = lane_begin + tl.arange(0, BLOCK_N)
    col = tl.load(tile_ptr) + lane
    live = col < tl.load(tile_ptr + 1)

    D_PADDED: tl.constexpr = HEAD_DIM < D0 + D1
    d0 = tl.arange(0, D0)
    k_at = tl.multiple_of(col.to(tl.int64) * stride_k_row + kv_head.to(tl.int64) * stride_k_head, [ALIGN])
    v_at = tl.multiple_of(col.to(tl.int64) * stride_v_row + kv_head.to(tl.int64) * stride_v_head, [ALIGN])
    k0 = load_rows(k_ptr, k_at, d0, live, HEAD_DIM, D_PADDED and D1 == 0, UPCAST)
    dk0 = tl.zeros([BLOCK_N, D0], tl.float32)
    if D1 > 0:
        d1 = D0 + tl.arange(0, D1)
        k1 = load_rows(k_ptr, k_at, d1, live, HEAD_DIM, D_PADDED, UPCAST)
        dk1 = tl.zeros([BLOCK_N, D1], tl.float32)
    V_PADDED: tl.constexpr = V_DIM < V0 + V1
    v_d0 = tl.arange(0, V0)
    v0 = load_rows(v_ptr, v_at, v_d0, live, V_DIM, V_PADDED and V1 == 0, UPCAST)
    dv0 = tl.zeros([BLOCK_N, V0], tl.float32)
    if V1 > 0:
        v_d1 = V0 + tl.arange(0, V1)
        v1 = load_rows(v_ptr, v_at, v_d1, live, V_DIM, V_PADDED, UPCAST)
        dv1 = tl.zeros([BLOCK_N, V1], tl.float32)
    if HAS_WINDOW:
        col_pos = tl.load(positions_ptr + col, mask=live, other=0)
        high = tl.max(tl.where(live, col_pos, -2147483647), axis=0) + window

    piece_begin = tl.load(tile_ptr + 2)
    pieces = tl.load(tile_ptr + 3) - piece_begin
    for i in range(group * pieces):
        q_head = kv_head * group + i // pieces
        begin, end, sees = piece(pieces_ptr, piece_begin + i % pieces, lane)
        if HAS_WINDOW:
            begin, end = within(positions_ptr, begin, end, -2147483647, high)
        since = tl.where(sees & live, col, 2147483647)
        q_base = q_ptr + tl.multiple_of(q_head.to(tl.int64) * stride_q_head, ALIGN)
        for start in range(begin, end, BLOCK_M):
            m = start + tl.arange(0, BLOCK_M)
            keep = m < end
            q_at = tl.multiple_of(m.to(tl.int64) * stride_q_row, [ALIGN])
            at = m.to(tl.int64) * num_kv_heads * group + q_head
            g_at = at * V_DIM  # the gradient is contiguous
            lse = tl.load(lse_ptr + at, mask=keep, other=0.0)
            lse = tl.where(lse == float("-inf"), 0.0, lse)
            q0 = load_rows(q_base, q_at, d0, keep, HEAD_DIM, D_PADDED and D1 == 0, UPCAST)
            s = tl.dot(k0, tl.trans(q0), input_precision="ieee")  # [columns, rows]
            if D1 > 0:
                q1 = load_rows(q_base, q_at, d1, keep, HEAD_DIM, D_PADDED, UPCAST)
                s = tl.dot(k1, tl.trans(q1), s, input_precision="ieee")
            s = s * scale
            if HAS_SOFTCAP:
                t = tanh(s / softcap)
                s = softcap * t
            visible = (m[None, :] >= since[:, None]) & keep[None, :]
            if HAS_WINDOW:
                pos = tl.load(positions_ptr + m, mask=keep, other=0)
                visible = visible & (pos[None, :] - col_pos[:, None] < window)
            w = tl.where(visible, tl.exp(s - lse[None, :]), 0.0)
            g0 = load_rows(grad_ptr, g_at, v_d0, keep, V_DIM, V_PADDED and V1 == 0, UPCAST)
            w_in = w.to(g0.dtype)
            dv0 = add(dv0, w_in, g0, visible, GUARDED)
            ds = tl.dot(v0, tl.trans(g0), input_precision="ieee")
            if V1 > 0:
                g1 = load_rows(grad_ptr, g_at, v_d1, keep, V_DIM, V_PADDED, UPCAST)
                dv1 = add(dv1, w_in, g1, visible, GUARDED)
                ds = tl.dot(v1, tl.trans(g1), ds, input_precision="ieee")
            delta = tl.load(delta_ptr + at, mask=keep, other=0.0)
            ds = ds - delta[None, :]
            if HAS_SOFTCAP:
                ds = ds * (1.0 - t * t)
            ds = tl.where(visible, ds * w, 0.0).to(q0.dtype)
            dk0 = add(dk0, ds, q0, visible, GUARDED)
            if D1 > 0:
                dk1 = add(dk1, ds, q1, visible, GUARDED)

    of_col = col.to(tl.int64) * num_kv_heads + kv_head  # dk and dv are contiguous
    store_rows(dk_ptr, of_col * HEAD_DIM, d0, dk0 * scale, live, HEAD_DIM, D_PADDED and D1 == 0)
    store_rows(dv_ptr, of_col * V_DIM, v_d0, dv0, live, V_DIM, V_PADDED and V1 == 0)
    poisoned = any_nan(dk0, live) | any_nan(dv0, live)
    if D1 > 0:
        store_rows(dk_ptr, of_col * HEAD_DIM, d1, dk1 * scale, live, HEAD_DIM, D_PADDED)
        poisoned = poisoned | any_nan(dk1, live)
    if V1 > 0:
        store_rows(dv_ptr, of_col * V_DIM, v_d1, dv1, live, V_DIM, V_PADDED)
        poisoned = poisoned | any_nan(dv1, live)
    return poisoned


@triton.jit(
    do_not_specialize=["num_kv_heads", "group", "window", *STRIDES],
    do_not_specialize_on_alignment=[*INDEX_ARRAYS, *ROW_ARRAYS],
)
def branch_dkdv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    grad_ptr,  # [T, Hq, E], contiguous
    dk_ptr,  # [T, Hkv, D], contiguous
    dv_ptr,  # [T, Hkv, E], contiguous
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
    HEAD_DIM: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    V_DIM: tl.constexpr,
    V0: tl.constexpr,
    V1: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr,  # rows a step
    BLOCK_N: tl.constexpr,  # columns of a tile at most
    HAS_SOFTCAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    UPCAST: tl.constexpr,
):
    tile_ptr = tiles_ptr + (tl.program_id(0) // num_kv_heads).to(tl.int64) * 4
    kv_head = tl.program_id(0) % num_kv_heads
    pointers = (
        q_ptr, k_ptr, v_ptr, grad_ptr, dk_ptr, dv_ptr, lse_ptr, delta_ptr, tile_ptr, pieces_ptr, positions_ptr,
    )  # fmt: skip
    strides = (stride_q_row, stride_q_head, stride_k_row, stride_k_head, stride_v_row, stride_v_head)
    numbers = (kv_head, num_kv_heads, group, scale, softcap, window)
    poisoned = _dkdv_tile(
        pointers, strides, numbers, 0, HEAD_DIM, D0, D1, V_DIM, V0, V1, ALIGN, BLOCK_M, BLOCK_N,
        HAS_SOFTCAP, HAS_WINDOW, UPCAST, False,
    )  # fmt: skip
    if poisoned:
        tl.debug_barrier()  # what was just written is written once more, by other threads
        for lane_begin in tl.range(0, tl.load(tile_ptr + 1) - tl.load(tile_ptr), GUARD, num_stages=1):
            _dkdv_tile(
                pointers, strides, numbers, lane_begin, HEAD_DIM, D0, D1, V_DIM, V0, V1, ALIGN, GUARD, GUARD,
                HAS_SOFTCAP, HAS_WINDOW, UPCAST, True,
            )  # fmt: skip
