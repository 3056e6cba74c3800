"""Rotating queries once more: what a row needs to read keys as if it stood somewhere else.

Rotary embeddings turn each pair of a query's and a key's dimensions by position · frequency, so a score depends on the
difference of the two positions alone. Turned on by `offset` positions, a query sees keys as if it stood that much
further on; the keys stay as they were written.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from anabranch._check import shape_of

__all__ = ["Rotary", "rotate"]


@dataclass(frozen=True, eq=False)
class Rotary:
    """The rotation of one kind of layer.

    Attributes:
        frequencies: float [pairs], radians a position; 2 · pairs ≤ head_dim, further dimensions are not turned.
        interleaved: pairs are neighbours (0, 1), (2, 3), … (GPT-J, GLM); False: halves of the turned dimensions,
            (0, pairs), (1, pairs + 1), … (Llama).
        last: the dimensions that are turned are the last ones (DeepSeek); False: the first.

    >>> ab.Rotary(10000.0 ** (-torch.arange(0, 64, 2) / 64))
    """

    frequencies: Tensor
    interleaved: bool = False
    last: bool = False

    def __post_init__(self) -> None:
        given = self.frequencies
        if not isinstance(given, Tensor) or given.dim() != 1 or not given.is_floating_point():
            raise ValueError(f"frequencies: expected a floating-point tensor [pairs], got {shape_of(given)}")
        object.__setattr__(self, "frequencies", given.detach().to("cpu", torch.float64))

    def table(self, offsets: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin, float32 [len(offsets), pairs], on the device of `offsets` (int64)."""
        # In float64: a product of 10^5 positions and a frequency has no digits left in float32.
        angles = offsets.double()[:, None] * self.frequencies.to(offsets.device)
        return angles.cos().float(), angles.sin().float()


def rotate(q: Tensor, table: tuple[Tensor, Tensor], interleaved: bool, last: bool = False) -> Tensor:
    """q [n, heads, head_dim] with row i turned on by the angles table[…][i]; computed in float32 (float64 for float64).

    table: cos and sin [n, pairs], as `Rotary.table` gives them; the others as in `Rotary`.
    """
    pairs = table[0].shape[1]
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    cos, sin = (x[:, None].to(wide) for x in table)
    begin = q.shape[-1] - 2 * pairs if last else 0
    before, turned, behind = q.tensor_split((begin, begin + 2 * pairs), -1)
    turned = turned.to(wide)
    first, second = (turned[..., 0::2], turned[..., 1::2]) if interleaved else turned.split(pairs, -1)
    parts = first * cos - second * sin, second * cos + first * sin
    mixed = torch.stack(parts, -1).flatten(-2) if interleaved else torch.cat(parts, -1)
    return torch.cat([before, mixed.to(q.dtype), behind], -1)
