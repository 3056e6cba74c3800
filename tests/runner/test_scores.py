"""Choices over a vocabulary by the CPU's kernels: the same as torch's operators make."""

import math
import os
import subprocess
import sys

import pytest
import torch
from transformers import LogitsProcessorList
from transformers.generation import logits_process as lp

from anabranch import _cpu
from anabranch.engine.sampling import Sampler, _draw
from anabranch.runner import scores as vocabulary

ISAS = _cpu.info()["runnable"]
TYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = (1, 2, 15, 63, 64, 65, 130, 1000, 49152)


@pytest.fixture(params=ISAS)
def isa(request):
    _cpu.use(request.param)
    yield request.param
    _cpu.use("")


def rows(size, dtype, count=6, spread=3.0, seed=0):
    """[count, size] with a stride between rows."""
    values = torch.randn(count, size + 3, generator=torch.Generator().manual_seed(seed + size)) * spread
    return values.to(dtype)[:, :size]


@pytest.mark.parametrize("dtype", TYPES)
def test_best_and_logsumexp(isa, dtype):
    for size in SIZES:
        x = rows(size, dtype)
        best, tokens = vocabulary.best(x)
        wide = x.float()
        assert torch.equal(best, wide.amax(-1)) and torch.equal(tokens, wide.argmax(-1))
        assert torch.equal(vocabulary.highest(x), best)
        torch.testing.assert_close(vocabulary.logsumexp(x), wide.logsumexp(-1), atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("dtype", TYPES)
def test_scores_that_are_no_numbers(isa, dtype):
    for size in (1, 64, 100, 1000):
        x = rows(size, dtype, 5)
        x[0, size // 2] = math.nan
        x[1, size - 1] = math.inf
        x[2] = -math.inf
        x[3, : size - 1] = -math.inf
        best, tokens = vocabulary.best(x)
        assert best[0].isnan() and best[1] == math.inf and best[2] == -math.inf and tokens[1] == size - 1
        assert tokens[2] == 0 and tokens[3] == size - 1 and torch.equal(best[3:], x[3:].float().amax(-1))
        sums = vocabulary.logsumexp(x)
        assert sums[0].isnan() and sums[1] == math.inf and sums[2] == -math.inf and sums[3] == best[3]
        uniform = torch.full((5,), 0.5, dtype=torch.float64)
        for cut in ((1.0, 0, 1.0), (0.7, 5, 0.9), (0.7, 0, 0.9)):
            best, tokens = vocabulary.draw(x, *cut, uniform)
            assert tokens[:3].tolist() == [-1, -1, -1] and best[0].isnan()


NOTHING_BEHIND = """
import ctypes, mmap
import torch
from anabranch.runner import scores

page, libc = mmap.PAGESIZE, ctypes.CDLL(None, use_errno=True)
room = mmap.mmap(-1, 40 * page)
address = ctypes.addressof(ctypes.c_char.from_buffer(room))
assert libc.mprotect(ctypes.c_void_p(address + 39 * page), ctypes.c_size_t(page), 0) == 0, ctypes.get_errno()
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for size in (1, 15, 63, 65, 130, 1000, 3001):
        bytes = 3 * size * dtype.itemsize
        x = torch.frombuffer(room, dtype=dtype, count=3 * size, offset=39 * page - bytes).view(3, size)
        x.copy_(torch.randn(3, size, generator=torch.Generator().manual_seed(size)))
        x[2, size - 1] = 9.0  # the best is in the last block
        assert scores.best(x)[1][2] == size - 1
        scores.highest(x), scores.logsumexp(x)
        for cut in ((1.0, 0, 1.0), (0.7, 5, 1.0), (0.7, 0, 0.9), (0.7, 50, 0.9)):
            scores.draw(x, *cut, torch.full((3,), 0.5, dtype=torch.float64))
"""


def test_nothing_is_read_beyond_the_last_row(isa):
    """Rows that end where memory ends: a page that may not be read lies behind them."""
    environment = {**os.environ, "ANABRANCH_CPU_ISA": isa}
    done = subprocess.run([sys.executable, "-c", NOTHING_BEHIND], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:] or f"exit status {done.returncode}"


def warped(x, temperature, top_k, top_p, uniform):
    """The draw by Transformers' warpers and torch's operators."""
    x = x.float()
    if temperature != 1:
        x = lp.TemperatureLogitsWarper(temperature)(None, x)
    if top_k:
        x = lp.TopKLogitsWarper(top_k)(None, x)
    if top_p < 1:
        x = lp.TopPLogitsWarper(top_p)(None, x)
    return _draw(x, uniform)


CUTS = [
    (1.0, 0, 1.0), (0.3, 0, 1.0), (2.0, 0, 1.0), (1.0, 50, 1.0), (0.7, 1, 1.0), (0.7, 50, 0.95), (1.0, 7, 0.5),
    (1.0, 300, 0.9), (1.0, 0, 0.95), (0.6, 0, 0.8), (0.3, 0, 0.0), (1.5, 100_000, 0.99),
]  # fmt: skip


@pytest.mark.parametrize("cut", CUTS)
def test_a_draw_is_torchs_or_left_to_torch(cut):
    left = total = 0
    for dtype in (torch.float32, torch.bfloat16):
        for size in (1, 5, 70, 3000, 49152):
            x = rows(size, dtype, 32, spread=4.0)
            uniform = torch.rand(32, dtype=torch.float64, generator=torch.Generator().manual_seed(size))
            best, tokens = vocabulary.draw(x, *cut, uniform)
            told = tokens >= 0
            assert torch.equal(best, x.float().amax(-1))
            assert torch.equal(tokens[told], warped(x, *cut, uniform)[told]), (dtype, size)
            left, total = left + int((~told).sum()), total + 32
    assert left < total / 4


def test_every_instruction_set_draws_the_same(isa):
    x = rows(3000, torch.float32, 32)
    uniform = torch.rand(32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for cut in CUTS:
        _, tokens = vocabulary.draw(x, *cut, uniform)
        told = tokens >= 0
        assert torch.equal(tokens[told], warped(x, *cut, uniform)[told]) and told.float().mean() > 0.4


def test_a_draw_is_exact_over_a_large_vocabulary():
    """Each of 300,000 equal tokens is drawn by its own stretch of [0, 1); in single precision some are mistaken."""
    size = 300_000
    tokens = torch.arange(0, size, 997)
    for inside in (1e-3, 0.999):
        uniform = (tokens.double() + inside) / size
        found = torch.cat([_draw(torch.zeros(1, size), u[None]) for u in uniform])
        assert torch.equal(found, tokens)


def test_equal_scores_at_the_edge_of_the_nucleus():
    """Which of several equals torch's sort keeps is open: the kernel answers where all of them give the same token."""
    x = torch.full((1, 1000), -9.0)
    x[0, 100], x[0, 200:300], x[0, 800] = 9.0, 5.0, 8.0
    total = float(x[0].double().exp().sum())
    heavy, each = math.exp(9.0) / total, math.exp(5.0) / total
    top_p = heavy + math.exp(8.0) / total + 10.5 * each  # cuts in the middle of the hundred equals
    told = {}
    for u in torch.linspace(0, 0.999, 200, dtype=torch.float64):
        _, tokens = vocabulary.draw(x, 1.0, 0, top_p, u[None])
        told[float(u)] = int(tokens)
        if int(tokens) >= 0:
            assert int(tokens) in (100, 800) and int(tokens) == int(warped(x, 1.0, 0, top_p, u[None]))
    assert {100, 800, -1} == set(told.values())


@pytest.mark.parametrize("equals", [3, 40, 60, 200])
def test_equal_scores_at_the_kth_place(equals):
    """All of the scores that equal the k-th stay, as Transformers keeps them, also more than the kernel looks at."""
    x = torch.full((1, 1000), -9.0)
    x[0, 900], x[0, 300 : 300 + equals] = 4.0, 3.0
    told = set()
    for u in torch.linspace(0, 0.999, 100, dtype=torch.float64):
        _, tokens = vocabulary.draw(x, 1.0, 3, 1.0, u[None])
        told.add(int(tokens) >= 0)
        assert int(tokens) in (-1, int(warped(x, 1.0, 3, 1.0, u[None])))
    assert (True in told) == (equals < 50)


def test_draws_close_to_where_another_token_begins_are_left():
    x = torch.zeros(1, 4)
    for u, token in ((0.1, 0), (0.25, -1), (0.25 - 1e-7, -1), (0.2501, 1), (0.75 + 1e-9, -1), (0.9, 3)):
        assert int(vocabulary.draw(x, 1.0, 0, 1.0, torch.tensor([u], dtype=torch.float64))[1]) == token


def sampler_of(**options):
    from engine_kit import make_model
    from transformers import GenerationConfig, StoppingCriteriaList

    config = GenerationConfig(**options)
    return Sampler(make_model(), None, config, LogitsProcessorList(), StoppingCriteriaList())


class Stream:
    def __init__(self, seed):
        self.values = torch.rand(1, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).tolist()

    def random(self):
        return self.values.pop()


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    "options",
    [
        dict(do_sample=False),
        dict(do_sample=True, top_k=0),
        dict(do_sample=True, top_k=20, top_p=0.9, temperature=0.7),
        dict(do_sample=True, top_k=0, top_p=0.9, temperature=0.7),
        dict(do_sample=True, top_k=9, min_p=0.05),
        dict(do_sample=True, top_k=0, typical_p=0.9),
        dict(do_sample=True, top_k=0, min_new_tokens=5, eos_token_id=[3, 17]),
        dict(do_sample=True, top_k=30, min_length=50, suppress_tokens=[1, 2], eos_token_id=3),
        dict(do_sample=False, begin_suppress_tokens=[0, 5], suppress_tokens=[7], min_length=3, eos_token_id=9),
    ],
)
def test_a_sampler_chooses_what_it_chose_without_the_kernels(options, dtype, monkeypatch):
    sampler = sampler_of(**options)
    x = rows(2000, dtype, 24)
    before = x.clone()

    def choose():
        streams = [Stream(i) for i in range(24)]
        return sampler.choose(x, [lambda: list(range(12))] * 24, [12] * 24, [12] * 24, streams)

    quick = choose()
    assert torch.equal(x, before)  # banned tokens are back
    monkeypatch.setattr(vocabulary, "takes", lambda scores: False)
    monkeypatch.setattr("anabranch.engine.sampling._banned", lambda first, length, size: None if first else [])
    assert choose() == quick


def test_scores_come_back_when_no_token_can_be_chosen():
    sampler = sampler_of(do_sample=False, suppress_tokens=[0, 1, 2])
    x = torch.tensor([[1.0, 2.0, 3.0]])
    with pytest.raises(ValueError, match="every score is −inf after SuppressTokensLogitsProcessor"):
        sampler.choose(x, [list], [1], [1], [Stream(0)])
    assert x.tolist() == [[1.0, 2.0, 3.0]]
