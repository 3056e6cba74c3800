"""What is timed on a GPU: ours, and whatever else of this kind runs on the machine. All of it is optional.

A contender takes a ``Problem`` and gives back ``Ready``: a call for a layer's attention, and what planning cost. It
raises ``Unfit`` with the reason that the table shows.
"""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from benchmarks.contenders.base import Unfit
from problem import Problem

DENSE_BYTES = 12e9  # that the copies of an attention without sharing may take
WORKSPACE = 256 << 20
MASK_ENTRIES = 3e8  # FlexAttention evaluates its mask densely once


@dataclass
class Ready:
    """A contender that can run.

    Attributes:
        attend: layer → out [rows, num_q_heads, head_dim].
        plan_us: what is paid once a topology and shared by all layers; 0 where there is nothing to plan.
    """

    attend: Callable[[int], torch.Tensor]
    plan_us: float = 0.0
    note: str = ""


def synchronize(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def timed(make: Callable[[], Any], device: str, times: int = 5) -> tuple[Any, float]:
    """What ``make`` returns, and its median µs until the device is done, after one call that does not count."""
    made, seconds = make(), []
    for _ in range(times):
        synchronize(device)
        begin = time.perf_counter()
        made = make()
        synchronize(device)
        seconds.append(time.perf_counter() - begin)
    return made, statistics.median(seconds) * 1e6


def ours(name: str) -> Callable[[Problem], Ready]:
    """Tree attention of one backend, over block tables: the plan finds the sharing itself."""

    def prepare(p: Problem) -> Ready:
        import anabranch as ab

        _, tile_config = _backend(name, p)

        def plan() -> Any:
            made = ab.Plan.from_block_tables(p.tables, p.lengths, p.page_size, p.queries)
            made.check(0, p.k_pages(0))
            made.arrays(p.group, tile_config)  # the backend asks for the same again, and finds them
            return made

        made, plan_us = timed(plan, p.device)
        found = made.arrays(p.group, tile_config)
        return Ready(
            lambda layer: ab.paged_tree_attention(
                p.q, p.k_pages(layer), p.v_pages(layer), made, scale=p.scale, backend=name
            ),
            plan_us,
            f"{found.num_items} items, {found.num_partials} partials",
        )

    return prepare


def flat(name: str) -> Callable[[Problem], Ready]:
    """The same kernels without sharing: every sequence reads its whole context, as paged decoding does.

    Shared pages are still shared in memory, so what one sequence brings into L2 another may find there.
    """

    def prepare(p: Problem) -> Ready:
        import anabranch as ab

        backend, tile_config = _backend(name, p)
        if p.tables.numel() * p.page_size > 2**31 - 1:
            raise Unfit("more than 2^31 tokens in all sequences together")

        def plan() -> FlatPlan:
            # Pages of its own for every sequence, as far as the planner knows; then each strip's true place.
            alone = torch.arange(p.tables.numel(), dtype=torch.int32).view(p.tables.shape)
            made = ab.Plan.from_block_tables(alone, p.lengths, p.page_size, p.queries).arrays(p.group, tile_config)
            strips = made.kv_strips.clone()
            slots = strips[:, 0].long().clamp(0, p.tables.numel() * p.page_size - 1)
            strips[:, 0] = (p.tables.flatten()[slots // p.page_size] * p.page_size + slots % p.page_size).int()
            arrays = replace(made, kv_strips=strips)
            moved = {n: x.to(p.device) for n, x in vars(arrays).items() if isinstance(x, torch.Tensor)}
            return FlatPlan(replace(arrays, **moved), len(p.q))

        made, plan_us = timed(plan, p.device, times=2)
        options: dict[str, Any] = dict(scale=p.scale, softcap=None, window=None, sinks=None, return_lse=False)
        return Ready(
            lambda layer: backend.attention(p.q, p.k_pages(layer), p.v_pages(layer), made, **options)[0], plan_us
        )

    return prepare


@dataclass
class FlatPlan:
    """What a backend asks a plan for."""

    made: Any
    num_rows: int
    batch_invariant: bool = False

    def arrays(self, group: int, tile_config: Any) -> Any:
        return self.made


def _backend(name: str, p: Problem) -> tuple[Any, Any]:
    from anabranch import backends
    from anabranch.errors import BackendUnavailable

    try:
        backend = backends.choose(name, torch.device(p.device), p.dtype, p.head_dim)
    except (BackendUnavailable, ValueError) as reason:
        raise Unfit(str(reason)) from None
    return backend, backend.tile_config(p.num_q_heads, p.num_kv_heads, p.head_dim, p.dtype, p.q.device)


def sdpa(p: Problem) -> Ready:
    """scaled_dot_product_attention over a dense copy of every sequence's context; the copying is not counted."""
    each = 2.0 * sum(p.lengths) * p.num_kv_heads * p.head_dim * p.dtype.itemsize
    if each > DENSE_BYTES:
        raise Unfit(f"dense copies take {each / 1e9:.0f} GB")
    copies = int(min(p.layers, max(1, DENSE_BYTES // each)))
    groups: dict[tuple[int, int], list[int]] = {}
    for i, shape in enumerate(zip(p.lengths, p.queries, strict=True)):
        groups.setdefault(shape, []).append(i)
    first = [0]
    for count in p.queries:
        first.append(first[-1] + count)
    parts = []
    for (length, count), members in groups.items():
        rows = torch.cat([torch.arange(first[i], first[i + 1]) for i in members]).to(p.device)
        slots = torch.stack([p.slots_of_sequence(i) for i in members])
        dense = [tuple(x.transpose(1, 2).contiguous() for x in p.gather(slots, layer)) for layer in range(copies)]
        mask = None
        if count > 1:
            mask = torch.ones(count, length, dtype=torch.bool, device=p.device).tril(length - count)
        parts.append((rows, dense, mask, count))

    def whole(attend: Callable[..., torch.Tensor]) -> Callable[[int], torch.Tensor]:
        def run(layer: int) -> torch.Tensor:
            if len(parts) == 1:
                _, dense, mask, count = parts[0]
                return attend(p.q, *dense[layer % copies], mask, count)
            out = torch.empty_like(p.q)
            for rows, dense, mask, count in parts:
                out[rows] = attend(p.q[rows], *dense[layer % copies], mask, count)
            return out

        return run

    def usual(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, count: int) -> torch.Tensor:
        x = q.view(-1, count, p.num_q_heads, p.head_dim).transpose(1, 2)
        o = F.scaled_dot_product_attention(x, k, v, attn_mask=mask, scale=p.scale, enable_gqa=p.group > 1)
        return o.transpose(1, 2).reshape(-1, p.num_q_heads, p.head_dim)

    def packed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, count: int) -> torch.Tensor:
        x = q.view(-1, p.num_kv_heads, p.group, p.head_dim)
        o = F.scaled_dot_product_attention(x, k, v, scale=p.scale)
        return o.reshape(-1, p.num_q_heads, p.head_dim)

    ways = {"enable_gqa": whole(usual)}
    if p.group > 1 and set(p.queries) == {1}:
        ways["heads as rows"] = whole(packed)
    cost = {name: timed(lambda way=way: way(0), p.device, times=3)[1] for name, way in ways.items()}
    best = min(cost, key=cost.__getitem__)
    return Ready(ways[best], note=best)


def flex(p: Problem) -> Ready:
    """FlexAttention, compiled, query heads of a KV head as rows; making its block mask counts as planning."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    rows, keys = len(p.case.rows) * p.group, p.case.unique_tokens
    if rows * keys > MASK_ENTRIES:
        raise Unfit(f"its mask is evaluated densely once: {rows} × {keys}")
    index = torch.tensor([p.case.starts[n] + offset for n, offset in p.case.rows], device=p.device)
    index = index.repeat_interleave(p.group)
    lengths = torch.tensor(p.case.lengths, device=p.device)
    end = torch.repeat_interleave(torch.tensor(p.case.ends, device=p.device), lengths)

    def visible(b: Any, h: Any, q: Any, kv: Any) -> Any:
        return (kv <= index[q]) & (index[q] < end[kv])

    mask, plan_us = timed(
        lambda: create_block_mask(visible, None, None, rows, keys, device=p.device), p.device, times=2
    )
    dense = [tuple(x.transpose(0, 1)[None].contiguous() for x in p.gather(p.unique_slots, i)) for i in range(p.layers)]
    torch._dynamo.reset()
    compiled = torch.compile(flex_attention, dynamic=False)

    def attend(layer: int) -> torch.Tensor:
        x = p.q.view(-1, p.num_kv_heads, p.group, p.head_dim).transpose(0, 1)
        x = x.reshape(1, p.num_kv_heads, rows, p.head_dim)
        o = compiled(x, *dense[layer % p.layers], block_mask=mask, scale=p.scale)
        o = o.view(p.num_kv_heads, -1, p.group, p.head_dim).transpose(0, 1)
        return o.reshape(-1, p.num_q_heads, p.head_dim)

    return Ready(attend, plan_us)


def _flashinfer() -> Any:
    try:
        return importlib.import_module("flashinfer")
    except Exception as error:  # a build that does not fit this torch fails in its own way
        raise Unfit(f"flashinfer cannot be imported ({type(error).__name__}: {str(error)[:80]})") from None


def _ints(values: list[int], device: str) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def _paged(pages: list[list[int]], tokens: list[int], p: Problem) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """FlashInfer's page tables: indptr, indices, tokens in each one's last page."""
    indptr = [0]
    for some in pages:
        indptr.append(indptr[-1] + len(some))
    last = [n - (len(some) - 1) * p.page_size for some, n in zip(pages, tokens, strict=True)]
    flat_pages = [page for some in pages for page in some]
    return _ints(indptr, p.device), _ints(flat_pages, p.device), _ints(last, p.device)


def _pools(p: Problem, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    return p.storage[layer % p.layers, 0], p.storage[layer % p.layers, 1]  # FlashInfer's "HND"


def flashinfer_cascade(p: Problem) -> Ready:
    """One level of FlashInfer's cascade a level of the tree, for trees whose leaves are all equally deep."""
    flashinfer = _flashinfer()
    case = p.case
    if {case.depths[node] for node, _ in p.sequences} != {max(case.depths)} or set(p.queries) != {1}:
        raise Unfit("its levels want leaves of one depth with one row each")
    below = [0] * len(case.lengths)
    for node, count in p.sequences:
        for above in case.path(node):
            below[above] += count
    levels: list[tuple[torch.Tensor, ...]] = []
    for depth in range(max(case.depths) + 1):
        nodes = [n for n, d in enumerate(case.depths) if d == depth]  # depth-first: their rows follow one another
        queries = [0]
        for node in nodes:
            queries.append(queries[-1] + below[node])
        tables = _paged([list(p.pages_of[n]) for n in nodes], [case.lengths[n] for n in nodes], p)
        levels.append((_ints(queries, p.device), *tables))
    workspace = torch.empty(WORKSPACE, dtype=torch.uint8, device=p.device)
    wrapper = flashinfer.MultiLevelCascadeAttentionWrapper(len(levels), workspace, "HND")
    arrays = [list(part) for part in zip(*levels, strict=True)]
    _, plan_us = timed(
        lambda: wrapper.plan(
            *arrays, p.num_q_heads, p.num_kv_heads, p.head_dim, p.page_size, sm_scale=p.scale, q_data_type=p.dtype
        ),
        p.device,
    )
    return Ready(lambda layer: wrapper.run(p.q, _pools(p, layer)), plan_us, f"{len(levels)} levels")


def flashinfer_decode(p: Problem) -> Ready:
    """FlashInfer's paged batch decode: no sharing but what L2 gives."""
    flashinfer = _flashinfer()
    if set(p.queries) != {1}:
        raise Unfit("one row a sequence only")
    workspace = torch.empty(WORKSPACE, dtype=torch.uint8, device=p.device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=p.group >= 4)
    tables = _paged(p.pages_of_sequence, p.lengths, p)
    _, plan_us = timed(
        lambda: wrapper.plan(
            *tables, p.num_q_heads, p.num_kv_heads, p.head_dim, p.page_size,
            q_data_type=p.dtype, kv_data_type=p.dtype, sm_scale=p.scale,
        ),
        p.device,
    )  # fmt: skip
    return Ready(lambda layer: wrapper.run(p.q, _pools(p, layer)), plan_us)
