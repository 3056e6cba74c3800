"""Decode steps as one replay: a model's forward over a tree, captured as a CUDA graph while the topology stays.

Between two topology changes (fork, join, an end, a plan that is full) a decode step changes a few numbers: token ids,
positions, slots. They are copied into buffers that never move, and one graph does the rest: it advances the plan on the
device (resident.py), runs every layer, and leaves the scores where they always are. Nothing in it depends on the host,
so nothing waits. With another topology come other arrays, and another capture once it has lasted a few steps.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from anabranch import backends
from anabranch.errors import TopologyChanged
from anabranch.kv.cache import TreeCache
from anabranch.kv.step import Step
from anabranch.plan.arrays import FlatContexts, PlanArrays, staged, upload
from anabranch.plan.plan import Plan
from anabranch.plan.resident import ResidentPlan
from anabranch.plan.tile_config import TileConfig
from anabranch.runner.capture import CudaCapture
from anabranch.runner.eager import forward
from anabranch.runner.model_state import forward_hooks

if TYPE_CHECKING:
    from anabranch.runner.capture import Capture


CAPACITY = 64  # rows that the input buffers hold at first


def unfit(cache: TreeCache, backend: str = "auto") -> str | None:
    """Why decode steps over this cache cannot be captured, with the remedy; None when they can."""
    if cache.device.type != "cuda":
        return (
            f"CUDA graphs need a CUDA device, and the model and its cache are on {cache.device}; move the model there"
        )
    if cache.v_in_k:
        return "forwards over latents are not captured; make the cache without latent=True"
    chosen = backends.choose(
        backend, cache.device, cache.dtype, cache.head_dim, cache.kv_format.dtype, cache.v_head_dim
    )
    if not chosen.capturable:
        able = backends.with_trait(lambda other: other.capturable)
        return f"the {chosen.name} backend works on the host between its kernels; pass backend={able}"
    return None


class _FixedPlan(Plan):
    """What a captured forward reads instead of a step's plan: the same memory, whatever step it stands for."""

    def __init__(self, rows: int, slots: Tensor, positions: Tensor, kept: dict[tuple[int, TileConfig], ResidentPlan]):
        super().__init__(rows, slots.device)
        self.slots, self.positions, self.kept = slots, positions, kept

    def arrays(self, group: int, tile_config: TileConfig) -> PlanArrays:
        kept = self.kept.get((group, tile_config))
        if kept is None:
            raise TopologyChanged(
                "step: the forward asks for a plan in a capture that it did not ask for in the steps before; "
                "let it do the same in every step, or call DecodeGraph.drop() after changing the model"
            )
        return kept.arrays

    def contexts(self) -> FlatContexts:
        raise RuntimeError("the reference backend works on the host and cannot be captured; use 'triton' or 'cuda'")

    def begin_write(self, layer: int) -> Tensor:
        return self.slots


class _Inputs(NamedTuple):
    """Views of the input buffers for so many rows; where what a graph reads is put."""

    rows: int
    all: Tensor  # int64 [3, rows]: ids, positions, slots
    ids: Tensor
    positions: Tensor
    wide_slots: Tensor
    places: Tensor  # [2, rows]: positions, slots
    slots: Tensor  # int32 [rows], made of wide_slots in the graph


class _Graph:
    """One capture: how to replay it, where the scores are."""

    def __init__(self, step: Step, replay: Callable[[], None], scores: Tensor) -> None:
        self.step, self.replay, self.scores = step, replay, scores
        self.arrays = {key: kept.arrays for key, kept in step.plan.kept.items()}


class DecodeGraph:
    """Runs a model's steps over a tree; decode steps of a topology that stays become one CUDA graph replay each.

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
        after: decode steps of a topology that run as usual before it is captured (at least 2: the first makes the
            plan, the second finds where it grows). A capture costs about as much as two steps.
        capture: how to capture; None: `CudaCapture`.

    Attributes:
        scores: what the last capture's replays write to; None while there is none.
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
        self._graph: _Graph | None = None
        self._builds: dict[tuple[int, TileConfig], int] = {}  # of the last step
        self._seen = 0  # steps in a row that had them
        self._hooks: list[Any] | None = None
        self._watched = False
        self._off = False
        self._said: set[str] = set()
        self._buffer: Tensor | None = None
        self._slots: Tensor | None = None
        self._inputs: _Inputs | None = None

    @property
    def scores(self) -> Tensor | None:
        return None if self._graph is None else self._graph.scores

    def drop(self) -> None:
        """Forget the graph; the next ones are captured anew."""
        self._graph, self._builds, self._seen, self._hooks = None, {}, 0, None

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
            self.drop()
            self.cache.planner.forget_device()  # the planner may be a step ahead of it
            raise

    def _run(self, ids: Tensor | np.ndarray, step: Step) -> Tensor:
        decoding = step.num_rows == len(step.branches)
        if decoding and self._steady(step):
            if self._seen >= self.after and self._may_capture():
                # Before a capture too: who records by running must find places that exist, not an earlier graph's.
                self._fill(ids, step)
                if self._graph is None:
                    self._graph = self._capture_forward(step)
                if self._graph is not None:
                    return self._replay(self._graph, step)
        else:
            self.drop()
        step.plan.follow()  # the device goes where the planner went above
        return self._as_usual(ids, step, decoding)

    # ---------------------------------------------------------------------------------------- as usual

    def _as_usual(self, ids: Tensor | np.ndarray, step: Step, decoding: bool) -> Tensor:
        device = self.cache.device
        on_device = upload(ids, device) if isinstance(ids, np.ndarray) else ids.long()
        keep = None if decoding else step.last_rows
        if not decoding:
            return forward(self.model, on_device, step, self.backend, keep)
        if self._watched or self._seen != self.after - 1 or self._off:
            scores = forward(self.model, on_device, step, self.backend)
        else:
            with self._capture.watch() as found:
                scores = forward(self.model, on_device, step, self.backend)
            self._watched = True
            if found:
                self._give_up(found[0])
        builds = step.plan.builds()
        self._seen = self._seen + 1 if builds == self._builds else 1
        self._builds = builds
        return scores

    def _steady(self, step: Step) -> bool:
        """Whether this step only makes its branches longer: the last step's arrays, advanced by a token each."""
        if self._off or not self._builds:
            return False
        return all(step.plan.result(key).build == build for key, build in self._builds.items())

    # ---------------------------------------------------------------------------------------- captured

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

    def _capture_forward(self, step: Step) -> _Graph | None:
        """Record what this step would do; nothing runs."""
        self._hooks = forward_hooks(self.model)
        if any(self._hooks):
            return None  # on modules that are new: said in the next step
        cache, inputs = self.cache, self._inputs
        assert inputs is not None  # filled
        kept = {key: cache.planner.resident(key) for key in self._builds}
        kernel = cache.planner.advance_kernel
        fixed = step.with_plan(_FixedPlan(inputs.rows, inputs.slots, inputs.positions, kept))

        def record() -> Tensor:
            inputs.slots.copy_(inputs.wide_slots)
            for plan in kept.values():
                plan.advance(inputs.slots, inputs.positions, kernel)
            return forward(self.model, inputs.ids, fixed, self.backend)

        try:
            replay, scores = self._capture(record)
        except TopologyChanged:
            raise
        except Exception as error:
            self._give_up(": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]]))
            return None
        self.captures += 1
        return _Graph(fixed, replay, scores)

    def _replay(self, graph: _Graph, step: Step) -> Tensor:
        graph.replay()
        step.plan.replayed(graph.arrays)
        self.replays += 1
        return graph.scores

    def _fill(self, ids: Tensor | np.ndarray, step: Step) -> None:
        """The step's numbers, to where a graph reads them: one transfer, or two if the ids are on the device."""
        if self._inputs is None or self._inputs.rows != step.num_rows:
            self._inputs = self._views(step.num_rows)
        rows: tuple[np.ndarray, ...] = step.plan.host_rows()
        if isinstance(ids, np.ndarray):
            where, rows = self._inputs.all, (ids, *rows)
        else:
            where = self._inputs.places
            self._inputs.ids.copy_(ids)
        # Memory that is new each time: none is used again before it has left.
        where.copy_(staged(np.array(rows, dtype=np.int64), where.device), non_blocking=True)

    def _views(self, rows: int) -> _Inputs:
        if self._buffer is None or self._buffer.numel() < 3 * rows:
            capacity = max(CAPACITY, 1 << (rows - 1).bit_length())
            self._buffer = torch.zeros(3 * capacity, dtype=torch.int64, device=self.cache.device)
            self._slots = torch.zeros(capacity, dtype=torch.int32, device=self.cache.device)
        assert self._slots is not None
        every = self._buffer[: 3 * rows].view(3, rows)
        return _Inputs(rows, every, every[0], every[1], every[2], every[1:], self._slots[:rows])

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
