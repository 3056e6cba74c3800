"""What a block waits for between two units of its own."""

from __future__ import annotations

import kit
import numpy as np
import pytest
import torch
from strip_kit import lay_out, tokens
from triton_cases import check, random_case

WITHOUT = ("results_visible", "places_visible", "queries_landed", "queries_visible", "tile_landed", "ring_done")


def side_by_side(case):
    """The case with every strip's tokens side by side, as a cache lays them out."""
    a = case.arrays
    a.kv_strips, a.kv_spelled, begins = lay_out([tokens(a, *item[:2]) for item in a.items.tolist()], a.strip)
    a.items[:, 0] = torch.tensor(begins, dtype=torch.int32)
    return case


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("head_dim", [32, 256])
def test_nothing_is_looked_up_between_two_units(device, head_dim, dtype):
    """Item, rows, limits, destinations and the first strips were looked up while the unit before was computed."""
    case = side_by_side(random_case(9, rows=11, segments=6, max_len=300, head_dim=head_dim, dtype=dtype))
    for grid in (1, 3):
        device.configure(**kit.settings(grid))
        device.reset_statistics()
        got = kit.attention(device, case, grid=grid)
        check(case, got, **kit.NO_OPTIONS)
        loads = device.statistics()["loads"]
        assert {site: loads[device.SITES[site]] for site in WITHOUT} == dict.fromkeys(WITHOUT, 0)
        assert loads[device.SITES["tile_visible"]] <= 1  # a strip, two blocks before it is needed


def test_items_of_more_rows_than_were_looked_up(device):
    """Plans are cut for the kernel's tile; with more rows an item takes several passes, and some are looked up late."""
    case = random_case(10, rows=150, segments=3, max_len=130, tile_rows=120, head_dim=32, dtype=torch.float16)
    assert int(case.arrays.items[:, 3].max()) > 64
    for window in (None, 40):
        device.configure(**kit.settings(4))
        check(case, kit.attention(device, case, grid=2, window=window), **kit.NO_OPTIONS | dict(window=window))


@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_strips_of_every_size(device, page_size):
    """With small strips those of the first blocks are more than are looked up ahead."""
    case = random_case(12, rows=6, segments=3, max_len=500, page_size=page_size, head_dim=32, dtype=torch.bfloat16)
    assert case.arrays.strip == page_size
    for ring in (2, 5, 8):
        device.configure(**kit.settings(ring))
        check(case, kit.attention(device, case, grid=2, ring=ring), **kit.NO_OPTIONS)


def test_counts_that_end_in_every_round(device):
    """Captured graphs: the grid is for more items than there are, and the last round is full for some blocks alone."""
    case = random_case(13, rows=9, segments=5, head_dim=32)
    heads, items = 2, case.arrays.num_items
    want, _ = kit.attention(device, case, grid=1)
    for grid in (1, 2, 3, 5, items * heads - 1, items * heads, items * heads + 3):
        device.configure(**kit.settings(grid))
        assert torch.equal(kit.attention(device, case, grid=grid)[0], want), grid
    short = np.array([0, case.arrays.num_partials, 0], np.int32)
    case.arrays.counts = torch.from_numpy(short)
    assert torch.isnan(kit.attention(device, case, grid=4)[0]).all()


@pytest.mark.parametrize("ring", [3, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_next_units_first_tokens_are_on_their_way_to_the_cache(device, dtype, ring):
    """As many as the ring takes, of every unit but a block's first, and nothing that is not the unit's."""
    case = side_by_side(random_case(15, rows=9, segments=5, max_len=400, head_dim=64, dtype=dtype))
    block, heads = (32 if dtype == torch.float32 else 64), 2
    lengths = np.minimum(case.arrays.items[:, 1].numpy(), (ring + 1) // 2 * block).repeat(heads)
    for grid in (1, 4):
        device.configure(**kit.settings(ring))
        device.reset_statistics()
        check(case, kit.attention(device, case, grid=grid, ring=ring), **kit.NO_OPTIONS)
        assert device.statistics()["cached"] == int(lengths[grid:].sum()) * 2 * 64 * dtype.itemsize


def test_tokens_outside_of_every_window_are_not_fetched_to_the_cache(device):
    """Their pages may be gone."""
    case = side_by_side(random_case(16, rows=9, segments=5, max_len=400, head_dim=32, dtype=torch.bfloat16))
    a = case.arrays
    kit.attention(device, case, grid=1)
    every = device.statistics()["cached"]
    ranges = []
    for begin, length, *_, row_pos_min, _ in a.items.tolist():
        slots, positions = tokens(a, begin, length)
        ranges.append((np.where(row_pos_min - positions >= 30, 16 * 10**6 + slots, slots).astype(np.int32), positions))
    a.kv_strips, a.kv_spelled, begins = lay_out(ranges, a.strip)
    a.items[:, 0] = torch.tensor(begins, dtype=torch.int32)
    device.reset_statistics()
    check(case, kit.attention(device, case, grid=1, window=30), **kit.NO_OPTIONS | dict(window=30))
    assert device.statistics()["cached"] < every
