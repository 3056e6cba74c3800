"""The torch ops on CUDA tensors: opcheck, every backend against the oracle, branch attention's gradients."""

from __future__ import annotations

import functools

import pytest
import torch
from branch_kit import computed, expected, random_graph, random_tree, relative, tensors
from triton_cases import relative_error

import anabranch as ab
from anabranch import backends

BACKENDS = ["reference", "triton", "cuda"]
BOUNDS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}


@pytest.fixture(params=BACKENDS)
def backend(request):
    if reason := backends.unavailable(request.param):
        pytest.skip(reason)
    return request.param


def forked(dtype=torch.float32, layers=1, heads=2, dim=32):
    """A cache on the GPU with a trunk of 6 and two kids, and a step of three rows whose K and V are written."""
    cache = ab.TreeCache(layers, heads, dim, num_pages=32, page_size=4, dtype=dtype, device="cuda")
    gen = torch.Generator("cuda").manual_seed(0)

    def fill(step):
        for layer in range(layers):
            k, v = (torch.randn(step.num_rows, heads, dim, generator=gen, device="cuda").to(dtype) for _ in range(2))
            cache.write(layer, k, v, step)
        return step

    trunk = cache.branch()
    fill(cache.step({trunk: 6}))
    kids = cache.fork(trunk, 2)
    step = fill(cache.step({kids[0]: 1, kids[1]: 2}))
    return cache, step, torch.randn(3, 2 * heads, dim, generator=gen, device="cuda").to(dtype)


@pytest.mark.compiled
@pytest.mark.parametrize("sinks", [False, True], ids=["no-sinks", "sinks"])
def test_opcheck_tree_attention(backend, sinks):
    cache, step, q = forked()
    given = torch.zeros(4, device="cuda") if sinks else None
    args = (q, cache.k_pages(0), cache.v_pages(0), step.handle, given, 0.2, 0.0, 0, 0, backend, True)
    torch.library.opcheck(torch.ops.anabranch.tree_attention.default, args)


@pytest.mark.compiled
def test_opcheck_write_kv(backend):
    cache = ab.TreeCache(3, 2, 32, num_pages=8, device="cuda")
    step = cache.step({cache.branch(): 3})
    k = torch.ones(3, 2, 32, device="cuda")
    # Each check runs the op, and a layer is written once: one layer a check.
    for layer, check in enumerate(("test_schema", "test_faketensor", "test_autograd_registration")):
        args = (k, k, cache.k_pages(layer).contiguous(), cache.v_pages(layer).contiguous(), step.handle, layer, backend)
        torch.library.opcheck(torch.ops.anabranch.write_kv.default, args, test_utils=check)


@pytest.mark.compiled
@pytest.mark.parametrize("backend", ["reference", "triton"])  # the cuda backend has no branch attention
def test_opcheck_branch_attention(backend):
    mask = random_tree(1, segments=4, longest=5).to("cuda")
    for sinks in (torch.linspace(-1, 1, 4, device="cuda"), None):
        q, k, v, _ = tensors(0, mask.num_tokens, 4, 2, 32, torch.float32, "cuda")
        options = (0.2, 3.0, 6, backend)
        index = (mask.starts, mask.row_ptr, mask.cols, mask.positions)
        out, lse = torch.ops.anabranch.branch_attention(q, k, v, *index, sinks, *options)
        for x in (q, k, v, *([] if sinks is None else [sinks])):
            x.requires_grad_()
        torch.library.opcheck(
            torch.ops.anabranch.branch_attention.default, (q, k, v, *index, sinks, *options), atol=1e-4, rtol=1e-4
        )
        detached = [None if x is None else x.detach() for x in (q, k, v, sinks)]
        arguments = (torch.ones_like(out), torch.ones_like(lse), *detached[:3], out, lse, *index, detached[3], *options)
        torch.library.opcheck(torch.ops.anabranch.branch_attention_backward.default, arguments)


@pytest.mark.compiled
def test_compile_fullgraph(backend):
    cache, step, q = forked()
    want = ab.tree_attention(q, cache, 0, step, softcap=9.0, backend=backend)

    def block(q):
        return ab.tree_attention(q * 1.0, cache, 0, step, softcap=9.0, backend=backend) + 1

    torch.testing.assert_close(torch.compile(block, fullgraph=True)(q), want + 1)


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("heads,kv_heads,dim", [(8, 2, 128), (6, 6, 64), (7, 1, 80)])
def test_every_backend_against_the_oracle(backend, heads, kv_heads, dim, dtype):
    """Own pages, mixed decode and chunks, every option; the oracle is the reference in float64 on the CPU."""
    gen = torch.Generator().manual_seed(dim)
    k_pages, v_pages = (torch.randn(60, 16, kv_heads, dim, generator=gen).to(dtype) for _ in range(2))
    order = torch.randperm(60, generator=gen).int()
    trunk = order[:20].tolist()
    tables = torch.tensor([trunk + order[20 + 4 * i : 24 + 4 * i].tolist() for i in range(10)])
    lengths, rows = [384, 383, 370, 384, 321, 350, 379, 384, 336, 337], [1, 1, 30, 1, 1, 12, 1, 1, 1, 2]
    q = torch.randn(sum(rows), heads, dim, generator=gen).to(dtype)
    sinks = torch.randn(heads, generator=gen)
    for options in ({}, dict(softcap=4.0, window=200, sinks=sinks, scale=0.15)):
        plans = [ab.Plan.from_block_tables(tables, lengths, 16, rows) for _ in range(2)]
        there = {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in options.items()}
        out, lse = ab.paged_tree_attention(
            q.cuda(), k_pages.cuda(), v_pages.cuda(), plans[0], backend=backend, return_lse=True, **there
        )
        want, want_lse = ab.paged_tree_attention(
            q.double(), k_pages.double(), v_pages.double(), plans[1], backend="reference", return_lse=True, **options
        )
        assert relative_error(out, want) <= BOUNDS[dtype]
        bound = 1e-4 if dtype == torch.float32 else 2e-2
        assert torch.allclose(lse.cpu().double(), want_lse.double(), atol=bound, rtol=bound)


@pytest.mark.parametrize("make", [random_tree, random_graph], ids=["tree", "graph"])
@pytest.mark.parametrize("dtype,bound", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=["f32", "bf16"])
@pytest.mark.parametrize("dim", [64, 128])
def test_branch_attention_forward_and_backward(make, dtype, bound, dim):
    """Triton, at lengths that take many tiles; out, dq, dk, dv and the sinks' gradient against float64."""
    mask = make(5, segments=9, longest=120)
    attend = functools.partial(ab.branch_attention, backend="triton")
    given = tensors(0, mask.num_tokens, 8, 2, dim, dtype, "cuda")
    sinks = torch.linspace(-1, 2, 8, device="cuda")
    for options in ({}, dict(scale=0.2, softcap=3.0, window=90, sinks=sinks)):
        want, got = expected(*given, mask, **options), computed(attend, *given, mask.to("cuda"), **options)
        for name, x, y in zip(("out", "dq", "dk", "dv", "d_sinks"), got, want, strict=False):
            assert torch.isfinite(x).all() and relative(x, y) <= bound, (name, relative(x, y))


def test_tensors_of_the_host_are_refused_by_name(backend):
    cache, step, q = forked()
    with pytest.raises(ValueError, match=r"q: expected device cuda:0 like the pages, got cpu"):
        ab.tree_attention(q.cpu(), cache, 0, step, backend=backend)
    with pytest.raises(ValueError, match=r"sinks: expected device cuda:0 like q, got cpu"):
        ab.tree_attention(q, cache, 0, step, sinks=torch.zeros(4), backend=backend)
