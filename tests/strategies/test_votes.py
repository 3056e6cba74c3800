"""Votes over answers that are the same by what they mean, early or late, and what `eval` makes of the same texts."""

from __future__ import annotations

import itertools
import random

import pytest
from engine_kit import assert_nothing_held, byte_tokenizer, make_engine
from strategies_kit import Says

import anabranch as ab
from anabranch.strategies import EntropyFork, SelfConsistency
from anabranch.strategies.api.ops import Ended
from anabranch.strategies.api.voting import Ballot, answer_in, decided, majority


def end(text):
    return Ended("eos", (), text, None, ())


@pytest.mark.parametrize(
    ("answers", "classes"),
    [
        ([r"\frac{1}{2}", "0.5", "1/2", ".5", r"50\%", r"\dfrac12"], [0] * 6),
        (["1,234", "1234", "1{,}234", "1, 234"], [0, 0, 0, 1]),
        (["3-5", "-5", "\u22125", "5"], [0, 1, 1, 2]),
        (["B", "(B)", r"\text{B}", "B. A common mistake", "A"], [0, 0, 0, 0, 1]),
        (["x=5", "5", "5.0", "6"], [0, 0, 0, 1]),
        (["5 cm", "5", r"5\text{ cm}", "5"], [0, 0, 0, 0]),
        (["5 cm", "5", "5 m", "5 m"], [0, 1, 2, 2]),
        (["1, 2", "2, 1", r"\{1,2\}", "(1,2)", "(2,1)"], [0, 0, 0, 1, 2]),
        (["(x+1)^2", "x^2+2x+1", "x^2+1"], [0, 0, 1]),
        ([None, "7", None, "8", "7."], [None, 0, None, 1, 0]),
        ([], []),
    ],
)
def test_boxes_are_sorted_by_what_they_mean(answers, classes):
    assert Ballot(answers, "boxed").classes == classes
    named = Ballot(answers[::-1], "boxed").classes[::-1]  # the same classes in any order
    for i, j in itertools.combinations(range(len(answers)), 2):
        assert (named[i] == named[j]) == (classes[i] == classes[j])


def test_other_votes_are_sorted_by_equality():
    assert Ballot(["1/2", "0.5", "1/2"], r"\S+").classes == [0, 1, 0]
    assert Ballot([[1], [2], [1]], len).classes == [0, 1, 0]  # need not be hashable
    assert majority([[2], [1], [1]], len) == 1 and majority([None, None], "boxed") == 0


def test_the_winner_is_the_first_of_the_largest_class():
    assert majority(["7", r"\frac12", "0.5", "7.0", "1/2"], "boxed") == 1
    assert majority(["7", "1/2", "7.0", "0.5"], "boxed") == 0  # a tie: the earlier


def test_a_decided_vote_stays_decided_whatever_comes():
    rng = random.Random(0)
    pool = ["5", "5.0", "5 cm", "5 m", "x=5", "6", "6 cm", r"\frac{12}{2}", None]
    early = 0
    for _ in range(600):
        found = rng.choices(pool, k=rng.randint(1, 8))
        missing = rng.randint(0, 2)
        if not decided(found, missing, "boxed"):
            continue
        early += missing > 0
        ballot = Ballot(found, "boxed")
        winners = [i for i, c in enumerate(ballot.classes) if c == ballot.classes[ballot.winner()]]
        for _ in range(20):
            more = Ballot([*found, *rng.choices([*pool, "9"], k=missing)], "boxed")
            assert more.winner() in winners or more.classes[more.winner()] in {more.classes[i] for i in winners}
    assert early > 20


def test_readers_by_name_and_by_pattern():
    assert SelfConsistency(vote="boxed").answer(end(r"so \boxed{\frac{1}{2}}")) == r"\frac{1}{2}"
    assert SelfConsistency(vote="boxed").answer(end(r"so \boxed{\frac{1}{2}")) is None
    assert SelfConsistency(vote="number").answer(end("from 3-5")) == "5"
    assert SelfConsistency(vote="letter").answer(end("B. A common mistake")) == "B"
    assert SelfConsistency(vote="line").answer(end("one\n two \n\n")) == "two"
    assert SelfConsistency(vote="line").answer(end(" \n")) is None
    assert answer_in("b", "(a)|b", "t") is None  # the group took no part
    assert answer_in("xx", "y*", "t") is None  # nothing matched is no answer
    assert answer_in("a1 a2", r"a(\d)", "t") == "2"


class Opens(Says):
    """Each branch draws its first letter, and then says what that letter stands for."""

    def __init__(self, lines, letters):
        super().__init__(lines)
        self.letters = [byte_tokenizer()(c)["input_ids"][0] for c in letters]

    def __call__(self, input_ids, scores):
        text = byte_tokenizer().decode(input_ids[0])
        if text.endswith("?"):
            return scores.new_full(scores.shape, -float("inf")).index_fill(
                -1, scores.new_tensor(self.letters).long(), 0.0
            )
        return super().__call__(input_ids, scores)


def test_a_vote_of_an_engine_counts_spellings_together_and_stops_early_alike():
    lines = {"?a": r"\boxed{\frac{1}{2}}", "?b": r" \boxed{0.5}", "?c": r"  \boxed{12}", "?d": r"   \boxed{1/2}"}
    engine = make_engine(tokenizer=byte_tokenizer(), num_pages=800)
    options = dict(logits_processor=[Opens(lines, "abcd")], max_new_tokens=40, top_k=0)
    for seed in range(4):
        whole = SelfConsistency(8, vote="boxed", temperature=None)
        full = engine.generate("?", strategy=whole, seed=seed, **options)
        halves = [a for a in full.answers if a != "12"]
        assert len(set(full.answers)) > 2
        early = engine.generate(
            "?", strategy=SelfConsistency(8, vote="boxed", temperature=None, early_stop=True), seed=seed, **options
        )
        for result in (full, early):
            text = result.text[result.text.index("{") + 1 : -1]
            assert (text == "12") == (len(halves) < 4)
        assert_nothing_held(engine)


def test_entropy_fork_weighs_spellings_together():
    lines = {"?a": r"\boxed{\frac{1}{2}}", "?b": r" \boxed{0.5}", "?c": r"  \boxed{12}"}
    engine = make_engine(tokenizer=byte_tokenizer(), num_pages=800)
    strategy = EntropyFork(threshold=-1.0, n=6, vote="boxed")
    result = engine.generate(
        "?", strategy=strategy, logits_processor=[Opens(lines, "abc")], max_new_tokens=40, top_k=0, seed=0
    )
    ballot = Ballot(result.answers, "boxed")
    assert len(result.answers) == 6 and len(set(ballot.classes)) <= 2
    assert_nothing_held(engine)


def test_votes_and_eval_read_alike():
    from anabranch.evaluation.evaluate import is_right

    texts = [r"\boxed{1{,}234}", "1234 it is, \\boxed{1,234}", r"\boxed{1, 234}", r"\boxed{3-5}"]
    assert [is_right(t, "1234") for t in texts] == [True, True, False, False]
    read = [answer_in(t, "boxed", "t") for t in texts]
    assert [Ballot([r, "1234"], "boxed").classes == [0, 0] for r in read] == [True, True, False, False]
    assert ab.SelfConsistency(4, vote="boxed").vote == "boxed"
