"""Replaying a trace: its tokens go through an engine again, and must give the same tree on the same positions."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from anabranch._check import told
from anabranch.engine.engine import Engine
from anabranch.engine.request import Request
from anabranch.engine.thread_kv import EngineThread
from anabranch.records.actions import Action
from anabranch.records.joins import JOINS
from anabranch.records.result import Node, Result, Run
from anabranch.strategies.api.ops import Ended, ScoreOp
from anabranch.strategies.api.strategy import Strategy
from anabranch.strategies.api.thread import Thread

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
    _check(tree)
    result: Result = engine.generate(list(trace.prompt_token_ids), strategy=_Replay(tree))
    aborted = tree.fate == "killed"
    for before, after in zip(tree.walk(), result.tree.walk(), strict=False):  # a node tells how many children it has
        for name, one, other in zip(_COMPARED, _facts(before), _facts(after), strict=True):
            if one != other and not (name == "fate" and aborted):
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
    runs = (*node.runs, *node.forgotten)
    return [logprob for run in runs for logprob in (run.logprobs or [None] * len(run.token_ids))]


def _check(tree: Node) -> None:
    """ValueError for a log that speaks of threads the tree does not have."""
    every = {node.id for node in tree.walk()}
    for node in tree.walk():
        names = [child.id for child in node.children]
        for other in (name for sight in node.sights for name in sight.others):
            if other not in every:
                raise ValueError(f"trace: thread {node.id} saw thread {other!r}, which is not in the tree")
        for i, action in enumerate(node.log):
            if (action.do in ("fork", "spawn", "join", "kill")) != bool(action.children):
                raise ValueError(f"trace: log[{i}] of thread {node.id}: {action.do} of {len(action.children)} threads")
            if action.do == "fork" and len(action.headers) != len(action.children):
                raise ValueError(f"trace: log[{i}] of thread {node.id}: not one header a child")
            for name in action.children if action.do != "kill" else ():
                if name not in names:
                    raise ValueError(f"trace: log[{i}] of thread {node.id}: {action.do} of {name!r}, which is no child")


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
    "children",
    "sees",
    "turns",
    "sights",
)


def _facts(node: Node) -> list[Any]:
    """What must come out the same: all but the text, which is the tokenizer's affair."""
    facts = {"children": len(node.children), "runs": _whole(node.runs), "forgotten": _whole(node.forgotten)}
    return [facts.get(name, getattr(node, name)) for name in _COMPARED]


def _whole(runs: Sequence[Run]) -> list[Run]:
    """Runs of one origin in one piece: what was scored stands apart from what was inserted, until it is replayed."""
    found: list[Run] = []
    for run in runs:
        last = found[-1] if found else None
        spliced = run.spliced or (last is not None and last.spliced)
        dense = last is not None and last.position + len(last.token_ids) == run.position
        if last is not None and dense and not spliced and (last.kind, last.source) == (run.kind, run.source):
            found[-1] = Run(run.kind, last.token_ids + run.token_ids, last.position, run.source)
        else:
            found.append(run)
    return found


@dataclass(frozen=True)
class _Replay(Strategy):
    """Does to each thread what its log says."""

    tree: Node

    @property
    def kv_segments(self) -> int:  # type: ignore[override]
        used = [s for node in self.tree.walk() for action in node.log for s in action.segments]
        return max(used, default=-1) + 1

    def run(self, trunk: Thread) -> Generator[Any, Any, Any]:
        player = _Player(self.tree)
        player.recall(trunk)
        yield from player.play(trunk, self.tree)
        while not all(task.done for task in player.playing.values()):
            yield list(player.playing.values())
        player.order_children(trunk)


class _Player:
    """All threads of one replay, each beside the others."""

    def __init__(self, tree: Node):
        self.nodes = {node.id: node for node in tree.walk()}
        self.seen = {name for node in tree.walk() for sight in node.sights for name in sight.others}
        self.threads: dict[str, Thread] = {}
        self.playing: dict[str, Any] = {}
        self.early: dict[str, str] = {}  # killed before they came to be → how

    def play(self, thread: Thread, node: Node, header: bool = False) -> Generator[Any, Any, None]:
        """What the log says; `header`: the fork has queued the first tokens."""
        for action in node.log:
            if action.do == "insert":
                if not header:
                    thread.insert(action.token_ids)
                header = False
            elif action.do == "sample":
                token_ids = thread.host.check_ids(action.token_ids, f"trace: {node.id}")
                thread.host.submit(ScoreOp(thread, token_ids, "sampled"))
            elif action.do in ("fork", "spawn"):
                self._children(thread, action)
            elif action.do == "truncate":
                yield thread  # so that a mistake in the log is this line's
                thread.truncate(action.length)  # type: ignore[arg-type]
            elif action.do == "skip":
                yield thread
                thread.skip(action.position - thread.position)  # type: ignore[operator]
            else:
                yield [self.playing[name] for name in action.children if name in self.playing]
                if action.do == "join":
                    self._join(thread, action)
                else:
                    self._kill(thread, action)
        yield thread
        if node.ended is not None:
            _state(thread).ended = Ended(node.ended)

    def recall(self, thread: Thread) -> None:
        """Where a thread saw others, or was seen: when its tokens were computed, and what it saw."""
        node = self.nodes[thread.id]
        if node.turns or node.sights or thread.id in self.seen:  # (who is seen may not have had a turn yet)
            state = _state(thread)
            state.request.live.recall(state, node.turns, node.sights)

    def order_children(self, trunk: Thread) -> None:
        """Threads that are spawned come to be at once, and may have passed forks that were there before them."""
        for thread in (trunk, *self.threads.values()):
            order = {child.id: i for i, child in enumerate(self.nodes[thread.id].children)}
            _state(thread).blocks.sort(key=lambda block, order=order: order[block[1][0].id])  # type: ignore[misc]

    def _children(self, thread: Thread, action: Action) -> None:
        _state(thread).next_child = int(action.children[0].rpartition(".")[2])
        if action.do == "fork":
            _state(thread).spawned_at = -1  # what is spawned behind it is a block of its own
            headers = action.headers
            sees = [(self.threads[name], count) for name, count in self.nodes[action.children[0]].sees]
            kids = thread.fork(list(headers), segments=action.segments or None, sees=sees, apart=action.length or 0)
        else:
            runs = self.nodes[action.children[0]].runs
            prompt = next((run.token_ids for run in runs if run.kind == "prompt"), None)
            if prompt is None:  # killed before its prompt was there: what the prompt was is not recorded
                prompt = (0,)
                self.early.setdefault(action.children[0], self.nodes[action.children[0]].fate or "killed")
            headers, kids = [None], [thread.spawn(prompt)]
        for kid, header in zip(kids, headers, strict=True):
            self.threads[kid.id] = kid
            self.recall(kid)
            self.playing[kid.id] = thread.start(self.play(kid, self.nodes[kid.id], bool(header)))
            if kid.id in self.early:
                thread.host.kill([kid], self.early[kid.id])

    def _join(self, thread: Thread, action: Action) -> None:
        children = [self.threads[name] for name in action.children]
        thread.join(children, **JOINS[action.mode or "concat"].arguments(action))

    def _kill(self, thread: Thread, action: Action) -> None:
        fate = action.mode or "killed"
        for name in action.children:
            if name in self.threads:
                thread.host.kill([self.threads[name]], fate)
            else:
                self.early[name] = fate


def _state(thread: Thread) -> EngineThread:
    """The engine's record of a thread: a replay is run by an `Engine` and by no other host."""
    assert isinstance(thread.host, Request)
    return thread.host.state(thread)
