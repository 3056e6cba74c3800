"""What each way of joining means; how a host does it is in `anabranch.threads.joins`, under the same names.

A mode is one file here and one there. A strategy's arguments are checked by it, a trace is read by it and replayed by
it, so whoever knows this registry knows every mode there is.
"""

from __future__ import annotations

from anabranch.records.joins.concat import Concat
from anabranch.records.joins.discard import Discard
from anabranch.records.joins.mode import JoinMode
from anabranch.records.joins.reprefill import Reprefill
from anabranch.records.joins.summary import Summary

JOINS: dict[str, JoinMode] = {mode.name: mode for mode in (Concat(), Reprefill(), Summary(), Discard())}

__all__ = ["JOINS", "JoinMode"]
