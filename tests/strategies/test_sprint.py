"""SPRINT: an executor at each prompt, on what the planner had written by then, while the planner writes on."""

from __future__ import annotations

import pytest
from engine_kit import make_engine
from systems_kit import Babble, assert_same_everywhere, assert_training_parity, play, survive

import anabranch as ab

ONE, TWO, END = "<Plan_1>a<prompt_1.1>p</prompt_1.1>", " and<prompt_1.2>q</prompt_1.2>", " so</Plan_1>"
PLAN = ONE + TWO + END
RUNS = "<execution_1.1>a long one</execution_1.1>", "<execution_1.2>b</execution_1.2>"
LINES = [
    ("?", PLAN),
    ("?" + ONE + "<execution_1.1>", RUNS[0][15:]),
    ("?" + ONE + TWO + "<execution_1.2>", RUNS[1][15:]),
    ("?" + PLAN + "".join(RUNS), "the answer<eos>"),
]


def test_executors_begin_on_snapshots_and_come_back_in_the_order_of_the_prompts():
    result, compared = play(ab.SPRINT(), "?", *LINES)
    assert result.text == PLAN + "".join(RUNS) + "the answer" and result.malformed == ()
    assert result.answers.text == "the answer"
    first, second = result.tree.children
    assert (first.forked_at, second.forked_at) == (1 + len(ONE), 1 + len(ONE + TWO))
    assert (first.start, second.start) == (first.forked_at, second.forked_at)
    assert (first.text, second.text) == RUNS and (first.fate, second.fate) == ("joined", "joined")
    runs = result.tree.runs  # dense, all of it in sight of what follows
    assert [r.position for r in runs] == [sum(len(q.token_ids) for q in runs[:i]) for i in range(len(runs))]
    assert [r.source for r in runs if r.kind == "joined"] == ["0.0", "0.1"] and not any(r.spliced for r in runs)
    assert compared == result.metrics.sampled_tokens
    assert result.metrics.max_concurrency == 2  # the first was done when the second began


def test_its_own_critical_path_and_ours():
    result, _ = play(ab.SPRINT(), "?", *LINES)
    stage = max(len(ONE) + len(RUNS[0]), len(ONE + TWO) + len(RUNS[1]))
    answer = len("the answer") + 1
    assert result.answers.sequential_tokens == stage + answer
    assert result.metrics.critical_path_tokens == max(stage, len(PLAN)) + answer
    short = [("?", PLAN), (LINES[1][0], "</execution_1.1>"), (LINES[2][0], "</execution_1.2>")]
    done = "<execution_1.1></execution_1.1><execution_1.2></execution_1.2>"
    long = " " * 200
    lines = [("?", ONE + TWO + long + END), *short[1:], ("?" + ONE + TWO + long + END + done, "x<eos>")]
    result, _ = play(ab.SPRINT(), "?", *lines)
    assert result.answers.sequential_tokens == len(ONE + TWO) + 31 + 2  # not what the planner wrote behind its prompts
    assert result.metrics.critical_path_tokens == len(ONE + TWO + long + END) + 2


def test_every_row_equals_training():
    assert_training_parity(ab.SPRINT(), "?", *LINES)


def test_two_stages_and_one_without_prompts():
    again = "<Plan_2><prompt_2.1>r</prompt_2.1></Plan_2>"
    ran = "<execution_2.1>c</execution_2.1>"
    before = "?" + PLAN + "".join(RUNS)
    lines = [*LINES[:3], (before, again), (before + again[: -len("</Plan_2>")] + "<execution_2.1>", ran[15:])]
    lines += [
        (before + again + ran, "<Plan_3>think</Plan_3>"),
        (before + again + ran + "<Plan_3>think</Plan_3>", "x<eos>"),
    ]
    result, _ = play(ab.SPRINT(), "?", *lines)
    assert result.text == PLAN + "".join(RUNS) + again + ran + "<Plan_3>think</Plan_3>x"
    assert result.metrics.threads_per_block == (1, 1, 1) and result.malformed == ()


def test_a_separator_stands_in_front_of_each_execution():
    lines = [(b.replace("<execution", "\n<execution"), s) for b, s in LINES]
    result, _ = play(ab.SPRINT(separator="\n"), "?", *lines)
    assert result.text == PLAN + "\n" + "\n".join(RUNS) + "the answer"


@pytest.mark.parametrize(
    ("says", "why"),
    [
        ("</prompt_1.1>x", "</prompt_1.1> without <prompt_1.1>; kept as plain text"),
        ("</Plan_4>x", "</Plan_4> without <Plan_4>"),
        ("<Plan_1></Plan_1000></Plan_1>x", "</Plan_1000> without <Plan_1000>"),
    ],
)
def test_malformed_marks(says, why):
    lines = [("?", says + "<eos>")]
    result, _ = play(ab.SPRINT(), "?", *lines)
    assert result.text == says and result.malformed[0] == f"thread 0: {why}" and result.metrics.num_threads == 0


def test_a_prompt_given_twice_and_a_stage_that_is_never_closed():
    says = ONE + "<prompt_1.1>z</prompt_1.1>"
    result, _ = play(ab.SPRINT(), "?", ("?", says + "<eos>"), LINES[1])
    assert result.text == says and result.malformed == (
        "thread 0: a second prompt 1.1 in a stage; kept as plain text",
        "thread 0: ended within a stage, whose executions nobody waits for",
    )
    assert result.tree.children[0].fate == "discarded" and result.tree.children[0].text == RUNS[0]


@pytest.mark.parametrize("options", [{}, {"execution_tokens": 3}])
def test_an_execution_that_does_not_end_itself_is_closed(options):
    plan = ONE + "</Plan_1>"
    begun = "?" + ONE + "<execution_1.1>"
    ran = "<execution_1.1>abc</execution_1.1>"
    says = "abcdef" if options else "abc<eos>"
    result, _ = play(ab.SPRINT(**options), "?", ("?", plan), (begun, says), ("?" + plan + ran, "x<eos>"))
    assert result.text == plan + ran + "x" and len(result.malformed) == 1
    assert result.answers.sequential_tokens == len(ONE + ran) + 2


PIECES = (
    "<Plan_1>",
    "</Plan_1>",
    "<prompt_1.1>",
    "</prompt_1.1>",
    "<prompt_2>",
    "</prompt_2>",
    "</execution_1.1>",
    "</prompt_",
)
USUAL = {
    "a": ["a", "b", "<prompt_1.1>", "<prompt_2>", "</Plan_1>", "<Plan_1>"],
    "b": ["</execution_1.1>", "</prompt_1.1>", "a"],
    "<prompt_1.1>": ["</prompt_1.1>", "</prompt_1.1>", "a"],
    "<prompt_2>": ["</prompt_2>", "a"],
    "</prompt_1.1>": ["a", "</Plan_1>", "<prompt_2>"],
    "</prompt_2>": ["a", "</Plan_1>"],
    "<Plan_1>": ["<prompt_1.1>", "a"],
    "</execution_1.1>": ["a"],
    "</prompt_": ["1", ">"],
    ">": ["a", "</execution_1.1>"],
}  # fmt: skip
BABBLE = Babble(PIECES, USUAL, wild=0.05)
SMALL = ab.SPRINT(execution_tokens=12)


def test_the_same_seed_gives_the_same_tree():
    results = assert_same_everywhere(SMALL, [f"{n}a" for n in range(16)], BABBLE, *PIECES, pages=70)
    assert sum(r.metrics.num_threads for r in results) > 16


def babbled(count):
    results = survive(SMALL, lambda seed: f"{seed}a", BABBLE, *PIECES, count=count)
    assert sum(r.metrics.num_threads > 0 for r in results) > count / 4
    assert {r.metrics.format_correctness for r in results} == {0.0, 1.0}


def test_malformed_generations():
    babbled(300)


@pytest.mark.slow
def test_many_malformed_generations():
    babbled(10_000)


def test_bad_input():
    with pytest.raises(ValueError, match="SPRINT: execution_tokens=0"):
        ab.SPRINT(execution_tokens=0)
    with pytest.raises(ValueError, match="SPRINT: separator=None; pass a text"):
        ab.SPRINT(separator=None)
    with pytest.raises(ValueError, match="needs a tokenizer"):
        make_engine().generate([1, 2, 3], strategy=ab.SPRINT())
