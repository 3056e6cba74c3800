"""Commands that measure whole generations of a model, one engine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from .. import report
from ..floor import Floor
from ..store import Store
from .app import app
from .options import ClockOption, Dtype, Dtypes, Json, Only, Peer, Plot, Quick, Rounds, Threads, console, finish, start


def run_e2e(
    store: Store,
    quick: bool,
    dtypes: list[Dtype] | None,
    peer: Path | None,
    rounds: int,
    only: str,
    patience: float = 600.0,
    branches: list[int] | None = None,
) -> None:
    from .. import e2e

    names = [d.value for d in dtypes] if dtypes else ["bfloat16", "float32"]
    with console.status("loading the model") as status:
        for entry in e2e.run(
            quick=quick, dtypes=names, peer=peer, rounds=rounds, only=only, patience=patience,
            branches=branches or (16, 1), report=status.update,
        ):  # fmt: skip
            store.put("e2e", ("contender", "prompt", "dtype", "n"), entry)
            console.print(report.e2e_line(entry))
    console.print(report.e2e_table(store.data))


@app.command("e2e")
def e2e_command(
    quick: Quick = False, only: Only = "", dtype: Dtypes = None, peer: Peer = None, rounds: Rounds = 3,
    threads: Threads = None, clock: ClockOption = "wall", json: Json = None, plot: Plot = None,
    patience: Annotated[
        float, typer.Option(help="Leave a contender out where its prefill alone would take more seconds than this.")
    ] = 600.0,
    branches: Annotated[
        list[int] | None, typer.Option("--branches", min=1, help="May be repeated. Default: 16 and 1.")
    ] = None,
) -> None:  # fmt: skip
    """A real model: our engine, model.generate and, with --peer, vLLM on the same prompts."""
    store = start(threads, json, clock)
    run_e2e(store, quick, dtype, peer, rounds, only, patience, branches)
    finish(store, plot)


@app.command("step")
def step_command(
    quick: Quick = False,
    dtype: Annotated[Dtype, typer.Option()] = Dtype.bfloat16,
    rounds: Rounds = 5,
    threads: Threads = None, clock: ClockOption = "wall", json: Json = None,
) -> None:  # fmt: skip
    """Where a decode step goes: plan, linear layers, attention, sampling, the rest; by rows, beside the floor."""
    from .. import step

    store = start(threads, json, clock)
    with console.status("measuring the floor") as status:
        floor = Floor().measure((getattr(torch, dtype.value),), tries=3 if quick else 10)
        store.set("floor", floor.as_dict())
        for entry in step.run(quick, dtype.value, min(rounds, 2) if quick else rounds, floor, status.update):
            store.put("step", ("contender", "rows", "dtype"), entry)
            if "left_out" in entry:
                console.print(
                    f"{entry['rows']} rows, {entry['contender']}: left out, {entry['left_out']}", markup=False
                )
    console.print(report.step_table(store.data))
    finish(store, None)


@app.command("company")
def company_command(
    quick: Quick = False,
    against: Annotated[
        Path | None, typer.Option(help="The `python` folder of another build, measured in turns with this one.")
    ] = None,
    branches: Annotated[list[int] | None, typer.Option(help="May be repeated. Default: 1 and 16.")] = None,
    others: Annotated[list[int] | None, typer.Option(help="Spinning programs; may be repeated.")] = None,
    tokens: Annotated[int, typer.Option(min=2)] = 32,
    rounds: Rounds = 5, model: Annotated[str, typer.Option()] = "smollm2", dtype: Dtype = Dtype.bfloat16,
    json: Json = None,
) -> None:  # fmt: skip
    """Decoding of a real model alone and beside programs that spin: tokens a second, ratio to the fair share."""
    from .. import company

    store = start(None, json)
    for entry in company.run(
        against, model, dtype.value, tuple(branches or (1, 16)), tokens, tuple(others or (0, 1, 2)),
        min(rounds, 3) if quick else rounds,
    ):  # fmt: skip
        store.put("company", ("contender", "branches", "competitors", "dtype"), entry)
        console.print(company.line(entry))


@app.command("loop")
def loop_command(
    quick: Quick = False,
    branches: Annotated[list[int] | None, typer.Option(help="May be repeated. Default: 1 and 16.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Decoded in a round.")] = 24,
    rounds: Rounds = 5, dtype: Dtype = Dtype.float32, threads: Threads = None, json: Json = None,
) -> None:  # fmt: skip
    """A decoding loop of one's own, with torch's linear layers: tokens a second, Transformers in turns."""
    from .. import loop

    store = start(threads, json)
    for entry in loop.run(dtype.value, tuple(branches or (1, 16)), steps, min(rounds, 3) if quick else rounds, quick):
        store.put("loop", ("prompt", "branches", "dtype"), entry)
        console.print(loop.line(entry))


@app.command("drafts")
def drafts_command(
    model: Annotated[list[str] | None, typer.Option("--model", help="May be repeated; default: both of ours.")] = None,
    count: Annotated[int, typer.Option(min=1, help="Problems of each model.")] = 6, rounds: Rounds = 3,
    draft_model: Annotated[
        Path | None,
        typer.Option(exists=True, file_okay=False, help="Folder of a draft model (training/drafts), compared as well."),
    ] = None,
    threads: Threads = None, json: Json = None,
) -> None:  # fmt: skip
    """Steps and seconds of our models' answers with drafts and without, trees compared."""
    from .. import drafts

    store = start(threads, json)
    for entry in drafts.run(tuple(model or ("multiplication", "smollm2-adaptive")), count, rounds, draft_model):
        store.put("drafts", ("model", "draft"), entry)
        same = "same trees" if entry["same_trees"] else "[red]other trees[/red]"
        console.print(
            f"{entry['model']:18} {entry['draft']:20} {entry['steps']:5} steps (÷ {entry['fewer_steps']:.2f})  "
            f"{entry['accepted_tokens']:5} of {entry['draft_tokens']:5} guesses  "
            f"{entry['rows']:5} rows  time ÷ {entry['faster']}  {same}"
        )


@app.command("deciding")
def deciding_command(
    model: Annotated[str, typer.Option()] = "smollm2",
    tokens: Annotated[int, typer.Option(min=1, help="Most new tokens of an answer.")] = 48,
    only: Annotated[list[str] | None, typer.Option(help="A strategy by name; may be repeated.")] = None,
    cores: Annotated[int, typer.Option(min=1, help="1: processor time; more: wall clock, on a quiet machine.")] = 1,
    json: Json = None,
) -> None:  # fmt: skip
    """Every strategy on a real model: time inside it, as a share of the steps'."""
    from .. import deciding

    store = start(cores, json, "cpu" if cores == 1 else "wall")
    for entry in deciding.run(model, tokens, tuple(only or ()), cores):
        store.put("deciding", ("model", "strategy", "cores"), entry)
        console.print(
            f"{entry['strategy']:20} {entry['steps']:4} steps {entry['rows']:5} rows {entry['threads']:3} threads  "
            f"in the strategy {entry['strategy_share']:7.2%}  with forks, joins and plans {entry['overhead']:7.2%}"
        )
