"""APR (Pan et al. 2025, arXiv 2504.15466): a search in plain text that calls sub-searches and reads their results."""

from __future__ import annotations

import re
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

from anabranch._check import whole_fields
from anabranch.strategies.api.cutting import cut_at
from anabranch.strategies.api.strategy import Strategy
from anabranch.strategies.api.thread import Thread
from anabranch.strategies.calls.countdown import State, begin_at, states_of

CALLING, END_CALLING = "<Calling Sub Searches>", "<End Calling Sub Searches>"
RESULTS, END_RESULTS = "<Sub Searches>", "<End Sub Searches>"
GOAL = "Goal Reached"


@dataclass(frozen=True, kw_only=True)
class APR(Strategy):
    r"""Adaptive parallel reasoning, as its Countdown models write it::

        Moving to Node #0                                      the prompt (see `APR.prompt`)
        Current State: 27:[22, 26, 31, 53], Operations: []     …
        Generated Node #0,1: 27:[22, 31, 31] Operation: 53-22=31
        <Calling Sub Searches>
        <Start Sub Search 0 at level 1> Moving to Node #0,1
        <End Calling Sub Searches>

    Each call is a thread with a context of its own, which begins with the node's state (``Moving to Node #0,1`` and
    ``Current State: …``) and sees nothing else. At the join the calling block is deleted, and what the threads found
    takes its place: ``<No Solution in Sub Search 0 at level 1 at Node #0,1>``, or ``<Goal Reached in …>`` and the
    path. ``result.answers`` is the parent's own path, None where it found none.

    depth: levels of calls. As in the released code what a thread on the last level calls is not served; it writes on.
    call_tokens: most tokens sampled in one go, by the parent between two joins or by a thread; None: no limit.

    A search succeeds when its text holds "Goal Reached" twice; the path is the text behind the last but one. A
    ``<Sub Searches>`` that the model writes itself is taken for ``<Calling Sub Searches>``. A call of a node whose
    state was never written ends the answer, as it does in the released code, and counts as malformed.

    The authors' cost of an answer is its longest single context: ``metrics.longest_context``.

    >>> engine.generate(ab.APR.prompt(27, [22, 26, 31, 53]), strategy=ab.APR(depth=2), max_new_tokens=256).answers
    """

    depth: int = 1
    call_tokens: int | None = 4096

    def __post_init__(self) -> None:
        whole_fields(self, ("depth", "call_tokens"), optional=("call_tokens",))

    @staticmethod
    def prompt(target: int, numbers: Sequence[int], sub_call_budget: int | None = None) -> str:
        """The prompt of a Countdown problem: reach `target` with `numbers`; with `sub_call_budget`, for models that
        are conditioned on the number of calls, the "Sub Call Budget: n " in front of it.

        >>> ab.APR.prompt(27, [22, 26, 31, 53], sub_call_budget=10)
        'Sub Call Budget: 10 Moving to Node #0\\nCurrent State: 27:[22, 26, 31, 53], Operations: []'
        """
        budget = "" if sub_call_budget is None else f"Sub Call Budget: {sub_call_budget} "
        return budget + begin_at("0", State(str(target), ", ".join(map(str, numbers)), ()))

    def run(self, trunk: Thread) -> Generator[Any, Any, str | None]:
        return self._search(trunk, 0)

    def _search(self, thread: Thread, level: int) -> Generator[Any, Any, str | None]:
        """A thread's whole search; the path it found, None without one."""
        serves = level < self.depth
        while True:
            end = yield thread.decode(self.call_tokens, stop=[RESULTS, END_CALLING] if serves else [RESULTS])
            own = thread.text_of(thread.token_ids)
            if end.stop == RESULTS:
                thread.malformed(f"{RESULTS} written by the model; taken for {CALLING}")
                length, left = cut_at(thread, own.rindex(RESULTS))
                thread.truncate(length)
                thread.insert(left + CALLING)
                continue
            if end.stop != END_CALLING:
                return _found(thread)
            begin = own.rfind(f"{CALLING}\n")
            if begin < 0:
                thread.malformed(f"{END_CALLING} without {CALLING}; kept as plain text")
                continue
            called = re.findall(r"<Start Sub Search[^\n]*Moving to Node #([^\n]*)", own[begin:])
            states = states_of(thread.text_of(thread.context), called)
            if None in states:
                thread.malformed(f"a call of node {called[states.index(None)]!r:.40}, whose state was never written")
                return None
            yield from self._call(thread, begin, [(n, s) for n, s in zip(called, states, strict=True) if s], level + 1)

    def _call(self, thread: Thread, begin: int, calls: list[tuple[str, State]], level: int) -> Generator[Any, Any, Any]:
        """Search each node in a thread of its own; their results replace the thread's text from `begin` on."""
        length, left = cut_at(thread, begin)
        kids = [thread.spawn(begin_at(node.strip(), state)) for node, state in calls]
        found = yield [self._search(kid, level) for kid in kids]
        lines = [RESULTS]
        for i, ((node, _), path) in enumerate(zip(calls, found, strict=True)):
            how = "No Solution" if path is None else GOAL
            lines.append(f"<{how} in Sub Search {i} at level {level} at Node #{node.strip()}>")
            lines += [] if path is None else [path]
        text = left + "\n".join([*lines, END_RESULTS, ""])
        if kids:
            thread.join(kids, "summary", text=text, keep=length)
        else:
            thread.truncate(length)
            thread.insert(text)


def _found(thread: Thread) -> str | None:
    """The path that a finished search reports."""
    text = thread.text_of(thread.context)
    if text.count(GOAL) < 2:
        return None
    return text[text.rindex(GOAL, 0, text.rindex(GOAL)) :].strip()[len(GOAL) + 1 :]
