"""The pool of the CPU kernels: pieces are claimed one by one, and nobody waits for a thread that has begun none."""

import os
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from threads_kit import torch_threads

import anabranch as ab
from anabranch import _cpu
from anabranch.backends import threads
from anabranch.runner.linear import linear

NEVER = 10**9  # microseconds


@pytest.fixture(autouse=True)
def on_the_pool():
    """Torch's threads, which may take over while they are awake, have tests of their own (test_openmp_threads.py)."""
    before = threads.choose("pool")
    yield
    threads.choose(before)


@contextmanager
def delayed(before=0, inside=0):
    _cpu.delay_workers(before, inside)
    try:
        yield
    finally:
        _cpu.delay_workers(0, 0)


@pytest.fixture
def counted(monkeypatch):
    """Sets the number of threads that the kernels are given."""

    def use(count):
        monkeypatch.setattr(threads, "count", lambda: count)

    return use


def test_every_piece_runs_once_on_a_thread_of_the_region():
    for count in (0, 1, 2, 7, 64, 1000):
        for many in (1, 2, 5, 33):
            by = _cpu.pieces(many, count)
            assert len(by) == count and all(0 <= t < many for t in by)


def test_workers_take_part():
    for _ in range(50):  # they are woken, and may be late
        if len(set(_cpu.pieces(3, 300, piece_us=100))) > 1:
            return
    pytest.fail("no worker ever took a piece")


def test_a_worker_that_never_gets_to_run_is_not_waited_for():
    """All workers are stopped before their first claim, for a quarter of an hour: the caller does everything."""
    with delayed(before=NEVER):
        assert Counter(_cpu.pieces(6, 400, piece_us=10)) == {0: 400}
        assert Counter(_cpu.pieces(6, 400)) == {0: 400}  # the workers still sit in front of the region before


def test_only_pieces_that_were_begun_are_waited_for():
    """Workers are slow inside their pieces: each holds up the caller with the one piece that it has, and no more."""
    _cpu.pieces(3, 300, piece_us=50)
    with delayed(inside=20_000):
        by = Counter(_cpu.pieces(3, 200, piece_us=50))
    assert by[0] >= 200 - 2 * 10 and sum(by.values()) == 200


def test_late_workers_touch_no_later_region():
    """Workers that look at a region and claim only after it is over, while others are opened in its place."""
    with delayed(before=300):
        for i in range(300):
            count = 1 + i % 17
            by = _cpu.pieces(2 + i % 4, count)
            assert len(by) == count and all(0 <= t < 2 + i % 4 for t in by)


def test_what_a_piece_throws_reaches_the_caller():
    for many in (1, 2, 4):
        for fails in (0, 50, 99):
            with pytest.raises(RuntimeError, match=f"piece {fails} failed"):
                _cpu.pieces(many, 100, piece_us=5, fails=fails)
    assert len(_cpu.pieces(4, 100)) == 100  # nothing is left of it


def test_regions_inside_pieces():
    assert len(_cpu.pieces(3, 60, piece_us=5, nested=True)) == 60
    with delayed(before=NEVER):
        assert Counter(_cpu.pieces(3, 60, nested=True)) == {0: 60}


def test_many_callers_at_once():
    """More Python threads than the pool has regions; one in three of their regions fails."""
    wrong = []

    def call(seed):
        for i in range(60):
            try:
                if (i + seed) % 3 == 0:
                    _cpu.pieces(3, 40, fails=7)
                    wrong.append((seed, i))
                elif len([t for t in _cpu.pieces(3, 40, piece_us=2) if t >= 0]) != 40:
                    wrong.append((seed, i))
            except RuntimeError as error:
                if "piece 7 failed" not in str(error):
                    wrong.append(error)

    callers = [threading.Thread(target=call, args=(seed,)) for seed in range(12)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


def attention_case():
    torch.manual_seed(0)
    cache = ab.TreeCache(num_layers=1, num_kv_heads=2, head_dim=32, num_pages=64)
    trunk = cache.branch()
    step = cache.step({trunk: 300})
    cache.write(0, torch.randn(300, 2, 32), torch.randn(300, 2, 32), step)
    kids = cache.fork(trunk, 12)
    step = cache.step({kid: 3 for kid in kids})
    cache.write(0, torch.randn(36, 2, 32), torch.randn(36, 2, 32), step)
    q = torch.randn(36, 8, 32)
    mask = ab.BranchMask.from_tree([100, 60, 60], [-1, 0, 0])
    packed = [torch.randn(220, heads, 32) for heads in (8, 2, 2)]
    x, weight, bias = torch.randn(40, 96), torch.randn(500, 96), torch.randn(500)
    held = cache, kids  # alive as long as the step is used

    def compute():
        assert held
        out, lse = ab.tree_attention(q, cache, 0, step, return_lse=True)
        inputs = [p.clone().requires_grad_() for p in packed]
        branch = ab.branch_attention(*inputs, mask)
        branch.square().sum().backward()
        return [out, lse, branch.detach(), *(p.grad for p in inputs), linear(x, weight, bias)]

    return compute


def test_results_do_not_depend_on_threads_nor_on_who_runs_a_piece(counted):
    compute = attention_case()
    counted(4)  # plans depend on the number that was wanted when they were made, pieces do not
    expected = compute()
    for before, inside in ((0, 0), (NEVER, 0), (200, 0), (0, 200)):
        with delayed(before, inside):
            for _ in range(3):
                assert all(map(torch.equal, compute(), expected))


def test_branch_attention_and_linear_are_the_same_for_any_number(counted):
    compute = attention_case()
    results = []
    for count in (1, 2, 3, 8):
        counted(count)
        results.append(compute()[-1:])  # attention's plans are cut by the number of threads
    assert all(torch.equal(r[0], results[0][0]) for r in results)


def test_more_threads_than_cores(counted):
    compute = attention_case()
    counted(1)
    expected = compute()
    counted(64)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(compute(), expected, strict=True))


PROGRAM = """
import os, sys, threading
from collections import Counter
from anabranch import _cpu
_cpu.pieces(3, 100, piece_us=20)
busy = threading.Thread(target=lambda: [_cpu.pieces(3, 50, piece_us=20) for _ in range(200)])
busy.start()
for _ in range(5):  # in the middle of another thread's regions
    pid = os.fork()
    if pid == 0:
        assert _cpu.info()["parallel"] == "own pool, 0 workers started"
        assert len(_cpu.pieces(3, 100, piece_us=20)) == 100
        assert _cpu.info()["parallel"] == "own pool, 2 workers started"
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
busy.join()
assert len(_cpu.pieces(3, 100)) == 100
print("done")
"""


def run_program(program, **environment):
    path = os.pathsep.join(p for p in sys.path if p)
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": path} | environment,
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork() on this system")
def test_a_child_of_fork_makes_workers_of_its_own():
    assert "done" in run_program(PROGRAM)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="threads are counted in /proc")
def test_idle_workers_sleep():
    """A worker spins for a moment only: over half a second without work, none takes CPU time worth naming."""
    _cpu.pieces(3, 100, piece_us=20)
    ticks = os.sysconf("SC_CLK_TCK")

    def spent():
        seconds = {}
        for task in Path("/proc/self/task").iterdir():
            name, rest = (task / "stat").read_text().rsplit(")", 1)
            if name.endswith("(anabranch"):
                fields = rest.split()
                seconds[task.name] = (int(fields[11]) + int(fields[12])) / ticks
        return seconds

    time.sleep(0.1)
    before = spent()
    time.sleep(0.5)
    after = spent()
    assert len(before) >= 2 and all(after[t] - before[t] <= 0.05 for t in before)


@pytest.mark.skipif(not _cpu.info()["openmp"], reason="torch has no OpenMP here")
def test_torch_keeps_to_one_thread_within_the_block():
    inside, others = [], []
    with torch_threads(3):
        wanted = threads.count()
        with threads.torch_on_one():
            inside += [torch.get_num_threads(), threads.count()]
            with threads.torch_on_one():
                inside.append(threads.count())
            other = threading.Thread(target=lambda: others.append(torch.get_num_threads()))
            other.start()
            other.join()
            with pytest.raises(KeyError), threads.torch_on_one():
                raise KeyError
        assert inside == [1, wanted, wanted] and others == [3]
        assert torch.get_num_threads() == 3
        with threads.torch_on_one(False):
            assert torch.get_num_threads() == 3
