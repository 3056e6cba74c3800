"""Items that hold a subtree: where the planner makes them, that they are right, and that strangers change nothing."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from deep_trees import grown_twins, random_deep_batch, tree_batch
from plan_kit import GROUPS, Batch, check, check_batch, seen_by_step
from strip_kit import tokens

from anabranch.plan.arrays import PlanArrays
from anabranch.plan.layout import ItemField
from anabranch.plan.plan import Plan
from anabranch.plan.resident import advance, tails_of
from anabranch.plan.tile_config import TileConfig

CUT = TileConfig(64, 256, 1, 8, 2, subtree=64)
CUTS = [
    CUT,
    TileConfig(64, 256, 1, subtree=16),
    TileConfig(16, 8, 2, 1, 4, subtree=16),
    TileConfig(64, 64, 9, 2, 2, subtree=40),
]


def subtrees(arrays: PlanArrays) -> list[list[list[int]]]:
    """The items that hold a subtree, each with its parts."""
    items = arrays.items.tolist()
    return [items[i : i + 1 + item[-1]] for i, item in enumerate(items) if item[-1] > 0]


def test_a_deep_tree_has_no_partial_results() -> None:
    """32 leaves under five levels of short nodes: two items of sixteen rows, and nothing to merge."""
    batch = tree_batch([2] * 5, page_size=16)
    arrays = batch.plan().arrays(4, CUT)
    check_batch(batch, arrays)
    held = subtrees(arrays)
    assert [len(item) - 1 for item in held] == [1 + 1 + 2 + 4 + 8 + 16] * 2 and arrays.num_items == 2 * 33
    assert arrays.num_partials == arrays.num_merge == arrays.num_absorbed == 0
    assert arrays.kv_tokens == 63 * 16  # stored once, the root too, which both items read
    for head, *parts in held:
        assert head[ItemField.ROW_COUNT] == 16
        assert [p[ItemField.ROW_COUNT] for p in parts] == [16, 16, *[8, *[4, *[2, 1, 1] * 2] * 2] * 2]
    without = batch.plan().arrays(4, replace(CUT, subtree=0))
    assert without.num_partials == 32 * 5 and without.num_absorbed == 16 and not subtrees(without)


def test_what_is_long_stays_an_item_of_its_own() -> None:
    """A root of 512 tokens is read in ranges by all rows; what is below it, in items that hold subtrees."""
    batch = tree_batch([2] * 5, page_size=16)
    root = batch.tables[0][0]
    long = list(range(batch.num_pages, batch.num_pages + 31))
    batch = replace(batch, tables=[[*long, *t] for t in batch.tables], lengths=[n + 31 * 16 for n in batch.lengths])
    assert all(t[31] == root for t in batch.tables)
    arrays = batch.plan().arrays(4, CUT)
    check_batch(batch, arrays)
    assert len(subtrees(arrays)) == 2 and arrays.num_partials == 32 * 2
    assert [item[1] for item in arrays.items.tolist() if item[-1] == 0] == [512, 512]


@pytest.mark.parametrize("pages,tiles", [(16, 4), (17, 0)])
def test_a_result_is_spared_for_at_most_128_products(pages: int, tiles: int) -> None:
    """A star of 64 short leaves: each row sees two runs of 4 · pages tokens, so that one result is spared."""
    arrays = tree_batch([64], pages).plan().arrays(4, CUT)
    assert len(subtrees(arrays)) == tiles and arrays.num_partials == (0 if tiles else 128)


@pytest.mark.parametrize(
    "batch,tile_config",
    [
        (tree_batch([64], pages=17), CUT),  # a result to spare for 2 · 68 tokens that a row sees
        (tree_batch([2] * 5, pages=33), CUT),  # longer than a part may be
        (tree_batch([1] * 6), CUT),  # one row
        (tree_batch([2, 2]), TileConfig(64, 256, 64, 8, 2, subtree=64)),  # more processors than rows to deal
        (tree_batch([2] * 5), replace(CUT, fixed=True)),
        (tree_batch([2] * 5), replace(CUT, subtree=0)),
        (replace(tree_batch([2] * 5), queries=[2] * 32), CUT),  # rows that hide tokens from one another
    ],
    ids=["star", "long", "chain", "processors", "fixed", "off", "several rows"],
)
def test_where_there_are_none(batch: Batch, tile_config: TileConfig) -> None:
    arrays = batch.plan().arrays(4, tile_config)
    check_batch(batch, arrays)
    assert not subtrees(arrays)


def test_a_row_beside_prefills_keeps_what_it_shares_with_them() -> None:
    """Runs that rows of a chunk see too stay items of their own; those below are fused all the same."""
    batch = tree_batch([2] * 5, page_size=16)
    queries = [1] * 31 + [7]
    batch = replace(batch, queries=queries)
    arrays = batch.plan().arrays(4, CUT)
    check_batch(batch, arrays)
    assert len(subtrees(arrays)) == 2
    assert {p[ItemField.KV_BEGIN] for _, *parts in subtrees(arrays) for p in parts}.isdisjoint(
        item[ItemField.KV_BEGIN] for item in arrays.items.tolist() if item[-1] == 0
    )


def test_random_batches() -> None:
    held = 0
    for seed in range(400):
        r = random.Random(seed)
        batch = random_deep_batch(r)
        plan = batch.plan()
        for tile_config in CUTS:
            arrays = plan.arrays(r.choice(GROUPS), tile_config)
            try:
                check_batch(batch, arrays)
            except AssertionError as error:
                raise AssertionError(f"seed {seed}, {tile_config}: {batch}") from error
            held += bool(subtrees(arrays))
    assert held > 200


def test_the_order_of_rows_in_a_step_is_free() -> None:
    """Leaves in any order: the same runs side by side in an item."""
    batch = tree_batch([2, 3, 2], page_size=16)
    order = random.Random(0).sample(range(12), 12)
    mixed = replace(batch, tables=[batch.tables[i] for i in order])
    for each in (batch, mixed):
        arrays = each.plan().arrays(4, CUT)
        check_batch(each, arrays)
        assert [len(item) for item in subtrees(arrays)] == [1 + 1 + 2 + 6 + 12]


def of_rows(arrays: PlanArrays, rows: range) -> list[tuple]:
    """How those rows' results come about: items in the order of their sizes, with slots in place of places."""
    found = []
    items, listed = arrays.items.tolist(), arrays.rows.tolist()
    for begin, length, row_begin, row_count, *_, parts in items:
        members = listed[row_begin : row_begin + row_count]
        if set(members) <= set(rows):
            slots = tokens(arrays, begin, length)[0].tolist() if length else []
            found.append((members, slots, parts))
        else:
            assert set(members).isdisjoint(rows)
    return found


@pytest.mark.parametrize("between", [False, True])
def test_strangers_change_nothing(between: bool) -> None:
    """Other trees in the plan, deep ones too, before, behind or between a tree's own rows."""
    own = tree_batch([3, 2, 3], page_size=16)
    other = tree_batch([2] * 6, page_size=16)
    chain = tree_batch([], pages=20, page_size=16)
    alone = of_rows(own.plan().arrays(4, CUT), range(18))
    assert any(parts > 0 for *_, parts in alone)
    for strangers in ([chain], [other], [chain, other, chain]):
        pages, tables = own.num_pages, []
        for batch in strangers:
            tables += [[page + pages for page in t] for t in batch.tables]
            pages += batch.num_pages
        tables = [*own.tables, *tables]
        order = list(range(len(tables)))
        if between:  # the tree's own rows stay in their order
            order = sorted(order, key=lambda i: (i * 5 if i < 18 else (i - 18) * 3 + 1, i))
        width = max(map(len, tables))
        lengths = [len(t) * 16 for t in tables]
        both = Batch(
            16,
            [tables[i] + [0] * (width - len(tables[i])) for i in order],
            [lengths[i] for i in order],
            [1] * len(order),
        )
        arrays = both.plan().arrays(4, CUT)
        check_batch(both, arrays)
        named = {at: i for at, i in enumerate(order) if i < 18}
        renamed = [named.get(row, row + 1000) for row in arrays.rows.tolist()]
        arrays = replace(arrays, rows=torch.tensor(renamed))
        assert of_rows(arrays, range(18)) == alone


@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_advanced_plans_stay_right(page_size: int) -> None:
    """A decode loop over a deep tree: the arrays are advanced in place, here and as a device would, and a fork inside
    an item that holds a subtree makes a new plan."""
    tokens = 5 if page_size < 5 else page_size + 2  # pages that are not full are copied by a fork, and shared no more
    twins, leaves = grown_twins([2, 2, 3], tokens, page_size=page_size, heads=1, dim=8, num_pages=3000)
    device: PlanArrays | None = None
    tails = None
    for turn in range(60):
        step = twins.step(dict.fromkeys(leaves, 1))[0]
        arrays = step.plan.arrays(2, CUT)
        check(arrays, seen_by_step(twins.cache, step))
        assert subtrees(arrays)
        if turn == 0:
            copies = {
                name: getattr(arrays, name).clone()
                for name in ("items", "kv_strips", "kv_spelled", "limits", "row_positions")
            }
            device = replace(arrays, **copies)
        elif turn < 40:
            assert device is not None
            if tails is None:
                tails = tails_of(arrays.items.numpy(), arrays.rows.numpy(), device.items[:, 1].numpy(), arrays.num_rows)
            import torch

            advance(device, torch.from_numpy(tails), step.slots, step.position_ids)
            check(device, seen_by_step(twins.cache, step))
            assert torch.equal(device.items, arrays.items) and torch.equal(device.limits, arrays.limits)
    built, advanced = twins.cache.plan_stats()
    assert built <= 2 and advanced >= 57
    kids = twins.fork(twins.pairs[leaves[4]], 2)
    rows = [i for i in leaves if i != leaves[4]] + [twins.pairs.index(kid) for kid in kids]
    for _ in range(3):
        step = twins.step(dict.fromkeys(rows, 1))[0]
        arrays = step.plan.arrays(2, CUT)
        check(arrays, seen_by_step(twins.cache, step))
        assert arrays.num_rows == len(rows) and subtrees(arrays)


def test_grown_tables_follow() -> None:
    """A serving loop's plans: most are made of the one before, and both stay right."""
    batch = tree_batch([2, 2, 3], page_size=16, missing=15)
    plan: Plan = batch.plan()
    check_batch(batch, plan.arrays(4, CUT))
    for _ in range(15):
        before, earlier = batch, plan
        batch = replace(batch, lengths=[n + 1 for n in batch.lengths])
        plan = batch.plan()
        arrays = plan.arrays(4, CUT)
        check_batch(batch, arrays)
        check_batch(before, earlier.arrays(4, CUT))
        assert subtrees(arrays)
