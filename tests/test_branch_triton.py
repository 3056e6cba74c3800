"""The Triton kernels of branch attention against dense float64: in the interpreter, or on a GPU where there is one."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed (it has wheels for Linux only)")

from anabranch.kernels import configs, launch

import anabranch as ab
from anabranch._core import branch_tables
from anabranch.branch_mask import BranchMask, _transpose
from branch_kit import computed, expected, random_graph, random_tree, relative, tensors

DEVICE = "cpu" if launch.INTERPRETED else "cuda"
pytestmark = pytest.mark.skipif(
    not launch.INTERPRETED and not torch.cuda.is_available(),
    reason="no GPU, and Triton was imported without TRITON_INTERPRET=1",
)
ALL = dict(scale=0.3, softcap=3.0, window=11)
attend = functools.partial(ab.branch_attention, backend="triton")


def check(mask, heads, kv_heads, dim, dtype, options, bound, sinks=False):
    given = tensors(0, mask.num_tokens, heads, kv_heads, dim, dtype, DEVICE)
    if sinks:
        options = {**options, "sinks": torch.linspace(-1, 2, heads, device=DEVICE)}
    want, got = expected(*given, mask, **options), computed(attend, *given, mask.to(DEVICE), **options)
    for name, x, y in zip(("out", "dq", "dk", "dv", "d_sinks"), got, want, strict=False):
        assert torch.isfinite(x).all(), name
        assert relative(x, y) <= bound, (name, relative(x, y))


@pytest.mark.parametrize("make", [random_tree, random_graph], ids=["tree", "graph"])
@pytest.mark.parametrize(
    "options", [{}, dict(softcap=2.0), dict(window=7), ALL], ids=["plain", "softcap", "window", "all"]
)
def test_options(make, options):
    check(make(1, segments=6), 2, 1, 32, torch.float32, options, 1e-5, sinks=options is ALL)


# 80, 96 are two column parts, 40 and 72 padded; the last has several tiles of rows and of columns
@pytest.mark.parametrize(
    "shape", [(3, 1, 40), (2, 2, 72), (4, 2, 80), (1, 1, 96), (2, 1, 128), (1, 1, 192), (1, 1, 256)]
)
def test_shapes(shape):
    check(random_tree(3, segments=4, longest=12), *shape, torch.float32, ALL, 1e-5, sinks=True)


@pytest.mark.parametrize("dtype,bound", [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)], ids=["f16", "bf16"])
def test_16_bits(dtype, bound):
    check(random_graph(2, segments=5), 2, 1, 64, dtype, ALL, bound, sinks=True)


def test_several_tiles():
    mask = BranchMask.from_tree([70, 40, 1, 33], [-1, 0, 0, 2])
    check(mask, 2, 1, 32, torch.float32, {}, 1e-5)
    check(mask, 1, 1, 32, torch.float32, dict(window=20), 1e-5)


def test_rows_that_see_only_themselves():
    mask = BranchMask.from_tree([1] * 5, [-1] * 5)
    q, k, v, grad = tensors(0, 5, 2, 2, 32, torch.float32, DEVICE)
    out, dq, dk, dv = computed(attend, q, k, v, grad, mask.to(DEVICE))
    assert torch.allclose(out, v, atol=1e-6) and torch.allclose(dv, grad, atol=1e-6)
    assert dq.abs().max() < 1e-5 and dk.abs().max() < 1e-5


def test_same_bits_every_time():
    mask = random_graph(4).to(DEVICE)
    given = tensors(0, mask.num_tokens, 2, 1, 32, torch.float32, DEVICE)
    first = computed(attend, *given, mask)
    assert all(torch.equal(x, y) for x, y in zip(computed(attend, *given, mask), first, strict=True))


# ------------------------------------------------------------------------------------------------ the tables


def dense_of(tiles, pieces, total):
    """The mask as kernels read it from tables: [tile axis, other axis], causality apart; every pair at most once."""
    seen = np.zeros((total, total), dtype=int)
    for begin, end, first, last in tiles:
        for piece in pieces[first:last]:
            bits = np.array([(int(piece[4 + t // 32]) >> (t % 32)) & 1 for t in range(end - begin)])
            assert bits.any() and piece[0] < piece[1] and bool(piece[2]) == bool(bits.all())
            seen[begin:end, piece[0] : piece[1]] += bits[:, None]
    return seen


@pytest.mark.parametrize("most", [16, 32, 128])
@pytest.mark.parametrize("columns", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("make", [random_tree, random_graph], ids=["tree", "graph"])
def test_tables_are_the_mask(make, columns, most):
    for seed in range(6):
        mask = make(seed, segments=12, longest=30 if seed % 2 else 3)
        starts, ptr, intervals = (x.numpy() for x in (mask.starts, mask.row_ptr, mask.cols))
        if columns:
            ptr, intervals = (x.numpy() for x in _transpose(starts, ptr, intervals))
        tiles, pieces = branch_tables(starts, ptr, intervals, columns, most, 16)
        assert (np.diff(tiles[:, :2]) <= most).all()
        assert tiles[:, :2].ravel().tolist() == sorted(tiles[:, :2].ravel().tolist())
        assert tiles[0, 0] == 0 and tiles[-1, 1] == mask.num_tokens and (tiles[1:, 0] == tiles[:-1, 1]).all()
        seen = dense_of(tiles, pieces, mask.num_tokens)
        assert seen.max() == 1
        causal = np.tri(mask.num_tokens, dtype=bool)
        assert (((seen.T if columns else seen) > 0) & causal == mask.dense().numpy()).all()


def test_short_segments_share_a_tile_where_that_saves_work():
    """Twenty answers of three tokens see the same prompt: a few tiles, not twenty. Twenty strangers do not."""
    answers = BranchMask.from_tree([500, *[3] * 20], [-1, *[0] * 20])
    strangers = BranchMask.pack([BranchMask.from_tree([40], [-1])] * 20)
    for mask, count in ((answers, 4 + 1), (strangers, 20)):
        arrays = (x.numpy() for x in (mask.starts, mask.row_ptr, mask.cols))
        tiles, _ = branch_tables(*arrays, False, 128, 16)
        assert len(tiles) == count


def test_configurations_exist_and_fit():
    for head_dim in (32, 40, 64, 72, 80, 96, 128, 192, 256):
        for itemsize in (2, 4):
            for arch in (configs.AMD, 80, 86, 90, 100, 120):
                for kernel in ("forward", "dq", "dkdv"):
                    config = configs.branch_config(kernel, head_dim, itemsize, arch)
                    assert 16 <= config.block_m <= 128 and 16 <= config.block_n <= 128
                    assert arch != configs.AMD or "maxnreg" not in config.options  # unknown to their compiler
