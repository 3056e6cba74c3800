"""Two phases in plain PyTorch: a shared prefix as one product for all rows below it, suffixes a branch, LSE merge.

That is Hydragen's and RelayAttention's scheme, generalised to trees: one phase a level, as in FlashInfer's cascade.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass

import torch

from ..workload import Workload
from .base import Call, Contender, Unfit

# The CPU flash kernel behind scaled_dot_product_attention; called by its name because only that returns the LSE.
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


@dataclass
class Phase:
    """Nodes of one level with equally many tokens and rows, computed in one batched call.

    `rows` are the query rows below the nodes, a contiguous slice where possible, else an index tensor; `k` and `v` are
    [nodes, kv_heads, tokens, head_dim], contiguous; `mask` [rows, tokens] is for a last phase whose rows see parts.
    """

    rows: slice | torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    mask: torch.Tensor | None = None


def _as_rows(indices: list[int]) -> slice | torch.Tensor:
    if indices == list(range(indices[0], indices[0] + len(indices))):
        return slice(indices[0], indices[0] + len(indices))
    return torch.tensor(indices)


def phases(work: Workload) -> list[Phase]:
    case = work.case
    if case.group in ("draft", "prefill"):
        return _trunk_and_tail(work)
    below: list[list[int]] = [[] for _ in case.lengths]
    for row, (leaf, _) in enumerate(case.rows):
        for node in case.path(leaf):
            below[node].append(row)
    groups: dict[tuple[int, int, int], list[int]] = defaultdict(list)
    for node, rows in enumerate(below):
        groups[(case.depths[node], case.lengths[node], len(rows))].append(node)
    out = []
    for nodes in groups.values():
        k, v = (
            torch.stack([t[work.node_slice(n)].transpose(0, 1) for n in nodes]).contiguous()
            for t in (work.keys, work.values)
        )
        out.append(Phase(_as_rows([r for n in nodes for r in below[n]]), k, v))
    return out


def _trunk_and_tail(work: Workload) -> list[Phase]:
    """One trunk that all rows see whole, and one small masked product for what follows it (drafts, a prefill chunk)."""
    case = work.case
    first = int(work.row_index.min())

    def part(tokens: slice) -> tuple[torch.Tensor, torch.Tensor]:
        k, v = (t[tokens].transpose(0, 1).contiguous()[None] for t in (work.keys, work.values))
        return k, v

    rows = slice(0, len(case.rows))
    index = work.row_index[:, None]
    keys = torch.arange(first, case.unique_tokens)
    mask = (keys <= index) & (index < work.key_end[first:])
    return [Phase(rows, *part(slice(0, first))), Phase(rows, *part(slice(first, case.unique_tokens)), mask=mask)]


class TwoPhase(Contender):
    name = "two_phase"
    title = "two-phase torch"

    def bytes_needed(self) -> float:
        return self.work.kv_bytes

    def variants(self) -> dict[str, Call]:
        work = self.work
        parts = phases(work)
        if len(parts) > 64:
            raise Unfit(f"{len(parts)} phases: the tree has no regular levels")
        rows, heads, group = len(work.case.rows), work.num_kv_heads, work.group
        additive = [
            None
            if p.mask is None
            else torch.zeros(p.mask.shape, dtype=work.dtype)
            .masked_fill(~p.mask, -math.inf)
            .repeat_interleave(group, 0)[None, None]
            for p in parts
        ]

        def pack(q: torch.Tensor, phase: Phase) -> torch.Tensor:
            """[rows, q_heads, D] → [nodes, kv_heads, rows a node · group, D]; a view where a node has one row."""
            x = q[phase.rows]
            nodes = phase.k.shape[0]
            each = x.shape[0] // nodes
            x = x.view(nodes, each, heads, group, work.head_dim).transpose(1, 2)
            return x.reshape(nodes, heads, each * group, work.head_dim)

        def unpack(o: torch.Tensor) -> torch.Tensor:
            """The inverse: [nodes, kv_heads, rows · group, X] → [rows, kv_heads, group, X]."""
            nodes, _, packed, width = o.shape
            return o.view(nodes, heads, packed // group, group, width).transpose(1, 2).reshape(-1, heads, group, width)

        def flash(x, phase, mask):
            o, lse = _flash(x, phase.k, phase.v, attn_mask=mask, scale=work.scale)
            return o, lse

        def gemm(x, phase, mask):
            scores = torch.matmul(x * work.scale, phase.k.transpose(2, 3)).float()
            if mask is not None:
                scores = scores + mask
            lse = torch.logsumexp(scores, dim=-1)
            o = torch.matmul(scores.sub_(lse[..., None]).exp_().to(work.dtype), phase.v)
            return o, lse

        def merged(attend) -> torch.Tensor:
            """Running merge; every phase but the last covers all rows of a regular tree."""
            out = lse = None
            for phase, mask in zip(parts, additive, strict=True):
                o, s = attend(pack(work.q, phase), phase, mask)
                s = s.view(phase.k.shape[0], heads, -1, 1) if s.dim() == 3 else s
                o, s = unpack(o), unpack(s)
                whole = isinstance(phase.rows, slice) and phase.rows == slice(0, rows)
                if out is None and whole:
                    out, lse = o.float(), s.float()
                    continue
                if out is None:
                    out = torch.zeros(rows, heads, group, work.head_dim)
                    lse = torch.full((rows, heads, group, 1), -math.inf)
                if whole:
                    share = torch.sigmoid(s - lse)
                    out = torch.lerp(out, o.float(), share)
                    lse = torch.logaddexp(lse, s)
                else:
                    share = torch.sigmoid(s - lse[phase.rows])
                    out[phase.rows] = torch.lerp(out[phase.rows], o.float(), share)
                    lse[phase.rows] = torch.logaddexp(lse[phase.rows], s)
            return out.reshape(rows, work.num_q_heads, work.head_dim).to(work.dtype)

        ways: dict[str, Call] = {"flash kernel with LSE": lambda: merged(flash)}
        if work.dtype == torch.float32:  # a bf16 matmul is dozens of times slower on CPUs without AVX-512 BF16
            ways["two matmuls"] = lambda: merged(gemm)
        return ways
