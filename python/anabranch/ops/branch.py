"""``torch.ops.anabranch.branch_attention`` and its backward: schemas, fake implementations, autograd, dispatch.

A mask travels as its four index tensors, so everything that ``torch.compile``, activation checkpointing and a saved
graph see is a tensor, and a mask may be dropped before the backward has run.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from anabranch import backends
from anabranch.backends.base import BranchAttention, MaskTensors
from anabranch.ops.tree import NO_SOFTCAP, NO_WINDOW, _lib, _lse_dtype

_MASK = "Tensor starts, Tensor row_ptr, Tensor cols, Tensor positions"
_OPTIONS = "Tensor? sinks, float scale, float softcap, int window, str backend"
_lib.define(f"branch_attention(Tensor q, Tensor k, Tensor v, {_MASK}, {_OPTIONS}) -> (Tensor, Tensor)")
_lib.define(
    "branch_attention_backward(Tensor grad, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_MASK}, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)"
)


def _numbers(scale: float, softcap: float, window: int) -> dict[str, Any]:
    return {
        "scale": scale,
        "softcap": None if softcap == NO_SOFTCAP else softcap,
        "window": None if window == NO_WINDOW else window,
    }


def _choose(backend: str, q: Tensor, v: Tensor) -> BranchAttention:
    return cast(
        BranchAttention,
        backends.choose(backend, q.device, q.dtype, q.shape[2], v_head_dim=v.shape[2], branch=True),
    )


def _forward(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, row_ptr: Tensor, cols: Tensor, positions: Tensor,
    sinks: Tensor | None, scale: float, softcap: float, window: int, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    chosen = _choose(backend, q, v)
    layout = MaskTensors(starts, row_ptr, cols, positions)
    return chosen.branch_forward(q, k, v, layout, sinks=sinks, **_numbers(scale, softcap, window))


def _forward_fake(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, row_ptr: Tensor, cols: Tensor, positions: Tensor,
    sinks: Tensor | None, scale: float, softcap: float, window: int, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return q.new_empty((*q.shape[:2], v.shape[2])), q.new_empty(q.shape[:2], dtype=_lse_dtype(q))


def _backward(
    grad: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    starts: Tensor, row_ptr: Tensor, cols: Tensor, positions: Tensor,
    sinks: Tensor | None, scale: float, softcap: float, window: int, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    chosen = _choose(backend, q, v)
    layout = MaskTensors(starts, row_ptr, cols, positions)
    dq, dk, dv, delta = chosen.branch_backward(
        grad, grad_lse, q, k, v, out, lse, layout, sinks=sinks, **_numbers(scale, softcap, window)
    )
    if sinks is None:
        return dq, dk, dv, q.new_empty(0)
    # A sink is a key without a value: its weight is e^(sink − lse), and moving it moves the others by that much.
    weight = torch.exp(sinks.to(lse.dtype) - torch.where(lse == float("-inf"), float("inf"), lse))
    return dq, dk, dv, -(weight * delta).sum(0).to(sinks.dtype)


def _backward_fake(
    grad: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    starts: Tensor, row_ptr: Tensor, cols: Tensor, positions: Tensor,
    sinks: Tensor | None, scale: float, softcap: float, window: int, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    d_sinks = q.new_empty(0) if sinks is None else sinks.new_empty(sinks.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), d_sinks


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, starts, row_ptr, cols, positions, sinks, *options = inputs
    out, lse = output
    ctx.options = options
    ctx.has_sinks = sinks is not None
    ctx.save_for_backward(q, k, v, out, lse, starts, row_ptr, cols, positions, *([] if sinks is None else [sinks]))
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    q, k, v, out, lse, starts, row_ptr, cols, positions, *rest = ctx.saved_tensors
    sinks = rest[0] if ctx.has_sinks else None
    grads: tuple[Any, ...] = (None, None, None, None)
    if grad is not None or grad_lse is not None:
        if grad is None:
            grad = torch.zeros_like(out)
        grads = torch.ops.anabranch.branch_attention_backward(
            grad, grad_lse, q, k, v, out, lse, starts, row_ptr, cols, positions, sinks, *ctx.options
        )
    return *grads[:3], None, None, None, None, grads[3] if ctx.has_sinks else None, None, None, None, None


def _no_double_backward(ctx: Any, *grads: Any) -> Any:
    raise RuntimeError(
        "branch_attention: gradients of its gradients are not implemented; use backend-free dense attention under "
        "mask.dense() where you need them"
    )


for _key in ("CPU", "CUDA"):
    _lib.impl("branch_attention", _forward, _key)
    _lib.impl("branch_attention_backward", _backward, _key)
torch.library.register_fake("anabranch::branch_attention", _forward_fake, lib=_lib)
torch.library.register_fake("anabranch::branch_attention_backward", _backward_fake, lib=_lib)
torch.library.register_autograd("anabranch::branch_attention", _differentiate, setup_context=_setup, lib=_lib)
torch.library.register_autograd("anabranch::branch_attention_backward", _no_double_backward, lib=_lib)
