"""Quantised K and V in the Triton kernels, in Triton's interpreter or on a GPU: exact given what is stored."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed (it has wheels for Linux only)")

from anabranch.kernels import launch
from kernel_bodies import OPTIONS, with_sinks
from triton_cases import check, random_case

import anabranch as ab
from anabranch.backends import reference
from anabranch.backends.formats import KVFormat, KVScales

DEVICE = "cpu" if launch.INTERPRETED else "cuda"
pytestmark = pytest.mark.skipif(
    not launch.INTERPRETED and not torch.cuda.is_available(),
    reason="no GPU, and Triton was imported without TRITON_INTERPRET=1",
)
FORMATS = ("int8", "fp8")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def quantised(case, name):
    """The case over what its K and V become in the format, in float32; the pages and their factors."""
    fmt, pages, scales, meant = KVFormat.of(name, torch.float32), [], [], []
    for x in (case.k_pages, case.v_pages):
        payload, factors = fmt.quantise(x)
        kept = torch.empty_strided(x.shape, x.stride(), dtype=fmt.dtype, device=x.device)
        kept.view(torch.uint8).copy_(payload.view(torch.uint8))
        pages.append(kept)
        scales.append(factors)
        meant.append(fmt.dequantise(payload, factors))
    return dataclasses.replace(case, k_pages=meant[0], v_pages=meant[1]), pages, KVScales(*scales)


def run(case, name, **options):
    meant, pages, scales = quantised(case, name)
    options = with_sinks({"scale": 0.25, "softcap": None, "window": None, "sinks": None, **options}, case)
    got = launch.attention(case.q, *pages, case.arrays, kv_scales=scales, **options)
    check(meant, got, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", FORMATS)
def test_attention_is_exact_over_what_is_stored(name, options, dtype):
    for seed, group in ((1, 1), (2, 7), (3, 20)):
        run(random_case(seed, group=group, dtype=dtype, device=DEVICE), name, **OPTIONS[options])


@pytest.mark.parametrize("head_dim", [40, 72, 80, 128])
@pytest.mark.parametrize("name", FORMATS)
def test_head_dims_page_sizes_and_layouts(name, head_dim):
    for seed, page_size, layout in ((4, 1, "heads"), (5, 5, "tokens"), (6, 128, "heads")):
        case = random_case(seed, head_dim=head_dim, page_size=page_size, layout=layout, max_len=50, device=DEVICE)
        run(case, name, window=20)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_what_is_written_is_what_torch_writes(name, dtype):
    fmt, rng = KVFormat.of(name, dtype), np.random.default_rng(1)
    rows, heads, dim, page_size = 40, 3, 40, 7
    # The interpreter reads subnormals of bfloat16 wrongly, GPUs and float32 do not.
    small = -24 if dtype == torch.float16 else -100
    sizes = torch.from_numpy(rng.integers(small, 15, (rows, heads, 1))).double()
    x = torch.from_numpy(rng.standard_normal((rows, heads, dim))) * torch.exp2(sizes)
    x = (x * torch.exp2(torch.from_numpy(rng.integers(-12, 1, (rows, heads, dim))))).to(dtype)
    x[0], x[1, 0, 5], x[2, 1, 7], x[3, 2, 0] = 0, float("inf"), float("nan"), -float("inf")
    x[4] = torch.finfo(dtype).max
    x[5] = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5] + [0.0] * 34)  # ties
    slots = torch.from_numpy(rng.permutation(10 * page_size)[:rows].astype(np.int32))
    both = []
    for write in (launch.write_kv, reference.write_kv):
        pages = [torch.zeros(10, heads, page_size, dim, dtype=fmt.dtype, device=DEVICE).transpose(1, 2) for _ in "kv"]
        scales = KVScales(  # of either layout: V's lie as nothing else does
            torch.full((10, heads, page_size), 7.0, device=DEVICE).transpose(1, 2),
            torch.full((10, page_size, heads), 7.0, device=DEVICE),
        )
        write(x.to(DEVICE), x.flip(0).to(DEVICE), *pages, slots.to(DEVICE), kv_scales=scales)
        both.append([*(p.view(torch.uint8) for p in pages), *scales])
    for got, want in zip(*both, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", FORMATS)
def test_pages_and_factors_are_copied_together(name):
    rng = np.random.default_rng(4)
    pool = torch.from_numpy(rng.integers(0, 127, (4, 12, 3, 16, 24)).astype(np.uint8)).to(DEVICE)
    scales = torch.from_numpy(rng.standard_normal((4, 12, 3, 16))).float().to(DEVICE)
    src, dst, filled = (torch.tensor(x, dtype=torch.int32) for x in ([0, 3, 3], [7, 2, 9], [16, 5, 1]))
    want_pool, want_scales = pool.clone(), scales.clone()
    reference.copy_pages(want_pool, src, dst, filled, want_scales)
    launch.copy_pages(pool.view(KVFormat.of(name, torch.float32).dtype), src, dst, filled, scales)
    assert torch.equal(pool, want_pool) and torch.equal(scales, want_scales)


@pytest.mark.parametrize("name", FORMATS)
def test_through_a_cache(name):
    """A fork in the middle of a page, by the backend's name."""
    cache = ab.TreeCache(1, 2, 32, 16, 8, device=DEVICE, kv_format=name)
    trunk, gen = cache.branch(), torch.Generator().manual_seed(0)

    def draw(rows, heads):
        return torch.randn(rows, heads, 32, generator=gen).to(DEVICE)

    step = cache.step({trunk: 13})
    cache.write(0, draw(13, 2), draw(13, 2), step, backend="triton")
    step = cache.step({kid: 2 for kid in cache.fork(trunk, 3)})
    cache.write(0, draw(6, 2), draw(6, 2), step, backend="triton")
    q = draw(6, 4)
    got, want = (ab.tree_attention(q, cache, 0, step, backend=backend) for backend in ("triton", "reference"))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
