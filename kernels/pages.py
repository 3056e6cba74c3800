"""Moving KV: a step's rows into their slots, and whole pages for copy-on-write."""

from __future__ import annotations

import triton
import triton.language as tl

# How many bytes move at once follows from ALIGN, a power of two that divides every stride, in elements (see STRIDES in
# attention.py).
WRITE_STRIDES = [
    "stride_k_row",
    "stride_k_head",
    "stride_v_row",
    "stride_v_head",
    "stride_kp_page",
    "stride_kp_slot",
    "stride_kp_head",
    "stride_vp_page",
    "stride_vp_slot",
    "stride_vp_head",
]
COPY_STRIDES = ["stride_plane", "stride_page", "stride_head", "stride_slot"]
SCALE_STRIDES = ["stride_scale_plane", "stride_scale_page", "stride_scale_head"]


@triton.jit(do_not_specialize=["num_kv_heads", *WRITE_STRIDES], do_not_specialize_on_alignment=["slots_ptr"])
def write_kv_kernel(
    k_ptr,  # [rows, Hkv, D]
    v_ptr,  # [rows, Hkv, E]
    k_pages_ptr,  # [pages, PAGE_SIZE, Hkv, D], any strides, the last 1
    v_pages_ptr,  # [pages, PAGE_SIZE, Hkv, E], likewise
    slots_ptr,  # int32 [rows]; a negative slot writes nothing (rows that only fill up a captured graph)
    num_kv_heads,
    stride_k_row,
    stride_k_head,
    stride_v_row,
    stride_v_head,
    stride_kp_page,
    stride_kp_slot,
    stride_kp_head,
    stride_vp_page,
    stride_vp_slot,
    stride_vp_head,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    V_DIM: tl.constexpr,  # of V; 0: K alone is written
    ALIGN: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """One program a (row, block of heads): K and V in the same launch. Values are moved, never computed with."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + row)
    if slot < 0:
        return
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    d = tl.arange(0, BLOCK_D)
    real = h < num_kv_heads
    keep = real[:, None] & (d < HEAD_DIM)[None, :]
    h = h.to(tl.int64)
    page = (slot // PAGE_SIZE).to(tl.int64)
    offset = (slot % PAGE_SIZE).to(tl.int64)
    k_at = tl.multiple_of(row * stride_k_row + h * stride_k_head, [ALIGN])
    k = tl.load(k_ptr + k_at[:, None] + d[None, :], mask=keep)
    if V_DIM > 0:  # both are on their way before either is stored
        v_d = tl.arange(0, BLOCK_V)
        v_keep = real[:, None] & (v_d < V_DIM)[None, :]
        v_at = tl.multiple_of(row * stride_v_row + h * stride_v_head, [ALIGN])
        v = tl.load(v_ptr + v_at[:, None] + v_d[None, :], mask=v_keep)
    k_to = tl.multiple_of(page * stride_kp_page + offset * stride_kp_slot + h * stride_kp_head, [ALIGN])
    tl.store(k_pages_ptr + k_to[:, None] + d[None, :], k, mask=keep)
    if V_DIM > 0:
        v_to = tl.multiple_of(page * stride_vp_page + offset * stride_vp_slot + h * stride_vp_head, [ALIGN])
        tl.store(v_pages_ptr + v_to[:, None] + v_d[None, :], v, mask=v_keep)


@triton.jit(
    do_not_specialize=["num_kv_heads", "num_planes", "num_copies", *COPY_STRIDES, *SCALE_STRIDES],
    do_not_specialize_on_alignment=["scales_ptr"],
)
def copy_pages_kernel(
    pool_ptr,  # [planes, pages, Hkv, page_size, D], any strides, the last 1
    scales_ptr,  # float32 [planes, pages, Hkv, page_size], the last stride 1; read when HAS_SCALES
    copies_ptr,  # int32 [3, num_copies]: source page, destination page, filled slots
    num_copies,
    num_planes,
    num_kv_heads,
    stride_plane,
    stride_page,
    stride_head,
    stride_slot,
    stride_scale_plane,
    stride_scale_page,
    stride_scale_head,
    HEAD_DIM: tl.constexpr,
    ALIGN: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program a (copy, plane, head): the first ``filled`` slots only, every layer's K and V in one launch.

    A destination page was free a moment ago, so it is nobody's source: the copies need no order among themselves.
    """
    head = (tl.program_id(0) % num_kv_heads).to(tl.int64)
    plane = (tl.program_id(0) // num_kv_heads % num_planes).to(tl.int64)
    copy = tl.program_id(0) // num_kv_heads // num_planes
    src = tl.load(copies_ptr + copy).to(tl.int64)
    dst = tl.load(copies_ptr + num_copies + copy).to(tl.int64)
    filled = tl.load(copies_ptr + 2 * num_copies + copy)
    base = plane * stride_plane + head * stride_head
    scales = scales_ptr + plane * stride_scale_plane + head * stride_scale_head
    d = tl.arange(0, BLOCK_D)
    for start in range(0, filled, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        keep = (t < filled)[:, None] & (d < HEAD_DIM)[None, :]
        at = base + t.to(tl.int64) * stride_slot
        from_at = tl.multiple_of(at + src * stride_page, [ALIGN])
        to_at = tl.multiple_of(at + dst * stride_page, [ALIGN])
        x = tl.load(pool_ptr + from_at[:, None] + d[None, :], mask=keep)
        tl.store(pool_ptr + to_at[:, None] + d[None, :], x, mask=keep)
        if HAS_SCALES:
            factors = tl.load(scales + src * stride_scale_page + t, mask=t < filled)
            tl.store(scales + dst * stride_scale_page + t, factors, mask=t < filled)
