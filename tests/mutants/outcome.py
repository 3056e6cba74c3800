"""The summary that is committed beside the lists."""

from __future__ import annotations

from typing import Any

from entry import Mutant


def summary_of(mutants: dict[str, Mutant], results: dict[str, Any]) -> dict[str, Any]:
    """Counts by area and the commits they were counted on; what survived; what changes nothing that can be seen, and
    why; what was noticed, and after how many seconds; what was not run since it was written."""
    found = {key: results[key] for key, m in mutants.items() if results.get(key, {}).get("entry") == list(m)}
    areas: dict[str, dict[str, Any]] = {}
    for key in mutants:
        counts = areas.setdefault(key.partition(":")[0], {"mutants": 0, "killed": 0, "survived": 0, "equivalent": 0})
        counts["mutants"] += 1
        if key in found:
            counts[found[key]["outcome"].lower()] += 1
            counts["commits"] = sorted({found[key]["commit"], *counts.get("commits", [])})
    total = {
        name: sum(counts[name] for counts in areas.values()) for name in ("mutants", "killed", "survived", "equivalent")
    }
    return {
        "made by": "python tests/mutants/run.py --summary",
        "all": total,
        "areas": areas,
        "survived": [key for key, r in found.items() if r["outcome"] == "SURVIVED"],
        "equivalent": {key: mutants[key].equivalent for key, r in found.items() if r["outcome"] == "equivalent"},
        "killed": {key: round(r["seconds"]) for key, r in found.items() if r["outcome"] == "killed"},
        "not run": [key for key in mutants if key not in found],
    }
