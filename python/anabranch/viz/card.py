"""The score card at the end of a demo, and what ``--json`` prints."""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING, Any

from rich.table import Table

from anabranch.viz.console import machine_note

if TYPE_CHECKING:
    from rich.console import Console

    from anabranch.cli.compare import Comparison
    from anabranch.records.metrics import Metrics
    from anabranch.records.result import Node, Result
    from anabranch.viz.story import Pages


def written(node: Node) -> int:
    """Tokens that this thread wrote or was given, those that were cut off later included."""
    return sum(len(run.token_ids) for run in (*node.runs, *node.forgotten) if run.kind in ("sampled", "inserted"))


def card(m: Metrics, page_size: int | None = None, peak: Pages | None = None) -> Table:
    """Everything that one generation cost.

    peak: the cache at the moment when the branches together saw most; without it the two peaks, which may lie at
    different moments (after a join nothing is shared any more, and the trunk holds all).
    """
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", justify="right", min_width=12)
    table.add_column(style="bold", justify="right", no_wrap=True)
    table.add_column(style="dim")
    inserted = f"{m.sampled_tokens} sampled, {m.inserted_tokens} inserted (headers)"
    table.add_row("tokens", f"{m.total_tokens}", inserted)
    table.add_row("critical path", f"{m.critical_path_tokens}", "had to wait for one another")
    if m.num_threads:
        table.add_row("token speed-up", f"{m.token_speedup:.2f}×", "tokens ÷ critical path")
    else:
        table.add_row("token speed-up", "–", "it did not fork, so there is nothing to compare")
    forks = f"{m.num_forks} fork{'' if m.num_forks == 1 else 's'}"
    table.add_row("threads", f"{m.num_threads}", f"in {forks}; at most {m.max_concurrency} at once")
    if not m.num_threads:
        pass  # one thread shares nothing
    elif peak is not None:
        shared = f"at the fullest: {peak.logical} tokens seen, {peak.physical} held"
        table.add_row("cache shared", f"{peak.sharing:.2f}×", shared)
    else:
        shared = f"{m.tokens_logical_peak} tokens seen at most, {m.tokens_physical_peak} held at most"
        table.add_row("cache shared", f"{m.sharing:.2f}×", shared)
    copied = f"{m.pages_copied} page{'' if m.pages_copied == 1 else 's'} copied on write"
    size = f"of {page_size} tokens, " if page_size else ""
    table.add_row("pages", f"{m.pages_peak}", f"{size}at most; {copied}")
    rate = f", {m.total_tokens / m.wall_seconds:.1f} tokens/s" if m.total_tokens and m.wall_seconds else ""
    table.add_row("time", f"{m.wall_seconds:.2f} s", f"{m.steps} steps{rate}")
    table.add_row("overhead", f"{100 * m.overhead:.1f} %", "planning, forks, joins and bookkeeping")
    return table


def comparison_table(c: Comparison) -> Table:
    """The two sides with their ratio."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", justify="right", min_width=12)
    for _ in range(4):
        table.add_column(justify="right", no_wrap=True)
    table.add_row("", *(f"[dim]{h}[/dim]" for h in ("seconds", "CPU seconds", "tokens/s", "prompt tokens")))
    best = min(c.engine.seconds, c.generate.seconds)
    for label, side in (("anabranch", c.engine), ("generate", c.generate)):
        style = "bold" if side.seconds == best else ""
        times = f"{side.seconds:.2f}", f"{side.cpu_seconds:.2f}"
        row = (*times, f"{side.tokens_per_second:.1f}", f"{side.prompt_tokens_computed}")
        table.add_row(label, *row, style=style)
    cpu = f"{c.generate.cpu_seconds / c.engine.cpu_seconds:.2f}×" if c.engine.cpu_seconds else "–"
    table.add_row("ratio", f"{c.ratio:.2f}×", cpu, "", "")
    return table


def show(console: Console, result: Result, page_size: int, peak: Pages) -> None:
    """The card, with a line's distance."""
    console.print()
    console.print(card(result.metrics, page_size, peak))


def show_comparison(console: Console, c: Comparison, dtype: str) -> None:
    """The comparison with what it means and where it was measured."""
    console.print()
    rounds = f"best of {c.rounds} rounds, in turns, after a warm-up"
    console.print(
        f"The same fork again, without the display: {c.branches} sampled continuations of {c.length} tokens each after "
        f"the {c.prompt_tokens} tokens before the fork; {rounds}. model.generate(num_return_sequences={c.branches}) "
        "uses SDPA, computes the prompt once a branch and cannot join.",
        style="dim",
    )
    console.print(comparison_table(c))
    console.print()
    console.print(f"{machine_note()}; {dtype}", style="dim")


def as_json(
    result: Result, *, model: str, dtype: str, prompt: Any, comparison: Comparison | None, command: str
) -> dict[str, Any]:
    """One object with everything; metrics by their names in `anabranch.records.metrics`."""
    threads = [
        {
            "id": node.id,
            "role": node.role,
            "text": node.text,
            "tokens": written(node),
            "positions": [node.start, node.stop],
            "ended": node.ended,
            "fate": node.fate,
        }
        for node in result.tree.walk()
    ]
    answer: dict[str, Any] = {
        "schema": f"anabranch.{command}",
        "version": 1,
        "model": model,
        "dtype": dtype,
        "prompt": prompt,
        "strategy": result.info["strategy"],
        "seed": result.info["seed"],
        "text": result.text,
        "token_ids": list(result.token_ids),
        "answers": result.answers,
        "threads": threads,
        "metrics": result.metrics.as_dict(),
        "overhead": result.metrics.overhead,
        "machine": {"note": machine_note(), "system": platform.platform(), "python": platform.python_version()},
    }
    if command == "demo":
        answer["comparison"] = comparison.as_dict() if comparison is not None else None
    return answer
