"""Long runs: for how long, with how much of a core, and whether the process stays as large as it was.

``ANABRANCH_SOAK_SECONDS`` is how long (an hour where it is not set), ``ANABRANCH_SOAK_SHARE`` the share of one core's
time that the process may take, for a machine that others use as well (all of it).
"""

from __future__ import annotations

import gc
import os
import statistics
import time
from pathlib import Path

STATM, FILES = Path("/proc/self/statm"), Path("/proc/self/fd")


def megabytes() -> float:
    """Resident memory of this process."""
    return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


class LongRun:
    """A run and its process's size over time."""

    def __init__(self, seconds: float | None = None, share: float | None = None) -> None:
        self.seconds = float(os.environ.get("ANABRANCH_SOAK_SECONDS", "3600")) if seconds is None else seconds
        self.share = float(os.environ.get("ANABRANCH_SOAK_SHARE", "1")) if share is None else share
        self.sizes: list[float] = []  # MB
        self.files: list[int] = []  # that are open
        self.begin()

    def begin(self) -> None:
        """The run begins now, not when it was made."""
        self._begun, self._busy = time.monotonic(), time.process_time()

    @property
    def spent(self) -> float:
        """Seconds since it began."""
        return time.monotonic() - self._begun

    @property
    def going(self) -> bool:
        return self.spent < self.seconds

    def owed(self) -> float:
        """Seconds to sleep so that the process has not taken more than its share."""
        return max(0.0, (time.process_time() - self._busy) / self.share - self.spent) if self.share < 1 else 0.0

    def note(self) -> None:
        """Note the process's size now."""
        gc.collect()
        self.sizes.append(round(megabytes(), 1))
        self.files.append(len(list(FILES.iterdir())))

    def grown(self) -> float:
        """MB from the second quarter of the run to the last, by their medians; the first quarter fills what is kept."""
        quarter = max(1, len(self.sizes) // 4)
        early = self.sizes[quarter : 2 * quarter] or self.sizes
        return statistics.median(self.sizes[-quarter:]) - statistics.median(early)
