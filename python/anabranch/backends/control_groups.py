"""What a process may use, by its control groups (a container's ``--cpus`` and ``--memory``) and the system.

Both versions of control groups, as Linux shows them to the process; what cannot be read sets no limit. ``root``: where
``/proc`` and ``/sys`` are.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

__all__ = ["available_memory", "cpu_quota"]

ROOT = Path("/")


def cpu_quota(root: Path = ROOT) -> float | None:
    """Cores' worth of CPU time, the smallest of the groups on the way up; None: any.

    ``cpu.max`` (v2), ``cpu.cfs_quota_us`` and ``cpu.cfs_period_us`` (v1).
    """
    quotas = [quota for version, group in _groups(root, "cpu") if (quota := _quota(version, group)) is not None]
    return min(quotas, default=None)


def available_memory(root: Path = ROOT) -> int | None:
    """Bytes that the process can still take without taking them from others; None where that cannot be told.

    The least of what the system has (``MemAvailable``) and what each group on the way up leaves: its limit less what it
    uses, without files that were read and can be dropped.
    """
    lines = (line.split() for line in _lines(root / "proc/meminfo"))
    found = [1024 * int(n) for name, n in (words[:2] for words in lines if len(words) > 1)
             if name == "MemAvailable:" and n.isdecimal()]  # fmt: skip
    found += [room for version, group in _groups(root, "memory") if (room := _room(version, group)) is not None]
    return min(found, default=None)


def _groups(root: Path, controller: str) -> Iterator[tuple[int, Path]]:
    """``(version, folder)`` of the process's group, and of those above it, in each hierarchy that governs something."""
    mounts = list(_mounts(root, controller))
    for line in _lines(root / "proc/self/cgroup"):
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        version = 2 if number == "0" and not controllers else 1
        if version == 1 and controller not in controllers.split(","):
            continue
        for kind, top, folder in mounts:
            if kind == version:
                # In a container the tree may be mounted from its own group on, while the path is the host's.
                inside = path[len(top) :] if top != "/" and f"{path}/".startswith(f"{top}/") else path
                place = PurePosixPath("/", *(p for p in inside.split("/") if p not in ("", ".", "..")))
                yield from ((version, folder / group.relative_to("/")) for group in (place, *place.parents))


def _mounts(root: Path, controller: str) -> Iterator[tuple[int, str, Path]]:
    """``(version, the group that is mounted, where)``."""
    lines = _lines(root / "proc/self/mountinfo")
    if not lines:
        yield 2, "/", root / "sys/fs/cgroup"
        yield 1, "/", root / "sys/fs/cgroup" / controller
    for line in lines:
        left, _, right = line.partition(" - ")
        place, system = left.split(), right.split()
        if len(place) < 5 or not system:
            continue
        if system[0] == "cgroup2":
            yield 2, place[3], root / place[4].lstrip("/")
        elif system[0] == "cgroup" and controller in system[-1].split(","):
            yield 1, place[3], root / place[4].lstrip("/")


def _quota(version: int, group: Path) -> float | None:
    if version == 2:
        words = " ".join(_lines(group / "cpu.max")).split()
    else:
        words = [*_lines(group / "cpu.cfs_quota_us"), *_lines(group / "cpu.cfs_period_us")]
    try:
        quota, period = (int(word) for word in words)
    except ValueError:  # "max", or no such file
        return None
    return quota / period if quota > 0 and period > 0 else None


def _room(version: int, group: Path) -> int | None:
    limit, used, idle = {
        2: ("memory.max", "memory.current", "inactive_file"),
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    }[version]
    files = (line.partition(" ") for line in _lines(group / "memory.stat"))
    droppable = sum(int(n) for name, _, n in files if name == idle and n.isdecimal())
    try:
        most, now = (int("".join(_lines(group / name))) for name in (limit, used))
    except ValueError:  # "max", or no such file
        return None
    return max(0, most - max(0, now - droppable))


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        return []
