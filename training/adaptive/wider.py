"""More kinds of problems than the five families: the same work asked for in other words, forms and orders.

    compute   expressions for people, "Compute 23 * 4 + 6 for Ana and 31 * 3 + 5 for Ben"
    values    expressions for nobody, "What are 23 * 4 + 6 and 31 * 3 - 5?"; the results side by side
    packs     how many things there are in all; a thread a kind, a running total at the join
    herd      leg counting in words of ours
    each      what everybody earns, walks, reads, saves; half of the held-out problems are of scenes never trained on
    orders    bills with the question first, a line a person, bullets or numbers
    longest   times, arranged in the same ways

Numbers, names and goods keep to the splits of `families`: a product is held out in every family or in none. The 440
problems of the score card are of the five families alone; `problems_wider.jsonl` holds the ones of these.
"""

from __future__ import annotations

import random
from dataclasses import replace

from .families import (
    GOODS,
    MAKERS,
    NAMES,
    Arrange,
    Maker,
    Part,
    Problem,
    Words,
    bills,
    held_out,
    in_a_row,
    pick,
    product,
    running_sum,
    times,
)


def joined(items: list[str], rng: random.Random) -> str:
    """``a, b and c``."""
    if len(items) == 1:
        return items[0]
    return ", ".join(items[:-1]) + rng.choice([" and ", ", and "]) + items[-1]


# ------------------------------------------------------------------------------------------------ expressions


TIMES_SIGN = Words(seen=[" * ", "*", " x "], unseen=[" · "], more=[" × ", " times ", " multiplied by "])


def expression(split: str, rng: random.Random, strange: bool) -> tuple[str, str, str, int]:
    """(as the prompt has it, as the work repeats it, the steps, the value): a product with a number before or behind
    it, or a chain of single digits."""
    if rng.random() < 0.2:
        return chain(split, rng)
    q, p = pick(split, rng, lambda: (rng.randint(2, 9), rng.randint(11, 49)))
    a, b = (q, p) if rng.random() < 0.5 else (p, q)
    value, steps = q * p, [product(q, p)]
    between = TIMES_SIGN.pick(split, rng, strange)
    shown, short = f"{a}{between}{b}", f"{a}*{b}"
    for _ in range(rng.choice([0, 1, 1, 1, 2])):
        r, sign = rng.randint(2, 9), rng.choice("++-")
        after = value + r if sign == "+" else value - r
        word = {"+": "plus", "-": "minus"}[sign] if "t" in between else sign  # times, multiplied
        steps.append(f"{value}{sign}{r}={after}")
        shown, short, value = f"{shown} {word} {r}", f"{short}{sign}{r}", after
    if len(steps) == 1 and rng.random() < 0.25:
        r = rng.randint(2, 9)
        steps.append(f"{value}+{r}={value + r}")
        shown, short, value = f"{r} + {shown}", f"{r}+{short}", value + r
    return shown, short, ", ".join(steps), value


def chain(split: str, rng: random.Random) -> tuple[str, str, str, int]:
    """``3 + 8 - 2 + 6``: `expression` for additions and subtractions alone; running totals stay positive."""
    while True:
        value, shown, steps = rng.randint(1, 9), "", []
        shown = str(value)
        for _ in range(rng.randint(2, 5)):
            r, sign = rng.randint(1, 9), "+" if value < 9 else rng.choice("+-")
            after = value + r if sign == "+" else value - r
            steps.append(f"{value}{sign}{r}={after}")
            shown, value = f"{shown} {sign} {r}", after
        if held_out("sums", shown) == split:
            return shown, shown.replace(" ", ""), ", ".join(steps), value


COMPUTE = Words(
    seen=["Compute {items}.", "Work out {items}.", "Calculate {items}.", "Find {items}."],
    unseen=["Please determine {items}.", "I need the values: {items}."],
    more=[
        "What is {items}?",
        "Evaluate {items}.",
        "Can you compute {items}?",
        "Please work out {items}.",
        "Tell me {items}.",
        "Solve {items}.",
        "I want to know {items}.",
        "How much is {items}?",
        "Give me the results: {items}.",
        "{items}",
        "Do the maths: {items}",
    ],
)
FOR = Words(
    seen=["{e} for {name}", "{name}: {e}", "for {name} {e}"],
    unseen=["{name} gets {e}"],
    more=["{name} has {e}", "{e} ({name})", "{name} = {e}", "{name}'s {e}", "{e} on behalf of {name}"],
)
VALUES = Words(
    seen=["What are {items}?", "Compute {items}.", "Work out {items}."],
    unseen=["Please determine {items}."],
    more=["Calculate {items}.", "Evaluate {items}.", "Find the values of {items}.", "How much are {items}?",
          "Tell me what {items} are.", "Give me {items}.", "Results of {items}, please.", "{items}"],
)  # fmt: skip
LIST = [", ", "; ", "\n", "\n- "]  # between the items, besides a sentence's commas and "and"


def _listed(lead: str, items: list[str], rng: random.Random) -> str:
    """The items in a sentence, or, two times in five, as a list behind the lead's words."""
    if len(items) == 1 or rng.random() < 0.6:
        return lead.format(items=joined(items, rng))
    between, words = rng.choice(LIST), lead.replace("{items}", "").strip(" .?:,")
    head = f"{words}:" if words else ""
    return (head + (between if between[0] == "\n" else " ") + between.join(items)).strip()


def _of_each(parts: list[Part]) -> str:
    """What each of some people has: "Ana 98, Ben 160"; the number alone where there is one."""
    return parts[0].result.split()[1] if len(parts) == 1 else ", ".join(p.result for p in parts)


def compute(split: str, rng: random.Random, n: int, strange: bool) -> Problem | None:
    form = FOR.pick(split, rng, strange)
    items, parts = [], []
    for name in rng.sample(NAMES[split], n):
        shown, short, steps, value = expression(split, rng, strange)
        items.append(form.format(e=shown, name=name))
        parts.append(Part(name, f" {name}: {short}. {steps}. {name} {value}.", f"{name} {value}"))
    answer = _of_each(parts)
    return Problem("compute", _listed(COMPUTE.pick(split, rng, strange), items, rng), tuple(parts), "", answer, strange)


def values(split: str, rng: random.Random, n: int, strange: bool) -> Problem | None:
    items, parts = [], []
    while len(parts) < n:
        shown, short, steps, value = expression(split, rng, strange)
        if short in [p.outline for p in parts]:
            continue
        items.append(shown)
        parts.append(Part(short, f" {short}. {steps}. {value}.", str(value)))
    words = COMPUTE if n == 1 else VALUES
    answer = ", ".join(p.result for p in parts)
    return Problem("values", _listed(words.pick(split, rng, strange), items, rng), tuple(parts), "", answer, strange)


# ------------------------------------------------------------------------------------------------ totals


PACK = Words(
    seen=["{q} boxes with {p} {goods} each", "{q} bags of {p} {goods}", "{p} {goods} in each of {q} boxes"],
    unseen=["{q} trays holding {p} {goods} apiece"],
    more=["{q} packs of {p} {goods}", "{q} shelves with {p} {goods} each", "{q} times {p} {goods}",
          "{q} rows of {p} {goods}", "{q} cartons with {p} {goods} in each", "{q} crates, each with {p} {goods}"],
)  # fmt: skip
PACK_ASK = Words(
    seen=["A shop has {items}. How many things is that in total?", "{name} has {items}. How many things altogether?"],
    unseen=["The van of {name} carries {items}. Add up all the things in it."],
    more=[
        "How many things are in {items}?",
        "{name} counts {items}. What is the total?",
        "In a cellar there are {items}. Count all of them.",
        "A school buys {items}. How many items does it get in all?",
        "What is the total number of things in {items}?",
        "{name} unloads {items}. Say how many pieces that makes.",
    ],
)
HERD = Words(
    seen=["How many legs do {items} have in total?", "Count the legs of {items}."],
    unseen=["On a farm live {items}. How many legs walk around there?"],
    more=["What is the total number of legs of {items}?", "How many legs are there on {items}?",
          "There are {items}. How many legs is that altogether?", "{name} sees {items}. How many legs are that?",
          "{items}: how many legs do they have together?"],
)  # fmt: skip


def _total(family: str, prompt: str, parts: list[Part], strange: bool) -> Problem:
    totals = [int(p.result) for p in parts]
    join = f"{running_sum(totals)}.\n" if len(totals) > 1 else ""
    return Problem(family, prompt, tuple(parts), join, str(sum(totals)), strange)


def _about(words: Words, split: str, rng: random.Random, strange: bool, items: list[str]) -> str:
    said = words.pick(split, rng, strange).format(items=joined(items, rng), name=rng.choice(NAMES[split]))
    return said[0].upper() + said[1:]


def packs(split: str, rng: random.Random, n: int, strange: bool) -> Problem | None:
    form = PACK.pick(split, rng, strange)
    items, parts = [], []
    for goods in rng.sample(GOODS[split], min(n, len(GOODS[split]))):
        q, p = pick(split, rng, lambda: (rng.randint(2, 9), rng.randint(11, 29)))
        items.append(form.format(q=q, p=p, goods=goods))
        parts.append(Part(goods, f" {goods}: {q}*{p}. {product(q, p)}. {goods} {q * p}.", str(q * p)))
    return _total("packs", _about(PACK_ASK, split, rng, strange, items), parts, strange)


def _plural(animal: str) -> str:
    if animal in ("deer", "sheep") or animal.endswith("fish"):
        return animal
    return animal[:-1] + "ies" if animal.endswith("fly") else animal + ("es" if animal.endswith(("s", "ch")) else "s")


def herd(split: str, rng: random.Random, n: int, strange: bool) -> Problem | None:
    from reasoning_gym.arithmetic.leg_counting import ANIMALS

    counts = {a: [c for c in range(2, 16) if held_out("legs", c, a) == split] for a in ANIMALS if ANIMALS[a] < 10}
    items, parts = [], []
    for animal in rng.sample([a for a in counts if counts[a]], n):
        legs, count = ANIMALS[animal], rng.choice(counts[animal])
        work = f" {count} {animal}: {legs} legs each. {count}*{legs}: {product(legs, count)}. {animal} {count * legs}."
        items.append(f"{count} {_plural(animal)}")
        parts.append(Part(f"{count} {animal}", work, str(count * legs)))
    return _total("herd", _about(HERD, split, rng, strange, items), parts, strange)


# ------------------------------------------------------------------------------------------------ scenes


SCENES = Words(  # "+" adds r at the end, "-" takes it away
    seen=[
        "+{name} walks {q} laps of {p} metres and {r} metres more.|How many metres does each of them walk?",
        "-{name} works {q} hours at {p} coins an hour and pays {r} coins for lunch.|How many coins are left for each?",
        "+{name} reads {q} chapters of {p} pages and {r} pages of notes.|How many pages does each one read?",
    ],
    unseen=[
        "+{name} waters {q} beds of {p} plants and {r} pots.|How many plants and pots does everybody water?",
        "-{name} bakes {q} trays of {p} rolls and burns {r} of them.|How many good rolls does each baker have?",
    ],
    more=[
        "-{name} wins {q} rounds of {p} points and loses {r} points.|What is the score of each player?",
        "+{name} saves {p} coins a week for {q} weeks and finds {r} more.|How many coins does each one have?",
        "+{name} swims {q} lanes of {p} metres, then {r} metres.|How far does each of them swim, in metres?",
        "-{name} picks {q} baskets of {p} plums and eats {r}.|How many plums does everybody bring home?",
        "+{name} lays {q} rows of {p} tiles and {r} single ones.|How many tiles does each worker lay?",
        "-{name} prints {q} sets of {p} sheets and throws {r} away.|How many sheets does each one keep?",
        "+{name} types {q} lines of {p} letters and {r} letters at the end.|How many letters does each one type?",
        "-{name} fills {q} jars with {p} beans each and takes {r} out.|How many beans does each one have in the jars?",
        "+{name} sells {q} books of {p} tickets and {r} single tickets.|How many tickets does each one sell?",
    ],
)


def each(split: str, rng: random.Random, n: int, strange: bool) -> Problem | None:
    scene = SCENES.pick(split, rng, strange)
    sign = scene[0]
    sentence, _, ask = scene[1:].partition("|")
    lines, parts = [], []
    for name in rng.sample(NAMES[split], n):
        q, p = pick(split, rng, lambda: (rng.randint(2, 9), rng.randint(11, 49)))
        r = rng.randint(2, 9)
        value = q * p + r if sign == "+" else q * p - r
        lines.append(sentence.format(name=name, q=q, p=p, r=r))
        steps = f"{product(q, p)}, {q * p}{sign}{r}={value}"
        parts.append(Part(name, f" {name}: {q}*{p}{sign}{r}. {steps}. {name} {value}.", f"{name} {value}"))
    answer = _of_each(parts)
    return Problem("each", _arrangement(split, rng, strange)(lines, ask), tuple(parts), "", answer, strange)


# ------------------------------------------------------------------------------------------------ arrangements


def _question_first(lines: list[str], ask: str) -> str:
    return " ".join([ask, *lines])


def _lines(lines: list[str], ask: str) -> str:
    return "\n".join([*lines, ask])


def _bullets(lines: list[str], ask: str) -> str:
    return "\n".join([ask, *(f"- {line}" for line in lines)])


def _numbered(lines: list[str], ask: str) -> str:
    return "\n".join([*(f"{i}. {line}" for i, line in enumerate(lines, 1)), ask])


def _stars(lines: list[str], ask: str) -> str:
    return "\n".join([*(f"* {line}" for line in lines), "", ask])


def _labelled(lines: list[str], ask: str) -> str:
    return f"Question: {ask}\nFacts: {' '.join(lines)}"


def _arrangement(split: str, rng: random.Random, strange: bool) -> Arrange:
    if split != "train":
        return rng.choice([_stars, _labelled] if strange else [in_a_row, _question_first, _bullets])
    return rng.choice([in_a_row, in_a_row, _question_first, _lines, _bullets, _numbered])


def orders(split: str, rng: random.Random, n: int, strange: bool) -> Problem | None:
    made = bills(split, rng, n, strange, _arrangement(split, rng, strange))
    return made and replace(made, family="orders")


def longest(split: str, rng: random.Random, n: int, strange: bool) -> Problem | None:
    made = times(split, rng, n, strange, _arrangement(split, rng, strange))
    return made and replace(made, family="longest")


WIDER: dict[str, tuple[Maker, int]] = {
    "compute": (compute, 14),
    "values": (values, 9),
    "packs": (packs, 9),
    "herd": (herd, 7),
    "each": (each, 10),
    "orders": (orders, 6),
    "longest": (longest, 6),
}
# What training draws from: fewer of the families that go well.
_SHARES = {"legs": 16, "sums": 10, "bills": 8, "times": 12, "story": 14}
ALL: dict[str, tuple[Maker, int]] = {**{name: (MAKERS[name][0], share) for name, share in _SHARES.items()}, **WIDER}
