"""Engines as the benchmarks of whole answers use them."""

from __future__ import annotations

from typing import Any

import anabranch as ab


def compiled_engine(model: Any, **options: Any) -> ab.Engine:
    """An engine whose steps are compiled behind its first few, where they can be; ``engine.compiled`` tells."""
    try:
        return ab.Engine(model, compile=True, **options)
    except ValueError:  # no compiler, or a model that cannot be traced
        return ab.Engine(model, compile=False, **options)
