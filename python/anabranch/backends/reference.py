"""The oracle: dense attention, one context at a time, in float64 by default. Slow and obvious; it shares no code with
the planner or any kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from anabranch.plan import Plan, Profile

name = "reference"


def unavailable() -> str | None:
    return None


def refuses(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    if not dtype.is_floating_point:
        return f"takes floating-point tensors, not {dtype}"
    if head_dim > 4096:
        return f"head_dim {head_dim} is past anything a model uses (4096)"
    return None


def profile(num_q_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> Profile:
    return Profile(tile=64, chunk=256, parallelism=1, num_kv_heads=num_kv_heads, elem_size=dtype.itemsize)


def gather(pages: Tensor, slots: Tensor) -> Tensor:
    """[num_pages, page_size, heads, dim], slots [n] → [n, heads, dim]."""
    page_size = pages.shape[1]
    return pages[slots // page_size, slots % page_size]


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
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor | None]:
    """Computed in ``dtype`` (float64); out has q's dtype, lse is float32 (float64 for float64 inputs)."""
    rows, num_q_heads, head_dim = q.shape
    num_kv_heads = k_pages.shape[2]
    group = num_q_heads // num_kv_heads
    out = torch.zeros(rows, num_q_heads, head_dim, dtype=dtype, device=q.device)
    lse = torch.full((rows, num_q_heads), float("-inf"), dtype=dtype, device=q.device)
    if sinks is not None:
        lse[:] = sinks.to(dtype)
    view = plan.contexts()
    for c in range(len(view.row_ptr) - 1):
        first, last = int(view.row_ptr[c]), int(view.row_ptr[c + 1])
        begin, end = int(view.ptr[c]), int(view.ptr[c + 1])
        n, length = last - first, end - begin
        if n == 0 or length == 0:
            continue
        slots = torch.from_numpy(view.slots[begin:end]).to(q.device).long()
        k_pos = torch.from_numpy(view.positions[begin:end]).to(q.device).long()
        q_pos = torch.from_numpy(view.row_positions[first:last]).to(q.device)
        k = gather(k_pages, slots).to(dtype).repeat_interleave(group, dim=1)  # [length, Hq, D]
        v = gather(v_pages, slots).to(dtype).repeat_interleave(group, dim=1)
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
        # A key that a row must not see adds nothing, whatever its V holds.
        seen = visible.any(dim=0)
        o = torch.einsum(
            "hij,jhd->ihd", p / torch.where(total == 0, 1.0, total), v.masked_fill(~seen[:, None, None], 0.0)
        )
        out[first:last] = o
        lse[first:last] = (m + torch.log(total)).squeeze(-1).T
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return out.to(q.dtype), lse.to(lse_dtype) if return_lse else None


def write_kv(k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, slots: Tensor) -> None:
    page_size = k_pages.shape[1]
    index = slots.long()
    k_pages[index // page_size, index % page_size] = k
    v_pages[index // page_size, index % page_size] = v


def copy_pages(pool: Tensor, src: Tensor, dst: Tensor, filled: Tensor) -> None:
    for s, d, n in zip(src.tolist(), dst.tolist(), filled.tolist(), strict=True):
        pool[:, d, :, :n] = pool[:, s, :, :n]
