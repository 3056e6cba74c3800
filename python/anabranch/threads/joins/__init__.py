"""How a host takes children back: one file a mode, under the names of `anabranch.records.joins`."""

from __future__ import annotations

from anabranch.threads.joins.common import HostJoin
from anabranch.threads.joins.concat import Concat
from anabranch.threads.joins.reprefill import Reprefill
from anabranch.threads.joins.summary import Summary

# A mode that is carried out at once ("discard") ends its children and leaves nothing to do.
HOST_JOINS: dict[str, HostJoin] = {"concat": Concat(), "reprefill": Reprefill(), "summary": Summary()}

__all__ = ["HOST_JOINS", "HostJoin"]
