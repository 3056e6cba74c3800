"""A trace as one HTML file that needs nothing else: no server, no network, no other file.

The page may run the two scripts and the one style sheet that are in it, by their hashes, and may load and connect to
nothing (its content security policy). What a model wrote is data in it, never markup.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import os
from importlib import resources
from typing import TYPE_CHECKING, Any

from anabranch.records.files import write_whole
from anabranch.records.result import Result
from anabranch.viz.timeline import Lane, Timeline, timeline

if TYPE_CHECKING:
    from anabranch.records.metrics import Metrics
    from anabranch.records.trace import Trace

__all__ = ["page", "save_html"]

SCRIPTS = ("model.js", "chart.js", "details.js", "page.js")
INSERTED, CUT = 1, 2  # bits of a token's kind, as in model.js


def save_html(trace: Trace | Result, path: str | os.PathLike[str]) -> None:
    """Write `page` to `path`; a file already there is replaced only once the new one is whole.

    >>> ab.viz.save_html(result, "answer.html")

    Raises:
        TypeError, ValueError: as `timeline`.
        OSError: the file cannot be written; nothing is left behind.
    """
    write_whole(path, page(trace))


def page(trace: Trace | Result) -> str:
    """The HTML of a trace, or of a `Result`.

    Raises:
        TypeError, ValueError: as `timeline`.
    """
    whole = trace.trace() if isinstance(trace, Result) else trace
    drawn = timeline(whole)
    style, library = _file("view.css"), _file("d3.min.js")
    # One scope, so that nothing of the page is global.
    script = '(() => {\n"use strict";\n' + "\n".join(_file(name) for name in SCRIPTS) + "\n})();\n"
    policy = (
        f"default-src 'none'; script-src {_hash(library)} {_hash(script)}; style-src {_hash(style)}; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    model = os.path.basename(whole.model.rstrip("/")) or whole.model
    parts = {
        "policy": policy,
        "title": html.escape(f"{model}: anabranch"),
        "heading": html.escape(model),
        "about": html.escape(f"{whole.strategy.partition('(')[0]}, seed {whole.seed}"),
        "strategy": html.escape(whole.strategy),
        "facts": _facts(whole.metrics, whole.malformed),
        "style": style,
        "library": library,
        "script": script,
        "data": _embedded(_data(drawn)),
    }
    template = _file("view.html")
    pieces = template.split("@")  # text, name, text, …
    return "".join(parts[piece] if i % 2 else piece for i, piece in enumerate(pieces))


def _file(name: str) -> str:
    return (resources.files("anabranch.viz") / "page" / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _embedded(data: Any) -> str:
    """JSON that cannot end the element that it stands in, whatever a model wrote."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _data(drawn: Timeline) -> dict[str, Any]:
    pieces = drawn.pieces
    return {
        "length": drawn.length,
        "lanes": [_lane(lane) for lane in drawn.lanes],
        "arrows": [[a.kind, a.source, a.leaves, a.target, a.arrives, a.mode] for a in drawn.arrows],
        "usage": [list(u) for u in drawn.usage()],
        "ids": drawn.ids,
        "owner": drawn.owner,
        "pieces": None if pieces is None else {str(token): piece for token, piece in pieces.items()},
    }


def _lane(lane: Lane) -> dict[str, Any]:
    known = any(token.logprob is not None for token in lane.tokens)
    prompt = next((step.ranges[0] for step in lane.steps if step.do == "prompt"), (0, 0))
    return {
        "number": lane.number,
        "id": lane.id,
        "parent": lane.parent,
        "depth": lane.depth,
        "role": lane.role,
        "fate": lane.fate,
        "ended": lane.ended,
        "begin": lane.begin,
        "end": lane.end,
        "gone": lane.gone,
        "prompt": prompt,
        "shared": lane.shared,
        "steps": [[s.do, s.clock, s.ranges, s.lanes, s.mode, s.length] for s in lane.steps],
        "clocks": [token.clock for token in lane.tokens],
        "positions": [token.position for token in lane.tokens],
        "kinds": [(token.kind == "inserted") * INSERTED + token.cut * CUT for token in lane.tokens],
        "logprobs": [_rounded(token.logprob) for token in lane.tokens] if known else None,
    }


def _rounded(logprob: float | None) -> float | None:
    """To what a page shows; JSON has no infinities."""
    return None if logprob is None or logprob != logprob else max(-1e4, min(0.0, round(logprob, 4)))


def _facts(m: Metrics, malformed: tuple[str, ...]) -> str:
    facts = [
        (f"{m.total_tokens:,}", f"tokens, {m.critical_path_tokens:,} on the critical path"),
        (f"{m.token_speedup:.2f}×", "token speed-up") if m.num_threads else ("1", "thread: it did not fork"),
        *([(f"{m.num_threads:,}", f"threads, at most {m.max_concurrency} at once")] if m.num_threads else []),
        *([(f"{m.sharing:.2f}×", "cache shared")] if m.num_threads else []),
        (f"{m.pages_peak:,}", f"pages at most, {m.pages_copied:,} copied on write"),
        (f"{m.longest_context:,}", "tokens in the longest context"),
        (f"{m.wall_seconds:.2f} s", f"{m.steps:,} steps, {100 * m.overhead:.1f} % of the time for deciding"),
    ]
    items = [f"<li><b>{html.escape(value)}</b> <span>{html.escape(what)}</span></li>" for value, what in facts]
    items += [f'<li class="bad">format broken: {html.escape(why)}</li>' for why in malformed[:5]]
    return "\n".join(items)
