"""Mistakes in KV formats, in the cache around the tree, and in kept prefixes."""

from __future__ import annotations

from entry import Mutant

FORMATS, PREFIX = "python/anabranch/backends/formats.py", "python/anabranch/kv/prefix.py"
TESTS = "tests/kv/test_formats.py"
KEPT = "tests/engine/test_prefix_cache.py"
ALONE = "tests/kv/test_prefix.py"  # without a model

MUTANTS = [
    Mutant(
        "int8 is rounded down", FORMATS, "scaled.round()", "scaled.floor()", TESTS,
    ),
    Mutant(
        "one infinity spoils no vector", FORMATS, "torch.where(wide.isfinite().all(-1), scales, ",
        "torch.where(wide.isfinite().any(-1), scales, ", TESTS,
    ),
    Mutant(
        "a factor is not counted in a vector's bytes", FORMATS, "+ (4 if self.quantised else 0)", "+ 0", TESTS,
    ),
    Mutant(
        "float64 comes back through float32", FORMATS, "wide = dtype if dtype.itemsize > 4 else torch.float32",
        "wide = torch.float32", TESTS,
    ),
    Mutant(
        "the largest element is clamped one step lower", FORMATS, ".clamp(-largest, largest)",
        ".clamp(1 - largest, largest - 1)", TESTS,
    ),
    Mutant(
        "a context at the limit is not kept", PREFIX, "if self.limit is not None and len(token_ids) > self.limit:",
        "if self.limit is not None and len(token_ids) >= self.limit:", f"{ALONE} {KEPT} tests/hf/test_hf_rope.py",
    ),
    Mutant(
        "a page that is found in part is found", PREFIX,
        "return length if length < size else length - length % size", "return length", KEPT,
    ),
    Mutant(
        "a leaf that goes on keeps its own branch", PREFIX,
        "            self.cache.release(node.branch)\n            node.branch = None\n",
        "            node.branch = None\n", KEPT,
    ),
    Mutant(
        "a branch that is kept holds more than its tokens", PREFIX,
        "        if branch.length > len(token_ids):\n            self.cache.truncate(branch, len(token_ids))\n", "",
        f"{ALONE} {KEPT}",
    ),
    Mutant(
        "what is found does not count as used", PREFIX,
        "        self._touch(node)\n        branch = self.cache.fork", "        branch = self.cache.fork", KEPT,
    ),
    Mutant(
        "what goes with the end of a context is a page short", PREFIX,
        "length = (-(-leaf.end // size) - pages) * size", "length = (leaf.end // size - pages) * size",
        f"{ALONE} {KEPT}",
    ),
    Mutant(
        "pages that are kept count as given up", PREFIX, "return usage.pages_free - usage.pages_kept",
        "return usage.pages_free", KEPT,
    ),
    Mutant(
        "weights that change leave the epoch", PREFIX, "        self.epoch += 1\n", "", KEPT,
    ),
    Mutant(
        "two contexts are alike to the end of the longer", PREFIX, "return min(len(first), len(second))",
        "return len(second)", KEPT,
    ),
]  # fmt: skip
