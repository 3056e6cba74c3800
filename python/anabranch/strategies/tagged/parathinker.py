"""ParaThinker (arXiv 2509.04475): paths with a tag each, as many as wanted, then a summary."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, ClassVar

from anabranch._check import whole_fields
from anabranch.strategies.api.strategy import Strategy
from anabranch.strategies.api.thread import Thread


@dataclass(frozen=True, kw_only=True)
class ParaThinker(Strategy):
    """ParaThinker's format, to the token::

        prompt <think1>…</think1> <think2>…</think2> … <summary>…</summary>      (no space between them)

    Path i begins with ``<thinki>`` right behind the prompt, blind to the others, all on the same positions. They are
    joined as they are, nothing is computed again, and the summary, which sees all of them, goes on one position behind
    the longest. The model adds vectors that it learnt to K, before the rotation, and to V: those of segment i in path
    i, its tags included, those of segment 0 in the prompt and the summary (``Engine(segment_vectors=…)``).

    paths: how many, at most as many as the checkpoint has vectors and the tokenizer tags for.
    path_tokens: most tokens sampled in a path, which is left open there, as in the released code. summary_tokens: most
        tokens of the summary. None leaves the answer's own limit.
    opening: how the summary is made to begin; the released example forces `ParaThinker.OPENING`.
    biased: whether the vectors are added. False: the format alone, on a model that was not trained with them.

    In a path another path's ``<thinkj>``, or ``<summary>``, becomes ``<think1>`` and the path goes on; what
    else would end it (``</thinkj>``, ``</think>``, ``</summary>``, EOS) becomes its own ``</thinki>``. What would end
    the summary becomes ``</summary>``. All of that is counted as malformed.

    >>> engine.generate(prompt, strategy=ab.ParaThinker(paths=3, path_tokens=32, biased=False), max_new_tokens=128).text
    """

    paths: int = 4
    path_tokens: int | None = None
    summary_tokens: int | None = None
    opening: str = ""
    biased: bool = True

    OPENING: ClassVar[str] = "By analyzing multiple reasoning processes above, I concluded that: The final answer is"
    needs = ("concat joins", "vectors added to K and V")

    def __post_init__(self) -> None:
        limits = ("path_tokens", "summary_tokens")
        whole_fields(self, ("paths", *limits), optional=limits)
        if not isinstance(self.opening, str):
            raise ValueError(f"ParaThinker: opening={self.opening!r}; pass a text, such as ParaThinker.OPENING")
        if not isinstance(self.biased, bool):
            raise ValueError(f"ParaThinker: biased={self.biased!r}; pass True or False")

    @property
    def kv_segments(self) -> int:  # type: ignore[override]
        return self.paths + 1 if self.biased else 0

    def run(self, trunk: Thread) -> Generator[Any, Any, None]:
        # No generator itself: an unfit tokenizer is told before anything runs.
        tags = [tag for i in range(1, self.paths + 1) for tag in (f"<think{i}>", f"</think{i}>")]
        ids = trunk.tag_ids([*tags, "<summary>", "</summary>"])
        return self._write(trunk, ids | self._known(trunk, ids))

    @staticmethod
    def _known(trunk: Thread, needed: dict[str, int]) -> dict[str, int]:
        """The format's other tags, as far as the tokenizer has them."""
        known: dict[str, int] = {}
        for tag in ("</think>", *(f"{t}think{i}>" for i in range(1, 9) for t in ("<", "</"))):
            if tag not in needed:
                try:
                    known |= trunk.tag_ids([tag])
                except ValueError:
                    continue
        return known

    def _write(self, trunk: Thread, ids: dict[str, int]) -> Generator[Any, Any, None]:
        numbers = range(1, self.paths + 1)
        headers = [[ids[f"<think{i}>"]] for i in numbers]
        kids = trunk.fork(headers, segments=list(numbers) if self.biased else None)
        yield [self._path(kid, i, ids) for i, kid in zip(numbers, kids, strict=True)]
        trunk.join(kids)
        opening = trunk.encode(self.opening, (ids["<summary>"],)) if self.opening else []
        trunk.insert([ids["<summary>"], *opening])
        end = yield trunk.decode(self.summary_tokens, stop=_ends(ids))
        self._close(trunk, ids, "</summary>", end)
        yield trunk

    def _path(self, kid: Thread, number: int, ids: dict[str, int]) -> Generator[Any, Any, None]:
        strays = [i for tag, i in ids.items() if not tag.startswith("</")]
        left = self.path_tokens
        while True:
            end = yield kid.decode(left, stop=[*_ends(ids), *strays])
            if end.stop not in strays:
                break
            kid.malformed("a path or the summary begun inside a path; taken for <think1>")
            kid.truncate(kid.length - 1)
            kid.insert([ids["<think1>"]])
            if left is not None and (left := left - len(end.token_ids)) < 1:
                return
        self._close(kid, ids, f"</think{number}>", end)

    @staticmethod
    def _close(thread: Thread, ids: dict[str, int], tag: str, end: Any) -> None:
        """Make what was ended end with its own tag; what a limit cut off stays open."""
        if end.stop == ids[tag]:
            return
        thread.malformed(f"ended by {'another tag' if end.reason == 'stop' else end.reason} without {tag}")
        if end.reason == "eos" or end.stop in _ends(ids):
            thread.truncate(thread.length - 1)
            thread.insert([ids[tag]])


def _ends(ids: dict[str, int]) -> list[int]:
    """What ends a path or the summary, besides EOS."""
    return [i for tag, i in ids.items() if tag.startswith("</")]
