"""Who guesses tokens for speculative decoding: one file a way of guessing, behind the `Proposer` protocol."""

from anabranch.engine.drafts.base import Ask, Path, Proposer
from anabranch.engine.drafts.choose import check_draft, proposer_for
from anabranch.engine.drafts.odds import Odds, least_chance
from anabranch.engine.drafts.pace import Pace
from anabranch.engine.drafts.tree import Ahead, Draft, DraftNode

__all__ = [
    "Ahead", "Ask", "Draft", "DraftNode", "Odds", "Pace", "Path", "Proposer", "check_draft", "least_chance",
    "proposer_for",
]  # fmt: skip
