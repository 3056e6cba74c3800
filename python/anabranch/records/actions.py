"""What was done to a thread, in order: enough to do it all again (`ab.replay`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass
class Action:
    """One thing that was done to a thread: an entry of its log, which is enough to do it all again (`ab.replay`).

    ``do``: "insert" or "sample" (`token_ids`), "fork" (`children`, the `headers` that they began with, and their
    `segments`, if given), "spawn" (`children`), "join" (`children`, `mode`; with "summary" `token_ids` and `length`,
    what was kept; with "reprefill" `headers`), "kill" (`children`, `mode`: how they went), "truncate" (`length`),
    "skip" (`position`: of the next token).

    ``clock``: tokens on the longest chain that it had to wait for, those it writes not counted (the clock whose end is
    ``critical_path_tokens``); None in traces from before it was kept.
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
