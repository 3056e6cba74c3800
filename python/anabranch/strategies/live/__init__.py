"""Strategies whose threads see one another while they write."""

from anabranch.strategies.live.group_think import GroupThink

__all__ = ["GroupThink"]
