"""Steps as vLLM describes them, against dense attention: the plan, the write, the attention. No vLLM is needed."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from vllm_kit import Server, Stub, common, vllm_config

NAN = float("nan")


@pytest.fixture
def parts(monkeypatch):
    """The backend's parts, imported beside a stub."""
    Stub().install(monkeypatch)
    from anabranch.integrations.vllm import backend

    return backend.TreeAttentionBackend


def build(parts, server, **changes):
    spec = SimpleNamespace(block_size=server.block_size, head_size=server.dim, head_size_v=server.dim)
    return parts.get_builder_cls()(spec, ["layer"], vllm_config(**changes), torch.device("cpu"))


def layer(parts, server, **options):
    before = torch.get_default_dtype()
    torch.set_default_dtype(server.dtype)  # as vLLM does while a model is made
    try:
        given = dict(sliding_window=server.window, **options)
        return parts.get_impl_cls()(server.heads, server.dim, server.dim**-0.5, server.kv_heads, **given)
    finally:
        torch.set_default_dtype(before)


def check(parts, server, builder, impl, budget=10**6, padding=0, **options):
    """One step; returns its metadata and plan."""
    meta, k, v, expected = server.step(budget, padding)
    rows = int(meta.query_start_loc_cpu[-1])
    wide = torch.randn(rows + padding, server.heads + 2 * server.kv_heads, server.dim, generator=server.generator)
    q = wide.to(server.dtype)[:, : server.heads]  # a slice of Q, K and V in one, as a model gives it
    impl.do_kv_cache_update(None, k, v, server.cache, meta.slot_mapping)
    built = builder.build(0, meta)
    out = torch.full((rows + padding, server.heads, server.dim), 9.0, dtype=server.dtype)
    assert impl.forward(None, q, k, v, server.cache, built, out) is out
    want = expected(q[:rows], impl.scale, **options)
    bound = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[server.dtype]
    assert float((out[:rows].double() - want).norm() / want.norm()) <= bound
    assert (out[rows:] == 9).all()
    return meta, built.plan


@pytest.mark.parametrize("block_size", [1, 5, 16, 32, 128])
def test_prompts_in_chunks_then_decoding(parts, block_size):
    """Three generations: cold siblings in one step, a later one that finds blocks, one that forks off deep inside."""
    server = Server(block_size, seed=block_size, blocks=900 if block_size == 1 else 200, columns=512)
    builder, impl = build(parts, server), layer(parts, server)
    prefix = [server.random.randrange(1000) for _ in range(150)]
    server.add([*prefix, 1, 2, 3])
    server.add(prefix[:70] + [5] * 9)
    for budget in (40, 40, 200):
        check(parts, server, builder, impl, budget)
    for tail in ([4], [6, 7], []):
        server.add(prefix + tail)
    server.add([*server.requests[0].tokens[:154], 8, 8])
    plans = [check(parts, server, builder, impl)[1] for _ in range(3)]
    total = sum(len(request.tokens) - 1 for request in server.requests)
    shared = {1: 0.35, 5: 0.36, 16: 0.4, 32: 0.5, 128: 0.75}[block_size]
    assert plans[-1].unique_tokens < shared * total


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("window,softcap,sinks", [(None, 5.0, True), (20, None, False), (33, 2.0, True)], ids=str)
def test_windows_softcap_and_sinks(parts, dtype, window, softcap, sinks):
    """Blocks outside the window are vLLM's null block, whatever is in it."""
    given = {"softcap": softcap, "sinks": torch.linspace(-2, 2, 6).to(dtype) if sinks else None}
    server = Server(8, heads=6, kv_heads=3, dtype=dtype, window=window, seed=3)
    builder, impl = build(parts, server), layer(parts, server, logits_soft_cap=softcap or 0, sinks=given["sinks"])
    prefix = [server.random.randrange(1000) for _ in range(61)]
    server.add([*prefix, 1])
    check(parts, server, builder, impl, **given)
    server.add([*prefix, 2])
    server.add([*prefix[:40], 3, 4])
    for budget in (7, 30, 30):
        check(parts, server, builder, impl, budget, **given)
    assert torch.isnan(server.cache[Server.NULL]).all()


def test_tokens_and_requests_that_only_fill_up(parts):
    server = Server(4)
    builder, impl = build(parts, server), layer(parts, server)
    server.add(list(range(11)))
    server.add(list(range(9)))
    before = server.cache.clone()
    meta, _ = check(parts, server, builder, impl, padding=3)
    written = {int(slot) // 4 for slot in meta.slot_mapping if slot >= 0}
    others = [b for b in range(len(before)) if b not in written]
    assert torch.isnan(server.cache[others]).all()
    meta, *_ = server.step()
    two = builder.build(0, meta).plan
    meta.num_reqs, meta.seq_lens = 4, torch.cat([meta.seq_lens, torch.tensor([0, 5], dtype=torch.int32)])
    meta.query_start_loc_cpu = torch.cat([meta.query_start_loc_cpu, meta.query_start_loc_cpu[-1:].repeat(2)])
    meta.block_table_tensor = torch.cat([meta.block_table_tensor, torch.full_like(meta.block_table_tensor, -1)])
    four = builder.build(0, meta).plan
    assert (four.num_rows, four.unique_tokens) == (two.num_rows, two.unique_tokens) == (2, 12 + 2)


def test_a_step_without_rows_and_a_warm_up(parts):
    server = Server(4)
    builder, impl = build(parts, server), layer(parts, server)
    nothing = builder.build(0, common(torch.zeros(2, 3), [0, 0], [0, 0]))
    assert nothing.plan is None
    for metadata in (None, nothing):
        out = torch.full((5, 4, 32), NAN)
        assert not impl.forward(None, out, out, out, torch.tensor([]), metadata, out).any()
    impl.do_kv_cache_update(None, out, out, torch.tensor([]), torch.tensor([0]))  # before there is a cache


def test_one_plan_for_all_layers(parts, monkeypatch):
    server = Server(4)
    builder, layers = build(parts, server), [layer(parts, server) for _ in range(3)]
    server.add(list(range(30)))
    meta, k, v, _ = server.step()
    built, made = builder.build(0, meta), []
    from anabranch.plan import plan

    split = plan.split_buffers
    monkeypatch.setattr(plan, "split_buffers", lambda *a, **o: made.append(1) or split(*a, **o))
    for impl in layers:
        impl.do_kv_cache_update(None, k, v, server.cache, meta.slot_mapping)
        impl.forward(None, torch.randn(30, 4, 32), k, v, server.cache, built, torch.empty(30, 4, 32))
    assert made == [1]


def test_what_vllm_is_told(parts):
    assert parts.get_name() == "CUSTOM" and parts.forward_includes_kv_cache_update is False
    assert parts.supported_dtypes == [torch.float32, torch.float16, torch.bfloat16]
    assert [x.name for x in parts.supported_kv_cache_layouts()] == ["LBHNC"]
    assert parts.supports_sink() and parts.supports_sliding_window() and not parts.supports_kv_connector()
    assert parts.supports_head_size(80) and not parts.supports_head_size(512)


REFUSED = [
    (dict(alibi_slopes=[0.5, 0.5, 0.5, 0.5]), "ALiBi"),
    (dict(attn_type="encoder_only"), "decoders, not attention of type 'encoder_only'"),
    (dict(attn_type="encoder_decoder"), "encoder_decoder"),
    (dict(kv_sharing_target_layer_name="layers.0"), "another layer's K and V"),
    (dict(kv_cache_dtype="fp8"), "K and V kept as fp8 .*--kv-cache-dtype"),
    (dict(kv_cache_dtype="bfloat16"), "kept as bfloat16"),
    (dict(chunk_lookback=3), "asks? for with chunk_lookback"),
    (dict(use_alibi_sqrt=True), "use_alibi_sqrt"),
]


@pytest.mark.parametrize("options,match", REFUSED, ids=lambda x: next(iter(x), "") if isinstance(x, dict) else "")
def test_layers_that_are_refused(parts, options, match):
    with pytest.raises(ValueError, match=rf"--attention-backend CUSTOM \(anabranch\): .*{match}"):
        layer(parts, Server(4), **options)


def test_other_shapes_types_and_devices_are_refused(parts, monkeypatch):
    for server, match in ((Server(4, dim=300), "head sizes up to 256"), (Server(4, dtype=torch.float64), "float64")):
        with pytest.raises(ValueError, match=match):
            layer(parts, server)
    layer(parts, Server(4), kv_cache_dtype="float32", chunk_lookback=-1, use_alibi_sqrt=False)
    monkeypatch.setattr(sys.modules["vllm.platforms"].current_platform, "device_type", "xpu")
    with pytest.raises(ValueError, match="not for device type 'xpu'"):
        layer(parts, Server(4))
    with pytest.raises(NotImplementedError, match="not quantised"):
        impl = object.__new__(parts.get_impl_cls())
        impl.forward(None, *[None] * 4, None, None, output_scale=torch.ones(1))


@pytest.mark.parametrize(
    "changes",
    [
        dict(speculative_config=1), dict(kv_transfer_config=1), dict(parallel_config__decode_context_parallel_size=2),
        dict(parallel_config__prefill_context_parallel_size=2), dict(model_config__is_mm_prefix_lm=True),
        dict(attention_config__use_non_causal=True), dict(model_config__rswa_window=8),
    ],
    ids=str,
)  # fmt: skip
def test_models_that_are_refused(parts, changes):
    with pytest.raises(ValueError, match=r"CUSTOM \(anabranch\): .*; leave"):
        build(parts, Server(4), **changes)


def test_more_that_is_refused(parts, monkeypatch):
    server = Server(4)
    spec = SimpleNamespace(block_size=4, head_size=32, head_size_v=16)
    with pytest.raises(ValueError, match=r"different sizes \(32 and 16\)"):
        parts.get_builder_cls()(spec, [], vllm_config(), torch.device("cpu"))
    builder = build(parts, server)
    for causal in (False, torch.ones(1)):
        meta = common(torch.zeros(1, 1), [1], [1])
        meta.causal = causal
        with pytest.raises(ValueError, match="only causal"):
            builder.build(0, meta)
    with pytest.raises(ValueError, match="query_lengths"):
        builder.build(0, common(torch.zeros(1, 1), [1], [2]))
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    with pytest.raises(ValueError, match="batch invariance"):
        build(parts, server)
