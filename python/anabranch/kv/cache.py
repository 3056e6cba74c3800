"""``TreeCache``: a paged KV cache whose branches fork for free and join without a copy.

The bookkeeping (pages, spans, reference counts, plans) is C++ in ``anabranch._core``; this file holds the tensors, the
checks and the one device call a step may need, the copy of shared tail pages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from anabranch import _core, backends, ops
from anabranch._check import layer_of, shape_of, told
from anabranch._core import OutOfPages
from anabranch.backends.control_groups import available_memory
from anabranch.backends.formats import KVFormat, KVScales
from anabranch.kv.arguments import _branch, _device, _number, _positions, _rows, _size
from anabranch.kv.aside import KVAside
from anabranch.kv.model import CacheShape, shape_for
from anabranch.kv.pool import Pool, v_head_dim_of
from anabranch.kv.step import Branch, Step
from anabranch.kv.views import Views, core_views
from anabranch.kv.watch import Watch
from anabranch.ops.rotary import Rotary
from anabranch.plan.planner import Planner


@dataclass(frozen=True)
class Usage:
    """What a cache holds, in pages and tokens.

    Attributes:
        pages_total, pages_free: pages of the pool. Those that only kept branches hold count as free: they are given up
            when a step needs them (see `TreeCache.keep`).
        tokens_logical: Σ of the branches' lengths, as if nothing were shared.
        tokens_physical: tokens that really take up a slot.
        pages_copied: shared tail pages copied since the cache was made (each for all layers, K and V).
        pages_kept: of the free ones, those whose tokens can still be forked from. Tokens of kept branches alone count
            in none of the above.

    >>> cache = ab.TreeCache(num_layers=1, num_kv_heads=1, head_dim=8, num_pages=8, page_size=4)
    >>> trunk = cache.branch()
    >>> step = cache.step({trunk: 4})
    >>> children = cache.fork(trunk, 3)
    >>> cache.usage().tokens_logical, cache.usage().tokens_physical
    (16, 4)
    """

    pages_total: int
    pages_free: int
    tokens_logical: int
    tokens_physical: int
    pages_copied: int
    pages_kept: int = 0


class TreeCache:
    """A paged, copy-on-write KV cache for branches that fork and join.

    Args:
        num_layers, num_kv_heads, head_dim: the model's.
        num_pages: pages of the pool; a page holds ``page_size`` tokens of K and of V for every layer, that is
            num_layers · page_size · num_kv_heads · (head_dim + v_head_dim) elements.
        page_size: tokens a page.
        dtype: float32, float16, bfloat16 (float64 with the reference backend only).
        device: "cpu" or a CUDA device.
        kv_format: how K and V are kept: "auto", in `dtype`; "int8" or "fp8" (e4m3), a byte an element and a float32
            factor for each token's K and V of each head. (See docs/guides/own_loop.md.)
        max_positions: positions that the model has embeddings for, where they are looked up in a table (GPT-2, OPT);
            `step` refuses to go beyond. None: no limit (rotary embeddings).
        rotary: the model's rotary embeddings, one for all layers or one a layer (None: a layer that knows no
            positions); only rows that read other branches under a position offset (`Read`) need it.
        v_head_dim: head_dim of V, where it is another than K's (192 and 128 in DeepSeek's models).
        v_in_k: V is the first ``v_head_dim`` numbers of K's row, so V is not kept: multi-head latent attention (MLA)
            over latents, with ``num_kv_heads=1``, ``head_dim=kv_lora_rank + qk_rope_head_dim`` and
            ``v_head_dim=kv_lora_rank``. (See docs/guides/attention_shapes.md.)

    Not safe for use by several threads at once.

    >>> cache = ab.TreeCache(num_layers=1, num_kv_heads=2, head_dim=64, num_pages=256)
    >>> trunk = cache.branch()
    >>> step = cache.step({trunk: 20})                        # 20 new rows
    >>> k, v = torch.randn(2, 20, 2, 64)
    >>> cache.write(0, k, v, step)
    >>> out = ab.tree_attention(torch.randn(20, 8, 64), cache, 0, step)
    >>> children = cache.fork(trunk, 4)                       # nothing is copied
    >>> step = cache.step(dict.fromkeys(children, 1))         # a row each; the tail page is copied once per child
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
        rotary: Rotary | Sequence[Rotary | None] | None = None,
        kv_format: KVFormat | str | torch.dtype | None = "auto",
        v_head_dim: int | None = None,
        v_in_k: bool = False,
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
        v_head_dim = v_head_dim_of(v_head_dim, head_dim, v_in_k)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"dtype: expected a torch.dtype such as torch.float32, got {dtype!r}")
        if num_pages * page_size > 2**31 - 1:
            raise ValueError(
                f"num_pages: {num_pages} pages × {page_size} tokens exceed 2^31 − 1 slots; take fewer pages"
            )
        self.num_layers = num_layers
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.v_head_dim = v_head_dim
        self.v_in_k = v_in_k
        self.num_pages = num_pages
        self.page_size = page_size
        self.max_positions = max_positions
        self._rotary: Any = _rotary(rotary, num_layers, head_dim)
        self.dtype = dtype
        self.kv_format = KVFormat.of(kv_format, dtype)
        device = _device(device)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        self.device = device
        # Raises for a dtype, format, device or head_dim that nothing here can serve, before memory is taken.
        self._backend = backends.choose(
            "auto", self.device, dtype, head_dim, self.kv_format.dtype, 0 if v_in_k else v_head_dim
        )
        self._pool = Pool(
            num_layers, num_pages, num_kv_heads, page_size, head_dim, v_head_dim, v_in_k, self.kv_format, self.device,
            self._backend,
        )  # fmt: skip
        self._core = _core.Cache(num_pages, page_size)
        self.batch_invariant = False  # for plans of later steps; a backend with that trait honours it
        self.reclaim: Callable[[int], bool] = _nothing_to_give  # see `keep`
        self.planner = Planner(self._core.plan, self.device, backends.advance_kernel(self.device))
        self._watch = Watch()

    @classmethod
    def for_model(
        cls,
        model: Any,
        num_pages: int | None = None,
        page_size: int = 16,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        kv_format: KVFormat | str | torch.dtype | None = "auto",
        latent: bool = False,
    ) -> TreeCache:
        """A cache with a Hugging Face model's shape, for that model: steps that it could not serve raise ValueError
        (the model has been switched to another attention; rows of the last step were never written; rotary embeddings
        that would depend on another branch's length), before anything changes.

        Args:
            model: a decoder; its config gives layers, heads and head_dim, its weights dtype and device.
            num_pages: default: a quarter of the memory that the process can take (its container's limit included; nine
                tenths of a GPU's), at most 2^20 tokens.
            kv_format: how K and V are kept: "auto" (the model's dtype), "int8" or "fp8".
            latent: keep the latents of multi-head latent attention (DeepSeek) in place of its K and V, for all heads
                together; forwards then take ``cache=anabranch.hf.latents_of(step)`` beside ``tree_step=step``.

        Raises:
            ValueError: a model whose layers are not all plain self-attention, or with ``latent`` none over latents; the
                message names what is in the way.
        """
        page_size = _size("page_size", page_size)
        shape = shape_for(model)
        dtype = shape.dtype if dtype is None else dtype
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"dtype: expected a torch.dtype such as torch.float32, got {dtype!r}")
        device = _device(shape.device if device is None else device)
        num_kv_heads, head_dim, v_head_dim = shape.num_kv_heads, shape.head_dim, shape.v_head_dim
        if not isinstance(latent, bool):
            raise ValueError(f"latent: expected True or False, got {told(latent)}")
        if latent:
            num_kv_heads, (head_dim, v_head_dim) = 1, shape.latent()
        if num_pages is None:
            num_pages = free_pages(shape, page_size, dtype, device, kv_format, latent)
        cache = cls(
            shape.num_layers, num_kv_heads, head_dim, num_pages, page_size, dtype, device,
            max_positions=shape.max_positions, kv_format=kv_format, v_head_dim=v_head_dim, v_in_k=latent,
        )  # fmt: skip
        cache._watch, cache._rotary = shape.watch, shape.rotary
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

    def step(
        self,
        rows: Mapping[Branch, int],
        positions: Mapping[Branch, Tensor] | None = None,
        views: Views | None = None,
    ) -> Step:
        """Reserves new rows: slots for their K and V, positions, and the plan of who sees what.

        A branch whose part-filled tail page is shared gets its own copy of that page first: all such branches, all
        layers, K and V, in one call (two where K and V have different head_dims). The last holder goes on in place.

        Args:
            rows: how many new tokens each branch gets; rows follow the dict's order.
            positions: logical positions for some branches, integers [rows of that branch]; default: from
                ``branch.position`` on. The branch goes on from the last one given + 1.
            views: what the rows of some branches read beside their own branch: a list of `Read`, or one list a row. A
                row sees each token once, as its own branch has it, else as the first `Read` that holds it says. Rows
                of one step may see one another: K and V of all are written before any attends.

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
        seen, turned = ({}, False) if views is None else core_views(views, rows)
        rotary = self._rotary_of_layers() if turned else ()
        core = self._reserved(rows, given, seen)
        if core.num_copies:
            src, dst, filled = torch.from_numpy(core.copies()).unbind(0)
            self._pool.copy(src, dst, filled)
        step = Step(self, core, tuple(rows), rotary=rotary)
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

    def share(self, branch: Branch, sibling: Branch, count: int | None = None) -> None:
        """Lets ``branch`` see what a sibling wrote since its fork as well; the sibling goes on as it is.

        Metadata only: nothing is copied or computed again. The tokens keep their positions and count as shared, like
        those that ``branch`` was forked with, so that a join brings back its own alone; its next position lies behind
        them. What the sibling writes later is not seen::

            one, two, both = cache.fork(trunk, 3)
            ...                                   # steps of one and two
            cache.share(both, one)
            cache.share(both, two)                # sees the trunk, one and two, which stay blind to each other
            ...                                   # steps of both
            cache.join(trunk, [one, two, both])   # each token once

        Args:
            branch: forked from the same branch as ``sibling``, and without a step since.
            count: of the sibling's own tokens the first so many; None: all there are now.

        Raises:
            DeadBranch, ValueError: a dead or foreign branch, one that is no sibling, has tokens of its own, or sees the
                tokens already; a count out of range.
        """
        own = _branch(sibling, "share: sibling").length - sibling.fork_length
        count = own if count is None else _number(count, "share: count")
        self._watch.check_join(_branch(branch, "share: branch"), [sibling])
        self._core.share(branch, sibling, count)
        self._watch.shared(branch, sibling)

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

    def keep(self, branch: Branch) -> None:
        """Keeps a branch to be forked from later, for as long as nothing else needs its pages.

        From now on it takes no rows and no part in joins, and `usage` counts what it alone holds as free. It can be
        forked, truncated, read and released. When a step runs out of pages, ``cache.reclaim(pages)`` is called, which
        is to release or truncate kept branches until so many pages are free beside those kept, and to say whether
        it could; `PrefixCache` does.

        Raises:
            DeadBranch, ValueError: a dead or foreign branch.
        """
        self._core.keep(_branch(branch, "keep"))

    def kept_pages(self, branch: Branch, length: int) -> int:
        """Of the pages that hold a branch's first `length` tokens, those that count as free because only kept branches
        hold them: so many less are free once it is forked."""
        return self._core.kept_pages(_branch(branch, "kept_pages"), length)

    def _reserved(
        self, rows: Mapping[Branch, int], given: Mapping[Branch, Any], views: Mapping[Branch, Any]
    ) -> _core.Step:
        while True:
            try:
                return self._core.step(rows, given, views)
            except OutOfPages:
                if not self.reclaim(self._core.pages_needed):
                    raise

    # -- tensors -----------------------------------------------------------------------------------------------------
    def k_pages(self, layer: int) -> Tensor:
        """A view of the layer's K pool: [num_pages, page_size, num_kv_heads, head_dim] (not contiguous), elements of
        ``kv_format.dtype``."""
        return self._pool.k[layer_of(layer, self.num_layers)]

    def v_pages(self, layer: int) -> Tensor:
        """A view of the layer's V pool, like ``k_pages``, [num_pages, page_size, num_kv_heads, v_head_dim]; with
        ``v_in_k`` of its K pool."""
        return self._pool.v[layer_of(layer, self.num_layers)]

    def kv_scales(self, layer: int) -> KVScales | None:
        """Views of the layer's factors where K and V are quantised, ``.k`` and ``.v`` float32 [num_pages, page_size,
        num_kv_heads]; else None. ``kv_format.dequantise(k_pages, scales.k)`` is what the pages stand for."""
        return self._pool.scales[layer_of(layer, self.num_layers)]

    def write(self, layer: int, k: Tensor, v: Tensor | None, step: Step, backend: str = "auto") -> None:
        """Puts a step's K and V (after rotary embedding) into its slots, quantised if the cache's format says so.

        Args:
            layer: 0 … num_layers − 1.
            k: [rows, num_kv_heads, head_dim], contiguous, in the cache's dtype and on its device.
            v: [rows, num_kv_heads, v_head_dim], likewise; None with ``v_in_k``.
            step: what ``step`` returned; each layer of it is written once.

        Raises:
            ValueError: a shape, dtype, device or layer that does not fit; a step that is stale or already written.
        """
        if not isinstance(step, Step):
            raise TypeError(f"step: expected the Step that TreeCache.step() returned, got {told(step)}")
        if step.cache is not self:
            raise ValueError("step: made by another cache; write to the cache that made it")
        layer = layer_of(layer, self.num_layers)
        if self.v_in_k and v is not None:
            raise ValueError(
                f"v: this cache has V in K's rows (v_in_k=True), got {shape_of(v)}; pass None, and in k rows of "
                f"{self.head_dim} numbers whose first {self.v_head_dim} are V"
            )
        heads = (step.num_rows, self.num_kv_heads)
        for name, x, expected in (("k", k, (*heads, self.head_dim)), ("v", v, (*heads, self.v_head_dim))):
            if x is None and self.v_in_k:
                continue
            if (
                type(x) is not Tensor
                or x.shape != expected
                or x.dtype is not self.dtype
                or x.device != self.device
                or not x.is_contiguous()
            ):
                self._check_rows(name, x, expected)
        pool = self._pool
        v_pages = None if v is None else pool.v[layer]
        ops.write(k, v, pool.k[layer], v_pages, step.plan, layer, backend, pool.scales[layer])

    def _check_rows(self, name: str, x: Any, expected: tuple[int, ...]) -> None:
        """Raise ValueError that says why `x` cannot be written."""
        if not isinstance(x, Tensor) or x.shape != expected:
            raise ValueError(
                f"{name}: expected shape {list(expected)} (rows, num_kv_heads, {'v_' if name == 'v' else ''}head_dim), "
                f"got {shape_of(x)}"
            )
        if x.dtype != self.dtype:
            raise ValueError(f"{name}: expected dtype {self.dtype} like the cache, got {x.dtype}; call {name}.to(...)")
        if x.device != self.device:
            raise ValueError(f"{name}: expected device {self.device} like the cache, got {x.device}")
        if not x.is_contiguous():
            raise ValueError(f"{name}: must be contiguous, got strides {list(x.stride())}; call {name}.contiguous()")

    def read(self, branch: Branch, layer: int) -> tuple[Tensor, Tensor]:
        """Dense copies of a branch's K [length, num_kv_heads, head_dim] and V [length, num_kv_heads, v_head_dim], in
        context order, in ``dtype`` (of quantised ones: what is kept, as attention reads it, rounded to that)."""
        layer = layer_of(layer, self.num_layers)
        return self._pool.read(layer, self._slots(_branch(branch, "read")), self.dtype)

    def put_aside(self, branch: Branch, length: int) -> KVAside:
        """K and V of a branch's first `length` tokens, copied to the host bit for bit as they are kept. So a branch can
        leave the cache, and come back by `put_back`, whose KV could not be computed again.

        Raises:
            DeadBranch, ValueError: a dead or foreign branch; a length out of range.
        """
        length = _number(length, "put_aside: length")
        slots = self._slots(_branch(branch, "put_aside"))
        if not 0 <= length <= len(slots):
            raise ValueError(f"put_aside: length: expected 0 … {len(slots)}, got {length}")
        slots = slots[:length]
        return KVAside(length, self.positions(branch)[:length], [x.cpu() for x in self._pool.raw(slots)])

    def put_back(self, branch: Branch, aside: KVAside, begin: int) -> None:
        """Writes tokens `begin` … of what was put aside over the same tokens of `branch`, up to its end.

        The branch must have rows of its own there, which it shares with nobody yet, from steps whose positions were
        ``aside.positions``: their slots are reserved by a step like any other's.

        Raises:
            DeadBranch, ValueError: a dead or foreign branch; tokens that it shares, or that were not put aside.
        """
        slots = self._slots(_branch(branch, "put_back"))
        end, begin = len(slots), _number(begin, "put_back: begin")
        if not branch.fork_length <= begin <= end <= aside.length:
            raise ValueError(
                f"put_back: tokens {begin} … {end}: expected some of the {aside.length} that were put aside, behind "
                f"the {branch.fork_length} that the branch was forked with"
            )
        self._pool.put_raw(slots[begin:], [x[begin:end].to(self.device) for x in aside.planes])

    def _slots(self, branch: Branch) -> Tensor:
        return torch.from_numpy(self._core.slots(branch)).to(self.device).long()

    def positions(self, branch: Branch) -> Tensor:
        """Logical positions of a branch's tokens, int64 [length], in context order, on the CPU."""
        return torch.from_numpy(self._core.positions(_branch(branch, "positions")))

    def require_rotary(self) -> None:
        """Raise ValueError, with the reason, where rows cannot read other branches under a position offset."""
        self._rotary_of_layers()

    def _rotary_of_layers(self) -> Sequence[Rotary | None]:
        """The rotary embeddings of each layer; ValueError where nobody knows them."""
        if callable(self._rotary):  # the model is asked at the first use, once
            try:
                self._rotary = self._rotary()
            except ValueError as error:
                self._rotary = error
        if isinstance(self._rotary, ValueError):
            raise self._rotary
        if self._rotary is None:
            raise ValueError(
                "views: a Read has an offset, and this cache does not know how its keys were rotated; make it with "
                "TreeCache.for_model(model), or pass rotary=ab.Rotary(frequencies)"
            )
        return self._rotary  # type: ignore[no-any-return]

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

    def populate(self) -> bool:
        """Have the system hand out the memory of all pages now, rather than where each is first written: on a virtual
        machine that cost a large cache's first step 10 ms a layer. For a cache that is still empty; it may run in a
        thread of its own beside steps.

        Returns:
            Whether it did: Linux from 5.14 on, and the CPU (a GPU's memory is there from the beginning).

        Raises:
            MemoryError: the pages take more than the process can (its control groups' limits included): the system
                would kill it. Nothing was claimed; a step that gets so far would be its end as well.
        """
        available = available_memory() if self.device.type == "cpu" else None
        if available is not None and available < (takes := self._pool.num_bytes):
            raise MemoryError(
                f"num_pages={self.num_pages} (of {self.page_size} tokens) take {takes / 1e9:.1f} GB, and "
                f"{available / 1e9:.1f} GB can be had; pass a smaller num_pages"
            )
        return self._pool.populate()

    def plan_stats(self) -> tuple[int, int]:
        """(plans built from scratch, plans advanced in place) since the cache was made."""
        return self._core.plan_stats()

    def check(self) -> None:
        """Raises ``RuntimeError`` unless reference counts, free list, spans and branches agree (for tests; linear)."""
        self._core.check()

    def __repr__(self) -> str:
        u = self.usage()
        dtype = str(self.dtype).removeprefix("torch.")
        if self.kv_format.quantised:
            dtype += f" kept as {self.kv_format.name}"
        head_dim = str(self.head_dim)
        if self.v_in_k or self.v_head_dim != self.head_dim:
            head_dim += f" (V: {self.v_head_dim}{' of them' if self.v_in_k else ''})"
        return (
            f"TreeCache(layers={self.num_layers}, kv_heads={self.num_kv_heads}, head_dim={head_dim}, {dtype}, "
            f"{self.device}, pages={u.pages_total - u.pages_free}/{u.pages_total} × {self.page_size}, "
            f"tokens={u.tokens_physical} for {u.tokens_logical})"
        )


def _rotary(given: Any, num_layers: int, head_dim: int) -> list[Rotary | None] | None:
    """One a layer, checked."""
    if given is None:
        return None
    every = [given] * num_layers if isinstance(given, Rotary) else list(given)
    if len(every) != num_layers or not all(r is None or isinstance(r, Rotary) for r in every):
        raise ValueError(f"rotary: expected an ab.Rotary, or a list of {num_layers} (one a layer), got {told(given)}")
    for rotary in every:
        if rotary is not None and 2 * len(rotary.frequencies) > head_dim:
            raise ValueError(f"rotary: {len(rotary.frequencies)} pairs do not fit in head_dim={head_dim}")
    return every


def _nothing_to_give(pages: int) -> bool:
    return False


def free_pages(
    shape: CacheShape, page_size: int, dtype: torch.dtype, device: torch.device, kv_format: Any, latent: bool = False
) -> int:
    """Pages that a cache of this shape takes by default."""
    heads, (dim, v_dim) = (1, shape.latent()) if latent else (shape.num_kv_heads, (shape.head_dim, shape.v_head_dim))
    fmt = KVFormat.of(kv_format, dtype)
    token_bytes = fmt.bytes_per_vector(dim) + (0 if latent else fmt.bytes_per_vector(v_dim))
    return max(1, min(free_memory(device) // (shape.num_layers * page_size * heads * token_bytes), 2**20 // page_size))


def free_memory(device: torch.device) -> int:
    """Bytes a cache may take by default: nine tenths of a GPU's free memory, a quarter of what the process can take."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] * 9 // 10
    available = available_memory()
    return 2**30 if available is None else available // 4
