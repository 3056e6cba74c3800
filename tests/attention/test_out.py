"""``paged_tree_attention(out=)``: the same numbers, in a tensor of the caller's, on every backend."""

from __future__ import annotations

import pytest
import torch
from programs import backends_here

import anabranch as ab
from anabranch.backends import registry

TABLES = torch.tensor([[0, 1, 2], [0, 1, 3], [0, 4, -1]])
LENGTHS, ROWS = [11, 10, 6], [2, 1, 3]


def case(dtype=torch.float32, dim=32):
    g = torch.Generator().manual_seed(1)
    k, v = (torch.randn(5, 4, 2, dim, generator=g).to(dtype) for _ in range(2))
    return torch.randn(6, 4, dim, generator=g).to(dtype), k, v, ab.Plan.from_block_tables(TABLES, LENGTHS, 4, ROWS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", backends_here())
def test_in_place(backend, dtype):
    """Also where it begins at an odd address, with everything around it left alone."""
    q, k, v, plan = case(dtype)
    options = dict(backend=backend, window=7, softcap=4.0, sinks=torch.linspace(-1, 1, 4))
    want, want_lse = ab.paged_tree_attention(q, k, v, plan, return_lse=True, **options)
    for offset in (0, 1, 8):
        around = torch.full((q.numel() + 16,), 77.0, dtype=dtype)
        out = around[offset : offset + q.numel()].view(q.shape)
        got, lse = ab.paged_tree_attention(q, k, v, plan, out=out, return_lse=True, **options)
        assert got is out and torch.equal(out, want) and torch.equal(lse, want_lse)
        assert (around == 77).sum() == 16
    assert ab.paged_tree_attention(q, k, v, plan, out=out, **options) is out


@pytest.mark.parametrize("backend", [name for name in backends_here() if name != "reference"])
def test_nothing_of_its_size_is_made(backend, monkeypatch):
    """The kernel is given the caller's memory; partial results are as many as before."""
    q, k, v, plan = case()
    out, made = torch.full_like(q, 5.0), []
    ab.paged_tree_attention(q, k, v, plan, out=out, backend=backend)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **o: made.append(empty(*a, **o)) or made[-1])
    monkeypatch.setattr(torch.Tensor, "copy_", lambda *a, **o: pytest.fail("copied"))
    ab.paged_tree_attention(q, k, v, plan, out=out, backend=backend)
    assert not [x for x in made if x.shape == q.shape]


def test_a_row_that_sees_nothing_is_written_too():
    k = torch.ones(1, 4, 1, 32)
    out = torch.full((2, 1, 32), 9.0)
    ab.paged_tree_attention(
        torch.ones(2, 1, 32), k, k, ab.Plan.from_block_tables(torch.tensor([[0], [0]]), [2, 0], 4), out=out
    )
    assert torch.equal(out[1], torch.zeros(1, 32)) and torch.allclose(out[0], torch.ones(1, 32))


def test_where_somebody_looks_on():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Seen(TorchDispatchMode):
        names = ()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.names += (str(func),)
            return func(*args, **(kwargs or {}))

    q, k, v, plan = case()
    out = torch.empty_like(q)
    with Seen() as seen:
        assert ab.paged_tree_attention(q, k, v, plan, out=out) is out
    assert "anabranch.tree_attention.default" in seen.names
    assert torch.equal(out, ab.paged_tree_attention(q, k, v, plan))


@pytest.mark.compiled
def test_compiled_as_one_graph():
    q, k, v, plan = case()
    out = torch.empty_like(q)
    twice = lambda q, out: ab.paged_tree_attention(q, k, v, plan, out=out) * 2  # noqa: E731
    call = torch.compile(twice, fullgraph=True, backend="aot_eager")
    want = ab.paged_tree_attention(q, k, v, plan)
    with torch.no_grad():
        assert torch.equal(call(q, out), want * 2) and torch.equal(out, want)


def test_what_does_not_fit_is_refused_before_anything_changes():
    q, k, v, plan = case()
    whole = torch.zeros(12, 4, 32)
    refused = {
        r"out: expected a tensor of shape \[6, 4, 32\] .*, got shape \[5, 4, 32\]": whole[:5],
        r"out: expected a tensor of shape": [1],
        "out: expected torch.float32 on cpu like q, got torch.float64": whole[:6].double(),
        "out: expected torch.float32 on cpu like q, got torch.float32 on meta": whole[:6].to("meta"),
        r"out: must be contiguous, got strides \[256, 32, 1\]": whole[::2],
        "out: writing in place has no gradients": whole[:6].clone().requires_grad_(),
        "out: shares memory with q": q,
        "out: shares memory with k_pages": k.view(-1)[: q.numel()].view(q.shape),
        "out: shares memory with v_pages": v.view(-1)[-q.numel() :].view(q.shape),
    }
    for match, out in refused.items():
        with pytest.raises(ValueError, match=match):
            ab.paged_tree_attention(q, k, v, plan, out=out)
    with pytest.raises(ValueError, match="out: writing in place has no gradients"):
        ab.paged_tree_attention(q.clone().requires_grad_(), k, v, plan, out=whole[:6])
    with pytest.raises(ValueError, match="window"):
        ab.paged_tree_attention(q, k, v, plan, window=0, out=whole[:6])
    assert not whole.any()
    both = torch.zeros(2, *q.shape)  # neighbours in one buffer are no overlap
    both[0] = q
    ab.paged_tree_attention(both[0], k, v, plan, out=both[1])
    assert torch.equal(both[1], ab.paged_tree_attention(q, k, v, plan))


def test_every_backend_takes_it():
    import inspect

    for name in registry.NAMES:
        assert inspect.signature(registry.get(name).attention).parameters["out"].default is None
