"""Decode steps as one replay, with a tape in the CUDA graph's place (on a GPU: tests/gpu/test_decode_graph.py)."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from engine_kit import Nested, assert_nothing_held, make_engine, make_model
from graph_kit import HostWork, TapeCapture, as_on_a_device, counted_reads

import anabranch as ab
from anabranch.errors import TopologyChanged
from anabranch.plan import planner
from anabranch.runner import graph
from anabranch.runner.eager import forward
from anabranch.runner.graph import DecodeGraph
from anabranch.strategies import Sequential

PROMPT = [5, 6, 7, 8, 9, 10, 11]


def captured_engine(*args, after=2, **options):
    """An engine as on a GPU, and the capture in the CUDA graph's place."""
    engine = make_engine(*args, own_linear=False, **options)  # a kernel for CPUs, which the tape would not see
    as_on_a_device(engine.cache)
    capture = TapeCapture()
    engine.graphs = DecodeGraph(engine.model, engine.cache, engine.backend, after=after, capture=capture)
    return engine, capture


class Loop:
    """A PyTorch loop of one's own over one trunk and its kids, and its eager twin, which has the last word."""

    decode_backend = "auto"

    def __init__(self, after=2, kids=3, prompt=21, backend="auto", **options):
        self.model = make_model()
        ab.hf.enable(self.model)
        self.caches = [ab.TreeCache.for_model(self.model, num_pages=200, page_size=4) for _ in range(2)]
        as_on_a_device(self.caches[0])
        self.capture = TapeCapture(**options)
        self.decode = DecodeGraph(self.model, self.caches[0], backend, after=after, capture=self.capture)
        self.branches = [[cache.branch()] for cache in self.caches]
        self.ids = torch.arange(3, 3 + prompt)
        self.step([prompt])
        self.fork(0, kids)
        for branches in self.branches:
            del branches[0]
        self.ids = self.ids.expand(kids).contiguous()

    def fork(self, at, n):
        for cache, branches in zip(self.caches, self.branches, strict=True):
            branches += cache.fork(branches[at], n)

    def step(self, counts=None, ids=None):
        """One step of both; the captured one's scores."""
        counts = counts or [1] * len(self.branches[0])
        steps = [
            cache.step(dict(zip(branches, counts, strict=True)))
            for cache, branches in zip(self.caches, self.branches, strict=True)
        ]
        ids = self.ids if ids is None else ids
        got = self.decode(ids, steps[0])
        ids = torch.as_tensor(ids)
        with torch.no_grad():
            want = forward(self.model, ids, steps[1], self.decode_backend, keep=steps[1].last_rows)
        torch.testing.assert_close(
            got, want, atol=5e-5, rtol=5e-5
        )  # a graph has more rows, and products of other shapes
        self.ids = got.argmax(-1)
        self.used = steps[0]
        return got


# ------------------------------------------------------------------------------------------------ a loop of one's own


@pytest.mark.parametrize("after", [2, 4])
def test_a_steady_topology_is_captured_once_and_replayed(after):
    loop = Loop(after)
    for i in range(12):
        loop.step()
        assert (loop.capture.captures, loop.capture.replays) == (int(i >= after), max(0, i + 1 - after))
    assert (loop.decode.captures, loop.decode.replays) == (1, 12 - after)
    for a, b in zip(*loop.branches, strict=True):
        for ours, theirs in zip(loop.caches[0].read(a, 1), loop.caches[1].read(b, 1), strict=True):
            torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=2e-5)


def test_ids_come_as_a_list_too():
    loop = Loop()
    for _ in range(5):
        loop.step(ids=loop.ids.tolist())
    assert loop.capture.replays == 3


def test_a_topology_that_changes_is_replayed_too():
    loop = Loop()
    for _ in range(4):
        loop.step()
    assert loop.capture.replays == 2
    loop.fork(1, 2)  # more rows
    loop.ids = torch.tensor([5, 6, 7, 8, 9])
    for _ in range(4):
        loop.step()
    assert (loop.capture.captures, loop.capture.replays) == (1, 6)
    for cache, branches in zip(loop.caches, loop.branches, strict=True):  # as many rows, another tree
        cache.release(branches.pop())
        branches += cache.fork(branches[0], 1)
    for _ in range(3):
        loop.step()
    assert (loop.capture.captures, loop.capture.replays) == (1, 9)
    loop.step(counts=[1, 2, 1, 1, 1], ids=torch.arange(6))  # not a decode step
    assert (loop.capture.captures, loop.capture.replays) == (1, 9)
    loop.step()
    assert (loop.capture.captures, loop.capture.replays) == (1, 10)
    for branches in loop.branches:  # the same branches in another order
        branches.reverse()
    for _ in range(3):
        loop.step()
    assert (loop.capture.captures, loop.capture.replays) == (1, 13)


def test_a_plan_that_is_full_is_sent_anew():
    loop = Loop()
    for _ in range(75):  # a plan lasts some 64 steps
        loop.step()
    assert (loop.capture.captures, loop.capture.replays) == (1, 73)


def test_steps_between_replays_that_do_not_go_through_it():
    """They use the same arrays: neither may leave the other behind."""
    loop = Loop()
    decode = loop.decode
    for i in range(14):
        if i in (4, 7, 8, 13):
            loop.decode = lambda ids, step: forward(loop.model, ids, step)
            with torch.no_grad():
                loop.step()
        else:
            loop.decode = decode
            loop.step()
    assert decode.replays >= 6


def test_a_step_whose_forward_asks_for_no_plan():
    """The planner has gone on all the same; the device's arrays must be where it is when they are next used."""
    loop = Loop(after=5)
    for backend in ("auto", "auto", "reference", "auto", "reference", "auto", "auto", "auto", "auto"):
        loop.decode.backend = loop.decode_backend = backend
        loop.step()
    assert loop.capture.replays == 2


def test_attention_after_a_replay_sees_the_arrays_as_they_are():
    loop = Loop()
    for _ in range(5):
        loop.step()
        q = torch.randn(3, 6, 32)
        out = [ab.tree_attention(q, loop.caches[0], 1, loop.used, backend=b) for b in ("cpu", "reference")]
        torch.testing.assert_close(*out, atol=1e-5, rtol=1e-5)
    assert loop.capture.replays == 3


def test_nothing_is_waited_for_moved_or_allocated_between_two_steps(monkeypatch):
    """Two copies into buffers that stay, one replay. With ids from the host it is one copy."""
    loop = Loop()
    for _ in range(4):
        loop.step()
    cache, branches = loop.caches[0], loop.branches[0]
    addresses = set()
    result = ("aten.slice.Tensor", [(16, 260)])  # a view, as the first one below
    expected = [
        ("aten.slice.Tensor", [(16,)]),
        ("aten.copy_.default", [(3,), (3,)]),
        ("aten.copy_.default", [(2, 16), (2, 16)]),
        result,
    ]
    for i in range(8):
        step = cache.step({b: 1 for b in branches})
        before = loop.capture.replays
        with counted_reads(loop.capture, monkeypatch) as reads, HostWork(loop.capture) as work:
            ids = [1, 2, 3] if i % 2 else loop.ids
            logits = loop.decode(ids, step)
            assert work.take() == (expected if i % 2 == 0 else [("aten.copy_.default", [(3, 16), (3, 16)]), result])
        assert reads == [] and loop.capture.replays == before + 1
        addresses.add((logits.data_ptr(), logits.shape, logits.stride()))
    assert len(addresses) == 1


def test_the_counters_count(monkeypatch):
    """What the test above would see if there were something to see."""
    capture = TapeCapture()
    with counted_reads(capture, monkeypatch) as reads, HostWork(capture) as work:
        x = torch.ones(3).sum()
        assert bool(x > 1) and x.item() == 3 and int(x) == 3 and x.tolist() == 3
        torch.cuda.synchronize()
        names = [name for name, _ in work.take()]
    assert {"__bool__", "item", "__int__", "tolist", "synchronize"} <= set(reads)
    assert "aten.ones.default" in names and "aten.sum.default" in names


def test_a_graph_for_each_bucket_of_rows():
    loop = Loop(kids=3)
    for n in (0, 40, 40):
        if n:
            loop.fork(0, n)
        for _ in range(3):
            loop.step(ids=torch.arange(len(loop.branches[0])))
    assert loop.capture.captures == 3 and sorted(loop.decode._inputs) == [16, 64, 128]
    replays = loop.capture.replays
    while len(loop.branches[0]) > 1:
        for cache, branches in zip(loop.caches, loop.branches, strict=True):
            while len(branches) > 1 and len(branches) not in (64, 16):
                cache.release(branches.pop())
        loop.step(ids=torch.arange(len(loop.branches[0])))
        for cache, branches in zip(loop.caches, loop.branches, strict=True):
            if len(branches) > 1:
                cache.release(branches.pop())
    assert loop.capture.replays > replays


def test_what_is_recorded_has_the_steps_own_numbers():
    """An earlier graph's would be other rows', and who records by running would write to slots that are not theirs."""
    loop, seen = Loop(kids=3), []

    class Look(TapeCapture):
        def __call__(self, forward):
            seen.append(loop.decode._inputs[graph.row_bucket(len(loop.ids))].all.clone())
            return super().__call__(forward)

    loop.decode._capture = Look()
    for kids in (20, 50):
        for _ in range(3):
            ids = loop.ids.clone()
            loop.step()
        rows = len(ids)
        assert torch.equal(seen.pop()[0, :rows], ids) and not seen
        _, positions, slots = loop.decode._inputs[graph.row_bucket(rows)].all.tolist()
        assert positions[:rows] == loop.used.position_ids.tolist() and slots[:rows] == loop.used.plan.slots.tolist()
        assert set(positions[rows:]) == {0} and set(slots[rows:]) == {-1}
        loop.fork(0, kids)
        loop.ids = torch.arange(len(loop.branches[0]))


def test_a_step_is_used_once():
    loop = Loop()
    for _ in range(4):
        loop.step()
    with pytest.raises(ValueError, match="step: was already written"):
        loop.decode(loop.ids, loop.used)
    stale = loop.caches[0].step({b: 1 for b in loop.branches[0]})
    loop.caches[0].truncate(loop.branches[0][0], 3)
    with pytest.raises(ValueError, match="has moved on"):
        loop.decode(loop.ids, stale)


# ------------------------------------------------------------------------------------------------ what is in the way


def test_a_read_back_found_by_watching(recwarn):
    loop = Loop(notices=["modeling.py, line 3, waits for the device"])
    for _ in range(5):
        loop.step()
    assert (loop.capture.captures, loop.capture.watched) == (0, 1)
    assert ["without a CUDA graph: modeling.py, line 3" in str(w.message) for w in recwarn] == [True]


def test_a_capture_that_fails_is_said_once_and_costs_nothing(recwarn):
    loop = Loop()
    real = type(loop.model.model.norm).forward

    def norm(self, x):
        return real(self, x if x.sum().item() != 0.5 else x * 2)  # a branch on what was computed

    loop.model.model.norm.forward = norm.__get__(loop.model.model.norm)
    for _ in range(6):
        loop.step()
    loop.fork(0, 1)
    loop.ids = torch.arange(4)
    for _ in range(5):
        loop.step()
    assert (loop.decode.captures, loop.decode.replays) == (0, 0)
    assert ["RuntimeError: operation not permitted" in str(w.message) for w in recwarn] == [True]


def test_forward_hooks_are_called_in_every_step(recwarn):
    loop = Loop()
    for _ in range(4):
        loop.step()
    assert loop.capture.replays == 2
    calls = []
    handle = loop.model.model.layers[1].register_forward_hook(lambda *args: calls.append(1))
    for _ in range(3):
        loop.step()
    assert loop.capture.replays == 2 and len(calls) == 2 * 3  # the eager twin's too
    handle.remove()
    loop.step()
    assert loop.capture.replays == 3
    assert ["forward hooks, which a replay would not call" in str(w.message) for w in recwarn] == [True]


def test_autocast_and_training_run_as_usual():
    loop = Loop()
    for _ in range(4):
        loop.step()
    with torch.autocast("cpu", torch.bfloat16), pytest.warns(UserWarning, match="torch.autocast is on"):
        assert not loop.decode._may_capture()
    loop.model.train()
    step = loop.caches[0].step({b: 1 for b in loop.branches[0]})
    with pytest.raises(ValueError, match="is in training mode"):
        loop.decode(loop.ids, step)
    loop.model.eval()
    loop.caches[1].step({b: 1 for b in loop.branches[1]})
    assert loop.capture.replays == 2


def test_an_error_in_a_replay_leaves_the_plan_right():
    """The planner has gone on by then, and the device has not. The same topology, other steps, the same scores."""
    loop = Loop()
    for _ in range(4):
        loop.step()

    def fail():
        raise RuntimeError("CUDA error")

    steps = [c.step({b: 1 for b in branches}) for c, branches in zip(loop.caches, loop.branches, strict=True)]
    loop.decode._graphs[16].replay = fail
    with pytest.raises(RuntimeError, match="CUDA error"):
        loop.decode(loop.ids, steps[0])
    for layer in range(2):  # K and V of the lost step from somewhere else
        k, v = torch.randn(2, 3, 2, 32)
        for cache, step in zip(loop.caches, steps, strict=True):
            cache.write(layer, k, v, step)
    for _ in range(5):
        loop.step()
    assert loop.capture.captures == 2


def test_a_topology_change_inside_a_capture(monkeypatch):
    loop = Loop()
    monkeypatch.setattr(planner, "capturing", lambda device: loop.capture.active)
    cache = loop.caches[0]
    other = cache.branch()
    mlp = loop.model.model.layers[0].mlp
    real = mlp.forward

    def meddle(x):
        if loop.capture.active:
            _ = cache.step({other: 1}).position_ids
        return real(x)

    loop.step()
    loop.step()
    mlp.forward = meddle
    step = cache.step({b: 1 for b in loop.branches[0]})
    with pytest.raises(TopologyChanged, match="make and use steps outside the capture"):
        loop.decode(loop.ids, step)
    mlp.forward = real
    for branch in loop.branches[0]:
        cache.truncate(branch, branch.length - 1)  # what that step did not write
    # A plan that is not there yet, asked for in a capture.
    with pytest.raises(TopologyChanged, match="run one step of this topology eagerly"):
        fresh = cache.step({b: 1 for b in loop.branches[0]})
        assert fresh.position_ids.shape == fresh.slots.shape
        loop.capture.active = True
        fresh.plan.arrays(*next(iter(step.plan.keys())))


@pytest.mark.parametrize(
    "ids,error,match",
    [
        ([1, 2], ValueError, r"ids: expected shape \[3\]"),
        (torch.ones(3), ValueError, "ids: expected integers, got torch.float32"),
        ([1.0, 2.0, 3.0], ValueError, "ids: expected integers"),
        (torch.ones(1, 3, dtype=torch.long), ValueError, r"got \[1, 3\]"),
    ],
)
def test_ids_that_do_not_fit(ids, error, match):
    loop = Loop()
    step = loop.caches[0].step({b: 1 for b in loop.branches[0]})
    with pytest.raises(error, match=match):
        loop.decode(ids, step)
    loop.decode([1, 2, 3], step)  # nothing happened


def test_what_it_refuses():
    loop = Loop()
    with pytest.raises(ValueError, match=r"cache: CUDA graphs need a CUDA device, .* on cpu; move the model there"):
        DecodeGraph(loop.model, loop.caches[0])
    with pytest.raises(ValueError, match="after=1; pass a whole number of at least 2"):
        DecodeGraph(loop.model, loop.caches[0], after=1, capture=loop.capture)
    with pytest.raises(TypeError, match="step: expected the Step"):
        loop.decode([1], "no step")
    with pytest.raises(ValueError, match="step: made by another cache"):
        loop.decode(loop.ids, loop.caches[1].step({loop.branches[1][0]: 1}))
    with pytest.raises(ValueError, match="cuda_graphs=True: CUDA graphs need a CUDA device"):
        make_engine(cuda_graphs=True)
    with pytest.raises(ValueError, match="cuda_graphs=1; pass True, False or None"):
        make_engine(cuda_graphs=1)
    assert make_engine().graphs is None and make_engine(cuda_graphs=False).graphs is None


# ------------------------------------------------------------------------------------------------ the engine's own step

CASES = {
    "plain": (None, dict(max_new_tokens=20)),
    "many": (ab.SelfConsistency(5, max_new_tokens=9), dict()),
    "forks and joins": (Nested(), dict()),
    "sequential": (Sequential(Nested()), dict()),
    "sampled": (ab.SelfConsistency(4, max_new_tokens=12), dict(do_sample=True, temperature=0.9, top_k=20)),
    "logprobs": (ab.SelfConsistency(3, max_new_tokens=9), dict(logprobs=True)),
    "rules": (ab.EntropyFork(threshold=2.0), dict(max_new_tokens=20)),
}


@pytest.mark.parametrize("family,case", [("qwen3", "forks and joins"), *(("llama", case) for case in CASES)])
def test_the_same_tokens_with_and_without(family, case):
    strategy, options = CASES[case]
    options = dict(max_new_tokens=40, eos_token_id=None) | options
    prompts = [PROMPT, [1, 2, 3], list(range(40, 60))]
    eager = make_engine(family, num_pages=600)
    engine, capture = captured_engine(family, num_pages=600)
    want = eager.generate(prompts, strategy=strategy, seed=3, **options)
    for _ in range(2):  # the second call meets what the first left
        got = engine.generate(prompts, strategy=strategy, seed=3, **options)
        assert [r.tree for r in got] == [r.tree for r in want]
        assert_nothing_held(engine)
    assert capture.replays > 5 and capture.captures


def test_searches_beside_replays():
    """Chosen tokens, threads that become others, hidden states: a step that notes those runs without a graph."""
    hidden = ab.STEP(scorer=lambda state: state[0], n=3, step_tokens=6, stop=(), prune=0)
    for strategy in (ab.BeamSearch(width=2), hidden, ab.PruneRefork(n=4, every=8, swap=1, scorer="logprob")):
        options = dict(strategy=strategy, max_new_tokens=30, eos_token_id=None, seed=2)
        want = make_engine(num_pages=600).generate([PROMPT, [1, 2, 3]], **options)
        engine, capture = captured_engine(num_pages=600)
        for _ in range(2):
            assert [r.tree for r in engine.generate([PROMPT, [1, 2, 3]], **options)] == [r.tree for r in want]
            assert_nothing_held(engine)
        assert capture.replays > 5 or strategy is not hidden


def test_the_same_tokens_through_preemption_and_turns():
    for pages, limit in ((30, None), (50, 2)):
        options = dict(max_new_tokens=60, eos_token_id=None)
        prompts = [PROMPT, [1, 2, 3]]
        eager = make_engine(num_pages=600)
        engine, capture = captured_engine(num_pages=pages, max_threads=limit)
        preemptions = 0
        for strategy in (ab.SelfConsistency(4, max_new_tokens=16), Nested()):
            want = eager.generate(prompts, strategy=strategy, seed=1, **options)
            got = engine.generate(prompts, strategy=strategy, seed=1, **options)
            assert [r.tree for r in got] == [r.tree for r in want]
            preemptions += sum(r.metrics.preemptions for r in got)
        assert capture.replays and (preemptions or limit is not None)
        assert_nothing_held(engine)


def test_scores_outlive_the_replay_that_made_them():
    """Threads that stop, wait and go on again, beside others: each with the scores of its own last step."""

    class Late(ab.Strategy):
        def run(self, trunk):
            kids = trunk.fork(3)
            yield [kid.decode(6) for kid in kids]
            rest = kids[1:]
            yield [kid.decode(8) for kid in rest]  # the first waits meanwhile, scores in hand or token to come
            yield [kid.decode(5) for kid in kids]
            trunk.join(kids)
            trunk.insert([3])
            yield trunk.decode(4)

    options = dict(max_new_tokens=60, eos_token_id=None)
    engine, capture = captured_engine()
    for limit in (None, 2):
        engine.max_threads = limit
        want = make_engine(max_threads=limit).generate(PROMPT, strategy=Late(), **options)
        assert engine.generate(PROMPT, strategy=Late(), **options).tree == want.tree
    assert capture.replays


class Wide(ab.Strategy):
    def __init__(self, n):
        self.n = n

    def run(self, trunk):
        kids = trunk.fork(self.n)
        yield [kid.decode(14) for kid in kids]
        trunk.join(kids[1:], "discard")
        yield trunk.join(kids[0])


def steady_steps(strategy, monkeypatch):
    """What the host reads, and does besides, in each step of a generation's steady part."""
    engine, capture = captured_engine(num_pages=600)
    steps, last = [], 0
    with counted_reads(capture, monkeypatch) as reads, HostWork(capture) as work:
        for event in engine.stream(PROMPT, strategy=strategy, eos_token_id=None, max_new_tokens=14):
            if isinstance(event, ab.engine.Token) and capture.replays > last:  # the first token of a replayed step
                steps.append((capture.replays - last, tuple(reads), work.take()))
                last = capture.replays
                reads.clear()
    steady = steps[2:-1]
    assert len(steady) > 5 and {n for n, _, _ in steady} == {1}
    return [names for _, names, _ in steady], [calls for _, _, calls in steady]


def test_a_decode_step_of_the_engine_is_one_replay_and_two_reads(monkeypatch):
    """Whether a score is NaN, and the tokens: all that the host waits for, whatever the number of threads. And the
    operations around the replay are the same in every step, shapes included."""
    for threads in (2, 7):
        reads, calls = steady_steps(Wide(threads), monkeypatch)
        assert all(names == ("__bool__", "tolist") for names in reads), reads[0]
        assert all(c == calls[0] for c in calls)


def test_sampling_with_statistics_reads_as_often_for_many_threads(monkeypatch):
    few, many = (steady_steps(ab.SelfConsistency(n, max_new_tokens=14), monkeypatch)[0] for n in (2, 7))
    assert set(few) == set(many) and len(set(few)) == 1, (few[0], many[0])


def test_nan_scores_of_a_replay_are_refused():
    engine, capture = captured_engine()
    stream = engine.stream(PROMPT, eos_token_id=None, max_new_tokens=20)
    with pytest.raises(ValueError, match=r"returned NaN scores in step .* thread 0, position"):
        for i, _ in enumerate(stream):
            if i == 10:
                assert capture.replays
                engine.model.lm_head.weight.data.fill_(float("nan"))
    assert_nothing_held(engine)


def test_a_models_new_weights_serve_the_next_call():
    engine, capture = captured_engine()
    options = dict(eos_token_id=None, max_new_tokens=10)
    engine.generate(PROMPT, **options)
    fresh = copy.deepcopy(engine.model.lm_head.weight.data.flip(0))
    engine.model.lm_head.weight = torch.nn.Parameter(fresh)
    other = make_engine()
    other.model.lm_head.weight = torch.nn.Parameter(fresh)
    assert engine.generate(PROMPT, **options).token_ids == other.generate(PROMPT, **options).token_ids
    assert capture.captures == 2


# ------------------------------------------------------------------------------------------------ graphs that last


@pytest.mark.parametrize("seed", range(6))
def test_random_topologies_are_replayed_right(seed):
    """Forks, joins, cuts, ends, prefills, branches that pause: the eager twin's scores in every step."""
    rng = random.Random(seed)
    loop = Loop(kids=rng.randint(1, 4))
    for _ in range(60):
        branches = loop.branches[0]
        what = rng.random()
        at = rng.randrange(len(branches))
        if what < 0.15 and len(branches) < 24:
            loop.fork(at, rng.randint(1, 3))
        elif what < 0.25 and len(branches) > 1:
            for cache, found in zip(loop.caches, loop.branches, strict=True):
                cache.release(found.pop(at))
        elif what < 0.32 and branches[at].length > 4:
            for cache, found in zip(loop.caches, loop.branches, strict=True):
                cache.truncate(found[at], found[at].length - 2)
        elif what < 0.4:
            n = rng.randint(1, 2)
            for cache, found in zip(loop.caches, loop.branches, strict=True):
                children = cache.fork(found[at], n)
                step = cache.step(dict.fromkeys(children, 1))
                for layer in range(2):
                    torch.manual_seed(layer)
                    k = torch.randn(n, cache.num_kv_heads, cache.head_dim)
                    cache.write(layer, k, k, step)
                cache.join(found[at], children)
        elif what < 0.5:
            counts = [rng.randint(1, 3) for _ in branches]
            loop.step(counts, torch.randint(3, 250, (sum(counts),)))
            continue
        whole = loop.branches
        if what > 0.85 and len(branches) > 1:  # some pause
            keep = sorted(rng.sample(range(len(branches)), rng.randint(1, len(branches) - 1)))
            loop.branches = [[found[i] for i in keep] for found in whole]
        loop.step(ids=torch.randint(3, 250, (len(loop.branches[0]),)))
        loop.branches = whole
    assert loop.capture.replays > 20 and loop.capture.captures <= 3


def test_kernels_of_triton_read_the_counts():
    loop = Loop(backend="triton", kids=2, prompt=5)
    for i in range(6):
        if i == 3:
            loop.fork(1, 2)
        loop.step(ids=torch.arange(3, 3 + len(loop.branches[0])))
    assert (loop.capture.captures, loop.capture.replays) == (1, 4)


def test_a_model_that_changed_between_two_calls_is_captured_anew():
    engine, capture = captured_engine()
    for change in (lambda: None, lambda: setattr(engine.model.lm_head.weight, "data", engine.model.lm_head.weight * 2)):
        change()
        before = capture.captures
        options = dict(max_new_tokens=12, eos_token_id=None)
        eager = make_engine()
        eager.model.load_state_dict(engine.model.state_dict())
        assert engine.generate(PROMPT, **options).tree == eager.generate(PROMPT, **options).tree
        assert capture.captures == (1 if not before else 1 + (capture.captures > before))
    assert capture.captures == 2


def test_captures_of_a_forking_generation():
    """Three at most where a thousand tokens fork, join and end all the time."""

    class Forking(ab.Strategy):
        def run(self, trunk):
            for n in (2, 5, 3, 7, 4, 6, 8, 3, 7, 5):
                children = trunk.fork([[3 + i] for i in range(n)])
                yield [child.decode(4 + 5 * i) for i, child in enumerate(children)]
                trunk.join(children)
                trunk.insert([9])
                yield trunk.decode(6)

    options = dict(strategy=Forking(), max_new_tokens=2000, eos_token_id=None)
    engine, capture = captured_engine(num_pages=2000)
    got, want = engine.generate(PROMPT, **options), make_engine(num_pages=2000).generate(PROMPT, **options)
    assert got.tree == want.tree
    tokens = got.metrics.sampled_tokens
    assert tokens > 800 and capture.captures <= 3 and capture.replays > 0.9 * (got.metrics.steps - 20)
