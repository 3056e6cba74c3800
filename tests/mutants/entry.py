"""What a list of mistakes holds."""

from __future__ import annotations

from typing import NamedTuple


class Mutant(NamedTuple):
    """`old` stands exactly once in `file`; `tests` are arguments of pytest. equivalent: why nothing can be noticed."""

    name: str
    file: str
    old: str
    new: str
    tests: str
    equivalent: str = ""
