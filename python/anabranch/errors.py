"""The errors a caller may want to catch. All else is a ``ValueError`` or ``TypeError`` that names the argument."""

from __future__ import annotations

from anabranch._core import DeadBranch, OutOfPages

__all__ = ["BackendUnavailable", "DeadBranch", "OutOfPages", "RemoteError", "TopologyChanged"]


class BackendUnavailable(RuntimeError):
    """The backend that was asked for cannot run here; the message says why and what to do about it."""


class TopologyChanged(RuntimeError):
    """A CUDA graph was being captured, and the tree changed in it: what it records would be right for one step only."""


class RemoteError(RuntimeError):
    """A server cannot be reached, refuses a request, or is not what the caller takes it for."""
