"""What plays a trace again: the program of each thread is its log, and it waits for others where the order matters.

Of different threads a trace tells no common order, and a replay needs none but in these places: a thread is joined or
ends when all that it and its children did has been done; what a fork sees of siblings is what they held at one time;
and of threads that saw one another, which tokens each row saw (`LiveGroup.recall`).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any

from anabranch.engine.request import Request
from anabranch.engine.thread_kv import EngineThread
from anabranch.records.actions import Action
from anabranch.records.joins import JOINS
from anabranch.records.live_rows import path_of
from anabranch.records.result import Node
from anabranch.strategies.api.awaitable import Awaitable
from anabranch.strategies.api.ops import Ended, InsertOp, ScoreOp
from anabranch.strategies.api.strategy import Strategy
from anabranch.strategies.api.thread import Thread


class Player:
    """All threads of one replay, each beside the others."""

    def __init__(self, tree: Node):
        self.tree = tree
        self.nodes = {node.id: node for node in tree.walk()}
        self.live = _live_threads(tree)
        self.threads: dict[str, Thread] = {}
        self.playing: dict[str, Any] = {}
        self.early: dict[str, str] = {}  # killed before they came to be → how
        self.done: dict[str, int] = {}  # of each thread: how many entries of its log
        self._gone: dict[str, Awaitable] = {}
        self._marks: dict[tuple[str, int], Awaitable] = {}
        self._seers = _seers(tree)

    def run(self, trunk: Thread) -> Generator[Any, Any, None]:
        if self.live:
            live = _state(trunk).request.live
            live.recall({name: [s for part in self._parts(name) for s in part.sights] for name in self.live})
        self.threads[trunk.id] = trunk
        yield from self._play(trunk, self.tree)
        while not all(task.done for task in self.playing.values()):
            yield list(self.playing.values())
        self._order_children(trunk)

    def where(self) -> str:
        """What those wait for that are not through."""
        left = ((name, self.nodes[name].log[at:]) for name, at in self.done.items())
        waits = [f"thread {name} with log[{self.done[name]}] ({log[0].do})" for name, log in left if log]
        return ", ".join(waits) or "the last entries of all logs"

    # ---------------------------------------------------------------------------------------- one thread

    def _play(self, thread: Thread, node: Node, header: bool = False, born: Any = ()) -> Generator[Any, Any, None]:
        """What the log says; `header`: the fork has queued the first tokens; `born`: what it comes to be by."""
        live_from = self._live_from(node)
        if not live_from:
            self._take_in(thread, 0)
        yield born
        for i, action in enumerate(node.log):
            self.done[node.id] = i
            self._reach(node.id, i)
            if live_from and i == live_from:
                yield thread
                self._take_in(thread, i)
            if action.do == "insert":
                if i or not header:
                    thread.insert(action.token_ids)
            elif action.do == "sample":
                token_ids = thread.host.check_ids(action.token_ids, f"trace: {node.id}")
                thread.host.submit(ScoreOp(thread, token_ids, "sampled"))
            elif action.do == "skip":
                yield thread
                thread.skip(action.position - thread.position)  # type: ignore[operator]
            elif action.do == "spawn":
                yield from self._settled(thread)
                self._spawn(thread, action)
            elif action.do == "fork":
                for (name, _), logged in zip(self.nodes[action.children[0]].sees, action.logged, strict=False):
                    yield self._mark(name, logged)
                self._fork(thread, action)
            elif action.do == "kill":
                yield from self._through(action.children)
                yield from self._settled(thread)
                self._kill(thread, action)
            else:
                yield from self._through(action.children)
                if action.length is not None:
                    yield thread  # so that a mistake in the log is this line's
                    yield [self._end_of(name) for name in self._who_sees(node, i, action.length - self._shared(thread))]
                done = self._cut(thread, action) if action.do == "truncate" else self._join(thread, action)
                if action.length is not None:
                    yield done
                    self._take_in(thread, i + 1)
        self.done[node.id] = len(node.log)
        self._reach(node.id, len(node.log))
        yield thread
        if live_from and live_from == len(node.log):
            self._take_in(thread, live_from)
        if node.ended is not None:
            _state(thread).ended = Ended(node.ended)

    @staticmethod
    def _settled(thread: Thread) -> Generator[Any, Any, None]:
        """Wait for what has to be there before a thread is spawned, or killed: all but tokens under way, which may
        depend on it."""
        if not all(isinstance(op, (InsertOp, ScoreOp)) for op in _state(thread).queue):
            yield thread

    def _through(self, names: Iterable[str]) -> Generator[Any, Any, None]:
        """Wait until some threads, and all below them, have done all that is on record."""
        for name in names:
            if name in self.playing:
                yield self.playing[name]
                yield from self._through([child.id for child in self.nodes[name].children])

    def _start(self, thread: Thread, kid: Thread, header: bool, born: Any) -> None:
        """A child begins; one that was killed before it came to be is so again."""
        self.threads[kid.id] = kid
        self.playing[kid.id] = thread.start(self._play(kid, self.nodes[kid.id], header, born))
        if kid.id in self.early:
            _state(kid).request.end(_state(kid), self.early[kid.id])
            self._ended(kid.id)

    # ---------------------------------------------------------------------------------------- each entry

    def _fork(self, thread: Thread, action: Action) -> None:
        state = _state(thread)
        state.next_child = path_of(action.children[0])[-1]
        state.spawned_at = -1  # what is spawned behind it is a block of its own
        sees = [(self.threads[name], count) for name, count in self.nodes[action.children[0]].sees]
        logs = [self.nodes[name].log for name in action.children]
        headers = [
            header if log and log[0].do == "insert" and tuple(log[0].token_ids) == tuple(header or ()) else None
            for header, log in zip(action.headers, logs, strict=True)
        ]  # one that was killed at once may never have come to its header
        kids = thread.fork(headers, segments=action.segments or None, sees=sees, apart=action.length or 0)
        fork = state.queue[-1]
        for kid, header in zip(kids, headers, strict=True):
            self._start(thread, kid, bool(header), fork)

    def _spawn(self, thread: Thread, action: Action) -> None:
        state, (name,) = _state(thread), action.children
        state.next_child = path_of(name)[-1]
        if not (state.blocks and self._follows(state.blocks[-1][1][-1].id, name)):
            state.spawned_at = -1  # it does not stand behind the one that was spawned last
        node = self.nodes[name]
        prompt = next((run.token_ids for run in node.runs if run.kind == "prompt"), None)
        if prompt is None:  # killed before its prompt was there: what the prompt was is not recorded
            prompt = (0,)
            self.early.setdefault(name, node.fate or "killed")
        self._start(thread, thread.spawn(prompt), False, ())

    def _kill(self, thread: Thread, action: Action) -> None:
        state, fate = _state(thread), action.mode or "killed"
        state.log.append(replace(action, clock=state.request.clock()))
        for name in action.children:
            if name in self.threads:
                state.request.end(_state(self.threads[name]), fate)
                self._ended(name)
            else:
                self.early[name] = fate

    def _join(self, thread: Thread, action: Action) -> Awaitable:
        children = [self.threads[name] for name in action.children]
        join = thread.join(children, **JOINS[action.mode or "concat"].arguments(action))
        for name in action.children:
            join.when_done(partial(self._ended, name))
        return join

    @staticmethod
    def _cut(thread: Thread, action: Action) -> Awaitable:
        assert action.length is not None
        return thread.truncate(action.length)

    # ---------------------------------------------------------------------------------------- who waits for whom

    def _reach(self, name: str, logged: int) -> None:
        self._mark(name, logged).resolve(None, 0)

    def _mark(self, name: str, logged: int) -> Awaitable:
        """Done when so many entries of a thread's log are."""
        return self._marks.setdefault((name, logged), Awaitable())

    def _ended(self, name: str) -> None:
        for node in self.nodes[name].walk():
            self._end_of(node.id).resolve(None, 0)

    def _end_of(self, name: str) -> Awaitable:
        """Done when a thread has been joined or killed."""
        return self._gone.setdefault(name, Awaitable())

    @staticmethod
    def _shared(thread: Thread) -> int:
        return len(_state(thread).prefix)

    def _who_sees(self, node: Node, entry: int, own: int) -> Iterator[str]:
        """Forks that saw more of a thread than its first `own` tokens, and were forked before that log entry."""
        for name, count, logged in self._seers.get(node.id, ()):
            if logged <= entry and count > own:
                yield name
        if turns := node.log[entry].turns:
            for name in self.live - {node.id}:
                if any(seen > own for part in self._parts(name) for seen in _seen(part, name, node.id, turns)):
                    yield name

    # ---------------------------------------------------------------------------------------- live, and the order

    def _parts(self, name: str) -> list[Node | Action]:
        """A live thread's turns and sights as they stood at each cut, and at its end."""
        node = self.nodes[name]
        return [*(action for action in node.log if action.length is not None and action.do != "fork"), node]

    @staticmethod
    def _live_from(node: Node) -> int:
        """The entry of a thread's log from which on it may be live: what was joined or cut before was so plainly."""
        before = node.log[: node.live_since or 0]
        return max((i + 1 for i, action in enumerate(before) if action.do in ("join", "truncate")), default=0)

    def _take_in(self, thread: Thread, entry: int) -> None:
        """The turns and sights of what a thread writes from a log entry on, up to where it is cut next."""
        if thread.id not in self.live:
            return
        node = self.nodes[thread.id]
        passed = sum(action.length is not None and action.do != "fork" for action in node.log[:entry])
        part, *rest = self._parts(thread.id)[passed:]
        later = [sight for other in rest for sight in other.sights]
        state = _state(thread)
        state.request.live.take_in(state, part.turns, part.sights, later)

    def _follows(self, name: str, other: str) -> bool:
        """Whether a thread stands right behind another among the children."""
        order = [child.id for child in self.nodes[name.rpartition(".")[0]].children]
        return name in order and order[order.index(name) + 1 :][:1] == [other]

    def _order_children(self, trunk: Thread) -> None:
        """Threads that are spawned come to be at once, and may have passed forks that were there before them."""
        for thread in (trunk, *self.threads.values()):
            order = {child.id: i for i, child in enumerate(self.nodes[thread.id].children)}
            _state(thread).blocks.sort(key=lambda block, order=order: order.get(block[1][0].id, 0))  # type: ignore[misc]


@dataclass(frozen=True)
class Replaying(Strategy):
    """Does to each thread what its log says."""

    player: Player

    @property
    def kv_segments(self) -> int:  # type: ignore[override]
        used = [s for node in self.player.nodes.values() for action in node.log for s in action.segments]
        return max(used, default=-1) + 1

    def run(self, trunk: Thread) -> Generator[Any, Any, Any]:
        yield from self.player.run(trunk)


def _live_threads(tree: Node) -> set[str]:
    """Names of the threads that saw others live, or were seen."""
    found: set[str] = set()
    for node in tree.walk():
        parts: Sequence[Node | Action] = (node, *node.log)
        sights = [sight for part in parts for sight in part.sights]
        if sights or any(part.turns for part in parts):
            found.add(node.id)
        found.update(name for sight in sights for name in sight.others)  # who is seen may not have had a turn yet
    return found


def _seen(part: Node | Action, reader: str, name: str, turns: Sequence[tuple[int, int]]) -> Iterator[int]:
    """How many own tokens of thread `name`, which were computed in these turns, each turn of a reader saw."""
    ends = list(accumulate(count for _, count in turns))
    at = 0
    for turn, count in part.turns:
        sight = next((sight for sight in reversed(part.sights) if sight.begin <= at), None)
        at += count
        if sight is None or name not in sight.others or not turn or turn > turns[-1][0]:
            continue
        same = sight.same_step == "all" or (sight.same_step == "before" and path_of(name) < path_of(reader))
        found = bisect_right([t for t, _ in turns], turn if same else turn - 1)
        yield ends[found - 1] if found else 0


def _seers(tree: Node) -> dict[str, list[tuple[str, int, int]]]:
    """Of each thread that forks saw: (fork, how many tokens of it, how many entries its log had then)."""
    found: dict[str, list[tuple[str, int, int]]] = {}
    kids = {node.id: node for node in tree.walk()}
    for node in kids.values():
        for action in node.log:
            if action.do == "fork" and action.logged:
                for name in action.children:
                    for (seen, count), logged in zip(kids[name].sees, action.logged, strict=False):
                        found.setdefault(seen, []).append((name, count, logged))
    return found


def _state(thread: Thread) -> EngineThread:
    """The engine's record of a thread: a replay is run by an `Engine` and by no other host."""
    assert isinstance(thread.host, Request)
    return thread.host.state(thread)
