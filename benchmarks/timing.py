"""Interleaved timing: every contender is called once a round, so that a noisy moment hits all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

# What `once` reads. Wall time is what users feel; CPU time of one thread stays honest while other programs run.
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
_clock = time.perf_counter


def set_clock(name: str) -> None:
    """Time with "wall" or "cpu" (this process's CPU seconds: meaningful with one thread alone)."""
    global _clock
    if name == "cpu" and torch.get_num_threads() != 1:
        raise ValueError(f"clock 'cpu' adds up the time of all threads; use --threads 1, not {torch.get_num_threads()}")
    _clock = CLOCKS[name]


def clock_name() -> str:
    return next(name for name, clock in CLOCKS.items() if clock is _clock)


def now() -> float:
    """Seconds on the chosen clock."""
    return _clock()


_FLUSH: torch.Tensor | None = None


def flush_caches() -> None:
    """Walk through 96 MB, several times a common last-level cache: the next call finds its KV in memory.

    In a model every layer has its own KV, so a layer's attention never finds it in the cache from the step before.
    """
    global _FLUSH
    if _FLUSH is None:
        _FLUSH = torch.zeros(96 << 18, dtype=torch.float32)
    _FLUSH.add_(1.0)


@dataclass
class Timing:
    """Seconds of one contender's calls, one a round."""

    seconds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def as_dict(self) -> dict[str, float | int]:
        micro = [s * 1e6 for s in self.seconds]
        return {
            "median_us": round(statistics.median(micro), 2),
            "min_us": round(min(micro), 2),
            "max_us": round(max(micro), 2),
            "rounds": len(micro),
        }


def once(call: Callable[[], object]) -> float:
    start = now()
    call()
    return now() - start


def interleaved(
    calls: Sequence[Callable[[], object]], *, rounds: int, min_rounds: int = 3, budget: float = 10.0, cold: bool = True
) -> list[Timing]:
    """Time `calls` in rounds A B C A B C …

    Args:
        calls: what is timed; each has been called at least once before.
        rounds: the number of rounds aimed at.
        min_rounds: made even when the budget is spent.
        budget: seconds after which no new round starts.
        cold: evict the caches before each call (not timed).
    """
    seconds: list[list[float]] = [[] for _ in calls]
    end = time.perf_counter() + budget
    for r in range(rounds):
        if r >= min_rounds and time.perf_counter() > end:
            break
        for i, call in enumerate(calls):
            if cold:
                flush_caches()
            seconds[i].append(once(call))
    return [Timing(s) for s in seconds]


def best_variant(variants: dict[str, Callable[[], object]], tries: int = 2) -> str:
    """Name of the fastest of several equal ways to compute one thing: each contender enters with its best."""
    best: dict[str, float] = {}
    for name, call in variants.items():
        best[name] = first = once(call)
        for _ in range(tries if first < 1.0 else 1):
            best[name] = min(best[name], once(call))
    return min(best, key=best.__getitem__)
