"""The loop: one packed forward a step for all threads of all prompts."""

from anabranch.engine.async_engine import AsyncEngine
from anabranch.engine.engine import Engine
from anabranch.engine.handle import Handle
from anabranch.engine.replay import logprob_pairs, replay
from anabranch.records.events import Become, Discard, Event, Finish, Fork, Join, Token
from anabranch.records.result import Node, Result
from anabranch.records.stats import EngineStats

__all__ = [
    "AsyncEngine",
    "Become",
    "Discard",
    "Engine",
    "EngineStats",
    "Event",
    "Finish",
    "Fork",
    "Handle",
    "Join",
    "Node",
    "Result",
    "Token",
    "logprob_pairs",
    "replay",
]
