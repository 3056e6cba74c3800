"""Strategies: who forks, when, and how results come back. They know neither tensors nor the model."""

from .aspects import Aspects
from .plain import Plain, Sequential
from .protocol import Decode, Ended, Strategy, Thread, ThreadGone, TokenStats, first, gather
from .self_consistency import SelfConsistency

__all__ = [
    "Aspects",
    "Decode",
    "Ended",
    "Plain",
    "SelfConsistency",
    "Sequential",
    "Strategy",
    "Thread",
    "ThreadGone",
    "TokenStats",
    "first",
    "gather",
]
