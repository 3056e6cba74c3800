"""Answers read off texts: what is the expected one, and what only looks like it. Wrong must never be called right."""

from __future__ import annotations

import importlib.util
import logging
import random
import sys
import threading
import time
from fractions import Fraction

import pytest

from anabranch import answers
from anabranch.answers import Reading, boxed, final_answer, is_right, letter, matches, number, read

# (what a box holds or "The answer is" is followed by, the expected answer, right?)
PAIRS = [
    # signs
    (r"-5", "-5", True),
    ("\u22125", "-5", True),
    ("\u20135", "-5", True),
    ("- 5", "-5", True),
    ("+5", "5", True),
    ("\uff0d5", "-5", True),
    ("5", "-5", False),
    ("-5", "5", False),
    ("3-5", "-5", False),
    ("3-5", "5", False),
    ("3-5", "3", False),
    ("3-5", "-2", False),
    ("3\u20135", "-5", False),
    ("3\u20135", "3-5", True),
    ("3--5", "8", False),
    ("3 - 5", "3-5", True),
    (r"\pm 5", "5", False),
    (r"\pm 5", "5, -5", True),
    (r"x = \pm 5", "-5, 5", True),
    (r"3 \pm \sqrt{2}", r"3+\sqrt2, 3-\sqrt2", True),
    (r"3 \pm \sqrt{2}", r"3+\sqrt{2}", False),
    # fractions
    (r"\frac{1}{2}", "1/2", True),
    (r"\dfrac{1}{2}", r"\frac{1}{2}", True),
    (r"\tfrac12", "0.5", True),
    (r"\frac12", "1/2", True),
    ("1/2", "12", False),
    ("1/2", "2", False),
    ("1/2", "1", False),
    ("2/4", "1/2", True),
    ("\u00bd", "1/2", True),
    ("1\u00bd", "3/2", True),
    ("1 1/2", "1.5", True),
    ("1 1/2", "11/2", False),
    (r"1\frac{1}{2}", "3/2", True),
    (r"1\frac{1}{2}", "1/2", False),
    (r"-\frac{1}{2}", "-0.5", True),
    (r"\frac{-1}{2}", "-1/2", True),
    (r"-1\frac{1}{2}", "-3/2", True),
    (r"-1\frac{1}{2}", "-1/2", False),
    (r"\frac{1,000}{3}", "1000/3", True),
    (r"\frac{1}{0}", r"\frac{2}{0}", False),
    (r"\frac{\sqrt{3}}{3}", r"\frac{1}{\sqrt{3}}", True),
    (r"\frac{\sqrt{3}}{3}", r"\sqrt{3}", False),
    ("0.333", "1/3", False),
    ("0.333333", "1/3", False),
    (r"0.\overline{3}", "1/3", True),
    ("0.333...", "0.333", False),
    # decimals
    (".5", "0.5", True),
    ("0.50", "0.5", True),
    ("5.", "5", True),
    ("5.0", "5", True),
    (".5", "5", False),
    ("0.5", "5", False),
    ("-.5", "-1/2", True),
    ("1.5", "15", False),
    ("0.1", "0.10000000001", False),
    ("0.0000001", "0", False),
    ("0.0000001", "0.0000002", False),
    ("1,5", "1.5", False),
    ("007", "7", True),
    # groups of digits
    ("1,234", "1234", True),
    ("1,234", "1, 234", False),
    ("1, 234", "1234", False),
    ("1,234", "234", False),
    ("1 234", "1234", True),
    ("1\u202f234", "1234", True),
    ("1{,}234", "1234", True),
    (r"1,\!234", "1234", True),
    (r"1\,234", "1234", True),
    ("1'234", "1234", True),
    ("12,34,567", "1234567", True),
    ("1,234,567.89", "1234567.89", True),
    ("1.234,5", "1234.5", True),
    ("1.234.567", "1234567", True),
    ("1.234", "1234", False),
    ("1,23", "123", False),
    ("1,234, 5", "1234, 5", True),
    ("1,234, 5", "12345", False),
    ("1,234, 5", "1, 234, 5", False),
    ("1,234 and 5,678", "1234, 5678", True),
    ("0,123", "123", False),
    # part of a number
    ("100", "10", False),
    ("10", "100", False),
    ("210", "10", False),
    ("10.5", "10", False),
    ("10.5", "5", False),
    ("2^{10}", "10", False),
    ("2^{10}", "1024", True),
    ("10^6", "1,000,000", True),
    # percent
    (r"50\%", "50%", True),
    ("50%", "0.5", True),
    ("50%", "1/2", True),
    ("50 percent", "50%", True),
    ("50%", "50", True),
    ("50", "50%", True),
    ("0.5", "50", False),
    ("0.5%", "0.5", False),
    ("0.5%", "50%", False),
    ("5%", "50%", False),
    # units
    (r"5\text{ cm}", "5", True),
    (r"5\text{ cm}", "5 cm", True),
    (r"5\,\mathrm{cm}", "5 cm", True),
    ("5 cm", "5 m", False),
    ("5 cm", "5 m^2", False),
    (r"5\text{ cm}^2", "5 cm^2", True),
    ("5 cm\u00b2", "5 cm^{2}", True),
    ("5 hours", "5 hour", True),
    ("5 hours", "5 minutes", False),
    ("5", "5 apples", True),
    ("5 million", "5", False),
    ("5 million", "5,000,000", True),
    ("5 dozen eggs", "60", True),
    ("5m", "5", False),
    ("5ab", "5", False),
    ("5 squared", "5", False),
    ("5th", "5", False),
    ("5 of 7", "5", False),
    ("5 or 6", "5", False),
    ("5 or 6", "6", False),
    ("5 pm", "5 am", False),
    (r"90^\circ", "90", True),
    (r"90^{\circ}", "90 degrees", True),
    ("90\u00b0", "90", True),
    ("12:30", "12", False),
    ("12:30", "30", False),
    ("12:30", "12:30", True),
    # currency
    ("$5$", "5 dollars", True),
    (r"\$5", "5", True),
    ("$5", "5 dollars", True),
    ("$5", "5 cents", False),
    ("$5", "5 euros", False),
    ("-$5", "-5", True),
    ("$-5", "-5", True),
    ("5\u20ac", "5 euros", True),
    (r"\$1,234.50", "1234.5", True),
    # wrappers
    (r"\text{5}", "5", True),
    (r"\mathrm{5}", "5", True),
    (r"\mathbf{42}", "42", True),
    ("**42**", "42", True),
    (r"\left(1, 2\right)", "(1,2)", True),
    (r"\left( 1,\, 2 \right)", "(1, 2)", True),
    (r"\displaystyle \frac{1}{2}", "1/2", True),
    ("{5}", "5", True),
    ("$5$.", "5", True),
    ("\uff11\uff12", "12", True),
    # letters
    ("B", "B", True),
    ("(B)", "B", True),
    (r"\text{B}", "B", True),
    (r"\textbf{(B)}", "B", True),
    ("b", "B", True),
    ("B. 12", "B", True),
    (r"\text{(B) } 12", "B", True),
    ("B. A common mistake", "B", True),
    ("B. A common mistake", "A", False),
    ("Because", "B", False),
    ("A dog", "A", False),
    ("A, B", "A", False),
    ("A and B", "B", False),
    ("A, B", "B, A", True),
    ("A: 57", "A: 58", False),
    ("A: 5, B: 7", "A: 5, B: 6", False),
    ("a - b", "a", False),
    ("A+B", "A", False),
    # tuples, sets, intervals
    ("(1,2)", "(1, 2)", True),
    ("(1,2)", "(2,1)", False),
    ("(2,1)", "(3,1)", False),
    ("(1,2)", "[1,2]", False),
    ("[1,2)", "[1,2)", True),
    ("[1,2)", "(1,2]", False),
    ("(1,2)", "1, 2", False),
    ("1, 2", "2, 1", True),
    ("1, 2", "1, 3", False),
    ("1, 2", "1, 2, 3", False),
    ("1, 1, 2", "1, 2, 2", False),
    (r"\{1, 2\}", r"\{2, 1\}", True),
    (r"\{1, 2\}", "1, 2", True),
    (r"\{1, 2\}", "(1, 2)", False),
    ("1 and 2", "1, 2", True),
    ("1, 2, and 3", "3, 2, 1", True),
    ("1", "1, 2", False),
    (r"(-\infty, 1) \cup (2, \infty)", r"(-\infty,1)\cup(2,\infty)", True),
    (r"(-\infty, 1) \cup (2, \infty)", r"(-\infty,1)\cup(3,\infty)", False),
    (r"(-\infty, 1]", r"(-\infty, 1)", False),
    (r"(\frac12, 3)", "(0.5, 3)", True),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", True),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}2\\1\end{pmatrix}", False),
    # equations
    ("x=5", "5", True),
    ("x = 5", "x=5", True),
    ("5", "x=5", True),
    ("x=5", "y=5", False),
    ("x=5", "x=6", False),
    ("x = 2 + 3 = 5", "5", True),
    ("2 + 3 = 6", "5", False),
    ("x=1, y=2", "y=2, x=1", True),
    ("x=1, y=2", "x=2, y=1", False),
    ("x=1 or x=2", "1, 2", True),
    ("x>5", "5", False),
    ("x>5", "x<5", False),
    ("x>5", "5<x", True),
    (r"x \ge 5", "x \u2265 5", True),
    (r"x \ge 5", "x > 5", False),
    ("y=2x+1", "2x+1", True),
    ("x^2+y^2=1", "y^2+x^2=1", True),
    ("x^2+y^2=1", "x^2+y^2=2", False),
    # expressions
    ("(x+1)^2", "x^2+2x+1", True),
    ("(x+1)^2", "x^2+1", False),
    (r"\sqrt{8}", r"2\sqrt{2}", True),
    ("\u221a2", r"\sqrt{2}", True),
    (r"\sqrt{2}", "2", False),
    (r"2\pi", "2\u03c0", True),
    (r"2\pi", "6.28", False),
    (r"1.5\pi", r"\frac{3\pi}{2}", True),
    (r"\pi R^2", r"\pi r^2", False),
    ("x_1", "x_2", False),
    (r"\sqrt{2}\cdot 10^{-20}", r"\sqrt{3}\cdot 10^{-20}", False),
    ("5!", "120", True),
    (r"\infty", r"-\infty", False),
    (r"\frac{a}{b}", r"\frac{b}{a}", False),
    ("ab", "ba", False),  # words, as far as anyone can tell
    ("2ab", "2ba", True),
    # powers of ten
    (r"1.2 \times 10^3", "1200", True),
    (r"1.2 \times 10^{-3}", "0.0012", True),
    ("1.2e3", "1200", True),
    ("1.2E+3", "1200", True),
    ("1.2\u00d710\u00b3", "1200", True),
    (r"1.2 \times 10^3", "1.2", False),
    (r"1.2 \times 10^3", "3", False),
    # dates, versions, ratios
    ("2024-05-12", "2024-05-12", True),
    ("2024-05-12", "2024-05-13", False),
    ("2024-05-12", "2007", False),
    ("2024-05-12", "12", False),
    ("12/05/2024", "12/06/2024", False),
    ("12/05/2024", "2024", False),
    ("3:5", "3/5", False),
    ("3:5", "3 : 5", True),
    ("1.2.3", "1.2", False),
    # words
    ("Paris", "paris", True),
    ("Paris.", "Paris", True),
    ("Paris", "London", False),
    ("no", "on", False),
    ("yes", "no", False),
    ("not 5", "5", False),
    ("no solution", "no solution", True),
    (r"\text{no solution}", "no solution", True),
    ("Laura 271, Hugo 192", "Laura 271, Hugo 192", True),
    ("Hugo 271, Laura 192", "Laura 271, Hugo 192", False),
    ("Hugo 192, Laura 271", "Laura 271, Hugo 192", False),
    ("A 57, B 12", "B 12, A 57", False),
    ("", "5", False),
]


@pytest.mark.parametrize(("given", "expected", "right"), PAIRS)
def test_an_answer_against_the_expected_one(given, expected, right):
    assert matches(given, expected) is right
    assert is_right(rf"So we get \boxed{{{given}}}.", expected) is right
    assert matches(expected, given) is right  # whichever side is the expected one
    if right:
        assert is_right(f"The answer is {given}", expected)


def test_the_table_is_large_and_has_both():
    right = sum(r for _, _, r in PAIRS)
    assert len(PAIRS) >= 200 and 80 < right < len(PAIRS) - 80 and len(set(PAIRS)) == len(PAIRS)


@pytest.mark.parametrize(("given", "expected", "right"), PAIRS)
def test_a_sentence_never_makes_a_wrong_answer_right(given, expected, right):
    """What stands in a sentence is read more loosely; a wrong one stays wrong."""
    for text in (f"The answer is {given}.", f"**Answer:** {given}\n", f"#### {given}", f"Some words.\n\n{given}"):
        assert right or not is_right(text, expected), text


TEXTS = [
    # what counts as the answer
    (r"First \boxed{12}. No: \boxed{13}", "13", True),
    (r"First \boxed{12}. No: \boxed{13}", "12", False),
    (r"So \boxed{12} and \boxed{13}", "12, 13", True),
    (r"So \boxed{12} and \boxed{13}", "13", False),
    (r"So \boxed{12}, then \boxed{13}", "13", True),
    (r"So \boxed{12}. In the form \boxed{}", "12", True),
    (r"So \boxed{12", "12", False),
    (r"So \boxed{11}. Then \boxed{12", "11", False),
    (r"So \boxed{\frac{1}{2", "1", False),
    (r"So \fbox{12}", "12", True),
    (r"So $\boxed 12$.", "12", True),
    (r"So \boxed{\boxed{12}}", "12", True),
    (r"So \[ \boxed{\text{12}} \]", "12", True),
    (r"So \boxed{\{1, 2\}}", "1, 2", True),
    (r"So \boxed{12}, as 13 is odd.", "12", True),
    (r"So \boxed{12}, as 13 is odd.", "13", False),
    (r"The answer is \boxed{12}", "12", True),
    (r"\boxed{13}, so the answer is 12.", "12", True),
    ("The answer is 12. Or 13: the answer is 13.", "13", True),
    ("The answer is 12. Then I tried 13.", "12", True),
    ("The answer is 12. Then I tried 13.", "13", False),
    ("**Final Answer:** 12", "12", True),
    ("**Answer**: 12", "12", True),
    ("The final answer is:\n\n$$12$$", "12", True),
    ("The answer to the question is 12.", "12", True),
    ("The answers are 3 and 4.", "3, 4", True),
    ("The answers are 3 and 4.", "4", False),
    ("#### 12", "12", True),
    ("#### 1,234", "1234", True),
    ("7 * 12 = 84", "84", True),
    ("7 * 12 = 84", "12", False),
    ("The answer is 12.<|im_end|><|endoftext|>", "12", True),
    # numbers in sentences
    ("The answer is 84 legs.", "84", True),
    ("The answer is 84 legs, as 7 * 12 = 84.", "84", True),
    ("The answer is approximately 84.", "84", True),
    ("The answer is not 84.", "84", False),
    ("The answer isn't 84.", "84", False),
    ("The answer is 83 or 84.", "84", False),
    ("The answer is between 80 and 84.", "84", False),
    ("The answer is 80 to 84.", "84", False),
    ("The answer is more than 84.", "84", False),
    ("The answer is half of 84.", "84", False),
    ("The answer is minus 84.", "84", False),
    ("The answer is the square root of 84.", "84", False),
    ("The answer is 84 squared.", "84", False),
    ("The answer is 84th.", "84", False),
    ("The answer is 84 thousand.", "84", False),
    ("The answer is 84 thousand.", "84000", True),
    ("The answer is 1/84.", "84", False),
    ("The answer is 0.84.", "84", False),
    ("The answer is 84%.", "0.84", True),
    ("The answer is $84.", "84 dollars", True),
    ("The answer is 84 cents.", "84 dollars", False),
    ("The answer is 84 apples in total.", "84 apples", True),
    ("The answer is n - 84 apples.", "84", False),
    (r"The answer is about \sqrt{84}.", "84", False),
    (r"The answer is $x = 84$ metres.", "84", True),
    (r"The answer is the number $\frac{1}{2}$.", "0.5", True),
    (r"The answer is $\frac{1}{2}$ of 10.", "0.5", False),
    ("The answer is 12 out of 84.", "84", False),
    ("The answer is 84 minus 2.", "84", False),
    ("In total that makes 84 eggs.", "84", True),
    ("It is 84, not 83.", "83", False),
    ("I am not sure: 83 or 84.", "84", False),
    ("It takes 80 to 84 hours.", "84", False),
    ("It cannot be 84.", "84", False),
    ("In 2024-05-84", "84", False),
    ("See section 3.84", "84", False),
    ("It ends at 12:84", "84", False),
    ("It is 5-84", "-84", False),
    ("Version 1.2.84", "84", False),
    ("The answer is COVID84.", "84", False),
    ("Some molecule of C84", "84", False),
    ("That is more than 84", "84", False),
    ("That leaves -84", "84", False),
    ("That leaves \u221284", "-84", True),
    # letters
    ("The answer is B. A common mistake is to pick A.", "B", True),
    ("The answer is B. A common mistake is to pick A.", "A", False),
    ("The answer is (B) because A is odd.", "B", True),
    ("The answer is **B**.", "B", True),
    ("The answer is a dog.", "A", False),
    ("The answer is A dog.", "A", False),
    ("The answer is Because.", "B", False),
    ("The answer is either A or B.", "B", False),
    ("The answer is A or B.", "A", False),
    ("The answer is not B.", "B", False),
    ("Because A is large, B is small", "B", False),
    ("B. A common mistake", "B", True),
    ("B. A common mistake", "A", False),
    ("So the best option is B.", "B", True),
    ("A, B and C are all plausible.", "C", False),
    (r"Hence \boxed{\text{(C)}}", "C", True),
    (r"Hence \boxed{C. 15}", "C", True),
    (r"Hence \boxed{C. 15}", "D", False),
    # words
    ("The answer is Paris.", "Paris", True),
    ("The answer is not Paris.", "Paris", False),
    ("Paris is the largest city. The capital is Bern.", "Paris", False),
    ("It is not Paris.", "Paris", False),
    ("There is no answer here.", "no", False),
    ("Yes or no? Hard to say.", "no", False),
    ("The capital of France is Paris.", "Paris", True),
    ("The answer is Anna $12, Ben $15.", "Anna 12, Ben 15", True),
    ("The answer is Anna 12, Ben 16.", "Anna 12, Ben 15", False),
    ("The answer is Anna -12, Ben 15.", "Anna 12, Ben 15", False),
    ("The answer is Anna 12 and Ben 15.", "Anna 12, Ben 15", True),
    ("Anna pays 12, Ben pays 15 and Cleo pays 7.", "Anna 12, Ben 15", False),
    ("Anna pays 12 and Ben pays 15.", "Anna 12, Ben 15", True),
    ("Ben pays 12 and Anna pays 15.", "Anna 12, Ben 15", False),
]


@pytest.mark.parametrize(("text", "expected", "right"), TEXTS)
def test_a_text_that_says_more_than_its_answer(text, expected, right):
    assert is_right(text, expected) is right, final_answer(text)


# ------------------------------------------------------------------------------------------------ what a vote finds


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\left\{ \frac{1}{2} \right\}}", r"\left\{ \frac{1}{2} \right\}"),
        (r"\boxed{a} then \boxed{ b }", "b"),
        (r"\boxed {7}", "7"),
        (r"\fbox{7}", "7"),
        (r"\boxed 7.", "7"),
        (r"\boxed{1} and \boxed{2}", "1, 2"),
        (r"$\boxed{1}$, $\boxed{2}$", "1, 2"),
        (r"\boxed{7} \boxed{7}", "7"),
        (r"\boxed{}", None),
        (r"\boxed{5", None),
        (r"\boxed{4}\boxed{\text{5}", None),
        (r"\boxedness{5}", None),
        (r"\boxed", None),
        ("none", None),
    ],
)
def test_what_a_box_holds(text, found):
    assert boxed(text) == found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("so 1,234.", "1234"),
        ("so 1{,}234", "1234"),
        ("so -5", "-5"),
        ("so \u22125", "-5"),
        ("it is - 5", "-5"),
        ("x=-5", "-5"),
        ("3-5", "5"),
        ("3\u20135", "5"),
        ("7 - 5", "5"),
        ("- 5 apples", "5"),
        ("(-5)", "-5"),
        (".5", "0.5"),
        ("0.50", "0.5"),
        ("-.25", "-0.25"),
        ("1/2", "0.5"),
        ("1/3", "1/3"),
        ("2/6", "1/3"),
        (r"$\frac{3}{4}$", "0.75"),
        (r"$1\frac{1}{2}$", "1.5"),
        ("12,34,567", "1234567"),
        ("1 234 567", "1234567"),
        ("1.234,5", "1234.5"),
        ("1, 234", "234"),
        ("1,234, 5", "5"),
        ("50%", "50"),
        ("$12.50", "12.5"),
        ("5 cm", "5"),
        ("1.2e3", "1200"),
        (r"1.2 \times 10^{-3}", "0.0012"),
        ("10^6", "1000000"),
        ("7.", "7"),
        ("7.0", "7"),
        ("on 2024-05-12", "12"),
        ("+2a2b9c6d1=1692", "1692"),
        ("1/0", None),
        ("c.7", "7"),  # a full stop
        ("so ..7", "7"),
        ("a7", "7"),
        ("v1.2.3", "1.2"),
        ("none", None),
        ("", None),
    ],
)
def test_the_last_number(text, found):
    assert number(text) == found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("B. A common mistake", "B"),
        ("B. A common mistake is to choose C.", "B"),
        ("I choose B. A common mistake is haste", "B"),
        ("The answer is (b).", "B"),
        ("The answer is B because A is too small.", "B"),
        ("Answer: C\nA is too small", "C"),
        (r"\boxed{\text{D}}", "D"),
        (r"\boxed{D. 12}", "D"),
        ("**B**", "B"),
        ("(B) 12", "B"),
        ("A. 1\nB. 2\nC. 3\nSo it is B", "B"),
        ("Option A is right", "A"),
        ("A dog", None),
        ("Because", None),
        ("none at all", None),
        ("so A", "A"),
        ("It is G.", "G"),
        ("I think so", None),
        ("", None),
    ],
)
def test_the_letter_of_an_option(text, found):
    assert letter(text) == found


# ------------------------------------------------------------------------------------------------ readings


def test_a_reading_says_what_it_is():
    assert read("50%") == Reading("number", Fraction(1, 2), "", "%")
    assert read(r"x = 5\text{ cm}") == Reading("number", Fraction(5), "x", "cm")
    assert read("[1, 2)").value == ("[", ")", (Reading("number", Fraction(1)), Reading("number", Fraction(2))))
    assert read("(C) because") == Reading("letter", "C", "", "because")
    assert answers.labels(read("x=1, 2 cm")) == ("", "", "x", "", "", "cm")


SHAPES = [given for given, _, _ in PAIRS if given]


def test_having_the_same_value_is_an_equivalence():
    readings = [read(s) for s in dict.fromkeys(SHAPES[::4])]
    classes: list[list[Reading]] = []
    for one in readings:
        assert answers.same_value(one, one)
        homes = [c for c in classes if answers.same_value(c[0], one)]
        assert len(homes) <= 1
        for home in homes:
            assert all(answers.same_value(other, one) and answers.same_value(one, other) for other in home)
            home.append(one)
        if not homes:
            classes.append([one])
    assert 30 < len(classes) < len(readings)


# ------------------------------------------------------------------------------------------------ any text at all

HOSTILE = [
    "9^{9^{9^9}}",
    "9^9^9^9",
    "((((9^{99})^{99})^{99})^{99})^{99}",
    "9^{99999999}",
    "9^{9999 \\cdot 9999}",
    "10^{10^{10}}",
    "99999999!",
    "(99!)!",
    "9!!!!!!!!",
    r"\binom{999999999}{333333333}",
    r"\prod_{i=1}^{99999}\prod_{j=1}^{99999} ij",
    r"\sum_{i=1}^{999999999} \frac{1}{i}",
    r"\int_0^1 x^x dx",
    r"\frac{" * 60 + "1" + "}{2}" * 60,
    "(" * 150,
    "(" * 90 + "x" + ")" * 90,
    "{" * 1000 + "}" * 1000,
    "[" * 900,
    r"\text{" * 300,
    r"\left" * 300,
    "$" * 999,
    "1," * 900,
    "1/" * 900,
    "-" * 900,
    "1 " * 900,
    "x^" * 90,
    "(x+y+z+w)^{999}",
    "(a+b+c+d+e)^{99}=0",
    r"\sqrt{" * 60 + "2" + "}" * 60,
    "9" * 5000,
    "1e" * 500,
    "1e999",
    "\x00\ud800\udfff",
    "\\",
    "\\boxed{" * 200,
    "}" * 50,
    r"\def\x{\x\x}\x",
    "0^{-1}",
    "0/0",
    "__import__('os').system('false')",
]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_text_neither_hangs_nor_raises(text):
    begin = time.process_time()
    for one in (text, f"\\boxed{{{text}}}", f"The answer is {text}"):
        for other in ("5", r"\sqrt{2}", "x^2+1", text):
            is_right(one, other)
        boxed(one), number(one), letter(one)
    assert time.process_time() - begin < 60


def test_random_text_neither_raises_nor_depends_on_order():
    rng = random.Random(0)
    words = [
        *"0123456789+-*/^_=<>.,;:!%$(){}[] \n",
        "\\frac",
        "\\boxed{",
        "\\text{",
        "\\pm",
        "and",
        "x",
        "\u2212",
        "answer is",
    ]
    for _ in range(300):
        one, other = ("".join(rng.choices(words, k=rng.randint(0, 12))) for _ in "ab")
        assert answers.same_value(read(one), read(other)) is answers.same_value(read(other), read(one))
        is_right(one, other), boxed(one), number(one), letter(one)


def test_other_threads_read_alike_and_nothing_is_left_behind(caplog):
    from anabranch.answers import maths

    def hook(frame, event, argument):
        return None

    maths._equal.cache_clear()
    said = []
    work = threading.Thread(target=lambda: said.append(matches(r"\sqrt{8}", r"2\sqrt{2}")))
    work.start()
    work.join()
    assert said == [True]
    maths._equal.cache_clear()
    before = sys.getprofile()
    sys.setprofile(hook)
    try:
        with caplog.at_level(logging.DEBUG):
            assert matches("(x+1)^2", "x^2+2x+1") and not matches("9^{9^{9}}", "5")
        assert sys.getprofile() is hook
    finally:
        sys.setprofile(before)
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


def test_the_budget_is_of_calls_and_ends_what_takes_too_long(monkeypatch):
    from anabranch.answers import maths

    maths._equal.cache_clear()
    monkeypatch.setattr(maths, "BUDGET", 50)
    assert not maths.equal("x+x", "2x")
    maths._equal.cache_clear()
    monkeypatch.undo()
    assert maths.equal("x+x", "2x")


def test_without_math_verify_the_remedy_is_said(monkeypatch):
    import anabranch as ab
    from anabranch.evaluation import evaluate
    from anabranch.evaluation.evaluate import Problem

    find = importlib.util.find_spec
    monkeypatch.setattr("anabranch.answers.maths.find_spec", lambda name: None if name == "math_verify" else find(name))
    with pytest.raises(ModuleNotFoundError, match=r"vote='boxed'.*pip install math-verify"):
        ab.SelfConsistency(4, vote="boxed")
    with pytest.raises(ModuleNotFoundError, match=r"evaluate: .*pip install math-verify"):
        evaluate(None, [Problem("a", "1")], None, modes=["plain"])
    ab.SelfConsistency(4, vote="number")  # needs none


def test_importing_the_package_imports_no_math_verify():
    import subprocess

    code = "import sys, anabranch, anabranch.evaluation; assert 'math_verify' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
