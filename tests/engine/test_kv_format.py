"""Engine(kv_format=…): the whole loop over quantised K and V."""

from __future__ import annotations

import pytest
import torch
from engine_kit import Nested, assert_nothing_held, make_engine

import anabranch as ab

PROMPT = list(range(40, 62))
QUANTISED = ("int8", "fp8")


@pytest.mark.parametrize("name", [None, "auto", "float32"])
def test_auto_is_the_models_own_dtype(name):
    engine = make_engine(kv_format=name)
    assert engine.cache.kv_format.name == "float32" and engine.cache.k_pages(0).dtype == torch.float32
    expected = make_engine().generate(PROMPT, max_new_tokens=12).token_ids
    assert engine.generate(PROMPT, max_new_tokens=12).token_ids == expected


@pytest.mark.parametrize("name", QUANTISED)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_the_same_answer_alone_in_chunks_in_a_batch_and_on_other_pages(name, backend):
    """What is stored depends on the token alone; so the answer does not depend on how it was computed."""
    prompts = [PROMPT, [3], list(range(100, 150))]
    answers = []
    for options in (dict(), dict(max_rows=5), dict(page_size=1, num_pages=1024), dict(page_size=128, num_pages=8)):
        engine = make_engine(kv_format=name, backend=backend, **options)
        answers += [[r.token_ids for r in engine.generate(prompts, max_new_tokens=12)]]
        answers += [[engine.generate(p, max_new_tokens=12).token_ids for p in prompts]]
        assert_nothing_held(engine)
    assert all(a == answers[0] for a in answers)


@pytest.mark.parametrize("name", QUANTISED)
def test_scores_are_close_to_those_of_the_models_own_dtype(name):
    scored = {}
    for kept in ("auto", name):
        engine = make_engine(kv_format=kept)
        model, cache = engine.model, engine.cache
        step = cache.step({cache.branch(): len(PROMPT)})
        ids = torch.tensor([PROMPT])
        with torch.no_grad():
            logits = model(ids, position_ids=step.position_ids[None], tree_step=step, use_cache=False).logits
        scored[kept] = torch.log_softmax(logits[0], -1)
    off = (scored[name].exp() * (scored[name] - scored["auto"])).sum(-1)  # KL divergence
    assert 0 < off.max() < {"int8": 0.02, "fp8": 0.2}[name]


@pytest.mark.parametrize("name", QUANTISED)
def test_forks_joins_and_pre_emption(name):
    """A tree that does not fit at once waits and is recomputed; the answer is that of a roomy cache."""

    def answers(**options):
        engine = make_engine(kv_format=name, **options)
        results = engine.generate(
            [PROMPT, PROMPT[:5], PROMPT[3:]], strategy=ab.SelfConsistency(n=4), max_new_tokens=14, do_sample=True,
            seed=3, eos_token_id=None,
        )  # fmt: skip
        assert_nothing_held(engine)
        return [r.token_ids for r in results], sum(r.metrics.preemptions for r in results)

    roomy, none = answers(num_pages=256)
    tight, some = answers(num_pages=26)
    assert none == 0 and some > 0
    assert tight == roomy
    engine = make_engine(kv_format=name, num_pages=64)
    engine.generate(PROMPT, strategy=Nested(), max_new_tokens=60, eos_token_id=None)
    assert engine.cache.usage().pages_copied > 0
    assert_nothing_held(engine)


@pytest.mark.parametrize("name", QUANTISED)
def test_batch_invariant(name):
    engine = make_engine(kv_format=name, batch_invariant=True)
    alone = engine.generate(PROMPT, max_new_tokens=10, do_sample=True, seed=5, logprobs=True)
    together = engine.generate([PROMPT, [1, 2, 3], PROMPT[:9]], max_new_tokens=10, do_sample=True, seed=[5, 6, 7])
    assert together[0].token_ids == alone.token_ids


def test_refused_by_name_before_anything_runs():
    with pytest.raises(ValueError, match="kv_format='int3': expected one of 'auto', 'int8', 'fp8'"):
        make_engine(kv_format="int3")
    with pytest.raises(ValueError, match=r"kv_format='bfloat16': K and V are float32"):
        make_engine(kv_format="bfloat16")
    with pytest.raises((ValueError, ab.BackendUnavailable), match="cuda"):
        make_engine(kv_format="int8", backend="cuda")
