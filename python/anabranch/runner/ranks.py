"""The processes that share a model under tensor parallelism: who they are, and what rank 0 tells the others.

Transformers cuts a model up (``from_pretrained(…, tp_plan="auto")`` under torchrun): every process holds some heads of
each layer, and a forward is one only if all of them run it. What they are to run goes from rank 0 to the others over a
group of its own (gloo, on the host), beside the one that the layers use.
"""

from __future__ import annotations

import atexit
import gc
import pickle
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import Any

import torch

from anabranch.errors import RankLost

__all__ = ["RankGroup", "leave", "sharded"]

_FOR_EVER = timedelta(days=3650)


def sharded(model: Any) -> bool:
    """Whether tensor parallelism has cut up the model's weights among several processes."""
    return next(_meshes(model), None) is not None


def _meshes(model: Any) -> Iterator[Any]:
    parameters = getattr(model, "parameters", None)
    for parameter in parameters() if callable(parameters) else ():
        mesh = getattr(parameter, "device_mesh", None)  # DTensors have one
        if mesh is not None:
            yield mesh


class RankGroup:
    """All processes of a model that is cut up. All of them make it, at the same place of their programs.

    model: a sharded one. timeout: seconds that a process waits for the others inside a forward, and rank 0 for the
        others to take what it sends; they themselves wait for rank 0 as long as it takes, since it may have nothing to
        do.

    Raises ValueError where the model is cut up in another way than by tensor parallelism alone.
    """

    def __init__(self, model: Any, timeout: float):
        import torch.distributed as dist

        self._dist = dist
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.leads = self.rank == 0
        self.lost: RankLost | None = None  # what has gone wrong; from then on nothing is sent or received
        groups = {}
        for mesh in _meshes(model):
            for dim in range(mesh.ndim):
                group = mesh.get_group(dim)
                groups[group.group_name] = group
        if any(group.size() not in (1, self.size) for group in groups.values()):
            raise ValueError(
                f"model: is shared out among some of the {self.size} processes only; an engine takes tensor "
                "parallelism over all of them: load it with tp_plan='auto', and start as many processes as that takes"
            )
        wait = timedelta(seconds=timeout)
        for group in groups.values():
            dist.distributed_c10d._set_pg_timeout(wait, group)
        self._group: Any = dist.new_group(backend="gloo", timeout=wait if self.leads else _FOR_EVER)
        _groups.add(self)
        _leave_at_exit()

    def agree(self, **facts: Any) -> None:
        """ValueError, in every process, where these facts are not the same in all of them."""
        found: list[Any] = [None] * self.size
        self._dist.all_gather_object(found, facts, group=self._group)
        for rank, other in enumerate(found):
            for name, value in found[0].items():
                if other[name] != value:
                    raise ValueError(
                        f"{name}: {value!r} on rank 0, but {other[name]!r} on rank {rank}; make the engine with the "
                        "same model and options in every process"
                    )

    def least(self, number: int) -> int:
        """The smallest of the processes' numbers."""
        held = torch.tensor([number], dtype=torch.int64, device="cpu")
        self._dist.all_reduce(held, self._dist.ReduceOp.MIN, group=self._group)
        return int(held)

    # ---------------------------------------------------------------------------------------- from rank 0 to all

    def send(self, message: Any) -> None:
        """Rank 0: give this to all others; raises `RankLost`."""
        payload = pickle.dumps(message)
        with self.at_work("rank 0 could not reach the other processes"):
            self._broadcast(torch.tensor([len(payload)], dtype=torch.int64, device="cpu"))
            self._broadcast(torch.frombuffer(bytearray(payload), dtype=torch.uint8))

    def receive(self) -> Any:
        """The others: what rank 0 sends next; raises `RankLost`."""
        with self.at_work("rank 0 is gone"):
            size = torch.zeros(1, dtype=torch.int64, device="cpu")
            self._broadcast(size)
            payload = torch.zeros(int(size), dtype=torch.uint8, device="cpu")
            self._broadcast(payload)
        return pickle.loads(payload.numpy().tobytes())

    def _broadcast(self, tensor: torch.Tensor) -> None:
        self._dist.broadcast(tensor, 0, group=self._group)

    @contextmanager
    def at_work(self, what: str) -> Iterator[None]:
        """What all processes do together goes inside. If it fails here they are no longer at the same place: whatever
        followed would mix up one forward with another, so nothing follows."""
        if self.lost is not None:
            raise RankLost(str(self.lost))
        try:
            yield
        except BaseException as error:
            self.lost = RankLost(
                f"tensor parallel, rank {self.rank} of {self.size}: {what} ({type(error).__name__}: {error}); "
                "start all processes again"
            )
            if isinstance(error, Exception):
                # Another one: `lost` stays, and its traceback would hold the group.
                raise RankLost(str(self.lost)) from error
            raise


_groups: weakref.WeakSet[RankGroup] = weakref.WeakSet()


@cache
def _leave_at_exit() -> None:
    """Once a process: behind whatever is registered later, such as the engines' own ends."""
    atexit.register(leave)


def leave() -> None:
    """At the end of the program: end torch's groups, and wait for their threads.

    A group's threads run until nobody holds it, whatever destroy_process_group says, and the model's meshes do. One
    that is still at work when Python ends is ended in the middle, which aborts the process ("terminate called without
    an active exception").
    """
    import torch.distributed as dist

    for group in _groups:
        group._group = None
    if dist.is_initialized():
        dist.destroy_process_group()
    for mesh in [held for held in gc.get_objects() if isinstance(held, dist.DeviceMesh)]:
        getattr(mesh, "_pg_registry", {}).clear()  # of newer torch; older ones hold names alone
    gc.collect()
