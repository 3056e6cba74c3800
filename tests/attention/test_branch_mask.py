"""``BranchMask``: random trees and graphs against plain loops, both interval forms, packing, and every refusal."""

from __future__ import annotations

import copy
import pickle
import random
import sys
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.attention.mask import BranchMask


@st.composite
def trees(draw, most: int = 12):
    """(lengths, parents) in DFS preorder; empty segments and several roots among them."""
    count = draw(st.integers(1, most))
    path: list[int] = []
    parents = []
    for i in range(count):
        depth = draw(st.integers(0, len(path)))
        path = path[:depth]
        parents.append(path[-1] if path else -1)
        path.append(i)
    return draw(st.lists(st.integers(0, 4), min_size=count, max_size=count)), parents


@st.composite
def graphs(draw, most: int = 12):
    count = draw(st.integers(1, most))
    context = [sorted(draw(st.sets(st.integers(0, i - 1)))) if i else [] for i in range(count)]
    return draw(st.lists(st.integers(0, 4), min_size=count, max_size=count)), context


def oracle(lengths: list[int], context: list[list[int]]) -> torch.Tensor:
    segment = [s for s, n in enumerate(lengths) for _ in range(n)]
    total = len(segment)
    sees = torch.zeros(total, total, dtype=torch.bool)
    for i in range(total):
        for j in range(total):
            sees[i, j] = segment[j] in context[segment[i]] or (segment[i] == segment[j] and j <= i)
    return sees


def ancestors(parents: list[int]) -> list[list[int]]:
    found: list[list[int]] = []
    for up in parents:
        found.append([] if up < 0 else [*found[up], up])
    return found


def check_intervals(mask: BranchMask) -> None:
    """Both forms are what the class says: sorted, disjoint, merged, and describe ``dense()``."""
    dense, starts = mask.dense(), mask.starts.tolist()
    assert mask.num_tokens == starts[-1] == dense.shape[0]
    assert mask.starts.dtype == mask.positions.dtype == torch.int64
    for ptr, pairs in ((mask.row_ptr, mask.cols), (mask.col_ptr, mask.rows)):
        assert ptr.dtype == pairs.dtype == torch.int32
        assert ptr[0] == 0 and ptr[-1] == len(pairs) and pairs.shape[1:] == (2,)
    for s in range(mask.num_segments):
        begin, end = starts[s], starts[s + 1]
        cols = mask.cols[mask.row_ptr[s] : mask.row_ptr[s + 1]].tolist()
        rows = mask.rows[mask.col_ptr[s] : mask.col_ptr[s + 1]].tolist()
        for pairs in (cols, rows):
            assert all(b < e for b, e in pairs)
            assert all(a[1] < b[0] for a, b in pairwise(pairs))
        assert not cols or cols[-1][1] <= begin
        assert not rows or rows[0][0] >= end
        if begin < end:
            assert [j for b, e in cols for j in range(b, e)] == dense[begin, :begin].nonzero()[:, 0].tolist()
            below = dense[end:, begin].nonzero()[:, 0] + end
            assert [i for b, e in rows for i in range(b, e)] == below.tolist()
        else:
            assert not rows


@settings(max_examples=40)
@given(trees())
def test_from_tree(tree):
    lengths, parents = tree
    mask = BranchMask.from_tree(lengths, parents)
    assert torch.equal(mask.dense(), oracle(lengths, ancestors(parents)))
    # In a tree everything that a token sees is on the way to it: its depth is their number.
    assert mask.positions.tolist() == (mask.dense().sum(1) - 1).tolist()
    check_intervals(mask)
    assert mask == BranchMask.from_context(lengths, ancestors(parents))


@settings(max_examples=40)
@given(graphs())
def test_from_context(graph):
    lengths, context = graph
    mask = BranchMask.from_context(lengths, context)
    assert torch.equal(mask.dense(), oracle(lengths, context))
    check_intervals(mask)
    shuffled = [random.Random(0).sample([*c, *c], 2 * len(c)) for c in context]
    assert mask == BranchMask.from_context(lengths, shuffled)
    for i, row in enumerate(mask.dense()):
        seen = row.nonzero()[:-1, 0]
        assert mask.previous[i] == (seen[-1] if len(seen) else -1)


@settings(max_examples=40)
@given(graphs())
def test_positions_begin_behind_all_that_is_seen(graph):
    lengths, context = graph
    mask = BranchMask.from_context(lengths, context)
    ends: list[int] = []
    for s, size in enumerate(lengths):
        first = max((ends[j] for j in context[s]), default=0)
        begin = int(mask.starts[s])
        assert mask.positions[begin : begin + size].tolist() == list(range(first, first + size))
        ends.append(first + size)


@settings(max_examples=40)
@given(st.lists(graphs(5), min_size=1, max_size=3))
def test_pack_is_block_diagonal(items):
    masks = [BranchMask.from_context(*item) for item in items]
    packed = BranchMask.pack(masks)
    assert torch.equal(packed.dense(), torch.block_diag(*(m.dense().int() for m in masks)).bool())
    assert packed.positions.tolist() == [p for m in masks for p in m.positions.tolist()]
    assert packed.num_segments == sum(m.num_segments for m in masks)
    check_intervals(packed)


def test_positions_of_ones_own():
    mask = BranchMask.from_tree([2, 1], [-1, 0], positions=[5, 6, 9])
    assert mask.positions.tolist() == [5, 6, 9]
    assert BranchMask.from_context([2, 1], [[], [0]], positions=torch.tensor([5, 6, 9])) == mask
    assert BranchMask.from_tree([2, 1], [-1, 0]) != mask


def test_copies_are_kept_and_pickled_masks_are_equal():
    mask = BranchMask.from_tree([2, 1, 3], [-1, 0, 0])
    assert mask.to("cpu") is mask
    there = mask.to("meta")
    assert there.device.type == "meta" and there.cols.is_meta
    assert mask.to("meta") is there and there.to("cpu") is mask
    _ = mask.rows
    for twin in (pickle.loads(pickle.dumps(mask)), copy.deepcopy(mask)):
        assert twin == mask and torch.equal(twin.rows, mask.rows)
    assert mask.segment_ids.tolist() == [0, 0, 1, 2, 2, 2]
    assert repr(mask) == "BranchMask(6 tokens, 3 segments, device='cpu')"


REFUSED = {
    "out of order": (lambda: BranchMask.from_tree([1, 1, 1], [-1, 2, 0]), r"parents: segment 1 names parent 2.*later"),
    "itself": (lambda: BranchMask.from_tree([1, 1], [-1, 1]), "parents: segment 1 names itself"),
    "no such parent": (lambda: BranchMask.from_tree([1, 1], [-1, -2]), "parents: segment 1 names parent -2.*0 … 1"),
    "beyond the end": (lambda: BranchMask.from_tree([1, 1], [-1, 7]), "parents: segment 1 names parent 7.*0 … 1"),
    "not an ancestor": (
        lambda: BranchMask.from_tree([1, 1, 1, 1], [-1, 0, 0, 1]),
        "parents: segment 3 has parent 1.*segment 2.*preorder",
    ),
    "parents missing": (lambda: BranchMask.from_tree([1, 1, 1], [-1, 0]), r"parents: expected one a segment \(3"),
    "negative length": (lambda: BranchMask.from_tree([1, -3], [-1, 0]), "lengths: segment 1 has -3 tokens"),
    "no segments": (lambda: BranchMask.from_tree([], []), "lengths: empty"),
    "fractions": (lambda: BranchMask.from_tree([1.5], [-1]), "lengths: expected whole numbers"),
    "too long": (lambda: BranchMask.from_tree([2**30, 2**30], [-1, 0]), "lengths: 2147483648 tokens"),
    "positions": (lambda: BranchMask.from_tree([2, 2], [-1, 0], positions=[0, 1]), r"positions: expected \[4\]"),
    "negative position": (
        lambda: BranchMask.from_tree([1, 2], [-1, 0], positions=[0, 1, -4]),
        r"positions: token 2 \(segment 1\) is at -4",
    ),
    "cycle": (lambda: BranchMask.from_context([1, 1], [[1], [0]]), "context: segment 0 names segment 1.*cycle"),
    "sees itself": (lambda: BranchMask.from_context([1, 1], [[], [1]]), "context: segment 1 names itself"),
    "none there is": (lambda: BranchMask.from_context([1, 1], [[], [-1]]), "context: segment 1 names segment -1"),
    "contexts missing": (lambda: BranchMask.from_context([1, 1], [[]]), r"context: expected one list a segment \(2"),
    "nothing to pack": (lambda: BranchMask.pack([]), "masks: empty"),
    "two devices": (
        lambda: BranchMask.pack([m := BranchMask.from_tree([1], [-1]), m.to("meta")]),
        r"masks\[1\]: is on meta",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_names_the_segment(case):
    make, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        make()


def test_work_grows_with_the_segments_alone():
    """Calls made for 1,000 segments are at most twice those for 500, and as many for 100 tokens each as for one."""

    def calls(make, *arguments) -> int:
        """Python and C functions called: what a quadratic construction would show, on a machine of any speed."""
        count = 0

        def note(frame, event, argument):
            nonlocal count
            count += event in ("call", "c_call")

        sys.setprofile(note)
        try:
            make(*arguments)
        finally:
            sys.setprofile(None)
        return count

    random.seed(0)
    parents = [-1, *(0 if i % 3 else i - 1 for i in range(1, 1000))]
    visible = [sorted(random.sample(range(i), min(i, 8))) for i in range(1000)]
    for make, edges in ((BranchMask.from_tree, parents), (BranchMask.from_context, visible)):
        half, whole = calls(make, [100] * 500, edges[:500]), calls(make, [100] * 1000, edges)
        assert 0 < whole < 2.1 * half, make.__name__
        assert abs(calls(make, [1] * 1000, edges) - whole) < 0.01 * whole, make.__name__


@settings(max_examples=3)
@given(st.integers(2, 60))
def test_combs_and_chains(count):
    """The two shapes with the longest paths: one that merges into a single interval a segment, one that cannot."""
    chain = BranchMask.from_tree([2] * count, range(-1, count - 1))
    assert len(chain.cols) == len(chain.rows) == count - 1
    assert torch.equal(chain.dense(), torch.ones(2 * count, 2 * count).tril().bool())
    comb = BranchMask.from_tree([1] * (2 * count), [-1 if k == 0 else k - 2 + k % 2 for k in range(2 * count)])
    check_intervals(comb)


def test_intervals_of_ones_own_are_checked():
    """Two tokens a segment; segment 2 begins at 4. Whole earlier segments, sorted, disjoint, merged, or an error."""
    positions = torch.tensor([0, 1, 2, 3, 4, 5])

    def mask(*cols):
        return BranchMask.from_intervals([0, 2, 4, 6], [0, 0, 0, len(cols)], list(cols), positions)

    for good in ([], [(0, 2)], [(2, 4)], [(0, 4)]):
        sees = {column for begin, end in good for column in range(begin, end)}
        assert mask(*good).dense()[4].nonzero().flatten().tolist() == sorted(sees | {4})
    touching, own, cut_end, cut_begin = [(0, 2), (2, 4)], [(0, 6)], [(0, 3)], [(1, 4)]
    unsorted, twice, empty, negative = [(2, 4), (0, 2)], [(0, 2), (0, 2)], [(2, 2)], [(-2, 2)]
    for bad in (touching, own, cut_end, cut_begin, unsorted, twice, empty, negative, [(4, 6)], [(2, 6)]):
        with pytest.raises(ValueError, match="cols: segment 2 has interval"):
            mask(*bad)
