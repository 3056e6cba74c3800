"""ThreadWeaver against its released controller, written down here once more from its description, in both variants.

The controller is a loop over a model that answers a context with one token; it knows no engine, cache or thread.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
from engine_kit import assert_nothing_held, make_engine
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LogitsProcessor, PreTrainedTokenizerFast

from anabranch.strategies import Sequential, ThreadWeaver

TAGS = ThreadWeaver(conclusion=True).tags


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and one a tag, within the tiny models' vocabulary."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[: 256 - len(TAGS)]  # what is left out are control bytes
    inner = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([*TAGS, "<pad>", "<bos>", "<eos>"])
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")


def ids(text: str) -> list[int]:
    return tokenizer()(text, add_special_tokens=False)["input_ids"]


def text_of(token_ids) -> str:
    return tokenizer().decode(token_ids)


END = ids("<eos>")[0]


# ------------------------------------------------------------------------------------------------ the controller


@dataclass
class Controller:
    """RL rollout: sequential and parallel phases in turns, at most `iterations` of both together."""

    model: object  # context -> token
    conclusion: bool
    iterations: int = 32
    thread_tokens: int | None = None

    def sample(self, context, stop, limit=None):
        """Tokens up to and with `stop` or EOS; and why it ended."""
        said = []
        while limit is None or len(said) < limit:
            said.append(self.model(context + said))
            if said[-1] in (ids(stop)[0], END):
                return said, "eos" if said[-1] == END else "stop"
        return said, "length"

    def run(self, prompt):
        context, names, forks = list(prompt), [], 0
        for _ in range(self.iterations):
            if not names:
                said, why = self.sample(context, "</Outlines>")
                context += said
                if why == "eos":
                    break
                names = self.outlines(text_of(context))
                continue
            forks += 1
            over, merged = False, ""
            for i, name in enumerate(names):
                said, why = self.sample(context + ids(f"\n<Thread>\n{name}:"), "</Thread>", self.thread_tokens)
                over |= why != "stop"
                text = text_of(said).removesuffix("<eos>") + ("" if why == "stop" else "\n</Thread>")
                merged += ("" if i else "\n") + f"<Thread>\n{name}:{text}"
            names = []
            context += ids(merged)
            if over:
                context += ids("\n<Conclusion>\n</Conclusion>\n</Parallel>" if self.conclusion else "\n</Parallel>")
                break
            context += ids("\n<Conclusion>\n" if self.conclusion else "\n")
        return context[len(prompt) :], forks

    @staticmethod
    def outlines(text):
        at = text.rfind("<Outlines>")
        found = re.findall(r"<Outline>\s*([0-9]+(?:\.[0-9]+)*)\s*:", text[at:]) if at >= 0 else []
        return list(dict.fromkeys(found))


class Babble:
    """A model that half knows the format: its next token is drawn from what it has in context."""

    def __init__(self, seed: int, conclusion: bool):
        self.seed = seed
        last = "<Conclusion>" if conclusion else "</Parallel>"
        self.usual = {
            "q": ["<Parallel>"],
            "<Parallel>": ["<Outlines>"],
            "<Outlines>": ["<Outline>"],
            "<Outline>": ["1", "2", "3", "2", "3", " "],
            " ": ["1", ":"],
            "</Outline>": ["<Outline>", "</Outlines>"],
            **{digit: [":", ":", ":", ":", "."] for digit in "123"},
            ".": ["1", "2"],
            ":": ["a", "b"],
            **{letter: ["a", "</Outline>", "</Thread>", "</Thread>"] for letter in "ab"},
            "\n": ["</Parallel>", "</Parallel>", "a"] if not conclusion else ["a", *["</Conclusion>"] * 6],
            "</Parallel>": ["<Parallel>", "a", "<eos>"],
            "<Conclusion>": ["a", "\n"],
            "</Conclusion>": ["</Parallel>"],
            "</Outlines>": ["a", last],
        }
        self.words = [*TAGS, *"1:2ab. \n"]

    def __call__(self, context):
        rng = random.Random(f"{self.seed} {len(context)} {context[-6:]}")
        words = self.usual.get(text_of(context[-1:]), []) if rng.random() < 0.98 else []
        ends = rng.random() < 0.003 + 0.0003 * len(context)
        return ids("<eos>" if ends else rng.choice(words or self.words))[0]


class Speaks(LogitsProcessor):
    """Makes the engine's model say what `model` says."""

    def __init__(self, model):
        self.model = model

    def __call__(self, input_ids, scores):
        token = torch.tensor([[self.model(context)] for context in input_ids.tolist()])
        return torch.full_like(scores, -torch.inf).scatter(-1, token, 0.0)


def engine():
    return make_engine(tokenizer=tokenizer(), num_pages=3000)


@pytest.mark.parametrize("conclusion", [False, True], ids=["plain", "conclusion"])
def test_the_strategy_agrees_with_the_controller_token_for_token(conclusion):
    """100 generations in each variant: with broken threads, outlines without ids, nested tags and few iterations."""
    ours, rng = engine(), random.Random(conclusion)
    forks = broken = stopped = clean = 0
    for seed in range(100):
        model = Babble(seed, conclusion)
        iterations, most = rng.choice([32, 32, 32, 2, 3, 4]), rng.choice([None, None, 3, 8])
        prompt = ids(rng.choice(["q", "q", "<Parallel><Outlines><Outline>1:a</Outline>", "x\n"]))
        expected, count = Controller(model, conclusion, iterations, most).run(prompt)
        strategy = ThreadWeaver(conclusion=conclusion, max_iterations=iterations, thread_tokens=most)
        result = ours.generate(
            prompt,
            strategy=Sequential(strategy) if seed % 5 == 0 else strategy,
            logits_processor=[Speaks(model)],
            max_new_tokens=2000,
        )
        assert list(result.token_ids) == expected, (seed, text_of(expected), result.text)
        assert result.metrics.num_forks == count
        assert_nothing_held(ours)
        forks += count
        broken += bool(result.malformed)
        clean += count > 0 and not result.malformed
        stopped += any("iterations" in why for why in result.malformed)
    assert forks > 60 and broken > 40 and stopped > 5 and clean > 1, (forks, broken, stopped, clean)


# ------------------------------------------------------------------------------------------------ by hand

OUTLINES = "<Parallel><Outlines><Outline>1:a</Outline><Outline>2:b</Outline></Outlines>"


class Script:
    """What is said behind each context; a KeyError where the format does not lead."""

    def __init__(self, *lines: tuple[str, str]):
        self.next: dict[tuple[int, ...], int] = {}
        for before, says in lines:
            context = tuple(ids(before))
            for token in ids(says):
                assert self.next.setdefault(context, token) == token
                context += (token,)

    def __call__(self, context):
        return self.next[tuple(context)]


def play(*lines: tuple[str, str], strategy, **options):
    ours = engine()
    result = ours.generate(
        "p", strategy=strategy, logits_processor=[Speaks(Script(*lines))], **({"max_new_tokens": 200} | options)
    )
    assert_nothing_held(ours)
    return result


def threads(first: str, second: str) -> list[tuple[str, str]]:
    begin = f"p{OUTLINES}\n<Thread>\n"
    return [("p", OUTLINES), (f"{begin}1:", first), (f"{begin}2:", second)]


def test_a_block_with_a_conclusion():
    joined = OUTLINES + "\n<Thread>\n1: x</Thread><Thread>\n2: y</Thread>\n<Conclusion>\n"
    last = "so z</Conclusion>\n</Parallel> z<eos>"
    result = play(*threads(" x</Thread>", " y</Thread>"), ("p" + joined, last), strategy=ThreadWeaver(conclusion=True))
    assert list(result.token_ids) == ids(joined + last) and result.malformed == ()
    assert [run.kind for run in result.tree.runs] == ["prompt", "sampled", "joined", "joined", "inserted", "sampled"]
    missing = play(
        *threads(" x</Thread>", " y</Thread>"),
        ("p" + joined, "</Parallel><eos>"),
        strategy=ThreadWeaver(conclusion=True),
    )
    assert missing.metrics.format_correctness == 0.0  # a conclusion that never closes


@pytest.mark.parametrize("said", ["x<eos>", "xyz"], ids=["eos", "length"])
def test_a_thread_that_does_not_close_ends_the_answer_with_an_empty_conclusion(said):
    strategy = ThreadWeaver(conclusion=True, thread_tokens=3)
    result = play(*threads(said, " y</Thread>"), strategy=strategy)
    closed = said.removesuffix("<eos>") + "\n</Thread>"
    tail = f"\n<Thread>\n1:{closed}<Thread>\n2: y</Thread>\n<Conclusion>\n</Conclusion>\n</Parallel>"
    assert list(result.token_ids) == ids(OUTLINES + tail)
    # The other variant closes straight behind the last </Thread>: one newline, not two.
    plain = play(*threads(said, " y</Thread>"), strategy=replace(strategy, conclusion=False))
    assert list(plain.token_ids) == ids(OUTLINES + tail.replace("<Conclusion>\n</Conclusion>\n", ""))


def test_a_limit_reached_with_the_last_thread_closes_conclusion_and_block():
    most = len(ids(OUTLINES)) + 2
    result = play(*threads("x</Thread>", "y</Thread>"), strategy=ThreadWeaver(conclusion=True), max_new_tokens=most)
    tail = "\n<Thread>\n1:x</Thread><Thread>\n2:y</Thread>\n<Conclusion>\n</Conclusion>\n</Parallel>"
    assert list(result.token_ids) == ids(OUTLINES + tail)


@pytest.mark.parametrize("conclusion", [False, True])
def test_an_answer_ends_behind_its_sixteenth_block(conclusion):
    block = "<Parallel><Outlines><Outline>1:a</Outline></Outlines>"
    behind = "\n<Conclusion>\n" if conclusion else "\n"
    goes_on = ("c</Conclusion>" if conclusion else "") + "</Parallel>"
    lines, text = [], ""
    for turn in range(16):
        says = goes_on * bool(turn) + block
        lines += [("p" + text, says), (f"p{text}{says}\n<Thread>\n1:", "x</Thread>")]
        text += says + "\n<Thread>\n1:x</Thread>" + behind
    result = play(*lines, strategy=ThreadWeaver(conclusion=conclusion), max_new_tokens=5000)
    assert list(result.token_ids) == ids(text)  # no </Parallel>, and no answer
    assert result.metrics.num_forks == 16 and result.malformed[0] == "thread 0: more than 32 iterations; ended there"
    expected, forks = Controller(Script(*lines), conclusion).run(ids("p"))
    assert expected == ids(text) and forks == 16


def test_what_ends_with_the_last_iteration_is_not_too_much():
    lines = [*threads("x</Thread>", "y</Thread>")]
    joined = OUTLINES + "\n<Thread>\n1:x</Thread><Thread>\n2:y</Thread>\n"
    done = play(*lines, ("p" + joined, "</Parallel><eos>"), strategy=ThreadWeaver(max_iterations=3))
    assert done.malformed == ()
    # Outlines in the last iteration open no block.
    cut = play(*lines, strategy=ThreadWeaver(max_iterations=1))
    assert list(cut.token_ids) == ids(OUTLINES) and cut.metrics.num_forks == 0 and cut.malformed


def test_the_variants_are_told_apart_and_replace_goes_both_ways():
    plain, other = ThreadWeaver(), ThreadWeaver(conclusion=True)
    assert replace(plain, conclusion=True) == other and replace(other, conclusion=False) == plain
    assert hash(other) != hash(plain) and "<Conclusion>" not in plain.tags
    own = ThreadWeaver(conclusion=True, after="\n<Conclusion>")
    assert own.after == "\n<Conclusion>" and own.closing == other.closing
    with pytest.raises(ValueError, match="conclusion='yes'"):
        ThreadWeaver(conclusion="yes")
    with pytest.raises(ValueError, match="max_iterations=0"):
        ThreadWeaver(max_iterations=0)
