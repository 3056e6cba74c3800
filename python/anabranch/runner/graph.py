"""Decode steps as one replay: a model's forward over a tree, captured as a CUDA graph for all topologies that fit.

A decode step changes a few numbers: token ids, positions, slots. They are copied into buffers that never move, and one
graph does the rest: it appends the tokens to the plan on the device, runs every layer, and leaves the scores where they
always are. A fork, a join, an end or a plan that is full changes the plan's numbers too: they are sent to the same
places (`PaddedPlan`). Nothing in a graph depends on the host, so nothing waits.

A graph has as many rows as `row_bucket` says; what a step does not use of them fills up: no slot to write to, nothing to
attend to. Another capture is made for another bucket, and for all of them once a plan outgrows its memory.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from anabranch import backends
from anabranch.errors import TopologyChanged
from anabranch.kv.cache import TreeCache
from anabranch.kv.step import Step
from anabranch.plan.arrays import FlatContexts, PlanArrays, staged, upload
from anabranch.plan.padded import PaddedPlan
from anabranch.plan.plan import Plan
from anabranch.plan.planner import PlanKey
from anabranch.plan.resident import advance
from anabranch.plan.tile_config import TileConfig
from anabranch.runner.capture import CudaCapture
from anabranch.runner.eager import forward
from anabranch.runner.model_state import ModelState, forward_hooks

if TYPE_CHECKING:
    from anabranch.runner.capture import Capture


CAPACITY = 64  # rows


def row_bucket(rows: int) -> int:
    """Rows of the graph that runs a step of so many. Up to 64, a decode step waits for its weights, not for its rows."""
    return next((bucket for bucket in (1, 16, CAPACITY) if rows <= bucket), -(-rows // CAPACITY) * CAPACITY)


def unfit(cache: TreeCache, backend: str = "auto") -> str | None:
    """Why decode steps over this cache cannot be captured, with the remedy; None when they can."""
    if cache.device.type != "cuda":
        return (
            f"CUDA graphs need a CUDA device, and the model and its cache are on {cache.device}; move the model there"
        )
    chosen = backends.choose(backend, cache.device, cache.dtype, cache.head_dim, cache.kv_format.dtype)
    if not chosen.capturable:
        able = backends.with_trait(lambda other: other.capturable)
        return f"the {chosen.name} backend works on the host between its kernels; pass backend={able}"
    return None


def _places(model: torch.nn.Module) -> list[int]:
    """Where the model's numbers lie."""
    return [x.data_ptr() for x in chain(model.parameters(), model.buffers())]


class _FixedPlan(Plan):
    """What a captured forward reads instead of a step's plan: the same memory, whatever step it stands for."""

    def __init__(self, rows: int, slots: Tensor, positions: Tensor, plans: Mapping[PlanKey, PaddedPlan]) -> None:
        super().__init__(rows, slots.device)
        self.slots, self.positions = slots, positions
        self.padded = {key: plan.arrays(rows) for key, plan in plans.items()}

    def arrays(self, group: int, tile_config: TileConfig) -> PlanArrays:
        arrays = self.padded.get((group, tile_config))
        if arrays is None:
            raise TopologyChanged(
                "step: the forward asks for a plan in a capture that it did not ask for in the steps before; "
                "let it do the same in every step, or call DecodeGraph.drop() after changing the model"
            )
        return arrays

    def contexts(self) -> FlatContexts:
        raise RuntimeError("the reference backend works on the host and cannot be captured; use 'triton' or 'cuda'")

    def begin_write(self, layer: int) -> Tensor:
        return self.slots


class _Inputs(NamedTuple):
    """Where what a graph reads is put: memory that stays, and views of it."""

    all: Tensor  # int64 [3, rows]: ids, positions, slots
    ids: Tensor
    positions: Tensor
    wide_slots: Tensor
    places: Tensor  # [2, rows]: positions, slots
    slots: Tensor  # int32 [rows], made of wide_slots in the graph

    @classmethod
    def of(cls, rows: int, device: torch.device) -> _Inputs:
        every = torch.zeros(3, rows, dtype=torch.int64, device=device)
        slots = torch.zeros(rows, dtype=torch.int32, device=device)
        return cls(every, every[0], every[1], every[2], every[1:], slots)


class _Graph:
    """One capture: how to replay it, where the scores are; the step that its forward was given stays alive with it."""

    def __init__(self, step: Step, replay: Callable[[], None], scores: Tensor) -> None:
        self.step, self.replay, self.scores = step, replay, scores


class DecodeGraph:
    """Runs a model's steps over a tree; decode steps become one CUDA graph replay each, whatever forks, joins and ends.

    Example::

        decode = ab.DecodeGraph(model, cache)
        logits = decode(prompt_ids, cache.step({trunk: len(prompt_ids)}))   # runs as usual
        ids = logits.argmax(-1)
        while …:
            logits = decode(ids, cache.step({trunk: 1}))    # as usual `after` times, captured, from then on replayed
            ids = logits.argmax(-1)                         # on the device: nothing here waits for it

    Args:
        model: a decoder with ``attn_implementation="anabranch"``, in eval mode.
        cache: its cache; on a CUDA device.
        backend: "auto", "triton" or "cuda".
        after: decode steps that run as usual before one is captured, of each number of rows that graphs are made for
            (1, 16, 64, and multiples of 64; at least 2). A capture costs about as much as two steps.
        capture: how to capture; None: `CudaCapture`.

    Attributes:
        scores: what the last replay wrote to; None while there was none.
        captures, replays: how many there have been.

    A forward that cannot be captured (it waits for the device, or branches on what it computed) stays as it is, and a
    warning says so once. The same where modules have forward hooks, which a replay would not call, and under
    torch.autocast, whose casts do not outlive it. Call `drop` after changing weights or modules in the middle of a
    generation.

    Raises:
        ValueError: a cache that is not on a CUDA device, a backend that works on the host, `after` below 2.
    """

    def __init__(
        self,
        model: Any,
        cache: TreeCache,
        backend: str = "auto",
        after: int = 3,
        capture: Capture | None = None,
    ) -> None:
        if not isinstance(after, int) or after < 2:
            raise ValueError(
                f"after={after!r}; pass a whole number of at least 2 (steps before a topology is captured)"
            )
        if capture is None:
            reason = unfit(cache, backend)
            if reason is not None:
                raise ValueError(f"cache: {reason}, or call the model itself")
            capture = CudaCapture(cache.device)
        self.model, self.cache, self.backend, self.after = model, cache, backend, after
        self.captures = self.replays = 0
        self._capture = capture
        self._graphs: dict[int, _Graph] = {}  # by rows
        self._plans: dict[PlanKey, PaddedPlan] = {}  # what they read
        self._last: _Graph | None = None
        self._seen: Counter[int] = Counter()  # decode steps that ran as usual, by the rows that their graph would have
        self._keys: frozenset[PlanKey] = frozenset()  # the plans that they asked for
        self._hooks: list[Any] | None = None
        self._model: tuple[ModelState, list[int]] | None = None  # as the graphs know it
        self._rested = False
        self._watched = False
        self._off = False
        self._said: set[str] = set()
        self._inputs: dict[int, _Inputs] = {}  # by rows

    @property
    def scores(self) -> Tensor | None:
        return None if self._last is None else self._last.scores

    def drop(self) -> None:
        """Forget all graphs; the next ones are captured anew."""
        self._graphs.clear()
        self._plans.clear()
        self._seen.clear()
        self._last, self._keys, self._hooks, self._model = None, frozenset(), None, None

    def rest(self) -> None:
        """The model may change before the next step: its modules, parameters and where they lie are compared then."""
        self._rested = True

    def __call__(self, ids: Tensor | Sequence[int], step: Step) -> Tensor:
        """One step.

        Args:
            ids: integers [rows] in the step's order: a tensor on any device, or a list.
            step: what ``cache.step`` returned, not used yet.

        Returns:
            scores [branches, vocabulary] of each branch's last row. A replay leaves them where the last one did:
            read them, or copy them, before the next call.

        Raises:
            ValueError, TypeError: ids that do not fit the step; a step of another cache, stale, or used already.
        """
        given = self._checked(ids, step)
        try:
            with torch.inference_mode():
                return self._run(given, step)
        except BaseException:
            self.drop()  # the planner may be a step ahead of the device
            raise

    def _run(self, ids: Tensor | np.ndarray, step: Step) -> Tensor:
        if self._rested and self._model is not None:
            state, places = self._model
            if not state.same(self.model) or _places(self.model) != places:
                self.drop()
        self._rested = False
        if step.num_rows != len(step.branches) or step.plan.turned:
            return self._as_usual(ids, step, None if step.num_rows == len(step.branches) else step.last_rows)
        rows = row_bucket(step.num_rows)
        if self._keys and (rows in self._graphs or self._seen[rows] >= self.after) and self._may_capture():
            self._prepare(step, rows)
            # Before a capture too: who records by running must find places that exist, not an earlier step's.
            self._fill(ids, step, rows)
            if rows not in self._graphs:
                self._capture_forward(step, rows)
            if rows in self._graphs:
                return self._replay(self._graphs[rows], step)
        return self._decode_as_usual(ids, step, rows)

    # ---------------------------------------------------------------------------------------- as usual

    def _as_usual(self, ids: Tensor | np.ndarray, step: Step, keep: Tensor | None) -> Tensor:
        on_device = upload(ids, self.cache.device) if isinstance(ids, np.ndarray) else ids.long()
        return forward(self.model, on_device, step, self.backend, keep)

    def _decode_as_usual(self, ids: Tensor | np.ndarray, step: Step, rows: int) -> Tensor:
        if self._watched or self._off or self._seen[rows] != self.after - 1:
            scores = self._as_usual(ids, step, None)
        else:
            with self._capture.watch() as found:
                scores = self._as_usual(ids, step, None)
            self._watched = True
            if found:
                self._give_up(found[0])
        keys = frozenset(step.plan.keys())
        if keys and keys != self._keys:  # a model that asks for other plans than before
            self.drop()
            self._keys = keys
        self._seen[rows] += bool(keys)
        return scores

    # ---------------------------------------------------------------------------------------- captured

    def _prepare(self, step: Step, rows: int) -> None:
        """Bring the plans that graphs read to where the step's graph expects them; where one has no room, all graphs are
        forgotten, and it gets more."""
        results = {key: step.plan.result(key) for key in self._keys}
        for key, result in results.items():
            plan = self._plans.get(key)
            if plan is None or not plan.fits(result):
                self._graphs.clear()
                most = max(CAPACITY, rows, 0 if plan is None else plan.rows)
                self._plans[key] = PaddedPlan(result, most, self.cache.device)
        for key, result in results.items():
            self._plans[key].follow(result, rows)

    def _may_capture(self) -> bool:
        if self._off or getattr(self.model, "training", False):
            return False  # training mode is refused where it matters
        if torch.is_autocast_enabled(self.cache.device.type):
            self._say("torch.autocast is on; load the model in the dtype it is to run in")
            return False
        if self._hooks is None:
            self._hooks = forward_hooks(self.model)
        if any(self._hooks):
            self._say("modules have forward hooks, which a replay would not call; remove them")
            return False
        return True

    def _capture_forward(self, step: Step, rows: int) -> None:
        """Record what this step would do; nothing runs."""
        self._hooks = forward_hooks(self.model)
        if any(self._hooks):
            return  # on modules that are new: said in the next step
        inputs, kernel = self._inputs[rows], self.cache.planner.advance_kernel
        plan = _FixedPlan(rows, inputs.slots, inputs.positions, self._plans)
        fixed = step.with_plan(plan)
        tails = {key: padded.tails[:rows] for key, padded in self._plans.items()}

        def record() -> Tensor:
            inputs.slots.copy_(inputs.wide_slots)
            for key, arrays in plan.padded.items():
                (kernel or advance)(arrays, tails[key], inputs.slots, inputs.positions)
            return forward(self.model, inputs.ids, fixed, self.backend)

        try:
            replay, scores = self._capture(record)
        except TopologyChanged:
            raise
        except Exception as error:
            self._give_up(": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]]))
            return
        self.captures += 1
        if self._model is None:
            self._model = ModelState(self.model), _places(self.model)
        self._graphs[rows] = _Graph(fixed, replay, scores)

    def _replay(self, graph: _Graph, step: Step) -> Tensor:
        graph.replay()
        step.plan.replayed()
        self.replays += 1
        self._last = graph
        return graph.scores[: step.num_rows]

    def _fill(self, ids: Tensor | np.ndarray, step: Step, rows: int) -> None:
        """The step's numbers, to where a graph of `rows` rows reads them: one transfer, or two if the ids are on the
        device. Rows that fill up have position 0, no slot, and the id of a step before."""
        inputs = self._inputs.get(rows)
        if inputs is None:
            inputs = self._inputs[rows] = _Inputs.of(rows, self.cache.device)
        values = np.zeros((3, rows), dtype=np.int64)
        values[1, : step.num_rows], values[2, : step.num_rows] = step.plan.host_rows()
        values[2, step.num_rows :] = -1
        where = inputs.all
        if isinstance(ids, np.ndarray):
            values[0, : step.num_rows] = ids
        else:
            where, values = inputs.places, values[1:]
            inputs.ids[: step.num_rows].copy_(ids)
        # Memory that is new each time: none is used again before it has left.
        where.copy_(staged(values, where.device), non_blocking=True)

    # ---------------------------------------------------------------------------------------- checks and words

    def _checked(self, ids: Any, step: Any) -> Tensor | np.ndarray:
        """int64 on the host, or a tensor on the cache's device, [rows]."""
        if not isinstance(step, Step):
            raise TypeError(f"step: expected the Step that TreeCache.step() returned, got {type(step).__name__}")
        if step.cache is not self.cache:
            raise ValueError("step: made by another cache; pass a step of the cache that this DecodeGraph was made for")
        step.plan.require_unused()
        if isinstance(ids, Tensor):
            if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
                raise ValueError(f"ids: expected integers, got {ids.dtype}")
            shape = tuple(ids.shape)
        else:
            ids = np.asarray(ids)
            if ids.dtype.kind not in "iu":
                raise ValueError(f"ids: expected integers, got {ids.dtype}")
            ids, shape = ids.astype(np.int64), ids.shape
        if shape != (step.num_rows,):
            raise ValueError(f"ids: expected shape [{step.num_rows}] (one a row of the step), got {list(shape)}")
        if isinstance(ids, Tensor) and ids.device != self.cache.device:
            ids = ids.cpu().numpy().astype(np.int64)
        return ids

    def _give_up(self, why: str) -> None:
        self._off = True
        self._say(why)

    def _say(self, why: str) -> None:
        if why not in self._said:
            self._said.add(why)
            warnings.warn(f"anabranch: decode steps run without a CUDA graph: {why}", stacklevel=2)
