"""LeaP: paths that summarize what they have, and read what the most different of their peers found."""

from __future__ import annotations

import difflib
import random

import pytest
from engine_kit import make_engine
from systems_kit import Babble, assert_same_everywhere, assert_training_parity, play, survive

import anabranch as ab
from anabranch.strategies.calls.leap import ASK, LeaP, similarity

SMALL = {"request": "<summarize>", "comment": "[{peers}]", "final": "!", "vote": "number"}


def told(*peers):
    return "[" + "\n".join(f'Peer {i}: "{peer}"' for i, peer in enumerate(peers, 1)) + "]"


CUT = "q" + "ab" + "\n\n<summarize>"
AFTER = CUT + "s</summarize>" + told("s")
TURNS = [("q", "ab\n\ncdefgh"), (CUT, "s</summarize>"), (AFTER, "4</think>")]


def test_a_turn_a_summary_and_what_the_peers_said():
    """Both paths have one context, so they say the same: what a path is told is the other's summary."""
    result, _ = play(LeaP(paths=2, turns=2, turn_tokens=10, **SMALL), "q", *TURNS)
    assert result.text == (AFTER + "4</think>")[1:] and result.answers == ["4", "4"] and result.malformed == ()
    kid = result.tree.children[0]
    assert [run.kind for run in kid.runs] == ["sampled", "inserted", "sampled", "inserted", "sampled"]
    assert len(kid.forgotten) == 1  # the paragraph that was begun


def test_every_row_equals_training():
    assert_training_parity(LeaP(paths=2, turns=2, turn_tokens=10, **SMALL), "q", *TURNS)


def test_the_least_similar_peers_are_heard_or_the_most():
    summaries = ["abcd", "abce", "xyz", "abxy"]
    scores = [similarity("abcd", s) for s in summaries[1:]]
    assert sorted(scores) == [scores[1], scores[2], scores[0]]
    for router, peers in (
        ("dispersed", ("xyz", "abxy")),
        ("clustered", ("abce", "abxy")),
        (None, tuple(summaries[1:])),
    ):
        strategy = LeaP(router=router, **SMALL)
        assert strategy._comment(0, summaries) == told(*peers)
    assert LeaP(peers=1, **SMALL)._comment(0, summaries) == told("xyz")
    assert "No comments" in LeaP(**SMALL)._comment(0, ["alone"])


def test_similarity_is_that_of_insertions_and_deletions():
    def slow(a, b):
        row = [0] * (len(b) + 1)
        for x in a:
            last = 0
            for j, y in enumerate(b, 1):
                row[j], last = (last + 1 if x == y else max(row[j], row[j - 1])), row[j]
        return 2 * row[-1] / (len(a) + len(b)) if a or b else 1.0

    rng = random.Random(0)
    for _ in range(200):
        a, b = ("".join(rng.choices("abc", k=rng.randrange(12))) for _ in range(2))
        assert similarity(a, b) == pytest.approx(slow(a, b))
        assert similarity(a, b) >= difflib.SequenceMatcher(None, a, b).ratio() - 1e-9  # which need not find the longest


def test_what_is_not_through_is_made_to_answer():
    strategy = LeaP(paths=1, turns=1, turn_tokens=2, summary_tokens=2, **SMALL)
    result, _ = play(strategy, "q", ("q", "ab"), ("qab!", "78"))
    assert result.text == "ab!78" and result.answers == ["78"]


@pytest.mark.parametrize(("says", "stays"), [("sum<eos>", "sum"), ("sum</think>", "sum"), ("summarized", "summar")])
def test_a_summary_that_is_not_closed(says, stays):
    strategy = LeaP(paths=1, turns=2, turn_tokens=2, summary_tokens=6 if says == "summarized" else 20, **SMALL)
    after = f"qab\n\n<summarize>{stays}... </summarize>"
    alone = " <comment> No comments </comment>\n\nHmm, there are no comments, so let's continue reasoning."
    lines = [("q", "ab"), ("qab\n\n<summarize>", says), (after + alone, "3<eos>")]
    result, _ = play(strategy, "q", *lines)
    assert result.text == (after + alone + "3")[1:] and len(result.malformed) == 1


def test_as_released():
    strategy = ab.LeaP()
    assert (strategy.paths, strategy.turns, strategy.turn_tokens, strategy.summary_tokens) == (4, 5, 2048, 256)
    assert (strategy.peers, strategy.router) == (2, "dispersed") and ASK.count("<summarize>") == 1


PIECES = ("<summarize>", "</summarize>", "</think>", "\n\n")
USUAL = {"a": ["a", "1", "\n\n", "b"], "b": ["a", "</summarize>", "</think>"], "1": ["a", "</think>", "</summarize>"]}
BABBLE = Babble(PIECES, USUAL)
BABBLED = LeaP(paths=3, turns=3, turn_tokens=8, summary_tokens=6, **SMALL)


def test_the_same_seed_gives_the_same_tree():
    assert_same_everywhere(BABBLED, [f"{n}a" for n in range(16)], BABBLE, *PIECES, pages=70)


def test_malformed_generations():
    results = survive(BABBLED, lambda seed: f"{seed}a", BABBLE, *PIECES, count=200)
    assert {r.metrics.format_correctness for r in results} == {0.0, 1.0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"turns": 0}, "LeaP: turns=0"),
        ({"router": "near"}, "LeaP: router='near'; pass 'dispersed', 'clustered' or None"),
        ({"comment": "x"}, "LeaP: comment does not hold {peers}"),
        ({"vote": None}, "LeaP: vote=None"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        ab.LeaP(**options)


def test_without_a_tokenizer():
    with pytest.raises(ValueError, match="needs a tokenizer"):
        make_engine().generate([1, 2, 3], strategy=ab.LeaP())
