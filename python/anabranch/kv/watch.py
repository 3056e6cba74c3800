"""Who is told of every change of a cache's tree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from anabranch.kv.step import Branch, Step


class Watch:
    """Told of every change of a cache's tree; what it raises comes before anything has changed.

    This one does nothing. A cache made for a model has one that knows what the model can serve (hf/watch.py).
    """

    def check_step(self, rows: Mapping[Branch, int], positions: Mapping[Branch, Any]) -> None:
        """Before a step. positions: for some branches, integers as NumPy arrays."""

    def stepped(self, step: Step) -> None:
        """After a step."""

    def forked(self, branch: Branch, kids: Sequence[Branch]) -> None:
        """After a fork."""

    def check_join(self, trunk: Branch, kids: Sequence[Branch]) -> None:
        """Before a join by concatenation, or before the first of `kids` shares its tokens with the trunk."""

    def shared(self, branch: Branch, sibling: Branch) -> None:
        """After a branch came to see a sibling's tokens."""

    def joined(self, trunk: Branch, kids: Sequence[Branch]) -> None:
        """After it."""

    def truncating(self, branch: Branch, length: int) -> None:
        """Before a truncation, which may still be refused."""

    def ending(self, branch: Branch) -> None:
        """Before a release, which may still be refused."""
