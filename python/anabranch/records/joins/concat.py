"""The children's KV becomes part of the thread's context, side by side; nothing is computed again."""

from __future__ import annotations

from anabranch.records.joins.mode import JoinMode


class Concat(JoinMode):
    """Siblings stay blind to one another and share positions."""

    name = "concat"

    def check_child(self, index: int, role: str) -> None:
        if role == "fresh":
            raise ValueError(
                f"join: kids[{index}] has a context of its own, which cannot be spliced; "
                "join it by 'reprefill', 'summary' or 'discard'"
            )
