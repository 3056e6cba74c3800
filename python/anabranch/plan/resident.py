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
        advances: the planner's count of advances that the device stands at.
        arrays: on the device; advanced in place.
    """

    def __init__(self, result: _core.PlanResult, device: torch.device) -> None:
        self.build, self.advances = result.build, result.advances
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
        self.advances += 1

    def _find_tails(self, device: torch.device) -> Tensor:
        return upload(tails_of(self._host_items, self._host_rows, self._host_lengths, self.arrays.num_rows), device)


def tails_of(items: np.ndarray, rows: np.ndarray, lengths: np.ndarray, num_rows: int) -> np.ndarray:
    """int64 [num_rows]: the item that each row's new token went to, seen from what the planner's first step changed.

    Args:
        items, rows: the planner's own buffers, a step after they were built.
        lengths: of the items' tokens, a step before.
    """
    grown = np.flatnonzero(items[:, ItemField.KV_LEN] != lengths)
    tails = np.full(num_rows, -1, dtype=np.int64)
    tails[rows[items[grown, ItemField.ROW_BEGIN]]] = grown
    if (tails < 0).any() or grown.size != tails.size:
        raise RuntimeError("a plan was advanced that has no tail for every row; report this, with the tree")
    return tails


def advance(arrays: PlanArrays, tails: Tensor, slots: Tensor, positions: Tensor) -> None:
    """What ``LivePlan::advance`` (csrc/plan/live_plan.cpp) does on the host, as PyTorch operators on a device.

    Args:
        arrays: advanced in place.
        tails: int64 [rows], the item that ends each row's context; that item has this row alone. −1: a row that gets no
            token (`PaddedPlan`); what is written for it goes to the last item, strip and limit, which only padded
            arrays have to spare.
        slots, positions: int32 and int64 [rows].
    """
    live = tails >= 0
    tails = torch.where(live, tails, arrays.items.shape[0] - 1)
    items = arrays.items[tails]  # [rows, ITEM_FIELDS]
    positions = positions.to(torch.int32)
    place = (items[:, ItemField.KV_BEGIN] + items[:, ItemField.KV_LEN]).long()
    strip, at = torch.where(live, place // arrays.strip, arrays.kv_strips.shape[0] - 1), place % arrays.strip
    entry = arrays.kv_strips[strip]  # [rows, 2]
    token = torch.stack((slots, positions), 1)
    # A strip that begins; one that spells out its tokens; else the token lies side by side with the one before it, and
    # goes where nobody reads.
    arrays.kv_strips.index_put_((strip,), torch.where((at == 0)[:, None], token, entry))
    spelled = live & (at != 0) & (entry[:, 0] < 0)
    arrays.kv_spelled.index_put_((torch.where(spelled, ~entry[:, 0].long() + at, 0),), token)
    items[:, ItemField.KV_LEN] += 1
    items[:, ItemField.KV_POS_MAX] = torch.maximum(items[:, ItemField.KV_POS_MAX], positions)
    items[:, ItemField.ROW_POS_MIN] = positions
    limit = torch.where(live, items[:, ItemField.ROW_BEGIN].long(), arrays.limits.shape[0] - 1)
    arrays.limits.index_put_((limit,), items[:, ItemField.KV_LEN])
    arrays.row_positions.copy_(positions)
    arrays.items.index_put_((tails,), items)
