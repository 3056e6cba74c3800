"""Plans: which query rows attend to which KV slots, cut into work items for a kernel.

A plan is made once a topology, serves all layers, and knows no cache and no model. ``TreeCache.step`` makes one a step;
``Plan.from_block_tables`` makes one for a page pool of the user's own. The array layout is in docs/kernel_contract.md.
"""

from __future__ import annotations

import itertools
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from anabranch import _core
from anabranch._check import index_of, told
from anabranch.plan.arrays import FlatContexts, append_tokens, capturing, split_buffers, upload
from anabranch.plan.tile_config import core_params

if TYPE_CHECKING:
    from anabranch.plan.arrays import PlanArrays
    from anabranch.plan.tile_config import TileConfig


# Plans by handle, so that the torch op can be given a tensor instead of a Python object. Weak: a plan lives as long as
# the Step or the variable that holds it.
_plans: weakref.WeakValueDictionary[int, Plan] = weakref.WeakValueDictionary()

_handles = itertools.count(1)


def _no_step() -> None:
    """Stands for the step of a plan that belongs to none."""


def plan_of(handle: Tensor) -> Plan:
    """The live plan behind a handle tensor; raises ``ValueError`` when it is gone."""
    plan = _plans.get(int(handle))
    if plan is None:
        raise ValueError(
            "plan: the plan behind this handle no longer exists; keep its Step or Plan alive while it is used"
        )
    return plan


class Plan:
    """Who attends to what, ready to be cut into work items.

    Attributes:
        num_rows: query rows that attention expects.
        handle: int64 CPU tensor [1] that names this plan to ``torch.ops.anabranch.tree_attention``.
        device: where the arrays go.
        step: gives the Step that the plan belongs to; None for a plan of the user's own, and once the step is gone.
        batch_invariant: a row's attention is to be the same, bit for bit, whatever rows are beside it.

    >>> plan = ab.Plan.from_block_tables(torch.tensor([[0, 1], [0, 2]]), lengths=[20, 17], page_size=16)
    >>> plan.num_rows, plan.unique_tokens
    (2, 21)
    """

    batch_invariant = False
    step: Callable[[], Any] = staticmethod(_no_step)

    def __init__(self, num_rows: int, device: torch.device) -> None:
        self.num_rows = num_rows
        self.device = device
        number = next(_handles)
        # Not an inference tensor, even in inference mode: a compiled forward outside of it declares it as changed.
        # (torch.tensor takes several times as long, and so does a context that changes nothing.)
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(False):
                self.handle = torch.from_numpy(np.array([number]))
        else:
            self.handle = torch.from_numpy(np.array([number]))
        _plans[number] = self

    # -- what a kernel asks ------------------------------------------------------------------------------------------
    def arrays(self, group: int, tile_config: TileConfig) -> PlanArrays:
        """Work items for ``group`` query heads a KV head, cut as ``tile_config`` says. Cached."""
        raise NotImplementedError  # by every kind of plan

    def contexts(self) -> FlatContexts:
        """What each row sees, token by token."""
        raise NotImplementedError

    def queries(self, q: Tensor, layer: int) -> Tensor:
        """The query rows that kernels are given, [queries, Hq, D], of a step's q [rows, Hq, D].

        Kernels index them by the plan's ``rows``; the output, and ``merge_rows``, have ``num_rows`` rows. They are the
        same unless a row reads spans under several position offsets.
        """
        return q

    def check(self, layer: int, k_pages: Tensor) -> None:
        """Raises when the plan no longer fits: stale, or made for other pages."""

    def begin_write(self, layer: int) -> Tensor:
        """The slots that a write of this layer goes to, int32 [rows]; raises when it must not happen."""
        raise ValueError("plan: only a step of a TreeCache can be written through; write to your own pages yourself")

    def end_write(self, layer: int) -> None:
        """The layer's K and V are in their slots."""

    # -- plans for a pool of one's own -------------------------------------------------------------------------------
    @staticmethod
    def from_block_tables(
        block_tables: Tensor,
        lengths: Tensor | Sequence[int],
        page_size: int,
        query_lengths: Tensor | Sequence[int] | None = None,
    ) -> Plan:
        """A plan over a page pool of the user's own; shared pages are found, not declared.

        Sequences whose tables name the same page in the same column share the work for it, wherever that is: common
        prefixes, trees of them, or pages that meet again after a fork. Nothing is copied from the tables' KV.

        A loop may simply make a plan a step: where the sequences are those of a plan that is still alive, each longer
        by a few tokens or none, the new one is that plan advanced, not made from nothing. Its results are the same, up
        to rounding; the earlier one stays valid.

        Args:
            block_tables: [batch, max_pages], integers, any device. Row b lists the pages of sequence b; entries behind
                its length are not read (−1 is a common filler).
            lengths: [batch], tokens in each sequence's context, the new ones included. 0 gives an output of zeros.
            page_size: tokens a page.
            query_lengths: [batch], query rows of each sequence, its last tokens (causal among themselves). Default: one
                row each (decode). ``q`` then holds the rows of all sequences, one after another.

        Returns:
            a plan for ``anabranch.paged_tree_attention``; reusable for all layers until a length changes.

        Raises:
            ValueError: shapes that do not fit, a negative page inside a length, or more rows than tokens.
        """
        return TablePlan(block_tables, lengths, page_size, query_lengths)


def _ints(name: str, value: Tensor | Sequence[int] | np.ndarray, ndim: int) -> np.ndarray:
    try:
        array = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
    except ValueError:  # rows of different lengths
        raise ValueError(f"{name}: the rows have different lengths; pad them (−1 is a common filler)") from None
    if array.size == 0:
        array = array.astype(np.int64)
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name}: expected integers, got {array.dtype}")
    if array.ndim != ndim:
        raise ValueError(f"{name}: expected {ndim} dimension{'s' * (ndim > 1)}, got shape {list(array.shape)}")
    return array


# The newest plans over block tables: what a loop's next plan may be made of. Weak: they live as long as who made them
# keeps them.
_recent: deque[weakref.ref[TablePlan]] = deque(maxlen=8)


class TablePlan(Plan):
    """``Plan.from_block_tables``."""

    def __init__(
        self,
        block_tables: Tensor,
        lengths: Tensor | Sequence[int],
        page_size: int,
        query_lengths: Tensor | Sequence[int] | None,
    ) -> None:
        size = index_of(page_size)
        if size is None or not 1 <= size < 2**31:
            raise ValueError(f"page_size: must be at least 1, a whole number below 2^31, got {told(page_size)}")
        page_size = size
        tables = _ints("block_tables", block_tables, 2)
        held = _ints("lengths", lengths, 1).astype(np.int64)
        batch, columns = tables.shape
        if held.shape[0] != batch:
            raise ValueError(f"lengths: expected shape [{batch}] (one a row of block_tables), got {list(held.shape)}")
        if batch == 0:
            raise ValueError("block_tables: no sequences")
        if query_lengths is None:
            queries = np.ones(batch, dtype=np.int64)
        else:
            queries = _ints("query_lengths", query_lengths, 1).astype(np.int64)
            if queries.shape[0] != batch:
                raise ValueError(f"query_lengths: expected shape [{batch}], got {list(queries.shape)}")
            bad = np.flatnonzero((queries < 0) | (queries > held))
            if bad.size:
                i = int(bad[0])
                raise ValueError(f"query_lengths[{i}]: {queries[i]} rows do not fit in lengths[{i}] = {held[i]} tokens")
        bad = np.flatnonzero((held < 0) | (held > columns * page_size))
        if bad.size:
            i = int(bad[0])
            raise ValueError(
                f"lengths[{i}]: must be from 0 to {columns} pages × {page_size} = {columns * page_size}, got {held[i]}"
            )
        most = (2**31 - 1) // page_size - 1
        tables = tables[:, : -(-int(held.max()) // page_size)]  # what is not read may be long
        if tables.size and (tables.min() < 0 or tables.max() > most):
            used = np.arange(tables.shape[1])[None, :] * page_size < held[:, None]
            outside = np.argwhere(used & ((tables < 0) | (tables > most)))
            if outside.size:
                i, j = map(int, outside[0])
                raise ValueError(
                    f"block_tables[{i}, {j}]: page {tables[i, j]} is inside lengths[{i}] but out of range; pages count "
                    f"from 0 to {most}, since slots (page × {page_size} + offset) are 32-bit numbers"
                )
        device = block_tables.device if isinstance(block_tables, Tensor) else torch.device("cpu")
        super().__init__(int(queries.sum()), device)
        self.page_size = page_size
        self._given_on = device
        self._tables = _core.BlockTables(np.ascontiguousarray(tables, dtype=np.int32), held, queries, page_size)
        self._arrays: dict[tuple[int, TileConfig], PlanArrays] = {}
        for before in [plan for ref in _recent if (plan := ref()) is not None]:
            if before._given_on == device and self._tables.follow(before._tables):
                self._follow(before)
                break
        _recent.appendleft(weakref.ref(self))

    def _follow(self, before: TablePlan) -> None:
        """Take over the arrays of an earlier plan: the planner has advanced them, and the device has most of them."""
        self.device = before.device
        if capturing(self.device):
            return
        for key, earlier in before._arrays.items():
            params = core_params(*key)
            changed = self._tables.appended(params)
            if changed is None:
                continue
            kv = None
            if self.device.type != "cpu":
                kv = earlier.kv
                assert kv is not None
                append_tokens(kv, upload(changed, self.device))  # behind what the earlier plan reads
            self._arrays[key] = split_buffers(self._tables.plan(params), self.device, kv=kv)

    def arrays(self, group: int, tile_config: TileConfig) -> PlanArrays:
        key = (group, tile_config)
        if key not in self._arrays:
            if capturing(self.device):
                raise RuntimeError(
                    "plan: it is not on the GPU yet, and a captured CUDA graph cannot bring it there; run one call "
                    "with this plan before the capture"
                )
            self._arrays[key] = split_buffers(self._tables.plan(core_params(group, tile_config)), self.device)
        return self._arrays[key]

    def contexts(self) -> FlatContexts:
        return FlatContexts(*self._tables.contexts())

    @property
    def unique_tokens(self) -> int:
        """Tokens after sharing: what attention has to read."""
        return self._tables.unique_tokens

    def check(self, layer: int, k_pages: Tensor) -> None:
        num_pages, page_size = k_pages.shape[:2]
        if self.device != k_pages.device:  # tables made on the host, pages on the GPU
            self.device = k_pages.device
            self._arrays.clear()
        if page_size != self.page_size:
            raise ValueError(f"k_pages: page size {page_size}, but the plan was made for {self.page_size}")
        if self._tables.max_page >= num_pages:
            raise ValueError(
                f"k_pages: {num_pages} pages, but the plan's block tables name page {self._tables.max_page}"
            )

    def __repr__(self) -> str:
        return f"Plan(rows={self.num_rows}, unique_tokens={self.unique_tokens}, page_size={self.page_size})"
