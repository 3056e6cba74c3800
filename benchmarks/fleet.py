"""The fleet on paper: N replicas under random arrivals, some of which fork, as a discrete-event simulation.

Nothing here is a measurement but the cost of a step: an engine's steps are timed for many mixtures of rows and
contexts, and a model with few terms is fitted to them (`Cost`). The simulation then plays the engine's rules with these
costs: requests of a group share a beginning, which a replica computes once and keeps while it has pages (oldest use
goes first); a step takes a row of each branch and fills up with chunks of prompts; who does not fit waits, in order.

`fleet_real.check` plays the same arrivals on two real engines and on two simulated ones. Each real engine has a clock
of its own, the seconds of its steps, so both run in one process; with ``--clock cpu`` other programs disturb them less.
"""

from __future__ import annotations

import math
import random
import statistics
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import simpy

from .serve import percentile

ROUTES = ("prefix", "turns", "least")


@dataclass(frozen=True)
class Cost:
    """Seconds of a step.

    rows, seconds: of one prompt of so many tokens, which begins with this step; interpolated.
    begin: the part of it that is no forward but a request's beginning. A step has it as often as requests begin.
    per_branch, per_token, per_pair: more for each branch that decodes, for each token of KV that is read (once for
    all), and for each pair of a row and a token in the cache that it sees.
    fork, per_fork: of the step without a forward in which a prompt's branches get their first tokens, and of each.
    error: median |fit − measured| / measured, of steps in which branches decode.
    """

    rows: tuple[int, ...]
    seconds: tuple[float, ...]
    per_branch: float
    per_token: float
    per_pair: float
    begin: float = 0.0
    fork: float = 0.0
    per_fork: float = 0.0
    error: float = 0.0

    def __call__(self, rows: int, branches: int, tokens: float, pairs: float, begins: int = 0) -> float:
        forward = float(np.interp(rows, self.rows, self.seconds)) - self.begin
        more = self.per_branch * branches + self.per_token * tokens + self.per_pair * pairs
        return max(self.seconds[0] / 4, forward + more) + begins * self.begin

    def of_forks(self, branches: int) -> float:
        """Of a step in which so many branches get their first tokens, from the scores of their prompts."""
        return self.fork + self.per_fork * branches


@dataclass(frozen=True)
class Replica:
    """What an engine has. max_rows: tokens of a step."""

    pages: int
    page_size: int = 16
    max_rows: int = 512


@dataclass(frozen=True)
class Load:
    """What arrives: `count` requests, Poisson, `rate` a second; a prompt is one of `groups` beginnings of `shared`
    tokens and `own` further ones; then `branches` of `new` tokens each (1: none, the trunk goes on), and `tail` tokens
    of the trunk behind their join."""

    rate: float
    count: int = 64
    groups: int = 4
    shared: int = 256
    own: int = 16
    branches: int = 4
    new: int = 32
    tail: int = 0
    seed: int = 0

    def arrivals(self) -> list[Request]:
        rng, at, found = random.Random(self.seed), 0.0, []
        for number in range(self.count):
            found.append(Request(number, at, rng.randrange(self.groups), self))
            at += rng.expovariate(self.rate)
        return found


@dataclass
class Request:
    number: int
    at: float
    group: int
    load: Load
    left: int = 0  # tokens of the prompt that are still to be computed
    begun: bool = False
    forking: bool = False  # its prompt is there, and its branches have no token yet
    written: int = 0  # by each branch, then by the trunk
    joined: bool = False
    first: float = math.nan
    end: float = math.nan
    replica: int = -1

    @property
    def rows(self) -> int:
        return 0 if self.left or self.forking else 1 if self.joined else self.load.branches

    @property
    def private(self) -> int:
        """Tokens beyond the group's beginning that it holds."""
        done = self.load.own - min(self.left, self.load.own)
        new = self.load.branches * self.load.new if self.joined else self.load.branches * self.written
        return done + new + (self.written if self.joined else 0)

    @property
    def most(self) -> int:
        return self.load.own + self.load.branches * self.load.new + self.load.tail

    @property
    def context(self) -> int:
        """Tokens that a row of it sees."""
        beyond = self.private if self.joined else self.load.own + self.written
        return self.load.shared + beyond


@dataclass
class Engine:
    """A replica at work: a simpy process that does steps while anybody is there."""

    env: simpy.Environment
    cost: Cost
    size: Replica
    active: list[Request] = field(default_factory=list)
    waiting: list[Request] = field(default_factory=list)
    kept: OrderedDict[int, int] = field(default_factory=OrderedDict)  # group → tokens of its beginning
    busy: float = 0.0
    peak: int = 0
    asked: int = 0
    found: int = 0

    def __post_init__(self) -> None:
        self._came = self.env.event()
        self.env.process(self._work())

    def take(self, request: Request) -> None:
        self.waiting.append(request)
        if not self._came.triggered:
            self._came.succeed()

    @property
    def load(self) -> int:
        """Tokens that are still to be written or computed."""
        return sum(r.left + r.load.branches * r.load.new + r.load.tail - r.written for r in self.active + self.waiting)

    def _pages(self, tokens: int) -> int:
        return -(-tokens // self.size.page_size)

    def _work(self) -> Iterator[simpy.Event]:
        while True:
            self._admit()
            if not self.active:
                self._came = self.env.event()
                if not self.waiting:
                    yield self._came
                continue
            rows, seconds, step = self._step()
            self.peak = max(self.peak, rows)
            self.busy += seconds
            yield self.env.timeout(seconds)
            for request, count in step:
                self._advance(request, count)

    def _admit(self) -> None:
        """Who fits beside those that are there, at their longest; beginnings that nobody uses make room."""
        while self.waiting:
            request = self.waiting[0]
            begin, used = request.load.shared, {r.group for r in self.active} | {request.group}
            held = sum(self._pages(r.most) for r in self.active) + self._pages(request.most)
            there = self.kept.get(request.group, 0)
            need = held + sum(self._pages(self.kept.get(g, begin)) for g in used)
            if self.active and need > self.size.pages:
                return
            while need + sum(self._pages(t) for g, t in self.kept.items() if g not in used) > self.size.pages:
                old = next((g for g in self.kept if g not in used), None)
                if old is None:
                    break
                del self.kept[old]
            self.waiting.pop(0)
            computing = any(r.group == request.group and r.left > r.load.own for r in self.active)
            request.left = request.load.own + (0 if there or computing else begin)
            self.asked, self.found = self.asked + begin + request.load.own, self.found + begin * bool(there)
            self.kept[request.group] = begin
            self.kept.move_to_end(request.group)
            self.active.append(request)

    def _step(self) -> tuple[int, float, list[tuple[Request, int]]]:
        """Rows, seconds, and what each request gets: a row a branch, then chunks of prompts. Scores that wait for a
        token to be chosen go first, in a step without a forward."""
        forking = [r for r in self.active if r.forking]
        if forking:
            return 0, self.cost.of_forks(sum(r.load.branches for r in forking)), [(r, 0) for r in forking]
        decoding = [r for r in self.active if not r.left]
        rows = branches = sum(r.rows for r in decoding)
        step, pairs = [(r, r.rows) for r in decoding], float(sum(r.rows * r.context for r in decoding))
        groups = {r.group: r.load.shared for r in decoding}
        tokens, begins = float(sum(r.private for r in decoding)), 0
        for request in (r for r in self.active if r.left):
            chunk = min(request.left, self.size.max_rows - rows)
            blocked = request.left <= request.load.own and any(
                r.group == request.group and r.left > r.load.own for r in self.active
            )
            if chunk <= 0 or blocked:  # what it begins with is being computed
                continue
            rows += chunk
            begins += not request.begun
            seen = request.load.shared + request.load.own - request.left
            pairs += chunk * seen
            if request.left <= request.load.own:
                groups[request.group] = request.load.shared
            step.append((request, chunk))
        return rows, self.cost(rows, branches, tokens + sum(groups.values()), pairs, begins), step

    def _advance(self, request: Request, count: int) -> None:
        request.begun = True
        if request.left:
            request.left -= count
            if request.left:
                return
            request.forking = request.load.branches > 1
            if request.forking:
                return
            request.written = 0
        request.forking = False
        if math.isnan(request.first):
            request.first = self.env.now
        request.written += 1
        if not request.joined and request.written >= request.load.new and request.load.tail:
            request.joined, request.written = True, 0
        elif request.written >= (request.load.tail if request.joined else request.load.new):
            request.end = self.env.now
            self.active.remove(request)


def simulate(cost: Cost, size: Replica, load: Load, replicas: int = 1, route: str = "prefix") -> dict[str, Any]:
    """Play a load; latencies in seconds, tokens a second, and what the replicas had to do."""
    env = simpy.Environment()
    engines = [Engine(env, cost, size) for _ in range(replicas)]
    requests = load.arrivals()

    def arrive() -> Iterator[simpy.Event]:
        for request in requests:
            yield env.timeout(request.at - env.now)
            request.replica = place(route, request, replicas, lambda i: engines[i].load)
            engines[request.replica].take(request)

    env.process(arrive())
    env.run()
    return told(load, requests, route=route, replicas=replicas, peak_rows=max(e.peak for e in engines),
                found=sum(e.found for e in engines) / max(1, sum(e.asked for e in engines)),
                busy=statistics.mean(e.busy for e in engines) / env.now)  # fmt: skip


def place(route: str, request: Request, replicas: int, load: Callable[[int], float]) -> int:
    """Which replica a request goes to."""
    if route == "prefix":
        return request.group % replicas
    if route == "turns":
        return request.number % replicas
    return min(range(replicas), key=load)


def told(load: Load, requests: Sequence[Request], **more: Any) -> dict[str, Any]:
    took, end = sorted(r.end - r.at for r in requests), max(r.end for r in requests)
    tokens = len(requests) * (load.branches * load.new + load.tail)
    return {
        "rate": load.rate, "branches": load.branches, "seconds": end, "tokens_per_s": tokens / end,
        "mean": statistics.mean(took), "p50": percentile(took, 0.5), "p99": percentile(took, 0.99),
        "first": statistics.mean(r.first - r.at for r in requests), **more,
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------- what is asked


def held(cost: Cost, size: Replica, load: Load, counts: Sequence[int]) -> list[dict[str, Any]]:
    """How many branches one replica holds, and what they are worth: its tokens a second with that many at once, sharing
    one context or each with a context of its own."""
    found = []
    for count in counts:
        context = load.shared + load.own
        shared = math.ceil(context / size.page_size) + count * (1 + math.ceil(load.new / size.page_size))
        alone = count * math.ceil((context + load.new) / size.page_size)
        seen = count * (context + load.new / 2)
        for name, pages, tokens in (
            ("shared", shared, context + count * load.new / 2),
            ("alone", alone, seen),
        ):
            if pages <= size.pages and count <= size.max_rows:
                found.append({"kind": name, "branches": count, "pages": pages,
                              "tokens_per_s": count / cost(count, count, tokens, seen)})  # fmt: skip
    return found


def routing(cost: Cost, size: Replica, load: Load, replicas: int, rates: Sequence[float]) -> list[dict[str, Any]]:
    """The same arrivals, routed in each way."""
    return [simulate(cost, size, replace(load, rate=rate), replicas, route) for rate in rates for route in ROUTES]


def forking(
    cost: Cost, size: Replica, load: Load, replicas: int, rates: Sequence[float], more: float = 0.0
) -> list[dict[str, Any]]:
    """The same work as branches side by side, and as one thread that writes all of it one after another. more: the
    share of tokens that forking adds (headers, repeated thoughts)."""
    found = []
    for rate in rates:
        wide = replace(load, rate=rate, new=round(load.new * (1 + more)))
        narrow = replace(load, rate=rate, branches=1, new=load.branches * load.new)
        for name, what in (("forked", wide), ("one thread", narrow)):
            found.append({"kind": name, **simulate(cost, size, what, replicas)})
    return found


def pays_until(entries: Sequence[dict[str, Any]]) -> float:
    """The highest rate up to which forked requests have the lower mean latency; inf: at all that were tried."""
    last = 0.0
    by_rate: dict[float, dict[str, float]] = {}
    for entry in entries:
        by_rate.setdefault(entry["rate"], {})[entry["kind"]] = entry["mean"]
    for rate, means in sorted(by_rate.items()):
        if means["forked"] > means["one thread"]:
            return last
        last = rate
    return math.inf


def capacity(cost: Cost, size: Replica, load: Load, replicas: int) -> float:
    """Requests a second that the replicas can finish, all at once there."""
    crowd = replace(load, rate=1e9)
    return load.count / simulate(cost, size, crowd, replicas)["seconds"]
