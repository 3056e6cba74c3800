"""Strategies whose threads see one another while they write."""

from anabranch.strategies.live.group_think import GroupThink
from anabranch.strategies.live.hogwild import Hogwild
from anabranch.strategies.live.prompts import HogwildPrompts

__all__ = ["GroupThink", "Hogwild", "HogwildPrompts"]
