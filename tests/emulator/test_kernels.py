"""The CUDA kernels on the host-side device, against dense float64 attention over random trees (triton_cases.py).

A seed fixes the order of threads and blocks and how copies land (kit.settings); the data of a case is fixed by its own
seed. `pytest -m slow tests/emulator` goes through 50 seeds.
"""

from __future__ import annotations

import functools
import math
import os

import kernel_bodies as bodies
import kernel_extremes as extremes
import kit
import numpy as np
import pytest
import torch
from kernel_bodies import DTYPES, OPTIONS, with_sinks
from strip_kit import lay_out, tokens
from triton_cases import check, random_case

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


@pytest.fixture
def ran(device):
    """``run`` as the shared tests call it."""
    return functools.partial(run, device)


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


@pytest.mark.parametrize("ring", range(2, 9))
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
    without, _ = run(device, case, 5, ring=6)
    assert torch.equal(without[0], out)


def test_lse_is_optional(device):
    case = long_case(max_len=90)
    (want, _), _ = run(device, case)
    out, lse = kit.attention(device, case, lse=False)
    assert torch.equal(out, want) and torch.isnan(lse).all()


def test_a_grid_larger_than_the_work(ran):
    case = random_case(11, rows=8, head_dim=32)
    padded = bodies.a_grid_larger_than_the_work(ran, case)
    padded.counts.zero_()  # a graph replayed for a tree of nothing
    got, _ = ran(case)
    assert torch.isnan(got[0]).all() and torch.isnan(got[1]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_window_never_reads_what_nobody_sees(ran, dtype):
    case = random_case(21, rows=5, segments=2, max_len=200, head_dim=32, dtype=dtype)
    bodies.window_never_reads_what_nobody_sees(ran, case)


def test_slots_that_slid_out_of_every_window_are_not_looked_up(ran):
    """They may have been given away, and the numbers in their places may be anything: here, no memory at all."""
    case, window, hidden, ranges = random_case(21, rows=5, segments=2, max_len=200, head_dim=32), 30, 0, []
    a = case.arrays
    for begin, length, *_, row_pos_min, _ in a.items.tolist():
        slots, positions = tokens(a, begin, length)
        gone = row_pos_min - positions >= window
        ranges.append((np.where(gone, 10**7, slots).astype(np.int32), positions))
        hidden += int(gone.sum())
    assert hidden > 20
    a.kv_strips, a.kv_spelled, begins = lay_out(ranges, a.strip, np.random.default_rng(0))
    a.items[:, 0] = torch.tensor(begins, dtype=torch.int32)
    got, options = ran(case, window=window)
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


def test_all_rows_empty(ran):
    bodies.all_rows_empty(ran, random_case(5, rows=3, head_dim=32))


@pytest.mark.parametrize("magnitude", [1e4, -1e4, 1e-4])
def test_hostile_scores(ran, magnitude):
    bodies.hostile_scores(ran, random_case(31, rows=6, magnitude=magnitude), magnitude)


def test_sinks_of_minus_infinity_are_no_sinks(ran):
    bodies.sinks_of_minus_infinity_are_no_sinks(ran, random_case(41, rows=6, head_dim=32))


def test_strided_queries(ran):
    bodies.strided_queries(ran, random_case(51, rows=6))


def test_offsets_beyond_32_bits(ran, tmp_path):
    case = random_case(61, rows=4, segments=2, max_len=20, head_dim=32, dtype=torch.float16, page_size=64)
    bodies.offsets_beyond_32_bits(ran, case, tmp_path)


def merging(device, dim):
    """The merge kernel alone, as the shared tests call it."""

    def merged(acc, m, l, rows, ptr, sinks):  # noqa: E741
        heads = acc.shape[1]
        out, lse = torch.full((6, heads, dim), math.nan), torch.full((6, heads), math.nan)
        ml = torch.stack([m / math.log(2), l], -1).contiguous()
        with kit.memory(device, rows=rows, ptr=ptr, ml=ml, acc=acc, sinks=sinks, out_=out, lse_=lse):
            device.attention(
                0, dim, heads, heads, 16, (0, 0, 0), (0, 0, 0, 0), (0, 0, 0, 0),
                (*[0] * 7, rows.data_ptr(), ptr.data_ptr(), 1, 0), 0, len(rows), 1.0, 0.0, -1,
                0 if sinks is None else sinks.data_ptr(), out.data_ptr(), lse.data_ptr(),
                (acc.data_ptr(), ml.data_ptr()), 0, 0,
            )  # fmt: skip
        return out, lse

    return merged


@pytest.mark.parametrize("sink", [None, -math.inf, 0.7], ids=["no-sink", "sink-inf", "sink"])
@pytest.mark.parametrize("dim", [24, 256])
def test_merge(device, dim, sink):
    bodies.merge(merging(device, dim), dim, sink)


def test_merges_of_many_partials(device):
    extremes.merges_of_many_partials(merging(device, 24), 24)


@pytest.mark.parametrize("partials", [1, 8, 33, 70])
@pytest.mark.parametrize("dim", [24, 96, 256])
def test_a_warp_and_a_block_merge_alike(device, dim, partials):
    """How many warps take a row depends on how many rows there are; what they sum does not."""
    gen = torch.Generator().manual_seed(dim + partials)
    heads, many = 2, 14  # 28 (row, head) pairs: more than the device's blocks, so a warp each
    acc = torch.randn(partials, heads, dim, generator=gen)
    ml = torch.stack([torch.randn(partials, heads, generator=gen), torch.rand(partials, heads, generator=gen)], -1)
    ml[partials // 2 :: 7, 1, 0] = -math.inf  # empty: their acc is never used
    acc[partials // 2 :: 7, 1] = math.nan
    found = []
    for rows in (1, many):
        device.reset_statistics()
        out, lse = torch.full((rows, heads, dim), math.nan), torch.full((rows, heads), math.nan)
        numbers = torch.arange(rows, dtype=torch.int32)
        copies = acc.repeat(rows, 1, 1), ml.repeat(rows, 1, 1)
        ptr = torch.arange(rows + 1, dtype=torch.int32) * partials
        with kit.memory(device, rows=numbers, ptr=ptr, acc=copies[0], ml=copies[1], out_=out, lse_=lse):
            device.attention(
                0, dim, heads, heads, 16, (0, 0, 0), (0, 0, 0, 0), (0, 0, 0, 0),
                (*[0] * 7, numbers.data_ptr(), ptr.data_ptr(), 1, 0), 0, rows, 1.0, 0.0, -1, 0, out.data_ptr(),
                lse.data_ptr(), (copies[0].data_ptr(), copies[1].data_ptr()), 0, 0,
            )  # fmt: skip
        assert device.statistics()["blocks"] == (2 if rows == 1 else 7)
        found.append((out, lse))
    (one, one_lse), (all_of_them, all_lse) = found
    assert torch.equal(one.expand(many, -1, -1), all_of_them) and torch.equal(one_lse.expand(many, -1), all_lse)
    weights = torch.where(torch.isinf(ml[..., 0]), 0, torch.exp2(ml[..., 0].double()))
    want = (weights[..., None] * torch.nan_to_num(acc.double())).sum(0) / (weights * ml[..., 1]).sum(0)[:, None]
    assert torch.allclose(one[0].double(), torch.nan_to_num(want), atol=1e-5, equal_nan=True)


def test_partials_beyond_32_bits(device, tmp_path):
    case = random_case(61, rows=4, segments=2, max_len=20, head_dim=256, dtype=torch.float16)

    def with_sparse_partials(case):
        a, heads, dim = case.arrays, *case.q.shape[1:]
        acc = extremes.sparse(tmp_path, f"acc{a.num_partials}", a.num_partials * heads * dim, torch.float32)
        ml = extremes.sparse(tmp_path, f"ml{a.num_partials}", a.num_partials * heads * 2, torch.float32)
        return kit.attention(device, case, partials=(acc, ml)), kit.NO_OPTIONS

    extremes.partials_beyond_32_bits(with_sparse_partials, case)


def test_rows_beyond_32_bits(device, tmp_path):
    case = random_case(65, rows=4, segments=2, max_len=20, head_dim=256, dtype=torch.float16)

    def with_sparse_outputs(case):
        def sparse(name, shape, dtype):
            return extremes.sparse(tmp_path, f"{name}{shape[0]}", math.prod(shape), dtype).view(shape)

        out, lse = sparse("out", case.q.shape, case.q.dtype), sparse("lse", case.q.shape[:2], torch.float32)
        return kit.attention(device, case, outputs=(out, lse)), kit.NO_OPTIONS

    extremes.rows_beyond_32_bits(with_sparse_outputs, case, tmp_path)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_blind_tiles(ran, dtype):
    extremes.blind_tiles(ran, long_case(dtype, max_len=700, tile_rows=6))


def test_late_maxima(ran):
    extremes.late_maxima(ran, random_case(64, head_dim=32))


def writing(device):
    """``write_kv`` as the shared tests call it."""

    def write(k, v, k_pages, v_pages, slots):
        heads, dim = k.shape[1:]
        page_size, dtype = k_pages.shape[1], k.dtype
        with kit.memory(device, k=k, v=v, k_pages_=k_pages, v_pages_=v_pages, slots=slots):
            device.write_kv(
                kit.TYPES[dtype], dim, heads, page_size, *((x.data_ptr(), *x.stride()[:2]) for x in (k, v)),
                *((x.data_ptr(), *x.stride()[:3]) for x in (k_pages, v_pages)), slots.data_ptr(), k.shape[0], 0, 0,
            )  # fmt: skip
        assert device.statistics()["launches"] == int(k.shape[0] > 0)  # nothing to write: no launch
        device.reset_statistics()

    return write


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads,dim,page_size", [(2, 64, 16), (3, 80, 7), (5, 33, 4), (1, 2, 4)])
def test_write_kv(device, heads, dim, page_size, dtype):
    bodies.write_kv(writing(device), heads, dim, page_size, dtype, "cpu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_write_kv_at_any_address(device, dtype):
    bodies.write_kv_at_any_address(writing(device), dtype, "cpu")


def test_rows_without_a_slot_among_many_of_one_thread(device):
    """More rows than threads: those that only fill up a captured graph are passed over, and the thread goes on."""
    rows = 40_000
    k, v = torch.randn(2, rows, 1, 2, generator=torch.Generator().manual_seed(1))
    pools = torch.zeros(2, rows // 16, 16, 1, 2)
    slots = torch.randperm(rows, generator=torch.Generator().manual_seed(2)).int()
    slots[torch.rand(rows, generator=torch.Generator().manual_seed(3)) < 0.3] = -1
    writing(device)(k, v, pools[0], pools[1], slots)
    kept = slots >= 0
    for pool, new in zip(pools.view(2, rows, 1, 2), (k, v), strict=True):
        want = torch.zeros_like(new)
        want[slots[kept].long()] = new[kept]
        assert torch.equal(pool, want)


def test_writes_beyond_32_bits(device, tmp_path):
    extremes.writes_beyond_32_bits(writing(device), tmp_path)


def copying(device):
    """``copy_pages`` as the shared tests call it."""

    def copy(pool, src, dst, filled):
        dtype, dim = pool.dtype, pool.shape[4]
        copies = torch.stack([src, dst, filled])
        with kit.memory(device, pool_=pool, copies=copies):
            device.copy_pages(
                kit.TYPES[dtype], dim, pool.data_ptr(), pool.stride()[:4], *pool.shape[0:3:2], copies.data_ptr(),
                len(src), 0, 0,
            )  # fmt: skip

    return copy


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [96, 33])
def test_copy_pages(device, dim, dtype):
    bodies.copy_pages(copying(device), dim, dtype, "cpu")
    assert device.statistics()["launches"] == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_copy_pages_at_any_address(device, dtype):
    bodies.copy_pages_at_any_address(copying(device), dtype, "cpu")


def test_copies_beyond_32_bits(device, tmp_path):
    extremes.copies_beyond_32_bits(copying(device), tmp_path)


def test_a_slot_outside_the_pool_traps(device):
    case = random_case(3, head_dim=32)
    case.arrays.kv_strips[0, 0] = case.k_pages.shape[0] * case.k_pages.shape[1] + 40
    with pytest.raises(
        device.Trap, match=r"block \d, thread \d+: read of 16 bytes at 0x\w+ is outside every allocation"
    ):
        run(device, case)


@pytest.mark.parametrize("options", [dict(head_dim=257), dict(ring=1), dict(ring=9), dict(type=3)], ids=str)
def test_what_the_launcher_refuses(device, options):
    o = dict(type=1, head_dim=64, ring=0) | options
    with pytest.raises(ValueError, match=next(iter(options))):
        device.attention(
            o["type"], o["head_dim"], 1, 1, 16, (0, 0, 0), (0, 0, 0, 0), (0, 0, 0, 0), (*[0] * 9, 1, 0), 1, 0, 1.0,
            0.0, -1, 0, 0,
            0, (0, 0), 0, 0, o["ring"],
        )  # fmt: skip


def test_tile_of_a_plan(device):
    few = "ANABRANCH_FEW_HEAD_DIMS" in os.environ.get("ANABRANCH_EMULATOR_DEFINES", "")  # 128 is computed as 256 then
    assert [device.packed_rows(1, d) for d in (32, 128, 136, 256)] == [64, 32 if few else 64, 32, 32]
    assert [device.packed_rows(0, d) for d in (32, 128, 136, 256)] == [32, 16 if few else 32, 16, 16]


def test_a_large_ring_after_a_small_one(device):
    """What a kernel may have of shared memory is one number, the last one set: a small ring must not lower it."""
    case = random_case(3, rows=4, segments=2, max_len=150, head_dim=128, dtype=torch.float16)
    (want, _), _ = run(device, case, ring=6)
    for ring in (4, 6, 3, 6):
        (out, _), _ = run(device, case, ring=ring)
        assert torch.equal(out, want)


HIDDEN = [
    dict(head_dim=32, group=1, rows=9, segments=3),
    dict(head_dim=40, group=7, num_kv_heads=1, rows=9, segments=2),
    dict(head_dim=128, group=5, num_kv_heads=1, rows=12, segments=2, tile_rows=12),
    dict(head_dim=256, group=2, num_kv_heads=1, rows=9, segments=2),
]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hidden_values(device, ran, dtype, window, value):
    for i, shape in enumerate(HIDDEN):
        case = random_case(200 + i, dtype=dtype, **{"max_len": 100, "tile_rows": 6, **shape})
        extremes.hidden_values(ran, case, value, window=window)


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_seen_infinities(ran, dtype, window):
    for i, shape in enumerate(HIDDEN):
        case = random_case(200 + i, dtype=dtype, **{"max_len": 100, "tile_rows": 6, **shape})
        extremes.seen_infinities(ran, case, window=window, sinks=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_infinities_in_one_column_of_values(ran, dtype):
    """A tile is looked through whole before its values are multiplied: each of eight columns beside one another."""
    for column in range(0, 24, 3):
        case = random_case(200, dtype=dtype, head_dim=32, group=1, rows=9, segments=3, max_len=100, tile_rows=6)
        extremes.seen_infinities(ran, case, column=column)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(50))
def test_fifty_seeds(device, seed):
    for dtype in DTYPES:
        shape = SHAPES[seed % len(SHAPES)]
        case = random_case(1000 + seed, dtype=dtype, **{"rows": 6, "max_len": 150, **shape})
        got, options = run(device, case, seed, ring=2 + seed % 7, grid=seed % 5, **list(OPTIONS.values())[seed // 10])
        check(case, got, **options)
