"""Every public entry given what does not fit: an error that names the argument, and nothing has changed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from engine_kit import assert_nothing_held, byte_tokenizer, make_engine, make_model

import anabranch as ab
from anabranch import hf
from anabranch.strategies import Strategy

NOT_WHOLE = (True, 1.5, "2", None, [2], torch.tensor([2]), torch.tensor(2.0), np.bool_(True))
WHOLE = (np.int64(2), np.array(2), torch.tensor(2))
SHAPE = dict(num_layers=2, num_kv_heads=2, head_dim=32, num_pages=16, page_size=4)


def refused(name: str, call, *errors: type[Exception]) -> None:
    with pytest.raises(errors or (ValueError, TypeError)) as caught:
        call()
    assert name in str(caught.value), f"{caught.value} does not name {name}"


# ------------------------------------------------------------------------------------------------ cache


@pytest.mark.parametrize("name", [*SHAPE, "max_positions"])
def test_sizes_of_a_cache(name):
    for value in (0, -1, 10**30, *(v for v in NOT_WHOLE if v is not None or name != "max_positions")):
        refused(name, lambda value=value: ab.TreeCache(**SHAPE | {name: value}), ValueError)
    for value in WHOLE:
        ab.TreeCache(**SHAPE | {name: value})
    for name, value in (("dtype", "float32"), ("device", "gpu"), ("device", None), ("device", "meta"), ("device", 1.5)):
        refused(name, lambda name=name, value=value: ab.TreeCache(**SHAPE, **{name: value}), ValueError)


def test_calls_of_a_cache():
    cache, other = ab.TreeCache(**SHAPE), ab.TreeCache(**SHAPE)
    trunk, foreign, dead = cache.branch(), other.branch(), cache.branch()
    cache.release(dead)
    step = cache.step({trunk: 3})
    k = torch.zeros(3, 2, 32)
    before = cache.usage()
    entries = {
        "fork": cache.fork,
        "release": cache.release,
        "truncate": lambda b: cache.truncate(b, 0),
        "read": lambda b: cache.read(b, 0),
        "positions": cache.positions,
        "step": lambda b: cache.step({b: 1}),
        "join: trunk": lambda b: cache.join(b, []),
        "join: kids[0]": lambda b: cache.join(trunk, [b]),
    }
    for name, call in entries.items():
        for value in (None, 5, "x"):
            refused(name, lambda call=call, value=value: call(value), TypeError)
        refused("another cache", lambda call=call: call(foreign), ValueError)
        refused("released", lambda call=call: call(dead), ab.DeadBranch)
    for value in NOT_WHOLE:
        refused("fork: n", lambda value=value: cache.fork(trunk, value), ValueError)
        refused("length", lambda value=value: cache.truncate(trunk, value), ValueError)
        refused("step", lambda value=value: cache.step({trunk: value}), TypeError)
        refused("layer", lambda value=value: cache.write(value, k, k, step), ValueError)
        refused("layer", lambda value=value: cache.k_pages(value), ValueError)
    for rows in (None, 5, [trunk], "x"):
        refused("rows", lambda rows=rows: cache.step(rows))
    for given in (5, [1], {5: [1]}, *({trunk: bad} for bad in (5, "ab", [[1]], [1.5], [True], None, [-1], [2**40]))):
        refused("positions", lambda given=given: cache.step({trunk: 1}, given))
    for kids in (None, 5, trunk):
        refused("kids", lambda kids=kids: cache.join(trunk, kids), TypeError)
    for mode in ("concat", "discard"):
        refused("kids[0]", lambda mode=mode: cache.join(trunk, [trunk], mode), ValueError)
    for bad in (None, k.numpy(), k[:2], k.half(), k.to("meta"), torch.zeros(2, 3, 32).transpose(0, 1)):
        refused("k", lambda bad=bad: cache.write(0, bad, k, step), ValueError)
    for bad in (None, 5, step.handle, other.step({foreign: 3})):
        refused("step", lambda bad=bad: cache.write(0, k, k, bad))
    assert cache.usage() == before and trunk.alive and trunk.length == 3
    cache.check()


def test_a_discard_is_all_or_nothing():
    cache = ab.TreeCache(**SHAPE)
    trunk = cache.branch()
    kid, stranger = cache.fork(trunk)[0], cache.branch()
    for kids in ([kid, kid], [kid, stranger]):
        refused("kids[1]", lambda kids=kids: cache.join(trunk, kids, "discard"), ValueError)
    assert kid.alive and stranger.alive
    cache.join(trunk, [kid], "discard")
    assert not kid.alive


# ------------------------------------------------------------------------------------------------ attention

OPTIONS = {
    "scale": ["x", float("nan"), float("inf"), True, torch.ones(2)],
    "softcap": ["x", 0, -1, float("nan"), float("inf"), True],
    "window": [0, -1, 1.5, "x", True],
    "sinks": [5, [1.0] * 4, torch.zeros(3), torch.zeros(4, dtype=torch.long), torch.zeros(4, device="meta")],
    "backend": [None, 5, "fast"],
}


def test_attention_options():
    cache = ab.TreeCache(**SHAPE)
    step, q, k = cache.step({cache.branch(): 3}), torch.zeros(3, 4, 32), torch.zeros(3, 2, 32)
    cache.write(0, k, k, step)
    plan, pages = ab.Plan.from_block_tables([[0]], [3], 4, [3]), torch.zeros(1, 4, 2, 32)
    mask = ab.BranchMask.from_tree([3], [-1])
    for name, values in OPTIONS.items():
        for value in values:
            option = {name: value}
            refused(name, lambda option=option: ab.tree_attention(q, cache, 0, step, **option))
            refused(name, lambda option=option: ab.paged_tree_attention(q, pages, pages, plan, **option))
            refused(name, lambda option=option: ab.branch_attention(q, k, k, mask, **option))
    for option in ({"window": 10**30}, {"window": np.int64(3)}, {"softcap": np.float32(3)}, {"scale": torch.tensor(1)}):
        ab.tree_attention(q, cache, 0, step, **option)
        ab.branch_attention(q, k, k, mask, **option)
    refused("step", lambda: ab.tree_attention(q, cache, 0, None), TypeError)
    refused("layer", lambda: ab.tree_attention(q, cache, "0", step), ValueError)


def test_plans_and_masks():
    for size in (0, -1, *NOT_WHOLE, 10**30):
        refused("page_size", lambda size=size: ab.Plan.from_block_tables([[0]], [3], size), ValueError)
    for tables in (None, 5, "x", [[0.0]], [[True]], [0], [[0], [0, 1]]):
        refused("block_tables", lambda tables=tables: ab.Plan.from_block_tables(tables, [3], 4))
    for lengths in (None, 5, "x", [], [1.5], [True], [-1], [[1], [1, 2]]):
        refused("lengths", lambda lengths=lengths: ab.BranchMask.from_tree(lengths, [-1]), ValueError)
    for positions in (5, "x", [0], [0.0, 1.0], [True, True], [0, -1]):
        refused("positions", lambda p=positions: ab.BranchMask.from_tree([2], [-1], p), ValueError)
    for context in (None, 5, "xy", [[], 0], [[], "a"], [[], [0.5]]):
        refused("context", lambda context=context: ab.BranchMask.from_context([2, 1], context), ValueError)
    mask = ab.BranchMask.from_tree([2], [-1])
    for masks in (None, 5, [], [5], mask):
        refused("masks", lambda masks=masks: ab.BranchMask.pack(masks))
    refused("device", lambda: mask.to("gpu"), ValueError)
    refused("trace", lambda: ab.BranchMask.from_trace(None), TypeError)


# ------------------------------------------------------------------------------------------------ engine


def test_arguments_of_an_engine():
    model = make_model()
    counts = {"num_pages": (0, True, 1.5, "2"), "page_size": (0, *NOT_WHOLE), "max_rows": (0, *NOT_WHOLE)}
    counts |= {"max_threads": (0, True, "2"), "backend": (None, 5, "fast"), "tokenizer": ("x", 5)}
    for name, values in counts.items():
        for value in values:
            refused(name, lambda name=name, value=value: ab.Engine(model, **{"num_pages": 16, name: value}))
    two = np.int64(2)
    engine = ab.Engine(model, num_pages=torch.tensor(16), page_size=np.int64(4), max_rows=two, max_threads=two)
    assert len(engine.generate([3, 4], max_new_tokens=two, seed=two, max_total_tokens=two).token_ids) == 2


def test_arguments_of_generate():
    engine = make_engine(tokenizer=byte_tokenizer())
    bad = {
        "prompt": (
            None,
            5,
            b"ab",
            [],
            {3},
            [True],
            [1.5],
            [None],
            [-1],
            [10**30],
            np.ones(2),
            torch.tensor(3),
            ["a", 3],
        ),
        "seed": (-1, *(v for v in NOT_WHOLE if not isinstance(v, (list, torch.Tensor)))),
        "max_new_tokens": (0, -1, *(v for v in NOT_WHOLE if v is not None)),
        "max_total_tokens": (0, True, "x"),
        "logits_processor": (5, [5]),
        "stopping_criteria": (5, [5]),
    }
    for name, values in bad.items():
        for value in values:
            refused(name, lambda name=name, value=value: engine.generate(**{"prompt": [3], name: value}))
    assert_nothing_held(engine)


def test_ids_of_any_whole_kind():
    engine = make_engine()
    expected = engine.generate([5, 6], max_new_tokens=4).token_ids
    for prompt in (
        [np.int64(5), np.int32(6)],
        np.array([5, 6]),
        torch.tensor([5, 6]),
        [torch.tensor(5), 6],
        range(5, 7),
    ):
        assert engine.generate(prompt, max_new_tokens=np.int64(4)).token_ids == expected
    many = engine.generate([np.array([5, 6]), [np.int64(5), 6]], max_new_tokens=4)
    assert [one.token_ids for one in many] == [expected] * 2
    assert engine.generate(np.array([[5, 6], [5, 6]]), max_new_tokens=4)[1].token_ids == expected


class Ask(Strategy):
    """Does one thing with the trunk, so that its error is seen."""

    def __init__(self, ask):
        self.ask = ask

    def run(self, trunk):
        self.ask(trunk)
        yield trunk.decode(1)


def test_what_a_strategy_asks_for():
    engine = make_engine()
    asks = {
        "max_new_tokens": lambda t, v: t.decode(v),
        "stats": lambda t, v: t.decode(1, stats=v),
        "stop": lambda t, v: t.decode(1, stop=v),
        "insert": lambda t, v: t.insert(v),
        "score": lambda t, v: t.score(v),
        "headers": lambda t, v: t.fork(v),
        "prompt": lambda t, v: t.spawn(v),
        "length": lambda t, v: t.truncate(v),
        "kids": lambda t, v: t.join(v),
    }
    for name, ask in asks.items():
        for value in (1.5, [1.5], [None]) if name in ("insert", "score", "prompt") else (1.5, -1, -(10**30)):
            do = lambda trunk, ask=ask, value=value: ask(trunk, value)  # noqa: E731
            refused(name, lambda do=do: engine.generate([3, 4], strategy=Ask(do)))
    assert_nothing_held(engine)

    def fine(trunk):
        trunk.insert(np.array([5, 6]))
        trunk.join(trunk.fork(np.int64(2)), "discard")
        trunk.decode(torch.tensor(2), stop=[np.int64(7)], stats=np.int64(3))

    assert engine.generate([3, 4], strategy=Ask(fine)).token_ids[:2] == (5, 6)


def test_counts_of_strategies():
    for kind, name in ((ab.SelfConsistency, "n"), (ab.EntropyFork, "n"), (ab.SkeletonOfThought, "most")):
        options = {"threshold": 1.0} if kind is ab.EntropyFork else {}
        for value in (0, *NOT_WHOLE):
            refused(name, lambda kind=kind, name=name, v=value, o=options: kind(**o, **{name: v}), ValueError)
        assert type(getattr(kind(**options, **{name: np.int64(4)}), name)) is int
    refused("trace", lambda: ab.replay(None, make_engine()), TypeError)


# ------------------------------------------------------------------------------------------------ models


def test_models_changed_behind_the_engines_back():
    engine = make_engine()
    expected = engine.generate([5, 6, 7], max_new_tokens=4).token_ids
    engine.model.to(torch.bfloat16)
    refused("model: is torch.bfloat16 now", lambda: engine.generate([5, 6, 7]), ValueError)
    engine.model.to(torch.float32)
    engine.model.set_attn_implementation("sdpa")
    refused("attn_implementation='sdpa'", lambda: engine.generate([5, 6, 7]), ValueError)
    engine.model.set_attn_implementation("anabranch")
    assert_nothing_held(engine)
    assert len(expected) == len(engine.generate([5, 6, 7], max_new_tokens=4).token_ids)
    engine.model.resize_token_embeddings(300)  # followed
    assert len(engine.generate([299, 6, 7], max_new_tokens=4).token_ids) == 4
    engine.model.resize_token_embeddings(100)
    refused("vocabulary of 100", lambda: engine.generate([200]), ValueError)


def test_autocast_changes_nothing_in_an_engine():
    expected = make_engine().generate([5, 6, 7], max_new_tokens=8)
    with torch.autocast("cpu", torch.bfloat16):
        engine = make_engine()  # the probe, too, asks the model itself
        assert engine.cache.dtype == torch.float32
        assert engine.generate([5, 6, 7], max_new_tokens=8).token_ids == expected.token_ids
        cache = ab.TreeCache.for_model(engine.model, num_pages=16)
        step = cache.step({cache.branch(): 1})
        with pytest.raises(ValueError, match=r"torch\.autocast"), torch.no_grad():
            engine.model(
                input_ids=torch.tensor([[5]]), position_ids=step.position_ids[None], tree_step=step, use_cache=False
            )


def test_learned_prompts_are_refused_and_weights_are_not():
    peft = pytest.importorskip("peft", reason="adapters need PEFT: pip install peft")
    for config in (
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    ):
        model = peft.get_peft_model(make_model(), config)
        refused("3 learned virtual tokens", lambda model=model: ab.Engine(model, num_pages=16), ValueError)
    lora = peft.get_peft_model(make_model(), peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    assert len(ab.Engine(lora, num_pages=16).generate([5, 6], max_new_tokens=3).token_ids) == 3


# ------------------------------------------------------------------------------------------------ learned positions


def tabled(kind: str, positions: int = 32):
    torch.manual_seed(0)
    base = dict(vocab_size=97, bos_token_id=1, eos_token_id=None, pad_token_id=0)
    if kind == "OPTConfig":  # its table has two rows in front of position 0
        own = dict(hidden_size=64, ffn_dim=64, word_embed_proj_dim=64, num_hidden_layers=2, num_attention_heads=4)
        own["max_position_embeddings"] = positions
    else:
        own = dict(n_embd=64, n_layer=2, n_head=4, n_positions=positions)
        own |= {"rotary_dim": 8} if kind == "GPTJConfig" else {}
    config = getattr(transformers, kind)(**base, **own)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


@pytest.mark.parametrize("kind", ["GPT2Config", "OPTConfig", "GPTJConfig"])
def test_a_table_of_positions_is_found_and_its_end_is_kept(kind):
    model = tabled(kind)
    prompt = list(range(5, 35))  # 30 tokens
    ids = torch.tensor([prompt])
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)[0, 30:]
    engine = ab.Engine(model, num_pages=32)
    assert hf.describe(model).position_limit == 32
    refused("32 positions", lambda: engine.generate([*prompt, 3, 4, 5]), ValueError)
    result = engine.generate(prompt, max_new_tokens=20)
    assert (list(result.token_ids), result.tree.ended) == (expected.tolist(), "length")
    both = engine.generate(prompt, strategy=ab.SelfConsistency(2), max_new_tokens=20)
    assert all(kid.ended == "length" for kid in both.tree.children)

    def long_spawn(trunk):
        kid = trunk.spawn([5] * 40)
        kid.decode(1)

    refused("thread 0.0: its tokens reach position 39", lambda: engine.generate([5], strategy=Wait(long_spawn)))
    refused("thread 0: its tokens reach position 39", lambda: engine.generate([5], strategy=Wait(long_insert)))
    assert_nothing_held(engine)
    cache = ab.TreeCache.for_model(model, num_pages=32)
    branch = cache.branch()
    refused("position 32", lambda: cache.step({branch: 33}), ValueError)
    refused("position 40", lambda: cache.step({branch: 1}, {branch: [40]}), ValueError)
    assert cache.step({branch: 32}).num_rows == 32


def long_insert(trunk):
    trunk.insert([5] * 39)


class Wait(Ask):
    """Waits for all that was asked, too."""

    def run(self, trunk):
        self.ask(trunk)
        kids = trunk.children
        yield [trunk.decode(1), *kids]
