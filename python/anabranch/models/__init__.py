"""Models by name: ``model, tokenizer = anabranch.models.load("smollm2")``."""

from anabranch._cache_folder import cache_folder
from anabranch.models.catalogue import load, names, path, state
from anabranch.models.folders import ModelUnavailable

__all__ = ["ModelUnavailable", "cache_folder", "load", "names", "path", "state"]
