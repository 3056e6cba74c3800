"""What the tests of branch attention share: random masks, and dense attention in float64 by autograd alone."""

from __future__ import annotations

import numpy as np
import torch

from anabranch.attention.mask import BranchMask


def random_tree(seed: int, segments: int = 7, longest: int = 20, roots: int = 2) -> BranchMask:
    """A forest in DFS preorder; some segments are empty, some have one token."""
    rng = np.random.default_rng(seed)
    parents, path = [], []
    for i in range(segments):
        up = -1 if not path or (len([p for p in parents if p < 0]) < roots and rng.random() < 0.15) else None
        if up is None:
            del path[int(rng.integers(1, len(path) + 1)) :]
            up = path[-1]
        else:
            path = []
        parents.append(up)
        path.append(i)
    lengths = [int(n) for n in rng.integers(1, longest + 1, segments)]
    if segments > 3:
        lengths[int(rng.integers(0, segments))] = 0
        lengths[int(rng.integers(0, segments))] = 1
    return BranchMask.from_tree(lengths, parents)


def random_graph(seed: int, segments: int = 8, longest: int = 16) -> BranchMask:
    """Each segment sees a random set of earlier ones; positions are as odd as they may be."""
    rng = np.random.default_rng(seed)
    lengths = [int(n) for n in rng.integers(1, longest + 1, segments)]
    context = [[j for j in range(i) if rng.random() < 0.5] for i in range(segments)]
    mask = BranchMask.from_context(lengths, context)
    if seed % 2:
        odd = rng.permutation(mask.num_tokens) // 2
        mask = BranchMask.from_context(lengths, context, positions=torch.from_numpy(odd))
    return mask


def tensors(
    seed: int,
    total: int,
    heads: int,
    kv_heads: int,
    dim: int,
    dtype: torch.dtype,
    device: str = "cpu",
    v_dim: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v and the output's gradient, random."""
    gen = torch.Generator().manual_seed(seed)
    v_dim = v_dim or dim
    shapes = [(total, heads, dim), (total, kv_heads, dim), (total, kv_heads, v_dim), (total, heads, v_dim)]
    q, k, v, grad = (torch.randn(s, generator=gen, dtype=torch.float64) for s in shapes)
    return tuple(x.to(dtype).to(device) for x in (2 * q, k, v, grad))  # type: ignore[return-value]


def dense(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: BranchMask,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Plain PyTorch in the inputs' dtype, over ``mask.dense()``; differentiated by autograd."""
    group = q.shape[1] // k.shape[1]
    visible = mask.dense()
    if window is not None:
        visible = visible & (mask.positions[:, None] - mask.positions[None] < window)
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    s = torch.einsum("ihd,jhd->hij", q, k) * (q.shape[2] ** -0.5 if scale is None else scale)
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    s = s.masked_fill(~visible, float("-inf"))
    if sinks is not None:
        s = torch.cat([s, sinks[:, None, None].expand(-1, s.shape[1], 1)], 2)
    p = torch.softmax(s, 2)[:, :, : v.shape[0]]
    return torch.einsum("hij,jhd->ihd", p, v)


def expected(q, k, v, grad, mask, *, sinks=None, **options):
    """out, dq, dk, dv and, with sinks, d_sinks, all in float64."""
    inputs = [x.detach().cpu().double().requires_grad_() for x in (q, k, v, *([] if sinks is None else [sinks]))]
    out = dense(*inputs[:3], mask.to("cpu"), sinks=inputs[3] if sinks is not None else None, **options)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad.cpu().double())]


def computed(attend, q, k, v, grad, mask, *, sinks=None, **options):
    """The same from ``attend(q, k, v, mask, sinks=…, …)`` in its own dtype."""
    inputs = [x.detach().clone().requires_grad_() for x in (q, k, v, *([] if sinks is None else [sinks]))]
    out = attend(*inputs[:3], mask, sinks=inputs[3] if sinks is not None else None, **options)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad)]


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    """‖got − want‖ / ‖want‖ in float64."""
    got, want = got.detach().cpu().double(), want.double()
    return float((got - want).norm() / want.norm().clamp_min(1e-30))
