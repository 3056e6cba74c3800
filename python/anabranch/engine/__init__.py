"""The loop: one packed forward a step for all threads of all prompts."""

from .core import Engine
from .events import Discard, Event, Finish, Fork, Join, Token
from .replay import logprob_pairs, replay
from .result import Node, Result

__all__ = [
    "Discard",
    "Engine",
    "Event",
    "Finish",
    "Fork",
    "Join",
    "Node",
    "Result",
    "Token",
    "logprob_pairs",
    "replay",
]
