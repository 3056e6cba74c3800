r"""What an answer says: a number, a list, an option's letter, an expression or words, and what is noted beside it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Literal

from anabranch.answers.numbers import quantity
from anabranch.answers.tidy import tidy

LONGEST = 2_000  # characters of an answer that is read; a longer one is compared as it is written

Kind = Literal["number", "list", "letter", "maths", "words"]


@dataclass(frozen=True)
class Reading:
    """An answer, read. Two with the same value and labels that agree are the same answer.

    kind, value: "number": a Fraction; "list": (opening bracket, closing bracket, elements as Readings), no brackets
        for sets and where none were written; "letter": an option's capital letter; "maths": an expression in LaTeX;
        "words": words, in one spelling.
    name: the variable that the value is given to ("x" of x = 5). unit: of a number ("cm", "%", "$"), or the text behind
        an option's letter. Both "" where there is none.
    """

    kind: Kind
    value: Fraction | tuple[str, str, tuple[Reading, ...]] | str
    name: str = ""
    unit: str = ""


@lru_cache(maxsize=4096)
def read(text: str) -> Reading:
    """What `text`, which is an answer and nothing else, says."""
    return Reading("words", text) if len(text) > LONGEST else _read(tidy(text), 0)


def _read(text: str, depth: int) -> Reading:
    if (found := quantity(text)) is not None:
        return Reading("number", found[0], "", found[1])
    if depth > 8:
        return Reading("words", words(text))
    if not depth and (option := _option(text)) is not None:
        return option
    if r"\begin" not in text:
        if (listed := _listed(text, depth)) is not None:
            return listed
        if (assigned := _assigned(text)) is not None:
            inner = _read(assigned[1], depth + 1)
            return Reading(inner.kind, inner.value, assigned[0] or inner.name, inner.unit)
    return Reading("maths", text) if is_maths(text) else Reading("words", words(text))


def words(text: str) -> str:
    """Words in one spelling: without case, outer punctuation and the spaces beside signs."""
    text = re.sub(r"\s+", " ", text).strip(" .,;:!?\"'*").casefold()
    return re.sub(r"\s*([^\w\s])\s*", r"\1", text)


# ------------------------------------------------------------------------------------------------ options

_OPTION = re.compile(
    r"(?:(?:[Oo]ption|[Cc]hoice|[Aa]nswer)\s+)?"
    r"(?:[(\[]([A-J])[)\]][.:]?|([A-J])[.):]|([A-J])(?=\s*$|\s+-+\s+\w{3})|\(([a-j])\)(?=\s*$|[.:]?\s+[A-Za-z]{2}))"
    r"(?:\s*$|\s+-*\s*(?=[\w\\($\ue000.-])(.+))",
    re.DOTALL,
)
_NEXT_OPTION = re.compile(r"(?<![A-Za-z])[A-J][.):]")


def _option(text: str) -> Reading | None:
    match = _OPTION.fullmatch(text)
    if match is None or _NEXT_OPTION.search(match[5] or ""):
        return None
    return Reading("letter", (match[1] or match[2] or match[3] or match[4]).upper(), "", words(match[5] or ""))


# ------------------------------------------------------------------------------------------------ structure

_NAME = re.compile(r"\\?[A-Za-z]+(?:_\{?\w+\}?)?'?(?:\s*\([A-Za-z\d, ]*\))?")
_STRONG = re.compile(r"(?:,\s*)?(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])|,(?=\s)|;|\\cup(?![A-Za-z])")
_COMMA = re.compile(",")
_OPEN, _CLOSE = "([{", ")]}"
_SIGNS = {r"\{": "{", r"\}": "}", r"\langle": "<", r"\rangle": ">"}


def split(text: str) -> list[str]:
    """The elements of a list: what stands between commas, semicolons, ands, ors and unions outside of all brackets.

    Beside another of these, or a comma and a space, a comma without one groups digits where it can: 1,234, 5.
    """
    parts = _cut(text, _STRONG)
    if len(parts) == 1:
        return _cut(text, _COMMA)
    return [inner for part in parts for inner in ([part] if quantity(part) is not None else _cut(part, _COMMA))]


def _cut(text: str, between: re.Pattern[str]) -> list[str]:
    parts, depth, last, at = [], 0, 0, 0
    while at < len(text):
        match = None if depth else between.match(text, at)
        if match is not None:
            parts.append(text[last:at].strip())
            at = last = match.end()
        else:
            depth += (text[at] in _OPEN) - (text[at] in _CLOSE)
            at += 1
    return [*parts, text[last:].strip()]


def _enclosed(text: str) -> tuple[str, str, str] | None:
    """(opening bracket, inside, closing bracket) where one pair stands around the whole."""
    match = re.fullmatch(r"(\\?\{|[(\[<]|\\langle)(.*?)(\\?\}|[)\]>]|\\rangle)", text, re.DOTALL)
    if match is None:
        return None
    depth = 0
    for c in match[2]:
        depth += (c in _OPEN) - (c in _CLOSE)
        if depth < 0:
            return None
    begin, end = _SIGNS.get(match[1], match[1]), _SIGNS.get(match[3], match[3])
    if depth or begin + end not in ("()", "[]", "(]", "[)", "{}", "<>"):
        return None
    return begin, match[2].strip(), end


def _listed(text: str, depth: int) -> Reading | None:
    """A list in brackets or without; what holds one ± is the list of both; None where it is one thing."""
    if text == r"\emptyset":
        return Reading("list", ("", "", ()))
    begin = end = ""
    parts = split(text)
    if (around := _enclosed(text)) is not None:
        begin, inside, end = around
        parts = split(inside) if inside else []
        if len(parts) == 1 and begin != "[":
            return None if begin == "<" else _read(parts[0], depth + 1)
    elif len(parts) == 1:
        one = re.fullmatch(r"((?:(?!\\pm).)*)\\pm(?![A-Za-z])((?:(?!\\pm).)*)", text, re.DOTALL)
        if one is None:
            return None
        before, behind = (one[i].strip() for i in (1, 2))
        parts = [
            f"{before}+{behind}" if before and before[-1] not in "(={[" else f"{before}{behind}",
            f"{before}-{behind}",
        ]
    elif r"\cup" in text:
        begin = r"\cup"
    if not all(parts):
        return Reading("words", words(text))
    bare = ("", "") if begin == "{" else (begin, end)
    return Reading("list", (*bare, tuple(_read(part, depth + 1) for part in parts)))


def _assigned(text: str) -> tuple[str, str] | None:
    """(name, value) of x = 5, of x = 2 + 3 = 5 and of 2 + 3 = 5 (which has no name); None for other equations."""
    if (member := re.fullmatch(rf"({_NAME.pattern})\s*\\in(?![A-Za-z])(.+)", text, re.DOTALL)) is not None:
        return re.sub(r"\s", "", member[1]), member[2].strip()
    parts = [p.strip() for p in re.split(r"(?<![<>!=]):?=(?!=)", text)]
    if len(parts) < 2 or not all(parts):
        return None
    if _NAME.fullmatch(parts[0]):
        return re.sub(r"\s", "", parts[0]), parts[-1]
    if not re.search("[A-Za-z]", re.sub(r"\\[A-Za-z]+", "", "".join(parts[:-1]))):
        return (re.sub(r"\s", "", parts[-1]), parts[-2]) if _NAME.fullmatch(parts[-1]) else ("", parts[-1])
    return None


_FUNCTIONS = frozenset(
    "sin cos tan cot sec csc log ln exp sqrt max min gcd lcm arcsin arccos arctan sinh cosh tanh".split()
)
_SHORT = frozenset("no on is it of or to at by in if an as so we he do go up us my me be am pm".split())


def is_maths(text: str) -> bool:
    """Whether `text` reads as one expression, not as words, a range (3-5), a date, a time or a ratio."""
    bare = re.sub(r"\\(?:begin|end)\s*\{[a-z]+\}|\\[A-Za-z]+", " ", text)
    if re.fullmatch(r"[\d\s.,:/-]*", text) and re.search(r"\d\s*[-:]+\s*[\d.]|/.*/", text):
        return False
    if re.search(r"\\[lcdv]?dots|\.\.|\d\.\d+\.\d", text) or not re.fullmatch(
        r"[A-Za-z\d\s+\-*/^_=<>!|().,{}\[\]\\&;]+", text
    ):
        return False
    runs = re.findall(r"[A-Za-z]+", bare)
    if re.search(r"(?<![A-Za-z])[A-Za-z]{1,2} +\d", bare):
        return False  # a name and a number: A 57
    if any((len(run) > 2 or run.casefold() in _SHORT) and run not in _FUNCTIONS for run in runs):
        return False
    return bool(re.search(r"[\d+*/^=<>|\\-]|^[A-Za-z]$", text))
