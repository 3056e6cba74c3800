"""The Triton kernel on items that hold a subtree, which its plans have where `triton.SUBTREE` asks for them."""

from __future__ import annotations

import random

import pytest
import torch
from deep_trees import random_deep_batch, tree_batch
from plan_kit import Batch, check_attention

from anabranch.backends import triton
from anabranch.plan.tile_config import TileConfig

if reason := triton.unavailable():
    pytest.skip(f"triton: {reason}", allow_module_level=True)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans as for a GPU of one multiprocessor, so that small trees are fused."""

    def tile_config(num_q_heads: int, num_kv_heads: int, *_: object, **__: object) -> TileConfig:
        return TileConfig(64, 256, 1, num_kv_heads, subtree=64, parts=64)

    monkeypatch.setattr(triton, "tile_config", tile_config)


def fused(batch: Batch, group: int, heads: int) -> int:
    arrays = batch.plan().arrays(group, TileConfig(64, 256, 1, heads, subtree=64, parts=64))
    assert arrays.most_parts == 64
    return int((arrays.items[:, 7] > 0).sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", [{}, {"window": 9}, {"softcap": 3.0, "sinks": True}], ids=str)
def test_deep_trees(dtype: torch.dtype, options: dict) -> None:
    """Items of the narrow tile and of the wide one; more tokens than a block has."""
    given = {"scale": 0.3} | options
    for group, dim, fans, pages, page_size in ((2, 16, [2, 2, 2], 1, 8), (4, 40, [3, 5], 3, 5)):
        if given.get("sinks") is not None:
            given["sinks"] = torch.linspace(-2, 2, group)
        batch = tree_batch(fans, pages, page_size, missing=page_size // 2)
        assert fused(batch, group, 1)
        check_attention(batch, random.Random(0), "triton", dtype, (1, group, dim), given, device=DEVICE)


def test_what_a_row_does_not_see_cannot_reach_it() -> None:
    """NaN and infinities in leaves: no other row of the item notices."""
    for seed in range(3):
        batch = tree_batch([2, 3], 2, 4, missing=1)
        assert fused(batch, 4, 1)
        options = {"scale": 0.3, "window": (None, 7)[seed % 2]}
        r = random.Random(seed)
        check_attention(batch, r, "triton", torch.float32, (1, 4, 16), options, poison=True, device=DEVICE)


def test_random_trees() -> None:
    """Beside items of every other kind."""
    held = 0
    for seed in range(20):
        r = random.Random(seed)
        batch = random_deep_batch(r, most_rows=12)
        if max(batch.lengths) > 200 or held == 6:
            continue
        group = r.choice((1, 2, 5))
        count = fused(batch, group, 1)
        if count == 0:
            continue
        held += 1
        check_attention(batch, r, "triton", torch.float32, (1, group, 16), device=DEVICE)
    assert held >= 4


def test_trees_of_more_parts_than_a_program_takes() -> None:
    """16 leaves under nodes of one token, 31 parts: with a limit below that the tree is not fused."""
    plan = tree_batch([2] * 4, page_size=1).plan()
    for parts, items in ((31, 1), (30, 0), (0, 1)):
        arrays = plan.arrays(4, TileConfig(64, 256, 1, 8, subtree=64, parts=parts))
        assert int((arrays.items[:, 7] > 0).sum()) == items
