"""Triton kernels: the default on NVIDIA (and AMD) GPUs; under ``TRITON_INTERPRET=1`` the same sources run on the CPU.

The contract is docs/architecture.md's; arguments that reach this file are checked already.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch

from anabranch.plan import Profile

if TYPE_CHECKING:
    from anabranch.plan import Plan

__all__ = ["attention", "copy_pages", "name", "profile", "refuses", "unavailable", "write_kv"]

name = "triton"

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_HEAD_DIM = 256
# Tokens: K and V of one chunk at head_dim 128 are 128 KB a head in bfloat16, some 4 µs of one multiprocessor's share
# of the memory bandwidth. Shorter chunks cost more partials than they balance, longer ones leave a tail.
CHUNK = 256


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
        "PyTorch sees no CUDA or ROCm device; use backend='cpu', "
        "or set TRITON_INTERPRET=1 before Python starts to run the kernels in Triton's (slow) interpreter"
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
def profile(num_q_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> Profile:
    """Tile, chunk and parallelism for this device: every multiprocessor should have two programs to switch between."""
    from anabranch.kernels import configs, launch

    traits = launch.device_traits(device)
    return Profile(
        tile=configs.max_block_m(head_dim, dtype.itemsize, traits.arch),
        chunk=CHUNK,
        parallelism=2 * traits.multiprocessors,
        num_kv_heads=num_kv_heads,
        elem_size=dtype.itemsize,
        narrow=launch.NARROW,
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
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """out [rows, Hq, D] in q's dtype; lse [rows, Hq] float32 (natural log) or None."""
    from anabranch.kernels import launch

    num_q_heads, num_kv_heads = q.shape[1], k_pages.shape[2]
    arrays = plan.arrays(
        num_q_heads // num_kv_heads, profile(num_q_heads, num_kv_heads, q.shape[2], q.dtype, k_pages.device)
    )
    out, lse = launch.attention(q, k_pages, v_pages, arrays, scale=scale, softcap=softcap, window=window, sinks=sinks)
    return out, lse if return_lse else None


def write_kv(
    k: torch.Tensor, v: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, slots: torch.Tensor
) -> None:
    """k, v [rows, Hkv, D] into slots int32 [rows] of the pages, in place; one launch."""
    from anabranch.kernels import launch

    launch.write_kv(k, v, k_pages, v_pages, slots)


def copy_pages(pool: torch.Tensor, src: torch.Tensor, dst: torch.Tensor, filled: torch.Tensor) -> None:
    """Pages ``src`` to ``dst`` (int32 CPU tensors [n]) in every plane, the first ``filled`` slots only; one launch."""
    from anabranch.kernels import launch

    launch.copy_pages(pool, src, dst, filled)
