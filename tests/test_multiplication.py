"""The packaged multiplication model, the traces it learnt, and that training shows what the engine shows."""

from __future__ import annotations

import dataclasses
import json
import random
import re

import pytest
import torch
from training.layout import FORKED, IGNORE, PLAIN, thread_layout
from training.multiplication.evaluate import PROBLEMS, interval
from training.multiplication.tokens import make_tokenizer, vocabulary
from training.multiplication.traces import draw, problem, split_of
from transformers import LlamaConfig, LlamaForCausalLM, LogitsProcessor

import anabranch as ab
from engine_kit import Recorder, assert_nothing_held

TAGS = ab.ThreadWeaver().tags
PAIRS = [(7308, 4406), (47, 36), (9999, 9999), (1000, 7), (5, 400), (0, 12), (3, 0), (8, 21), (60, 1111)]


def layout_of(question, tokenizer):
    ids = tokenizer(question.prompt)["input_ids"]
    return thread_layout(ids, question.items, tokenizer, eos_id=tokenizer.eos_token_id)


def flat_text(question) -> str:
    return question.prompt + "".join(x if isinstance(x, str) else "|".join(t for _, t in x) for x in question.items)


# ------------------------------------------------------------------------------------------------ traces


def test_traces_are_arithmetically_right():
    rng = random.Random(4)
    for a, b in PAIRS + [draw(rng, s) for s in ("train", "dev", "test") for _ in range(60)]:
        question = problem(a, b)
        multiplier = [int(d) for d in reversed(str(b))]
        places = [i for i, d in enumerate(multiplier) if d]
        assert question.threads == (len(places) if len(places) > 1 else 0)
        threads = [x for x in question.items if not isinstance(x, str)]
        assert [len(x) for x in threads] == ([question.threads] if question.threads else [])
        texts = [t for _, t in threads[0]] if threads else [question.items[0].partition("=")[2].rpartition("=")[0]]
        products = []
        for place, text in zip(places or [0], texts, strict=True):
            steps = re.findall(r"([a-h])(\d)\*(\d)=(\d\d)\+(\d)=(\d\d)([a-h])(\d)", text)
            assert "".join(d for _, d, *_ in steps) == str(a)[::-1]
            carry = 0
            for at, (p, x, y, product, plus, total, q, digit) in enumerate(steps):
                assert (p, q) == ("abcdefgh"[at], "abcdefgh"[at + place]) and int(y) == multiplier[place]
                assert int(product) == int(x) * int(y) and int(plus) == carry
                assert int(total) == int(product) + carry and digit == total[1]
                carry = int(total[0])
            columns = re.findall(r"([a-h])(\d)", re.sub(r"[a-h]\d\*\d=\d\d\+\d=\d\d", "", text))
            assert [c for c, _ in columns] == list("abcdefgh"[: len(str(a)) + len(str(b))])
            products.append(int("".join(d for _, d in reversed(columns))))
            assert products[-1] == a * multiplier[place] * 10**place
        if threads:
            outlines = re.findall(r"<Outline>(\d):(\d+)</Outline>", question.items[0])
            assert outlines == [(str(t), str(multiplier[p] * 10**p)) for t, p in enumerate(places, 1)]
            sums = re.findall(r"\+(\d)((?:[a-h]\d'?)+)", question.items[2])
            assert [t for t, _ in sums] == [str(t) for t in range(2, len(places) + 1)]
            left = products[0]
            for (_, text), right in zip(sums, products[1:], strict=True):
                for at, (_, digit, mark) in enumerate(re.findall(r"([a-h])(\d)('?)", text)):
                    assert bool(mark) == (left % 10 ** (at + 1) + right % 10 ** (at + 1) >= 10 ** (at + 1))
                    assert int(digit) == (left + right) // 10**at % 10
                left += right
            assert left == a * b
        assert question.items[-1].endswith(f"={a * b}") and question.answer == str(a * b)


def test_splits_are_disjoint_in_either_order():
    rng = random.Random(1)
    drawn = {s: {draw(rng, s) for _ in range(150)} for s in ("train", "dev", "test")}
    for name, pairs in drawn.items():
        assert all(split_of(a, b) == split_of(b, a) == name for a, b in pairs)
    lines = [json.loads(line) for line in PROBLEMS.read_text().splitlines()]
    assert len(lines) == len({x["prompt"] for x in lines}) >= 500
    for line in lines:
        a, b = map(int, line["prompt"].split(" * "))
        assert split_of(a, b) == "test" and line["answer"] == str(a * b)
        assert line["threads"] == problem(a, b).threads
    low, high = interval(97, 100)
    assert 0.91 < low < 0.97 < high < 0.99


# ------------------------------------------------------------------------------------------------ tokens


def test_the_tokenizer():
    for tokenizer in (make_tokenizer(), ab.models.load("multiplication", device="cpu")[1]):
        assert tokenizer.get_vocab() == {token: i for i, token in enumerate(vocabulary())}
        for tag in TAGS:
            assert len(tokenizer(tag, add_special_tokens=False)["input_ids"]) == 1
        want = [tokenizer.bos_token_id, *tokenizer.convert_tokens_to_ids(list("7308*4406"))]
        for prompt in ("7308*4406", "7308 * 4406", "7,308 x 4 406", "7308×4406"):
            assert tokenizer(prompt)["input_ids"] == want
        for a, b in PAIRS:
            text = flat_text(problem(a, b)).replace("|", "\n<Thread>\n2:")
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert tokenizer.decode(ids) == text and tokenizer.unk_token_id not in ids
        assert tokenizer("7 apples")["input_ids"].count(tokenizer.unk_token_id) > 0


# ------------------------------------------------------------------------------------------------ layout and engine


class Trie(LogitsProcessor):
    """Makes a model write what a layout's rows have to learn; a context that is no path of the trie is a KeyError."""

    def __init__(self, layouts, kind: int):
        self.target, self.row = {}, {}
        for number, x in enumerate(layouts):
            paths: list[tuple[int, ...]] = []
            for row, (token, parent) in enumerate(zip(x.token_ids, x.parents, strict=True)):
                paths.append((*(paths[parent] if parent >= 0 else ()), token))
                assert x.positions[row] == len(paths[row]) - 1
                self.row[paths[row]] = (number, row)
                if x.written[row] & kind:
                    self.target[paths[row]] = x.targets[row]

    def __call__(self, input_ids, scores):
        token = self.target[tuple(input_ids[0].tolist())]
        return torch.full_like(scores, -torch.inf).index_fill(-1, torch.tensor(token), 0.0)


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(vocabulary()), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                         num_attention_heads=2, max_position_embeddings=1024, initializer_range=0.3,
                         eos_token_id=2, bos_token_id=1, pad_token_id=0)  # fmt: skip
    return LlamaForCausalLM._from_config(config, attn_implementation="eager").eval()


def dense_logits(model, layout):
    mask = torch.zeros(len(layout.token_ids), len(layout.token_ids))
    mask.masked_fill_(~torch.from_numpy(layout.mask()), torch.finfo(torch.float32).min)
    with torch.no_grad():
        return model(
            input_ids=torch.tensor([layout.token_ids]),
            position_ids=torch.tensor([layout.positions]),
            attention_mask=mask[None, None],
        ).logits[0]


@pytest.mark.parametrize("way", ["forked", "sequential", "plain"])
def test_the_layout_is_what_the_engine_shows(tiny, way):
    """Each row that the model writes, in each way of running: the same tokens before it, the same logits."""
    kind = PLAIN if way == "plain" else FORKED
    strategy = {"forked": ab.ThreadWeaver(), "sequential": ab.Sequential(ab.ThreadWeaver()), "plain": None}[way]
    tokenizer = make_tokenizer()
    questions = [problem(*pair) for pair in PAIRS[:5]]
    layouts = [layout_of(q, tokenizer) for q in questions]
    logits = [dense_logits(tiny, x) for x in layouts]
    recorder, trie = Recorder(), Trie(layouts, kind)
    with_fork_attention = LlamaForCausalLM._from_config(tiny.config, attn_implementation="anabranch").eval()
    with_fork_attention.load_state_dict(tiny.state_dict())
    engine = ab.Engine(with_fork_attention, tokenizer, num_pages=400, page_size=8)
    results = engine.generate(
        [q.prompt for q in questions], strategy=strategy, logits_processor=[recorder, trie], max_new_tokens=600
    )
    assert_nothing_held(engine)
    seen = set()
    for context, scores in recorder.seen:
        number, row = trie.row[context]
        seen.add((number, row))
        torch.testing.assert_close(scores, logits[number][row], atol=2e-4, rtol=2e-4)
    assert seen == {(n, row) for n, x in enumerate(layouts) for row, who in enumerate(x.written) if who & kind}
    for question, x, result in zip(questions, layouts, results, strict=True):
        assert result.malformed == () and result.text.endswith(f"={question.answer}")
        flat = [*result.prompt_token_ids, *result.token_ids]
        assert all(tuple(flat[: n + 1]) in trie.row for n in range(len(flat)))
        assert len(flat) == max(x.positions) + 1
        if way != "plain":
            assert result.metrics.num_threads == question.threads
            for child in result.tree.children:
                at = [
                    trie.row[tuple(flat[: child.start]) + child.token_ids[: n + 1]] for n in range(len(child.token_ids))
                ]
                positions = [x.positions[row] for _, row in at]
                assert positions == list(range(child.start, child.stop))


def test_what_carries_loss():
    tokenizer = make_tokenizer()
    question = problem(47, 36)
    x = layout_of(question, tokenizer)
    spelled = tokenizer.convert_ids_to_tokens(x.token_ids)
    header = spelled.index("<Thread>") - 1  # the line break that the runtime inserts
    assert [x.written[x.parents[header + i]] for i in range(4)] == [PLAIN] * 4
    second = [i for i, token in enumerate(spelled) if token == "2" and spelled[x.parents[i]] == "\n"]
    assert len(second) == 2 and len({x.positions[i] for i in second}) == 2  # alone, and behind thread 1
    alone = min(second, key=lambda i: x.positions[i])
    assert x.positions[alone] == x.positions[header] + 3 and x.targets[alone] == IGNORE
    assert x.written[alone + 1] == FORKED and tokenizer.decode([x.targets[alone + 1]]) == "a0"
    assert x.targets[: len("<47*36") - 1] == [IGNORE] * 5
    assert all((t == IGNORE) == (w == 0) for t, w in zip(x.targets, x.written, strict=True))


@pytest.mark.parametrize(
    ("items", "why"),
    [
        ([[("1", "a1")]], "do not stand behind"),
        (["=<Outlines></Outlines>", [("1", "a1")]], "has to go on"),
        (["=<Outlines></Outlines>", [("1", "a1"), ("1", "a2")], "="], "two with one id"),
        (["=<Outlines></Outlines>", [("1", "a1</Thread>")], "="], "leave </Thread> out"),
    ],
)
def test_items_that_do_not_fit(items, why):
    tokenizer = make_tokenizer()
    with pytest.raises(ValueError, match=why):
        thread_layout([1], items, tokenizer)
    with pytest.raises(ValueError, match="prompt_ids is empty"):
        thread_layout([], ["="], tokenizer)
    with pytest.raises(ValueError, match="join='reprefill'"):
        concat = dataclasses.replace(ab.ThreadWeaver(), join="concat", next_header=None)
        thread_layout([1], ["="], tokenizer, concat)


def test_pieces_serve_in_place_of_a_tokenizer():
    tokenizer, question = make_tokenizer(), problem(47, 36)
    pieces = {token: i for i, token in enumerate(vocabulary())}
    assert thread_layout([1], question.items, pieces, eos_id=2) == thread_layout(
        [1], question.items, tokenizer, eos_id=2
    )


# ------------------------------------------------------------------------------------------------ the packaged model


@pytest.fixture(scope="module")
def packaged():
    model, tokenizer = ab.models.load("multiplication", device="cpu")
    return ab.Engine(model, tokenizer, num_pages=400)


def test_the_packaged_model_loads_offline(packaged, monkeypatch):
    folder = ab.models.path("multiplication")
    assert folder.is_relative_to(ab.models.__file__.rpartition("/")[0])
    assert sum(file.stat().st_size for file in folder.iterdir()) < 8 << 20
    assert packaged.model.dtype == torch.float32
    monkeypatch.setattr(ab.models, "__file__", "/nowhere/models.py")
    with pytest.raises(ab.models.ModelUnavailable, match="not whole"):
        ab.models.path("multiplication")


@pytest.mark.parametrize("way", ["forked", "sequential", "plain"])
def test_the_packaged_model_decides_and_is_right(packaged, way):
    strategy = {"forked": ab.ThreadWeaver(), "sequential": ab.Sequential(ab.ThreadWeaver()), "plain": None}[way]
    prompts = {"7308 * 4406": 3, "9472 x 8": 0, "6 * 500": 0, "38*47=": 2}
    results = packaged.generate(list(prompts), strategy=strategy)
    for (prompt, threads), result in zip(prompts.items(), results, strict=True):
        a, b = map(int, re.findall(r"\d+", prompt))
        assert result.text.endswith(f"={a * b}") and result.text.count("<Thread>") == threads
        assert result.malformed == ()
        assert result.metrics.num_threads == (0 if way == "plain" else threads)
    big = results[0].metrics
    assert big.token_speedup > 1.8 if way == "forked" else big.token_speedup == 1.0
    assert_nothing_held(packaged)
