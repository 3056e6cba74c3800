"""``branch_attention``: attention over packed branches for training. Argument checks, then the torch op."""

from __future__ import annotations

import torch
from torch import Tensor

from anabranch._check import shape_of
from anabranch.attention.mask import BranchMask
from anabranch.attention.tree import check_backend, check_sinks, options_of
from anabranch.ops import branch as branch_ops  # noqa: F401  # defines the op


def branch_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BranchMask,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    sinks: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention of packed tokens under a ``BranchMask``, forward and backward.

    A prompt of two tokens and two answers of one, packed as ``[prompt prompt a b]``, see::

        1 0 0 0
        1 1 0 0
        1 1 1 0
        1 1 0 1

    Only tiles that some row sees are computed; there is no [T, T] tensor, and memory grows with T: besides the inputs,
    the backward keeps the output and the log-sum-exp. (``backend="reference"`` is the exception: it is dense.) The
    backward uses no atomics: the same inputs and, on the CPU, the same number of threads give the same bits.

    Differentiable in q, k, v and sinks (once: not in its own gradients). Works under autocast (q, k and v are then
    converted to its dtype, unless they are float64), ``torch.compile(fullgraph=True)``, activation checkpointing and
    DistributedDataParallel.

    Args:
        q: [T, num_q_heads, head_dim] float32, bfloat16 or float16 (reference: also float64), head_dim 1–256; any
            strides. Query head h reads KV head h // (num_q_heads // num_kv_heads).
        k, v: [T, num_kv_heads, head_dim], q's dtype and device.
        mask: which token sees which; T = ``mask.num_tokens``, on q's device (``mask.to(q.device)``).
        scale: factor on q·k; default head_dim ** -0.5.
        softcap: scores become softcap · tanh(score / softcap), before the mask (Gemma 2).
        window: a key is visible when q_position − k_position < window (``mask.positions``, as in Transformers).
        sinks: [num_q_heads], an extra logit a head that takes part in the softmax only (gpt-oss).
        backend: "auto", "cpu", "triton" or "reference".

    Returns:
        out [T, num_q_heads, head_dim], contiguous, in q's dtype.

    Raises:
        TypeError, ValueError: a mask, shape, dtype, device or option that does not fit; nothing was computed.
        BackendUnavailable: the backend asked for cannot run here.

    >>> mask = ab.BranchMask.from_context([2, 1, 1], [[], [0], [0]])   # a prompt of two tokens, two answers of one
    >>> q, k, v = torch.randn(4, 8, 64), torch.randn(4, 2, 64), torch.randn(4, 2, 64)
    >>> ab.branch_attention(q, k, v, mask).shape
    torch.Size([4, 8, 64])
    """
    if not isinstance(mask, BranchMask):
        raise TypeError(f"mask: expected a BranchMask (BranchMask.from_tree, from_context), got {type(mask).__name__}")
    q, k, v = _autocast(q, k, v)
    _check(q, k, v, mask)
    numbers = options_of(q.shape[2], scale, softcap, window)
    check_sinks(sinks, q)
    check_backend(backend)
    out, _ = torch.ops.anabranch.branch_attention(
        q,
        k,
        v,
        mask.starts,
        mask.row_ptr,
        mask.cols,
        mask.positions,
        sinks,
        *numbers,
        backend,
    )
    return out


def _autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What autocast does for PyTorch's own attention: the lower precision for what is float32 or lower."""
    if not isinstance(q, Tensor) or not torch.amp.is_autocast_available(q.device.type):
        return q, k, v
    if not torch.is_autocast_enabled(q.device.type):
        return q, k, v
    dtype = torch.get_autocast_dtype(q.device.type)
    x, y, z = (
        t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in (q, k, v)
    )
    return x, y, z


def _check(q: Tensor, k: Tensor, v: Tensor, mask: BranchMask) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor) or x.dim() != 3:
            hint = "; a batch [B, T, H, D] is packed in one row, see BranchMask.pack" if _dims(x) == 4 else ""
            raise ValueError(f"{name}: expected a tensor [T, heads, head_dim], got {shape_of(x)}{hint}")
    if q.shape[0] != mask.num_tokens:
        raise ValueError(
            f"mask: made for {mask.num_tokens} tokens, but q has {q.shape[0]} rows; pass the mask of this packed row"
        )
    if mask.device != q.device:
        raise ValueError(f"mask: is on {mask.device}, q on {q.device}; pass mask.to({str(q.device)!r})")
    if k.shape[1] == 0 or q.shape[1] == 0 or q.shape[1] % k.shape[1] != 0:
        raise ValueError(f"q: {q.shape[1]} query heads are not a multiple of the {k.shape[1]} KV heads")
    for name, x in (("k", k), ("v", v)):
        if x.shape[0] != q.shape[0] or x.shape[2] != q.shape[2] or x.shape[1] != k.shape[1]:
            heads = "num_kv_heads" if name == "k" else str(k.shape[1])
            raise ValueError(f"{name}: expected shape [{q.shape[0]}, {heads}, {q.shape[2]}], got {list(x.shape)}")
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(
                f"{name}: expected {q.dtype} on {q.device} like q, got {x.dtype} on {x.device}; convert it"
            )


def _dims(x: object) -> int:
    return x.dim() if isinstance(x, Tensor) else 0
