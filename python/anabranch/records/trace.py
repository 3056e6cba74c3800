"""Traces: a finished generation as versioned JSON, to keep, to view, to compare and to replay; checked field by field
when read.

Layout (version 2)::

    {"schema": "anabranch.records.trace", "version": 2,
     "model": str, "strategy": str, "seed": int, "config": {…},
     "prompt_token_ids": [int], "token_ids": [int], "text": str | null, "answers": any JSON, "malformed": [str],
     "tree": {"id", "role", "token_ids", "text", "start", "stop", "forked_at", "ended", "fate",
              "runs": [{"kind", "token_ids", "position", "source", "spliced", "logprobs", "kv_segment"}],
              "forgotten": [as runs, with "cut": [begin, logged, spliced]],
              "children": [nodes], "sees": [[id, tokens]],
              "log": [{"do", "token_ids", "children", "mode", "length", "headers", "segments",
                       "clock", "position", "logged", "turns", "sights"}],
              "turns": [[turn, tokens]], "sights": [{"begin", "others", "lined_up", "same_step"}],
              "live_since": int | null},
     "metrics": {…}, "pieces": {id: str | [byte]} | null}

``pieces`` is what each token id reads as in the middle of a text (its bytes, where they are no whole characters), null
without a tokenizer and missing in traces from before it was kept. ``logprobs`` is null unless they were asked for
(``generate(logprobs=True)``). ``log`` is what was done to a thread, in order (`anabranch.records.actions.Action`):
`ab.replay` does it again. ``kv_segment``, ``segments`` and ``cut`` may be missing (0, none, not known); ``turns``,
``sights`` and ``live_since`` are those of `Node`, and may be left out, as may ``logged`` and what follows it in a log.
Version 1, which had neither log nor log-probabilities and fewer metrics, is still read; it cannot be replayed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from anabranch.records.actions import Action
from anabranch.records.files import write_whole
from anabranch.records.joins import JOINS
from anabranch.records.metrics import Metrics, overhead_of
from anabranch.records.result import Cut, Node, Result, Run, Sight

__all__ = ["SCHEMA", "VERSION", "Trace", "load", "save"]

Piece = str | tuple[int, ...]  # what a token reads as: text, or the bytes of a part of a character

SCHEMA, VERSION = "anabranch.records.trace", 2
_LATER = ("draft_tokens", "accepted_tokens")  # metrics that traces of this version may lack: there were none yet


@dataclass(frozen=True)
class Trace:
    """One finished generation. ``version`` is the layout's (see the module docstring)."""

    model: str
    strategy: str
    seed: int
    config: Mapping[str, Any]
    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    text: str | None
    tree: Node
    metrics: Metrics
    answers: Any = None
    malformed: tuple[str, ...] = ()
    pieces: Mapping[int, Piece] | None = None
    version: int = field(default=VERSION)

    @classmethod
    def of(cls, result: Result) -> Trace:
        """The trace of a `Result`."""
        info = result.info
        return cls(
            model=info["model"],
            strategy=info["strategy"],
            seed=info["seed"],
            config=_plain(info["config"]),
            prompt_token_ids=result.prompt_token_ids,
            token_ids=result.token_ids,
            text=result.text,
            tree=result.tree,
            metrics=result.metrics,
            answers=_plain(result.answers),
            malformed=result.malformed,
            pieces=info.get("pieces"),
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain dict, as it is written."""
        return {"schema": SCHEMA, **_plain(asdict(self))}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as JSON; a file already there is replaced only once the new one is whole."""
        write_whole(path, json.dumps(self.as_dict(), ensure_ascii=False, indent=1) + "\n")

    @classmethod
    def from_dict(cls, data: Any) -> Trace:
        """Check `data` field by field; ValueError names the first field that is wrong."""
        _want(data, dict, "trace")
        if data.get("schema") != SCHEMA:
            raise ValueError(f"trace.schema: expected {SCHEMA!r}, got {data.get('schema')!r}; is this file a trace?")
        version = _get(data, "version", "trace", int)
        if version == 1:
            data = _from_version_1(data)
        elif version != VERSION:
            raise ValueError(
                f"trace.version: {version} is not readable here (this is version {VERSION}); "
                "use the anabranch that wrote it"
            )
        metrics = _get(data, "metrics", "trace", dict)
        known = {f.name for f in fields(Metrics)}
        metrics = {**dict.fromkeys(_LATER, 0), **metrics}
        for f in fields(Metrics):
            if f.name in metrics:
                continue
            raise ValueError(f"trace.metrics.{f.name}: missing")
        for name, value in metrics.items():
            if name not in known:
                raise ValueError(f"trace.metrics.{name}: unknown")
            if name not in ("threads_per_block", "seconds"):
                _want(value, (int, float), f"trace.metrics.{name}")
        tree = _node(_get(data, "tree", "trace", dict), "trace.tree")
        return cls(
            model=_get(data, "model", "trace", str),
            strategy=_get(data, "strategy", "trace", str),
            seed=_get(data, "seed", "trace", int),
            config=_get(data, "config", "trace", dict),
            prompt_token_ids=_ids(data, "prompt_token_ids", "trace"),
            token_ids=_ids(data, "token_ids", "trace"),
            text=_get(data, "text", "trace", (str, type(None))),
            tree=tree,
            metrics=Metrics(**{**metrics, "threads_per_block": _ids(metrics, "threads_per_block", "trace.metrics")}),
            answers=data.get("answers"),
            malformed=tuple(_list(data, "malformed", "trace", lambda v, at: _want(v, str, at))),
            pieces=_pieces(data),
        )


def save(trace: Trace | Result, path: str | os.PathLike[str]) -> None:
    """Write a trace (or a result's) to `path`."""
    (trace.trace() if isinstance(trace, Result) else trace).save(path)


def load(path: str | os.PathLike[str]) -> Trace:
    """Read and check a trace; ValueError names the file and the field that is wrong."""
    with open(path, encoding="utf-8") as file:
        try:
            data = json.load(file)
        except json.JSONDecodeError as error:
            raise ValueError(f"{os.fspath(path)}: not JSON ({error}); was the file cut short?") from None
    try:
        return Trace.from_dict(data)
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)}: {error}") from None


def _from_version_1(data: Mapping[str, Any]) -> dict[str, Any]:
    """As version 2, with nothing made up: what was not kept then is null, empty or 0."""

    def grown(node: Any) -> Any:
        if not isinstance(node, dict):
            return node  # the reader will say what is wrong with it
        runs = {
            name: [{**run, "logprobs": None} if isinstance(run, dict) else run for run in node[name]]
            for name in ("runs", "forgotten")
            if isinstance(node.get(name), list)
        }
        children = [grown(child) for child in node["children"]] if isinstance(node.get("children"), list) else None
        return {**node, **runs, **({} if children is None else {"children": children}), "log": []}

    metrics = _get(data, "metrics", "trace", dict)
    seconds = _get(metrics, "seconds", "trace.metrics", dict)
    deciding, share = overhead_of({k: _want(v, (int, float), f"trace.metrics.seconds.{k}") for k, v in seconds.items()})
    new = {"overhead_seconds": deciding, "overhead": share, "tokens_physical_then": 0}
    return {**data, "version": VERSION, "tree": grown(data.get("tree")), "metrics": {**metrics, **new}}


def _plain(value: Any) -> Any:
    """JSON's types only; anything else by its repr (a strategy may return what it likes)."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value if value is None or isinstance(value, (str, int, float, bool)) else repr(value)


def _want(value: Any, kind: Any, at: str) -> Any:
    # bool is an int to Python, but not in a trace.
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        names = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise ValueError(f"{at}: expected {names}, got {value!r:.60}")
    return value


def _get(data: Mapping[str, Any], name: str, at: str, kind: Any) -> Any:
    if name not in data:
        raise ValueError(f"{at}.{name}: missing")
    return _want(data[name], kind, f"{at}.{name}")


def _list(data: Mapping[str, Any], name: str, at: str, item: Callable[[Any, str], Any]) -> list[Any]:
    values = _get(data, name, at, (list, tuple))
    return [item(value, f"{at}.{name}[{i}]") for i, value in enumerate(values)]


def _natural(value: Any, at: str) -> int:
    number: int = _want(value, int, at)
    if number < 0:
        raise ValueError(f"{at}: expected a number ≥ 0, got {value}")
    return number


def _ids(data: Mapping[str, Any], name: str, at: str) -> tuple[int, ...]:
    return tuple(_list(data, name, at, _natural))


def _pieces(data: Mapping[str, Any]) -> dict[int, Piece] | None:
    pieces = _want(data.get("pieces"), (dict, type(None)), "trace.pieces")
    if pieces is None:
        return None
    for token, text in pieces.items():
        if not token.isdecimal():
            raise ValueError(f"trace.pieces: {token!r} is no token id")
        if not isinstance(_want(text, (str, list, tuple), at := f"trace.pieces[{token!r}]"), str):
            for byte in text:
                if _natural(byte, at) > 255:
                    raise ValueError(f"{at}: {byte} is no byte")
    return {int(token): text if isinstance(text, str) else tuple(text) for token, text in pieces.items()}


def _run(data: Any, at: str) -> Run:
    _want(data, dict, at)
    kind = _get(data, "kind", at, str)
    if kind not in ("prompt", "inserted", "sampled", "joined"):
        raise ValueError(f"{at}.kind: expected 'prompt', 'inserted', 'sampled' or 'joined', got {kind!r}")
    return Run(
        kind=kind,
        token_ids=_ids(data, "token_ids", at),
        position=_natural(_get(data, "position", at, int), f"{at}.position"),
        source=_get(data, "source", at, (str, type(None))),
        spliced=_get(data, "spliced", at, bool),
        logprobs=_logprobs(data, at),
        kv_segment=_natural(data.get("kv_segment", 0), f"{at}.kv_segment"),
        cut=_cut(data.get("cut"), f"{at}.cut"),
    )


def _cut(data: Any, at: str) -> Cut | None:
    if data is None:
        return None
    if len(_want(data, (list, tuple), at)) != 3:
        raise ValueError(f"{at}: expected two numbers and whether it was spliced, got {data!r:.60}")
    return Cut(_natural(data[0], at), _natural(data[1], at), _want(data[2], bool, at))


def _logprobs(data: Mapping[str, Any], at: str) -> tuple[float, ...] | None:
    if _get(data, "logprobs", at, (list, tuple, type(None))) is None:
        return None
    values = tuple(_list(data, "logprobs", at, lambda v, at: _want(v, (int, float), at)))
    if len(values) != len(data["token_ids"]):
        raise ValueError(f"{at}.logprobs: {len(values)} of them for {len(data['token_ids'])} tokens")
    return values


ACTIONS = ("insert", "sample", "fork", "spawn", "join", "kill", "truncate", "skip")


def _action(data: Any, at: str) -> Action:
    _want(data, dict, at)
    do, mode = _get(data, "do", at, str), _get(data, "mode", at, (str, type(None)))
    if do not in ACTIONS:
        raise ValueError(f"{at}.do: expected one of {', '.join(ACTIONS)}, got {do!r}")
    if mode not in (None, "killed", "discarded", *JOINS):
        raise ValueError(f"{at}.mode: expected a join mode, 'killed' or 'discarded', got {mode!r}")
    length = _get(data, "length", at, (int, type(None)))
    clock = _want(data.get("clock"), (int, type(None)), f"{at}.clock")
    position = _want(data.get("position"), (int, type(None)), f"{at}.position")  # older traces have none
    return Action(
        do=do,
        token_ids=_ids(data, "token_ids", at),
        children=tuple(_list(data, "children", at, lambda v, at: _want(v, str, at))),
        mode=mode,
        length=None if length is None else _natural(length, f"{at}.length"),
        headers=tuple(
            _list(data, "headers", at, lambda v, at: None if v is None else _ids({"header": v}, "header", at))
        ),
        clock=None if clock is None else _natural(clock, f"{at}.clock"),
        segments=_ids(data, "segments", at) if "segments" in data else (),
        position=None if position is None else _natural(position, f"{at}.position"),
        logged=_ids(data, "logged", at) if "logged" in data else (),
        **_live(data, at),
    )


def _seen(data: Any, at: str) -> tuple[str, int]:
    if len(_want(data, (list, tuple), at)) != 2:
        raise ValueError(f"{at}: expected a thread and how many tokens of it, got {data!r:.60}")
    return _want(data[0], str, at), _natural(data[1], at)


def _turn(data: Any, at: str) -> tuple[int, int]:
    _want(data, (list, tuple), at)
    if len(data) != 2:
        raise ValueError(f"{at}: expected a turn and a number of tokens, got {data!r:.60}")
    return _natural(data[0], at), _natural(data[1], at)


def _live(data: Mapping[str, Any], at: str) -> dict[str, Any]:
    """``turns`` and ``sights``, which may be left out."""
    data = {"turns": [], "sights": [], **data}
    return {name: tuple(_list(data, name, at, item)) for name, item in (("turns", _turn), ("sights", _sight))}


def _sight(data: Any, at: str) -> Sight:
    _want(data, dict, at)
    same_step = _get(data, "same_step", at, str)
    if same_step not in ("all", "before", "none"):
        raise ValueError(f"{at}.same_step: expected 'all', 'before' or 'none', got {same_step!r}")
    return Sight(
        begin=_natural(_get(data, "begin", at, int), f"{at}.begin"),
        others=tuple(_list(data, "others", at, lambda v, at: _want(v, str, at))),
        lined_up=_get(data, "lined_up", at, bool),
        same_step=same_step,
    )


def _node(data: Any, at: str) -> Node:
    _want(data, dict, at)
    role = _get(data, "role", at, str)
    if role not in ("trunk", "fork", "fresh"):
        raise ValueError(f"{at}.role: expected 'trunk', 'fork' or 'fresh', got {role!r}")
    node = Node(
        id=_get(data, "id", at, str),
        role=role,
        token_ids=_ids(data, "token_ids", at),
        text=_get(data, "text", at, (str, type(None))),
        start=_natural(_get(data, "start", at, int), f"{at}.start"),
        stop=_natural(_get(data, "stop", at, int), f"{at}.stop"),
        forked_at=_natural(_get(data, "forked_at", at, int), f"{at}.forked_at"),
        ended=_get(data, "ended", at, (str, type(None))),
        fate=_get(data, "fate", at, (str, type(None))),
        runs=tuple(_list(data, "runs", at, _run)),
        forgotten=tuple(_list(data, "forgotten", at, _run)),
        children=tuple(_list(data, "children", at, _node)),
        sees=tuple(_list(data, "sees", at, _seen)) if "sees" in data else (),  # older traces have none
        log=tuple(_list(data, "log", at, _action)),
        live_since=_get({"live_since": None, **data}, "live_since", at, (int, type(None))),
        **_live(data, at),
    )
    held = [t for run in node.runs if run.kind != "prompt" for t in run.token_ids]
    if held != list(node.token_ids):
        raise ValueError(
            f"{at}.runs: hold {len(held)} tokens that are not those of {at}.token_ids ({len(node.token_ids)})"
        )
    return node
