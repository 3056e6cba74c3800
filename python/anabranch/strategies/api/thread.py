"""What a strategy sees of the engine: threads, what one can ask of them, and how to wait for it.

A strategy's ``run(trunk)`` is a generator. The methods of a `Thread` only *queue* work and return at once; ``yield``
waits for it and evaluates to its result. The loop serves all threads of all prompts together, so whatever is queued
on several threads happens in the same steps::

    def run(self, trunk):
        yield trunk.decode(stop=["\\n"])                      # wait: the first line
        kids = trunk.fork(["Pros:", "Cons:"])                # two threads, sharing all of it
        yield [kid.decode(64) for kid in kids]               # both decode together
        trunk.join(kids)                                     # their KV becomes the trunk's, side by side
        trunk.insert("\\nIn short,")
        yield trunk.decode()

No tensor and no model is in sight here, and nothing in this file imports one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

from anabranch._check import index_of, told, whole
from anabranch.records.actions import JOIN_MODES, Action
from anabranch.strategies.api.awaitable import Awaitable, ThreadGone
from anabranch.strategies.api.ops import Decode, Ended, Fork, Insert, Join, Score, Truncate

if TYPE_CHECKING:
    from anabranch.strategies.api.host import Host


@dataclass
class Segment:
    """A run of tokens of one origin. ``kind``: "prompt", "inserted" (by the runtime), "sampled", "joined" (from
    `source`).

    Positions are `position`, `position` + 1, … ; `spliced`: the tokens lie in the cache as the thread `source` wrote
    them, blind to its siblings. `logprobs`: of each token, where they were recorded.
    """

    kind: str
    token_ids: list[int]
    position: int
    source: str | None = None
    spliced: Thread | None = None
    logprobs: list[float] | None = None


class Thread:
    """One line of tokens. The trunk is a thread, and so is every fork; all methods return at once (see the module
    docstring).

    Attributes: ``id`` ("0" is the trunk, "0.2" its third child), ``path`` (the same as a tuple: what seeds its
    sampling), ``parent``, ``role`` ("trunk", "fork" or "fresh"), ``alive``, ``length`` (tokens of its context, prompt
    included), ``token_ids`` (its own: those since its fork, or since the prompt), ``text`` (of these), ``ended`` (its
    last `Ended`).
    """

    def __init__(self, host: Host, parent: Thread | None, path: tuple[int, ...], role: str):
        self._host: Any = host
        self.parent, self.path, self.role = parent, path, role
        self.id = ".".join(map(str, path))
        self.alive = True
        self.ended: Ended | None = None
        self.fate: str | None = None  # how it left: "joined", "discarded", "killed", "finished"
        self._ops: deque[Any] = deque()
        self._next_child = 0
        self._waiting: list[Awaitable] = []  # who waits for this thread to have nothing queued
        # Written by the loop:
        self._prefix: tuple[int, ...] = ()  # context at its fork
        self._own: list[int] = []  # tokens since; prompt included for a trunk or a fresh thread
        self._segments: list[Segment] = []
        self._start = 0  # position at its fork
        self._position = 0  # of the next token
        self._forks: list[tuple[int, list[Thread]]] = []  # (length, children) of each block, in order
        self._spawned_at = -1  # the turn of the strategy in which the last block, of fresh threads, was begun
        self._forgotten: list[Segment] = []
        self._depth = 0  # Lamport clock at its end
        self._path_sampled = 0  # sampled tokens on the longest way here
        self._prompt_length = 0  # of a prompt of its own: the trunk's, a spawned thread's
        self._header_length = 0  # tokens of the header that its fork gave it
        self._log: list[Action] = []
        self._live: Any = None

    def __repr__(self) -> str:
        return f"Thread({self.id!r}, {self.role}, length={self.length}{'' if self.alive else ', ' + str(self.fate)})"

    @property
    def length(self) -> int:
        return len(self._prefix) + len(self._own)

    @property
    def token_ids(self) -> tuple[int, ...]:
        return tuple(self._own[self._prompt_length :])

    @property
    def context(self) -> tuple[int, ...]:
        """All token ids that it sees, in order: what it shares with its parent (or its prompt), then its own."""
        return (*self._prefix, *self._own)

    @property
    def text(self) -> str | None:
        begin = len(self._prefix) + self._prompt_length
        return self._host.text(self._own[self._prompt_length :], self._backwards(begin))

    def _backwards(self, length: int | None = None) -> Iterator[int]:
        """The context (up to `length`) from its last token on."""
        skip = 0 if length is None else self.length - length
        return islice(chain(reversed(self._own), reversed(self._prefix)), skip, None)

    def decode(
        self,
        max_new_tokens: int | None = None,
        *,
        stop: str | int | Sequence[str | int] = (),
        sampling: Mapping[str, Any] | None = None,
        until: Callable[[Decode], bool] | None = None,
        stats: bool | int | str = False,
    ) -> Decode:
        """Sample until something ends it; ``yield`` gives the `Ended`.

        max_new_tokens: at most so many tokens (the answer's own limit holds as well).
        stop: strings and token ids that end it; EOS always ends. Strings are looked for in the text of what *this* call
            samples, not in what was inserted before; one ends it with the token with which that text first holds it.
        sampling: fields of Transformers' GenerationConfig that differ here, e.g. ``{"do_sample": True, "temperature":
        0.8}``.
        until: called after every token with this `Decode`; True ends it.
        stats: True (or the k of its top-k mean, 20 by default) records a `TokenStats` a token; "logprob" leaves its
            other fields NaN and is cheaper.
        """
        self._check_alive("decode")
        if max_new_tokens is not None:
            max_new_tokens = whole(max_new_tokens, "decode: max_new_tokens", 1, hint=", or None")
        given = [stop] if isinstance(stop, str) or index_of(stop) is not None else stop
        if not isinstance(given, Iterable):
            raise TypeError(f"decode: stop={told(stop)}; pass strings and token ids")
        stops: list[Any] = [s if isinstance(s, str) else index_of(s) for s in given]
        if "" in stops:
            raise ValueError("decode: stop holds an empty string, which would end every text at once; leave it out")
        if None in stops:
            raise TypeError(f"decode: stop={told(stop)}; pass strings and token ids")
        self._host.check_ids([s for s in stops if not isinstance(s, str)], "stop")
        if any(isinstance(s, str) for s in stops):
            self._host.encode("")  # says so when there is no tokenizer
        self._host.check_sampling(sampling)
        if isinstance(stats, bool) or (isinstance(stats, str) and stats == "logprob"):
            topk = {True: 20, False: None, "logprob": 0}[stats]
        else:
            topk = whole(stats, "decode: stats", 0, hint=" (the k of its top-k mean), True, False or 'logprob'") or None
        return self._submit(Decode(self, max_new_tokens, stops, sampling, until, topk))

    def insert(self, text_or_ids: str | Sequence[int]) -> Insert:
        """Append tokens that the model did not sample; they are prefilled and marked as inserted.

        Text reads exactly as given behind what stands there when its turn has come: no tokenizer's dummy space.
        """
        self._check_alive("insert")
        return self._submit(Insert(self, self._given(text_or_ids, "insert"), "inserted"))

    def score(self, text_or_ids: str | Sequence[int]) -> Score:
        """Like `insert`, and find out how likely the model found them: ``yield`` gives a log-probability for each token
        (nats, from its raw scores), however many there are in a forward or two."""
        self._check_alive("score")
        return self._submit(Score(self, self._given(text_or_ids, "score"), "inserted"))

    def fork(self, headers: int | Sequence[str | Sequence[int] | None]) -> list[Thread]:
        """Children that share all of this thread's context, in one block; no KV is copied.

        headers: how many, or one header a child (text, token ids or None), inserted at its beginning.
        """
        self._check_alive("fork")
        count = index_of(headers)
        if count is not None and not 1 <= count <= 2**20:
            raise ValueError(f"fork: headers={count}; pass a number from 1 to 2^20, or a list of one header a child")
        many = not isinstance(headers, (str, bytes, dict)) and isinstance(headers, Iterable)
        heads: list[Any] = [None] * count if count is not None else list(headers) if many else []  # type: ignore[arg-type]
        if not heads:
            raise ValueError(
                f"fork: headers={told(headers)}; pass a number of at least 1, or a list of one header a child"
            )
        given = [None if h is None else self._given(h, f"fork: headers[{i}]") for i, h in enumerate(heads)]
        kids = [self._host.new_thread(self, "fork") for _ in heads]
        self._submit(Fork(self, list(kids)))  # a list of its own: the caller may change theirs
        for kid, header in zip(kids, given, strict=True):
            if header:
                kid._submit(Insert(kid, header, "inserted", header=True))
        return kids

    def spawn(self, prompt: str | Sequence[int]) -> Thread:
        """A child with a context of its own: it sees `prompt` and nothing else, from position 0."""
        self._check_alive("spawn")
        given = self._given(prompt, "spawn: prompt")
        ids = self._host.encode(given) if isinstance(given, str) else given
        if not ids:
            raise ValueError("spawn: prompt is empty; a fresh thread needs at least one token")
        kid = self._host.new_thread(self, "fresh")
        kid._submit(Insert(kid, ids, "prompt"))
        return kid

    def join(
        self,
        kids: Thread | Sequence[Thread],
        mode: str = "concat",
        *,
        text: str | Sequence[int] | None = None,
        keep: int | None = None,
        headers: Sequence[str | Sequence[int] | None] | None = None,
    ) -> Join:
        """Take children back, in the order given, once they have nothing left to do. They are gone afterwards.

        mode "concat": their KV becomes part of this thread's context, nothing is computed again; siblings stay blind to
        one another and share positions; position = the largest. "reprefill": their tokens follow one another as if
        written one after the other, so that each sees those before it; the first one's KV is what that gives, and is
        kept. `headers` may replace a child's header there (None: it stays), when it reads differently behind a sibling.
        Children with a context of their own (`spawn`) may come back that way, too: what they wrote, prompt left out, is
        computed again here. "summary": forget this thread's tokens from length `keep` on (default: none), then insert
        `text`. "discard": nothing comes back; children still decoding are killed.
        """
        self._check_alive("join")
        if not isinstance(kids, (Thread, Iterable)):
            raise ValueError(f"join: kids={told(kids)}; pass the children to take back")
        kids = [kids] if isinstance(kids, Thread) else list(kids)
        if mode not in JOIN_MODES:
            raise ValueError(f"join: mode={mode!r}; pass one of {', '.join(map(repr, JOIN_MODES))}")
        if (text is not None) != (mode == "summary") or (keep is not None and mode != "summary"):
            raise ValueError(
                f"join: mode={mode!r} with text={text!r}, keep={keep!r}; "
                "summary takes text (and keep), no other mode does"
            )
        if keep is not None:
            keep = whole(keep, "join: keep", hint=", or None")
        if not kids:
            raise ValueError("join: kids is empty; pass at least one child")
        if headers is not None and (mode != "reprefill" or isinstance(headers, str) or len(headers) != len(kids)):
            raise ValueError(f"join: headers={headers!r}; mode 'reprefill' takes one for each of the {len(kids)} kids")
        for i, kid in enumerate(kids):
            if not isinstance(kid, Thread) or kid.parent is not self:
                raise ValueError(f"join: kids[{i}]={kid!r} is not a child of {self!r}")
            kid._check_alive(f"join: kids[{i}]")
            if kid.role == "fresh" and mode == "concat":
                raise ValueError(
                    f"join: kids[{i}] has a context of its own, which cannot be spliced; "
                    "join it by 'reprefill', 'summary' or 'discard'"
                )
            if any(kid is other for other in kids[:i]):
                raise ValueError(f"join: kids[{i}]={kid!r} is given twice")
        if mode == "discard":  # at once: a child still decoding must not cost another step
            op = Join(self, kids, mode)
            self._log.append(Action("kill", children=[kid.id for kid in kids], mode="discarded"))
            for kid in kids:
                self._host.kill(kid, "discarded")
            op._resolve(None, op.issued)
            return op
        given = None if text is None else self._given(text, "join: text")
        heads = [None if h is None else self._given(h, f"join: headers[{i}]") for i, h in enumerate(headers or [])]
        return self._submit(Join(self, kids, mode, given, keep, heads))

    def truncate(self, length: int) -> Truncate:
        """Forget this thread's tokens from context length `length` on (see ``thread.length``); only its own can go."""
        self._check_alive("truncate")
        length = whole(length, "truncate: length", hint=" (a context length, as thread.length gives it)")
        return self._submit(Truncate(self, length))

    def rstrip(self) -> Truncate:
        """Forget the EOS and the tokens of nothing but white space that its last decode ended with."""
        self._check_alive("rstrip")
        if self._ops:
            raise ValueError(f"rstrip: thread {self.id} still has work queued; yield it first")
        sampled = self._segments[-1].token_ids if self._segments and self._segments[-1].kind == "sampled" else []
        return self.truncate(self.length - self._host.blank_at_end(sampled))

    def kill(self) -> None:
        """End it now, with its children; a decode in progress ends with reason "killed", and its pages are free.

        A program of its own (`start`) ends the next time it asks something of the thread.
        """
        if self.parent is None:
            raise ValueError("kill: this is the trunk; return from run() instead")
        if self.alive:
            self.parent._log.append(Action("kill", children=[self.id], mode="killed"))
            self._host.kill(self, "killed")

    def start(self, generator: Generator[Any, Any, Any]) -> Awaitable:
        """Run another generator beside this one (a child's own program); ``yield`` the return value for its result."""
        return self._host.start(generator)

    @property
    def prompt(self) -> Any:
        """The prompt as the caller gave it: text, token ids, or a chat (a list of messages)."""
        return self._host.prompt

    def encode(self, text: str, before: Sequence[int] | None = None) -> list[int]:
        """Token ids of `text`, no special tokens added: as a text of its own, or as it goes on behind the ids `before`.

        The two differ where a tokenizer begins every text with a space of its own. Text given to `insert`, `score`,
        `fork` and `join` goes on behind whatever stands there when its turn has come.
        """
        return self._host.encode(text, None if before is None else reversed(before))

    def encode_prompt(self, prompt: Any) -> list[int]:
        """Token ids of a prompt for `spawn`, by the rules of ``Engine.generate``: a chat goes through the tokenizer's
        chat template."""
        return self._host.encode_prompt(prompt)

    def text_of(self, token_ids: Sequence[int]) -> str:
        """Text of token ids, control tags shown; "" without a tokenizer."""
        return self._host.text(token_ids, ()) or ""

    def tag_ids(self, tags: Sequence[str]) -> dict[str, int]:
        """The one token id of each control tag; ValueError, with the remedy, for a tag that is several tokens."""
        return self._host.tag_ids(tags)

    def malformed(self, why: str) -> None:
        """Count this answer as breaking the strategy's format (``metrics.format_correctness``)."""
        self._host.malformed(self, why)

    def _given(self, value: str | Sequence[int], name: str) -> str | list[int]:
        """Text or token ids, checked: text, too, must have ids that the model knows."""
        ids: list[int] = self._host.check_ids(self._host.encode(value) if isinstance(value, str) else value, name)
        return value if isinstance(value, str) else ids

    def _check_alive(self, what: str) -> None:
        if not self.alive:
            raise ThreadGone(f"{what}: thread {self.id} was {self.fate} and takes nothing more")

    def _submit(self, op: Any) -> Any:
        self._ops.append(op)
        self._host.submit(op)
        return op
