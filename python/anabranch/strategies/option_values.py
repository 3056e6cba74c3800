"""Values of strategy options from text, by their types, and how a listing writes those types."""

from __future__ import annotations

import ast
import collections.abc
import importlib
import inspect
import re
import types
import typing
from collections.abc import Callable
from typing import Any

from anabranch.strategies.api.strategy import Strategy

__all__ = ["import_object", "kind_name", "read", "split"]


def read(text: str, kind: Any, what: str, strategy: Callable[[str], Strategy]) -> Any:
    """A value of type `kind` from `text`.

    Numbers as in Python; true and false; "none" for None; a text as it stands, or in quotes as a Python string, with
    its escapes; parts of a list between "|"; a function or any other object as ``module:name``. strategy: reads one.

    >>> read("'\\n'|.", tuple[str, ...], "after", parse)
    ('\\n', '.')

    Raises:
        ValueError: the text is no such value; the message names `what` and what is expected.
    """
    choices = list(typing.get_args(kind)) if _is_union(kind) else [kind]
    if type(None) in choices and text.strip().lower() in ("none", "null"):
        return None
    choices = [choice for choice in choices if choice is not type(None)]
    if str in choices and len(split(text, "|")) < 2:
        choices = [choice for choice in choices if not _is_list(choice)]
    for choice in sorted(choices, key=_breadth):  # the narrowest first: anything is a text
        try:
            return _read(text.strip(), choice, what, strategy)
        except _Unfit as error:
            if error.args and str not in choices:
                raise ValueError(f"{what}={text!r}: {error}") from None
    raise ValueError(f"{what}={text!r}; expected {kind_name(kind)}")


def split(text: str, at: str = ",") -> list[str]:
    """Parts of `text` between `at`, those inside brackets or quotes left alone: ``a(x=1,y=2),b`` is two.

    Raises:
        ValueError: a bracket or quote is not closed.
    """
    parts, depth, quote = [""], 0, ""
    for char in text:
        if quote:
            quote = "" if char == quote else quote
        elif char in "\"'" and not parts[-1].rstrip()[-1:].isalnum():  # no apostrophe
            quote = char
        else:
            depth += (char in "([{") - (char in ")]}")
        if char == at and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += char
        if depth < 0:
            break
    if depth or quote:
        raise ValueError(f"{text!r}: a bracket or quote is not closed; write name(option=value, …)")
    return [part.strip() for part in parts if part.strip()]


def import_object(path: str) -> Any:
    """The object at ``module:name``; ValueError where it cannot be imported."""
    module, _, name = path.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"cannot import {name!r} from {module!r} ({error})") from None
    return found


def kind_name(kind: Any) -> str:
    """A type as a listing writes it."""
    if _is_union(kind):
        return " | ".join(kind_name(k) for k in typing.get_args(kind))
    if kind is type(None):
        return "none"
    origin = typing.get_origin(kind)
    if origin is typing.Literal:
        return " | ".join(str(value) for value in typing.get_args(kind))
    if _is_list(kind):
        items = [kind_name(a) for a in typing.get_args(kind) if a is not Ellipsis]
        return f"list of {' or '.join(dict.fromkeys(items)) or 'text'}"
    if collections.abc.Callable in (kind, origin):
        return "module:function"
    plain = {str: "text", int: "int", float: "float", bool: "true | false", Any: "text"}
    return plain[kind] if kind in plain else getattr(kind, "__name__", str(kind)).lower()


class _Unfit(ValueError):
    """The text is no value of that type; with a message where it looks like one."""


def _is_union(kind: Any) -> bool:
    return typing.get_origin(kind) in (typing.Union, types.UnionType)


def _is_list(kind: Any) -> bool:
    return kind in (tuple, list) or typing.get_origin(kind) in (tuple, list, collections.abc.Sequence)


def _breadth(kind: Any) -> int:
    order: list[Any] = [bool, int, float]
    return order.index(kind) if kind in order else 9 if kind in (str, Any, object) else 5


def _read(text: str, kind: Any, what: str, strategy: Callable[[str], Strategy]) -> Any:
    origin = typing.get_origin(kind)
    if kind is bool:
        if text.lower() not in ("true", "false", "yes", "no"):
            raise _Unfit
        return text.lower() in ("true", "yes")
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            raise _Unfit from None
    if origin is typing.Literal:
        for value in typing.get_args(kind):
            if str(value) == _bare(text):
                return value
        raise _Unfit
    if _is_list(kind):
        arguments = [a for a in typing.get_args(kind) if a is not Ellipsis]
        items = [read(part, arguments[0] if arguments else str, what, strategy) for part in split(text, "|")]
        return items if list in (kind, origin) else tuple(items)
    if inspect.isclass(kind) and issubclass(kind, Strategy):
        return strategy(text)
    if kind in (str, Any, object):
        return _bare(text)
    if re.fullmatch(r"[\w.]+:[\w.]+", text):
        try:
            return import_object(text)
        except ValueError as error:
            raise _Unfit(str(error)) from None
    raise _Unfit


def _bare(text: str) -> str:
    if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'":
        try:
            return str(ast.literal_eval(text))
        except (SyntaxError, ValueError):
            raise _Unfit("not a Python string") from None
    return text
