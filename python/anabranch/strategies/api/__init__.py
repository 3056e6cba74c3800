"""What a strategy is written against: threads, what one can ask of them, and how to wait for it."""

from anabranch.strategies.api.awaitable import Awaitable, ThreadGone, first, gather
from anabranch.strategies.api.ops import Candidates, Decode, Ended, TokenStats
from anabranch.strategies.api.strategy import Strategy
from anabranch.strategies.api.thread import Thread

__all__ = [
    "Awaitable",
    "Candidates",
    "Decode",
    "Ended",
    "Strategy",
    "Thread",
    "ThreadGone",
    "TokenStats",
    "first",
    "gather",
]
