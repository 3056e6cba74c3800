"""A trace in Chrome's trace-event format, which https://ui.perfetto.dev and chrome://tracing open.

One thread of the trace is one track, a tick of the token clock is a millisecond, forks and joins are flows, and the
tokens that all threads see and hold together are a counter.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from anabranch.records.files import write_whole
from anabranch.records.result import Result
from anabranch.viz.timeline import Arrow, Lane, Timeline, timeline

if TYPE_CHECKING:
    from anabranch.records.trace import Trace

__all__ = ["perfetto", "save_perfetto"]

TICK = 1000  # the format counts microseconds
PROCESS = 1
LEAD = 1  # ticks before the first, so that no slice begins below 0


def save_perfetto(trace: Trace | Result, path: str | os.PathLike[str]) -> None:
    """Write `perfetto` as JSON to `path`; a file already there is replaced only once the new one is whole.

    >>> ab.viz.save_perfetto(result, "perfetto.json")

    Raises:
        TypeError, ValueError: as `timeline`.
        OSError: the file cannot be written; nothing is left behind.
    """
    write_whole(path, json.dumps(perfetto(trace), ensure_ascii=False, allow_nan=False, separators=(",", ":")) + "\n")


def perfetto(trace: Trace | Result) -> dict[str, Any]:
    """The trace events of a `Trace`, or of a `Result`.

    Raises:
        TypeError, ValueError: as `timeline`.
    """
    whole = trace.trace() if isinstance(trace, Result) else trace
    drawn = timeline(whole)
    events: list[dict[str, Any]] = [
        _meta("process_name", 0, name=f"{os.path.basename(whole.model)}: {whole.strategy}"[:200])
    ]
    for lane in drawn.lanes:
        events += _lane(drawn, lane)
    for number, arrow in enumerate(drawn.arrows):
        events += _flow(arrow, number + 1)
    for usage in drawn.usage():
        counted = {"seen": usage.seen, "held": usage.held}
        events.append({"ph": "C", "pid": PROCESS, "ts": (usage.clock + LEAD) * TICK, "name": "tokens", "args": counted})
    other = {"model": whole.model, "strategy": whole.strategy, "seed": whole.seed, "clock": "1 ms is one token"}
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": other}


def _meta(kind: str, thread: int, **args: Any) -> dict[str, Any]:
    return {"ph": "M", "pid": PROCESS, "tid": thread, "name": kind, "args": args}


def _slice(lane: Lane, name: str, begin: float, end: float, kind: str, **args: Any) -> dict[str, Any]:
    times = {"ts": round((begin + LEAD) * TICK), "dur": max(1, round((end - begin) * TICK))}
    return {"ph": "X", "pid": PROCESS, "tid": lane.number + 1, **times, "name": name, "cat": kind, "args": args}


def _lane(drawn: Timeline, lane: Lane) -> Iterator[dict[str, Any]]:
    """Its track: a slice for all of its life, and one a token within."""
    yield _meta("thread_name", lane.number + 1, name=f"thread {lane.id}")
    yield _meta("thread_sort_index", lane.number + 1, sort_index=lane.number)
    serials = [s for step in lane.steps if step.do == "write" for part in step.ranges for s in range(*part)]
    text = drawn.text(drawn.ids[s] for s in serials)
    facts: dict[str, Any] = {"role": lane.role, "fate": lane.fate, "ended": lane.ended, "tokens": len(lane.tokens)}
    # A tick longer at both ends of time, so that a flow always has a slice to bind to.
    yield _slice(lane, f"thread {lane.id}", lane.begin - 0.5, lane.gone + 0.5, "thread", **facts, text=text)
    for token in lane.tokens:
        name = drawn.text([token.id])
        probability = None if token.logprob is None or math.isnan(token.logprob) else round(math.exp(token.logprob), 6)
        facts = {"id": token.id, "position": token.position, "probability": probability, "cut": token.cut}
        shown = f"{token.id}" if name is None else name if name.strip() else repr(name)
        yield _slice(lane, shown, token.clock, token.clock + 1, token.kind, **facts)


def _flow(arrow: Arrow, number: int) -> Iterator[dict[str, Any]]:
    common = {"pid": PROCESS, "id": number, "name": arrow.mode or arrow.kind, "cat": arrow.kind}
    yield {**common, "ph": "s", "tid": arrow.source + 1, "ts": (arrow.leaves + LEAD) * TICK}
    yield {
        **common,
        "ph": "f",
        "bp": "e",
        "tid": arrow.target + 1,
        "ts": (max(arrow.arrives, arrow.leaves) + LEAD) * TICK,
    }
