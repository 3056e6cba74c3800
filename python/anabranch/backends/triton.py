"""Triton kernels: the default on NVIDIA (and AMD) GPUs; under ``TRITON_INTERPRET=1`` the same sources run on the CPU.

The contract is `base`; arguments that reach this file are checked already.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from anabranch.backends import cost_model as machine
from anabranch.backends.native import rows
from anabranch.plan.tile_config import TileConfig

if TYPE_CHECKING:
    from anabranch.backends.base import MaskTensors
    from anabranch.backends.formats import KVScales
    from anabranch.kernels.branch_launch import MaskTiles
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
    "refuses",
    "tile_config",
    "unavailable",
    "write_kv",
]  # fmt: skip

name = "triton"
device_type = "cuda"
capturable = True
batch_invariant = False
kv_dtypes = (torch.int8, torch.float8_e4m3fn)
split_head_dims = True

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_HEAD_DIM = 576  # latents of DeepSeek's models: 512 and 64
branch_head_dim = 256

# Packed rows of an item that holds a subtree, and its parts (a power of two). 0: none is made until a GPU has
# shown what they gain. (A tile multiplies all its rows with all of the item's tokens: what is spared has a price.)
SUBTREE = 0
PARTS = 64


@functools.cache
def unavailable() -> str | None:
    """Why these kernels cannot run here, with the remedy; None when they can."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return "Triton is not installed; `pip install triton` (it needs Linux and a GPU)"
    from anabranch.kernels import launch

    if launch.INTERPRETED or torch.cuda.is_available():
        return None
    return (
        "PyTorch sees no CUDA or ROCm device (none is there, or its driver is too old for this PyTorch: "
        "`torch.cuda.init()` says which; update the driver); use backend='cpu', "
        "or set TRITON_INTERPRET=1 before Python starts to run the kernels in Triton's (slow) interpreter"
    )


def expected(gpu: bool) -> bool:
    """Wherever there is a GPU: Triton comes with PyTorch."""
    return gpu


def info() -> dict[str, Any]:
    """For ``doctor``: interpreted (by Triton's interpreter, on the CPU), summary."""
    interpreted = not torch.cuda.is_available()
    return {"interpreted": interpreted} | (
        {"summary": "in Triton's interpreter: right, but slow"} if interpreted else {}
    )


def refuses(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why this call cannot be served, with the remedy; None when it can."""
    from anabranch.kernels import launch

    if device.type != "cuda" and not (launch.INTERPRETED and device.type == "cpu"):
        return f"the triton backend takes CUDA tensors, got device {device}; use backend='cpu' or move the tensors"
    if device.type == "cuda" and launch.device_traits(device).arch in range(1, 80):
        return f"the triton backend needs compute capability 8.0 or later, {device} has less; use backend='reference'"
    if dtype not in DTYPES:
        return f"the triton backend takes float32, float16 and bfloat16, got {dtype}; convert q and the KV pool"
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        return f"the triton backend takes head_dim 1 to {MAX_HEAD_DIM}, got {head_dim}; use backend='reference'"
    return None


@functools.lru_cache(maxsize=256)
def tile_config(
    num_q_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device,
    chunk: int | None = None, v_head_dim: int | None = None,
) -> TileConfig:  # fmt: skip
    """How plans for these kernels are to be cut: the wide tile of this device; chunk (where none is given) and split
    by the model of the machine. Shorter chunks cost more partials than they balance, longer ones leave a tail."""
    from anabranch.kernels import configs, launch

    traits = launch.device_traits(device)
    tile = configs.attention_config(max(head_dim, v_head_dim or 0), dtype.itemsize, traits.arch).wide
    mean = (head_dim + (v_head_dim or head_dim)) // 2  # the model reads K and V of one size
    cut = machine.cut_for(device, traits.multiprocessors, num_q_heads, num_kv_heads, mean, dtype.itemsize, tile, chunk)
    return TileConfig(
        tile=tile,
        subtree=SUBTREE and min(SUBTREE, tile),
        parts=PARTS,
        chunk=cut.chunk,
        parallelism=cut.parallelism,
        num_kv_heads=num_kv_heads,
        elem_size=dtype.itemsize,
    )


def attention(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    plan: Plan,
    *,
    scale: float,
    softcap: float | None,
    window: int | None,
    sinks: torch.Tensor | None,
    return_lse: bool,
    kv_scales: KVScales | None = None,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """out [rows, Hq, E] in q's dtype, E of v_pages; lse [rows, Hq] float32 (natural log) or None."""
    from anabranch.kernels import launch

    num_q_heads, num_kv_heads = q.shape[1], k_pages.shape[2]
    config = tile_config(
        num_q_heads, num_kv_heads, q.shape[2], q.dtype, k_pages.device, v_head_dim=v_pages.shape[3]
    )  # fmt: skip
    arrays = plan.arrays(num_q_heads // num_kv_heads, config)
    out, lse = launch.attention(
        q, k_pages, v_pages, arrays,
        scale=scale, softcap=softcap, window=window, sinks=sinks, num_rows=plan.num_rows, kv_scales=kv_scales,
        out=out,
    )  # fmt: skip
    return out, lse if return_lse else None


def write_kv(
    k: torch.Tensor,
    v: torch.Tensor | None,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor | None,
    slots: torch.Tensor,
    kv_scales: KVScales | None = None,
) -> None:
    """k [rows, Hkv, D], v [rows, Hkv, E] into slots int32 [rows] of the pages, in place, quantised where there are
    factors to write; one launch. v and v_pages None: K alone."""
    from anabranch.kernels import launch

    launch.write_kv(k, v, k_pages, v_pages, slots, kv_scales)


def copy_pages(
    pool: torch.Tensor,
    src: torch.Tensor,
    dst: torch.Tensor,
    filled: torch.Tensor,
    scales: torch.Tensor | None = None,
) -> None:
    """Pages ``src`` to ``dst`` (int32 CPU tensors [n]) in every plane of the pool and of its factors, the first
    ``filled`` slots only; one launch."""
    from anabranch.kernels import launch

    launch.copy_pages(pool, src, dst, filled, scales)


# A mask's tables, made at its first use and kept as long as its tensors: all layers of a step share them.
_tables: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _cut(layout: MaskTensors, columns: bool, most: int) -> MaskTiles:
    """The mask cut into tiles of at most ``most`` rows (or columns), on its device.

    The first call for a mask copies its few index arrays to the host, which waits for the device; later calls do not.
    """
    from anabranch._core import branch_tables
    from anabranch.kernels.branch_launch import MaskTiles
    from anabranch.plan.intervals import transpose_intervals

    kept = _tables.setdefault(layout.starts, {})
    if "host" not in kept:
        kept["host"] = tuple(x.cpu().numpy() for x in layout[:3])
        kept["positions"] = layout.positions.to(torch.int32).contiguous()
    starts, ptr, intervals = kept["host"]
    if columns:
        if "turned" not in kept:
            kept["turned"] = tuple(x.numpy() for x in transpose_intervals(starts, ptr, intervals))
        ptr, intervals = kept["turned"]
    if (columns, most) not in kept:
        tiles, pieces = branch_tables(starts, ptr, intervals, columns, most, NARROWEST)
        tokens = [0, *(pieces[:, 1] - pieces[:, 0]).cumsum()]
        work = [tokens[end] - tokens[begin] for begin, end in tiles[:, 2:].tolist()]
        order = sorted(range(len(work)), key=lambda i: -work[i])
        kept[columns, most] = tuple(torch.from_numpy(x).to(layout.starts.device) for x in (tiles[order], pieces))
    by_tile, by_piece = kept[columns, most]
    return MaskTiles(by_tile, by_piece, kept["positions"])


NARROWEST = 16  # lanes of a dot product: a shorter tile costs as much


def branch_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: MaskTensors,
    *,
    scale: float,
    softcap: float | None,
    window: int | None,
    sinks: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out [T, Hq, E] in q's dtype, lse [T, Hq] float32, natural logarithm, sinks included."""
    from anabranch.kernels import branch_launch

    return branch_launch.branch_forward(
        rows(q), rows(k), rows(v), functools.partial(_cut, layout),
        scale=scale, softcap=softcap, window=window, sinks=None if sinks is None else sinks.contiguous(),
    )  # fmt: skip


def branch_backward(
    grad: torch.Tensor,
    grad_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    layout: MaskTensors,
    *,
    scale: float,
    softcap: float | None,
    window: int | None,
    sinks: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk, dv in their inputs' dtypes; delta [T, Hq] float32 = grad · out − grad_lse. No atomics."""
    from anabranch.kernels import branch_launch

    delta = (grad.float() * out.float()).sum(2)
    if grad_lse is not None:
        delta = delta - grad_lse
    dq, dk, dv = branch_launch.branch_backward(
        grad.contiguous(), rows(q), rows(k), rows(v), lse.contiguous(), delta, functools.partial(_cut, layout),
        scale=scale, softcap=softcap, window=window,
    )  # fmt: skip
    return dq, dk, dv, delta
