"""The Triton kernels against a dense float64 computation (tests/triton_cases.py).

Without a GPU they run in the interpreter of Triton (tests/conftest.py sets TRITON_INTERPRET=1 before Triton is
imported), on a machine with one they run there. tests/gpu adds what only a GPU can show.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed (it has wheels for Linux only)")

from anabranch.kernels import configs, launch
from anabranch.kernels.merge import merge_kernel

from triton_cases import check, dense, random_case, relative_error

DEVICE = "cpu" if launch.INTERPRETED else "cuda"
pytestmark = pytest.mark.skipif(
    not launch.INTERPRETED and not torch.cuda.is_available(),
    reason="no GPU, and Triton was imported without TRITON_INTERPRET=1",
)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NO_OPTIONS = dict(softcap=None, window=None, sinks=None)


def make_case(seed, **shape):
    return random_case(seed, device=DEVICE, **shape)


def run(case, **options):
    options = {"scale": 0.25, **NO_OPTIONS, **options}
    got = launch.attention(case.q, case.k_pages, case.v_pages, case.arrays, **options)
    return got, options


# 80, 96, 192 are two parts, 72 and 40 padded; group 7 leaves lanes idle; group 20 gives a tile of 128 rows, two of 32
SHAPES = [
    dict(head_dim=32, group=1),
    dict(head_dim=64, group=4),
    dict(head_dim=80, group=7, layout="tokens"),
    dict(head_dim=96, group=3),
    dict(head_dim=128, group=2, page_size=12),
    dict(head_dim=192, group=1, num_kv_heads=3),
    dict(head_dim=256, group=2, page_size=1),
    dict(head_dim=72, group=5, rows=4),
    dict(head_dim=40, group=20, num_kv_heads=1, rows=5, segments=3),
]
OPTIONS = {
    "plain": {},
    "softcap": dict(softcap=2.0),
    "window": dict(window=33),
    "sinks": dict(sinks=True),
    "everything": dict(softcap=5.0, window=47, sinks=True, scale=0.4),
}


def with_sinks(options, case):
    if options.get("sinks"):
        gen = torch.Generator().manual_seed(7)
        options = {**options, "sinks": torch.randn(case.q.shape[1], generator=gen).to(case.q.dtype).to(case.q.device)}
    return options


@pytest.mark.parametrize(
    "dtype,options",
    [(torch.float32, {}), *((dtype, OPTIONS["everything"]) for dtype in DTYPES)],
    ids=["float32-plain", "float32", "float16", "bfloat16"],
)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"d{s['head_dim']}g{s['group']}")
def test_attention_shapes(shape, dtype, options):
    case = make_case(shape["head_dim"] + shape["group"], dtype=dtype, **{"rows": 5, "max_len": 70, **shape})
    got, options = run(case, **with_sinks(options, case))
    check(case, got, **options)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_attention_options(options, seed):
    case = make_case(100 + seed, rows=9, segments=5, head_dim=64, tile_rows=3, dtype=DTYPES[seed])
    got, options = run(case, **with_sinks(options, case))
    check(case, got, **options)


def test_same_bits_every_time_and_whoever_else_is_there():
    case = make_case(3, rows=9, segments=5)
    (out, lse), _ = run(case, window=40)
    again, _ = run(case, window=40)
    assert torch.equal(out, again[0]) and torch.equal(lse, again[1])
    # Drop the last row of every item: the others must not notice, though window and limits now cut elsewhere.
    dropped = set()
    items = case.arrays.items.clone()
    for item in items:
        if item[3] > 1:
            item[3] -= 1
            last = int(item[2] + item[3])
            dropped.add(int(case.arrays.rows[last]))
            kept = case.arrays.rows[int(item[2]) : last].long()
            item[6] = case.arrays.row_positions[kept].min()
    case.arrays.items = items
    (fewer, _), _ = run(case, window=40)
    kept = [row for row in range(9) if row not in dropped]
    assert len(kept) > 2
    assert torch.equal(fewer[kept], out[kept])


def test_grid_larger_than_the_work():
    """What a captured graph launches: host ints are capacities, the device's counts are the truth."""
    case = make_case(11, rows=8)
    (out, lse), options = run(case, softcap=3.0)
    a = case.arrays
    garbage = torch.full((5, 8), 2**30, dtype=torch.int32, device=DEVICE)
    padded = SimpleNamespace(**vars(a))
    padded.items = torch.cat([a.items, garbage])
    padded.merge_rows = torch.cat([a.merge_rows, garbage[:, 0]])
    padded.merge_ptr = torch.cat([a.merge_ptr, garbage[:, 0]])
    padded.counts = torch.tensor([a.num_items, a.num_partials, a.num_merge], dtype=torch.int32, device=DEVICE)
    padded.num_items, padded.num_merge, padded.num_partials = a.num_items + 5, a.num_merge + 5, a.num_partials + 9
    case.arrays = padded
    got, _ = run(case, softcap=3.0)
    assert torch.equal(got[0], out) and torch.equal(got[1], lse)
    check(case, got, **options)


def test_wide_and_narrow_items_in_launches_of_their_own(monkeypatch):
    case = make_case(13, rows=16, segments=4, tile_rows=6, group=4)
    a = case.arrays
    classes = launch.tile_classes(a, 24, num_kv_heads=2, multiprocessors=1)
    assert classes == [(0, a.num_wide, 24), (a.num_wide, a.num_items, 16)] and 0 < a.num_wide < a.num_items
    together, options = run(case)  # few items: one launch
    assert len(launch.tile_classes(a, 24, num_kv_heads=2, multiprocessors=132)) == 1
    monkeypatch.setattr(launch, "device_traits", lambda device: launch.Device(arch=90, multiprocessors=1))
    apart, _ = run(case)
    check(case, together, **options)
    check(case, apart, **options)
    a.num_wide = 0  # all narrow: the tile shrinks, and is wide enough for what it is given
    assert launch.tile_classes(a, 24, 2, 1) == [(0, a.num_items, 16)]
    a.num_items = 0
    assert launch.tile_classes(a, 24, 2, 1) == []


def test_window_never_reads_what_nobody_sees():
    """Slots that slid out of every row's window may have been given away: they hold NaN here."""
    case = make_case(21, rows=5, segments=2, max_len=200, head_dim=32)
    window = 30
    visible = torch.zeros(case.k_pages.shape[0] * case.k_pages.shape[1], dtype=torch.bool, device=DEVICE)
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


def test_all_rows_empty():
    case = make_case(5, rows=3)
    case.arrays.num_items = case.arrays.num_partials = 0
    case.arrays.num_merge = 3
    case.arrays.merge_rows = torch.arange(3, dtype=torch.int32, device=DEVICE)
    case.arrays.merge_ptr = torch.zeros(4, dtype=torch.int32, device=DEVICE)
    (out, lse), _ = run(case)
    assert bool((out == 0).all()) and bool((lse == -math.inf).all())
    sinks = torch.randn(case.q.shape[1], device=DEVICE)
    (out, lse), _ = run(case, sinks=sinks)
    assert bool((out == 0).all()) and torch.allclose(lse, sinks.expand_as(lse))


@pytest.mark.parametrize("magnitude", [1e4, -1e4, 1e-4])
def test_hostile_scores(magnitude):
    case = make_case(31, rows=6, magnitude=magnitude)
    if magnitude < 0:  # all scores about −1e4: a maximum that starts at 0 or a mask of −1e6 would lose them
        case.q.copy_(case.q.abs())
        case.k_pages.abs_()
        got, options = run(case, scale=-1e3)
    else:
        got, options = run(case)
    out, lse = got
    want, want_lse = dense(case, **options)
    assert torch.isfinite(out).all()
    # A float32 score of 1e4 is only good to about 1e-3, and so is its exponential.
    assert relative_error(out, want) < (1e-5 if abs(magnitude) < 1 else 2e-2)
    finite = torch.isfinite(want_lse)
    assert torch.allclose(lse.cpu().double()[finite], want_lse[finite], rtol=1e-5, atol=1e-5)


def test_sinks_of_minus_infinity_are_no_sinks():
    case = make_case(41, rows=6)
    (out, lse), _ = run(case)
    (with_sink, lse_sink), _ = run(case, sinks=torch.full((case.q.shape[1],), -math.inf, device=DEVICE))
    assert torch.equal(out, with_sink) and torch.equal(lse, lse_sink)


def test_strided_queries():
    case = make_case(51, rows=6)
    (want, _), _ = run(case)
    wide = torch.full((6, 2 * case.q.shape[1], 3 * case.q.shape[2]), math.nan, device=DEVICE)
    wide[:, ::2, 64:128] = case.q
    case.q = wide[:, ::2, 64:128]
    (got, _), _ = run(case)
    assert torch.equal(got, want)


def test_offsets_beyond_32_bits(tmp_path):
    """A pool of more than 2^31 elements; on the CPU a sparse file, of which a few pages are touched."""
    case = make_case(61, rows=4, segments=2, max_len=20, head_dim=32, dtype=torch.float16, page_size=64)
    (want, want_lse), _ = run(case)
    pages, page_size, heads, dim = case.k_pages.shape
    far = 2**31 // (pages - 1) + 64 & ~15
    size = far * (pages - 1) + page_size * heads * dim
    if DEVICE == "cpu":
        pool = torch.from_file(str(tmp_path / "pool"), shared=True, size=size, dtype=torch.float16)
    else:
        pool = torch.zeros(size, dtype=torch.float16, device=DEVICE)
    moved = pool.as_strided((pages, page_size, heads, dim), (far, heads * dim, dim, 1))
    used = sorted({int(s) // page_size for slots, _ in case.context for s in slots})
    order = [p for p in range(pages) if p not in used] + used  # the pages in use move to the far end
    place = {page: at for at, page in enumerate(order)}
    for page in used:
        moved[place[page]] = case.k_pages[page]
    slots = case.arrays.kv_slots
    case.arrays.kv_slots = torch.tensor(
        [place[int(s) // page_size] * page_size + int(s) % page_size for s in slots],
        dtype=torch.int32,
        device=DEVICE,
    )
    keys = case.k_pages
    case.k_pages = moved
    case.v_pages = moved
    (out, lse), _ = run(case)
    assert torch.equal(lse, want_lse)
    case.k_pages, case.v_pages, case.arrays.kv_slots = keys, keys, slots
    (want, _), _ = run(case)
    assert torch.equal(out, want)


@pytest.mark.parametrize("sinks", [None, -math.inf, 0.7], ids=["no-sink", "sink-inf", "sink"])
def test_merge(sinks):
    """Ranges of 0, 1, 2, 9 and 40 partials, some of them empty with poison for an accumulator, against float64."""
    heads, dim, lengths = 3, 24, [0, 1, 2, 9, 40, 3]
    gen = torch.Generator().manual_seed(2)
    total = sum(lengths)
    m = torch.randn(total, heads, generator=gen) * 20
    l = torch.rand(total, heads, generator=gen) + 1  # noqa: E741
    acc = torch.randn(total, heads, dim, generator=gen)
    empty = torch.rand(total, heads, generator=gen) < 0.3
    empty[-3:] = True  # the last row: nothing but empty partials
    empty[12:22] = True  # the row of 40: a whole step of the merge's loop without anything, then the rest
    m[empty], l[empty], acc[empty] = -math.inf, 0.0, math.nan
    ptr = torch.tensor([0, *lengths]).cumsum(0).int()
    rows = torch.tensor([4, 0, 2, 5, 1, 3], dtype=torch.int32)
    sink = torch.zeros(heads) if sinks is None else torch.full((heads,), sinks)
    out = torch.full((6, heads, dim), math.nan, device=DEVICE)
    lse = torch.full((6, heads), math.nan, device=DEVICE)
    on_device = [x.to(DEVICE) for x in (acc, torch.stack([m, l], -1).contiguous(), rows, ptr)]
    sink_device = sink.to(DEVICE)
    merge_kernel[(len(lengths) * heads,)](
        *on_device, out, lse, sink_device, on_device[3],
        len(lengths), heads, out.stride(0), out.stride(1),
        HEAD_DIM=dim, BLOCK_D=32, BLOCK_P=8, HAS_SINKS=sinks is not None, HAS_COUNTS=False,
    )  # fmt: skip
    out, lse = out.cpu(), lse.cpu()
    for i, row in enumerate(rows.tolist()):
        part = slice(int(ptr[i]), int(ptr[i + 1]))
        mm, ll = m[part].double(), l[part].double()
        aa = acc[part].double().nan_to_num()
        terms = torch.cat([mm, sink.double()[None]]) if sinks is not None else mm
        if terms.shape[0] == 0 or bool((terms == -math.inf).all()):
            assert bool((out[row] == 0).all()) and bool((lse[row] == -math.inf).all())
            continue
        top = terms.amax(0)
        top = torch.where(top == -math.inf, 0.0, top)
        w = torch.exp(mm - top)
        sum_l = (w * ll).sum(0) + (torch.exp(sink.double() - top) if sinks is not None else 0)
        want = torch.where(sum_l[:, None] > 0, (w[..., None] * aa).sum(0) / sum_l[:, None].clamp_min(1e-300), 0.0)
        assert relative_error(out[row], want) < 1e-5 or float(want.norm()) == 0 == float(out[row].norm())
        assert torch.allclose(lse[row].double(), top + sum_l.log(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads,dim,page_size", [(2, 64, 16), (3, 80, 7), (40, 32, 4)])
def test_write_kv(heads, dim, page_size, dtype):
    gen = torch.Generator().manual_seed(dim)
    pool = torch.randn(2, 2, 5, heads, page_size, dim, generator=gen).to(
        DEVICE, dtype
    )  # as TreeCache: [2, layers, pages, …]
    before = pool.clone()
    k_pages, v_pages = (pool[i, 1].permute(0, 2, 1, 3) for i in (0, 1))
    packed = torch.randn(6, 2, heads, dim, generator=gen).to(DEVICE, dtype)  # k and v as slices of one projection
    k, v = packed[:, 0], packed[:, 1]
    slots = torch.tensor([0, 5 * page_size - 1, -1, page_size, 3, page_size + 2], dtype=torch.int32, device=DEVICE)
    launch.write_kv(k, v, k_pages, v_pages, slots)
    for row, slot in enumerate(slots.tolist()):
        if slot >= 0:
            before[0, 1, slot // page_size, :, slot % page_size] = k[row]
            before[1, 1, slot // page_size, :, slot % page_size] = v[row]
    assert torch.equal(pool, before)
    launch.write_kv(k[:0], v[:0], k_pages, v_pages, slots[:0])
    assert torch.equal(pool, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_copy_pages(dtype):
    planes, pages, heads, page_size, dim = 3, 6, 2, 20, 96
    gen = torch.Generator().manual_seed(1)
    pool = torch.randn(planes, pages, heads, page_size, dim, generator=gen).to(DEVICE, dtype)
    pool[:, 1, :, 15:] = math.nan  # the unfilled tail of a source stays where it is
    want = pool.clone()
    src, dst, filled = (torch.tensor(x, dtype=torch.int32) for x in ([1, 1, 4], [0, 3, 5], [15, 1, 20]))
    for s, d, n in zip(src.tolist(), dst.tolist(), filled.tolist(), strict=True):
        want[:, d, :, :n] = want[:, s, :, :n]
    launch.copy_pages(pool, src, dst, filled)
    assert torch.equal(pool.view(torch.uint8), want.view(torch.uint8))
    launch.copy_pages(pool, src[:0], dst[:0], filled[:0])
    assert torch.equal(pool.view(torch.uint8), want.view(torch.uint8))


def test_column_split():
    for head_dim in range(1, 257):
        d0, d1 = configs.column_split(head_dim)
        assert d0 & (d0 - 1) == 0 and d1 & (d1 - 1) == 0 and d0 >= 16 and (d1 == 0 or d1 >= 16)
        assert head_dim <= d0 + d1 < 2 * max(16, head_dim)
    assert configs.column_split(80) == (64, 16) and configs.column_split(192) == (128, 64)
    assert configs.column_split(128) == (128, 0)


def test_every_variant_has_a_configuration():
    for arch in (configs.AMD, 80, 86, 89, 90, 100, 120):
        for head_dim in range(1, 257):
            for itemsize in (2, 4):
                block_m = 16
                while block_m <= configs.max_block_m(head_dim, itemsize, arch):
                    config = configs.attention_config(head_dim, itemsize, block_m, arch)
                    assert config.block_n >= 16 and config.num_stages >= 2
                    block_m *= 2


def test_backend_contract():
    from anabranch.backends import triton as backend

    assert backend.name == "triton" and backend.unavailable() is None
    device = torch.device(DEVICE)
    assert backend.refuses(device, torch.bfloat16, 128) is None
    assert "float64" in backend.refuses(device, torch.float64, 128)
    assert "257" in backend.refuses(device, torch.float32, 257)
    assert "meta" in backend.refuses(torch.device("meta"), torch.float32, 64)
    profile = backend.profile(32, 8, 128, torch.bfloat16, device)
    assert profile.tile == 128 and profile.chunk > 0 and profile.parallelism > 0
    case = make_case(71, rows=5)
    calls = []

    class OnePlan:
        def arrays(self, group, profile):
            calls.append((group, profile))
            return case.arrays

    options = dict(scale=0.3, softcap=None, window=None, sinks=None)
    out, lse = backend.attention(case.q, case.k_pages, case.v_pages, OnePlan(), return_lse=True, **options)
    check(case, (out, lse), **options)
    out, lse = backend.attention(case.q, case.k_pages, case.v_pages, OnePlan(), return_lse=False, **options)
    assert lse is None and calls[0][0] == 2


@pytest.mark.parametrize("group", [1, 4, 7])
def test_planner_parts_wide_and_narrow_items(group):
    """The package's planner puts the items of more than ``narrow`` packed rows first, each part by cost."""
    import anabranch as ab

    cache = ab.TreeCache(1, 2, 64, num_pages=64, page_size=8)
    trunk = cache.branch()
    cache.step({trunk: 30})
    kids = cache.fork(trunk, 19)
    step = cache.step({kid: 1 + 2 * (i % 9 == 0) for i, kid in enumerate(kids)})
    profile = ab.plan.Profile(tile=64, chunk=16, parallelism=1, num_kv_heads=2, elem_size=2, narrow=16)
    arrays = step.plan.arrays(group, profile)
    packed = arrays.items[:, 3] * group
    assert 0 < arrays.num_wide <= arrays.num_items
    assert bool((packed[: arrays.num_wide] > 16).all()) and bool((packed[arrays.num_wide :] <= 16).all())


@pytest.mark.parametrize("window", [None, 20])
def test_through_a_cache(window):
    """The package's own planner: prefill, fork, uneven growth, join and decode, against the reference in float64."""
    import anabranch as ab

    gen = torch.Generator().manual_seed(5)
    cache = ab.TreeCache(1, 2, 64, num_pages=32, page_size=8, dtype=torch.float32, device=DEVICE)
    trunk = cache.branch()

    def step(rows):
        s = cache.step(rows)
        k, v = (torch.randn(s.num_rows, 2, 64, generator=gen).to(DEVICE) for _ in range(2))
        cache.write(0, k, v, s, backend="triton")
        q = torch.randn(s.num_rows, 6, 64, generator=gen).to(DEVICE)
        out, lse = ab.tree_attention(q, cache, 0, s, window=window, backend="triton", return_lse=True)
        want, want_lse = ab.tree_attention(q, cache, 0, s, window=window, backend="reference", return_lse=True)
        assert relative_error(out, want.cpu()) <= 1e-5
        assert torch.allclose(lse, want_lse.float(), atol=1e-5)

    step({trunk: 21})
    kids = cache.fork(trunk, 3)
    step({kids[0]: 1, kids[1]: 1, kids[2]: 1})
    step({kids[0]: 5, kids[2]: 1, trunk: 2})
    cache.join(trunk, kids)
    step({trunk: 1})
