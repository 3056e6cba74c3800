"""A kept plan's arrays on a device, advanced there.

Between two topology changes a decode step appends one token to each branch's tail, and that is all that changes in a
plan. The planner does it on the host, in place; uploading its whole buffer every step would cost more than the step's
kernels on a large tree. So the device does the same from what a step uploads anyway, its slots and positions: no
transfer, no allocation, no change of address or shape, no waiting: what a captured CUDA graph needs.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from anabranch.plan.arrays import PlanArrays, split_buffer, upload

KV_BEGIN, KV_LEN, ROW_BEGIN, KV_POS_MAX, ROW_POS_MIN = 0, 1, 2, 5, 6  # fields of an item


class ResidentPlan:
    """The arrays of one build of a plan, and how far they have come.

    Attributes:
        build: the planner's number for this build; another one means another topology, and other arrays.
        arrays: on the device; advanced in place.
    """

    def __init__(self, result: tuple, device: torch.device) -> None:
        self.build = result[0]
        # Made in inference mode they could be advanced in inference mode only.
        with torch.inference_mode(False):
            self.arrays: PlanArrays = split_buffer(result, device, copy=True)
        # The planner's own buffer, which it advances in place; and how long its items were when this was made.
        self._host_items = host_items(result)
        self._host_lengths = self._host_items[:, KV_LEN].copy()
        self._host_rows = host_rows(result)
        self._tails: Tensor | None = None

    def advance(self, slots: Tensor, positions: Tensor, kernel: Callable[..., None] | None = None) -> None:
        """One decode step on, after the planner has gone the same step on the host.

        Args:
            slots: int32 [rows], where each branch's new token lies.
            positions: int64 [rows], the new rows' logical positions.
            kernel: a backend's own ``advance(arrays, tails, slots, positions)``; None: PyTorch's operators.
        """
        if self._tails is None:
            self._tails = self._find_tails(slots.device)
        (kernel or advance)(self.arrays, self._tails, slots, positions)

    def _find_tails(self, device: torch.device) -> Tensor:
        """int64 [rows]: the item that each row's new token went to, seen from what the planner's first step changed."""
        grown = np.flatnonzero(self._host_items[:, KV_LEN] != self._host_lengths)
        rows = self._host_rows[self._host_items[grown, ROW_BEGIN]]
        tails = np.full(self.arrays.num_rows, -1, dtype=np.int64)
        tails[rows] = grown
        if (tails < 0).any() or grown.size != tails.size:
            raise RuntimeError("a plan was advanced that has no tail for every row; report this, with the tree")
        return upload(tails, device)


def _section(result: tuple, index: int) -> np.ndarray:
    _, buffer, begin, _ = result
    return buffer[begin[index] : begin[index + 1]]


def host_items(result: tuple) -> np.ndarray:
    """int32 [num_items, 8], a view of the planner's buffer."""
    num_items = result[3][0]
    return _section(result, 2)[: num_items * 8].reshape(num_items, 8)


def host_rows(result: tuple) -> np.ndarray:
    """The items' rows, int32, a view of the planner's buffer."""
    return _section(result, 3)


def advance(arrays: PlanArrays, tails: Tensor, slots: Tensor, positions: Tensor) -> None:
    """What ``LivePlan::advance`` (csrc/plan/plan.cpp) does on the host, as PyTorch operators on the arrays' device.

    Args:
        arrays: advanced in place.
        tails: int64 [rows], the item that ends each row's context; that item has this row alone.
        slots, positions: int32 and int64 [rows].
    """
    items = arrays.items[tails]  # [rows, 8]
    positions = positions.to(torch.int32)
    at = (items[:, KV_BEGIN] + items[:, KV_LEN]).long()
    arrays.kv_slots.index_put_((at,), slots)
    arrays.kv_positions.index_put_((at,), positions)
    items[:, KV_LEN] += 1
    items[:, KV_POS_MAX] = torch.maximum(items[:, KV_POS_MAX], positions)
    items[:, ROW_POS_MIN] = positions
    arrays.limits.index_put_((items[:, ROW_BEGIN].long(),), items[:, KV_LEN])
    arrays.row_positions.copy_(positions)
    arrays.items.index_put_((tails,), items)
