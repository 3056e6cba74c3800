"""A model under torch.compile over a tree: one graph, no break, and no recompilation while rows and topology change.

Dynamo's own counters are asked. Its "eager" backend runs the graph as traced, so nothing here waits for a compiler, but
for the one model that goes through inductor.
"""

from __future__ import annotations

import engine_kit
import hf_kit
import pytest
import torch
from torch._dynamo.utils import counters

import anabranch as ab

pytestmark = pytest.mark.compiled

# One graph for the first number of rows, one for any number, one for a single row (torch.compile makes 1 special).
MOST_GRAPHS = 4


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def grown(model, shape_of, forward, steps: int = 20) -> list[torch.Tensor]:
    """Scores of a tree that forks, joins and loses branches while it decodes."""
    cache = ab.TreeCache.for_model(shape_of, num_pages=256, page_size=4)
    ids = torch.Generator().manual_seed(1)
    scores: list[torch.Tensor] = []

    def run(rows):
        step = cache.step(rows)
        given = torch.randint(3, hf_kit.VOCAB, (step.num_rows,), generator=ids)
        scores.append(forward(model, given, step))

    trunk = cache.branch()
    run({trunk: 9})
    kids: list[ab.Branch] = []
    for at in range(steps):
        if at in (1, 4, 9):
            kids += cache.fork(trunk, at)
        if at == 7:
            cache.join(trunk, [kids.pop(0), kids.pop(0)])
        if at in (12, 14):
            cache.release(kids.pop())
        run({branch: 1 + (at == 15) for branch in [trunk, *kids]})
    return scores


@torch.no_grad()
def own_loop(model, ids, step) -> torch.Tensor:
    return model(input_ids=ids[None], position_ids=step.position_ids[None], tree_step=step, use_cache=False).logits[0]


def assert_no_trap() -> None:
    assert not counters["graph_break"], counters["graph_break"]
    assert counters["stats"]["unique_graphs"] <= MOST_GRAPHS


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gpt-oss"])
def test_a_loop_of_ones_own(family):
    config, options = hf_kit.FAMILIES[family]
    model = hf_kit.build(config, **options, **({} if "layer_types" in options else {"num_hidden_layers": 2}))
    expected = grown(model, model, own_loop)
    got = grown(torch.compile(model, backend="eager"), model, own_loop)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)
    assert_no_trap()


def test_a_model_that_leaves_its_window_to_the_mask():
    """PhiMoE passes attention no window; under torch.compile, too, its mask is where the window is found."""
    model = hf_kit.build(
        "PhimoeConfig", num_hidden_layers=2, num_local_experts=2, num_experts_per_tok=1, sliding_window=hf_kit.WINDOW
    )
    expected = grown(model, model, own_loop, steps=5)
    got = grown(torch.compile(model, backend="eager"), model, own_loop, steps=5)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)
    wide = hf_kit.build("PhimoeConfig", num_hidden_layers=2, num_local_experts=2, num_experts_per_tok=1)
    assert not torch.allclose(grown(wide, wide, own_loop, steps=5)[-1], expected[-1])


def test_through_inductor():
    model = hf_kit.build("LlamaConfig", num_hidden_layers=1)
    expected = grown(model, model, own_loop)
    got = grown(torch.compile(model, dynamic=True), model, own_loop)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    assert_no_trap()


@pytest.mark.parametrize("how", ["compiled", "in place", "afterwards", "layer by layer"])
def test_an_engine(how):
    prompt = [3, 4, 5, 6, 7]
    expected = engine_kit.make_engine(compile=False).generate(
        prompt, strategy=engine_kit.Nested(), max_new_tokens=40, seed=3
    )
    model = engine_kit.make_model()
    if how == "compiled":
        model = torch.compile(model, backend="eager")
    elif how == "in place":
        model.compile(backend="eager")
    elif how == "layer by layer":
        for layer in model.model.layers:
            layer.compile(backend="eager")
    engine = ab.Engine(model, num_pages=256, page_size=4)
    if how == "afterwards":
        engine.model = torch.compile(engine.model, backend="eager")
    got = engine.generate(prompt, strategy=engine_kit.Nested(), max_new_tokens=40, seed=3)
    assert (got.token_ids, got.tree) == (expected.token_ids, expected.tree)
    assert not counters["graph_break"], counters["graph_break"]
    assert 0 < counters["stats"]["unique_graphs"] <= MOST_GRAPHS * (2 if how == "layer by layer" else 1)
    engine_kit.assert_nothing_held(engine)


def test_wrong_calls_are_told_when_the_graph_runs():
    model = hf_kit.build("LlamaConfig", num_hidden_layers=1)
    compiled = torch.compile(model, backend="eager", dynamic=True)
    cache = ab.TreeCache.for_model(model, num_pages=16, page_size=4)
    trunk = cache.branch()
    step = cache.step({trunk: 3})
    ids = torch.tensor([[3, 4, 5]])

    def call(step, positions=None, ids=ids, **options):
        positions = step.position_ids[None] if positions is None else positions
        with torch.no_grad():
            return compiled(input_ids=ids, position_ids=positions, tree_step=step, use_cache=False, **options)

    with pytest.raises(ValueError, match="position_ids: with tree_step pass"):
        call(step, positions=step.position_ids[None] + 1)
    with pytest.raises(ValueError, match="tree_step has 3 rows, but the model was given 2"):
        call(step, ids=ids[:, :2], positions=torch.tensor([[0, 1]]))
    with pytest.raises(ValueError, match="attention_mask: must not be given"):
        call(step, attention_mask=torch.ones(1, 3, dtype=torch.long))
    call(step)  # none of those wrote anything
    with pytest.raises(ValueError, match="already written"):
        call(step)
    stale = cache.step({trunk: 3})
    cache.truncate(trunk, 3)
    with pytest.raises(ValueError, match="moved on"):
        call(stale)


def test_a_gradient_is_refused_when_it_is_asked_for():
    model = hf_kit.build("LlamaConfig", num_hidden_layers=1)
    compiled = torch.compile(model, backend="aot_eager", dynamic=True)
    cache = ab.TreeCache.for_model(model, num_pages=16, page_size=4)
    step = cache.step({cache.branch(): 3})
    ids = torch.tensor([[3, 4, 5]])
    logits = compiled(
        input_ids=ids, position_ids=step.position_ids[None], tree_step=step, use_cache=False
    ).logits  # people forget no_grad
    with pytest.raises(RuntimeError, match="attention over a TreeCache has no gradient"):
        logits.sum().backward()


def test_opcheck():
    cache = ab.TreeCache(num_layers=3, num_kv_heads=2, head_dim=32, num_pages=8)
    step = cache.step({cache.branch(): 3})
    q, k = torch.randn(1, 4, 3, 32), torch.randn(1, 2, 3, 32)
    # Each check runs the op, and a layer is written once: one layer a check.
    for layer, check in enumerate(("test_schema", "test_faketensor", "test_autograd_registration")):
        args = (q, k, k, step.handle, step.position_ids[None], None, 0.2, 0.0, 0, layer, "test", False, "auto", "")
        torch.library.opcheck(torch.ops.anabranch.tree_layer.default, args, test_utils=check)
