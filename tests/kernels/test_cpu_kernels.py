"""The CPU kernels against a float64 oracle, on plans made here, by hand, from the contract in docs/kernel_contract.md:
an independent reading of it, which shares nothing with the planner."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from strip_kit import lay_out

from anabranch import _cpu
from anabranch.backends import cpu, reference
from anabranch.backends.formats import KVScales
from anabranch.plan.arrays import PlanArrays
from anabranch.plan.tile_config import TileConfig

INFO = _cpu.info()
ISAS = INFO["runnable"]
PAIRS = ("wide", "wide_amx", "avx512bf16", "amx")  # instruction sets that multiply bfloat16 by pairs
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAN, INF = float("nan"), float("inf")


@pytest.fixture(autouse=True)
def default_isa():
    yield
    _cpu.use("")


@dataclass
class Case:
    """Random work items and, independently of how they are cut, what each row sees."""

    arrays_: PlanArrays
    visible: np.ndarray  # bool [rows, tokens], before any window
    slots: np.ndarray  # [tokens]
    positions: np.ndarray  # [tokens]
    row_positions: np.ndarray  # [rows]
    lone: list[tuple[int, int]]  # (row, token): another row of the same item sees the token, this one does not
    batch_invariant: bool = False

    @property
    def num_rows(self) -> int:
        return len(self.row_positions)

    def arrays(self, group: int, tile_config: TileConfig) -> PlanArrays:
        return self.arrays_


def make_case(rng, num_rows, lengths, tile_rows, num_slots, page_size=1) -> Case:
    """One segment of tokens for each of ``lengths``; each row sees a random prefix of a random half of them. Tokens
    fill whole pages of ``page_size``, wherever these are."""
    total = sum(lengths)
    pages = rng.permutation(num_slots // page_size)
    slots = (pages[:, None] * page_size + np.arange(page_size)).reshape(-1)[:total]
    positions = rng.integers(0, 200, total)
    for at, n in zip(np.cumsum([0, *lengths]), lengths, strict=False):  # every other one as in a branch: one by one
        if n % 2:
            positions[at : at + n] = positions[at] + np.arange(n)
    row_positions = rng.integers(100, 220, num_rows)
    visible = np.zeros((num_rows, total), dtype=bool)
    items, rows, limits, lone = [], [], [], []
    partials = [[] for _ in range(num_rows)]
    begin = 0
    for length in lengths:
        whole = rng.random() < 0.4
        watchers = [r for r in rng.permutation(num_rows) if r != 0 and rng.random() < 0.6]  # row 0 sees nothing
        for t in range(0, len(watchers), tile_rows):
            members = watchers[t : t + tile_rows]
            # limits of 0 (a row that is listed and sees nothing) and of the whole length are among them
            seen = [length if whole else int(rng.integers(0, length + 1)) for _ in members]
            kv_len = max(seen)
            if kv_len == 0:
                continue
            row_begin = len(rows)
            for r, limit in zip(members, seen, strict=True):
                visible[r, begin : begin + limit] = True
                partials[r].append(len(rows))
                rows.append(r)
                limits.append(limit)
                if not whole and limit < kv_len:
                    lone.append((int(r), begin + kv_len - 1))
            row_pos_min = min(row_positions[r] for r in members)
            kv_pos_max = positions[begin : begin + kv_len].max()
            items.append([begin, kv_len, row_begin, len(members), int(min(seen) < kv_len), kv_pos_max, row_pos_min, 0])
        begin += length
    dest, merge_rows, merge_ptr = [-1] * len(rows), [], [0]
    for r in range(num_rows):
        if len(partials[r]) == 1:
            continue
        order = rng.permutation(partials[r]) if partials[r] else []
        for i, place in enumerate(order):
            dest[place] = merge_ptr[-1] + i
        merge_rows.append(r)
        merge_ptr.append(merge_ptr[-1] + len(order))
    order = sorted(range(len(items)), key=lambda i: -items[i][1] * items[i][3])

    def ints(x):
        return torch.tensor(np.asarray(x, dtype=np.int32))

    starts = np.concatenate([[0], np.cumsum(lengths)])
    strip = min(16, page_size & -page_size)
    ranges = [(slots[a:b], positions[a:b]) for a, b in itertools.pairwise(starts)]
    kv_strips, kv_spelled, begins = lay_out(ranges, strip, np.random.default_rng(0))
    for item in items:
        item[0] = begins[starts.tolist().index(item[0])]
    arrays = PlanArrays(
        items=ints([items[i] for i in order]).reshape(-1, 8),
        kv_strips=kv_strips, kv_spelled=kv_spelled, strip=strip, rows=ints(rows), limits=ints(limits), dest=ints(dest),
        row_positions=ints(row_positions), merge_rows=ints(merge_rows), merge_ptr=ints(merge_ptr),
        num_items=len(items), num_partials=merge_ptr[-1], num_merge=len(merge_rows), tile_rows=tile_rows,
        num_runs=len(lengths), num_absorbed=0, kv_tokens=total,
    )  # fmt: skip
    return Case(arrays, visible, slots, positions, row_positions, lone)


def make_pools(rng, layout, num_pages, page_size, heads, dim, dtype, used):
    """K and V whose unused slots are NaN."""
    pools = []
    for _ in range(2):
        x = torch.from_numpy(rng.standard_normal((num_pages * page_size, heads, dim))).to(dtype)
        unused = np.setdiff1d(np.arange(num_pages * page_size), used)
        x[unused] = NAN
        x = x.reshape(num_pages, page_size, heads, dim)
        if layout == "cache":  # the tokens of a head contiguous in a page
            x = x.permute(0, 2, 1, 3).contiguous().permute(0, 2, 1, 3)
        elif layout == "padded":  # odd strides
            wide = torch.full((num_pages, page_size, heads + 1, dim + 3), NAN, dtype=dtype)
            wide[:, :, :heads, :dim] = x
            x = wide[:, :, :heads, :dim]
        pools.append(x)
    return pools


def oracle(case, q, k, v, scale, softcap=None, window=None, sinks=None):
    page_size, group, rows = k.shape[1], q.shape[1] // k.shape[2], q.shape[0]
    seen = torch.from_numpy(case.visible)
    if window is not None:
        seen = seen & torch.from_numpy(case.row_positions[:, None] - case.positions[None] < window)
    keys = k[case.slots // page_size, case.slots % page_size].double().transpose(0, 1)  # [Hkv, T, D]
    values = v[case.slots // page_size, case.slots % page_size].double().transpose(0, 1)
    queries = q.double().reshape(rows, k.shape[2], group, -1)
    s = torch.einsum("rhgd,hjd->rhgj", queries, keys).reshape(rows, q.shape[1], -1) * scale
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    s = s.masked_fill(~seen[:, None], -INF)
    if sinks is not None:
        s = torch.cat([s, sinks.double().expand(rows, -1)[:, :, None]], 2)
    lse = torch.logsumexp(s, 2) if s.shape[2] else torch.full(q.shape[:2], -INF, dtype=torch.float64)
    p = torch.exp(s - torch.where(torch.isneginf(lse), 0.0, lse)[:, :, None])[:, :, : keys.shape[1]]
    weights = p.masked_fill(~seen[:, None], 0.0).reshape(rows, k.shape[2], group, -1)
    out = torch.zeros_like(queries)
    for r in range(rows):  # one at a time, so that what a row does not see cannot touch it
        out[r] = torch.einsum("hgj,hjd->hgd", weights[r][:, :, seen[r]], values[:, seen[r]])
    return out.reshape(q.shape), lse


def relative(x, reference):
    return ((x.double() - reference).norm() / reference.norm()).item()


def check(case, q, k, v, *, tolerance=1e-5, **options):
    expected, expected_lse = oracle(case, q, k, v, **options)
    poison = torch.full(q.shape, NAN, dtype=q.dtype)  # what torch.empty is likely to hand out next
    del poison
    keep = {"softcap": None, "window": None, "sinks": None} | options
    out, lse = cpu.attention(q, k, v, case, return_lse=True, **keep)
    assert out.dtype == q.dtype and lse.dtype == torch.float32
    assert torch.isfinite(out.float()).all()
    rounding = relative(expected.to(q.dtype), expected) if q.dtype != torch.float32 else 0
    # Weights that are multiplied by pairs are rounded as well, which on random values adds as much as the result's own.
    more = 1.5 if q.dtype == torch.bfloat16 and cpu.info()["isa"] in PAIRS else 1.05
    assert relative(out, expected) <= tolerance + more * rounding
    nothing = torch.isinf(expected_lse)
    assert torch.equal(torch.isneginf(lse), nothing)
    assert (out[nothing] == 0).all()
    torch.testing.assert_close(lse[~nothing].double(), expected_lse[~nothing], rtol=2e-6, atol=2e-5)
    again, _ = cpu.attention(q, k, v, case, return_lse=False, **keep)
    assert torch.equal(out, again)  # bit for bit, run to run
    return out


SHAPES = [  # query heads, KV heads, rows a tile
    (2, 2, 1),
    (2, 1, 2),
    (6, 2, 1),
    (6, 2, 5),
    (7, 1, 9),
    (16, 2, 8),
    (3, 3, 3),
    (5, 1, 1),
]


HEAD_DIMS = [(isa, dim) for isa in ISAS for dim in (16, 24, 32, 64, 80, 96, 128, 192, 256)]
# All of them with the code this machine uses; the others share its source, so four with odd vectors and panels will do.
HEAD_DIMS = [(isa, dim) for isa, dim in HEAD_DIMS if isa == INFO["isa"] or dim in (16, 24, 80, 128)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("isa", "dim"), HEAD_DIMS)
def test_head_dims_and_groups(isa, dim, dtype):
    _cpu.use(isa)
    rng = np.random.default_rng(dim)
    for i in range(dim // 8 % 2, len(SHAPES), 2):
        hq, hkv, tile_rows = SHAPES[i]
        page_size = (16, 5, 1, 64)[i % 4]
        case = make_case(rng, 11, [3, 130, 1, 40, 97], tile_rows, num_slots=640)
        k, v = make_pools(
            rng, ("user", "cache", "padded")[i % 3], 640 // page_size, page_size, hkv, dim, dtype, case.slots
        )
        q = torch.from_numpy(rng.standard_normal((11, hq, dim))).to(dtype)
        check(case, q, k, v, scale=dim**-0.5)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dim", [1, 7, 33, 100])
def test_any_head_dim(isa, dim):
    _cpu.use(isa)
    rng = np.random.default_rng(dim)
    for dtype in DTYPES:
        for hq, hkv, tile_rows in ((3, 1, 1), (4, 2, 7)):
            case = make_case(rng, 8, [50, 120], tile_rows, num_slots=320)
            k, v = make_pools(rng, "user", 20, 16, hkv, dim, dtype, case.slots)
            q = torch.from_numpy(rng.standard_normal((8, hq, dim))).to(dtype)
            check(case, q, k, v, scale=dim**-0.5)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tile_rows", [1, 2, 12])
@pytest.mark.parametrize("options", [
    {"softcap": 3.0}, {"softcap": 30.0, "window": 64}, {"window": 1}, {"window": 90}, {"sinks": True},
    {"sinks": True, "softcap": 5.0, "window": 40},
], ids=str)  # fmt: skip
def test_options(isa, dtype, tile_rows, options):
    _cpu.use(isa)
    rng = np.random.default_rng(tile_rows)
    hq, hkv, dim = (6, 2, 64)
    case = make_case(rng, 13, [200, 1, 7, 100, 33], tile_rows, num_slots=512)
    k, v = make_pools(rng, "cache", 32, 16, hkv, dim, dtype, case.slots)
    q = torch.from_numpy(rng.standard_normal((13, hq, dim))).to(dtype)
    options = dict(options)
    if options.get("sinks"):
        options["sinks"] = torch.tensor([0.5, -INF, 20.0, -30.0, 0.0, 1.0])
    check(case, q, k, v, scale=0.31, **options)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"softcap": 4.0, "window": 70}], ids=str)
def test_long_runs_of_whole_pages(isa, dtype, options):
    """Tokens that lie side by side, which kernels may read in place; more of them than any tile; many rows an item."""
    _cpu.use(isa)
    rng = np.random.default_rng(3)
    for dim, run, page_size, layout in (
        (64, 16, 16, "cache"), (128, 48, 48, "user"), (32, 16, 16, "padded"), (40, 16, 16, "cache"),
        (64, 240, 1, "user"),
    ):  # fmt: skip
        case = make_case(rng, 30, [530, 9, 288, 64], 16, num_slots=960, page_size=run)
        k, v = make_pools(rng, layout, 960 // page_size, page_size, 2, dim, dtype, case.slots)
        q = torch.from_numpy(rng.standard_normal((30, 6, dim))).to(dtype)
        check(case, q, k, v, scale=0.2, **options)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tile_rows", [1, 3, 16])
def test_what_a_row_does_not_see_cannot_reach_it(isa, dtype, tile_rows):
    """NaN and infinities in tokens that only other rows of the same item see."""
    _cpu.use(isa)
    rng = np.random.default_rng(5)
    hq, hkv, dim = 4, 2, 64
    for window in (None, 60):
        case = make_case(rng, 16, [150, 20, 64], tile_rows, num_slots=256)
        k, v = make_pools(rng, "user", 16, 16, hkv, dim, dtype, case.slots)
        q = torch.from_numpy(rng.standard_normal((16, hq, dim))).to(dtype)
        bad = sorted({token for _, token in case.lone}) if tile_rows > 1 else [10, 160]
        assert bad
        for i, token in enumerate(bad):
            slot = case.slots[token]
            (k if i % 2 else v)[slot // 16, slot % 16] = (NAN, INF)[i // 2 % 2]
            v[slot // 16, slot % 16, :, 3] = NAN
        seen = case.visible.copy()
        if window is not None:
            seen &= case.row_positions[:, None] - case.positions[None] < window
        clean = torch.from_numpy(~seen[:, bad].any(1))
        assert 0 < clean.sum() < 16
        out, _ = cpu.attention(q, k, v, case, scale=0.2, softcap=None, window=window, sinks=None, return_lse=False)
        expected, _ = oracle(case, q, k, v, scale=0.2, window=window)
        assert torch.isfinite(out[clean]).all()
        rounding = 0 if dtype == torch.float32 else relative(expected[clean].to(dtype), expected[clean])
        assert relative(out[clean], expected[clean]) <= 1e-5 + 1.6 * rounding
        assert torch.isnan(out[~clean][:, :, 3]).all()  # and what it does see does reach it


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("hq", [1, 8])
@pytest.mark.parametrize("softcap", [None, 50.0])
def test_hostile_scores(isa, hq, softcap):
    """Scores of ±1e4 and −inf; keys are ± one axis, so that scores are exact in float32."""
    _cpu.use(isa)
    rng = np.random.default_rng(1)
    case = make_case(rng, 6, [90, 200], 4, num_slots=320)
    k, v = make_pools(rng, "cache", 20, 16, 1, 32, torch.float32, case.slots)
    k[:] = 0
    k[..., 0] = torch.from_numpy(rng.choice([-1.0, 1.0, 0.5], size=k.shape[:3])).float()
    q = torch.zeros(6, hq, 32)
    q[:, :, 0] = 1e4
    check(case, q, k, v, scale=1.0, softcap=softcap)
    check(case, -q, k, v, scale=1.0, softcap=softcap)
    if softcap is None:
        k[..., 1] = torch.where(torch.from_numpy(rng.random(k.shape[:3])) < 0.3, -INF, 0.0)
        q[:, :, 1] = 1.0
        q[:, :, 0] = 10.0
        check(case, q, k, v, scale=1.0)
        k[..., 1] = -INF  # every key: nothing is left
        out, lse = cpu.attention(q, k, v, case, scale=1.0, softcap=None, window=None, sinks=None, return_lse=True)
        assert (out == 0).all() and torch.isneginf(lse).all()


def test_nan_in_visible_keys_is_not_hidden():
    rng = np.random.default_rng(2)
    for hq in (1, 16):
        case = make_case(rng, 6, [90], 4, num_slots=96)
        k, v = make_pools(rng, "cache", 6, 16, 1, 32, torch.float32, case.slots)
        k[case.slots[0] // 16, case.slots[0] % 16] = NAN
        q = torch.from_numpy(rng.standard_normal((6, hq, 32))).float()
        out, _ = cpu.attention(q, k, v, case, scale=1.0, softcap=None, window=None, sinks=None, return_lse=False)
        assert torch.equal(torch.isnan(out).all(-1).all(-1), torch.from_numpy(case.visible[:, 0]))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounding_to_nearest_even_over_all_magnitudes(isa, dtype):
    """One visible token: the output is V itself, or the mean of two neighbours, exactly half way."""
    _cpu.use(isa)
    bits = torch.arange(0, 2**16, dtype=torch.int32).to(torch.int16)
    values = bits.view(dtype)
    values = values[torch.isfinite(values.float())]
    values = torch.cat([values, values.new_zeros(-len(values) % 64)]).reshape(-1, 1, 64)
    n = len(values)
    case = make_case(np.random.default_rng(0), 1, [1], 1, num_slots=1)
    ints = torch.arange(n, dtype=torch.int32)
    items = torch.zeros(n, 8, dtype=torch.int32)
    items[:, 0], items[:, 1], items[:, 2], items[:, 3] = ints, 1, ints, 1

    def plan(kv_len, slots):
        items[:, 1] = kv_len
        fields = vars(case.arrays_) | {
            "items": items, "kv_strips": torch.stack([slots, ints], 1), "strip": 1, "rows": ints, "limits": ints * 0 + kv_len,
            "dest": ints * 0 - 1, "row_positions": ints, "merge_rows": ints[:0], "merge_ptr": ints[:1] * 0,
            "num_items": n, "num_merge": 0,
        }  # fmt: skip
        return Case(PlanArrays(**fields), case.visible, case.slots, case.positions, ints.numpy(), [])

    q = torch.zeros(n, 1, 64, dtype=dtype)
    pages = values.reshape(n, 1, 1, 64)
    options = {"scale": 1.0, "softcap": None, "window": None, "sinks": None, "return_lse": False}
    out, _ = cpu.attention(q, torch.zeros_like(pages), pages, plan(1, ints), **options)
    expected = values.float()
    if isa == "avx512bf16" and dtype == torch.bfloat16:  # its instruction takes subnormals for zeros
        expected = expected.where(expected.abs() >= torch.finfo(torch.float32).tiny, 0.0)
    assert torch.equal(out.float(), expected)  # both conversions, subnormals included
    items[:, 0] = ints.clamp(max=n - 2)
    out, _ = cpu.attention(q, torch.zeros_like(pages), pages, plan(2, ints), **options)
    below = items[:, 0].long()
    mean = ((values[below].double() + values[below + 1].double()) / 2).float()
    normal = (mean.abs() > 2e-38) & (mean.abs() < 1e38)  # past these the sum, taken in float32, is not exact
    assert torch.equal(out[normal], mean.to(dtype)[normal])


@pytest.mark.parametrize("isa", ISAS)
def test_empty(isa):
    _cpu.use(isa)
    rng = np.random.default_rng(0)
    case = make_case(rng, 3, [], 4, num_slots=16)
    k, v = make_pools(rng, "user", 1, 16, 2, 32, torch.float32, case.slots)
    q = torch.randn(3, 4, 32)
    options = {"scale": 1.0, "softcap": None, "window": None, "return_lse": True}
    out, lse = cpu.attention(q, k, v, case, sinks=None, **options)
    assert (out == 0).all() and torch.isneginf(lse).all()
    sinks = torch.tensor([0.5, 1.0, -INF, 2.0])
    out, lse = cpu.attention(q, k, v, case, sinks=sinks, **options)
    assert (out == 0).all() and torch.equal(lse, sinks.expand(3, 4))
    case = make_case(rng, 0, [], 4, num_slots=16)
    out, lse = cpu.attention(q[:0], k, v, case, sinks=None, **options)
    assert out.shape == (0, 4, 32) and lse.shape == (0, 4)


def test_threads_do_not_change_results():
    rng = np.random.default_rng(9)
    case = make_case(rng, 40, [300, 500, 200, 7, 64], 8, num_slots=2048)
    k, v = make_pools(rng, "cache", 128, 16, 4, 64, torch.float32, case.slots)
    q = torch.from_numpy(rng.standard_normal((40, 8, 64))).float()
    before = torch.get_num_threads()
    options = {"scale": 0.125, "softcap": None, "window": None, "sinks": None, "return_lse": True}
    results = []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            results += [cpu.attention(q, k, v, case, **options) for _ in range(3)]
    finally:
        torch.set_num_threads(before)
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0]) and torch.equal(lse, results[0][1])


def test_calls_from_several_python_threads():
    rng = np.random.default_rng(10)
    case = make_case(rng, 24, [300, 400], 8, num_slots=1024)
    k, v = make_pools(rng, "cache", 64, 16, 2, 64, torch.float32, case.slots)
    q = torch.from_numpy(rng.standard_normal((24, 4, 64))).float()
    options = {"scale": 0.125, "softcap": None, "window": None, "sinks": None, "return_lse": False}
    expected, _ = cpu.attention(q, k, v, case, **options)
    wrong = []

    def run():
        for _ in range(20):
            if not torch.equal(cpu.attention(q, k, v, case, **options)[0], expected):
                wrong.append(1)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["user", "cache", "padded"])
@pytest.mark.parametrize("rows", [0, 1, 37, 600])
def test_write_kv(dtype, layout, rows):
    rng = np.random.default_rng(rows)
    k, v = make_pools(rng, layout, 100, 7, 3, 48, dtype, np.arange(700))
    slots = torch.from_numpy(rng.permutation(700)[:rows].astype(np.int32))
    new = torch.from_numpy(rng.standard_normal((rows, 9, 48))).to(dtype)
    new_k, new_v = new[:, 3:6], new[:, 6:]  # views of a fused projection
    want_k, want_v = k.clone(), v.clone()
    index = slots.long()
    want_k[index // 7, index % 7], want_v[index // 7, index % 7] = new_k, new_v
    cpu.write_kv(new_k, new_v, k, v, slots)
    assert torch.equal(k, want_k) and torch.equal(v, want_v)


@pytest.mark.parametrize("quantised", [False, True])
def test_rows_without_a_slot_are_not_written(quantised):
    """Those that only fill up a captured graph, by the CPU's kernels and by the reference."""
    k, v = torch.randn(2, 5, 2, 16, generator=torch.Generator().manual_seed(0))
    slots = torch.tensor([-1, 9, -1, 3, -1], dtype=torch.int32)
    found = []
    for backend in (cpu, reference):
        pages = [torch.zeros(3, 4, 2, 16, dtype=torch.int8 if quantised else torch.float32) for _ in range(2)]
        scales = [torch.zeros(3, 4, 2) for _ in range(2)] if quantised else []
        backend.write_kv(k, v, *pages, slots, KVScales(*scales) if quantised else None)
        found.append([*pages, *scales])
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)
        assert ours.reshape(12, -1).float().abs().sum(1).nonzero().flatten().tolist() == [3, 9]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("planes", [2, 60])
def test_copy_pages(dtype, planes):
    rng = np.random.default_rng(planes)
    pool = torch.from_numpy(rng.standard_normal((planes, 40, 3, 16, 24))).to(dtype)
    order = rng.permutation(40).astype(np.int32)
    src, dst = torch.from_numpy(order[:15]), torch.from_numpy(order[15:30].copy())
    filled = torch.from_numpy(rng.integers(0, 17, 15).astype(np.int32))
    expected = pool.clone()
    for s, d, n in zip(src.tolist(), dst.tolist(), filled.tolist(), strict=True):
        expected[:, d, :, :n] = pool[:, s, :, :n]
    cpu.copy_pages(pool, src, dst, filled)
    assert torch.equal(pool, expected)
    with pytest.raises(ValueError, match="contiguous in a page"):
        cpu.copy_pages(pool.transpose(2, 3), src, dst, filled)


def test_info_and_choice_of_instruction_set():
    info = cpu.info()
    assert info["isa"] in info["runnable"] and set(info["runnable"]) <= set(info["compiled"])
    assert "plain" in info["runnable"] and not info["isa"].startswith("wide")
    with pytest.raises(ValueError, match=r"unknown; this build has: .*plain"):
        _cpu.use("altivec")
    assert cpu.unavailable() is None
    assert "head_dim" in cpu.refuses(torch.device("cpu"), torch.float32, 512)
    assert "float64" in cpu.refuses(torch.device("cpu"), torch.float64, 64)
    assert cpu.refuses(torch.device("cpu"), torch.bfloat16, 80) is None
    if sys.platform == "linux" and "gomp" in torch.__config__.parallel_info().lower():
        assert "gomp" in info["openmp"]


PROGRAM = """
import os, sys, threading, torch, numpy as np
sys.path[:0] = {paths!r}
import test_cpu_kernels as t
torch.set_num_threads(2)
rng = np.random.default_rng(0)
case = t.make_case(rng, 40, [300, 500], 8, num_slots=1024)
k, v = t.make_pools(rng, "cache", 64, 16, 4, 64, torch.float32, case.slots)
q = torch.from_numpy(rng.standard_normal((40, 8, 64))).float()
"""


def run_program(program: str, **environment: str) -> str:
    code = (
        PROGRAM.format(paths=[os.path.dirname(__file__), str(Path(__file__).resolve().parents[1] / "kits")]) + program
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_after_fork_the_child_has_a_pool_of_its_own():
    out = run_program("""
torch.mm(torch.randn(512, 512), torch.randn(512, 512))  # torch's workers exist
options = {"scale": 0.125, "softcap": None, "window": None, "sinks": None, "return_lse": False}
expected = t.cpu.attention(q, k, v, case, **options)[0].numpy()
before = t.cpu.info()["parallel"]
pid = os.fork()
assert t.cpu.info()["parallel"] == before or pid == 0
if pid == 0:  # torch's own parallel operators may hang here; ours must not
    for _ in range(20):
        assert np.array_equal(t.cpu.attention(q, k, v, case, **options)[0].numpy(), expected)
    print(before, t.cpu.info()["parallel"], flush=True)
    os._exit(0)
_, status = os.waitpid(pid, 0)
assert status == 0, status
assert np.array_equal(t.cpu.attention(q, k, v, case, **options)[0].numpy(), expected)
""")
    assert out.count("1 workers started") == 2


def test_isa_from_the_environment():
    assert "plain" in run_program("print(t.cpu.info()['isa'])", ANABRANCH_CPU_ISA="plain")
    program = "from anabranch.backends import cpu; print(cpu.unavailable())"
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | {"ANABRANCH_CPU_ISA": "z80"}, capture_output=True, text=True
    )
    assert "ANABRANCH_CPU_ISA" in done.stdout and "z80" in done.stdout, done.stderr


def test_oracle_itself():
    """Two tokens by hand."""
    case = make_case(np.random.default_rng(0), 2, [2], 2, num_slots=16)
    case.visible[:] = True
    case.slots[:] = [0, 1]
    k = torch.zeros(1, 16, 1, 1)
    v = torch.zeros(1, 16, 1, 1)
    k[0, :2, 0, 0] = torch.tensor([0.0, math.log(3.0)])
    v[0, :2, 0, 0] = torch.tensor([1.0, 5.0])
    out, lse = oracle(case, torch.ones(2, 1, 1), k, v, scale=1.0)
    torch.testing.assert_close(out, torch.full((2, 1, 1), 4.0, dtype=torch.float64))
    torch.testing.assert_close(lse, torch.full((2, 1), math.log(4.0), dtype=torch.float64))
