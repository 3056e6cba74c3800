"""Tables of position embeddings are found by what a forward reads in them (hf/positions.py)."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import embedding

from anabranch.hf.positions import PositionTables

NEAR, FAR = 3, 40


@pytest.mark.parametrize("offset", [0, 2])
@pytest.mark.parametrize("read", [embedding, lambda at, table: table.index_select(0, at), lambda at, table: table[at]])
def test_a_table_holds_as_many_positions_as_rows_behind_its_offset(read, offset):
    """OPT's tables begin with two rows that stand for no position."""
    table, positions = torch.zeros(64, 8), torch.tensor([FAR, NEAR, FAR])
    with PositionTables(NEAR, FAR) as tables:
        read(positions + offset, table)
    assert tables.limit == 64 - offset


def test_the_shortest_of_several_tables_counts():
    for sizes in ((64, 50), (50, 64)):
        with PositionTables(NEAR, FAR) as tables:
            for size in sizes:
                embedding(torch.tensor([NEAR, FAR]), torch.zeros(size, 8))
        assert tables.limit == 50


def test_what_is_no_table_of_positions():
    with PositionTables(NEAR, FAR) as tables:
        embedding(torch.tensor([5, 9, 7]), torch.zeros(64, 8))  # tokens
        embedding(torch.tensor([NEAR, FAR - 1]), torch.zeros(64, 8))  # as far apart as no two positions are
        torch.zeros(20, 8)[torch.tensor([1, 2])]  # too short to hold both
    assert tables.limit is None
