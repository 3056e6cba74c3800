"""Long multiplication written out in ThreadWeaver's format: the generator, and the split into train, dev and test.

``47*36`` becomes (line breaks and spaces only here)::

    47*36=<Parallel><Outlines><Outline>1:6</Outline><Outline>2:30</Outline></Outlines>
    <Thread>
    1:A7B4*6: A7*6=42+0=42a2; B4*6=24+4=28b8; c2d0; c2b8a2=282</Thread><Thread>
    2:A7B4*30: a0; A7*3=21+0=21b1; B4*3=12+2=14c4; d1; d1c4b1a0=1410</Thread>
    </Parallel> 20a2 81b9 24c6 01d1; d1c6b9a2=1692

Letters are places, A and a the ones, B and b the tens …: capital ones in the multiplicand, small ones in products and
sums. A thread says its digits in the order of use, then works: digit * digit = product + carry = sum, and the digit
that comes out, with its place; at last the product the usual way round, and as a number. The join takes one column
after another: each thread's digit, then their sum's, with a mark ' for each ten that is carried; then again the number.
A place and a digit are one token, so each step finds what it needs by what it is, not by how far away it stands. A
multiplier with one digit that is not zero needs no threads: what a thread would write follows the ``=``.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass

PLACES, OPERAND = "abcdefgh", "ABCD"
DIGITS = 4  # of an operand, at most
HELD_OUT = 20  # one pair of operands in so many is for dev, one for test


@dataclass(frozen=True)
class Problem:
    """a, b: the operands. prompt: as a user writes it. items: the answer for `lesson`. threads: 0 = no fork."""

    a: int
    b: int
    prompt: str
    items: list[str | list[tuple[str, str]]]
    threads: int

    @property
    def answer(self) -> str:
        return str(self.a * self.b)


def threads_needed(b: int) -> int:
    """One a digit of the multiplier that is not zero; 0, no parallel block, where one or none is."""
    digits = sum(d != "0" for d in str(b))
    return digits if digits > 1 else 0


def partial_product(a: int, b: int, place: int) -> tuple[str, list[int]]:
    """The steps of a times b's digit at `place`; the text, and the product's digits, ones first, in all columns."""
    width = len(str(a)) + len(str(b))
    digit, carry = b // 10**place % 10, 0
    said = "".join(f"{OPERAND[i]}{d}" for i, d in enumerate(reversed(str(a)))) + f"*{digit}{'0' * place}:"
    out = [0] * place
    lines = ["".join(f"{PLACES[i]}0" for i in range(place))] if place else []
    for i, d in enumerate(map(int, reversed(str(a)))):
        total = d * digit + carry
        lines.append(f"{OPERAND[i]}{d}*{digit}={d * digit:02d}+{carry}={total:02d}{PLACES[len(out)]}{total % 10}")
        out.append(total % 10)
        carry = total // 10
    top = [carry] + [0] * (width - len(out) - 1)
    lines.append("".join(f"{p}{d}" for p, d in zip(PLACES[len(out) :], top, strict=False)))
    return said + ";".join(lines) + answer_line(out + top), out + top


def columns(numbers: list[list[int]]) -> tuple[str, list[int]]:
    """The sum of numbers of equal width, ones first, column by column."""
    text, out, carry = "", [], 0
    for place, digits in zip(PLACES, zip(*numbers, strict=True), strict=False):
        carry, digit = divmod(sum(digits) + carry, 10)
        text += "".join(map(str, digits)) + f"{place}{digit}" + "'" * carry
        out.append(digit)
    return text, out


def answer_line(digits: list[int]) -> str:
    """The digits with their places the usual way round, and the number."""
    number = _number(digits)
    return ";" + "".join(f"{PLACES[len(number) - 1 - i]}{d}" for i, d in enumerate(number)) + f"={number}"


def problem(a: int, b: int) -> Problem:
    """The whole trace of a * b."""
    for name, value in (("a", a), ("b", b)):
        if not 0 <= value < 10**DIGITS:
            raise ValueError(f"{name}={value}: operands have 1 to {DIGITS} digits")
    prompt, places = f"{a}*{b}", [i for i, d in enumerate(reversed(str(b))) if d != "0"]
    threads = threads_needed(b)
    if not threads:
        text, total = partial_product(a, b, places[0] if places else 0)
        items: list[str | list[tuple[str, str]]] = ["=" + text]
    else:
        outlines = "".join(f"<Outline>{t}:{b // 10**p % 10}{'0' * p}</Outline>" for t, p in enumerate(places, start=1))
        parts = [partial_product(a, b, p) for p in places]
        text, total = columns([part for _, part in parts])
        items = [
            f"=<Parallel><Outlines>{outlines}</Outlines>",
            [(str(t), text) for t, (text, _) in enumerate(parts, start=1)],
            f"</Parallel>{text}{answer_line(total)}",
        ]
    assert _number(total) == str(a * b)
    return Problem(a, b, prompt, items, threads)


def drill(rng: random.Random) -> tuple[str, str]:
    """A join without its threads' steps, of random numbers: what stands there, and what the model has to write.

    Sums and the answer are a tenth of a trace's tokens and the last to be learnt; this shows them in few tokens.
    """
    width = rng.choice((2, 3, 4, 5, 6, 7, 8))
    count = rng.choices((1, 2, 3, 4), (1, 2, 2, 2))[0]
    numbers = [[rng.randrange(10) for _ in range(width)] for _ in range(count)]
    top = rng.choice((0, 1, 2))  # leading zeros, as real products have them
    for number in numbers:
        number[width - min(top, width - 1) :] = [0] * min(top, width - 1)
    text, total = columns(numbers)
    if count == 1:  # the answer alone
        return "".join(f"{p}{d}" for p, d in zip(PLACES, total, strict=False)), answer_line(total)
    threads = "".join(
        f"<Thread>\n{t}:" + "".join(f"{p}{d}" for p, d in zip(PLACES, number, strict=False)) + "</Thread>"
        for t, number in enumerate(numbers, start=1)
    )
    return f"\n{threads}\n</Parallel>", f"{text}{answer_line(total)}"


def _number(digits: list[int]) -> str:
    return "".join(map(str, reversed(digits))).lstrip("0") or "0"


def split_of(a: int, b: int) -> str:
    """One of "train", "dev" and "test", by a hash of the pair in either order: no pair is in two of them."""
    digest = hashlib.sha256(f"{min(a, b)}*{max(a, b)}".encode()).digest()
    return {0: "dev", 1: "test"}.get(int.from_bytes(digest[:4], "big") % HELD_OUT, "train")


def draw(
    rng: random.Random, split: str, weights: tuple[float, ...] = (1, 2, 4, 10), zeros: float = 0.2
) -> tuple[int, int]:
    """A pair of operands of one split: lengths by `weights` (of 1, 2, … digits), uniform digits; in a share `zeros` of
    them the multiplier's digits behind the first are zero with probability 0.4, for other numbers of threads."""
    while True:
        n, m = (rng.choices(range(1, DIGITS + 1), weights)[0] for _ in range(2))
        a = rng.randrange(10 ** (n - 1) if n > 1 else 0, 10**n)
        b = rng.randrange(10 ** (m - 1) if m > 1 else 0, 10**m)
        if rng.random() < zeros:
            first, *rest = str(b)
            b = int(first + "".join("0" if rng.random() < 0.4 else d for d in rest))
        if split_of(a, b) == split:
            return a, b
