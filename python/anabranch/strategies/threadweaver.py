"""ThreadWeaver (Lian et al. 2025, arXiv 2512.07843): the model writes outlines, one thread works each of them out."""

from __future__ import annotations

from dataclasses import dataclass

from .tagged import Tagged


@dataclass(frozen=True, kw_only=True)
class ThreadWeaver(Tagged):
    r"""ThreadWeaver's format, to the token::

        … <Parallel>
        <Outlines>
        <Outline>1: Compute (Δx)^2.</Outline>
        <Outline>2: Compute (Δy)^2.</Outline>
        </Outlines>
        <Thread>
        1: …</Thread><Thread>
        2: …</Thread>
        </Parallel> …

    The model decides whether, when and into how many threads. A thread sees everything before it and all outlines, but
    no sibling, and begins on the position after ``</Outlines>``. At the join the threads' texts follow one another and
    the later ones are computed again, so that each sees those before it, on dense positions; the first one's KV is
    kept. The model itself writes ``</Parallel>``. A thread in which EOS or a token limit came before ``</Thread>`` is
    closed, and the answer ends there with ``</Parallel>``; so does one that would open a 33rd block.

    ``ab.Sequential(ab.ThreadWeaver())`` writes the same tokens with one thread at a time, each as blind to its siblings
    as before. A model that writes it all in one go, later threads in sight of the earlier ones, is ``strategy=None``.
    """

    tags: tuple[str, ...] = (
        "<Parallel>",
        "</Parallel>",
        "<Outlines>",
        "</Outlines>",
        "<Outline>",
        "</Outline>",
        "<Thread>",
        "</Thread>",
    )
    trigger: str = "</Outlines>"
    opening: str = "<Outlines>"
    outline: str = r"<Outline>\s*([0-9]+(?:\.[0-9]+)*)\s*:"
    header: str = "\n<Thread>\n{id}:"
    next_header: str | None = "<Thread>\n{id}:"
    stop: str = "</Thread>"
    unclosed: str = "\n</Thread>"
    after: str = "\n"
    closing: str = "\n</Parallel>"
    shape: str = r"(<Parallel><Outlines>(<Outline></Outline>)+</Outlines>(<Thread></Thread>)+</Parallel>)*"
