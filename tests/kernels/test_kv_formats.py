"""Quantised K and V in the kernels: exact given what is stored, on every backend and instruction set."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from programs import Twins
from test_cpu_kernels import DTYPES, ISAS, PAIRS, make_case, make_pools, oracle, relative

import anabranch as ab
from anabranch import _cpu
from anabranch.backends import cpu, reference
from anabranch.backends.formats import KVFormat, KVScales

FORMATS = ("int8", "fp8")
NAN, INF = float("nan"), float("inf")


@pytest.fixture(autouse=True)
def default_isa():
    yield
    _cpu.use("")


def quantised_pools(pools, name):
    """Pages [pages, page_size, heads, dim] with their strides, quantised; what they stand for in float64."""
    fmt, pages, scales, meant = KVFormat.of(name, torch.float32), [], [], []
    for x in pools:
        payload, factors = fmt.quantise(x)
        kept = torch.empty_strided(x.shape, x.stride(), dtype=fmt.dtype)
        kept.view(torch.uint8).copy_(payload.view(torch.uint8))
        pages.append(kept)
        scales.append(factors)
        meant.append(fmt.dequantise(payload, factors, torch.float64))
    return pages, KVScales(*scales), meant


def check(case, q, pools, name, *, scale, softcap=None, window=None, sinks=None):
    (k, v), scales, meant = quantised_pools(pools, name)
    expected, expected_lse = oracle(case, q, *meant, scale, softcap, window, sinks)
    options = dict(scale=scale, softcap=softcap, window=window, sinks=sinks)
    out, lse = cpu.attention(q, k, v, case, return_lse=True, kv_scales=scales, **options)
    assert out.dtype == q.dtype and torch.isfinite(out.float()).all()
    rounding = relative(expected.to(q.dtype), expected) if q.dtype != torch.float32 else 0
    assert relative(out, expected) <= 1e-5 + 1.05 * rounding
    nothing = torch.isinf(expected_lse)
    assert torch.equal(torch.isneginf(lse), nothing) and (out[nothing] == 0).all()
    torch.testing.assert_close(lse[~nothing].double(), expected_lse[~nothing], rtol=2e-6, atol=3e-5)
    again, _ = cpu.attention(q, k, v, case, return_lse=False, kv_scales=scales, **options)
    assert torch.equal(out, again)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dim", [7, 24, 64, 80, 128, 256])
def test_cpu_attention_is_exact_over_what_is_stored(name, isa, dim):
    _cpu.use(isa)
    rng = np.random.default_rng(dim)
    shapes = [(2, 2, 1, 16), (6, 2, 5, 5), (7, 1, 9, 1), (16, 2, 8, 64), (4, 4, 1, 128)]
    for i, (hq, hkv, tile_rows, page_size) in enumerate(shapes):
        dtype = DTYPES[(i + dim) % 3]
        case = make_case(rng, 9, [3, 130, 1, 97], tile_rows, num_slots=640)
        layout = ("user", "cache", "padded")[i % 3]
        pools = make_pools(rng, layout, 640 // page_size, page_size, hkv, dim, dtype, case.slots)
        check(case, torch.from_numpy(rng.standard_normal((9, hq, dim))).to(dtype), pools, name, scale=dim**-0.5)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("tile_rows", [1, 12])
@pytest.mark.parametrize("options", [
    {"softcap": 3.0}, {"window": 1}, {"window": 90}, {"sinks": True}, {"sinks": True, "softcap": 5.0, "window": 40},
], ids=str)  # fmt: skip
def test_cpu_options(name, isa, tile_rows, options):
    _cpu.use(isa)
    rng = np.random.default_rng(tile_rows)
    options = dict(options)
    if options.get("sinks"):
        options["sinks"] = torch.tensor([0.5, -INF, 20.0, -30.0, 0.0, 1.0])
    for dtype in DTYPES:
        case = make_case(rng, 13, [200, 1, 7, 100, 33], tile_rows, num_slots=512)
        pools = make_pools(rng, "cache", 32, 16, 2, 64, dtype, case.slots)
        q = torch.from_numpy(rng.standard_normal((13, 6, 64))).to(dtype)
        check(case, q, pools, name, scale=0.31, **options)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("tile_rows", [1, 3, 7])  # 2, 6 and 14 packed rows: K and V read as they lie, and packed
def test_cpu_a_nan_reaches_the_rows_that_see_it_and_no_others(name, isa, tile_rows):
    _cpu.use(isa)
    rng = np.random.default_rng(5)
    case = make_case(rng, 10, [60, 130], tile_rows, num_slots=320)
    assert case.lone or tile_rows == 1
    slot = case.slots[case.lone[0][1]] if case.lone else case.slots[100]
    pools = make_pools(rng, "cache", 20, 16, 2, 64, torch.float32, case.slots)
    pools[1][slot // 16, slot % 16, 1, 3] = INF
    (k, v), scales, _ = quantised_pools(pools, name)
    q = torch.from_numpy(rng.standard_normal((10, 4, 64))).float()
    out, _ = cpu.attention(
        q, k, v, case, scale=0.2, softcap=None, window=None, sinks=None, return_lse=False, kv_scales=scales
    )
    sees = torch.from_numpy(case.visible[:, np.flatnonzero(case.slots == slot)[0]])
    assert 0 < sees.sum() < 10
    assert out[~sees].isfinite().all() and out[:, :2].isfinite().all() and out[sees][:, 2:].isnan().all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_cpu_writes_the_bits_that_torch_writes(name, dtype, isa):
    """Over every size that a float has: zeros, subnormals, vectors that span the whole range, infinities, NaN."""
    _cpu.use(isa)
    fmt, rng = KVFormat.of(name, dtype), np.random.default_rng(1)
    rows, heads, dim, page_size = 200, 3, 40, 7
    sizes = torch.from_numpy(rng.integers(-40 if dtype != torch.float16 else -24, 15, (rows, heads, 1))).double()
    x = torch.from_numpy(rng.standard_normal((rows, heads, dim))) * torch.exp2(sizes)
    x = (x * torch.exp2(torch.from_numpy(rng.integers(-12, 1, (rows, heads, dim))))).to(dtype)
    x[0], x[1, 0, 5], x[2, 1, 7], x[3, 2, 0] = 0, INF, NAN, -INF
    x[4] = torch.finfo(dtype).tiny * torch.arange(dim) / 64  # subnormals
    x[5] = torch.finfo(dtype).max
    x[6] = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5] + [0.0] * 34)  # ties
    slots = torch.from_numpy(rng.permutation(40 * page_size)[:rows].astype(np.int32))
    both = []
    for write in (cpu.write_kv, reference.write_kv):
        pages = [torch.zeros(40, heads, page_size, dim, dtype=fmt.dtype).transpose(1, 2) for _ in "kv"]
        scales = KVScales(  # of either layout: V's lie as nothing else does
            torch.full((40, heads, page_size), 7.0).transpose(1, 2), torch.full((40, page_size, heads), 7.0)
        )
        write(x, x.flip(0), *pages, slots, kv_scales=scales)
        both.append([*(p.view(torch.uint8) for p in pages), *scales])
    for got, want in zip(*both, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", [cpu, reference])
@pytest.mark.parametrize("name", FORMATS)
def test_pages_and_factors_are_copied_together(backend, name):
    rng = np.random.default_rng(4)
    pool = torch.from_numpy(rng.integers(0, 127, (6, 40, 3, 16, 24)).astype(np.uint8)).view(
        KVFormat.of(name, torch.float32).dtype
    )
    scales = torch.from_numpy(rng.standard_normal((6, 40, 3, 16))).float()
    order = rng.permutation(40).astype(np.int32)
    src, dst = torch.from_numpy(order[:15]), torch.from_numpy(order[15:30].copy())
    filled = torch.from_numpy(rng.integers(0, 17, 15).astype(np.int32))
    want_pool, want_scales = pool.view(torch.uint8).clone(), scales.clone()
    for s, d, n in zip(src.tolist(), dst.tolist(), filled.tolist(), strict=True):
        want_pool[:, d, :, :n] = want_pool[:, s, :, :n]
        want_scales[:, d, :, :n] = want_scales[:, s, :, :n]
    backend.copy_pages(pool, src, dst, filled, scales)
    assert torch.equal(pool.view(torch.uint8), want_pool) and torch.equal(scales, want_scales)


BACKENDS = ("reference", "cpu")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("options", [{}, {"softcap": 4.0, "window": 9}], ids=str)
def test_a_growing_tree_equals_the_dense_twin(name, backend, options):
    """Forks in the middle of a page, joins, truncations: against float64 over what is stored."""
    for page_size, seed in ((1, 0), (3, 1), (16, 2), (128, 3)):
        twins = Twins(num_pages=600, page_size=page_size, heads=2, dim=24, seed=seed, kv_format=name)
        twins.branch()
        twins.step({0: 21})
        for _ in range(12):
            twins.random_change()
            if not twins.pairs:
                twins.branch()
            step, twin = twins.step({i: 1 + i % 3 for i in range(len(twins.pairs))})
            twins.compare()
            q = twins.randn(step.num_rows, 6, 24)
            out, lse = ab.tree_attention(q, twins.cache, 0, step, backend=backend, return_lse=True, **options)
            expected, expected_lse = twins.naive.attention(q, 0, twin, **options)
            torch.testing.assert_close(out, expected.float(), rtol=2e-5, atol=2e-6)
            torch.testing.assert_close(lse, expected_lse.float(), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", FORMATS)
def test_the_error_of_quantisation_is_what_the_format_says(name, backend):
    """Attention over quantised K and V against attention over what was written."""
    torch.manual_seed(0)
    results = {}
    for kept in ("auto", name):
        cache = ab.TreeCache(1, 2, 64, 32, 16, kv_format=kept)
        step = cache.step({cache.branch(): 200})
        gen = torch.Generator().manual_seed(1)
        k, v, q = (torch.randn(200, heads, 64, generator=gen) for heads in (2, 2, 8))
        cache.write(0, k, v, step)
        results[kept] = ab.tree_attention(q, cache, 0, step, backend=backend)
    error = relative(results[name], results["auto"].double())
    assert 1e-4 < error < {"int8": 0.01, "fp8": 0.04}[name]


@pytest.mark.parametrize("name", FORMATS)
def test_pages_of_the_users_own(name):
    fmt = KVFormat.of(name, torch.bfloat16)
    gen = torch.Generator().manual_seed(1)
    k, v = (torch.randn(8, 16, 2, 32, generator=gen) for _ in "kv")
    (k_pages, k_scales), (v_pages, v_scales) = fmt.quantise(k), fmt.quantise(v)
    table = torch.tensor([[3, 1, 0], [3, 5, 7]])
    plan = ab.Plan.from_block_tables(table, torch.tensor([40, 35]), page_size=16)
    q = torch.randn(2, 4, 32, generator=gen)
    scales = dict(k_scales=k_scales, v_scales=v_scales)
    meant = fmt.dequantise(k_pages, k_scales), fmt.dequantise(v_pages, v_scales)
    expected = ab.paged_tree_attention(q, *meant, plan, backend="reference")
    for backend in BACKENDS:
        got = ab.paged_tree_attention(q, k_pages, v_pages, plan, backend=backend, **scales)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    # One factor a head, or one for all, is the same tensor with strides of 0.
    for shape in ((1, 1, 2), (1, 1, 1)):
        one = torch.rand(shape, generator=gen).expand(8, 16, 2)
        expected = ab.paged_tree_attention(
            q, fmt.dequantise(k_pages, one), fmt.dequantise(v_pages, one), plan, backend="reference"
        )
        for backend in BACKENDS:
            got = ab.paged_tree_attention(q, k_pages, v_pages, plan, backend=backend, k_scales=one, v_scales=one)
            assert relative(got, expected.double()) < 2e-6
    with pytest.raises(ValueError, match=r"v_scales: k_pages are .* expected their factors"):
        ab.paged_tree_attention(q, k_pages, v_pages, plan, k_scales=k_scales)
    with pytest.raises(ValueError, match=r"k_scales: .*\[8, 16, 2\].*got shape \[8, 16, 1\]"):
        ab.paged_tree_attention(q, k_pages, v_pages, plan, k_scales=k_scales[..., :1], v_scales=v_scales)
    with pytest.raises(ValueError, match="k_scales: only pages of"):
        ab.paged_tree_attention(q, k, v, plan, **scales)


def test_pairs_of_bfloat16_are_among_the_instruction_sets():
    assert set(PAIRS) & set(ISAS)
