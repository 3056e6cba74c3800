"""How many threads the CPU kernels take: torch's number, the cores of this process, quotas (test_control_groups.py)."""

import pytest
import torch

from anabranch.backends import cpu, threads
from anabranch.backends.threads import Limits


@pytest.mark.parametrize(
    ("limits", "of_torch", "expected"),
    [
        (Limits(8, 8, None), 8, 8),
        (Limits(8, 8, None), 3, 3),  # torch.set_num_threads(3)
        (Limits(8, 2, None), 8, 2),
        (Limits(8, 8, 2.9), 8, 2),
        (Limits(8, 8, 0.5), 8, 1),
        (Limits(8, 2, 4.0), 8, 2),
        (Limits(8, 2, 1.0, torch_is_told=True), 8, 8),
        (Limits(8, 2, 1.0, asked=5), 8, 5),
        (Limits(8, 2, 1.0, asked=5, torch_is_told=True), 3, 5),
    ],
)
def test_the_number(limits, of_torch, expected):
    assert limits.threads(of_torch) == expected


@pytest.fixture
def environment(monkeypatch):
    """Sets variables, and lets limits be read anew."""
    for name in ("OMP_NUM_THREADS", threads.VARIABLE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 300)

    def use(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        threads.limits.cache_clear()

    yield use
    monkeypatch.undo()
    threads.limits.cache_clear()


def test_without_variables(environment):
    environment()
    assert threads.count() == min(300, threads.limits().most)


def test_our_own_variable_decides(environment):
    environment(OMP_NUM_THREADS="2", ANABRANCH_NUM_THREADS="7")
    assert threads.count() == 7 and "ANABRANCH_NUM_THREADS says so" in str(threads.explain()["why"])


def test_torchs_variable_is_followed_as_it_is(environment):
    environment(OMP_NUM_THREADS="2")
    assert threads.count() == 300  # torch.set_num_threads came after it


@pytest.mark.parametrize("wrong", ["0", "-1", "many", "2.5", "99999"])
def test_a_wrong_variable_is_the_reason_why_the_backend_does_not_run(environment, wrong):
    environment(ANABRANCH_NUM_THREADS=wrong)
    assert f"ANABRANCH_NUM_THREADS='{wrong}': expected a whole number" in cpu.unavailable.__wrapped__()


def test_reasons(monkeypatch):
    monkeypatch.setattr(threads.torch, "get_num_threads", lambda: 8)
    for limits, reason in (
        (Limits(8, 8, None), "as many as torch has"),
        (Limits(8, 2, None), "this process is bound to 2 of 8 cores"),
        (Limits(8, 8, 2.5), "quota is 2.5 cores"),
        (Limits(8, 2, 4.0), "bound to 2 of 8 cores"),
        (Limits(8, 2, None, torch_is_told=True), "OMP_NUM_THREADS is set"),
    ):
        monkeypatch.setattr(threads, "limits", lambda limits=limits: limits)
        assert reason in threads.explain()["why"]
