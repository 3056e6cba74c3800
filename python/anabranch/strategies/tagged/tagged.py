"""Systems in which the model itself writes tags that ask for threads: the format as data, one loop for all of them."""

from __future__ import annotations

import re
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from anabranch._check import whole_fields
from anabranch.strategies.api.ops import Ended
from anabranch.strategies.api.strategy import Strategy
from anabranch.strategies.api.thread import Thread


@dataclass(frozen=True, kw_only=True)
class Tagged(Strategy):
    r"""A tag-driven system as data; `ThreadWeaver` is one.

    The trunk decodes until the model writes `trigger`. The ids of the outlines written since the last `opening` are
    read off, and the trunk is forked into one thread an id. A thread ends with `stop`; the threads are joined, `after`
    is inserted, and the trunk goes on. Tags inside a thread do not fork again: there they are plain text.

    A system of one's own is an instance::

        plans = Tagged(
            tags=("<plan>", "</plan>", "<step>", "</step>", "<answer>"),
            opening="<plan>", trigger="</plan>", outline=r"(\d+)\. ",     # <plan>1. … 2. …</plan>
            header="\n<step>{id}.", stop="</step>", unclosed="</step>",   # <step>1. …</step>
            after="\n<answer>", closing="",                               # the runtime asks for the answer
            shape="(<plan></plan>(<step></step>)+<answer>)?", join="concat",
        )
        engine.generate(prompt, strategy=plans)

    and a small change to a known one is ``dataclasses.replace(ab.ThreadWeaver(), thread_tokens=512)``.

    tags: control tags; each must be one token. With a tokenizer in which one is not, generate() raises ValueError.
    trigger, opening: see above. outline: regular expression whose first group is an outline's id, searched in the text
        since `opening`; duplicates are dropped, the order is kept.
    header: what a thread begins with; "{id}" stands for its outline's id. next_header: what takes its place, from the
        second thread on, where the threads stand one behind another (join "reprefill"); None: the same.
    stop: the tag that ends a thread. unclosed: appended to a thread that ended without it (an EOS is dropped first).
    after: inserted behind the last thread. closing: inserted in its place when a thread met EOS or a token limit; the
        answer is over then.
    shape: regular expression that the tags of a well-formed answer, all in a row, match as a whole.
    join: "reprefill" (later threads see the earlier ones) or "concat" (siblings stay blind, nothing is computed again).
    max_blocks: an answer that asks for more ends there. max_iterations: most phases of an answer, where what the trunk
        writes up to a trigger is one, and a block another; the answer ends behind the last, even if that leaves a
        block open. None: no limit.
    max_threads: threads of one answer that decode at a time; more wait for their turn, which changes no token (unless
        ``max_total_tokens`` runs out meanwhile). thread_tokens: most tokens sampled in a thread; None leaves the
        answer's own limit.
    pieces: ids of the format's own text, in place of the tokenizer's, for an engine without one: each tag and what
        headers and outlines are spelled with, e.g. ``{"<Thread>": 7, "\n": 10, ":": 11, "1": 21, …}``.

    What breaks the format never stops a generation. It is counted (``result.malformed``) and repaired as above, or,
    like outlines without an id, kept as plain text.
    """

    tags: tuple[str, ...]
    trigger: str
    opening: str
    outline: str
    header: str
    next_header: str | None = None
    stop: str
    unclosed: str
    after: str
    closing: str
    shape: str
    join: str = "reprefill"
    max_blocks: int = 32
    max_iterations: int | None = None
    max_threads: int | None = 64
    thread_tokens: int | None = None
    pieces: Mapping[str, int] | tuple[tuple[str, int], ...] | None = None

    def __post_init__(self) -> None:
        name = type(self).__name__
        object.__setattr__(self, "tags", tuple(self.tags))
        if self.pieces is not None:  # as a tuple: a strategy is frozen, and can be hashed
            object.__setattr__(self, "pieces", tuple(dict(self.pieces).items()))
        for field in ("trigger", "opening", "stop"):
            if getattr(self, field) not in self.tags:
                raise ValueError(f"{name}: {field}={getattr(self, field)!r} is not one of tags={self.tags}")
        for field in ("outline", "shape"):
            try:
                groups = re.compile(getattr(self, field)).groups
            except re.error as error:
                raise ValueError(
                    f"{name}: {field}={getattr(self, field)!r} is no regular expression: {error}"
                ) from None
            if field == "outline" and not groups:
                raise ValueError(f"{name}: outline={self.outline!r} has no group; put (…) around an outline's id")
        if "{id}" not in self.header:
            raise ValueError(f"{name}: header={self.header!r} does not hold {{id}}; put it where the outline's id goes")
        if self.join not in ("reprefill", "concat"):
            raise ValueError(f"{name}: join={self.join!r}; pass 'reprefill' or 'concat'")
        if self.join == "concat" and self.next_header is not None:
            raise ValueError(f"{name}: next_header={self.next_header!r} with join='concat', which keeps each header")
        if self.join == "concat" and not self.after:
            raise ValueError(f"{name}: after is empty; behind join='concat' the trunk needs a token to go on from")
        limits = ("max_blocks", "max_iterations", "max_threads", "thread_tokens")
        whole_fields(self, limits, optional=limits[1:])

    def run(self, trunk: Thread) -> Generator[Any, Any, Any]:
        # No generator itself: an unfit tokenizer is told before anything runs.
        return _Writer(self, trunk).write()


class _Writer:
    """One answer in a format: the format's texts as token ids, and the loop."""

    def __init__(self, form: Tagged, trunk: Thread):
        self.form, self.trunk = form, trunk
        self.coder: Any = trunk if form.pieces is None else _Pieces(dict(form.pieces))
        self.ids: dict[str, int] = self.coder.tag_ids(form.tags)
        self.trigger, self.stop, self.opening = (self.ids[t] for t in (form.trigger, form.stop, form.opening))
        self.after, self.closing = self.behind(form.stop, form.after), self.behind(form.stop, form.closing)
        # Behind a thread's own text; pieces read the same everywhere.
        self.unclosed = form.unclosed if form.pieces is None else self.coder.encode(form.unclosed)

    def behind(self, tag: str, text: str) -> list[int]:
        """Ids of `text` as it reads right behind a tag: some tokenizers begin a text otherwise than they go on."""
        ids: list[int] = self.coder.encode(text, (self.ids[tag],))
        return ids

    def write(self) -> Generator[Any, Any, None]:
        trunk, form = self.trunk, self.form
        blocks = iterations = 0
        joined = False  # the trunk's last tokens are a join's
        while True:
            if iterations == form.max_iterations:
                trunk.malformed(f"more than {form.max_iterations} iterations; ended there")
                break
            iterations += 1
            end = yield trunk.decode(stop=self.trigger)
            if end.stop != self.trigger:
                if joined and not end.token_ids and self.closing[: len(self.after)] == self.after:
                    trunk.insert(self.closing[len(self.after) :])  # the limit was reached with the last thread
                break
            joined = False
            names = re.findall(form.outline, self.coder.text_of(self.since_opening()))
            names = [n if isinstance(n, str) else n[0] for n in names]  # of several groups the first is the id
            if not names:
                trunk.malformed(f"{form.trigger} without any outline id; kept as plain text")
                continue
            if len(set(names)) < len(names):
                trunk.malformed(f"duplicate outline ids in {_short(names)}; dropped")
            if blocks == form.max_blocks:
                trunk.malformed(f"more than {form.max_blocks} parallel blocks; ended there")
                break
            if iterations == form.max_iterations:
                continue
            blocks, iterations = blocks + 1, iterations + 1
            if (yield from self.block(list(dict.fromkeys(names)))):
                break
            joined = True
        yield trunk  # what was inserted last is to be seen
        self.check_shape()

    def since_opening(self) -> tuple[int, ...]:
        context = self.trunk.context
        at = next((i for i in range(len(context) - 1, -1, -1) if context[i] == self.opening), None)
        return () if at is None else context[at:]

    def block(self, names: list[str]) -> Generator[Any, Any, bool]:
        """Fork, one thread a name, and join; whether the answer is over."""
        trunk, form = self.trunk, self.form
        kids = trunk.fork([self.behind(form.trigger, form.header.replace("{id}", name)) for name in names])
        ends: list[Ended] = []
        waiting = iter(kids)  # shared by the lanes: who is free takes the next

        def lane() -> Generator[Any, Any, None]:
            for kid in waiting:
                end = yield kid.decode(form.thread_tokens, stop=self.stop)
                ends.append(end)
                if end.stop != self.stop:
                    kid.malformed(f"ended by {end.reason} without {form.stop}; closed")
                    if end.reason == "eos":
                        kid.truncate(kid.length - 1)
                    kid.insert(self.unclosed)

        yield [lane() for _ in range(min(form.max_threads or len(kids), len(kids)))]
        headers: list[Sequence[int] | None] | None = None
        if form.join == "reprefill":
            headers = [None] * len(kids)
            if form.next_header is not None:
                headers[1:] = [self.behind(form.stop, form.next_header.replace("{id}", name)) for name in names[1:]]
        trunk.join(kids, form.join, headers=headers)
        over = any(end.reason in ("eos", "length", "budget") for end in ends)
        trunk.insert(self.closing if over else self.after)
        return over

    def check_shape(self) -> None:
        tag_of = {i: tag for tag, i in self.ids.items()}
        everything, answer = (
            [tag_of[i] for i in ids if i in tag_of] for ids in (self.trunk.context, self.trunk.token_ids)
        )
        # A prompt may explain the format, or begin a block that the answer goes on with.
        if not any(re.fullmatch(self.form.shape, "".join(tags)) for tags in (answer, everything)):
            self.trunk.malformed(f"its tags are {_short(answer)}")


class _Pieces:
    """The format's own text without a tokenizer: what it is spelled with, and the id of each piece."""

    def __init__(self, ids: dict[str, int]):
        self.ids = ids
        self._texts = {i: text for text, i in ids.items()}
        self._any = re.compile("|".join(map(re.escape, sorted(ids, key=len, reverse=True))) or r"(?!)")

    def encode(self, text: str, before: Sequence[int] | None = None) -> list[int]:
        """Ids of `text`, the same wherever it stands."""
        ids, at = [], 0
        while at < len(text):
            match = self._any.match(text, at)
            if match is None or not match.group():
                raise ValueError(f"pieces: nothing spells {text[at:]!r} in {text!r}; add {text[at]!r} and its token id")
            ids.append(self.ids[match.group()])
            at = match.end()
        return ids

    def text_of(self, token_ids: Sequence[int]) -> str:
        return "".join(self._texts.get(i, "\ufffd") for i in token_ids)

    def tag_ids(self, tags: Sequence[str]) -> dict[str, int]:
        for tag in tags:
            if not isinstance(self.ids.get(tag), int):
                raise ValueError(f"pieces: no token id for the control tag {tag!r}; add it, e.g. {{{tag!r}: 7}}")
        return {tag: self.ids[tag] for tag in tags}


def _short(items: Sequence[str], most: int = 12) -> str:
    return " ".join(items[:most]) + (f" … ({len(items)})" if len(items) > most else "")
