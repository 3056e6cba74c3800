"""What a thread can be asked for, as data. Pure bookkeeping; the engine does the work."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from anabranch.strategies.api.thread import Thread
from anabranch.strategies.api.awaitable import Awaitable


class TokenStats(NamedTuple):
    """How sure the model was of one sampled token, from its raw scores (before any logits processor); in nats."""

    logprob: float  # log-probability of the token that was sampled
    entropy: float  # of the whole next-token distribution
    topk_logprob: float  # mean log-probability of the k likeliest tokens (DeepConf's confidence is its negative)


@dataclass(frozen=True)
class Ended:
    """How one `Thread.decode` ended and what it sampled.

    ``reason``: "stop" (a stop string or id), "eos", "length" (its own or the answer's token limit), "budget" (the
    prompt's token budget over all threads), "until" (the caller's predicate), "killed". ``token_ids`` includes the
    token that ended it; ``text`` is theirs as they read where they stand, leaves a final EOS out and is None without a
    tokenizer; ``stop`` is the stop string or
    id that matched; ``stats`` has one entry a token when asked for, else none.
    """

    reason: str
    token_ids: tuple[int, ...] = ()
    text: str | None = None
    stop: str | int | None = None
    stats: tuple[TokenStats, ...] = ()


class Op(Awaitable):
    """One queued request of a thread; done when the loop has carried it out."""

    def __init__(self, thread: Thread):
        super().__init__()
        self.thread = thread
        self.issued = thread._host.clock()


class Insert(Op):
    """Tokens to append: ids, or text, which becomes ids (``token_ids``) when its turn has come; `header`: a child's."""

    def __init__(self, thread: Thread, given: str | list[int], kind: str, header: bool = False):
        super().__init__(thread)
        self.given, self.kind, self.header = given, kind, header
        self.token_ids: list[int] = []


class Fork(Op):
    def __init__(self, thread: Thread, kids: list[Thread]):
        super().__init__(thread)
        self.kids = kids


class Join(Op):
    def __init__(
        self,
        thread: Thread,
        kids: list[Thread],
        mode: str,
        given: str | list[int] | None = None,
        keep: int | None = None,
        headers: Sequence[str | list[int] | None] | None = None,
    ):
        super().__init__(thread)
        self.kids, self.mode, self.given, self.keep = kids, mode, given or [], keep
        self.token_ids: list[int] = []  # of `given`
        # What takes the place of each kid's own header; text becomes token ids when the join is carried out.
        self.headers: list[str | list[int] | None] = list(headers or [None] * len(kids))


class Truncate(Op):
    def __init__(self, thread: Thread, length: int):
        super().__init__(thread)
        self.length = length


class Score(Op):
    """Tokens that are given, not sampled; its value: the log-probability of each."""

    def __init__(self, thread: Thread, given: str | list[int], kind: str):
        super().__init__(thread)
        self.given, self.kind = given, kind
        self.token_ids: list[int] = []
        self.logprobs: list[float | None] = []
        self.begin: int | None = None  # context length in front of the first; None: they are not in the thread yet


class Decode(Op):
    """A decoding in progress, as ``until`` sees it: ``thread``, and ``token_ids``, ``text``, ``stats`` so far."""

    def __init__(
        self,
        thread: Thread,
        max_new_tokens: int | None,
        stop: Sequence[str | int],
        sampling: Mapping[str, Any] | None,
        until: Callable[[Decode], bool] | None,
        stats: int | None,
    ):
        super().__init__(thread)
        self.max_new_tokens = max_new_tokens
        self.stop_strings = tuple(s for s in stop if isinstance(s, str))
        self.stop_ids = frozenset(s for s in stop if not isinstance(s, str))
        self.sampling = tuple(sorted((sampling or {}).items()))
        self.until, self.topk = until, stats
        self.token_ids: list[int] = []
        self.stats: list[TokenStats] = []
        self._limit: int | None = None  # of tokens, settled when it starts
        self._sampler: Any = None
        self._reader: Any = None  # of its text, from when it starts; stays None without a tokenizer
        self._seen = 0  # so many of its tokens the reader has
        self._stops: Any = ()

    def _read(self) -> str:
        """Let the reader have all tokens; what became certain of the text by that."""
        new, self._seen = self.token_ids[self._seen :], len(self.token_ids)
        told: str = self._reader.push(new)
        return told

    @property
    def text(self) -> str | None:
        if self._reader is None:
            return self.thread._host.text(self.token_ids, ())
        self._read()
        text: str = self._reader.text
        return text
