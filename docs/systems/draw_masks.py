"""Draws who sees whom in each system, from the trace of a small generation: ``python docs/systems/draw_masks.py``.

A tiny random model is made to write the system's format: the generations of the tests, or the scripts below.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT / folder) for folder in ("tests/strategies", "tests/kits", "python")]

import anabranch as ab  # noqa: E402
from anabranch import training  # noqa: E402
from anabranch.records.trace_rows import trace_rows  # noqa: E402

MULTIVERSE = "<Parallel><Goal><Outline>1: x</Outline><Outline>2: y</Outline></Goal>"
NPR = "<guideline><plan>1: x</plan><plan>2: y</plan></guideline>"
PASTA = 'a<promise topic="x" tokens="20"/>', 'b<promise topic="y"/>', "c<sync/>"
STEP = "<Outline> Transient Step {}: A -> {}; Dependency: [{}] </Outline>"
MEDVERSE = "<Plan>" + STEP.format(1, "B", "") + STEP.format(2, "C", "") + STEP.format(3, "D", "1") + "</Plan>"


def tagged_scripts() -> Iterator[tuple[Any, list[Any]]]:
    """Strategy and script (what stands before, what the model then writes) of each system with a nested format."""
    paths = ["\n<Path>\n1: a is 4.</Path>", "\n<Path>\n2: b is 25.</Path>"]
    yield (
        ab.Multiverse(),
        [
            ("q", MULTIVERSE),
            *(("q" + MULTIVERSE + path[:10], path[10:]) for path in paths),
            ("q" + MULTIVERSE + "".join(paths) + "<Conclusion>\n", "29</Conclusion></Parallel><eos>"),
        ],
    )
    steps = ["<step>\n1: a is 4.</step>\n", "<step>\n2: b is 25.</step>\n"]
    yield (
        ab.NPR(),
        [
            ("q", NPR),
            *(("q" + NPR + "\n" + step[:9], step[9:]) for step in steps),
            ("q" + NPR + "\n" + "".join(steps) + "<takeaway>\n", "29</takeaway><eos>"),
        ],
    )
    texts = ["<async>first</async>", "<async>second</async>"]
    yield (
        ab.PASTA(),
        [
            ("q", "".join(PASTA)),
            ("q" + PASTA[0] + "<async>", texts[0][7:]),
            ("q" + PASTA[0] + PASTA[1] + "<async>", texts[1][7:]),
            ("q" + "".join(PASTA) + "".join(texts) + "\n", "end<eos>"),
        ],
    )
    begin = MEDVERSE + "\n<Execution>\n"
    acts = {n: f"<Step> Transient Step {n}: A -> {to}\n" for n, to in (("1", "B"), ("2", "C"), ("3", "D"))}
    done = {n: head + "text</Step>" for n, head in acts.items()}
    yield (
        ab.MedVerse(),
        [
            ("q", MEDVERSE),
            ("q" + begin + acts["1"], "text</Step>"),
            ("q" + begin + acts["2"], "text</Step>"),
            ("q" + begin + done["1"] + acts["3"], "text</Step>"),
            ("q" + begin + "".join(done.values()) + "</Execution>\n<Conclusion>\n", "so</Conclusion><eos>"),
        ],
    )


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
    for strategy, script in tagged_scripts():
        yield type(strategy).__name__.lower(), strategy, "q", script, tuple(getattr(strategy, "tags", ())), {}
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
    matplotlib.rcParams["svg.hashsalt"] = "anabranch"  # the same picture, the same file
    os.environ["SOURCE_DATE_EPOCH"] = "0"
    for name, strategy, prompt, lines, pieces, options in scenes():
        result = kit.engine_with(*pieces).generate(
            prompt,
            strategy=strategy,
            logits_processor=[kit.Script(*lines, pieces=pieces)],
            **({"max_new_tokens": 1500, "seed": 0} | options),
        )
        names = list(numbered(result.tree))
        labels = [names[number] for number in trace_rows(result).threads]
        training.from_trace(result).mask.plot(HERE / f"{name}.svg", labels=labels, size=3.6)


if __name__ == "__main__":
    draw()
