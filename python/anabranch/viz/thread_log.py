"""What was done to a thread, in order: from its log, or, for traces that have none, from what it holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from anabranch.records.actions import Action

if TYPE_CHECKING:
    from anabranch.records.result import Node

__all__ = ["actions_of"]


def actions_of(node: Node) -> Sequence[Action]:
    """The log of a thread. A trace of version 1 has none: then what its runs and its children's places tell.

    >>> [action.do for action in actions_of(result.tree)]
    ['sample', 'fork', 'join', 'insert', 'sample']
    """
    return node.log or list(_told_by_runs(node))


def _told_by_runs(node: Node) -> Iterator[Action]:
    waiting = list(node.children)
    length = node.forked_at if node.role == "fork" else 0

    def forks() -> Iterator[Action]:
        here = [kid for kid in waiting if kid.role == "fork" and kid.forked_at <= length]
        if here:
            yield Action("fork", children=[kid.id for kid in here], headers=[None] * len(here))
        waiting[:] = [kid for kid in waiting if kid not in here]

    for (kind, spliced), group in groupby(node.runs, key=lambda run: (run.kind, run.spliced)):
        runs = list(group)
        if kind == "prompt":
            length += sum(len(run.token_ids) for run in runs)
            yield from forks()
            continue
        yield from forks()
        if kind == "joined":
            sources = dict.fromkeys(run.source or "" for run in runs)
            names = [kid.id for kid in node.children if any(f"{s}.".startswith(f"{kid.id}.") for s in sources)]
            fresh = [kid for kid in waiting if kid.id in names and kid.role == "fresh"]
            for kid in fresh:
                yield Action("spawn", children=[kid.id])
            waiting[:] = [kid for kid in waiting if kid not in fresh]
            if names:
                yield Action("join", children=names, mode="concat" if spliced else "reprefill")
            length += sum(len(run.token_ids) for run in runs)
            continue
        ids = [token for run in runs for token in run.token_ids]
        while ids:
            stops = [kid.forked_at - length for kid in waiting if kid.role == "fork" and kid.forked_at > length]
            part = ids[: min([len(ids), *stops])]
            yield Action("sample" if kind == "sampled" else "insert", part)
            ids, length = ids[len(part) :], length + len(part)
            yield from forks()
    for kid in waiting:
        yield Action("fork" if kid.role == "fork" else "spawn", children=[kid.id], headers=[None])
