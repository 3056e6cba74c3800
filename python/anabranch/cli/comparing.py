"""The commands about strategies, and their options: ``strategies`` and ``compare``. Imports nothing heavy."""

from __future__ import annotations

from typing import Annotated

import typer

from anabranch.cli.common import command
from anabranch.cli.options import DebugOption, JsonOption, examples

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
