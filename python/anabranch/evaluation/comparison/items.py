"""One problem of a task."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["Item"]


@dataclass(frozen=True)
class Item:
    """One problem. ``score``: of an answer's text, from 0 to 1; it may raise."""

    prompt: Any
    answer: str
    score: Callable[[str], float]
