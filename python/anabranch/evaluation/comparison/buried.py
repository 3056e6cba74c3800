"""Context rot, measured: problems among sentences that have nothing to do with them, of a length of one's choice."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from anabranch.answers import is_right
from anabranch.evaluation.comparison.items import Item
from anabranch.strategies.calls.passages import take_apart

if TYPE_CHECKING:
    from anabranch.evaluation.comparison.tasks import Task

__all__ = ["BillsTask", "BuriedTask", "WhereaboutsTask", "buried_of", "filler"]

# 16 · 18 · 16 sentences of about eleven words. None has a number, a price or a person in it.
WHO = (
    "The old lighthouse", "A grey heron", "The village bakery", "The northern ferry", "A long goods train",
    "The botanical garden", "The stone bridge", "A travelling orchestra", "The public library", "The weather station",
    "A narrow footpath", "The clock tower", "The fishing harbour", "A green tram", "The mountain hut",
    "The town museum",
)  # fmt: skip
WHAT = (
    "was painted", "drew a small crowd", "seemed quieter than usual", "was covered in fog", "stood out",
    "was shown on a postcard", "looked almost new", "could hardly be seen", "was talked about", "was swept clean",
    "smelled of fresh rain", "was lit by lanterns", "appeared in the local paper", "was drawn by a pupil",
    "stayed open late", "was full of visitors", "caught the evening light", "was repaired with great care",
)  # fmt: skip
WHEN = (
    "on a cold morning in early spring", "while the wind blew from the west", "long before the market opened",
    "as the leaves began to fall", "during a very dry summer", "although the roads were wet",
    "when the school holidays had begun", "after the snow had melted away", "just as the bells began to ring",
    "in the last week of autumn", "because the sky had cleared at last", "until the street lamps went out",
    "shortly before the parade arrived", "as it does nearly every year", "while the river was still high",
    "to the surprise of the whole valley",
)  # fmt: skip

PARTS = 3
NAMES = ("Maria", "Tom", "Laura", "Max", "Sarah", "Hugo", "Linda", "Robert", "Nora", "Martin", "Eva", "Philip")
GOODS = ("oranges", "bottles", "pencils", "tiles", "carrots", "boxes", "shells", "bells")
THINGS = ("torch", "map", "violin", "whistle", "compass", "blanket", "camera", "ladder", "kite", "basket")
PLACES = (
    "kitchen", "garage", "attic", "cellar", "garden", "office", "cupboard", "bathroom", "hallway", "shed", "bedroom",
    "car",
)  # fmt: skip


def filler(words: int, rng: random.Random) -> list[str]:
    """Sentences of together about `words` words (the last one may go beyond), none of them twice in a row of 4,608."""
    return list(_up_to(words, rng))


def _up_to(words: int, rng: random.Random) -> Iterator[str]:
    every = [(who, what, when) for who in WHO for what in WHAT for when in WHEN] if words > 0 else []
    while words > 0:
        rng.shuffle(every)
        for parts in every:
            if words <= 0:
                return
            sentence = " ".join(parts) + "."
            words -= len(sentence.split())
            yield sentence


@dataclass(frozen=True)
class BuriedTask:
    """The problems of `task`, their sentences spread over `filler` words that have nothing to do with them.

    What is asked (the last line of a prompt, or the last sentence of one in a single line) stays at the end. Without
    filler the problems are those of the task itself.
    """

    task: Task
    filler: int

    @property
    def name(self) -> str:
        return f"buried({self.task.name},filler={self.filler})"

    def items(self, count: int, seed: int) -> list[Item]:
        return [self._buried(item, f"{seed}/{n}") for n, item in enumerate(self.task.items(count, seed))]

    def _buried(self, item: Item, seed: str) -> Item:
        if not isinstance(item.prompt, str):
            raise ValueError(f"task {self.name!r}: a prompt of chat messages cannot be buried; use one that is text")
        if not self.filler:
            return item
        rng = random.Random(seed)
        facts, question = take_apart(item.prompt, 1)
        around = filler(self.filler, rng)
        places = sorted(rng.choices(range(len(around) + 1), k=len(facts)))
        sentences: list[str] = []
        for at, sentence in enumerate([*around, None]):
            while places and places[0] == at:
                sentences.append(facts[len(facts) - len(places)].strip())
                places.pop(0)
            if sentence is not None:
                sentences.append(sentence)
        between = "\n" if "\n" in item.prompt else " "
        return replace(item, prompt=f"{' '.join(sentences)}{between}{question}")


def _check_count(task: str, option: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 2 <= value <= len(NAMES):
        raise ValueError(f"task {task!r}: {option}={value!r}; pass a number from 2 to {len(NAMES)}")


@dataclass(frozen=True)
class BillsTask:
    """What each of `parts` people pays: a sentence a person, none of which needs another; `smollm2-adaptive` can."""

    parts: int = PARTS

    def __post_init__(self) -> None:
        _check_count("bills", "parts", self.parts)

    @property
    def name(self) -> str:
        return "bills" if self.parts == PARTS else f"bills(parts={self.parts})"

    def items(self, count: int, seed: int) -> list[Item]:
        rng = random.Random(seed)
        return [self._item(rng) for _ in range(count)]

    def _item(self, rng: random.Random) -> Item:
        lines, answers = [], []
        for name in rng.sample(NAMES, self.parts):
            amount, price, bag = rng.randint(2, 9), rng.randint(11, 49), rng.randint(2, 9)
            goods = rng.choice(GOODS)
            lines.append(f"{name} buys {amount} {goods} at {price} cents each and a bag for {bag} cents.")
            answers.append(f"{name} {amount * price + bag}")
        answer = ", ".join(answers)
        prompt = " ".join([*lines, "How many cents does each of them pay?"])
        return Item(prompt, answer, lambda text: float(is_right(text, answer)))


@dataclass(frozen=True)
class WhereaboutsTask:
    """Where one of `people` keeps something, each told in a sentence: a look-up that stock models can do."""

    people: int = PARTS

    def __post_init__(self) -> None:
        _check_count("whereabouts", "people", self.people)

    @property
    def name(self) -> str:
        return "whereabouts" if self.people == PARTS else f"whereabouts(people={self.people})"

    def items(self, count: int, seed: int) -> list[Item]:
        rng = random.Random(seed)
        return [self._item(rng) for _ in range(count)]

    def _item(self, rng: random.Random) -> Item:
        names = rng.sample(NAMES, self.people)
        things, places = rng.choices(THINGS, k=self.people), rng.sample(PLACES, self.people)
        lines = [f"{n} keeps a {t} in the {p}." for n, t, p in zip(names, things, places, strict=True)]
        asked = rng.randrange(self.people)
        answer = places[asked]
        prompt = " ".join([*lines, f"Where does {names[asked]} keep the {things[asked]}?"])
        return Item(prompt, answer, lambda text: float(is_right(text, answer)))


def buried_of(name: str) -> tuple[str, int] | None:
    """The task and the words of filler in the name of a `BuriedTask`; None for another name.

    >>> buried_of("buried(bills(parts=4),filler=250)")
    ('bills(parts=4)', 250)
    """
    match = re.fullmatch(r"buried\((.*),filler=(\d+)\)", name)
    return None if match is None else (match[1], int(match[2]))
