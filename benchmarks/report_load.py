"""Engines under load as text: arrivals, and the simulated fleet."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from .tables import head, micro, row

SERVE_HEAD = ("answers", "requests/s", "", "tokens/s", "first p50", "p99", "between p50", "p99", "found")


def _serve_cells(data: dict[str, Any]) -> Iterator[list[str]]:
    for e in sorted(data.get("serve", []), key=lambda e: (e["dtype"], e["answers"], e["rate"])):
        begin = [e["answers"], f"{e['rate']:g}"]
        if "left_out" in e:
            yield [*begin, f"{e['title']}: {e['left_out']}", *("–" for _ in SERVE_HEAD[3:])]
            continue
        waits = (micro(1e6 * e[name]) for name in ("first_p50", "first_p99", "gap_p50", "gap_p99"))
        # Those that do not tell what they found have 0.
        found = f"{e['hit_rate']:.0%}" if e["hit_rate"] else "–"
        yield [*begin, e["title"], f"{e['tokens_per_s']:.1f}", *waits, found]


def serve_table(data: dict[str, Any]) -> Table:
    """Who serves how fast: throughput, waiting for the first token and between tokens."""
    table = Table(box=SIMPLE_HEAD, title="serving, Poisson arrivals")
    for name in SERVE_HEAD:
        table.add_column(name, justify="left" if name in ("answers", "") else "right")
    for cells in _serve_cells(data):
        table.add_row(*map(escape, cells))
    return table


def serve_markdown(data: dict[str, Any]) -> list[str]:
    """The same, with how it was measured above it."""
    dtypes = ", ".join(sorted({e["dtype"] for e in data["serve"]}))
    counts = ", ".join(str(n) for n in sorted({e["requests"] for e in data["serve"]}))
    return [
        f"SmolLM2-135M-Instruct in {dtypes}: {counts} requests a load, Poisson arrivals, the same for everybody; every "
        "answer exactly as many tokens. *First*: from arrival to the first token; *between*: two tokens of an answer; "
        "*found*: share of the prompts' tokens that was in the cache.",
        "",
        *head(*SERVE_HEAD),
        *(row(*cells) for cells in _serve_cells(data)),
        "",
    ]


def fleet_table(data: dict[str, Any]) -> str:
    """The fleet's simulation in Markdown: the check on real engines first."""
    fleet = data["fleet"]
    check, cost = fleet["check"], fleet["cost"]
    measured, simulated = check["measured"], check["simulated"]
    lines = [
        f"Simulation from measured steps of {fleet['model']} (median error of the fitted costs {cost['error']:.0%}); "
        f"{fleet['replicas']} replicas of {fleet['replica']['pages']} pages.",
        "",
        "| two engines | measured | simulated | ratio |",
        "| --- | ---: | ---: | ---: |",
    ]
    names = {"seconds": "seconds", "tokens_per_s": "tokens a second", "mean": "mean latency", "p99": "p99", "first": "to the first token"}  # fmt: skip  # noqa: E501
    for name, words in names.items():
        lines.append(f"| {words} | {measured[name]:.3g} | {simulated[name]:.3g} | {check['ratios'][name]:.2f} |")
    lines += ["", "| branches held | pages | tokens a second |", "| --- | ---: | ---: |"]
    for entry in fleet["held"]:
        lines.append(f"| {entry['branches']}, {entry['kind']} | {entry['pages']} | {entry['tokens_per_s']:.0f} |")
    lines += [
        "",
        "| requests a second | routed | mean latency | p99 | prefix found |",
        "| ---: | --- | ---: | ---: | ---: |",
    ]
    for entry in fleet["routing"]:
        lines.append(
            f"| {entry['rate']:.3g} | {ROUTES[entry['route']]} | {entry['mean']:.3g} s | {entry['p99']:.3g} s | "
            f"{entry['found']:.0%} |"
        )
    lines += [
        "",
        "| requests a second | tokens that a fork adds | forked | one thread |",
        "| ---: | ---: | ---: | ---: |",
    ]
    for more, entries in fleet["forking"].items():
        for forked, single in zip(entries[::2], entries[1::2], strict=True):
            lines.append(
                f"| {forked['rate']:.3g} | {float(more):.0%} | {forked['mean']:.3g} s | {single['mean']:.3g} s |"
            )
    for more, rate in fleet["pays_until"].items():
        until = "at every rate tried" if math.isinf(rate) else f"up to {rate:.3g} requests a second"
        lines.append(f"\nWith {float(more):.0%} more tokens, forks have the lower mean latency {until}.")
    return "\n".join(lines)


ROUTES = {"prefix": "by prefix", "turns": "in turns", "least": "to who has least to do"}
