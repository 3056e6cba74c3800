"""The planner's arrays, unfolded: every row meets every token it must see exactly once, whatever the cut."""

from __future__ import annotations

import pytest
import torch
from plan_kit import TILE_CONFIGS, seen_by_step
from plan_kit import check as check_arrays
from programs import Twins

import anabranch as ab
from anabranch.plan.arrays import PlanArrays
from anabranch.plan.tile_config import TileConfig


def check(twins: Twins, step: ab.Step, arrays: PlanArrays) -> None:
    check_arrays(arrays, seen_by_step(twins.cache, step))


def sets_of_readers(cache: ab.TreeCache, step: ab.Step) -> int:
    """How many different sets of a step's branches there are that see some token: tokens of one set are one run."""
    readers: dict[int, list[int]] = {}
    for i, branch in enumerate(step.branches):
        for slot in cache._core.slots(branch).tolist():
            readers.setdefault(slot, []).append(i)
    return len(set(map(tuple, readers.values())))


@pytest.mark.parametrize("seed", range(30))
def test_random_programs(seed: int) -> None:
    twins = Twins(seed=seed, page_size=(1, 3, 4, 16, 128)[seed % 5], heads=1, dim=8, num_pages=3000)
    for _ in range(60):
        twins.random_change(max_rows=30)
    for group in (1, 3, 8):
        for tile_config in TILE_CONFIGS:
            step = twins.random_step(max_rows=20)[0]
            arrays = step.plan.arrays(group, tile_config)
            check(twins, step, arrays)
            assert arrays.num_runs == sets_of_readers(twins.cache, step)
            costs: list[int] = []
            for _, length, _, count, *_, parts in arrays.items.tolist():
                cost = length * (8 + count * group)
                if parts < 0:  # of the item before
                    costs[-1] += cost
                else:
                    costs.append(cost)
            for part in (costs[: arrays.num_wide], costs[arrays.num_wide :]):
                assert part == sorted(part, reverse=True)


@pytest.mark.parametrize("page_size", [1, 4])  # pages of one token: the free places end where another range begins
@pytest.mark.parametrize("tile_config", TILE_CONFIGS)
def test_advanced_plans_stay_right(tile_config: TileConfig, page_size: int) -> None:
    """The same arrays, advanced in place over many steps, past page ends and the plan's slack."""
    twins = Twins(page_size=page_size, heads=1, dim=8, num_pages=3000)
    trunk = twins.branch()
    twins.step({0: 37})
    twins.fork(trunk, 3)
    for _ in range(90):
        step = twins.step({1: 1, 2: 1, 3: 1})[0]
        check(twins, step, step.plan.arrays(2, tile_config))
    built, advanced = twins.cache.plan_stats()
    assert built <= 3 and advanced >= 87


@pytest.mark.parametrize("page_size", [1, 4])
def test_a_page_that_came_without_the_plan_is_noticed(page_size: int) -> None:
    """A branch takes a whole page alone: its next token begins a page, as it would have without."""
    twins = Twins(page_size=page_size, heads=1, dim=8)
    for i in range(2):
        twins.branch()
        twins.step({i: 7})
    for _ in range(3):
        step = twins.step({0: 1, 1: 1})[0]
        check(twins, step, step.plan.arrays(1, TILE_CONFIGS[0]))
        twins.step({0: page_size})


@pytest.mark.parametrize("page_size", [1, 4])
def test_a_page_that_was_written_anew_is_noticed(page_size: int) -> None:
    """A branch's last page is cut, taken by another and written again elsewhere: its length is what it was."""
    twins = Twins(page_size=page_size, heads=1, dim=8)
    for _ in range(3):
        twins.branch()
    twins.step({0: 7, 1: 7, 2: 8})
    step = twins.step({0: 1, 1: 1})[0]
    check(twins, step, step.plan.arrays(1, TILE_CONFIGS[0]))
    twins.truncate(twins.pairs[0], 8 - page_size)
    twins.step({2: page_size})
    twins.step({0: page_size})
    step = twins.step({0: 1, 1: 1})[0]
    check(twins, step, step.plan.arrays(1, TILE_CONFIGS[0]))


def test_positions_that_fall_are_noticed() -> None:
    """Positions given by hand may fall; row_pos_min must follow, or a window would skip too much."""
    twins = Twins(page_size=4, heads=1, dim=8)
    trunk = twins.branch()
    twins.step({0: 9})
    twins.fork(trunk, 2)
    twins.step({1: 1, 2: 1})
    twins.step({1: 1, 2: 1}, {1: [50], 2: [60]})
    for positions in ([70, 70], [3, 71], [4, 2]):
        step = twins.step({1: 1, 2: 1}, {1: positions[:1], 2: positions[1:]})[0]
        check(twins, step, step.plan.arrays(1, TILE_CONFIGS[0]))


def test_the_same_steps_interleaved() -> None:
    """Two sets of branches in turn: neither may be handed the other's plan."""
    twins = Twins(page_size=4, heads=1, dim=8)
    for i in range(4):
        twins.branch()
        twins.step({i: 5 + i})
    for _ in range(5):
        first, second = twins.step({0: 1, 1: 1})[0], twins.step({2: 1, 3: 1})[0]
        for step in (second, first):
            check(twins, step, step.plan.arrays(1, TILE_CONFIGS[0]))


def test_more_ways_to_cut_than_plans_are_kept() -> None:
    """Six profiles in turn, so that kept plans are dropped and made anew: none may be taken for an older one."""
    twins = Twins(page_size=4, heads=1, dim=8)
    for i in range(3):
        twins.branch()
        twins.step({i: 9 + i})
    profiles = [TileConfig(64, chunk, 8) for chunk in (1, 2, 4, 8, 16, 32)]
    for turn in range(6):
        for i, tile_config in enumerate(profiles):
            step = twins.step({(turn + i) % 3: 1, (turn + i + 1) % 3: 1})[0]
            check(twins, step, step.plan.arrays(1, tile_config))


def test_sharing_is_read_once() -> None:
    """16 branches on one prefix: the prefix is one run, whose items hold all 16 rows."""
    twins = Twins(page_size=16, heads=1, dim=8, num_pages=3000)
    trunk = twins.branch()
    twins.step({0: 1024})
    twins.fork(trunk, 16)
    step = twins.step({i: 1 for i in range(1, 17)})[0]
    arrays = step.plan.arrays(4, TileConfig(64, 256, 1, 8, 2))
    assert arrays.kv_tokens == 1024 + 16 and arrays.num_runs == 17
    shared = [item for item in arrays.items.tolist() if item[3] == 16]
    assert [(i[1], i[3]) for i in shared] == [(1024, 16)]
    split = step.plan.arrays(4, TileConfig(64, 256, 32, 8, 2))  # more workers: the same run in four fixed chunks
    assert [i[1] for i in split.items.tolist() if i[3] == 16] == [256] * 4


@pytest.mark.parametrize("leaves,group,length", [(2, 1, 4), (3, 2, 6), (5, 4, 10)])
def test_a_run_is_read_again_where_that_costs_no_more_than_its_partials(leaves: int, group: int, length: int) -> None:
    """2 bytes an element: 4 · length · (leaves − 1) read once more against 8 · rows · group written and read."""
    for extra, absorbed in ((0, 1), (1, 0)):
        twins = Twins(page_size=1, heads=1, dim=8)
        trunk = twins.branch()
        twins.step({0: length + extra})
        twins.fork(trunk, leaves)
        step = twins.step({i: 1 for i in range(1, leaves + 1)})[0]
        arrays = step.plan.arrays(group, TileConfig(64, 256, 1, 1, 2))
        assert arrays.num_absorbed == absorbed
        assert arrays.kv_tokens == (length + extra) * (leaves if absorbed else 1) + leaves


def test_private_history_is_one_run() -> None:
    """What only one branch sees is merged, however often it was forked and joined."""
    twins = Twins(page_size=4, heads=1, dim=8)
    trunk = twins.branch()
    twins.step({0: 6})
    for _ in range(3):
        kids = twins.fork(trunk, 2)
        twins.step({1: 3, 2: 2})
        twins.join(trunk, kids)
    step = twins.step({0: 1})[0]
    arrays = step.plan.arrays(1, TileConfig(64, 256, 1, 1, 2))
    assert arrays.num_items == 1 and arrays.num_partials == 0 and arrays.kv_tokens == 6 + 3 * 5 + 1


def test_handles_die_with_their_plan() -> None:
    plan = ab.Plan.from_block_tables(torch.tensor([[0]]), [1], 4)
    handle = plan.handle
    k = torch.ones(1, 4, 1, 32)
    call = torch.ops.anabranch.tree_attention
    call(torch.ones(1, 1, 32), k, k, handle, None, 1.0, 0.0, 0, 0, "reference", False)
    del plan
    with pytest.raises(ValueError, match="no longer exists"):
        call(torch.ones(1, 1, 32), k, k, handle, None, 1.0, 0.0, 0, 0, "reference", False)
