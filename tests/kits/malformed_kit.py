"""Generations that break a tag-driven format in every way there is, thousands of them, on a model that costs nothing.

What the model says is a function of what stands before it: it half knows the format, follows a nasty script after an
opening tag, and babbles. `assert_survives` runs many such generations and checks what must hold whatever was written.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from unittest.mock import patch

import torch
from engine_kit import assert_nothing_held
from tagged_kit import tag_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, LogitsProcessor

import anabranch as ab
from anabranch.engine.sampling import Sampler


@cache
def _weights(vocabulary: int, hidden: int) -> LlamaForCausalLM:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=hidden,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=1 << 20,
        eos_token_id=vocabulary - 1,  # the last of a `tag_tokenizer`
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM._from_config(config, attn_implementation="eager").eval()


def tiny_engine(tags: Sequence[str], num_pages: int = 6000, **options) -> ab.Engine:
    """An engine over one small layer; what its model would say does not matter."""
    tokenizer = tag_tokenizer(tuple(tags), None)
    return ab.Engine(_weights(len(tokenizer), 32), tokenizer, num_pages=num_pages, page_size=4, **options)


@dataclass
class Habits:
    """What a model of a format knows of it.

    tags: its control tags. opening: tags behind which a script follows; scripts: what may follow, the opening left out:
    whole outlines, good and bad. usual: the words that usually follow a word (a tag or a character). words: characters
    that it writes besides. rare: scripts that cost much, seldom chosen. pieces: more texts that are one token each.
    """

    tags: Sequence[str]
    opening: Sequence[str]
    scripts: Sequence[str]
    usual: Mapping[str, Sequence[str]] = field(default_factory=dict)
    words: str = "12:. \nab"
    rare: Sequence[str] = ()
    pieces: Sequence[str] = ()

    @property
    def tokens(self) -> tuple[str, ...]:
        """What its tokenizer has a token for."""
        return (*self.tags, *self.pieces)


class Malformed(LogitsProcessor):
    """Makes the model say what `habits` has it say; the prompt's first bytes choose among endlessly many models.

    choices: so many models, between whose tokens the scores and the sampler choose: so the seed matters.
    """

    def __init__(self, habits: Habits, scripted: float = 0.8, usual: float = 0.9, ends: float = 0.01, choices: int = 1):
        self.habits, self.scripted, self.usual, self.ends, self.choices = habits, scripted, usual, ends, choices
        self.tokenizer = tag_tokenizer(habits.tokens, None)
        self.opening = {self._ids(tag)[0] for tag in habits.opening}
        self.scripts = [self._ids(script) for script in habits.scripts]
        self.rare = [self._ids(script) for script in habits.rare]
        self.next = {self._ids(word)[0]: [self._ids(w)[0] for w in follow] for word, follow in habits.usual.items()}
        self.words = [self._ids(word)[0] for word in (*habits.tags, *habits.words)]
        self.eos = self.tokenizer.eos_token_id

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def says(self, context: Sequence[int], choice: int = 0) -> int:
        """The next token behind `context`."""
        at = next((i for i in range(len(context) - 1, -1, -1) if context[i] in self.opening), None)
        if at is not None:
            rng = random.Random(f"{context[:4]} {at} {context[max(0, at - 6) : at]}")
            said = list(context[at + 1 :])
            if rng.random() < self.scripted:
                script = rng.choice(self.rare if self.rare and rng.random() < 0.01 else self.scripts)
                if len(said) < len(script) and said == script[: len(said)]:
                    return script[len(said)]
        rng = random.Random(f"{context[:4]} {len(context)} {context[-6:]}" + f" {choice}" * (choice > 0))
        if rng.random() < self.ends:
            return self.eos
        known = self.next.get(context[-1], []) if rng.random() < self.usual else []
        return rng.choice(known or self.words)

    def __call__(self, input_ids, scores):
        said = [[self.says(context, i) for i in range(self.choices)] for context in input_ids.tolist()]
        allowed = torch.full_like(scores, -torch.inf).scatter(-1, torch.tensor(said), 0.0)
        return allowed + scores if self.choices > 1 else allowed


def generate(engine: ab.Engine, models: Malformed, prompts: Sequence[str], **options) -> list[ab.Result]:
    """What `models` say, as a logits processor has it, chosen past the sampler: that would take most of the time."""

    def choose(sampler, logits, contexts, *rest):
        return [models.says(context()) for context in contexts]

    with patch.object(Sampler, "choose", choose):
        return engine.generate(prompts, **options)


def thousand(outline: str) -> str:
    """A thousand outlines."""
    return "".join(outline.replace("{id}", str(name)) for name in range(1000))


def bad_outlines(outline: str, close: str) -> list[str]:
    """Scripts behind an opening tag, the first six of them good; `outline` has {id}, `close` is the trigger."""

    def listed(*names: object) -> str:
        return "".join(outline.replace("{id}", str(name)) for name in names)

    half = outline.replace("{id}", "1")
    return [
        listed(1, 2) + close,
        listed(1, 2) + close,
        listed(1) + close,
        listed(1, 2, 3) + close,
        listed(1.1, 1.2) + close,
        listed(3, 1, 2) + close,  # unordered
        listed(1, 1, 2, 2, 2) + close,  # duplicates
        listed(*range(1, 12)) + close,
        listed("0", "00", "9" * 60) + close,
        listed("", "x", "-1") + close,  # no ids
        close,
        half[: len(half) // 2] + close,  # truncated
        half[len(half) // 2 :] + close,
        listed(1) + half[: len(half) - 3] + listed(2) + close,  # tags in tags
        listed(1) + close + close,
        listed(1) + close + listed(2) + close,
        listed(1, 2),  # never closed
    ]


def assert_survives(
    strategy,
    habits: Habits,
    runs: int,
    seed: int = 0,
    batch: int = 50,
    num_pages: int = 40_000,  # a join of a thousand threads needs all of them at once
    limits: Sequence[int] = (8, 20, 40, 90),
    prompt: str = "{:04d}q",
    **options,
) -> Counter:
    """Run `runs` generations: none raises, none goes on past its limits, no page is lost, and what broke was counted.

    Limits are drawn anew for each batch, so that tags are cut by budgets as well. Returns how often what was told.
    """
    rng, told = random.Random(seed), Counter()
    engine = tiny_engine(habits.tokens, num_pages=num_pages)
    for first in range(0, runs, batch):
        most = rng.choice(limits)
        total = rng.choice((60, 150, 300)) * max(1, max(limits) // 100)
        prompts = [prompt.format(seed + first + i) for i in range(min(batch, runs - first))]
        models = Malformed(habits, scripted=rng.choice((0.5, 0.9)), usual=rng.choice((0.6, 0.95)))
        most_ = {"max_new_tokens": most, "max_total_tokens": total}
        results = generate(engine, models, prompts, strategy=strategy, seed=first, **most_, **options)
        assert_nothing_held(engine)
        for asked, result in zip(prompts, results, strict=True):
            told["generations"] += 1
            told["forked"] += bool(result.tree.children)
            told["malformed"] += bool(result.malformed)
            for why in result.malformed:
                what = why.partition(": ")[2].partition(" <" if "its tags are" in why else ";")[0]
                told["".join(c for c in what if not c.isdigit())] += 1
            assert result.metrics.sampled_tokens <= total, asked
            assert result.metrics.format_correctness == (not result.malformed), asked
            for node in result.tree.walk():
                own = [run for run in (*node.runs, *node.forgotten) if run.kind == "sampled"]
                assert sum(len(run.token_ids) for run in own) <= most, asked
                assert node.fate in ("finished", "joined", "discarded", "killed"), asked
    return told


def assert_same_everywhere(strategy, habits: Habits, num_pages: int, seed: int = 5, **options) -> None:
    """Sixteen prompts give the same trees together, alone, and with so few pages that threads are pre-empted."""
    models, prompts = Malformed(habits, scripted=1, usual=1, ends=0.005), [f"{i:04d}q" for i in range(16)]
    options = {"strategy": strategy, "logits_processor": [models], "max_new_tokens": 60, "seed": seed} | options
    together = tiny_engine(habits.tokens).generate(prompts, **options)
    few = tiny_engine(habits.tokens, num_pages=num_pages)
    scarce = few.generate(prompts, **options)
    assert_nothing_held(few)
    assert sum(result.metrics.preemptions for result in scarce) > 20
    assert sum(len(list(result.tree.walk())) > 3 for result in together) > 8
    for prompt, one, two in zip(prompts, together, scarce, strict=True):
        assert one.tree == two.tree, prompt
    for prompt, one in list(zip(prompts, together, strict=True))[::4]:
        assert one.tree == tiny_engine(habits.tokens).generate(prompt, **options).tree, prompt
