"""The `Host` of one prompt's threads, as far as it needs no model: who asks what, what comes when, what was counted."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from inspect import isgenerator
from math import inf
from typing import Any, ClassVar, Generic, TypeVar

from anabranch.records import events
from anabranch.records.actions import Action
from anabranch.strategies.api.awaitable import Awaitable
from anabranch.strategies.api.ops import Decode, ForkOp, InsertOp, JoinOp, Op, ScoreOp
from anabranch.strategies.api.strategy import Strategy
from anabranch.strategies.api.thread import Thread
from anabranch.strategies.plain import is_plain
from anabranch.text.prompts import Text
from anabranch.text.tokens import Stops
from anabranch.threads.costs import Costs
from anabranch.threads.narrator import Narrator
from anabranch.threads.ops.base import HostOp, next_ops
from anabranch.threads.running import RunningDecode, Sampling
from anabranch.threads.state import ThreadState
from anabranch.threads.tasks import Task, Tasks

State = TypeVar("State", bound=ThreadState[Any])


class Books(Generic[State]):
    """Carries out what needs no forward; what does is for the host derived from it to say and do.

    A host defines `record` (its class of thread records), `sampling` and `check_sampling`, and ``ops`` (how each op is
    carried out). One that keeps more than the tokens of a thread (an engine: its KV) also defines the hooks at the end.
    """

    ops: ClassVar[Mapping[type[Op], HostOp[Any]]]

    def __init__(
        self,
        index: int,
        token_ids: list[int],
        strategy: Strategy,
        seed: int,
        *,
        text: Text,
        max_new_tokens: int,
        max_total_tokens: int | None,
        logprobs: bool,
        position_limit: int | None = None,
        emit: Callable[[events.Event], None] | None,
        prompt: Any = None,
        template: Mapping[str, Any] | None = None,
    ):
        self.index, self.strategy, self.seed, self.prompt = index, strategy, seed, prompt
        # How a chat ends is said of the caller's own; the rest holds for a strategy's as well.
        own = ("add_generation_prompt", "continue_final_message")
        self._template = {k: v for k, v in (template or {}).items() if k not in own}
        self.text_rules = text
        self.max_new_tokens, self.max_total_tokens = max_new_tokens, max_total_tokens
        self.logprobs, self.narrator = logprobs, Narrator(index, text, emit)
        self.position_limit = position_limit
        # Plain decoding ends with a token that nothing follows: like `model.generate`, it needs no position for it.
        self._last_is_free = is_plain(strategy)
        self.sequential = bool(getattr(strategy, "sequential", False))
        self.kv_segments = int(getattr(getattr(strategy, "strategy", strategy), "kv_segments", 0))
        self.drains = bool(getattr(getattr(strategy, "strategy", strategy), "drains", False))
        self.tasks = Tasks(type(strategy).__name__, self.drained)
        self.threads: list[State] = []
        self._states: dict[Thread, State] = {}
        self.queued: dict[State, None] = {}  # threads with something in their queue, in order of arrival
        self.sampled = self.inserted = self.max_concurrency = self.longest_context = 0
        self._malformed: list[tuple[tuple[int, ...], str]] = []
        self._asked: State | None = None  # whose until() is being called
        self.chose: set[State] = set()  # threads given a chosen token since one of them was given two
        self.spent = Costs()
        self.started: float | None = None  # when it was handed to what runs it
        self.finished = False
        self.trunk = self._make(None, "trunk", (0,))
        self.trunk.prompt_length = len(token_ids)
        self.trunk.append(token_ids, "prompt")
        self.trunk.clock = 0  # the prompt is not part of the answer's critical path
        self.main: Task | None = None

    # ---------------------------------------------------------------------------------------- life

    def start_strategy(self) -> None:
        running = self.strategy.run(self.trunk.handle)
        if isgenerator(running):
            self.main = self.tasks.start(running, 0)
        else:  # a run() without any yield has already queued all it wants
            self.main = Task(iter(()), 0)  # type: ignore[arg-type]
            self.main.resolve(running, 0)

    @property
    def over(self) -> bool:
        if self.main is None or not self.main.done or self.trunk.queue:
            return False
        return not (self.drains and any(thread.queue for thread in self.queued))

    def critical_path(self) -> int:
        if self.sequential:  # run one after another, every token is on the path
            return self.sampled + self.inserted
        return max(self.main.now if self.main is not None else 0, self.trunk.clock)

    def release(self) -> None:
        """Give back all that its threads hold and end every generator. Safe at any moment, and twice."""
        for thread in self.threads:
            self.free(thread)
        self.tasks.close()

    # ---------------------------------------------------------------------------------------- Host

    @property
    def eos_ids(self) -> frozenset[int]:
        return self.sampling(()).eos_ids

    def clock(self) -> int:
        if self._asked is not None:  # what an until() asks for comes after the tokens that it has seen
            return self._asked.clock
        return self.tasks.current.now if self.tasks.current is not None else 0

    def encode(self, text: str, backwards: Iterable[int] | None = None) -> list[int]:
        return self.text_rules.encode(text, backwards)

    def encode_prompt(self, prompt: Any) -> list[int]:
        chat = not isinstance(prompt, str) and len(prompt) > 0 and isinstance(prompt[0], Mapping)
        return self.text_rules.prompt_ids(prompt, template=self._template if chat else None)

    def text(self, token_ids: Sequence[int], backwards: Iterable[int]) -> str | None:
        return self.text_rules.text(token_ids, backwards)

    def pieces(self, token_ids: Iterable[int]) -> dict[int, str | tuple[int, ...]] | None:
        """What each token reads as in the middle of a text; None without a tokenizer."""
        return self.text_rules.pieces(token_ids)

    def tag_ids(self, tags: Sequence[str]) -> dict[str, int]:
        return self.text_rules.tag_ids(tags)

    def blank_at_end(self, token_ids: Sequence[int]) -> int:
        return self.text_rules.blank_at_end(token_ids)

    def check_ids(self, token_ids: Iterable[int], name: str) -> list[int]:
        return self.text_rules.check_ids(token_ids, name)

    def check_sampling(self, sampling: Mapping[str, Any] | None) -> None:
        """Raise for options of a decode that the host does not know."""
        self.sampling(tuple(sorted((sampling or {}).items())))

    def state(self, thread: Thread) -> State:
        """The record of a handle."""
        return self._states[thread]

    def submit(self, op: Op) -> None:
        thread = self._states[op.thread]
        thread.queue.append(op)
        self.queued[thread] = None

    def drained(self, thread: Thread) -> Awaitable:
        wait, state = Awaitable(), self._states[thread]
        if state.queue and state.alive:
            state.waiting.append(wait)
        else:
            wait.resolve(thread, state.clock)
        return wait

    def room(self, thread: Thread) -> int:
        return self.left(self._states[thread])

    def children(self, thread: Thread) -> list[Thread]:
        return [child.handle for child in self._states[thread].children]

    def start(self, generator: Generator[Any, Any, Any]) -> Awaitable:
        return self.tasks.start(generator, self.clock())

    def tokens_left(self, thread: Thread) -> int:
        return max(0, self.max_new_tokens - self._states[thread].path_sampled)

    def malformed(self, thread: Thread, why: str) -> None:
        self._malformed.append((thread.path, f"thread {thread.id}: {why}"))

    @property
    def malformed_reasons(self) -> list[str]:
        """What broke the format, in order of threads: which of two found out first depends on the schedule."""
        return [why for _, why in sorted(self._malformed, key=lambda item: item[0])]

    def decoded_text(self, op: Decode) -> str | None:
        decode = self._states[op.thread].decode
        if decode is None or decode.op is not op or decode.reader is None:
            return self.text(op.token_ids, ())
        return decode.text

    def new_thread(self, parent: Thread, role: str) -> Thread:
        state = self._states[parent]
        path = (*state.path, state.next_child)
        state.next_child += 1
        return self._make(state, role, path).handle

    def _make(self, parent: State | None, role: str, path: tuple[int, ...]) -> State:
        thread = self.record(parent, path, role)
        self._states[thread.handle] = thread
        self.threads.append(thread)
        if role == "fresh" and parent is not None:
            parent.log.append(Action("spawn", children=[thread.id], clock=self.clock()))
            if parent.spawned_at == self.tasks.turn:
                parent.blocks[-1][1].append(thread)  # spawned in one go: one block
            else:
                parent.blocks.append((parent.length, [thread]))
                parent.spawned_at = self.tasks.turn
            thread.clock, thread.path_sampled = self.clock(), parent.path_sampled
            self.narrator.forked(parent, [thread.id], "fresh")
        return thread

    def kill(self, children: Sequence[Thread], fate: str) -> None:
        states = [self._states[child] for child in children]
        for parent in dict.fromkeys(state.parent for state in states if state.parent is not None):
            names = [state.id for state in states if state.parent is parent]
            parent.log.append(Action("kill", children=names, mode=fate, clock=self.clock()))
        for state in states:
            self.end(state, fate)

    def see(self, thread: Thread, others: Sequence[Thread], lined_up: bool, same_step: str) -> None:
        raise ValueError("see: live sharing needs KV of one's own, which this host does not have; use a local Engine")

    def end(self, thread: State, fate: str) -> None:
        """End a thread now, with its children."""
        if not thread.alive:
            return
        thread.reach(self.clock())
        for op in thread.parent.queue if thread.parent is not None else ():
            # What would take it back, or let others see it, does without it.
            if (isinstance(op, JoinOp) and thread.handle in op.children) or (
                isinstance(op, ForkOp) and any(other is thread.handle for other, _ in op.sees)
            ):
                op.without(thread.handle)
                op.issued = max(op.issued, thread.clock)
        for child in list(thread.children):
            self.end(child, fate)
        for op in thread.queue:
            self.ops[type(op)].drop(self, thread, op, fate)
            op.resolve(None, thread.clock)
        thread.queue.clear()
        self.retire(thread, fate)
        self.narrator.discarded(thread, fate)

    def retire(self, thread: State, fate: str) -> None:
        """A thread takes nothing more, and holds nothing."""
        self.narrator.tell_rest(thread)
        thread.alive, thread.fate = False, fate
        self.free(thread)
        self.emptied(thread)

    # ---------------------------------------------------------------------------------------- the queues

    def advance(self) -> bool:
        """Run the strategy and all queued ops that need no forward, until nothing moves; whether anything did."""
        moved = any_moved = self.tasks.run_ready()
        while True:
            for thread in list(self.queued):
                while thread.born and self._advance(thread):
                    moved = True
                if not thread.queue:
                    self.emptied(thread)
            moved = self.tasks.run_ready() or moved
            if not moved:
                return any_moved
            any_moved, moved = True, False

    def decodable(self) -> list[State]:
        """Threads whose queue begins with a decode; for a sequential strategy only the first that has anything to do,
        children before their parent."""
        threads = [t for t in self.queued if t.queue and t.born]
        if self.sequential:
            # A fork that still waits for its thread's last token keeps the turn: its children come next, not whoever
            # happens to be ready. So the order, and with it who a budget stops, does not depend on pages or chunks.
            threads = [t for t in threads if not self.ops[type(t.queue[0])].waits_for_children(self, t.queue[0])]
            threads = sorted(threads, key=lambda t: (*t.path, inf))[:1]
        return [t for t in threads if self.ops[type(t.queue[0])].decodes]

    def _advance(self, thread: State) -> bool:
        """Carry out the first of a thread's next ops that can be; whether one was."""
        for op in next_ops(thread):
            if self.ops[type(op)].advance(self, thread, op):
                return True
        return False

    def emptied(self, thread: State) -> None:
        """A thread has nothing queued any more: whoever waits for that goes on."""
        self.queued.pop(thread, None)
        waiting, thread.waiting = thread.waiting, []
        for wait in waiting:
            wait.resolve(thread.handle, thread.clock)

    # ---------------------------------------------------------------------------------------- each op

    def insert(self, thread: State, token_ids: list[int], kind: str) -> None:
        """Append tokens that nobody sampled."""
        if not token_ids:
            return
        position, clock = thread.position, thread.clock
        thread.append(token_ids, kind)
        if kind == "inserted":
            self.inserted += len(token_ids)
        else:
            thread.clock = clock  # a fresh thread's prompt, like the trunk's, is not part of the answer
        if kind == "prompt":
            thread.prompt_length = len(token_ids)
        self.narrator.tell(thread, token_ids, position, kind != "sampled")

    # ---------------------------------------------------------------------------------------- decoding

    def running(self, thread: State, op: Decode) -> RunningDecode[Any]:
        """What is settled about a decode whose turn has come: its limit, sampler, reader and stops."""
        left = self.left(thread)
        limit = left if op.max_new_tokens is None else min(left, op.max_new_tokens)
        sampler = self.sampling(op.sampling)
        decode = RunningDecode(op, limit, sampler, self.text_rules.reader(thread.backwards()))
        decode.stops = self._stops(thread, decode)
        return decode

    def left(self, thread: State) -> int:
        """Tokens that a thread may still be given, by the answer's limit and the model's positions."""
        left = self.max_new_tokens - thread.path_sampled
        if self.position_limit is not None:
            self.check_position(thread, thread.position - 1)
            left = min(left, self.position_limit - thread.position + self._last_is_free)
        return left

    def check_position(self, thread: State, last: int) -> None:
        """Raise for a thread with tokens past the positions which the model has embeddings for."""
        if self.position_limit is not None and last >= self.position_limit:
            raise ValueError(
                f"thread {thread.id}: its tokens reach position {last}, but the model has embeddings for "
                f"{self.position_limit} positions (0 … {self.position_limit - 1}); insert, join or spawn less, use a "
                "smaller max_new_tokens, or a model with a longer context"
            )

    @property
    def out_of_budget(self) -> bool:
        """Whether the prompt's ``max_total_tokens`` are sampled."""
        return self.max_total_tokens is not None and self.sampled >= self.max_total_tokens

    def count_sampled(self, thread: State, count: int = 1) -> None:
        """A thread was given tokens that the model wrote."""
        thread.path_sampled += count
        self.sampled += count
        self.longest_context = max(self.longest_context, thread.length)

    def count_chosen(self, thread: State) -> None:
        """A thread was given a token that its strategy chose."""
        self.count_sampled(thread)
        if thread in self.chose:
            self.chose.clear()
        self.chose.add(thread)
        self.max_concurrency = max(self.max_concurrency, len(self.chose))

    def holds_stop(self, thread: State, strings: Sequence[str], token: int) -> bool:
        """Whether one of `strings` ends a thread's text with `token`, and not before it."""
        before = self.text_rules.last_characters(thread.context, max(map(len, strings)))
        read = self.text_rules.text([token], thread.backwards()) or ""
        return Stops(strings, before).find("", read) is not None

    def until(self, thread: State, op: Decode) -> bool:
        """Whether the caller's predicate ends a decode."""
        if op.until is None:
            return False
        self._asked = thread
        try:
            return bool(op.until(op))
        finally:
            self._asked = None

    def _stops(self, thread: State, decode: RunningDecode[Any]) -> list[Stops]:
        """What looks for stop strings: the decode's own in what it samples, the config's in all of the thread."""
        found = [Stops(decode.op.stop_strings)] if decode.op.stop_strings else []
        if configured := decode.sampler.stop_strings:
            found.append(Stops(configured, self.text_rules.last_characters(thread.context, max(map(len, configured)))))
        return found

    # ---------------------------------------------------------------------------------------- text

    def ids(self, thread: State, given: str | Sequence[int]) -> list[int]:
        """Token ids of what is to go on at a thread's end."""
        return self.text_rules.encode(given, thread.backwards()) if isinstance(given, str) else list(given)

    def settle(self, thread: State, op: InsertOp | ScoreOp | JoinOp) -> list[int]:
        """The token ids of an op whose turn has come: only now is it known what its text stands behind."""
        op.token_ids = self.ids(thread, op.given)
        op.given = op.token_ids
        return op.token_ids

    # ---------------------------------------------------------------------------------------- for the derived host

    def record(self, parent: State | None, path: tuple[int, ...], role: str) -> State:
        """A new thread's record."""
        raise NotImplementedError

    def sampling(self, overrides: tuple[tuple[str, Any], ...]) -> Sampling:
        """What a decode with these options samples by; ValueError for an unknown one."""
        raise NotImplementedError

    def holds(self, thread: State) -> bool:
        """Whether all of a thread is there to be forked, joined or decoded."""
        return True

    def along(self, thread: State) -> list[State]:
        """Threads that must be held when this one goes on by a token."""
        return [thread]

    def may_fork(self, thread: State) -> bool:
        """Whether a thread's children can begin now."""
        return self.holds(thread)

    def hold_children(self, thread: State, children: Sequence[State], seen: Sequence[tuple[State, int]]) -> None:
        """Children begin with all that a thread holds, then the first tokens of what siblings hold that they see."""

    def hold_joined(self, thread: State, children: Sequence[State]) -> None:
        """What children hold becomes a thread's, behind its own, in order; called before the books tell."""

    def hold_own(self, children: Sequence[State]) -> None:
        """Children are about to be spliced: what they hold must be their own, not a sibling's."""

    def may_take_over(self, thread: State, child: State) -> bool:
        """Whether what a thread has to hold can be had where it becomes its only child as things stand."""
        return True

    def take_over(self, thread: State, child: State) -> None:
        """A thread becomes its only child: it holds what that held."""

    def cut_needs(self, thread: State, length: int) -> list[State]:
        """Threads that must be held before one can be cut to a context length."""
        return []

    def cut(self, thread: State, length: int, what: str) -> None:
        """Cut a thread to a context length; ValueError (it begins with `what`) when more than its own would go."""
        if not thread.begin <= length <= thread.length:
            raise ValueError(
                f"{what}: thread {thread.id} can be cut to a length of {thread.begin} (all but its own tokens) to "
                f"{thread.length}"
            )
        if length == thread.length:
            return
        if seers := thread.seen_beyond(length):
            raise ValueError(
                f"{what}: thread {seers[0].id} sees what thread {thread.id} has written behind {length}; "
                "join or kill it first"
            )
        self.forget(thread, length)
        for child in thread.forks_beyond(length):
            child.severed = True
        if thread.reader is not None and not thread.reader.drop(thread.length - length):
            thread.reader = None  # some of it was told
        thread.cut(length)

    def forget(self, thread: State, length: int) -> None:
        """Give back what a thread holds of its tokens from context length `length` on; called before the books tell."""

    def prepare(self, thread: State, what: str) -> None:
        """A decode or the like is about to begin; raise for a thread that has nothing to go on from."""

    def free(self, thread: State) -> None:
        """Give back all that a thread holds; its tokens stay. Safe twice."""
