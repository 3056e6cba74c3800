"""`Engine(compile=…)`: compiled steps compute what eager ones do, in two graphs for whatever rows and trees come, and a
model that changes under them is noticed.

Most tests run the traced graphs as they are, without inductor: what is traced, when, and what is noticed does not
depend on it. `compiler` has what would have been compiled.
"""

from __future__ import annotations

import json
import random
import warnings

import engine_kit
import hf_kit
import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import anabranch as ab
from anabranch.engine import Token
from anabranch.hf import tree as hf_tree
from anabranch.runner import compile_times, compiled, tracing
from anabranch.runner.compiled import CompiledForward
from anabranch.runner.linear import linear_context
from anabranch.runner.tracing import use_own_linear

pytestmark = pytest.mark.compiled

PROMPT = [3, 4, 5, 6, 7]
inductor = tracing.inductor


@pytest.fixture(autouse=True)
def compiler(monkeypatch):
    """Graphs as traced, and how many there were."""
    made: list[torch.fx.GraphModule] = []

    def as_traced(graph, inputs):
        made.append(graph)
        return graph.forward

    monkeypatch.setattr(tracing, "inductor", as_traced)
    torch._dynamo.reset()
    counters.clear()
    yield made
    torch._dynamo.reset()


def compiled_engine(model=None, **options) -> ab.Engine:
    return ab.Engine(model or engine_kit.make_model(), num_pages=256, page_size=4, compile=True, **options)


def answer(engine, strategy=None, n=12, **options):
    result = engine.generate(PROMPT, strategy=strategy, max_new_tokens=n, seed=3, **options)
    engine_kit.assert_nothing_held(engine)
    return result.token_ids, result.tree


def eager(model, **options):
    return answer(ab.Engine(model, num_pages=256, page_size=4, compile=False), **options)


# ------------------------------------------------------------------------------------------------ the same tokens


FAMILIES = ["llama", "qwen3", "mistral", "gemma2", "gpt-oss", "granite"]


def family_model(family: str) -> nn.Module:
    config, options = hf_kit.FAMILIES[family]
    return hf_kit.build(config, **options, **({} if "layer_types" in options else {"num_hidden_layers": 2}))


def assert_same_generations(family: str) -> None:
    model = family_model(family)
    one, other = (ab.Engine(model, num_pages=256, page_size=4, compile=c) for c in (True, False))
    for seed, strategy in enumerate((ab.SelfConsistency(4), engine_kit.Nested(), None)):
        told = dict(strategy=strategy, max_new_tokens=20, seed=seed, do_sample=strategy is not None)
        got, want = one.generate([PROMPT, [9, 8]], **told), other.generate([PROMPT, [9, 8]], **told)
        assert [(r.token_ids, r.tree) for r in got] == [(r.token_ids, r.tree) for r in want]
    assert one.compiled, one.compiled
    assert counters["stats"]["unique_graphs"] == one.compiled.compilations == 2
    assert not counters["graph_break"]
    engine_kit.assert_nothing_held(one)


@pytest.mark.parametrize("family", FAMILIES)
def test_whole_generations(family):
    assert_same_generations(family)


def test_steps_of_many_rows_of_prompts_run_as_they_are(monkeypatch):
    monkeypatch.setattr(compiled, "MOST_READ", 20)
    model, ran = engine_kit.make_model(), []
    engine = compiled_engine(model, prefix_cache=False)
    answer(engine)
    assert engine.compiled
    forward = compiled.CompiledForward._compiled
    monkeypatch.setattr(
        compiled.CompiledForward, "_compiled", lambda *given: ran.append(given[3].num_rows) or forward(*given)
    )
    prompts = [list(range(2, 22)), list(range(2, 23))]
    want = ab.Engine(model, num_pages=256, page_size=4, compile=False)
    for prompt in prompts:
        told = dict(max_new_tokens=3, eos_token_id=None)
        assert engine.generate(prompt, **told).token_ids == want.generate(prompt, **told).token_ids
    assert ran == [20, 1, 1, 1, 1]  # and not 21


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_whole_generations_through_inductor(family, monkeypatch):
    monkeypatch.setattr(tracing, "inductor", inductor)
    assert_same_generations(family)


def test_through_inductor_and_kept_on_disk(monkeypatch, tmp_path):
    monkeypatch.setattr(tracing, "inductor", inductor)
    monkeypatch.setenv("ANABRANCH_CACHE", str(tmp_path))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    model = hf_kit.build("LlamaConfig", num_hidden_layers=1)
    want = eager(model, strategy=engine_kit.Nested(), n=40)
    for hits in (0, 2):  # the second engine finds what the first had compiled
        engine = compiled_engine(model)
        assert answer(engine, engine_kit.Nested(), 40) == want
        assert engine.compiled, engine.compiled
        assert counters["inductor"]["fxgraph_cache_hit"] == hits
    assert any((tmp_path / "compiled").iterdir())


def test_bfloat16_within_rounding():
    model = hf_kit.build("LlamaConfig").to(torch.bfloat16)
    cache, other = (ab.TreeCache.for_model(model, num_pages=64, page_size=4) for _ in range(2))
    one = CompiledForward(model, cache, "auto", True, None, linear_context(model))
    two = CompiledForward(model, other, "auto", False, None, linear_context(model))
    for got, want in zip(random_steps(one, model, cache, 12), random_steps(two, model, other, 12), strict=True):
        hf_kit.assert_close(got.float(), want.float(), 0.05)
    assert one.on, one


# ------------------------------------------------------------------------------------------------ no recompilation


@torch.inference_mode()
def random_steps(run, model, cache, steps: int = 60, most: int = 64) -> list[torch.Tensor]:
    """Scores of a tree at random: prefills, forks, joins and ends, 1 to `most` rows a step."""
    pick = random.Random(4)
    branches: list[ab.Branch] = []
    found = []
    for at in range(steps):
        if not branches or (len(branches) < 20 and pick.random() < 0.3):
            branches.append(cache.branch())
        if pick.random() < 0.4 and (long := [b for b in branches if b.length]) and len(branches) < 40:
            branches += cache.fork(pick.choice(long), pick.randint(1, 12))
        if at % 11 == 10:
            parent = next(b for b in branches if b.length)
            kids = cache.fork(parent, 2)
            run(model, *packed(pick, cache, dict.fromkeys(kids, 2)))
            cache.join(parent, kids)
        if at % 17 == 16:
            for gone in branches[3:]:
                cache.release(gone)
            del branches[3:]
        chosen = pick.sample(branches, 1 if at % 5 == 4 else pick.randint(1, len(branches)))
        rows = {b: 1 if b.length and pick.random() < 0.8 else pick.randint(1, 3) for b in chosen}
        if at % 5 == 4:
            rows = {b: 1 for b in rows}
        while sum(rows.values()) > most:
            rows.popitem()
        found.append(run(model, *packed(pick, cache, rows)))
    return found


def packed(pick, cache, rows):
    step = cache.step(rows)
    ids = torch.tensor([pick.randrange(hf_kit.VOCAB) for _ in range(step.num_rows)])
    keep = step.last_rows if pick.random() < 0.5 else torch.arange(step.num_rows)
    return ids, step, keep


@pytest.mark.parametrize("family, steps", [("llama", 60), ("gpt-oss", 15)])
def test_no_recompilation_while_rows_and_trees_change(family, steps, compiler):
    model = family_model(family)
    cache, other = (ab.TreeCache.for_model(model, num_pages=512, page_size=4) for _ in range(2))
    one = CompiledForward(model, cache, "auto", True, None, linear_context(model))
    two = CompiledForward(model, other, "auto", False, None, linear_context(model))
    found, expected = random_steps(one, model, cache, steps), random_steps(two, model, other, steps)
    for got, want in zip(found, expected, strict=True):
        hf_kit.assert_close(got, want)
    assert one.on, one
    assert len(compiler) == counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]


def test_linear_layers_of_a_graph_run_our_kernel(compiler):
    """Per layer q, k and v as one op, gate and up as one, two others; and the head. None of torch's is left where ours
    takes any number of rows."""
    answer(compiled_engine(own_linear=True))
    for graph in compiler:
        targets = [node.target for node in graph.graph.nodes]
        together = [n for n in graph.graph.nodes if n.target is torch.ops.anabranch.linear_rows_of_one.default]
        assert sorted(len(node.args[1]) for node in together) == [2, 2, 3, 3]
        assert targets.count(torch.ops.anabranch.linear_rows.default) == 2 * 2 + 1
        assert torch._C._nn.linear not in targets
    compiler.clear()
    answer(compiled_engine(own_linear=False))
    assert compiler
    for graph in compiler:
        targets = [node.target for node in graph.graph.nodes]
        assert torch.ops.anabranch.linear_rows.default not in targets
        assert torch.ops.anabranch.linear_rows_of_one.default not in targets


def test_opcheck_of_the_linear_op():
    x, weight, bias = torch.randn(2, 3, 16), torch.randn(8, 16), torch.randn(8)
    for most in (0, 1 << 40):
        torch.library.opcheck(torch.ops.anabranch.linear_rows.default, (x, weight, bias, most))
        got = torch.ops.anabranch.linear_rows(x, weight, None, most)
        torch.testing.assert_close(got, nn.functional.linear(x, weight))


def test_opcheck_of_linear_layers_of_one_input():
    x, weights, biases = torch.randn(2, 3, 16), [torch.randn(n, 16) for n in (8, 1, 5)], [None, torch.randn(1), None]
    for most in (0, 1 << 40):
        torch.library.opcheck(torch.ops.anabranch.linear_rows_of_one.default, (x, weights, biases, most))
        got = torch.ops.anabranch.linear_rows_of_one(x, weights, biases, most)
        for part, weight, bias in zip(got, weights, biases, strict=True):
            torch.testing.assert_close(part, nn.functional.linear(x, weight, bias))


def test_weights_made_in_the_graph_are_not_joined():
    """A weight that a layer computes is not there yet where the first layer of its input stands."""

    def function(x, w):
        return torch._C._nn.linear(x, w), torch._C._nn.linear(x, w + 1)

    graph = torch.fx.symbolic_trace(function)
    x, w = torch.randn(3, 16), torch.randn(8, 16)
    for node in graph.graph.nodes:
        if node.op != "output":
            node.meta["example_value"] = x if node.name == "x" else w
    assert use_own_linear(graph, True) == 2
    for got, want in zip(graph(x, w), function(x, w), strict=True):
        torch.testing.assert_close(got, want)


# ------------------------------------------------------------------------------------------------ when


def test_the_first_token_waits_for_no_compiler(compiler):
    engine = compiled_engine()
    events = engine.stream(PROMPT, max_new_tokens=12)
    next(event for event in events if isinstance(event, Token))
    assert not compiler
    list(events)
    assert len(compiler) == 2 and engine.compiled


@pytest.fixture
def own_folder(tmp_path, monkeypatch):
    """Notes of how long compiling took are this test's own; the compiler's work is kept where it was."""
    monkeypatch.setattr(compile_times, "cache_folder", lambda: tmp_path)
    return tmp_path


def test_auto_waits_no_longer_than_compiling_took_before(compiler, own_folder, monkeypatch):
    def waits(**options):
        engine = ab.Engine(engine_kit.make_model(), num_pages=256, page_size=4, **options)
        answer(engine)
        return engine.compiled.reason

    assert "compiles after 120 s" in waits()
    assert "graphs in" in waits(compile=True)
    assert "compiles after 25 s" in waits()  # the compiler's work is there, and has not been used yet
    assert "compiles after 120 s" in waits(backend="reference")
    assert "graphs in" in waits(compile=True)
    note = next(own_folder.glob("compiled/times/*.json"))
    assert 0 < json.loads(note.read_text())["again"] < 120
    note.write_text(json.dumps({"again": 7.4}))
    assert "compiles after 7 s" in waits()
    for broken in ("", "[]", '{"again": "soon"}'):
        note.write_text(broken)
        assert "compiles after 120 s" in waits()
    note.unlink()
    monkeypatch.setattr(compile_times, "cache_folder", lambda: own_folder / "file")
    (own_folder / "file").write_text("")  # where no folder can be made
    assert "graphs in" in waits(compile=True)


def test_auto_compiles_nothing_in_short_work(compiler, own_folder):
    engine = ab.Engine(engine_kit.make_model(), num_pages=256, page_size=4)
    answer(engine, engine_kit.Nested(), 40)
    assert not compiler and not engine.compiled
    assert "compiles after 120 s" in engine.compiled.reason


@pytest.mark.parametrize("ratio, on", [(0.8, True), (1.02, False)])
def test_auto_keeps_what_is_faster(ratio, on, compiler, monkeypatch):
    monkeypatch.setattr(compiled, "AUTO_SECONDS", 0.0)
    monkeypatch.setattr(CompiledForward, "_ratios", lambda *_: {1: ratio, 16: ratio})
    engine = ab.Engine(engine_kit.make_model(), num_pages=256, page_size=4, compile="auto")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert answer(engine) == eager(engine_kit.make_model())
    assert bool(engine.compiled) is on
    assert len(compiler) == 2
    if not on:
        assert "not faster here" in repr(engine.compiled) and "1.02 for 16" in repr(engine.compiled)


def test_auto_times_both(compiler, monkeypatch):
    monkeypatch.setattr(compiled, "AUTO_SECONDS", 0.0)
    monkeypatch.setattr(compiled, "AUTO_GAIN", float("inf"))
    engine = ab.Engine(engine_kit.make_model(), num_pages=256, page_size=4)
    assert answer(engine) == eager(engine_kit.make_model())
    assert engine.compiled and len(compiler) == 2


# ------------------------------------------------------------------------------------------------ where it cannot be


def test_refused_by_name(monkeypatch):
    model = engine_kit.make_model()
    with pytest.raises(ValueError, match="compile='yes'; pass True, False or 'auto'"):
        ab.Engine(model, num_pages=8, compile="yes")
    with pytest.raises(ValueError, match="compile=True: batch_invariant=True"):
        ab.Engine(model, num_pages=8, compile=True, batch_invariant=True)
    whole, in_place, layers = (engine_kit.make_model() for _ in range(3))
    whole = torch.compile(whole, backend="eager")
    in_place.compile(backend="eager")
    layers.model.layers[1].compile(backend="eager")
    for done in (whole, in_place, layers):
        with pytest.raises(ValueError, match=r"compile=True: the model is compiled by torch.compile already"):
            ab.Engine(done, num_pages=8, compile=True)
        with pytest.raises(ValueError, match=r"batch_invariant=True: the model is compiled by torch.compile"):
            ab.Engine(done, num_pages=8, batch_invariant=True)
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    with pytest.raises(ValueError, match="compile=True: no C\\+\\+ compiler: no-such-compiler is not on PATH"):
        ab.Engine(model, num_pages=8, compile=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine = ab.Engine(model, num_pages=256, page_size=4)
    assert "no C++ compiler" in engine.compiled.reason
    assert answer(engine) == eager(engine_kit.make_model())
    assert "batch_invariant" in ab.Engine(model, num_pages=8, batch_invariant=True).compiled.reason


def test_a_compiler_that_fails(monkeypatch):
    def broken(graph, inputs):
        raise RuntimeError("cc1plus: out of memory")

    monkeypatch.setattr(tracing, "inductor", broken)
    engine = compiled_engine()
    with pytest.warns(UserWarning, match="steps run eagerly.*LlamaForCausalLM cannot be compiled.*out of memory"):
        got = answer(engine)
    assert got == eager(engine_kit.make_model())
    with warnings.catch_warnings():  # said once
        warnings.simplefilter("error")
        assert answer(engine) == got
    assert not engine.compiled


class _Lies(nn.Module):
    def forward(self, x):
        return x * 1.01 if torch.compiler.is_compiling() else x


class _ReadsNumbers(nn.Module):
    def forward(self, x):
        return x if float(x.abs().max()) < 1e9 else x * 0


@pytest.mark.parametrize(
    "part, why",
    [(_Lies, "compiles to something else .* scores of a prefill differ"), (_ReadsNumbers, "cannot be compi")],
)
def test_a_model_that_does_not_compile_to_itself(part, why):
    def model():
        model = engine_kit.make_model()
        model.model.layers[1].mlp.act_fn = nn.Sequential(nn.SiLU(), part())
        return model

    engine = compiled_engine(model())
    with pytest.warns(UserWarning, match=why):
        got = answer(engine, engine_kit.Nested(), 40)
    assert got == eager(model(), strategy=engine_kit.Nested(), n=40)
    assert not engine.compiled
    torch._dynamo.reset()
    counters.clear()
    quiet = ab.Engine(model(), num_pages=256, page_size=4, compile="auto")
    quiet.compiled._seconds = 1e9
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert answer(quiet, engine_kit.Nested(), 40) == got
    assert not quiet.compiled


class _Rounds(nn.Module):
    def forward(self, x):
        return x * (1 + 2**-22) if torch.compiler.is_compiling() else x


@pytest.mark.parametrize("as_much", [100.0, 0.0])
def test_a_row_may_differ_by_as_much_as_rounding_makes_of_it(as_much, monkeypatch):
    """Beyond the bound, what torch's linear layers and the reference attention make of the same row decides."""
    monkeypatch.setattr(compiled, "BOUNDS", {torch.float32: 1e-10})
    monkeypatch.setattr(compiled, "AS_MUCH", as_much)
    model = engine_kit.make_model()
    model.model.layers[1].mlp.act_fn = nn.Sequential(nn.SiLU(), _Rounds())
    engine = compiled_engine(model)
    if as_much:
        answer(engine)
        assert engine.compiled
    else:
        with pytest.warns(UserWarning, match=r"scores of a prefill differ by .*e-0\d of their size, 1e-10 is allowed"):
            answer(engine)
        assert not engine.compiled


def test_16_bits_are_measured_by_float32_too(monkeypatch):
    """Where there is memory for a copy; the model itself stays as it was."""
    monkeypatch.setattr(compiled, "BOUNDS", {torch.bfloat16: 1e-10, torch.float32: 1e-10})
    engine = compiled_engine(engine_kit.make_model().to(torch.bfloat16))
    forward = engine.compiled
    for memory, copies in ((None, 0), (1000, 0), (1 << 40, 1)):
        monkeypatch.setattr(compiled, "available_memory", lambda memory=memory: memory)
        with torch.inference_mode():
            assert len(forward._in_float32(engine.model)) == copies
    assert engine.model.dtype == torch.bfloat16
    answer(engine)
    assert engine.compiled


def test_an_error_in_a_compiled_step_loses_nothing(monkeypatch):
    engine = compiled_engine()
    want = answer(engine)

    def broken(*_, **__):
        raise RuntimeError("no more memory")

    with monkeypatch.context() as patch:
        patch.setattr(hf_tree, "attend", broken)
        with pytest.raises(RuntimeError, match="no more memory"):
            engine.generate(PROMPT, max_new_tokens=4)
    engine_kit.assert_nothing_held(engine)
    assert engine.compiled and answer(engine) == want


# ------------------------------------------------------------------------------------------------ a model that changes


def test_hooks_that_come_and_go(compiler):
    engine = compiled_engine()
    want = answer(engine)
    assert engine.compiled
    seen = []
    hook = engine.model.model.layers[0].mlp.register_forward_hook(lambda *_: seen.append(1))
    with pytest.warns(UserWarning, match="hooks"):
        assert answer(engine) == want
    assert len(seen) == 12
    hook.remove()
    assert answer(engine) == want
    assert len(seen) == 12 and engine.compiled and len(compiler) == 2


def test_hooks_that_are_there_before(compiler):
    engine = compiled_engine()
    seen = []
    hook = engine.model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: seen.append(1))
    with pytest.warns(UserWarning, match="hooks"):
        want = answer(engine)
    assert len(seen) == 12 and not compiler
    hook.remove()
    assert answer(engine) == want
    assert engine.compiled


def _in_place(model):
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(-1.5)


def _another_tensor(model):
    model.model.layers[0].mlp.up_proj.weight.data = torch.flip(model.model.layers[0].mlp.up_proj.weight.data, [0])


def _another_parameter(model):
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = nn.Parameter(torch.flip(layer.weight.data, [0]))


def _another_module(model):
    model.model.layers[1].mlp.act_fn = nn.Tanh()


def _no_layer(model):
    model.model.layers[1].mlp.down_proj.weight.data.zero_()
    model.model.layers[1].self_attn.o_proj = nn.Linear(6 * 32, 48, bias=True)
    nn.init.constant_(model.model.layers[1].self_attn.o_proj.weight, 0.1)
    nn.init.constant_(model.model.layers[1].self_attn.o_proj.bias, -0.1)


def _another_forward(model):
    mlp = model.model.layers[0].mlp
    mlp.forward = lambda x: -type(mlp).forward(mlp, x)


@pytest.mark.parametrize(
    "change", [_in_place, _another_tensor, _another_parameter, _another_module, _no_layer, _another_forward]
)
@pytest.mark.filterwarnings("ignore:anabranch. steps run eagerly")
def test_a_model_that_changes(change):
    engine = compiled_engine()
    before = answer(engine)
    assert engine.compiled
    change(engine.model)
    changed = engine_kit.make_model()
    change(changed)
    want = eager(changed)
    assert want != before
    assert answer(engine) == want
    assert answer(engine) == want


def test_a_model_that_changes_all_the_time(compiler, monkeypatch):
    monkeypatch.setattr(compiled, "MOST_CHANGES", 1)
    engine = compiled_engine()
    with pytest.warns(UserWarning, match="2 times by now"):
        for _ in range(3):
            _another_parameter(engine.model)
            assert answer(engine) == eager(engine.model)
    assert len(compiler) == 2 * 2 and not engine.compiled


def test_another_model(compiler):
    engine = compiled_engine()
    answer(engine)
    torch.manual_seed(9)
    other = engine_kit.make_model()
    ab.hf.enable(other)
    for parameter in other.parameters():
        nn.init.normal_(parameter, std=0.3)
    engine.model = other
    assert answer(engine) == eager(other)


def test_adapters_that_are_switched():
    peft = pytest.importorskip("peft", reason="needs peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    torch.manual_seed(5)
    model = peft.get_peft_model(engine_kit.make_model(), config)
    model.add_adapter("other", config)
    engine, plain = compiled_engine(model), ab.Engine(model, num_pages=256, page_size=4, compile=False)
    found = []
    for adapter in ("default", "other"):
        model.set_adapter(adapter)
        found.append(answer(engine))
        assert found[-1] == answer(plain)
    assert found[0] != found[1]
    with model.disable_adapter():
        assert answer(engine) == answer(plain) == eager(engine_kit.make_model())


def test_two_engines_of_one_class(compiler):
    """Graphs, and the number that torch.compile allows, are each engine's own."""
    for _ in range(5):
        engine = compiled_engine()
        assert answer(engine, n=5)
        assert engine.compiled, engine.compiled
    assert len(compiler) == 10  # more than torch.compile allows for one function
