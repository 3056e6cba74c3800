"""The CPU kernels on torch's OpenMP threads: every piece once, the same bits, and only while those threads spin."""

import os
import sys
import threading
import time
from contextlib import contextmanager

import pytest
import torch
from test_parallel import attention_case, run_program

from anabranch import _cpu
from anabranch.backends import threads

pytestmark = pytest.mark.skipif(not _cpu.info()["openmp"], reason="torch has no OpenMP here")


@contextmanager
def openmp(count, whose="openmp"):
    """`count` threads for torch's regions of this thread, and the choice of whose threads run ours."""
    before, chosen = _cpu.openmp_threads(count), threads.choose(whose)
    try:
        yield
    finally:
        threads.choose(chosen)
        _cpu.openmp_threads(before)


def regions():
    return _cpu.info()["openmp_regions"]


@pytest.mark.parametrize("team", [1, 2, 3, 8])
def test_every_piece_runs_once_on_a_thread_of_the_region(team):
    """Also where the team is larger or smaller than the region."""
    with openmp(team):
        before = regions()
        for count in (2, 7, 64, 300):
            for many in (2, 5, 33):
                by = _cpu.pieces(many, count, piece_us=20)
                assert len(by) == count and all(0 <= t < min(many, team) for t in by)
        assert regions() == before + 12
        _cpu.pieces(1, 50), _cpu.pieces(8, 1)  # nothing to share
        assert regions() == before + 12
        assert set(_cpu.pieces(2, 500, piece_us=100)) <= {0, 1}  # long enough for all of the team to get a core


def test_the_team_takes_part():
    with openmp(3):
        for _ in range(50):
            if len(set(_cpu.pieces(3, 300, piece_us=100))) > 1:
                return
    pytest.fail("no other thread ever took a piece")


def test_what_a_piece_throws_reaches_the_caller():
    with openmp(3):
        for fails in (0, 50, 99):
            with pytest.raises(RuntimeError, match=f"piece {fails} failed"):
                _cpu.pieces(3, 100, piece_us=5, fails=fails)
        assert -1 not in _cpu.pieces(3, 100)  # nothing is left of it


def test_regions_inside_pieces():
    with openmp(3):
        assert -1 not in _cpu.pieces(3, 60, piece_us=5, nested=True)


def test_callers_side_by_side_have_teams_of_their_own():
    wrong = []

    def call():
        with openmp(3):
            for _ in range(40):
                if -1 in _cpu.pieces(3, 40, piece_us=2):
                    wrong.append(1)

    with openmp(3):
        callers = [threading.Thread(target=call) for _ in range(6)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
    assert not wrong


def test_the_same_bits_on_whoever_runs_them(monkeypatch):
    monkeypatch.setattr(threads, "count", lambda: 4)
    compute = attention_case()
    with openmp(4, "pool"):
        expected = compute()
    for team in (1, 2, 4, 6):
        with openmp(team):
            before = regions()
            assert all(map(torch.equal, compute(), expected))
            assert regions() > before


def test_threads_that_sleep_are_left_asleep():
    with openmp(2, "auto"):
        _cpu.pieces(2, 8)  # the first look at them wakes them up for a moment
        time.sleep(0.1)
        before = regions()
        for _ in range(200):
            _cpu.pieces(2, 8, piece_us=20)
        assert regions() == before


@pytest.mark.parametrize("team", [1, 2])
def test_a_team_that_is_too_small_is_not_taken(team):
    x = torch.randn(256, 512)
    with openmp(team, "auto"):
        before = regions()
        for _ in range(100):
            torch.mm(x, x.T)
            _cpu.pieces(3, 8, piece_us=20)
        assert regions() == before


def test_within_torch_on_one_the_pool_works():
    x = torch.randn(256, 512)
    with openmp(2, "auto"), threads.torch_on_one():
        before = regions()
        for _ in range(100):
            torch.mm(x, x.T)
            _cpu.pieces(2, 8, piece_us=20)
        assert regions() == before


def test_another_word_is_refused():
    before = threads.choose("auto")
    with pytest.raises(ValueError, match="'auto', 'pool' or 'openmp'"):
        threads.choose("omp")
    assert threads.choose(before) == "auto"


# A process of its own: where there are more of its threads than cores, GCC's runtime lets none of them spin for long.
SPINNING = """
import time, torch
from anabranch import _cpu
_cpu.openmp_threads(2)
x, w = torch.randn(256, 512), torch.randn(512, 512)
end = time.monotonic() + 20
while not (taken := _cpu.info()["openmp_regions"]) and time.monotonic() < end:
    torch.mm(x, w)
    assert -1 not in _cpu.pieces(2, 4, piece_us=20)
print("done", "taken" if taken else "left")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells what time another thread has had")
@pytest.mark.skipif(threads.limits().affinity < 2, reason="one core: nothing spins beside another")
def test_threads_that_spin_behind_torchs_operators_are_taken():
    if "taken" not in run_program(SPINNING, OMP_NUM_THREADS="2"):
        cores = threads.limits().affinity
        if os.getloadavg()[0] > cores:
            pytest.skip(f"{os.getloadavg()[0]:.1f} programs for {cores} cores: OpenMP's threads cannot hold theirs")
        pytest.fail("on a machine that is not busy, no region was run by torch's threads")


FORKING = """
import os, torch
from anabranch import _cpu
for whose in ("openmp", "auto"):
    _cpu.choose_threads(whose)
    _cpu.openmp_threads(2)
    for _ in range(300):
        torch.mm(torch.ones(256, 512), torch.ones(512, 256))
        _cpu.pieces(2, 8, piece_us=50)
    assert whose == "auto" or _cpu.info()["openmp_regions"] >= 300
    pid = os.fork()
    if pid == 0:  # torch's team stayed with the parent: waiting for it would never end
        before = _cpu.info()["openmp_regions"]
        for _ in range(50):
            assert -1 not in _cpu.pieces(2, 100, piece_us=5)
        assert _cpu.info()["openmp_regions"] == before
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    assert -1 not in _cpu.pieces(2, 100)
print("done")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork() on this system")
def test_a_child_of_fork_has_the_pool_alone():
    assert "done" in run_program(FORKING, OMP_NUM_THREADS="2")
