"""Launching branch attention: grids, constants, tables. Arguments are checked by the caller."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from .branch import branch_forward_kernel
from .branch_backward import branch_dkdv_kernel, branch_dq_kernel
from .configs import branch_config, column_split
from .launch import INTERPRETED, _on, device_traits, stride_alignment

__all__ = ["MaskTiles", "branch_backward", "branch_forward"]


class MaskTiles(NamedTuple):
    """One way to cut a mask, on the device. Tiles with the most work come first: blocks are scheduled in order."""

    tiles: torch.Tensor  # int32 [tiles, 4]
    pieces: torch.Tensor  # int32 [pieces, 8]
    positions: torch.Tensor  # int32 [T]


# Asked with (columns?, tokens of a tile at most).
Cut = Callable[[bool, int], MaskTiles]


def _work_dtype(q: torch.Tensor) -> torch.dtype:
    """The interpreter rounds bfloat16 stores toward zero; there PyTorch rounds the result instead."""
    return torch.float32 if _upcast(q) else q.dtype


def _upcast(q: torch.Tensor) -> bool:
    return INTERPRETED and q.dtype == torch.bfloat16


def branch_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cut: Cut,
    *,
    scale: float,
    softcap: float | None,
    window: int | None,
    sinks: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out [T, Hq, E] in q's dtype and lse [T, Hq] float32. q, k, v [T, Hkv, E]: the last stride 1."""
    total, num_q_heads, head_dim = q.shape
    v_dim = v.shape[2]
    out = torch.empty((total, num_q_heads, v_dim), dtype=_work_dtype(q), device=q.device)
    lse = torch.empty((total, num_q_heads), dtype=torch.float32, device=q.device)
    config = branch_config("forward", max(head_dim, v_dim), q.element_size(), device_traits(q.device).arch)
    tables = cut(False, config.block_m)
    (d0, d1), (v0, v1) = column_split(head_dim), column_split(v_dim)
    with _on(q.device):
        if tables.tiles.shape[0]:
            branch_forward_kernel[(tables.tiles.shape[0] * num_q_heads,)](
                q, k, v, out, lse, *tables, lse if sinks is None else sinks,
                num_q_heads, num_q_heads // k.shape[1], float(scale), float(softcap or 0.0), int(window or 0),
                *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
                HEAD_DIM=head_dim, D0=d0, D1=d1, V_DIM=v_dim, V0=v0, V1=v1, ALIGN=stride_alignment(q, k, v),
                BLOCK_M=config.block_m, BLOCK_N=config.block_n,
                HAS_SOFTCAP=softcap is not None, HAS_WINDOW=window is not None, HAS_SINKS=sinks is not None,
                UPCAST=_upcast(q), **config.options,
            )  # fmt: skip
    return out.to(q.dtype), lse


def branch_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lse: torch.Tensor,
    delta: torch.Tensor,
    cut: Cut,
    *,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk, dv in q's dtype. grad [T, Hq, E], lse and delta float32 [T, Hq]: contiguous."""
    num_q_heads, head_dim, num_kv_heads, v_dim = q.shape[1], q.shape[2], k.shape[1], v.shape[2]
    dq, dk, dv = (torch.empty(x.shape, dtype=_work_dtype(q), device=q.device) for x in (q, k, v))
    arch = device_traits(q.device).arch
    (d0, d1), (v0, v1) = column_split(head_dim), column_split(v_dim)
    numbers = (num_q_heads // num_kv_heads, float(scale), float(softcap or 0.0), int(window or 0))
    strides = (*q.stride()[:2], *k.stride()[:2], *v.stride()[:2])
    options = dict(
        HEAD_DIM=head_dim, D0=d0, D1=d1, V_DIM=v_dim, V0=v0, V1=v1, ALIGN=stride_alignment(q, k, v),
        HAS_SOFTCAP=softcap is not None, HAS_WINDOW=window is not None,
    )  # fmt: skip
    with _on(q.device):
        config = branch_config("dq", max(head_dim, v_dim), q.element_size(), arch)
        tables = cut(False, config.block_m)
        if tables.tiles.shape[0]:
            branch_dq_kernel[(tables.tiles.shape[0] * num_q_heads,)](
                q, k, v, grad, dq, lse, delta, *tables, num_q_heads, *numbers, *strides, **options,
                BLOCK_M=config.block_m, BLOCK_N=config.block_n, UPCAST=_upcast(q),
                **config.options,
            )  # fmt: skip
        config = branch_config("dkdv", max(head_dim, v_dim), q.element_size(), arch)
        tables = cut(True, config.block_n)
        if tables.tiles.shape[0]:
            branch_dkdv_kernel[(tables.tiles.shape[0] * num_kv_heads,)](
                q, k, v, grad, dk, dv, lse, delta, *tables, num_kv_heads, *numbers, *strides,
                **options, BLOCK_M=config.block_m, BLOCK_N=config.block_n, UPCAST=_upcast(q),
                **config.options,
            )  # fmt: skip
    return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype)
