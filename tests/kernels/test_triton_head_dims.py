"""The Triton kernels where K and V have different head_dims, and over latents: in the interpreter, or on a GPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed (it has wheels for Linux only)")

from anabranch.kernels import launch
from branch_kit import computed, expected, random_tree, relative, tensors
from triton_cases import check, random_case

import anabranch as ab
from anabranch.backends import reference
from anabranch.backends.formats import KVFormat

DEVICE = "cpu" if launch.INTERPRETED else "cuda"
pytestmark = pytest.mark.skipif(
    not launch.INTERPRETED and not torch.cuda.is_available(),
    reason="no GPU, and Triton was imported without TRITON_INTERPRET=1",
)


def run(case, **options):
    given = dict(softcap=None, window=None, sinks=None) | options
    return launch.attention(case.q, case.k_pages, case.v_pages, case.arrays, **given)


# One column part or two, of K, of V and of both; padded parts; V wider than K.
@pytest.mark.parametrize("dims", [(192, 128), (80, 96), (72, 24), (16, 200)], ids=str)
def test_shapes(dims):
    for seed, (page_size, layout) in enumerate([(1, "heads"), (128, "tokens")]):
        case = random_case(
            seed, rows=4, segments=2, head_dim=dims[0], v_dim=dims[1], page_size=page_size, layout=layout, max_len=30,
            device=DEVICE,
        )  # fmt: skip
        options = dict(softcap=3.0, window=40, sinks=torch.linspace(-1, 2, 4, device=DEVICE)) if seed == 1 else {}
        check(case, run(case, scale=0.2, **options), scale=0.2, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dims", [(576, 512), (80, 64), (40, 24)], ids=str)
def test_v_in_k(dims, dtype, monkeypatch):
    """The kernel loads what is K and V once where the sizes allow it (576 and 512), twice elsewhere."""
    once = []
    found = launch._v_in_k
    monkeypatch.setattr(launch, "_v_in_k", lambda *args: once.append(found(*args)) or once[-1])
    case = random_case(
        1, rows=3, segments=2, head_dim=dims[0], v_dim=dims[1], v_in_k=True, num_kv_heads=1, group=16, dtype=dtype,
        max_len=40, device=DEVICE,
    )  # fmt: skip
    check(case, run(case, scale=0.06), scale=0.06)
    assert once == ([True] if dims[1] >= 64 else [])


@pytest.mark.parametrize("name", ["int8", "fp8"])
@pytest.mark.parametrize("v_in_k", [False, True])
def test_quantised(name, v_in_k):
    dim, v_dim = 80, 64
    case = random_case(
        3,
        rows=3,
        segments=2,
        head_dim=dim,
        v_dim=v_dim,
        v_in_k=v_in_k,
        num_kv_heads=1,
        group=4,
        max_len=25,
        device=DEVICE,
    )
    fmt = KVFormat.of(name, torch.float32)
    page_size, rows = case.k_pages.shape[1], 30
    k, v = (torch.randn(rows, 1, d, generator=torch.Generator().manual_seed(d)).to(DEVICE) for d in (dim, v_dim))
    slots = torch.randperm(case.k_pages.shape[0] * page_size)[:rows].int().to(DEVICE)
    got, want = [], []
    for module, into in ((launch, got), (reference, want)):  # the same bits as torch writes
        for d in (dim, v_dim):
            pages = torch.zeros(*case.k_pages.shape[:3], d, dtype=torch.uint8, device=DEVICE).view(fmt.dtype)
            into += [pages, torch.zeros(pages.shape[:3], device=DEVICE)]
        module.write_kv(
            k, None if v_in_k else v, into[0], None if v_in_k else into[2], slots, reference.KVScales(into[1], into[3])
        )
    for x, y in zip(got, want, strict=True):
        assert torch.equal(x.view(torch.uint8), y.view(torch.uint8))
    (payload, k_scales), (v_payload, v_scales) = fmt.quantise(case.k_pages), fmt.quantise(case.v_pages)
    scales = reference.KVScales(k_scales, k_scales if v_in_k else v_scales)
    v_kept = payload.view(torch.uint8)[..., :v_dim].view(fmt.dtype) if v_in_k else v_payload
    out, lse = launch.attention(
        case.q, payload, v_kept, case.arrays, scale=0.2, softcap=None, window=None, sinks=None, kv_scales=scales
    )
    case.k_pages = fmt.dequantise(payload, scales.k)
    case.v_pages = fmt.dequantise(v_kept, scales.v)
    check(case, (out, lse), scale=0.2)


def test_write_of_two_sizes():
    for dim, v_dim in ((72, 40), (16, 300)):
        k, v = (torch.randn(11, 3, d).to(DEVICE) for d in (dim, v_dim))
        slots = torch.randperm(32)[:11].int().to(DEVICE)
        got = [torch.zeros(8, 4, 3, d, device=DEVICE) for d in (dim, v_dim)]
        want = [x.clone() for x in got]
        launch.write_kv(k, v, *got, slots)
        reference.write_kv(k, v, *want, slots)
        assert all(map(torch.equal, got, want))
        alone = torch.zeros_like(want[0])
        launch.write_kv(k, None, alone, None, slots)
        assert torch.equal(alone, want[0])


@pytest.mark.parametrize("dims", [(192, 128), (24, 72)], ids=str)
def test_branch_attention(dims):
    mask = random_tree(3, segments=4, longest=6)
    given = tensors(0, mask.num_tokens, 2, 1, dims[0], torch.float32, DEVICE, v_dim=dims[1])
    options = dict(scale=0.1, softcap=3.0, window=11, sinks=torch.linspace(-1, 2, 2, device=DEVICE))
    want = expected(*given, mask, **options)
    got = computed(
        lambda *args, **more: ab.branch_attention(*args, backend="triton", **more), *given, mask.to(DEVICE), **options
    )
    for name, x, y in zip(("out", "dq", "dk", "dv", "d_sinks"), got, want, strict=True):
        assert x.shape == y.shape and torch.isfinite(x).all(), name
        assert relative(x, y) <= 1e-5, (name, relative(x, y))


def test_branch_attention_keeps_hidden_infinities_apart():
    mask = ab.BranchMask.from_tree([6, 5, 4], [-1, 0, 0])
    q, k, v, grad = tensors(0, 15, 1, 1, 24, torch.float32, DEVICE, v_dim=80)
    attend = lambda *args, **more: ab.branch_attention(*args, backend="triton", **more)  # noqa: E731
    want = computed(attend, q, k, v, grad, mask.to(DEVICE))
    v[8, 0, 79], k[9, 0, 23] = float("inf"), float("nan")
    got = computed(attend, q, k, v, grad, mask.to(DEVICE))
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x[11:], y[11:])  # the second branch sees neither
