"""Plans: which query rows attend to which KV slots, cut into work items for a kernel."""

from anabranch.plan.arrays import FlatContexts, PlanArrays
from anabranch.plan.plan import Plan, plan_of
from anabranch.plan.tile_config import TileConfig

Profile = TileConfig  # its former name, kept for one release

__all__ = ["FlatContexts", "Plan", "PlanArrays", "Profile", "TileConfig", "plan_of"]
