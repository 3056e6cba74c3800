"""Pictures of a `BranchMask`: half blocks in the terminal, an image for a paper. Neither builds a [T, T] matrix."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from anabranch.attention.mask import BranchMask

__all__ = ["coverage", "plot", "show"]

# Colours that stay apart in print and for colour-blind readers: what a token sees of others, and of its own segment.
CONTEXT, OWN = (120, 170, 220), (24, 78, 150)
_CHUNK = 4096


def coverage(mask: BranchMask, cells: int) -> tuple[np.ndarray, np.ndarray]:
    """Two float64 [n, n] arrays, n = min(cells, T): the share of each cell's (row, column) pairs that is visible, in
    earlier segments and in the row's own."""
    total = mask.num_tokens
    n = max(1, min(cells, total))
    edges = np.linspace(0, total, n + 1) if n < total else np.arange(n + 1, dtype=np.float64)
    starts, ptr, cols = (x.cpu().numpy() for x in (mask.starts, mask.row_ptr, mask.cols))
    size = np.diff(edges)

    def overlap(begin: np.ndarray, end: np.ndarray) -> np.ndarray:  # [intervals] → [intervals, n]
        return np.clip(np.minimum(end[:, None], edges[1:]) - np.maximum(begin[:, None], edges[:-1]), 0, None)

    context, own = np.zeros((n, n)), np.zeros((n, n))
    segment = np.repeat(np.arange(len(starts) - 1), np.diff(ptr))
    for at in range(0, len(cols), _CHUNK):
        s = segment[at : at + _CHUNK]
        context += overlap(starts[s], starts[s + 1]).T @ overlap(cols[at : at + _CHUNK, 0], cols[at : at + _CHUNK, 1])
    first = np.repeat(starts[:-1], np.diff(starts))
    for at in range(0, total, _CHUNK):
        row = np.arange(at, min(at + _CHUNK, total))
        own += overlap(row, row + 1).T @ overlap(first[row], row + 1)
    area = size[:, None] * size[None, :]
    return context / area, own / area


def show(mask: BranchMask, width: int = 64, labels: Sequence[str] | None = None, console: Any = None) -> None:
    """Draw a mask in the terminal, two rows of tokens a line of half blocks; long ones are downsampled to `width`.

    labels: one a segment, written beside its first line. console: a rich Console, by default one on standard output.
    """
    from rich.console import Console
    from rich.text import Text

    if width < 1:
        raise ValueError(f"width: must be at least 1, got {width}")
    console = Console() if console is None else console
    context, own = coverage(mask, width)
    n = len(context)
    text = Text()
    beside = _labels(mask, labels, n) if labels is not None else {}
    for top in range(0, n, 2):
        for column in range(n):
            text.append_text(_half_block(context[top : top + 2, column], own[top : top + 2, column]))
        text.append(" " + " ".join(filter(None, (beside.get(top), beside.get(top + 1)))) if beside else "")
        text.append("\n")
    scale = f", one cell = {mask.num_tokens / n:.3g} tokens" if n < mask.num_tokens else ""
    text.append(f"{mask.num_tokens} tokens, {mask.num_segments} segments{scale}   ")
    text.append("█", style=_rgb(OWN)).append(" own segment  ").append("█", style=_rgb(CONTEXT)).append(" context")
    console.print(text, soft_wrap=True, highlight=False)


def plot(
    mask: BranchMask,
    path: str | os.PathLike[str],
    labels: Sequence[str] | None = None,
    title: str | None = None,
    size: float = 4.0,
    dpi: int = 200,
    cells: int = 1024,
) -> None:
    """Write a mask as an image; the ending of `path` says which kind (png, svg, pdf).

    labels: one a segment, for the axes. size: inches a side. cells: longer masks are downsampled to so many.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("plot: needs matplotlib; pip install 'anabranch[plots]'") from None
    context, own = coverage(mask, cells)
    image = np.ones((*context.shape, 3))
    for share, colour in ((context, CONTEXT), (own, OWN)):
        image -= share[..., None] * (1 - np.asarray(colour) / 255)
    figure = Figure(figsize=(size, size), dpi=dpi, layout="constrained")
    axes = figure.add_subplot()
    total = mask.num_tokens
    axes.imshow(np.clip(image, 0, 1), extent=(0, total, total, 0), interpolation="nearest", aspect="equal")
    starts = mask.starts.tolist()
    if labels is not None:
        if len(labels) != mask.num_segments:
            raise ValueError(f"labels: expected {mask.num_segments}, one a segment, got {len(labels)}")
        middle = [(a + b) / 2 for a, b in pairwise(starts)]
        axes.set_xticks(middle, labels, rotation=90, fontsize=7)
        axes.set_yticks(middle, labels, fontsize=7)
        axes.tick_params(length=0)
    if mask.num_segments <= 40:
        for edge in starts[1:-1]:
            axes.axhline(edge, color="0.6", linewidth=0.4)
            axes.axvline(edge, color="0.6", linewidth=0.4)
    axes.set_xlabel("sees" if labels is None else "")
    axes.set_ylabel("token" if labels is None else "")
    if title is not None:
        axes.set_title(title, fontsize=9)
    figure.savefig(path)


def _half_block(context: np.ndarray, own: np.ndarray) -> Any:
    """One character for one column of two rows (or one, at the end)."""
    from rich.text import Text

    shades = [_shade(c, o) for c, o in zip(context, own, strict=True)]
    top, bottom = (*shades, None)[:2]
    if top and bottom:
        # Where there is no colour, "█" still says that both are visible.
        return Text("█", style=_rgb(top)) if top == bottom else Text("▀", style=f"{_rgb(top)} on {_rgb(bottom)}")
    return Text("▀", style=_rgb(top)) if top else Text("▄", style=_rgb(bottom)) if bottom else Text("·", style="dim")


def _shade(context: float, own: float) -> tuple[int, int, int] | None:
    if context + own <= 0.02:
        return None
    part = own / (context + own)
    r, g, b = (round(c + (o - c) * part) for c, o in zip(CONTEXT, OWN, strict=True))
    return r, g, b


def _rgb(colour: tuple[int, int, int]) -> str:
    return f"rgb({colour[0]},{colour[1]},{colour[2]})"


def _labels(mask: BranchMask, labels: Sequence[str], n: int) -> dict[int, str]:
    if len(labels) != mask.num_segments:
        raise ValueError(f"labels: expected {mask.num_segments}, one a segment, got {len(labels)}")
    beside: dict[int, str] = {}
    for start, label in zip(mask.starts[:-1].tolist(), labels, strict=True):
        line = min(n - 1, start * n // max(1, mask.num_tokens))
        beside[line] = f"{beside[line]} {label}" if line in beside else label
    return beside
