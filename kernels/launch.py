"""Launching the kernels: grids, constants and scratch memory. Arguments are checked by the caller."""

from __future__ import annotations

import contextlib
import functools
import operator
from typing import Any, NamedTuple

import torch
import triton

from .attention import tree_attention_kernel
from .configs import AMD, attention_config, column_split, next_power_of_two
from .merge import merge_kernel
from .pages import copy_pages_kernel, write_kv_kernel
from .quantise import quantise_kv_kernel

__all__ = ["INTERPRETED", "Device", "attention", "copy_pages", "device_traits", "stride_alignment", "write_kv"]

# Decided when the kernels were decorated, that is by TRITON_INTERPRET at import, whatever the variable says now.
INTERPRETED = not isinstance(tree_attention_kernel, triton.JITFunction)

# By a page's dtype: what the kernels call it, and what a vector's largest element becomes (quantise.py).
STORED = {torch.int8: (1, 127.0), torch.float8_e4m3fn: (2, 448.0)}

MERGE_BLOCK = 8  # partials a step of the merge: most rows have two to five


class Device(NamedTuple):
    """What a launch needs to know of the device."""

    arch: int  # compute capability, 90 = sm_90; configs.AMD
    multiprocessors: int


@functools.cache
def device_traits(device: torch.device) -> Device:
    """Capability and multiprocessor count; in the interpreter those of an H100, so that the same code paths run."""
    if device.type != "cuda":
        return Device(arch=90, multiprocessors=132)
    properties = torch.cuda.get_device_properties(device)
    arch = AMD if torch.version.hip else properties.major * 10 + properties.minor
    return Device(arch, properties.multi_processor_count)


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device; make that the tensors' own."""
    if device.type == "cuda" and device.index not in (None, torch.cuda.current_device()):
        return torch.cuda.device(device)
    return contextlib.nullcontext()


def stride_alignment(*tensors: torch.Tensor) -> int:
    """The largest power of two, 16 at most, that divides every stride but the last of the tensors, in elements.

    A dimension of one entry has no stride to speak of.
    """
    strides = (stride for x in tensors for n, stride in zip(x.shape[:-1], x.stride(), strict=False) if n > 1)
    every = functools.reduce(operator.or_, strides, 16)
    return every & -every


def _bytes(pages: torch.Tensor) -> torch.Tensor:
    """Pages as the kernels take them: 8-bit floats as bytes, which every GPU has."""
    return pages.view(torch.uint8) if pages.dtype == torch.float8_e4m3fn else pages


def _v_in_k(k_pages: torch.Tensor, v_pages: torch.Tensor, kv_scales: Any) -> bool:
    """Whether V's pages are the first columns of K's, under the same factors."""
    if k_pages.data_ptr() != v_pages.data_ptr() or k_pages.stride() != v_pages.stride():
        return False
    return kv_scales is None or (
        kv_scales[0].data_ptr() == kv_scales[1].data_ptr() and kv_scales[0].stride() == kv_scales[1].stride()
    )


def attention(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    arrays: Any,
    *,
    scale: float,
    softcap: float | None,
    window: int | None,
    sinks: torch.Tensor | None,
    kv_scales: Any = None,
    num_rows: int | None = None,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both launches of tree attention: every item's partials, then the merge. With `write_kv` three a layer.

    Args:
        q: [queries, Hq, D]; the last stride 1.
        k_pages: [pages, page_size, Hkv, D]; any strides, the last 1.
        v_pages: [pages, page_size, Hkv, E], likewise. Where they are a view of the first of k_pages' columns, and E is
            what the kernel takes of K at once (`column_split`), they are read once for both.
        arrays: PlanArrays for this group (docs/kernel_contract.md). With a ``counts`` tensor (int32 on the device:
            num_items, num_partials, num_merge) its host ints are capacities and the true numbers are read on the
            device, which is what a captured graph needs.
        kv_scales: the factors of quantised pages, (k, v) float32 [pages, page_size, Hkv] each, any strides.
        num_rows: rows of the output, by default as many as queries; fewer where a row is several queries.
        out: where the result goes, [rows, Hq, D] in q's dtype, contiguous; by default a new tensor.

    Returns:
        out [rows, Hq, E] in q's dtype and lse [rows, Hq] float32, natural log.
    """
    queries, num_q_heads, head_dim = q.shape
    rows = queries if num_rows is None else num_rows
    page_size, num_kv_heads, v_dim = k_pages.shape[1], k_pages.shape[2], v_pages.shape[3]
    group = num_q_heads // num_kv_heads
    # The interpreter rounds bfloat16 stores toward zero; there PyTorch rounds the output instead.
    upcast = INTERPRETED and q.dtype == torch.bfloat16
    given = out
    if out is None or upcast:
        out_dtype = torch.float32 if upcast else q.dtype
        out = torch.empty((rows, num_q_heads, v_dim), dtype=out_dtype, device=q.device)
    lse = torch.empty((rows, num_q_heads), dtype=torch.float32, device=q.device)
    part_acc = torch.empty((arrays.num_partials, num_q_heads, v_dim), dtype=torch.float32, device=q.device)
    part_ml = torch.empty((arrays.num_partials, num_q_heads, 2), dtype=torch.float32, device=q.device)
    counts = arrays.counts
    k_scales, v_scales = (lse, lse) if kv_scales is None else kv_scales
    scale_strides = (0,) * 6 if kv_scales is None else (*k_scales.stride(), *v_scales.stride())

    with _on(q.device):
        (d0, d1), (v0, v1) = column_split(head_dim), column_split(v_dim)
        plain = softcap is None and window is None and kv_scales is None
        config = attention_config(max(head_dim, v_dim), q.element_size(), device_traits(q.device).arch, plain)
        if arrays.num_items:
            # tile_rows is what the TileConfig allows; a small batch has fewer rows, and needs fewer tiles per item.
            tiles = triton.cdiv(min(arrays.tile_rows, queries) * group, config.wide)
            tree_attention_kernel[(arrays.num_items * num_kv_heads, tiles)](
                q, _bytes(k_pages), _bytes(v_pages), out, lse, part_acc, part_ml,
                arrays.items, arrays.kv_strips, arrays.kv_spelled, arrays.rows, arrays.limits, arrays.dest,
                arrays.row_positions, lse if sinks is None else sinks, arrays.items if counts is None else counts,
                k_scales, v_scales,
                arrays.num_items, num_kv_heads, float(scale), float(softcap or 0.0), int(window or 0),
                q.stride(0), q.stride(1),
                k_pages.stride(0), k_pages.stride(1), k_pages.stride(2),
                v_pages.stride(0), v_pages.stride(1), v_pages.stride(2),
                *scale_strides,
                GROUP=group, HEAD_DIM=head_dim, D0=d0, D1=d1, V_DIM=v_dim, V0=v0, V1=v1,
                V_IN_K=v_dim == v0 == d0 and _v_in_k(k_pages, v_pages, kv_scales), PAGE_SIZE=page_size,
                STRIP_SHIFT=arrays.strip.bit_length() - 1,
                Q_ALIGN=stride_alignment(q), KV_ALIGN=stride_alignment(k_pages, v_pages),
                WIDE=config.wide, WIDE_N=config.wide_n, WIDE_STAGES=config.wide_stages,
                NARROW_N=config.narrow_n, NARROW_STAGES=config.narrow_stages,
                HAS_SOFTCAP=softcap is not None, HAS_WINDOW=window is not None, HAS_SINKS=sinks is not None,
                HAS_COUNTS=counts is not None, UPCAST=upcast,
                STORED=0 if kv_scales is None else STORED[k_pages.dtype][0], PARTS=arrays.most_parts, **config.options,
            )  # fmt: skip
        if arrays.num_merge:
            merge_kernel[(arrays.num_merge * num_q_heads,)](
                part_acc, part_ml, arrays.merge_rows, arrays.merge_ptr, out, lse,
                lse if sinks is None else sinks, arrays.items if counts is None else counts,
                arrays.num_merge, num_q_heads,
                HEAD_DIM=v_dim, BLOCK_D=next_power_of_two(v_dim), BLOCK_P=MERGE_BLOCK,
                HAS_SINKS=sinks is not None, HAS_COUNTS=counts is not None, num_warps=4, num_stages=2,
            )  # fmt: skip
    if upcast and given is not None:
        return given.copy_(out), lse
    return out.to(q.dtype), lse


def write_kv(
    k: torch.Tensor,
    v: torch.Tensor | None,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor | None,
    slots: torch.Tensor,
    kv_scales: Any = None,
) -> None:
    """k [rows, Hkv, D], v [rows, Hkv, E] into slots [rows] (int32, on the device; negative: skipped) of the pages, in
    place; quantised, with their factors, where there are ``kv_scales``. v and v_pages None: K alone."""
    rows, num_kv_heads, head_dim = k.shape
    if rows == 0:
        return
    has_v = v is not None
    if v is None or v_pages is None:
        v, v_pages = k, k_pages
    v_dim = v.shape[2] if has_v else 0
    block_d, block_v = next_power_of_two(head_dim), next_power_of_two(v.shape[2])
    block_h = min(next_power_of_two(num_kv_heads), max(1, 1024 // max(block_d, block_v)))
    if kv_scales is not None:
        stored, largest = STORED[k_pages.dtype]
        k_scales, v_scales = kv_scales
        with _on(k.device):
            quantise_kv_kernel[(rows, triton.cdiv(num_kv_heads, block_h))](
                k, v, _bytes(k_pages), _bytes(v_pages), k_scales, v_scales, slots, num_kv_heads,
                k.stride(0), k.stride(1), v.stride(0), v.stride(1),
                k_pages.stride(0), k_pages.stride(1), k_pages.stride(2),
                v_pages.stride(0), v_pages.stride(1), v_pages.stride(2),
                *k_scales.stride(), *v_scales.stride(),
                LARGEST=largest, STORED=stored, PAGE_SIZE=k_pages.shape[1], HEAD_DIM=head_dim, V_DIM=v_dim,
                BLOCK_D=block_d, BLOCK_V=block_v, BLOCK_H=block_h, num_warps=4,
            )  # fmt: skip
        return
    with _on(k.device):
        write_kv_kernel[(rows, triton.cdiv(num_kv_heads, block_h))](
            k, v, k_pages, v_pages, slots, num_kv_heads,
            k.stride(0), k.stride(1), v.stride(0), v.stride(1),
            k_pages.stride(0), k_pages.stride(1), k_pages.stride(2),
            v_pages.stride(0), v_pages.stride(1), v_pages.stride(2),
            PAGE_SIZE=k_pages.shape[1], HEAD_DIM=head_dim, V_DIM=v_dim, ALIGN=stride_alignment(k, v, k_pages, v_pages),
            BLOCK_D=block_d, BLOCK_V=block_v, BLOCK_H=block_h, num_warps=4,
        )  # fmt: skip


def copy_pages(
    pool: torch.Tensor,
    src: torch.Tensor,
    dst: torch.Tensor,
    filled: torch.Tensor,
    scales: torch.Tensor | None = None,
) -> None:
    """The first ``filled[i]`` slots of page ``src[i]`` to page ``dst[i]``, in every plane of the pool, one launch.

    Args:
        pool: [planes, pages, Hkv, page_size, D], the last stride 1.
        src, dst, filled: int32 [n] on the CPU: they go to the device in one transfer, which does not wait.
        scales: the factors of quantised pages, float32 [planes, pages, Hkv, page_size], the last stride 1.
    """
    copies = torch.stack((src, dst, filled)).to(torch.int32)
    num_copies = copies.shape[1]
    if num_copies == 0:
        return
    if pool.device.type == "cuda":
        copies = copies.pin_memory().to(pool.device, non_blocking=True)
    pool = _bytes(pool)
    planes, _, num_kv_heads, page_size, head_dim = pool.shape
    block_d = next_power_of_two(head_dim)
    block_t = min(next_power_of_two(page_size), max(1, 2048 // block_d))
    with _on(pool.device):
        copy_pages_kernel[(num_copies * planes * num_kv_heads,)](
            pool, copies if scales is None else scales, copies, num_copies, planes, num_kv_heads,
            pool.stride(0), pool.stride(1), pool.stride(2), pool.stride(3),
            *((0, 0, 0) if scales is None else scales.stride()[:3]),
            HEAD_DIM=head_dim, ALIGN=stride_alignment(pool), HAS_SCALES=scales is not None,
            BLOCK_T=block_t, BLOCK_D=block_d, num_warps=4,
        )  # fmt: skip
