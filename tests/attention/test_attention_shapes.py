"""Trees whose K and V have different head_dims, and latent caches (MLA), on every backend against the naive twin."""

from __future__ import annotations

import pytest
import torch
from programs import Twins, backends_here

import anabranch as ab

BACKENDS = backends_here()
CHEAP = ("test_schema", "test_faketensor")
FAST = [name for name in BACKENDS if name != "reference"]


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm().clamp_min(1e-300))


def program(twins: Twins, changes: int, max_rows: int = 9) -> tuple:
    for _ in range(changes):
        twins.random_change(max_rows=max_rows)
    step = twins.random_step(max_rows=max_rows)
    twins.compare()
    return step


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("seed", "dims", "page_size"), [
    (0, (48, 32), 1), (1, (24, 16), 4), (2, (192, 128), 16), (3, (16, 80), 7), (4, (96, 72), 128),
], ids=str)  # fmt: skip
def test_random_programs(backend, seed, dims, page_size):
    light = backend == "triton"
    if light and seed == 2:
        pytest.skip("the interpreter is slow: tests/kernels/test_triton_head_dims.py has these sizes")
    heads, group = (1, 2, 3)[seed % 3], (1, 3, 4)[seed % 3]
    twins = Twins(seed=seed, page_size=page_size, heads=heads, dim=dims[0], v_dim=dims[1], num_pages=2000)
    step, twin = program(twins, 10 if light else 40, 4 if light else 20)
    options = {} if seed % 2 else dict(window=7, softcap=5.0, sinks=torch.linspace(-2, 2, heads * group))
    q = twins.randn(step.num_rows, heads * group, dims[0])
    expected, expected_lse = twins.naive.attention(q, 0, twin, **options)
    out, lse = ab.tree_attention(q, twins.cache, 0, step, backend=backend, return_lse=True, **options)
    assert out.shape == (step.num_rows, heads * group, dims[1]) and relative_error(out, expected) <= 1e-5
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kv_format", ["auto", "int8", "fp8"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_formats(backend, kv_format):
    light = backend == "triton"
    for v_in_k in (False, True):
        twins = Twins(seed=5, page_size=4, heads=1, dim=40, v_dim=32, v_in_k=v_in_k, kv_format=kv_format, num_pages=900)
        step, twin = program(twins, 8 if light else 40, 4 if light else 20)
        q = twins.randn(step.num_rows, 6, 40)
        expected, _ = twins.naive.attention(q, 0, twin, scale=0.2)
        out = ab.tree_attention(q, twins.cache, 0, step, scale=0.2, backend=backend)
        assert relative_error(out, expected) <= 1e-5


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("v_in_k", [False, True])
def test_half_precision_is_as_good_as_a_flat_kernel(backend, dtype, v_in_k):
    """At most twice the error of torch's own attention, branch by branch, in the same dtype."""
    heads, group, dim, v_dim = (1, 12, 80, 64) if v_in_k else (2, 3, 96, 64)
    twins = Twins(seed=3, page_size=16, heads=heads, dim=dim, v_dim=v_dim, v_in_k=v_in_k, dtype=dtype, num_pages=900)
    trunk = twins.branch()
    twins.step({0: 40})
    twins.fork(trunk, 3)
    twins.step({1: 9, 2: 1, 3: 20})
    step = twins.step({1: 1, 2: 1, 3: 1})
    q = twins.randn(3, heads * group, dim)
    out = ab.tree_attention(q, twins.cache, 0, step[0], scale=dim**-0.5, backend=backend)
    flat = torch.empty(3, heads * group, v_dim, dtype=dtype)
    for i, (branch, _) in enumerate(twins.pairs[1:]):
        k, v = (x.transpose(0, 1).repeat_interleave(group, 0)[None] for x in twins.cache.read(branch, 0))
        flat[i] = torch.nn.functional.scaled_dot_product_attention(q[i][None, :, None], k, v)[0, :, 0]
    exact, _ = twins.naive.attention(q, 0, step[1], scale=dim**-0.5)
    assert relative_error(out, exact) <= 2 * relative_error(flat, exact)


# ------------------------------------------------------------------------------------------------ latents


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("lora", "rope", "heads"), [(64, 16, 5), (32, 8, 20), (512, 64, 16)], ids=str)
def test_absorbed_products_are_the_expanded_ones(backend, lora, rope, heads):
    """Multi-head latent attention both ways, in float64 weights: per-head K and V made of the latents, and queries
    absorbed into latents, over the same tree."""
    if backend == "triton" and lora == 512:
        pytest.skip("the interpreter is slow: tests/kernels/test_triton_head_dims.py has this size")
    nope, v_dim = 24, 20
    g = torch.Generator().manual_seed(lora)
    up_k, up_v = (torch.randn(heads, n, lora, generator=g, dtype=torch.float64) / lora**0.5 for n in (nope, v_dim))
    twins = Twins(seed=1, page_size=4, heads=1, dim=lora + rope, v_dim=lora, v_in_k=True, num_pages=900)
    step, twin = program(twins, 8 if backend == "triton" else 30, 3 if backend == "triton" else 9)
    q = torch.randn(step.num_rows, heads, nope + rope, generator=g, dtype=torch.float64)
    scale = (nope + rope) ** -0.5
    absorbed = torch.cat([torch.einsum("thn,hnl->thl", q[..., :nope], up_k), q[..., nope:]], -1).float()
    latent = ab.tree_attention(absorbed, twins.cache, 0, step, scale=scale, backend=backend)
    assert latent.shape == (step.num_rows, heads, lora)
    out = torch.einsum("thl,hvl->thv", latent.double(), up_v)
    for branch, rows in twin.rows.items():
        rows_k, latents = (x[:, 0].double() for x in twins.naive.read(branch, 0))
        k = torch.cat([torch.einsum("jl,hnl->hjn", latents, up_k), rows_k[:, lora:].expand(heads, -1, -1)], -1)
        v = torch.einsum("jl,hvl->hjv", latents, up_v)
        for i in range(rows.start, rows.stop):
            seen = twin.first[branch] + i - rows.start + 1
            weights = torch.softmax(torch.einsum("hd,hjd->hj", q[i], k[:, :seen]) * scale, 1)
            assert relative_error(out[i], torch.einsum("hj,hjv->hv", weights, v[:, :seen])) <= 1e-5


def test_a_latent_cache_keeps_no_values():
    cache = ab.TreeCache(2, 1, 72, 10, page_size=8, v_head_dim=64, v_in_k=True)
    other = ab.TreeCache(2, 1, 72, 10, page_size=8, v_head_dim=64)
    held = [{p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for layer in (0, 1)
             for p in (c.k_pages(layer), c.v_pages(layer))} for c in (cache, other)]  # fmt: skip
    assert sum(held[0].values()) == 2 * 10 * 8 * 72 * 4 and sum(held[1].values()) == 2 * 10 * 8 * (72 + 64) * 4
    assert cache.v_pages(1).data_ptr() == cache.k_pages(1).data_ptr() and cache.v_pages(1).shape == (10, 8, 1, 64)
    assert "head_dim=72 (V: 64 of them)" in repr(cache) and "head_dim=72 (V: 64)" in repr(other)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_pool_of_latents_of_ones_own(backend):
    """Both layouts: V is a view of the pages of K."""
    plan = ab.Plan.from_block_tables(torch.tensor([[2, 0], [2, 1], [2, 3]]), [7, 8, 5], 4)
    g = torch.Generator().manual_seed(0)
    q, latents = torch.randn(3, 8, 48, generator=g), torch.randn(4, 4, 1, 48, generator=g)
    for pages in (latents, latents.transpose(1, 2).contiguous().transpose(1, 2)):
        out = ab.paged_tree_attention(q, pages, pages[..., :32], plan, scale=0.3, backend=backend)
        for row, (table, length) in enumerate(zip(([2, 0], [2, 1], [2, 3]), (7, 8, 5), strict=True)):
            seen = latents[table].reshape(-1, 48)[:length].double()
            want = torch.softmax(0.3 * q[row].double() @ seen.T, 1) @ seen[:, :32]
            assert out.shape == (3, 8, 32) and relative_error(out[row], want) <= 1e-5


# ------------------------------------------------------------------------------------------------ torch, bad input


def test_the_ops_know_their_shapes():
    for v_in_k in (False, True):
        twins = Twins(seed=2, page_size=4, heads=1, dim=24, v_dim=16, v_in_k=v_in_k)
        twins.branch()
        step = twins.step({0: 5})[0]
        cache, q = twins.cache, twins.randn(5, 4, 24)
        args = (q, cache.k_pages(0), cache.v_pages(0), step.plan.handle, None, 0.2, 0.0, 0, 0, "auto", True)
        torch.library.opcheck(torch.ops.anabranch.tree_attention.default, args, test_utils=CHEAP)


def test_the_branch_ops_know_their_shapes():
    mask = ab.BranchMask.from_tree([4, 3, 2], [-1, 0, 0])
    q, k, v = (torch.randn(9, h, d, requires_grad=True) for h, d in ((4, 24), (2, 24), (2, 10)))
    options = (None, 0.2, 0.0, 0, "auto")
    given = (q, k, v, mask.starts, mask.row_ptr, mask.cols, mask.positions, *options)
    torch.library.opcheck(torch.ops.anabranch.branch_attention.default, given, test_utils=CHEAP)


def test_what_does_not_fit_is_said():
    make = ab.TreeCache
    with pytest.raises(ValueError, match=r"v_in_k: needs v_head_dim.*kv_lora_rank"):
        make(1, 1, 72, 4, v_in_k=True)
    with pytest.raises(ValueError, match="v_head_dim: 80 numbers cannot be the first of K's 72"):
        make(1, 1, 72, 4, v_head_dim=80, v_in_k=True)
    with pytest.raises(ValueError, match="v_head_dim"):
        make(1, 1, 72, 4, v_head_dim=0)
    with pytest.raises(ValueError, match="v_in_k: expected True or False"):
        make(1, 1, 72, 4, v_head_dim=64, v_in_k="yes")
    cache = make(1, 1, 72, 4, v_head_dim=64, v_in_k=True)
    step = cache.step({cache.branch(): 2})
    with pytest.raises(ValueError, match=r"v: this cache has V in K's rows.*pass None"):
        cache.write(0, torch.zeros(2, 1, 72), torch.zeros(2, 1, 64), step)
    with pytest.raises(ValueError, match=r"k: expected shape \[2, 1, 72\]"):
        cache.write(0, torch.zeros(2, 1, 64), None, step)
    cache.write(0, torch.zeros(2, 1, 72), None, step)
    with pytest.raises(ValueError, match=r"scale: has to be given.*qk_nope_head_dim"):
        ab.tree_attention(torch.zeros(2, 4, 72), cache, 0, step)
    with pytest.raises(ValueError, match=r"q: expected shape \[2, num_q_heads, 72\]"):
        ab.tree_attention(torch.zeros(2, 4, 64), cache, 0, step, scale=1.0)
    split = make(1, 2, 24, 4, v_head_dim=16)
    step = split.step({split.branch(): 2})
    with pytest.raises(ValueError, match=r"v: expected shape \[2, 2, 16\] \(rows, num_kv_heads, v_head_dim\)"):
        split.write(0, torch.zeros(2, 2, 24), torch.zeros(2, 2, 24), step)
    with pytest.raises(ValueError, match=r"v: expected shape .* got None"):
        split.write(0, torch.zeros(2, 2, 24), None, step)
    plan = ab.Plan.from_block_tables(torch.tensor([[0]]), [2], 4)
    with pytest.raises(ValueError, match=r"v_pages: expected shape \[1, 4, 2, v_head_dim\]"):
        ab.paged_tree_attention(torch.zeros(1, 2, 24), torch.zeros(1, 4, 2, 24), torch.zeros(1, 4, 1, 16), plan)
    mask = ab.BranchMask.from_tree([3], [-1])
    with pytest.raises(ValueError, match=r"v: expected shape \[3, 2, v_head_dim\]"):
        ab.branch_attention(torch.zeros(3, 2, 24), torch.zeros(3, 2, 24), torch.zeros(3, 1, 16), mask)
