"""Strategies of models that write control tags: most are data for `Tagged`."""

from anabranch.strategies.tagged.medverse import MedVerse
from anabranch.strategies.tagged.multiverse import Multiverse
from anabranch.strategies.tagged.npr import NPR
from anabranch.strategies.tagged.parallel_r1 import ParallelR1
from anabranch.strategies.tagged.parathinker import ParaThinker
from anabranch.strategies.tagged.pasta import PASTA
from anabranch.strategies.tagged.sprint import SPRINT
from anabranch.strategies.tagged.ssft import SSFT
from anabranch.strategies.tagged.tagged import Tagged
from anabranch.strategies.tagged.threadweaver import ThreadWeaver

__all__ = [
    "NPR",
    "PASTA",
    "SPRINT",
    "SSFT",
    "MedVerse",
    "Multiverse",
    "ParaThinker",
    "ParallelR1",
    "Tagged",
    "ThreadWeaver",
]
