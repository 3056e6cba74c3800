"""The verbs that searches are made of: candidates and choices, a thread that becomes its sibling, hidden states."""

from __future__ import annotations

import pytest
import torch
from engine_kit import Dense, Does, Recorder, assert_nothing_held, make_engine, make_model
from hf_kit import FAMILIES, build

import anabranch as ab

PROMPT = [5, 6, 7, 8, 9, 10, 11]


def doing(run, prompt=PROMPT, engine=None, **options):
    """Generate with a strategy that does this."""
    engine = engine or make_engine()
    try:
        return engine.generate(prompt, strategy=Does(run), **({"max_new_tokens": 20} | options))
    finally:
        assert_nothing_held(engine)


def test_candidates_and_choices():
    def run(trunk):
        first = yield trunk.candidates(5)
        biased = yield trunk.candidates(5, bias={first.token_ids[0]: -100.0})
        done = yield trunk.choose(first.token_ids[1])
        second = yield trunk.candidates(400)
        return first, biased, done, second

    result = doing(run, logprobs=True, repetition_penalty=1.5, bad_words_ids=[[3]])
    first, biased, done, second = result.answers
    with torch.no_grad():
        logits = make_model()(torch.tensor([[*PROMPT, first.token_ids[1]]])).logits[0].float().log_softmax(-1)
    raw = logits[len(PROMPT) - 1]
    scores = raw.clone()
    scores[PROMPT] *= 1.5
    scores[3] = -torch.inf
    best = scores.topk(5)
    assert first.token_ids == tuple(best.indices.tolist()) and done is True
    torch.testing.assert_close(torch.tensor(first.logprobs), best.values, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(torch.tensor(first.raw), raw[list(first.token_ids)], atol=1e-4, rtol=1e-4)
    assert first.keys == first.logprobs and first.left == 20 and first.budget is None
    assert biased.token_ids[:4] == first.token_ids[1:]
    assert len(second.token_ids) == 259 and 3 not in second.token_ids  # what is ruled out is no candidate
    assert result.tree.runs[-1].kind == "sampled" and result.token_ids == first.token_ids[1:2]
    assert result.tree.runs[-1].logprobs[0] == pytest.approx(first.raw[1], abs=1e-5)


def test_what_ends_a_text():
    def run(trunk):
        first = yield trunk.candidates(3)
        yield trunk.choose(first.token_ids[0])
        last = yield trunk.candidates(3)
        yield trunk.choose(last.token_ids[0])
        refused = yield trunk.choose(last.token_ids[1])
        return first, last, refused, trunk.room

    first, last, refused, room = doing(run, max_new_tokens=2).answers
    assert first.ends == (False,) * 3 and last.ends == (True,) * 3 and (first.left, last.left) == (2, 1)
    assert refused is False and room == 0
    with_eos = doing(run, max_new_tokens=2, eos_token_id=first.token_ids[1]).answers[0]
    assert with_eos.ends == (False, True, False)


def test_a_thread_becomes_its_sibling():
    def run(trunk):
        kids = trunk.fork([[20, 21], [20, 30], [40]])
        yield [kid.decode(n) for kid, n in zip(kids, (3, 5, 2), strict=True)]
        yield kids[0].become(kids[1])
        yield [kids[0].decode(4), kids[1].decode(4)]
        yield kids[2].become(kids[0])
        yield trunk.join(kids[:2], "discard")
        yield trunk.join(kids[2])
        yield trunk.decode(3)
        return [kid.token_ids for kid in kids]

    engine = make_engine()
    result = doing(run, engine=engine, logprobs=True)
    one, two, three = result.answers
    assert one == two == three == result.token_ids[: len(one)]
    expected = make_engine().generate([*PROMPT, 20, 30], max_new_tokens=9).token_ids
    assert result.token_ids[2:] == expected[:9] + result.token_ids[11:]
    first, _, third = result.tree.children
    assert [run.token_ids for run in first.forgotten] and first.token_ids[:2] == (20, 30)
    assert third.forgotten[0].token_ids == (40,) or third.forgotten[-1].token_ids == (40,)
    ab.replay(result, engine)
    assert_nothing_held(engine)


def test_what_became_another_may_be_joined_side_by_side():
    """A splice takes what a branch wrote since its fork: one that was borrowed is computed again for it."""

    def run(trunk):
        kids = trunk.fork([[20], [30]])
        yield [kid.decode(4) for kid in kids]
        yield kids[0].become(kids[1])
        yield kids[0].decode(2, sampling={"do_sample": True})
        trunk.join(kids)
        trunk.insert([70])
        yield trunk.decode(4)

    engine, recorder = make_engine(), Recorder()
    result = doing(run, engine=engine, logits_processor=[recorder], eos_token_id=None)
    dense = Dense(result, "llama")
    last = [row for row in recorder.seen if row[0][: len(PROMPT)] == tuple(PROMPT) and 70 in row[0]]
    assert len(last) == 4
    for context, scores in last:
        torch.testing.assert_close(scores, dense.by_context[context], atol=2e-4, rtol=2e-4)
    ab.replay(result, engine)


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda t: (yield t.candidates(0)), "candidates: k=0"),
        (lambda t: (yield t.candidates(2, bias={999: 1.0})), "candidates: bias"),
        (lambda t: (yield t.candidates(2, bias={5: float("nan")})), r"candidates: bias\[5\]"),
        (lambda t: (yield t.candidates(2, sampling={"nothing": 1})), "'nothing' is not a sampling field"),
        (lambda t: (yield t.choose(9999)), "choose: token_id"),
        (lambda t: (yield t.become(t)), "is not another fork"),
        (lambda t: (yield t.fork(1)[0].become(t)), "is not another fork"),
        (lambda t: (yield _apart(t)), "were not forked from the same place"),
        (lambda t: (yield _with_children(t)), "thread 0.0 has children"),
        (lambda t: (yield _killed_meanwhile(t)), "thread 0.1, which thread 0.0 was to become, was killed"),
    ],
)
def test_bad_requests(run, message):
    with pytest.raises(ValueError, match=message):
        doing(lambda trunk: run(trunk))


def _apart(trunk):
    first = trunk.fork(1)[0]
    trunk.insert([5])
    return first.become(trunk.fork(1)[0])


def _killed_meanwhile(trunk):
    one, two = trunk.fork(2)
    two.decode(5)
    op = one.become(two)
    two.kill()
    return op


def _with_children(trunk):
    one, two = trunk.fork(2)
    one.fork([[5]])
    return one.become(two)


@pytest.mark.parametrize("own_linear", [False, None])
@pytest.mark.parametrize("family", ["llama", "gemma2", "granite"])
def test_hidden_states_are_what_the_head_reads(family, own_linear):
    config, options = FAMILIES[family]
    model = build(config, attn="eager", **options)
    engine = ab.Engine(build(config, **options), num_pages=200, page_size=4, own_linear=own_linear)

    def run(trunk):
        asked = yield trunk.hidden()  # of the prompt
        yield trunk.decode(3)
        after = yield trunk.hidden()
        kids = trunk.fork([[20], [30, 31]])
        mixed = yield [kids[0].hidden(), kids[1].decode(2), kids[1].hidden()]
        same = yield kids[0].hidden()
        return [asked, after, mixed[0], mixed[2]], [k.token_ids for k in kids], same == mixed[0]

    result = doing(run, engine=engine, eos_token_id=None)
    states, (one, two), same = result.answers
    answer = result.token_ids
    for state, tokens in zip(states, ((), answer, (*answer, *one), (*answer, *two)), strict=True):
        with torch.no_grad():
            inner = model.model(torch.tensor([[*PROMPT, *tokens]])).last_hidden_state[0, -1]
        torch.testing.assert_close(torch.tensor(state), inner, atol=1e-3, rtol=1e-3)
    assert same and not model.get_output_embeddings()._forward_pre_hooks
    assert not engine.model.get_output_embeddings()._forward_pre_hooks


def test_batch_invariant_to_the_bit():
    def run(trunk):
        found = yield trunk.candidates(40)
        yield trunk.decode(3)
        return found, (yield trunk.hidden())

    engine = make_engine(batch_invariant=True, num_pages=600)
    alone = doing(run, engine=engine).answers

    together = engine.generate([PROMPT, [1, 2, 3], list(range(50))], strategy=Does(run), max_new_tokens=20)
    assert together[0].answers == alone
    options = dict(strategy=ab.BeamSearch(width=3), max_new_tokens=6)
    beams = engine.generate(PROMPT, **options)
    assert engine.generate([[3, 4], PROMPT], **options)[1].tree == beams.tree
    assert_nothing_held(engine)
