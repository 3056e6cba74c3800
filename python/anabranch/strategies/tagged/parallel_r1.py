"""Parallel-R1 (arXiv 2509.07980): the model asks for a parallel block, the runtime opens its paths and the summary."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

from anabranch._check import number, whole_fields
from anabranch.strategies.api.strategy import Strategy
from anabranch.strategies.api.thread import Thread
from anabranch.strategies.tagged.shape import check_shape

TAGS = ("<Parallel>", "</Parallel>", "<Path>", "</Path>", "<Summary>", "</Summary>")
SHAPE = r"(<Parallel>(<Path></Path>)+</Parallel><Summary></Summary>)*"


@dataclass(frozen=True, kw_only=True)
class ParallelR1(Strategy):
    r"""Parallel-R1's format, to the token::

        … <Parallel><Path>…</Path><Path>…</Path></Parallel>
        <Summary>…</Summary> …

    The model writes ``<Parallel>``; the runtime opens `paths` paths, each with ``<Path>``, blind to one another. Behind
    the last it inserts ``</Parallel>``, a newline and ``<Summary>``, and the model writes the summary up to
    ``</Summary>``, as a step of its own, then goes on. After `max_blocks` blocks the answer ends behind the summary.

    paths: how many. positions: "dense", as in the released inference: the paths stand one behind another and are
        computed again, so that each sees those before it; or "shared", as the "Unseen" variant is trained: all
        paths begin on one position, siblings stay blind, what follows goes on behind the longest.
    max_blocks: most blocks; None: no limit.
    path_tokens: most tokens sampled in a path; None leaves the answer's own limit.
    path_temperature: paths are sampled with it; None: with the generation config's own settings.

    An EOS in a path or a summary is replaced by its closing tag, which is appended where a limit ended it. Both are
    counted as malformed, as are tags out of place, which are plain text. A summary that the answer's limit leaves no
    token for stays open, and the answer ends there.

    >>> engine.generate(prompt, strategy=ab.ParallelR1(paths=2, path_tokens=64), max_new_tokens=256).text
    """

    paths: int = 2
    positions: str = "dense"
    max_blocks: int | None = 4
    path_tokens: int | None = 4096
    path_temperature: float | None = 1.0

    def __post_init__(self) -> None:
        whole_fields(self, ("paths", "max_blocks", "path_tokens"), optional=("max_blocks", "path_tokens"))
        if self.positions not in ("dense", "shared"):
            raise ValueError(f"ParallelR1: positions={self.positions!r}; pass 'dense' or 'shared'")
        if self.path_temperature is not None:
            number(self.path_temperature, "ParallelR1: path_temperature", positive=True, hint=", or None")

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("concat joins",) if self.positions == "shared" else ()

    def run(self, trunk: Thread) -> Generator[Any, Any, None]:
        # No generator itself: an unfit tokenizer is told before anything runs.
        return self._write(trunk, trunk.tag_ids(TAGS))

    def _write(self, trunk: Thread, ids: dict[str, int]) -> Generator[Any, Any, None]:
        blocks = 0
        while blocks != self.max_blocks:
            end = yield trunk.decode(stop=ids["<Parallel>"])
            if end.stop != ids["<Parallel>"]:
                break
            blocks += 1
            yield from self._paths(trunk, ids)
            newline = trunk.encode("\n", (ids["</Parallel>"],))
            trunk.insert([ids["</Parallel>"], *newline, ids["<Summary>"]])
            summary = yield trunk.decode(stop=ids["</Summary>"])
            if not summary.token_ids:
                break
            self._close(trunk, ids["</Summary>"], "</Summary>")
        yield trunk
        check_shape(trunk, ids, SHAPE)

    def _paths(self, trunk: Thread, ids: dict[str, int]) -> Generator[Any, Any, None]:
        sampling = None
        if self.path_temperature is not None:
            sampling = {"do_sample": True, "temperature": float(self.path_temperature)}
        kids = trunk.fork([[ids["<Path>"]]] * self.paths)
        yield [kid.decode(self.path_tokens, stop=ids["</Path>"], sampling=sampling) for kid in kids]
        for kid in kids:
            self._close(kid, ids["</Path>"], "</Path>")
        yield trunk.join(kids, "reprefill" if self.positions == "dense" else "concat")

    @staticmethod
    def _close(thread: Thread, closing: int, tag: str) -> None:
        """Make a part end with its tag: in the place of an EOS, or behind what a limit cut off."""
        end = thread.ended
        assert end is not None
        if end.stop == closing:
            return
        thread.malformed(f"ended by {end.reason} without {tag}; closed")
        if end.reason == "eos":
            thread.truncate(thread.length - 1)
        thread.insert([closing])
