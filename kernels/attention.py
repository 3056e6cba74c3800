"""Tree attention: one program computes (work item × KV head × tile of packed query rows).

Why a plain grid. Items come most expensive first, and a GPU's block scheduler hands the next block to the first free
multiprocessor: that is longest-first list scheduling already, with no queue of our own. A persistent kernel would
need an atomic counter that every launch (and every replay of a CUDA graph) must find at zero. For graphs the grid may
be larger than the work: ``counts_ptr[0]`` is then the true number of items, on the device, and the programs beyond
it leave at once (a few hundred nanoseconds a wave).
"""

from __future__ import annotations

import triton
import triton.language as tl

SCAN = tl.constexpr(256)  # positions looked at at once when a window cuts an item short


@triton.jit
def _tanh(x):
    """tanh to about 1e-7 of its value; libdevice's own is not there in the interpreter."""
    x2 = x * x
    # Near zero 1 − 2/(e^2x + 1) loses all its digits, and softcap leaves most scores exactly there.
    small = x * (1.0 + x2 * (-1.0 / 3 + x2 * (2.0 / 15 + x2 * (-17.0 / 315 + x2 * (62.0 / 2835)))))
    e = tl.exp(-2.0 * tl.abs(x))  # in (0, 1]: nothing overflows
    large = (1.0 - e) / (1.0 + e)
    return tl.where(x2 < 0.0625, small, tl.where(x < 0, -large, large))


@triton.jit
def _load_rows(ptr, offsets, d, keep, HEAD_DIM: tl.constexpr, PADDED: tl.constexpr, UPCAST: tl.constexpr):
    """Rows at ``offsets`` [N] (int64), columns ``d`` [D]; what is not kept is zero and was never read."""
    if PADDED:
        x = tl.load(ptr + offsets[:, None] + d[None, :], mask=keep[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
    else:
        x = tl.load(ptr + offsets[:, None] + d[None, :], mask=keep[:, None], other=0.0)
    if UPCAST:
        x = x.to(tl.float32)
    return x


@triton.jit
def _store_rows(ptr, offsets, d, value, keep, HEAD_DIM: tl.constexpr, PADDED: tl.constexpr):
    """``value`` [N, D] to rows at ``offsets`` [N] (int64), in the pointer's dtype."""
    value = value.to(ptr.dtype.element_ty)
    if PADDED:
        tl.store(ptr + offsets[:, None] + d[None, :], value, mask=keep[:, None] & (d < HEAD_DIM)[None, :])
    else:
        tl.store(ptr + offsets[:, None] + d[None, :], value, mask=keep[:, None])


# A plan's arrays are slices of one buffer: a variant for each pattern of their alignments would be compiled as it came
# up, in the middle of a run, and would not be any faster (every read starts at some item's own offset).
PLAN_ARRAYS = [
    "items_ptr",
    "kv_slots_ptr",
    "kv_positions_ptr",
    "rows_ptr",
    "limits_ptr",
    "dest_ptr",
    "row_positions_ptr",
]
OTHERS = ["lse_ptr", "sinks_ptr", "counts_ptr"]


@triton.jit(
    do_not_specialize=["item_begin", "num_items", "num_kv_heads", "window"],
    do_not_specialize_on_alignment=[*PLAN_ARRAYS, *OTHERS],
)
def tree_attention_kernel(
    q_ptr,  # [rows, Hq, D]
    k_ptr,  # [pages, PAGE_SIZE, Hkv, D], any strides, the last 1
    v_ptr,  # like k
    out_ptr,  # [rows, Hq, D]
    lse_ptr,  # float32 [rows, Hq], contiguous
    part_acc_ptr,  # float32 [partials, Hq, D], contiguous
    part_ml_ptr,  # float32 [partials, Hq, 2], contiguous: m, l
    items_ptr,  # int32 [num_items, 8]
    kv_slots_ptr,
    kv_positions_ptr,
    rows_ptr,
    limits_ptr,
    dest_ptr,
    row_positions_ptr,
    sinks_ptr,  # [Hq], read when HAS_SINKS
    counts_ptr,  # int32 [>= 1], read when HAS_COUNTS
    item_begin,  # this launch computes items item_begin … num_items − 1
    num_items,
    num_kv_heads,
    scale,
    softcap,
    window,
    stride_q_row,
    stride_q_head,
    stride_k_page,
    stride_k_slot,
    stride_k_head,
    stride_v_page,
    stride_v_slot,
    stride_v_head,
    stride_out_row,
    stride_out_head,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D0: tl.constexpr,  # head_dim is D0 + D1 columns, both powers of two, so that 80 costs 64 + 16 and not 128;
    D1: tl.constexpr,  # the last columns of D1 are padding where HEAD_DIM < D0 + D1; 0: one part is enough
    PAGE_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_COUNTS: tl.constexpr,
    UPCAST: tl.constexpr,  # interpreter only: its bfloat16 arithmetic is wrong, so compute in float32 there
):
    # Heads of an item are neighbours: they read the same slots, rows and limits while these are in L2.
    item = item_begin + tl.program_id(0) // num_kv_heads
    kv_head = tl.program_id(0) % num_kv_heads
    if HAS_COUNTS:
        num_items = tl.load(counts_ptr)
    if item >= num_items:
        return
    item_ptr = items_ptr + item.to(tl.int64) * 8
    kv_begin = tl.load(item_ptr).to(tl.int64)
    kv_len = tl.load(item_ptr + 1)
    row_begin = tl.load(item_ptr + 2)
    packed = tl.load(item_ptr + 3) * GROUP
    masked = tl.load(item_ptr + 4)
    tile_begin = tl.program_id(1) * BLOCK_M
    if tile_begin >= packed:
        return

    # Packed query rows: lane = (row of the item, query head of the group).
    lane = tile_begin + tl.arange(0, BLOCK_M)
    live = lane < packed
    at = row_begin + lane // GROUP
    q_head = kv_head * GROUP + lane % GROUP
    num_q_heads = num_kv_heads * GROUP
    row = tl.load(rows_ptr + at, mask=live, other=0).to(tl.int64)
    # Without `masked` a row sees the whole item and its limit is not even read; a dead lane sees nothing.
    limited = tl.where(masked != 0, packed, 0)
    limit = tl.load(limits_ptr + at, mask=lane < limited, other=0)
    limit = tl.where(live & (lane >= limited), kv_len, limit)

    D_PADDED: tl.constexpr = HEAD_DIM < D0 + D1
    d0 = tl.arange(0, D0)
    q_at = row * stride_q_row + q_head.to(tl.int64) * stride_q_head
    q0 = _load_rows(q_ptr, q_at, d0, live, HEAD_DIM, D_PADDED and D1 == 0, UPCAST)
    acc0 = tl.zeros([BLOCK_M, D0], tl.float32)
    if D1 > 0:
        d1 = D0 + tl.arange(0, D1)
        q1 = _load_rows(q_ptr, q_at, d1, live, HEAD_DIM, D_PADDED, UPCAST)
        acc1 = tl.zeros([BLOCK_M, D1], tl.float32)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)  # noqa: E741

    begin = 0
    first = 0
    end = tl.max(limit, axis=0)
    if HAS_WINDOW:
        row_pos = tl.load(row_positions_ptr + row, mask=live, other=0)
        kv_pos_max = tl.load(item_ptr + 5)
        row_pos_min = tl.load(item_ptr + 6)
        if row_pos_min - kv_pos_max >= window:
            end = 0
        # What the item's earliest row cannot see, none can. The first and last visible token bound the main loop; a
        # test inside it would keep the compiler from pipelining the gathers. Positions cost 4 bytes a token,
        # K and V hundreds.
        first = end
        last = 0
        for start in range(0, end, SCAN):
            n = start + tl.arange(0, SCAN)
            pos = tl.load(kv_positions_ptr + kv_begin + n, mask=n < end, other=0)
            seen = (n < end) & (row_pos_min - pos < window)
            first = tl.minimum(first, tl.min(tl.where(seen, n, end), axis=0))
            last = tl.maximum(last, tl.max(tl.where(seen, n + 1, 0), axis=0))
        # Block boundaries stay where they are without the window: which rows share an item must not change a sum.
        # Tokens before the first visible one are masked out of the block like those past the end: they may be gone.
        begin = first // BLOCK_N * BLOCK_N
        end = last

    k_base = k_ptr + kv_head.to(tl.int64) * stride_k_head
    v_base = v_ptr + kv_head.to(tl.int64) * stride_v_head
    # A block's slots are fetched one block ahead. Were they loaded in the iteration that uses them, the compiler would
    # see a load behind a load and halve the number of K and V blocks it keeps in flight.
    n = begin + tl.arange(0, BLOCK_N)
    slot = tl.load(kv_slots_ptr + kv_begin + n, mask=(n >= first) & (n < end), other=0)
    for start in range(begin, end, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        keep = (n >= first) & (n < end)
        next_n = n + BLOCK_N
        next_slot = tl.load(kv_slots_ptr + kv_begin + next_n, mask=next_n < end, other=0)
        page = (slot // PAGE_SIZE).to(tl.int64)
        offset = (slot % PAGE_SIZE).to(tl.int64)
        k_at = page * stride_k_page + offset * stride_k_slot
        v_at = page * stride_v_page + offset * stride_v_slot

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
            kv_pos = tl.load(kv_positions_ptr + kv_begin + n, mask=keep, other=0)
            visible = visible & (row_pos[:, None] - kv_pos[None, :] < window)
        s = tl.where(visible, s, float("-inf"))

        m_new = tl.maximum(m, tl.max(s, axis=1))
        # Nothing visible yet: −inf − (−inf) is NaN, −inf − 0 is not.
        m_ref = tl.where(m_new == float("-inf"), 0.0, m_new)
        alpha = tl.exp(m - m_ref)
        p = tl.exp(s - m_ref[:, None])
        l = l * alpha + tl.sum(p, axis=1)  # noqa: E741
        v0 = _load_rows(v_base, v_at, d0, keep, HEAD_DIM, D_PADDED and D1 == 0, UPCAST)
        p_in = p.to(v0.dtype)
        acc0 = tl.dot(p_in, v0, acc0 * alpha[:, None], input_precision="ieee")
        if D1 > 0:
            v1 = _load_rows(v_base, v_at, d1, keep, HEAD_DIM, D_PADDED, UPCAST)
            acc1 = tl.dot(p_in, v1, acc1 * alpha[:, None], input_precision="ieee")
        m = m_new
        slot = next_slot

    # A partial for the merge …
    dest = tl.load(dest_ptr + at, mask=live, other=0)
    to_part = live & (dest >= 0)
    part = dest.to(tl.int64) * num_q_heads + q_head
    tl.store(part_ml_ptr + part * 2, m, mask=to_part)
    tl.store(part_ml_ptr + part * 2 + 1, l, mask=to_part)
    # (the merge never reads the acc of an empty partial, nor is it written)
    to_acc = to_part & (m > float("-inf"))
    _store_rows(part_acc_ptr, part * HEAD_DIM, d0, acc0, to_acc, HEAD_DIM, D_PADDED and D1 == 0)
    if D1 > 0:
        _store_rows(part_acc_ptr, part * HEAD_DIM, d1, acc1, to_acc, HEAD_DIM, D_PADDED)

    # … or the row has this partial alone, and this is its output.
    to_out = live & (dest < 0)
    if HAS_SINKS:
        sink = tl.load(sinks_ptr + q_head, mask=live, other=0.0).to(tl.float32)
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
    tl.store(lse_ptr + row * num_q_heads + q_head, lse, mask=to_out)
    out_at = row * stride_out_row + q_head.to(tl.int64) * stride_out_head
    _store_rows(out_ptr, out_at, d0, acc0 * weight[:, None], to_out, HEAD_DIM, D_PADDED and D1 == 0)
    if D1 > 0:
        _store_rows(out_ptr, out_at, d1, acc1 * weight[:, None], to_out, HEAD_DIM, D_PADDED)
