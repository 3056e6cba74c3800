"""AsyncThink: an organizer that goes on, workers with contexts of their own, results where they are asked for."""

from __future__ import annotations

import re

import pytest
from engine_kit import byte_tokenizer, make_engine
from strategies_kit import Says
from systems_kit import (
    Babble,
    assert_same_everywhere,
    assert_training_parity,
    ids,
    play,
    survive,
)

import anabranch as ab

ASK = ab.AsyncThink(worker_request="Work: {query}\n")
FORKS_ONE = "<FORK-1>what?</FORK-1>."
FORKS = "<FORK-1>a?</FORK-1>hm<FORK-2> b? </FORK-2>"
MID = "<JOIN-2><RETURN>B</RETURN>"
END = "x<JOIN-1><RETURN>A</RETURN>"
LINES = [
    ("q", FORKS + "<JOIN-2>"),
    ("Work: a?\n", "long long long thought<RETURN>A</RETURN>"),
    ("Work: b?\n", "t<RETURN>B</RETURN>"),
    ("q" + FORKS + MID, "x<JOIN-1>"),
    ("q" + FORKS + MID + END, "AB<eos>"),
]


def test_the_organizer_goes_on_and_blocks_only_at_a_join():
    result, compared = play(ASK, "q", *LINES)
    assert result.text == FORKS + MID + END + "AB" and result.answers == "AB" and result.malformed == ()
    assert result.token_ids == ids(FORKS + MID + END + "AB<eos>")
    first, second = result.tree.children
    assert (first.role, first.start, first.fate) == (second.role, second.start, second.fate) == ("fresh", 0, "joined")
    assert first.runs[0].token_ids == ids("Work: a?\n") and second.runs[0].token_ids == ids("Work: b?\n")
    assert compared == result.metrics.sampled_tokens  # the organizer's rows and the workers'
    runs = result.tree.runs
    assert [r.position for r in runs] == [sum(len(q.token_ids) for q in runs[:i]) for i in range(len(runs))]
    assert [r.token_ids for r in runs if r.kind == "inserted"] == [ids("<RETURN>B</RETURN>"), ids("<RETURN>A</RETURN>")]
    # The first join waits for worker 2, the second for nobody: worker 1 was done before.
    metrics = result.metrics
    waits = len(FORKS) + len(LINES[2][1]) + len("<RETURN>B</RETURN>")
    assert metrics.critical_path_tokens == waits + len(LINES[3][1]) + len("<RETURN>A</RETURN>AB") + 1
    assert metrics.max_concurrency == 3 and metrics.threads_per_block == (1, 1)
    active = (len(LINES[1][1]) + len(LINES[2][1])) / metrics.critical_path_tokens
    assert metrics.parallel_ratio * metrics.token_speedup == pytest.approx(active)


def test_every_row_equals_training():
    assert_training_parity(ASK, "q", *LINES)


def test_it_may_fork_again_after_a_join():
    again = "<FORK-3>c?</FORK-3><JOIN-3>"
    before = "q" + FORKS + MID + END
    lines = [*LINES[:-1], (before, again), ("Work: c?\n", "<RETURN>C</RETURN>")]
    result, _ = play(
        ab.AsyncThink(workers=2, worker_request=ASK.worker_request),
        "q",
        *lines,
        (before + again + "<RETURN>C</RETURN>", "D<eos>"),
    )
    assert result.answers == "D" and result.malformed == () and result.metrics.num_threads == 3


@pytest.mark.parametrize(
    ("strategy", "says", "why"),
    [
        (ASK, "<FORK-1>a?</FORK-1><FORK-1>b?</FORK-1>.", "fork of 1: that id was forked before; kept as plain text"),
        (
            ab.AsyncThink(workers=1, worker_request="Work: {query}\n"),
            "<FORK-1>a?</FORK-1><FORK-2>b?</FORK-2>.",
            "fork of 2: all 1 workers are taken; kept as plain text",
        ),
        (ASK, "<FORK-1>a?</FORK-1>.</FORK-7>.", "</FORK-7> without <FORK-7>; kept as plain text"),
        (ASK, "<FORK-1>a?</FORK-1><JOIN-1000>.", "join of 1000, which was never forked; kept as plain text"),
        (ASK, "<FORK-1>a?</FORK-1>", "no answer behind the last fork or join"),
    ],
)
def test_malformed(strategy, says, why):
    result, _ = play(strategy, "q", ("q", says + "<eos>"), LINES[1])
    assert result.text == says and result.malformed == (f"thread 0: {why}",)
    assert [(kid.fate, kid.text) for kid in result.tree.children] == [("discarded", LINES[1][1])]  # nobody asked for it


def test_a_worker_that_nobody_joins_may_be_ended_where_it_is():
    lines = [("q", "<FORK-1>a?</FORK-1>.<eos>"), ("Work: a?\n", "t" * 99)]
    strategy = ab.AsyncThink(worker_request=ASK.worker_request, drains=False)
    result, _ = play(strategy, "q", *lines)
    assert result.tree.children[0].text == "tt" and result.answers == "."


def test_what_only_looks_like_a_mark_is_text():
    says = "</FORK-x></FORK-></FORK-1.</FORK-1.2.></FORK-12<JOIN-<JOIN-.>."
    result, _ = play(ASK, "q", ("q", says + "<eos>"))
    assert result.text == says and result.malformed == () and result.answers == says


def test_marks_that_share_tokens_with_the_text_around_them():
    pieces = ("?</FORK-", "1>hm", "-2", "2>", "<JOIN-1>")
    result, _ = play(ASK, "q", *LINES, pieces=pieces)
    assert result.text == FORKS + MID + END + "AB" and result.malformed == ()


def test_ids_that_were_joined():
    fork, got = "<FORK-1>a?</FORK-1><JOIN-1>", "<RETURN>A</RETURN>"
    lines = [("q", fork), LINES[1], ("q" + fork + got, fork), ("q" + fork + got + fork + got, "B<eos>")]
    assert play(ab.AsyncThink(worker_request=ASK.worker_request, reuse_ids=True), "q", *lines)[0].answers == "B"
    lines = [*lines[:2], ("q" + fork + got, fork + "B<eos>")]
    result, _ = play(ASK, "q", *lines)
    assert result.text == fork + got + fork + "B" and len(result.malformed) == 2
    assert "that id was forked before" in result.malformed[0] and "joined before" in result.malformed[1]


def test_a_worker_without_a_return_gives_all_that_it_wrote():
    fork, got = "<FORK-1>a?</FORK-1><JOIN-1>", "<RETURN>some words</RETURN>"
    for wrote, options in ((" some words\n<eos>", {}), ("some words and", {"worker_tokens": 10})):
        strategy = ab.AsyncThink(worker_request=ASK.worker_request, **options)
        result, _ = play(strategy, "q", ("q", fork), ("Work: a?\n", wrote), ("q" + fork + got, "B<eos>"))
        assert result.text == fork + got + "B" and result.metrics.format_correctness == 0


@pytest.mark.parametrize(
    ("strategy", "asked", "worker"),
    [
        (ab.AsyncThink(), "Q", r"Work on the query below .*Query: what\?"),
        (ab.AsyncThink(informed=True), "Q", r"Question: Q\n\nWork on one part .*Query: what\?"),
        (
            ab.AsyncThink(worker_request="{question}: {query}"),
            [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}],
            r"\[system\]S\[user\]Q: what\?\[a\]",
        ),
    ],
)
def test_a_worker_sees_the_sub_query_alone_or_the_question_too(strategy, asked, worker):
    script = Says({"Q": FORKS_ONE, "Q[a]": FORKS_ONE, "what?": "</FORK-1>.", "what?[a]": "."})
    engine = make_engine(tokenizer=byte_tokenizer(), num_pages=900)
    result = engine.generate(asked, strategy=strategy, max_new_tokens=60, logits_processor=[script])
    seen = byte_tokenizer().decode(result.tree.children[0].runs[0].token_ids)
    assert re.fullmatch(worker, seen, re.DOTALL)


PIECES = ("<FORK-", "</FORK-", "<JOIN-", "<RETURN>", "</RETURN>")
USUAL = {
    **{mark: ["1", "2"] for mark in PIECES[:3]},
    **{digit: [">"] * 8 + [".", "1"] for digit in "12"},
    ">": ["a", "a", "</FORK-", "<JOIN-"],
    "a": ["a", "</FORK-", "</FORK-", "<JOIN-", "</RETURN>"],
    "<RETURN>": ["a", "</RETURN>"],
    "</RETURN>": ["<JOIN-", "<FORK-", "a"],
    "\n": ["<RETURN>", "a"],
    "q": ["<FORK-"],
}
BABBLE = Babble(PIECES, USUAL, wild=0.05)
SMALL = ab.AsyncThink(workers=2, worker_request="W {query}\n", reuse_ids=True)


def test_the_same_seed_gives_the_same_tree():
    results = assert_same_everywhere(SMALL, [f"{n}q" for n in range(16)], BABBLE, *PIECES, pages=60)
    assert sum(r.metrics.num_threads for r in results) > 8


def babbled(count):
    results = survive(SMALL, lambda seed: f"{seed}q", BABBLE, *PIECES, count=count)
    assert sum(r.metrics.num_threads > 0 for r in results) > count / 20
    assert sum("<RETURN>" in r.text for r in results) > count / 50
    assert {r.metrics.format_correctness for r in results} == {0.0, 1.0}


def test_malformed_generations():
    babbled(300)


@pytest.mark.slow
def test_many_malformed_generations():
    babbled(10_000)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": 0}, "AsyncThink: workers=0"),
        ({"worker_tokens": 0}, "AsyncThink: worker_tokens=0"),
        ({"worker_request": "work"}, "worker_request does not hold {query}"),
        ({"worker_request": 3}, "worker_request=3; pass a text"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        ab.AsyncThink(**options)


def test_without_a_tokenizer():
    with pytest.raises(ValueError, match="needs a tokenizer"):
        make_engine().generate([1, 2, 3], strategy=ab.AsyncThink())
