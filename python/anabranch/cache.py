"""``TreeCache``: a paged KV cache whose branches fork for free and join without a copy.

The bookkeeping (pages, spans, reference counts, plans) is C++ in ``anabranch._core``; this file holds the tensors, the
checks and the one device call a step may need, the copy of shared tail pages.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from anabranch import _core, backends
from anabranch._check import index_of, told
from anabranch.attention import layer_of, shape_of
from anabranch.errors import TopologyChanged
from anabranch.plan import (
    FlatContexts,
    Plan,
    PlanArrays,
    Profile,
    capturing,
    core_params,
    plan_of,
    split_buffer,
    upload,
)
from anabranch.resident import ResidentPlan

Branch = _core.Branch


@dataclass(frozen=True)
class Usage:
    """What a cache holds, in pages and tokens.

    Attributes:
        pages_total, pages_free: pages of the pool.
        tokens_logical: Σ of the branches' lengths, as if nothing were shared.
        tokens_physical: tokens that really take up a slot.
        pages_copied: shared tail pages copied since the cache was made (each for all layers, K and V).
    """

    pages_total: int
    pages_free: int
    tokens_logical: int
    tokens_physical: int
    pages_copied: int


class StepPlan(Plan):
    """The plan of one step. Work items are cut when a kernel first asks; while the topology stays, the arrays of the
    last step are advanced in place instead."""

    def __init__(self, cache: TreeCache, core: _core.Step) -> None:
        super().__init__(core.num_rows, cache.device)
        self.batch_invariant = cache.batch_invariant
        self._cache = cache
        self._core = core
        self._results: dict[tuple[int, Profile], tuple] = {}
        self._arrays: dict[tuple[int, Profile], PlanArrays] = {}
        self._slots: Tensor | None = None
        self._positions: Tensor | None = None
        self._written: set[int] = set()

    def arrays(self, group: int, profile: Profile) -> PlanArrays:
        key = (group, profile)
        found = self._arrays.get(key)
        if found is None:
            found = self._arrays[key] = self._cache._plan_arrays(self, key)
        return found

    def result(self, key: tuple[int, Profile]) -> tuple:
        """What the planner says for this step; asked once. Whoever asks sees to it that the arrays follow."""
        found = self._results.get(key)
        if found is None:
            found = self._results[key] = self._cache._plan_on_host(self, key)
        return found

    def builds(self) -> dict[tuple[int, Profile], int]:
        """The planner's number of each plan that was asked for: the same as the last step's while topology stays."""
        return {key: result[0] for key, result in self._results.items()}

    def follow(self) -> None:
        """Bring the device's arrays to where the planner is."""
        for key in self._results:
            self.arrays(*key)

    def replayed(self, arrays: dict[tuple[int, Profile], PlanArrays]) -> None:
        """A captured graph has written K and V of all layers and has advanced these arrays."""
        self._arrays.update(arrays)
        self._written.update(range(self._cache.num_layers))

    def contexts(self) -> FlatContexts:
        return FlatContexts(*self._core.contexts())

    @property
    def slots(self) -> Tensor:
        """int32 [rows] on the cache's device."""
        if self._slots is None:
            self._slots = self._cache._upload(self._core.slots())
        return self._slots

    @property
    def positions(self) -> Tensor:
        """int64 [rows] on the cache's device."""
        if self._positions is None:
            self._positions = self._cache._upload(self._core.positions())
        return self._positions

    def host_rows(self) -> tuple[Any, Any]:
        """Positions and slots as NumPy arrays, int64 and int32 [rows]."""
        return self._core.positions(), self._core.slots()

    def unwritten(self) -> list[int]:
        """The layers that have no K and V of this step."""
        if len(self._written) == self._cache.num_layers:
            return []
        return [layer for layer in range(self._cache.num_layers) if layer not in self._written]

    def require_unused(self) -> None:
        """Raises when the step is stale, or was written already."""
        self._require_current()
        if self._written:
            raise ValueError("step: was already written; a step is used once, make a new one for new rows")

    def _require_current(self) -> None:
        at = self._core.moved_on()
        if at >= 0:
            raise ValueError(
                f"step: its branch number {at} has moved on (a later step, a join, a truncation or a release); "
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
    """

    def __init__(self, cache: TreeCache, core: _core.Step, branches: tuple[Branch, ...]) -> None:
        self.cache = cache
        self.branches = branches
        self.num_rows: int = core.num_rows
        self.plan = StepPlan(cache, core)
        self.plan.step = weakref.ref(self)
        self.handle = self.plan.handle
        self._core = core
        self._rows: Rows | None = None
        self._last_rows: Tensor | None = None

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
            self._last_rows = self.cache._upload(self._core.row_ptr()[1:].astype("int64") - 1)
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


class Watch:
    """Told of every change of a cache's tree; what it raises comes before anything has changed.

    This one does nothing. A cache made for a model has one that knows what the model can serve (hf_watch.py).
    """

    def check_step(self, rows: Mapping[Branch, int], positions: Mapping[Branch, Any]) -> None:
        """Before a step. positions: for some branches, integers as NumPy arrays."""

    def stepped(self, step: Step) -> None:
        """After a step."""

    def forked(self, branch: Branch, kids: Sequence[Branch]) -> None:
        """After a fork."""

    def check_join(self, trunk: Branch, kids: Sequence[Branch]) -> None:
        """Before a join by concatenation."""

    def joined(self, trunk: Branch, kids: Sequence[Branch]) -> None:
        """After it."""

    def truncating(self, branch: Branch, length: int) -> None:
        """Before a truncation, which may still be refused."""

    def ending(self, branch: Branch) -> None:
        """Before a release, which may still be refused."""


class TreeCache:
    """A paged, copy-on-write KV cache for branches that fork and join.

    Example::

        cache = ab.TreeCache(num_layers=2, num_kv_heads=2, head_dim=64, num_pages=256)
        trunk = cache.branch()
        step = cache.step({trunk: 20})                      # 20 new rows
        cache.write(0, k, v, step)                          # k, v: [20, 2, 64]
        out = ab.tree_attention(q, cache, 0, step)          # q: [20, heads, 64]
        kids = cache.fork(trunk, 4)                         # nothing is copied
        step = cache.step({kid: 1 for kid in kids})         # one row each; the shared tail page is copied, once a kid

    Args:
        num_layers, num_kv_heads, head_dim: the model's.
        num_pages: pages of the pool; a page holds ``page_size`` tokens of K and of V for every layer, that is
            2 · num_layers · page_size · num_kv_heads · head_dim elements.
        page_size: tokens a page.
        dtype: float32, float16, bfloat16 (float64 with the reference backend only).
        device: "cpu" or a CUDA device.
        max_positions: positions that the model has embeddings for, where they are looked up in a table (GPT-2, OPT);
            `step` refuses to go beyond. None: no limit (rotary embeddings).

    Not safe for use by several threads at once.
    """

    def __init__(
        self,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        num_pages: int,
        page_size: int = 16,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        max_positions: int | None = None,
    ) -> None:
        num_layers, num_kv_heads, head_dim, num_pages, page_size = (
            _size(name, value)
            for name, value in (
                ("num_layers", num_layers),
                ("num_kv_heads", num_kv_heads),
                ("head_dim", head_dim),
                ("num_pages", num_pages),
                ("page_size", page_size),
            )
        )
        if max_positions is not None:
            max_positions = _size("max_positions", max_positions)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"dtype: expected a torch.dtype such as torch.float32, got {dtype!r}")
        if num_pages * page_size > 2**31 - 1:
            raise ValueError(
                f"num_pages: {num_pages} pages × {page_size} tokens exceed 2^31 − 1 slots; take fewer pages"
            )
        self.num_layers = num_layers
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.num_pages = num_pages
        self.page_size = page_size
        self.max_positions = max_positions
        self.dtype = dtype
        device = _device(device)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        self.device = device
        # Raises for a dtype, device or head_dim that nothing here can serve, before memory is taken.
        self._backend = backends.choose("auto", self.device, dtype, head_dim)
        # A head's tokens lie together in a page, so that a kernel's (item × KV head) streams whole pages.
        self._pool = torch.empty(
            2 * num_layers, num_pages, num_kv_heads, page_size, head_dim, dtype=dtype, device=self.device
        )
        if self._backend.name == "cpu":
            self._backend.large_pages(self._pool)
        self._k = [self._pool[i].transpose(1, 2) for i in range(num_layers)]
        self._v = [self._pool[num_layers + i].transpose(1, 2) for i in range(num_layers)]
        self._core = _core.Cache(num_pages, page_size)
        self.batch_invariant = False  # for plans of later steps; the cpu backend alone can honour it
        self._params: dict[tuple[int, Profile], _core.PlanParams] = {}
        self._last_arrays: dict[tuple[int, Profile], tuple[int, PlanArrays]] = {}
        self._resident: dict[tuple[int, Profile], ResidentPlan] = {}
        self._on_host = self.device.type == "cpu"
        self._watch = Watch()

    @classmethod
    def for_model(
        cls,
        model: Any,
        num_pages: int | None = None,
        page_size: int = 16,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> TreeCache:
        """A cache with a Hugging Face model's shape, for that model: steps that it could not serve raise ValueError
        (the model has been switched to another attention; rows of the last step were never written; rotary embeddings
        that would depend on another branch's length), before anything changes.

        Args:
            model: a decoder; its config gives layers, heads and head_dim, its weights dtype and device.
            num_pages: default: a quarter of the machine's free memory (nine tenths of a GPU's), at most 2^20 tokens.

        Raises:
            ValueError: a model whose layers are not all plain self-attention; the message names what is in the way.
        """
        from anabranch.hf_shape import describe, text_config  # the model's side, which need not be there for a cache
        from anabranch.hf_watch import ModelWatch

        page_size = _size("page_size", page_size)
        shape = describe(model)
        dtype = shape.dtype if dtype is None else dtype
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"dtype: expected a torch.dtype such as torch.float32, got {dtype!r}")
        device = _device(shape.device if device is None else device)
        if num_pages is None:
            page_bytes = 2 * shape.num_layers * page_size * shape.num_kv_heads * shape.head_dim * dtype.itemsize
            num_pages = max(1, min(free_memory(device) // page_bytes, 2**20 // page_size))
        cache = cls(
            shape.num_layers, shape.num_kv_heads, shape.head_dim, num_pages, page_size, dtype, device,
            max_positions=shape.position_limit,
        )  # fmt: skip
        cache._watch = ModelWatch(type(model).__name__, text_config(model), shape)
        return cache

    @property
    def for_a_model(self) -> bool:
        """Whether `for_model` made this cache, which then knows what its model can serve."""
        return type(self._watch) is not Watch

    # -- branches ----------------------------------------------------------------------------------------------------
    def branch(self) -> Branch:
        """A new, empty branch (``.length``, ``.position``, ``.alive``)."""
        return self._core.branch()

    def fork(self, branch: Branch, n: int = 1) -> list[Branch]:
        """``n`` new branches that see all of ``branch``. Metadata only: no KV is copied, whatever the length.

        Raises:
            DeadBranch, ValueError: a dead or foreign branch, n < 1.
        """
        kids = self._core.fork(_branch(branch, "fork"), _number(n, "fork: n"))
        self._watch.forked(branch, kids)
        return kids

    def step(self, rows: Mapping[Branch, int], positions: Mapping[Branch, Tensor] | None = None) -> Step:
        """Reserves new rows: slots for their K and V, positions, and the plan of who sees what.

        A branch whose part-filled tail page is shared gets its own copy of that page first: all such branches, all
        layers, K and V, in one call. The last holder goes on in place.

        Args:
            rows: how many new tokens each branch gets; rows follow the dict's order.
            positions: logical positions for some branches, integers [rows of that branch]; default: from
                ``branch.position`` on. The branch goes on from the last one given + 1.

        Raises:
            OutOfPages: too few free pages for all branches together; nothing was changed.
            DeadBranch, ValueError, TypeError: a dead or foreign branch, no rows, positions that do not fit; what the
                model of a cache made by `for_model` cannot serve.
        """
        rows = _rows(rows)
        given = {} if positions is None else _positions(positions)
        if self.max_positions is not None:
            self._check_limit(rows, given)
        self._watch.check_step(rows, given)
        core = self._core.step(rows, given)
        if core.num_copies:
            src, dst, filled = torch.from_numpy(core.copies()).unbind(0)
            self._backend.copy_pages(self._pool, src, dst, filled)
        step = Step(self, core, tuple(rows))
        self._watch.stepped(step)
        return step

    def join(self, trunk: Branch, kids: Sequence[Branch], mode: str = "concat") -> None:
        """Ends ``kids`` and gives the trunk what they wrote since their fork.

        With ``"concat"`` the trunk's context becomes its own tokens, then each kid's own, in the order given; nothing
        is copied or recomputed, positions stay what they were, and the trunk's next position is the largest of all.
        With ``"discard"`` the trunk keeps its own tokens only. The trunk may have gone on meanwhile. (Joins that
        prefill text again, ``"reprefill"`` and ``"summary"``, are the engine's: they need the model.)

        Raises:
            DeadBranch, ValueError: a dead or foreign branch, a kid that was not forked from the trunk, an unknown mode.
        """
        if mode not in ("concat", "discard"):
            raise ValueError(
                f"mode: expected 'concat' or 'discard', got {mode!r}"
                + ("; this one needs the model: use Engine" if mode in ("reprefill", "summary") else "")
            )
        _branch(trunk, "join: trunk")
        if isinstance(kids, Branch) or not isinstance(kids, Iterable):
            raise TypeError(f"join: kids: expected a list of branches, got {told(kids)}; pass [kid]")
        kids = [_branch(kid, f"join: kids[{i}]") for i, kid in enumerate(kids)]
        if mode == "discard":
            self._core.discard(trunk, kids)
            for kid in kids:
                self._watch.ending(kid)
        else:
            self._watch.check_join(trunk, kids)
            self._core.join(trunk, kids)
            self._watch.joined(trunk, kids)

    def truncate(self, branch: Branch, length: int) -> None:
        """Forgets the tokens from index ``length`` on; pages that nobody else holds are free at once.

        ``branch.position`` becomes one past the last token left (0 when none is).

        Raises:
            DeadBranch, ValueError: a dead or foreign branch; a length below 0 or beyond the branch's.
        """
        length = _number(length, "truncate: length")
        self._watch.truncating(_branch(branch, "truncate"), length)
        self._core.truncate(branch, length)

    def release(self, branch: Branch) -> None:
        """Drops the branch's references; pages that nobody else holds are free at once.

        Raises:
            DeadBranch, ValueError: already released or joined; another cache's.
        """
        self._watch.ending(_branch(branch, "release"))
        self._core.release(branch)

    # -- tensors -----------------------------------------------------------------------------------------------------
    def k_pages(self, layer: int) -> Tensor:
        """A view of the layer's K pool: [num_pages, page_size, num_kv_heads, head_dim] (not contiguous)."""
        return self._k[layer_of(layer, self.num_layers)]

    def v_pages(self, layer: int) -> Tensor:
        """A view of the layer's V pool, like ``k_pages``."""
        return self._v[layer_of(layer, self.num_layers)]

    def write(self, layer: int, k: Tensor, v: Tensor, step: Step, backend: str = "auto") -> None:
        """Puts a step's K and V (after rotary embedding) into its slots.

        Args:
            layer: 0 … num_layers − 1.
            k, v: [rows, num_kv_heads, head_dim], contiguous, in the cache's dtype and on its device.
            step: what ``step`` returned; each layer of it is written once.

        Raises:
            ValueError: a shape, dtype, device or layer that does not fit; a step that is stale or already written.
        """
        if not isinstance(step, Step):
            raise TypeError(f"step: expected the Step that TreeCache.step() returned, got {told(step)}")
        if step.cache is not self:
            raise ValueError("step: made by another cache; write to the cache that made it")
        layer = layer_of(layer, self.num_layers)
        expected = (step.num_rows, self.num_kv_heads, self.head_dim)
        for name, x in (("k", k), ("v", v)):
            if not isinstance(x, Tensor) or x.shape != expected:
                raise ValueError(
                    f"{name}: expected shape {list(expected)} (rows, num_kv_heads, head_dim), got {shape_of(x)}"
                )
            if x.dtype != self.dtype:
                raise ValueError(
                    f"{name}: expected dtype {self.dtype} like the cache, got {x.dtype}; call {name}.to(...)"
                )
            if x.device != self.device:
                raise ValueError(f"{name}: expected device {self.device} like the cache, got {x.device}")
            if not x.is_contiguous():
                raise ValueError(
                    f"{name}: must be contiguous, got strides {list(x.stride())}; call {name}.contiguous()"
                )
        torch.ops.anabranch.write_kv(
            k.detach(), v.detach(), self._k[layer], self._v[layer], step.handle, layer, backend
        )

    def read(self, branch: Branch, layer: int) -> tuple[Tensor, Tensor]:
        """Dense copies of a branch's K and V: [length, num_kv_heads, head_dim] each, in context order."""
        layer = layer_of(layer, self.num_layers)
        slots = torch.from_numpy(self._core.slots(_branch(branch, "read"))).to(self.device).long()
        page, offset = slots // self.page_size, slots % self.page_size
        return self._k[layer][page, offset], self._v[layer][page, offset]

    def positions(self, branch: Branch) -> Tensor:
        """Logical positions of a branch's tokens, int64 [length], in context order, on the CPU."""
        return torch.from_numpy(self._core.positions(_branch(branch, "positions")))

    def _check_limit(self, rows: Mapping[Branch, int], given: Mapping[Branch, Any]) -> None:
        """Raise for a branch whose new rows would lie past the positions that the model has embeddings for."""
        for branch, count in rows.items():
            where = given.get(branch)
            self._core.check_branch(branch, "step")
            last = branch.position + count - 1 if where is None else int(where.max(initial=0))
            if last >= self.max_positions:  # type: ignore[operator]
                raise ValueError(
                    f"step: {branch!r} would get a token at position {last}, but the model has embeddings for "
                    f"{self.max_positions} positions (0 … {self.max_positions - 1}); end the branch, or truncate it"  # type: ignore[operator]
                )

    # -- accounts ----------------------------------------------------------------------------------------------------
    def usage(self) -> Usage:
        """Pages and tokens held now, and pages copied so far."""
        return Usage(*self._core.usage())

    def plan_stats(self) -> tuple[int, int]:
        """(plans built from scratch, plans advanced in place) since the cache was made."""
        return self._core.plan_stats()

    def check(self) -> None:
        """Raises ``RuntimeError`` unless reference counts, free list, spans and branches agree (for tests; linear)."""
        self._core.check()

    def _upload(self, array: Any) -> Tensor:
        if not self._on_host and capturing(self.device):
            raise TopologyChanged(
                "step: it is not on the GPU yet, and what a captured CUDA graph copies there stays the same in every "
                "replay; make and use steps outside the capture, or let anabranch.DecodeGraph capture the forward"
            )
        return upload(array, self.device)

    def _plan_on_host(self, plan: StepPlan, key: tuple[int, Profile]) -> tuple:
        params = self._params.get(key)
        if params is None:
            params = self._params[key] = core_params(*key)
        return self._core.plan(plan._core, params)

    def _plan_arrays(self, plan: StepPlan, key: tuple[int, Profile]) -> PlanArrays:
        result = plan.result(key)
        if self._on_host:
            last = self._last_arrays.get(key)
            if last is not None and last[0] == result[0]:
                return last[1]  # advanced in place: the same memory, already wrapped
            arrays = split_buffer(result, self.device)
            self._last_arrays[key] = (result[0], arrays)
            return arrays
        resident = self._resident.get(key)
        if resident is not None and resident.build == result[0]:
            resident.advance(plan.slots, plan.positions, self._advance_kernel())
        else:
            if capturing(self.device):
                raise TopologyChanged(
                    "step: this plan is not on the GPU yet, or the tree's topology changed, which a captured CUDA "
                    "graph cannot follow; run one step of this topology eagerly, then capture the next one"
                )
            resident = self._resident[key] = ResidentPlan(result, self.device)
        return resident.arrays

    @staticmethod
    def _advance_kernel() -> Callable[..., None] | None:
        return backends.get("cuda").advance if backends.unavailable("cuda") is None else None

    def __repr__(self) -> str:
        u = self.usage()
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"TreeCache(layers={self.num_layers}, kv_heads={self.num_kv_heads}, head_dim={self.head_dim}, {dtype}, "
            f"{self.device}, pages={u.pages_total - u.pages_free}/{u.pages_total} × {self.page_size}, "
            f"tokens={u.tokens_physical} for {u.tokens_logical})"
        )


def _size(name: str, value: Any) -> int:
    found = index_of(value)
    if found is None or found < 1:
        raise ValueError(f"{name}: must be an integer of at least 1, got {told(value)}")
    if found > 2**31 - 1:
        raise ValueError(f"{name}: must be below 2^31, got {found}")
    return found


def _number(value: Any, name: str) -> int:
    """A whole number for the core, which says what range it must be in; one beyond 64 bits is out of any."""
    found = index_of(value)
    if found is None:
        raise ValueError(f"{name} must be a whole number, got {told(value)}")
    return max(-(2**62), min(found, 2**62))


def _device(device: Any) -> torch.device:
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f"device: expected 'cpu', 'cuda' or a torch.device, got {told(device)}") from None
    if found.type == "meta":
        raise ValueError("device: 'meta' holds no data; pass 'cpu' or 'cuda'")
    if found.type == "cuda" and not (torch.cuda.is_available() and (found.index or 0) < torch.cuda.device_count()):
        raise ValueError(f"device: PyTorch sees no {str(found)!r} here ({torch.cuda.device_count()} CUDA devices)")
    return found


def _branch(branch: Any, what: str) -> Branch:
    if not isinstance(branch, Branch):
        raise TypeError(f"{what}: expected a Branch (TreeCache.branch or fork makes them), got {told(branch)}")
    return branch


def _rows(rows: Any) -> dict[Branch, int]:
    """``step``'s rows as the core takes them. (What a branch is in, and its count's size, is the core's to say.)"""
    if type(rows) is not dict:
        if not isinstance(rows, Mapping):
            raise TypeError(f"rows: expected a dict {{branch: number of new rows}}, got {told(rows)}")
        rows = dict(rows)
    if all(type(count) is int for count in rows.values()):
        return rows
    for branch, count in rows.items():
        if index_of(count) is None:
            raise TypeError(f"step: the number of rows must be an integer, got {told(count)} for {branch!r}")
    return {branch: _number(count, "step: rows") for branch, count in rows.items()}


def _positions(positions: Any) -> dict[Branch, Any]:
    """``step``'s positions as NumPy arrays, int64."""
    if not isinstance(positions, Mapping):
        raise TypeError(f"positions: expected a dict {{branch: positions of its new rows}}, got {told(positions)}")
    given: dict[Branch, Any] = {}
    for branch, value in positions.items():
        _branch(branch, "positions: keys")
        if not isinstance(value, Tensor):
            try:
                value = torch.as_tensor(value)
            except (TypeError, ValueError, RuntimeError) as error:
                raise ValueError(f"positions: expected integers for {branch!r}, got {told(value)} ({error})") from None
        if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
            raise ValueError(f"positions: expected integers for {branch!r}, got {value.dtype}")
        if value.dim() != 1:
            raise ValueError(f"positions: expected one a row for {branch!r}, got shape {list(value.shape)}")
        given[branch] = value.detach().to("cpu", torch.int64).contiguous().numpy()
    return given


def free_memory(device: torch.device) -> int:
    """Bytes a cache may take by default: nine tenths of a GPU's free memory, a quarter of the host's."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] * 9 // 10
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4
    except (ValueError, OSError):  # not on every system
        return 2**30
