"""Problem files, answers, intervals, and what `anabranch eval` makes of a model's results."""

from __future__ import annotations

import json

import pytest
from engine_kit import byte_tokenizer, make_model
from evaluation_kit import Canned

import anabranch as ab
from anabranch.cli import evaluate as cli
from anabranch.evaluation import evaluate
from anabranch.evaluation.evaluate import (
    Problem,
    bootstrap,
    final_answer,
    is_right,
    ratio_of_sums,
    read_problems,
    wilson,
)
from anabranch.strategies import ThreadWeaver


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("7*8=56\nThe answer is 56.", "56", True),
        ("The answer is 56.<|im_end|>", "56", True),  # an end-of-sequence token is not text
        ("The answer is 56. Or 57: the answer is 57.", "56", False),  # the last one counts
        ("… so 84. The answer is 84 legs.", "84", True),
        ("The answer is A 57, B 12.", "A 57, B 12", True),
        ("The answer is B 12, A 57.", "A 57, B 12", False),
        ("The answer is A 57.", "A 57, B 12", False),
        ("The answer is Anna 1,204.", "Anna 1204", True),
        ("The answer is Ben 1204.", "Anna 1204", False),
        ("</Parallel>+2a2b9c6d1=1692", "1692", True),
        ("</Parallel>+2a2b9c6d1=1693", "1692", False),
        ("#### 12", "12", True),
        ("so \\boxed{12}", "12", True),
        ("There are 3 boxes of 4.\n\nIn total that makes 12 eggs.", "12", True),
        ("There are 3 boxes of 4, so 12 eggs, not 13.", "12", False),
        ("Laura pays 281 and Hugo pays 366.", "Laura 281, Hugo 366", True),
        ("Hugo pays 366 and Laura pays 281.", "Laura 281, Hugo 366", False),
        ("", "12", False),
    ],
)
def test_an_answer_is_right_when_it_ends_in_what_was_asked_for(text, answer, right):
    assert is_right(text, answer) is right


def test_the_final_answer_knows_whether_it_was_marked():
    assert final_answer("x\nThe answer is 5.") == (" 5.", True)
    assert final_answer("2*3=6") == ("6", True)
    assert final_answer("One.\n\nIt is six.") == ("It is six.", False)


def test_wilson_against_known_values():
    low, high = wilson(90, 100)  # Wilson 1927, as R's prop.test(correct = FALSE) has it
    assert low == pytest.approx(0.8256, abs=1e-4) and high == pytest.approx(0.9448, abs=1e-4)
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(10, 10)[1] == 1.0 and wilson(0, 10)[0] == 0.0


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("{", "line 1: not JSON"),
        ('{"prompt": "a", "answer": "b"}\n{"prompt": "a"}', 'line 2: expected an object with "prompt" and "answer"'),
        ('{"prompt": "a", "answer": 1, "threads": -1}', '"threads" is -1'),
        ("[1]", "line 1: expected an object"),
        ('{"prompt": "a", "answer": null}', 'line 1: "answer" is None; expected a number, or text'),
        ('{"prompt": "a", "answer": " "}', "line 1: \"answer\" is ' '"),
        ('{"prompt": "a", "answer": true}', 'line 1: "answer" is True'),
        ("\n\n", "no problems"),
    ],
)
def test_a_broken_problem_file_names_the_line(tmp_path, lines, said):
    path = tmp_path / "p.jsonl"
    path.write_text(lines)
    with pytest.raises(ValueError, match=r"p\.jsonl") as caught:
        read_problems(path)
    assert said in str(caught.value)


def test_a_problem_file_is_read_whole(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text(
        '{"prompt": "a", "answer": 5, "threads": 2, "family": "f", "x": 1}\n\n{"prompt": "b", "answer": "c"}\n'
    )
    assert read_problems(path) == [Problem("a", "5", 2, "f", {"x": 1}), Problem("b", "c", None, "", {})]


def test_counts_ratios_and_differences_are_those_of_the_results():
    problems = [Problem("a", "1", 2, "even"), Problem("b", "2", 0, "odd"), Problem("c", "3", 3, "odd")]
    forked = {"a": ("=1", 2, 0, 100, 40), "b": ("=2", 0, 0, 50, 50), "c": ("=9", 2, 1, 90, 30)}
    one_by_one = {"a": ("=1", 2, 0, 100, 100), "b": ("=2", 0, 0, 50, 50), "c": ("=3", 3, 0, 90, 90)}
    engine = Canned(forked, one_by_one)
    seen = []
    out = evaluate(
        engine, problems, ThreadWeaver(), modes=["forked", "sequential"], batch=2, timed=3,
        report=lambda *a: seen.append(a),
    )  # fmt: skip
    f = out["modes"]["forked"]
    assert (f["right"], f["malformed"], f["forked"]) == (2, 1, 2)
    assert f["token_speedup_where_forked"] == pytest.approx(190 / 70)  # the one that did not fork does not count
    assert f["threads_right"] == pytest.approx(2 / 3)
    assert f["by_family"] == {"even": "1/1", "odd": "1/2"}
    assert out["modes"]["sequential"]["accuracy"] == 1.0
    assert out["forked_minus_sequential"]["difference"] == pytest.approx(-1 / 3)
    assert [w["prompt"] for w in out["wrong"]] == ["c"]
    assert out["timed"]["forked"] == 2 and out["timed"]["overhead"] == pytest.approx(0.03 / 0.93)
    assert seen[-1] == ("timed", 3, 3) and ("forked", 3, 3) in seen
    assert all(how["do_sample"] is False for _, _, how in engine.calls)
    json.dumps(out)


def test_what_cannot_be_run_is_refused_before_it_starts():
    engine = Canned({}, {})
    for arguments, said in [
        (dict(problems=[], strategy=ThreadWeaver()), "problems: none"),
        (dict(problems=[Problem("a", "1")], strategy=None), "without a strategy"),
        (dict(problems=[Problem("a", "1")], strategy=None, modes=["backwards"]), "backwards"),
    ]:
        with pytest.raises(ValueError, match=said):
            evaluate(engine, **arguments)
    assert not engine.calls


def test_a_model_without_the_tags_runs_plain():
    engine = ab.Engine(make_model("llama"), byte_tokenizer(), num_pages=64)
    out = evaluate(
        engine, [Problem("ab", "x"), Problem("cd", "y")], None, modes=["plain"], max_new_tokens=4, chat=False
    )
    assert out["modes"]["plain"]["total_tokens"] == 8 and out["modes"]["plain"]["forked"] == 0
    assert cli.strategy_for(engine.tokenizer) is None
    report = {"model": "tiny", "file": "f", "machine": "m", "dtype": "float32", **out}
    assert cli.table(report).row_count == 1 and cli.remarks(report)


def test_intervals_hold_what_they_should_when_problems_are_drawn_again():
    pairs = [(2.0, 1.0)] * 30 + [(3.0, 1.0)] * 10
    low, high = bootstrap(pairs, ratio_of_sums)
    assert 2.0 < low < 2.25 < high < 2.6
