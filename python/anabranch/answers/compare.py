"""Which answers are the same: for a vote (classes of answers), and against what was expected (right or not)."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from anabranch.answers.maths import equal
from anabranch.answers.read import Reading, read


def same_value(a: Reading, b: Reading) -> bool:
    """Whether two answers have the same value, whatever names and units stand beside it; an equivalence."""
    return _same(a, b, labelled=False)


def matches(given: Reading | str, expected: Reading | str) -> bool:
    """Whether an answer is the expected one.

    The same value, and no other name or unit: where one side leaves the unit (or the variable's name) out, the other's
    is taken. "%" is a unit of a hundredth, and a bare number above 1 may leave it out: 50 % is 0.5, 1/2 and 50.
    """
    a, b = (read(x) if isinstance(x, str) else x for x in (given, expected))
    return _same(a, b, labelled=True)


def labels(reading: Reading) -> tuple[str, ...]:
    """Names and units of an answer and of its elements, in order; all of them "" for one without any."""
    inner = reading.value[2] if isinstance(reading.value, tuple) else ()
    return (reading.name, reading.unit, *(label for element in inner for label in labels(element)))


def _same(a: Reading, b: Reading, labelled: bool) -> bool:
    if labelled:
        if a.name and b.name and a.name != b.name:
            return False
        if a.unit and b.unit and a.unit != b.unit:
            return False
        if _percent(a, b) or _percent(b, a):
            return True
    if a.kind == b.kind == "number":
        return a.value == b.value
    if a.kind == "list" or b.kind == "list":
        return a.kind == b.kind and _same_lists(a, b, labelled)
    if a.kind in ("letter", "words") or b.kind in ("letter", "words"):
        return "number" not in (a.kind, b.kind) and _spelled(a) == _spelled(b)
    return equal(_latex(a), _latex(b))


def _percent(share: Reading, bare: Reading) -> bool:
    if not isinstance(share.value, Fraction) or not isinstance(bare.value, Fraction):
        return False
    return share.unit == "%" and not bare.unit and abs(bare.value) > 1 and share.value * 100 == bare.value


def _spelled(reading: Reading) -> str:
    return str(reading.value).replace(" ", "").casefold()


def _latex(reading: Reading) -> str:
    value = reading.value
    if isinstance(value, Fraction):
        return str(value.numerator) if value.denominator == 1 else rf"\frac{{{value.numerator}}}{{{value.denominator}}}"
    return str(value)


def _same_lists(a: Reading, b: Reading, labelled: bool) -> bool:
    assert isinstance(a.value, tuple) and isinstance(b.value, tuple)
    ours, theirs = a.value[2], b.value[2]
    if a.value[:2] != b.value[:2] or len(ours) != len(theirs):
        return False
    if a.value[0] in ("", r"\cup") and not any(e.kind == "words" for e in (*ours, *theirs)):  # in any order
        return _paired(ours, list(theirs), labelled)
    return all(_same(x, y, labelled) for x, y in zip(ours, theirs, strict=True))


def _paired(ours: Sequence[Reading], theirs: list[Reading], labelled: bool) -> bool:
    for element in ours:
        at = next((i for i, other in enumerate(theirs) if _same(element, other, labelled)), None)
        if at is None:
            return False
        del theirs[at]
    return True
