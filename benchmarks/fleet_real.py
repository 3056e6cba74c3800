"""What the fleet's simulation rests on: the costs of an engine's steps, and a run of real engines beside it."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

import anabranch as ab

from .fleet import Cost, Load, Replica, Request, capacity, forking, held, pays_until, place, routing, simulate, told
from .timing import now

JOINING = 16  # tokens of a prompt that comes while branches decode


def fit(
    engine: ab.Engine,
    rows: Sequence[int] = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 256, 512),
    branches: Sequence[int] = (1, 4, 16, 64),
    contexts: Sequence[int] = (16, 256, 1024),
    repeat: int = 5,
) -> Cost:
    """Time an engine's steps, and fit `Cost` to them: prompts of so many rows first, then so many branches on contexts
    of so many tokens, alone and with a short prompt beside them."""
    rng = random.Random(0)
    curve: list[tuple[int, float]] = []
    for count in (r for r in rows if r <= engine.max_rows):
        taken = []
        for _ in range(repeat):
            handle = engine.add(_ids(rng, count), max_new_tokens=1)
            taken.append(_step(engine))
            handle.result()
        curve.append((count, statistics.median(taken)))
    # rows, requests that begin, branches, tokens, pairs, seconds
    measured: list[tuple[int, int, int, float, float, float]] = []
    forks: list[tuple[int, float]] = []
    for context in contexts:
        for count in (b for b in branches if b <= engine.max_rows):
            handle = engine.add(_ids(rng, context), _branching(count), **_exactly(repeat + 4))
            last = 0.0
            while len(handle.so_far) < 2 and not handle.done:
                last = _step(engine)
            if count > 1:  # the last one gave the branches their first tokens, from the prompt's scores
                forks.append((count, last))
            taken = [_step(engine) for _ in range(repeat)]
            own = 1 + repeat / 2
            tokens, pairs = context + count * own, count * (context + own)
            measured.append((count, 0, count, tokens, pairs, statistics.median(taken)))
            if count + JOINING <= engine.max_rows:  # another request's prompt comes in a step with these branches
                joining = engine.add(_ids(rng, JOINING), max_new_tokens=1)
                mixed = _step(engine)
                joining.result()
                tokens, pairs = context + count * (repeat + 1), count * (context + repeat + 1)
                measured.append((count + JOINING, 1, count, tokens, pairs, mixed))
            handle.result()
    bare = Cost(*zip(*curve, strict=True), 0.0, 0.0, 0.0)  # type: ignore[arg-type]
    # What a step of as many decoding rows takes less than a prompt's is what the prompt's beginning takes.
    terms = np.array([(m[1] - 1.0, *m[2:5]) for m in measured])
    rest = np.array([m[5] - bare(m[0], 0, 0, 0) for m in measured])
    begin, per_branch, per_token, per_pair = _no_less_than_0(terms, rest)
    cost = replace(bare, per_branch=per_branch, per_token=per_token, per_pair=per_pair, begin=begin)
    if forks:
        took = np.array([seconds for _, seconds in forks])
        fork, per_fork = _no_less_than_0(np.array([(1.0, count) for count, _ in forks]), took)
        cost = replace(cost, fork=fork, per_fork=per_fork)
    errors = [abs(cost(m[0], *m[2:5], m[1]) - m[5]) / m[5] for m in measured]
    return replace(cost, error=statistics.median(errors))


def _no_less_than_0(terms: np.ndarray, values: np.ndarray) -> list[float]:
    """Least squares; what would be negative is left out, the most negative first."""
    there = list(range(terms.shape[1]))
    while there:
        found = np.linalg.lstsq(terms[:, there], values, rcond=None)[0]
        if min(found) >= 0:
            return [float(found[there.index(i)]) if i in there else 0.0 for i in range(terms.shape[1])]
        del there[int(np.argmin(found))]
    return [0.0] * terms.shape[1]


def _ids(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(5, 200) for _ in range(count)]


def _branching(branches: int) -> ab.SelfConsistency | None:
    return None if branches == 1 else ab.SelfConsistency(branches, temperature=1.0, top_p=1.0, top_k=0)


def _exactly(tokens: int) -> dict[str, int]:
    return {"min_new_tokens": tokens, "max_new_tokens": tokens}


def _step(engine: ab.Engine) -> float:
    begin = now()
    engine.step()
    return now() - begin


def measure(engines: Sequence[ab.Engine], load: Load, route: str = "prefix") -> dict[str, Any]:
    """The same load on real engines, each on a clock of its own: the CPU seconds of its steps."""
    rng = random.Random(load.seed + 1)
    before = [engine.stats() for engine in engines]
    beginnings = [_ids(rng, load.shared) for _ in range(load.groups)]
    clocks, requests = [0.0] * len(engines), load.arrivals()
    queues: list[list[Request]] = [[] for _ in engines]
    for request in requests:
        if route == "least":
            raise ValueError("route: real engines on clocks of their own cannot be compared at one time")
        request.replica = place(route, request, len(engines), lambda _: 0.0)
        queues[request.replica].append(request)
    if load.tail:
        raise ValueError("tail: the real requests have none")
    for at, (engine, queue) in enumerate(zip(engines, queues, strict=True)):
        there: list[tuple[Request, Any]] = []
        while queue or there:
            if not there and queue:
                clocks[at] = max(clocks[at], queue[0].at)
            begin = now()
            while queue and queue[0].at <= clocks[at]:
                request = queue.pop(0)
                ids = beginnings[request.group] + _ids(rng, load.own)
                there.append((request, engine.add(ids, _branching(load.branches), **_exactly(load.new))))
            engine.step()
            clocks[at] += now() - begin
            for request, handle in there:
                if math.isnan(request.first) and len(handle.so_far) > (load.branches > 1):
                    request.first = clocks[at]
                if handle.done:
                    handle.result()
                    request.end = clocks[at]
            there = [pair for pair in there if not pair[1].done]
    stats = [(engine.stats(), old) for engine, old in zip(engines, before, strict=True)]
    asked = sum(new.prefix_tokens - old.prefix_tokens for new, old in stats)
    hits = sum(new.cached_tokens - old.cached_tokens for new, old in stats)
    return told(load, requests, route=route, replicas=len(engines), found=hits / max(1, asked))


def check(engines: Sequence[ab.Engine], cost: Cost, load: Load) -> dict[str, Any]:
    """The simulation beside real engines; `ratios` are simulated / measured. Engines answer a request beforehand: the
    first large forward of an engine takes up to twice its time, once in its life, and a fleet's engines have lived."""
    for engine in engines:
        measure([engine], replace(load, count=1))
        engine.clear_prefix_cache()
    real = measure(engines, load)
    size = Replica(engines[0].cache.num_pages, engines[0].cache.page_size, engines[0].max_rows)
    played = simulate(cost, size, load, len(engines))
    names = ("seconds", "tokens_per_s", "mean", "p99", "first")
    return {"measured": real, "simulated": played, "ratios": {name: played[name] / real[name] for name in names}}


def run(
    engines: Sequence[ab.Engine], load: Load, replicas: int, report: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """Everything, from the costs of `engines[0]`: the costs, the check, and what was asked."""
    report("timing steps")
    cost = fit(engines[0])
    for engine in engines:
        engine.clear_prefix_cache()
    size = Replica(engines[0].cache.num_pages, engines[0].cache.page_size, engines[0].max_rows)
    most = capacity(cost, size, load, len(engines))
    report("two real engines")
    found = {"cost": asdict(cost), "replica": asdict(size), "load": asdict(load), "replicas": replicas}
    found["check"] = check(engines, cost, replace(load, rate=0.7 * most))
    report("simulating")
    many = replace(load, count=8 * load.count)
    found["held"] = held(cost, size, load, [2**i for i in range(11)])
    # Half as many beginnings again as one replica keeps while it works: all of them fit the fleet, not each replica.
    crowded = replace(many, groups=max(2, size.pages * size.page_size // load.shared * 3 // 4))
    crowded = replace(crowded, count=10 * crowded.groups)
    small = replace(size, pages=size.pages // 2)
    found["routing"] = routing(cost, small, crowded, replicas, _rates(capacity(cost, small, crowded, replicas)))
    found["capacity"] = capacity(cost, size, many, replicas)
    rates = _rates(found["capacity"])
    found["forking"] = {str(more): forking(cost, size, many, replicas, rates, more) for more in (0.0, 0.5)}
    found["pays_until"] = {more: pays_until(entries) for more, entries in found["forking"].items()}
    return found


def _rates(most: float) -> list[float]:
    return [round(share * most, 3) for share in (0.1, 0.25, 0.5, 0.75, 0.9, 1.1)]
