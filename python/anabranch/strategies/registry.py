"""Strategies by name: which there are, what each does, and how to build one from text.

Every strategy that `anabranch.strategies` exports is here by itself; a line in `anabranch.strategies.about` adds what a
listing says of it.
Names are read without regard to case, hyphens and underscores: "self-consistency", "self_consistency" and
"SelfConsistency" are one. A strategy with its options is written as in Python, ``self-consistency(n=4, vote=number)``,
and one around another as ``sequential(threadweaver)``.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from anabranch._check import nearest, plain_name
from anabranch.strategies.about import ABOUT, About
from anabranch.strategies.api.strategy import Strategy
from anabranch.strategies.option_values import import_object, kind_name, read, split

__all__ = [
    "Option",
    "StrategyInfo",
    "build",
    "describe",
    "find",
    "names",
    "parse",
    "register",
    "spelled",
    "split",
    "take_apart",
]


ABSTRACT = ("Strategy",)
ALIASES = {"none": "Plain"}

_registered: dict[str, Callable[..., Strategy]] = {}


@dataclass(frozen=True)
class Option:
    """A field of a strategy's dataclass. ``kind``: its type, in words; ``default``: its repr, None where required."""

    name: str
    kind: str
    default: str | None
    help: str = ""

    @property
    def required(self) -> bool:
        return self.default is None


@dataclass(frozen=True)
class StrategyInfo:
    """What `describe` tells."""

    name: str
    class_name: str
    summary: str
    forks: str
    when: str
    join: str
    options: tuple[Option, ...]


def register(name: str, make: Callable[..., Strategy]) -> None:
    """Add a strategy of one's own under `name` for this process: a `Strategy` subclass, or a function that makes one.

    >>> register("careful", Careful)
    >>> build("careful", {"n": "4"})

    Raises:
        ValueError: the name is taken or empty.
    """
    if not plain_name(name) or plain_name(name) in _table():
        raise ValueError(
            f"name={name!r}: {'empty' if not plain_name(name) else 'taken'}; pass another name for the strategy"
        )
    if not callable(make):
        raise TypeError(f"make={make!r}; pass a Strategy subclass or a function that returns a Strategy")
    _registered[name] = make


def names() -> list[str]:
    """Names of all strategies, sorted."""
    return sorted(name for name, _ in _table().values())


def find(name: str) -> Callable[..., Strategy]:
    """The class of a strategy by name; ValueError with the nearest names where there is none.

    A class that is not registered is found as ``module:Class``.
    """
    if ":" in name:
        try:
            found = import_object(name)
        except ValueError as error:
            raise ValueError(f"strategy {name!r}: {error}") from None
        if not callable(found) or (inspect.isclass(found) and not issubclass(found, Strategy)):
            raise ValueError(f"strategy {name!r}: {found!r:.60} is no Strategy class")
        return typing.cast(Callable[..., Strategy], found)
    return _lookup(name)[1]


def build(name: str, options: Mapping[str, Any] | None = None) -> Strategy:
    """A strategy from its name and options; a value that is text is read as its type asks.

    Numbers as in Python; true and false; "none" for None; a text as it stands, or in quotes with escapes; parts of a
    list between "|"; a function as ``module:name``; a strategy as `parse` reads it.

    >>> build("self-consistency", {"n": "4", "vote": "number"})
    SelfConsistency(n=4, vote='number', temperature=0.8, top_p=None, top_k=None, max_new_tokens=None, early_stop=False)

    Raises:
        ValueError: no such strategy or option (the nearest names are given), or a value that the option does not take.
    """
    make = find(name)
    kinds, known = _kinds(make), _fields(make)
    values = {}
    for given, value in (options or {}).items():
        field = next((f for f in known if plain_name(f) == plain_name(given)), None)
        if field is None:
            raise ValueError(
                f"strategy {name!r} has no option {given!r}; {_nearest(given, list(known)) or 'it takes none'}"
            )
        if field in values:
            raise ValueError(f"strategy {name!r}: option {field!r} is given twice; give it once")
        text = isinstance(value, str)
        values[field] = read(value, kinds.get(field, str), f"{name}: {field}", parse) if text else value
    if missing := [f for f, required in known.items() if required and f not in values]:
        raise ValueError(f"strategy {name!r} needs {', '.join(f'{f}=…' for f in missing)}")
    try:
        strategy = make(**values)
    except TypeError as error:
        raise ValueError(f"strategy {name!r}: {error}") from None
    if not isinstance(strategy, Strategy):
        raise ValueError(f"strategy {name!r}: {strategy!r:.60} is no Strategy")
    return strategy


def parse(text: str) -> Strategy:
    """A strategy from its name and options in one text.

    >>> parse("sequential(self-consistency(n=4))").strategy.n
    4

    Raises:
        ValueError: as `build`, and for a text that is neither a name nor ``name(option=value, …)``.
    """
    return build(*take_apart(text))


def take_apart(text: str) -> tuple[str, dict[str, Any]]:
    """Name and options of a text that `parse` reads, the options not read yet.

    Raises:
        ValueError: as `parse`.
    """
    match = re.fullmatch(r"\s*([\w.:-]+)\s*(?:\((.*)\))?\s*", text, re.DOTALL)
    if match is None:
        raise ValueError(f"strategy {text!r}: expected a name, or name(option=value, …)")
    name, inside = match[1], match[2]
    options: dict[str, Any] = {}
    for part in split(inside) if inside else []:
        given = re.match(r"([\w-]+)\s*=\s*(.*)", part, re.DOTALL)
        if given is None:  # without a name: the strategy that this one wraps
            first = next(iter(_fields(find(name))), None)
            if first is None or options:
                raise ValueError(f"strategy {text!r}: {part!r} is not option=value")
            options[first] = part
        elif given[1] in options:
            raise ValueError(f"strategy {text!r}: option {given[1]!r} is given twice; give it once")
        else:
            options[given[1]] = given[2]
    return name, options


def spelled(text: str) -> str:
    """One spelling of a text that `parse` reads: listed names, options in order, no white space between them.

    >>> spelled("Self_Consistency( vote=number, n=4 )")
    'self-consistency(n=4,vote=number)'

    Raises:
        ValueError: as `take_apart`.
    """
    name, options = take_apart(text)
    shown = name if ":" in name else _lookup(name)[0]
    kinds = _kinds(find(name))
    parts = []
    for key, value in sorted(options.items()):
        key = key.replace("-", "_")
        inner = inspect.isclass(kinds.get(key)) and issubclass(kinds[key], Strategy)
        parts.append(spelled(value) if inner else f"{key}={value.strip()}")
    return f"{shown}({','.join(parts)})" if parts else shown


def describe(name: str) -> StrategyInfo:
    """What a strategy forks, when, what its join does, and its options.

    >>> describe("aspects").when
    'at the end of the first line or sentence'

    Raises:
        ValueError: no such strategy; the nearest names are given.
    """
    shown, make = (name, find(name)) if ":" in name else _lookup(name)
    doc = inspect.getdoc(make) or ""
    class_name = getattr(make, "__name__", type(make).__name__)
    first = " ".join(doc.split("\n\n")[0].split())
    about = ABOUT.get(class_name) or About(first, "–", _join_of(make))
    helps = _option_helps(doc, list(_fields(make)))
    options = tuple(
        Option(field, kind_name(_kinds(make).get(field, Any)), _default(make, field), helps.get(field, ""))
        for field in _fields(make)
    )
    return StrategyInfo(shown, class_name, first, about.forks, about.when, about.join, options)


# ------------------------------------------------------------------------------------------------ names


def _kebab(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "-", name).lower()


def _table() -> dict[str, tuple[str, Callable[..., Strategy]]]:
    """Key → (name, class) of everything that the package exports and that was registered."""
    from anabranch import strategies

    table: dict[str, tuple[str, Callable[..., Strategy]]] = {}
    for exported in strategies.__all__:
        found = getattr(strategies, exported)
        if not (inspect.isclass(found) and issubclass(found, Strategy)) or exported in ABSTRACT:
            continue
        if any(required and field == "tags" for field, required in _fields(found).items()):
            continue  # Tagged: a format to be filled in, no strategy yet
        about = ABOUT.get(exported)
        table[plain_name(exported)] = ((about and about.name) or _kebab(exported), found)
    for name, make in _registered.items():
        table[plain_name(name)] = (name, make)
    return table


def _lookup(name: str) -> tuple[str, Callable[..., Strategy]]:
    table = _table()
    key = plain_name(ALIASES.get(plain_name(name), name))
    if key not in table:
        raise ValueError(f"no strategy {name!r}; {_nearest(name, [n for n, _ in table.values()])}")
    return table[key]


def _nearest(name: str, known: Sequence[str]) -> str:
    """The nearest of `known` names; all of them where none is near."""
    if close := nearest(name, known):
        return f"did you mean {' or '.join(close)}? All: {', '.join(sorted(known))}"
    return f"expected one of {', '.join(sorted(known))}" if known else ""


# ------------------------------------------------------------------------------------------------ options


def _fields(make: Callable[..., Strategy]) -> dict[str, bool]:
    """Option → whether it must be given."""
    if dataclasses.is_dataclass(make):
        missing = dataclasses.MISSING
        return {
            f.name: f.default is missing and f.default_factory is missing for f in dataclasses.fields(make) if f.init
        }
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(make).parameters.values()
    return {p.name: p.default is p.empty for p in parameters if p.kind in kinds}


def _kinds(make: Callable[..., Strategy]) -> dict[str, Any]:
    """Option → its type; where a hint names something that cannot be found, that one is read as text."""
    try:
        return typing.get_type_hints(make)
    except (NameError, TypeError):
        return {}


def _default(make: Callable[..., Strategy], field: str) -> str | None:
    if not dataclasses.is_dataclass(make):
        default = inspect.signature(make).parameters[field].default
        return None if default is inspect.Parameter.empty else repr(default)
    found = next(f for f in dataclasses.fields(make) if f.name == field)
    if found.default is not dataclasses.MISSING:
        return repr(found.default)
    return repr(found.default_factory()) if found.default_factory is not dataclasses.MISSING else None


def _join_of(make: Callable[..., Strategy]) -> str:
    default = _default(make, "join") if "join" in _fields(make) else None
    return default.strip("'") if default else "–"


def _option_helps(doc: str, fields: Sequence[str]) -> dict[str, str]:
    """What a docstring's ``name, other: text`` paragraphs say of each option."""
    helps: dict[str, str] = {}
    current: list[str] = []
    names = "|".join(map(re.escape, fields))
    doc = re.sub(rf"(?<=[.;]) (?=(?:{names})(?:, (?:{names}))*: )", "\n", doc) if names else ""
    for line in doc.splitlines():
        match = re.match(r"\s*(\w+(?:, \w+)*): (.*)", line)
        heads = match[1].split(", ") if match else []
        if heads and all(head in fields for head in heads):
            current = heads
            for head in heads:
                helps[head] = match[2].strip() if match else ""
        elif not line.strip():
            current = []
        else:
            for head in current:
                helps[head] += " " + line.strip()
    return helps
