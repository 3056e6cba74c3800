"""Plans of mixed batches: prefill, chunks and decode in one, over pages shared at any depth, and steps of several rows.

Why tests of plans did not have such a batch before: the structure of plans was checked on steps of a ``TreeCache``
only, where a step's new tokens belong to one branch each: what is hidden from a row is never shared, never absorbed.
Block tables can share new tokens (cold siblings prefill the same pages in one step), and their tests were four batches
that compared outputs, with sharing made before the last page and queries too short to reach back to it. Here, plans of
both kinds are drawn with everything that either can say, and compared with what is written in tables, lengths and
queries (or in the branches), not with the planner's own view of it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from plan_kit import (
    BOUNDS,
    GROUPS,
    KNOWN,
    TILE_CONFIGS,
    Batch,
    check,
    check_attention,
    check_batch,
    random_batch,
    random_options,
    seen_by_step,
)
from programs import Twins, backends_here

import anabranch as ab
from anabranch.backends import cpu

BACKENDS = backends_here()
if "cpu" in BACKENDS:
    from anabranch import _cpu
ISAS = _cpu.info()["runnable"] if "cpu" in BACKENDS else []
# Where a batch runs: a backend, with each instruction set of the CPU's.
PLACES = [(name, isa) for name in BACKENDS for isa in (ISAS if name == "cpu" else [""])]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def default_isa() -> Iterator[None]:
    yield
    if "cpu" in BACKENDS:
        _cpu.use("")


@pytest.fixture(params=PLACES, ids=lambda place: "-".join(filter(None, place)))
def backend(request: pytest.FixtureRequest) -> str:
    name, isa = request.param
    if isa:
        _cpu.use(isa)
    return name


# -- the arrays --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", KNOWN.values(), ids=KNOWN)
def test_arrays_of_known_batches(batch: Batch) -> None:
    plan = batch.plan()
    for tile_config in TILE_CONFIGS:
        for group in GROUPS:
            check_batch(batch, plan.arrays(group, tile_config))


def arrays_of_batches(seeds: range) -> None:
    for seed in seeds:
        r = random.Random(seed)
        batch = random_batch(r)
        plan = batch.plan()
        assert plan.num_rows == sum(batch.queries)
        for tile_config in r.sample(TILE_CONFIGS, 2):
            try:
                check_batch(batch, plan.arrays(r.choice(GROUPS), tile_config))
            except AssertionError as error:
                raise AssertionError(f"seed {seed}, {tile_config}: {batch}") from error


def test_arrays_of_random_batches() -> None:
    arrays_of_batches(range(1500))


@pytest.mark.slow
def test_arrays_of_a_hundred_thousand_batches() -> None:
    arrays_of_batches(range(10**6, 10**6 + 10**5))


def random_tree_step(r: random.Random, max_rows: int, **shape: int) -> tuple[Twins, tuple]:
    """A step of several rows, and changes since that leave it valid but split and share its spans anew."""
    twins = Twins(seed=r.randrange(2**32), page_size=r.choice((1, 2, 3, 4, 8, 16, 48, 128)), num_pages=2000, **shape)
    for _ in range(r.randint(5, 40)):
        twins.random_change(max_rows=max_rows)
    step = twins.random_step(max_rows)
    stepped = [pair for pair in twins.pairs if pair[0] in step[0].branches]
    for _ in range(r.choice((0, 0, 3))):
        child = twins.fork(r.choice(stepped), 1)[0]
        if r.random() < 0.7:
            twins.truncate(child, r.randint(0, child[1].length))
        if r.random() < 0.5:
            twins.step({twins.pairs.index(child): r.randint(1, 4)})
    return twins, step


def same_order(contexts: list[list[int]]) -> None:
    """Any two contexts list the slots they share in the same order: ``Contexts`` in plan.hpp promises that."""
    for i, a in enumerate(contexts):
        assert len(set(a)) == len(a)
        for b in contexts[:i]:
            common = set(a) & set(b)
            assert [slot for slot in a if slot in common] == [slot for slot in b if slot in common]


def arrays_of_steps(seeds: range) -> None:
    for seed in seeds:
        r = random.Random(seed)
        twins, (step, _) = random_tree_step(r, max_rows=20, heads=1, dim=1)
        same_order([twins.cache._core.slots(branch).tolist() for branch, _ in twins.pairs])
        seen = seen_by_step(twins.cache, step)
        for tile_config in r.sample(TILE_CONFIGS, 3):
            try:
                check(step.plan.arrays(r.choice(GROUPS), tile_config), seen)
            except AssertionError as error:
                raise AssertionError(f"seed {seed}, {tile_config}") from error


def test_arrays_of_random_steps() -> None:
    arrays_of_steps(range(150))


@pytest.mark.slow
def test_arrays_of_twenty_thousand_steps() -> None:
    arrays_of_steps(range(10**6, 10**6 + 20_000))


# -- the numbers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", KNOWN.values(), ids=KNOWN)
def test_known_batches(backend: str, batch: Batch) -> None:
    for window in (5,) if backend == "triton" else (None, 5):  # the interpreter is slow
        check_attention(batch, random.Random(0), backend, torch.float32, (1, 8, 16), {"scale": 0.3, "window": window})


def run_batches(backend: str, seeds: range, monkeypatch: pytest.MonkeyPatch) -> None:
    light = backend == "triton"
    for seed in seeds:
        r = random.Random(seed)
        batch = random_batch(r, max_tokens=24 if light else 160)
        shape = (r.choice((1, 1, 2)), r.choice(GROUPS), r.choice((16, 24, 32, 64, 80)))
        if backend == "cpu":  # runs cut as those of contexts a hundred times as long are
            monkeypatch.setattr(cpu, "CHUNK", r.choice((256, 16, 40)))
            monkeypatch.setattr(cpu, "TILE", r.choice((64, 8)))
        dtype = torch.float32 if backend == "reference" else DTYPES[seed % 3]
        try:
            check_attention(batch, r, backend, dtype, shape, poison=backend in ("cpu", "reference") and seed % 2 == 1)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}, {dtype}, KV heads, group and head_dim {shape}: {batch}") from error


def test_random_batches(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run_batches(backend, range(6 if backend == "triton" else 60), monkeypatch)


@pytest.mark.slow
def test_thousands_of_batches(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run_batches(backend, range(10**6, 10**6 + (100 if backend == "triton" else 3000)), monkeypatch)


def run_steps(backend: str, seeds: range) -> None:
    """Steps of several rows against the naive twin."""
    light = backend == "triton"
    for seed in seeds:
        r = random.Random(seed)
        heads, group, dim = r.choice((1, 2)), r.choice(GROUPS), r.choice((16, 32, 40))
        twins, (step, twin) = random_tree_step(r, 3 if light else 12, heads=heads, dim=dim)
        q = twins.randn(step.num_rows, heads * group, dim)
        options = random_options(r, heads * group)
        out, lse = ab.tree_attention(q, twins.cache, 0, step, backend=backend, return_lse=True, **options)  # type: ignore[arg-type]
        expected, expected_lse = twins.naive.attention(q, 0, twin, **options)  # type: ignore[arg-type]
        error = (out.double() - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
        assert bool((error <= BOUNDS[torch.float32]).all()), f"seed {seed}: {error.tolist()}"
        torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-4)


def test_random_steps(backend: str) -> None:
    run_steps(backend, range(3 if backend == "triton" else 12))


@pytest.mark.slow
def test_thousands_of_steps(backend: str) -> None:
    run_steps(backend, range(10**6, 10**6 + (60 if backend == "triton" else 1000)))
