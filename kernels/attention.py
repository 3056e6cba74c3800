"""Tree attention: one program computes (work item × KV head × tile of packed query rows).

Why two tiles in one kernel. A leaf of a tree has one row, the root has all: in the root's tile a leaf would waste most
lanes. Which of the two an item gets follows from its own packed rows alone, so the order of its sums, and with it every
bit of its result, is the same whoever else is in the batch. One launch holds both; a launch for each would be the
fourth of a layer (KV write, wide, narrow, merge). The price: a narrow program is given the registers and the shared
memory of the wide tile, which is therefore no larger than lets two programs share a multiprocessor (configs.py).

Why a plain grid. Items come most expensive first, and a GPU's block scheduler hands the next block to the first free
multiprocessor: that is longest-first list scheduling already, with no queue of our own. A persistent kernel would
need an atomic counter that every launch (and every replay of a CUDA graph) must find at zero. For graphs the grid may
be larger than the work: ``counts_ptr[0]`` is then the true number of items, on the device, and the programs beyond
it leave at once (a few hundred nanoseconds a wave).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .primitives import (
    SCAN,
    any_nan,
    infinities,
    load_positions,
    load_rows,
    load_strips,
    of_part,
    places_of,
    store_rows,
    tanh,
    tokens_of,
    without_infinities,
)
from .quantise import AS_THEY_ARE, dequantised

NARROW = tl.constexpr(16)  # packed rows of the smaller tile: the fewest that a tensor core multiplies
GUARD_N = tl.constexpr(16)  # tokens a step where infinities are kept from rows that do not see them

# A plan's arrays are slices of one buffer: a variant for each pattern of their alignments would be compiled as it came
# up, in the middle of a run, and would not be any faster (every read starts at some item's own offset).
PLAN_ARRAYS = [
    "items_ptr",
    "kv_strips_ptr",
    "kv_spelled_ptr",
    "rows_ptr",
    "limits_ptr",
    "dest_ptr",
    "row_positions_ptr",
]
OTHERS = ["lse_ptr", "sinks_ptr", "counts_ptr", "k_scales_ptr", "v_scales_ptr"]


@triton.jit
def _sum_tokens(
    q0,
    q1,
    k_base,
    v_base,
    kv_strips_ptr,  # of the item
    kv_spelled_ptr,
    place,  # of the item's first token in its first strip
    parts,  # PARTS > 0: (first token, end, from tokens to places, first row, end) of each, [PARTS]
    item_row,  # of each lane, counted from the item's first
    first,
    end,
    limit,
    row_pos,
    scale,
    softcap,
    window,
    stride_k_page,
    stride_k_slot,
    stride_v_page,
    stride_v_slot,
    factors,  # of quantised pages: (k, v of this head, strides of page and slot of each)
    HEAD_DIM: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    V_DIM: tl.constexpr,
    V0: tl.constexpr,
    V1: tl.constexpr,
    V_IN_K: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    STRIP_SHIFT: tl.constexpr,
    KV_ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    UPCAST: tl.constexpr,
    STORED: tl.constexpr,
    PARTS: tl.constexpr,
    GUARDED: tl.constexpr,  # infinities and NaN in V reach the rows that see them and no others
):
    """m, l [BLOCK_M] and acc [BLOCK_M, V0], [BLOCK_M, V1] (V1 = 0: the first again) of tokens first … end − 1."""
    D_PADDED: tl.constexpr = HEAD_DIM < D0 + D1
    V_PADDED: tl.constexpr = V_DIM < V0 + V1
    d0 = tl.arange(0, D0)
    if D1 > 0:
        d1 = D0 + tl.arange(0, D1)
    v_d0 = tl.arange(0, V0)
    acc0 = tl.zeros([BLOCK_M, V0], tl.float32)
    if V1 > 0:
        v_d1 = V0 + tl.arange(0, V1)
        acc1 = tl.zeros([BLOCK_M, V1], tl.float32)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)  # noqa: E741

    # Block boundaries stay where they are without the window: which rows share an item must not change a sum.
    # Tokens before the first visible one are masked out of the block like those past the end: they may be gone.
    begin = first // BLOCK_N * BLOCK_N
    # A block's slots are there one block ahead, the strips that they come from two. Were one loaded in the iteration
    # that uses it, the compiler would see a load behind a load and halve the K and V blocks it keeps in flight.
    n = begin + tl.arange(0, BLOCK_N)
    keep = (n >= first) & (n < end)
    at = places_of(n, place, parts, PARTS)
    next_at = places_of(n + BLOCK_N, place, parts, PARTS)
    strip = load_strips(kv_strips_ptr, at, keep, 0, STRIP_SHIFT)
    slot = tokens_of(strip, strip, kv_spelled_ptr, at, keep, 0, STRIP_SHIFT)
    strip = load_strips(kv_strips_ptr, next_at, n + BLOCK_N < end, 0, STRIP_SHIFT)
    for start in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        n = start + tl.arange(0, BLOCK_N)
        keep = (n >= first) & (n < end)
        next_n = n + BLOCK_N
        after = next_n + BLOCK_N
        next_at = places_of(next_n, place, parts, PARTS)
        next_slot = tokens_of(strip, strip, kv_spelled_ptr, next_at, next_n < end, 0, STRIP_SHIFT)
        strip = load_strips(kv_strips_ptr, places_of(after, place, parts, PARTS), after < end, 0, STRIP_SHIFT)
        page = (slot // PAGE_SIZE).to(tl.int64)
        offset = (slot % PAGE_SIZE).to(tl.int64)
        k_at = tl.multiple_of(page * stride_k_page + offset * stride_k_slot, [KV_ALIGN])
        v_at = tl.multiple_of(page * stride_v_page + offset * stride_v_slot, [KV_ALIGN])

        k0 = load_rows(k_base, k_at, d0, keep, HEAD_DIM, D_PADDED and D1 == 0, UPCAST and STORED == AS_THEY_ARE)
        stored0 = k0
        if STORED != AS_THEY_ARE:  # exact in any type of q; the factors multiply the scores
            k0 = dequantised(k0, STORED).to(q0.dtype)
        s = tl.dot(q0, tl.trans(k0), input_precision="ieee")
        if D1 > 0:
            k1 = load_rows(k_base, k_at, d1, keep, HEAD_DIM, D_PADDED, UPCAST and STORED == AS_THEY_ARE)
            if STORED != AS_THEY_ARE:
                k1 = dequantised(k1, STORED).to(q0.dtype)
            s = tl.dot(q1, tl.trans(k1), s, input_precision="ieee")
        s = s * scale
        if STORED != AS_THEY_ARE:
            k_scales, v_scales, stride_ks_page, stride_ks_slot, stride_vs_page, stride_vs_slot = factors
            k_scale = tl.load(k_scales + page * stride_ks_page + offset * stride_ks_slot, mask=keep, other=0.0)
            v_scale = tl.load(v_scales + page * stride_vs_page + offset * stride_vs_slot, mask=keep, other=0.0)
            s = s * k_scale[None, :]
        if HAS_SOFTCAP:
            s = softcap * tanh(s / softcap)
        visible = n[None, :] < limit[:, None]
        if PARTS > 0:
            starts, ends, _, rows_begin, rows_end = parts
            visible = visible & (item_row[:, None] >= of_part(n, starts, ends, rows_begin)[None, :])
            visible = visible & (item_row[:, None] < of_part(n, starts, ends, rows_end)[None, :])
        if HAS_WINDOW:
            at = places_of(n, place, parts, PARTS)
            kv_pos = load_positions(kv_strips_ptr, kv_spelled_ptr, at, keep, STRIP_SHIFT)
            visible = visible & (row_pos[:, None] - kv_pos[None, :] < window)
        s = tl.where(visible, s, float("-inf"))

        m_new = tl.maximum(m, tl.max(s, axis=1))
        # Nothing visible yet: −inf − (−inf) is NaN, −inf − 0 is not.
        m_ref = tl.where(m_new == float("-inf"), 0.0, m_new)
        alpha = tl.exp(m - m_ref)
        p = tl.exp(s - m_ref[:, None])
        l = l * alpha + tl.sum(p, axis=1)  # noqa: E741
        if V_IN_K:
            v0 = stored0
        else:
            v0 = load_rows(v_base, v_at, v_d0, keep, V_DIM, V_PADDED and V1 == 0, UPCAST and STORED == AS_THEY_ARE)
        if STORED != AS_THEY_ARE:  # (weights times factors would be subnormal in float16)
            v0 = (dequantised(v0, STORED) * v_scale[:, None]).to(q0.dtype)
        p_in = p.to(v0.dtype)
        if GUARDED:
            v0, kind0 = without_infinities(v0)
        acc0 = tl.dot(p_in, v0, acc0 * alpha[:, None], input_precision="ieee")
        if GUARDED:
            acc0 += infinities(visible, kind0)
        if V1 > 0:
            v1 = load_rows(v_base, v_at, v_d1, keep, V_DIM, V_PADDED, UPCAST and STORED == AS_THEY_ARE)
            if STORED != AS_THEY_ARE:
                v1 = (dequantised(v1, STORED) * v_scale[:, None]).to(q0.dtype)
            if GUARDED:
                v1, kind1 = without_infinities(v1)
            acc1 = tl.dot(p_in, v1, acc1 * alpha[:, None], input_precision="ieee")
            if GUARDED:
                acc1 += infinities(visible, kind1)
        m = m_new
        slot = next_slot
    if V1 == 0:
        acc1 = acc0
    return m, l, acc0, acc1


@triton.jit
def _attend(
    pointers,
    strides,
    numbers,
    tile_begin,  # the tile's first packed row
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    V_DIM: tl.constexpr,
    V0: tl.constexpr,
    V1: tl.constexpr,
    V_IN_K: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    STRIP_SHIFT: tl.constexpr,
    Q_ALIGN: tl.constexpr,
    KV_ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    UPCAST: tl.constexpr,
    STORED: tl.constexpr,
    PARTS: tl.constexpr,
    GUARDED: tl.constexpr,
):
    """One tile of packed rows of one (item × KV head), to its partials or its outputs.

    Returns whether infinities or NaN in V may have come to rows that do not see them: the tile is then to be computed
    once more, guarded.
    """
    (
        q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, part_acc_ptr, part_ml_ptr, item_ptr, kv_strips_ptr, kv_spelled_ptr,
        rows_ptr, limits_ptr, dest_ptr, row_positions_ptr, sinks_ptr, k_scales_ptr, v_scales_ptr,
    ) = pointers  # fmt: skip
    (
        stride_q_row, stride_q_head, stride_k_page, stride_k_slot, stride_k_head, stride_v_page, stride_v_slot,
        stride_v_head, stride_ks_page, stride_ks_slot, stride_ks_head, stride_vs_page, stride_vs_slot, stride_vs_head,
    ) = strides  # fmt: skip
    kv_head, num_kv_heads, scale, softcap, window = numbers
    kv_begin = tl.load(item_ptr)
    kv_len = tl.load(item_ptr + 1)
    row_begin = tl.load(item_ptr + 2)
    packed = tl.load(item_ptr + 3) * GROUP
    masked = tl.load(item_ptr + 4)
    if PARTS > 0:
        # The parts of an item that holds a subtree are the entries behind its own; any other item is its only part.
        # Tokens are counted through all of them, so blocks are as full, and as many are on their way, as in any item.
        place = 0
        num_parts = tl.load(item_ptr + 7)
        part = tl.arange(0, PARTS)
        there = part < tl.maximum(num_parts, 1)
        part_ptr = item_ptr + (part + tl.where(num_parts > 0, 1, 0)) * 8
        lengths = tl.load(part_ptr + 1, mask=there, other=0)
        ends = tl.cumsum(lengths, 0)
        rows_begin = tl.load(part_ptr + 2, mask=there, other=0) - row_begin
        rows_end = rows_begin + tl.load(part_ptr + 3, mask=there, other=0)
        parts = (ends - lengths, ends, tl.load(part_ptr, mask=there, other=0) - (ends - lengths), rows_begin, rows_end)
        kv_len = tl.sum(lengths, axis=0)
    else:
        kv_strips_ptr += (kv_begin >> STRIP_SHIFT).to(tl.int64) * 2
        place = kv_begin & ((1 << STRIP_SHIFT) - 1)
        parts = (kv_begin,)

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
    q_at = tl.multiple_of(row * stride_q_row + q_head.to(tl.int64) * stride_q_head, [Q_ALIGN])
    q0 = load_rows(q_ptr, q_at, d0, live, HEAD_DIM, D_PADDED and D1 == 0, UPCAST)
    if D1 > 0:
        d1 = D0 + tl.arange(0, D1)
        q1 = load_rows(q_ptr, q_at, d1, live, HEAD_DIM, D_PADDED, UPCAST)
    else:
        q1 = q0

    first = 0
    end = tl.max(limit, axis=0)
    row_pos = limit  # read only with a window
    if HAS_WINDOW:
        row_pos = tl.load(row_positions_ptr + row, mask=live, other=0)
        kv_pos_max = tl.load(item_ptr + 5)
        row_pos_min = tl.load(item_ptr + 6)
        if row_pos_min - kv_pos_max >= window:
            end = 0
        # What the item's earliest row cannot see, none can. The first and last visible token bound the main loop; a
        # test inside it would keep the compiler from pipelining the gathers. Positions cost 8 bytes a strip, K and V
        # hundreds a token.
        first = end
        last = 0
        for start in range(0, end, SCAN):
            n = start + tl.arange(0, SCAN)
            at_n = places_of(n, place, parts, PARTS)
            pos = load_positions(kv_strips_ptr, kv_spelled_ptr, at_n, n < end, STRIP_SHIFT)
            seen = (n < end) & (row_pos_min - pos < window)
            first = tl.minimum(first, tl.min(tl.where(seen, n, end), axis=0))
            last = tl.maximum(last, tl.max(tl.where(seen, n + 1, 0), axis=0))
        end = last

    k_base = k_ptr + tl.multiple_of(kv_head.to(tl.int64) * stride_k_head, KV_ALIGN)
    v_base = v_ptr + tl.multiple_of(kv_head.to(tl.int64) * stride_v_head, KV_ALIGN)
    factors = (
        k_scales_ptr + kv_head * stride_ks_head, v_scales_ptr + kv_head * stride_vs_head,
        stride_ks_page, stride_ks_slot, stride_vs_page, stride_vs_slot,
    )  # fmt: skip
    m, l, acc0, acc1 = _sum_tokens(  # noqa: E741
        q0, q1, k_base, v_base, kv_strips_ptr, kv_spelled_ptr, place, parts, lane // GROUP, first, end, limit, row_pos,
        scale, softcap, window, stride_k_page, stride_k_slot, stride_v_page, stride_v_slot, factors,
        HEAD_DIM, D0, D1, V_DIM, V0, V1, V_IN_K, PAGE_SIZE, STRIP_SHIFT, KV_ALIGN, BLOCK_M, BLOCK_N, STAGES,
        HAS_SOFTCAP, HAS_WINDOW, UPCAST, STORED, PARTS, GUARDED,
    )  # fmt: skip
    poisoned = False
    if not GUARDED:
        poisoned = any_nan(acc0, live)
        if V1 > 0:
            poisoned = poisoned | any_nan(acc1, live)
        if PARTS == 0:
            poisoned = poisoned & ((masked != 0) | HAS_WINDOW)

    # A partial for the merge …
    dest = tl.load(dest_ptr + at, mask=live, other=0)
    to_part = live & (dest >= 0)
    part = dest.to(tl.int64) * num_q_heads + q_head
    tl.store(part_ml_ptr + part * 2, m, mask=to_part)
    tl.store(part_ml_ptr + part * 2 + 1, l, mask=to_part)
    # (the merge never reads the acc of an empty partial, nor is it written)
    to_acc = to_part & (m > float("-inf"))
    V_PADDED: tl.constexpr = V_DIM < V0 + V1
    v_d0 = tl.arange(0, V0)
    store_rows(part_acc_ptr, part * V_DIM, v_d0, acc0, to_acc, V_DIM, V_PADDED and V1 == 0)
    if V1 > 0:
        v_d1 = V0 + tl.arange(0, V1)
        store_rows(part_acc_ptr, part * V_DIM, v_d1, acc1, to_acc, V_DIM, V_PADDED)

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
    of_row = row * num_q_heads + q_head
    tl.store(lse_ptr + of_row, lse, mask=to_out)
    store_rows(out_ptr, of_row * V_DIM, v_d0, acc0 * weight[:, None], to_out, V_DIM, V_PADDED and V1 == 0)
    if V1 > 0:
        store_rows(out_ptr, of_row * V_DIM, v_d1, acc1 * weight[:, None], to_out, V_DIM, V_PADDED)
    return poisoned


# How wide a load may be follows from Q_ALIGN and KV_ALIGN alone. Triton's own guess knows multiples of 16 elements and
# nothing else, so a head_dim of 72 would be read two bytes at a time.
STRIDES = [
    "stride_q_row",
    "stride_q_head",
    "stride_k_page",
    "stride_k_slot",
    "stride_k_head",
    "stride_v_page",
    "stride_v_slot",
    "stride_v_head",
    "stride_ks_page",
    "stride_ks_slot",
    "stride_ks_head",
    "stride_vs_page",
    "stride_vs_slot",
    "stride_vs_head",
]


@triton.jit(
    do_not_specialize=["num_items", "num_kv_heads", "window", *STRIDES],
    do_not_specialize_on_alignment=[*PLAN_ARRAYS, *OTHERS],
)
def tree_attention_kernel(
    q_ptr,  # [rows, Hq, D], any strides, the last 1
    k_ptr,  # [pages, PAGE_SIZE, Hkv, D], any strides, the last 1
    v_ptr,  # [pages, PAGE_SIZE, Hkv, E], likewise
    out_ptr,  # [rows, Hq, E], contiguous
    lse_ptr,  # float32 [rows, Hq], contiguous
    part_acc_ptr,  # float32 [partials, Hq, E], contiguous
    part_ml_ptr,  # float32 [partials, Hq, 2], contiguous: m, l
    items_ptr,  # int32 [num_items, 8]
    kv_strips_ptr,  # int32 [strips, 2]
    kv_spelled_ptr,  # int32 [·, 2]
    rows_ptr,
    limits_ptr,
    dest_ptr,
    row_positions_ptr,
    sinks_ptr,  # [Hq], read when HAS_SINKS
    counts_ptr,  # int32 [>= 1], read when HAS_COUNTS
    k_scales_ptr,  # float32 [pages, PAGE_SIZE, Hkv], any strides, like v_scales; read when K and V are quantised
    v_scales_ptr,
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
    stride_ks_page,
    stride_ks_slot,
    stride_ks_head,
    stride_vs_page,
    stride_vs_slot,
    stride_vs_head,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D0: tl.constexpr,  # head_dim is D0 + D1 columns, both powers of two, so that 80 costs 64 + 16 and not 128;
    D1: tl.constexpr,  # the last columns of D1 are padding where HEAD_DIM < D0 + D1; 0: one part is enough
    V_DIM: tl.constexpr,  # of V, in parts likewise
    V0: tl.constexpr,
    V1: tl.constexpr,
    V_IN_K: tl.constexpr,  # V is what D0 holds of K (V0 == D0, V1 == 0): one load serves both
    PAGE_SIZE: tl.constexpr,
    STRIP_SHIFT: tl.constexpr,  # log2 of the tokens of a strip
    Q_ALIGN: tl.constexpr,  # a power of two that divides every stride of q, in elements
    KV_ALIGN: tl.constexpr,  # likewise, of k and v
    WIDE: tl.constexpr,  # packed rows of the larger tile
    WIDE_N: tl.constexpr,  # tokens a step of its loop
    WIDE_STAGES: tl.constexpr,
    NARROW_N: tl.constexpr,
    NARROW_STAGES: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_COUNTS: tl.constexpr,
    UPCAST: tl.constexpr,  # interpreter only: its bfloat16 arithmetic is wrong, so compute in float32 there
    STORED: tl.constexpr,  # what is in the pages: see quantise.py
    PARTS: tl.constexpr,  # of an item that holds a subtree at most, a power of two; 0: the plan has no such items
):
    # Heads of an item are neighbours: they read the same strips, rows and limits while these are in L2.
    item = tl.program_id(0) // num_kv_heads
    kv_head = tl.program_id(0) % num_kv_heads
    tile_begin = tl.program_id(1) * WIDE
    if HAS_COUNTS:
        num_items = tl.load(counts_ptr)
    if item >= num_items:
        return
    item_ptr = items_ptr + item.to(tl.int64) * 8
    if PARTS > 0:
        if tl.load(item_ptr + 7) < 0:  # a part: its item's program takes it
            return
    packed = tl.load(item_ptr + 3) * GROUP
    if tile_begin >= packed:
        return
    pointers = (
        q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, part_acc_ptr, part_ml_ptr, item_ptr, kv_strips_ptr, kv_spelled_ptr,
        rows_ptr, limits_ptr, dest_ptr, row_positions_ptr, sinks_ptr, k_scales_ptr, v_scales_ptr,
    )  # fmt: skip
    strides = (
        stride_q_row, stride_q_head, stride_k_page, stride_k_slot, stride_k_head, stride_v_page, stride_v_slot,
        stride_v_head, stride_ks_page, stride_ks_slot, stride_ks_head, stride_vs_page, stride_vs_slot, stride_vs_head,
    )  # fmt: skip
    numbers = (kv_head, num_kv_heads, scale, softcap, window)
    if packed <= NARROW:
        poisoned = _attend(
            pointers, strides, numbers, tile_begin, GROUP, HEAD_DIM, D0, D1, V_DIM, V0, V1, V_IN_K, PAGE_SIZE,
            STRIP_SHIFT, Q_ALIGN, KV_ALIGN, NARROW, NARROW_N, NARROW_STAGES, HAS_SOFTCAP, HAS_WINDOW, HAS_SINKS, UPCAST,
            STORED, PARTS, False,
        )  # fmt: skip
    else:
        poisoned = _attend(
            pointers, strides, numbers, tile_begin, GROUP, HEAD_DIM, D0, D1, V_DIM, V0, V1, V_IN_K, PAGE_SIZE,
            STRIP_SHIFT, Q_ALIGN, KV_ALIGN, WIDE, WIDE_N, WIDE_STAGES, HAS_SOFTCAP, HAS_WINDOW, HAS_SINKS, UPCAST,
            STORED, PARTS, False,
        )  # fmt: skip
    # A token that a row does not see has weight 0, and 0 · NaN is NaN: where the tokens of other rows hold infinities
    # or NaN in V, a guarded sum takes the place of the first. A test of each block would cost every item what this
    # costs those few, and a guard of the wide tile's size would take registers from the loop that matters.
    if poisoned:
        tl.debug_barrier()  # the rows just written are written once more, by other threads
        tile_end = tl.minimum(packed, tile_begin + WIDE)
        for begin in tl.range(tile_begin, tile_end, NARROW, num_stages=1):
            _attend(
                pointers, strides, numbers, begin, GROUP, HEAD_DIM, D0, D1, V_DIM, V0, V1, V_IN_K, PAGE_SIZE,
                STRIP_SHIFT, Q_ALIGN, KV_ALIGN, NARROW, GUARD_N, 1, HAS_SOFTCAP, HAS_WINDOW, HAS_SINKS, UPCAST,
                STORED, PARTS, True,
            )  # fmt: skip
