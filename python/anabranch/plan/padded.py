"""A plan in memory that outlives it: what a captured CUDA graph reads, whatever the topology.

A graph holds addresses and launch sizes. Here both are those of capacities: kernels are launched for as many items,
partial results and merges as fit, and read on the device how many there are (``PlanArrays.counts``); the rest end at
once. A fork, a join or an end that fits writes other numbers to the same places. The graph itself appends a step's
tokens (`resident.advance`), but to rows whose tail is −1: all of them in a step whose plan was just sent, since that
holds the tokens already, and those that only fill up the graph's rows.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anabranch import _core
from anabranch.plan.arrays import PlanArrays, section, staged
from anabranch.plan.layout import ITEM_FIELDS, SECTIONS, ItemField
from anabranch.plan.resident import tails_of

__all__ = ["PaddedPlan"]

# Times as much as the first plan takes, and at least so many entries: of what only memory is needed for, and of what
# kernels are launched for.
ROOM, LEAST = 8, 4096
LAUNCH_ROOM, LEAST_LAUNCHED = 2, 256


class PaddedPlan:
    """The arrays of one plan after another, in the same memory on a device.

    Args:
        result: the first plan.
        rows: most rows of a step.
        device: where.

    Attributes:
        tails: int64 [rows], see `resident.advance`.
    """

    def __init__(self, result: _core.PlanResult, rows: int, device: torch.device) -> None:
        self.rows = rows
        self._build, self._advances = -1, -1
        sizes = {name: max(ROOM * _entries(result, name), LEAST) for name in SECTIONS}
        sizes["items"] = max(LAUNCH_ROOM * result.num_items, LEAST_LAUNCHED)
        # Every row may be merged, those that fill up included.
        sizes |= {"row_positions": rows, "merge_rows": rows, "merge_ptr": rows + 1}
        # The last item, strip and limit belong to nobody.
        self._most = {name: size - (name in ("items", "kv_strips", "limits")) for name, size in sizes.items()}
        self._most_partials = max(LAUNCH_ROOM * result.num_partials, LEAST_LAUNCHED)
        with torch.inference_mode(False):  # made in inference mode they could be changed in inference mode only
            flat = {name: torch.zeros(size * _WIDTH.get(name, 1), dtype=torch.int32, device=device)
                    for name, size in sizes.items()}  # fmt: skip
            self._counts = torch.zeros(3, dtype=torch.int32, device=device)
            self.tails = torch.full((rows,), -1, dtype=torch.int64, device=device)
        parts: dict[str, Any] = {
            name: part.view(-1, _WIDTH[name]) if name in _WIDTH else part for name, part in flat.items()
        }
        self._arrays = PlanArrays(
            **parts, strip=result.strip, num_items=self._most["items"], num_partials=self._most_partials,
            num_merge=rows, tile_rows=result.tile_rows, num_runs=0, num_absorbed=0, kv_tokens=0, counts=self._counts,
            most_parts=result.most_parts,
        )  # fmt: skip
        self._host_items = self._host_rows = self._host_lengths = np.zeros(0, dtype=np.int32)
        self._appends = False  # whether `tails` are those of the plan that is here

    def arrays(self, rows: int) -> PlanArrays:
        """What a forward of so many rows reads; the same memory each time."""
        return replace(self._arrays, row_positions=self._arrays.row_positions[:rows])

    def fits(self, result: _core.PlanResult) -> bool:
        """Whether a plan has room here."""
        held = self._arrays
        if (result.strip, result.tile_rows, result.most_parts) != (held.strip, held.tile_rows, held.most_parts):
            return False
        if result.num_rows > self.rows:
            return False
        return result.num_partials <= self._most_partials and all(
            _entries(result, name) <= self._most[name] for name in SECTIONS if name not in _BY_ROW
        )

    def follow(self, result: _core.PlanResult, rows: int) -> None:
        """Bring the device to where it is right once the graph of `rows` rows has appended a step's tokens.

        Args:
            result: the planner's latest, which fits.
            rows: of the graph, at least the plan's.
        """
        if (result.build, result.advances) == (self._build, self._advances + 1):
            if not self._appends:
                tails = tails_of(self._host_items, self._host_rows, self._host_lengths, result.num_rows)
                self._put(self.tails[: result.num_rows], tails)
                self._appends = True
        else:
            self._send(result, rows)
        self._build, self._advances = result.build, result.advances

    def _send(self, result: _core.PlanResult, rows: int) -> None:
        filling = rows - result.num_rows
        for name in SECTIONS:
            values = section(result, name)
            if name == "row_positions":
                values = values[: result.num_rows]
            elif name == "merge_rows":  # rows that fill up have no partials, and so a result: 0
                values = np.concatenate((values[: result.num_merge], np.arange(result.num_rows, rows, dtype=np.int32)))
            elif name == "merge_ptr":
                values = values[: result.num_merge + 1]
                values = np.concatenate((values, np.full(filling, values[-1], dtype=np.int32)))
            to = getattr(self._arrays, name).view(-1)
            self._put(to[: values.size], values.reshape(-1))
        counts = (result.num_items, result.num_partials, result.num_merge + filling)
        self._put(self._counts, np.array(counts, dtype=np.int32))
        self.tails.fill_(-1)
        self._appends = False
        self._host_items, self._host_rows = section(result, "items"), section(result, "rows")
        self._host_lengths = self._host_items[:, ItemField.KV_LEN].copy()

    def _put(self, to: Tensor, values: np.ndarray) -> None:
        to.copy_(staged(np.ascontiguousarray(values), to.device), non_blocking=True)


def _entries(result: _core.PlanResult, name: str) -> int:
    values = section(result, name)
    return values.shape[0] // 2 if name.startswith("kv_") else values.shape[0]


_WIDTH = {"items": ITEM_FIELDS, "kv_strips": 2, "kv_spelled": 2}
_BY_ROW = ("row_positions", "merge_rows", "merge_ptr")
