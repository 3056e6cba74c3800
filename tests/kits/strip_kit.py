"""Strips, the way plans name tokens (docs/kernel_contract.md), written and read without the planner."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch


def lay_out(
    ranges: Sequence[tuple[Sequence[int], Sequence[int]]], strip: int, rng: np.random.Generator | None = None
) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """``kv_strips``, ``kv_spelled`` and where each range of (slots, positions) begins.

    A range begins where its first slot lies in its page. With ``rng`` some begin elsewhere, so that all of their tokens
    are spelled out, and some strips are spelled out that need not be (never those of one token).
    """
    strips: list[tuple[int, int]] = []
    spelled: list[tuple[int, int]] = [(-1, -1)]  # nobody's
    begins = []
    for slots, positions in ranges:
        pairs = [(int(s), int(p)) for s, p in zip(slots, positions, strict=True)]
        phase = pairs[0][0] % strip if pairs else 0
        if rng is not None and rng.random() < 0.3:
            phase = int(rng.integers(0, strip))
        begins.append(len(strips) * strip + phase)
        places: list[tuple[int, int] | None] = [None] * phase + pairs  # type: ignore[list-item]
        for at in range(0, len(places), strip):
            part = places[at : at + strip]
            first = next(i for i, token in enumerate(part) if token is not None)
            slot, position = (n - first for n in part[first])  # type: ignore[union-attr]
            together = slot % strip == 0 and slot >= 0
            together &= all(token in (None, (slot + i, position + i)) for i, token in enumerate(part))
            if strip == 1 or (together and (rng is None or rng.random() < 0.8)):
                strips.append((slot, position))
                continue
            strips.append((~len(spelled), 0))
            spelled += [(-1, -1) if token is None else token for token in part]
            spelled += [(-1, -1)] * (strip - len(part))

    def tensor(pairs: list[tuple[int, int]]) -> torch.Tensor:
        return torch.tensor(pairs, dtype=torch.int32).view(-1, 2)

    return tensor(strips), tensor(spelled), begins


def tokens(arrays: Any, begin: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Slots and positions of the tokens at places ``begin`` … ``begin + length − 1``."""
    places = np.arange(begin, begin + length)
    strips, spelled = arrays.kv_strips.cpu().numpy(), arrays.kv_spelled.cpu().numpy()
    entry, at = strips[places // arrays.strip], (places % arrays.strip)[:, None]
    out = np.where(entry[:, :1] >= 0, entry + at, spelled[np.where(entry[:, :1] >= 0, 0, ~entry[:, :1] + at)[:, 0]])
    return out[:, 0], out[:, 1]
