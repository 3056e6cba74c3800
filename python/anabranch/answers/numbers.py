r"""Numbers: their exact values, in all the ways they are written, with their units; and where they stand in a text."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from anabranch.answers.tidy import balanced, cleaned

LONGEST = 1_000  # digits of a number
_GROUPED = (
    r"[1-9]\d{0,2}(?:,\d{3})+(?:\.\d+)?"  # 1,234.5
    r"|[1-9]\d?(?:,\d{2})+,\d{3}(?:\.\d+)?"  # 12,34,567
    r"|[1-9]\d{0,2}(?:[ '_]\d{3})+(?:[.,]\d+)?"  # 1 234,5
    r"|[1-9]\d{0,2}(?:\.\d{3})+,\d+|[1-9]\d{0,2}(?:\.\d{3}){2,}"  # 1.234,5 and 1.234.567
)
PLAIN = rf"(?:(?:{_GROUPED})(?!\d)|\d+(?:\.\d+)?|(?<![\w.])\.\d+)"
_TIMES = r"\s*(?:\\times(?![A-Za-z])|\\cdot(?![A-Za-z])|\*|x)\s*10\s*(?:\^|\*\*)\s*"
_POWER = rf"(?:[eE]([-+]?\d{{1,3}})|{_TIMES}(?:\{{\s*)?([-+]?\d{{1,3}})(?:\s*\}})?)"
_FRAC = rf"\\frac\s*(?:\{{\s*([-+]?\s*{PLAIN})\s*\}}\s*\{{\s*({PLAIN})\s*\}}|(\d)\s*(\d)(?!\d))"
_NUMBER = re.compile(rf"({PLAIN})\.?{_POWER}?")
_REPEATING = re.compile(r"(\d*)\.(\d*)\\(?:overline|bar)\s*(?:\{(\d+)\}|(\d))")
_RATIO = re.compile(rf"({PLAIN})\s*/\s*({PLAIN})")
_MIXED = re.compile(rf"(\d+)(?:\s+(\d+)\s*/\s*(\d+)|\s*{_FRAC})")
_FRACTION = re.compile(_FRAC)


def value_of(text: str) -> Fraction | None:
    """The exact value of a number without a unit: digits, a fraction, a mixed number, with a power of ten."""
    text = text.strip()
    sign = 1
    if text[:1] in ("-", "+"):
        sign, text = (-1 if text[0] == "-" else 1), text[1:].lstrip()
        if text[:1] in ("-", "+"):
            return None
    if len(text) > 1 and text[0] == "(" and text[-1] == ")" and "," not in text and balanced(text[1:-1], "()"):
        inner = value_of(text[1:-1])
        return None if inner is None else sign * inner
    found = _unsigned(text)
    return None if found is None else sign * found


def _unsigned(text: str) -> Fraction | None:
    if len(text) > LONGEST:
        return None
    if (m := _NUMBER.fullmatch(text)) is not None:
        return _decimal(m[1]) * Fraction(10) ** int(m[2] or m[3] or 0)
    if (m := _RATIO.fullmatch(text)) is not None:
        return _divided(m[1], m[2])
    if (m := _FRACTION.fullmatch(text)) is not None:
        return _divided(m[1] or m[3], m[2] or m[4])
    if (m := _MIXED.fullmatch(text)) is not None:
        part = _divided(m[2] or m[4] or m[6], m[3] or m[5] or m[7])
        return int(m[1]) + part if part is not None and 0 <= part < 1 else None
    if (m := _REPEATING.fullmatch(text)) is not None:
        again = m[3] or m[4]
        return Fraction(m[1] + m[2] or "0") / 10 ** len(m[2]) + Fraction(
            int(again), (10 ** len(again) - 1) * 10 ** len(m[2])
        )
    return None


def _decimal(text: str) -> Fraction:
    """The exact value of unsigned digits, grouped in whatever way."""
    if text.count(".") > 1 or text.rfind(",") > text.rfind(".") >= 0:  # dots group: 1.234.567 and 1.234,5
        text = text.replace(".", "").replace(",", ".")
    elif re.search(r"[ '_]", text):
        text = text.replace(",", ".")
    return Fraction(re.sub(r"[ '_,]", "", text))


def _divided(over: str, under: str) -> Fraction | None:
    above, below = value_of(over), value_of(under)
    return above / below if above is not None and below else None


def written(value: Fraction) -> str:
    """The shortest decimal of an exact value, or a fraction where no decimal ends."""
    twos = fives = 0
    rest = value.denominator
    while rest % 2 == 0:
        rest, twos = rest // 2, twos + 1
    while rest % 5 == 0:
        rest, fives = rest // 5, fives + 1
    if rest != 1:
        return f"{value.numerator}/{value.denominator}"
    places = max(twos, fives)
    digits = str(abs(value.numerator) * 10**places // value.denominator).rjust(places + 1, "0")
    whole, behind = digits[: len(digits) - places], digits[len(digits) - places :]
    return "-" * (value < 0) + whole + "." * bool(places) + behind


# ------------------------------------------------------------------------------------------------ units

DOLLAR = "\ue000"  # a dollar sign that is money, as `tidy` has it
CURRENCY = {DOLLAR: "$", "€": "€", "£": "£", "¥": "¥", "₹": "₹", "¢": "¢", "₩": "₩", "₽": "₽", "₿": "₿"}
_MARKS = "".join(CURRENCY)
_SPELLINGS = {
    "dollar": "$", "usd": "$", "euro": "€", "eur": "€", "gbp": "£", "yen": "¥", "jpy": "¥", "rupee": "₹", "inr": "₹",
    "rs": "₹", "cent": "¢", "percent": "%", "pct": "%", "per cent": "%", "percentage": "%", "deg": "degree",
}  # fmt: skip
_SCALES = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
# Words behind a number that make it another number, or no number at all.
_NOT_UNITS = frozenset(
    "pi sqrt sin cos tan log ln exp mod e i and or to x plus minus times over out of divided by squared cubed "
    "factorial choose negative point below above half halves third thirds quarter quarters fourth fourths fifth "
    "fifths sixth sixths eighth eighths tenth tenths hundredth hundredths thousandth thousandths st nd rd th is "
    "are was were not nor if when than but".split()
)
# Of one or two letters; others are variables (5 x, 5ab), as is a single letter without a space (5m).
_SHORT = frozenset(
    "m g s h L l N J W V A K C F cm mm km nm um kg mg ml mL kB kb MB GB TB Mb Hz kW kV ft lb oz in yd mi hr am pm "
    "AM PM Pa eV px Rs rs Wh cc dB".split()
)
_ATTACHED = frozenset("min sec hrs lbs mph kmh kWh deg gal USD EUR GBP".split())
_UNIT = re.compile(r"[A-Za-zµμΩ]+(?:\^?\{?-?[1-9]\}?)?(?:[ /*.-]+[A-Za-zµμΩ]+(?:\^?\{?-?[1-9]\}?)?){0,4}\.?")


def unit_of(text: str) -> tuple[str, int] | None:
    """A unit in one spelling, and the factor that stands in it (5 million): None where it is no unit."""
    text = text.strip()
    if text in ("", "%", *CURRENCY):
        return CURRENCY.get(text, text), 1
    names = text.split()
    if _UNIT.fullmatch(text) is None or any(n.casefold() in _NOT_UNITS for n in re.findall(r"[A-Za-z]+", text)):
        return None
    factor = 1
    while names and names[0].casefold().rstrip("s") in _SCALES:
        factor *= _SCALES[names.pop(0).casefold().rstrip("s")]
    if names:
        first = re.match(r"[A-Za-zµμΩ]+", names[0])
        if first is not None and len(first[0]) < 3 and first[0].isascii() and first[0] not in _SHORT:
            return None
    unit = " ".join(_singular(n) for n in names)
    return _SPELLINGS.get(unit, unit), factor


def _singular(word: str) -> str:
    word = re.sub(r"[{}^.]", "", word)
    if len(word) <= 2 and word != "Rs":
        return word  # mb is not MB
    word = word.casefold()
    if re.search(r"(?:ch|sh|x|ss)es$", word):
        return word[:-2]
    return word[:-1] if word.endswith("s") and len(word) > 3 and not word.endswith("ss") else word


_WHOLE = re.compile(
    rf"(?P<sign>[-+]?)\s*(?P<mark>[{_MARKS}]?)\s*(?P<digits>[-+]?\s*[\d.\\(].*?)"
    rf"(?P<unit>%|[{_MARKS}]|(?<=[\d}}\s)%])[A-Za-zµμΩ][A-Za-zµμΩ\d^{{}} /*.-]*)?",
    re.DOTALL,
)


def quantity(text: str) -> tuple[Fraction, str] | None:
    """(value, unit) of a tidy number, None where `text` is something else; a percentage is its share of one."""
    plain = value_of(text)
    if plain is not None:
        return plain, ""
    match = _WHOLE.fullmatch(text)
    if match is None:
        return None
    behind = match["unit"] or ""
    if match["sign"] and match["digits"][:1] in ("-", "+"):
        return None
    letters = re.split("[^A-Za-z]", behind)[0]
    if letters and not match["digits"][-1].isspace() and (len(letters) in (1, 3) and letters not in _ATTACHED):
        return None  # 5m and 5abc may be products
    value, found = value_of(match["sign"] + match["digits"]), unit_of(behind)
    if value is None or found is None:
        return None
    unit, factor = found
    if mark := match["mark"]:
        if unit not in ("", CURRENCY[mark]):
            return None
        unit = CURRENCY[mark]
    return value * factor / (100 if unit == "%" else 1), unit


# ------------------------------------------------------------------------------------------------ within a text


@dataclass(frozen=True)
class Found:
    """A number within a text: text[start:end], with its sign. unit: of a currency whose mark stands before it."""

    start: int
    end: int
    value: Fraction
    unit: str


_IN_TEXT = re.compile(
    rf"(?<![_\d])(?<!\d\.)(?:{_MIXED.pattern}(?!\s*/)|{_FRAC}|{PLAIN}\s*/\s*{PLAIN}(?!\s*/\s*\d)"
    rf"|{PLAIN}\s*(?:\^|\*\*)\s*(?:\{{\s*\d{{1,3}}\s*\}}|\d{{1,3}})(?!\d)|{PLAIN}{_POWER}(?!\d)|{PLAIN})"
)
_RAISED = re.compile(rf"({PLAIN})\s*(?:\^|\*\*)\s*\{{?\s*(\d{{1,3}})\s*\}}?")


def find_numbers(text: str) -> list[Found]:
    """The numbers of a text, each as long as it can be read; `text` is `cleaned` (see `tidy`).

    A "-" is a sign where it touches the number and nothing before it (x=-5, not 3-5), and with a space behind "=", a
    bracket, a colon or "is" (not in 7 - 5, nor where it begins a line of a list).
    """
    found = []
    for match in _IN_TEXT.finditer(text):
        body = match[0].rstrip()
        raised = _RAISED.fullmatch(body)
        value = _unsigned(body) if raised is None else _raised(raised[1], int(raised[2]))
        if value is None:  # a division by zero, or too long
            continue
        start, unit = match.start(), ""
        if (mark := re.search(rf"([{_MARKS}])\s?$", text[max(0, start - 2) : start])) is not None:
            start, unit = start - len(mark[0]), CURRENCY[mark[1]]
        if (sign := _SIGN.search(text[max(0, start - 12) : start])) is not None:
            start, value = start - len(sign[0]) + sign[0].rindex("-"), -value
        found.append(Found(start, match.start() + len(body), value, unit))
    return found


def _raised(base: str, power: int) -> Fraction | None:
    return _decimal(base) ** power if len(base) * power <= LONGEST else None


_SIGN = re.compile(r"(?<![-\w)}\]%.])-$|(?:[=:(\[{,<>]|\b(?:is|was|are|be|equals|gets?|gives|to))[^\S\n]*-[^\S\n]+$")


def cleaned_numbers(text: str) -> tuple[str, list[Found]]:
    """`text` in one spelling, and its numbers."""
    text = cleaned(text)
    return text, find_numbers(text)
