"""``anabranch strategies``: which there are, and what one of them takes."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

from anabranch.cli.common import USAGE, Mistake
from anabranch.viz.console import consoles

if TYPE_CHECKING:
    from rich.console import Console

    from anabranch.strategies.registry import StrategyInfo


def run(name: str | None, as_json: bool) -> None:
    """All of them, or one with its options."""
    from anabranch.strategies import registry

    try:
        known = [registry.describe(each) for each in (registry.names() if name is None else [name])]
    except ValueError as error:
        raise Mistake(str(error), USAGE) from None
    if as_json:
        print(json.dumps([asdict(info) for info in known] if name is None else asdict(known[0]), ensure_ascii=False))
        return
    out, _ = consoles()
    if name is None:
        _all(out, known)
    else:
        _one(out, known[0])


def _all(out: Console, known: list[StrategyInfo]) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for head in ("strategy", "what forks", "when", "what a join does"):
        table.add_column(head, overflow="fold", no_wrap=head == "strategy", min_width=16)
    for info in known:
        table.add_row(f"[bold]{info.name}[/bold]", *map(escape, (info.forks, info.when, info.join)))
    out.print(table)
    out.print(
        "\nOne with its options: anabranch strategies NAME\n"
        "One in use:           anabranch generate PROMPT --strategy NAME --strategy-option KEY=VALUE\n"
        "Several side by side: anabranch compare --strategies plain,'self-consistency(n=4)',…",
        style="dim", markup=False, soft_wrap=True,
    )  # fmt: skip


def _one(out: Console, info: StrategyInfo) -> None:
    from rich.markup import escape
    from rich.table import Table

    out.print(f"[bold]{info.name}[/bold]  [dim]ab.{escape(info.class_name)}[/dim]\n{escape(info.summary)}\n")
    facts = Table.grid(padding=(0, 2))
    for what, value in (("forks", info.forks), ("when", info.when), ("join", info.join)):
        facts.add_row(f"[dim]{what}[/dim]", escape(value))
    out.print(facts)
    if not info.options:
        out.print("\nIt takes no options.")
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for head in ("option", "value", "default", ""):
        table.add_column(head, overflow="fold")
    for option in info.options:
        default = "must be given" if option.default is None else option.default
        shown = default if len(default) <= 40 else f"{default[:39]}…"
        table.add_row(f"[bold]{option.name}[/bold]", escape(option.kind), escape(shown), escape(option.help))
    out.print("")
    out.print(table)
