"""The commands about strategies, and their options: ``strategies`` and ``compare``. Imports nothing heavy."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from anabranch.cli.common import command
from anabranch.cli.options import DebugOption, Dtype, DtypeOption, JsonOption, examples, flag

commands = typer.Typer()


@commands.command(
    epilog=examples(
        "anabranch strategies",
        "anabranch strategies self-consistency",
        "anabranch strategies --json | jq '.[].name'",
    ),
)
@command
def strategies(
    name: Annotated[str | None, typer.Argument(help="One of them, with its options.", show_default=False)] = None,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """List the strategies: what forks, when, and what a join does; or one with its options.

    A strategy decides when a thread forks, what each child is given, when it ends and how results come back. Names are
    read without regard to case, hyphens and underscores; a class of your own is found as module:Class.
    """
    from anabranch.cli import strategies as body

    body.run(name, json)


@commands.command(
    epilog=examples(
        "anabranch compare --preset quick",
        "anabranch compare --preset full --store full.sqlite --plots docs",
        "anabranch compare --preset context-rot --store rot.sqlite --plots docs",
        "anabranch compare --models smollm2 --strategies plain,'self-consistency(n=4,vote=line)' --tasks chain_sum "
        "--problems 20",
        "anabranch compare --models ./my-model --strategies plain,threadweaver --tasks my.jsonl --budget 20000tok",
    ),
)
@command
def compare(
    preset: Annotated[
        str, typer.Option(metavar="NAME", help="quick (under ten minutes), full, or context-rot.")
    ] = "quick",
    store: Annotated[
        Path, typer.Option("--store", metavar="FILE", help="The results; the same command goes on from there.")
    ] = Path("anabranch-compare.sqlite"),
    models: Annotated[
        str | None,
        typer.Option(
            metavar="A,B", help="Names or Transformers folders.", show_default="the preset's, where installed"
        ),
    ] = None,
    strategies: Annotated[
        str | None,
        typer.Option(metavar="A,B", help="As `anabranch strategies` lists them, with options: 'a(n=4),b'."),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="A,B",
            help="Of reasoning-gym; multiplication, bills, whereabouts, buried(TASK,filler=N); .jsonl files.",
        ),
    ] = None,
    problems: Annotated[int | None, typer.Option(metavar="N", min=1, help="Of each task, for each seed.")] = None,
    seeds: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Seeds 0 to N-1: each draws problems and samples anew.")
    ] = None,
    budget: Annotated[
        str | None, typer.Option(metavar="LIMIT", help="Of this call: 20000tok, 300s or 5min; models share it.")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Most tokens sampled one after another.")
    ] = None,
    batch: Annotated[
        int, typer.Option(metavar="N", min=1, help="Answers under way at a time: faster, but seconds are of company.")
    ] = 1,
    plots: Annotated[
        Path | None, typer.Option("--plots", metavar="FOLDER", help="Write compare-accuracy.svg and compare-cost.svg.")
    ] = None,
    url: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Of a completions server that runs the model; --models names the tokenizer."),
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(metavar="KEY", envvar="ANABRANCH_API_KEY", help="For --url.", show_envvar=True)
    ] = None,
    retry_errors: Annotated[bool, flag("--retry-errors", help="Try again what ended in an error.")] = False,
    dtype: DtypeOption = Dtype.auto,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Compare strategies on tasks and models: one table with accuracy, tokens, critical path, time and memory.

    Every problem is answered by every strategy before the next one begins, and each result is in the store before that:
    killed at any moment, the same command goes on where it was. A problem whose verifier raises is kept as an error. A
    strategy whose tags a model does not know is left out, and so is a task that its vocabulary cannot spell.
    """
    from anabranch.cli import comparison as body

    body.run(
        body.Options(
            preset=preset, store=store, models=models, strategies=strategies, tasks=tasks, problems=problems,
            seeds=seeds, budget=budget, max_new_tokens=max_new_tokens, batch=batch, plots=plots,
            retry_errors=retry_errors, url=url, api_key=api_key, dtype=dtype.value, as_json=json,
        )
    )  # fmt: skip
