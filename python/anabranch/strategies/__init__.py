"""Strategies: who forks, when, and how results come back. They know neither tensors nor the model."""

from anabranch.strategies.api.awaitable import ThreadGone, first, gather
from anabranch.strategies.api.ops import Candidates, Decode, Ended, TokenStats
from anabranch.strategies.api.strategy import Strategy
from anabranch.strategies.api.thread import Thread
from anabranch.strategies.calls.apr import APR
from anabranch.strategies.calls.asyncthink import AsyncThink
from anabranch.strategies.calls.leap import LeaP
from anabranch.strategies.calls.pacore import PaCoRe
from anabranch.strategies.calls.running_summary import RunningSummary
from anabranch.strategies.calls.select_passages import SelectPassages
from anabranch.strategies.draft.draft_tree import DraftTree
from anabranch.strategies.live import GroupThink, Hogwild, HogwildPrompts
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
from anabranch.strategies.tagged.medverse import MedVerse
from anabranch.strategies.tagged.multiverse import Multiverse
from anabranch.strategies.tagged.npr import NPR
from anabranch.strategies.tagged.parallel_r1 import ParallelR1
from anabranch.strategies.tagged.parathinker import ParaThinker
from anabranch.strategies.tagged.pasta import PASTA
from anabranch.strategies.tagged.sprint import SPRINT, SprintAnswer
from anabranch.strategies.tagged.ssft import SSFT
from anabranch.strategies.tagged.tagged import Tagged
from anabranch.strategies.tagged.threadweaver import ThreadWeaver

__all__ = [
    "APR",
    "NPR",
    "PASTA",
    "SPRINT",
    "SSFT",
    "STEP",
    "Aspects",
    "AsyncThink",
    "BeamSearch",
    "BestOfN",
    "Candidates",
    "Decode",
    "DeepConf",
    "DraftTree",
    "Ended",
    "EntropyFork",
    "GroupThink",
    "Hogwild",
    "HogwildPrompts",
    "LeaP",
    "MedVerse",
    "Multiverse",
    "PaCoRe",
    "ParaThinker",
    "ParallelProbe",
    "ParallelR1",
    "Plain",
    "PruneRefork",
    "RunningSummary",
    "ScorerFailed",
    "SelectPassages",
    "SelfConsistency",
    "Sequential",
    "SkeletonOfThought",
    "SlimSC",
    "SprintAnswer",
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
