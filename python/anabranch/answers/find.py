r"""Where a text has its answer: in a box, in its last number, in an option's letter."""

from __future__ import annotations

import re

from anabranch.answers.numbers import cleaned_numbers, written
from anabranch.answers.tidy import cleaned, unwrap

BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*")
_JOINS = re.compile(r"[\s$]*(?:[,;]|,?\s*(?:\\text\s*\{\s*)?(?:and|or)(?:\s*\})?)[\s$]*")


def boxed(text: str) -> str | None:
    r"""The content of the last ``\boxed{…}`` (or ``\fbox{…}``); None without one, and where the last one never closes.

    Braces nest. Empty boxes do not count. Boxes that a comma or "and" alone stands between are one list.
    """
    boxes: list[tuple[int, int, str]] = []
    at = 0
    while (match := BOX.search(text, at)) is not None:
        end = _closed(text, match.end())
        if end is None:
            return None  # cut off, and with it the answer
        content = text[match.end() : end].strip()
        if content.startswith("{"):
            content = content[1:-1].strip()
        if content:
            boxes.append((match.start(), end, content))
        at = end
    if not boxes:
        return None
    last = [boxes[-1][2]]
    for one, following in zip(reversed(boxes[:-1]), reversed(boxes[1:]), strict=True):
        if not _JOINS.fullmatch(text[one[1] : following[0]]):
            break
        last.insert(0, one[2])
    return ", ".join(dict.fromkeys(last))


def _closed(text: str, start: int) -> int | None:
    """One past the end of a box's content, which begins at `start`: a group in braces, or what stands up to a space."""
    if text[start : start + 1] != "{":
        bare = re.match(r"[^\s$]*?(?=[.,;:]?(?:[\s$]|$))", text[start:])
        return start + (bare.end() if bare is not None else 0)
    depth = 0
    for match in re.finditer(r"\\.|[{}]", text[start:], re.DOTALL):
        depth += (match[0] == "{") - (match[0] == "}")
        if not depth and match[0] == "}":
            return start + match.end()
    return None


def number(text: str) -> str | None:
    """The last number of a text, without its unit, as the shortest exact decimal (or fraction): "1,234" is "1234".

    A fraction is one number. A "-" between two numbers is no sign.
    """
    _, found = cleaned_numbers(text)
    return written(found[-1].value) if found else None


# ------------------------------------------------------------------------------------------------ letters

MARK = re.compile(
    r"\banswers?\b(?:\s+[A-Za-z]+){0,5}?\s+(?:is|was|are)\b(?!\w|n't)|\banswers?\b[^\w\s]{0,3}\s?[:=]", re.IGNORECASE
)
_AT_START = re.compile(
    r"\W{0,4}?(?:(?:the\s+)?(?:correct\s+)?(?:option|choice|answer)\s+(?:is\s+)?)?"
    r"(?:[(\[]\s*([A-Ja-j])\s*[)\]]|([A-HJ])(?:\*\*)?(?=[.):]|\s*$|\s+[-(]|,?\s+(?:because|since|as|which)\b)"
    r"|(I)(?:\*\*)?(?=[.):]|\s*$))",
    re.IGNORECASE,
)
_ALONE = re.compile(r"(?<![\w'\\$^_])(?:([B-HJ])|(A)(?!\s+[a-z]|\s*$(?<=A ))|\(([A-Ja-j])\))(?![\w'+*/=<>^_])")
_OPTION_WORD = re.compile(r"(?:option|choice|answer|letter)\s*(?:is)?\s*\W{0,3}(A)(?!\w)", re.IGNORECASE)


def letter(text: str) -> str | None:
    r"""The option's letter (A to J) that a text chooses; None where it chooses none.

    The last of: what a box holds; what follows "answer is" or "answer:"; else, in the last line with one, the letter
    that begins it ("B. A common mistake", "(B)"), or the last that stands alone. "A" before a word is the article.
    """
    box = boxed(text)
    if box is not None and (found := starts_with_letter(cleaned(box))) is not None:
        return found
    text = cleaned(text)
    for mark in reversed(list(MARK.finditer(text))):
        if (found := starts_with_letter(text[mark.end() :].lstrip())) is not None:
            return found
    for line in reversed(text.splitlines()):
        if (found := starts_with_letter(line.strip())) is not None:
            return found
        alone = [m[1] or m[2] or m[3] for m in _ALONE.finditer(line)] or [m[1] for m in _OPTION_WORD.finditer(line)]
        if alone:
            return alone[-1].upper()
    return None


def starts_with_letter(text: str) -> str | None:
    """The option's letter that a text begins with, set apart from what follows."""
    text = unwrap(text)
    match = _AT_START.match(text)
    if match is None:
        return None
    found = match[1] or match[2] or match[3]
    bracketed = match[1] is not None
    return found.upper() if bracketed or found.isupper() else None
