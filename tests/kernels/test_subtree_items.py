"""The kernels on items that hold a subtree, against dense float64 a row at a time."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from deep_trees import grown_twins, random_deep_batch, tree_batch
from plan_kit import BOUNDS, Batch, check_attention, random_options
from threads_kit import torch_threads

import anabranch as ab
from anabranch import _cpu
from anabranch.backends import cpu
from anabranch.plan.plan import Plan

ISAS = _cpu.info()["runnable"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def one_thread_and_the_default_isa() -> Iterator[None]:
    """One thread: with more, the planner cuts a small tree into more items, and the subtrees there are gone."""
    with torch_threads(1):
        yield
    _cpu.use("")


def fused(plan: Plan, num_q_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> bool:
    """Whether this plan has such items, where the cpu backend asks for them."""
    if dtype == torch.bfloat16 and _cpu.isa() == "amx":
        return True  # it does not
    config = cpu.tile_config(num_q_heads, num_kv_heads, head_dim, dtype, torch.device("cpu"))
    return bool((plan.arrays(num_q_heads // num_kv_heads, config).items[:, 7] > 0).any())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_deep_trees(isa: str, dtype: torch.dtype) -> None:
    """Leaves of few packed rows and of many, items of one head and of all, tokens that fill no vector."""
    _cpu.use(isa)
    r = random.Random(0)
    for group, heads, dim, fans, pages, page_size in (
        (4, 2, 64, [2] * 5, 1, 16), (1, 3, 32, [3, 3, 3], 2, 8), (8, 1, 128, [2, 2, 2, 3], 5, 4),
        (3, 2, 80, [5, 5], 3, 1), (9, 1, 24, [2] * 4, 6, 16), (2, 4, 40, [2, 6, 2], 1, 3),
    ):  # fmt: skip
        batch = tree_batch(fans, pages, page_size, missing=page_size // 2)
        assert fused(batch.plan(), heads * group, heads, dim, dtype)
        check_attention(batch, r, "cpu", dtype, (heads, group, dim), {"scale": 0.2})


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("options", [
    {"softcap": 3.0}, {"window": 1}, {"window": 20}, {"window": 50, "softcap": 20.0}, {"sinks": True, "window": 33},
], ids=str)  # fmt: skip
def test_options(isa: str, options: dict) -> None:
    _cpu.use(isa)
    r = random.Random(1)
    for dtype in DTYPES:
        batch = tree_batch([2, 2, 2, 2], 1, 16, missing=5)
        group, heads = 4, 2
        given = dict(options)
        if given.get("sinks"):
            given["sinks"] = torch.linspace(-2, 2, heads * group)
        check_attention(batch, r, "cpu", dtype, (heads, group, 64), {"scale": 0.3} | given)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_a_row_does_not_see_cannot_reach_it(isa: str, dtype: torch.dtype) -> None:
    """NaN and infinities in leaves, and in a row's query: no other row of the item notices."""
    _cpu.use(isa)
    for seed in range(8):
        r = random.Random(seed)
        batch = tree_batch(r.choice(([2] * 4, [3, 2, 2], [5, 3])), r.choice((1, 3)), 8, missing=3)
        shape = (r.choice((1, 2)), r.choice((1, 4, 9)), r.choice((32, 64)))
        check_attention(batch, r, "cpu", dtype, shape, {"scale": 0.3, "window": r.choice((None, 20))}, poison=True)


@pytest.mark.parametrize("isa", ISAS)
def test_random_trees(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any trees side by side, with chunks and long nodes among them."""
    _cpu.use(isa)
    held = 0
    for seed in range(50):
        r = random.Random(seed)
        batch = random_deep_batch(r, most_rows=24)
        monkeypatch.setattr(cpu, "SUBTREE", r.choice((64, 64, 24)))
        shape = (r.choice((1, 2, 5)), r.choice((1, 2, 3, 4, 8)), r.choice((16, 32, 64, 72)))
        dtype = DTYPES[seed % 3]
        try:
            check_attention(batch, r, "cpu", dtype, shape, poison=seed % 2 == 1)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}, {dtype}, {shape}: {batch}") from error
        held += fused(batch.plan(), shape[0] * shape[1], shape[0], shape[2], dtype)
    assert held > 20


@pytest.mark.parametrize("kv_format", ["auto", "int8", "fp8"])
@pytest.mark.parametrize("v_dim", [64, 32])
def test_a_decode_loop(kv_format: str, v_dim: int) -> None:
    """Steps of a tree cache, advanced in place, forks and ends among them; quantised pages; V narrower than K."""
    twins, leaves = grown_twins(
        [2, 2, 3], 7, page_size=8, heads=2, dim=64, v_dim=v_dim, kv_format=kv_format, num_pages=500
    )
    for turn in range(12):
        step, twin = twins.step(dict.fromkeys(leaves, 1))
        assert fused(step.plan, 8, 2, 64, torch.float32)
        q = twins.randn(step.num_rows, 8, 64)
        options = random_options(random.Random(turn), 8)
        out, lse = ab.tree_attention(q, twins.cache, 0, step, backend="cpu", return_lse=True, **options)
        expected, expected_lse = twins.naive.attention(q, 0, twin, **options)
        error = (out.double() - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
        assert bool((error <= BOUNDS[torch.float32]).all()), f"{turn}: {error.tolist()}"
        torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-4)
        if turn == 5:
            twins.fork(twins.pairs[leaves[3]], 2)
            leaves = [i for i in leaves if i != leaves[3]] + [len(twins.pairs) - 2, len(twins.pairs) - 1]
        if turn == 8:
            leaves = leaves[1:]


def test_a_trees_results_do_not_depend_on_strangers() -> None:
    """To the bit, whatever other trees are in the plan, deep ones among them."""
    own = tree_batch([2, 2, 2, 3], page_size=16, missing=3)
    num_rows = len(own.tables)
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    pages = [randn(own.num_pages, 16, 2, 64) for _ in range(2)]
    q = randn(num_rows, 8, 64)

    def run(strangers: list[Batch]) -> torch.Tensor:
        tables, lengths, extra = list(own.tables), list(own.lengths), 0
        for batch in strangers:
            tables += [[page + own.num_pages + extra for page in t] for t in batch.tables]
            lengths += batch.lengths
            extra += batch.num_pages
        width = max(map(len, tables))
        both = Batch(16, [t + [0] * (width - len(t)) for t in tables], lengths, [1] * len(tables))
        k, v = (torch.cat([x, torch.randn(extra, 16, 2, 64)]) for x in pages)
        queries = torch.cat([q, torch.randn(len(tables) - num_rows, 8, 64)])
        return ab.paged_tree_attention(queries, k, v, both.plan(), scale=0.2, backend="cpu")[:num_rows]

    alone = run([])
    assert fused(own.plan(), 8, 2, 64, torch.float32)
    chain, deep = tree_batch([], 30, 16), tree_batch([2] * 6, page_size=16)
    for strangers in ([chain], [deep], [replace(deep, lengths=[n - 9 for n in deep.lengths]), chain]):
        assert torch.equal(run(strangers), alone)
