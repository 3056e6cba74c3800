"""Strategies: who forks, when, and how results come back. They know neither tensors nor the model."""

from anabranch.strategies.api.awaitable import ThreadGone, first, gather
from anabranch.strategies.api.ops import Decode, Ended, TokenStats
from anabranch.strategies.api.strategy import Strategy
from anabranch.strategies.api.thread import Thread
from anabranch.strategies.draft.draft_tree import DraftTree
from anabranch.strategies.plain import Plain, Sequential
from anabranch.strategies.sampling.aspects import Aspects
from anabranch.strategies.sampling.entropy_fork import EntropyFork
from anabranch.strategies.sampling.self_consistency import SelfConsistency
from anabranch.strategies.sampling.skeleton import SkeletonOfThought
from anabranch.strategies.tagged.tagged import Tagged
from anabranch.strategies.tagged.threadweaver import ThreadWeaver

__all__ = [
    "Aspects",
    "Decode",
    "DraftTree",
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
