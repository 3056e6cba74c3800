"""Draws who sees whom in each system, from the trace of a small generation: ``python docs/systems/draw_masks.py``.

The generations are those of the tests (a tiny random model that is made to write the system's format).
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT / folder) for folder in ("tests/strategies", "tests/kits", "python")]

import anabranch as ab  # noqa: E402
from anabranch import training  # noqa: E402
from anabranch.records.trace_rows import trace_rows  # noqa: E402


def scenes() -> Iterator[tuple[str, Any, str, list[Any], tuple[str, ...], dict[str, Any]]]:
    """Name, strategy, prompt, script, control tags and further options of each picture."""
    apr, asyncthink, r1, para, sprint, ssft, leap = (
        importlib.import_module(f"test_{name}")
        for name in ("apr", "asyncthink", "parallel_r1", "parathinker", "sprint", "ssft", "leap")
    )
    yield "apr", ab.APR(), apr.PROMPT, apr.LINES, (), {}
    yield "asyncthink", asyncthink.ASK, "q", asyncthink.LINES, (), {}
    for positions in ("dense", "shared"):
        yield f"parallel_r1_{positions}", ab.ParallelR1(positions=positions), "p: ", r1.LINES, r1.TAGS, {"seed": 1}
    yield "parathinker", para.PLAIN, "why", para.LINES, para.TAGS, {}
    yield "sprint", ab.SPRINT(), "?", sprint.LINES, (), {}
    yield "ssft", ab.SSFT(), "q", ssft.LINES, ssft.TAGS, {}
    yield "leap", ab.LeaP(paths=2, turns=2, turn_tokens=10, **leap.SMALL), "q", leap.TURNS, (), {}
    lines = [("q", "ab<eos>"), ("q:\nReference 1:\nab\n\nReference 2:\nab\n", "c<eos>")]
    yield "pacore", ab.PaCoRe(rounds=(2,), request="{question}:{references}"), "q", lines, (), {}


def numbered(node: Any) -> Iterator[str]:
    """Ids of threads in the order in which a packed row numbers them."""
    yield node.id
    for kid in sorted(node.children, key=lambda kid: -1 if kid.role == "fresh" else kid.forked_at):
        yield from numbered(kid)


def draw() -> None:
    """Write one SVG a scene, beside this file; axes name the thread that each run of tokens belongs to."""
    kit = importlib.import_module("systems_kit")
    for name, strategy, prompt, lines, pieces, options in scenes():
        result, _ = kit.play(strategy, prompt, *lines, pieces=pieces, **options)
        names = list(numbered(result.tree))
        labels = [names[number] for number in trace_rows(result).threads]
        training.from_trace(result).mask.plot(HERE / f"{name}.svg", labels=labels, size=3.6)


if __name__ == "__main__":
    draw()
