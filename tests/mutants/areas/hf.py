"""Mistakes where Transformers' models are probed, checked and given masks."""

from __future__ import annotations

from entry import Mutant

HF = "python/anabranch/hf/"
TESTS = "tests/hf/test_hf.py"
ROPE = "tests/hf/test_hf_rope.py"
UNHEARD = "tests/hf/test_hf_unheard.py"
COMPANY = "tests/hf/test_hf_company.py"

MUTANTS = [
    Mutant(
        "only the last position is checked", f"{HF}tree.py",
        "torch.equal(position_ids[0].to(expected.device), expected)",
        "torch.equal(position_ids[0, -1:].to(expected.device), expected[-1:])", TESTS,
    ),
    Mutant(
        "under a branch mask only the last position is checked", f"{HF}branch.py",
        "wrong = (given[0].to(mask.device) != mask.positions).nonzero()",
        "wrong = (given[0].to(mask.device) != mask.positions)[-1:].nonzero()", "tests/hf/test_hf_branch.py",
    ),
    Mutant(
        "a layer number one past the cache's is taken", f"{HF}tree.py", "not 0 <= layer < cache.num_layers",
        "not 0 <= layer <= cache.num_layers", TESTS,
    ),
    Mutant(
        "a layer of full attention has the configuration's window", f"{HF}checks.py",
        'if kinds and isinstance(layer, int) and kinds[layer] == "full_attention":',
        'if kinds and layer == "full_attention":', f"{TESTS} {COMPANY}",
    ),
    Mutant(
        "is_causal=False is the module's own word", f"{HF}checks.py",
        'getattr(module, "is_causal", True) if given is None else given)',
        'given or getattr(module, "is_causal", True))', f"{TESTS} tests/hf/test_hf_branch.py",
    ),
    Mutant(
        "a window that the mask has and the model passes otherwise is taken", f"{HF}checks.py",
        'if passed is None and getattr(config, "attention_chunk_size", None) is None:', "if passed is None:",
        f"{TESTS} {COMPANY}",
    ),
    Mutant(
        "a mask over cached keys is deferred", f"{HF}mask.py", "and q_length == kv_length",
        "and q_length <= kv_length", TESTS,
        equivalent="where keys are cached q_offset is not 0, which rules a deferred mask out by itself",
    ),
    Mutant(
        "a padded batch of one is deferred", f"{HF}mask.py", '        and kwargs.get("attention_mask") is None\n',
        "", TESTS,
    ),
    Mutant(
        "a deferred mask is built again at each look", f"{HF}mask.py", "        if not self._built:\n",
        "        if True:\n", TESTS, equivalent="building it again gives the same mask; only time is lost",
    ),
    Mutant(
        "other implementations swallow a branch mask", f"{HF}guard.py", '_OURS = ("tree_step", "branch_mask")',
        '_OURS = ("tree_step",)', UNHEARD,
    ),
    Mutant(
        "the probe compares its first row", f"{HF}probe.py", "    ROW = 3  # the one", "    ROW = 0  # the one",
        f"{TESTS} {ROPE}",
    ),
    Mutant(
        "the probe looks at the first kind of layer alone", f"{HF}probe.py",
        "firsts = frozenset(kinds.index(kind) for kind in kinds)", "firsts = frozenset({0})",
        f"{ROPE}::test_the_probe_looks_at_the_rotation_of_each_kind_of_layer",
    ),
    Mutant(
        "the probe leaves a model that was trained in evaluation", f"{HF}probe.py",
        "        for part in training:\n            part.training = True\n", "        pass\n", TESTS,
    ),
    Mutant(
        "a position table's offset is counted for it", f"{HF}positions.py",
        "limit = size - int(places[0]) + self.near", "limit = size + int(places[0]) - self.near",
        "tests/hf/test_positions.py",
    ),
    Mutant(
        "of several position tables the longest counts", f"{HF}positions.py", "else min(self.limit, limit)",
        "else max(self.limit, limit)", "tests/hf/test_positions.py",
    ),
    Mutant(
        "a sequence of just the limit is long", f"{HF}rope.py", "return length > self.limit",
        "return length >= self.limit", ROPE,
    ),
    Mutant(
        "a packed row's last position is left out", f"{HF}rope.py", "longest = int(mask.positions.max()) + 1 if",
        "longest = int(mask.positions.max()) if", ROPE,
    ),
    Mutant(
        "a sequence is as long as its own segment", f"{HF}rope.py",
        "spans = [*cols[ptr[segment] : ptr[segment + 1]], [begin, end]]", "spans = [[begin, end]]", ROPE,
    ),
]  # fmt: skip
