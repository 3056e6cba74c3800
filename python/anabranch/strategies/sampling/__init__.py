"""Strategies that need no trained format: votes, outlines, forks where the model is unsure."""

from anabranch.strategies.sampling.aspects import Aspects
from anabranch.strategies.sampling.entropy_fork import EntropyFork
from anabranch.strategies.sampling.self_consistency import SelfConsistency
from anabranch.strategies.sampling.skeleton import SkeletonOfThought

__all__ = ["Aspects", "EntropyFork", "SelfConsistency", "SkeletonOfThought"]
