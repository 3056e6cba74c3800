"""The children go, the thread forgets its tokens from length ``keep`` on, and ``text`` stands in their place."""

from __future__ import annotations

from typing import Any

from anabranch.records.actions import Action
from anabranch.records.joins.mode import JoinMode


class Summary(JoinMode):
    """The only mode that takes text."""

    name = "summary"
    takes_text = True

    def arguments(self, action: Action) -> dict[str, Any]:
        return {"mode": self.name, "text": action.token_ids, "keep": action.length}
