"""Interval tables of a branch mask: from what each segment sees to who sees each segment."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    pass


def _starts(lengths: np.ndarray) -> np.ndarray:
    starts = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=starts[1:])
    return starts


def transpose_intervals(starts: np.ndarray, row_ptr: np.ndarray, cols: np.ndarray) -> tuple[Tensor, Tensor]:
    """(col_ptr, rows) of `BranchMask`. Work grows with what it returns: a segment's row interval opens where a
    segment sees it and the one before does not, and closes where one does not and the one before did."""
    count = len(starts) - 1
    kept = np.flatnonzero(starts[1:] > starts[:-1])  # empty segments are nobody's column and nobody's row
    edges = starts[np.append(kept, count)]
    owner = np.searchsorted(kept, np.repeat(np.arange(count), np.diff(row_ptr)))
    real = np.repeat(starts[1:] > starts[:-1], np.diff(row_ptr))
    owner, first, last = owner[real], *(np.searchsorted(edges, cols[real, k]) for k in (0, 1))
    # Along (row segment, column segment), coverage by the segment itself (±1) and by the one before (±2).
    width = len(kept) + 1
    key = np.concatenate(
        [owner * width + first, owner * width + last, (owner + 1) * width + first, (owner + 1) * width + last]
    )
    step = np.repeat([1, -1, 2, -2], len(owner))
    order = np.argsort(key, kind="stable")
    key, state = key[order], np.cumsum(step[order])
    at = []  # (column segment, row segment) of every opening, then of every closing
    for wanted in (1, 2):
        i = np.flatnonzero(state[:-1] == wanted) if len(state) else np.empty(0, dtype=np.int64)
        sizes = key[i + 1] - key[i] if len(i) else np.empty(0, dtype=np.int64)
        column = np.repeat(key[i] % width, sizes) + np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        row = np.repeat(key[i] // width, sizes)
        sort = np.lexsort((row, column))
        at.append((column[sort], row[sort]))
    (column, opening), (_, closing) = at
    rows = np.stack([edges[opening], edges[closing]], axis=1).astype(np.int32)
    sizes = np.zeros(count, dtype=np.int64)
    sizes[kept] = np.bincount(column, minlength=len(kept))[: len(kept)]
    return torch.from_numpy(_starts(sizes).astype(np.int32)), torch.from_numpy(rows)
