"""Models by name: ``model, tokenizer = anabranch.models.load("smollm2")``."""

from anabranch.models.catalogue import load, names, path, state
from anabranch.models.folders import ModelUnavailable, cache_folder

__all__ = ["ModelUnavailable", "cache_folder", "load", "names", "path", "state"]
