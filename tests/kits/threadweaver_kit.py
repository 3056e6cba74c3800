"""What several test files share of test_threadweaver."""

from __future__ import annotations

import random
import re
from typing import ClassVar

import tagged_kit
import torch
from engine_kit import EOS, assert_nothing_held, make_engine
from transformers import LogitsProcessor, PreTrainedTokenizerFast

import anabranch as ab
from anabranch.engine.sampling import random_stream
from anabranch.strategies import ThreadWeaver

TAGS = ThreadWeaver().tags


def tag_tokenizer() -> PreTrainedTokenizerFast:
    return tagged_kit.tag_tokenizer(TAGS)


def ids(text: str) -> tuple[int, ...]:
    return tuple(tag_tokenizer()(text, add_special_tokens=False)["input_ids"])


TAG = {tag: ids(tag)[0] for tag in TAGS}


class Script(tagged_kit.Script):
    def __init__(self, *lines: tuple[str, str]):
        super().__init__(tag_tokenizer(), *lines)


def engine_with_tags(**options) -> ab.Engine:
    return make_engine(tokenizer=tag_tokenizer(), **({"num_pages": 600} | options))


def play(prompt, *lines, strategy=None, engine=None, recorder=None, **options):
    engine = engine or engine_with_tags()
    processors = [p for p in (recorder, Script(*lines)) if p is not None]
    options = {"max_new_tokens": 200} | options
    try:
        return engine.generate(prompt, strategy=strategy or ThreadWeaver(), logits_processor=processors, **options)
    finally:
        assert_nothing_held(engine)


# The example of the format, and an answer with two blocks, dotted ids, one thread alone, and no block at all.
OUTLINES = "<Parallel>\n<Outlines>\n<Outline>1: Compute a.</Outline>\n<Outline>2: Compute b.</Outline>\n</Outlines>"

FIRST = "<think> Two parts. " + OUTLINES

JOINED = "\n<Thread>\n1: a is 4.</Thread><Thread>\n2: b is 25, I think.</Thread>\n"

LAST = "</Parallel> So 29. </think>29<eos>"

TWO = [
    ("q: ", FIRST),
    ("q: " + FIRST + "\n<Thread>\n1:", " a is 4.</Thread>"),
    ("q: " + FIRST + "\n<Thread>\n2:", " b is 25, I think.</Thread>"),
    ("q: " + FIRST + JOINED, LAST),
]

AGAIN = "<Parallel>\n<Outlines>\n<Outline> 1.1 : x</Outline><Outline>1.2:y</Outline><Outline>3: z</Outline></Outlines>"

JOINED_AGAIN = "\n<Thread>\n1.1:x</Thread><Thread>\n1.2:yy</Thread><Thread>\n3:zzz</Thread>\n"

ALONE = "</Parallel><Parallel><Outlines><Outline>7:w</Outline></Outlines>"

MANY = [
    ("r", AGAIN),
    ("r" + AGAIN + "\n<Thread>\n1.1:", "x</Thread>"),
    ("r" + AGAIN + "\n<Thread>\n1.2:", "yy</Thread>"),
    ("r" + AGAIN + "\n<Thread>\n3:", "zzz</Thread>"),
    ("r" + AGAIN + JOINED_AGAIN, ALONE),
    ("r" + AGAIN + JOINED_AGAIN + ALONE + "\n<Thread>\n7:", "w</Thread>"),
    ("r" + AGAIN + JOINED_AGAIN + ALONE + "\n<Thread>\n7:w</Thread>\n", "</Parallel>.<eos>"),
]

# ------------------------------------------------------------------------------------------------ a naive reference


LETTERS = torch.tensor(ids("abcdefghijklmnopqrstuvwxyz"))


def next_of(context: list[int]) -> int | None:
    """What a well-behaved model must say next to keep the format; None: any letter. Lengths depend on its letters."""
    tag_of = {i: tag for tag, i in TAG.items()}
    tags = [tag_of[t] for t in context if t in tag_of]
    since = next((n for n, t in enumerate(reversed(context)) if t in tag_of), len(context))
    text = context[len(context) - since :]
    done = since > 1 and (text[-1] % 4 == 0 or since > 9)
    last = tags[-1] if tags else None
    block = tags[len(tags) - tags[::-1].index("<Parallel>") :] if "<Parallel>" in tags else []
    if last in (None, "</Parallel>"):
        return None if not done else TAG["<Parallel>"] if tags.count("<Parallel>") < 2 else EOS
    if last == "<Outline>":
        start = ids(f"{block.count('<Outline>')}:")
        return start[since] if since < len(start) else TAG["</Outline>"] if done else None
    if last == "</Outline>":
        return TAG["<Outline>"] if block.count("<Outline>") < 2 + context[-2] % 3 else TAG["</Outlines>"]
    if last == "<Thread>":
        return TAG["</Thread>"] if done and text[-1] in LETTERS.tolist() else None
    return TAG[{"<Parallel>": "<Outlines>", "<Outlines>": "<Outline>", "</Thread>": "</Parallel>"}[last]]


class Polite(LogitsProcessor):
    def __call__(self, input_ids, scores):
        token = next_of(input_ids[0].tolist())
        allowed = LETTERS if token is None else torch.tensor([token])
        return torch.full_like(scores, -torch.inf).index_copy(-1, allowed, scores[:, allowed])


def by_the_rules(model, prompt: list[int], seed: int | None) -> tuple[list[int], list[list[int]]]:
    """ThreadWeaver with nothing but whole forwards of flat contexts: (trunk, threads with their headers)."""

    def until(context, path, stop):
        stream, said = random_stream(seed or 0, path) if path not in streams else streams[path], []
        streams[path] = stream
        while not said or said[-1] not in (stop, EOS):
            with torch.no_grad():
                scores = model(torch.tensor([context + said])).logits[0, -1:]
            scores = Polite()(torch.tensor([context + said]), scores)[0]
            if seed is None:
                said.append(int(scores.argmax()))
            else:
                cdf = scores.softmax(-1).double().cumsum(-1)
                said.append(int(torch.searchsorted(cdf, stream.random() * cdf[-1], right=True)))
        return said

    streams: dict = {}
    trunk, threads = list(prompt), []
    while True:
        trunk += until(trunk, (0,), TAG["</Outlines>"])
        if trunk[-1] == EOS:
            return trunk[len(prompt) :], threads
        text = tag_tokenizer().decode(trunk)
        names = re.findall(r"<Outline>\s*([0-9]+(?:\.[0-9]+)*)\s*:", text[text.rindex("<Outlines>") :])
        merged: list[int] = []
        for i, name in enumerate(names):
            header = list(ids(f"\n<Thread>\n{name}:"))
            said = until(trunk + header, (0, len(threads)), TAG["</Thread>"])
            threads.append(header + said)
            merged += [*(header if i == 0 else ids(f"<Thread>\n{name}:")), *said]
        trunk += [*merged, *ids("\n")]


# ------------------------------------------------------------------------------------------------ any babble at all


class Babble(LogitsProcessor):
    """A model that half knows the format: what it says is drawn from its context, tags, ids, letters and EOS."""

    usual: ClassVar = {
        "<Parallel>": ["<Outlines>"],
        "<Outlines>": ["<Outline>"],
        "<Outline>": ["1", "2", "3"],
        "</Outline>": ["<Outline>", "</Outlines>"],
        **{digit: [":"] for digit in "123"},
        ":": ["a", "b"],
        **{letter: ["a", "</Outline>", "</Thread>", "</Thread>"] for letter in "ab"},
        "\n": ["</Parallel>"],
        "</Parallel>": ["<Parallel>", "a"],
    }
    words = (*TAGS, *"1:2ab")

    def __call__(self, input_ids, scores):
        context = input_ids[0].tolist()
        rng = random.Random(str(context[-7:]) + str(len(context)))
        words = self.usual.get(tag_tokenizer().decode(context[-1:]), []) if rng.random() < 0.95 else []
        word = "<eos>" if rng.random() < 0.01 else rng.choice(words or self.words)
        return torch.full_like(scores, -torch.inf).index_fill(-1, torch.tensor(ids(word)[0]), 0.0)
