"""More of what the suites of the tree attention kernels share (kernel_bodies.py): values at hidden places, memory past
2^31 elements, and maxima that come late. ``run``, ``copy`` and ``write`` are as there; all on the CPU's memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from kernel_bodies import Run
from strip_kit import lay_out, tokens
from triton_cases import Case, check, dense, relative_error

FAR = 2**31


# ------------------------------------------------------------------------------------------------ hidden values


def seen_slots(case: Case, row: int, window: int | None) -> np.ndarray:
    slots, positions = case.context[row]
    return slots if window is None else slots[case.row_positions[row] - positions < window]


def hidden_from_some(case: Case, window: int | None) -> tuple[list[int], np.ndarray]:
    """Some rows, and slots that none of these sees though they lie in items of theirs, where other rows do see them."""
    every = range(case.q.shape[0])
    by = [set(seen_slots(case, row, window).tolist()) for row in every]
    items = [
        (set(tokens(case.arrays, begin, n)[0].tolist()), set(case.arrays.rows[at : at + count].tolist()))
        for begin, n, at, count, *_ in case.arrays.items.tolist()
    ]
    gen, best = np.random.default_rng(0), (0, [0], set())
    for _ in range(60):
        kept = set(gen.permutation(every)[: gen.integers(1, len(every))].tolist())
        theirs = set().union(*by) - set().union(*(by[row] for row in kept))
        beside = [(slots & theirs, rows & kept) for slots, rows in items]
        score = sum(len(slots) * len(rows) for slots, rows in beside)
        if score > best[0]:
            best = score, sorted(kept), set().union(*(slots for slots, rows in beside if rows))
    assert best[0] > 5, "the case hides nothing that shares an item with a row that does not see it"
    return best[1], np.array(sorted(best[2]))


def hidden_values(run: Run, case: Case, value: float, v_columns: slice | None = None, **options: Any) -> None:
    """K and V of tokens that some rows do not see are set to ``value``, or these columns of V alone (which leaves the
    scores as they are); these rows do not notice."""
    (clean, clean_lse), used = run(case, **options)
    check(case, (clean, clean_lse), **used)
    kept, slots = hidden_from_some(case, used.get("window"))
    page_size = case.k_pages.shape[1]
    for slot in slots.tolist():
        at = (slot // page_size, slot % page_size)
        case.v_pages[at][:, v_columns or slice(None)] = value
        if v_columns is None:
            case.k_pages[at] = value
    (out, lse), _ = run(case, **options)
    assert torch.isfinite(out[kept]).all()
    # Kept apart from what is hidden, a sum may be taken in smaller steps: equal up to rounding.
    assert torch.allclose(lse[kept], clean_lse[kept], rtol=1e-5, atol=1e-5)
    bound = 1e-5 if case.q.dtype == torch.float32 else 6e-3
    assert relative_error(out[kept], clean[kept].double()) <= bound


def seen_infinities(
    run: Run,
    case: Case,
    column: int | None = None,
    values: tuple[float, ...] = (math.inf, -math.inf, math.nan),
    **options: Any,
) -> None:
    """``values`` in single elements of V reach the rows that see them, in their column, and nothing else.

    column: of all of them; None: each in another.
    """
    _, used = run(case, **options)
    kept, slots = hidden_from_some(case, used.get("window"))
    page_size, columns = case.v_pages.shape[1], case.v_pages.shape[3]
    gen = np.random.default_rng(0)
    for slot in slots.tolist():
        at = int(gen.integers(0, columns)) if column is None else column
        case.v_pages[slot // page_size, slot % page_size, :, at] = values[slot % len(values)]
    (out, lse), _ = run(case, **options)
    want, _ = dense(case, **used)
    sees_some = [row for row in range(out.shape[0]) if np.isin(seen_slots(case, row, used.get("window")), slots).any()]
    assert sees_some and not set(sees_some) & set(kept)
    finite = torch.isfinite(want)
    assert not finite[sees_some].all()
    assert torch.equal(torch.isfinite(out), finite)
    assert torch.equal(torch.isnan(out), torch.isnan(want))
    infinite = torch.isinf(want)
    assert torch.equal(out[infinite].double(), want[infinite])
    assert torch.isfinite(lse[kept]).any()
    bound = 1e-5 if case.q.dtype == torch.float32 else 6e-3
    assert relative_error(out[finite], want[finite]) <= bound


# ------------------------------------------------------------------------------------------------ past 2^31


def sparse(folder: Path, name: str, size: int, dtype: torch.dtype) -> torch.Tensor:
    """Zeros of which only what is touched takes memory. There is as much in front as an offset in 32 bits can go wrong
    by: it ends in a wrong value, not in a crash."""
    return torch.from_file(str(folder / name), shared=True, size=FAR + size, dtype=dtype)[FAR:]


def writes_beyond_32_bits(write: Callable[..., None], folder: Path, dtype: torch.dtype = torch.float16) -> None:
    """``write_kv`` to and from places past 2^31 elements: by the page, the slot and the head; of K and of V."""
    heads, dim, page_size = 3, 16, 4
    gen = torch.Generator().manual_seed(3)
    small = torch.randn(2, 3, heads, dim, generator=gen).to(dtype)
    far = FAR // 2 + 4096  # fits into 32 bits, and twice of it does not
    for name, strides in {
        "page": (far, heads * dim, dim, 1),
        "slot": (heads * dim, far, dim, 1),
        "head": (page_size * dim, dim, far, 1),
    }.items():
        size = 2 * strides[0] + 3 * strides[1] + 2 * strides[2] + dim
        pools = [
            sparse(folder, f"{name}{i}", size, dtype).as_strided((3, page_size, heads, dim), strides) for i in (0, 1)
        ]
        slots = torch.tensor([2 * page_size + 3, 0, page_size + 2], dtype=torch.int32)
        write(small[0], small[1], *pools, slots)
        for pool, rows in zip(pools, small, strict=True):
            for row, slot in zip(rows, slots.tolist(), strict=True):
                assert torch.equal(pool[slot // page_size, slot % page_size], row), name
    source = sparse(folder, "rows", 2 * far + heads * dim, dtype).as_strided((3, heads, dim), (far, dim, 1))
    source[:] = small[0]
    near = torch.zeros(2, 3, page_size, heads, dim, dtype=dtype)
    write(source, source, near[0], near[1], slots)
    for row, slot in zip(small[0], slots.tolist(), strict=True):
        assert torch.equal(near[0, slot // page_size, slot % page_size], row)
        assert torch.equal(near[1, slot // page_size, slot % page_size], row)


def copies_beyond_32_bits(copy: Callable[..., None], folder: Path, dtype: torch.dtype = torch.float16) -> None:
    """``copy_pages`` with source, destination, plane, head and slot past 2^31 elements."""
    planes, pages, heads, page_size, dim = 3, 3, 3, 4, 16
    far = FAR // 2 + 4096
    near = (pages * heads * page_size * dim, heads * page_size * dim, page_size * dim, dim, 1)
    for name, at in {"plane": 0, "page": 1, "head": 2, "slot": 3}.items():
        strides = list(near)
        strides[at] = far
        shape = (planes, pages, heads, page_size, dim)
        size = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        pool = sparse(folder, name, size, dtype).as_strided(shape, strides)
        want = torch.randn(shape, generator=torch.Generator().manual_seed(at)).to(dtype)
        pool.copy_(want)
        src, dst, filled = (torch.tensor(x, dtype=torch.int32) for x in ([2], [1], [4]))
        copy(pool, src, dst, filled)
        want[:, 1] = want[:, 2]
        assert torch.equal(pool, want), name
        copy(pool, *(torch.tensor(x, dtype=torch.int32) for x in ([0], [2], [3])))
        want[:, 2, :, :3] = want[:, 0, :, :3]
        assert torch.equal(pool, want), name


def partials_beyond_32_bits(run: Run, case: Case) -> None:
    """A plan whose partials begin past 2^31 elements of the accumulators: attention writes them, the merge reads them.

    ``run`` must take memory for the partials that costs nothing where it is not touched.
    """
    (want, want_lse), _ = run(case)
    a = case.arrays
    assert a.num_partials > 2
    begin = FAR // (case.q.shape[1] * case.q.shape[2]) + 5
    moved = SimpleNamespace(**vars(a))
    moved.dest = torch.where(a.dest >= 0, a.dest + begin, a.dest)
    moved.merge_ptr = a.merge_ptr + begin
    moved.num_partials = a.num_partials + begin
    case.arrays = moved
    (out, lse), _ = run(case)
    assert torch.equal(out, want) and torch.equal(lse, want_lse)


def rows_beyond_32_bits(run: Run, case: Case, folder: Path) -> None:
    """Queries, outputs and log-sum-exps of rows so far behind that their elements lie past 2^31.

    ``run`` must take memory for the outputs that costs nothing where it is not touched.
    """
    (want, want_lse), _ = run(case)
    rows, heads, dim = case.q.shape
    a, begin = case.arrays, FAR // (heads * dim) + 3
    assert a.num_merge and bool((a.dest < 0).any()), (
        "some rows are merged, and some are written by the item they lie in"
    )
    q = sparse(folder, "queries", (begin + rows) * heads * dim, case.q.dtype).view(begin + rows, heads, dim)
    q[begin:] = case.q
    positions = torch.zeros(begin + rows, dtype=torch.int32)
    positions[begin:] = a.row_positions
    moved = SimpleNamespace(**vars(a))
    moved.rows, moved.merge_rows, moved.row_positions = a.rows + begin, a.merge_rows + begin, positions
    case.q, case.arrays = q, moved
    (out, lse), _ = run(case)
    assert torch.equal(out[begin:], want) and torch.equal(lse[begin:], want_lse)


# ------------------------------------------------------------------------------------------------ blind tiles


def blind_tiles(run: Run, case: Case) -> None:
    """A third of each item, the first, the middle or the last, of which some rows see nothing, or none does: positions
    do not rise along a run where siblings were joined. ``case`` has items of several tiles of tokens."""
    a, window, page_size = case.arrays, 300, case.k_pages.shape[1]
    items = a.items.tolist()
    assert max(length for _, length, *_ in items) > 3 * 96, "no item has a whole tile in each of its thirds"
    case.row_positions = np.where(np.arange(case.q.shape[0]) % 2, 500, 1000).astype(np.int32)
    a.row_positions = torch.from_numpy(case.row_positions)
    for third in range(3):
        for blind in (600, 100):  # seen by every other row; by none
            place, ranges = {}, []
            for i, (begin, length, at, count, *_) in enumerate(items):
                slots = tokens(a, begin, length)[0]
                positions = np.array([blind if 3 * n // length == third else 800 for n in range(length)], np.int32)
                place |= dict(zip(slots.tolist(), positions.tolist(), strict=True))
                ranges.append((slots, positions))
                a.items[i, 5] = int(positions.max())
                a.items[i, 6] = min(case.row_positions[row] for row in a.rows[at : at + count].tolist())
            used = SimpleNamespace(**vars(a))
            used.kv_strips, used.kv_spelled, begins = lay_out(ranges, a.strip, np.random.default_rng(third))
            used.items = torch.cat([torch.tensor(begins, dtype=torch.int32)[:, None], a.items[:, 1:]], 1).contiguous()
            case.arrays = used
            case.context = [(slots, np.array([place[s] for s in slots.tolist()])) for slots, _ in case.context]
            gone = [s for s, position in place.items() if position == 100]
            keep = [(pool, pool.clone()) for pool in (case.k_pages, case.v_pages)]
            for pool, _ in keep:  # what nobody sees may be gone
                for slot in gone:
                    pool[slot // page_size, slot % page_size] = math.nan
            got, options = run(case, window=window)
            check(case, got, **options)
            for pool, before in keep:
                pool.copy_(before)


# ------------------------------------------------------------------------------------------------ late maxima


def late_maxima(run: Run, case: Case) -> None:
    """A row of 70 items: the highest score, far above all others, in the first, a middle or the last of them, and
    nothing visible in another one; through the attention and the merge. ``case`` is replaced but for its sizes."""
    count, each, heads, dim = 70, 3, *case.q.shape[1:]
    slots = np.arange(count * each, dtype=np.int32)
    page_size, num_kv_heads = case.k_pages.shape[1:3]
    shape = (-(-len(slots) // page_size), page_size, num_kv_heads, dim)
    gen = torch.Generator().manual_seed(8)
    k, v = (torch.randn(shape, generator=gen).to(case.q.dtype) for _ in range(2))
    q = torch.zeros(1, heads, dim, dtype=case.q.dtype)
    q[..., 0] = 1.0
    for top, empty in ((0, 69), (34, 0), (69, 34)):

        def ints(values: Any) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int32)

        limits, strip = [0 if i == empty else each for i in range(count)], min(16, page_size & -page_size)
        ranges = [(slots[i * each : (i + 1) * each], np.zeros(each, np.int32)) for i in range(count)]
        kv_strips, kv_spelled, begins = lay_out(ranges, strip, np.random.default_rng(top))
        keys = k.clone()
        for slot in range(top * each, top * each + each):
            keys[slot // page_size, slot % page_size, :, 0] = 1200  # times 0.25: e^300 is beyond float32
        arrays = SimpleNamespace(
            items=ints([[begins[i], each, i, 1, int(i == empty), 0, 0, 0] for i in range(count)]),
            kv_strips=kv_strips, kv_spelled=kv_spelled, strip=strip, most_parts=0, rows=ints([0] * count),
            limits=ints(limits), dest=ints(range(count)), row_positions=ints([0]), merge_rows=ints([0]),
            merge_ptr=ints([0, count]), num_items=count, num_partials=count, num_merge=1, tile_rows=1, num_wide=0,
        )  # fmt: skip
        seen = np.concatenate([slots[: empty * each], slots[(empty + 1) * each :]])
        one = Case(q, keys, v, arrays, [(seen, np.zeros(len(seen), np.int32))], np.zeros(1, np.int32))
        got, options = run(one)
        check(one, got, **options)


def merges_of_many_partials(merged: Callable[..., Any], dim: int) -> None:
    """Rows of 33 to 70 partials: the largest m in the first, a middle and the last of them, far above all others, and
    nothing visible in the first, a middle or the last. ``merged`` is as in kernel_bodies.merge, for six rows."""
    heads, lengths = 3, [40, 40, 33, 70, 65, 34]
    top, empty = [39, 0, 32, 35, 64, 33], [0, 39, 16, 69, 0, 1]
    gen = torch.Generator().manual_seed(4)
    total = sum(lengths)
    m = torch.randn(total, heads, generator=gen)
    l = torch.rand(total, heads, generator=gen) + 1  # noqa: E741
    acc = torch.randn(total, heads, dim, generator=gen)
    ptr = torch.tensor([0, *lengths]).cumsum(0).int()
    for i in range(6):
        m[ptr[i] + top[i]] += 300  # exp of the difference overflows float32
        at = ptr[i] + empty[i]
        m[at], l[at], acc[at] = -math.inf, 0.0, math.nan
    rows = torch.tensor([4, 0, 2, 5, 1, 3], dtype=torch.int32)
    for sinks in (None, torch.zeros(heads), torch.full((heads,), 310.0)):
        out, lse = merged(acc, m, l, rows, ptr, sinks)
        for i, row in enumerate(rows.tolist()):
            part = slice(int(ptr[i]), int(ptr[i + 1]))
            mm, ll, aa = m[part].double(), l[part].double(), acc[part].double().nan_to_num()
            high = mm.amax(0) if sinks is None else torch.maximum(mm.amax(0), sinks.double())
            w = torch.exp(mm - high)
            sum_l = (w * ll).sum(0) + (0 if sinks is None else torch.exp(sinks.double() - high))
            assert relative_error(out[row], (w[..., None] * aa).sum(0) / sum_l[:, None]) < 1e-4
            assert torch.allclose(lse[row].double(), high + sum_l.log(), rtol=1e-5, atol=1e-4)
