"""The oracle: dense attention, one context at a time, in float64 by default. Slow and obvious; it shares no code with
the planner or any kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from anabranch.backends import formats
from anabranch.backends.formats import KVScales
from anabranch.plan.plan import Plan
from anabranch.plan.tile_config import TileConfig

if TYPE_CHECKING:
    from anabranch.backends.base import MaskTensors

name = "reference"
device_type = "cpu"
capturable = False
batch_invariant = False
kv_dtypes = (torch.int8, torch.float8_e4m3fn)


def unavailable() -> str | None:
    return None


def expected(gpu: bool) -> bool:
    return True


def info() -> dict[str, Any]:
    return {}


def refuses(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    if not dtype.is_floating_point:
        return f"takes floating-point tensors, not {dtype}"
    if head_dim > 4096:
        return f"head_dim {head_dim} is past anything a model uses (4096)"
    return None


def tile_config(
    num_q_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> TileConfig:
    return TileConfig(tile=64, chunk=256, parallelism=1, num_kv_heads=num_kv_heads, elem_size=dtype.itemsize)


def gather(pages: Tensor, slots: Tensor, dtype: torch.dtype, scales: Tensor | None = None) -> Tensor:
    """[num_pages, page_size, heads, dim], slots [n] → [n, heads, dim] in `dtype`; scales as the pages, without dim."""
    page, offset = slots // pages.shape[1], slots % pages.shape[1]
    found = formats.pick(pages, page, offset)
    if scales is None:
        return found.to(dtype)
    return formats.by_dtype(pages.dtype).dequantise(found, scales[page, offset], dtype)


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
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor | None]:
    """Computed in ``dtype`` (float64); out has q's dtype, lse is float32 (float64 for float64 inputs)."""
    view = plan.contexts()
    if view.row_of is not None:
        return _attend_queries(q, k_pages, v_pages, plan, scale, softcap, window, sinks, return_lse, kv_scales, dtype)
    rows, num_q_heads, head_dim = q.shape
    num_kv_heads = k_pages.shape[2]
    group = num_q_heads // num_kv_heads
    out = torch.zeros(rows, num_q_heads, head_dim, dtype=dtype, device=q.device)
    lse = torch.full((rows, num_q_heads), float("-inf"), dtype=dtype, device=q.device)
    if sinks is not None:
        lse[:] = sinks.to(dtype)
    for c in range(len(view.row_ptr) - 1):
        first, last = int(view.row_ptr[c]), int(view.row_ptr[c + 1])
        begin, end = int(view.ptr[c]), int(view.ptr[c + 1])
        n, length = last - first, end - begin
        if n == 0 or length == 0:
            continue
        slots = torch.from_numpy(view.slots[begin:end]).to(q.device).long()
        k_pos = torch.from_numpy(view.positions[begin:end]).to(q.device).long()
        q_pos = torch.from_numpy(view.row_positions[first:last]).to(q.device)
        k_scales, v_scales = (None, None) if kv_scales is None else kv_scales
        k = gather(k_pages, slots, dtype, k_scales).repeat_interleave(group, dim=1)  # [length, Hq, D]
        v = gather(v_pages, slots, dtype, v_scales).repeat_interleave(group, dim=1)
        s = torch.einsum("ihd,jhd->hij", q[first:last].to(dtype), k) * scale  # [Hq, n, length]
        if softcap is not None:
            s = softcap * torch.tanh(s / softcap)
        index = torch.arange(length, device=q.device)
        limit = length - n + 1 + torch.arange(n, device=q.device)
        visible = index[None, :] < limit[:, None]
        if window is not None:
            visible &= q_pos[:, None] - k_pos[None, :] < window
        s = s.masked_fill(~visible, float("-inf"))
        m = s.amax(dim=-1, keepdim=True)
        if sinks is not None:
            m = torch.maximum(m, sinks.to(dtype)[:, None, None])
        p = torch.exp(s - torch.where(m == float("-inf"), 0.0, m)).masked_fill(~visible, 0.0)
        total = p.sum(dim=-1, keepdim=True)
        if sinks is not None:
            total = total + torch.exp(sinks.to(dtype)[:, None, None] - m)
        out[first:last] = _weigh("hij,jhd->ihd", p / torch.where(total == 0, 1.0, total), v, visible)
        lse[first:last] = (m + torch.log(total)).squeeze(-1).T
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return out.to(q.dtype), lse.to(lse_dtype) if return_lse else None


def _attend_queries(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    plan: Plan,
    scale: float,
    softcap: float | None,
    window: int | None,
    sinks: Tensor | None,
    return_lse: bool,
    kv_scales: KVScales | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    """Attention of rows that are several queries each: one softmax over what all queries of a row see."""
    view, group = plan.contexts(), q.shape[1] // k_pages.shape[2]
    assert view.row_of is not None
    k_scales, v_scales = (None, None) if kv_scales is None else kv_scales
    scores: list[list[Tensor]] = [[] for _ in range(plan.num_rows)]  # of each row: [Hq, tokens], a query at a time
    values: list[list[Tensor]] = [[] for _ in range(plan.num_rows)]
    for c in range(len(view.row_ptr) - 1):
        begin, end = int(view.ptr[c]), int(view.ptr[c + 1])
        slots = torch.from_numpy(view.slots[begin:end]).to(q.device).long()
        k_pos = torch.from_numpy(view.positions[begin:end]).to(q.device).long()
        k = gather(k_pages, slots, dtype, k_scales).repeat_interleave(group, dim=1)
        v = gather(v_pages, slots, dtype, v_scales).repeat_interleave(group, dim=1)
        first, last = int(view.row_ptr[c]), int(view.row_ptr[c + 1])
        for query in range(first, last):
            seen = torch.arange(end - begin, device=q.device) < end - begin - (last - 1 - query)
            if window is not None:
                seen &= int(view.row_positions[query]) - k_pos < window
            s = torch.einsum("hd,jhd->hj", q[query].to(dtype), k[seen]) * scale
            row = int(view.row_of[query])
            scores[row].append(s if softcap is None else softcap * torch.tanh(s / softcap))
            values[row].append(v[seen])
    outs, lses = [], []
    for row in range(plan.num_rows):
        s, v = torch.cat(scores[row], 1), torch.cat(values[row])
        total = s if sinks is None else torch.cat([s, sinks.to(dtype)[:, None]], 1)
        lses.append(torch.logsumexp(total, 1))
        outs.append(torch.einsum("hj,jhd->hd", torch.exp(s - lses[row][:, None]), v))  # a row sees itself
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return torch.stack(outs).to(q.dtype), torch.stack(lses).to(lse_dtype) if return_lse else None


def write_kv(
    k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, slots: Tensor, kv_scales: KVScales | None = None
) -> None:
    if bool((slots < 0).any()):
        kept = slots >= 0
        k, v, slots = k[kept], v[kept], slots[kept]
    page, offset = slots.long() // k_pages.shape[1], slots.long() % k_pages.shape[1]
    for x, pages, scales in ((k, k_pages, kv_scales and kv_scales.k), (v, v_pages, kv_scales and kv_scales.v)):
        if scales is not None:
            x, scales[page, offset] = formats.by_dtype(pages.dtype).quantise(x)
        formats.put(pages, page, offset, x)


def copy_pages(pool: Tensor, src: Tensor, dst: Tensor, filled: Tensor, scales: Tensor | None = None) -> None:
    for s, d, n in zip(src.tolist(), dst.tolist(), filled.tolist(), strict=True):
        for x in (pool,) if scales is None else (pool, scales):
            x[:, d, :, :n] = x[:, s, :, :n]


def branch_visible(layout: MaskTensors, window: int | None) -> Tensor:
    """bool [T, T] of a branch mask, True = the row may attend to the column."""
    starts, ptr = layout.starts.tolist(), layout.row_ptr.tolist()
    total = layout.positions.shape[0]
    sees = torch.zeros(total, total, dtype=torch.bool, device=layout.positions.device)
    for s in range(len(starts) - 1):
        begin, end = starts[s], starts[s + 1]
        for b, e in layout.cols[ptr[s] : ptr[s + 1]].tolist():
            sees[begin:end, b:e] = True
        sees[begin:end, begin:end] = torch.ones(end - begin, end - begin, dtype=torch.bool, device=sees.device).tril()
    if window is not None:
        sees &= layout.positions[:, None] - layout.positions[None, :] < window
    return sees


def _branch_scores(
    q: Tensor, k: Tensor, visible: Tensor, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor | None]:
    """Scores [Hq, T, T], −inf where hidden, and their derivative by q·k · scale (None: 1)."""
    s = torch.einsum("ihd,jhd->hij", q, k) * scale
    slope = None
    if softcap is not None:
        t = torch.tanh(s / softcap)
        s, slope = softcap * t, 1 - t * t
    return s.masked_fill(~visible, float("-inf")), slope


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
    """Dense, in float64: out [T, Hq, D] in q's dtype, lse [T, Hq] float32 (float64 for float64)."""
    group, dtype = q.shape[1] // k.shape[1], torch.float64
    visible = branch_visible(layout, window)
    wide_k, wide_v = (x.to(dtype).repeat_interleave(group, 1) for x in (k, v))
    s, _ = _branch_scores(q.to(dtype), wide_k, visible, scale, softcap)
    if sinks is not None:
        s = torch.cat([s, sinks.to(dtype)[:, None, None].expand(-1, s.shape[1], 1)], 2)
    lse = torch.logsumexp(s, 2)
    p = torch.exp(s[:, :, : k.shape[0]] - lse[:, :, None]).masked_fill(~visible, 0.0)
    out = _weigh("hij,jhd->ihd", p, wide_v, visible)
    kept = torch.float64 if q.dtype == torch.float64 else torch.float32
    return out.to(q.dtype).contiguous(), lse.T.to(kept).contiguous()


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
    """dq, dk, dv in their inputs' dtypes, and delta [T, Hq] = grad · out − grad_lse in lse's dtype."""
    group, dtype, shape = q.shape[1] // k.shape[1], torch.float64, k.shape
    visible = branch_visible(layout, window)
    wide_k, wide_v = (x.to(dtype).repeat_interleave(group, 1) for x in (k, v))
    x, do = q.to(dtype), grad.to(dtype)
    s, slope = _branch_scores(x, wide_k, visible, scale, softcap)
    p = torch.exp(s - lse.to(dtype).T[:, :, None]).masked_fill(~visible, 0.0)
    delta = (do * out.to(dtype)).sum(2)
    if grad_lse is not None:
        delta = delta - grad_lse.to(dtype)
    ds = p * (torch.einsum("ihd,jhd->hij", do, wide_v) - delta.T[:, :, None])
    ds = (ds if slope is None else ds * slope).masked_fill(~visible, 0.0) * scale
    dq = _weigh("hij,jhd->ihd", ds, wide_k, visible)
    dk = _weigh("hij,ihd->jhd", ds, x, visible.T).unflatten(1, (shape[1], group)).sum(2)
    dv = _weigh("hij,ihd->jhd", p, do, visible.T).unflatten(1, (shape[1], group)).sum(2)
    dq, dk, dv = (x.to(y.dtype).contiguous() for x, y in ((dq, q), (dk, k), (dv, v)))
    return dq, dk, dv, delta.to(lse.dtype)


def _weigh(equation: str, weights: Tensor, values: Tensor, visible: Tensor) -> Tensor:
    """The einsum; 0 · NaN adds nothing where a value is hidden (``visible`` [outputs, values])."""
    if bool(values.isfinite().all()):
        return torch.einsum(equation, weights, values)
    summed = 2 if equation.startswith("hij,j") else 1
    rows = [
        torch.einsum("hj,jhd->hd", weights.select(3 - summed, i)[:, seen], values[seen])
        for i, seen in enumerate(visible)
    ]
    return torch.stack(rows)
