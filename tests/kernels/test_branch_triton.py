"""The Triton kernels of branch attention against dense float64: in the interpreter, or on a GPU where there is one."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed (it has wheels for Linux only)")

from anabranch.kernels import configs, launch
from branch_kit import computed, expected, random_graph, random_tree, relative, tensors

import anabranch as ab
from anabranch._core import branch_tables
from anabranch.attention.mask import BranchMask
from anabranch.plan.intervals import transpose_intervals

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


def test_a_tile_of_many_segments():
    """More than 32 tokens, and more than 64, of segments that do not see one another share a tile."""
    mask = BranchMask.from_tree([40, *[3] * 40], [-1, *[0] * 40])
    check(mask, 2, 1, 64, torch.float16, {}, 2e-3)


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


@pytest.mark.parametrize("window", [None, 9])
def test_the_same_bits_whoever_else_is_in_the_row(window):
    """Strangers packed before and behind, of one token and of many: theirs share no tile with ours."""
    ours = BranchMask.from_tree([70, 3, 5, 20, 2], [-1, 0, 0, 0, 3])
    own = tensors(0, ours.num_tokens, 2, 1, 96, torch.float32, DEVICE)
    alone = computed(attend, *own, ours.to(DEVICE), window=window)
    for before, behind in (([2], [1]), ([7, 1, 30], [5, 5, 5])):
        masks = [BranchMask.from_tree([n], [-1]) for n in before], [BranchMask.from_tree([n], [-1]) for n in behind]
        packed = BranchMask.pack([*masks[0], ours, *masks[1]]).to(DEVICE)
        theirs = tensors(9, sum(before) + sum(behind), 2, 1, 96, torch.float32, DEVICE)
        given = [torch.cat([y[: sum(before)], x, y[sum(before) :]]) for x, y in zip(own, theirs, strict=True)]
        got = computed(attend, *given, packed, window=window)
        for name, x, y in zip(("out", "dq", "dk", "dv"), got, alone, strict=False):
            assert torch.equal(x[sum(before) :][: ours.num_tokens], y), name


def check_others(got, clean, visible, rows):
    """All but these rows, and columns that none of these sees, are as they were."""
    columns = visible[rows].any(0)
    assert 20 < int((~rows).sum()) and 10 < int((~columns).sum())
    for name, x, y, tainted in zip(("out", "dq", "dk", "dv"), got, clean, (rows, rows, columns, columns), strict=False):
        kept = ~tainted.to(x.device)
        assert torch.isfinite(x[kept]).all() and relative(x[kept], y[kept]) <= 1e-5, name


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of infinities
@pytest.mark.parametrize("value,window,shape", [
    (np.nan, None, (2, 1, 32)), (np.inf, 9, (4, 2, 40)), (-np.inf, None, (1, 1, 96)),
])  # fmt: skip
def test_hidden_values(value, window, shape):
    """K, V, q and the gradient of one branch's last tokens are set to ``value``: rows that do not see these tokens, and
    columns that no row sees which does, do not notice, forward and backward, though they share tiles."""
    mask = BranchMask.from_tree([20, 6, 7, 4], [-1, 0, 0, 2])
    q, k, v, grad = tensors(0, mask.num_tokens, *shape, torch.float32, DEVICE)
    clean = computed(attend, q, k, v, grad, mask.to(DEVICE), window=window)
    odd = torch.zeros(mask.num_tokens, dtype=torch.bool)
    odd[23:26] = True  # the last three of the second segment
    for x in (q, k, v, grad):
        x[odd.to(x.device)] = value
    got = computed(attend, q, k, v, grad, mask.to(DEVICE), window=window)
    visible = mask.dense()
    if window is not None:
        visible = visible & (mask.positions[:, None] - mask.positions[None] < window)
    check_others(got, clean, visible, visible[:, odd].any(1) | odd)
    assert not torch.isfinite(got[0][odd.to(DEVICE)]).all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(
    "which,value,token", [("q", -np.inf, 10), ("k", -np.inf, 10), ("v", np.nan, 10), ("grad", np.inf, 63)]
)
def test_hidden_values_that_only_the_second_part_of_the_columns_shows(which, value, token):
    """One element behind the 64th column, such that what it makes of the first 64 is no NaN in the tiles that hold it
    and what it must not reach: scores of −inf, and products of one sign."""
    mask = BranchMask.from_tree([4, 12, 48], [-1, 0, 0])  # the first two share a tile
    given = dict(zip(("q", "k", "v", "grad"), tensors(0, 64, 1, 1, 96, torch.float32, DEVICE), strict=True))
    given["q"][..., 70] = given["k"][..., 70] = 1.0
    given["v"][:16, :, 70], given["v"][16:, :, 70] = 1.0, -10.0
    clean = computed(attend, *given.values(), mask.to(DEVICE))
    given[which][token, 0, 70] = value
    got = computed(attend, *given.values(), mask.to(DEVICE))
    visible, rows = mask.dense(), torch.zeros(64, dtype=torch.bool)
    rows[token] = True
    check_others(got, clean, visible, visible[:, token] if which in "kv" else rows)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("values", [(np.inf, -np.inf, np.nan), (np.inf,), (-np.inf,)], ids=str)
def test_seen_infinities(values):
    """Infinities and NaN in V: in their column, for the rows that see them, as in plain arithmetic. Single ones of all
    kinds, and one kind in one column of every token: as many as a step has tokens."""
    mask = random_tree(5, segments=5, longest=12) if len(values) > 1 else BranchMask.from_tree([5, 40, 20], [-1, 0, 0])
    given = tensors(0, mask.num_tokens, 2, 1, 40, torch.float32, DEVICE)
    if len(values) > 1:
        for i, token in enumerate(range(3, mask.num_tokens, 7)):
            given[2][token, 0, 5 * i % 40] = values[i % 3]
    else:
        given[2][5:, 0, 3] = values[0]
    out = attend(*given[:3], mask.to(DEVICE)).cpu()
    q, k, v = (x.cpu().double() for x in given[:3])
    visible = mask.dense()
    s = torch.einsum("ihd,jd->hij", q, k[:, 0]) * 40**-0.5
    p = torch.softmax(s.masked_fill(~visible, -np.inf), 2)
    terms = torch.where(visible[None, :, :, None], p[..., None] * v[:, 0], 0.0)  # [heads, rows, columns, D]
    want = terms.sum(2).transpose(0, 1)
    assert torch.equal(torch.isnan(out), torch.isnan(want)) and bool(torch.isnan(want).any()) == (len(values) > 1)
    assert torch.equal(torch.isinf(out), torch.isinf(want)) and torch.isinf(want).any()
    assert torch.equal(out[torch.isinf(out)].double(), want[torch.isinf(want)])
    finite = torch.isfinite(want)
    assert relative(out[finite], want[finite]) <= 1e-5


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
            ptr, intervals = (x.numpy() for x in transpose_intervals(starts, ptr, intervals))
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


@pytest.mark.parametrize("columns", [False, True], ids=["rows", "columns"])
def test_a_tile_never_spans_two_trees(columns):
    """And a tree is cut alike whatever is packed before and behind it."""

    def tables(mask):
        starts, ptr, intervals = (x.numpy() for x in (mask.starts, mask.row_ptr, mask.cols))
        if columns:
            ptr, intervals = (x.numpy() for x in transpose_intervals(starts, ptr, intervals))
        return branch_tables(starts, ptr, intervals, columns, 64, 16)

    for seed in range(6):
        parts = [
            random_tree(seed, segments=6, longest=5, roots=1),
            random_tree(seed + 9, segments=4, longest=9, roots=1),
        ]
        parts.append(BranchMask.from_tree([1], [-1]))
        tiles, pieces = tables(BranchMask.pack(parts))
        at = 0
        for part in parts:
            own, own_pieces = tables(part)
            mine = tiles[(tiles[:, 0] >= at) & (tiles[:, 1] <= at + part.num_tokens)]
            assert (mine[:, :2] - at == own[:, :2]).all() and len(mine) == len(own)
            of = pieces[mine[0, 2] : mine[-1, 3]].copy()
            of[:, :2] -= at
            assert (of == own_pieces).all()
            at += part.num_tokens


def test_configurations_exist_and_fit():
    for head_dim in (32, 40, 64, 72, 80, 96, 128, 192, 256):
        for itemsize in (2, 4):
            for arch in (configs.AMD, 80, 86, 90, 100, 120):
                for kernel in ("forward", "dq", "dkdv"):
                    config = configs.branch_config(kernel, head_dim, itemsize, arch)
                    assert 16 <= config.block_m <= 128 and 16 <= config.block_n <= 128
                    assert arch != configs.AMD or "maxnreg" not in config.options  # unknown to their compiler
