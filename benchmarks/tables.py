"""Cells, rows and heads of tables, for the terminal and for Markdown."""

from __future__ import annotations


def micro(us: float | None) -> str:
    """Microseconds in the unit that suits them."""
    if us is None:
        return "–"
    if us < 1000:
        return f"{us:.0f} µs" if us >= 10 else f"{us:.1f} µs"
    if us < 1e6:
        return f"{us / 1e3:.1f} ms" if us < 1e5 else f"{us / 1e3:.0f} ms"
    return f"{us / 1e6:.1f} s"


def row(*cells: object) -> str:
    return "| " + " | ".join(str(c).replace("|", "\\|") for c in cells) + " |"


def head(*cells: str) -> list[str]:
    return [row(*cells), "|" + "|".join(" --- " if i == 0 else " ---: " for i in range(len(cells))) + "|"]
