"""The part of a packed row in which forks saw one another while they wrote: their tokens turn by turn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from anabranch.records.rows import Rows

if TYPE_CHECKING:
    from anabranch.records.result import Node, Run


def check_live(nodes: Sequence[Node]) -> None:
    """ValueError for threads of a fork that saw more, or otherwise, than a causal row can show."""
    names = {node.id for node in nodes}
    for node in nodes:
        for sight in node.sights:
            reason = None
            if sight.lined_up:
                reason = "saw others lined up: a key's position differed from viewer to viewer"
            elif sight.same_step == "all":
                reason = "saw what others computed in the same step, and they its own: that has no causal order"
            elif not names.issuperset(sight.others):
                reason = "saw threads that do not come from the same fork"
            if reason is not None:
                raise ValueError(f"trace: thread {node.id} {reason}; no packed row shows a model the same")
        if node.turns and node.children:
            raise ValueError(f"trace: thread {node.id} saw others, or was seen, and forked; that has no packed row yet")


def write_live(
    rows: Rows, nodes: Sequence[Node], before: Sequence[int], numbers: dict[str, int]
) -> dict[str, list[int]]:
    """Add the own tokens of `nodes`, forks of one thread whose context is `before`; the segments of each.

    numbers: of each thread, for `Rows.add`.
    """
    own: dict[str, list[int]] = {node.id: [] for node in nodes}
    held: dict[str, list[tuple[int, int]]] = {node.id: [] for node in nodes}  # (turn, segment)
    done = dict.fromkeys(own, 0)
    pieces = sorted(
        (turn, path_of(node.id), node, count) for node in nodes for turn, count in _turns(node)
    )  # the threads of a turn in the order of their ids, which is who comes "before" whom
    for turn, _, node, count in pieces:
        for run, at, size in _stretch(node.runs, done[node.id], count):
            sight = next((s for s in reversed(node.sights) if s.begin <= done[node.id]), None)
            seen = [
                segment
                for other in (sight.others if sight is not None else ())
                for then, segment in held[other]
                if then < turn
                or (sight is not None and sight.same_step == "before" and path_of(other) < path_of(node.id))
            ]
            sampled = run.kind == "sampled"
            ids = run.token_ids[at : at + size]
            segment = rows.add(
                ids, [*before, *seen, *own[node.id]], run.position + at, sampled, sampled, numbers[node.id]
            )
            if last := (own[node.id] or list(before))[-1:]:
                rows.follows[segment] = last[0]
            if sampled and run.logprobs is not None:
                rows.recorded[segment] = run.logprobs[at : at + size]
            own[node.id].append(segment)
            held[node.id].append((turn, segment))
            done[node.id] += size
    return own


def path_of(name: str) -> tuple[int, ...]:
    """A thread's place in the tree, by which threads are in order: (0, 2, 1) of "0.2.1"."""
    return tuple(map(int, name.split(".")))


def _turns(node: Node) -> list[tuple[int, int]]:
    """(turn, tokens), the tokens that were never computed in a turn of their own behind all others."""
    size = sum(len(run.token_ids) for run in node.runs)
    left = size - sum(count for _, count in node.turns)
    last = node.turns[-1][0] if node.turns else 0
    return [*node.turns, *([(last + 1, left)] if left > 0 else [])]


def _stretch(runs: Sequence[Run], begin: int, count: int) -> list[tuple[Run, int, int]]:
    """Own tokens begin … begin + count: (run, where in it, how many)."""
    found, at = [], 0
    for run in runs:
        first, last = max(begin, at), min(begin + count, at + len(run.token_ids))
        if first < last:
            found.append((run, first - at, last - first))
        at += len(run.token_ids)
    return found
