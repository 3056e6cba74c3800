"""Mistakes in packed training rows: labels, the rows that predict them, copies, formats."""

from __future__ import annotations

from entry import Mutant

LAYOUT, FORMATS = "python/anabranch/training/layout.py", "python/anabranch/training/formats.py"
COLLATORS = "python/anabranch/training/collators.py"
TESTS = "tests/training/test_training.py"

MUTANTS = [
    Mutant(
        "a token that nothing precedes is learnt", LAYOUT, "(learnt & (previous < 0), ",
        "(learnt & (previous < -1), ", TESTS,
    ),
    Mutant(
        "labels that the runtime wrote are accepted", LAYOUT, "(learnt & ~self.written, ",
        "(learnt & ~self.written & (previous < 0), ", TESTS,
    ),
    Mutant(
        "a packed row's root is predicted by the row before it", LAYOUT,
        'torch.where(joined["previous"] < 0, -1, joined["previous"] + shift)', 'joined["previous"] + shift', TESTS,
    ),
    Mutant(
        "copies have labels", LAYOUT, "labels = torch.cat([labels, torch.full_like(copied, IGNORE)])",
        "labels = torch.cat([labels, ids[copied]])", TESTS,
    ),
    Mutant(
        "a row that predicts three threads is copied once", LAYOUT, "if row in seen or seen.add(row)]",
        "if row in seen and not seen.discard(row) or seen.add(row)]", TESTS,
    ),
    Mutant(
        "a live thread goes on from the first token of its turn before", LAYOUT,
        "previous[mask.starts[segment]] = mask.starts[before + 1] - 1",
        "previous[mask.starts[segment]] = mask.starts[before]",
        "tests/training/test_training_parity.py tests/strategies/test_group_think.py",
    ),
    Mutant(
        "recorded log-probabilities are rounded to half", LAYOUT, "torch.as_tensor(recorded, dtype=torch.float32)",
        "torch.as_tensor(recorded, dtype=torch.float16)", "tests/training/test_training_parity.py",
    ),
    Mutant(
        "a shared token is written as in the last sequence", FORMATS, "flags[node - 1][0] |= written",
        "flags[node - 1][0] = written", TESTS,
    ),
    Mutant(
        "threads have no loss where they stand behind one another, the first included", FORMATS,
        "sequential or flat_loss or j == 0", "sequential or flat_loss", TESTS,
        equivalent="the first thread's branch is the same tokens of the trie, and has loss",
    ),
    Mutant(
        "a branch begins with the header that stands in the flat text", FORMATS,
        "branches.append([*prefix, (piece.header(j), False, False)",
        "branches.append([*prefix, (piece.header(j, flat=True), False, False)", TESTS,
    ),
    Mutant(
        "what follows a block goes on behind the last thread, not the longest", FORMATS,
        "longest = max(longest, end)", "longest = end", TESTS,
    ),
    Mutant(
        "threads see their earlier siblings", FORMATS, "write(inner, [*before, *kid], end, name)",
        "write(inner, [*sees, *own, *kid], end, name)", TESTS,
    ),
    Mutant(
        "advantages are given out by prompt", COLLATORS,
        'torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))',
        'torch.repeat_interleave(torch.arange(len(sizes)) // len(features), torch.tensor(sizes))', TESTS,
    ),
]  # fmt: skip
