"""SSFT: a path for each thinking tag, then a vote."""

from __future__ import annotations

import pytest
from engine_kit import byte_tokenizer, make_engine
from systems_kit import Babble, assert_same_everywhere, assert_training_parity, engine_with, ids, play, survive

import anabranch as ab

TAGS = tuple(f"<think{i}>" for i in range(1, 7))
SAYS = (r"\boxed{1}", r"so \boxed{2}", r"it is 2: \boxed{2.0}", "no idea", r"\boxed{3}", r"\boxed{1")
LINES = [("q" + tag, says + "<eos>") for tag, says in zip(TAGS, SAYS, strict=True)]


def test_paths_share_the_prompt_and_the_most_frequent_answer_wins():
    result, compared = play(ab.SSFT(), "q", *LINES, pieces=TAGS)
    assert result.answers == ["1", "2", "2.0", None, "3", None]
    assert result.text == "<think2>" + SAYS[1] and result.token_ids == ids(result.text + "<eos>", *TAGS)
    kids = result.tree.children
    assert [kid.text for kid in kids] == [tag + says for tag, says in zip(TAGS, SAYS, strict=True)]
    assert {kid.start for kid in kids} == {1}
    assert [kid.fate for kid in kids] == ["discarded", "joined", *["discarded"] * 4]
    assert result.malformed == tuple(f"thread 0.{i}: a path without an answer" for i in (3, 5))
    assert compared == result.metrics.sampled_tokens
    assert result.metrics.critical_path_tokens == max(len(says) for says in SAYS) + 2


def test_every_row_equals_training():
    assert_training_parity(ab.SSFT(), "q", *LINES, pieces=TAGS)


def test_fewer_paths_another_vote_and_limits():
    result, _ = play(ab.SSFT(paths=2, vote="number", path_tokens=8), "q", *LINES, pieces=TAGS)
    assert result.answers == ["1", None] and [kid.ended for kid in result.tree.children] == ["length"] * 2


BABBLE = Babble(TAGS, {"a": ["a", "1", "2", "<think3>"], **{tag: ["a", "1"] for tag in TAGS}})


def test_the_same_seed_gives_the_same_tree():
    assert_same_everywhere(ab.SSFT(vote="number"), [f"{n}" for n in range(16)], BABBLE, *TAGS, pages=90)


def test_malformed_generations():
    results = survive(ab.SSFT(paths=4, vote="number"), lambda seed: f"{seed}", BABBLE, *TAGS, count=200)
    assert {r.metrics.format_correctness for r in results} == {0.0, 1.0}


def test_bad_input():
    with pytest.raises(ValueError, match="SSFT: paths=0"):
        ab.SSFT(paths=0)
    with pytest.raises(ValueError, match="SSFT: vote=None; say how"):
        ab.SSFT(vote=None)
    with pytest.raises(ValueError, match=r"control tag '<think1>' must be one token.*add it"):
        make_engine(tokenizer=byte_tokenizer()).generate("q", strategy=ab.SSFT())
    with pytest.raises(ValueError, match="control tag '<think7>' must be one token"):
        engine_with(*TAGS).generate("q", strategy=ab.SSFT(paths=7))
