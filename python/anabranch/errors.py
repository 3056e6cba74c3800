"""The errors a caller may want to catch. All else is a ``ValueError`` or ``TypeError`` that names the argument."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from anabranch._core import DeadBranch, OutOfPages

if TYPE_CHECKING:
    from anabranch.records.result import Result

__all__ = [
    "BackendUnavailable",
    "DeadBranch",
    "DeadlineExceeded",
    "OutOfPages",
    "QueueFull",
    "RankLost",
    "RemoteError",
    "TopologyChanged",
]


class BackendUnavailable(RuntimeError):
    """The backend that was asked for cannot run here; the message says why and what to do about it."""


class TopologyChanged(RuntimeError):
    """A CUDA graph was being captured, and the tree changed in it: what it records would be right for one step only."""


class RemoteError(RuntimeError):
    """A server cannot be reached, refuses a request, or is not what the caller takes it for."""


class RankLost(RuntimeError):
    """Under tensor parallelism another process died, stopped answering or is not where this one is; start all of them
    again."""


class QueueFull(RuntimeError):
    """As many requests wait as ``Engine(max_queue=…)`` allows; nothing was added. Try again when some have begun."""


class DeadlineExceeded(TimeoutError):
    """A request was not answered within its ``deadline`` and has been ended; its pages are free.

    ``results``: what there was so far, one `Result` a prompt.
    """

    def __init__(self, message: str, results: Sequence[Result] = ()) -> None:
        super().__init__(message)
        self.results = list(results)
