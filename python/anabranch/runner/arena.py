"""Memory for recorded steps: blocks that stay where they are, and are used again once no tensor is in them."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["Arena"]

_LINE = 64  # bytes


class Arena:
    """Memory in blocks that are used again once no tensor is in them.

    spare: unused blocks that are kept at most; None: all, since somebody knows them by their address.
    """

    def __init__(self, spare: int | None = None) -> None:
        self.blocks: list[Any] = []
        self._spare = spare

    def take(self, size: int) -> Any:
        """A free block of at least so many bytes: NumPy uint8, on a cache line."""
        if self._spare is not None:
            idle = [i for i, held in enumerate(_held(self.blocks)) if held <= _IDLE]
            for i in reversed(idle[: -self._spare]):
                del self.blocks[i]
        idle = [i for i, held in enumerate(_held(self.blocks)) if held <= _IDLE and self.blocks[i].nbytes >= size]
        if not idle:
            self.blocks.append(_block(size))
            return self.blocks[-1]
        return self.blocks[min(idle, key=lambda i: self.blocks[i].nbytes)]

    def empty(self, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor in a block of its own."""
        extent = 1 + sum((n - 1) * s for n, s in zip(size, stride, strict=True)) if all(size) else 0
        flat = torch.from_numpy(self.take(max(extent, 1) * dtype.itemsize))[: extent * dtype.itemsize]
        return flat.view(dtype).as_strided(tuple(size), tuple(stride))

    def dense(self, size: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A contiguous tensor in a block of its own."""
        extent = math.prod(size) * dtype.itemsize
        return torch.from_numpy(self.take(max(extent, 1)))[:extent].view(dtype).view(tuple(size))

    def poison(self) -> None:
        """Fills all blocks with NaN: what a run does not compute itself shows."""
        for block in self.blocks:
            block.fill(0xFF)

    def block_of(self, place: int) -> Any:
        """The block that an address lies in; None for none."""
        return next((b for b in self.blocks if b.ctypes.data <= place < b.ctypes.data + b.nbytes), None)


def _block(size: int) -> Any:
    memory = np.empty(size + _LINE, dtype=np.uint8)
    at = -memory.ctypes.data % _LINE
    return memory[at : at + size]


def _held(blocks: list[Any]) -> list[int]:
    # A tensor made of an array holds a reference to it for as long as any tensor shares its memory.
    return [sys.getrefcount(block) for block in blocks]


_IDLE = _held([_block(1)])[0]
