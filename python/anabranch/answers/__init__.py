r"""Answers read off a text: where an answer stands, what it says, and which answers are the same.

One reader for the votes of strategies and for ``anabranch eval``. `boxed`, `number` and `letter` find an answer in a
text; `read` makes a `Reading` of its words; `same_value`, `labels` and `matches` compare readings. What is trivial is
read here: exact numbers, their units, lists and brackets, option letters, words. All else that is mathematics goes to
`math-verify <https://github.com/huggingface/Math-Verify>`_. Nothing here raises on any text, and nothing depends on
time, threads or the order of calls.
"""

from anabranch.answers.compare import labels, matches, same_value
from anabranch.answers.find import boxed, letter, number
from anabranch.answers.judge import final_answer, is_right
from anabranch.answers.maths import require
from anabranch.answers.read import Reading, read

__all__ = [
    "Reading",
    "boxed",
    "final_answer",
    "is_right",
    "labels",
    "letter",
    "matches",
    "number",
    "read",
    "require",
    "same_value",
]
