"""CUDA C++ kernels (``anabranch._cuda``): NVIDIA GPUs from sm_80 on, chosen by hand with ``backend="cuda"``.

The contract is `base`; arguments that reach this file are checked already. Two launches a layer at most
(items, merge), one for a step's K and V, one for all pages that a step copies; on torch's current stream, no waiting.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from anabranch.backends import cost_model as machine
from anabranch.backends import native
from anabranch.backends.native import MAX_HEAD_DIM, TYPES, address, rows, strided
from anabranch.plan.tile_config import TileConfig

if TYPE_CHECKING:
    from anabranch.backends.formats import KVScales
    from anabranch.plan.arrays import PlanArrays
    from anabranch.plan.plan import Plan

__all__ = [
    "advance",
    "attention",
    "batch_invariant",
    "capturable",
    "copy_pages",
    "device_type",
    "expected",
    "info",
    "name",
    "refuses",
    "tile_config",
    "unavailable",
    "write_kv",
]  # fmt: skip

name = "cuda"
device_type = "cuda"
capturable = True
batch_invariant = False
kv_dtypes: tuple[torch.dtype, ...] = ()
split_head_dims = False

OLDEST = 80  # sm_80: mma on bfloat16, ldmatrix, cp.async


def _module() -> ModuleType:
    from anabranch import _cuda  # type: ignore[attr-defined]

    return _cuda


def _on_device(device: torch.device) -> bool:
    return device.type == "cuda"


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream


def _current(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Kernels are launched on the current device; make that the tensors' own."""
    if device.type == "cuda" and device.index not in (None, torch.cuda.current_device()):
        return torch.cuda.device(device)
    return contextlib.nullcontext()


def _index(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    return torch.cuda.current_device() if device.index is None else device.index


@functools.cache
def unavailable() -> str | None:
    """Why these kernels cannot run here, with the remedy; None when they can."""
    try:
        module = _module()
    except ImportError as error:
        return (
            f"anabranch._cuda cannot be imported ({error}); install with ANABRANCH_CUDA=1 where nvcc is on PATH, "
            "or use backend='triton'"
        )
    count = module.device_count()
    if count < 0:
        return "the NVIDIA driver is too old for this build or not loaded; update the driver, or use backend='triton'"
    if count == 0:
        return "no NVIDIA GPU is visible; use backend='cpu'"
    return None


@functools.cache
def _traits(index: int) -> dict[str, int]:
    return _module().device(index)


def runs_on(built: str, arch: int) -> bool:
    """Whether a GPU of compute capability ``arch`` can run what was compiled for ``built`` ("80/90/100+PTX").

    Machine code runs on its own generation from its minor version on; PTX on anything later.
    """
    for entry in built.split("/"):
        number = "".join(c for c in entry.split("+")[0] if c.isdigit())
        if not number:
            return True  # unknown: let the driver say
        have = int(number)
        later = have <= arch and (have // 10 == arch // 10 or "PTX" in entry)
        if have == arch or (later and "a" not in entry):  # 90a: that one alone
            return True
    return False


def expected(gpu: bool) -> bool:
    """Wherever there is a GPU and the extension was built, which is optional."""
    return gpu and importlib.util.find_spec("anabranch._cuda") is not None


def refuses(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why this call cannot be served, with the remedy; None when it can."""
    if not _on_device(device):
        return f"the cuda backend takes CUDA tensors, got device {device}; use backend='cpu' or move the tensors"
    arch = _traits(_index(device))["arch"]
    if arch < OLDEST:
        return (
            f"the cuda backend needs compute capability 8.0 or later, {device} has {arch / 10}; use backend='reference'"
        )
    built = _module().architectures()
    if not runs_on(built, arch):
        return (
            f"this build has kernels for {built} and {device} is sm_{arch}; rebuild with "
            f"ANABRANCH_CUDA_ARCHS=\"{arch}\", or use backend='triton'"
        )
    if dtype not in TYPES:
        return f"the cuda backend takes float32, float16 and bfloat16, got {dtype}; convert q and the KV pool"
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        return f"the cuda backend takes head_dim up to {MAX_HEAD_DIM}, got {head_dim}; use backend='reference'"
    grain = 16 // dtype.itemsize
    if head_dim % grain != 0:
        return (
            f"the cuda backend copies 16 bytes at a time: head_dim must be a multiple of {grain} for {dtype}, got "
            f"{head_dim}; use backend='triton'"
        )
    return None


@functools.lru_cache(maxsize=256)
def tile_config(
    num_q_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device,
    chunk: int | None = None,
) -> TileConfig:  # fmt: skip
    """How plans for these kernels are to be cut: the kernel's own tile; chunk (where none is given) and split by the
    model of the machine."""
    tile = _module().packed_rows(TYPES[dtype], head_dim)
    multiprocessors = _traits(_index(device))["multiprocessors"]
    cut = machine.cut_for(device, multiprocessors, num_q_heads, num_kv_heads, head_dim, dtype.itemsize, tile, chunk)
    return TileConfig(
        tile=tile,
        chunk=cut.chunk,
        parallelism=cut.parallelism,
        num_kv_heads=num_kv_heads,
        elem_size=dtype.itemsize,
    )


def info() -> dict[str, Any]:
    """For ``doctor``: architectures (what the kernels were compiled for), devices, summary."""
    module = _module()
    count, built = max(0, module.device_count()), module.architectures()
    return {
        "architectures": built,
        "devices": [module.device(i) for i in range(count)],
        "summary": f"kernels for {built}; taken with backend='cuda' only",
    }


def _aligned(x: Tensor, dims: int) -> bool:
    """Whether every run of the last dimension begins at a multiple of 16 bytes."""
    size = x.element_size()
    return x.data_ptr() % 16 == 0 and all(
        n == 1 or s * size % 16 == 0 for n, s in zip(x.shape[:dims], x.stride(), strict=False)
    )


def _check_pages(name: str, pages: Tensor) -> None:
    if not _aligned(pages, 3):
        raise ValueError(
            f"{name}: the cuda backend copies 16 bytes at a time, so every token of a head must begin at a multiple of "
            f"16 bytes; got strides {list(pages.stride())} of {pages.element_size()} bytes at address "
            f"{pages.data_ptr():#x}. Use backend='triton' or a contiguous pool"
        )


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
    """out [rows, Hq, D] in q's dtype; lse [rows, Hq] float32 (natural log) or None. kv_scales: always None."""
    num_q_heads, num_kv_heads = q.shape[1], k_pages.shape[2]
    arrays = plan.arrays(
        num_q_heads // num_kv_heads, tile_config(num_q_heads, num_kv_heads, q.shape[2], q.dtype, k_pages.device)
    )
    return run(
        q, k_pages, v_pages, arrays,
        scale=scale, softcap=softcap, window=window, sinks=sinks, return_lse=return_lse, num_rows=plan.num_rows,
        out=out,
    )  # fmt: skip


def run(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    arrays: Any,
    *,
    out: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Both launches over a plan's arrays; the options are `attention`'s, and return_lse is True where it is not given.

    With a ``counts`` tensor (int32 on the device: num_items, num_partials, num_merge) the host ints of ``arrays`` are
    capacities and the true numbers are read on the device, which is what a captured graph needs: the grid follows from
    the capacities alone.
    """
    if out is not None and out.data_ptr() % 16:  # the kernels store 16 bytes at a time: these need a copy
        result, lse = run(q, k_pages, v_pages, arrays, **options)
        return out.copy_(result), lse
    num_q_heads, head_dim = q.shape[1:]
    device = q.device
    if q.stride(2) != 1 or not _aligned(q, 2):
        q = q.contiguous()
        if q.data_ptr() % 16:
            q = q.clone()
    _check_pages("k_pages", k_pages)
    _check_pages("v_pages", v_pages)
    part_acc = torch.empty((arrays.num_partials, num_q_heads, head_dim), dtype=torch.float32, device=device)
    part_ml = torch.empty((arrays.num_partials, num_q_heads, 2), dtype=torch.float32, device=device)
    with _current(device):
        return native.attention(
            _module().attention, q, k_pages, v_pages, arrays,
            (address(part_acc), address(part_ml)), _index(device), _stream(device),
            sections=(arrays.counts,), out=out, **options,
        )  # fmt: skip


def write_kv(
    k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, slots: Tensor, kv_scales: KVScales | None = None
) -> None:
    """k, v [rows, Hkv, D] into slots int32 [rows] of the pages, in place (negative: skipped); one launch. kv_scales:
    always None."""
    num_rows, num_kv_heads, head_dim = k.shape
    k, v = rows(k), rows(v)
    with _current(k.device):
        _module().write_kv(
            TYPES[k.dtype],
            head_dim,
            num_kv_heads,
            k_pages.shape[1],
            strided(k),
            strided(v),
            strided(k_pages),
            strided(v_pages),
            address(slots),
            num_rows,
            _index(k.device),
            _stream(k.device),
        )


def advance(arrays: PlanArrays, tails: Tensor, slots: Tensor, positions: Tensor) -> None:
    """One decode step of a kept plan: a token more for every tail, in place (anabranch.plan.resident); one launch.

    tails int64 [rows] (items), slots int32 [rows], positions int64 [rows], all on the arrays' device.
    """
    sections = (arrays.items, arrays.kv_strips, arrays.kv_spelled, arrays.limits, arrays.row_positions)
    with _current(slots.device):
        _module().advance(
            tuple(map(address, sections)),
            arrays.strip,
            address(tails),
            address(slots),
            address(positions),
            tails.shape[0],
            _index(slots.device),
            _stream(slots.device),
        )


def copy_pages(pool: Tensor, src: Tensor, dst: Tensor, filled: Tensor, scales: Tensor | None = None) -> None:
    """Pages ``src`` to ``dst`` (int32 CPU tensors [n]) in every plane of pool [planes, pages, Hkv, page_size, D], the
    first ``filled`` slots only; one transfer that does not wait, one launch. scales: always None."""
    copies = torch.stack((src, dst, filled)).to(torch.int32)
    if pool.device.type == "cuda":
        copies = copies.pin_memory().to(pool.device, non_blocking=True)
    planes, _, num_kv_heads, _, head_dim = pool.shape
    with _current(pool.device):
        _module().copy_pages(
            TYPES[pool.dtype],
            head_dim,
            address(pool),
            pool.stride()[:4],
            planes,
            num_kv_heads,
            address(copies),
            copies.shape[1],
            _index(pool.device),
            _stream(pool.device),
        )
