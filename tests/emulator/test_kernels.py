"""The CUDA kernels on the host-side device, against dense float64 attention over random trees (triton_cases.py).

A seed fixes the order of threads and blocks and how copies land (kit.settings); the data of a case is fixed by its own
seed. `pytest -m slow tests/emulator` goes through 50 seeds.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import kit
import pytest
import torch

from triton_cases import check, dense, random_case, relative_error

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
OPTIONS = {
    "plain": {},
    "softcap": dict(softcap=2.0),
    "window": dict(window=33),
    "sinks": dict(sinks=True),
    "everything": dict(softcap=5.0, window=47, sinks=True, scale=0.4),
}
# 40 and 72 are padded; groups of 7 and 5 leave lanes idle, 20 and 71 rows take several warps or passes
SHAPES = [
    dict(head_dim=32, group=1),
    dict(head_dim=64, group=4, num_kv_heads=1),
    dict(head_dim=80, group=7, num_kv_heads=1, layout="tokens"),
    dict(head_dim=96, group=3),
    dict(head_dim=128, group=2, page_size=12),
    dict(head_dim=192, group=1, num_kv_heads=3),
    dict(head_dim=256, group=2, page_size=1, num_kv_heads=1),
    dict(head_dim=72, group=5, rows=4),
    dict(head_dim=40, group=20, num_kv_heads=1, segments=3),
    dict(head_dim=32, group=71, num_kv_heads=1, rows=3, segments=2, tile_rows=1),
]


def with_sinks(options, case):
    if options.get("sinks"):
        gen = torch.Generator().manual_seed(7)
        return {**options, "sinks": torch.randn(case.q.shape[1], generator=gen).to(case.q.dtype)}
    return options


def run(device, case, seed=0, ring=0, grid=0, **options):
    device.configure(**kit.settings(seed))
    options = kit.NO_OPTIONS | with_sinks(options, case)
    return kit.attention(device, case, ring=ring, grid=grid, **options), options


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"d{s['head_dim']}g{s['group']}")
def test_shapes(device, shape, dtype):
    seed = shape["head_dim"] + shape["group"]
    case = random_case(seed, dtype=dtype, **{"rows": 5, "max_len": 70, **shape})
    got, options = run(device, case, seed, **OPTIONS["everything"])
    check(case, got, **options)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_options(device, options, seed):
    case = random_case(100 + seed, rows=9, segments=5, head_dim=32, tile_rows=3, dtype=DTYPES[seed])
    got, options = run(device, case, seed + 3, **options)
    check(case, got, **options)


def long_case(dtype=torch.bfloat16, **shape):
    """Several blocks of tokens an item, more than any ring holds, and items of one to four warps of rows."""
    return random_case(
        17,
        dtype=dtype,
        **dict(rows=13, segments=2, max_len=700, tile_rows=16, head_dim=32, group=4, num_kv_heads=1) | shape,
    )


@pytest.mark.parametrize("ring", range(2, 8))
@pytest.mark.parametrize("window", [None, 300])
def test_rings(device, ring, window):
    case = long_case(DTYPES[ring % 3])
    if case.q.dtype == torch.float32:
        case = long_case(torch.float32, tile_rows=8)
    got, options = run(device, case, ring, ring=ring, window=window)
    check(case, got, **options)


def test_order_and_grid_change_no_bit(device):
    case = long_case()
    (out, lse), _ = run(device, case, grid=1)
    for seed, grid in ((1, 2), (2, 3), (3, 8), (4, 40)):
        again, _ = run(device, case, seed, grid=grid)
        assert torch.equal(again[0], out) and torch.equal(again[1], lse)
    without, _ = run(device, case, 5, ring=7)
    assert torch.equal(without[0], out)


def test_lse_is_optional(device):
    case = long_case(max_len=90)
    (want, _), _ = run(device, case)
    out, lse = kit.attention(device, case, lse=False)
    assert torch.equal(out, want) and torch.isnan(lse).all()


def test_a_grid_larger_than_the_work(device):
    """What a captured graph launches: host ints are capacities, the device's counts are the truth."""
    case = random_case(11, rows=8, head_dim=32)
    (out, lse), options = run(device, case, softcap=3.0)
    a = case.arrays
    garbage = torch.full((5, 8), 2**30, dtype=torch.int32)
    padded = SimpleNamespace(**vars(a))
    padded.items = torch.cat([a.items, garbage])
    padded.merge_rows = torch.cat([a.merge_rows, garbage[:, 0]])
    padded.merge_ptr = torch.cat([a.merge_ptr, garbage[:, 0]])
    padded.counts = torch.tensor([a.num_items, a.num_partials, a.num_merge], dtype=torch.int32)
    padded.num_items, padded.num_merge, padded.num_partials = a.num_items + 5, a.num_merge + 5, a.num_partials + 9
    case.arrays = padded
    got, _ = run(device, case, softcap=3.0)
    assert torch.equal(got[0], out) and torch.equal(got[1], lse)
    check(case, got, **options)
    padded.counts.zero_()  # a graph replayed for a tree of nothing
    got, _ = run(device, case)
    assert torch.isnan(got[0]).all() and torch.isnan(got[1]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_window_never_reads_what_nobody_sees(device, dtype):
    """Slots that slid out of every row's window may have been given away: they hold NaN here."""
    case = random_case(21, rows=5, segments=2, max_len=200, head_dim=32, dtype=dtype)
    window = 30
    visible = torch.zeros(case.k_pages.shape[0] * case.k_pages.shape[1], dtype=torch.bool)
    for row, (slots, positions) in enumerate(case.context):
        visible[slots[case.row_positions[row] - positions < window]] = True
    before = int(torch.isfinite(case.k_pages).all(-1).all(-1).sum())
    for pages in (case.k_pages, case.v_pages):
        flat = pages.permute(0, 2, 1, 3)  # [pages, heads, page_size, D]
        flat[~visible.view(pages.shape[0], 1, pages.shape[1], 1).expand_as(flat)] = math.nan
    assert int(torch.isfinite(case.k_pages).all(-1).all(-1).sum()) < before - 20, "the case has nothing to hide"
    got, options = run(device, case, window=window)
    check(case, got, **options)


def test_a_window_skips_tiles(device):
    case = long_case()
    run(device, case)
    every = device.statistics()["copies"]
    device.reset_statistics()
    case.row_positions[:] = 10**6  # far behind all keys: nothing is read
    case.arrays.row_positions[:] = 10**6
    case.arrays.items[:, 6] = 10**6
    got, options = run(device, case, window=50)
    assert device.statistics()["copies"] == 0 < every
    check(case, got, **options)


def test_all_rows_empty(device):
    case = random_case(5, rows=3, head_dim=32)
    case.arrays.num_items = case.arrays.num_partials = 0
    case.arrays.num_merge = 3
    case.arrays.merge_rows = torch.arange(3, dtype=torch.int32)
    case.arrays.merge_ptr = torch.zeros(4, dtype=torch.int32)
    (out, lse), _ = run(device, case)
    assert bool((out == 0).all()) and bool((lse == -math.inf).all())
    sinks = torch.randn(case.q.shape[1])
    out, lse = kit.attention(device, case, sinks=sinks)
    assert bool((out == 0).all()) and torch.allclose(lse, sinks.expand_as(lse))


@pytest.mark.parametrize("magnitude", [1e4, -1e4, 1e-4])
def test_hostile_scores(device, magnitude):
    case = random_case(31, rows=6, magnitude=magnitude)
    if magnitude < 0:  # all scores about −1e4: a maximum that starts at 0 or a mask of −1e6 would lose them
        case.q.copy_(case.q.abs())
        case.k_pages.abs_()
        (out, lse), options = run(device, case, scale=-1e3)
    else:
        (out, lse), options = run(device, case)
    want, want_lse = dense(case, **options)
    assert torch.isfinite(out).all()
    # A float32 score of 1e4 is only good to about 1e-3, and so is its exponential.
    assert relative_error(out, want) < (1e-5 if abs(magnitude) < 1 else 2e-2)
    finite = torch.isfinite(want_lse)
    assert torch.allclose(lse.double()[finite], want_lse[finite], rtol=1e-5, atol=1e-5)


def test_sinks_of_minus_infinity_are_no_sinks(device):
    case = random_case(41, rows=6, head_dim=32)
    (out, lse), _ = run(device, case)
    with_sink, lse_sink = kit.attention(device, case, sinks=torch.full((case.q.shape[1],), -math.inf))
    assert torch.equal(out, with_sink) and torch.equal(lse, lse_sink)


def test_strided_queries(device):
    case = random_case(51, rows=6)
    (want, _), _ = run(device, case)
    wide = torch.full((6, 2 * case.q.shape[1], 3 * case.q.shape[2]), math.nan)
    wide[:, ::2, 64:128] = case.q
    case.q = wide[:, ::2, 64:128]
    (got, _), _ = run(device, case)
    assert torch.equal(got, want)


def test_offsets_beyond_32_bits(device, tmp_path):
    """A pool of more than 2^31 elements: a sparse file, of which a few pages are touched."""
    case = random_case(61, rows=4, segments=2, max_len=20, head_dim=32, dtype=torch.float16, page_size=64)
    case.v_pages = case.k_pages
    (want, want_lse), _ = run(device, case)
    pages, page_size, heads, dim = case.k_pages.shape
    far = 2**31 // (pages - 1) + 64 & ~15
    pool = torch.from_file(
        str(tmp_path / "pool"), shared=True, size=far * (pages - 1) + page_size * heads * dim, dtype=torch.float16
    )
    moved = pool.as_strided((pages, page_size, heads, dim), (far, heads * dim, dim, 1))
    used = sorted({int(s) // page_size for slots, _ in case.context for s in slots})
    order = [p for p in range(pages) if p not in used] + used  # the pages in use move to the far end
    place = {page: at for at, page in enumerate(order)}
    for page in used:
        moved[place[page]] = case.k_pages[page]
    slots = case.arrays.kv_slots.tolist()
    case.arrays.kv_slots = torch.tensor(
        [place[s // page_size] * page_size + s % page_size for s in slots], dtype=torch.int32
    )
    case.k_pages = case.v_pages = moved
    (out, lse), _ = run(device, case)
    assert torch.equal(lse, want_lse) and torch.equal(out, want)


@pytest.mark.parametrize("sink", [None, -math.inf, 0.7], ids=["no-sink", "sink-inf", "sink"])
@pytest.mark.parametrize("dim", [24, 256])
def test_merge(device, dim, sink):
    """Ranges of 0, 1, 2, 9 and 40 partials, some of them empty with poison for an accumulator, against float64."""
    heads, lengths = 3, [0, 1, 2, 9, 40, 3]
    gen = torch.Generator().manual_seed(2)
    total = sum(lengths)
    m = torch.randn(total, heads, generator=gen) * 20
    l = torch.rand(total, heads, generator=gen) + 1  # noqa: E741
    acc = torch.randn(total, heads, dim, generator=gen)
    empty = torch.rand(total, heads, generator=gen) < 0.3
    empty[-3:] = True  # the last row: nothing but empty partials
    m[empty], l[empty], acc[empty] = -math.inf, 0.0, math.nan
    ptr = torch.tensor([0, *lengths]).cumsum(0).int()
    rows = torch.tensor([4, 0, 2, 5, 1, 3], dtype=torch.int32)
    sinks = torch.full((heads,), 0.0 if sink is None else sink)
    out, lse = torch.full((6, heads, dim), math.nan), torch.full((6, heads), math.nan)
    ml = torch.stack([m / math.log(2), l], -1).contiguous()
    with kit.memory(device, rows=rows, ptr=ptr, ml=ml, acc=acc, sinks=sinks, out_=out, lse_=lse):
        device.attention(
            0, dim, heads, heads, 16, (0, 0, 0), (0, 0, 0, 0), (0, 0, 0, 0),
            (*[0] * 7, rows.data_ptr(), ptr.data_ptr(), 0), 0, len(lengths), 1.0, 0.0, -1,
            0 if sink is None else sinks.data_ptr(), out.data_ptr(), lse.data_ptr(), (acc.data_ptr(), ml.data_ptr()),
            0, 0,
        )  # fmt: skip
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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads,dim,page_size", [(2, 64, 16), (3, 80, 7), (5, 33, 4), (1, 2, 4)])
def test_write_kv(device, heads, dim, page_size, dtype):
    gen = torch.Generator().manual_seed(dim)
    pool = torch.randn(2, 2, 5, heads, page_size, dim, generator=gen).to(dtype)  # as TreeCache: [2, layers, pages, …]
    want = pool.clone()
    k_pages, v_pages = (pool[i, 1].permute(0, 2, 1, 3) for i in (0, 1))
    packed = torch.randn(6, 2, heads, dim, generator=gen).to(dtype)  # k and v as slices of one projection
    k, v = packed[:, 0], packed[:, 1]
    slots = torch.tensor([0, 5 * page_size - 1, -1, page_size, 3, page_size + 2], dtype=torch.int32)

    def write(rows):
        with kit.memory(device, packed=packed, pool_=pool, slots=slots):
            device.write_kv(
                kit.TYPES[dtype], dim, heads, page_size, *((x.data_ptr(), *x.stride()[:2]) for x in (k, v)),
                *((x.data_ptr(), *x.stride()[:3]) for x in (k_pages, v_pages)), slots.data_ptr(), rows, 0, 0,
            )  # fmt: skip

    write(0)
    assert torch.equal(pool, want) and device.statistics()["launches"] == 0
    write(6)
    for row, slot in enumerate(slots.tolist()):
        if slot >= 0:
            want[0, 1, slot // page_size, :, slot % page_size] = k[row]
            want[1, 1, slot // page_size, :, slot % page_size] = v[row]
    assert torch.equal(pool, want) and device.statistics()["launches"] == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [96, 33])
def test_copy_pages(device, dim, dtype):
    planes, pages, heads, page_size = 3, 6, 2, 20
    pool = torch.randn(planes, pages, heads, page_size, dim, generator=torch.Generator().manual_seed(1)).to(dtype)
    pool[:, 1, :, 15:] = math.nan  # the unfilled tail of a source stays where it is
    want = pool.clone()
    copies = torch.tensor([[1, 1, 4], [0, 3, 5], [15, 1, 20]], dtype=torch.int32)
    for s, d, n in copies.T.tolist():
        want[:, d, :, :n] = want[:, s, :, :n]
    with kit.memory(device, pool_=pool, copies=copies):
        for count in (3, 0):
            device.copy_pages(
                kit.TYPES[dtype], dim, pool.data_ptr(), pool.stride()[:4], planes, heads, copies.data_ptr(), count, 0, 0
            )
    assert torch.equal(pool.view(torch.uint8), want.view(torch.uint8))
    assert device.statistics()["launches"] == 1


def test_a_slot_outside_the_pool_traps(device):
    case = random_case(3, head_dim=32)
    case.arrays.kv_slots[5] = case.k_pages.shape[0] * case.k_pages.shape[1] + 40
    with pytest.raises(
        device.Trap, match=r"block \d, thread \d+: read of 16 bytes at 0x\w+ is outside every allocation"
    ):
        run(device, case)


@pytest.mark.parametrize("options", [dict(head_dim=257), dict(ring=1), dict(ring=8), dict(type=3)], ids=str)
def test_what_the_launcher_refuses(device, options):
    o = dict(type=1, head_dim=64, ring=0) | options
    with pytest.raises(ValueError, match=next(iter(options))):
        device.attention(
            o["type"], o["head_dim"], 1, 1, 16, (0, 0, 0), (0, 0, 0, 0), (0, 0, 0, 0), (0,) * 10, 1, 0, 1.0, 0.0, -1,
            0, 0,
            0, (0, 0), 0, 0, o["ring"],
        )  # fmt: skip


def test_tile_of_a_plan(device):
    assert [device.packed_rows(1, d) for d in (32, 128, 136, 256)] == [64, 64, 32, 32]
    assert [device.packed_rows(0, d) for d in (32, 128, 136, 256)] == [32, 32, 16, 16]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(50))
def test_fifty_seeds(device, seed):
    for dtype in DTYPES:
        shape = SHAPES[seed % len(SHAPES)]
        case = random_case(1000 + seed, dtype=dtype, **{"rows": 6, "max_len": 150, **shape})
        got, options = run(device, case, seed, ring=2 + seed % 6, grid=seed % 5, **list(OPTIONS.values())[seed // 10])
        check(case, got, **options)
