"""What a generation leaves: events, the result and its tree, metrics, traces. Pure data that knows no tensor."""

from anabranch.records.events import Become, Discard, Event, Finish, Fork, Join, Token
from anabranch.records.metrics import Metrics
from anabranch.records.result import Node, Result, Run
from anabranch.records.trace import Trace

__all__ = ["Become", "Discard", "Event", "Finish", "Fork", "Join", "Metrics", "Node", "Result", "Run", "Token", "Trace"]
