"""Random fork/join programs, run on a TreeCache and its naive twin at once."""

from __future__ import annotations

import random

import torch

import anabranch as ab
from anabranch.kv.naive import NaiveCache


class Twins:
    """A TreeCache and a NaiveCache that are always told the same."""

    def __init__(
        self, num_pages: int = 512, page_size: int = 8, layers: int = 1, heads: int = 2, dim: int = 32,
        dtype: torch.dtype = torch.float32, seed: int = 0, kv_format: str = "auto", v_dim: int | None = None,
        v_in_k: bool = False,
    ) -> None:  # fmt: skip
        self.cache = ab.TreeCache(
            layers, heads, dim, num_pages, page_size, dtype, kv_format=kv_format, v_head_dim=v_dim, v_in_k=v_in_k
        )
        self.naive = NaiveCache(layers, heads, dim, dtype, v_dim, v_in_k)
        self.v_dim, self.v_in_k = v_dim or dim, v_in_k
        self.layers, self.heads, self.dim, self.dtype = layers, heads, dim, dtype
        self.pairs: list[tuple] = []  # (Branch, NaiveBranch), alive
        self.generator = torch.Generator().manual_seed(seed)
        self.random = random.Random(seed)

    def randn(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator).to(self.dtype)

    def kept(self, x: torch.Tensor) -> torch.Tensor:
        """What is left of K or V in the cache's format."""
        fmt = self.cache.kv_format
        return fmt.dequantise(*fmt.quantise(x), self.dtype) if fmt.quantised else x

    def branch(self) -> tuple:
        pair = (self.cache.branch(), self.naive.branch())
        self.pairs.append(pair)
        return pair

    def fork(self, pair: tuple, n: int) -> list[tuple]:
        kids = list(zip(self.cache.fork(pair[0], n), self.naive.fork(pair[1], n), strict=True))
        self.pairs += kids
        return kids

    def step(self, rows: dict[int, int], positions: dict[int, list[int]] | None = None) -> tuple:
        """rows: index into ``pairs`` → number of new tokens. Writes random K and V to all layers."""
        where = positions or {}
        held = {branch: self.cache._core.slots(branch).tolist() for branch, _ in self.pairs}
        step = self.cache.step(
            {self.pairs[i][0]: n for i, n in rows.items()},
            {self.pairs[i][0]: torch.tensor(p) for i, p in where.items()},
        )
        twin = self.naive.step(
            {self.pairs[i][1]: n for i, n in rows.items()}, {self.pairs[i][1]: p for i, p in where.items()}
        )
        assert torch.equal(step.position_ids, twin.position_ids)
        self.check_reservations(step, held)
        assert [step.rows[self.pairs[i][0]] for i in rows] == [twin.rows[self.pairs[i][1]] for i in rows]
        for layer in range(self.layers):
            k = self.randn(step.num_rows, self.heads, self.dim)
            v = None if self.v_in_k else self.randn(step.num_rows, self.heads, self.v_dim)
            self.cache.write(layer, k, v, step)
            self.naive.write(layer, self.kept(k), None if v is None else self.kept(v), twin)
        return step, twin

    def check_reservations(self, step: ab.Step, held: dict[ab.Branch, list[int]]) -> None:
        """What a step may write to. The kernels copy all pages at once and in any order: a page that somebody held
        before the step, a copy's source above all, must not be a destination, even where the step itself frees it."""
        page_size = self.cache.page_size
        before = set[int]().union(*held.values())
        pages_before = {slot // page_size for slot in before}
        sources, destinations, filled = step._core.copies().tolist()
        assert pages_before.issuperset(sources) and pages_before.isdisjoint(destinations)
        assert len(set(destinations)) == len(destinations)
        assert all(0 < n <= page_size for n in filled)
        new = step.slots.tolist()
        assert len(set(new)) == len(new) and before.isdisjoint(new)
        copied = {d * page_size + i for d, n in zip(destinations, filled, strict=True) for i in range(n)}
        assert copied.isdisjoint(new)
        # Each branch keeps its own slots, but for those of the pages copied for it, and gains its own rows' alone.
        moved = dict(zip(destinations, sources, strict=True))
        for branch, slots in held.items():
            now = self.cache._core.slots(branch).tolist()
            rows = new[step.rows[branch]] if branch in step.rows else []
            assert now[len(now) - len(rows) :] == rows
            old = [moved.get(slot // page_size, slot // page_size) * page_size + slot % page_size for slot in now]
            assert old[: len(now) - len(rows)] == slots

    def kids_of(self, pair: tuple) -> list[tuple]:
        return [p for p in self.pairs if p[1].parent is pair[1]]

    def join(self, pair: tuple, kids: list[tuple]) -> None:
        self.cache.join(pair[0], [k[0] for k in kids])
        self.naive.join(pair[1], [k[1] for k in kids])
        self.pairs = [p for p in self.pairs if p not in kids]

    def sharers(self) -> list[tuple[tuple, tuple]]:
        """Pairs of siblings of which the first may come to see what the second wrote."""
        found = []
        for a in self.pairs:
            for b in self.pairs:
                related = a is not b and a[1].parent is not None and a[1].parent is b[1].parent
                if related and a[1].own == a[1].length and b[1] not in a[1].sees:
                    found.append((a, b))
        return found

    def share(self, pair: tuple, sibling: tuple, count: int) -> None:
        self.cache.share(pair[0], sibling[0], count)
        self.naive.share(pair[1], sibling[1], count)

    def truncate(self, pair: tuple, length: int) -> None:
        self.cache.truncate(pair[0], length)
        self.naive.truncate(pair[1], length)

    def release(self, pair: tuple) -> None:
        self.cache.release(pair[0])
        self.naive.release(pair[1])
        self.pairs.remove(pair)

    def compare(self, layers: range | None = None) -> None:
        """Same lengths, positions and KV in every live branch, and an account that adds up."""
        self.cache.check()
        for branch, twin in self.pairs:
            assert branch.alive and (branch.length, branch.position) == (twin.length, twin.position)
            assert self.cache.positions(branch).tolist() == twin.positions
            for layer in layers if layers is not None else range(self.layers):
                for ours, theirs in zip(self.cache.read(branch, layer), self.naive.read(twin, layer), strict=True):
                    assert torch.equal(ours, theirs)
        usage = self.cache.usage()
        assert usage.tokens_logical == sum(t.length for _, t in self.pairs)
        assert usage.tokens_physical <= usage.tokens_logical

    def random_change(self, max_branches: int = 12, max_rows: int = 9) -> None:
        """One random call other than the attention itself."""
        r = self.random
        if not self.pairs:
            self.branch()
        pair = r.choice(self.pairs)
        action = r.choice(("fork", "fork", "step", "step", "step", "join", "share", "truncate", "release", "branch"))
        if action == "fork" and len(self.pairs) < max_branches:
            self.fork(pair, r.randint(1, 3))
        elif action == "join" and self.kids_of(pair):
            kids = self.kids_of(pair)
            self.join(pair, r.sample(kids, r.randint(1, len(kids))))
        elif action == "share" and (sharers := self.sharers()):
            pair, sibling = r.choice(sharers)
            self.share(pair, sibling, r.randint(0, sibling[1].length - sibling[1].own))
        elif action == "truncate" and pair[1].length:
            self.truncate(pair, r.randint(0, pair[1].length))
        elif action == "release" and len(self.pairs) > 1:
            self.release(pair)
        elif action == "branch" and len(self.pairs) < max_branches:
            self.branch()
        elif action == "step":
            self.random_step(max_rows)

    def random_step(self, max_rows: int = 9) -> tuple:
        r = self.random
        chosen = r.sample(range(len(self.pairs)), r.randint(1, len(self.pairs)))
        rows = {i: 1 if r.random() < 0.6 else r.randint(1, max_rows) for i in chosen}
        where = {
            i: sorted(r.randint(0, 60) for _ in range(n)) for i, n in rows.items() if r.random() < 0.1
        }  # positions given by hand, as a strategy that restarts them does
        return self.step(rows, where)


def backends_here() -> list[str]:
    """Every backend that works on this machine, the interpreter's Triton included."""
    from anabranch import backends

    return [name for name in backends.NAMES if backends.unavailable(name) is None]
