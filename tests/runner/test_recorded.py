"""Compiled steps that are replayed without Python between their kernels: the same bits for any tree, nothing stale.

The models are compiled by inductor itself, with our linear layers whatever the machine is.
"""

from __future__ import annotations

import random
from types import SimpleNamespace

import engine_kit
import hf_kit
import pytest
import torch
from torch import nn

import anabranch as ab
from anabranch import _core, _cpu
from anabranch.backends.threads import torch_on_one
from anabranch.runner import compiled as compiled_forward
from anabranch.runner import recorded, recorder
from anabranch.runner.arena import Arena
from anabranch.runner.compiled import CompiledForward, _packed, _trial
from anabranch.runner.linear import linear_context
from anabranch.runner.model_state import Untouched
from anabranch.runner.recorded import Recordings
from anabranch.runner.recorder import Recorder
from anabranch.runner.tracing import Graphs

pytestmark = pytest.mark.compiled
FAMILIES = ["qwen2", "gemma2", "gpt-oss", "deepseek-v3"]


def compiled_graphs(model) -> Graphs:
    graphs = Graphs(own_linear=True)
    graphs.warming = True
    for _, *given in _trial(model, ab.TreeCache.for_model(model, num_pages=96, page_size=4)):
        with torch_on_one():
            graphs(model, *given)
    graphs.warming = False
    return graphs


@pytest.fixture(scope="module")
def compiled():
    """A model and its compiled forward."""
    torch._dynamo.reset()
    for config, options in (hf_kit.FAMILIES[family] for family in FAMILIES):
        hf_kit.build(
            config, **options
        )  # Transformers notes classes as they come, and torch.compile's guards look there
    with torch.inference_mode():
        model = hf_kit.build("LlamaConfig", num_hidden_layers=2)
        yield SimpleNamespace(model=model, graphs=compiled_graphs(model))
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    """The second step of a kind is recorded."""
    monkeypatch.setattr(recorded, "_AFTER", 2)


@pytest.fixture
def graphs(compiled):
    """The compiled forward with nothing recorded."""
    codes = compiled.graphs.recordings._codes
    compiled.graphs.recordings = Recordings()
    compiled.graphs.recordings._codes = codes
    return compiled.graphs


def as_compiled(graphs, model, ids, step, keep):
    """The compiled forward's scores, not recorded."""
    problem, graphs.recordings.problem = graphs.recordings.problem, "not now"
    try:
        with torch_on_one():
            return graphs(model, ids, step, keep)
    finally:
        graphs.recordings.problem = problem


def random_trees(seed: int, steps: int, caches):
    """Steps of a random tree, the same ones over each cache: yields (ids, step, keep) of each."""
    pick = random.Random(seed)
    trees = [[cache.branch()] for cache in caches]
    for _ in range(steps):
        kind = pick.random()
        at, more = pick.randrange(len(trees[0])), pick.randint(1, 3)
        if kind < 0.25 and trees[0][at].length and len(trees[0]) < 9:
            for cache, tree in zip(caches, trees, strict=True):
                tree += cache.fork(tree[at], more)
        elif kind < 0.3 and len(trees[0]) > 4:
            for cache, tree in zip(caches, trees, strict=True):
                cache.release(tree.pop())
        elif kind < 0.35 and trees[0][at].length > 4:
            for cache, tree in zip(caches, trees, strict=True):
                cache.truncate(tree[at], tree[at].length - 3)
        chosen = pick.sample(range(len(trees[0])), pick.randint(1, len(trees[0])))
        rows = {i: 1 if pick.random() < 0.8 else 3 for i in chosen}
        total = sum(rows.values())
        ids = torch.tensor([pick.randrange(hf_kit.VOCAB) for _ in range(total)])
        every = pick.random() < 0.3
        found = []
        for cache, tree in zip(caches, trees, strict=True):
            step = cache.step({tree[i]: n for i, n in rows.items()})
            found.append((ids, step, torch.arange(total) if every else step.last_rows))
        yield found


def kv_of(cache):
    return [torch.cat([cache.k_pages(i).flatten(), cache.v_pages(i).flatten()]) for i in range(cache.num_layers)]


# ------------------------------------------------------------------------------------------------ the same bits


@pytest.mark.parametrize("kv_format", [None, "int8"])
def test_random_trees(compiled, graphs, kv_format):
    """Scores and what lies in the cache, bit for bit, though rows, scores, forks, cuts and ends come as they like."""
    model = compiled.model
    caches = [ab.TreeCache.for_model(model, num_pages=256, page_size=4, kv_format=kv_format) for _ in range(2)]
    for cache in caches:
        for layer in range(cache.num_layers):
            cache.k_pages(layer).zero_()
            cache.v_pages(layer).zero_()
    held = []
    for one, other in random_trees(3, 120, caches):
        with torch_on_one():
            got = graphs(model, *one)
        want = as_compiled(graphs, model, *other)
        assert torch.equal(got, want)
        held.append((got, want))
        held = held[-5:]
        assert all(torch.equal(a, b) for a, b in held), "a later step has written over scores that somebody holds"
    assert all(map(torch.equal, *map(kv_of, caches)))
    assert graphs.recordings.problem is None and graphs.recordings.replays > 40


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family):
    """Biases, softcaps, windows and norms of heads are replayed; experts and latents are not, and run as they did."""
    config, options = hf_kit.FAMILIES[family]
    model = hf_kit.build(config, **options, **({} if "layer_types" in options else {"num_hidden_layers": 2}))
    graphs = compiled_graphs(model)
    caches = [ab.TreeCache.for_model(model, num_pages=128, page_size=4) for _ in range(2)]
    for one, other in random_trees(5, 30, caches):
        with torch_on_one():
            got = graphs(model, *one)
        assert torch.equal(got, as_compiled(graphs, model, *other))
    dense = family in ("qwen2", "gemma2")
    assert (graphs.recordings.replays >= 4) == dense, graphs.recordings.problem


def test_a_number_that_was_another_in_a_model_of_the_class():
    """Then torch.compile hands it over with each step, which a replay does not."""
    model, other = (hf_kit.build("LlamaConfig", num_hidden_layers=1, rms_norm_eps=eps) for eps in (0.1, 0.3))
    compiled_graphs(model)
    graphs = compiled_graphs(other)
    caches = [ab.TreeCache.for_model(other, num_pages=16, page_size=4) for _ in range(2)]
    branches = [cache.branch() for cache in caches]
    for _ in range(6):
        given, same = (_packed(other, c, {b: 1}) for c, b in zip(caches, branches, strict=True))
        with torch_on_one():
            assert torch.equal(graphs(other, *given), as_compiled(graphs, other, *same))
    assert graphs.recordings.replays == 4, graphs.recordings.problem


def test_bfloat16_in_an_engine():
    """Whole generations with and without, by the engine; `replays` counts what was replayed."""
    with torch.inference_mode(False):
        model = engine_kit.make_model().to(torch.bfloat16)
        found = []
        for most in (recorded._MOST_PROBLEMS, 0):
            engine = ab.Engine(model, num_pages=256, page_size=4, compile=True, own_linear=True)
            engine.generate([3, 4, 5], max_new_tokens=5)
            if not most:
                engine.compiled._graphs.recordings.problem = "not now"
            given = dict(strategy=ab.SelfConsistency(4), max_new_tokens=30, seed=3)
            found.append([(r.token_ids, r.tree) for r in engine.generate([[3, 4, 5], [9, 8]], **given)])
            engine_kit.assert_nothing_held(engine)
            assert engine.compiled
            assert (engine.compiled.replays > 20) == bool(most)
        assert found[0] == found[1]


@pytest.mark.parametrize("pages", [256, 11])
def test_the_usual_steps_are_recorded_behind_the_compilation(pages, monkeypatch):
    """As far as there are pages; and whoever is in the cache by then goes on as if nothing had been."""
    monkeypatch.setattr(compiled_forward, "USUAL", 12)
    with torch.inference_mode(False):
        model = engine_kit.make_model()
        given = dict(max_new_tokens=9, eos_token_id=None)
        want = ab.Engine(model, num_pages=256, page_size=4, compile=False).generate([3, 4, 5], **given)
        engine = ab.Engine(model, num_pages=pages, page_size=4, compile=True, own_linear=True)
        assert engine.generate([3, 4, 5], **given).token_ids == want.token_ids
        assert engine.compiled and engine.compiled.replays
        kinds = list(engine.compiled._graphs.recordings._recorded)
        assert sorted(kinds) == [(rows, rows) for rows in range(1, 13 if pages == 256 else 10)]
        engine_kit.assert_nothing_held(engine)


# ------------------------------------------------------------------------------------------------ nothing stale


def forward_of(compiled) -> CompiledForward:
    cache = ab.TreeCache.for_model(compiled.model, num_pages=128, page_size=4)
    forward = CompiledForward(compiled.model, cache, "auto", True, True, linear_context(compiled.model, True))
    return forward


def decoded(forward, model, cache, branch, steps=4):
    return [forward(model, *_packed(model, cache, {branch: 1})) for _ in range(steps)]


def _scaling(model):
    model.model.layers[1].self_attn.scaling *= 3.0


def _data(model):
    weight = model.model.layers[0].mlp.up_proj.weight
    weight.data = weight.data.flip(0).clone()


def _in_place(model):
    model.model.layers[0].mlp.up_proj.weight.mul_(-1.5)


def _buffer(model):
    model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq * 0.5


def _epsilon(model):
    model.model.norm.variance_epsilon = 0.5


@pytest.mark.parametrize("change", [_scaling, _data, _in_place, _buffer, _epsilon])
@pytest.mark.filterwarnings("ignore:anabranch. steps run eagerly")
def test_a_model_that_changes(change):
    model, twin = (hf_kit.build("LlamaConfig", num_hidden_layers=2) for _ in range(2))
    forward = forward_of(SimpleNamespace(model=model))
    caches = [forward._cache, ab.TreeCache.for_model(twin, num_pages=128, page_size=4)]
    branches = [cache.branch() for cache in caches]

    def check(steps):
        for _ in range(steps):
            got = forward(model, *_packed(model, caches[0], {branches[0]: 1}))
            want = forward.eager(twin, *_packed(twin, caches[1], {branches[1]: 1}))
            hf_kit.assert_close(got, want)

    check(8)
    assert forward.on and forward.replays > 2, forward
    change(model), change(twin)
    check(8)
    replays = forward.replays
    check(2)
    assert not forward.on or forward.replays == replays + 2, "after a change, steps are recorded again"


def test_a_class_whose_forward_is_replaced(monkeypatch):
    model = hf_kit.build("LlamaConfig", num_hidden_layers=1)
    untouched = Untouched(model)
    assert untouched(model)
    kind = type(model.model.layers[0].mlp)
    with monkeypatch.context() as patch:
        patch.setattr(kind, "forward", lambda self, x: x)
        assert not untouched(model)
    assert untouched(model)


def test_untouched_sees_attributes_configurations_hooks_and_parameters():
    model = hf_kit.build("LlamaConfig", num_hidden_layers=1)
    untouched = Untouched(model)
    assert untouched(model) and not untouched(hf_kit.build("LlamaConfig", num_hidden_layers=1))
    attention = model.model.layers[0].self_attn
    attention.note = 1
    assert not untouched(model)
    del attention.note
    assert untouched(model)
    before = model.config.rms_norm_eps
    model.config.rms_norm_eps = 1.0
    assert not untouched(model)
    model.config.rms_norm_eps = before
    assert untouched(model)
    hook = attention.register_forward_hook(lambda *_: None)
    assert not untouched(model)
    hook.remove()
    assert untouched(model)
    attention.q_proj.weight = nn.Parameter(attention.q_proj.weight.data, requires_grad=False)
    assert not untouched(model)


def test_held_values():
    one, other = {"a": 1, "b": [2]}, {}
    held = _core.HeldValues([one, other])
    assert held.same()
    other["x"] = 0
    assert not held.same()
    del other["x"]
    assert held.same()
    one["b"] = [2]  # equal, but another object
    assert not held.same()
    with pytest.raises(TypeError):
        _core.HeldValues([3])


def test_another_cache(compiled, graphs):
    """Addresses of pages are of one cache; steps of another are recorded anew."""
    model = compiled.model
    for _ in range(3):
        caches = [ab.TreeCache.for_model(model, num_pages=16, page_size=4) for _ in range(2)]
        branches = [cache.branch() for cache in caches]
        for _ in range(5):
            given = [_packed(model, cache, {branch: 1}) for cache, branch in zip(caches, branches, strict=True)]
            with torch_on_one():
                got = graphs(model, *given[0])
            assert torch.equal(got, as_compiled(graphs, model, *given[1]))
    assert graphs.recordings.replays == 9 and graphs.recordings.problem is None


# ---------------------------------------------------------------------------------------- when nothing is recorded


def steps_of(compiled, graphs, count=6):
    cache = ab.TreeCache.for_model(compiled.model, num_pages=16, page_size=4)
    branch = cache.branch()
    for _ in range(count):
        given = _packed(compiled.model, cache, {branch: 1})
        with torch_on_one():
            yield given, graphs(compiled.model, *given)


def test_steps_that_are_watched_run_as_they_were(compiled, graphs):
    for _ in steps_of(compiled, graphs):
        pass
    replays = graphs.recordings.replays
    assert replays == 4
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        for _ in steps_of(compiled, graphs, 3):
            pass
    assert graphs.recordings.replays == replays


def test_rows_that_read_others_under_an_offset(compiled, graphs):
    model = compiled.model
    cache = ab.TreeCache.for_model(model, num_pages=32, page_size=4)
    one, other = cache.branch(), cache.branch()
    for _ in range(4):
        with torch_on_one():
            graphs(model, *_packed(model, cache, {one: 1}))
    replays = graphs.recordings.replays
    step = cache.step({other: 1}, views={other: [ab.Read(one, 0, 3, offset=2), ab.Read(other)]})
    with torch_on_one():
        graphs(model, torch.tensor([5]), step, step.last_rows)
    assert graphs.recordings.replays == replays


def test_a_step_that_was_used_or_is_stale(compiled, graphs):
    model = compiled.model
    *_, (given, _) = steps_of(compiled, graphs)
    assert graphs.recordings.replays
    replays = graphs.recordings.replays
    with pytest.raises(ValueError, match=r"moved on|already written"), torch_on_one():
        graphs(model, *given)
    assert graphs.recordings.replays == replays


def test_a_token_that_the_model_does_not_have(compiled, graphs):
    """The kernel's own check speaks, through the replay, and the next step is none the worse."""
    model = compiled.model
    cache = ab.TreeCache.for_model(model, num_pages=16, page_size=4)
    branch = cache.branch()
    for _ in range(4):
        with torch_on_one():
            graphs(model, *_packed(model, cache, {branch: 1}))
    step = cache.step({branch: 1})
    with pytest.raises(RuntimeError, match="out of bounds"), torch_on_one():
        graphs(model, torch.tensor([hf_kit.VOCAB + 3]), step, step.last_rows)
    other = cache.fork(branch, 1)[0]
    cache.truncate(other, 4)
    with torch_on_one():
        got = graphs(model, *_packed(model, cache, {other: 1}))
    assert got.isfinite().all()


def test_code_that_is_not_understood(compiled, graphs, monkeypatch):
    """Nothing is recorded, after a few attempts nothing is tried any more, and the scores are as they were."""
    monkeypatch.setattr(recorder, "_GLOBALS", recorder._GLOBALS - {"reinterpret_tensor"})
    monkeypatch.setattr(recorded, "_MOST_PROBLEMS", 1)
    for _, scores in steps_of(compiled, graphs):
        assert scores.isfinite().all()
    assert graphs.recordings.problem == "the compiled code uses reinterpret_tensor"
    assert not graphs.recordings.replays and not len(graphs.recordings)


@pytest.mark.parametrize("lost", ["kernel", "linear", "tree"])
def test_a_call_that_was_not_noted(compiled, graphs, monkeypatch, lost):
    """What is missing from a recording is found before it serves anybody, even where its result still lies there."""
    note, dropped = Recorder._note, []

    def forgetful(self, method, *args, **options):
        if method == lost and not dropped:
            dropped.append(method)
        else:
            note(self, method, *args, **options)

    monkeypatch.setattr(Recorder, "_note", forgetful)
    monkeypatch.setattr(recorded, "_MOST_PROBLEMS", 1)
    caches = [ab.TreeCache.for_model(compiled.model, num_pages=16, page_size=4) for _ in range(2)]
    branches = [cache.branch() for cache in caches]
    for _ in range(4):
        given, same = (_packed(compiled.model, c, {b: 1}) for c, b in zip(caches, branches, strict=True))
        with torch_on_one():
            got = graphs(compiled.model, *given)
        assert torch.equal(got, as_compiled(graphs, compiled.model, *same))
    assert dropped and "something else" in graphs.recordings.problem
    assert not graphs.recordings.replays
    for layer in range(2):
        for one, other in zip(*(c.read(b, layer) for c, b in zip(caches, branches, strict=True)), strict=True):
            assert torch.equal(one, other), "the trial has left its own keys and values behind"


def test_with_gradients_switched_on(compiled, graphs):
    model = compiled.model
    step = ab.TreeCache.for_model(model, num_pages=8, page_size=4)
    given = _packed(model, step, {step.branch(): 1})
    assert recorded._fits(given[1], [given[0]])
    with torch.inference_mode(False), torch.enable_grad():
        assert not recorded._fits(given[1], [given[0]])
    with torch.autocast("cpu", torch.bfloat16):
        assert not recorded._fits(given[1], [given[0]])


def test_kinds_of_steps_that_are_kept(compiled, graphs, monkeypatch):
    """The kind that was used longest ago goes first."""
    monkeypatch.setattr(recorded, "_MOST", 2)
    model = compiled.model
    cache = ab.TreeCache.for_model(model, num_pages=64, page_size=4)
    trunk = cache.branch()
    with torch_on_one():
        graphs(model, *_packed(model, cache, {trunk: 3}))
        kids = cache.fork(trunk, 4)
        for rows in (1, 1, 2, 2, 1, 3, 3):
            graphs(model, *_packed(model, cache, dict.fromkeys(kids[:rows], 1)))
    assert list(graphs.recordings._recorded) == [(1, 1), (3, 3)]


def test_prompts_that_are_not_recorded(compiled, graphs, monkeypatch):
    """A step that reads many rows of prompts and scores few of them runs as it was, however often it comes; one that
    scores all of as many rows is recorded."""
    monkeypatch.setattr(recorded, "_MOST_READ", 5)
    model = compiled.model
    cache = ab.TreeCache.for_model(model, num_pages=64, page_size=4)
    trunk = cache.branch()
    with torch_on_one():
        for count in (6, 6, 6, 5, 5):
            graphs(model, *_packed(model, cache, {trunk: count}))
        kids = cache.fork(trunk, 6)
        for _ in range(2):
            graphs(model, *_packed(model, cache, dict.fromkeys(kids, 1)))
    assert list(graphs.recordings._recorded) == [(5, 2), (6, 6)]


# ---------------------------------------------------------------------------------------- memory, and the C++ side


def test_blocks_are_used_again_once_nobody_has_them():
    arena = Arena()
    one = arena.empty((3, 5), (5, 1), torch.float32)
    view = one[1:]
    assert one.data_ptr() % 64 == 0 and one.stride() == (5, 1)
    other = arena.empty((3, 5), (5, 1), torch.float32)
    assert other.data_ptr() != one.data_ptr()
    place = one.data_ptr()
    del one
    assert arena.empty((2,), (1,), torch.float32).data_ptr() not in (place, other.data_ptr())
    del view
    again = arena.empty((15,), (1,), torch.float32)
    assert again.data_ptr() == place
    assert arena.block_of(again.data_ptr() + 4) is not None and arena.block_of(8) is None
    assert arena.empty((0, 4), (4, 1), torch.bfloat16).numel() == 0


def test_blocks_that_wait_are_few():
    arena = Arena(spare=2)
    held = [arena.empty((5,), (1,), torch.float32) for _ in range(6)]
    assert len(arena.blocks) == 6
    del held[1:]
    one = arena.empty((5,), (1,), torch.float32)
    assert len(arena.blocks) == 3 and one.data_ptr() != held[0].data_ptr()


def test_a_kernel_of_too_many_arguments():
    recording = _cpu.Recording()
    recording.kernel(0, [(0, 1)] * _cpu.Recording.most_arguments)
    assert len(recording) == 1
    with pytest.raises(ValueError, match="arguments"):
        recording.kernel(0, [(0, 1)] * (_cpu.Recording.most_arguments + 1))
    assert len(recording) == 1
