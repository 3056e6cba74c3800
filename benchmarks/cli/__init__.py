"""`python -m benchmarks`: measure, print, save, draw."""

from . import everything, kernels, models, serving  # noqa: F401  (each adds its commands)
from .app import app

__all__ = ["app"]
