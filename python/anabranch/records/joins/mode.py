"""The base of all join modes: which arguments one takes, which children, and how a trace tells of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from anabranch.records.actions import Action


class JoinMode:
    """One way to take children back."""

    name: ClassVar[str]
    takes_text: ClassVar[bool] = False  # then `text` must be given, and `keep` may be
    at_once: ClassVar[bool] = False  # nothing comes back, so nothing is waited for: the children are killed
    fate: ClassVar[str] = "joined"  # of the children

    def check_arguments(self, text: Any, keep: Any) -> None:
        """ValueError unless ``text`` and ``keep`` of `Thread.join` go with this mode."""
        if (text is not None) != self.takes_text or (keep is not None and not self.takes_text):
            raise ValueError(
                f"join: mode={self.name!r} with text={text!r}, keep={keep!r}; "
                "summary takes text (and keep), no other mode does"
            )

    def check_headers(self, headers: Any, count: int) -> None:
        """ValueError unless ``headers`` of `Thread.join` goes with this mode and its `count` children."""
        if headers is not None:
            raise ValueError(f"join: headers={headers!r}; mode 'reprefill' takes one for each of the {count} children")

    def check_child(self, index: int, role: str) -> None:
        """ValueError for a child that cannot come back this way; `role`: "fork" or "fresh"."""

    def recorded(
        self,
        children: Sequence[str],
        token_ids: Sequence[int],
        keep: int | None,
        headers: Sequence[Sequence[int] | None],
    ) -> Action:
        """The entry that a thread's log gets."""
        return Action("join", token_ids, children, self.name, keep, headers)

    def arguments(self, action: Action) -> dict[str, Any]:
        """Keyword arguments of `Thread.join` that do again what `action` tells."""
        return {"mode": self.name}
