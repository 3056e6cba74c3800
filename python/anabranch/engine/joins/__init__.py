"""How the engine takes children back: one file a mode, under the names of `anabranch.records.joins`."""

from __future__ import annotations

from anabranch.engine.joins.common import EngineJoin
from anabranch.engine.joins.concat import Concat
from anabranch.engine.joins.reprefill import Reprefill
from anabranch.engine.joins.summary import Summary

# A mode that is carried out at once ("discard") ends its children and leaves the engine nothing to do.
ENGINE_JOINS: dict[str, EngineJoin] = {"concat": Concat(), "reprefill": Reprefill(), "summary": Summary()}

__all__ = ["ENGINE_JOINS", "EngineJoin"]
