"""Speculative decoding inside any strategy: drafts are verified many tokens a step, and no token changes."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

from anabranch._check import nearest, number, told, whole_fields
from anabranch.strategies.api.strategy import Strategy
from anabranch.strategies.api.thread import Thread
from anabranch.strategies.plain import inner_of

DRAFTS = ("ngram", "siblings")


@dataclass(frozen=True)
class DraftTree(Strategy):
    """`strategy` with the same tokens in fewer steps: each thread may be given a tree of guessed tokens to verify.

    A step computes the scores behind every guess along with those of the thread's last token. Each token is then
    chosen from its scores as without drafts, by the same draw of the thread's own random stream; where it is a guess,
    the next scores are there already, and no forward is needed. So greedy and sampled output are those of plain
    decoding, and logits processors, stops, ``until``, budgets, statistics and events see one token after another.

    strategy: what to run; None decodes plainly.
    draft: who guesses. "ngram": what followed the thread's last tokens earlier in its own context (prompt lookup);
        "siblings": the same, over what all threads of the answer have written, finished ones included; a small Hugging
        Face model with the same vocabulary on the same device; or an object of one's own (`Proposer`).
    length: most tokens of a guess. Each thread is given fewer where few of its guesses come true, down to none.
    width: most guesses of a thread that a step verifies side by side.
    row_cost: what a row more costs, as a part of the time of a step of one row. Guesses that come true too seldom to be
        worth it, by what became of the answer's guesses so far, are left out. None: 1/32 on a CPU, 0 on a GPU, where a
        few dozen rows cost next to nothing. 0: all guesses are verified, which saves the most steps.
    in_step: False: a thread whose guesses come true gets ahead of its siblings, as after a page shortage. True: all
        threads of the answer get their tokens in step, for strategies in which it matters who is done first; it saves
        fewer steps. Under ``max_total_tokens`` and where a strategy waits for the `first` of several it is always so.

    ``result.metrics.draft_tokens`` counts guessed tokens that were verified, ``accepted_tokens`` those that came true.

    Raises ValueError for an unknown draft, and when generating for a model with another vocabulary or device.

    >>> engine.generate(prompt, strategy=ab.DraftTree(ab.ThreadWeaver(), draft="siblings"), max_new_tokens=64).text
    """

    strategy: Strategy | None = None
    draft: Any = field(default="ngram")
    length: int = 8
    width: int = 4
    in_step: bool = False
    row_cost: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "strategy", inner_of("DraftTree", self.strategy))
        whole_fields(self, ("length", "width"))
        if self.row_cost is not None:
            cost = number(self.row_cost, "DraftTree: row_cost", hint=" or None")
            if cost < 0:
                raise ValueError(f"DraftTree: row_cost={told(self.row_cost)}; pass a number of at least 0, or None")
            object.__setattr__(self, "row_cost", cost)
        if not isinstance(self.in_step, bool):
            raise ValueError(f"DraftTree: in_step={told(self.in_step)}; pass True or False")
        if isinstance(self.draft, str):
            if self.draft not in DRAFTS:
                near = nearest(self.draft, DRAFTS, 1)
                raise ValueError(
                    f"DraftTree: draft={self.draft!r} is unknown; "
                    + (f"did you mean {near[0]!r}? " if near else "")
                    + f"pass one of {', '.join(map(repr, DRAFTS))}, or a small model (the model itself, not its name)"
                )
        elif not (hasattr(self.draft, "propose") or hasattr(self.draft, "get_input_embeddings")):
            raise TypeError(
                f"DraftTree: draft={told(self.draft)}; pass one of {', '.join(map(repr, DRAFTS))}, a Hugging Face "
                "model with the same vocabulary, or an object with a propose() of its own"
            )

    def __repr__(self) -> str:
        draft = repr(self.draft) if isinstance(self.draft, str) else type(self.draft).__name__
        in_step = ", in_step=True" if self.in_step else ""
        in_step += "" if self.row_cost is None else f", row_cost={self.row_cost:g}"
        return f"DraftTree({self.strategy!r}, draft={draft}, length={self.length}, width={self.width}{in_step})"

    @property
    def needs(self) -> Sequence[str]:  # type: ignore[override]
        assert self.strategy is not None
        return ("drafts", *self.strategy.needs)

    @property
    def sequential(self) -> bool:  # type: ignore[override]
        assert self.strategy is not None
        return self.strategy.sequential

    def run(self, trunk: Thread) -> Generator[Any, Any, Any]:
        assert self.strategy is not None
        return self.strategy.run(trunk)
