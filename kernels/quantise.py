"""K and V in pages of one byte an element, with a float32 factor for each token and head.

``anabranch.backends.formats`` defines the formats; these functions give the same bits. fp8 is taken apart and put
together by integers: GPUs before compute capability 8.9 have no instructions for it, and the price is a few operations
an element.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .pages import WRITE_STRIDES

# What is in the pages (a constant of the kernels).
AS_THEY_ARE = tl.constexpr(0)  # elements of q's type
INT8 = tl.constexpr(1)
FP8 = tl.constexpr(2)  # e4m3, as uint8. (Its NaN is never stored: a vector that has one has NaN for its factor.)

ROUND = tl.constexpr(12582912.0)  # 1.5 · 2^23: adding and taking it away again rounds to an integer, ties to even
SCALE_STRIDES = [
    "stride_ks_page",
    "stride_ks_slot",
    "stride_ks_head",
    "stride_vs_page",
    "stride_vs_slot",
    "stride_vs_head",
]


@triton.jit
def dequantised(x, STORED: tl.constexpr):
    """Elements of a page as float32, without their factors."""
    if STORED == 1:
        return x.to(tl.float32)
    bits = x.to(tl.uint16)
    # As float16 with the exponent of fp8, whose bias is 8 less; subnormals come out right, too.
    half = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True)
    return half.to(tl.float32) * 256.0


@triton.jit
def _quantised(x, LARGEST: tl.constexpr, STORED: tl.constexpr):
    """Vectors ``x`` [N, D] (float32; 0 past D): elements of a page and factors [N]."""
    size = tl.abs(x)
    bad = tl.max(tl.where(size < float("inf"), 0, 1), axis=1)
    scale = tl.div_rn(
        tl.max(tl.where(size < float("inf"), size, 0.0), axis=1), tl.full([x.shape[0]], LARGEST, tl.float32)
    )
    scale = tl.where(bad > 0, float("nan"), scale)
    some = (scale > 0)[:, None]
    y = tl.div_rn(tl.where(some, x, 0.0), tl.broadcast_to(tl.where(scale > 0, scale, 1.0)[:, None], x.shape))
    y = tl.minimum(tl.maximum(y, -LARGEST), LARGEST)
    if STORED == 1:
        kept = ((y + ROUND) - ROUND).to(tl.int8)
    else:
        bits = y.to(tl.int32, bitcast=True)
        positive = bits & 0x7FFFFFFF
        normal = ((positive + 0x7FFFF + ((positive >> 20) & 1)) >> 20) - (120 << 3)
        small = ((tl.abs(y) * 512.0 + ROUND) - ROUND).to(tl.int32)  # subnormals: units of 2^-9
        code = tl.where(positive < 0x3C800000, small, normal)
        kept = (code | ((bits >> 24) & 0x80)).to(tl.uint8)
    return kept, scale


@triton.jit(
    do_not_specialize=["num_kv_heads", *WRITE_STRIDES, *SCALE_STRIDES],
    do_not_specialize_on_alignment=["slots_ptr", "k_scales_ptr", "v_scales_ptr"],
)
def quantise_kv_kernel(
    k_ptr,  # [rows, Hkv, D]
    v_ptr,  # [rows, Hkv, E]
    k_pages_ptr,  # int8 or uint8 [pages, PAGE_SIZE, Hkv, D], any strides, the last 1
    v_pages_ptr,  # likewise [pages, PAGE_SIZE, Hkv, E]
    k_scales_ptr,  # float32 [pages, PAGE_SIZE, Hkv], any strides
    v_scales_ptr,  # like k_scales
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
    stride_ks_page,
    stride_ks_slot,
    stride_ks_head,
    stride_vs_page,
    stride_vs_slot,
    stride_vs_head,
    LARGEST: tl.constexpr,  # what a vector's largest element becomes
    STORED: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    V_DIM: tl.constexpr,  # of V; 0: K alone is written
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """One program a (row, block of heads): K and V in the same launch."""
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
    k_at = (row * stride_k_row + h * stride_k_head)[:, None] + d[None, :]
    k = tl.load(k_ptr + k_at, mask=keep, other=0.0).to(tl.float32)
    if V_DIM > 0:
        v_d = tl.arange(0, BLOCK_V)
        v_keep = real[:, None] & (v_d < V_DIM)[None, :]
        v_at = (row * stride_v_row + h * stride_v_head)[:, None] + v_d[None, :]
        v = tl.load(v_ptr + v_at, mask=v_keep, other=0.0).to(tl.float32)
    k_kept, k_scale = _quantised(k, LARGEST, STORED)
    k_to = (page * stride_kp_page + offset * stride_kp_slot + h * stride_kp_head)[:, None] + d[None, :]
    tl.store(k_pages_ptr + k_to, k_kept, mask=keep)
    tl.store(k_scales_ptr + page * stride_ks_page + offset * stride_ks_slot + h * stride_ks_head, k_scale, mask=real)
    if V_DIM > 0:
        v_kept, v_scale = _quantised(v, LARGEST, STORED)
        v_to = (page * stride_vp_page + offset * stride_vp_slot + h * stride_vp_head)[:, None] + v_d[None, :]
        tl.store(v_pages_ptr + v_to, v_kept, mask=v_keep)
        tl.store(
            v_scales_ptr + page * stride_vs_page + offset * stride_vs_slot + h * stride_vs_head, v_scale, mask=real
        )
