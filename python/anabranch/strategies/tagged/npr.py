"""Native Parallel Reasoner (arXiv 2512.07461): guidelines with plans, one step each, and what is taken from them."""

from __future__ import annotations

from dataclasses import dataclass

from anabranch._check import number
from anabranch.strategies.tagged.tagged import Tagged


@dataclass(frozen=True, kw_only=True)
class NPR(Tagged):
    r"""NPR's format, to the token::

        <guideline>
        <plan>1: …</plan>
        <plan>2: …</plan>
        </guideline>
        <step>
        1: …</step>
        <step>
        2: …</step>
        <takeaway>
        …</takeaway> …

    repeated as often as the model likes. A step sees all before it and all plans, but no sibling, with Multiverse's
    mask and splicing join; the runtime opens ``<takeaway>``. As in the released engine:

    - No plans or more than 5 (`max_outlines`), a ``</guideline>`` without a ``<guideline>`` since the last takeaway
      began, or a ``</step>`` outside a step end the answer; in a step, the first two end the step.
    - With fewer than 1,024 tokens left (`min_left`), or more than 5 blocks around it (`max_depth`), a fork is refused,
      and what asked for it is plain text.
    - A step ends where (context − prompt) + own tokens × steps of the block reaches ``max_new_tokens`` less 128
      (`reserve`), and so, behind its first block, does the answer. With a small ``max_new_tokens`` nothing forks,
      unless `min_left` and `reserve` are smaller, too.
    - One newline stands in front of all steps; one token more is sampled behind each ``</step>``, and stays (`kept`).
    - A step that ends without ``</step>`` is left open, and the answer goes on.

    positions: "released": dense; the newline stands on base + 1, each ``<step>`` on base + 2 (base: that of
        ``</guideline>``), the takeaway behind the furthest step and what was kept of it. "training": each ``<step>`` on
        base + 1, the takeaway right behind the furthest ``</step>``.
    repetition_penalty: inside a step; it counts the step's whole context, as GenerationConfig's does. 1.0: none.
    nested: whether a step may hold a guideline of its own, as the engine allows and training does not.

    >>> engine.generate(prompt, strategy=ab.NPR(), max_new_tokens=256).text
    """

    tags: tuple[str, ...] = (
        "<guideline>",
        "</guideline>",
        "<plan>",
        "</plan>",
        "<step>",
        "</step>",
        "<takeaway>",
        "</takeaway>",
    )
    trigger: str = "</guideline>"
    opening: str = "<guideline>"
    outline: str = r"<plan>\s*([0-9]+(?:\.[0-9]+)*)\s*:"
    own_opening: bool = True
    repeats: str = "keep"
    max_outlines: int | None = 5
    lead: str = "\n"
    header: str = "<step>\n{id}:"
    stop: str = "</step>"
    kept: int = 1
    unclosed: str = ""
    after: str = "<takeaway>\n"
    closing: str | None = None
    shape: str = "(<guideline>(<plan></plan>)+</guideline>(<step></step>)+<takeaway></takeaway>)*"
    join: str = "concat"
    nested: bool = True
    max_depth: int | None = 5
    min_left: int = 1024
    misfit: str = "end"
    stray: str = "end"
    reserve: int | None = 128
    max_blocks: int = 2**20
    positions: str = "released"
    repetition_penalty: float = 1.02

    def __post_init__(self) -> None:
        if self.positions not in ("released", "training"):
            raise ValueError(f"NPR: positions={self.positions!r}; pass 'released' or 'training'")
        penalty = number(self.repetition_penalty, "NPR: repetition_penalty", positive=True)
        sampling = {k: v for k, v in dict(self.sampling).items() if k != "repetition_penalty"}
        if penalty != 1.0:
            sampling["repetition_penalty"] = penalty
        object.__setattr__(self, "sampling", sampling)
        object.__setattr__(self, "overlap", self.positions == "training")
        super().__post_init__()
