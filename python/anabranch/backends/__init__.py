"""Backends: one file each (`base` says what one has), one of them the oracle. `registry` picks."""

from anabranch.backends.registry import NAMES, PREFERRED, advance_kernel, choose, get, unavailable, with_trait

__all__ = ["NAMES", "PREFERRED", "advance_kernel", "choose", "get", "unavailable", "with_trait"]
