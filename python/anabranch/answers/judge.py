r"""Whether a text that may say more than its answer gives the expected one; in doubt it does not."""

from __future__ import annotations

import re

from anabranch.answers.compare import matches
from anabranch.answers.find import BOX, MARK, boxed, starts_with_letter
from anabranch.answers.numbers import Found, cleaned_numbers, quantity, unit_of, written
from anabranch.answers.read import Reading, read
from anabranch.answers.tidy import tidy

_ENDS = re.compile(r"(?:(?:<\|[^|<>]*\|>|</?s>|<eos>)\s*)+$")  # end-of-sequence tokens as tokenizers spell them
_SENTENCE = re.compile(r"[.!?](?=[\s*\"')]|$)")
# Words that deny what stands beside them, or make another number of it.
_DENIES = re.compile(
    r"(?<!\w)(?:not|never|no|nor|neither|cannot|\w+n't|or|than|half|twice|double|triple|squared|cubed|minus|plus|times"
    r"|negative|factorial|root|least|most|between|quarters?|thirds?|fourths?|fifths?|tenths?)(?!\w)",
    re.IGNORECASE,
)
_SIGN = re.compile(r"[-+*/^<>=\\|!_~]")


def final_answer(text: str) -> tuple[str, bool]:
    r"""What `text` gives as its answer, and whether it is marked; else the last paragraph.

    Marks: "The answer is …", "Answer: …", "#### …", a box, and a last line that ends in "= " and a number. The last
    mark counts; after one that is followed by a box that never closes there is no answer ("").
    """
    text = _ENDS.sub("", text).strip()
    at = max((m.end() for m in (*MARK.finditer(text), *re.finditer("####", text))), default=-1)
    box = max((m.start() for m in BOX.finditer(text)), default=-1)
    if box >= at and box >= 0:
        return boxed(text) or "", True
    if at >= 0:
        lines = text[at:].split("\n")
        return next((line for line in lines if re.search(r"\w", line)), lines[0]), True
    last = text.splitlines()[-1] if text else ""
    behind = last.rpartition("=")
    if behind[1] and quantity(tidy(behind[2])) is not None:
        return (last if read(last).name else behind[2]), True
    return re.split(r"\n\s*\n", text)[-1], False


def is_right(text: str, answer: str) -> bool:
    """Whether `text` ends in `answer`.

    A marked answer must be the expected one: the same number, list, expression or words (see `matches`), or a sentence
    whose only number it is. For models that were never taught to mark it the last paragraph counts: it must end in the
    expected number, or hold the expected words and numbers in order and no other number. What denies itself ("not 5",
    "5 or 6") is wrong.
    """
    given, marked = final_answer(text)
    expected = read(answer)
    if not given.strip() or not answer.strip():
        return False
    if any(matches(piece, expected) for piece in _pieces(given, marked)):
        return True
    if expected.kind == "number":
        return _only_number(given, expected) if marked else _last_number(given, expected)
    if expected.kind == "letter" and not expected.unit:
        return _letter(given, str(expected.value), marked)
    return _worded(given, answer, marked)


def _pieces(given: str, marked: bool) -> list[str]:
    """What may be the answer as it stands: all of it, its first sentence, the only mathematics within that."""
    pieces = [given.strip(" :")]
    if marked:
        first = sentence(given)
        pieces.append(first.strip(" :"))
        inside = re.findall(r"\$([^$]+)\$|\\\((.+?)\\\)", first)
        rest = re.sub(r"\$[^$]+\$|\\\(.+?\\\)", " ", first)
        if len(inside) == 1 and not re.search(r"\d", rest) and not _SIGN.search(rest) and not _DENIES.search(rest):
            if not re.search(r"[A-Za-z]\s*$", inside[0][0] or inside[0][1]) or not re.search(r"[\d$%]", rest):
                pieces.append(inside[0][0] or inside[0][1])
    return [p for p in pieces if p]


def sentence(text: str) -> str:
    """The first sentence of a text, without its full stop."""
    text = text.strip()
    match = _SENTENCE.search(text)
    return text[: match.start()] if match is not None else text


# ------------------------------------------------------------------------------------------------ numbers in prose


def _only_number(given: str, expected: Reading) -> bool:
    first = sentence(given)
    if read(first).kind == "maths" or expected.name:  # a name was looked at before
        return False
    if "=" in first:
        first = first.rpartition("=")[2]
        if matches(first, expected):
            return True
    text, found = cleaned_numbers(first)
    if len(found) != 1 or _DENIES.search(text) or text[found[0].end :].startswith(".."):
        return False
    number = found[0]
    if text[number.start - 1 : number.start].isalpha() and number.start:
        return False
    rest = text[: number.start] + " " + text[number.end :]
    if re.search(r"\d", rest) or _SIGN.search(re.sub(r"(?<=[A-Za-z])-(?=[A-Za-z])|^\s*~", " ", rest)):
        return False
    return _same_number(text, number, expected)


def _last_number(given: str, expected: Reading) -> bool:
    text, found = cleaned_numbers(given)
    if not found:
        return False
    number = found[-1]
    if text[number.start - 1 : number.start].isalpha() and number.start:
        return False
    before, behind = text[: number.start].rstrip(" "), text[number.end :]
    if expected.name or re.search(r"\d[,.:]$|\\[A-Za-z]+\s*\{?\s*$", before) or behind.startswith(".."):
        return False
    doubt = re.search(rf"(?:{_DENIES.pattern}|(?<!\w)(?:to|and))\s*(?:\w+\s*)?$", before, re.IGNORECASE)
    if doubt or re.search(r"\d", behind) or re.search(r"[-+*/^<>\\|]$", before):
        return False
    if re.match(r"\s*[-+*/^<>=\\|!_]", behind) or _DENIES.search(re.split(r"[.!?\n]", behind)[0]):
        return False
    return _same_number(text, number, expected)


def _same_number(text: str, number: Found, expected: Reading) -> bool:
    """Whether a number in prose, with the words behind it that can be its unit, is the expected one."""
    behind = re.match(r"(-?\s*)((?:%|[^\W\d_]|[€£¥₹¢\ue000])?[^\W\d_]*(?:\s+[^\W\d_]+){0,2})", text[number.end :])
    gap, names = (behind[1], behind[2].split()) if behind is not None else ("", [])
    if names and not gap and names[0].isalpha() and (len(names[0]) < 2 or unit_of(names[0]) is None):
        return False  # 12th, 12x
    units = [u for n in (3, 2, 1) if (u := unit_of(" ".join(names[:n]))) is not None]
    unit, factor = next((u for u in units if u[0] == expected.unit), units[-1] if units else ("", 1))
    unit = number.unit or (unit if expected.unit or unit == "%" else "")
    value = number.value * factor / (100 if unit == "%" else 1)
    return matches(Reading("number", value, "", unit), expected)


# ------------------------------------------------------------------------------------------------ letters and words


def _letter(given: str, expected: str, marked: bool) -> bool:
    if starts_with_letter(given.strip(" :")) == expected:
        return True
    if marked:
        return False
    last = re.split(r"(?<=[.!?])\s+", given.strip())[-1]
    alone = re.findall(r"(?<![\w'])([A-J])(?!\w)", last)
    return alone == [expected] and not _DENIES.search(last) and re.search(rf"{expected}[\s.!?)*]*$", last) is not None


def _worded(given: str, answer: str, marked: bool) -> bool:
    wanted, got = _tokens(answer), _tokens(given)
    if not wanted or not got:
        return False
    if got == wanted:
        return True
    if marked or _DENIES.search(_DENIES.sub("", given, 0) if _DENIES.search(answer) else given):
        return _tokens(sentence(given)) == wanted if marked else False
    numbers = [w for w in wanted if w[-1].isdigit()]
    if not numbers:
        last = _tokens(re.split(r"(?<=[.!?])\s+", given.strip())[-1]) or []
        return last[-len(wanted) :] == wanted
    rest = iter(got)
    return [w for w in got if w[-1].isdigit()] == numbers and all(w in rest for w in wanted)


def _tokens(text: str) -> list[str] | None:
    """Words and numbers, without case, punctuation and groups of digits; None where a sign might mean something."""
    text, found = cleaned_numbers(text)
    out: list[str] = []
    at = 0
    for start, end, value in [*((f.start, f.end, f) for f in found), (len(text), len(text), None)]:
        between = re.sub(r"(?<=[A-Za-z])-(?=[A-Za-z])", " ", text[at:start])
        if re.search(r"[-+*/^<>=\\|!_%()\[\]{}]", re.sub(r"[!]\s*$", "", between)):
            return None
        out += [w.casefold() for w in re.findall(r"[^\W\d_]+|\d+", between) if w.casefold() != "and"]
        if value is not None:
            out.append(written(value.value))
        at = end
    return out
