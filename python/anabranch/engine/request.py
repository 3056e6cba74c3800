"""One prompt in the engine: its threads, the queue of each, its strategy's tasks and its counts."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from inspect import isgenerator
from math import nan
from typing import Any

from anabranch.engine.costs import Costs
from anabranch.engine.cuts import cut_needs, rewind, truncate
from anabranch.engine.joins import ENGINE_JOINS
from anabranch.engine.narrator import Narrator
from anabranch.engine.running import RunningDecode, RunningScore
from anabranch.engine.sampling import Samplers, random_stream
from anabranch.engine.tasks import Task, Tasks
from anabranch.engine.thread_kv import EngineThread
from anabranch.kv.cache import TreeCache
from anabranch.kv.prefix import PrefixCache
from anabranch.records import events
from anabranch.records.actions import Action
from anabranch.records.joins import JOINS
from anabranch.strategies.api.awaitable import Awaitable
from anabranch.strategies.api.ops import Decode, Ended, ForkOp, InsertOp, JoinOp, Op, ScoreOp, TruncateOp
from anabranch.strategies.api.strategy import Strategy
from anabranch.strategies.api.thread import Thread
from anabranch.strategies.plain import Plain
from anabranch.text.prompts import Text
from anabranch.text.tokens import Stops


class Request:
    """The `Host` of one prompt's threads. Carries out what needs no forward; says what does."""

    def __init__(
        self,
        index: int,
        token_ids: list[int],
        strategy: Strategy,
        seed: int,
        *,
        cache: TreeCache,
        text: Text,
        samplers: Samplers,
        max_new_tokens: int,
        max_total_tokens: int | None,
        logprobs: bool,
        position_limit: int | None = None,
        prefixes: PrefixCache | None = None,
        emit: Callable[[events.Event], None] | None,
        prompt: Any = None,
        template: Mapping[str, Any] | None = None,
    ):
        self.index, self.strategy, self.seed, self.prompt = index, strategy, seed, prompt
        self.order = (0, index)  # among all requests of an engine: who comes first in a shortage (the loop's affair)
        # How a chat ends is said of the caller's own; the rest holds for a strategy's as well.
        own = ("add_generation_prompt", "continue_final_message")
        self._template = {k: v for k, v in (template or {}).items() if k not in own}
        self.cache, self.samplers, self._text = cache, samplers, text
        self.max_new_tokens, self.max_total_tokens = max_new_tokens, max_total_tokens
        self.logprobs, self.narrator = logprobs, Narrator(index, text, emit)
        self.position_limit = position_limit
        self.prefixes, self.epoch = prefixes, 0  # contexts to find and to leave behind, those of one epoch alone
        # Plain decoding ends with a token that nothing follows: like `model.generate`, it needs no position for it.
        self._last_is_free = isinstance(getattr(strategy, "strategy", strategy), Plain)
        self.sequential = bool(getattr(strategy, "sequential", False))
        self.tasks = Tasks(type(strategy).__name__, self.drained)
        self.threads: list[EngineThread] = []
        self._states: dict[Thread, EngineThread] = {}
        self.queued: dict[EngineThread, None] = {}  # threads with something in their queue, in order of arrival
        self.sampled = self.inserted = self.max_concurrency = self.longest_context = 0
        self.malformed_reasons: list[str] = []
        self._asked: EngineThread | None = None  # whose until() is being called
        self.spent = Costs()
        self.started: float | None = None  # when it was handed to the loop
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
        return self.main is not None and self.main.done and not self.trunk.queue

    def critical_path(self) -> int:
        # Run one after another, every token is on the path.
        return (
            self.sampled + self.inserted
            if self.sequential
            else max(self.main.now if self.main is not None else 0, self.trunk.clock)
        )

    def release(self) -> None:
        """Give back every page and end every generator. Safe at any moment, and twice."""
        for thread in self.threads:
            thread.kv.release(self.cache)
            thread.kv.logits = None
        self.tasks.close()

    # ---------------------------------------------------------------------------------------- Host

    def clock(self) -> int:
        if self._asked is not None:  # what an until() asks for comes after the tokens that it has seen
            return self._asked.clock
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

    def state(self, thread: Thread) -> EngineThread:
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

    def children(self, thread: Thread) -> list[Thread]:
        return [child.handle for child in self._states[thread].children]

    def start(self, generator: Generator[Any, Any, Any]) -> Awaitable:
        return self.tasks.start(generator, self.clock())

    def malformed(self, thread: Thread, why: str) -> None:
        self.malformed_reasons.append(f"thread {thread.id}: {why}")

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

    def _make(self, parent: EngineThread | None, role: str, path: tuple[int, ...]) -> EngineThread:
        thread = EngineThread(self, parent, path, role, len(self.threads), random_stream(self.seed, path))
        self._states[thread.handle] = thread
        self.threads.append(thread)
        if role == "fresh" and parent is not None:
            parent.log.append(Action("spawn", children=[thread.id]))
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
            parent.log.append(Action("kill", children=names, mode=fate))
        for state in states:
            self.end(state, fate)

    def end(self, thread: EngineThread, fate: str) -> None:
        """End a thread now, with its children."""
        if not thread.alive:
            return
        thread.reach(self.clock())
        for op in thread.parent.queue if thread.parent is not None else ():
            if isinstance(op, JoinOp) and thread.handle in op.children:  # what would take it back does without it
                op.without(thread.handle)
                op.issued = max(op.issued, thread.clock)
        for child in list(thread.children):
            self.end(child, fate)
        for op in thread.queue:
            if isinstance(op, Decode):
                self._end(thread, op, "killed")
            elif isinstance(op, ForkOp):  # children that never came to be
                for handle in op.children:
                    self.end(self._states[handle], fate)
            op.resolve(None, thread.clock)
        thread.queue.clear()
        self.retire(thread, fate)
        self.narrator.discarded(thread, fate)

    def retire(self, thread: EngineThread, fate: str) -> None:
        """A thread takes nothing more; its pages are free."""
        self.narrator.tell_rest(thread)
        thread.alive, thread.fate = False, fate
        thread.kv.leave(self.cache)
        thread.kv.logits = None
        self._drained(thread)

    # ---------------------------------------------------------------------------------------- the queues

    def advance(self) -> bool:
        """Run the strategy and all queued ops that need no forward, until nothing moves; whether anything did."""
        moved = any_moved = self.tasks.run_ready()
        while True:
            for thread in list(self.queued):
                while thread.queue and self._carry_out(thread, thread.queue[0]):
                    moved = True
                if not thread.queue:
                    self._drained(thread)
            moved = self.tasks.run_ready() or moved
            if not moved:
                return any_moved
            any_moved, moved = True, False

    def _drained(self, thread: EngineThread) -> None:
        self.queued.pop(thread, None)
        waiting, thread.waiting = thread.waiting, []
        for wait in waiting:
            wait.resolve(thread.handle, thread.clock)

    def _carry_out(self, thread: EngineThread, op: Op) -> bool:
        """Do `op`, the first in its thread's queue, if that is possible now."""
        if not thread.born:
            return False  # its parent has yet to fork
        if isinstance(op, Decode):
            return self._begin(thread, op)
        if isinstance(op, ScoreOp):
            return self._score(thread, op)
        if not self._ready(thread, op):
            return False
        thread.reach(op.issued)
        thread.queue.popleft()
        if isinstance(op, InsertOp):
            self.insert(thread, self.settle(thread, op), op.kind)
            if op.kind == "inserted":
                thread.log.append(Action("insert", list(op.token_ids)))
        elif isinstance(op, ForkOp):
            self._fork(thread, op)
        elif isinstance(op, JoinOp):
            self._join(thread, op)
        elif isinstance(op, TruncateOp):
            thread.log.append(Action("truncate", length=op.length))
            truncate(self.cache, thread, op.length, f"truncate: length={op.length}")
        op.resolve(op.children if isinstance(op, ForkOp) else None, thread.clock)
        return True

    def needs(self, thread: EngineThread, op: Op) -> list[EngineThread]:
        """Threads that must be wholly in the cache before `op` can be carried out (or, for a Decode, go on).

        A fork's children are to share the parent's last token, and what a join splices is KV: the token that was
        sampled last has none yet, so it is computed first. That costs one more row in a step that other threads use as
        well, and the row's logits serve children without a header. (Leaving the token to the children instead would
        compute it once per child, and a concat join would then bring it back once per child.)
        """
        if isinstance(op, (ForkOp, Decode, ScoreOp)):
            return [thread]
        if isinstance(op, JoinOp):
            return ENGINE_JOINS[op.mode].needs(thread, op, self.joined(op))
        return cut_needs(thread, op.length) if isinstance(op, TruncateOp) else []

    def joined(self, op: JoinOp) -> list[EngineThread]:
        """The children that a join takes back."""
        return [self._states[child] for child in op.children]

    def waits_for_children(self, op: Op) -> bool:
        """Whether `op` takes back children that still have something to do."""
        return isinstance(op, JoinOp) and any(child.queue or not child.born for child in self.joined(op))

    def _ready(self, thread: EngineThread, op: Op) -> bool:
        if self.waits_for_children(op):
            return False
        if isinstance(op, ForkOp) and not thread.kv.has_logits and rewind(self.cache, thread):
            return False
        return all(t.kv.in_cache for t in self.needs(thread, op))

    # ---------------------------------------------------------------------------------------- each op

    def insert(self, thread: EngineThread, token_ids: list[int], kind: str) -> None:
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

    def _join(self, thread: EngineThread, op: JoinOp) -> None:
        children, names = self.joined(op), [child.id for child in op.children]
        for child in children:
            thread.reach(child.clock)
            thread.path_sampled = max(thread.path_sampled, child.path_sampled)
        ENGINE_JOINS[op.mode].carry_out(self, thread, op, children)
        if children:
            headers = [None if h is None else self.ids(thread, h) for h in op.headers]
            thread.log.append(JOINS[op.mode].recorded(names, op.token_ids, op.keep, headers))
            self.narrator.joined(thread, names, op.mode)
        else:  # all were killed while it waited for them
            if op.keep is not None:
                thread.log.append(Action("truncate", length=op.keep))
            if op.token_ids:
                thread.log.append(Action("insert", op.token_ids))

    def _fork(self, thread: EngineThread, op: ForkOp) -> None:
        children = [self._states[child] for child in op.children]
        context = thread.context  # one tuple for all children
        branches = self.cache.fork(thread.kv.held, len(children))
        thread.blocks.append((thread.length, children))
        thread.spawned_at = -1
        headers: list[list[int] | None] = []
        for child in children:
            header = child.queue[0] if child.queue else None
            if isinstance(header, InsertOp) and header.header:
                header.token_ids = self.ids(thread, header.given)
                header.given = header.token_ids
                child.header_length = len(header.token_ids)
                headers.append(list(header.token_ids))
            else:
                headers.append(None)
        thread.log.append(Action("fork", children=[child.id for child in children], headers=headers))
        for child, branch in zip(children, branches, strict=True):
            thread.branch_off(child, context)
            child.kv.branch, child.kv.logits, child.kv.logits_at = branch, thread.kv.logits, thread.kv.logits_at
            if not child.alive:  # killed before it came to be
                child.kv.release(self.cache)
        self.narrator.forked(thread, [child.id for child in children])

    # ---------------------------------------------------------------------------------------- decoding

    def _begin(self, thread: EngineThread, op: Decode) -> bool:
        """Settle a decode that has come to the head of its queue; True when it ends at once."""
        decode = thread.decode
        if decode is None or decode.op is not op:
            left = self.max_new_tokens - thread.path_sampled
            limit = left if op.max_new_tokens is None else min(left, op.max_new_tokens)
            if self.position_limit is not None:
                self.check_position(thread, thread.position - 1)
                limit = min(limit, self.position_limit - thread.position + self._last_is_free)
            sampler = self.samplers.get(op.sampling)
            decode = RunningDecode(op, limit, sampler, self._text.reader(thread.backwards()))
            decode.stops = self._stops(thread, decode)
            thread.decode = decode
            thread.reach(op.issued)
        if decode.limit <= 0 or self._out_of_budget():
            thread.queue.popleft()
            self._end(thread, op, "length" if decode.limit <= 0 else "budget")
            return True
        self._need_logits(thread, "decode")
        return False

    def check_position(self, thread: EngineThread, last: int) -> None:
        """Raise for a thread with tokens past the positions which the model has embeddings for."""
        if self.position_limit is not None and last >= self.position_limit:
            raise ValueError(
                f"thread {thread.id}: its tokens reach position {last}, but the model has embeddings for "
                f"{self.position_limit} positions (0 … {self.position_limit - 1}); insert, join or spawn less, use a "
                "smaller max_new_tokens, or a model with a longer context"
            )

    def _need_logits(self, thread: EngineThread, what: str) -> None:
        """Have the next token's logits computed where they are missing."""
        if thread.kv.in_cache and not thread.kv.has_logits and not rewind(self.cache, thread):
            raise ValueError(
                f"{what}: thread {thread.id} has nothing to go on from: its last tokens are "
                f"{'joined siblings' if thread.segments else 'its parents'}; insert() at least one token first"
            )

    def _score(self, thread: EngineThread, op: ScoreOp) -> bool:
        """Append a thread's given tokens, or end the scoring once all their log-probabilities are there."""
        if thread.score is None and self.settle(thread, op):
            self._need_logits(thread, "score")
            if not (thread.kv.in_cache and thread.kv.has_logits):
                return False
            thread.reach(op.issued)
            assert thread.kv.logits is not None
            rows, at = thread.kv.logits
            thread.score = RunningScore(op, thread.length, [None] * len(op.token_ids))
            thread.score.logprobs[0] = float(rows[at].float().log_softmax(-1)[op.token_ids[0]])
            thread.log.append(Action("sample" if op.kind == "sampled" else "insert", list(op.token_ids)))
            position = thread.position
            thread.append(op.token_ids, op.kind, logprobs=[nan] * len(op.token_ids))
            if op.kind == "sampled":
                self.sampled += len(op.token_ids)
                thread.path_sampled += len(op.token_ids)
            else:
                self.inserted += len(op.token_ids)
            self.narrator.tell(thread, op.token_ids, position, op.kind != "sampled")
        wanted = thread.score.logprobs if thread.score is not None else []
        logprobs = [logprob for logprob in wanted if logprob is not None]
        if len(logprobs) < len(wanted):
            return False
        thread.queue.popleft()
        thread.score = None
        if logprobs:
            kept = thread.segments[-1].logprobs
            assert kept is not None
            kept[-len(logprobs) :] = logprobs
        op.resolve(tuple(logprobs), thread.clock)
        return True

    def _out_of_budget(self) -> bool:
        return self.max_total_tokens is not None and self.sampled >= self.max_total_tokens

    def record_token(self, thread: EngineThread, token: int, logprob: float | None = None) -> None:
        """A token was sampled for a thread's decode; end the decode where that ends it."""
        decode = thread.running
        op, sampler, position = decode.op, decode.sampler, thread.position
        thread.append([token], "sampled", logprobs=None if logprob is None else [logprob])
        if not op.token_ids:
            thread.log.append(Action("sample", op.token_ids))  # the list itself, which grows
        op.token_ids.append(token)
        thread.path_sampled += 1
        self.sampled += 1
        self.longest_context = max(self.longest_context, thread.length)
        self.narrator.tell(thread, [token], position, False)
        reason: str | None = None
        stop: str | int | None = None
        if token in op.stop_ids:
            reason, stop = "stop", token
        elif token in sampler.eos_ids:
            reason = "eos"
        elif (stop := decode.stop_string()) is not None or sampler.stops(lambda: [*thread.prefix, *thread.own]):
            reason = "stop"
        elif self._until(thread, op):
            reason = "until"
        elif len(op.token_ids) >= decode.limit:
            reason = "length"
        elif self._out_of_budget():
            reason = "budget"
        if reason is not None and not op.done:  # until() may have killed this thread
            thread.queue.popleft()
            self._end(thread, op, reason, stop)
            if not thread.queue:
                self._drained(thread)

    def _until(self, thread: EngineThread, op: Decode) -> bool:
        if op.until is None:
            return False
        self._asked = thread
        try:
            return bool(op.until(op))
        finally:
            self._asked = None

    def _stops(self, thread: EngineThread, decode: RunningDecode) -> list[Stops]:
        """What looks for stop strings: the decode's own in what it samples, the config's in all of the thread."""
        found = [Stops(decode.op.stop_strings)] if decode.op.stop_strings else []
        if configured := decode.sampler.stop_strings:
            found.append(Stops(configured, self._text.last_characters(thread.context, max(map(len, configured)))))
        return found

    def _end(self, thread: EngineThread, op: Decode, reason: str, stop: str | int | None = None) -> None:
        thread.ended = Ended(reason, tuple(op.token_ids), self.decoded_text(op), stop, tuple(op.stats))
        op.resolve(thread.ended, thread.clock)

    # ---------------------------------------------------------------------------------------- text

    def ids(self, thread: EngineThread, given: str | Sequence[int]) -> list[int]:
        """Token ids of what is to go on at a thread's end."""
        return self._text.encode(given, thread.backwards()) if isinstance(given, str) else list(given)

    def settle(self, thread: EngineThread, op: InsertOp | ScoreOp | JoinOp) -> list[int]:
        """The token ids of an op whose turn has come: only now is it known what its text stands behind."""
        op.token_ids = self.ids(thread, op.given)
        op.given = op.token_ids
        return op.token_ids
