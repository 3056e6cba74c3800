"""KVFormat, and a cache that keeps K and V in one: what is read back, forks, joins, copies, accounts, bad input."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize
from programs import Twins
from test_cache import CacheMachine, fill, make

import anabranch as ab
from anabranch import backends

QUANTISED = ("int8", "fp8")


# ------------------------------------------------------------------------------------------------ the format itself


@pytest.mark.parametrize("name", QUANTISED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_an_element_is_off_by_no_more_than_the_format_says(name, dtype):
    gen = torch.Generator().manual_seed(0)
    fmt = ab.KVFormat.of(name, dtype)
    x = torch.randn(500, 3, 64, generator=gen) * torch.exp2(torch.randint(-12, 12, (500, 3, 1), generator=gen))
    payload, scales = fmt.quantise(x.to(dtype))
    assert payload.dtype == fmt.dtype and payload.shape == x.shape
    assert scales.dtype == torch.float32 and scales.shape == x.shape[:-1]
    back = fmt.dequantise(payload, scales, torch.float64)
    assert torch.equal(back, payload.double() * scales.double()[..., None])  # exact: nothing is rounded in between
    off = (back - x.to(dtype).double()).abs()
    assert (off <= fmt.error_bound(scales).double()[..., None]).all()
    assert off.max() > 0  # and it is lossy
    largest = payload.float().abs().amax(-1)
    assert (largest == fmt.largest).all()  # every vector uses the whole range


@pytest.mark.parametrize("name", QUANTISED)
def test_nothing_overflows(name):
    """Vectors of any size keep their direction: a model whose K and V are huge is none the worse for it."""
    fmt = ab.KVFormat.of(name, torch.float32)
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(1))
    for size in (1e-30, 1e-6, 1.0, 1e5, 1e30):
        back = fmt.dequantise(*fmt.quantise(x * size))
        assert ((back / size - x).norm() / x.norm()) < {"int8": 0.01, "fp8": 0.04}[name]


@pytest.mark.parametrize("name", QUANTISED)
def test_zeros_and_what_is_not_finite(name):
    fmt = ab.KVFormat.of(name, torch.float32)
    x = torch.ones(4, 8)
    x[0], x[1, 3], x[2, 0] = 0, float("inf"), float("nan")
    payload, scales = fmt.quantise(x)
    back = fmt.dequantise(payload, scales)
    assert (back[0] == 0).all() and back[1:3].isnan().all()
    assert scales.isnan().tolist() == [False, True, True, False]
    torch.testing.assert_close(back[3], x[3])


@pytest.mark.parametrize("name", QUANTISED)
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_one_element_that_is_not_finite_spoils_its_vector_alone(name, value):
    fmt = ab.KVFormat.of(name, torch.float32)
    x = torch.randn(3, 16)
    x[1, 5] = value
    payload, scales = fmt.quantise(x)
    back = fmt.dequantise(payload, scales)
    assert scales.isnan().tolist() == [False, True, False]
    assert back[1].isnan().all() and back[[0, 2]].isfinite().all()


@pytest.mark.parametrize("name", QUANTISED)
def test_float64_is_not_rounded_on_its_way(name):
    """An element times its factor has more digits than float32."""
    fmt = ab.KVFormat.of(name, torch.float32)
    payload, scales = fmt.quantise(torch.randn(50, 16))
    back = fmt.dequantise(payload, scales, torch.float64)
    exact = payload.to(torch.float64) * scales.double()[:, None]
    assert back.dtype == torch.float64 and torch.equal(back, exact)
    assert not torch.equal(back, exact.float().double())


def test_names_and_bytes():
    of = ab.KVFormat.of
    for asked in ("auto", None, torch.bfloat16, "bfloat16", of("auto", torch.bfloat16)):
        fmt = of(asked, torch.bfloat16)
        assert fmt.name == "bfloat16" and not fmt.quantised and fmt.bytes_per_vector(64) == 128
    for name in QUANTISED:
        fmt = of(name, torch.bfloat16)
        assert fmt.name == name and fmt.quantised and fmt.bytes_per_vector(64) == 68
        assert of(fmt, torch.float32) is fmt
    with pytest.raises(ValueError, match="kv_format='int4': expected one of 'auto', 'int8', 'fp8'"):
        of("int4", torch.float32)
    with pytest.raises(ValueError, match=r"kv_format='float16': K and V are float32.*'int8' or 'fp8'"):
        of(torch.float16, torch.float32)
    with pytest.raises(ValueError, match=r"'bfloat16'.*convert the model"):
        of("bfloat16", torch.float32)
    with pytest.raises(ValueError, match="kv_format=7"):
        of(7, torch.float32)
    with pytest.raises(ValueError, match="'float32' keeps elements as they are"):
        of("auto", torch.float32).quantise(torch.ones(2, 2))


# ------------------------------------------------------------------------------------------------ the cache


class QuantisedMachine(CacheMachine):
    """The rules of the ordinary cache, with a twin that holds what quantising leaves."""

    @initialize(
        page_size=st.sampled_from([1, 3, 16]), pages=st.sampled_from([24, 400]), seed=st.integers(0, 2**16),
        name=st.sampled_from(QUANTISED),
    )  # fmt: skip
    def start(self, page_size: int, pages: int, seed: int, name: str) -> None:
        self.twins = Twins(num_pages=pages, page_size=page_size, layers=2, heads=2, dim=8, seed=seed, kv_format=name)
        self.twins.branch()


TestQuantisedMachine = QuantisedMachine.TestCase
TestQuantisedMachine.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)


@pytest.mark.parametrize("name", QUANTISED)
@pytest.mark.parametrize("page_size", [1, 5, 128])
def test_read_gives_what_quantising_leaves(name, page_size):
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        cache = ab.TreeCache(2, 3, 40, 64, page_size, dtype, kv_format=name)
        trunk = cache.branch()
        step = cache.step({trunk: 23})
        backend = "reference" if dtype == torch.float64 else "auto"
        written = [torch.randn(2, 23, 3, 40).to(dtype) for _ in range(2)]
        for layer, (k, v) in enumerate(written):
            cache.write(layer, k, v, step, backend=backend)
        fmt = cache.kv_format
        for layer, kv in enumerate(written):
            for got, x in zip(cache.read(trunk, layer), kv, strict=True):
                assert got.dtype == dtype
                assert torch.equal(got, fmt.dequantise(*fmt.quantise(x), dtype))


@pytest.mark.parametrize("name", QUANTISED)
def test_views_of_pages_and_factors(name):
    cache, trunk = make(kv_format=name)
    step = cache.step({trunk: 20})
    fill(cache, step)
    pages, scales = cache.v_pages(1), cache.kv_scales(1).v
    assert pages.dtype == cache.kv_format.dtype and pages.shape == (64, 16, 2, 32) and scales.shape == (64, 16, 2)
    slots = step.slots.long()
    meant = cache.kv_format.dequantise(pages, scales)[slots // 16, slots % 16]
    assert torch.equal(meant, cache.read(trunk, 1)[1])
    assert make()[0].kv_scales(0) is None
    assert f"kept as {name}" in repr(cache)


@pytest.mark.parametrize("name", QUANTISED)
def test_a_default_cache_has_more_pages_for_the_same_memory(name, monkeypatch):
    from engine_kit import make_model

    monkeypatch.setattr("anabranch.kv.cache.free_memory", lambda device: 1 << 20)
    model = make_model()
    ab.hf.enable(model)
    pages = {kept: ab.TreeCache.for_model(model, kv_format=kept).num_pages for kept in ("auto", name)}
    assert pages[name] == pytest.approx(pages["auto"] * 32 * 4 / (32 + 4), rel=0.02)


def test_bad_input():
    with pytest.raises(ValueError, match="kv_format='fp4'"):
        make(kv_format="fp4")
    cache, trunk = make(kv_format="int8", dtype=torch.bfloat16)
    step = cache.step({trunk: 3})
    x = torch.zeros(3, 2, 32, dtype=torch.bfloat16)
    before = cache.usage()
    for call, match in (
        (lambda: cache.write(0, x.float(), x, step), "k: expected dtype torch.bfloat16 like the cache"),
        (lambda: cache.write(0, x, x.to(torch.int8), step), "v: expected dtype torch.bfloat16"),
        (lambda: cache.write(0, x, x, step, backend="cuda"), "cuda"),
    ):
        with pytest.raises((ValueError, ab.BackendUnavailable), match=match):
            call()
    assert cache.usage() == before
    cache.write(0, x, x, step)
    with pytest.raises(ValueError, match=r"q: expected dtype torch.bfloat16 like the cache, got torch.float32"):
        ab.tree_attention(torch.zeros(3, 2, 32), cache, 0, step)


def test_a_backend_without_the_format_is_refused_by_name(monkeypatch):
    """Before anything runs, with the backends that have it; "auto" takes one of those."""
    cuda, cpu = backends.get("cuda"), torch.device("cpu")
    monkeypatch.setattr(backends.registry, "unavailable", lambda name: None)
    monkeypatch.setattr(cuda, "refuses", lambda *args: None)
    with pytest.raises(
        ValueError,
        match=r"backend 'cuda': has no kernels for K and V kept as int8; pass backend='auto' or 'reference' or 'cpu'",
    ):
        backends.choose("cuda", cpu, torch.bfloat16, 64, torch.int8)
    assert backends.choose("cuda", cpu, torch.bfloat16, 64, torch.bfloat16) is cuda
    assert backends.choose("auto", cpu, torch.bfloat16, 64, torch.float8_e4m3fn).name == "cpu"


@pytest.mark.compiled
@pytest.mark.parametrize("name", QUANTISED)
def test_the_operators_say_what_they_change(name):
    cache, trunk = make(kv_format=name)
    step = cache.step({trunk: 5})
    k, v, q = torch.randn(5, 2, 32), torch.randn(5, 2, 32), torch.randn(5, 4, 32)
    scales = cache.kv_scales(0)
    ops = torch.ops.anabranch
    schema = str(ops.write_kv.default._schema)
    assert all(f"!)? {x}_scales" in schema for x in "kv")
    ops.write_kv(k, v, cache.k_pages(0), cache.v_pages(0), step.handle, 0, "auto", *scales)
    out, _ = ops.tree_attention(
        q, cache.k_pages(0), cache.v_pages(0), step.handle, None, 0.2, 0.0, 0, 0, "auto", False, *scales
    )
    assert torch.equal(out, ab.tree_attention(q, cache, 0, step, scale=0.2))
