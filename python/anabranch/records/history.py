"""What a thread held at each time: between any two cuts, out of what it holds at its end and what was cut off."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from anabranch.records.result import Cut, Run

if TYPE_CHECKING:
    from anabranch.records.result import Node


@dataclass(frozen=True)
class Stage:
    """What a thread had come to hold when some of it was cut off, or at its end.

    runs: of its own tokens, prompt included. kept: so many of them stayed. logged: the entries of its log that were
    made before the cut; None at the end.
    """

    runs: tuple[Run, ...]
    kept: int
    logged: int | None = None


def stages(node: Node) -> list[Stage]:
    """A thread's stages, in order; the last is its end.

    Raises:
        ValueError: a trace from before it was kept where cuts were made, and positions do not tell.
    """
    held = tuple(node.runs)
    found = [Stage(held, size(held))]
    for piece in reversed(node.forgotten):  # the last cut is undone first
        cut = piece.cut or Cut(_by_position(node, held, piece.position), 0)
        held = (*first(held, cut.begin), replace(piece, spliced=cut.spliced))
        found.insert(0, Stage(held, cut.begin, cut.logged))
    return found


def size(runs: Sequence[Run]) -> int:
    """Tokens of some runs."""
    return sum(len(run.token_ids) for run in runs)


def first(runs: Sequence[Run], count: int) -> tuple[Run, ...]:
    """The runs of the first `count` tokens."""
    found: list[Run] = []
    for run in runs:
        if count <= 0:
            break
        if len(run.token_ids) > count:
            logprobs = None if run.logprobs is None else run.logprobs[:count]
            run = replace(run, token_ids=run.token_ids[:count], logprobs=logprobs)
        found.append(run)
        count -= len(run.token_ids)
    return tuple(found)


def _by_position(node: Node, held: Sequence[Run], position: int) -> int:
    """How many tokens a thread held before `position`."""
    kept, end, whole = 0, -1, True
    for run in held:
        if run.position >= position:
            break
        # Siblings that were joined share positions: a cut among them would be a cut in each.
        if not whole:
            end = -1
            break
        left = min(len(run.token_ids), position - run.position)
        whole, end, kept = left == len(run.token_ids), max(end, run.position + left), kept + left
    if kept and end != position:
        raise ValueError(
            f"trace: thread {node.id} was cut back to position {position}; what it held then is not in the trace"
        )
    return kept
