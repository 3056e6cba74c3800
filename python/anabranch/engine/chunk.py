"""A run of tokens whose K and V a step computes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from anabranch.engine.drafts.tree import DraftNode
    from anabranch.kv.step import Branch
    from anabranch.kv.views import Read


@dataclass
class PrefillChunk:
    """A run of tokens to be cached next: on `branch`, from position `position`, the first `done` of them already.

    The last `drafted` of them are guesses; `guesses`: those of them that no other chunk of the step has.
    """

    branch: Branch
    token_ids: list[int]
    position: int
    segments: Sequence[int] = ()  # of each token, where the model adds segment vectors to K and V
    done: int = 0
    reads: list[list[Read]] = field(default_factory=list)  # of each token, where its thread sees others
    positions: Sequence[int] = ()  # of each token, where they do not follow one another
    drafted: int = 0
    guesses: Sequence[DraftNode] = ()
    kept: bool = False  # their K and V were put aside, and come back in place of what the forward computes

    @property
    def left(self) -> int:
        return len(self.token_ids) - self.done

    @property
    def last_position(self) -> int:
        return max(self.positions) if self.positions else self.position + len(self.token_ids) - 1
