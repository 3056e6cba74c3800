"""Plans over block tables that grow from step to step: made of the plan before, right like those made from nothing."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest
import torch
from plan_kit import TILE_CONFIGS, Batch, check_attention, check_batch, random_batch
from programs import backends_here

import anabranch as ab
from anabranch.plan.arrays import append_tokens
from anabranch.plan.plan import Plan
from anabranch.plan.tile_config import TileConfig, core_params

FIXED = TileConfig(8, 16, 1, fixed=True)


def decoding(r: random.Random, page_sizes: tuple[int, ...] = (1, 3, 16, 128)) -> Batch:
    """Sequences that share prefixes, each with one row or (some) none, and tables with room to grow."""
    batch = random_batch(r, max_tokens=400, page_sizes=page_sizes)
    lengths = [max(1, n) for n in batch.lengths]
    return replace(batch, lengths=lengths, queries=[int(r.random() < 0.9) for _ in lengths])


def grown(r: random.Random, batch: Batch, most: int = 3) -> Batch:
    """A few tokens more for each sequence, in pages of its own once the last one is full."""
    fresh = itertools.count(batch.num_pages)
    tables, lengths = [], []
    for table, length in zip(batch.tables, batch.lengths, strict=True):
        used = table[: -(-length // batch.page_size)]
        length += r.randint(0, most)
        # Whoever shares the last page and grows writes to a copy of it: tables as a copy-on-write allocator makes them.
        need = -(-length // batch.page_size)
        tables.append(used + [next(fresh) for _ in range(need - len(used))])
        lengths.append(length)
    width = max(map(len, tables)) + r.randint(0, 3)
    return replace(batch, tables=[t + [0] * (width - len(t)) for t in tables], lengths=lengths)


def followed(plan: Plan, group: int, tile_config: TileConfig) -> bool:
    return plan._tables.appended(core_params(group, tile_config)) is not None  # type: ignore[attr-defined]


@pytest.mark.parametrize("seed", range(60))
def test_a_loop(seed: int) -> None:
    """Every step's plan is right, and so is the one before it, still, whatever was appended since."""
    r = random.Random(seed)
    batch = decoding(r)
    cuts = [*r.sample(TILE_CONFIGS, 2), FIXED]
    plan = batch.plan()
    for _ in range(25):
        for tile_config in cuts:
            check_batch(batch, plan.arrays(2, tile_config))
        later = grown(r, batch)
        next_plan = later.plan()
        for tile_config in cuts:
            check_batch(later, next_plan.arrays(2, tile_config))
            check_batch(batch, plan.arrays(2, tile_config))
        assert next_plan.unique_tokens == later.plan().unique_tokens  # type: ignore[attr-defined]
        batch, plan = later, next_plan


def lone(page_size: int, lengths: list[int]) -> Batch:
    tables = [[i * 64 + j for j in range(64)] for i in range(len(lengths))]
    return Batch(page_size, tables, lengths, [1] * len(lengths))


@pytest.mark.parametrize("page_size", (1, 3, 16, 128))
def test_most_steps_follow(page_size: int) -> None:
    """A decode loop makes a plan from nothing when its tails are full, not every step."""
    batch, cut = lone(page_size, [30, 17, 64]), TILE_CONFIGS[0]
    plan = batch.plan()
    plan.arrays(1, cut)
    made = 0
    for _ in range(100):
        batch = replace(batch, lengths=[n + 1 for n in batch.lengths])
        if max(batch.lengths) > 64 * page_size:
            break
        plan = batch.plan()
        check_batch(batch, plan.arrays(1, cut))
        made += not followed(plan, 1, cut)
    assert made <= 1


def test_what_does_not_follow() -> None:
    """Other tables, shorter sequences, other rows: a plan from nothing."""
    batch, cut = lone(16, [30, 40]), TILE_CONFIGS[0]
    first = batch.plan()
    first.arrays(1, cut)
    other = [*batch.tables]
    other[1] = [7, *other[1][1:]]
    for change in (
        dict(tables=other), dict(lengths=[30, 39]), dict(queries=[1, 2]), dict(queries=[0, 1]), dict(page_size=8),
        dict(lengths=[200, 40]),
    ):  # fmt: skip
        changed = replace(batch, **change)  # type: ignore[arg-type]
        plan = changed.plan()
        assert not followed(plan, 1, cut), change
        check_batch(changed, plan.arrays(1, cut))
    check_batch(batch, first.arrays(1, cut))


def test_two_that_follow_one() -> None:
    """A sequence goes on in two ways, as two users of one plan may: both plans are right, and the first one."""
    batch, cut = lone(16, [30, 47]), TILE_CONFIGS[0]
    first = batch.plan()
    first.arrays(1, cut)
    ways = []
    for page in (100, 200):
        tables = [[*t[:3], page + i, *t[4:]] for i, t in enumerate(batch.tables)]
        way = replace(batch, tables=tables, lengths=[31, 50])
        ways.append((way, way.plan()))
    for way, plan in [*ways, (batch, first)]:
        check_batch(way, plan.arrays(1, cut))
    assert [followed(plan, 1, cut) for _, plan in ways] == [True, False]


def test_a_plan_that_is_gone_is_not_followed() -> None:
    batch, cut = lone(16, [30, 40]), TILE_CONFIGS[0]
    batch.plan().arrays(1, cut)
    assert not followed(replace(batch, lengths=[31, 41]).plan(), 1, cut)


@pytest.mark.parametrize("page_size", (1, 4, 16))
def test_what_a_device_is_told(page_size: int) -> None:
    """The strips on a device become the planner's by the few entries that changed."""
    batch, cut = lone(page_size, [30, 17, 44]), TILE_CONFIGS[1]
    plan = batch.plan()
    kv = plan.arrays(1, cut).kv.clone()  # type: ignore[union-attr]
    for more in (1, 2, 5, 0, 3):
        batch = replace(batch, lengths=[n + more for n in batch.lengths])
        plan = batch.plan()
        changed = plan._tables.appended(core_params(1, cut))  # type: ignore[attr-defined]
        append_tokens(kv, torch.from_numpy(changed))
        assert len(changed) <= 3 * more and torch.equal(kv, plan.arrays(1, cut).kv)


@pytest.mark.parametrize("backend", backends_here())
def test_numbers(backend: str) -> None:
    """Attention over grown plans against float64, a row at a time."""
    light = backend == "triton"
    for seed in range(2 if light else 12):
        r = random.Random(seed)
        kept: list[Plan] = []

        class Kept(Batch):
            def plan(self) -> Plan:
                kept.append(super().plan())  # noqa: B023
                return kept[-1]  # noqa: B023

        batch = decoding(r, (1, 3, 16) if light else (1, 3, 16, 128))
        batch = Kept(batch.page_size, batch.tables, batch.lengths, [1] * len(batch.lengths))
        for _ in range(2 if light else 6):
            check_attention(batch, r, backend, torch.float32, (1, 2, 16), {"scale": 0.3, "window": r.choice((None, 9))})
            batch = grown(r, batch)
        assert len(kept) >= 2


def test_the_docs_loop() -> None:
    """What a serving loop writes: a plan a step, bound to the same name."""
    table, page_size = torch.arange(8).view(1, 8), 4
    k = torch.randn(8, page_size, 1, 32)
    q = torch.randn(1, 1, 32)
    plan = None
    for length in range(5, 30):
        plan = ab.Plan.from_block_tables(table, [length], page_size)
        out = ab.paged_tree_attention(q, k, k, plan)
        want = torch.softmax(k.view(-1, 32)[:length] @ q[0, 0] / 32**0.5, 0) @ k.view(-1, 32)[:length]
        torch.testing.assert_close(out[0, 0], want, rtol=1e-5, atol=1e-5)
