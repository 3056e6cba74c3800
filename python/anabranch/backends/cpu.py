"""C++ kernels (``anabranch._cpu``): the default without a GPU. The contract is `base`.

They run on a small pool of our own (csrc/cpu/parallel.cpp), on as many threads as `threads` says, with the best
instruction set of this machine; ``ANABRANCH_CPU_ISA`` (plain, avx2, avx512, avx512bf16, amx) overrides the choice.
Arguments are checked already.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from anabranch.backends import native, threads
from anabranch.backends.formats import KVScales
from anabranch.backends.native import TYPES, address, floats, rows, strided
from anabranch.plan.tile_config import TileConfig

if TYPE_CHECKING:
    from anabranch.backends.base import MaskTensors
    from anabranch.plan.arrays import PlanArrays
    from anabranch.plan.plan import Plan

__all__ = [
    "attention",
    "batch_invariant",
    "branch_backward",
    "branch_forward",
    "capturable",
    "copy_pages",
    "device_type",
    "expected",
    "info",
    "kv_dtypes",
    "name",
    "populate",
    "prepare_pool",
    "refuses",
    "tile_config",
    "unavailable",
    "write_kv",
]  # fmt: skip

name = "cpu"
device_type = "cpu"
capturable = False
batch_invariant = True
kv_dtypes = (torch.int8, torch.float8_e4m3fn)
split_head_dims = True
branch_head_dim = 1024  # MAX_HEAD_DIM of csrc/cpu/kernels.hpp

# Packed rows an item. 64 rows amortise the conversion of K and V to a few percent and leave Q, scores, accumulators and
# a tile of K and V together inside 512 KB of second-level cache at head_dim 256.
TILE = 64
# Tokens. Partial results of a chunk cost about as much traffic as 8 · rows tokens; below 256 that begins to show.
CHUNK = 256
# STREAM_ROWS of csrc/cpu/kernels.hpp. Items of more packed rows are summed up in tiles of another size; where all are
# of so many at most, or each is one row of a larger group, one kernel computes every row.
FEW_ROWS_TILE = 8
SUBTREE = 64  # packed rows of an item that holds a subtree: as many as of any other
UNITS_PER_THREAD = 4  # for balance: the last unit to end then holds up the others for an eighth of the time at most


@functools.cache
def unavailable() -> str | None:
    """Why the kernels cannot run here, with the remedy; None when they can."""
    try:
        from anabranch import _cpu
    except ImportError as error:
        return f"anabranch._cpu cannot be imported ({error}); install with `pip install .`, or build with `make build`"
    try:
        _cpu.info()
    except ValueError as error:
        return f"ANABRANCH_CPU_ISA: {error}; unset it or name another"
    try:
        threads.limits()
    except ValueError as error:
        return str(error)
    return None


def expected(gpu: bool) -> bool:
    """Always: an installation without these kernels is broken."""
    return True


def refuses(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why this call cannot be served, with the remedy; None when it can."""
    if device.type != "cpu":
        return f"the cpu backend takes CPU tensors, got device {device}; use backend='triton' or move the tensors"
    if dtype not in TYPES:
        return f"the cpu backend takes float32, float16 and bfloat16, got {dtype}; use backend='reference' or convert"
    if not 1 <= head_dim <= branch_head_dim:
        return f"the cpu backend takes head_dim 1 to {branch_head_dim}, got {head_dim}; use backend='reference'"
    return None


def tile_config(
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    batch_invariant: bool = False,
) -> TileConfig:
    """How plans for these kernels are to be cut.

    batch_invariant: so that a row's result depends on its own context alone.
    """
    return _tile_config(num_kv_heads, dtype.itemsize, batch_invariant, threads.count(), _subtree(dtype))


def _subtree(dtype: torch.dtype) -> int:
    """Not where AMX multiplies: its kernel for many rows takes no parts, and has not been measured against them."""
    from anabranch import _cpu

    return 0 if dtype == torch.bfloat16 and _cpu.isa() == "amx" else SUBTREE


@functools.cache
def _tile_config(num_kv_heads: int, elem_size: int, fixed: bool, parallel: int, subtree: int) -> TileConfig:
    return TileConfig(
        tile=FEW_ROWS_TILE if fixed else TILE,
        chunk=CHUNK,
        parallelism=UNITS_PER_THREAD * parallel,
        num_kv_heads=num_kv_heads,
        elem_size=elem_size,
        fixed=fixed,
        subtree=0 if fixed else subtree,
    )


def info() -> dict[str, Any]:
    """For ``doctor``: isa, vector_bytes, compiled, runnable, parallel (what the pool does), summary."""
    from anabranch import _cpu

    found = _cpu.info()
    return found | {"summary": f"{found['isa']} of {', '.join(found['compiled'])}; {threads.count()} threads"}


_NOT_QUANTISED = (-1, *(0,) * 8)


def plan_arrays(plan: Plan, group: int, num_kv_heads: int, dtype: torch.dtype) -> PlanArrays:
    """A plan as the kernels of this moment's threads read it."""
    count = threads.count()
    return plan.arrays(group, _tile_config(num_kv_heads, dtype.itemsize, plan.batch_invariant, count, _subtree(dtype)))


def quantised(pages: Tensor, scales: KVScales | None) -> tuple[int, ...]:
    """What the kernels are told of quantised pages: their type, addresses and strides of the factors."""
    if scales is None:
        return _NOT_QUANTISED
    return (kv_dtypes.index(pages.dtype), *(n for x in scales for n in (x.data_ptr(), *x.stride())))


def attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    plan: Plan,
    *,
    scale: float,
    softcap: float | None,
    window: int | None,
    sinks: Tensor | None,
    return_lse: bool,
    kv_scales: KVScales | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """out [rows, Hq, E] in q's dtype, E of v_pages; lse [rows, Hq] float32 (natural log) or None."""
    from anabranch import _cpu

    num_q_heads, num_kv_heads = q.shape[1], k_pages.shape[2]
    arrays = plan_arrays(plan, num_q_heads // num_kv_heads, num_kv_heads, q.dtype)
    if arrays.counts is not None:  # a padded plan: here the device's numbers are at hand
        num_items, _, num_merge = arrays.counts.tolist()
        arrays = replace(arrays, num_items=num_items, num_merge=num_merge)
    return native.attention(
        _cpu.attention, rows(q), k_pages, v_pages, arrays, threads.count(),
        v_pages.shape[3], quantised(k_pages, kv_scales),
        scale=scale, softcap=softcap, window=window, sinks=sinks, return_lse=return_lse, num_rows=plan.num_rows,
        out=out,
    )  # fmt: skip


def _branch_arguments(
    q: Tensor, k: Tensor, v: Tensor, layout: MaskTensors, scale: float, softcap: float | None, window: int | None
) -> tuple[Any, ...]:
    return (
        TYPES[q.dtype],
        (q.shape[2], v.shape[2], q.shape[1], k.shape[1]),
        tuple(map(strided, (q, k, v))),
        (*map(address, layout), layout.starts.shape[0] - 1),
        *native.numbers(scale, softcap, window),
    )


def branch_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: MaskTensors,
    *,
    scale: float,
    softcap: float | None,
    window: int | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """out [T, Hq, E] in q's dtype, lse [T, Hq] float32, natural logarithm, sinks included."""
    from anabranch import _cpu

    q, k, v, sinks = rows(q), rows(k), rows(v), floats(sinks)
    layout = type(layout)(*(x.contiguous() for x in layout))
    out = torch.empty((*q.shape[:2], v.shape[2]), dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    _cpu.branch_forward(
        *_branch_arguments(q, k, v, layout, scale, softcap, window),
        address(sinks),
        address(out),
        address(lse),
        threads.count(),
    )
    return out, lse


def branch_backward(
    grad: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    layout: MaskTensors,
    *,
    scale: float,
    softcap: float | None,
    window: int | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv in their inputs' dtypes; delta [T, Hq] float32 = grad · out − grad_lse."""
    from anabranch import _cpu

    q, k, v, grad, out, lse = rows(q), rows(k), rows(v), rows(grad), out.contiguous(), lse.contiguous()
    layout, grad_lse = type(layout)(*(x.contiguous() for x in layout)), floats(grad_lse)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    delta = torch.empty(lse.shape, dtype=torch.float32, device=q.device)
    _cpu.branch_backward(
        *_branch_arguments(q, k, v, layout, scale, softcap, window),
        0,  # what sinks do to the rows is in lse
        address(out),
        address(lse),
        strided(grad),
        address(grad_lse),
        address(delta),
        tuple(map(address, (dq, dk, dv))),
        threads.count(),
    )
    return dq, dk, dv, delta


def write_kv(
    k: Tensor,
    v: Tensor | None,
    k_pages: Tensor,
    v_pages: Tensor | None,
    slots: Tensor,
    kv_scales: KVScales | None = None,
) -> None:
    """k [rows, Hkv, D], v [rows, Hkv, E] into slots int32 [rows] of the pages, in place; quantised where there are
    factors. v and v_pages None: K alone."""
    from anabranch import _cpu

    num_rows, num_kv_heads, head_dim = k.shape
    k, v, slots = rows(k), None if v is None else rows(v), slots.contiguous()
    _cpu.write_kv(
        TYPES[k.dtype],
        (head_dim, 0 if v is None else v.shape[2]),
        num_kv_heads,
        k_pages.shape[1],
        strided(k),
        (0, 0, 0) if v is None else strided(v),
        strided(k_pages),
        (0, 0, 0, 0) if v_pages is None else strided(v_pages),
        address(slots),
        num_rows,
        threads.count(),
        quantised(k_pages, kv_scales),
    )


def prepare_pool(pool: Tensor) -> bool:
    """`large_pages` for a page pool. Steps read all over it: with 4 KB pages, address translation takes some 4 % of the
    attention."""
    return large_pages(pool)


def populate(pool: Tensor) -> bool:
    """The memory of a page pool, or of its factors, from Linux 5.14 on."""
    from anabranch import _cpu

    return _cpu.populate(address(pool), pool.numel() * pool.element_size())


def large_pages(memory: Tensor) -> bool:
    """Asks the system to back a contiguous tensor with large pages (Linux's transparent ones), before it is written to.
    Whether it will try."""
    from anabranch import _cpu

    return _cpu.large_pages(address(memory), memory.numel() * memory.element_size())


def copy_pages(pool: Tensor, src: Tensor, dst: Tensor, filled: Tensor, scales: Tensor | None = None) -> None:
    """Pages ``src`` to ``dst`` (int32 CPU tensors [n]) in every plane of pool [planes, pages, Hkv, page_size, D], and
    of scales [planes, pages, Hkv, page_size], the first ``filled`` slots only."""
    from anabranch import _cpu

    planes, _, heads, _, head_dim = pool.shape
    if pool.stride(4) != 1 or pool.stride(3) != head_dim:
        raise ValueError(
            f"pool: the tokens of a head must be contiguous in a page (strides [..., {head_dim}, 1]), "
            f"got {list(pool.stride())}"
        )
    if scales is not None and scales.stride(3) != 1:
        raise ValueError(f"scales: the last dimension must have stride 1, got {scales.stride(3)}")
    size = pool.element_size()
    src, dst, filled = src.contiguous(), dst.contiguous(), filled.contiguous()
    _cpu.copy_pages(
        address(pool),
        planes,
        heads,
        (pool.stride(0) * size, pool.stride(1) * size, pool.stride(2) * size, head_dim * size),
        address(src),
        address(dst),
        address(filled),
        src.shape[0],
        threads.count(),
        (0, 0, 0, 0) if scales is None else (address(scales), *scales.stride()[:3]),
    )
