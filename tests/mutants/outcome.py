"""The summary that is committed beside the lists."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from entry import Mutant


def write_summary(path: Path, mutants: dict[Mutant, str], results: dict[str, Any]) -> None:
    """Counts by area, what survived, and what changes nothing that can be seen and why."""
    found = [(m, a, results[m.name]) for m, a in mutants.items() if m.name in results]
    lines = ["# Outcome of `make mutants`", "", "Written by `python tests/mutants/run.py --summary`.", ""]
    lines += ["| area | mutants | killed | survived | equivalent | commit |", "|---|---|---|---|---|---|"]
    for area in sorted({a for _, a, _ in found}):
        lines.append(_row(area, [r for _, a, r in found if a == area]))
    lines.append(_row("all", [r for *_, r in found]))
    for title, outcome in (("Survived", "SURVIVED"), ("Equivalent", "equivalent")):
        entries = [f"* `{m.file}`: {m.name}{f' ({m.equivalent})' if m.equivalent else ''}" for m, _, r in found
                   if r["outcome"] == outcome]  # fmt: skip
        lines += ["", f"## {title}", "", *(entries or ["None."])]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _row(name: str, results: list[dict[str, Any]]) -> str:
    counts = [sum(r["outcome"] == o for r in results) for o in ("killed", "SURVIVED", "equivalent")]
    commits = sorted({r["commit"] for r in results})
    return f"| {name} | {len(results)} | {' | '.join(map(str, counts))} | {', '.join(commits)} |"
