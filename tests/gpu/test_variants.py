"""Every compiled variant runs on the GPU and agrees with float64, with contexts of some hundred tokens."""

from __future__ import annotations

import kernel_bodies as bodies
import pytest
import torch
from triton_cases import check, dense, random_case, relative_error

pytest.importorskip("triton", reason="Triton is not installed (it has wheels for Linux only)")

from anabranch.kernels import launch
from anabranch.kernels.variants import HEAD_DIMS

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# Items of as many packed rows at most: the narrow tile, the wide one less than full, full, and two of them.
VARIANTS = [(head_dim, dtype, packed) for dtype in DTYPES for head_dim in HEAD_DIMS for packed in (16, 32, 64, 128)]


def run(case, **options):
    options = dict(scale=0.2, softcap=None, window=None, sinks=None) | options
    return launch.attention(case.q, case.k_pages, case.v_pages, case.arrays, **options), options


@pytest.mark.parametrize("everything", [False, True], ids=["plain", "everything"])
@pytest.mark.parametrize("head_dim,dtype,packed", VARIANTS)
def test_variant(head_dim, dtype, packed, everything):
    bodies.variant(run, head_dim + packed, head_dim, DTYPES[dtype], packed // 4, everything)


@pytest.mark.parametrize("group", bodies.GROUPS)
def test_groups(group):
    bodies.group_size(run, group)


def test_same_bits_in_fifty_runs():
    bodies.same_bits_in_fifty_runs(run)


def test_a_long_chain_of_partials():
    """One row over 40,000 tokens in some hundred and fifty chunks: the merge's long walk."""
    from types import SimpleNamespace

    import numpy as np

    case = random_case(6, rows=1, segments=1, max_len=2, head_dim=128, group=4, dtype=torch.bfloat16, device="cuda")
    tokens, chunk, page_size = 40_000, 256, 16
    gen = torch.Generator("cuda").manual_seed(0)
    shape = (tokens // page_size, page_size, 2, 128)
    case.k_pages, case.v_pages = (torch.randn(shape, generator=gen, device="cuda").bfloat16() for _ in range(2))
    order = np.random.default_rng(0).permutation(tokens).astype(np.int32)
    case.context = [(order, np.arange(tokens, dtype=np.int32))]
    starts = range(0, tokens, chunk)
    items = [[s, min(chunk, tokens - s), i, 1, 0, min(s + chunk, tokens) - 1, tokens, 0] for i, s in enumerate(starts)]

    def ints(values):
        return torch.tensor(values, dtype=torch.int32, device="cuda")

    n = len(items)
    case.arrays = SimpleNamespace(
        items=ints(items), kv_strips=ints(list(zip(order.tolist(), range(tokens), strict=True))),
        kv_spelled=ints([[0, 0]]), strip=1, counts=None,
        rows=ints([0] * n), limits=ints([0] * n), dest=ints(list(range(n))), row_positions=ints([tokens]),
        merge_rows=ints([0]), merge_ptr=ints([0, n]), num_items=n, num_partials=n, num_merge=1, tile_rows=32,
    )  # fmt: skip
    got, options = run(case, scale=0.5)
    check(case, got, **options)


def test_captured_graph_follows_the_device_counts():
    bodies.captured_graph_follows_the_device_counts(run)


def test_hostile_scores():
    case = random_case(8, rows=30, segments=6, max_len=300, magnitude=1e4, device="cuda")
    (out, _), options = run(case)
    assert torch.isfinite(out).all()
    assert relative_error(out, dense(case, **options)[0]) < 2e-2  # a float32 score of 1e4 is good to 1e-3


def test_copying_and_writing_many_pages():
    bodies.copying_and_writing_many_pages(launch.copy_pages, launch.write_kv)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_tree_on_the_gpu_and_its_twin_on_the_cpu(dtype):
    bodies.a_tree_and_its_twin_on_the_cpu(dtype, "triton")
