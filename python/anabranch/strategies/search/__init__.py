"""Search: many texts at once, of which the best go on; by the model's own scores, by functions, by votes."""

from anabranch.strategies.search.beam_search import BeamSearch
from anabranch.strategies.search.best_of_n import BestOfN
from anabranch.strategies.search.deep_conf import DeepConf
from anabranch.strategies.search.parallel_probe import ParallelProbe
from anabranch.strategies.search.prune_refork import PruneRefork
from anabranch.strategies.search.scoring import ScorerFailed
from anabranch.strategies.search.slim_sc import SlimSC
from anabranch.strategies.search.step_beam_search import StepBeamSearch
from anabranch.strategies.search.step_pruning import STEP
from anabranch.strategies.search.tree_of_thoughts import TreeOfThoughts

__all__ = [
    "STEP",
    "BeamSearch",
    "BestOfN",
    "DeepConf",
    "ParallelProbe",
    "PruneRefork",
    "ScorerFailed",
    "SlimSC",
    "StepBeamSearch",
    "TreeOfThoughts",
]
