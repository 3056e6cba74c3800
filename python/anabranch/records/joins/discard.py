"""Nothing comes back; children still decoding are killed."""

from __future__ import annotations

from typing import ClassVar

from anabranch.records.joins.mode import JoinMode


class Discard(JoinMode):
    """Carried out at once: a child still decoding must not cost another step. In a log it is a "kill"."""

    name = "discard"
    at_once: ClassVar[bool] = True
    fate = "discarded"
