"""Problems in plain English with one to six parts that do not depend on one another, and how a model should work them.

Five families. Two are reasoning-gym's own tasks, scored by its own verifiers:

    legs    leg_counting: a thread an animal, a running total at the join
    sums    chain_sum: one expression, or several to be worked out; a thread an expression, the results side by side

and three are made here:

    bills   who pays how much for goods and something small; a thread a person, the amounts side by side
    times   who spent the most time, or has the longest thing; a thread a person, a running maximum at the join
    story   steps that need one another: nothing to do in parallel, however many sentences there are

A thread first says what it is about: its outline's words, then its numbers, so that each is found by one look back. It
ends with its result beside its name, as the join will want it. Nothing is done in one's head that a small model cannot
do: products go tens and ones apart, and one number is added at a time. What a join asks for is a copy, a comparison or
one addition a part, digit by digit. Further families, the same work in other words, are in `wider`.

**Splits.** Train, dev and test share no name, no kind of goods, and no held-out numbers: a product (7 * 38), a sum's
whole expression, an animal and its number belong to one split by a hash. Every part of a dev or test problem of a
family made here is drawn from the held-out numbers; a reasoning-gym problem must hold at least one. (A step of a story
is the exception where too few numbers are left to choose from.) Half of the dev and test problems of these families
are phrased in words that training has not seen. Problems are unique by prompt.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

FAMILIES = ("legs", "sums", "bills", "times", "story")
SPLITS = ("train", "dev", "test")


@dataclass(frozen=True)
class Part:
    """One independent part: its outline, the work of its thread, and what comes out."""

    outline: str
    work: str
    result: str


@dataclass(frozen=True)
class Problem:
    """A problem and its worked answer; `threads` is what it calls for: 0 where nothing can be done side by side."""

    family: str
    prompt: str
    parts: tuple[Part, ...]
    join: str  # what stands between the parts and the answer; may be empty
    answer: str
    unseen_words: bool = False
    entries: tuple[dict[str, Any], ...] = field(default=(), compare=False)  # reasoning-gym's, for its verifier

    @property
    def threads(self) -> int:
        return len(self.parts) if len(self.parts) > 1 else 0


def held_out(*numbers: object) -> str:
    """The split that these numbers belong to: 84 % train, 4 % dev, 12 % test, by their hash."""
    h = int.from_bytes(hashlib.blake2s(repr(numbers).encode(), digest_size=4).digest(), "big") % 100
    return "test" if h < 12 else "dev" if h < 16 else "train"


# ------------------------------------------------------------------------------------------------ words

NAMES = {
    "train": "Anna Ben Clara David Emma Felix Grace Henry Iris Jack Kate Leo Mia Noah Olga Paul Rosa Sam Tina Victor "
    "Will Zoe Adam Bella Carl Dora Eric Fiona George Helen Ivan Julia Karl Lucy Mark Nina Oscar Peter Ruth Simon Agnes "
    "Bruno Celia Dylan Edith Fabio Gloria Hannah Igor Jonas Katya Luis Mabel Nigel Otto Priya Quentin Rachel "
    "Stefan Teresa Ursula Vera Walter Xenia Yusuf Zelda Omar Wanda Ines Theo Liam Amira Kofi Mei Ana Lea Nadia "
    "Norman Nathan Nico Noel Natasha Nils Neil Nelly Sara Sandra Sabine Saul Lara Lars Lina Lorenz Lionel Evan "
    "Evelyn Eve Marta Marco Marcel Marie Mario Thomas Tomas Toby Tilda Hugh Hubert Holly Rob Roberta Rolf Rita "
    "Phil Petra Pia Pedro Maxim Milan Mira Moritz Amir Anton Aisha Alma Andre Bianca Boyd Cora Cyril Dana Deniz "
    "Ella Elias Farah Gil Hana Ida Jana Jonah Juan Kim Kurt Lena Lou Maja Musa Nur Olaf Pablo Quinn Ravi Rafael "
    "Salma Tara Uma Viktor Wendy Yara Zoran".split(),
    "dev": "Alice Boris Chloe Daniel Esther Frank".split(),
    "test": "Maria Tom Laura Max Sarah Hugo Linda Robert Nora Martin Eva Philip".split(),
}
GOODS = {
    "train": "apples pens cards stamps eggs candles books cups balls roses lemons keys bags bolts buttons cakes combs "
    "coins dolls flags forks hats jars kites lamps masks nails nuts pears pins plates ribbons rings ropes "
    "onions candies rulers towels stickers brushes screws mugs radishes envelopes notebooks spools".split(),
    "dev": "socks bricks peaches spoons".split(),
    "test": "oranges bottles pencils tiles carrots boxes shells bells".split(),
}
THINGS = {
    "train": ["marbles", "stickers", "shells", "points", "coins", "beads", "cards", "stamps", "acorns", "magnets",
              "postcards", "medals", "feathers", "chips", "letters", "keys"],
    "dev": ["buttons", "tokens"],
    "test": ["pebbles", "tickets", "badges"],
}  # fmt: skip


class Words(NamedTuple):
    """Phrasings: `seen` in every split, `unseen` in half of the dev and test problems, `more` in training alone."""

    seen: list[str]
    unseen: list[str]
    more: list[str]

    def pick(self, split: str, rng: random.Random, strange: bool) -> str:
        if split == "train":
            return rng.choice(self.seen + self.more)
        return rng.choice(self.unseen if strange else self.seen)


Arrange = Callable[[list[str], str], str]  # a sentence a person, and the question: the prompt


def in_a_row(lines: list[str], ask: str) -> str:
    return " ".join([*lines, ask])


def pick(split: str, rng: random.Random, draw: Callable[[], tuple]) -> tuple:
    """Numbers of this split: drawn until they belong to it."""
    while True:
        numbers = draw()
        if held_out(*numbers) == split:
            return numbers


# ------------------------------------------------------------------------------------------------ arithmetic


def product(a: int, b: int) -> str:
    """``7*30=210, 7*8=56, 210+56=266`` (a below 10, or the other way round); shorter where a digit is 0."""
    if a > b:
        a, b = b, a
    tens, ones = b // 10 * 10, b % 10
    if a >= 10:
        raise ValueError(f"product: {a} and {b} both have two digits")
    if not tens or not ones:
        return f"{a}*{b}={a * b}"
    return f"{a}*{tens}={a * tens}, {a}*{ones}={a * ones}, {a * tens}+{a * ones}={a * b}"


def added(x: int, y: int) -> str:
    """``126+72: 126+70=196, 196+2=198``: one digit of y at a time, so that a carry is all there is to mind;
    ``126+70=196`` where y has one digit that is not 0, ``0+84=84``."""
    places = [int(digit) * 10**i for i, digit in enumerate(reversed(str(y))) if digit != "0"][::-1]
    if x == 0 or len(places) < 2:
        return f"{x}+{y}={x + y}"
    steps, total = [], x
    for place in places:
        steps.append(f"{total}+{place}={total + place}")
        total += place
    return f"{x}+{y}: {', '.join(steps)}"


def running_sum(numbers: list[int]) -> str:
    """``60+32: 60+30=90, 90+2=92, 92+70=162``."""
    total, steps = numbers[0], []
    for n in numbers[1:]:
        steps.append(added(total, n))
        total += n
    return ", ".join(steps)


# ------------------------------------------------------------------------------------------------ families


def legs(split: str, rng: random.Random, n: int, strange: bool) -> Problem | None:
    """reasoning-gym's leg_counting as it is; `strange` has no meaning here, its words are always the same."""
    import reasoning_gym
    from reasoning_gym.arithmetic.leg_counting import ANIMALS

    entry = reasoning_gym.create_dataset(
        "leg_counting",
        seed=rng.randrange(2**31),
        size=1,
        min_animals=n,
        max_animals=n,
        min_instances=2,
        max_instances=15,
    )[0]
    animals = entry["metadata"]["animals"]
    if not _belongs(split, [held_out("legs", count, animal) for animal, count in animals.items()]):
        return None
    parts, totals = [], []
    for animal, count in animals.items():
        each, total = ANIMALS[animal], count * ANIMALS[animal]
        steps = product(each, count) if each < 10 or count < 10 else f"{count}*10={count * 10}"
        if each == 14:
            steps = f"{count}*10={count * 10}, {product(4, count)}, {count * 10}+{count * 4}={total}"
        work = f" {count} {animal}: {each} legs each. {count}*{each}: {steps}. {animal} {total}."
        parts.append(Part(f"{count} {animal}", work, str(total)))
        totals.append(total)
    join = f"{running_sum(totals)}.\n" if n > 1 else ""
    return Problem("legs", entry["question"].strip(), tuple(parts), join, entry["answer"], False, (entry,))


SUMS_LEAD = Words(
    seen=["Work out each of these.", "Calculate all of these.", "What do these come to?", "Solve these:"],
    unseen=["Please evaluate the following sums.", "Give me the result of every line."],
    more=["Find the value of each.", "Compute these, please.", "Do all of the arithmetic below.", "How much is each?"],
)


def sums(split: str, rng: random.Random, n: int, strange: bool) -> Problem | None:
    import reasoning_gym

    entries, parts = [], []
    while len(entries) < n:
        entry = reasoning_gym.create_dataset(
            "chain_sum", seed=rng.randrange(2**31), size=1, min_terms=4, max_terms=6, min_digits=1, max_digits=1
        )[0]
        expression = entry["metadata"]["expression"]
        pieces = expression.split()
        totals, steps = [int(pieces[0])], ["".join(pieces)]
        for i in range(1, len(pieces), 2):
            totals.append(totals[-1] + (int(pieces[i + 1]) if pieces[i] == "+" else -int(pieces[i + 1])))
            steps.append("".join([str(totals[-1]), *pieces[i + 2 :]]))
        if min(totals) < 0 or any(entry["question"] == e["question"] for e in entries):
            continue  # running totals that stay positive
        entries.append({**entry, "split": held_out("sums", expression)})
        letter = "ABCDEF"[len(entries) - 1]
        parts.append(Part(letter, f" {letter}: {'='.join(steps)}. {letter} {totals[-1]}.", f"{letter} {totals[-1]}"))
    if not _belongs(split, [e["split"] for e in entries]):
        return None
    if n == 1:
        return Problem("sums", entries[0]["question"], tuple(parts), "", entries[0]["answer"], False, tuple(entries))
    lead = SUMS_LEAD.pick(split, rng, strange)
    lines = "\n".join(
        f"{letter}: {e['metadata']['expression']} =" for letter, e in zip("ABCDEF", entries, strict=False)
    )
    answer = ", ".join(p.result for p in parts)
    return Problem("sums", f"{lead}\n{lines}", tuple(parts), "", answer, strange, tuple(entries))


def _belongs(split: str, of: list[str]) -> bool:
    """Training sees no held-out number at all; a dev or test problem holds one at least, and none of the other's."""
    return set(of) <= {"train", split} and split in of


BILL = Words(
    seen=[
        "{name} buys {q} {goods} at {p} cents each and a bag for {r} cents.",
        "{name} takes {q} {goods} for {p} cents apiece and pays {r} cents for the wrapping.",
        "{name} orders {q} {goods} ({p} cents each, plus {r} cents for postage).",
        "{name} needs {q} {goods} and a box; the {goods} cost {p} cents each, the box {r} cents.",
    ],
    unseen=[
        "{name} picks up {q} {goods}, each priced at {p} cents, and a newspaper priced at {r} cents.",
        "Into the basket of {name} go {q} {goods} of {p} cents and a loaf of {r} cents.",
    ],
    more=[
        "{name} chooses {q} {goods}, {p} cents a piece, and a card that costs {r} cents.",
        "{name} pays for {q} {goods} ({p} cents per item) and a fee of {r} cents.",
        "{q} {goods} at {p} cents each and a cup of tea at {r} cents are what {name} asks for.",
        "A parcel with {q} {goods}, {p} cents each, and a string for {r} cents goes to {name}.",
        "For {name} there are {q} {goods} of {p} cents each, and a tip of {r} cents.",
        "It is {name} who wants {q} {goods} for {p} cents each and a roll for {r} cents.",
        "The shop sells {name} {q} {goods} at {p} cents and one lid at {r} cents.",
        "{name} gets {q} {goods}. Each of the {goods} costs {p} cents, and the ride {r} cents.",
        "With a voucher {name} collects {q} {goods}, worth {p} cents each, and some tape worth {r} cents.",
    ],
)
BILL_ASK = Words(
    seen=[
        "How many cents does each of them pay?",
        "What does everyone owe, in cents?",
        "Find the bill of each in cents.",
        "How much is it for each person, in cents?",
    ],
    unseen=["Tell me how many cents every customer spends.", "What must each one hand over, in cents?"],
    more=[
        "Work out the cents for each of them.",
        "In cents, how much does everybody need?",
        "Say what all of them have to pay, in cents.",
        "List the cost for each one in cents.",
        "Please give each total in cents.",
    ],
)
BILL_ASK_ONE = Words(
    seen=["How many cents is that?", "What does that cost in all, in cents?", "Find the bill in cents."],
    unseen=["Tell me how many cents go over the counter."],
    more=["Give the price of everything in cents.", "Say what that comes to in cents.", "How much is due, in cents?"],
)


def bills(
    split: str, rng: random.Random, n: int, strange: bool, arrange: Arrange = in_a_row
) -> Problem | None:  # fmt: skip
    sentence = BILL.pick(split, rng, strange)
    lines, parts = [], []
    for name in rng.sample(NAMES[split], n):
        q, p = pick(split, rng, lambda: (rng.randint(2, 9), rng.randint(11, 49)))
        r = rng.randint(2, 9)
        lines.append(sentence.format(name=name, q=q, goods=rng.choice(GOODS[split]), p=p, r=r))
        total = q * p + r
        work = f" {name}: {q}*{p}+{r}. {product(q, p)}, {q * p}+{r}={total}. {name} {total}."
        parts.append(Part(name, work, f"{name} {total}"))
    if n == 1:
        ask = BILL_ASK_ONE.pick(split, rng, strange)
        answer = parts[0].result.split()[1]
    else:
        ask = BILL_ASK.pick(split, rng, strange)
        answer = ", ".join(p.result for p in parts)
    return Problem("bills", arrange(lines, ask), tuple(parts), "", answer, strange)


UNITS = [
    ("hour", "minute", 60),
    ("minute", "second", 60),
    ("day", "hour", 24),
    ("foot", "inch", 12),
    ("week", "day", 7),
]
TIME = {
    60: Words(
        seen=[
            "{name} reads for {a} and then for {c}.",
            "{name} trains {a} on one day and {c} on the next.",
            "{name} needs {a} for the first lap and {c} for the second.",
        ],
        unseen=["A rehearsal of {a} and a concert of {c} are behind {name}."],
        more=[
            "{name} paints for {a} and cleans up for {c}.",
            "After {a} of running, {name} swims for {c}.",
            "A film of {a} and a clip of {c} are what {name} watches.",
            "A drive of {a}, then a walk of {c}: that is the day of {name}.",
            "Two calls, of {a} and of {c}, keep {name} busy.",
            "For {name} the way there takes {a} and the way back {c}.",
            "{a} of practice and {c} of rest are planned by {name}.",
        ],
    ),
    24: Words(
        seen=["{name} is on the road for {a} and then for {c}.", "{name} sails for {a} and rests for {c}."],
        unseen=["The voyages of {name} take {a} and {c}."],
        more=[
            "Two trips keep {name} away, first {a}, then {c}.",
            "First a hike of {a}, then a ride of {c}: {name} is tired.",
            "After {a} on a boat, {name} waits for {c}.",
            "Two flights, of {a} and of {c}, are booked for {name}.",
            "{a} at sea and {c} on land are planned by {name}.",
        ],
    ),
    12: Words(
        seen=["{name} has boards of {a} and {c}.", "{name} lays pipes that are {a} and {c} long."],
        unseen=["In the shed of {name} stand two planks, {a} and {c} long."],
        more=[
            "{name} knots two ropes, one of {a}, one of {c}.",
            "Two strips, of {a} and of {c}, are cut by {name}.",
            "A rail of {a} and a rod of {c} belong to {name}.",
            "The two ribbons of {name} measure {a} and {c}.",
            "{name} ties a cord of {a} to a cord of {c}.",
        ],
    ),
    7: Words(
        seen=["{name} is away for {a} and then for {c}.", "{name} takes courses of {a} and {c}."],
        unseen=["The visits of {name} last {a} and {c}."],
        more=[
            "Two holidays, {a} and {c}, are granted to {name}.",
            "A camp of {a} and a fair of {c} are planned by {name}.",
            "After {a} abroad, {name} stays home for {c}.",
            "Two jobs, of {a} and of {c}, are done by {name}.",
            "{a} of school and {c} of leave lie ahead of {name}.",
        ],
    ),
}
TIME_ASK = Words(
    seen=["Who has the most in total?", "Whose total is the largest?", "Who comes out on top in total?"],
    unseen=["Which of them reaches the greatest total?"],
    more=[
        "Which one has the biggest sum?",
        "Say who has the most altogether.",
        "Name the one whose sum is the highest.",
        "Who is ahead when all is added up?",
        "Which person has the longest total?",
        "Find the one that gets the most overall.",
    ],
)
TIME_ASK_ONE = Words(
    seen=["How many {units} is that in total?", "What is the total in {units}?"],
    unseen=["Express the whole of it in {units}."],
    more=[
        "Give the total in {units}.",
        "Turn all of it into {units}.",
        "Say how many {units} there are altogether.",
        "Write the sum in {units}.",
        "Convert everything to {units}, please.",
    ],
)
_PLURAL = {"foot": "feet", "inch": "inches"}


def _amount(n: int, unit: str) -> str:
    return f"{n} {unit}" if n == 1 else f"{n} {_PLURAL.get(unit, unit + 's')}"


def times(
    split: str, rng: random.Random, n: int, strange: bool, arrange: Arrange = in_a_row
) -> Problem | None:  # fmt: skip
    big, small, per = rng.choice(UNITS)
    sentence = TIME[per].pick(split, rng, strange)
    lines, parts, totals = [], [], []
    for name in rng.sample(NAMES[split], n):
        while True:
            _, a, b, c = pick(split, rng, lambda: (per, rng.randint(1, 9), rng.randint(1, per - 1), rng.randint(2, 9)))
            one = a * per + b
            if one + c not in totals:  # one of them has the most
                break
        first = f"{_amount(a, big)} {_amount(b, small)}"
        lines.append(sentence.format(name=name, a=first, c=_amount(c, small)))
        total = one + c
        steps = f"{product(a, per)}, {a * per}+{b}={one}, {one}+{c}={total}"
        parts.append(Part(name, f" {name}: {a}*{per}+{b}+{c}. {steps}. {name} {total}.", f"{name} {total}"))
        totals.append(total)
    if n == 1:
        ask = TIME_ASK_ONE.pick(split, rng, strange).format(units=_PLURAL.get(small, small + "s"))
        return Problem("times", arrange(lines, ask), tuple(parts), "", str(totals[0]), strange)
    best, join = 0, parts[0].result
    for i in range(1, n):
        more = totals[i] > totals[best]
        join += f", {parts[i].result}{'>' if more else '<'}{totals[best]}"
        best = i if more else best
    ask = TIME_ASK.pick(split, rng, strange)
    answer = parts[best].result
    return Problem("times", arrange(lines, ask), tuple(parts), f"{join}.\n", answer, strange)


STORY_START = Words(
    seen=["{name} has {x} {things}.", "{name} starts with {x} {things}.", "There are {x} {things} in a box."],
    unseen=["In the morning {name} counts {x} {things}."],
    more=[
        "{name} owns {x} {things}.",
        "On a shelf lie {x} {things}.",
        "At first {name} finds {x} {things}.",
        "On Monday {name} brings {x} {things}.",
        "{name} collects {x} {things}.",
        "When the day begins, {x} {things} belong to {name}.",
        "A drawer holds {x} {things}.",
        "Early on, {name} counts out {x} {things}.",
    ],
)
STORY_UP = Words(
    seen=["Then {y} more come.", "Next {y} are added.", "After that {y} are won."],
    unseen=["Later on {y} turn up."],
    more=[
        "Later {y} are found.",
        "Soon {y} show up.",
        "Then {y} arrive.",
        "In the evening {y} are bought.",
        "Then a friend brings {y}.",
        "Afterwards {y} are put back.",
        "Now {y} come in.",
        "Some time later {y} more are counted.",
        "A bit later {y} appear.",
        "Shortly after, {y} are brought.",
        "{y} more are picked up.",
        "Another {y} come along.",
    ],
)
STORY_DOWN = Words(
    seen=["Then {y} are lost.", "Next {y} are given away.", "After that {y} are sold."],
    unseen=["Later on {y} go missing."],
    more=[
        "Later {y} are stolen.",
        "Soon {y} vanish.",
        "Then {y} break.",
        "In the evening {y} are thrown out.",
        "Then a friend takes {y}.",
        "Afterwards {y} get lost.",
        "Now {y} leave.",
        "Some time later {y} are gone.",
        "A bit later {y} disappear.",
        "Shortly after, {y} are taken.",
        "{y} of them fall down a drain.",
        "Another {y} are handed over.",
    ],
)
STORY_TIMES = ["Then the number doubles.", "Next the number triples."]
STORY_ASK = Words(
    seen=["How many {things} are there in the end?", "How many {things} are left?"],
    unseen=["What is the final number of {things}?"],
    more=["Count the {things} at the end.", "How many {things} is that now?", "Say how many {things} remain."],
)


def story(split: str, rng: random.Random, n: int, strange: bool) -> Problem | None:
    """n steps, each of which needs the one before: one part, so no threads."""
    name, things = rng.choice(NAMES[split]), rng.choice(THINGS[split])
    x = rng.randint(11, 40)
    lines = [STORY_START.pick(split, rng, strange).format(name=name, x=x, things=things)]
    steps, doubled, total = [], False, x
    for _ in range(n):
        kind = rng.choice("+++---*")
        if kind == "*" and not doubled and total < 50:
            i = rng.randrange(2)
            lines.append(STORY_TIMES[i])
            steps.append(f"{product(i + 2, total)}" if total >= 10 else f"{i + 2}*{total}={(i + 2) * total}")
            total *= i + 2
            doubled = True
            continue
        up = kind != "-" or total < 4
        sign, most = (1, 9) if up else (-1, min(9, total - 1))
        steps_of = [sign * y for y in range(2, most + 1)]
        y = rng.choice([y for y in steps_of if held_out("story", total, y) == split] or steps_of)  # some have none
        lines.append((STORY_UP if y > 0 else STORY_DOWN).pick(split, rng, strange).format(y=abs(y)))
        steps.append(f"{total}{'+' if y > 0 else '-'}{abs(y)}={total + y}")
        total += y
    lines.append(STORY_ASK.pick(split, rng, strange).format(things=things))
    part = Part("", f" {', '.join(steps)}.", str(total))
    return Problem("story", " ".join(lines), (part,), "", str(total), strange)


def drill(rng: random.Random) -> Problem:
    """For training alone: additions and subtractions as joins and threads need them."""
    sums: list[str] = []
    asked: list[str] = []
    for _ in range(rng.randint(5, 9)):
        kind = rng.randrange(10)
        if kind < 2 or kind > 7:  # a running total of a join
            x, y = rng.choice([rng.randint(2, 99), rng.randint(80, 900)]), rng.randint(2, 210)
        elif kind == 2:  # tens and ones of a product
            x, y = rng.randint(2, 54) * 10, rng.randint(2, 81)
        elif kind < 6:  # a step of a thread or a story
            x, y = rng.randint(10, 560), rng.randint(2, 9)
        else:
            x, y = rng.randint(10, 99), rng.randint(2, 9)
        sign = "-" if kind in (5, 6) else "+"
        asked.append(f"{x}{sign}{y}")
        last = x - y if sign == "-" else x + y
        sums.append(f"{x}-{y}={last}" if sign == "-" else added(x, y))
    part = Part("", f" {', '.join(sums)}.", "")
    return Problem("drill", f"Add and subtract: {', '.join(asked)}", (part,), "", str(last))


Maker = Callable[[str, random.Random, int, bool], Problem | None]
# A family's name: what makes one problem of it (split, rng, number of parts, in held-out words), and its share.
MAKERS: dict[str, tuple[Maker, int]] = {
    "legs": (legs, 22),
    "sums": (sums, 22),
    "bills": (bills, 22),
    "times": (times, 22),
    "story": (story, 12),
}


def problems(
    split: str, seed: int, families: Iterable[str] = FAMILIES, most: int = 6, drills: float = 0.0,
    makers: Mapping[str, tuple[Maker, int]] = MAKERS,
) -> Iterator[Problem]:  # fmt: skip
    """Unique problems without end. Parts: one to `most`, about equally often; every family by its share. `drills`:
    share of rows that are additions alone (for training). makers: where `families` are found."""
    names = list(families)
    if split not in SPLITS:
        raise ValueError(f"split: {split!r}; pass one of {', '.join(SPLITS)}")
    rng = random.Random(f"{split} {seed}")
    seen: set[str] = set()
    while True:
        if drills and rng.random() < drills:
            yield drill(rng)
            continue
        family = rng.choices(names, [makers[f][1] for f in names])[0]
        problem = None
        while problem is None or problem.prompt in seen:  # anew, number of parts and all: some have few problems
            n, strange = rng.randint(1, most), rng.random() < 0.5 and split != "train"
            problem = makers[family][0](split, rng, n, strange)
        seen.add(problem.prompt)
        yield problem
