"""Parallel-R1: the model asks, the runtime opens the paths and asks for the summary; both rules of positions."""

from __future__ import annotations

import pytest
import torch
from engine_kit import byte_tokenizer, make_engine
from systems_kit import (
    Babble,
    assert_same_everywhere,
    assert_training_parity,
    engine_with,
    ids,
    play,
    survive,
)
from transformers import LogitsProcessor

import anabranch as ab
from anabranch import training
from anabranch.strategies.tagged.parallel_r1 import TAGS
from anabranch.training.formats import Block

OPEN = "p: <Parallel><Path>"
PATHS = ("a.</Path>", "bbbb.</Path>")
SUMMARY = "</Parallel>\n<Summary>"


def tags(text):
    return ids(text, *TAGS)


def lines(*after, paths=PATHS, end="so</Summary>"):
    """Both paths have one context, so each says what it draws first; the summary knows every order."""
    script = [("p: ", "<Parallel>"), *((OPEN, path) for path in paths)]
    for one in paths:
        for other in paths:
            script.append((f"{OPEN}{one}<Path>{other}{SUMMARY}", end))
            script += [(f"{OPEN}{one}<Path>{other}{SUMMARY}{before}", says) for before, says in after]
    return script


LINES = lines(("so</Summary>", "ok<eos>"))


@pytest.mark.parametrize("positions", ["dense", "shared"])
def test_the_runtime_opens_the_paths_and_asks_for_the_summary(positions):
    strategy = ab.ParallelR1(positions=positions)
    result, compared = play(strategy, "p: ", *LINES, pieces=TAGS, seed=1)
    first, second = result.tree.children
    assert {first.text, second.text} == {"<Path>" + path for path in PATHS}  # drawn by each thread's own stream
    assert result.text == f"<Parallel>{first.text}{second.text}{SUMMARY}so</Summary>ok"
    assert result.token_ids == tags(result.text + "<eos>") and result.malformed == ()
    base = len(tags("p: <Parallel>"))
    assert [kid.start for kid in (first, second)] == [base, base]
    longest, total = max(len(k.token_ids) for k in (first, second)), len(first.token_ids) + len(second.token_ids)
    runs = result.tree.runs
    inserted = next(run for run in runs if run.kind == "inserted")
    assert inserted.token_ids == tags(SUMMARY)
    assert inserted.position == base + (total if positions == "dense" else longest)
    assert next(r.position for r in runs if r.kind == "joined") == base
    assert [r.spliced for r in runs if r.kind == "joined"] == [True, positions == "shared"]
    # (The scores of the paths' first token are there once for each path, and the same.)
    assert compared == result.metrics.sampled_tokens
    # A forward has a row for each token but the last. What the dense join computes again is the second path, whose own
    # last token nobody had needed so far.
    again = 0 if positions == "shared" else len(second.token_ids) - 1
    assert result.metrics.rows == len(tags("p: ")) + result.metrics.total_tokens - 1 + again


@pytest.mark.parametrize("positions", ["dense", "shared"])
def test_every_row_equals_training(positions):
    assert_training_parity(ab.ParallelR1(positions=positions), "p: ", *LINES, pieces=TAGS, seed=1)


def test_shared_positions_are_those_of_the_layout_that_trains_them():
    result, _ = play(ab.ParallelR1(positions="shared"), "p: ", *LINES, pieces=TAGS, seed=1)
    block = Block(
        [kid.token_ids[1:] for kid in result.tree.children], [tags("<Path>")] * 2, tags("</Parallel>\n<Summary>")
    )
    layout = training.formats.parallel_r1(tags("p: "), [tags("<Parallel>"), block, tags("so</Summary>ok<eos>")])
    traced = training.from_trace(result)
    assert traced.position_ids.tolist() == layout.position_ids.tolist()
    assert traced.input_ids.tolist() == layout.input_ids.tolist()
    assert bool((traced.mask.dense() == layout.mask.dense()).all())


def test_an_eos_in_a_path_becomes_its_end():
    script = lines(("so</Summary>", "ok<eos>"), paths=("a.</Path>",))
    script = [(before, says.replace(".</Path>", ".<eos>")) for before, says in script]
    result, _ = play(ab.ParallelR1(), "p: ", *script, pieces=TAGS)
    assert result.text == f"<Parallel><Path>a.</Path><Path>a.</Path>{SUMMARY}so</Summary>ok"
    assert result.malformed == tuple(f"thread 0.{i}: ended by eos without </Path>; closed" for i in (0, 1))
    assert [r.token_ids for r in result.tree.children[0].runs] == [tags("<Path>"), tags("a."), tags("</Path>")]


def test_an_eos_in_the_summary_becomes_its_end_and_the_answer_goes_on():
    script = lines(("so</Summary>", "ok<eos>"), end="so<eos>")
    result, _ = play(ab.ParallelR1(), "p: ", *script, pieces=TAGS)
    assert result.text.endswith(f"{SUMMARY}so</Summary>ok")
    assert result.malformed == ("thread 0: ended by eos without </Summary>; closed",)


def test_a_path_that_its_limit_cuts_is_closed():
    script = [
        ("p: ", "<Parallel>"),
        (OPEN, "abcdefgh"),
        (f"{OPEN}abc</Path><Path>abc</Path>{SUMMARY}", "</Summary><eos>"),
    ]
    result, _ = play(ab.ParallelR1(path_tokens=3), "p: ", *script, pieces=TAGS)
    assert result.text == f"<Parallel><Path>abc</Path><Path>abc</Path>{SUMMARY}</Summary>"
    assert [kid.ended for kid in result.tree.children] == ["length"] * 2 and len(result.malformed) == 2


def test_an_answer_that_is_used_up_ends_with_the_summary_open():
    script = [("p: ", "<Parallel>"), (OPEN, "abcdefgh"), (f"{OPEN}abcd</Path><Path>abcd</Path>{SUMMARY}", "x")]
    result, _ = play(ab.ParallelR1(), "p: ", *script, pieces=TAGS, max_new_tokens=5)
    assert result.text == f"<Parallel><Path>abcd</Path><Path>abcd</Path>{SUMMARY}"
    assert result.tree.ended == "length" and result.metrics.format_correctness == 0


@pytest.mark.parametrize("most", [1, 2])
def test_the_answer_ends_behind_the_last_block(most):
    block = f"<Parallel><Path>a</Path>{SUMMARY}s</Summary>"
    script, before = [], "p"
    for _ in range(most):
        script += [(before, "<Parallel>"), (before + "<Parallel><Path>", "a</Path>")]
        script.append((f"{before}<Parallel><Path>a</Path>{SUMMARY}", "s</Summary>"))
        before += block
    result, _ = play(ab.ParallelR1(paths=1, max_blocks=most), "p", *script, pieces=TAGS)
    assert result.text == block * most and result.malformed == () and result.metrics.num_forks == most


def test_four_blocks_as_released_and_no_limit():
    assert ab.ParallelR1().max_blocks == 4 and ab.ParallelR1().path_tokens == 4096
    assert ab.ParallelR1(max_blocks=None).max_blocks is None


@pytest.mark.parametrize("says", ["</Path>x<eos>", "<Summary>x</Summary><eos>", "</Parallel><eos>"])
def test_tags_out_of_place_are_text_and_counted(says):
    result, _ = play(ab.ParallelR1(), "p", ("p", says), pieces=TAGS)
    assert result.text == says.replace("<eos>", "") and len(result.malformed) == 1
    assert result.malformed[0].startswith("thread 0: its tags are <")


def test_paths_are_sampled_with_a_temperature_of_their_own():
    """The trunk is greedy, the paths are not: they differ for some seed, and with None they never do."""

    def texts(strategy, seed):
        result = engine_with(*TAGS).generate(
            "p<Parallel>", strategy=strategy, seed=seed, max_new_tokens=8, logits_processor=[_Opens()], do_sample=False
        )
        return [kid.token_ids for kid in result.tree.children]

    hot, greedy = ab.ParallelR1(path_temperature=1.0), ab.ParallelR1(path_temperature=None)
    assert any(len(set(texts(hot, seed))) == 2 for seed in range(3))
    assert len(set(texts(greedy, 0))) == 1


class _Opens(LogitsProcessor):
    """The model opens a block at once."""

    def __call__(self, input_ids, scores):
        if input_ids.shape[1] == len(tags("p<Parallel>")):
            return torch.full_like(scores, -torch.inf).index_fill(-1, torch.tensor(tags("<Parallel>")), 0.0)
        return scores


USUAL = {
    "<Parallel>": ["a"],
    "<Path>": ["a", "b"],
    "a": ["a", "b", "</Path>", "</Summary>", "<Parallel>"],
    "b": ["</Path>", "</Summary>", "<Parallel>"],
    "</Summary>": ["<Parallel>", "a"],
    "<Summary>": ["b", "</Summary>"],
}
BABBLE = Babble(TAGS, USUAL)


@pytest.mark.parametrize("positions", ["dense", "shared"])
def test_the_same_seed_gives_the_same_tree(positions):
    strategy = ab.ParallelR1(paths=3, positions=positions, path_tokens=12)
    results = assert_same_everywhere(strategy, [f"{n}a" for n in range(16)], BABBLE, *TAGS, pages=60)
    assert sum(r.metrics.num_threads for r in results) > 8


def babbled(count):
    for positions in ("dense", "shared"):
        strategy = ab.ParallelR1(paths=3, positions=positions, path_tokens=12)
        results = survive(strategy, lambda seed: f"{seed}a", BABBLE, *TAGS, count=count // 2)
        assert sum(r.metrics.num_threads > 0 for r in results) > count / 10
        assert {r.metrics.format_correctness for r in results} == {0.0, 1.0}


def test_malformed_generations():
    babbled(300)


@pytest.mark.slow
def test_many_malformed_generations():
    babbled(10_000)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"paths": 0}, "ParallelR1: paths=0"),
        ({"positions": "same"}, "positions='same'; pass 'dense' or 'shared'"),
        ({"path_temperature": 0}, "path_temperature: must be positive"),
        ({"max_blocks": 0}, "ParallelR1: max_blocks=0"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        ab.ParallelR1(**options)


def test_a_tokenizer_without_the_tags():
    with pytest.raises(ValueError, match=r"control tag '<Parallel>' must be one token.*add it"):
        make_engine(tokenizer=byte_tokenizer()).generate("p", strategy=ab.ParallelR1())
