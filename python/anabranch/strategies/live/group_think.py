"""Group Think (Hsu et al. 2025, arXiv 2505.11107): workers that adapt to one another at every token."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

from anabranch._check import whole_fields
from anabranch.strategies.api.ops import Ended
from anabranch.strategies.api.strategy import Strategy
from anabranch.strategies.api.thread import Thread

NAMES = ("Ann", "Bob", "Cyd", "Dan", "Eve", "Fay", "Gus", "Hal")


@dataclass(frozen=True)
class GroupThink(Strategy):
    r"""Workers that go on with one prompt side by side; each sees, at every token, all that all have written so far.

    The paper's rule: token k + 1 of a worker depends on the prompt and on the first k tokens of every worker. Each
    worker's tokens stand in a range of positions of its own, one range behind another. A worker that is through keeps
    its place in the others' sight (its EOS goes). Then their texts stand one after another in the trunk, in the order
    of the workers, and with a `conclusion` the trunk goes on from there.

    workers: how many. tokens: most tokens each writes.
    headers: how each worker's text begins; None: a line break and a name.
    room: positions of each worker's range, and so most tokens that one writes, header included; None: all begin at the
        same position (a worker's tokens then stand beside the others').
    same_step: what a worker sees of tokens that are computed in the same forward as its own. "all": the paper's rule;
        "before": those of workers before it (all of them interleaved in one causal sequence, the paper's variant for
        many requests); "none": a token is seen from the next step on. A training mask can show the last two.
    conclusion: text behind all of them, from which the trunk goes on; None: it ends there.
    stop: text that ends a worker.

    >>> engine.generate(prompt, strategy=ab.GroupThink(workers=3, tokens=32)).text
    """

    workers: int = 4
    tokens: int | None = None
    headers: tuple[str, ...] | None = None
    room: int | None = 1024
    same_step: str = "all"
    conclusion: str | None = None
    stop: str | tuple[str, ...] = ()

    needs = ("live sharing",)

    def __post_init__(self) -> None:
        whole_fields(self, ("workers", "tokens", "room"), optional=("tokens", "room"))
        if isinstance(self.headers, str) or (self.headers is not None and len(self.headers) != self.workers):
            raise ValueError(f"GroupThink: headers={self.headers!r}; pass one for each of the {self.workers} workers")
        if self.headers is not None and not all(self.headers):
            raise ValueError(f"GroupThink: headers={self.headers!r}; a header may not be empty")
        if self.same_step not in ("all", "before", "none"):
            raise ValueError(f"GroupThink: same_step={self.same_step!r}; pass 'all', 'before' or 'none'")
        if self.conclusion == "":
            raise ValueError("GroupThink: conclusion is empty; pass the text that the trunk goes on with, or None")

    def run(self, trunk: Thread) -> Generator[Any, Any, Any]:
        kids = trunk.fork(self._headers(), apart=self.room or 0)
        for kid in kids:
            kid.see([other for other in kids if other is not kid], same_step=self.same_step)
        ends: list[Ended] = yield [self._work(kid) for kid in kids]
        yield trunk.join(kids, "reprefill")
        if self.conclusion is not None:
            trunk.insert(self.conclusion)
            yield trunk.decode()
        return [end.token_ids if end.text is None else end.text for end in ends]

    def _work(self, kid: Thread) -> Generator[Any, Any, Ended]:
        yield kid  # its header is there
        room = None if self.room is None else self.room - len(kid.token_ids)
        if room is not None and room < 1:
            raise ValueError(f"GroupThink: room={self.room} is taken by the header of thread {kid.id}; pass more")
        limits = [limit for limit in (self.tokens, room) if limit is not None]
        end: Ended = yield kid.decode(min(limits, default=None), stop=self.stop)
        if end.reason == "eos":
            yield kid.truncate(kid.length - 1)  # before anybody sees it
        return end

    def _headers(self) -> tuple[str, ...]:
        names = (NAMES[i] if i < len(NAMES) else f"Worker {i + 1}" for i in range(self.workers))
        return self.headers or tuple(f"\n{name}:" for name in names)
