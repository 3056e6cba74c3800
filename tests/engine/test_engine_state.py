"""What `generate` and `stream` leave behind (nothing), and what around them must not matter."""

from __future__ import annotations

import copy
import dataclasses
import os
import random
import warnings
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from engine_kit import Nested, assert_nothing_held, byte_tokenizer, make_engine, make_model
from threads_kit import torch_threads

import anabranch as ab
from anabranch import training

PROMPT = list(range(5, 15))
SAMPLED = dict(max_new_tokens=6, do_sample=True, logprobs=True, min_new_tokens=2)


def half_trained(model):
    """Some parts train, others (a frozen layer) do not."""
    model.train()
    model.model.layers[0].eval()
    model.lm_head.weight.requires_grad_(False)
    return model


def state(engine) -> dict:
    """All that a call might change beside the engine's own cache."""
    model, tokenizer = engine.model, engine.tokenizer
    return {
        "modes": {n: m.training for n, m in model.named_modules()},
        "attributes": {n: sorted(vars(m)) for n, m in model.named_modules()},
        "hooks": {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()},
        "gradients": {n: (p.requires_grad, p.grad is None) for n, p in model.named_parameters()},
        "weights": {n: p.detach().clone() for n, p in model.named_parameters()},
        "config": copy.deepcopy(model.config.to_dict()),
        "generation": (id(model.generation_config), copy.deepcopy(model.generation_config.to_dict())),
        "generation attributes": sorted(vars(model.generation_config)),
        "tokenizer": (tokenizer.padding_side, tokenizer.truncation_side, tokenizer._tokenizer.truncation,
                      tokenizer._tokenizer.padding, len(tokenizer)),
        "torch random": torch.random.get_rng_state(),
        "numpy random": [*map(str, np.random.get_state())],
        "random": random.getstate(),
        "threads": torch.get_num_threads(),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "modes of torch": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "autocast": torch.is_autocast_enabled("cpu"),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warnings": [*map(str, warnings.filters)],
        "environment": dict(os.environ),
    }  # fmt: skip


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(v, b[k]) for k, v in a.items())
    return a == b


def changed(before: dict, after: dict) -> list[str]:
    return [name for name in before if not same(before[name], after[name])]


class Boom(RuntimeError):
    pass


def explode(input_ids, scores):
    if input_ids.shape[1] >= 12:
        raise Boom
    return scores


def whole(engine):
    engine.generate("ab", Nested(), max_new_tokens=40, logprobs=True)


def raising(engine):
    with pytest.raises(Boom):
        engine.generate(PROMPT, max_new_tokens=6, logits_processor=[explode], eos_token_id=None)


def refused(engine):
    with pytest.raises(ValueError):
        engine.generate(PROMPT, num_beams=3)


def abandoned(engine):
    stream = engine.stream([PROMPT, PROMPT[:3]], **SAMPLED)
    for _ in range(3):
        next(stream)
    stream.close()


def collected(engine):
    stream = engine.stream(PROMPT, **SAMPLED)
    next(stream)
    del stream


@pytest.mark.parametrize("options", [{}, dict(own_linear=True), dict(batch_invariant=True)], ids=str)
@pytest.mark.parametrize("call", [whole, raising, refused, abandoned, collected])
def test_nothing_is_left_behind(call, options):
    engine = make_engine(tokenizer=copy.deepcopy(byte_tokenizer()), **options)
    half_trained(engine.model)
    before = state(engine)
    call(engine)
    assert changed(before, state(engine)) == []
    assert_nothing_held(engine)


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def reseeded():
    torch.manual_seed(99)
    np.random.seed(99)
    random.seed(99)
    yield


@contextmanager
def warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


SURROUNDINGS = {
    "float64 by default": lambda: default_dtype(torch.float64),
    "bfloat16 by default": lambda: default_dtype(torch.bfloat16),
    "another default device": lambda: torch.device("meta"),
    "gradients": torch.enable_grad,
    "no gradients": torch.no_grad,
    "inference mode": torch.inference_mode,
    "one thread": lambda: torch_threads(1),
    "another seed": reseeded,
    "warnings are errors": warnings_are_errors,
}


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_globals_do_not_matter(name):
    engine = make_engine()
    expected = engine.generate([PROMPT, PROMPT[:4]], ab.SelfConsistency(3, vote=None), seed=4, **SAMPLED)
    with SURROUNDINGS[name]():
        made = make_engine() if "device" not in name else engine
        for other in (engine, made):
            got = other.generate([PROMPT, PROMPT[:4]], ab.SelfConsistency(3, vote=None), seed=4, **SAMPLED)
            for a, b in zip(got, expected, strict=True):
                assert [k.token_ids for k in walk(a.tree)] == [k.token_ids for k in walk(b.tree)]
                for x, y in zip(logprobs(a.tree), logprobs(b.tree), strict=True):
                    assert x == pytest.approx(y, abs=1e-5)


def walk(node):
    yield from node.runs
    for kid in node.children:
        yield from walk(kid)


def logprobs(node):
    return [x for run in walk(node) for x in run.logprobs or ()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_layout_keeps_the_recorded_numbers(dtype):
    result = make_engine().generate(PROMPT, ab.SelfConsistency(2, vote=None), seed=2, **SAMPLED)
    expected = training.from_trace(result)
    with default_dtype(dtype):
        layout = training.from_trace(result)
        given = dataclasses.replace(expected, recorded=expected.recorded.tolist())
    for got in (layout, given):
        assert got.recorded.dtype == torch.float32
        torch.testing.assert_close(got.recorded, expected.recorded, rtol=0, atol=0, equal_nan=True)
    assert expected.recorded.isfinite().any()


def test_results_hold_no_tensors_of_inference_mode():
    result = make_engine().generate(PROMPT, ab.SelfConsistency(2, vote=None), **SAMPLED)
    assert not any(isinstance(x, torch.Tensor) for run in walk(result.tree) for x in vars(run).values())


def test_two_engines_share_a_model_that_trains():
    model = half_trained(make_model())
    one, other = (ab.Engine(model, num_pages=32, page_size=4) for _ in range(2))
    modes = {n: m.training for n, m in model.named_modules()}
    assert one.generate(PROMPT, **SAMPLED).token_ids == other.generate(PROMPT, **SAMPLED).token_ids
    assert modes == {n: m.training for n, m in model.named_modules()}
