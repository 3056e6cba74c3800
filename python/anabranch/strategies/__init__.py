"""Strategies: who forks, when, and how results come back. They know neither tensors nor the model."""

from anabranch.strategies.api.awaitable import ThreadGone, first, gather
from anabranch.strategies.api.ops import Candidates, Decode, Ended, TokenStats
from anabranch.strategies.api.strategy import Strategy
from anabranch.strategies.api.thread import Thread
from anabranch.strategies.plain import Plain, Sequential
from anabranch.strategies.sampling.aspects import Aspects
from anabranch.strategies.sampling.entropy_fork import EntropyFork
from anabranch.strategies.sampling.self_consistency import SelfConsistency
from anabranch.strategies.sampling.skeleton import SkeletonOfThought
from anabranch.strategies.search import (
    STEP,
    BeamSearch,
    BestOfN,
    DeepConf,
    ParallelProbe,
    PruneRefork,
    ScorerFailed,
    SlimSC,
    StepBeamSearch,
    TreeOfThoughts,
)
from anabranch.strategies.tagged.tagged import Tagged
from anabranch.strategies.tagged.threadweaver import ThreadWeaver

__all__ = [
    "STEP",
    "Aspects",
    "BeamSearch",
    "BestOfN",
    "Candidates",
    "Decode",
    "DeepConf",
    "Ended",
    "EntropyFork",
    "ParallelProbe",
    "Plain",
    "PruneRefork",
    "ScorerFailed",
    "SelfConsistency",
    "Sequential",
    "SkeletonOfThought",
    "SlimSC",
    "StepBeamSearch",
    "Strategy",
    "Tagged",
    "Thread",
    "ThreadGone",
    "ThreadWeaver",
    "TokenStats",
    "TreeOfThoughts",
    "first",
    "gather",
]
