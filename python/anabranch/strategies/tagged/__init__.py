"""Strategies of models that write control tags: each system is data for `Tagged`."""

from anabranch.strategies.tagged.medverse import MedVerse
from anabranch.strategies.tagged.multiverse import Multiverse
from anabranch.strategies.tagged.npr import NPR
from anabranch.strategies.tagged.pasta import PASTA
from anabranch.strategies.tagged.tagged import Tagged
from anabranch.strategies.tagged.threadweaver import ThreadWeaver

__all__ = ["NPR", "PASTA", "MedVerse", "Multiverse", "Tagged", "ThreadWeaver"]
