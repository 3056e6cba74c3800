"""The KV cache: pages, branches that share them, steps that write them."""

from anabranch.backends.formats import KVFormat
from anabranch.kv.cache import TreeCache, Usage
from anabranch.kv.step import Branch, Step, StepPlan, step_of
from anabranch.kv.views import Read
from anabranch.kv.watch import Watch

__all__ = ["Branch", "KVFormat", "Read", "Step", "StepPlan", "TreeCache", "Usage", "Watch", "step_of"]
