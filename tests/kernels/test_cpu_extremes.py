"""What the GPU kernels are put through (kernel_extremes.py), on the CPU, in each instruction set."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import MISSING, fields
from types import SimpleNamespace

import kernel_extremes as extremes
import pytest
import torch
from kernel_bodies import DTYPES, with_sinks
from triton_cases import random_case

from anabranch import _cpu
from anabranch.backends import cpu
from anabranch.plan.arrays import PlanArrays

ISAS = _cpu.info()["runnable"]
OPTIONS = dict(scale=0.25, softcap=None, window=None, sinks=None)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    _cpu.use(request.param)
    yield request.param
    _cpu.use("")


def run(case, **options):
    used = OPTIONS | with_sinks(options, case)
    missing = {f.name: 0 if f.default is MISSING else None for f in fields(PlanArrays) if f.init}
    parts = {name: getattr(case.arrays, name, value) for name, value in missing.items()}
    arrays = PlanArrays(**parts)
    plan = SimpleNamespace(arrays=lambda group, tile_config: arrays, num_rows=len(case.q), batch_invariant=False)
    return cpu.attention(case.q, case.k_pages, case.v_pages, plan, return_lse=True, **used), used


# Few packed rows are streamed, many are packed.
SHAPES = [dict(group=1, tile_rows=2, head_dim=32), dict(group=5, tile_rows=12, head_dim=64)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=("few", "many"))
def test_blind_tiles(isa, shape, dtype):
    extremes.blind_tiles(run, random_case(17, rows=13, segments=2, max_len=700, num_kv_heads=1, dtype=dtype, **shape))


@pytest.mark.parametrize("shape", SHAPES, ids=("few", "many"))
def test_late_maxima(isa, shape):
    extremes.late_maxima(run, random_case(64, **shape))


def test_rows_that_see_nothing_beside_a_sink_of_minus_infinity(isa):
    """No token and no sink: zeros, and −inf for the log-sum-exp; written at once, and merged."""
    for seed in range(3):
        case = random_case(70 + seed, rows=6, segments=3, head_dim=32)
        (out, lse), _ = run(case)
        sinks = torch.full((case.q.shape[1],), -math.inf)
        (with_sink, lse_sink), _ = run(case, sinks=sinks, window=None)
        assert torch.equal(out, with_sink) and torch.equal(lse, lse_sink)
        (out, lse), _ = run(case, sinks=sinks, window=1)  # most rows see nothing of what is there
        assert torch.isfinite(out).all() and not torch.isnan(lse).any()


def test_partials_beyond_32_bits():
    """Scratch of 9 GB, of which a few pages are touched."""
    try:
        extremes.partials_beyond_32_bits(
            run, random_case(61, rows=4, segments=2, max_len=20, head_dim=256, dtype=torch.float16)
        )
    except MemoryError:
        pytest.skip("the system does not map so much at once")


def test_rows_beyond_32_bits(tmp_path, monkeypatch):
    def sparse(shape, dtype=None, device=None):
        return extremes.sparse(tmp_path, f"{len(list(tmp_path.iterdir()))}", math.prod(shape), dtype).view(shape)

    monkeypatch.setattr(cpu.torch, "empty", sparse)
    monkeypatch.setattr(cpu.torch, "empty_like", lambda x, **kwargs: sparse(x.shape, kwargs.get("dtype", x.dtype)))
    case = random_case(65, rows=4, segments=2, max_len=20, head_dim=256, dtype=torch.float16)
    extremes.rows_beyond_32_bits(run, case, tmp_path)
