"""How many threads the CPU kernels run on, and why.

As many as torch has (``torch.get_num_threads()``), but no more than this process may use at once: the cores it is bound
to (``sched_setaffinity``, ``taskset``, a cpuset) and the CPU quota of its control group (a container's ``--cpus``),
rounded down. With more, the kernel of the system stops all of them for a part of each period, the one that has the rest
of the work included. Limits are read once. ``OMP_NUM_THREADS`` is someone's own decision and is followed as it is;
``ANABRANCH_NUM_THREADS`` decides for these kernels alone.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from anabranch.backends.control_groups import cpu_quota

__all__ = ["VARIABLE", "Limits", "choose", "count", "cpu_quota", "explain", "limits", "torch_on_one"]

VARIABLE = "ANABRANCH_NUM_THREADS"


@dataclass(frozen=True)
class Limits:
    """What bounds the threads of this process.

    Attributes:
        cores: of the machine.
        affinity: cores that this process may run on.
        quota: cores' worth of time a period that its control group may use; None: no quota.
        asked: ``ANABRANCH_NUM_THREADS``; None: not set.
        torch_is_told: ``OMP_NUM_THREADS`` is set.
    """

    cores: int
    affinity: int
    quota: float | None
    asked: int | None = None
    torch_is_told: bool = False

    @property
    def most(self) -> int:
        """Threads that can run all at once."""
        return self.affinity if self.quota is None else max(1, min(self.affinity, int(self.quota)))

    def threads(self, torch_threads: int) -> int:
        """Threads of the kernels where torch has `torch_threads`."""
        if self.asked is not None:
            return self.asked
        return torch_threads if self.torch_is_told else min(torch_threads, self.most)


def count() -> int:
    """Threads for the next call of a kernel, this one included.

    Raises ValueError for an ``ANABRANCH_NUM_THREADS`` that is no whole number of at least 1.
    """
    held: int = getattr(_held, "threads", 0)
    return held or limits().threads(torch.get_num_threads())


def choose(whose: str) -> str:
    """Whose threads run the CPU kernels of this process from now on; the choice before.

    ``"auto"``, the default: a pool of their own, for which a region never waits for a thread that is not running; but
    torch's OpenMP threads while those spin on the cores, as they do for some milliseconds behind each operator of
    torch's. ``"pool"`` and ``"openmp"``: always the one or the other, the latter for a program that binds its OpenMP
    threads to cores. Where torch has no OpenMP it is always the pool. Results are the same bits.

    Raises ValueError for another word.
    """
    from anabranch import _cpu

    return _cpu.choose_threads(whose)


@functools.cache
def limits() -> Limits:
    """This process's, read once."""
    cores = os.cpu_count() or 1
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    return Limits(cores, affinity, cpu_quota(), _asked(), bool(os.environ.get("OMP_NUM_THREADS")))


def _asked() -> int | None:
    text = os.environ.get(VARIABLE, "").strip()
    if not text:
        return None
    if not text.isdecimal() or not 1 <= int(text) <= 1024:
        raise ValueError(f"{VARIABLE}={text!r}: expected a whole number from 1 to 1024; unset it for torch's threads")
    return int(text)


def explain() -> dict[str, object]:
    """For ``doctor``: cores, affinity, quota, threads, and why so many, in words."""
    found, of_torch = limits(), torch.get_num_threads()
    threads = count()
    if found.asked is not None:
        why = f"{VARIABLE} says so"
    elif found.torch_is_told:
        why = "OMP_NUM_THREADS is set: as many as torch has"
    elif threads == of_torch:
        why = "as many as torch has"
    elif found.affinity == threads:
        why = f"torch has {of_torch}, but this process is bound to {found.affinity} of {found.cores} cores"
    else:
        why = f"torch has {of_torch}, but the control group's quota is {found.quota:g} cores"
    return {
        "cores": found.cores,
        "affinity": found.affinity,
        "quota": found.quota,
        "torch_threads": of_torch,
        "threads": threads,
        "why": why,
    }


# ------------------------------------------------------------------------------------------------ torch's own threads

_held = threading.local()


@contextmanager
def torch_on_one(apply: bool = True) -> Iterator[None]:
    """Within the block, torch's OpenMP regions of this thread take one thread; the kernels keep theirs.

    For a forward whose heavy work is ours: what is left to torch is small, and each of its regions would wait for a
    thread that may not be running, and leave it spinning on a core that our workers need. Other threads of the program
    are not touched, nor is what ``torch.set_num_threads`` was told. Where torch has no OpenMP, nothing happens.
    """
    if not apply:
        yield
        return
    from anabranch import _cpu

    before_held, threads = getattr(_held, "threads", 0), count()
    before = _cpu.openmp_threads(1)
    _held.threads = threads
    try:
        yield
    finally:
        _held.threads = before_held
        if before:
            _cpu.openmp_threads(before)


@contextmanager
def torch_on_all() -> Iterator[None]:
    """Inside `torch_on_one`: as many threads for torch as our kernels have, for a product that is torch's after all."""
    held: int = getattr(_held, "threads", 0)
    if not held:
        yield
        return
    from anabranch import _cpu

    before = _cpu.openmp_threads(held)
    try:
        yield
    finally:
        if before:
            _cpu.openmp_threads(before)
