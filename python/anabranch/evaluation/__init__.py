"""`evaluate`: a model over problems with known answers, forked and sequential; used by ``anabranch eval``."""

from anabranch.answers import final_answer, is_right
from anabranch.evaluation.evaluate import MODES, Problem, evaluate, read_problems

__all__ = ["MODES", "Problem", "evaluate", "final_answer", "is_right", "read_problems"]
