"""Backends: one file each, one contract (docs/architecture.md), one oracle. `registry` picks."""

from anabranch.backends.registry import NAMES, PREFERRED, advance_kernel, choose, get, unavailable

__all__ = ["NAMES", "PREFERRED", "advance_kernel", "choose", "get", "unavailable"]
