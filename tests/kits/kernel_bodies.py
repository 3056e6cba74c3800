"""What the suites of the tree attention kernels share: Triton in its interpreter, CUDA on the host-side device, and
both on a GPU assert the same things.

``run(case, **options)`` computes a case of triton_cases.py and returns ((out, lse), the options it used); ``copy`` and
``write`` are a backend's ``copy_pages(pool, src, dst, filled)`` and ``write_kv(k, v, k_pages, v_pages, slots)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from triton_cases import Case, check, dense, random_case, relative_error

import anabranch as ab
from anabranch import backends

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "softcap": dict(softcap=2.0),
    "window": dict(window=33),
    "sinks": dict(sinks=True),
    "everything": dict(softcap=5.0, window=47, sinks=True, scale=0.4),
}
GROUPS = [1, 3, 7, 20, 71]
PLAN_ARRAYS = (
    "items", "kv_strips", "kv_spelled", "rows", "limits", "dest", "row_positions", "merge_rows", "merge_ptr",
)  # fmt: skip
Run = Callable[..., tuple[tuple[torch.Tensor, torch.Tensor], dict[str, Any]]]


def with_sinks(options: dict[str, Any], case: Case) -> dict[str, Any]:
    """``sinks=True`` becomes a random sink a query head."""
    if options.get("sinks") is True:
        gen = torch.Generator().manual_seed(7)
        options = {**options, "sinks": torch.randn(case.q.shape[1], generator=gen).to(case.q.dtype).to(case.q.device)}
    return options


# ------------------------------------------------------------------------------------------------ anywhere


def a_grid_larger_than_the_work(run: Run, case: Case) -> SimpleNamespace:
    """What a captured graph launches: host ints are capacities, the device's counts are the truth.

    Returns the padded arrays, which the case has from now on.
    """
    (out, lse), options = run(case, softcap=3.0)
    a = case.arrays
    garbage = torch.full((5, 8), 2**30, dtype=torch.int32, device=case.q.device)
    padded = SimpleNamespace(**vars(a))
    padded.items = torch.cat([a.items, garbage])
    padded.merge_rows = torch.cat([a.merge_rows, garbage[:, 0]])
    padded.merge_ptr = torch.cat([a.merge_ptr, garbage[:, 0]])
    padded.counts = torch.tensor(
        [a.num_items, a.num_partials, a.num_merge], dtype=torch.int32, device=case.q.device
    )  # fmt: skip
    padded.num_items, padded.num_merge, padded.num_partials = a.num_items + 5, a.num_merge + 5, a.num_partials + 9
    case.arrays = padded
    got, _ = run(case, softcap=3.0)
    assert torch.equal(got[0], out) and torch.equal(got[1], lse)
    check(case, got, **options)
    return padded


def window_never_reads_what_nobody_sees(run: Run, case: Case, window: int = 30) -> None:
    """Slots that slid out of every row's window may have been given away: they hold NaN here."""
    visible = torch.zeros(case.k_pages.shape[0] * case.k_pages.shape[1], dtype=torch.bool, device=case.q.device)
    for row, (slots, positions) in enumerate(case.context):
        visible[slots[case.row_positions[row] - positions < window]] = True
    before = int(torch.isfinite(case.k_pages).all(-1).all(-1).sum())
    for pages in (case.k_pages, case.v_pages):
        flat = pages.permute(0, 2, 1, 3)  # [pages, heads, page_size, D]
        hidden = ~visible.view(pages.shape[0], 1, pages.shape[1], 1).expand_as(flat)
        flat[hidden] = math.nan
    assert int(torch.isfinite(case.k_pages).all(-1).all(-1).sum()) < before - 20, "the case has nothing to hide"
    got, options = run(case, window=window)
    check(case, got, **options)


def all_rows_empty(run: Run, case: Case) -> None:
    """``case`` has three rows."""
    device = case.q.device
    case.arrays.num_items = case.arrays.num_partials = 0
    case.arrays.num_merge = 3
    case.arrays.merge_rows = torch.arange(3, dtype=torch.int32, device=device)
    case.arrays.merge_ptr = torch.zeros(4, dtype=torch.int32, device=device)
    (out, lse), _ = run(case)
    assert bool((out == 0).all()) and bool((lse == -math.inf).all())
    sinks = torch.randn(case.q.shape[1], device=device)
    (out, lse), _ = run(case, sinks=sinks)
    assert bool((out == 0).all()) and torch.allclose(lse, sinks.expand_as(lse))


def hostile_scores(run: Run, case: Case, magnitude: float) -> None:
    """``case`` was made with this magnitude: 1e4, −1e4 or 1e-4."""
    if magnitude < 0:  # all scores about −1e4: a maximum that starts at 0 or a mask of −1e6 would lose them
        case.q.copy_(case.q.abs())
        case.k_pages.abs_()
        (out, lse), options = run(case, scale=-1e3)
    else:
        (out, lse), options = run(case)
    want, want_lse = dense(case, **options)
    assert torch.isfinite(out).all()
    # A float32 score of 1e4 is only good to about 1e-3, and so is its exponential.
    assert relative_error(out, want) < (1e-5 if abs(magnitude) < 1 else 2e-2)
    finite = torch.isfinite(want_lse)
    assert torch.allclose(lse.cpu().double()[finite], want_lse[finite], rtol=1e-5, atol=1e-5)


def sinks_of_minus_infinity_are_no_sinks(run: Run, case: Case) -> None:
    (out, lse), _ = run(case)
    (with_sink, lse_sink), _ = run(case, sinks=torch.full((case.q.shape[1],), -math.inf, device=case.q.device))
    assert torch.equal(out, with_sink) and torch.equal(lse, lse_sink)


def strided_queries(run: Run, case: Case) -> None:
    """``case`` has a head_dim of 64."""
    (want, _), _ = run(case)
    rows, heads, dim = case.q.shape
    wide = torch.full((rows, 2 * heads, 3 * dim), math.nan, device=case.q.device)
    wide[:, ::2, 64:128] = case.q
    case.q = wide[:, ::2, 64:128]
    (got, _), _ = run(case)
    assert torch.equal(got, want)


def offsets_beyond_32_bits(run: Run, case: Case, folder: Path) -> None:
    """A pool of more than 2^31 elements; on the CPU a sparse file, of which a few pages are touched."""
    case.v_pages = case.k_pages
    (want, want_lse), _ = run(case)
    device = case.q.device
    pages, page_size, heads, dim = case.k_pages.shape
    far = 2**31 // (pages - 1) + 64 & ~15
    size = far * (pages - 1) + page_size * heads * dim
    assert size > 2**31
    if device.type == "cpu":
        pool = torch.from_file(str(folder / "pool"), shared=True, size=size, dtype=case.q.dtype)
    else:
        pool = torch.zeros(size, dtype=case.q.dtype, device=device)
    moved = pool.as_strided((pages, page_size, heads, dim), (far, heads * dim, dim, 1))
    used = sorted({int(s) // page_size for slots, _ in case.context for s in slots})
    order = [p for p in range(pages) if p not in used] + used  # the pages in use move to the far end
    place = {page: at for at, page in enumerate(order)}
    for page in used:
        moved[place[page]] = case.k_pages[page]
    for entries in (case.arrays.kv_strips, case.arrays.kv_spelled):
        moved_to = [s if s < 0 else place[s // page_size] * page_size + s % page_size for s in entries[:, 0].tolist()]
        entries[:, 0] = torch.tensor(moved_to, dtype=torch.int32)
    case.k_pages = case.v_pages = moved
    (out, lse), _ = run(case)
    assert torch.equal(lse, want_lse) and torch.equal(out, want)


def merge(merged: Callable[..., tuple[torch.Tensor, torch.Tensor]], dim: int, sink: float | None) -> None:
    """Ranges of 0, 1, 2, 9 and 40 partials, some of them empty with poison for an accumulator, against float64.

    ``merged(acc [partials, heads, dim], m, l [partials, heads], rows, ptr, sinks or None)`` takes and gives tensors on
    the CPU: out [6, heads, dim], lse [6, heads], which began as NaN.
    """
    heads, lengths = 3, [0, 1, 2, 9, 40, 3]
    gen = torch.Generator().manual_seed(2)
    total = sum(lengths)
    m = torch.randn(total, heads, generator=gen) * 20
    l = torch.rand(total, heads, generator=gen) + 1  # noqa: E741
    acc = torch.randn(total, heads, dim, generator=gen)
    empty = torch.rand(total, heads, generator=gen) < 0.3
    empty[-3:] = True  # the last row: nothing but empty partials
    empty[12:22] = True  # the row of 40: several steps of a merge's loop without anything, then the rest
    m[empty], l[empty], acc[empty] = -math.inf, 0.0, math.nan
    ptr = torch.tensor([0, *lengths]).cumsum(0).int()
    rows = torch.tensor([4, 0, 2, 5, 1, 3], dtype=torch.int32)
    sinks = torch.full((heads,), 0.0 if sink is None else sink)
    out, lse = merged(acc, m, l, rows, ptr, None if sink is None else sinks)
    for i, row in enumerate(rows.tolist()):
        part = slice(int(ptr[i]), int(ptr[i + 1]))
        mm, ll, aa = m[part].double(), l[part].double(), acc[part].double().nan_to_num()
        terms = mm if sink is None else torch.cat([mm, sinks.double()[None]])
        if terms.shape[0] == 0 or bool((terms == -math.inf).all()):
            assert bool((out[row] == 0).all()) and bool((lse[row] == -math.inf).all())
            continue
        top = terms.amax(0)
        top = torch.where(top == -math.inf, 0.0, top)
        w = torch.exp(mm - top)
        sum_l = (w * ll).sum(0) + (0 if sink is None else torch.exp(sinks.double() - top))
        want = torch.where(sum_l[:, None] > 0, (w[..., None] * aa).sum(0) / sum_l[:, None].clamp_min(1e-300), 0.0)
        assert relative_error(out[row], want) < 1e-5 or float(want.norm()) == 0 == float(out[row].norm())
        assert torch.allclose(lse[row].double(), top + sum_l.log(), rtol=1e-5, atol=1e-5)


def write_kv(write: Callable[..., None], heads: int, dim: int, page_size: int, dtype: torch.dtype, device: str) -> None:
    gen = torch.Generator().manual_seed(dim)
    pool = torch.randn(2, 2, 5, heads, page_size, dim, generator=gen).to(device, dtype)  # as TreeCache: [2, layers, …]
    want = pool.clone()
    k_pages, v_pages = (pool[i, 1].permute(0, 2, 1, 3) for i in (0, 1))
    packed = torch.randn(6, 2, heads, dim, generator=gen).to(device, dtype)  # k and v as slices of one projection
    k, v = packed[:, 0], packed[:, 1]
    slots = torch.tensor([0, 5 * page_size - 1, -1, page_size, 3, page_size + 2], dtype=torch.int32, device=device)
    write(k[:0], v[:0], k_pages, v_pages, slots[:0])
    assert torch.equal(pool, want)
    write(k, v, k_pages, v_pages, slots)
    for row, slot in enumerate(slots.tolist()):
        if slot >= 0:
            want[0, 1, slot // page_size, :, slot % page_size] = k[row]
            want[1, 1, slot // page_size, :, slot % page_size] = v[row]
    assert torch.equal(pool, want)


def copy_pages(copy: Callable[..., None], dim: int, dtype: torch.dtype, device: str) -> None:
    planes, pages, heads, page_size = 3, 6, 2, 20
    gen = torch.Generator().manual_seed(1)
    pool = torch.randn(planes, pages, heads, page_size, dim, generator=gen).to(device, dtype)
    pool[:, 1, :, 15:] = math.nan  # the unfilled tail of a source stays where it is
    want = pool.clone()
    src, dst, filled = (torch.tensor(x, dtype=torch.int32) for x in ([1, 1, 4], [0, 3, 5], [15, 1, 20]))
    for s, d, n in zip(src.tolist(), dst.tolist(), filled.tolist(), strict=True):
        want[:, d, :, :n] = want[:, s, :, :n]
    copy(pool, src, dst, filled)
    assert torch.equal(pool.view(torch.uint8), want.view(torch.uint8))
    copy(pool, src[:0], dst[:0], filled[:0])
    assert torch.equal(pool.view(torch.uint8), want.view(torch.uint8))


def strided(shape: tuple[int, ...], odd: int | None, dtype: torch.dtype, device: str) -> torch.Tensor:
    """Zeros of which the address and all strides but the last are multiples of 16 elements. odd: of this dimension the
    stride is one element more; of −1, the address."""
    strides = [1]
    for size, dimension in zip(shape[:0:-1], range(len(shape) - 2, -1, -1), strict=True):
        strides.insert(0, -(-size * strides[0] // 16) * 16 + int(dimension == odd))
    storage = torch.zeros(shape[0] * strides[0] + 16, dtype=dtype, device=device)
    return storage.as_strided(shape, strides, int(odd == -1))


def write_kv_at_any_address(write: Callable[..., None], dtype: torch.dtype, device: str) -> None:
    """Rows and pools of which one begins, or goes on, at an odd element, while all others would allow wide copies."""
    gen = torch.Generator().manual_seed(9)
    shapes = [(3, 2, 16)] * 2 + [(3, 4, 2, 16)] * 2  # k, v, k_pages, v_pages
    slots = torch.tensor([9, 0, 6], dtype=torch.int32, device=device)
    for which, shape in enumerate(shapes):
        for odd in range(-1, len(shape) - 1):
            tensors = [strided(s, odd if i == which else None, dtype, device) for i, s in enumerate(shapes)]
            for rows, pool in zip(tensors[:2], tensors[2:], strict=True):
                rows.copy_(torch.randn(rows.shape, generator=gen))
                pool.copy_(torch.randn(pool.shape, generator=gen))
            want = [pool.clone() for pool in tensors[2:]]
            write(*tensors, slots)
            for rows, pool, expected in zip(tensors[:2], tensors[2:], want, strict=True):
                expected[slots.long() // 4, slots.long() % 4] = rows
                assert torch.equal(pool, expected), (which, odd)


def copy_pages_at_any_address(copy: Callable[..., None], dtype: torch.dtype, device: str) -> None:
    """The same of a pool whose pages are copied."""
    shape = (2, 3, 2, 4, 16)  # planes, pages, heads, tokens, head_dim
    src, dst, filled = (torch.tensor([n], dtype=torch.int32) for n in (2, 1, 3))
    for odd in range(-1, len(shape) - 1):
        pool = strided(shape, odd, dtype, device)
        pool.copy_(torch.randn(shape, generator=torch.Generator().manual_seed(9)))
        want = pool.clone()
        want[:, 1, :, :3] = want[:, 2, :, :3]
        copy(pool, src, dst, filled)
        assert torch.equal(pool, want), odd


# ------------------------------------------------------------------------------------------------ on a GPU


def variant(run: Run, seed: int, head_dim: int, dtype: torch.dtype, tile_rows: int, everything: bool) -> None:
    """Contexts of some hundred tokens; plain, or with every option."""
    case = random_case(
        seed, rows=45, segments=9, max_len=700, tile_rows=tile_rows, group=4, num_kv_heads=2, head_dim=head_dim,
        dtype=dtype, device="cuda",
    )  # fmt: skip
    options = {}
    if everything:
        sinks = torch.randn(8, generator=torch.Generator().manual_seed(1)).to("cuda", dtype)
        options = dict(softcap=3.0, window=400, sinks=sinks)
    got, options = run(case, **options)
    check(case, got, **options)


def group_size(run: Run, group: int) -> None:
    case = random_case(
        group, rows=20, segments=6, max_len=400, tile_rows=max(1, 64 // group), group=group, num_kv_heads=2,
        head_dim=128, dtype=torch.bfloat16, device="cuda",
    )  # fmt: skip
    got, options = run(case)
    check(case, got, **options)


def same_bits_in_fifty_runs(run: Run) -> None:
    case = random_case(
        5, rows=200, segments=40, max_len=500, tile_rows=16, group=4, dtype=torch.bfloat16, device="cuda"
    )
    (out, lse), _ = run(case, window=300)
    for _ in range(50):
        again, _ = run(case, window=300)
        assert torch.equal(again[0], out) and torch.equal(again[1], lse)


def captured_graph_follows_the_device_counts(run: Run) -> None:
    """One graph, captured at capacity, replayed while plans of other sizes are copied into its arrays."""
    shape: dict[str, Any] = dict(
        rows=12, segments=5, max_len=300, tile_rows=8, group=4, head_dim=64, dtype=torch.float16, device="cuda"
    )
    cases = [random_case(70 + i, **shape) for i in range(3)]
    static = random_case(69, **shape)
    pages = max(case.k_pages.shape[0] for case in cases)
    static.k_pages, static.v_pages = (
        torch.zeros(pages, 16, 2, 64, dtype=torch.float16, device="cuda") for _ in range(2)
    )
    arrays = static.arrays = SimpleNamespace(**vars(static.arrays))
    for name in PLAN_ARRAYS:
        most = max(getattr(case.arrays, name).shape[0] for case in cases)
        setattr(arrays, name, torch.zeros((most, *getattr(arrays, name).shape[1:]), dtype=torch.int32, device="cuda"))
    for name in ("num_items", "num_partials", "num_merge"):
        setattr(arrays, name, max(getattr(case.arrays, name) for case in cases))
    arrays.counts = torch.zeros(3, dtype=torch.int32, device="cuda")

    def load(case: Case) -> None:
        a = case.arrays
        for name in PLAN_ARRAYS:
            source = getattr(a, name)
            getattr(arrays, name)[: source.shape[0]] = source
        arrays.counts.copy_(torch.tensor([a.num_items, a.num_partials, a.num_merge], dtype=torch.int32))
        static.q.copy_(case.q)
        for mine, theirs in ((static.k_pages, case.k_pages), (static.v_pages, case.v_pages)):
            mine[: theirs.shape[0]] = theirs

    load(cases[0])
    run(static)  # compiles, where that is still to be done
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got, options = run(static)
    for case in [*cases, cases[0]]:
        load(case)
        graph.replay()
        check(case, got, **options)


def copying_and_writing_many_pages(copy: Callable[..., None], write: Callable[..., None]) -> None:
    gen = torch.Generator("cuda").manual_seed(0)
    pool = torch.randn(16, 600, 4, 16, 128, generator=gen, device="cuda").bfloat16()  # planes, pages, heads, tokens, D
    want = pool.clone()
    src, dst = torch.arange(0, 250, dtype=torch.int32), torch.arange(300, 550, dtype=torch.int32)
    filled = torch.arange(250, dtype=torch.int32) % 16 + 1
    for s, d, n in zip(src.tolist(), dst.tolist(), filled.tolist(), strict=True):
        want[:, d, :, :n] = want[:, s, :, :n]
    copy(pool, src, dst, filled)
    assert torch.equal(pool, want)
    k_pages, v_pages = (pool[i].permute(0, 2, 1, 3) for i in (0, 1))
    slots = torch.randperm(600 * 16, generator=gen, device="cuda")[:5000].int()
    k, v = (torch.randn(5000, 4, 128, generator=gen, device="cuda").bfloat16() for _ in range(2))
    write(k, v, k_pages, v_pages, slots)
    for pages, rows in ((k_pages, k), (v_pages, v)):
        assert torch.equal(pages[slots // 16, slots % 16], rows)
    assert torch.equal(pool[2:], want[2:])


def a_tree_and_its_twin_on_the_cpu(dtype: torch.dtype, backend: str, device: str = "cuda") -> None:
    """The whole way: the same program on two caches, one on ``device``, one on the CPU with the reference."""
    there, cpu = (
        ab.TreeCache(2, 2, 128, num_pages=200, page_size=16, dtype=t, device=d)
        for d, t in ((device, dtype), ("cpu", torch.float32))
    )
    there._backend = backends.get(backend)
    gen = torch.Generator().manual_seed(3)
    trunks = [c.branch() for c in (there, cpu)]

    def step(rows: list[tuple[Any, Any, int]]) -> None:
        steps = [c.step({r[i]: r[2] for r in rows}) for i, c in enumerate((there, cpu))]
        for layer in range(2):
            q, k, v = (torch.randn(steps[0].num_rows, h, 128, generator=gen).to(dtype) for h in (8, 2, 2))
            there.write(layer, k.to(device), v.to(device), steps[0], backend=backend)
            cpu.write(layer, k.float(), v.float(), steps[1])
            out = ab.tree_attention(q.to(device), there, layer, steps[0], window=150, backend=backend)
            want = ab.tree_attention(q.float(), cpu, layer, steps[1], window=150, backend="reference")
            assert relative_error(out, want) <= (1e-5 if dtype == torch.float32 else 6e-3)

    step([(*trunks, 333)])
    kids = list(zip(there.fork(trunks[0], 9), cpu.fork(trunks[1], 9), strict=True))
    step([(*kid, 1) for kid in kids])  # copies the shared tail page nine times
    for _ in range(20):  # plans that advance on the device
        step([(*kid, 1) for kid in kids])
    step([(*kid, 1 + i * 7) for i, kid in enumerate(kids)])
    there.join(trunks[0], [kid[0] for kid in kids])
    cpu.join(trunks[1], [kid[1] for kid in kids])
    step([(*trunks, 3)])
    assert there.usage().tokens_physical == cpu.usage().tokens_physical
