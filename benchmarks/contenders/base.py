"""What a contender is.

A contender prepares its best layout outside the timed region, offers one or more equal ways to compute the case, and
is timed with the fastest of them on this machine. Its call takes `q` as a model's projection leaves it,
`[rows, q_heads, head_dim]`, and returns the output in the same shape.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch

from ..timing import best_variant
from ..workload import Workload

Call = Callable[[], torch.Tensor]


class Unfit(RuntimeError):
    """A contender cannot run a case here; the message is the reason shown in the table."""


class Contender:
    """Base of all contenders.

    Attributes:
        name: key in the results.
        title: column title.
        variant: the way that was fastest, set by `prepare`.
        extra: further measurements in microseconds (planning, mask creation), set by `prepare`.
    """

    name: ClassVar[str]
    title: ClassVar[str]

    def __init__(self, work: Workload) -> None:
        self.work = work
        self.variant = ""
        self.extra: dict[str, float] = {}
        self.call: Call

    def bytes_needed(self) -> float:
        """Memory of the layouts that this contender builds, for the check before anything is built."""
        raise NotImplementedError

    def flops(self) -> float:
        """Operations that this contender really does (a dense mask computes what it then throws away)."""
        return self.work.case.flops(self.work.num_q_heads, self.work.head_dim)

    def variants(self) -> dict[str, Call]:
        """Build the layout and return the ways to compute the case."""
        raise NotImplementedError

    def prepare(self) -> None:
        """Build, choose the fastest way, leave it in `call`."""
        ways = self.variants()
        self.variant = next(iter(ways)) if len(ways) == 1 else best_variant(ways)
        self.call = ways[self.variant]

    def finish(self) -> None:
        """Called after all timing of the case; further measurements may go to `extra`."""
