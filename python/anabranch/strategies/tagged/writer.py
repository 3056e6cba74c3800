"""The loop of all tag-driven systems: decode, fork where the model asks for it, join, go on."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any

from anabranch.strategies.api.ops import Ended
from anabranch.strategies.api.thread import Thread
from anabranch.strategies.tagged.wording import Wording

if TYPE_CHECKING:
    from anabranch.strategies.tagged.tagged import Tagged

Program = Generator[Any, Any, Any]


class Writer:
    """One answer in a format: the format's texts as token ids, and the loop."""

    def __init__(self, form: Tagged, trunk: Thread):
        self.form, self.trunk = form, trunk
        self.wording = Wording(form, trunk)
        self.trigger, self.stop = self.wording.ids[form.trigger], self.wording.ids[form.stop]
        self.lead, self.after = self.behind(form.trigger, form.lead), self.behind(form.stop, form.after)
        self.closing = None if form.closing is None else self.behind(form.stop, form.closing)
        self.blocks = 0
        self.prompt, self.limit = trunk.length, trunk.tokens_left

    def behind(self, tag: str, text: str) -> list[int]:
        return self.wording.behind(tag, text)

    def write(self) -> Program:
        yield from self.follow(self.trunk)
        yield self.trunk  # what was inserted last is to be seen
        self.wording.check_shape(self.trunk)

    def follow(self, thread: Thread, depth: int = 0, siblings: int = 1) -> Program:
        """Decode on a thread, forking where it asks for that, to its end: how that came (None: the answer is over).

        depth: blocks around it. siblings: threads of its block.
        """
        form = self.form
        yield thread
        since, sampled, iterations, joined = thread.length, 0, 0, False  # joined: its last tokens are a join's
        stops = [self.trigger] * (form.nested or not depth) + [self.stop] * (depth > 0 or form.stray == "end")
        while True:
            if not depth and iterations == form.max_iterations:
                thread.malformed(f"more than {form.max_iterations} iterations; ended there")
                return None
            iterations += 1
            most = self.most(thread, since, siblings, sampled if depth else None)
            if most is not None and most <= 0:
                return Ended("length")
            end = yield thread.decode(most, stop=stops, sampling=dict(form.sampling) if depth else None)
            sampled += len(end.token_ids)
            if end.stop != self.trigger:
                if depth == 0 and end.stop == self.stop:
                    thread.malformed(f"{form.stop} outside a thread; ended there")
                if joined and not end.token_ids and self.closing and self.closing[: len(self.after)] == self.after:
                    thread.insert(self.closing[len(self.after) :])  # the limit was reached with the last thread
                return end
            joined = False
            names = self.wording.outlines(thread, since)
            if names is None:
                if form.misfit == "end":
                    return end
                continue
            if self.refused(thread, depth):
                continue
            if self.blocks == form.max_blocks:
                thread.malformed(f"more than {form.max_blocks} parallel blocks; ended there")
                return end
            if not depth and iterations == form.max_iterations:
                continue
            self.blocks, iterations = self.blocks + 1, iterations + 1
            if (yield from self.block(thread, names, depth)):
                return None
            since, siblings, joined = thread.length, 1, True

    def most(self, thread: Thread, since: int, siblings: int, sampled: int | None) -> int | None:
        """Tokens that a thread may go on by; None: whatever the answer's limit leaves."""
        limits = []
        if sampled is not None and self.form.thread_tokens is not None:
            limits.append(self.form.thread_tokens - sampled)
        if self.form.reserve is not None and (sampled is not None or self.blocks):
            room = self.limit - self.form.reserve - (since - self.prompt)
            limits.append(-(-room // siblings) - (thread.length - since))
        return min(limits, default=None)

    def refused(self, thread: Thread, depth: int) -> bool:
        """Whether a block fits no more: what asked for it is plain text then."""
        form, left = self.form, thread.tokens_left
        if left < form.min_left:
            thread.malformed(f"a fork with {left} tokens left, fewer than {form.min_left}; refused")
        elif form.max_depth is not None and depth > form.max_depth:
            thread.malformed(f"a fork deeper than {form.max_depth} blocks; refused")
        else:
            return False
        return True

    def block(self, thread: Thread, names: Sequence[str], depth: int) -> Program:
        """Fork, one thread a name, and join; whether the answer is over."""
        form, kids, ends, behind = self.form, [], [], []
        if self.lead:
            thread.insert(self.lead)
            if form.overlap:
                thread.skip(-1)
        kids = thread.fork([self.behind(form.trigger, form.header.replace("{id}", name)) for name in names])
        waiting = iter(kids)  # shared by the lanes: who is free takes the next

        def lane() -> Program:
            for kid in waiting:
                end = yield from self.follow(kid, depth + 1, len(kids))
                behind.append((yield from self.close(kid, end)))
                ends.append(end)

        yield [lane() for _ in range(min(form.max_threads or len(kids), len(kids)))]
        headers: list[Sequence[int] | None] | None = None
        if form.join == "reprefill":
            headers = [None] * len(kids)
            if form.next_header is not None:
                headers[1:] = [self.behind(form.stop, form.next_header.replace("{id}", name)) for name in names[1:]]
        yield thread.join(kids, form.join, headers=headers)
        if form.overlap:
            thread.skip(max(behind) - thread.position)
        over = self.closing is not None and any(end is None or end.stop != self.stop for end in ends)
        yield thread.insert(self.closing if over and self.closing is not None else self.after)
        return over

    def close(self, kid: Thread, end: Ended | None) -> Program:
        """What stands behind a thread's own text; the position behind its `stop`."""
        form, position = self.form, kid.position
        if end is not None and end.stop == self.stop:
            if form.kept:
                yield kid.decode(form.kept, sampling=dict(form.sampling))
            return position
        reason = "a block" if end is None else end.reason
        kid.malformed(f"ended by {reason} without {form.stop}; {'closed' if form.unclosed else 'left open'}")
        if reason == "eos":
            kid.truncate(kid.length - 1)
        kid.insert(self.wording.unclosed)
        yield kid
        return kid.position
