"""Rotary embeddings that look at the longest sequence of a forward: exact where that cannot matter, else refused."""

from __future__ import annotations

import copy

import pytest
import torch
from hf_kit import FAMILIES, VOCAB, assert_close, build
from torch import nn

import anabranch as ab
from anabranch import hf, training

SWITCH = 40
FACTORS = {"short_factor": [1.0] * 16, "long_factor": [8.0 + i for i in range(16)]}


def longrope(attn: str = "anabranch", config_class: str = "Phi3Config", **parameters) -> nn.Module:
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": SWITCH}
    return build(
        config_class, attn=attn, sliding_window=None, original_max_position_embeddings=SWITCH,
        rope_parameters=rope | FACTORS | parameters,
    )  # fmt: skip


def phimoe(attn: str = "anabranch") -> nn.Module:
    return longrope(attn, "PhimoeConfig", short_mscale=1.0, long_mscale=1.5)


def dynamic(attn: str = "anabranch") -> nn.Module:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    return build("LlamaConfig", attn=attn, max_position_embeddings=SWITCH + 1, rope_parameters=rope)


MODELS = {"longrope": longrope, "phimoe": phimoe}


def tokens(n: int, seed: int = 0) -> list[int]:
    return torch.randint(3, VOCAB, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.no_grad()
def alone(eager: nn.Module, ids: list[int]) -> torch.Tensor:
    return eager(torch.tensor([ids]), use_cache=False).logits[0]


class Tree:
    def __init__(self, model: nn.Module) -> None:
        self.model, self.cache = model, ab.TreeCache.for_model(model, num_pages=64, page_size=4)

    @torch.no_grad()
    def run(self, rows: dict[ab.Branch, list[int]], **kwargs) -> dict[ab.Branch, torch.Tensor]:
        step = self.cache.step({branch: len(ids) for branch, ids in rows.items()}, **kwargs)
        ids = torch.tensor([[i for ids in rows.values() for i in ids]])
        logits = self.model(ids, position_ids=step.position_ids[None], tree_step=step, use_cache=False).logits[0]
        return {branch: logits[step.rows[branch]] for branch in rows}


@pytest.mark.parametrize("kind", MODELS)
def test_short_sequences_and_long_ones_are_exact_among_themselves(kind):
    model, eager = MODELS[kind](), MODELS[kind]("eager")
    tree = Tree(model)
    a, b = tree.cache.branch(), tree.cache.branch()
    short, other = tokens(SWITCH - 1), tokens(12, 1)
    got = tree.run({a: short[:30], b: other})
    assert_close(got[a], alone(eager, short[:30]))
    assert_close(got[b], alone(eager, other))
    assert_close(tree.run({a: short[30:]})[a], alone(eager, short)[30:])
    # Long from the first forward on; chunks after it, children and joins of it too.
    c, d, long = tree.cache.branch(), tree.cache.branch(), tokens(SWITCH + 20, 2)
    tree.run({c: long[: SWITCH + 1], d: tokens(SWITCH + 2)})
    assert_close(tree.run({c: long[SWITCH + 1 :]})[c], alone(eager, long)[SWITCH + 1 :])
    e, f = tree.cache.fork(c, 2)
    assert_close(tree.run({e: [5], d: [6], f: [7]})[f], alone(eager, [*long, 7])[-1:])
    tree.cache.join(c, [e, f])
    tree.run({c: [8]})
    assert tree.run({b: [9]})[b].isfinite().all()  # and short ones beside nobody


REFUSED = (
    "a short one beside a long one",
    "decoding past the switch",
    "the second chunk of a long prompt",
    "a long one cut short",
    "a position far away",
)


def refusals(tree: Tree) -> dict[str, tuple]:
    """One of REFUSED → (what must raise, with which words); all from the same state."""
    cache = tree.cache
    short, full, long, empty = (cache.branch() for _ in range(4))
    tree.run({short: tokens(10), full: tokens(SWITCH)})
    tree.run({long: tokens(SWITCH + 5)})
    cut = cache.fork(long)[0]
    cache.truncate(cut, 10)
    return {
        "a short one beside a long one": (lambda: tree.run({short: [3], long: [4]}), "the factors of the long one"),
        "decoding past the switch": (lambda: tree.run({full: [3]}), "cached keys were rotated with the short ones"),
        "the second chunk of a long prompt": (lambda: tree.run({short: tokens(SWITCH)}), "with the short ones"),
        "a long one cut short": (lambda: tree.run({cut: [3]}), "cached keys were rotated with the long ones"),
        "a position far away": (
            lambda: tree.run({empty: [3, 4], short: [5]}, positions={empty: torch.tensor([90, 91])}),
            "Run them in separate steps",
        ),
    }


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("kind", MODELS)
def test_what_would_depend_on_company_is_refused_with_the_remedy(kind, name):
    tree = Tree(MODELS[kind]())
    call, message = refusals(tree)[name]
    before = tree.cache.usage()
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert 'p["short_factor"] = p["long_factor"]' in str(error.value) and f"beyond {SWITCH}" in str(error.value)
    assert tree.cache.usage() == before
    tree.cache.check()


def test_emptied_and_released_branches_are_as_good_as_new():
    tree = Tree(longrope())
    a, b = tree.cache.branch(), tree.cache.branch()
    tree.run({a: tokens(SWITCH + 5), b: tokens(SWITCH + 5)})
    tree.cache.truncate(a, 0)
    tree.cache.release(b)
    tree.run({a: tokens(5), tree.cache.branch(): tokens(6)})


def test_dynamic_ntk_is_served_below_its_limit_only():
    model, eager = dynamic(), dynamic("eager")
    tree = Tree(model)
    branch, ids = tree.cache.branch(), tokens(SWITCH)
    got = tree.run({branch: ids})[branch]
    assert_close(got, alone(eager, ids))
    with pytest.raises(ValueError, match=rf"reach {SWITCH + 1} tokens, but the model's dynamic.*'yarn'"):
        tree.run({branch: [3]})
    with pytest.raises(ValueError, match="branch_mask: reaches position 40, but dynamic"):
        training.grpo(tokens(30), [tokens(11), [4]]).logprobs(model)


def test_engine_gives_what_the_model_gives_or_says_why_not():
    model, eager = longrope(), longrope("eager")
    engine = ab.Engine(model, num_pages=64)
    options = {"max_new_tokens": 6, "eos_token_id": None}

    def greedy(ids: list[int]) -> tuple[int, ...]:
        found = list(ids)
        for _ in range(6):
            found.append(int(alone(eager, found)[-1].argmax()))
        return tuple(found[len(ids) :])

    for ids in (tokens(20), tokens(SWITCH + 10)):
        assert engine.generate(ids, **options).token_ids == greedy(ids)
    beyond = tokens(SWITCH + 10)
    refused = {
        r"prompt: prompt\[1\] is beyond 40 tokens, prompt\[0\] is not.*separate calls": ([tokens(20), beyond], 512),
        r"prompt: 50 tokens.*one forward; make the engine with max_rows of at least 50": (beyond, 32),
        r"prompt: its 37 tokens and max_new_tokens=6 go past 40.*use max_new_tokens=4 at most": (tokens(37), 512),
    }
    for message, (prompt, rows) in refused.items():
        engine.max_rows = rows
        with pytest.raises(ValueError, match=message):  # before anything ran
            next(iter(engine.stream(prompt, **options)))
        assert engine.cache.usage().pages_free == 64
    last = engine.generate(tokens(37), max_new_tokens=4, eos_token_id=None).token_ids
    assert last == greedy(tokens(37))[:4]
    assert engine.generate(tokens(20), **options).token_ids == greedy(tokens(20))


def test_the_remedy_serves_everything():
    model = longrope(short_factor=FACTORS["long_factor"])
    eager = longrope("eager", short_factor=FACTORS["long_factor"])
    assert hf.describe(model).rope_rules == ()
    tree = Tree(model)
    for call, _ in refusals(tree).values():
        call()
    engine, ids = ab.Engine(model, num_pages=64, max_rows=16), tokens(SWITCH + 10)
    first = engine.generate([ids, tokens(5)], max_new_tokens=1)[0].token_ids
    assert first == (int(alone(eager, ids)[-1].argmax()),)


@pytest.mark.parametrize("kind", MODELS)
def test_branch_masks(kind):
    model, eager = MODELS[kind](), MODELS[kind]("eager")
    prompt = tokens(30)
    for answers in ([tokens(5, 1), tokens(9, 2)], [tokens(15, 1), tokens(12, 2)]):  # all short; all long
        layout = training.grpo(prompt, answers)
        want = []
        for answer in answers:
            scores = alone(eager, prompt + answer).log_softmax(-1)
            want += [scores[29 + i, token] for i, token in enumerate(answer)]
        torch.testing.assert_close(layout.logprobs(model), torch.stack(want), atol=1e-4, rtol=1e-4)
        model(**layout.batch("all"), use_cache=False)  # with a copy of the prompt's last row, which is no sequence
    for layout in (
        training.grpo(prompt, [tokens(15), tokens(5)]),
        training.Layout.pack([training.grpo(prompt, [tokens(15)]), training.grpo(tokens(5), [tokens(3)])]),
    ):
        with pytest.raises(ValueError, match=r"branch_mask: segment \d ends a sequence of .*separate rows"):
            layout.logprobs(model)


def test_a_sequence_reaches_as_far_as_what_it_sees():
    """Positions may restart behind a long thread that is seen: alone, the whole of it is rotated as a long sequence."""
    model, eager, ids = longrope(), longrope("eager"), tokens(SWITCH + 4)
    positions = torch.tensor([*range(SWITCH + 2), 4, 5])

    def row(*sees: list[int]) -> training.Layout:
        mask = ab.BranchMask.from_context([SWITCH + 2, 2], sees, positions)
        return training.Layout(ids, mask, torch.ones(len(ids), dtype=torch.bool))

    with torch.no_grad():
        every = torch.ones(1, len(ids), dtype=torch.long)
        want = eager(torch.tensor([ids]), every, positions[None], use_cache=False).logits[0].log_softmax(-1)
    want = want[:-1].gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]
    torch.testing.assert_close(row([], [0]).logprobs(model), want, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="segment 1 ends a sequence of 6 positions beside one of 42"):
        row([], []).logprobs(model)


def test_a_hand_made_cache_cannot_know():
    model = longrope()
    cache = ab.TreeCache(num_layers=3, num_kv_heads=2, head_dim=32, num_pages=16)
    step = cache.step({cache.branch(): 3})
    with pytest.raises(ValueError, match=r"longrope rotary embeddings.*TreeCache\.for_model\(model\)"):
        model(torch.ones(1, 3, dtype=torch.long), position_ids=step.position_ids[None], tree_step=step, use_cache=False)


class ByTheLongest(nn.Module):
    """Rotary embeddings that no configuration tells of; `kind`: for these layers only, None for all."""

    def __init__(self, inner: nn.Module, behind: bool, kind: str | None = None) -> None:
        super().__init__()
        self.inner, self.behind, self.kind = inner, behind, kind

    def forward(self, x, position_ids, *kind):
        longest = position_ids.cummax(-1).values if self.behind else position_ids.max()
        far = (longest > 100) & (self.kind in (None, *kind))
        return self.inner(x, torch.where(far, position_ids * 2, position_ids), *kind)


@pytest.mark.parametrize("behind", [False, True], ids=["anywhere", "those before"])
def test_the_probe_finds_what_no_configuration_tells(behind):
    model = build("LlamaConfig")
    model.model.rotary_emb = ByTheLongest(model.model.rotary_emb, behind)
    with pytest.raises(hf.UnsupportedModel, match=r"rotates a row differently.*position 255.*whole forward"):
        hf.describe(model)


@pytest.mark.parametrize(("kind", "layer"), [("sliding_attention", 0), ("full_attention", 1)])
def test_the_probe_looks_at_the_rotation_of_each_kind_of_layer(kind, layer):
    config_class, options = FAMILIES["gemma3"]
    model = build(config_class, **options)
    model.model.rotary_emb = ByTheLongest(model.model.rotary_emb, behind=False, kind=kind)
    with pytest.raises(hf.UnsupportedModel, match=rf"rotates a row differently.*\(layer {layer}\)"):
        hf.describe(model)


def test_a_configuration_changed_after_loading_is_not_believed():
    """The remedy is for loading: a loaded model has made its frequencies already."""
    model = copy.deepcopy(longrope())
    hf.describe(model)
    model.config.rope_parameters["short_factor"] = FACTORS["long_factor"]
    with pytest.raises(hf.UnsupportedModel, match="rotates a row differently"):
        hf.describe(model)


def test_requests_of_both_sides_at_the_same_time_go_in_steps_of_their_own():
    """Requests that came apart share an engine: long and short ones take turns, and none sees another's rotation."""
    model = longrope()
    plain = ab.Engine(model, num_pages=64, prefix_cache=False)
    prompts, options = [tokens(SWITCH + 5), tokens(12, 1), tokens(SWITCH + 9, 2), tokens(20, 3)], dict(max_new_tokens=8)
    expected = [plain.generate(p, **options).token_ids for p in prompts]
    engine = ab.Engine(model, num_pages=64, page_size=4)
    handles = [engine.add(p, **options) for p in prompts]
    assert [h.result().token_ids for h in handles] == expected
    # What was rotated as long is not found by what is short, nor the other way round.
    again = [engine.generate(p, **options) for p in [prompts[0][:20], *prompts]]
    assert [r.token_ids for r in again[1:]] == expected
    assert [r.metrics.cached_tokens for r in again] == [0, 0, 8, 0, 16]
    assert again[0].token_ids == plain.generate(prompts[0][:20], **options).token_ids
    usage = engine.cache.usage()
    assert usage.pages_free == usage.pages_total
