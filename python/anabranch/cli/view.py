"""``anabranch view``: a saved trace as a tree with its texts; replayed through a model if that is wished."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from anabranch.cli.common import Mistake, load_model
from anabranch.viz.console import consoles

if TYPE_CHECKING:
    from anabranch.records.trace import Trace


def run(path: Path, as_json: bool, replay: bool = False, model: str | None = None) -> None:
    """Read, check and draw; `replay`: through `model` (None: the one that wrote it) first."""
    if not path.is_file():
        raise Mistake(f"TRACE {str(path)!r}: no such file; `anabranch demo --save {path.name}` makes one")
    from anabranch.records import trace as traces

    try:
        trace = traces.load(path)
    except UnicodeDecodeError:
        raise Mistake(f"TRACE {str(path)!r}: not a text file, so not a trace") from None
    note = ""
    if replay:
        trace, note = _replay(trace, model)
    if as_json:
        print(json.dumps(trace.as_dict(), ensure_ascii=False))
        return
    from rich.markup import escape

    from anabranch.viz.card import card
    from anabranch.viz.story import Story, from_node
    from anabranch.viz.terminal import Picture

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
    if note:
        out.print(f"\n{note}", markup=False)


def _replay(trace: Trace, name: str | None) -> tuple[Trace, str]:
    """The trace with what a model makes of its tokens now, and a line about that."""
    from dataclasses import replace

    import anabranch as ab
    from anabranch import models
    from anabranch.engine import logprob_pairs

    name = name or trace.model
    if name not in models.names() and not Path(name).expanduser().is_dir():
        raise Mistake(f"--replay: {name!r}, which wrote the trace, is not on this machine; pass --model NAME")
    model, tokenizer, _ = load_model(name, "float32")
    again = ab.replay(trace, ab.Engine(model, tokenizer))
    note = f"replayed: the same tree, {again.metrics.sampled_tokens} sampled tokens scored"
    if pairs := list(logprob_pairs(trace, again)):
        note += f"; log-probabilities within {max(abs(a - b) for a, b in pairs):.1e} of the recorded {len(pairs)}"
    return replace(trace, tree=again.tree), note
