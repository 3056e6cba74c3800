"""What the commands share: their options, where results go, how a run begins and ends."""

from __future__ import annotations

import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from ..contenders import ALL
from ..store import Store
from ..timing import CLOCKS, set_clock

# Where nobody looks on, tables get the room that they need.
console = Console(width=None if sys.stdout.isatty() else 140)


class Dtype(str, Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


Quick = Annotated[bool, typer.Option("--quick", help="A few telling cases and fewer rounds: a minute or two.")]
Only = Annotated[str, typer.Option(help="Regular expression on a case's name or family: headline, GRPO, draft …")]
Dtypes = Annotated[list[Dtype] | None, typer.Option("--dtype", help="May be repeated. Default: float32 and bfloat16.")]
HeadShapes = Annotated[list[str] | None, typer.Option("--heads", help="Query/KV heads such as 32/8; may be repeated.")]
HeadDims = Annotated[list[int] | None, typer.Option("--head-dim", help="May be repeated. Default: 128.")]
Contenders = Annotated[list[str] | None, typer.Option("--contender", help=f"May be repeated: {', '.join(ALL)}.")]
Json = Annotated[Path | None, typer.Option("--json", help="Write results here as they come; extends an existing file.")]
Plot = Annotated[Path | None, typer.Option("--plot", help="Draw the figures into this folder.")]
Minutes = Annotated[float, typer.Option(help="Start no new case after this time; the telling ones come first.")]
Rounds = Annotated[int, typer.Option(min=1, help="Rounds aimed at for each case.")]
Memory = Annotated[float, typer.Option(help="GB that the layouts of one case may take together.")]
Peer = Annotated[Path | None, typer.Option("--peer", help="Python of an environment with vLLM (see peer_vllm.py).")]
ClockOption = Annotated[
    str, typer.Option("--clock", help="wall, or cpu: CPU time of one thread (--threads 1), for a machine that is busy.")
]
Threads = Annotated[int | None, typer.Option(min=1, help="torch's threads. Default: as torch chooses.")]


def finish(store: Store, plot: Path | None) -> None:
    machine = store.data["machine"]
    console.print(f"[dim]{machine['cpu']}, {machine['threads']} threads, commit {machine['commit']}[/dim]")
    if store.path:
        console.print(f"results: {store.path}")
    if plot is not None:
        from .. import plots

        for path in plots.draw(store.data, plot):
            console.print(f"figure: {path}")


def start(threads: int | None, json: Path | None, clock: str = "wall") -> Store:
    if threads is not None:
        torch.set_num_threads(threads)
    if clock not in CLOCKS:
        raise typer.BadParameter(f"{clock!r}: expected one of {', '.join(CLOCKS)}", param_hint="--clock")
    try:
        set_clock(clock)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--clock") from None
    try:
        return Store(json, clock)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--json") from None
