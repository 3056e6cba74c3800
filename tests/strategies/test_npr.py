"""NPR to the token: traces written by hand, both position rules, what ends the answer and what decodes on."""

from __future__ import annotations

import dataclasses

import formats_kit
import pytest
from engine_kit import byte_tokenizer, make_engine
from malformed_kit import Habits, assert_same_everywhere, assert_survives, bad_outlines
from tagged_kit import Stage

import anabranch as ab

STAGE = Stage(ab.NPR().tags)
PLAIN = ab.NPR(repetition_penalty=1.0)  # scores as the model gave them, so that they can be compared


def guideline(*ids: str) -> str:
    return "<guideline>" + "".join(f"<plan>{i}: x</plan>" for i in ids) + "</guideline>"


def step(name: str, says: str, kept: str = "\n") -> str:
    return f"<step>\n{name}:{says}</step>{kept}"


def block(begin: str, steps: dict[str, str], kept: str = "\n") -> list[tuple[str, str]]:
    """Lines of a block: what stands before the steps, and what each says, with what is kept behind it."""
    return [(f"{begin}\n<step>\n{name}:", f"{says}</step>{kept}") for name, says in steps.items()]


def joined(head: str, steps: dict[str, str]) -> str:
    return head + "\n" + "".join(step(*s) for s in steps.items()) + "<takeaway>\n"


HEAD = guideline("1", "2")
STEPS = {"1": " a is 4.", "2": " b is 25, I think."}
AGAIN = "so</takeaway>\n" + guideline("1", "2", "3")
MORE = {"1": "x", "2": "yyyyy", "3": "z"}
BOTH = joined(joined(HEAD, STEPS) + AGAIN, MORE)
END = "29</takeaway>\n29.<eos>"
TWO = [
    ("q", HEAD),
    *block("q" + HEAD, STEPS),
    ("q" + joined(HEAD, STEPS), AGAIN),
    *block("q" + joined(HEAD, STEPS) + AGAIN, MORE),
    ("q" + BOTH, END),
]


def play(prompt, *lines, strategy=PLAIN, **options):
    return STAGE.play(prompt, *lines, strategy=strategy, **options)


def size(text: str) -> int:
    return len(STAGE.ids(text))


def test_a_trace_written_by_hand_as_released():
    result = play("q", *TWO)
    assert result.token_ids == STAGE.ids(BOTH + END) and result.malformed == ()
    base = size("q" + HEAD) - 1
    # The newline stands on base + 1, each step on base + 2; the takeaway behind the furthest step's kept token.
    takeaway = base + 2 + size(step("2", STEPS["2"]))
    again = takeaway + size("<takeaway>\n" + AGAIN) - 1
    last = again + 2 + size(step("2", MORE["2"]))
    assert [kid.start for kid in result.tree.children] == [base + 2] * 2 + [again + 2] * 3
    assert STAGE.placed(result) == [
        ("q" + HEAD + "\n" + step("1", STEPS["1"]), 0),
        (step("2", STEPS["2"]) + "<takeaway>\n" + AGAIN + "\n" + step("1", "x"), base + 2),
        (step("2", MORE["2"]), again + 2),
        (step("3", "z"), again + 2),
        ("<takeaway>\n" + END, last),
    ]
    assert result.metrics.rows == 1 + result.metrics.total_tokens - 1  # nothing is computed again


def test_positions_as_in_training():
    result = play("q", *TWO, strategy=dataclasses.replace(PLAIN, positions="training"))
    assert result.token_ids == STAGE.ids(BOTH + END) and result.malformed == ()
    base = size("q" + HEAD) - 1
    m = size(step("2", STEPS["2"], kept=""))  # of </step>, from base
    again = base + m + size("<takeaway>\n" + AGAIN)
    assert [kid.start for kid in result.tree.children] == [base + 1] * 2 + [again + 1] * 3
    assert STAGE.placed(result) == [
        ("q" + HEAD + "\n", 0),
        (step("1", STEPS["1"]), base + 1),  # shares the newline's position
        (step("2", STEPS["2"]), base + 1),
        ("<takeaway>\n" + AGAIN + "\n", base + m + 1),  # shares that of what was kept behind the furthest step
        (step("1", "x"), again + 1),
        (step("2", MORE["2"]), again + 1),
        (step("3", "z"), again + 1),
        ("<takeaway>\n" + END, again + size(step("2", MORE["2"], kept="")) + 1),
    ]


def test_a_trace_in_training_positions_replays(tmp_path):
    result = play("q", *TWO, strategy=dataclasses.replace(PLAIN, positions="training"), exact=False)
    ab.records.trace.save(result, tmp_path / "trace.json")
    again = ab.replay(ab.records.trace.load(tmp_path / "trace.json"), STAGE.engine())
    assert STAGE.placed(again) == STAGE.placed(result)
    assert max(abs(a - b) for a, b in ab.engine.logprob_pairs(result, again)) < 1e-3


def test_a_step_may_hold_a_guideline_of_its_own():
    inner = "in " + guideline("1.1", "1.2")
    first = "q" + HEAD + "\n<step>\n1:"
    deep = {"1.1": "x", "1.2": "yyy"}
    said = joined(inner, deep) + "c</takeaway>."
    whole = joined(HEAD, {"1": said, "2": "z"})
    lines = [
        ("q", HEAD),
        (first, inner),
        *block(first + inner, deep),
        (first + joined(inner, deep), "c</takeaway>.</step>\n"),
        *block("q" + HEAD, {"2": "z"}),
        ("q" + whole, END),
    ]
    result = play("q", *lines)
    assert result.token_ids == STAGE.ids(whole + END) and result.malformed == ()
    assert [node.id for node in result.tree.walk()] == ["0", "0.0", "0.0.0", "0.0.1", "0.1"]
    # Without nesting, as in training, the inner guideline is plain text.
    flat = joined(HEAD, {"1": inner + ".", "2": "z"})
    lines = [("q", HEAD), *block("q" + HEAD, {"1": inner + ".", "2": "z"}), ("q" + flat, END)]
    result = play("q", *lines, strategy=dataclasses.replace(PLAIN, nested=False))
    assert result.token_ids == STAGE.ids(flat + END) and len(result.tree.children) == 2


def test_a_repetition_penalty_holds_inside_steps_alone():
    """Every score of a step's rows is the dense one after the penalty, every score of the trunk's the dense one."""
    import torch
    from engine_kit import Dense, Recorder
    from tagged_kit import Script
    from transformers import RepetitionPenaltyLogitsProcessor

    recorder, engine = Recorder(), STAGE.engine()
    result = engine.generate(
        "q", strategy=ab.NPR(), logits_processor=[recorder, Script(STAGE.tokenizer, *TWO)], max_new_tokens=3000
    )
    dense, steps = Dense(result, "llama"), 0
    penalty = RepetitionPenaltyLogitsProcessor(1.02)
    for context, scores in recorder.seen:
        expected = dense.by_context[context]
        tags = STAGE.text(context)
        if tags.rfind("<step>") > tags.rfind("<takeaway>"):
            expected, steps = penalty(torch.tensor([context]), expected[None])[0], steps + 1
        torch.testing.assert_close(scores, expected, atol=2e-4, rtol=2e-4)
    assert steps == sum(len(STAGE.ids(says)) + 2 for says in (*STEPS.values(), *MORE.values()))


# ------------------------------------------------------------------------------------------------ what goes wrong


@pytest.mark.parametrize(
    ("says", "why"),
    [
        ("<guideline></guideline>", "</guideline> without any outline id; ended there"),
        ("<guideline><plan>x</plan></guideline>", "</guideline> without any outline id; ended there"),
        ("text</guideline>", "</guideline> without any outline id; ended there"),
        (guideline(*"123456"), "6 outlines, more than 5; ended there"),
        (guideline(*"112233"), "6 outlines, more than 5; ended there"),
        ("<guideline>text</step>", "</step> outside a thread; ended there"),
    ],
)
def test_what_ends_the_answer(says, why):
    result = play("q", ("q", says))
    assert result.token_ids == STAGE.ids(says) and not result.tree.children
    assert result.malformed[0] == f"thread 0: {why}"


def test_a_guideline_in_the_prompt_or_before_the_last_block_does_not_count():
    opened = "<guideline><plan>1: x</plan>"
    result = play("q" + opened, ("q" + opened, "</guideline>"))
    assert result.malformed[0] == "thread 0: </guideline> without any outline id; ended there"
    lines = [*TWO[:3], ("q" + joined(HEAD, STEPS), "so</takeaway></guideline>")]
    result = play("q", *lines)
    assert result.token_ids == STAGE.ids(joined(HEAD, STEPS) + "so</takeaway></guideline>")


def test_what_ends_the_answer_ends_a_step_inside_one():
    steps = {"1": "a", "2": "b"}
    whole = HEAD + "\n<step>\n1:<guideline></guideline>" + step("2", "b") + "<takeaway>\n"
    lines = [("q", HEAD), ("q" + HEAD + "\n<step>\n1:", "<guideline></guideline>")]
    result = play("q", *lines, *block("q" + HEAD, {"2": steps["2"]}), ("q" + whole, END))
    assert result.token_ids == STAGE.ids(whole + END)
    assert result.malformed[1:3] == (
        "thread 0.0: </guideline> without any outline id; ended there",
        "thread 0.0: ended by stop without </step>; left open",
    )


def test_with_fewer_than_1024_tokens_left_a_fork_is_refused_and_decoding_goes_on():
    says = HEAD + " alone<eos>"
    result = play("q", ("q", says), max_new_tokens=size(HEAD) + 1023)
    assert result.token_ids == STAGE.ids(says) and not result.tree.children
    assert result.malformed[0] == "thread 0: a fork with 1023 tokens left, fewer than 1024; refused"
    assert len(play("q", *TWO, max_new_tokens=size(HEAD + AGAIN) + 1200).tree.children) >= 2
    # What the model writes by itself then ends the answer at its first </step>.
    result = play("q", ("q", HEAD + step("1", "a")), max_new_tokens=500)
    assert result.token_ids == STAGE.ids(HEAD + step("1", "a", kept=""))


def test_a_step_ends_with_the_budget_that_counts_its_siblings():
    head = guideline("1", "2", "3")
    strategy = dataclasses.replace(PLAIN, min_left=10, reserve=20)
    most = size(head) + 60
    begin = size(head + "\n<step>\n1:")
    # (context − prompt) + own · 3 ≥ most − 20
    own = -(-(most - 20 - begin) // 3)
    lines = [("q" + f"{head}\n<step>\n{i}:", "a" * 100) for i in "123"]
    whole = head + "\n" + "".join(f"<step>\n{i}:" + "a" * own for i in "123") + "<takeaway>\n"
    result = play("q", ("q", head), *lines, ("q" + whole, "so</takeaway>"), strategy=strategy, max_new_tokens=most)
    assert [len(kid.token_ids) for kid in result.tree.children] == [size("<step>\n1:") + own] * 3
    assert [kid.ended for kid in result.tree.children] == ["length"] * 3
    # The context is past its budget then, so the answer ends there.
    assert result.token_ids == STAGE.ids(whole)
    assert result.malformed[1:4] == tuple(f"thread 0.{i}: ended by length without </step>; left open" for i in range(3))


def test_a_step_that_meets_eos_is_left_open():
    whole = HEAD + "\n<step>\n1:a" + step("2", "b") + "<takeaway>\n"
    lines = [("q", HEAD), ("q" + HEAD + "\n<step>\n1:", "a<eos>"), *block("q" + HEAD, {"2": "b"}), ("q" + whole, END)]
    result = play("q", *lines)
    assert result.token_ids == STAGE.ids(whole + END)
    assert result.malformed[1] == "thread 0.0: ended by eos without </step>; left open"


def test_what_is_kept_behind_a_step_is_whatever_was_sampled():
    whole = HEAD + "\n" + step("1", "a", kept="</step>") + step("2", "b", kept=" ") + "<takeaway>\n"
    lines = [*block("q" + HEAD, {"1": "a"}, kept="</step>"), *block("q" + HEAD, {"2": "b"}, kept=" ")]
    result = play("q", ("q", HEAD), *lines, ("q" + whole, END))
    assert result.token_ids == STAGE.ids(whole + END)


# ------------------------------------------------------------------------------------------------ the same everywhere

HABITS = Habits(
    ab.NPR().tags,
    ["<guideline>"],
    bad_outlines("<plan>{id}: a</plan>", "</guideline>"),
    formats_kit.NPR,
)
SMALL = ab.NPR(min_left=5, reserve=4)


@pytest.mark.parametrize("positions", ["released", "training"])
def test_alone_in_a_batch_and_after_preemptions_the_tree_is_the_same(positions):
    habits = dataclasses.replace(HABITS, scripts=HABITS.scripts[:6])
    strategy = dataclasses.replace(SMALL, positions=positions, reserve=None)
    assert_same_everywhere(strategy, habits, num_pages=60)


@pytest.mark.parametrize(("positions", "runs"), [("released", 300), ("training", 100)])
def test_malformed_generations_are_survived(positions, runs):
    told = assert_survives(dataclasses.replace(SMALL, positions=positions), HABITS, runs)
    assert told["forked"] > runs / 5 and told["malformed"] > runs / 2


@pytest.mark.slow
def test_ten_thousand_malformed_generations_are_survived():
    assert_survives(SMALL, HABITS, 10_000, seed=1)


# ------------------------------------------------------------------------------------------------ bad input


def test_a_tokenizer_without_the_tags_is_told_how_to_add_them():
    with pytest.raises(ValueError, match=r"<guideline>.*add"):
        make_engine(tokenizer=byte_tokenizer()).generate("p", strategy=ab.NPR())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"positions": "dense"}, "NPR: positions='dense'; pass 'released' or 'training'"),
        ({"repetition_penalty": 0}, "NPR: repetition_penalty"),
        ({"reserve": -1}, "NPR: reserve=-1"),
        ({"kept": None}, "NPR: kept=None"),
        ({"max_outlines": 0}, "NPR: max_outlines=0"),
        ({"stray": "raise"}, "NPR: stray='raise'; pass 'text' or 'end'"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        ab.NPR(**options)
