"""Processes that share a model: ``--tp N`` starts this very command N times, by torchrun."""

from __future__ import annotations

import os
import sys

from anabranch.cli.common import USAGE, Mistake


def started() -> bool:
    """Whether this is one of several processes already, started by torchrun."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def check(count: int) -> None:
    """`Mistake` where the processes are not there, or cannot be started."""
    if started() and os.environ["WORLD_SIZE"] != str(count):
        raise Mistake(
            f"--tp {count}: torchrun has started {os.environ['WORLD_SIZE']} processes; pass the same number", USAGE
        )
    import torch

    if not torch.distributed.is_available():
        raise Mistake("--tp: this torch was built without torch.distributed; install another build", USAGE)
    try:
        import accelerate  # noqa: F401
    except ImportError:
        raise Mistake("--tp: Transformers needs accelerate for it; pip install accelerate", USAGE) from None
    if torch.cuda.is_available() and torch.cuda.device_count() < count and not started():
        raise Mistake(
            f"--tp {count}: there are {torch.cuda.device_count()} GPUs here, and each process takes one", USAGE
        )


def start(model: str, count: int) -> None:
    """Become torchrun, which runs this command in `count` processes, and ends all when one fails. Does not return."""
    from anabranch import models

    if model in models.names():
        models.path(model)  # converted once, not by each of them
    # Else torchrun gives each process one thread.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // count)))
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    os.execv(sys.executable, [sys.executable, *torchrun, "-m", "anabranch", *sys.argv[1:]])
