"""K and V of different head_dims, and V as the first numbers of K's rows: every backend against the float64 oracle."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from branch_kit import computed, expected, random_graph, random_tree, tensors
from branch_kit import relative as relative_error
from test_cpu_kernels import DTYPES, INFO, ISAS, check, make_case, make_pools
from test_kv_formats import check as check_quantised

import anabranch as ab
from anabranch import _cpu, backends
from anabranch.backends import cpu

#: head_dims of K and of V: DeepSeek's expanded heads, odd ones, V wider than K
DIMS = [(192, 128), (24, 16), (7, 40), (80, 96), (64, 320), (128, 1)]
SHAPES = [(2, 2, 1), (6, 2, 5), (7, 1, 9)]  # query heads, KV heads, rows a tile: few packed rows, then many


@pytest.fixture(autouse=True)
def default_isa():
    yield
    _cpu.use("")


@pytest.mark.parametrize(("dim", "v_dim"), DIMS)
@pytest.mark.parametrize("isa", ISAS)
def test_cpu_attention(isa, dim, v_dim):
    _cpu.use(isa)
    rng = np.random.default_rng(dim)
    for i, (hq, hkv, tile_rows) in enumerate(SHAPES):
        for dtype in DTYPES if isa == INFO["isa"] else DTYPES[:2]:
            page_size = (1, 16, 128)[i]
            case = make_case(rng, 9, [3, 130, 1, 97], tile_rows, num_slots=640)
            layout = ("user", "cache", "padded")[i]
            k, v = make_pools(rng, layout, 640 // page_size, page_size, hkv, dim, dtype, case.slots, v_dim)
            q = torch.from_numpy(rng.standard_normal((9, hq, dim))).to(dtype)
            out = check(case, q, k, v, scale=dim**-0.5, **({"softcap": 3.0, "window": 90} if i == 1 else {}))
            assert out.shape == (9, hq, v_dim)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("dim", "v_dim"), [(576, 512), (40, 24)])
def test_cpu_v_in_k(isa, dim, v_dim, dtype):
    """Latents: one KV head, many query heads, V a view of K's pages."""
    _cpu.use(isa)
    rng = np.random.default_rng(3)
    for hq, tile_rows in ((16, 4), (5, 1), (128, 1)):
        case = make_case(rng, 6, [3, 110, 33], tile_rows, num_slots=320)
        k, _ = make_pools(rng, "cache", 20, 16, 1, dim, dtype, case.slots)
        q = torch.from_numpy(rng.standard_normal((6, hq, dim))).to(dtype)
        check(case, q, k, k[..., :v_dim], scale=0.07)


@pytest.mark.parametrize("name", ["int8", "fp8"])
@pytest.mark.parametrize(("dim", "v_dim"), [(192, 128), (24, 40)])
def test_cpu_quantised(name, dim, v_dim):
    rng = np.random.default_rng(1)
    for dtype, tile_rows in zip(DTYPES, (1, 5, 9), strict=True):
        case = make_case(rng, 9, [3, 130, 1, 97], tile_rows, num_slots=640)
        pools = make_pools(rng, "cache", 40, 16, 2, dim, dtype, case.slots, v_dim)
        q = torch.from_numpy(rng.standard_normal((9, 6, dim))).to(dtype)
        check_quantised(case, q, pools, name, scale=dim**-0.5)


@pytest.mark.parametrize("isa", ISAS)
def test_hidden_infinities_of_v_stay_hidden(isa):
    _cpu.use(isa)
    rng = np.random.default_rng(5)
    for tile_rows in (1, 7):
        case = make_case(rng, 10, [60, 130], 7, num_slots=320)
        k, v = make_pools(rng, "cache", 20, 16, 1, 40, torch.float32, case.slots, 72)
        token = case.lone[0][1]
        v[case.slots[token] // 16, case.slots[token] % 16, 0, 71] = float("inf")
        q = torch.from_numpy(rng.standard_normal((10, tile_rows, 40))).float()
        out, _ = cpu.attention(q, k, v, case, scale=0.2, softcap=None, window=None, sinks=None, return_lse=False)
        sees = torch.from_numpy(case.visible[:, token])
        assert (
            out[~sees].isfinite().all() and out[..., :71].isfinite().all() and not out[sees][..., 71].isfinite().any()
        )


BRANCHES = [("cpu", torch.float32, 1e-5), ("cpu", torch.bfloat16, 2e-2), ("reference", torch.float64, 1e-12)]


@pytest.mark.parametrize(("dim", "v_dim"), [(192, 128), (24, 16), (7, 40), (80, 96), (16, 300)])
@pytest.mark.parametrize(("backend", "dtype", "bound"), BRANCHES, ids=str)
def test_branch_attention_forward_and_backward(backend, dtype, bound, dim, v_dim):
    for mask, options in ((random_tree(3), {}), (random_graph(1), dict(softcap=2.0, window=11))):
        given = tensors(0, mask.num_tokens, 6, 2, dim, dtype, v_dim=v_dim)
        options = {"scale": dim**-0.5, "sinks": torch.linspace(-1, 2, 6, dtype=dtype), **options}
        want = expected(*given, mask, **options)
        got = computed(
            lambda *args, **more: ab.branch_attention(*args, backend=backend, **more), *given, mask, **options
        )
        for name, x, y in zip(("out", "dq", "dk", "dv", "d_sinks"), got, want, strict=True):
            assert x.shape == y.shape and torch.isfinite(x).all(), name
            assert relative_error(x, y) <= bound, (name, relative_error(x, y))


@pytest.mark.parametrize("isa", ISAS)
def test_branch_attention_of_every_instruction_set(isa):
    _cpu.use(isa)
    for dim, v_dim in ((20, 56), (56, 20)):
        mask = random_graph(2)
        given = tensors(1, mask.num_tokens, 4, 2, dim, torch.float32, v_dim=v_dim)
        want = expected(*given, mask, scale=0.2)
        for x, y in zip(computed(ab.branch_attention, *given, mask, scale=0.2), want, strict=True):
            assert relative_error(x, y) <= 1e-5


def test_branch_attention_keeps_hidden_infinities_apart():
    mask = ab.BranchMask.from_tree([6, 5, 4], [-1, 0, 0])
    q, k, v, grad = tensors(0, 15, 2, 1, 24, torch.float32, v_dim=40)
    want = computed(ab.branch_attention, q, k, v, grad, mask)
    v[8, 0, 39], k[9, 0, 23] = float("inf"), float("nan")
    got = computed(ab.branch_attention, q, k, v, grad, mask)
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x[11:], y[11:])  # the second branch sees neither


def test_what_a_backend_lacks_is_said(monkeypatch):
    device = torch.device("cpu")
    monkeypatch.setattr(backends.registry, "unavailable", lambda name: None)
    with pytest.raises(ValueError, match="head_dim 128 for V beside 192 for K; pass backend='auto' or 'reference'"):
        backends.choose("cuda", device, torch.float32, 192, v_head_dim=128)
    with pytest.raises(ValueError, match="V as a part of K's rows"):
        backends.choose("cuda", device, torch.float32, 576, v_head_dim=0)
    with pytest.raises(ValueError, match="head_dim up to 256 in branch attention, got 300; use 'reference' or 'cpu'"):
        backends.choose("triton", device, torch.float32, 300, v_head_dim=128, branch=True)
    with pytest.raises(ValueError, match="1 to 1024, got 2000"):
        backends.choose("cpu", device, torch.float32, 64, v_head_dim=2000)
