"""Strategies: who forks, when, and how results come back. They know neither tensors nor the model."""

from .aspects import Aspects
from .ops import Decode, Ended, ThreadGone, TokenStats, first, gather
from .plain import Plain, Sequential
from .protocol import Strategy, Thread
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
