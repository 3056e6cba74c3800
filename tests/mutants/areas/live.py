"""Mistakes in live sharing, and in trees of guesses."""

from __future__ import annotations

from entry import Mutant

THREADS, ENGINE = "python/anabranch/threads/live.py", "python/anabranch/engine/live.py"
DRAFTING, TREE = "python/anabranch/engine/drafting.py", "python/anabranch/engine/drafts/tree.py"
LIVE = "tests/engine/test_live.py tests/strategies/test_group_think.py"
DRAFTS = "tests/engine/test_drafts.py"
SHARING = "tests/engine/test_sharing.py"
WAITS = "tests/engine/test_engine_order.py::test_who_sees_another_waits_for_what_it_sees_and_not_for_what_comes_after"

MUTANTS = [
    Mutant(
        "rows see what others compute in the same turn", THREADS,
        'view.same_step == "all" or (view.same_step == "before" and other.path < thread.path)',
        'view.same_step in ("all", "before")', LIVE,
    ),
    Mutant(
        "others are seen one turn late", THREADS, "turn if sees_same_turn(view, thread, other) else turn - 1)",
        "turn - 1)", LIVE,
    ),
    Mutant(
        "a token sees by the first view of its thread", THREADS,
        "(view for view in reversed(self.views) if view.begin <= number)",
        "(view for view in self.views if view.begin <= number)", LIVE,
    ),
    Mutant(
        "a cut at a turn's end takes the turn with it", THREADS, "self._ends and self._ends[-1] > length:",
        "self._ends and self._ends[-1] >= length:", LIVE,
        equivalent="ends rise, so of a turn that ends just there the end is set to what it is, and no turn goes",
    ),
    Mutant(
        "what an ancestor wrote is read twice", THREADS,
        "            return len(below.prefix) - len(other.prefix)\n", "            return 0\n",
        f"{LIVE} tests/kv/test_views.py",
    ),
    Mutant(
        "lined up, blocks stand as if all began where the reader did", ENGINE,
        "offset = total - before - thread.start + other.start if view.lined_up else 0",
        "offset = total - before if view.lined_up else 0", f"{LIVE} tests/strategies/test_hogwild.py",
    ),
    Mutant(
        "a turn's clock is the one after it", ENGINE, "thread.reach(clocks[other] if same else other.turns.clock)",
        "thread.reach(clocks[other])", f"{LIVE} {WAITS}",
    ),
    Mutant(
        "more tokens than rows go to whoever is first", ENGINE, "else max_rows // len(new)", "else max_rows", LIVE,
    ),
    Mutant(
        "a turn that does not fit is begun", ENGINE, "                if turn:\n                    break\n", "",
        LIVE,
    ),
    Mutant(
        "who has gone is still seen", ENGINE, "others = [other for other in views[-1].others if other is not thread]",
        "others = list(views[-1].others)", LIVE,
    ),
    Mutant(
        "who has gone is not computed again for those that saw it", "python/anabranch/engine/request.py",
        "thread.lingers, self._lingering[thread] = True, None", "self._lingering[thread] = None", SHARING,
    ),
    Mutant(
        "a fork that comes back gives its parents a turn", "python/anabranch/engine/live.py",
        "if asked and whole", "if whole", SHARING,
    ),
    Mutant(
        "a live child's KV is spliced", "python/anabranch/threads/joins/reprefill.py",
        'first.role == "fork" and first.live is None and thread.live is None', 'first.role == "fork"', LIVE,
    ),
    Mutant(
        "a wrong guess stays in the branch", DRAFTING,
        "        if keep is not None and kv.branch is not None and kv.branch.length > keep:\n            "
        "self.cache.truncate(kv.branch, keep)\n",
        "", DRAFTS,
    ),
    Mutant(
        "a guess on a side path counts as in the branch", DRAFTING, "            if node.main:\n",
        "            if True:\n", DRAFTS,
    ),
    Mutant(
        "the scores behind a guess are the last one's", DRAFTING, "node.at = before + len(found)",
        "node.at = before", DRAFTS,
    ),
    Mutant(
        "a decode's last token is guessed as well", DRAFTING, "decode.limit - len(decode.op.token_ids) - 1)",
        "decode.limit - len(decode.op.token_ids))", DRAFTS,
    ),
    Mutant(
        "forks for side paths stay", DRAFTING,
        "        for branch in self._sides:\n            self.cache.release(branch)\n", "", DRAFTS,
    ),
    Mutant(
        "drafts take rows that a step does not have", TREE, "return sum(len(path) + (i > 0) for i, (path, _)",
        "return sum(len(path) for i, (path, _)", DRAFTS,
    ),
    Mutant(
        "what two paths share is verified twice", TREE, "            if token not in node.children:\n",
        "            if True:\n", DRAFTS,
    ),
]  # fmt: skip
