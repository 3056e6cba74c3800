"""``NaiveCache``: what ``TreeCache`` means, with nothing clever. One dense tensor a branch; a fork copies it.

It is the oracle of the property tests, and the shortest description of the semantics. No pages, so it never runs out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


class NaiveBranch:
    """A branch as plain data: ``kv`` [tokens, layers, heads, dim of K + dim of V], ``positions`` and where its own
    tokens begin."""

    def __init__(self, kv: Tensor, positions: list[int], position: int, parent: NaiveBranch | None) -> None:
        self.kv = kv
        self.positions = positions
        self.position = position
        self.parent = parent
        self.own = len(positions)
        self.sees: list[NaiveBranch] = []  # siblings whose tokens it shares
        self.alive = True

    @property
    def length(self) -> int:
        return len(self.positions)


class NaiveStep:
    """Rows of a step: which branch, which tokens."""

    def __init__(self, rows: dict[NaiveBranch, slice], first: dict[NaiveBranch, int], position_ids: Tensor) -> None:
        self.rows = rows
        self.first = first  # context index of each branch's first new token
        self.position_ids = position_ids
        self.num_rows = int(position_ids.shape[0])


class NaiveCache:
    """The dense twin of ``TreeCache``: same calls, same results, no sharing."""

    def __init__(
        self,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        v_head_dim: int | None = None,
        v_in_k: bool = False,
    ) -> None:
        self.head_dim = head_dim
        self.v_head_dim = head_dim if v_head_dim is None else v_head_dim
        self.v_in_k = v_in_k
        self.shape = (num_layers, num_kv_heads, head_dim + (0 if v_in_k else self.v_head_dim))
        self.dtype = dtype
        self.alive: list[NaiveBranch] = []

    def branch(self) -> NaiveBranch:
        new = NaiveBranch(torch.empty(0, *self.shape, dtype=self.dtype), [], 0, None)
        self.alive.append(new)
        return new

    def fork(self, branch: NaiveBranch, n: int = 1) -> list[NaiveBranch]:
        kids = [NaiveBranch(branch.kv.clone(), list(branch.positions), branch.position, branch) for _ in range(n)]
        self.alive.extend(kids)
        return kids

    def step(
        self, rows: Mapping[NaiveBranch, int], positions: Mapping[NaiveBranch, Sequence[int]] | None = None
    ) -> NaiveStep:
        at, slices, first, ids = 0, {}, {}, []
        for branch, n in rows.items():
            new = [int(p) for p in (positions or {}).get(branch, range(branch.position, branch.position + n))]
            slices[branch], first[branch] = slice(at, at + n), branch.length
            branch.kv = torch.cat([branch.kv, torch.full((n, *self.shape), float("nan"), dtype=self.dtype)])
            branch.positions += new
            branch.position = new[-1] + 1
            ids += new
            at += n
        return NaiveStep(slices, first, torch.tensor(ids))

    def write(self, layer: int, k: Tensor, v: Tensor | None, step: NaiveStep) -> None:
        kv = k if v is None else torch.cat([k, v], -1)
        for branch, rows in step.rows.items():
            begin = step.first[branch]
            branch.kv[begin : begin + rows.stop - rows.start, layer] = kv[rows]

    def join(self, trunk: NaiveBranch, kids: Sequence[NaiveBranch]) -> None:
        for kid in kids:
            trunk.kv = torch.cat([trunk.kv, kid.kv[kid.own :]])
            trunk.positions += kid.positions[kid.own :]
            trunk.position = max(trunk.position, kid.position)
            self.release(kid)

    def share(self, branch: NaiveBranch, sibling: NaiveBranch, count: int) -> None:
        own = slice(sibling.own, sibling.own + count)
        branch.kv = torch.cat([branch.kv, sibling.kv[own]])
        branch.positions += sibling.positions[own]
        branch.position = max([branch.position, *(p + 1 for p in sibling.positions[own])])
        branch.own = branch.length
        branch.sees.append(sibling)

    def truncate(self, branch: NaiveBranch, length: int) -> None:
        if length >= branch.length:
            return
        branch.kv = branch.kv[:length]
        branch.positions = branch.positions[:length]
        branch.position = branch.positions[-1] + 1 if length else 0
        branch.own = min(branch.own, length)

    def release(self, branch: NaiveBranch) -> None:
        branch.alive = False
        self.alive.remove(branch)

    def read(self, branch: NaiveBranch, layer: int) -> tuple[Tensor, Tensor]:
        kv = branch.kv[:, layer]
        return kv[..., : self.head_dim], kv[..., : self.v_head_dim] if self.v_in_k else kv[..., self.head_dim :]

    def attention(
        self,
        q: Tensor,
        layer: int,
        step: NaiveStep,
        scale: float | None = None,
        softcap: float | None = None,
        window: int | None = None,
        sinks: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Row by row in float64: out [rows, Hq, v_head_dim] and lse [rows, Hq]."""
        out = torch.zeros(*q.shape[:2], self.v_head_dim, dtype=torch.float64)
        lse = torch.zeros(q.shape[:2], dtype=torch.float64)
        scale = q.shape[2] ** -0.5 if scale is None else scale
        for branch, rows in step.rows.items():
            k, v = (x.double() for x in self.read(branch, layer))
            group = q.shape[1] // k.shape[1]
            for i in range(rows.start, rows.stop):
                seen = list(range(step.first[branch] + i - rows.start + 1))
                if window is not None:
                    seen = [j for j in seen if int(step.position_ids[i]) - branch.positions[j] < window]
                for h in range(q.shape[1]):
                    s = k[seen, h // group] @ q[i, h].double() * scale
                    if softcap is not None:
                        s = softcap * torch.tanh(s / softcap)
                    logits = s if sinks is None else torch.cat([s, sinks[h : h + 1].double()])
                    lse[i, h] = torch.logsumexp(logits, 0)
                    out[i, h] = torch.exp(s - lse[i, h]) @ v[seen, h // group]
        return out, lse
