"""Multiverse (Yang et al. 2025, arXiv 2506.09991): goals with outlines, one path each, blind to one another, nested."""

from __future__ import annotations

from dataclasses import dataclass

from anabranch.strategies.tagged.tagged import Tagged

_ID = r"([0-9]+(?:\.[0-9]+)*)\s*:"


@dataclass(frozen=True, kw_only=True)
class Multiverse(Tagged):
    r"""Multiverse's format, to the token::

        … <Parallel>
        <Goal>
        <Outline>1: Compute (Δx)^2.</Outline>
        <Outline>2: Compute (Δy)^2.</Outline>
        </Goal>
        <Path>
        1: …</Path>
        <Path>
        2: …</Path><Conclusion>
        …</Conclusion>
        </Parallel> …

    The model decides whether, when and into how many paths; a path may hold blocks of its own, with ids such as 1.1. A
    path sees all before it and all outlines, but no sibling. With ``</Goal>`` on position g, every path begins on
    g + 1, and the conclusion, which the runtime opens, behind the end of the furthest. The join splices: nothing is
    computed again, and siblings stay blind to each other for whatever follows.

    As in the released engine a fork is refused, and what asked for it is plain text, with fewer than 30 tokens left
    (`min_left`) or more than 5 blocks around it (`max_depth`); an id that comes twice gets two paths; a path that ends
    without ``</Path>`` is left open, and the answer goes on. A ``</Goal>`` without outlines, where that engine raises
    or waits for ever, is plain text.

    released: what else its engine does, by the way it works: one newline in front of all paths, not one each, and one
        more token sampled behind each ``</Path>`` that stays.

    >>> engine.generate(prompt, strategy=ab.Multiverse(), max_new_tokens=256).text
    """

    tags: tuple[str, ...] = (
        "<Parallel>",
        "</Parallel>",
        "<Goal>",
        "</Goal>",
        "<Outline>",
        "</Outline>",
        "<Path>",
        "</Path>",
        "<Conclusion>",
        "</Conclusion>",
    )
    trigger: str = "</Goal>"
    opening: str = "<Goal>"
    outline: str = rf"<Outline>\s*{_ID}"
    repeats: str = "keep"
    header: str = "\n<Path>\n{id}:"
    stop: str = "</Path>"
    unclosed: str = ""
    after: str = "<Conclusion>\n"
    closing: str | None = None
    shape: str = "(<Parallel><Goal>(<Outline></Outline>)+</Goal>(<Path></Path>)+<Conclusion></Conclusion></Parallel>)*"
    join: str = "concat"
    nested: bool = True
    max_depth: int | None = 5
    min_left: int = 30
    max_blocks: int = 2**20
    released: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.released, bool):
            raise ValueError(f"Multiverse: released={self.released!r}; pass True or False")
        variants = {False: ("", "\n<Path>\n{id}:", 0), True: ("\n", "<Path>\n{id}:", 1)}
        for field, mine, other in zip(
            ("lead", "header", "kept"), variants[self.released], variants[not self.released], strict=True
        ):
            if getattr(self, field) == other:  # what was given of one's own stays
                object.__setattr__(self, field, mine)
        super().__post_init__()
