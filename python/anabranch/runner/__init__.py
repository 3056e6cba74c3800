"""Runs a model's forward over a tree: as it is, or as a captured CUDA graph."""

from anabranch.runner.eager import forward
from anabranch.runner.graph import DecodeGraph

__all__ = ["DecodeGraph", "forward"]
