"""The children's tokens follow one another as if written one after the other, so that each sees those before it."""

from __future__ import annotations

from typing import Any

from anabranch.records.actions import Action
from anabranch.records.joins.mode import JoinMode


class Reprefill(JoinMode):
    """`headers` may replace a child's header, where it reads differently behind a sibling."""

    name = "reprefill"

    def check_headers(self, headers: Any, count: int) -> None:
        if headers is not None and (isinstance(headers, str) or len(headers) != count):
            super().check_headers(headers, count)

    def arguments(self, action: Action) -> dict[str, Any]:
        return {"mode": self.name, "headers": action.headers}
