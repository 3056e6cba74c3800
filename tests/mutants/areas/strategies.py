"""Mistakes in strategies: votes, beams, forks in doubt, tags, calls."""

from __future__ import annotations

from entry import Mutant

S = "python/anabranch/strategies/"
VOTES = "tests/strategies/test_votes.py"
BEAMS = "tests/strategies/test_beam_search.py"
RULES = "tests/strategies/test_rule_strategies.py tests/strategies/test_strategies.py"
SEARCH = "tests/strategies/test_search.py tests/strategies/test_rule_strategies.py"

MUTANTS = [
    Mutant(
        "a vote is decided when the rest could still draw level", f"{S}api/voting.py",
        "return votes > max(others, default=0) + missing", "return votes >= max(others, default=0) + missing",
        VOTES,
    ),
    Mutant(
        "of equals the later answer wins", f"{S}api/voting.py",
        "self.classes.index(votes.most_common(1)[0][0]) if votes",
        "self.classes.index(max(votes, key=lambda c: (votes[c], c))) if votes", VOTES,
    ),
    Mutant(
        "a pattern's first match is the answer", f"{S}api/voting.py",
        "found = matches[-1].group(matches[-1].re.groups and 1)",
        "found = matches[0].group(matches[0].re.groups and 1)", f"{VOTES} tests/strategies/test_strategies.py",
    ),
    Mutant(
        "a nameless spelling goes with any of two", f"{S}api/voting.py",
        "if exact[1] is None and len(labels) == 1 else exact", "if exact[1] is None and labels else exact", VOTES,
    ),
    Mutant(
        "the likeliest branch is the longest", f"{S}sampling/self_consistency.py",
        "sum(s.logprob for s in ends[i].stats) / max(1, len(ends[i].stats))",
        "sum(s.logprob for s in ends[i].stats) * -1", "tests/strategies/test_strategies.py",
    ),
    Mutant(
        "beams of finished texts are compared at their bare sums", f"{S}search/beam_search.py",
        "new = [(score(c.score, length, self.length_penalty),", "new = [(c.score,", BEAMS,
    ),
    Mutant(
        "beams stop when the best running one equals the worst finished one", f"{S}search/beam_search.py",
        "return score(best.score, limit if longest else length, self.length_penalty) > worst.score",
        "return score(best.score, length, self.length_penalty) > worst.score", BEAMS,
    ),
    Mutant(
        "candidates beyond the width may end a beam", f"{S}search/beam_search.py",
        "ended = [c for c in ranked[: self.width] if c.ends]", "ended = [c for c in ranked if c.ends]", BEAMS,
    ),
    Mutant(
        "the doubtful token is kept", f"{S}sampling/entropy_fork.py",
        "            trunk.truncate(trunk.length - 1)  # the doubtful token: every branch draws its own\n", "",
        RULES,
    ),
    Mutant(
        "a group of window − 1 tokens counts", f"{S}sampling/entropy_fork.py",
        "whole = len(group) == self.window and", "whole = len(group) >= self.window - 1 and", RULES,
    ),
    Mutant(
        "the surest of the fallen is the least sure", f"{S}sampling/entropy_fork.py",
        "kids[-fallen.pop(0)[1]].kill()", "kids[-fallen.pop()[1]].kill()", RULES,
    ),
    Mutant(
        "a doubt in the lead looks at the entropy's threshold", f"{S}sampling/entropy_fork.py",
        "self.margin is not None and last.margin < self.margin",
        "self.margin is not None and last.margin > self.margin",
        "tests/strategies/test_search.py::test_the_entropy_fork_by_margin",
    ),
    Mutant(
        "a chain at its end is killed", f"{S}search/slim_sc.py", "if worse in writing:  # a chain",
        "if True:  # a chain", SEARCH,
    ),
    Mutant(
        "the more diverse chain goes", f"{S}search/slim_sc.py", "return i if own[0] > own[1] else j",
        "return j if own[0] > own[1] else i", SEARCH,
    ),
    Mutant(
        "thoughts just at the threshold stay", f"{S}search/slim_sc.py",
        "for thought in thoughts[j]) >= self.threshold:", "for thought in thoughts[j]) > self.threshold:", SEARCH,
    ),
    Mutant(
        "an ended trace may win", f"{S}search/deep_conf.py", 'if name == best and ends[i].reason != "until"]',
        "if name == best]", SEARCH,
        equivalent="it votes for nothing, so it could win only where nobody votes, as the surest of all; but it ended "
        "below the bar, and some trace of the warm-up is at or above it",
    ),
    Mutant(
        "a thread's limit of a tagged format is counted from the block", f"{S}tagged/writer.py",
        "limits.append(self.form.thread_tokens - sampled)", "limits.append(self.form.thread_tokens)",
        "tests/strategies/test_multiverse.py::test_a_limit_of_a_thread_counts_all_that_it_samples "
        "tests/strategies/test_threadweaver.py tests/strategies/test_parathinker.py",
    ),
    Mutant(
        "the room of siblings is rounded down", f"{S}tagged/writer.py",
        "limits.append(-(-room // siblings) - (thread.length - since))",
        "limits.append(room // siblings - (thread.length - since))",
        "tests/strategies/test_parallel_r1.py tests/strategies/test_npr.py tests/strategies/test_parathinker.py",
    ),
    Mutant(
        "a fork just as deep as allowed is refused", f"{S}tagged/writer.py",
        "form.max_depth is not None and depth > form.max_depth",
        "form.max_depth is not None and depth >= form.max_depth",
        "tests/strategies/test_multiverse.py tests/strategies/test_npr.py",
    ),
    Mutant(
        "an EOS stays in front of the closing tag", f"{S}tagged/writer.py",
        '        if reason == "eos":\n            kid.truncate(kid.length - 1)\n        kid.insert',
        "        kid.insert", "tests/strategies/test_multiverse.py tests/strategies/test_threadweaver.py",
    ),
    Mutant(
        "a plan's first opening is read, not its last", f"{S}tagged/medverse.py",
        "next((i for i in range(len(context) - 1, -1, -1) if context[i] == opening), None)",
        "next((i for i in range(len(context)) if context[i] == opening), None)",
        "tests/strategies/test_medverse.py",
    ),
    Mutant(
        "a step sees what it depends on, and nothing before that", f"{S}tagged/medverse.py",
        'left += steps[need][1] if self.sees == "ancestors" else []', "left += []",
        "tests/strategies/test_medverse.py",
    ),
    Mutant(
        "a call block is cut at the first one", f"{S}calls/apr.py", 'begin = own.rfind(f"{CALLING}\\n")',
        'begin = own.find(f"{CALLING}\\n")', "tests/strategies/test_apr.py",
    ),
    Mutant(
        "a path is what stands behind the last goal", f"{S}calls/apr.py",
        "text[text.rindex(GOAL, 0, text.rindex(GOAL)) :]", "text[text.rindex(GOAL) :]",
        "tests/strategies/test_apr.py",
    ),
    Mutant(
        "the last level's calls are served", f"{S}calls/apr.py", "serves = level < self.depth",
        "serves = level <= self.depth", "tests/strategies/test_apr.py",
    ),
]  # fmt: skip
