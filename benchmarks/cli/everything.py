"""`all` and `report`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from .. import report
from ..store import load
from .app import app
from .kernels import attention_settings, run_attention, run_branch, run_host
from .models import run_e2e
from .options import Json, Memory, Minutes, Peer, Plot, Quick, Threads, console, finish, start


@app.command("all")
def all_command(
    quick: Quick = False, peer: Peer = None, memory: Memory = 8.0, minutes: Minutes = math.inf, threads: Threads = None,
    json: Json = None, plot: Plot = None,
) -> None:  # fmt: skip
    """Everything, one after another."""
    store = start(threads, json)
    run_attention(attention_settings(quick, "", None, None, None, None, 9, memory), store, minutes)
    run_host(store, quick)
    run_branch(store, quick)
    run_e2e(store, quick, None, peer, 1 if quick else 3, "")
    finish(store, plot)


@app.command("report")
def report_command(
    file: Annotated[Path, typer.Argument(help="A results file.", exists=True, dir_okay=False)],
    full: Annotated[bool, typer.Option("--full", help="Every head shape instead of the README's selection.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the Markdown here instead of printing it.")] = None,
    plot: Plot = None,
) -> None:
    """Markdown tables (and figures) from a results file; numbers in documents come from here alone."""
    data = load(file)
    text = report.markdown(data, full=full)
    if out is None:
        print(text)
    else:
        out.write_text(text)
    if plot is not None:
        from .. import plots

        for path in plots.draw(data, plot):
            console.print(f"figure: {path}")


@app.callback(invoke_without_command=True)
def main(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        options = {"quick": False, "peer": None, "memory": 8.0, "minutes": math.inf, "threads": None, "json": None}
        context.invoke(all_command, **options, plot=None)
