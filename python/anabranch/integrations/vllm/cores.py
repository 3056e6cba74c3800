"""The cores that vLLM has bound this process's OpenMP threads to."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

#: where vLLM's CPU worker says so, each in its OpenMP library's own words
VARIABLES = ("GOMP_CPU_AFFINITY", "KMP_AFFINITY", "OMP_PLACES")


def bound(environment: Mapping[str, str] = os.environ) -> set[int] | None:
    """Core numbers; None where nothing is bound, or in words not understood.

    vLLM gives each worker cores of its own. OpenMP then ties the thread that calls our kernels to the first of them,
    and threads that it starts would inherit that: all of them on one core.
    """
    for name in VARIABLES:
        text = environment.get(name, "")
        listed = re.search(r"proclist=\[([^\]]*)\]", text)
        text = (listed.group(1) if listed else text).strip(" {}")
        if re.fullmatch(r"\d+(-\d+)?([,\s]+\d+(-\d+)?)*", text):
            ranges = [part.partition("-") for part in re.split(r"[,\s]+", text)]
            return {core for first, _, last in ranges for core in range(int(first), int(last or first) + 1)}
    return None
