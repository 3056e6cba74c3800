"""Options that several commands share, and how their help pages are written. Imports nothing heavy."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from anabranch.cli.common import set_debug


class Dtype(str, Enum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Compile(str, Enum):
    auto = "auto"
    now = "now"
    never = "never"


def flag(*names: str, **options: Any) -> Any:
    """A yes-or-no option; its page needs no word for the kind of value it takes."""
    return typer.Option(*names, metavar="", **options)


def examples(*lines: str) -> str:
    """The end of a help page."""
    return "\n\n".join(("Examples:", *lines))


DebugOption = Annotated[
    bool, flag("--debug", callback=set_debug, is_eager=True, help="Show the traceback of an error.")
]
ModelOption = Annotated[
    str, typer.Option("--model", "-m", metavar="NAME", help="A model's name, or a Transformers folder on this machine.")
]
DtypeOption = Annotated[
    Dtype,
    typer.Option(
        metavar="TYPE",
        help="Of the weights: float32, bfloat16, float16 or auto, which is bfloat16 where the hardware "
        "multiplies it, else float32.",
    ),
]
JsonOption = Annotated[bool, flag("--json", help="Print one JSON object and nothing else on standard output.")]
SeedOption = Annotated[int, typer.Option(metavar="N", min=0, help="The same seed gives the same answer.")]
SaveOption = Annotated[
    Path | None, typer.Option("--save", metavar="FILE", help="Write the trace here, for `anabranch view`.")
]
