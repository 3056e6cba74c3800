"""`Engine(batch_invariant=True)`: the same bits alone, in a batch, in other chunks and after a pre-emption."""

from __future__ import annotations

import random

import pytest
import torch
import transformers
from engine_kit import make_model
from torch import nn
from transformers import AutoModelForCausalLM

import anabranch as ab
from anabranch import _cpu
from anabranch.runner.invariant import Invariant, RowInvariant, check_rows
from anabranch.runner.linear import linear

ISAS = _cpu.info()["runnable"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SMALL = dict(
    vocab_size=97, hidden_size=48, intermediate_size=104, num_hidden_layers=2, num_attention_heads=6,
    num_key_value_heads=2, max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    initializer_range=0.3,
)  # fmt: skip
FAMILIES = {
    "LlamaConfig": {},
    "Gemma2Config": dict(head_dim=16),
    "GPT2Config": dict(n_embd=48, n_layer=2, n_head=6, n_positions=512),
    "MixtralConfig": dict(num_local_experts=4),
    "Qwen2MoeConfig": dict(
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=40,
        decoder_sparse_step=1,
    ),
    "GptOssConfig": dict(num_local_experts=4, head_dim=16),
}


@pytest.fixture(autouse=True)
def default_isa():
    yield
    _cpu.use("")


def build(family: str, dtype: torch.dtype, **options):
    torch.manual_seed(0)
    config = getattr(transformers, family)(**{**SMALL, **FAMILIES[family], **options})
    return AutoModelForCausalLM.from_config(config).eval().to(dtype)


def told(result) -> list:
    """All of a tree that sampling decides, log-probabilities included."""
    found = []

    def visit(node) -> None:
        found.extend((node.id, run.token_ids, run.logprobs) for run in node.runs)
        for kid in node.children:
            visit(kid)

    visit(result.tree)
    return found


@pytest.mark.parametrize(
    ("family", "dtype"), [*((f, torch.bfloat16) for f in FAMILIES), ("LlamaConfig", torch.float16)], ids=str
)
def test_same_tree_alone_in_a_batch_and_after_a_preemption(family, dtype):
    model = build(family, dtype)
    wide = ab.Engine(model, num_pages=400, page_size=4, batch_invariant=True)
    tight = ab.Engine(model, num_pages=20, page_size=4, batch_invariant=True, max_rows=9)
    prompts = [[(7 * i + j) % 90 + 5 for j in range(3 + 9 * i)] for i in range(4)]
    options = dict(max_new_tokens=10, do_sample=True, temperature=1.5, logprobs=True)
    preempted = 0
    for strategy in (None, ab.SelfConsistency(3, vote=None), ab.EntropyFork(threshold=2.0, vote=None)):
        alone = [told(wide.generate(p, strategy=strategy, seed=i, **options)) for i, p in enumerate(prompts)]
        together = wide.generate(prompts, strategy=strategy, seed=list(range(4)), **options)
        chunked = tight.generate(prompts, strategy=strategy, seed=list(range(4)), **options)
        assert [told(r) for r in together] == alone
        assert [told(r) for r in chunked] == alone
        preempted += sum(r.metrics.preemptions for r in chunked)
    assert preempted  # else the tight engine showed nothing


def attend(cache, q, k, v, parts, **options):
    """One step; rows by the number of their token."""
    step = cache.step({branch: len(ids) for branch, ids in parts})
    ids = torch.tensor([i for _, part in parts for i in part])
    cache.write(0, k[ids].contiguous(), v[ids].contiguous(), step)
    out = ab.tree_attention(q[ids].contiguous(), cache, 0, step, backend="cpu", **options)
    return {i: out[row] for row, i in enumerate(ids.tolist())}


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_of_a_row_depends_on_its_context_alone(isa, dtype):
    """One tree, computed in other chunks, other orders, beside strangers: around the borders of token ranges (256)."""
    _cpu.use(isa)
    for seed, (group, head_dim, window, length) in enumerate(
        ((3, 40, None, 257), (4, 64, 30, 255), (9, 16, 300, 520), (1, 128, None, 300))
    ):
        rng = torch.Generator().manual_seed(seed)
        q = torch.randn(800, 2 * group, head_dim, generator=rng).to(dtype)
        k, v = (torch.randn(800, 2, head_dim, generator=rng).to(dtype) for _ in range(2))
        options = dict(window=window, softcap=20.0 if seed % 2 else None, sinks=torch.randn(2 * group, generator=rng))

        def run(way: int, seed=seed, length=length, head_dim=head_dim, q=q, k=k, v=v, options=options):
            choose = random.Random(seed * 7 + way)
            cache = ab.TreeCache(1, 2, head_dim, 400, 8, dtype=dtype)
            cache.batch_invariant = True
            trunk, stranger, found, at = cache.branch(), cache.branch(), {}, 0
            while at < length:
                n = min(length - at, choose.choice([1, 3, 90, length]) if way else length)
                parts = [(trunk, list(range(at, at + n)))]
                if way and choose.random() < 0.7:
                    parts.insert(choose.randrange(2), (stranger, [790 + choose.randrange(10)]))
                found |= attend(cache, q, k, v, parts, **options)
                at += n
            kids, done = cache.fork(trunk, 3), [0, 0, 0]
            while min(done) < 12:
                parts = []
                for i in range(3):
                    if done[i] < 12 and (not way or choose.random() < 0.7):
                        n = min(choose.choice([1, 1, 7]) if way == 2 else 1, 12 - done[i])
                        begin = length + 12 * i + done[i]
                        parts.append((kids[i], list(range(begin, begin + n))))
                        done[i] += n
                choose.shuffle(parts)
                if parts:
                    found |= attend(cache, q, k, v, parts, **options)
            return {i: row for i, row in found.items() if i < 790}

        expected = run(0)
        for way in (1, 2):
            got = run(way)
            assert got.keys() == expected.keys()
            assert all(torch.equal(got[i], row) for i, row in expected.items()), (seed, way)


def test_attention_of_fixed_ranges_is_right():
    """Against the dense reference."""
    rng = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(400, 4, 32, generator=rng), *(torch.randn(400, 2, 32, generator=rng) for _ in range(2))
    cache = ab.TreeCache(1, 2, 32, 200, 4)
    cache.batch_invariant = True
    trunk = cache.branch()
    attend(cache, q, k, v, [(trunk, list(range(300)))])
    kids = cache.fork(trunk, 2)
    attend(cache, q, k, v, [(kids[0], [300]), (kids[1], [301, 302, 303])])
    step = cache.step({kids[1]: 2, kids[0]: 1})
    cache.write(0, k[304:307], v[304:307], step)
    for window in (None, 40):
        ours, dense = (
            ab.tree_attention(q[304:307], cache, 0, step, window=window, backend=backend)
            for backend in ("cpu", "reference")
        )
        torch.testing.assert_close(ours, dense)


@pytest.mark.parametrize("isa", ISAS)
def test_linear_elements_depend_on_their_row_and_column_alone(isa, rng):
    _cpu.use(isa)
    for dtype in DTYPES:
        for n, k in ((1, 48), (17, 75), (97, 641)):
            x, w = torch.randn(70, k, generator=rng).to(dtype), torch.randn(n, k, generator=rng).to(dtype)
            y = linear(x, w)
            assert all(torch.equal(linear(x[s : s + m], w), y[s : s + m]) for m in (1, 2, 3, 5, 9, 33) for s in (0, 31))
            assert all(torch.equal(linear(x, w[c : c + 1]), y[:, c : c + 1]) for c in range(0, n, 5))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_operations_row_by_row(dtype, rng):
    """What torch computes otherwise in a tensor's last elements, and products by the number of rows."""
    x = torch.randn(70, 97, generator=rng).to(dtype)
    w, stack = torch.randn(97, 33, generator=rng).to(dtype), torch.randn(70, 97, 5, generator=rng).to(dtype)
    bias = torch.randn(33, generator=rng).to(dtype)
    grouped = torch.randn(2, 97, 6, generator=rng).to(dtype)
    functions = {
        "silu": nn.functional.silu,
        "gelu": nn.functional.gelu,
        "sigmoid": lambda x: x.clone().sigmoid_(),
        "softplus": nn.functional.softplus,
        "pow": lambda x: x.abs().pow(1.5),
        "rsqrt": lambda x: x.abs().rsqrt(),
        "add": lambda x: torch.add(x, x * 3, alpha=0.3),
        "norm": lambda x: x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True)).to(dtype),
        "softmax": lambda x: x.softmax(-1),
        "mm": lambda x: x @ w,
        "addmm": lambda x: torch.addmm(bias, x, w),
        "bmm": lambda x: torch.bmm(x[:, None], stack[: len(x)])[:, 0],
        "outer": lambda x: x[:, :, None] @ x[:, None, :3],
        "einsum": lambda x: torch.einsum("tk,kn->tn", x, w),
    }
    with torch.inference_mode(), RowInvariant():
        for name, function in functions.items():
            whole = function(x)
            for rows in (1, 3, 17):
                few = function(x[:rows])
                assert torch.equal(few, whole[:rows]), name
        offs = torch.tensor([40, 70], dtype=torch.int32)
        split = torch.ops.transformers.grouped_mm_fallback(x, grouped, offs)
        assert torch.equal(split, torch.cat([x[:40] @ grouped[0], x[40:] @ grouped[1]]))
    for name, function in functions.items():
        with torch.inference_mode(), RowInvariant():
            ours = function(x)
        error = (ours.double() - function(x).double()).abs().max()
        assert error < (1e-4 if dtype == torch.float32 else 1.0), name


def test_unknown_operations_are_refused_by_name():
    with torch.inference_mode(), RowInvariant():
        for function in (
            lambda: torch.fft.fft(torch.ones(4)),
            lambda: nn.functional.conv1d(torch.ones(1, 2, 5), torch.ones(3, 2, 2)),
            lambda: torch.ones(3, 4).double() @ torch.ones(4, 2).double(),
        ):
            with pytest.raises(ValueError, match="batch_invariant=True: the model's forward has"):
                function()


class Mixing(nn.Module):
    """A layer that looks at all rows of a forward."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) - x.amax(dim=-2, keepdim=True)


class Convolving(Mixing):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) + torch.fft.fft(x).real


def test_a_model_that_cannot_be_kept_to_it_is_refused_when_the_engine_is_made():
    model = make_model()
    model.model.layers[1].mlp = Mixing(model.model.layers[1].mlp)
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp \(Mixing\) gives a row other values"):
        ab.Engine(model, num_pages=8, batch_invariant=True)
    ab.Engine(model, num_pages=8)
    model.model.layers[1].mlp = Convolving(model.model.layers[1].mlp.inner)
    with pytest.raises(ValueError, match=r"the model's forward has in model\.layers\.1\.mlp aten\._fft"):
        ab.Engine(model, num_pages=8, batch_invariant=True)


def test_arguments():
    model = make_model()
    for options, message in (
        (dict(batch_invariant="yes"), "pass True or False"),
        (dict(batch_invariant=True, backend="reference"), "backend='reference'"),
        (dict(batch_invariant=True, own_linear=False), "own_linear=False"),
    ):
        with pytest.raises(ValueError, match=message):
            ab.Engine(model, num_pages=8, **options)
    compiled = torch.compile(make_model().model.layers[0], backend="eager")
    model.model.layers[0] = compiled
    with pytest.raises(ValueError, match="compiled"):
        ab.Engine(model, num_pages=8, batch_invariant=True)


def test_the_check_leaves_nothing_behind():
    model = make_model().train()
    model.model.layers[0].eval()
    before = {name: (m.training, dict(vars(m)).keys()) for name, m in model.named_modules()}
    hooks = {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()}
    ab.hf.enable(model)
    check_rows(model, Invariant(model), "cpu")
    assert before == {name: (m.training, dict(vars(m)).keys()) for name, m in model.named_modules()}
    assert hooks == {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()}
