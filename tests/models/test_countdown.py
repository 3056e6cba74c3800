"""The Countdown traces: right, split, token for token what `ab.APR` shows a model."""

from __future__ import annotations

import json
import random

import pytest
import torch
from engine_kit import Recorder, assert_nothing_held
from taught_kit import Teacher, tiny_llama
from training.countdown.problems import FILE
from training.countdown.score import Run, gap, shares, written_out
from training.countdown.search import Problem, combine, draw, expression, is_right, split_of, steps, targets
from training.countdown.tokens import PHRASES, make_tokenizer, vocabulary
from training.countdown.traces import drill, lines, row, search

import anabranch as ab
from anabranch.training import IGNORE

TOKENIZER = make_tokenizer()
EASY = Problem((2, 6, 11, 13), 27)
NO_ANSWER = Problem((20, 19, 18, 17), 30)
ANSWER = Problem((20, 19, 18, 17), 29)


def some(count: int, size: int = 4, split: str = "train", ways: int | None = 2) -> list[Problem]:
    rng = random.Random(f"{size} {split}")
    return [draw(rng, split, size, ways=ways) for _ in range(count)]


# ------------------------------------------------------------------------------------------------ problems


def test_steps_are_right_and_keep_to_the_range():
    assert combine(3, 9) == [("+", 12), ("-", 6), ("*", 27), ("/", 3)]
    assert combine(5, 5) == [("+", 10), ("*", 25), ("/", 1)] and combine(1, 30) == [("-", 29)]
    for problem in some(20):
        for step in steps(problem.numbers):
            assert step.a >= step.b and 1 <= step.value <= 30 and step.rest[-1] == step.value
            assert eval(f"{step.a}{step.op}{step.b}") == step.value
            assert sorted([*step.rest[:-1], step.a, step.b]) == sorted(problem.numbers)


def test_few_first_steps_lead_to_a_hard_problems_answer():
    for problem in some(20):
        assert 1 <= len(targets(problem.numbers)[problem.target]) <= 2
        children = search(problem).children
        assert {i for i, c in enumerate(children) if c.path} == targets(problem.numbers)[problem.target]


def test_splits_are_disjoint_whatever_the_order():
    drawn = {split: some(30, 3, split, None) for split in ("train", "dev", "test")}
    for name, problems in drawn.items():
        for p in problems:
            assert split_of(p) == split_of(Problem(p.numbers[::-1], p.target)) == name
    committed = [json.loads(line) for line in FILE.read_text().splitlines()]
    assert len({x["prompt"] for x in committed}) == len(committed) >= 300
    for x in committed:
        problem = Problem(tuple(x["numbers"]), x["target"])
        assert split_of(problem) == "test" and x["prompt"] == ab.APR.prompt(problem.target, problem.numbers)
        assert x["threads"] == len(search(problem).children)


def test_the_verdict_is_of_an_expression():
    pytest.importorskip("reasoning_gym", reason="scores the answers")
    problem = Problem((53, 22, 4, 26), 1)
    path = "53-22=31, 31-4=27, 27-26=1 Goal Reached"
    assert expression(path, problem) == "(((53-22)-4)-26)" and is_right(path, problem)
    assert not is_right(path.replace("=27", "=28"), problem)  # the next step takes a number that is not there
    assert not is_right(path.replace("27-26=1", "27+26=1"), problem)  # a wrong sum
    assert not is_right("53-22=31, 31-4=27", problem) and not is_right(None, problem)
    assert not is_right("53-22=31, 31-22=9, 27-26=1", problem)  # a number twice


# ------------------------------------------------------------------------------------------------ traces


def test_lines_of_a_search_of_three_numbers():
    text, path = lines((6, 2, 11), 30, ("13-2=11",))
    assert text.startswith("\n6+2=8,11:+19-3\n6-2=4,11:+15-7\n6*2=12,11:+23-1\n6/2=3,11:+14-8\n") and path is None
    assert text.endswith("\n11*2=22,6:+28-16")
    assert lines((6, 2, 11), 7, ()) == ("\n6+2=8,11:+19-3\n6-2=4,11:+15-7", "6-2=4, 11-4=7 Goal Reached")


@pytest.mark.parametrize("serially", [False, True])
def test_the_traces_lead_to_right_answers(serially):
    pytest.importorskip("reasoning_gym", reason="scores the answers")
    for problem in [*some(20), *some(20, size=3, ways=None)]:
        assert is_right(search(problem, serially).path, problem)
    assert search(NO_ANSWER, serially).path is None


# ------------------------------------------------------------------------------------------------ tokens


def test_the_tokenizer_is_exact():
    assert TOKENIZER.get_vocab() == {token: i for i, token in enumerate(vocabulary())}
    for phrase in PHRASES:
        assert len(TOKENIZER(phrase, add_special_tokens=False)["input_ids"]) == 1
    for problem in (EASY, NO_ANSWER, *some(5)):
        x, y = search(problem), search(problem, serially=True)
        child = x.children[0]
        for text in (x.prompt + x.written + x.calls, x.results + x.rest, y.prompt + y.written, child.prompt):
            ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
            assert TOKENIZER.decode(ids) == text and TOKENIZER.unk_token_id not in ids


# ------------------------------------------------------------------------------------------------ rows and engine


@pytest.fixture(scope="module")
def tiny():
    return tiny_llama("anabranch", len(vocabulary()), positions=2048, bos=None, eos=1)


@pytest.mark.parametrize("serially", [False, True])
@pytest.mark.parametrize("problem", [ANSWER, NO_ANSWER, Problem((6, 2, 11), 7)], ids=str)
def test_the_rows_are_what_the_engine_shows(tiny, problem, serially):
    """Every context that the engine meets is one of a row's; the scores there are those of training."""
    found = search(problem, serially)
    searches = [found, *found.children]
    rows = [row(x, TOKENIZER) for x in searches]
    recorder, teacher = Recorder(), Teacher([(x, x.labels != IGNORE) for x in rows])
    engine = ab.Engine(tiny, TOKENIZER, num_pages=600, page_size=8)
    result = engine.generate(
        ab.APR.prompt(problem.target, problem.numbers, 0 if serially else None),
        strategy=ab.APR(),
        logits_processor=[recorder, teacher],
        max_new_tokens=6000,
    )
    assert_nothing_held(engine)
    assert result.malformed == () and result.answers == found.path
    assert result.metrics.num_threads == len(found.children)
    assert bool(found.children) == (len(problem.numbers) > 3 and not serially)
    longest = max(int(x.position_ids.max()) + 1 for x in rows)
    assert result.metrics.longest_context == longest
    assert {context for context, _ in recorder.seen} == set(teacher.next)  # all that has loss, and nothing else
    with torch.no_grad():
        scores = [tiny(**x.batch("all") | {"labels": None}, use_cache=False).logits[0] for x in rows]
    for context, seen in recorder.seen:
        number, i = teacher.row[context]
        torch.testing.assert_close(seen, scores[number][i], atol=2e-4, rtol=2e-4)


def test_a_row_may_be_cut_off():
    whole, cut = (row(search(EASY, serially=True), TOKENIZER, longest) for longest in (None, 40))
    assert cut.num_tokens == 40 and torch.equal(cut.input_ids, whole.input_ids[:40])


def test_drills_ask_for_results_alone():
    x = drill(random.Random(0), TOKENIZER, 3)
    learnt = [TOKENIZER.decode([i]) for i in x.input_ids[x.learnt].tolist()]
    assert "=" not in learnt and "," not in learnt and ":" not in learnt


# ------------------------------------------------------------------------------------------------ score card


def test_a_right_answer_counts_from_the_longest_context_on():
    ours = [Run(True, 300, 12, total_tokens=2000, critical_path_tokens=500), Run(False, 100, 3, True, 900, 90)]
    other = [Run(True, 700, 0, total_tokens=680, critical_path_tokens=680), Run(True, 90, 0, False, 80, 80)]
    perfect = [Run(True, 290, 12), Run(True, 310, 4)]
    found = shares(ours, perfect)
    assert (found["right"], found["threads_right"], found["malformed"], found["total_tokens"]) == (1, 1, 1, 1450)
    assert found["within"][256] == 0 and found["within"][320] == found["within"][1024] == 0.5
    assert found["written_out_within"][256] == 0 and found["written_out_within"][320] == 1
    assert gap(ours, other, 64)[0] == 0 and gap(ours, other, 320)[0] == 0 and gap(ours, other, 1024)[0] == -0.5


def test_the_searches_as_written_out_fit_where_they_should():
    """Sub-searches have the shorter longest context where few first steps lead to the answer, and always find it."""
    for problem in some(10):
        forked, serial = (written_out(problem, serially, TOKENIZER) for serially in (False, True))
        assert forked.right and serial.right and forked.longest_context < 640
        assert forked.threads == len(list(steps(problem.numbers))) and serial.threads == 0
