"""Ordinary questions, with nothing to fork: what the adapted model has to answer as the stock model does.

`questions("train")` draws chats without end, unique by text, of some twenty kinds: facts, definitions, poems, advice,
lists, code, translations, greetings, a second question behind a first answer, with and without a system message. Their
answers are not here: they are what the stock model itself says (`ordinary.py` makes them).

**Splits.** A topic (`topics.txt`: a country, a word, a whole question) belongs to one split by a hash (78 % train, 6 %
dev, 16 % test); "the capital of France" is held out whatever its hash. Some ways to ask are left to dev and test.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

Chat = list[dict[str, str]]

STOCK_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"  # of the stock chat template


class Kind(NamedTuple):
    """Ways to ask, with ``{x}`` for the topic (`unseen` in dev and test alone), and the topics."""

    seen: list[str]
    unseen: list[str]
    topics: list[str]


def _topics(file: Path) -> dict[str, list[str]]:
    """Sections of a text file: ``[name]``, then a topic a line."""
    out: dict[str, list[str]] = {}
    for line in filter(None, file.read_text(encoding="utf-8").splitlines()):
        if line[0] == "[":
            out[line[1:-1]] = now = []
        else:
            now.append(line)
    return out


TOPICS = _topics(Path(__file__).with_name("topics.txt"))
KINDS: dict[str, Kind] = {
    "capital": Kind(
        ["What is the capital of {x}?", "Which city is the capital of {x}?", "Name the capital of {x}."],
        ["Tell me the capital city of {x}."],
        TOPICS["countries"],
    ),
    "country": Kind(
        ["Where is {x}?", "What is {x} known for?", "Which language do people speak in {x}?", "Tell me about {x}.",
         "What should I see in {x}?", "What do people eat in {x}?"],
        ["On which continent does {x} lie?", "Write two sentences about {x}."],
        TOPICS["countries"],
    ),
    "thing": Kind(
        ["What is {x}?", "Explain {x} in one sentence.", "Explain {x} to a child.", "Define {x}.",
         "Tell me something about {x}.", "Why is {x} important?"],
        ["Describe {x} in your own words.", "What do I need to know about {x}?"],
        TOPICS["things"],
    ),
    "poem": Kind(
        ["Write a short poem about {x}.", "Write a haiku about {x}.", "Tell me a short story about {x}.",
         "Write a sentence about {x}.", "Write the first lines of a song about {x}."],
        ["Make up a fairy tale about {x}.", "Give me four lines of verse on {x}."],
        TOPICS["subjects"],
    ),
    "how": Kind(
        ["How do I {x}?", "Give me three tips to {x}.", "What do I need to {x}?", "How long does it take to {x}?",
         "What is the best way to {x}?"],
        ["I want to {x}. Where do I start?", "List the steps to {x}."],
        TOPICS["actions"],
    ),
    "why": Kind(["{x}"], ["{x} Answer briefly.", "Please explain: {x}"], TOPICS["why"]),
    "fact": Kind(["{x}"], ["{x} Answer in a full sentence.", "Quick question: {x}"], TOPICS["facts"]),
    "person": Kind(
        ["Who was {x}?", "What is {x} famous for?", "When did {x} live?", "Tell me about {x} in two sentences."],
        ["Why do people remember {x}?"],
        TOPICS["people"],
    ),
    "list": Kind(
        ["List five {x}.", "Name three {x}.", "Give me some {x}.", "What are some {x}?"],
        ["I need four {x}.", "Can you think of {x}?"],
        TOPICS["lists"],
    ),
    "code": Kind(
        ["Write a Python function that {x}.", "Write Python code that {x}.", "Which line of Python {x}?"],
        ["Show me a short program that {x}."],
        TOPICS["tasks"],
    ),
    "sentence": Kind(
        ["Translate into French: {x}", "Translate into Spanish: {x}", "Translate into German: {x}",
         "Make this more polite: {x}", "Correct the grammar: {x}", "Is this positive or negative? {x}",
         "Say this in other words: {x}"],
        ["Turn this into a question: {x}", "Continue this text: {x}"],
        TOPICS["sentences"],
    ),
    "pair": Kind(
        ["What is the difference between {x}?", "Compare {x}.", "What do {x} have in common?"],
        ["Which would you choose of {x}, and why?"],
        TOPICS["pairs"],
    ),
    "talk": Kind(["{x}"], ["Hey! {x}"], TOPICS["talk"]),
    "email": Kind(
        ["Write an email to {x}.", "Write a short message to {x}.", "Help me write to {x}."],
        ["What could I write to {x}?"],
        TOPICS["requests"],
    ),
    "situation": Kind(["{x}"], ["Read this and answer. {x}"], TOPICS["situations"]),
    "double": Kind(["{x}"], ["{x} Keep it short."], TOPICS["double"]),
}  # fmt: skip
_WEIGHT = {"thing": 3, "poem": 2, "how": 3, "why": 2, "fact": 3, "country": 2, "capital": 2, "situation": 2}

SYSTEMS = {
    "train": ["You are a helpful assistant.", "You are a pirate.", "Answer in one sentence.",
              "Answer as briefly as you can.",
              "You are a patient teacher.", "You are a friendly guide.", "You write in simple words."],
    "dev": ["Be concise.", "You are a poet."],
    "test": ["You are an expert who answers politely.", "Reply in a few words.", "You are a cheerful librarian."],
}  # fmt: skip
# (first question, its answer): a conversation that goes on with one of NEXT.
FIRST = [
    ("What is the capital of Italy?", "The capital of Italy is Rome."),
    ("What is gravity?", "Gravity is the force by which things that have mass attract one another."),
    ("Name a fruit.", "An apple."),
    ("Hello!", "Hello! How can I help you today?"),
    ("Tell me about owls.", "Owls are birds that hunt at night. They see and hear very well."),
    ("How do I make tea?", "Boil water, pour it over the tea and wait three minutes."),
    ("Who wrote Faust?", "Faust was written by Johann Wolfgang von Goethe."),
    ("I am going to Lisbon.", "How nice! Lisbon is a beautiful city with many hills and views."),
    ("What is a poem?", "A poem is a text that plays with sound, rhythm and images."),
    ("Give me a tip for my health.", "Drink enough water and go for a walk every day."),
    ("What is Python?", "Python is a programming language that is easy to read."),
    ("My dog is ill.", "I am sorry to hear that. It would be best to see a vet."),
    ("What is a whale?", "A whale is a large mammal that lives in the sea."),
    ("Write a line about the moon.", "The moon hangs over the quiet hills like a silver lamp."),
    ("Where do penguins live?", "Most penguins live in the southern half of the Earth, many of them in Antarctica."),
    ("What does a baker do?", "A baker makes bread, cakes and other baked goods."),
]
NEXT = [
    "Tell me more.", "Can you say that in simpler words?", "Why?", "Thank you!", "Are you sure?", "Give me an example.",
    "And what else?", "Say that in one sentence.", "I do not understand.", "What should I read about it?",
    "Write a short poem about it.", "How do you know that?", "What is the most important thing about it?",
]  # fmt: skip


def split_of(topic: str) -> str:
    """The split a topic belongs to, by its hash."""
    if topic == "France":  # what everybody asks first
        return "test"
    h = int.from_bytes(hashlib.blake2s(topic.encode(), digest_size=4).digest(), "big") % 100
    return "test" if h < 16 else "dev" if h < 22 else "train"


def _ask(split: str, rng: random.Random) -> tuple[str, str]:
    """(kind, one question of this split)."""
    names = list(KINDS)
    while True:
        name = rng.choices(names, [_WEIGHT.get(n, 1) for n in names])[0]
        kind = KINDS[name]
        if topics := [t for t in kind.topics if split_of(t) == split]:
            ways = kind.seen if split == "train" or rng.random() < 0.5 else kind.unseen
            return name, rng.choice(ways).format(x=rng.choice(topics))


def _more(split: str, rng: random.Random) -> Chat:
    """A second question behind a first answer."""
    first = [pair for pair in FIRST if split_of(pair[0]) == split]
    following = [text for text in NEXT if split_of(text) == split]
    if not first or not following:
        return []
    question, answer = rng.choice(first)
    last = rng.choice(following)
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer},
            {"role": "user", "content": last}]  # fmt: skip


def questions(split: str, seed: int = 0) -> Iterator[tuple[str, Chat]]:
    """(kind, chat) without end, each chat once. One in eight goes on behind a first answer; three in ten have the stock
    model's system message, one in ten another one."""
    if split not in SYSTEMS:
        raise ValueError(f"split: {split!r}; pass one of {', '.join(SYSTEMS)}")
    rng = random.Random(f"questions {split} {seed}")
    seen: set[str] = set()
    while True:
        kind, chat = "more", _more(split, rng) if rng.random() < 0.125 else []
        if not chat:
            kind, asked = _ask(split, rng)
            chat = [{"role": "user", "content": asked}]
        text = "\n".join(message["content"] for message in chat)
        if text in seen:
            continue
        seen.add(text)
        draw = rng.random()
        if draw < 0.4:
            system = STOCK_SYSTEM if draw < 0.3 else rng.choice(SYSTEMS[split])
            chat = [{"role": "system", "content": system}, *chat]
        yield kind, chat
