"""One prompt over a server: the books of its threads, and the requests that are under way for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from transformers import GenerationConfig

from anabranch.errors import RemoteError
from anabranch.remote import options
from anabranch.remote.dialects import Delta, Sampled
from anabranch.remote.score import RemoteScore
from anabranch.strategies.api.ops import Decode, Ended, ForkOp, JoinOp, Op, ScoreOp, SkipOp, TokenStats
from anabranch.threads.books import Books
from anabranch.threads.ops import HOST_OPS, record_token
from anabranch.threads.ops.decode import end
from anabranch.threads.state import ThreadState

if TYPE_CHECKING:
    from anabranch.remote.engine import RemoteEngine


_NO_SPLICE = (
    "join mode='concat': a server keeps no KV that could be spliced, so siblings cannot stay blind to one another; use "
    "mode='reprefill' or 'summary', a local Engine, or another strategy"
)


class RemoteStats(TokenStats):
    """What a server tells of one sampled token: no entropy, which needs the whole distribution."""

    @property
    def entropy(self) -> float:
        raise RemoteError("stats: a server does not tell the entropy of a distribution; use a local Engine")


@dataclass(eq=False)
class Work:
    """A request to the server for the op at the head of a thread's queue."""

    op: Op
    future: Future[Any] | None = None
    broken: int = 0  # how often its connection was lost
    cached: int = 0  # tokens of its prompt that the server had in its prefix cache

    def cancel(self) -> None:
        """Close its connection, which ends the work on the server."""
        if self.future is not None:
            self.future.cancel()


class RemoteThread(ThreadState["RemoteThread"]):
    """One thread's record; all that it holds are its tokens."""

    def __init__(self, request: RemoteRequest, parent: RemoteThread | None, path: tuple[int, ...], role: str):
        super().__init__(request, parent, path, role)
        self.work: Work | None = None


class RemoteRequest(Books[RemoteThread]):
    """The `Host` of one prompt's threads; decodes and scores are sent to the server."""

    ops: ClassVar = {**HOST_OPS, ScoreOp: RemoteScore()}

    def __init__(self, *args: Any, engine: RemoteEngine, config: GenerationConfig, **kwargs: Any):
        self.engine, self.config = engine, config
        self.cached_tokens = 0
        self.draining: set[Work] = set()  # decodes that are done, of which the server has yet to say how it ended them
        self._post: Callable[[Any], None] = lambda message: None
        super().__init__(*args, **kwargs)

    def listen(self, post: Callable[[Any], None]) -> None:
        """`post` takes a callable that goes on with what a server has answered, from whatever Python thread."""
        self._post = post

    # ---------------------------------------------------------------------------------------- Books

    def record(self, parent: RemoteThread | None, path: tuple[int, ...], role: str) -> RemoteThread:
        return RemoteThread(self, parent, path, role)

    def sampling(self, overrides: tuple[tuple[str, Any], ...]) -> options.RemoteSampling:
        return options.sampling(self.config, overrides, self.engine.server.dialect.fields)

    def submit(self, op: Op) -> None:
        if type(op) not in self.ops:
            name = type(op).__name__.removesuffix("Op").lower()
            raise ValueError(f"{name}: a server has no request for it; use a local Engine, or another strategy")
        if isinstance(op, JoinOp) and op.mode == "concat" and len(op.children) > 1:
            raise ValueError(_NO_SPLICE)
        if isinstance(op, SkipOp) or (isinstance(op, ForkOp) and (op.sees or op.apart or op.segments)):
            raise ValueError(
                "skip, and fork with sees, apart or segments: a server gives tokens their own positions and shows each "
                "all before it; use a local Engine, or another strategy"
            )
        if isinstance(op, ScoreOp) and not self.engine.server.dialect.scores:
            raise ValueError(
                f"score: {self.engine.server.dialect.name} does not tell the log-probabilities of given tokens; use "
                "vLLM or SGLang, or a local Engine"
            )
        super().submit(op)

    def hold_joined(self, thread: RemoteThread, children: Sequence[RemoteThread]) -> None:
        if len(children) > 1 or not thread.goes_on_as(children[0]):  # one that goes on where the thread stands may stay
            raise ValueError(_NO_SPLICE)

    def free(self, thread: RemoteThread) -> None:
        work, thread.work = thread.work, None
        if work is not None:
            work.cancel()

    def release(self) -> None:
        super().release()
        for work in self.draining:
            work.cancel()
        self.draining.clear()

    # ---------------------------------------------------------------------------------------- requests

    def begin_decodes(self) -> None:
        """Ask the server for the tokens of each decode that has come to the head of its queue."""
        running = 0
        for thread in self.decodable():
            decode = thread.decode
            if decode is None or decode.op is not thread.queue[0]:
                continue
            running += 1
            if thread.work is None or thread.work.op is not decode.op:
                thread.work = Work(decode.op)
                self._ask(thread, decode.op, thread.work)
        self.max_concurrency = max(self.max_concurrency, running)

    @property
    def underway(self) -> bool:
        """Whether the server is asked for anything."""
        return bool(self.draining) or any(thread.work is not None for thread in self.threads)

    def _ask(self, thread: RemoteThread, op: Decode, work: Work) -> None:
        """Ask for the rest of a thread's decode, behind what it has."""
        decode, server = thread.running, self.engine.server
        top = None if op.topk is None and not self.logprobs else (op.topk or 0)
        words = np.random.SeedSequence(entropy=self.seed, spawn_key=(*thread.path, thread.length))
        asked = Sampled(
            server.model,
            thread.context,
            decode.limit - len(op.token_ids),
            sorted(op.stop_ids | decode.sampler.eos_ids),
            dict(decode.sampler.fields),
            int(words.generate_state(1)[0]) & 0x7FFFFFFF,
            top,
        )
        payload = server.dialect.decode(asked)
        work.future = self.engine.spawn(self._stream(thread, op, work, payload, thread.length))

    async def _stream(
        self, thread: RemoteThread, op: Decode, work: Work, payload: dict[str, Any], prompt_tokens: int
    ) -> None:
        engine = self.engine
        last = Delta()
        try:
            async with engine.turns():
                async for event in engine.connection.events(engine.decode_url, payload):
                    delta = engine.server.dialect.delta(event)
                    _check(delta, engine.server.model, prompt_tokens)
                    last.finished = delta.finished or last.finished
                    last.stop = delta.stop if delta.stop is not None else last.stop
                    self._post(lambda delta=delta: self._take(thread, op, work, delta))
            if last.finished is None:
                raise ConnectionError(f"{engine.decode_url}: the stream ended before the answer did")
            self._post(lambda: self._over(thread, op, work, last))
        except ConnectionError as error:
            broken = error
            self._post(lambda: self._broken(thread, op, work, broken))
        except Exception as error:
            failed = error
            self._post(lambda: self._failed(thread, work, failed))

    def _take(self, thread: RemoteThread, op: Decode, work: Work, delta: Delta) -> None:
        """Tokens have come."""
        if delta.cached_tokens:
            self.cached_tokens += delta.cached_tokens - work.cached
            work.cached = delta.cached_tokens
        for i, token in enumerate(delta.token_ids):
            if thread.work is not work:
                return  # the thread has left, or wants no more
            self._token(thread, op, token, delta, i)
            if op.done and thread.work is work:
                self._ended(thread, op, work)

    def _token(self, thread: RemoteThread, op: Decode, token: int, delta: Delta, i: int) -> None:
        logprob = delta.logprobs[i] if i < len(delta.logprobs) else None
        if (op.topk is not None or self.logprobs) and logprob is None:
            raise RemoteError("the server sent a token without its log-probability, which was asked for")
        if op.topk is not None and logprob is not None:
            best = delta.top_logprobs[i][: op.topk] if i < len(delta.top_logprobs) else []
            mean = sum(best) / len(best) if best else logprob
            op.stats.append(RemoteStats(logprob, float("nan"), mean))
        record_token(self, thread, token, logprob if self.logprobs else None)

    def _ended(self, thread: RemoteThread, op: Decode, work: Work) -> None:
        """Its last token has come. A server that ends there by itself has yet to tell what it read and cached."""
        ended: Ended = op.value
        by_id = ended.reason == "eos" or isinstance(ended.stop, int)
        if ended.reason == "length" or (by_id and self.engine.server.dialect.stop_ids):
            thread.work = None
            self.draining.add(work)
        else:
            self.free(thread)

    def _over(self, thread: RemoteThread, op: Decode, work: Work, last: Delta) -> None:
        """The server has ended a decode."""
        self.draining.discard(work)
        if thread.work is not work:
            return
        thread.work = None
        decode = thread.running
        ends = op.stop_ids | decode.sampler.eos_ids
        missing = last.stop
        if last.finished == "stop" and missing is None and decode.sampler.eos_ids:
            missing = min(decode.sampler.eos_ids)  # a server that keeps the EOS to itself
        if last.finished == "stop" and missing in ends:
            assert missing is not None
            if op.topk is not None or self.logprobs:
                raise RemoteError("the server keeps the token that ended a decode, and its log-probability, to itself")
            record_token(self, thread, missing)
        if not op.done:
            if last.finished not in ("length", "stop"):
                raise RemoteError(f"the server ended a decode with {last.finished!r}")
            thread.queue.popleft()
            end(self, thread, op, last.finished)
            if not thread.queue:
                self.emptied(thread)

    def _broken(self, thread: RemoteThread, op: Decode, work: Work, error: Exception) -> None:
        """The connection was lost in the middle: ask for the rest."""
        self.draining.discard(work)
        if thread.work is not work:
            return
        work.broken += 1
        if work.broken > self.engine.connection.retries:
            times = work.broken
            raise RemoteError(f"the connection was lost {times} times ({error}); check the server") from error
        self._ask(thread, op, work)

    def _failed(self, thread: RemoteThread, work: Work, error: Exception) -> None:
        if thread.work is work or work in self.draining:
            raise error

    # ---------------------------------------------------------------------------------------- scores

    def ask_score(self, thread: RemoteThread, op: ScoreOp, given: Sequence[int]) -> None:
        """Ask for the log-probabilities of given tokens behind a thread's context."""
        thread.work = Work(op)
        prompt = [*thread.context, *given]
        thread.work.future = self.engine.spawn(self._score(thread, op, thread.work, prompt, len(given)))

    async def _score(self, thread: RemoteThread, op: ScoreOp, work: Work, prompt: list[int], count: int) -> None:
        engine = self.engine
        dialect = engine.server.dialect
        try:
            async with engine.turns():
                url = f"{engine.connection.url}/completions"
                answer = await engine.connection.post(url, dialect.score(engine.server.model, prompt))
            if answer is None:
                raise RemoteError(f"score: the server has no {url}")
            found = dialect.scored(answer, prompt)[-count:]
            if any(x is None for x in found):
                raise RemoteError("score: the server left out the log-probability of a token")
            self._post(lambda: self.ops[ScoreOp].settle(self, thread, op, found))  # type: ignore[attr-defined]
        except Exception as error:
            failed = error
            self._post(lambda: self._failed(thread, work, failed))


def _check(delta: Delta, model: str, prompt_tokens: int) -> None:
    """RemoteError for an answer by another model, or to a prompt that the server has cut."""
    if delta.model is not None and delta.model != model:
        raise RemoteError(f"the server answers with the model {delta.model!r}, where {model!r} was asked for")
    if delta.prompt_tokens is not None and delta.prompt_tokens != prompt_tokens:
        raise RemoteError(
            f"the server read {delta.prompt_tokens} tokens of a context of {prompt_tokens}; give it a longer context "
            "(vLLM: --max-model-len, llama.cpp: -c), or write less"
        )
