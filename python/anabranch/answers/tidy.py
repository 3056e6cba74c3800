r"""One spelling for what is written in many: Unicode signs, LaTeX wrappers and spacing, Markdown."""

from __future__ import annotations

import re
import unicodedata

_SIGNS = {
    **dict.fromkeys("\u2212\u2010\u2011\u2012\u2013\u2014\uff0d\ufe63", "-"),
    **dict.fromkeys("\u00a0\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000", " "),
    **dict.fromkeys("\u200b\u2060\ufeff\u2061\u2062", ""),
    "\u00d7": r"\times ", "\u00b7": r"\cdot ", "\u22c5": r"\cdot ", "\u2217": "*", "\u00f7": "/", "\u2044": "/",
    "\u2215": "/",
    "\u2264": r"\le ", "\u2265": r"\ge ", "\u2260": r"\ne ", "\u00b1": r"\pm ", "\u221e": r"\infty ", "\u03c0": r"\pi ",
    "\u222a": r"\cup ", "\u2229": r"\cap ", "\u2205": r"\emptyset ", "\u2208": r"\in ", "\u03b8": r"\theta ",
    "\u00b0": r"\degree ", "\u00ba": r"\degree ", "\uff0c": ",", "\uff0e": ".", "\uff05": "%", "\uff1d": "=",
    "\uff0b": "+",
    "\uff08": "(", "\uff09": ")", "\u2019": "'", "\u2018": "'", "\u201c": '"', "\u201d": '"', "\uff04": r"\$",
}  # fmt: skip
_POWERS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
_VULGAR = re.compile("(\\d?)([\u00bc-\u00be\u2150-\u215e])")
_WRAPPERS = (  # begin, end: what stands between the two, and nothing else, is meant
    ("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("**", "**"), ("__", "__"), ("*", "*"), ("`", "`"),
    ('"', '"'), ("{", "}"), (r"\boxed{", "}"), (r"\fbox{", "}"),
)  # fmt: skip
_STYLE = (
    r"\\(?:text(?:normal|bf|it|rm|sf|tt|up)?|mbox|hbox|mathrm|mathbf|mathit|mathsf|mathtt|textstyle|boldsymbol|bm|emph"
    r"|operatorname)\*?\s*"
)
_END = re.compile(r"(?<![\\.])\.$|[,;:]+$")  # punctuation; not of "0.333..."
_WORDS = re.compile(_STYLE + r"\{([^{}]*)\}")
_CLEAN = (
    (re.compile(r"\\(?:left|right|[bB]igg?[lrm]?)(?![A-Za-z])\s*\.?(?=[^A-Za-z]|$)"), ""),
    (re.compile(r"\\[dtc]frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\\(?:displaystyle|textstyle|limits|,(?=\d)|!)(?:(?<=[,!])|(?![A-Za-z]))"), "\u2009"),
    (re.compile(r"(?<!\\)\\(?:[,;:> ]|quad|qquad|enspace|hspace\{[^{}]*\})(?:(?<=[^A-Za-z])|(?![A-Za-z]))|~"), " "),
    (re.compile(r"\{\s*([,.])\s*\}"), r"\1"),
    (re.compile(r"\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![A-Za-z]))|\\degree(?![A-Za-z])"), r" degrees"),
    (re.compile(r"\\(?:geq|geqslant)(?![A-Za-z])"), r"\\ge"),
    (re.compile(r"\\(?:leq|leqslant)(?![A-Za-z])"), r"\\le"),
    (re.compile(r"\\neq(?![A-Za-z])"), r"\\ne"),
    (re.compile(r"\\(?:varnothing|empty)(?![A-Za-z])"), r"\\emptyset"),
    (re.compile(r"\\\$|\\(?:textdollar|dollar)(?![A-Za-z])"), "\ue000"),  # a dollar, not a delimiter
    (re.compile(r"\\([%#&_])"), r"\1"),
    (re.compile(r"\\(?:euro|pounds)(?![A-Za-z])\s*"), lambda m: {"e": "\u20ac", "p": "\u00a3"}[m[0][1]]),
)  # fmt: skip


def characters(text: str) -> str:
    """`text` with one character for each minus, space, digit and operator of Unicode."""
    if text.isascii():
        return text
    text = re.sub("[⁻⁰¹²³⁴-⁹]+", lambda m: "^{" + m[0].translate(_POWERS) + "}", text)
    text = _VULGAR.sub(lambda m: m[1] + " " * bool(m[1]) + unicodedata.normalize("NFKC", m[2]), text)
    text = re.sub("\u221a\\s*(?:\\(([^()]*)\\)|(\\d+|[A-Za-z]))", lambda m: rf"\sqrt{{{m[1] or m[2]}}}", text)
    out = []
    for c in text:
        c = _SIGNS.get(c, c)
        out.append(str(unicodedata.decimal(c)) if not c.isascii() and c.isdecimal() else c)
    return "".join(out)


def balanced(text: str, pairs: str = "{}") -> bool:
    """Whether the brackets of one kind in `text` close in order; escaped ones do not count."""
    depth = 0
    for c in re.sub(r"\\.", "", text):
        depth += (c == pairs[0]) - (c == pairs[1])
        if depth < 0:
            return False
    return not depth


def unwrap(text: str) -> str:
    """`text` without spaces, delimiters of mathematics, emphasis, quotes and boxes around the whole of it."""
    while True:
        text = text.strip()
        for begin, end in _WRAPPERS:
            inner = text[len(begin) : len(text) - len(end)]
            if (
                len(text) > len(begin) + len(end)
                and text.startswith(begin)
                and text.endswith(end)
                and not (text[: -len(end)].endswith("\\"))
                and (balanced(inner) if end == "}" else begin not in inner and end not in inner)
            ):
                text = inner
                break
        else:
            return text


def tidy(text: str) -> str:
    """An answer in one spelling: no wrappers, no styles, ``\\frac`` alone of its kind, no punctuation behind it.

    A dollar sign that is money comes out as U+E000; ``\\,`` between digits as a thin space.
    """
    text = characters(text)
    before = None
    while text != before:
        before = text
        text = unwrap(text)
        text = _END.sub("", text).rstrip()
        if (closed := re.fullmatch(r"(.*[^\\\s])\s*\\", text, re.DOTALL)) is not None:
            text = closed[1]
    text = re.sub(r"\s+", " ", cleaned(text)).strip()
    return _END.sub("", text).rstrip()


def cleaned(text: str) -> str:
    """A text, which may hold more than an answer, without styles, delimiters of mathematics and LaTeX's spaces."""
    text = characters(text)
    text = re.sub(r"(?<!\\)(?:\$\$|\\[()\[\]])", " ", text)
    text = re.sub(r"(?<!\\)\$([^$\n]*?[^\s$\\])\$(?!\d)", _delimited, text)
    while (plain := _WORDS.sub(r" \1 ", text)) != text:
        text = plain
    for pattern, put in _CLEAN:
        text = pattern.sub(put, text)  # type: ignore[arg-type]
    text = text.replace("$", "\ue000").replace("**", "")
    text = re.sub(r"(?<=\d)\u2009(?=\d{3}(?!\d))", " ", text).replace("\u2009", "")
    return re.sub(r"[^\S\n]*\^[^\S\n]*", "^", text)


def _delimited(match: re.Match[str]) -> str:
    """What stands between two $: mathematics, unless it holds a word, as between two prices."""
    words = re.findall(r"(?<![\\A-Za-z])[A-Za-z]{3,}", re.sub(_STYLE + r"\{[^{}]*\}", "", match[1]))
    return match[0] if words else f" {match[1]} "
