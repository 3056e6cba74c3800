"""Random steps whose rows read other branches, and the slow way to their attention: keys turned, in float64."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch

import anabranch as ab


def turned(x: torch.Tensor, positions: torch.Tensor, frequencies: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """x [n, heads, dim] by rotary embeddings at positions [n], as complex numbers, in x's own precision."""
    pairs = len(frequencies)
    front, back = x[..., : 2 * pairs], x[..., 2 * pairs :]
    halves = (front[..., 0::2], front[..., 1::2]) if interleaved else (front[..., :pairs], front[..., pairs:])
    z = torch.complex(*(h.double() for h in halves))
    z = (
        z
        * torch.polar(torch.ones(len(x), pairs, dtype=torch.float64), positions.double()[:, None] * frequencies)[
            :, None
        ]
    )
    front = torch.stack([z.real, z.imag], -1).flatten(-2) if interleaved else torch.cat([z.real, z.imag], -1)
    return torch.cat([front.to(x.dtype), back], -1)


class Views:
    """A cache and all that was ever written to it, each token as it was before it was turned.

    options: of ``tree_attention``, besides sinks.
    """

    def __init__(
        self, seed: int, *, dim: int = 16, heads: int = 2, group: int = 3, pairs: int | None = None,
        interleaved: bool = False, dtype: torch.dtype = torch.float32, page_size: int = 4, **options: Any,
    ):  # fmt: skip
        self.random, self.gen = random.Random(seed), torch.Generator().manual_seed(seed)
        self.heads, self.group, self.dim, self.dtype, self.options = heads, group, dim, dtype, options
        pairs = dim // 2 if pairs is None else pairs
        self.frequencies = 50.0 ** -(torch.arange(pairs, dtype=torch.float64) / max(1, pairs))
        self.interleaved = interleaved
        self.cache = ab.TreeCache(
            1, heads, dim, num_pages=400, page_size=page_size, dtype=dtype,
            rotary=ab.Rotary(self.frequencies, interleaved),
        )  # fmt: skip
        self.tokens: dict[ab.Branch, list[tuple[int, torch.Tensor, torch.Tensor]]] = {}  # position, raw k, v
        self.branches: list[ab.Branch] = []

    def branch(self) -> ab.Branch:
        self.branches.append(self.cache.branch())
        self.tokens[self.branches[-1]] = []
        return self.branches[-1]

    def fork(self, branch: ab.Branch, n: int) -> list[ab.Branch]:
        kids = self.cache.fork(branch, n)
        for kid in kids:
            self.tokens[kid] = list(self.tokens[branch])
        self.branches += kids
        return kids

    def grow(self, turning: bool, most: int = 4) -> tuple[ab.Step, dict[ab.Branch, list[list[ab.Read]]]]:
        """A step of some branches; what each of their rows reads is drawn at random."""
        chosen = self.random.sample(self.branches, self.random.randint(1, len(self.branches)))
        rows = {branch: self.random.randint(1, most) for branch in chosen}
        views = {}
        for branch, count in rows.items():
            others = [b for b in self.branches if b is not branch]
            if self.random.random() < 0.2 or not others:
                continue
            same = self.random.random() < 0.5
            reads = [self._reads(others, rows, turning) for _ in range(1 if same else count)]
            views[branch] = reads * count if same else reads
        given = {b: v[0] if all(x is v[0] for x in v) else v for b, v in views.items()}
        return self.cache.step(rows, views=given), views

    def _reads(self, others: list[ab.Branch], rows: dict[ab.Branch, int], turning: bool) -> list[ab.Read]:
        pick = self.random
        found = []
        for other in pick.sample(others, pick.randint(1, min(3, len(others)))):
            start = 9 if other in self.branches[:3] else pick.randint(0, other.length)  # the first three share 9 tokens
            stop = pick.choice([None, other.length, pick.randint(start, other.length + rows.get(other, 0))])
            found.append(ab.Read(other, start, stop, pick.randint(-9, 40) if turning and pick.random() < 0.7 else 0))
        return found

    def attend(self, step: ab.Step, views: dict[ab.Branch, list[list[ab.Read]]], write: str,
               check: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None], backends: list[str],
               sinks: torch.Tensor | None = None) -> None:  # fmt: skip
        """Writes a step's random K and V, and holds each backend's out and lse against the slow way by `check`."""
        n, wide = step.num_rows, self.heads * self.group
        draw = lambda h: torch.randn(n, h, self.dim, generator=self.gen).to(self.dtype).double()  # noqa: E731
        q, k, v, at = draw(wide), draw(self.heads), draw(self.heads), step.position_ids
        ready = lambda x: turned(x, at, self.frequencies, self.interleaved).to(self.dtype)  # noqa: E731
        self.cache.write(0, ready(k), v.to(self.dtype), step, backend=write)
        for branch, part in step.rows.items():
            for i in range(part.start, part.stop):
                self.tokens[branch].append((int(at[i]), k[i], v[i]))
        want, want_lse = self._slowly(step, views, q, sinks)
        for backend in backends:
            out, lse = ab.tree_attention(
                ready(q), self.cache, 0, step, backend=backend, return_lse=True, sinks=sinks, **self.options
            )
            check(out, want, lse, want_lse)

    def _slowly(self, step, views, q, sinks):
        outs, lses = [], []
        softcap, window = self.options.get("softcap"), self.options.get("window")
        for branch, part in step.rows.items():
            for j, i in enumerate(range(part.start, part.stop)):
                own = self.tokens[branch][: branch.length - (part.stop - part.start) + j + 1]
                seen = {id(token[1]): (token, 0) for token in own}
                for read in views.get(branch, [[]] * (j + 1))[j]:
                    held = self.tokens[read.branch]
                    for token in held[read.start : read.stop]:
                        seen.setdefault(id(token[1]), (token, read.offset))
                here = int(step.position_ids[i])
                at = torch.tensor([token[0] - offset for token, offset in seen.values()])
                k = torch.stack([token[1] for token, _ in seen.values()])
                v = torch.stack([token[2] for token, _ in seen.values()]).repeat_interleave(self.group, 1)
                keys = turned(k, at, self.frequencies, self.interleaved).repeat_interleave(self.group, 1)
                query = turned(q[i : i + 1], torch.tensor([here]), self.frequencies, self.interleaved)[0]
                s = torch.einsum("hd,jhd->hj", query, keys) * self.dim**-0.5
                if softcap is not None:
                    s = softcap * torch.tanh(s / softcap)
                if window is not None:
                    s = s.masked_fill(here - at >= window, float("-inf"))
                every = s if sinks is None else torch.cat([s, sinks.double()[:, None]], 1)
                lses.append(every.logsumexp(1))
                outs.append(torch.einsum("hj,jhd->hd", (s - lses[-1][:, None]).exp(), v))
        return torch.stack(outs), torch.stack(lses)


def grown(seed: int, **shape: Any) -> Views:
    """A trunk with forks and two branches of their own, all with some tokens."""
    problem = Views(seed, **shape)
    trunk = problem.branch()
    problem.attend(problem.cache.step({trunk: 9}), {}, "auto", lambda *_: None, [])
    kids = problem.fork(trunk, 2)
    other, empty = problem.branch(), problem.branch()
    rows = {kids[0]: 3, other: 6, kids[1]: 1}
    problem.attend(problem.cache.step(rows), {}, "auto", lambda *_: None, [])
    assert empty.length == 0
    return problem
