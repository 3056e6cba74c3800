"""``anabranch view``: a saved trace as a tree with its texts, as a page or for Perfetto; replayed first if wished."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from anabranch.cli.common import USAGE, Mistake, check_save, load_model
from anabranch.viz.console import consoles

if TYPE_CHECKING:
    from anabranch.records.trace import Trace


def run(
    path: Path, as_json: bool, replay: bool = False, model: str | None = None, page: Path | None = None,
    perfetto: Path | None = None,
) -> None:  # fmt: skip
    """Read, check and draw; `replay`: through `model` (None: the one that wrote it) first. page, perfetto: files."""
    if not path.is_file():
        raise Mistake(f"TRACE {str(path)!r}: no such file; `anabranch demo --save {path.name}` makes one")
    _check_targets(path, page, perfetto)
    from anabranch.records import trace as traces

    try:
        trace = traces.load(path)
    except UnicodeDecodeError:
        raise Mistake(f"TRACE {str(path)!r}: not a text file, so not a trace") from None
    note = ""
    if replay:
        trace, note = _replay(trace, model)
    if page is not None or perfetto is not None:
        _write(trace, page, perfetto)
        if not as_json:
            return
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


def _check_targets(trace: Path, page: Path | None, perfetto: Path | None) -> None:
    """Neither file may be the trace, nor both the same one."""
    targets = [(option, path) for option, path in (("--html", page), ("--perfetto", perfetto)) if path is not None]
    for option, path in targets:
        check_save(path, option)
        if path.exists() and path.samefile(trace):
            raise Mistake(f"{option} {str(path)!r} is the trace itself; name another file", USAGE)
    if len({path.resolve() for _, path in targets}) < len(targets):
        raise Mistake(f"--html and --perfetto are both {str(page)!r}; name two files", USAGE)


def _write(trace: Trace, page: Path | None, perfetto: Path | None) -> None:
    from anabranch import viz

    _, err = consoles()
    for path, save, what in (
        (page, viz.save_html, "open it in a browser"),
        (perfetto, viz.save_perfetto, "open it at https://ui.perfetto.dev"),
    ):
        if path is not None:
            save(trace, path)
            err.print(f"{path} written; {what}", style="dim", markup=False, soft_wrap=True)
    if page is not None and trace.pieces is None:
        err.print("the trace does not tell what its tokens read as; --replay adds that", style="dim", soft_wrap=True)


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
    return replace(trace, tree=again.tree, pieces=trace.pieces or again.trace().pieces), note
