"""The prefix cache: what is found, that it changes no token, who leaves first, and that nothing stale is served."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
import torch
from engine_kit import Nested, Recorder, assert_dense, assert_nothing_held, make_engine, make_model
from programs_of_threads import Anything

import anabranch as ab
from anabranch.kv.prefix import PrefixCache
from anabranch.strategies import SelfConsistency, Strategy

PROMPT = list(range(5, 28))  # 23 tokens, pages of 4
FREE = dict(eos_token_id=None, max_new_tokens=10)


def cached(result) -> int:
    return result.metrics.cached_tokens


# ------------------------------------------------------------------------------------------------ what is found


def test_the_same_prompt_again():
    engine = make_engine()
    first, second, third = (engine.generate(PROMPT, **FREE) for _ in range(3))
    assert (cached(first), cached(second), cached(third)) == (0, 20, 20)  # whole pages of the 22 that may be
    assert first.tree == second.tree == third.tree == make_engine(prefix_cache=False).generate(PROMPT, **FREE).tree
    assert second.metrics.rows == first.metrics.rows - 20 and second.metrics.pages_copied == 0
    stats = engine.stats()
    assert (stats.prefix_lookups, stats.prefix_hits, stats.prefix_tokens, stats.cached_tokens) == (3, 2, 66, 40)
    assert stats.hit_rate == pytest.approx(40 / 66) and stats.pages_kept == 8 and not stats.running
    assert_nothing_held(engine)
    assert ab.engine.EngineStats is type(stats)


def test_off_means_off():
    engine = make_engine(prefix_cache=False)
    for _ in range(2):
        assert cached(engine.generate(PROMPT, **FREE)) == 0
    assert engine.stats().prefix_lookups == engine.stats().pages_kept == 0 == engine.stats().hit_rate
    engine.clear_prefix_cache()
    with pytest.raises(ValueError, match="prefix_cache='yes'"):
        make_engine(prefix_cache="yes")


def test_a_prompt_of_less_than_a_page():
    engine = ab.Engine(make_model(), num_pages=64, page_size=16)
    first, second = (engine.generate(PROMPT[:7], **FREE) for _ in range(2))
    assert (cached(first), cached(second)) == (0, 6) and first.tree == second.tree
    assert_nothing_held(engine)


def test_a_conversation_finds_what_was_said():
    engine, plain = (make_engine(num_pages=400, prefix_cache=on) for on in (True, False))
    said = PROMPT
    for turn in range(4):
        found, expected = (e.generate(said, **(FREE | dict(max_new_tokens=20))) for e in (engine, plain))
        assert found.tree == expected.tree
        # All but what is new, and the last answer's last token, which nobody computed; in whole pages.
        assert cached(found) == (0 if turn == 0 else (len(said) - 4) // 4 * 4)
        said = [*said, *found.token_ids, 70, 71, 72]
    assert_nothing_held(engine)


def test_examples_in_front_and_rollouts():
    engine = make_engine()
    engine.generate([*PROMPT, 99], **FREE)
    result = engine.generate([*PROMPT, 200, 201], **FREE)
    assert cached(result) == 20 and result.tree == make_engine().generate([*PROMPT, 200, 201], **FREE).tree
    hot = dict(do_sample=True, temperature=1.5, top_k=0, **FREE)
    rollouts = [engine.generate(PROMPT, seed=i, **hot) for i in range(4)]
    assert [cached(r) for r in rollouts] == [20] * 4 and len({r.token_ids for r in rollouts}) == 4
    alone = make_engine(prefix_cache=False)
    assert [r.token_ids for r in rollouts] == [alone.generate(PROMPT, seed=i, **hot).token_ids for i in range(4)]


def test_an_agent_comes_back_to_where_it_forked():
    """Finished branches are found as well: what each wrote, and what it wrote that on."""

    @dataclass(frozen=True)
    class Explores(Strategy):
        def run(self, trunk):
            yield trunk.decode(8)
            kids = trunk.fork([[100, 101, 102, 103], [110, 111, 112, 113]])
            yield [kid.decode(8) for kid in kids]

    engine = make_engine()
    result = engine.generate(PROMPT, Explores(), **(FREE | dict(max_new_tokens=60)))
    trunk = list(result.token_ids)
    for kid in result.tree.children:
        context = [*PROMPT, *trunk, *kid.token_ids]
        again = engine.generate([*context, 7], **FREE)
        assert cached(again) == (len(context) - 1) // 4 * 4  # the last token's KV was never computed
        assert again.tree == make_engine(prefix_cache=False).generate([*context, 7], **FREE).tree


def test_spawned_prompts_find_earlier_ones():
    @dataclass(frozen=True)
    class Spawns(Strategy):
        def run(self, trunk):
            fresh = trunk.spawn([*PROMPT, 77])
            yield fresh.decode(5)
            return fresh.token_ids

    engine = make_engine()
    engine.generate(PROMPT, **FREE)
    result = engine.generate([1, 2, 3], Spawns(), **FREE)
    assert cached(result) == 20
    assert result.answers == make_engine(prefix_cache=False).generate([1, 2, 3], Spawns(), **FREE).answers


def test_requests_at_the_same_time_share_what_one_computes():
    """A long prompt that several begin with is computed once, even where they come together."""
    engine = make_engine(num_pages=600)
    long = [i % 200 for i in range(100)]
    prompts = [[*long, i] for i in range(8)]
    results = engine.generate(prompts, **FREE)
    assert [cached(r) for r in results] == [0] + [100] * 7
    plain = make_engine(num_pages=600, prefix_cache=False).generate(prompts, **FREE)
    assert [r.tree for r in results] == [r.tree for r in plain]
    later = [engine.add([*long, 3, i], **FREE) for i in range(2)]
    assert [cached(h.result()) for h in later] == [100, 100]
    assert_nothing_held(engine)


# ------------------------------------------------------------------------------------------------ exact


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_every_row_on_found_keys_equals_a_dense_recomputation(family):
    engine, recorder = make_engine(family), Recorder()
    for strategy in (Nested(), Nested(), SelfConsistency(3)):
        result = engine.generate(PROMPT, strategy, seed=4, logits_processor=[recorder], max_new_tokens=80,
                                 eos_token_id=None)  # fmt: skip
        assert assert_dense(result, recorder, family) > 10
        recorder.seen.clear()
    assert cached(result) == 20


def test_joined_siblings_are_no_dense_prefix():
    """Children side by side did not see one another: nothing behind the first is served to a prompt of these tokens."""

    @dataclass(frozen=True)
    class Joins(Strategy):
        cut: bool = False

        def run(self, trunk):
            yield trunk.decode(4)
            kids = trunk.fork([[30, 31, 32, 33, 34], [40, 41, 42, 43, 44]])
            yield [kid.decode(6) for kid in kids]
            if self.cut:
                trunk.truncate(trunk.length - 2)
                trunk.insert([20, 21])
            trunk.join(kids)
            trunk.insert([50, 51])
            yield trunk.decode(6)

    for cut in (False, True):
        engine, plain = make_engine(), make_engine(prefix_cache=False)
        result = engine.generate(PROMPT, Joins(cut), **(FREE | dict(max_new_tokens=60)))
        flat = [*PROMPT, *result.token_ids, 9]
        again = engine.generate(flat, logprobs=True, **FREE)
        expected = plain.generate(flat, logprobs=True, **FREE)
        assert again.token_ids == expected.token_ids
        assert again.tree.runs[-1].logprobs == pytest.approx(expected.tree.runs[-1].logprobs, abs=1e-4)
        assert 24 <= cached(again) <= 36


def test_an_index_of_contexts_against_a_plain_one():
    """Keeps, finds and shortages at random: what is found is what was kept, and the tree's invariants hold."""
    for number in range(30):
        rng = random.Random(number)
        size, pages = rng.choice([1, 2, 4]), rng.randint(8, 40)
        cache = ab.TreeCache(1, 1, 16, pages, size)
        prefixes, kept = PrefixCache(cache), set()
        live: list = []

        def write(branch, tokens, cache=cache):
            step = cache.step({branch: len(tokens)})
            rows = torch.tensor(tokens, dtype=torch.float32)[:, None, None].expand(-1, 1, 16).contiguous()
            cache.write(0, rows, rows, step)

        for _ in range(200):
            tokens = [rng.randrange(3) for _ in range(rng.randint(1, 12))]
            branch = prefixes.fork(tokens, len(tokens))
            if branch is None:
                branch = cache.branch()
            else:
                assert cache.read(branch, 0)[0][:, 0, 0].tolist() == tokens[: branch.length]
                assert any(k[: branch.length] == tuple(tokens[: branch.length]) for k in kept)
            try:
                if branch.length < len(tokens):
                    write(branch, tokens[branch.length :])
            except ab.OutOfPages:
                assert cache.usage().pages_kept == 0  # nobody is told before all that is kept has gone
                cache.release(branch)
                while live:
                    cache.release(live.pop())
                continue
            if rng.random() < 0.8:
                prefixes.keep(branch, tokens)
                kept.add(tuple(tokens))
            else:
                live.append(branch)
            cache.check()
        for branch in live:
            cache.release(branch)
        usage = cache.usage()
        assert usage.pages_free == pages and usage.tokens_logical == usage.tokens_physical == 0
        assert usage.pages_kept > 0
        prefixes.clear()
        assert cache.usage().pages_kept == 0 and cache.usage().pages_free == pages
        cache.check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_batch_invariant_to_the_bit(dtype):
    model = make_model().to(dtype)
    options = dict(logprobs=True, do_sample=True, seed=3, eos_token_id=None, max_new_tokens=40)
    on, off = (
        ab.Engine(model, num_pages=400, page_size=4, batch_invariant=True, prefix_cache=p) for p in (True, False)
    )
    prompts = [[*PROMPT, i] for i in range(3)]
    for strategy in (None, SelfConsistency(3), Nested()):
        expected = off.generate(prompts, strategy, **options)
        for _ in range(2):
            got = on.generate(prompts, strategy, **options)
            assert [exact(r.tree) for r in got] == [exact(r.tree) for r in expected]
    assert min(cached(r) for r in got) >= 20


def exact(node):
    return [(run.token_ids, run.logprobs) for n in node.walk() for run in n.runs]


def test_what_is_scored_is_computed_though_it_could_be_found():
    """A thread that leaves the cache while its tokens are scored comes back beside the same tokens, kept."""

    @dataclass(frozen=True)
    class Scores(Strategy):
        token_ids: tuple[int, ...]

        def run(self, trunk):
            return (yield trunk.score(self.token_ids))

    engine = make_engine(max_rows=6)
    result = engine.generate(PROMPT, logprobs=True, eos_token_id=None, max_new_tokens=40)
    strategy = Scores(result.token_ids)
    expected = make_engine(prefix_cache=False).generate(PROMPT, strategy).answers
    assert expected == pytest.approx(result.tree.runs[-1].logprobs, abs=1e-4)
    for steps in range(1, 9):
        handle = engine.add(PROMPT, strategy)
        for _ in range(steps):
            engine.step()
        for request in engine.loop.active:
            request.trunk.kv.release(engine.cache)  # as in a pre-emption
        assert handle.result().answers == pytest.approx(expected, abs=1e-4)
        assert_nothing_held(engine)


# ------------------------------------------------------------------------------------------------ who leaves


@pytest.mark.parametrize(("name", "found"), [("old", 20), ("new", 0)])
def test_what_was_used_longest_ago_goes_first(name, found):
    engine, once = make_engine(num_pages=30), dict(max_new_tokens=1)
    prompts = {"old": [1, *range(40, 59)], "new": [2, *range(40, 59)]}  # 5 pages each
    for which in ("old", "new", "old"):
        engine.generate(prompts[which], **once)
    engine.generate([3] * 100, **once)  # 25 pages
    assert cached(engine.generate([*prompts[name], 9], **once)) == found
    assert_nothing_held(engine)


def test_the_end_of_a_context_goes_before_its_beginning():
    engine = make_engine(num_pages=30)
    long = list(range(60, 160))
    engine.generate(long, max_new_tokens=1)
    engine.generate([3] * 60, max_new_tokens=1)  # 15 pages, of which 5 were free
    assert cached(engine.generate([*long, 9], max_new_tokens=1)) == 60
    assert_nothing_held(engine)


def test_nobody_is_pre_empted_for_what_is_kept():
    engine = make_engine(num_pages=40)
    for i in range(10):
        engine.generate([i] * 20, **FREE)
    assert engine.cache.usage().pages_kept > 20 and engine.cache.usage().pages_free == 40
    results = engine.generate([[100 + i] * 20 for i in range(4)], **FREE)
    assert [r.metrics.preemptions for r in results] == [0] * 4
    assert engine.generate([7] * 150, max_new_tokens=9, eos_token_id=None).metrics.preemptions == 0
    assert_nothing_held(engine)


def test_a_user_of_the_cache_itself_gets_the_pages():
    engine = make_engine(num_pages=20)
    engine.generate([3] * 60, **FREE)
    assert engine.cache.usage().pages_kept > 10
    branch = engine.cache.branch()
    step = engine.cache.step({branch: 80})
    assert step.num_rows == 80 and engine.cache.usage().pages_free == 0
    engine.cache.release(branch)
    assert_nothing_held(engine)


def test_kept_branches_take_no_rows():
    cache = ab.TreeCache(1, 1, 16, 8, 4)
    branch = cache.branch()
    step = cache.step({branch: 6})
    cache.write(0, *[torch.ones(6, 1, 16)] * 2, step)
    cache.keep(branch)
    cache.keep(branch)
    assert cache.usage() == ab.Usage(8, 8, 0, 0, 0, 2)
    with pytest.raises(ValueError, match="kept"):
        cache.step({branch: 1})
    with pytest.raises(ValueError, match="kept"):
        cache.join(branch, [cache.fork(branch)[0]])
    (kid,) = cache.fork(branch)
    assert cache.usage().pages_free == 6 and cache.usage().pages_kept == 0
    cache.check()
    cache.truncate(branch, 5)
    cache.step({kid: 1})
    cache.check()
    with pytest.raises(ab.OutOfPages):
        cache.step({cache.branch(): 40})
    cache.release(branch)
    cache.check()


def test_shortages_change_no_token():
    """The whole zoo at once in few pages, again and again over what is kept."""
    roomy = make_engine(num_pages=3000, prefix_cache=False)
    seen = hits = 0
    for number in range(5):
        rng = random.Random(number)
        engine = make_engine(num_pages=rng.randint(40, 90), max_rows=rng.choice([3, 16, 512]))
        base = [rng.randrange(200) for _ in range(20)]
        for _ in range(3):
            prompts = [[*base[: rng.randint(1, 20)], *range(rng.randint(1, 6))] for _ in range(3)]
            strategy = rng.choice([None, Nested(), SelfConsistency(3), Anything(rng.randrange(10**6))])
            options = dict(seed=rng.randrange(99), eos_token_id=None, max_new_tokens=20)
            try:
                results = engine.generate(prompts, strategy, **options)
            except ValueError as error:
                assert "num_pages" in str(error)
                assert_nothing_held(engine)
                continue
            assert [r.tree for r in results] == [r.tree for r in roomy.generate(prompts, strategy, **options)]
            assert_nothing_held(engine)
            seen += sum(r.metrics.preemptions for r in results)
            hits += sum(map(cached, results))
    assert seen > 0 and hits > 50, (seen, hits)


# ------------------------------------------------------------------------------------------------ nothing stale


def load(model):
    with torch.no_grad():
        state = {name: tensor * 1.5 for name, tensor in model.state_dict().items()}
    model.load_state_dict(state)


def in_place(model):
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight.mul_(-1)


def behind_torch(model):
    model.model.layers[0].self_attn.k_proj.weight.data.mul_(-1)


def replaced(model):
    weight = model.model.layers[0].self_attn.k_proj.weight
    model.model.layers[0].self_attn.k_proj.weight = torch.nn.Parameter(weight.detach() * 2)


def hooked(model):
    model.model.layers[0].mlp.register_forward_hook(lambda module, args, out: out * 2)


@pytest.mark.parametrize("change", [load, in_place, behind_torch, replaced, hooked])
def test_changed_weights_are_noticed(change):
    engine, fresh = make_engine(), make_engine()
    for _ in range(2):
        engine.generate(PROMPT, **FREE)
    change(engine.model)
    change(fresh.model)
    result = engine.generate(PROMPT, **FREE)
    assert cached(result) == 0 and result.tree == fresh.generate(PROMPT, **FREE).tree
    assert cached(engine.generate(PROMPT, **FREE)) == 20
    assert_nothing_held(engine)


def test_what_was_computed_with_other_weights_is_not_kept():
    """A request that was under way while the weights changed leaves nothing to be found."""
    engine, fresh = make_engine(), make_engine()
    handle = engine.add(PROMPT, **FREE)
    engine.step()
    for model in (engine.model, fresh.model):
        in_place(model)
    engine.generate([1, 2, 3], **FREE)
    handle.result()
    result = engine.generate(PROMPT, **FREE)
    assert cached(result) == 0 and result.tree == fresh.generate(PROMPT, **FREE).tree


def test_an_adapter_that_is_switched():
    peft = pytest.importorskip("peft", reason="adapters need peft")
    torch.manual_seed(1)
    settings = peft.LoraConfig(r=4, target_modules=["k_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(make_model(), settings, "one")
    model.add_adapter("two", settings)
    engine, plain = (ab.Engine(model, num_pages=99, page_size=4, prefix_cache=on) for on in (True, False))
    for name in ("one", "two", "one"):
        model.set_adapter(name)
        first, second = (engine.generate(PROMPT, **FREE) for _ in range(2))
        assert (cached(first), cached(second)) == (0, 20)
        assert first.tree == second.tree == plain.generate(PROMPT, **FREE).tree
    with model.disable_adapter():
        assert cached(engine.generate(PROMPT, **FREE)) == 0


def test_clear():
    engine = make_engine()
    engine.generate(PROMPT, **FREE)
    engine.clear_prefix_cache()
    assert engine.cache.usage().pages_kept == 0
    assert cached(engine.generate(PROMPT, **FREE)) == 0
    assert_nothing_held(engine)
