"""Mistakes in branch masks: who sees whom, positions, rows that predict, tiles."""

from __future__ import annotations

from entry import Mutant

MASK = "python/anabranch/attention/mask.py"
PLAN = "csrc/plan/branch_plan.hpp"
TESTS = "tests/attention/test_branch_mask.py"
TRAINING = "tests/training/test_training.py"
TILES = "tests/kernels/test_branch_triton.py::test_"

MUTANTS = [
    Mutant(
        "a child's positions follow the segment before it in the list", MASK, "first.append(first[up] + size[up])",
        "first.append(first[i - 1] + size[i - 1])", TESTS,
    ),
    Mutant(
        "a parent that is no ancestor of the segment before is accepted", MASK,
        "            if up >= 0 and not path:\n", "            if up >= i and not path:\n", TESTS,
    ),
    Mutant(
        "a join goes on behind the last of those it sees, not the longest", MASK,
        "first[i] = ends[segment[cut[i] : cut[i + 1]]].max()", "first[i] = ends[segment[cut[i + 1] - 1]]", TESTS,
    ),
    Mutant(
        "a segment may see itself", MASK, "np.flatnonzero((segment < 0) | (segment >= owner))",
        "np.flatnonzero((segment < 0) | (segment > owner))", TESTS,
    ),
    Mutant(
        "intervals that touch are accepted unmerged", MASK, "(pairs[1:, 0] <= pairs[:-1, 1])",
        "(pairs[1:, 0] < pairs[:-1, 1])", TESTS,
    ),
    Mutant(
        "an interval may reach into the segment that it belongs to", MASK, "(pairs[:, 1] > begin[owner])",
        "(pairs[:, 1] > begin[owner + 1])", TESTS,
    ),
    Mutant(
        "intervals may cut a segment", MASK, "bad |= ~(np.isin(pairs[:, 0], begin) & np.isin(pairs[:, 1], begin))",
        "bad |= ~np.isin(pairs[:, 0], begin)", TESTS,
    ),
    Mutant(
        "the row that predicts a segment ends the first interval it sees", MASK,
        "self.cols[ptr[1:][some] - 1, 1].long() - 1", "self.cols[ptr[:-1][some], 1].long() - 1",
        f"{TESTS} {TRAINING}",
    ),
    Mutant(
        "an empty segment has a first token", MASK, "filled = self.lengths > 0", "filled = self.lengths >= 0",
        f"{TESTS} {TRAINING}",
    ),
    Mutant(
        "a copy at a segment's first token sees what the segment before sees", MASK,
        'else int(np.searchsorted(starts, row, "right")) - 1', 'else int(np.searchsorted(starts, row, "left")) - 1',
        f"{TESTS} {TRAINING}",
    ),
    Mutant(
        "packed masks' intervals are those of the first", MASK,
        "torch.cat([p.cols + t for p, t in zip(parts, tokens, strict=False)]),",
        "torch.cat([p.cols + t * (t > 0) for p, t in zip(parts, [0, *tokens], strict=False)]),", TESTS,
    ),
    Mutant(
        "equal masks may have other positions", MASK, 'names = ("starts", "row_ptr", "cols", "positions")',
        'names = ("starts", "row_ptr", "cols")', TESTS,
    ),
    Mutant(
        "a tile spans two trees", PLAN, "      if (tree_begins_[s]) flush();\n", "",
        f"{TILES}a_tile_never_spans_two_trees {TILES}the_same_bits_whoever_else_is_in_the_row",
    ),
    Mutant(
        "the last token of a full word of bits is left out", PLAN, "hi = std::min(last - 32 * w, 32);",
        "hi = std::min(last - 32 * w, 31);", f"{TILES}tables_are_the_mask",
    ),
    Mutant(
        "a tile of several segments sees what its first one sees", PLAN,
        "whole = whole && bits.word[w] == all.word[w];",
        "whole = whole && (bits.word[w] & 1) == (all.word[w] & 1);",
        f"{TILES}tables_are_the_mask tests/attention/test_branch_attention.py::test_cpu_many_short_segments",
    ),
]  # fmt: skip
