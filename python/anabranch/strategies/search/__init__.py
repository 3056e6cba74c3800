"""Search: many texts at once, of which the best go on; by the model's own scores, by functions, by votes."""

from anabranch.strategies.search.beam_search import BeamSearch

__all__ = ["BeamSearch"]
