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

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from anabranch._check import index_of, number, told, whole
from anabranch.records.joins import JOINS
from anabranch.strategies.api.awaitable import Awaitable, ThreadGone
from anabranch.strategies.api.ops import (
    BecomeOp,
    CandidatesOp,
    ChooseOp,
    Decode,
    Ended,
    ForkOp,
    HiddenOp,
    InsertOp,
    JoinOp,
    Op,
    ScoreOp,
    SkipOp,
    TruncateOp,
)

if TYPE_CHECKING:
    from anabranch.strategies.api.host import Host, ThreadView

SomeOp = TypeVar("SomeOp", bound=Op)


class Thread:
    """One line of tokens. The trunk is a thread, and so is every fork; all methods return at once (see the module
    docstring).

    Attributes: ``id`` ("0" is the trunk, "0.2" its third child), ``path`` (the same as a tuple: what seeds its
    sampling), ``parent``, ``role`` ("trunk", "fork" or "fresh"), ``alive``, ``length`` (tokens of its context, prompt
    included), ``token_ids`` (its own: those since its fork, or since the prompt), ``text`` (of these), ``ended`` (its
    last `Ended`), ``host`` (what runs it; a strategy has no use for it).
    """

    def __init__(self, host: Host, view: ThreadView, parent: Thread | None, path: tuple[int, ...], role: str):
        self.host, self._view = host, view
        self.parent, self.path, self.role = parent, path, role
        self.id = ".".join(map(str, path))

    def __repr__(self) -> str:
        return f"Thread({self.id!r}, {self.role}, length={self.length}{'' if self.alive else ', ' + str(self.fate)})"

    @property
    def alive(self) -> bool:
        return self._view.alive

    @property
    def fate(self) -> str | None:
        """How it left: "joined", "discarded", "killed", "finished"."""
        return self._view.fate

    @property
    def ended(self) -> Ended | None:
        return self._view.ended

    @property
    def children(self) -> list[Thread]:
        """Its children that have come to be, in order, those that have left included."""
        return self.host.children(self)

    @property
    def length(self) -> int:
        return self._view.length

    @property
    def position(self) -> int:
        """Logical position of its next token: behind a splicing join not its length, and see `skip`."""
        return self._view.position

    @property
    def tokens_left(self) -> int:
        """Tokens that it may still sample before it reaches the answer's ``max_new_tokens``, which counts the longest
        way to a thread."""
        return self.host.tokens_left(self)

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self._view.token_ids

    @property
    def context(self) -> tuple[int, ...]:
        """All token ids that it sees, in order: what it shares with its parent (or its prompt), then its own."""
        return self._view.context

    @property
    def room(self) -> int:
        """Tokens that it may still be given, by the answer's limit."""
        return self.host.room(self)

    @property
    def text(self) -> str | None:
        return self.host.text(self._view.token_ids, self._view.backwards(self._view.begin))

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
        self.check_alive("decode")
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
        self.host.check_ids([s for s in stops if not isinstance(s, str)], "stop")
        if any(isinstance(s, str) for s in stops):
            self.host.encode("")  # says so when there is no tokenizer
        self.host.check_sampling(sampling)
        if isinstance(stats, bool) or (isinstance(stats, str) and stats == "logprob"):
            topk = {True: 20, False: None, "logprob": 0}[stats]
        else:
            topk = whole(stats, "decode: stats", 0, hint=" (the k of its top-k mean), True, False or 'logprob'") or None
        return self._submit(Decode(self, max_new_tokens, stops, sampling, until, topk))

    def insert(self, text_or_ids: str | Sequence[int]) -> InsertOp:
        """Append tokens that the model did not sample; they are prefilled and marked as inserted.

        Text reads exactly as given behind what stands there when its turn has come: no tokenizer's dummy space.
        """
        self.check_alive("insert")
        return self._submit(InsertOp(self, self._given(text_or_ids, "insert"), "inserted"))

    def score(self, text_or_ids: str | Sequence[int]) -> ScoreOp:
        """Like `insert`, and find out how likely the model found them: ``yield`` gives a log-probability for each token
        (nats, from its raw logits), however many there are in a forward or two."""
        self.check_alive("score")
        return self._submit(ScoreOp(self, self._given(text_or_ids, "score"), "inserted"))

    def candidates(
        self, k: int, *, sampling: Mapping[str, Any] | None = None, bias: Mapping[int, float] | None = None
    ) -> CandidatesOp:
        """Look up the `k` likeliest next tokens; nothing is appended. ``yield`` gives `Candidates`.

        sampling: as for `decode`; with ``do_sample`` the tokens are drawn, without replacement. bias: nats added to the
        log-probability of some token ids before the logits processors see them.

        >>> found = yield thread.candidates(4)
        >>> yield thread.choose(found.token_ids[0])
        """
        self.check_alive("candidates")
        k = whole(k, "candidates: k", 1)
        self.host.check_sampling(sampling)
        ids = self.host.check_ids(list(bias or ()), "candidates: bias")
        given = {i: number(v, f"candidates: bias[{i}]") for i, v in zip(ids, (bias or {}).values(), strict=True)}
        return self._submit(CandidatesOp(self, k, sampling, given))

    def choose(self, token_id: int) -> ChooseOp:
        """Append one token that the strategy picked among what the model offered.

        It counts as sampled, its log-probability is recorded where those are, traces replay it. ``yield`` gives False,
        and nothing is appended, where the answer's limit or the prompt's token budget is used up.
        """
        self.check_alive("choose")
        return self._submit(ChooseOp(self, self.host.check_ids([token_id], "choose: token_id")[0]))

    def become(self, sibling: Thread) -> BecomeOp:
        """Go on as `sibling` stands once it has nothing queued: what this thread wrote beyond what both have in common
        is forgotten, the sibling's tokens take its place, and its KV is shared, not copied or computed again.

        Both are forks of one thread from the same place. So a fixed pool of threads can hold the best of a search, and
        the tree stays flat however often they change places.
        """
        self.check_alive("become")
        if (
            not isinstance(sibling, Thread)
            or sibling is self
            or sibling.parent is not self.parent
            or self.role != "fork"
        ):
            raise ValueError(f"become: {sibling!r} is not another fork of the thread that {self!r} was forked from")
        sibling.check_alive("become: sibling")
        return self._submit(BecomeOp(self, sibling))

    def hidden(self) -> HiddenOp:
        """The model's last hidden state at this thread's last token: what its language head reads, after the final
        norm. ``yield`` gives a tuple of floats, as many as the model is wide."""
        self.check_alive("hidden")
        return self._submit(HiddenOp(self))

    def fork(
        self,
        headers: int | Sequence[str | Sequence[int] | None],
        *,
        segments: Sequence[int] | None = None,
        sees: Sequence[Thread | tuple[Thread, int]] = (),
        apart: int = 0,
    ) -> list[Thread]:
        """Children that share all of this thread's context, in one block; no KV is copied.

        headers: how many, or one header a child (text, token ids or None), inserted at its beginning.
        segments: which of the model's segment vectors are added to K and V of each child's tokens, for a strategy with
            ``kv_segments``; None: this thread's own.
        sees: earlier forks of this thread whose own tokens the children see as well, in this order, behind its context:
            the steps that a step depends on. They are shared where they lie, neither copied nor computed again, and a
            join brings back the children's own alone. The children begin one past the last position that they see. It
            waits until nothing is queued on those that are seen; they may go on afterwards, unseen, but not
            be cut back. ``(thread, n)``: its first n tokens.
        apart: each child begins so many positions behind the one before it; 0: all where this thread ends.
        """
        self.check_alive("fork")
        apart = whole(apart, "fork: apart", hint=" (positions)")
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
        if segments is not None:
            segments = [whole(s, f"fork: segments[{i}]") for i, s in enumerate(segments)]
            if len(segments) != len(heads):
                raise ValueError(f"fork: segments={told(segments)}; pass one for each of the {len(heads)} children")
        seen = [self._seen(item, f"fork: sees[{i}]") for i, item in enumerate(sees)]
        if len({id(other) for other, _ in seen}) < len(seen):
            raise ValueError("fork: sees holds a thread twice")
        if any(other is self or other.parent is not self or other.role != "fork" for other, _ in seen):
            raise ValueError(f"fork: sees={told(list(sees))}; pass forks of {self!r}")
        children = [self.host.new_thread(self, "fork") for _ in heads]
        self._submit(
            ForkOp(self, list(children), segments, seen, apart)
        )  # a list of its own: the caller may change theirs
        for child, header in zip(children, given, strict=True):
            if header:
                self._submit(InsertOp(child, header, "inserted", header=True))
        return children

    def spawn(self, prompt: str | Sequence[int]) -> Thread:
        """A child with a context of its own: it sees `prompt` and nothing else, from position 0."""
        self.check_alive("spawn")
        given = self._given(prompt, "spawn: prompt")
        ids = self.host.encode(given) if isinstance(given, str) else given
        if not ids:
            raise ValueError("spawn: prompt is empty; a fresh thread needs at least one token")
        child = self.host.new_thread(self, "fresh")
        self._submit(InsertOp(child, ids, "prompt"))
        return child

    def see(self, others: Thread | Sequence[Thread], *, lined_up: bool = False, same_step: str = "all") -> None:
        """From the next turn on, this thread also sees what `others` hold and go on to write: live, token by token.

        Takes effect at once, also in the middle of a decode, and replaces what was said before. All threads of a prompt
        that see others, or are seen, advance together: in each turn, one forward, every one computes what it has
        written since the last. Of a fork its own tokens are seen, of any other thread all.

        lined_up: False: tokens stand where they were written. True: `others` stand one behind another in the order
            given, then this thread, as if they were one sequence, whatever their lengths come to be (needs rotary
            embeddings; not for a fork, whose beginning has its place).
        same_step: what it sees of tokens computed in the same turn: "all", "before" (those of threads that come before
            it), or "none" (they are seen from the next turn on).

        A thread that others have seen cannot forget what they saw, and comes back to its parent by any join mode but
        "concat".
        """
        self.check_alive("see")
        given = [others] if isinstance(others, Thread) else others
        if not isinstance(given, Iterable) or not all(isinstance(other, Thread) for other in given):
            raise TypeError(f"see: others={told(others)}; pass the threads to be seen")
        seen: list[Thread] = list(given)
        for i, other in enumerate(seen):
            other.check_alive(f"see: others[{i}]")
            if other is self or other.host is not self.host or any(other is twice for twice in seen[:i]):
                raise ValueError(f"see: others[{i}]={other!r}; pass other threads of the same prompt, each once")
        if same_step not in ("all", "before", "none"):
            raise ValueError(f"see: same_step={same_step!r}; pass 'all', 'before' or 'none'")
        if lined_up and self.role == "fork":
            raise ValueError(f"see: lined_up=True for {self!r}; a fork goes on from its parent, so spawn() it instead")
        self.host.see(self, seen, bool(lined_up), same_step)

    def join(
        self,
        kids: Thread | Sequence[Thread],
        mode: str = "concat",
        *,
        text: str | Sequence[int] | None = None,
        keep: int | None = None,
        headers: Sequence[str | Sequence[int] | None] | None = None,
    ) -> JoinOp:
        """Take children back, in the order given, once they have nothing left to do. They are gone afterwards.

        mode "concat": their KV becomes part of this thread's context, nothing is computed again; siblings stay blind to
        one another and share positions; position = the largest. "reprefill": their tokens follow one another as if
        written one after the other, so that each sees those before it; the first one's KV is what that gives, and is
        kept. `headers` may replace a child's header there (None: it stays), when it reads differently behind a sibling.
        Children with a context of their own (`spawn`) may come back that way, too: what they wrote, prompt left out, is
        computed again here. "summary": forget this thread's tokens from length `keep` on (default: none), then insert
        `text`. "discard": nothing comes back; children still decoding are killed.
        """
        self.check_alive("join")
        if not isinstance(kids, (Thread, Iterable)):
            raise ValueError(f"join: kids={told(kids)}; pass the children to take back")
        children = [kids] if isinstance(kids, Thread) else list(kids)
        if mode not in JOINS:
            raise ValueError(f"join: mode={mode!r}; pass one of {', '.join(map(repr, JOINS))}")
        meaning = JOINS[mode]
        meaning.check_arguments(text, keep)
        if keep is not None:
            keep = whole(keep, "join: keep", hint=", or None")
        if not children:
            raise ValueError("join: kids is empty; pass at least one child")
        meaning.check_headers(headers, len(children))
        for i, child in enumerate(children):
            if not isinstance(child, Thread) or child.parent is not self:
                raise ValueError(f"join: kids[{i}]={child!r} is not a child of {self!r}")
            child.check_alive(f"join: kids[{i}]")
            meaning.check_child(i, child.role)
            if any(child is other for other in children[:i]):
                raise ValueError(f"join: kids[{i}]={child!r} is given twice")
        if meaning.at_once:
            op = JoinOp(self, children, mode)
            self.host.kill(children, meaning.fate)
            op.resolve(None, op.issued)
            return op
        given = None if text is None else self._given(text, "join: text")
        heads = [None if h is None else self._given(h, f"join: headers[{i}]") for i, h in enumerate(headers or [])]
        return self._submit(JoinOp(self, children, mode, given, keep, heads))

    def truncate(self, length: int) -> TruncateOp:
        """Forget this thread's tokens from context length `length` on (see ``thread.length``); only its own can go."""
        self.check_alive("truncate")
        length = whole(length, "truncate: length", hint=" (a context length, as thread.length gives it)")
        return self._submit(TruncateOp(self, length))

    def rstrip(self) -> TruncateOp:
        """Forget the EOS and the tokens of nothing but white space that its last decode ended with."""
        self.check_alive("rstrip")
        if not self._view.idle:
            raise ValueError(f"rstrip: thread {self.id} still has work queued; yield it first")
        return self.truncate(self.length - self.host.blank_at_end(self._view.last_sampled))

    def skip(self, count: int) -> SkipOp:
        """Let the next token stand `count` positions further on than it would; below 0: further back.

        Tokens stay where they are: a position may be left empty, or be held by several tokens, as siblings do. Room for
        what another thread writes meanwhile is left that way. A later `truncate` takes it back.
        """
        self.check_alive("skip")
        return self._submit(SkipOp(self, whole(count, "skip: count", None)))

    def kill(self) -> None:
        """End it now, with its children; a decode in progress ends with reason "killed", and its pages are free.

        A program of its own (`start`) ends the next time it asks something of the thread.
        """
        if self.parent is None:
            raise ValueError("kill: this is the trunk; return from run() instead")
        if self.alive:
            self.host.kill([self], "killed")

    def start(self, generator: Generator[Any, Any, Any]) -> Awaitable:
        """Run another generator beside this one (a child's own program); ``yield`` the return value for its result."""
        return self.host.start(generator)

    @property
    def eos_ids(self) -> frozenset[int]:
        """Token ids that end an answer."""
        return self.host.eos_ids

    @property
    def prompt(self) -> Any:
        """The prompt as the caller gave it: text, token ids, or a chat (a list of messages)."""
        return self.host.prompt

    def encode(self, text: str, before: Sequence[int] | None = None) -> list[int]:
        """Token ids of `text`, no special tokens added: as a text of its own, or as it goes on behind the ids `before`.

        The two differ where a tokenizer begins every text with a space of its own. Text given to `insert`, `score`,
        `fork` and `join` goes on behind whatever stands there when its turn has come.
        """
        return self.host.encode(text, None if before is None else reversed(before))

    def encode_prompt(self, prompt: Any) -> list[int]:
        """Token ids of a prompt for `spawn`, by the rules of ``Engine.generate``: a chat goes through the tokenizer's
        chat template."""
        return self.host.encode_prompt(prompt)

    def text_of(self, token_ids: Sequence[int]) -> str:
        """Text of token ids, control tags shown; "" without a tokenizer."""
        return self.host.text(token_ids, ()) or ""

    def tag_ids(self, tags: Sequence[str]) -> dict[str, int]:
        """The one token id of each control tag; ValueError, with the remedy, for a tag that is several tokens."""
        return self.host.tag_ids(tags)

    def malformed(self, why: str) -> None:
        """Count this answer as breaking the strategy's format (``metrics.format_correctness``)."""
        self.host.malformed(self, why)

    @staticmethod
    def _seen(item: Any, name: str) -> tuple[Thread, int | None]:
        thread, count = item if isinstance(item, tuple) and len(item) == 2 else (item, None)
        if not isinstance(thread, Thread):
            raise ValueError(f"{name}={told(item)}; pass a thread, or a thread and how many of its tokens")
        thread.check_alive(name)
        return thread, None if count is None else whole(count, f"{name}: tokens")

    def _given(self, value: str | Sequence[int], name: str) -> str | list[int]:
        """Text or token ids, checked: text, too, must have ids that the model knows."""
        ids = self.host.check_ids(self.host.encode(value) if isinstance(value, str) else value, name)
        return value if isinstance(value, str) else ids

    def check_alive(self, what: str) -> None:
        """`ThreadGone`, in the name of the method `what`, for a thread that has left."""
        if not self.alive:
            raise ThreadGone(f"{what}: thread {self.id} was {self.fate} and takes nothing more")

    def _submit(self, op: SomeOp) -> SomeOp:
        self.host.submit(op)
        return op
