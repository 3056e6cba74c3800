"""Replaying a trace: its tokens go through an engine again, and must give the same tree on the same positions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from typing import TYPE_CHECKING, Any

from anabranch._check import told
from anabranch.engine.engine import Engine
from anabranch.engine.replaying import Player, Replaying
from anabranch.engine.scheduler import NothingMoves
from anabranch.records.check_log import check_log
from anabranch.records.result import Node, Result, Run

if TYPE_CHECKING:
    from anabranch.records.trace import Trace

__all__ = ["logprob_pairs", "replay"]


def replay(trace: Trace | Result, engine: Engine) -> Result:
    """Feed a trace's tokens through `engine`, by the same forks, joins and truncations, and score every sampled token.

    Nothing is sampled: a thread's tokens go through in chunks, as in a prefill. The `Result` that comes back has the
    same tree (ids, tokens, positions, fates), and in its ``runs`` the log-probability that `engine`'s model gives each
    sampled token, whether the trace holds them or not; `logprob_pairs` puts the two side by side. Any model with the
    vocabulary will do: the one that wrote the trace shows that nothing was lost, another what it thinks of it.

    Raises ValueError for a trace without a log (version 1) or with one that cannot be followed, for token ids outside
    the model's vocabulary, and when the tree differs from the trace's, naming the first thread that does.

    >>> again = ab.replay(ab.trace.load("trace.json"), engine)
    >>> max(abs(a - b) for a, b in ab.engine.logprob_pairs(result, again))
    """
    if not hasattr(trace, "tree"):
        raise TypeError(f"trace: expected a Result or a Trace (trace.load), got {told(trace)}")
    if not isinstance(engine, Engine):
        raise TypeError(f"engine: expected an Engine, got {told(engine)}")
    tree = trace.tree
    if not tree.log and tree.runs[1:]:
        raise ValueError("trace: holds no log of what was done (version 1 had none), so it cannot be replayed")
    check_log(tree)
    player = Player(tree)
    try:
        result: Result = engine.generate(list(trace.prompt_token_ids), strategy=Replaying(player))
    except NothingMoves:
        raise ValueError(
            f"trace: it cannot be followed to its end; what is still to be done waits for what never comes: "
            f"{player.where()}; the trace was changed, or written by another version"
        ) from None
    aborted = tree.fate == "killed"
    for before, after in zip(tree.walk(), result.tree.walk(), strict=False):  # a node tells how many children it has
        for name, one, other in zip(_COMPARED, _facts(before), _facts(after), strict=True):
            unknown = (name == "fate" and aborted) or (name == "cuts" and None in one)
            if one != other and not unknown:
                raise ValueError(
                    f"trace: its replay differs in thread {before.id}, {name}: {one!r:.200} became {other!r:.200}; "
                    "the trace was changed, or written by another version"
                )
    return result


def logprob_pairs(first: Trace | Result, second: Trace | Result) -> Iterator[tuple[float, float]]:
    """Log-probabilities of the same tokens in two trees that are equal, for all that both have recorded."""
    for a, b in zip(first.tree.walk(), second.tree.walk(), strict=True):
        for one, two in zip(_logprobs(a), _logprobs(b), strict=True):
            if one is not None and two is not None:
                yield one, two


def _logprobs(node: Node) -> list[float | None]:
    """Of each token of a thread, None where none was recorded."""
    runs = (*node.runs, *_forgotten(node))
    return [logprob for run in runs for logprob in (run.logprobs or [None] * len(run.token_ids))]


_COMPARED = (
    "id",
    "role",
    "token_ids",
    "start",
    "stop",
    "forked_at",
    "ended",
    "fate",
    "runs",
    "forgotten",
    "cuts",
    "children",
    "sees",
    "turns",
    "sights",
)


def _facts(node: Node) -> list[Any]:
    """What must come out the same: all but the text, which is the tokenizer's affair."""
    forgotten = _whole(_forgotten(node))
    facts = {
        "children": len(node.children),
        "runs": _whole(node.runs),
        "forgotten": forgotten,
        "cuts": [run.cut for run in forgotten],  # which runs are not compared by
    }
    return [facts[name] if name in facts else getattr(node, name) for name in _COMPARED]


def _forgotten(node: Node) -> list[Run]:
    """What was cut off, cut by cut, each in the order in which it stood: a cut takes the last run first."""
    found: list[Run] = []
    for _, pieces in groupby(node.forgotten, key=lambda run: run.cut and run.cut.logged):
        found += [*pieces][::-1]
    return found


def _whole(runs: Sequence[Run]) -> list[Run]:
    """Runs of one origin in one piece: what was scored stands apart from what was inserted, until it is replayed."""
    found: list[Run] = []
    for run in runs:
        last = found[-1] if found else None
        if last is not None and _goes_on(last, run):
            found[-1] = replace(last, token_ids=last.token_ids + run.token_ids, logprobs=None)
        else:
            found.append(run)
    return found


def _goes_on(last: Run, run: Run) -> bool:
    """Whether a run stands right behind another of its kind."""
    alike = [(r.kind, r.source, r.kv_segment, r.cut and r.cut.logged) for r in (last, run)]
    dense = last.position + len(last.token_ids) == run.position
    return dense and alike[0] == alike[1] and not (last.spliced or run.spliced)
