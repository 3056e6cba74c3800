"""ThreadWeaver (Lian et al. 2025, arXiv 2512.07843): the model writes outlines, one thread works each of them out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from anabranch.strategies.tagged.tagged import Tagged

_PLAIN: dict[str, Any] = {
    "tags": (
        "<Parallel>",
        "</Parallel>",
        "<Outlines>",
        "</Outlines>",
        "<Outline>",
        "</Outline>",
        "<Thread>",
        "</Thread>",
    ),
    "after": "\n",
    "closing": "\n</Parallel>",
    "shape": r"(<Parallel><Outlines>(<Outline></Outline>)+</Outlines>(<Thread></Thread>)+</Parallel>)*",
}
_CONCLUSION: dict[str, Any] = {
    "tags": (*_PLAIN["tags"], "<Conclusion>", "</Conclusion>"),
    "after": "\n<Conclusion>\n",
    "closing": "\n<Conclusion>\n</Conclusion>\n</Parallel>",
    "shape": _PLAIN["shape"].replace("</Parallel>)*", "<Conclusion></Conclusion></Parallel>)*"),
}


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
    closed, and the answer ends there with ``</Parallel>``. As in the released controller there are at most 32
    iterations, what the trunk writes up to ``</Outlines>`` and a block counting one each: an answer ends behind its
    16th block, which is left open.

    conclusion: the variant in which the runtime opens ``<Conclusion>`` behind the threads, and the model writes it and
        closes it before ``</Parallel>``: the released code's default, where its training scripts leave it out. It
        needs both tags in the vocabulary.

    ``ab.Sequential(ab.ThreadWeaver())`` writes the same tokens with one thread at a time, each as blind to its siblings
    as before. A model that writes it all in one go, later threads in sight of the earlier ones, is ``strategy=None``.

    >>> engine.generate(prompt, strategy=ab.ThreadWeaver(), max_new_tokens=256).text
    """

    tags: tuple[str, ...] = _PLAIN["tags"]
    trigger: str = "</Outlines>"
    opening: str = "<Outlines>"
    outline: str = r"<Outline>\s*([0-9]+(?:\.[0-9]+)*)\s*:"
    header: str = "\n<Thread>\n{id}:"
    next_header: str | None = "<Thread>\n{id}:"
    stop: str = "</Thread>"
    unclosed: str = "\n</Thread>"
    after: str = _PLAIN["after"]
    closing: str = _PLAIN["closing"]
    shape: str = _PLAIN["shape"]
    max_iterations: int | None = 32
    conclusion: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.conclusion, bool):
            raise ValueError(f"ThreadWeaver: conclusion={self.conclusion!r}; pass True or False")
        mine, other = (_CONCLUSION, _PLAIN) if self.conclusion else (_PLAIN, _CONCLUSION)
        for field, text in mine.items():  # what was given of one's own stays; dataclasses.replace gives the other's
            if getattr(self, field) == other[field]:
                object.__setattr__(self, field, text)
        super().__post_init__()
