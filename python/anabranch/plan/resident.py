"""The arrays of a kept plan on a device, advanced there.

Between two topology changes a decode step appends one token to each branch's tail, and nothing else changes in the
plan. The planner does that on the host, in place; uploading its buffers in every step would cost more than the
step's kernels on a large tree. So the device makes the same change from what a step uploads anyway, its slots and
positions: no transfer, no allocation, no change of address or shape, no waiting. A captured CUDA graph needs all of
that.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from anabranch import _core
from anabranch.plan.arrays import PlanArrays, section, split_buffers, upload
from anabranch.plan.layout import ItemField

#: ``advance(arrays, tails, slots, positions)`` of a backend
AdvanceKernel = Callable[[PlanArrays, Tensor, Tensor, Tensor], None]


class ResidentPlan:
    """The arrays of one build of a plan on a device, and how far they have been advanced.

    Attributes:
        build: the planner's number for this build; another one means another topology, and other arrays.
        arrays: on the device; advanced in place.
    """

    def __init__(self, result: _core.PlanResult, device: torch.device) -> None:
        self.build = result.build
        # Made in inference mode they could be advanced in inference mode only.
        with torch.inference_mode(False):
            self.arrays: PlanArrays = split_buffers(result, device, copy=True)
        # The planner's own buffers, which it advances in place; and how long its items were when this was made.
        self._host_items = section(result, "items")
        self._host_lengths = self._host_items[:, ItemField.KV_LEN].copy()
        self._host_rows = section(result, "rows")
        self._tails: Tensor | None = None

    def advance(self, slots: Tensor, positions: Tensor, kernel: AdvanceKernel | None = None) -> None:
        """One decode step further, after the planner has made the same step on the host.

        Args:
            slots: int32 [rows], the slot of each branch's new token.
            positions: int64 [rows], the new rows' logical positions.
            kernel: a backend's own ``advance``; None: PyTorch's operators.
        """
        if self._tails is None:
            self._tails = self._find_tails(slots.device)
        (kernel or advance)(self.arrays, self._tails, slots, positions)

    def _find_tails(self, device: torch.device) -> Tensor:
        """int64 [rows]: the item that each row's new token went to, seen from what the planner's first step changed."""
        grown = np.flatnonzero(self._host_items[:, ItemField.KV_LEN] != self._host_lengths)
        rows = self._host_rows[self._host_items[grown, ItemField.ROW_BEGIN]]
        tails = np.full(self.arrays.num_rows, -1, dtype=np.int64)
        tails[rows] = grown
        if (tails < 0).any() or grown.size != tails.size:
            raise RuntimeError("a plan was advanced that has no tail for every row; report this, with the tree")
        return upload(tails, device)


def advance(arrays: PlanArrays, tails: Tensor, slots: Tensor, positions: Tensor) -> None:
    """What ``LivePlan::advance`` (csrc/plan/live_plan.cpp) does on the host, as PyTorch operators on a device.

    Args:
        arrays: advanced in place.
        tails: int64 [rows], the item that ends each row's context; that item has this row alone.
        slots, positions: int32 and int64 [rows].
    """
    items = arrays.items[tails]  # [rows, ITEM_FIELDS]
    positions = positions.to(torch.int32)
    place = (items[:, ItemField.KV_BEGIN] + items[:, ItemField.KV_LEN]).long()
    strip, at = place // arrays.strip, place % arrays.strip
    entry = arrays.kv_strips[strip]  # [rows, 2]
    token = torch.stack((slots, positions), 1)
    # A strip that begins; one that spells out its tokens; else the token lies side by side with the one before it, and
    # goes where nobody reads.
    arrays.kv_strips.index_put_((strip,), torch.where((at == 0)[:, None], token, entry))
    spelled = (at != 0) & (entry[:, 0] < 0)
    arrays.kv_spelled.index_put_((torch.where(spelled, ~entry[:, 0].long() + at, 0),), token)
    items[:, ItemField.KV_LEN] += 1
    items[:, ItemField.KV_POS_MAX] = torch.maximum(items[:, ItemField.KV_POS_MAX], positions)
    items[:, ItemField.ROW_POS_MIN] = positions
    arrays.limits.index_put_((items[:, ItemField.ROW_BEGIN].long(),), items[:, ItemField.KV_LEN])
    arrays.row_positions.copy_(positions)
    arrays.items.index_put_((tails,), items)
