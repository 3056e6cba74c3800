"""Plans: which query rows attend to which KV slots, cut into work items for a kernel."""

from anabranch.plan.arrays import FlatContexts, PlanArrays
from anabranch.plan.plan import Plan, plan_of
from anabranch.plan.tile_config import TileConfig

__all__ = ["FlatContexts", "Plan", "PlanArrays", "TileConfig", "plan_of"]
