"""``anabranch view``: a saved trace as a tree with its texts."""

from __future__ import annotations

import json
from pathlib import Path

from anabranch.cli.common import Mistake, consoles


def run(path: Path, as_json: bool) -> None:
    """Read, check and draw."""
    if not path.is_file():
        raise Mistake(f"TRACE {str(path)!r}: no such file; `anabranch demo --save {path.name}` makes one")
    from anabranch import trace as traces

    try:
        trace = traces.load(path)
    except UnicodeDecodeError:
        raise Mistake(f"TRACE {str(path)!r}: not a text file, so not a trace") from None
    if as_json:
        print(json.dumps(trace.as_dict(), ensure_ascii=False))
        return
    from rich.markup import escape

    from anabranch.cli.display import Picture
    from anabranch.cli.score import card
    from anabranch.cli.story import Story, from_node

    out, _ = consoles()
    name = Path(trace.model).name or trace.model
    out.print(f"[bold]{escape(name)}[/bold]  [dim]{escape(trace.strategy)}, seed {trace.seed}[/dim]\n")
    story = Story()
    story.trunk = from_node(trace.tree)
    out.print(Picture(story, live=False))
    out.print()
    out.print(card(trace.metrics))
    for why in trace.malformed:
        out.print(f"format broken: {why}", style="yellow", markup=False)
