"""The whole way on the GPU: prompts in, forks and joins by a strategy or by a model's own decision, tokens out."""

from __future__ import annotations

import pytest
import torch
from engine_kit import Nested, Recorder, assert_dense, assert_nothing_held, make_model

import anabranch as ab

PROMPT = [5, 6, 7, 8, 9, 10, 11]


@pytest.fixture(params=["auto", "triton", "cuda"])
def backend(request):
    if request.param != "auto" and (reason := ab.backends.unavailable(request.param)):
        pytest.skip(reason)
    return request.param


def engine_of(backend, **options):
    return ab.Engine(make_model().cuda(), None, num_pages=256, page_size=4, backend=backend, **options)


def test_plain_decoding_is_generate(backend):
    engine, model = engine_of(backend), make_model().cuda()
    prompts = [PROMPT, list(range(40, 75)), [3]]
    want = []
    for prompt in prompts:
        out = model.generate(torch.tensor([prompt], device="cuda"), do_sample=False, max_new_tokens=24)
        want.append(tuple(out[0, len(prompt) :].tolist()))
    assert [r.token_ids for r in engine.generate(prompts, max_new_tokens=24)] == want
    assert_nothing_held(engine)


@pytest.mark.parametrize("max_rows", [512, 3])
def test_every_row_of_a_fork_join_tree_equals_a_dense_recomputation(backend, max_rows):
    engine, recorder = engine_of(backend, max_rows=max_rows), Recorder()
    result = engine.generate(
        PROMPT, strategy=Nested(), max_new_tokens=100, logits_processor=[recorder], eos_token_id=None
    )
    compared = assert_dense(result, recorder, "llama", tolerance=1e-3)  # the oracle runs on the CPU
    assert compared == result.metrics.sampled_tokens == 6 + 17 + 8 + 3 + 5 + 10 + 4
    assert_nothing_held(engine)


def test_the_packaged_model_decides_and_is_right(backend):
    model, tokenizer = ab.models.load("multiplication", device="cuda", dtype=torch.float32)
    engine = ab.Engine(model, tokenizer, num_pages=400, backend=backend)
    prompts = {"7308 * 4406": 3, "9472 x 8": 0, "38*47=": 2}
    results = engine.generate(list(prompts), strategy=ab.ThreadWeaver())
    for (prompt, threads), product, result in zip(
        prompts.items(), (7308 * 4406, 9472 * 8, 38 * 47), results, strict=True
    ):
        assert result.text.endswith(f"={product}"), prompt
        assert result.metrics.num_threads == threads and result.malformed == ()
    assert_nothing_held(engine)
