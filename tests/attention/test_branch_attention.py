"""branch_attention: every backend that runs here against dense float64, then the torch machinery around it."""

from __future__ import annotations

import functools
import gc
import math
import weakref

import pytest
import torch
from branch_kit import computed, expected, random_graph, random_tree, relative, tensors
from threads_kit import torch_threads

import anabranch as ab
from anabranch import _cpu
from anabranch.attention.mask import BranchMask

ISAS = _cpu.info()["runnable"]
ALL = dict(scale=0.3, softcap=3.0, window=11)
OPTIONS = {"plain": {}, "softcap": dict(softcap=2.0), "window": dict(window=7), "sinks": dict(sinks=True), "all": ALL}
NAN, INF = float("nan"), float("inf")


@pytest.fixture(autouse=True)
def default_isa():
    yield
    _cpu.use("")


def attend(backend):
    return functools.partial(ab.branch_attention, backend=backend)


def with_sinks(options, heads, seed=0):
    if options.get("sinks") or options is ALL:
        gen = torch.Generator().manual_seed(seed)
        return {**options, "sinks": torch.randn(heads, generator=gen, dtype=torch.float64)}
    return options


def check(backend, mask, heads, kv_heads, dim, dtype, options, bound, seed=0):
    q, k, v, grad = tensors(seed, mask.num_tokens, heads, kv_heads, dim, dtype)
    options = with_sinks(options, heads, seed)
    if "sinks" in options and dtype != torch.float64:
        options["sinks"] = options["sinks"].float()
    want = expected(q, k, v, grad, mask, **options)
    got = computed(attend(backend), q, k, v, grad, mask, **options)
    assert got[0].dtype == dtype and got[0].is_contiguous()
    for name, x, y in zip(("out", "dq", "dk", "dv", "d_sinks"), got, want, strict=False):
        assert x.shape == y.shape and torch.isfinite(x).all(), name
        assert relative(x, y) <= bound, (name, relative(x, y))


@pytest.mark.parametrize("make", [random_tree, random_graph], ids=["tree", "graph"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_reference(make, options):
    for seed in range(3):
        check("reference", make(seed), 4, 2, 8, torch.float64, options, 1e-12, seed)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("make", [random_tree, random_graph], ids=["tree", "graph"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_cpu(isa, make, options):
    _cpu.use(isa)
    for seed in range(2):
        check("cpu", make(seed, longest=24), 4, 2, 32, torch.float32, options, 1e-5, seed)


# (query heads, KV heads, head_dim): GQA 1, 2, 3, 7; 33, 40, 72, 80 end in a part panel; 140 heads fit no tile.
SHAPES = [(2, 2, 40), (3, 1, 72), (7, 1, 80), (4, 4, 96), (2, 1, 128), (2, 1, 256), (140, 1, 64), (3, 3, 33)]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}x{s[2]}")
def test_cpu_shapes(shape):
    check("cpu", random_tree(3, segments=5, longest=30), *shape, torch.float32, ALL, 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_cpu_16_bits(dtype):
    for isa in ISAS:
        _cpu.use(isa)
        check("cpu", random_graph(2), 4, 2, 48, dtype, ALL, 1e-2 if dtype == torch.bfloat16 else 2e-3)


def test_cpu_long_segments_and_many_threads():
    """Several tiles of rows and of columns, several parts of the backward, windows that drop whole blocks."""
    mask = BranchMask.from_tree([300, 120, 1, 150, 40], [-1, 0, 0, 0, 3])
    for count in (1, 3, 8):
        with torch_threads(count):
            for options in ({}, dict(window=40), dict(window=200, softcap=4.0)):
                check("cpu", mask, 2, 1, 32, torch.float32, options, 1e-5)


def test_cpu_many_short_segments():
    """Tiles of many segments: more columns come and go in a tile than a block of columns holds."""
    sizes = [40, *([1, 3] * 45)]
    mask = BranchMask.from_context(sizes, [[], *([j for j in range(i) if (i * j) % 3 == 1] for i in range(1, 91))])
    check("cpu", mask, 2, 2, 32, torch.float32, {}, 1e-5)
    check("cpu", mask, 2, 1, 32, torch.float32, ALL, 1e-5)


def test_strides_and_layouts_do_not_matter():
    """[H, T, D] seen as [T, H, D], as models pass it; a last stride of 2; a gradient without memory of its own."""
    mask = random_tree(1)
    q, k, v, grad = tensors(0, mask.num_tokens, 4, 2, 32, torch.float32)
    plain = computed(attend("cpu"), q, k, v, grad, mask)
    heads_first = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v)]
    for x, y in zip(computed(attend("cpu"), *heads_first, grad, mask), plain, strict=True):
        assert torch.equal(x, y)
    for x, y in zip(computed(attend("cpu"), *[_every_other(x) for x in (q, k, v)], grad, mask), plain, strict=True):
        assert torch.equal(x, y)
    one = grad[:1, :1, :1].expand_as(grad)
    for x, y in zip(computed(attend("cpu"), q, k, v, one, mask), expected(q, k, v, one, mask), strict=True):
        assert relative(x, y) <= 1e-5


def _every_other(x):
    wide = torch.full((*x.shape[:2], 2 * x.shape[2]), NAN)
    wide[..., ::2] = x
    return wide[..., ::2]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_rows_that_see_only_themselves(backend):
    """Out is v, dv is the gradient, dq and dk are 0; no NaN."""
    mask = BranchMask.from_tree([1] * 9, [-1] * 9)
    q, k, v, grad = tensors(0, 9, 2, 2, 32, torch.float32)
    out, dq, dk, dv = computed(attend(backend), q, k, v, grad, mask)
    assert torch.allclose(out, v, atol=1e-6) and torch.allclose(dv, grad, atol=1e-6)
    assert dq.abs().max() < 1e-6 and dk.abs().max() < 1e-6
    out, *_ = computed(attend(backend), q, k, v, grad, BranchMask.from_tree([2, 3, 4], [-1, 0, 0]), window=1)
    assert torch.allclose(out, v, atol=1e-6)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("value", [NAN, INF, -INF, 1e30])
def test_a_bad_branch_leaves_the_others_alone(backend, value):
    """What one answer holds must not reach its siblings, forward or backward, although they share tiles."""
    mask = BranchMask.from_tree([9, 5, 6, 7], [-1, 0, 0, 0])
    for name in ("q", "k", "v", "grad"):
        given = dict(zip(("q", "k", "v", "grad"), tensors(0, 27, 4, 2, 32, torch.float32), strict=True))
        clean = computed(attend(backend), *given.values(), mask)
        given[name][14:20] = value  # segment 2
        got = computed(attend(backend), *given.values(), mask)
        for i, (x, y) in enumerate(zip(got, clean, strict=True)):
            kept = slice(9, 14) if i in (0, 1) or name in ("k", "v") else slice(20, 27)
            assert torch.allclose(x[kept], y[kept], rtol=1e-5, atol=1e-6), (name, i)
            assert torch.allclose(x[20:], y[20:], rtol=1e-5, atol=1e-6), (name, i)
        assert torch.allclose(got[0][:9], clean[0][:9], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("backend", "isa"), [("reference", ""), *(("cpu", isa) for isa in ISAS)])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("sizes", [(20, 7, 9), (200, 7, 9), (200, 2, 2)], ids=str)
def test_bad_tokens_leave_those_that_do_not_see_them_alone(backend, isa, value, sizes):
    """Hidden by the order of tokens alone in the first segment, and by the tree alone from the second, which comes
    behind all of it; the third sees it. Two segments of two tokens share a tile of rows, however wide vectors are: of
    the columns in front of it, a bit alone hides what the first of them does not see."""
    _cpu.use(isa)
    mask, length = BranchMask.from_context(sizes, [[], [], [0]]), sizes[0]
    half, second = length // 2, slice(length, length + sizes[1])
    for name in ("q", "k", "v", "grad"):
        given = dict(zip(("q", "k", "v", "grad"), tensors(0, sum(sizes), 4, 2, 32, torch.float32), strict=True))
        clean = computed(attend(backend), *given.values(), mask)
        rows = name in ("q", "grad")
        given[name][slice(0, half) if rows else slice(half, length)] = value
        got = computed(attend(backend), *given.values(), mask)
        for which, x, y in zip(("out", "dq", "dk", "dv"), got, clean, strict=True):
            kept = slice(half, length) if rows else slice(0, half if which in ("out", "dq") else 0)
            for part in (kept, second):
                assert torch.allclose(x[part], y[part], rtol=1e-5, atol=1e-5), (name, which)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_extreme_scores(backend):
    mask = random_tree(2, longest=12)
    q, k, v, grad = tensors(0, mask.num_tokens, 2, 1, 32, torch.float32)
    got = computed(attend(backend), 100 * q, 100 * k, v, grad, mask)
    assert all(torch.isfinite(x).all() for x in got)
    assert relative(got[0], expected(100 * q, 100 * k, v, grad, mask)[0]) < 1e-3
    low = computed(attend(backend), q, k, v, grad, mask, sinks=torch.tensor([-INF, 1e4]))
    assert all(torch.isfinite(x).all() for x in low)
    assert torch.equal(low[0][:, 1], torch.zeros_like(low[0][:, 1]))  # the sink takes everything


def test_same_bits_every_time():
    mask = random_graph(4, longest=40)
    given = tensors(0, mask.num_tokens, 4, 2, 64, torch.float32)
    with torch_threads(4):
        first = computed(attend("cpu"), *given, mask)
        for _ in range(3):
            assert all(torch.equal(x, y) for x, y in zip(computed(attend("cpu"), *given, mask), first, strict=True))


def test_a_row_does_not_depend_on_its_neighbours():
    """Packed with another tree or alone: the same numbers."""
    one, two = random_tree(5, longest=30), random_graph(6)
    q, k, v, grad = tensors(0, one.num_tokens + two.num_tokens, 4, 2, 32, torch.float32)
    n = one.num_tokens
    both = computed(attend("cpu"), q, k, v, grad, BranchMask.pack([one, two]))
    alone = computed(attend("cpu"), q[:n], k[:n], v[:n], grad[:n], one)
    for x, y in zip(both, alone, strict=True):
        assert torch.allclose(x[:n], y, rtol=1e-5, atol=1e-6)


def test_empty():
    mask = BranchMask.from_tree([0, 0], [-1, 0])
    q, k, v, grad = tensors(0, 0, 4, 2, 32, torch.float32)
    assert [x.numel() for x in computed(attend("cpu"), q, k, v, grad, mask)] == [0] * 4


# ------------------------------------------------------------------------------------------------ torch around it


def op_arguments(backend, dtype=torch.float32, sinks=True, grad=True):
    mask = random_tree(1, segments=4, longest=5)
    q, k, v, _ = tensors(0, mask.num_tokens, 4, 2, 32, dtype)
    s = torch.linspace(-1, 1, 4, dtype=dtype) if sinks else None
    for x in (q, k, v, *([s] if sinks else [])):
        x.requires_grad_(grad)
    return (q, k, v, mask.starts, mask.row_ptr, mask.cols, mask.positions, s, 0.2, 3.0, 6, backend), mask


@pytest.mark.compiled
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_opcheck(backend):
    for sinks in (True, False):
        arguments, _ = op_arguments(backend, sinks=sinks)
        torch.library.opcheck(torch.ops.anabranch.branch_attention.default, arguments)
    arguments, _ = op_arguments(backend, grad=False)
    out, lse = torch.ops.anabranch.branch_attention(*arguments)
    torch.library.opcheck(
        torch.ops.anabranch.branch_attention_backward.default,
        (torch.ones_like(out), torch.ones_like(lse), *arguments[:3], out, lse, *arguments[3:]),
    )


@pytest.mark.parametrize("options", [{}, ALL], ids=["plain", "all"])
def test_gradcheck(options):
    """Numerical differentiation of the reference in float64."""
    for mask in (random_tree(0, segments=3, longest=3), random_graph(1, segments=3, longest=2)):
        q, k, v, _ = tensors(0, mask.num_tokens, 2, 1, 3, torch.float64)
        inputs = [x.requires_grad_() for x in (q, k, v)]
        if options:
            inputs.append(torch.randn(2, dtype=torch.float64, requires_grad=True))
        assert torch.autograd.gradcheck(
            lambda q, k, v, s=None, mask=mask: ab.branch_attention(
                q, k, v, mask, sinks=s, backend="reference", **options
            ),
            inputs,
        )


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_the_log_sum_exp_is_differentiable_too(backend):
    arguments, mask = op_arguments(backend, dtype=torch.float32)
    q, k, _, *_, sinks, _, _, _, _ = arguments
    out, lse = torch.ops.anabranch.branch_attention(*arguments)
    got = torch.autograd.grad((out.sum() + (lse * torch.arange(4)).sum()), (q, k, arguments[2], sinks))
    x, y, z, s = (t.detach().double().requires_grad_() for t in (q, k, arguments[2], sinks))
    scores = torch.einsum("ihd,jhd->hij", x, y.repeat_interleave(2, 1)) * 0.2
    scores = 3.0 * torch.tanh(scores / 3.0)
    seen = mask.dense() & (mask.positions[:, None] - mask.positions[None] < 6)
    scores = torch.cat([scores.masked_fill(~seen, -INF), s[:, None, None].expand(-1, len(seen), 1)], 2)
    dense_out = torch.einsum("hij,jhd->ihd", scores.softmax(2)[:, :, :-1], z.repeat_interleave(2, 1))
    want_lse = torch.logsumexp(scores, 2).T
    want = torch.autograd.grad((dense_out.sum() + (want_lse * torch.arange(4)).sum()), (x, y, z, s))
    assert torch.allclose(lse.double(), want_lse, rtol=1e-5)
    assert all(relative(a, b) < 1e-5 for a, b in zip(got, want, strict=True))


@pytest.mark.compiled
def test_compile():
    """One graph, forward and backward, and the same graph for a second mask of another size."""

    def layer(q, k, v, mask):
        return ab.branch_attention(q * 1.5, k, v, mask, softcap=5.0).sin()

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for seed in (0, 1):
        mask = random_tree(seed)
        given = tensors(seed, mask.num_tokens, 4, 2, 32, torch.float32)
        eager, fast = computed(layer_of(layer), *given, mask), computed(layer_of(compiled), *given, mask)
        assert all(torch.allclose(x, y, rtol=1e-5, atol=1e-6) for x, y in zip(eager, fast, strict=True))


def layer_of(f):
    return lambda q, k, v, mask, sinks=None: f(q, k, v, mask)


def test_autocast():
    mask = random_tree(0)
    q, k, v, grad = tensors(0, mask.num_tokens, 4, 2, 32, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out, dq, dk, dv = computed(attend("auto"), q, k.bfloat16(), v, grad.bfloat16(), mask)
        wide = ab.branch_attention(q.double(), k.double(), v.double(), mask, backend="reference")
    assert out.dtype == torch.bfloat16 and wide.dtype == torch.float64
    assert (dq.dtype, dk.dtype, dv.dtype) == (torch.float32, torch.bfloat16, torch.float32)
    for x, y in zip((out, dq, dk, dv), expected(q, k, v, grad, mask), strict=True):
        assert relative(x, y) < 2e-2


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    from torch.utils.checkpoint import checkpoint

    mask = random_tree(0)
    given = tensors(0, mask.num_tokens, 4, 2, 32, torch.float32)

    def layer(q, k, v, mask, sinks=None):
        return checkpoint(lambda a, b, c: ab.branch_attention(a, b, c, mask), q, k, v, use_reentrant=reentrant)

    plain, kept = computed(attend("auto"), *given, mask), []
    inputs = [x.clone().requires_grad_() for x in given[:3]]
    out = layer(*inputs, mask)
    out.backward(given[3])
    kept = [out, *(x.grad for x in inputs)]
    assert all(torch.equal(x, y) for x, y in zip(kept, plain, strict=True))


def test_the_mask_may_go_before_the_backward():
    mask = random_tree(0)
    given = tensors(0, mask.num_tokens, 4, 2, 32, torch.float32)
    plain = computed(attend("auto"), *given, mask)
    inputs = [x.clone().requires_grad_() for x in given[:3]]
    out = ab.branch_attention(*inputs, mask)
    gone = weakref.ref(mask)
    del mask
    gc.collect()
    assert gone() is None
    assert all(torch.equal(x, y) for x, y in zip(torch.autograd.grad(out, inputs, given[3]), plain[1:], strict=True))


def test_no_gradients_of_gradients():
    (q, *rest), _ = op_arguments("cpu", sinks=False)
    out, _ = torch.ops.anabranch.branch_attention(q, *rest)
    (dq,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="gradients of its gradients"):
        dq.sum().backward()


def _ddp(rank, path, results):
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    model = torch.nn.parallel.DistributedDataParallel(Layer())
    mask = random_tree(rank)
    model(torch.ones(mask.num_tokens, 8) * (rank + 1), mask).square().mean().backward()
    if rank == 0:
        torch.save([p.grad for p in model.parameters()], results)
    dist.barrier()  # who leaves first would close connections that the other still reads from
    dist.destroy_process_group()


class Layer(torch.nn.Module):
    """One attention layer, 2 query heads and 1 KV head of 8."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.qkv = torch.nn.Linear(8, 32)
        self.sinks = torch.nn.Parameter(torch.zeros(2))

    def forward(self, x, mask):
        x = self.qkv(x * torch.linspace(-1, 1, len(x))[:, None]).unflatten(1, (4, 8))
        return ab.branch_attention(x[:, :2], x[:, 2:3], x[:, 3:], mask, sinks=self.sinks)


def test_distributed_data_parallel(tmp_path):
    """Two processes, gloo: the gradient is the mean of what each would have alone."""
    import torch.multiprocessing as mp

    mp.spawn(_ddp, (tmp_path / "meet", tmp_path / "grads"), nprocs=2)
    got, alone = torch.load(tmp_path / "grads"), []
    for rank in range(2):
        layer, mask = Layer(), random_tree(rank)
        layer(torch.ones(mask.num_tokens, 8) * (rank + 1), mask).square().mean().backward()
        alone.append([p.grad for p in layer.parameters()])
    for g, x, y in zip(got, *alone, strict=True):
        assert torch.allclose(g, (x + y) / 2, rtol=1e-4, atol=1e-7)


# ------------------------------------------------------------------------------------------------ memory and bad input


def test_nothing_of_size_t_squared(monkeypatch):
    """The largest tensor that a call makes is as large as its inputs, whatever T."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = [0]

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(x, torch.Tensor):
                    largest[0] = max(largest[0], x.numel())
            return out

    mask = BranchMask.from_tree([200, *[150] * 8], [-1, *[0] * 8])
    given = tensors(0, mask.num_tokens, 1, 1, 16, torch.float32)
    with Sizes():
        computed(attend("cpu"), *given, mask)
    assert 0 < largest[0] <= mask.num_tokens * 16 < mask.num_tokens**2


T = 12
GOOD = dict(q=(T, 4, 32), k=(T, 2, 32), v=(T, 2, 32))


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(q=(T + 1, 4, 32)), "made for 12 tokens, but q has 13"),
        (dict(q=(1, T, 4, 32)), r"q: expected a tensor \[T, heads, head_dim\].*packed"),
        (dict(k=(T - 1, 2, 32)), r"k: expected shape \[12, num_kv_heads, 32\]"),
        (dict(v=(T, 1, 32)), r"v: expected shape \[12, 2, v_head_dim\]"),
        (dict(q=(T, 3, 32)), "3 query heads are not a multiple of the 2 KV heads"),
        (dict(mask=None), "mask: expected a BranchMask"),
        (dict(softcap=0.0), "softcap: must be positive"),
        (dict(window=0), "window: must be at least 1"),
        (dict(sinks=torch.zeros(2)), r"sinks: expected shape \[4\]"),
        (dict(sinks=torch.zeros(4, dtype=torch.long)), "sinks: expected floating-point"),
        (dict(backend="fast"), "backend: 'fast' is not one of"),
        (dict(dtype=torch.float64, backend="cpu"), "float64"),
    ],
)
def test_bad_input(change, message):
    shapes = {name: change.get(name, shape) for name, shape in GOOD.items()}
    dtype = change.get("dtype", torch.float32)
    given = {name: torch.zeros(shape, dtype=dtype) for name, shape in shapes.items()}
    mask = change["mask"] if "mask" in change else BranchMask.from_tree([T], [-1])
    rest = {name: value for name, value in change.items() if name not in (*GOOD, "mask", "dtype")}
    with pytest.raises((ValueError, TypeError), match=message):
        ab.branch_attention(**given, mask=mask, **rest)


def test_bad_dtype_and_device():
    mask = BranchMask.from_tree([T], [-1])
    q, k, v = (torch.zeros(shape) for shape in GOOD.values())
    with pytest.raises(ValueError, match=r"k: expected torch\.float32 on cpu like q, got torch\.bfloat16"):
        ab.branch_attention(q, k.bfloat16(), v, mask)
    with pytest.raises(ValueError, match=r"mask: is on meta, q on cpu; pass mask\.to"):
        ab.branch_attention(q, k, v, mask.to("meta"))


def test_scale_defaults_to_the_usual():
    mask = random_tree(0)
    q, k, v, _ = tensors(0, mask.num_tokens, 4, 2, 64, torch.float32)
    assert torch.equal(ab.branch_attention(q, k, v, mask), ab.branch_attention(q, k, v, mask, scale=1 / math.sqrt(64)))
