"""The fleet's simulation: by hand where that can be done, and beside real engines of a tiny model."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from engine_kit import make_engine

pytest.importorskip("simpy", reason="the extra `bench` is not installed")

from benchmarks import fleet_real
from benchmarks.fleet import Cost, Load, Replica, capacity, forking, held, pays_until, routing, simulate

# A step takes a second, and a hundredth for each row beyond the first.
COST = Cost((1, 101), (1.0, 2.0), 0.0, 0.0, 0.0)
SIZE = Replica(pages=1000, page_size=16, max_rows=64)
ONE = Load(rate=1.0, count=1, groups=1, shared=32, own=1, branches=4, new=10)


def test_one_request_by_hand() -> None:
    """33 tokens of the prompt in one step, which gives each branch its first token; then nine steps of four rows."""
    found = simulate(COST, SIZE, ONE)
    assert found["first"] == pytest.approx(1.32) and found["seconds"] == pytest.approx(1.32 + 9 * 1.03)
    assert found["peak_rows"] == 33 and found["tokens_per_s"] == pytest.approx(40 / found["seconds"])
    with_tail = simulate(COST, SIZE, replace(ONE, tail=5))
    assert with_tail["seconds"] == pytest.approx(1.32 + 9 * 1.03 + 5 * 1.0)


def test_beginnings_and_forks_by_hand() -> None:
    """A beginning costs what it costs, once a request, whoever else is in the step; a fork stops everybody a moment."""
    cost = replace(COST, begin=0.25, fork=0.1, per_fork=0.01, per_pair=0.001)
    alone = simulate(cost, SIZE, ONE)
    forked = 1.32 + 0.14  # the prompt with its beginning, then the step in which four branches get their first tokens
    rest = [1.03 - 0.25 + 0.004 * (33 + i) for i in range(1, 10)]
    assert alone["first"] == pytest.approx(forked) and alone["seconds"] == pytest.approx(forked + sum(rest))
    both = simulate(cost, SIZE, replace(ONE, count=2, rate=1e9))
    # The second waits for what both begin with, and comes in a step with the first one's branches.
    mixed = 1.04 + 0.004 * 34 + 0.001 * 32
    assert both["first"] == pytest.approx((forked + forked + mixed + 0.14) / 2)


def test_a_long_prompt_comes_in_chunks() -> None:
    found = simulate(COST, SIZE, replace(ONE, shared=127, branches=1, new=1))
    assert found["seconds"] == pytest.approx(2 * 1.63)


def test_a_beginning_is_computed_once_where_it_stays() -> None:
    load = replace(ONE, count=40, groups=8, rate=0.2)
    by_prefix, in_turns = (simulate(COST, SIZE, load, 4, route) for route in ("prefix", "turns"))
    assert by_prefix["found"] > in_turns["found"] > 0
    room = Replica(pages=8, max_rows=64)  # for one request: nothing is kept beside it
    assert simulate(COST, room, load, 1)["found"] < 0.3


def test_nobody_is_lost_and_all_is_deterministic() -> None:
    rng = random.Random(5)
    for _ in range(30):
        load = Load(
            rate=rng.choice([0.01, 1.0, 1e6]), count=rng.randint(1, 30), groups=rng.randint(1, 5),
            own=rng.randint(1, 40), shared=rng.randint(1, 100), branches=rng.randint(1, 8), new=rng.randint(1, 12),
            tail=rng.choice([0, 3]), seed=rng.randrange(99),
        )  # fmt: skip
        size = Replica(rng.randint(1, 40), rng.choice([4, 16]), rng.randint(8, 64))
        replicas = rng.randint(1, 3)
        for route in ("prefix", "turns", "least"):
            found = simulate(COST, size, load, replicas, route)
            assert found["mean"] > 0 and found["p99"] >= found["p50"] and 0 < found["busy"] <= 1
            assert found == simulate(COST, size, load, replicas, route)


def test_forks_pay_until_rows_are_dear() -> None:
    dear = Cost((1, 101), (1.0, 101.0), 0.0, 0.0, 0.0)  # rows cost what they cost alone: nothing is won side by side
    rates = [0.001, 0.02, 0.05]
    cheap = forking(COST, SIZE, replace(ONE, count=50), 1, rates, 0.5)
    assert pays_until(cheap) == float("inf")
    assert pays_until(forking(dear, SIZE, replace(ONE, count=50, own=1, shared=1), 1, rates, 0.5)) < rates[-1]
    assert len(routing(COST, SIZE, replace(ONE, count=9), 2, rates)) == 9
    many = replace(ONE, count=20, groups=4)
    assert capacity(COST, SIZE, many, 2) > capacity(COST, SIZE, many, 1)
    kinds = {(e["kind"], e["branches"]) for e in held(COST, Replica(40), replace(ONE, new=32), [1, 8, 16])}
    assert kinds == {("shared", 1), ("shared", 8), ("alone", 1), ("alone", 8)}


def test_beside_real_engines() -> None:
    """Tokens, requests and found prefixes are the same; times are the business of `python -m benchmarks fleet`."""
    engines = [make_engine(num_pages=400, page_size=16, compile=False) for _ in range(2)]
    cost = fleet_real.fit(engines[0], rows=(1, 8, 64), branches=(1, 4), contexts=(16, 64), repeat=2)
    assert all(s > 0 for s in cost.seconds) and min(cost.per_branch, cost.per_token, cost.per_pair) >= 0
    for engine in engines:
        engine.clear_prefix_cache()
    found = fleet_real.check(engines, cost, Load(rate=1e6, count=6, groups=2, shared=64, own=8, branches=3, new=5))
    assert set(found["ratios"]) >= {"seconds", "mean"} and all(r > 0 for r in found["ratios"].values())
    assert found["measured"]["seconds"] >= found["measured"]["mean"] > 0
    with pytest.raises(ValueError, match="clocks of their own"):
        fleet_real.measure(engines, Load(1.0, 2), "least")
