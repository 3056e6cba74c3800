r"""Systems in which the model itself writes tags that ask for threads: the format as data, one loop for all of them."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from anabranch.strategies.api.strategy import Strategy
from anabranch.strategies.api.thread import Thread
from anabranch.strategies.tagged.checks import check_fields
from anabranch.strategies.tagged.writer import Writer


@dataclass(frozen=True, kw_only=True)
class Tagged(Strategy):
    r"""A tag-driven system as data; `ThreadWeaver`, `Multiverse` and `NPR` are some.

    The trunk decodes until the model writes `trigger`. The ids of the outlines written since the last `opening` are
    read off, and the trunk is forked into one thread an id. A thread ends with `stop`; the threads are joined, `after`
    is inserted, and the trunk goes on. Tags inside a thread do not fork again, unless the format is `nested`: there
    they are plain text.

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
        since `opening`; the order is kept. own_opening: `opening` counts only where the model wrote it since the last
        block, not in a prompt. repeats: an id that comes twice is dropped ("drop") or gets two threads ("keep").
        max_outlines: more of them fit no block.
    lead: inserted before the fork, so that all threads share it. header: what a thread begins with; "{id}" stands for
        its outline's id. next_header: what takes its place, from the second thread on, where the threads stand one
        behind another (join "reprefill"); None: the same. overlap: the first token of a header stands on the position
        of `lead`'s last, and `after` right behind the furthest `stop`, whatever stands behind that.
    stop: the tag that ends a thread. kept: tokens that are still sampled behind it and stay. unclosed: appended to a
        thread that ended without it (an EOS is dropped first).
    after: inserted behind the last thread. closing: inserted in its place when a thread met EOS or a token limit; the
        answer is over then. None: the answer goes on with `after` all the same.
    shape: regular expression that the tags of a well-formed answer, all in a row, match as a whole (nested: once those
        of inner blocks are taken out).
    join: "reprefill" (later threads see the earlier ones) or "concat" (siblings stay blind, nothing is computed again).
    nested: a thread forks as the trunk does, up to `max_depth` blocks around a block.
    min_left: a fork with fewer tokens left of the answer's limit is refused. What is refused is plain text from there
        on, and so is a `trigger` that no block fits ("text"), unless `misfit` says "end": then its thread ends there.
    stray: what `stop` means in the trunk: "text", or the "end" of the answer.
    sampling: fields of GenerationConfig that differ inside a thread. reserve: a thread (and, behind a block, the
        answer) ends once its context comes within so many tokens of the answer's limit, prompt left out and its own
        tokens counted once for each thread of its block.
    max_blocks: an answer that asks for more ends there. max_iterations: most phases of an answer, where what the trunk
        writes up to a trigger is one, and a block another; the answer ends behind the last, even if that leaves a
        block open. None: no limit.
    max_threads: threads of one block that decode at a time; more wait for their turn, which changes no token (unless
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
    own_opening: bool = False
    repeats: str = "drop"
    max_outlines: int | None = None
    lead: str = ""
    header: str
    next_header: str | None = None
    overlap: bool = False
    stop: str
    kept: int = 0
    unclosed: str
    after: str
    closing: str | None
    shape: str
    join: str = "reprefill"
    nested: bool = False
    max_depth: int | None = None
    min_left: int = 0
    misfit: str = "text"
    stray: str = "text"
    sampling: Mapping[str, Any] | tuple[tuple[str, Any], ...] = ()
    reserve: int | None = None
    max_blocks: int = 32
    max_iterations: int | None = None
    max_threads: int | None = 64
    thread_tokens: int | None = None
    pieces: Mapping[str, int] | tuple[tuple[str, int], ...] | None = None

    @property
    def needs(self) -> Sequence[str]:  # type: ignore[override]
        return ("concat joins",) if self.join == "concat" else ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "tags", tuple(self.tags))
        # As tuples: a strategy is frozen, and can be hashed.
        object.__setattr__(self, "sampling", tuple(sorted(dict(self.sampling).items())))
        if self.pieces is not None:
            object.__setattr__(self, "pieces", tuple(dict(self.pieces).items()))
        check_fields(self)

    def run(self, trunk: Thread) -> Generator[Any, Any, Any]:
        # No generator itself: an unfit tokenizer is told before anything runs.
        return Writer(self, trunk).write()
