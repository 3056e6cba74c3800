"""One prompt in the engine: its threads, the queue of each, its strategy's tasks and its counts."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from inspect import isgenerator
from math import nan
from typing import Any

from anabranch.engine.costs import Clock
from anabranch.engine.joins import adoptable, built_on, join, rewind, splits_joined, truncate
from anabranch.engine.sampling import Samplers, random_stream
from anabranch.engine.tasks import Task, Tasks
from anabranch.engine.thread_state import Live, append
from anabranch.records import events
from anabranch.records.actions import Action
from anabranch.strategies.api.awaitable import Awaitable
from anabranch.strategies.api.ops import Decode, Ended, Fork, Insert, Join, Op, Score, Truncate
from anabranch.strategies.api.strategy import Strategy
from anabranch.strategies.api.thread import Thread
from anabranch.strategies.plain import Plain
from anabranch.text.prompts import Text
from anabranch.text.tokens import Reader, Stops


class Request:
    """The `Host` of one prompt's threads. Carries out what needs no forward; says what does."""

    def __init__(
        self,
        index: int,
        token_ids: list[int],
        strategy: Strategy,
        seed: int,
        *,
        cache: Any,
        text: Text,
        samplers: Samplers,
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
        self.cache, self.samplers, self._text = cache, samplers, text
        self.max_new_tokens, self.max_total_tokens = max_new_tokens, max_total_tokens
        self.logprobs, self.emit = logprobs, emit
        self.position_limit = position_limit
        # Plain decoding ends with a token that nothing follows: like `model.generate`, it needs no position for it.
        self._last_is_free = isinstance(getattr(strategy, "strategy", strategy), Plain)
        self.sequential = bool(getattr(strategy, "sequential", False))
        self.tasks = Tasks(type(strategy).__name__)
        self.threads: list[Thread] = []
        self.queued: dict[Thread, None] = {}  # threads with something in their queue, in order of arrival
        self.sampled = self.inserted = self.max_concurrency = self.longest_context = 0
        self.malformed_reasons: list[str] = []
        self._asked: Thread | None = None  # whose until() is being called
        self.spent = Clock()
        self.answers: Any = None
        self.started: float | None = None
        self.finished = False
        self.trunk = self._make(None, "trunk", (0,))
        self.trunk._prompt_length = len(token_ids)
        append(self.trunk, token_ids, "prompt")
        self.trunk._depth = 0  # the prompt is not part of the answer's critical path
        self.main: Task | None = None

    # ---------------------------------------------------------------------------------------- life

    def start_strategy(self) -> None:
        self.started = time.perf_counter()
        running = self.strategy.run(self.trunk)
        if isgenerator(running):
            self.main = self.tasks.start(running, 0)
        else:  # a run() without any yield has already queued all it wants
            self.main = Task(iter(()), 0)  # type: ignore[arg-type]
            self.main._resolve(running, 0)

    @property
    def over(self) -> bool:
        return self.main is not None and self.main.done and not self.trunk._ops

    def critical_path(self) -> int:
        assert self.main is not None
        # Run one after another, every token is on the path.
        return self.sampled + self.inserted if self.sequential else max(self.main.now, self.trunk._depth)

    def release(self) -> None:
        """Give back every page and end every generator. Safe at any moment, and twice."""
        for thread in self.threads:
            thread._live.release(self.cache)
            thread._live.scores = None
        self.tasks.close()

    # ---------------------------------------------------------------------------------------- Host

    def clock(self) -> int:
        if self._asked is not None:  # what an until() asks for comes after the tokens that it has seen
            return self._asked._depth
        return self.tasks.current.now if self.tasks.current is not None else 0

    def encode(self, text: str, backwards: Iterable[int] | None = None) -> list[int]:
        return self._text.encode(text, backwards)

    def encode_prompt(self, prompt: Any) -> list[int]:
        chat = not isinstance(prompt, str) and len(prompt) > 0 and isinstance(prompt[0], Mapping)
        return self._text.prompt_ids(prompt, template=self._template if chat else None)

    def text(self, token_ids: Sequence[int], backwards: Iterable[int]) -> str | None:
        return self._text.text(token_ids, backwards)

    def tag_ids(self, tags: Sequence[str]) -> dict[str, int]:
        return self._text.tag_ids(tags)

    def blank_at_end(self, token_ids: Sequence[int]) -> int:
        return self._text.blank_at_end(token_ids)

    def check_ids(self, token_ids: Iterable[int], name: str) -> list[int]:
        return self._text.check_ids(token_ids, name)

    def check_sampling(self, sampling: Mapping[str, Any] | None) -> None:
        self.samplers.get(tuple(sorted((sampling or {}).items())))

    def submit(self, op: Op) -> None:
        self.queued[op.thread] = None

    def start(self, generator: Generator[Any, Any, Any]) -> Awaitable:
        return self.tasks.start(generator, self.clock())

    def malformed(self, thread: Thread, why: str) -> None:
        self.malformed_reasons.append(f"thread {thread.id}: {why}")

    def new_thread(self, parent: Thread, role: str) -> Thread:
        path = (*parent.path, parent._next_child)
        parent._next_child += 1
        return self._make(parent, role, path)

    def _make(self, parent: Thread | None, role: str, path: tuple[int, ...]) -> Thread:
        thread = Thread(self, parent, path, role)
        thread._live = Live(thread, len(self.threads), random_stream(self.seed, path))
        thread._live.born = role != "fork"  # a fork begins when its parent gets to the Fork in its queue
        self.threads.append(thread)
        if role == "fresh" and parent is not None:
            parent._log.append(Action("spawn", children=[thread.id]))
            if parent._spawned_at == self.tasks.turn:
                parent._forks[-1][1].append(thread)  # spawned in one go: one block
            else:
                parent._forks.append((parent.length, [thread]))
                parent._spawned_at = self.tasks.turn
            thread._depth, thread._path_sampled = self.clock(), parent._path_sampled
            if self.emit:
                self.emit(events.Fork(self.index, parent.id, (thread.id,), "fresh"))
        return thread

    def kill(self, thread: Thread, fate: str) -> None:
        if not thread.alive:
            return
        thread._depth = max(thread._depth, self.clock())
        for op in thread.parent._ops if thread.parent is not None else ():
            if isinstance(op, Join) and thread in op.kids:  # what was queued to take it back does without it
                del op.headers[op.kids.index(thread)]
                op.kids.remove(thread)
                op.issued = max(op.issued, thread._depth)
        for _, children in thread._forks:
            for child in children:
                self.kill(child, fate)
        for op in thread._ops:
            if isinstance(op, Decode):
                self._end(op, "killed")
            elif isinstance(op, Fork):  # children that never came to be
                for child in op.kids:
                    self.kill(child, fate)
            op._resolve(None, thread._depth)
        thread._ops.clear()
        self.retire(thread, fate)
        if self.emit:
            self.emit(events.Discard(self.index, thread.id, fate))

    def retire(self, thread: Thread, fate: str) -> None:
        self.tell_rest(thread)
        thread.alive, thread.fate = False, fate
        thread._live.release(self.cache)
        thread._live.scores = None
        self._drained(thread)

    # ---------------------------------------------------------------------------------------- the queues

    def advance(self) -> bool:
        """Run the strategy and all queued ops that need no forward, until nothing moves; whether anything did."""
        moved = any_moved = self.tasks.run_ready()
        while True:
            for thread in list(self.queued):
                while thread._ops and self._carry_out(thread._ops[0]):
                    moved = True
                if not thread._ops:
                    self._drained(thread)
            moved = self.tasks.run_ready() or moved
            if not moved:
                return any_moved
            any_moved, moved = True, False

    def _drained(self, thread: Thread) -> None:
        self.queued.pop(thread, None)
        waiting, thread._waiting = thread._waiting, []
        for wait in waiting:
            wait._resolve(thread, thread._depth)

    def _carry_out(self, op: Op) -> bool:
        """Do `op`, the first in its thread's queue, if that is possible now."""
        thread = op.thread
        if not thread._live.born:
            return False  # its parent has yet to fork
        if isinstance(op, Decode):
            return self._begin(op)
        if isinstance(op, Score):
            return self._score(op)
        if not self._ready(op):
            return False
        thread._depth = max(thread._depth, op.issued)
        thread._ops.popleft()
        if isinstance(op, Insert):
            self.insert(thread, self.settle(op), op.kind)
            if op.kind == "inserted":
                thread._log.append(Action("insert", list(op.token_ids)))
        elif isinstance(op, Fork):
            self._fork(op)
        elif isinstance(op, Join):
            join(self, op)
        elif isinstance(op, Truncate):
            thread._log.append(Action("truncate", length=op.length))
            truncate(self.cache, thread, op.length, f"truncate: length={op.length}")
        op._resolve(op.kids if isinstance(op, Fork) else None, thread._depth)
        return True

    def needs(self, op: Op) -> list[Thread]:
        """Threads that must be wholly in the cache before `op` can be carried out (or, for a Decode, go on).

        A fork's children are to share the parent's last token, and what a join splices is KV: the token that was
        sampled last has none yet, so it is computed first. That costs one more row in a step that other threads use as
        well, and the row's scores serve children without a header. (Leaving the token to the children instead would
        compute it once a child, and a concat join would then bring it back once a child.)
        """
        thread = op.thread
        if isinstance(op, (Fork, Decode, Score)):
            return [thread]
        if isinstance(op, Join) and op.kids and op.mode in ("concat", "reprefill") and not adoptable(op):
            if op.mode == "reprefill" and op.kids[0].role == "fresh":
                return []  # nothing of it is to be spliced
            return [thread, *(op.kids if op.mode == "concat" else op.kids[:1])]
        length = op.length if isinstance(op, Truncate) else op.keep if isinstance(op, Join) else None
        if length is not None and any(kid._live.branch is None for kid in built_on(thread, length)):
            return [thread]  # a child that is not in the cache takes what it shares from here, before that is cut
        if length is not None and not thread._live.opened and splits_joined(thread, length):
            return [thread]  # half of what a child wrote cannot be computed again
        return []

    def _ready(self, op: Op) -> bool:
        if isinstance(op, Join) and any(kid._ops or not kid._live.born for kid in op.kids):
            return False
        if isinstance(op, Fork) and not op.thread._live.has_scores and rewind(self.cache, op.thread):
            return False
        return all(t._live.in_cache for t in self.needs(op))

    # ---------------------------------------------------------------------------------------- each op

    def insert(self, thread: Thread, token_ids: list[int], kind: str, source: str | None = None) -> None:
        if not token_ids:
            return
        position, depth = thread._position, thread._depth
        append(thread, token_ids, kind, source)
        if kind == "inserted":
            self.inserted += len(token_ids)
        else:
            thread._depth = depth  # a fresh thread's prompt, like the trunk's, is not part of the answer
        if kind == "prompt":
            thread._prompt_length = len(token_ids)
        self._tell(thread, token_ids, position, kind != "sampled")

    def _fork(self, op: Fork) -> None:
        thread, live = op.thread, op.thread._live
        context = (*thread._prefix, *thread._own)  # one tuple for all children
        branches = self.cache.fork(live.branch, len(op.kids))
        thread._forks.append((thread.length, op.kids))
        thread._spawned_at = -1
        headers: list[list[int] | None] = []
        for kid in op.kids:
            header = kid._ops[0] if kid._ops and isinstance(kid._ops[0], Insert) and kid._ops[0].header else None
            if header is not None:
                header.token_ids = header.given = self.ids(thread, header.given)
                kid._header_length = len(header.token_ids)
            headers.append(None if header is None else list(header.token_ids))
        thread._log.append(Action("fork", children=[kid.id for kid in op.kids], headers=headers))
        for kid, branch in zip(op.kids, branches, strict=True):
            kid._prefix, kid._depth, kid._path_sampled = context, thread._depth, thread._path_sampled
            kid._start = kid._position = thread._position
            kid._live.branch, kid._live.scores, kid._live.scores_at = branch, live.scores, live.scores_at
            kid._live.born = True
            if not kid.alive:  # killed before it came to be
                kid._live.release(self.cache)
        if self.emit:
            self.emit(events.Fork(self.index, thread.id, tuple(k.id for k in op.kids)))

    # ---------------------------------------------------------------------------------------- decoding

    def _begin(self, op: Decode) -> bool:
        """Settle a decode that has come to the head of its queue; True when it ends at once."""
        thread = op.thread
        if op._limit is None:
            left = self.max_new_tokens - thread._path_sampled
            op._limit = left if op.max_new_tokens is None else min(left, op.max_new_tokens)
            if self.position_limit is not None:
                self.check_position(thread, thread._position - 1)
                op._limit = min(op._limit, self.position_limit - thread._position + self._last_is_free)
            op._sampler = self.samplers.get(op.sampling)
            op._reader = self._text.reader(thread._backwards())
            op._stops = self._stops(op)
            thread._depth = max(thread._depth, op.issued)
        if op._limit <= 0 or self._out_of_budget():
            thread._ops.popleft()
            self._end(op, "length" if op._limit <= 0 else "budget")
            return True
        self._need_scores(thread, "decode")
        return False

    def check_position(self, thread: Thread, last: int) -> None:
        """Raise for a thread with tokens past the positions which the model has embeddings for."""
        if self.position_limit is not None and last >= self.position_limit:
            raise ValueError(
                f"thread {thread.id}: its tokens reach position {last}, but the model has embeddings for "
                f"{self.position_limit} positions (0 … {self.position_limit - 1}); insert, join or spawn less, use a "
                "smaller max_new_tokens, or a model with a longer context"
            )

    def _need_scores(self, thread: Thread, what: str) -> None:
        """See to it that the next token's scores will be computed where they are missing."""
        live = thread._live
        if live.in_cache and not live.has_scores and not rewind(self.cache, thread):
            raise ValueError(
                f"{what}: thread {thread.id} has nothing to go on from: its last tokens are "
                f"{'joined siblings' if thread._segments else 'its parents'}; insert() at least one token first"
            )

    def _score(self, op: Score) -> bool:
        """Bring a thread's given tokens on their way, or see whether all their scores are there by now."""
        thread, live = op.thread, op.thread._live
        if op.begin is None and self.settle(op):
            self._need_scores(thread, "score")
            if not (live.in_cache and live.has_scores):
                return False
            thread._depth = max(thread._depth, op.issued)
            op.logprobs = [None] * len(op.token_ids)
            rows, at = live.scores
            op.begin, op.logprobs[0] = thread.length, float(rows[at].float().log_softmax(-1)[op.token_ids[0]])
            thread._log.append(Action("sample" if op.kind == "sampled" else "insert", list(op.token_ids)))
            position = thread._position
            append(thread, op.token_ids, op.kind, logprobs=[nan] * len(op.token_ids))
            if op.kind == "sampled":
                self.sampled += len(op.token_ids)
                thread._path_sampled += len(op.token_ids)
            else:
                self.inserted += len(op.token_ids)
            self._tell(thread, op.token_ids, position, op.kind != "sampled")
        logprobs = [logprob for logprob in op.logprobs if logprob is not None]
        if len(logprobs) < len(op.logprobs):
            return False
        thread._ops.popleft()
        if logprobs:
            thread._segments[-1].logprobs[-len(logprobs) :] = logprobs  # type: ignore[index]
        op._resolve(tuple(logprobs), thread._depth)
        return True

    def _out_of_budget(self) -> bool:
        return self.max_total_tokens is not None and self.sampled >= self.max_total_tokens

    def took(self, op: Decode, token: int, logprob: float | None = None) -> None:
        """A token was sampled for `op`: book it, and see whether that ends it."""
        thread = op.thread
        position = thread._position
        append(thread, [token], "sampled", logprobs=None if logprob is None else [logprob])
        if not op.token_ids:
            thread._log.append(Action("sample", op.token_ids))  # the list itself, which grows
        op.token_ids.append(token)
        thread._path_sampled += 1
        self.sampled += 1
        self.longest_context = max(self.longest_context, thread.length)
        self._tell(thread, [token], position, False)
        sampler = op._sampler
        reason: str | None = None
        stop: str | int | None = None
        if token in op.stop_ids:
            reason, stop = "stop", token
        elif token in sampler.eos_ids:
            reason = "eos"
        elif (stop := self._stop_string(op)) is not None or sampler.stops(lambda: [*thread._prefix, *thread._own]):
            reason = "stop"
        elif self._until(op):
            reason = "until"
        elif len(op.token_ids) >= (op._limit or 0):
            reason = "length"
        elif self._out_of_budget():
            reason = "budget"
        if reason is not None and not op.done:  # until() may have killed this thread
            thread._ops.popleft()
            self._end(op, reason, stop)
            if not thread._ops:
                self._drained(thread)

    def _until(self, op: Decode) -> bool:
        if op.until is None:
            return False
        self._asked = op.thread
        try:
            return bool(op.until(op))
        finally:
            self._asked = None

    def _stops(self, op: Decode) -> list[Stops]:
        """What looks for stop strings: the decode's own in what it samples, the config's in all of the thread."""
        found = [Stops(op.stop_strings)] if op.stop_strings else []
        if configured := op._sampler.stop_strings:
            thread = op.thread
            front = self._text.last_characters([*thread._prefix, *thread._own], max(map(len, configured)))
            found.append(Stops(configured, front))
        return found

    def _stop_string(self, op: Decode) -> str | None:
        if not op._stops:
            return None
        told, held = op._read(), op._reader.whole()
        return next((found for stops in op._stops if (found := stops.find(told, held)) is not None), None)

    def _end(self, op: Decode, reason: str, stop: str | int | None = None) -> None:
        thread = op.thread
        thread.ended = Ended(reason, tuple(op.token_ids), op.text, stop, tuple(op.stats))
        op._resolve(thread.ended, thread._depth)

    # ---------------------------------------------------------------------------------------- text

    def ids(self, thread: Thread, given: str | Sequence[int]) -> list[int]:
        """Token ids of what is to go on at a thread's end."""
        return self._text.encode(given, thread._backwards()) if isinstance(given, str) else list(given)

    def settle(self, op: Insert | Score | Join) -> list[int]:
        """The token ids of an op whose turn has come: only now is it known what its text stands behind."""
        op.token_ids = op.given = self.ids(op.thread, op.given)
        return op.token_ids

    def _tell(self, thread: Thread, token_ids: list[int], position: int, inserted: bool) -> None:
        if not self.emit:
            return
        live, length = thread._live, thread.length - len(token_ids)
        if length < thread._prompt_length:  # a fresh thread's prompt: a text of its own
            text = self._text.text(token_ids)
        else:
            if live.reader is None:
                live.reader = self._text.reader(thread._backwards(length))
            text = None if live.reader is None else live.reader.push(token_ids)
        self.emit(events.Token(self.index, thread.id, tuple(token_ids), text, position, inserted))

    def tell_held(self, thread: Thread, length: int) -> None:
        """Before children's tokens, which begin at context length `length`: tell what was held back until now."""
        reader: Reader | None = thread._live.reader
        if self.emit and reader is not None and reader.holds and thread.length > length:
            joined = thread._own[length - thread.length :]
            text, theirs = reader.push(joined) + reader.rest(), self._text.text(joined, thread._backwards(length)) or ""
            if held := text.removesuffix(theirs):
                self.emit(events.Token(self.index, thread.id, (), held, thread._position))
        thread._live.reader = None

    def tell_rest(self, thread: Thread) -> None:
        """At a thread's end: tell what was held back, which nothing completes any more."""
        reader: Reader | None = thread._live.reader
        if self.emit and reader is not None and (held := reader.rest()):
            self.emit(events.Token(self.index, thread.id, (), held, thread._position))
        thread._live.reader = None
