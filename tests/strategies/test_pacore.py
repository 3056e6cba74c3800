"""PaCoRe: rounds of answers, cut to what follows the thoughts, shuffled into the next round's prompt."""

from __future__ import annotations

import random
import re

import pytest
from engine_kit import byte_tokenizer, make_engine
from systems_kit import Babble, assert_same_everywhere, assert_training_parity, play, survive

import anabranch as ab
from anabranch.strategies.calls.pacore import REQUEST

SHORT = "{question}:{references}"  # the released request is long, and a prompt of a byte a token is slow


def prompt(references, question="q"):
    return f"{question}:" + "".join(f"\nReference {i}:\n{text}\n" for i, text in enumerate(references, 1))


def script(*rounds, last):
    """`rounds`: (prompt, what its answers draw from)."""
    lines = [(asked, says + "<eos>") for asked, drawn in rounds for says in drawn]
    return [*lines, last]


def test_one_round_then_the_answer():
    drawn = ("<think>x</think>one", "<think>yy</think>three", "no thoughts")
    for seed in range(20):  # whichever of them the four threads draw
        lines = [("q", says + "<eos>") for says in drawn]
        kept = [says.rpartition("</think>")[2] for says in drawn]
        orders = set()
        for mix in range(3**4):
            picked = sorted((kept[mix // 3**i % 3] for i in range(4)), key=len)
            random.Random(42).shuffle(picked)
            orders.add(tuple(picked))
        lines += [(prompt(order), "<think>z</think>7<eos>") for order in orders]
        result, compared = play(ab.PaCoRe(request=SHORT), "q", *lines, seed=seed)
        assert result.text == "<think>z</think>7" and tuple(result.answers[0]) in orders
        if len(set(result.answers[0])) == 3:
            break
    *kids, last = result.tree.children
    assert [(kid.role, kid.fate) for kid in kids] == [("fork", "discarded")] * 4 and kids[0].start == 1
    assert ab.PaCoRe().rounds == (4,) and ab.PaCoRe().shuffle_seed == 42
    assert (last.role, last.start, last.fate) == ("fresh", 0, "joined")
    assert byte_tokenizer().decode(last.runs[0].token_ids) == prompt(result.answers[0])
    # The threads' rows and the last answer's; its copy in the trunk is never computed.
    assert compared == result.metrics.sampled_tokens
    longest = max(len(kid.token_ids) for kid in kids)
    assert result.metrics.critical_path_tokens == longest + len("<think>z</think>7") + 1


def test_rounds_see_the_references_of_the_one_before_alone():
    strategy = ab.PaCoRe(rounds=(3, 2), request=SHORT)
    second = prompt(["a"] * 3)
    lines = script(("q", ["<think>t</think>a"]), (second, ["b"]), last=(prompt(["b", "b"]), "c<eos>"))
    result, _ = play(strategy, "q", *lines)
    assert result.text == "c" and result.answers == [["a"] * 3, ["b"] * 2]
    controller = result.tree.children[3]
    assert [kid.id for kid in controller.children] == ["0.3.0", "0.3.1"] and controller.role == "fresh"


def test_the_released_request():
    text = REQUEST.replace("{question}", "Q").replace("{references}", "\nReference 1:\nR\n")
    assert text.startswith("You are given a problem and a list of reference responses. ")
    assert "\n\nOriginal Problem:\nQ\n\nReference Responses:\n\nReference 1:\nR\n\n\nNow, based on the original" in text
    assert text.endswith("please provide your own comprehensive solution.")


def test_an_empty_answer_is_left_out():
    result, _ = play(ab.PaCoRe(rounds=(2,), request=SHORT), "q", ("q", "<think>x</think><eos>"))
    assert result.answers == [[]] and len(result.malformed) == 2  # and the question was asked again
    assert result.text == "<think>x</think>"


def test_a_chat_keeps_what_stands_before_the_question():
    chat = [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}]
    engine = make_engine(tokenizer=byte_tokenizer(), num_pages=900)
    result = engine.generate(chat, strategy=ab.PaCoRe(rounds=(2,), request=SHORT, answer_tokens=3), max_new_tokens=20)
    asked = byte_tokenizer().decode(result.tree.children[2].runs[0].token_ids)
    assert re.fullmatch(r"\[system\]S\[user\]Q:(\nReference \d:\n.*\n)*\[a\]", asked, re.DOTALL)


def test_every_row_equals_training():
    lines = script(("q", ["ab"]), last=(prompt(["ab", "ab"]), "c<eos>"))
    assert_training_parity(ab.PaCoRe(rounds=(2,), request=SHORT), "q", *lines)


PIECES = ("<think>", "</think>")
BABBLE = Babble(PIECES, {"a": ["a", "b", "</think>"], "b": ["a", "</think>"], "<think>": ["a", "</think>"]}, eos=0.1)
SMALL = ab.PaCoRe(rounds=(3, 2), request=SHORT, answer_tokens=12)


def test_the_same_seed_gives_the_same_tree():
    assert_same_everywhere(SMALL, [f"{n}a" for n in range(16)], BABBLE, *PIECES, pages=60)


def test_malformed_generations():
    results = survive(SMALL, lambda seed: f"{seed}a", BABBLE, *PIECES, count=200)
    assert {r.metrics.format_correctness for r in results} == {0.0, 1.0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounds": ()}, r"PaCoRe: rounds=\(\); pass the answers of each round"),
        ({"rounds": (4, 0)}, r"PaCoRe: rounds\[1\]=0"),
        ({"temperature": -1}, "PaCoRe: temperature: must be positive"),
        ({"request": "{question}"}, "request does not hold {references}"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        ab.PaCoRe(**options)
