"""Attention and KV write go past torch's dispatcher, but for those who look on."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import anabranch as ab
from anabranch.ops import tree as ops


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def case(rows=3):
    torch.manual_seed(0)
    cache = ab.TreeCache(num_layers=2, num_kv_heads=2, head_dim=32, num_pages=16)
    step = cache.step({cache.branch(): rows})
    return cache, step, torch.randn(rows, 2, 32), torch.randn(rows, 4, 32)


def both(cache, step, kv, q, layer=0, **options):
    cache.write(layer, kv, kv, step)
    return ab.tree_attention(q, cache, layer, step, **options)


@pytest.fixture
def refuse_ops(monkeypatch):
    """The ops themselves fail: whoever gets a result has gone past them."""
    for name in ("tree_attention", "write_kv"):
        monkeypatch.setattr(torch.ops.anabranch, name, lambda *args: pytest.fail("through the dispatcher"))


def test_plain_calls_do_not_ask_the_dispatcher(refuse_ops):
    cache, step, kv, q = case()
    both(cache, step, kv, q)
    with torch.inference_mode():
        both(cache, step, kv, q, layer=1)
    with torch.no_grad():
        ab.tree_attention(q.requires_grad_(), cache, 0, step)


def test_a_mode_sees_the_ops():
    cache, step, kv, q = case()
    with Seen() as seen:
        out = both(cache, step, kv, q)
    assert [n for n in seen.names if n.startswith("anabranch")] == [
        "anabranch.write_kv.default", "anabranch.tree_attention.default",
    ]  # fmt: skip
    assert torch.equal(out, ab.tree_attention(q, cache, 0, step))


def test_a_profiler_sees_the_ops():
    cache, step, kv, q = case()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        both(cache, step, kv, q)
    assert {"anabranch::tree_attention", "anabranch::write_kv"} <= {e.key for e in profile.key_averages()}


def test_gradients_are_still_refused():
    cache, step, kv, q = case()
    out = both(cache, step, kv, q.requires_grad_())
    with pytest.raises(RuntimeError, match="tree_attention reads a KV cache and has no backward"):
        out.sum().backward()


def test_subclasses_and_transforms_go_through_the_dispatcher():
    class Mine(torch.Tensor):
        pass

    q = torch.randn(3, 4, 32)
    assert ops.unobserved(q) and ops.unobserved(q.detach(), q)
    assert not ops.unobserved(q.as_subclass(Mine))
    assert not ops.unobserved(q.clone().requires_grad_())
    found = []
    torch.vmap(lambda x: (found.append(ops.unobserved(x)), x)[1])(q)
    torch.func.grad(lambda x: (found.append(ops.unobserved(x)), x.sum())[1])(q)
    with torch._subclasses.FakeTensorMode() as fake:
        found.append(ops.unobserved(fake.from_tensor(q)))
    assert found and not any(found)


def test_options_of_the_wrong_kind_are_not_taken_from_earlier_calls():
    """1, 1.0 and True are equal, and would be the same key."""
    cache, step, kv, q = case()
    both(cache, step, kv, q, window=1)
    for wrong in (1.0, True):
        with pytest.raises(ValueError, match="window: must be at least 1"):
            ab.tree_attention(q, cache, 0, step, window=wrong)
    for wrong in (True, "1"):
        with pytest.raises(ValueError, match="scale"):
            ab.tree_attention(q, cache, 0, step, scale=wrong)
    assert torch.equal(
        ab.tree_attention(q, cache, 0, step, scale=1), ab.tree_attention(q, cache, 0, step, scale=torch.tensor(1.0))
    )
