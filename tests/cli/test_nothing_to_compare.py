"""Ratios are given where they mean something: where something forked, from warm rounds in turns."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from evaluation_kit import Canned
from typer.testing import CliRunner

from anabranch.cli import adaptive, compare
from anabranch.cli import evaluate as cli
from anabranch.cli.app import app
from anabranch.evaluation import evaluate
from anabranch.evaluation.evaluate import Problem
from anabranch.records.metrics import measure
from anabranch.strategies import Sequential, ThreadWeaver
from anabranch.viz import card as score


def invoke(*arguments):
    result = CliRunner().invoke(app, [*arguments])
    assert result.exit_code == 0, result.output
    return result


def test_a_problem_that_did_not_fork_has_no_ratio():
    shown = invoke("demo", "7308 * 4000").output
    assert "did not fork, so there is nothing to compare" in shown and "×" not in shown.replace("7308 × 4000", "")
    (plain,) = json.loads(invoke("demo", "7308 * 4000", "--json").stdout)["problems"]
    assert plain["forked"] is False and plain["timing"] is None


def test_a_problem_that_forked_is_timed_warm_and_in_turns(monkeypatch):
    calls = []

    class Engine:
        tokenizer = SimpleNamespace(chat_template=None)

        def generate(self, prompt, strategy, max_new_tokens, **options):
            calls.append((isinstance(strategy, Sequential), max_new_tokens))

    timing = adaptive._time(Engine(), adaptive.Case("m", "p"), 100, 0, patience=0.0)
    warm, rounds = calls[:2], calls[2:]
    assert [c[0] for c in warm] == [False, True] and all(c[1] == 8 for c in warm)
    assert rounds == [(False, 100), (True, 100), (True, 100), (False, 100)] and timing.rounds == 2
    calls.clear()
    assert adaptive._time(Engine(), adaptive.Case("m", "p"), 100, 0).rounds == 3


def test_the_comparison_with_generate_takes_two_rounds_at_least(monkeypatch):
    order = []
    for name in ("_ours", "_generate"):
        monkeypatch.setattr(compare, name, lambda *a, n=name: (order.append((n, a[-1])), (1.0, 1.0))[1])
    found = compare.compare(SimpleNamespace(model=None), [1, 2], 3, 5, patience=0.0)
    assert found.rounds == 2 and [length for _, length in order] == [2, 2, 5, 5, 5, 5]
    assert order[2][0] == order[5][0] != order[3][0]  # in turns


@pytest.mark.parametrize("blocks", [(), (3,)])
def test_the_card_of_an_answer_without_threads_shows_no_ratio(blocks):
    from rich.console import Console

    m = measure(
        sampled=0, inserted=0, in_threads=0, critical=0, blocks=blocks, max_concurrency=1, longest_context=1,
    )  # fmt: skip
    console = Console(width=120, record=True, file=__import__("io").StringIO())
    console.print(score.card(m))  # no token and no time either
    text = console.export_text()
    assert ("×" in text) == bool(blocks) and ("nothing to compare" in text) == (not blocks) and "tokens/s" not in text


def test_eval_times_nothing_where_nothing_forked():
    same = {p: ("=1", 0, 0, 10, 10) for p in "ab"}
    out = evaluate(Canned(same, same), [Problem(p, "1") for p in "ab"], ThreadWeaver(), timed=2, modes=["forked"])
    assert out["timed"]["forked"] == 0 and "all" not in out["timed"] and "where_forked" not in out["timed"]
    assert out["modes"]["forked"]["token_speedup_where_forked"] is None
    report = {"model": "m", "file": "f", "machine": "m", "dtype": "float32", **out}
    lines = cli.remarks(report)
    assert any("none of the 2 timed problems forked: nothing to compare" in line for line in lines)
    json.dumps(out)


def test_one_problem_has_no_interval():
    forked, plain = {"a": ("=1", 2, 0, 100, 40)}, {"a": ("=1", 2, 0, 100, 100)}
    out = evaluate(Canned(forked, plain), [Problem("a", "1")], ThreadWeaver(), timed=1, modes=["forked", "sequential"])
    assert out["forked_minus_sequential"] == {"difference": 0.0, "low": None, "high": None}
    assert out["timed"]["all"]["speedup_95"] is None
    lines = cli.remarks({"model": "m", "file": "f", "machine": "m", "dtype": "float32", **out})
    assert sum("one problem, no interval" in line for line in lines) == 3
    json.dumps(out)
