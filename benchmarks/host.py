"""What the bookkeeping costs: forks, steps with their plans, and what a cache holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import SimpleNamespace

import torch

import anabranch as ab
from anabranch import backends
from anabranch.plan.tile_config import TileConfig
from anabranch.runner.graph import DecodeGraph

from .timing import Timing, once

CPU = torch.device("cpu")
Q_HEADS, KV_HEADS, HEAD_DIM, DTYPE = 32, 8, 128, torch.bfloat16


def tile_config() -> TileConfig:
    """How this machine's backend wants its work cut, for 32/8 heads of 128."""
    return backends.choose("auto", CPU, DTYPE, HEAD_DIM).tile_config(Q_HEADS, KV_HEADS, HEAD_DIM, DTYPE, CPU)


@dataclass
class Forest:
    """`branches` branches of one trunk, each past its first copy-on-write, ready to be stepped."""

    cache: ab.TreeCache
    trunk: ab.Branch
    branches: list[ab.Branch]

    def step(self, cut: TileConfig) -> None:
        """One decode step's bookkeeping: slots and positions for every branch, and the plan's work items."""
        step = self.cache.step({b: 1 for b in self.branches})
        step.plan.arrays(Q_HEADS // KV_HEADS, cut)

    def churn(self) -> None:
        """Change the topology: the first branch ends, the last one forks."""
        self.cache.release(self.branches.pop(0))
        self.branches.append(self.cache.fork(self.branches[-1], 1)[0])


def forest(prefix: int, branches: int, steps: int, num_layers: int = 1) -> Forest:
    """A trunk of `prefix` tokens, `branches` kids, room for `steps` tokens more each. KV is reserved, not filled."""
    pages = -(-prefix // 16) + branches * (2 + -(-steps // 16)) + 64
    cache = ab.TreeCache(num_layers, KV_HEADS, HEAD_DIM, pages, 16, DTYPE)
    trunk = cache.branch()
    cache.step({trunk: prefix})
    return Forest(cache, trunk, cache.fork(trunk, branches) if branches else [])


def _entry(name: str, title: str, seconds: list[float], more: str = "", **extra: object) -> dict[str, object]:
    return {"name": name, "title": title, **Timing(seconds).as_dict(), "more": more, **extra}


def fork_cost(rounds: int) -> dict[str, object]:
    """Fork a 4,096-token trunk of 32 layers into 64."""
    wood = forest(4096, 0, 0, num_layers=32)
    copied = wood.cache.usage().pages_copied
    free = wood.cache.usage().pages_free
    seconds = []
    for _ in range(rounds):
        kids: list[ab.Branch] = []
        seconds.append(once(lambda kids=kids: kids.extend(wood.cache.fork(wood.trunk, 64))))
        assert len(kids) == 64 and wood.cache.usage().pages_free == free, "a fork took pages"
        for kid in kids:
            wood.cache.release(kid)
    pages = wood.cache.usage().pages_copied - copied
    nbytes = pages * 2 * 32 * 16 * KV_HEADS * HEAD_DIM * DTYPE.itemsize
    title = "fork into 64 of a 4,096-token, 32-layer trunk"
    return _entry("fork64", title, seconds, f"{nbytes} bytes of KV copied", bytes_copied=nbytes)


def step_costs(branches: int, rounds: int) -> Iterator[dict[str, object]]:
    """A decode step of many branches: bookkeeping and planning, with the topology as it was and changed."""
    cut = tile_config()
    wood = forest(2048, branches, 2 * rounds + 4)
    for _ in range(2):
        wood.step(cut)
    before = wood.cache.plan_stats()
    kept = [once(lambda: wood.step(cut)) for _ in range(rounds)]
    after = wood.cache.plan_stats()
    more = f"{after[0] - before[0]} plans made anew, {after[1] - before[1]} advanced in place"
    yield _entry(f"step{branches}", f"step of {branches:,} branches, topology unchanged", kept, more)
    changed = []
    for _ in range(rounds):
        wood.churn()
        changed.append(once(lambda: wood.step(cut)))
    yield _entry(f"step{branches}_changed", f"step of {branches:,} branches, one ended and one forked", changed)


def replay_cost(branches: int, rounds: int) -> dict[str, object]:
    """What the host does in a decode step that is one graph replay (anabranch.DecodeGraph): the step's bookkeeping, its
    plan, its inputs' way to where the graph reads them. The replay itself is left out: nothing stands in its place."""
    cut = tile_config()
    wood = forest(2048, branches, 2 * rounds + 16)
    wood.cache.planner.on_host = False  # plans are kept as on a GPU

    class Model(torch.nn.Module):
        def forward(self, tree_step: ab.Step, **_: object) -> SimpleNamespace:
            tree_step.plan.arrays(Q_HEADS // KV_HEADS, cut)
            return SimpleNamespace(logits=torch.zeros(1, branches, 1))

    class Nothing:
        @staticmethod
        def watch() -> AbstractContextManager[list[str]]:
            return nullcontext([])

        def __call__(self, forward: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
            return (lambda: None), torch.zeros(branches, 1)

    decode = DecodeGraph(Model().eval(), wood.cache, after=2, capture=Nothing())
    ids = torch.zeros(branches, dtype=torch.int64)

    def step() -> None:
        decode(ids, wood.cache.step({b: 1 for b in wood.branches}))

    for _ in range(4):
        step()
    seconds = [once(step) for _ in range(rounds)]
    more = f"{decode.replays - 2} of {rounds} steps were replays"
    return _entry(f"replay{branches}", f"replayed step of {branches} branches, without the replay", seconds, more)


def table_costs(batch: int, tokens: int, rounds: int) -> Iterator[dict[str, object]]:
    """Plans over block tables without sharing: made from nothing, and of the plan before, grown."""
    cut = tile_config()
    columns = -(-(tokens + rounds) // 16)
    tables = torch.randperm(batch * columns, dtype=torch.int32).view(batch, columns)
    made: list[ab.Plan] = []

    def plan(length: int) -> None:
        made[:] = [ab.Plan.from_block_tables(tables, torch.full((batch,), length), 16)]
        made[0].arrays(Q_HEADS // KV_HEADS, cut)

    fresh = []
    for _ in range(rounds):
        made.clear()
        fresh.append(once(lambda: plan(tokens)))
    title = f"plan of {batch} block tables of {tokens:,} tokens without sharing"
    kv = made[0].arrays(Q_HEADS // KV_HEADS, cut).kv
    assert kv is not None
    nbytes = kv.numel() * 4
    yield _entry(f"tables{batch}", title, fresh, f"{nbytes / 1e6:.2f} MB of tokens", bytes_of_tokens=nbytes)
    grown = [once(lambda n=n: plan(tokens + n)) for n in range(1, rounds + 1)]
    yield _entry(f"tables{batch}_grown", f"{title}, one token more each", grown)


def memory_held(branches: int, prefix: int, suffix: int) -> dict[str, object]:
    """Tokens and pages that N branches of S tokens on a prefix of P hold; the ideal is P + N·S tokens."""
    wood = forest(prefix, branches, suffix)
    for _ in range(suffix):
        wood.cache.step({b: 1 for b in wood.branches})
    wood.cache.release(wood.trunk)
    usage = wood.cache.usage()
    ideal = prefix + branches * suffix
    pages = usage.pages_total - usage.pages_free
    spare = pages - ideal / 16
    more = (
        f"{usage.tokens_physical:,} tokens held for {usage.tokens_logical:,} (P + N·S = {ideal:,}), {pages:,} pages, "
        f"{spare / branches:.2f} a branch more than whole ones"
    )
    title = f"memory of N = {branches} branches of S = {suffix} tokens on P = {prefix:,}"
    return {
        "name": "memory",
        "title": title,
        "more": more,
        "tokens_physical": usage.tokens_physical,
        "tokens_ideal": ideal,
        "pages": pages,
    }


def run(quick: bool = False, report: Callable[[str], None] = lambda _: None) -> Iterator[dict[str, object]]:
    """All host measurements, one dict each."""
    rounds = 20 if quick else 100
    report("fork")
    yield fork_cost(rounds)
    for branches in (16, 64, 1000):
        report(f"steps of {branches}")
        yield from step_costs(branches, rounds)
    report("block tables")
    yield from table_costs(256, 4096, rounds)
    report("replayed steps of 64")
    yield replay_cost(64, min(rounds, 50))  # a plan is made anew after some 64 steps
    report("memory")
    yield memory_held(64, 1000, 100)
