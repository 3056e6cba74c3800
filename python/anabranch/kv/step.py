"""`Step`: the rows reserved for one packed forward, and the plan of who sees what."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from torch import Tensor

from anabranch import _core
from anabranch.ops.rotary import Rotary, rotate
from anabranch.plan.arrays import FlatContexts, PlanArrays
from anabranch.plan.plan import Plan, plan_of
from anabranch.plan.planner import PlanKey, Planner
from anabranch.plan.tile_config import TileConfig

if TYPE_CHECKING:
    from anabranch.kv.cache import TreeCache


Branch = _core.Branch


class StepPlan(Plan):
    """The plan of one step. Work items are cut when a kernel first asks; while the topology stays, the arrays of the
    last step are advanced in place instead."""

    # What few steps are asked for, or are asked for once. (One step is made per decoded token.)
    _queries: tuple[Tensor, Tensor] | None = None  # row, offset, on the device
    _tables: dict[Rotary, tuple[Tensor, Tensor]] | None = None
    _slots: Tensor | None = None
    _positions: Tensor | None = None

    def __init__(
        self,
        planner: Planner,
        core: _core.Step,
        num_layers: int,
        batch_invariant: bool = False,
        rotary: Sequence[Rotary | None] = (),
    ) -> None:
        """rotary: of each layer; needed where rows read under position offsets."""
        super().__init__(core.num_rows, planner.device)
        self._rotary = rotary
        self._turns = bool(rotary)
        self.batch_invariant = batch_invariant
        self._planner = planner
        self._core = core
        self._num_layers = num_layers
        self._results: dict[PlanKey, _core.PlanResult] = {}
        self._arrays: dict[PlanKey, PlanArrays] = {}
        self._written: set[int] = set()

    def arrays(self, group: int, tile_config: TileConfig) -> PlanArrays:
        key = (group, tile_config)
        found = self._arrays.get(key)
        if found is None:
            found = self._arrays[key] = self._planner.arrays(self.result(key), key, self._places)
        return found

    def result(self, key: PlanKey) -> _core.PlanResult:
        """What the planner says for this step; asked once."""
        found = self._results.get(key)
        if found is None:
            found = self._results[key] = self._planner.result(self._core, key)
        return found

    def keys(self) -> Iterable[PlanKey]:
        """The plans that were asked for."""
        return self._results.keys()

    @cached_property
    def _query_rows(self) -> tuple[Any, Any] | None:
        """Row and offset of each query row, NumPy arrays; None where the rows themselves are the queries."""
        return self._core.queries() if self._turns else None

    @property
    def turned(self) -> bool:
        """Whether rows read other branches under a position offset (`Read`)."""
        return self._query_rows is not None

    def replayed(self) -> None:
        """A captured graph has written K and V of all layers."""
        self._written.update(range(self._num_layers))

    def _places(self) -> tuple[Tensor, Tensor]:
        return self.slots, self.positions

    def contexts(self) -> FlatContexts:
        queries = self._query_rows
        return FlatContexts(*self._core.contexts(), None if queries is None else queries[0])

    def queries(self, q: Tensor, layer: int) -> Tensor:
        if self._query_rows is None:
            return q
        if self._queries is None:
            rows, offsets = (self._planner.upload(x) for x in self._query_rows)
            self._queries = rows.long(), offsets
        rows, offsets = self._queries
        rotary = self._rotary[layer]
        if rotary is None:
            return q[rows]  # a layer that knows no positions
        if self._tables is None:
            self._tables = {}
        if rotary not in self._tables:
            self._tables[rotary] = rotary.table(offsets)
        return rotate(q[rows], self._tables[rotary], rotary.interleaved, rotary.last)

    @property
    def slots(self) -> Tensor:
        """int32 [rows] on the cache's device."""
        if self._slots is None:
            self._slots = self._planner.upload(self._core.slots())
        return self._slots

    @property
    def positions(self) -> Tensor:
        """int64 [rows] on the cache's device."""
        if self._positions is None:
            self._positions = self._planner.upload(self._core.positions())
        return self._positions

    def host_rows(self) -> tuple[Any, Any]:
        """Positions and slots as NumPy arrays, int64 and int32 [rows]."""
        return self._core.positions(), self._core.slots()

    def unwritten(self) -> list[int]:
        """The layers that have no K and V of this step."""
        if len(self._written) == self._num_layers:
            return []
        return [layer for layer in range(self._num_layers) if layer not in self._written]

    def require_unused(self) -> None:
        """Raises when the step is stale, or was written already."""
        self._require_current()
        if self._written:
            raise ValueError("step: was already written; a step is used once, make a new one for new rows")

    def _require_current(self) -> None:
        at = self._core.moved_on()
        if at >= 0:
            which = "its branch" if at < len(self._core.row_ptr()) - 1 else "a branch that it reads, besides its own,"
            raise ValueError(
                f"step: {which} number {at} has moved on (a later step, a join, a truncation or a release); "
                "make a new step and use that"
            )

    def check(self, layer: int, k_pages: Tensor) -> None:
        self._require_current()
        if layer not in self._written:
            raise ValueError(
                f"layer: {layer} of this step has no K and V yet; call cache.write({layer}, k, v, step) first"
            )

    def begin_write(self, layer: int) -> Tensor:
        self._require_current()
        if layer in self._written:
            raise ValueError(
                f"step: layer {layer} was already written; a step is used once, make a new one for new rows"
            )
        return self.slots

    def end_write(self, layer: int) -> None:
        self._written.add(layer)


class Rows(Mapping[Branch, slice]):
    """Branch → slice of the step's rows."""

    def __init__(self, branches: Sequence[Branch], row_ptr: Sequence[int]) -> None:
        self._slices = {b: slice(row_ptr[i], row_ptr[i + 1]) for i, b in enumerate(branches)}

    def __getitem__(self, branch: Branch) -> slice:
        try:
            return self._slices[branch]
        except KeyError:
            raise KeyError(f"{branch!r} has no rows in this step") from None

    def __iter__(self) -> Iterator[Branch]:
        return iter(self._slices)

    def __len__(self) -> int:
        return len(self._slices)


class Step:
    """Rows reserved by ``TreeCache.step``: one packed forward's worth.

    Attributes:
        num_rows: rows of all branches together.
        position_ids: int64 [rows], on the cache's device.
        branches: the branches, in row order.
        handle: names the step's plan to the torch op.

    >>> cache = ab.TreeCache(num_layers=1, num_kv_heads=1, head_dim=8, num_pages=8)
    >>> a, b = cache.branch(), cache.branch()
    >>> step = cache.step({a: 3, b: 2})
    >>> step.num_rows, step.rows[b], step.position_ids.tolist()
    (5, slice(3, 5, None), [0, 1, 2, 0, 1])
    """

    _rows: Rows | None = None
    _last_rows: Tensor | None = None

    def __init__(
        self,
        cache: TreeCache,
        core: _core.Step,
        branches: tuple[Branch, ...],
        plan: Any = None,
        rotary: Sequence[Rotary | None] = (),
    ) -> None:
        self.cache = cache
        self.branches = branches
        self.num_rows: int = core.num_rows
        if plan is None:
            plan = StepPlan(cache.planner, core, cache.num_layers, cache.batch_invariant, rotary)
        plan.step = weakref.ref(self)
        self.plan: Any = plan
        self.handle = self.plan.handle
        self._core = core

    def with_plan(self, plan: Plan) -> Step:
        """A step of another plan's rows, at least this one's: what a captured forward is given, whose plan reads fixed
        memory."""
        step = Step(self.cache, self._core, self.branches, plan)
        step.num_rows = plan.num_rows
        return step

    @property
    def position_ids(self) -> Tensor:
        return self.plan.positions

    @property
    def rows(self) -> Mapping[Branch, slice]:
        """Branch → slice of rows."""
        if self._rows is None:
            self._rows = Rows(self.branches, self._core.row_ptr().tolist())
        return self._rows

    @property
    def last_rows(self) -> Tensor:
        """int64 [branches]: each branch's last row, in order; for ``logits_to_keep``."""
        if self._last_rows is None:
            self._last_rows = self.cache.planner.upload(self._core.row_ptr()[1:].astype("int64") - 1)
        return self._last_rows

    @property
    def slots(self) -> Tensor:
        """int32 [rows]: where each row's K and V go (page · page_size + offset)."""
        return self.plan.slots

    def __repr__(self) -> str:
        return f"Step(rows={self.num_rows}, branches={len(self.branches)})"


def step_of(handle: Tensor) -> Step:
    """The live step behind a handle tensor; raises ``ValueError`` when it is gone, or the handle is another plan's."""
    step = plan_of(handle).step()
    if step is None:
        raise ValueError("step: this handle is not that of a live Step; pass step.handle, and keep the Step alive")
    return step
