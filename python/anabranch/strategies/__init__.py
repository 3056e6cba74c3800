"""Strategies: who forks, when, and how results come back. They know neither tensors nor the model."""

from .aspects import Aspects
from .entropy_fork import EntropyFork
from .ops import Decode, Ended, ThreadGone, TokenStats, first, gather
from .plain import Plain, Sequential
from .protocol import Strategy, Thread
from .self_consistency import SelfConsistency
from .skeleton import SkeletonOfThought
from .tagged import Tagged
from .threadweaver import ThreadWeaver

__all__ = [
    "Aspects",
    "Decode",
    "Ended",
    "EntropyFork",
    "Plain",
    "SelfConsistency",
    "Sequential",
    "SkeletonOfThought",
    "Strategy",
    "Tagged",
    "Thread",
    "ThreadGone",
    "ThreadWeaver",
    "TokenStats",
    "first",
    "gather",
]
