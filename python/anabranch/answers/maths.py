r"""math-verify, used so that no text can hang or fail it: the equality of two expressions.

math-verify limits its time with signals, which exist in the main thread alone and make a result depend on the machine.
Here its time-outs are off. What can hold the interpreter inside one operation on huge integers is refused before
(`tame`), and the rest has a budget of calls, which is the same on every machine and in every thread.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib.util import find_spec
from math import comb
from typing import Any

LONGEST = 200  # characters of an expression
LARGEST = 100_000  # exponent, or product of the exponents where powers are nested
TERMS = 1_000  # of an expanded power of a bracket, at most
DEPTH = 12  # of brackets in one another
BUDGET = 1_000_000  # calls of Python functions, one to two seconds; a usual comparison takes 300,000 at most


def require(who: str) -> None:
    """ModuleNotFoundError with the remedy unless math-verify is there (it is not imported)."""
    if find_spec("math_verify") is None:
        raise ModuleNotFoundError(
            f"{who}: answers in mathematical notation are compared by math-verify, which is not installed; "
            "pip install math-verify",
            name="math_verify",
        )


def equal(a: str, b: str) -> bool:
    """Whether two expressions in LaTeX (without $) are equal for every value of their variables.

    False where either cannot be read, or where it would take too long.
    """
    return a == b or _equal(*sorted((a, b)))


@lru_cache(maxsize=4096)
def _equal(a: str, b: str) -> bool:
    if not (tame(a) and tame(b)):
        return False
    letters = [set(re.findall(r"[A-Za-z]", re.sub(r"\\[A-Za-z]+", "", text))) for text in (a, b)]
    if letters[0] != letters[1] and {c.lower() for c in letters[0]} == {c.lower() for c in letters[1]}:
        return False  # R is not r: math-verify looks at no variable's case
    _library()  # an error of its own where it is missing
    try:
        with _budget():
            one, other = _parsed(_exact(a)), _parsed(_exact(b))
            # Not symmetric: an assignment is unwrapped on one side only.
            return bool(one) and bool(other) and _verified(one, other) and _verified(other, one)
    except (Exception, _TooLong):
        return False


def tame(text: str) -> bool:
    """Whether no step of evaluating `text` can be a single operation on integers too large to compute with."""
    if len(text) > LONGEST or re.search(r"\\(?:prod|sum|int|lim|operatorname|def|newcommand)|\d{100}", text):
        return False
    if _depth(text) > DEPTH or re.search(r"\^\s*(?:\{[^{}]*\}|\S)\s*\^", text):
        return False
    if not all(re.search(r"(?:(?<!\d)\d{1,3}|[A-Za-z])$", text[: m.start()]) for m in re.finditer("!", text)):
        return False  # a factorial of more than three digits, of a bracket or of a factorial
    if any(int(n) > 999 for part in re.findall(r"\\d?t?binom(.{0,24})", text) for n in re.findall(r"\d+", part)):
        return False
    letters = set(re.findall(r"[A-Za-z]", re.sub(r"\\[A-Za-z]+", "", text)))
    terms = len(letters) + text.count(r"\sqrt")
    total, largest, nested, expanded = 1, 1, False, 1
    for match in re.finditer(r"\^\s*(\{|\S)", text):
        exponent = _group(text, match.start(1)) if match[1] == "{" else match[1]
        if re.search(r"[\^!]", exponent):
            return False
        size = 1
        for n in re.findall(r"\d+", exponent):
            size *= max(1, int(n))
        total, largest = total * size, max(largest, size)
        if text[: match.start()].rstrip()[-1:] in (")", "}", "]", "|"):
            nested |= "^" in text[: match.start()]
            expanded *= size
    if largest > LARGEST or (nested and total > LARGEST):
        return False
    return not terms or (expanded <= 1000 and comb(terms + expanded, expanded) <= TERMS)


def _depth(text: str) -> int:
    depth = deepest = 0
    for c in text:
        depth += (c in "([{") - (c in ")]}")
        deepest = max(deepest, depth)
    return deepest


def _group(text: str, start: int) -> str:
    """What stands in the braces that open at `start`; all the rest where they do not close."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "{") - (text[i] == "}")
        if not depth:
            return text[start + 1 : i]
    return text[start + 1 :]


def _exact(text: str) -> str:
    """Decimals as fractions: sympy would make binary floats of them, and these are compared by rounding."""
    return re.sub(
        r"(\d*)\.(\d+)", lambda m: rf"{{\frac{{{int(m[1] + m[2])}}}{{1{'0' * len(m[2])}}}}}", text
    )  # fmt: skip


@lru_cache(maxsize=1)
def _library() -> tuple[Any, Any, list[Any]]:
    require("answers")
    import math_verify
    from latex2sympy2_extended import NormalizationConfig

    for name in ("parser", "grader"):
        logging.getLogger(f"math_verify.{name}").addFilter(_not_about_timeouts)
    # Units are read before, and boxes too: what comes here is an expression, whole.
    how = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=False, boxed="none")
    config = math_verify.LatexExtractionConfig(boxed_match_priority=-1, normalization_config=how)
    return math_verify.parse, math_verify.verify, [config]


def _not_about_timeouts(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("Timeout is disabled")


def _parsed(text: str) -> list[Any]:
    parse, _, configs = _library()
    return parse(f"${text}$", extraction_config=configs, fallback_mode="no_fallback", parsing_timeout=None)


def _verified(gold: list[Any], target: list[Any]) -> bool:
    _, verify, _ = _library()
    return verify(gold, target, strict=True, float_rounding=30, numeric_precision=60, timeout_seconds=None)


class _TooLong(BaseException):
    """The budget is spent. No Exception: sympy catches those and goes on."""


@contextmanager
def _budget() -> Iterator[None]:
    """Raise `_TooLong` in the block after `BUDGET` calls."""
    before, left = sys.getprofile(), BUDGET

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal left
        left -= event == "call"
        if left < 0:
            raise _TooLong

    sys.setprofile(count)
    try:
        yield
    finally:
        sys.setprofile(before)
