"""Mistakes in records: traces, replays, what of a trace is learnt, metrics."""

from __future__ import annotations

from entry import Mutant

ROWS, TRACE = "python/anabranch/records/trace_rows.py", "python/anabranch/records/trace.py"
TESTS = "tests/training/test_training.py tests/training/test_training_parity.py"
HISTORY = "python/anabranch/records/history.py"
RECORDS = "tests/records/test_trace.py"

MUTANTS = [
    Mutant(
        "what a join brought back is learnt again", ROWS,
        'written if kind != "joined" or self.flat_loss else False', "written", TESTS,
    ),
    Mutant(
        "stages between cuts come out backwards", HISTORY, "found.insert(0, Stage(held, cut.begin, cut.logged))",
        "found.append(Stage(held, cut.begin, cut.logged))", TESTS,
    ),
    Mutant(
        "of several cuts the first is undone first", HISTORY, "for piece in reversed(node.forgotten):",
        "for piece in node.forgotten:", TESTS,
    ),
    Mutant(
        "log-probabilities of a split run begin anew", ROWS, "logprobs[at : at + len(self.rows.ids[segment])]",
        "logprobs[: len(self.rows.ids[segment])]", TESTS,
    ),
    Mutant(
        "a thread sees the whole of a sibling of which it saw a part", ROWS,
        "self._prefix(segment, min(count, len(self.rows.ids[segment])))", "segment",
        f"{TESTS} tests/engine/test_sight_and_places.py",
    ),
    Mutant(
        "a header that reads differently after a join counts as written by the model", ROWS,
        "written[-i] = there[-i][1]", "written[-i] = True", TESTS,
    ),
    Mutant(
        "a fork at the very length of a cut is taken for lost", ROWS, "if forked[n] > action.length]",
        "if forked[n] >= action.length]", TESTS,
    ),
    Mutant(
        "a fork from what was cut is taken for whole", ROWS, 'elif action.length is not None and (lost',
        'elif action.length is not None and action.do == "join" and (lost', TESTS,
    ),
    Mutant(
        "log-probabilities may be fewer than tokens", TRACE, 'if len(values) != len(data["token_ids"]):',
        'if len(values) > len(data["token_ids"]):', "tests/records/test_trace.py::test_a_wrong_field_is_named",
    ),
    Mutant(
        "tokens of a node are not compared with its runs", TRACE, "if held != list(node.token_ids):",
        "if len(held) != len(node.token_ids):", "tests/records/test_trace.py::test_a_wrong_field_is_named",
    ),
    Mutant(
        "answers count alike, however long", "python/anabranch/records/metrics.py",
        "sum(m.parallel_ratio * m.total_tokens for m in all_metrics) / total if total else 0.0",
        "sum(m.parallel_ratio for m in all_metrics) / n", "tests/records/test_metrics.py",
    ),
    Mutant(
        "peaks of a call are those of its last answer", "python/anabranch/records/metrics.py",
        "out[name] = max(getattr(m, name) for m in all_metrics)", "out[name] = getattr(all_metrics[-1], name)",
        "tests/records/test_metrics.py",
    ),
    Mutant(
        "a speedup without a critical path is 0", "python/anabranch/records/metrics.py",
        "        token_speedup=total / critical if critical else 1.0,\n",
        "        token_speedup=total / critical if critical else 0.0,\n", "tests/records/test_metrics.py",
    ),
]  # fmt: skip
