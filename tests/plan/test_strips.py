"""How plans name tokens: a page's tokens that lie side by side take one entry, wherever a run begins or goes on."""

from __future__ import annotations

import random

import pytest
import torch
from plan_kit import TILE_CONFIGS, check, seen_by_step
from programs import Twins
from strip_kit import tokens

import anabranch as ab
from anabranch.plan.arrays import PlanArrays
from anabranch.plan.tile_config import TileConfig

CUT = TileConfig(64, 256, 264, 8, 2, 16)
PAGE_SIZES = (1, 3, 4, 12, 16, 48, 128)


def strip_of(page_size: int) -> int:
    return min(16, page_size & -page_size)


def spelled_strips(arrays: PlanArrays) -> int:
    """Strips of the plan whose tokens are spelled out."""
    return sum(
        bool(arrays.kv_strips[place // arrays.strip, 0] < 0)
        for begin, length, *_ in arrays.items.tolist()
        for place in range(begin // arrays.strip * arrays.strip, begin + length, arrays.strip)
    )


def test_a_page_takes_one_entry() -> None:
    """256 sequences of 4,096 tokens that share nothing: a sixteenth of a slot and a position for each token."""
    tables = torch.randperm(256 * 256).int().view(256, 256)
    arrays = ab.Plan.from_block_tables(tables, [4096] * 256, 16).arrays(4, CUT)
    assert arrays.kv is not None and arrays.kv.numel() <= 1.05 * 2 * 256 * 4096 / 16 + 2 * 2 * arrays.num_items
    begin, length = arrays.items[7, :2].tolist()
    slots, positions = tokens(arrays, begin, length)
    row = int(positions[0]) // 16
    sequence = int(arrays.rows[arrays.items[7, 2]])
    assert slots.tolist() == [
        int(page) * 16 + i for page in tables[sequence, row : row + length // 16] for i in range(16)
    ]


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_sequences_take_no_more_than_their_pages(page_size: int) -> None:
    strip = strip_of(page_size)
    r = random.Random(page_size)
    lengths = [r.randint(1, 5 * page_size) for _ in range(9)]
    tables = torch.randperm(9 * 5).int().view(9, 5)
    arrays = ab.Plan.from_block_tables(tables, lengths, page_size).arrays(1, TileConfig(64, 10**6, 1))
    assert arrays.strip == strip and spelled_strips(arrays) == 0 and arrays.num_items == 9


@pytest.mark.parametrize("page_size", (16, 48, 128))
def test_runs_that_begin_in_the_middle_of_a_page(page_size: int) -> None:
    """Children of a fork go on in a copy of the trunk's last page, at its place in the page; so do their strips."""
    twins = Twins(page_size=page_size, heads=1, dim=8, num_pages=300)
    trunk = twins.branch()
    twins.step({0: page_size + 6})
    kids = twins.fork(trunk, 3)
    for _ in range(page_size + 20):
        step = twins.step({1: 1, 2: 1, 3: 1})[0]
    arrays = step.plan.arrays(1, TileConfig(64, 10**6, 1))
    check(arrays, seen_by_step(twins.cache, step))
    assert spelled_strips(arrays) == 0
    # A join puts pieces behind one another that do not fit so: what is spelled out is where they meet.
    twins.join(trunk, kids)
    for _ in range(40):
        step = twins.step({0: 1})[0]
        check(step.plan.arrays(1, CUT), seen_by_step(twins.cache, step))
    arrays = step.plan.arrays(1, TileConfig(64, 16, 1000, 1))
    own = sum(length for _, length, *_ in arrays.items.tolist())
    assert 0 < spelled_strips(arrays) * arrays.strip < own / 2


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("seed", range(3))
def test_positions_that_jump(page_size: int, seed: int) -> None:
    """Tokens side by side whose positions are not: told one by one, whether the plan is made or advanced."""
    r = random.Random(seed)
    twins = Twins(page_size=page_size, heads=1, dim=8, num_pages=300)
    trunk = twins.branch()
    twins.step({0: 21}, {0: [5 * i + r.randint(0, 4) for i in range(21)]})
    twins.fork(trunk, 2)
    for n in range(40):
        jump = {i: [150 + 4 * n] for i in (1, 2)} if r.random() < 0.3 else None
        step = twins.step({1: 1, 2: 1}, jump)[0] if jump else twins.step({1: 1, 2: 1})[0]
        for tile_config in TILE_CONFIGS[:2]:
            check(step.plan.arrays(1, tile_config), seen_by_step(twins.cache, step))
