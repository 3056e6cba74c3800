"""DecodeGraph on a GPU: what tests/runner/test_graph.py does with a tape in the CUDA graph's place."""

from __future__ import annotations

import pytest
import torch
from engine_kit import Nested, make_model

import anabranch as ab
from anabranch import backends
from anabranch.errors import TopologyChanged
from anabranch.runner.eager import forward

BACKENDS = [
    pytest.param(name, marks=pytest.mark.skipif(backends.unavailable(name) is not None, reason=f"{name}: not here"))
    for name in ("triton", "cuda")
]
PROMPT = [5, 6, 7, 8, 9, 10, 11]


def gpu_model():
    model = make_model().to("cuda")
    ab.hf.enable(model)
    return model


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("strategy", [None, ab.SelfConsistency(5, max_new_tokens=40), Nested()], ids=repr)
def test_the_same_tokens_with_and_without(backend, strategy):
    model = gpu_model()
    graphs, eager = (
        ab.Engine(model, num_pages=600, page_size=4, backend=backend, cuda_graphs=on) for on in (True, False)
    )
    options = dict(strategy=strategy, seed=3, max_new_tokens=60, eos_token_id=None, logprobs=True)
    prompts = [PROMPT, [1, 2, 3], list(range(40, 60))]
    want = eager.generate(prompts, **options)
    for _ in range(2):
        got = graphs.generate(prompts, **options)
        assert [r.token_ids for r in got] == [r.token_ids for r in want]
    assert graphs.graphs.replays > 5 and eager.graphs is None


def tree(model, kids=6):
    cache = ab.TreeCache.for_model(model, num_pages=600, page_size=4)
    trunk = cache.branch()
    with torch.no_grad():
        forward(model, torch.arange(3, 103, device="cuda"), cache.step({trunk: 100}))
    return cache, cache.fork(trunk, kids)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_loop_of_ones_own_waits_for_nothing_and_allocates_nothing(backend):
    model = gpu_model()
    (cache, branches), (other, twins) = tree(model), tree(model)
    decode = ab.DecodeGraph(model, cache, backend)
    ids = torch.arange(6, device="cuda")
    for i in range(100):  # beyond the 64 steps that a plan lasts
        step, twin = cache.step({b: 1 for b in branches}), other.step({b: 1 for b in twins})
        if decode.scores is not None and i > 8 and i % 16 == 0:
            torch.cuda.set_sync_debug_mode("error")
            held = torch.cuda.memory_allocated()
        replays = decode.replays
        try:
            logits = decode(ids, step)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        if decode.replays > replays and i > 8 and i % 16 == 0:
            assert torch.cuda.memory_allocated() == held
        with torch.no_grad():
            want = forward(model, ids, twin, backend)
        torch.testing.assert_close(logits, want, atol=1e-4, rtol=1e-4)
        ids = want.argmax(-1)
    assert decode.captures == 1 and decode.replays > 90


@pytest.mark.parametrize("backend", BACKENDS)
def test_forks_joins_and_ends_are_replayed(backend):
    model = gpu_model()
    (cache, branches), (other, twins) = tree(model, 3), tree(model, 3)
    decode = ab.DecodeGraph(model, cache, backend)
    for i in range(40):
        for c, found in ((cache, branches), (other, twins)):
            if i % 7 == 3:
                found += c.fork(found[i % len(found)], 2)
            if i % 11 == 9:
                c.release(found.pop(0))
        ids = torch.arange(3, 3 + len(branches), device="cuda")
        logits = decode(ids, cache.step(dict.fromkeys(branches, 1)))
        with torch.no_grad():
            want = forward(model, ids, other.step(dict.fromkeys(twins, 1)), backend)
        torch.testing.assert_close(logits, want, atol=1e-4, rtol=1e-4)
    assert decode.captures == 1 and decode.replays == 37


def test_a_model_that_reads_back_runs_as_usual(recwarn):
    model = gpu_model()
    real = type(model.model.norm).forward

    def norm(self, x):
        return real(self, x if x.sum().item() != 0.5 else x * 2)

    model.model.norm.forward = norm.__get__(model.model.norm)
    engine = ab.Engine(model, num_pages=600, page_size=4)
    plain = ab.Engine(model, num_pages=600, page_size=4, cuda_graphs=False)
    got, want = (e.generate(PROMPT, max_new_tokens=20, eos_token_id=None) for e in (engine, plain))
    assert got.token_ids == want.token_ids and engine.graphs.captures == 0
    told = [str(w.message) for w in recwarn if "without a CUDA graph" in str(w.message)]
    assert len(told) == 1 and "waits for the device" in told[0]


def test_a_failing_capture_leaves_everything_usable(recwarn):
    """The same without watching first: the capture itself fails, and the next one must not suffer from it."""
    model = gpu_model()
    cache, branches = tree(model)
    decode = ab.DecodeGraph(model, cache)
    decode._watched = True
    real = type(model.model.norm).forward
    model.model.norm.forward = (lambda self, x: real(self, x * x.new_ones(1).item())).__get__(model.model.norm)
    ids = torch.arange(6, device="cuda")
    for _ in range(6):
        decode(ids, cache.step({b: 1 for b in branches}))
    assert decode.captures == 0 and sum("without a CUDA graph" in str(w.message) for w in recwarn) == 1
    del model.model.norm.forward
    fresh = ab.DecodeGraph(model, cache)
    for _ in range(6):
        logits = fresh(ids, cache.step({b: 1 for b in branches}))
    assert fresh.replays == 3 and bool(logits.isfinite().all())


def test_a_step_made_inside_a_capture_is_refused():
    model = gpu_model()
    cache, branches = tree(model)
    graph = torch.cuda.CUDAGraph()
    x = torch.zeros(4, device="cuda")
    with torch.cuda.graph(graph):
        x += 1
        with pytest.raises(TopologyChanged, match="make and use steps outside the capture"):
            _ = cache.step({b: 1 for b in branches}).position_ids
    graph.replay()
    assert x.sum().item() == 4
