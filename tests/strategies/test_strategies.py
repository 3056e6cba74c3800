"""Self-consistency and aspects, and what all strategies that come with the package have in common."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, dataclass

import pytest
import torch
from engine_kit import Recorder, assert_dense, assert_nothing_held, byte_tokenizer, make_engine, make_model

from anabranch.strategies import Aspects, Ended, SelfConsistency, Sequential

PROMPT = [5, 6, 7, 8, 9, 10, 11]


# ------------------------------------------------------------------------------------------------ self-consistency


def end(text):
    return Ended("eos", (1,), text)


def test_votes():
    numbers = SelfConsistency(5, vote="number")
    answers = [
        numbers.answer(end(t)) for t in ("it is 1,204.", "so 12 + 3 = 15", "none", "x = 15", "1204 and then 1204")
    ]
    assert answers == ["1204", "15", None, "15", "1204"]
    assert numbers.elect(answers, []) == 0  # a tie goes to the earlier branch
    assert numbers.elect([None, None], []) == 0
    assert SelfConsistency(vote="boxed").answer(end(r"\boxed{a} then \boxed{ b }")) == "b"
    assert SelfConsistency(vote=r"answer: (\w+)").answer(end("answer: yes, answer: no")) == "no"
    assert SelfConsistency(vote=r"y\w+").answer(end("say yes")) == "yes"
    assert SelfConsistency(vote=len).answer(end("abc")) == 3
    assert SelfConsistency(vote=None).answer(end("abc")) == "abc"


def test_the_trunk_becomes_the_winner():
    tokenizer = byte_tokenizer()
    engine = make_engine(tokenizer=tokenizer)
    last = SelfConsistency(6, vote=lambda text: len(text) % 2, max_new_tokens=9, temperature=1.5)
    result = engine.generate("abc", strategy=last, seed=4)
    assert len(result.answers) == 6
    winner = result.answers.index(
        max(set(result.answers), key=lambda a: (result.answers.count(a), -result.answers.index(a)))
    )
    kids = result.tree.children
    assert [k.fate for k in kids] == ["joined" if i == winner else "discarded" for i in range(6)]
    assert result.token_ids == kids[winner].token_ids
    assert {(r.kind, r.source) for r in result.tree.runs[1:]} == {("joined", kids[winner].id)}
    metrics = result.metrics
    assert metrics.critical_path_tokens == max(len(k.token_ids) for k in kids)
    assert metrics.total_tokens == sum(len(k.token_ids) for k in kids) and metrics.parallel_ratio == 1
    assert (metrics.num_threads, metrics.num_forks, metrics.threads_per_block, metrics.max_concurrency) == (
        6,
        1,
        (6,),
        6,
    )
    assert_nothing_held(engine)


def test_without_a_vote_the_likeliest_branch_wins():
    engine = make_engine()
    result = engine.generate(PROMPT, strategy=SelfConsistency(5, max_new_tokens=6, temperature=1.0), seed=1, top_k=0)
    assert all(isinstance(a, tuple) for a in result.answers)
    mean = []
    for answer in result.answers:
        with torch.no_grad():
            logits = make_model()(torch.tensor([PROMPT + list(answer)])).logits[0, len(PROMPT) - 1 : -1]
        mean.append(float(logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).mean()))
    assert result.token_ids == result.answers[mean.index(max(mean))]


def test_the_winner_can_go_on():
    @dataclass(frozen=True)
    class Onward(SelfConsistency):
        def run(self, trunk):
            answers = yield from super().run(trunk)
            yield trunk.decode(5)
            return answers

    engine, recorder = make_engine(), Recorder()
    result = engine.generate(
        PROMPT, strategy=Onward(3, max_new_tokens=4), logits_processor=[recorder], eos_token_id=None
    )
    with torch.no_grad():
        logits = make_model()(torch.tensor([[*PROMPT, *result.token_ids]])).logits[0]
    assert len(result.token_ids) == 9 and result.metrics.critical_path_tokens == 9
    assert result.token_ids[4:] == tuple(logits[len(PROMPT) + 3 : -1].argmax(-1).tolist())


# ------------------------------------------------------------------------------------------------ aspects


def test_aspects_fork_in_mid_answer_and_join():
    tokenizer = byte_tokenizer()
    engine, recorder = make_engine(tokenizer=tokenizer), Recorder()
    strategy = Aspects(
        ("A:", "B:", "C:"), "so", after=(), intro_tokens=7, aspect_tokens=5, aspect_stop=(), conclusion_tokens=4
    )
    result = engine.generate("hello", strategy=strategy, logits_processor=[recorder], eos_token_id=None)
    assert_dense(result, recorder, "llama")
    assert [tokenizer.decode(k.token_ids)[:2] for k in result.tree.children] == ["A:", "B:", "C:"]
    runs = result.tree.runs
    assert [(r.kind, r.source) for r in runs] == [
        ("prompt", None),
        ("sampled", None),
        ("joined", "0.0"),
        ("joined", "0.1"),
        ("joined", "0.2"),
        ("inserted", None),
        ("sampled", None),
    ]
    base = len("hello") + 7
    assert {k.start for k in result.tree.children} == {base}
    assert runs[5].position == max(k.stop for k in result.tree.children)
    metrics = result.metrics
    assert metrics.total_tokens == 7 + 3 * (2 + 5) + 2 + 4
    assert metrics.critical_path_tokens == 7 + 2 + 5 + 2 + 4
    assert metrics.parallel_ratio == pytest.approx(21 / 34) and metrics.inserted_tokens == 3 * 2 + 2
    assert metrics.longest_context == len("hello") + 34 and metrics.trigger_rate == 1.0


def test_aspects_forks_inside_a_page_and_copies_it_only_then():
    engine = make_engine(page_size=8)
    strategy = Aspects(
        ([1], [2], [3]), [4], after=(), intro_tokens=6, aspect_tokens=3, aspect_stop=(), conclusion_tokens=2
    )
    result = engine.generate(PROMPT, strategy=strategy, eos_token_id=None)
    assert result.metrics.pages_copied == 3  # 13 tokens at the fork: one shared tail page, a copy for each child


def test_aspects_drops_blank_ends_and_leaves_a_finished_answer_alone():
    tokenizer = byte_tokenizer()
    engine = make_engine(tokenizer=tokenizer)
    plain = engine.generate("hello", max_new_tokens=12, eos_token_id=None).token_ids
    done = engine.generate(
        "hello", strategy=Aspects(after=(), intro_tokens=9), max_new_tokens=40, eos_token_id=[plain[4]]
    )
    assert done.token_ids == plain[:5] and done.metrics.trigger_rate == 0.0 and done.tree.ended == "eos"

    class Newlines(Recorder):
        """Makes every thread say "x", then line breaks."""

        def __call__(self, input_ids, scores):
            token = ord("x") if input_ids[0, -1] == ord(":") else tokenizer("\n")["input_ids"][0]
            return torch.full_like(scores, -1e9).index_fill(-1, torch.tensor(token), 0.0)

    strategy = Aspects(("1:", "2:"), "so", after=(), intro_tokens=1, conclusion_tokens=1)
    result = engine.generate("hello", strategy=strategy, logits_processor=[Newlines()])
    assert result.text.startswith("\n") and "so" in result.text


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SelfConsistency(0), "n=0"),
        (lambda: SelfConsistency(vote="("), "neither one of number, boxed, letter, line nor a regular expression"),
        (lambda: SelfConsistency(vote=3), "vote=3"),
        (lambda: Aspects(headers=()), "headers="),
        (lambda: Aspects(conclusion=""), "conclusion is empty"),
        (lambda: Sequential("x"), "not a Strategy"),
    ],
)
def test_strategies_check_their_fields(build, message):
    with pytest.raises((ValueError, TypeError), match=message):
        build()


def test_strategies_are_frozen_and_print_themselves():
    assert repr(Sequential(SelfConsistency(n=3))).startswith("Sequential(strategy=SelfConsistency(n=3, vote=None")
    with pytest.raises(FrozenInstanceError):
        Aspects().intro_tokens = 3
    assert hash(Aspects()) == hash(Aspects())
