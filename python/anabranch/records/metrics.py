"""What a generation cost and how parallel it was, in the field's words.

Tokens are counted once, where they were first written: sampled ones and those the runtime inserted (headers, closing
text); the prompt is not counted, nor a token that a join brings back or computes again.

=========================  =============================================================================================
``total_tokens``           all of them, in all threads
``sampled_tokens``         of these, what the model sampled; ``inserted_tokens``: what the runtime inserted
``critical_path_tokens``   the longest chain of tokens each of which had to wait for the one before: sequential tokens
                           plus, for each parallel block, the longest thread ("token latency"). Run one after another
                           (`Sequential`), that is all of them
``acceleration_ratio``     1 − critical / total (ThreadWeaver's code)
``token_speedup``          total / critical; never to be mixed up with the one above
``parallel_ratio``         tokens written in threads other than the trunk / total
``num_threads``            threads other than the trunk; ``num_forks``: parallel blocks; ``threads_per_block``: of each
``max_concurrency``        most threads that were given a token in one step
``trigger_rate``           share of answers that forked: 1.0 or 0.0 for one answer
``format_correctness``     share of answers that kept the strategy's format: 1.0 or 0.0 for one answer
``longest_context``        tokens of the longest context any thread saw, prompt included
=========================  =============================================================================================

Time and work of this prompt: ``wall_seconds`` from the call to its end; ``seconds`` by phase (`PHASES`), where a step
that several prompts shared counts for each by its rows, so that the prompts of a call add up to the call;
``overhead_seconds``, the price of deciding (phases "plan" and "strategy"), and ``overhead``, its share of all phases;
``steps`` it had rows in, ``rows`` it had in them, ``preemptions`` of its threads; ``draft_tokens`` that were guessed
and verified (`DraftTree`), ``accepted_tokens``: of these, those that came true; ``cached_tokens``: those of its prompts
whose keys and values earlier requests had computed (``Engine(prefix_cache=True)``).

Memory, of the whole cache (all requests share it), from the call up to this prompt's end: ``pages_copied``,
``pages_peak``, ``tokens_logical_peak`` (context tokens of all branches together, at most), ``tokens_physical_peak``
(those that really lay in memory, at most), ``tokens_physical_then`` (those in memory at the moment of the logical peak)
and ``sharing`` (how much less that was: logical peak / physical then).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["PHASES", "Metrics", "summary"]

# What a generation's time goes into; all that counts seconds by phase takes the names from here.
PHASES = (
    "prefill",  # forwards: rows of prompts, headers and joins
    "decode",  # forwards: rows of a thread's next token
    "plan",  # choosing rows, reserving pages, building the step
    "strategy",  # strategies, forks, joins, the queues
    "sampling",
)
DECIDING = ("plan", "strategy")


@dataclass(frozen=True)
class Metrics:
    """Metrics of one answer; see the module docstring for each name."""

    total_tokens: int
    sampled_tokens: int
    inserted_tokens: int
    critical_path_tokens: int
    acceleration_ratio: float
    token_speedup: float
    parallel_ratio: float
    num_threads: int
    num_forks: int
    threads_per_block: tuple[int, ...]
    max_concurrency: int
    trigger_rate: float
    format_correctness: float
    longest_context: int
    prompt_tokens: int = 0
    wall_seconds: float = 0.0
    seconds: Mapping[str, float] = field(default_factory=dict)
    overhead_seconds: float = 0.0
    overhead: float = 0.0
    steps: int = 0
    rows: int = 0
    preemptions: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    pages_copied: int = 0
    pages_peak: int = 0
    tokens_logical_peak: int = 0
    tokens_physical_peak: int = 0
    tokens_physical_then: int = 0
    sharing: float = 1.0
    cached_tokens: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Plain dict, ready for JSON."""
        return asdict(self)

    def __getitem__(self, name: str) -> Any:
        try:
            return getattr(self, name)
        except AttributeError:
            raise KeyError(name) from None

    def keys(self) -> Iterable[str]:
        return self.__dataclass_fields__.keys()


def measure(
    *,
    sampled: int,
    inserted: int,
    in_threads: int,
    critical: int,
    blocks: Iterable[int],
    max_concurrency: int,
    longest_context: int,
    well_formed: bool = True,
    **machine: Any,
) -> Metrics:
    """`Metrics` from counts: `in_threads` of the tokens were written outside the trunk, `blocks` are the threads of
    each fork."""
    total, per_block = sampled + inserted, tuple(blocks)
    deciding, overhead = overhead_of(machine.get("seconds", {}))
    return Metrics(
        total_tokens=total,
        sampled_tokens=sampled,
        inserted_tokens=inserted,
        critical_path_tokens=critical,
        acceleration_ratio=1 - critical / total if total else 0.0,
        token_speedup=total / critical if critical else 1.0,
        parallel_ratio=in_threads / total if total else 0.0,
        num_threads=sum(per_block),
        num_forks=len(per_block),
        threads_per_block=per_block,
        max_concurrency=max_concurrency,
        trigger_rate=float(bool(per_block)),
        format_correctness=float(well_formed),
        longest_context=longest_context,
        overhead_seconds=deciding,
        overhead=overhead,
        **machine,
    )


def overhead_of(seconds: Mapping[str, float]) -> tuple[float, float]:
    """Seconds that went into deciding (planning, strategies, forks, joins, queues), and their share of all phases."""
    whole, deciding = sum(seconds.values()), sum(seconds.get(name, 0.0) for name in DECIDING)
    return deciding, deciding / whole if whole else 0.0


def summary(results: Iterable[Any]) -> dict[str, float]:
    """Metrics of many answers together: counts are summed, ratios taken from the sums, shares averaged, maxima kept.

    results: `Result` or `Metrics` objects. Phases come as ``prefill_seconds`` and so on, summed; ``wall_seconds`` is a
    mean, since prompts of one call overlap.
    """
    all_metrics: list[Metrics] = [getattr(r, "metrics", r) for r in results]
    if not all_metrics:
        raise ValueError("summary: no results; pass at least one")
    n = len(all_metrics)
    out: dict[str, float] = {"answers": n}
    for name in (
        "total_tokens",
        "sampled_tokens",
        "inserted_tokens",
        "critical_path_tokens",
        "num_threads",
        "num_forks",
        "prompt_tokens",
        "rows",
        "preemptions",
        "draft_tokens",
        "accepted_tokens",
        "cached_tokens",
    ):
        out[name] = sum(getattr(m, name) for m in all_metrics)
    total, critical = out["total_tokens"], out["critical_path_tokens"]
    out["acceleration_ratio"] = 1 - critical / total if total else 0.0
    out["token_speedup"] = total / critical if critical else 1.0
    out["parallel_ratio"] = sum(m.parallel_ratio * m.total_tokens for m in all_metrics) / total if total else 0.0
    out["threads_per_block"] = out["num_threads"] / out["num_forks"] if out["num_forks"] else 0.0
    for name in ("trigger_rate", "format_correctness", "wall_seconds"):
        out[name] = sum(getattr(m, name) for m in all_metrics) / n
    for name in ("max_concurrency", "longest_context", "pages_peak"):
        out[name] = max(getattr(m, name) for m in all_metrics)
    seconds = {phase: sum(m.seconds.get(phase, 0.0) for m in all_metrics) for phase in PHASES}
    out |= {f"{phase}_seconds": value for phase, value in seconds.items()}
    out["overhead_seconds"], out["overhead"] = overhead_of(seconds)
    return out
