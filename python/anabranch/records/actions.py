"""What was done to a thread, in order: enough to do it all again (`ab.replay`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from anabranch.records.result import Sight


@dataclass
class Action:
    """One thing that was done to a thread: an entry of its log, which is enough to do it all again (`ab.replay`).

    ``do``: "insert" or "sample" (`token_ids`), "fork" (`children`, the `headers` that they began with, and their
    `segments`, if given), "spawn" (`children`), "join" (`children`, `mode`; with "summary" `token_ids` and `length`,
    what was kept; with "reprefill" `headers`), "kill" (`children`, `mode`: how they went), "truncate" (`length`),
    "skip" (`position`: of the next token).

    ``clock``: tokens on the longest chain that it had to wait for, those it writes not counted (the clock whose end is
    ``critical_path_tokens``); None in traces from before it was kept.

    ``logged``: of each thread that the children of a fork see, how many entries its own log had then. ``turns``,
    ``sights``: of a thread that sees others live, or is seen, as `Node` has them, before some of it was cut off. Empty
    in traces from before they were kept.
    """

    do: str
    token_ids: Sequence[int] = ()
    children: Sequence[str] = ()
    mode: str | None = None
    length: int | None = None
    headers: Sequence[Sequence[int] | None] = ()
    clock: int | None = None
    segments: Sequence[int] = ()
    position: int | None = None
    logged: Sequence[int] = ()
    turns: Sequence[tuple[int, int]] = ()
    sights: Sequence[Sight] = ()
