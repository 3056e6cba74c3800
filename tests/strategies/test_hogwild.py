"""Hogwild!: which blocks a worker sees where, against the released controller's rules written down again, and dense."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
import torch
from engine_kit import EOS, assert_nothing_held, byte_tokenizer
from live_kit import FAMILIES, Recorder, dense, engine
from transformers import LogitsProcessor

import anabranch as ab
from anabranch.records.trace import Trace
from anabranch.strategies.live.prompts import CONTIGUOUS, INTERLEAVED

PROMPT = "What is 2 + 3?"
COMBINED = ab.HogwildPrompts(rules="Work together.", openings=("Hi, I'm {name}. We", "I'm {name}."), check="Check: ")
TEXTS = {
    "combined": COMBINED,
    "interleaved": replace(COMBINED, in_progress="", in_front=""),
    "contiguous": replace(CONTIGUOUS, behind=" Together.", openings=("\n# {name}\nA:", "\n# {name}\nBcd:")),
}


def encode(text: str) -> list[int]:
    return byte_tokenizer().encode(text, add_special_tokens=False)


def hogwild(layout: str = "combined", **options) -> ab.Hogwild:
    options = dict(tokens=18, prompts=TEXTS[layout], check_every=25, finisher_tokens=3) | options
    return ab.Hogwild(layout=layout, **options)


class Ends(LogitsProcessor):
    """Ends steps with `text`, from the sampled token on that `script` tells for its opening, else from `later` on."""

    def __init__(self, script: dict[str, int], later: int, text: str = ".\n\n") -> None:
        self.script = {tuple(encode(opening)): at for opening, at in script.items()}
        self.later, self.text, self.starts = later, encode(text), encode("**")

    def __call__(self, ids, scores):
        context = ids[0].tolist()
        for opening, at in self.script.items():
            if tuple(context[: len(opening)]) == opening:
                number = len(context) - len(opening) - at
                break
        else:
            if context[1:3] != self.starts:  # the common block, or the thread that is asked for the answer
                return scores
            colon = "".join(map(byte_tokenizer().decode, context)).rindex("]:** ") + 5
            checked = len("Check: ") if context[colon : colon + 7] == encode("Check: ") else 0
            number = len(context) - colon - checked - self.later
        for token in encode("\n.?!#"):
            scores[:, token] = -torch.inf
        if 0 <= number < len(self.text):
            scores[:] = -torch.inf
            scores[:, self.text[number]] = 0
        return scores


SCRIPT = Ends({"**Alice [1]:** Hi, I'm Alice. We": 4, "**Bob [1]:** I'm Bob.": 9}, later=2)


@dataclass
class Block:
    """Tokens in the order they were computed, each with the turn."""

    tokens: list[int] = field(default_factory=list)
    turns: list[int] = field(default_factory=list)
    indices: list[int] = field(default_factory=list)

    def add(self, tokens: list[int], turn: int) -> None:
        self.tokens += tokens
        self.turns += [turn] * len(tokens)


def rules(result: ab.Result, strategy: ab.Hogwild) -> tuple[list, list, dict[tuple[int, ...], int]]:
    """All tokens (id, position in their block), what each row sees under which offset, and the row of each context."""
    texts, workers = strategy.texts, strategy.workers
    kids = list(result.tree.children)
    common = Block()
    if texts.rules:
        common.add([t for run in kids.pop(0).runs for t in run.token_ids], 0)
    else:
        common.add([*result.prompt_token_ids, *encode(texts.behind)], 0)
    heads = []
    for text in (texts.in_progress, texts.in_front):
        heads.append(Block())
        if text:
            heads[-1].add([t for run in kids.pop(0).runs for t in run.token_ids], 0)
            assert heads[-1].tokens == encode(text)
    # Each worker's stream: what it computes in each turn, and where a new step begins.
    steps: list[list[Block]] = [[] for _ in range(workers)]
    ended: list[tuple[int, int, Block]] = []  # turn, worker, block
    now = [0] * workers
    fed = 0
    feeds: dict[tuple[int, int], int] = {}
    for number, kid in enumerate(kid for kid in kids if kid.turns and kid.runs[-1].kind == "sampled"):
        name = number if number < workers else int("Bob" in byte_tokenizer().decode(kid.runs[1].token_ids))
        block, sampled = Block(), list(kid.runs[-1].token_ids)
        first = [t for run in kid.runs[:-1] for t in run.token_ids]
        if number < workers:
            turn = 1
        else:
            turn = now[name] + 1
            ended.append((turn, name, steps[name][-1]))
            feeds[turn, name] = len(first)
        block.add(first, turn)
        for token in sampled:
            turn += 1
            block.add([token], turn)
        now[name] = turn
        steps[name].append(block)
    ended.sort(key=lambda e: e[:2])
    # The controller's count of tokens since the last check, in its own order.
    for turn in range(2, max(now) + 1):
        for worker in range(workers):
            size = feeds.get((turn, worker), 1)
            if size > 1:
                block = next(b for b in steps[worker] if b.turns[0] == turn)
                checked = encode(texts.check) == block.tokens[size - len(encode(texts.check)) : size]
                assert checked == (fed > strategy.check_every)
                fed = 0 if checked else fed
            fed += size
    blocks = [common, *heads, *(b for worker in steps for b in worker)]
    tokens: list[tuple[int, int]] = []
    for block in blocks:
        block.indices = list(range(len(tokens), len(tokens) + len(block.tokens)))
        tokens += [(token, i) for i, token in enumerate(block.tokens)]
    sees: list[dict[int, int]] = [{} for _ in tokens]
    rows: dict[tuple[int, ...], int] = {}
    for block in (common, *heads):
        for i, index in enumerate(block.indices):
            sees[index] = dict.fromkeys(block.indices[: i + 1], 0)
    for worker, mine in enumerate(steps):
        for block in mine:
            for i, (turn, index) in enumerate(zip(block.turns, block.indices, strict=True)):
                done = [b for when, _, b in ended if when <= turn]
                others = [
                    next(b for b in reversed(theirs) if b.turns[0] <= turn)
                    for other, theirs in enumerate(steps)
                    if other != worker and strategy.layout != "interleaved"
                ]
                line = [common, *done, heads[0], *others, heads[1]]
                view = [j for b in line for j, t in zip(b.indices, b.turns, strict=True) if t <= turn]
                view += block.indices[: i + 1]
                sees[index] = {j: (len(view) - 1 - at) - i + tokens[j][1] for at, j in enumerate(view)}
                rows[tuple(block.tokens[: i + 1])] = index
    return tokens, sees, rows


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", TEXTS)
def test_every_row_equals_a_dense_recomputation(family, layout):
    recorder = Recorder()
    strategy = hogwild(layout)
    eng = engine(family)
    result = eng.generate(PROMPT, strategy=strategy, do_sample=True, seed=3, logits_processor=[recorder, SCRIPT])
    assert_nothing_held(eng)
    tokens, sees, rows = rules(result, strategy)
    logits = dense(family, tokens, sees)
    compared = 0
    for context, scores in recorder.seen:
        if context in rows:
            expected, mask = logits[rows[context]], scores.isfinite()
            error = (scores - expected)[mask].norm() / expected[mask].norm()
            assert float(error) < 2e-4
            compared += 1
    steps = sum(bool(kid.turns) and kid.runs[-1].kind == "sampled" for kid in result.tree.children)
    assert compared == 2 * 18 and steps >= (2 if layout == "contiguous" else 5)


def test_the_text_of_the_answer():
    """History in the order of finishing, then what is unfinished, then the forced question."""
    result = engine().generate(PROMPT, strategy=hogwild(), do_sample=True, seed=3, logits_processor=[SCRIPT])
    text = result.text
    marks = ["**Alice [1]:** Hi", "**Alice [2]:** ", "**Bob [1]:** I'm", "### Work in progress (others)", "<...>"]
    places = [text.index(mark) for mark in marks]
    assert places == sorted(places) and text.index("**Bob [2]:** ") > places[2]
    assert text[: places[1]].endswith(".\n\n") and "final answer is \\boxed{" in text
    assert text.count("<...>") == 2 and "Check: " in text


def test_an_answer_in_a_step_ends_the_work():
    """Everybody stops in the turn in which it was written."""
    script = Ends({"**Alice [1]:** Hi, I'm Alice. We": 2}, later=2, text="\\boxed{5}.\n\n")
    eng = engine()
    result = eng.generate(PROMPT, strategy=hogwild(tokens=40), do_sample=True, seed=3, logits_processor=[script])
    alice, bob = (kid for kid in result.tree.children if kid.turns and kid.runs[-1].kind == "sampled")
    assert result.answers == "5" and "final answer" not in result.text
    assert len(alice.runs[-1].token_ids) == len(bob.runs[-1].token_ids) == 2 + 12
    assert_nothing_held(eng)


def test_several_workers_and_eos():
    strategy = hogwild(workers=3, may_end=True, finisher_tokens=0)

    class End(LogitsProcessor):
        def __call__(self, ids, scores):
            scores[:, EOS] += 50.0 if ids.shape[1] > 40 else -torch.inf  # −inf stays what it is
            return scores

    result = engine().generate(PROMPT, strategy=strategy, logits_processor=[End()])
    written = [kid for kid in result.tree.children if kid.ended]
    assert len(written) == 3 and {kid.ended for kid in written} <= {"eos", "length"}
    assert all(EOS not in kid.token_ids for kid in written) and "**Carol [1]:** I'm Carol." in result.text
    never = engine().generate(PROMPT, strategy=replace(strategy, may_end=False), logits_processor=[End()])
    assert {kid.ended for kid in never.tree.children if kid.ended} == {"length"}


def test_a_chat_and_the_shipped_prompts():
    chat = [{"role": "user", "content": PROMPT}]
    eng = engine(num_pages=2000)
    for layout in TEXTS:
        result = eng.generate(chat, strategy=ab.Hogwild(layout=layout, tokens=3, finisher_tokens=2))
        assert result.text
        if layout == "combined":
            told = result.tree.children[0].runs[0].token_ids
            told = byte_tokenizer().decode(told)
            assert told.startswith("[user]# Working together") and told.endswith(f"{PROMPT}[a]")
            assert "Alice, Bob" in told and "**{name} [{number}]:** " in told and "{past}" not in told
    assert INTERLEAVED.in_front == ""
    assert_nothing_held(eng)


@pytest.mark.parametrize("layout", TEXTS)
def test_the_same_seed_gives_the_same_tree_anywhere(layout):
    """Alone, in a batch, and with so few pages that prompts push one another out."""
    strategy, options = hogwild(layout, tokens=14), dict(do_sample=True, logits_processor=[SCRIPT])
    alone = engine().generate(PROMPT, strategy=strategy, seed=3, **options)
    prompts = [f"{PROMPT[: 4 + i]} {i}" for i in range(15)] + [PROMPT]
    seeds = [*range(10, 25), 3]
    many = engine(num_pages=3000).generate(prompts, strategy=strategy, seed=seeds, **options)
    assert many[-1].tree == alone.tree
    short = engine(num_pages=150)
    few = short.generate(prompts, strategy=strategy, seed=seeds, **options)
    assert sum(r.metrics.preemptions for r in few) > 0
    assert [r.tree for r in few] == [r.tree for r in many]
    assert_nothing_held(short)


def test_replay_and_saved_traces():
    eng = engine("qwen3")
    result = eng.generate(PROMPT, strategy=hogwild(), do_sample=True, seed=3, logits_processor=[SCRIPT], logprobs=True)
    trace = Trace.from_dict(result.trace().as_dict())
    assert trace.tree == result.tree
    pairs = list(ab.engine.logprob_pairs(result, ab.replay(trace, eng)))
    assert len(pairs) >= 36 and max(abs(a - b) for a, b in pairs) < 1e-3
    with pytest.raises(ValueError, match="lined up"):
        ab.training.from_trace(result)
    assert_nothing_held(eng)


class TestBadInput:
    @pytest.mark.parametrize(
        "options,match",
        [
            (dict(workers=0), "workers"),
            (dict(tokens=0), "tokens"),
            (dict(check_every=0), "check_every"),
            (dict(finisher_tokens=-1), "finisher_tokens"),
            (dict(layout="circle"), "'combined', 'contiguous', 'interleaved'"),
            (dict(prompts="x"), "HogwildPrompts"),
            (dict(answer="("), "is no pattern"),
        ],
    )
    def test_options(self, options, match):
        with pytest.raises((ValueError, TypeError), match=match):
            ab.Hogwild(**options)

    def test_a_model_without_rotary_embeddings(self):
        from hf_kit import build

        eng = ab.Engine(build("GPT2Config", vocab_size=260, n_embd=128, n_layer=2, n_head=4), byte_tokenizer(), 64)
        with pytest.raises(ValueError, match="something else than a rotation"):
            eng.generate(PROMPT, strategy=hogwild())
        assert_nothing_held(eng)

    def test_no_tokenizer(self):
        eng = engine()
        eng.tokenizer = None
        with pytest.raises(ValueError, match="tokenizer"):
            eng.generate([1, 2, 3], strategy=hogwild())
        assert_nothing_held(eng)

    def test_a_chat_without_a_question(self):
        with pytest.raises(ValueError, match="no message of the user"):
            engine().generate([{"role": "system", "content": "x"}], strategy=hogwild())
