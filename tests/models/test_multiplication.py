"""The packaged multiplication model, the traces it learnt, and that training shows what the engine shows."""

from __future__ import annotations

import dataclasses
import json
import random
import re
from pathlib import Path

import pytest
import torch
from engine_kit import Recorder, assert_nothing_held
from taught_kit import Teacher, tiny_llama
from training.layout import lesson
from training.multiplication.problems import PROBLEMS
from training.multiplication.tokens import make_tokenizer, vocabulary
from training.multiplication.traces import draw, drill, problem, split_of
from transformers import LlamaForCausalLM

import anabranch as ab
from anabranch.models import catalogue
from anabranch.training import IGNORE

TAGS = ab.ThreadWeaver().tags
PAIRS = [(7308, 4406), (47, 36), (9999, 9999), (1000, 7), (5, 400), (0, 12), (3, 0), (8, 21), (60, 1111)]


def lesson_of(question, tokenizer):
    ids = tokenizer(question.prompt)["input_ids"]
    return lesson(ids, question.items, tokenizer, eos_id=tokenizer.eos_token_id)


def flat_text(question) -> str:
    return question.prompt + "".join(x if isinstance(x, str) else "|".join(t for _, t in x) for x in question.items)


# ------------------------------------------------------------------------------------------------ traces


def number_of(placed: str) -> int:
    """What places and digits like "a4b0'" say; each place once, in one order or the other."""
    found = re.findall(r"([a-h])(\d)'*", placed)
    letters = "".join(c for c, _ in found)
    assert letters in ("abcdefgh"[: len(letters)], "abcdefgh"[: len(letters)][::-1])
    return sum(int(d) * 10 ** "abcdefgh".index(c) for c, d in found)


def check_product(text: str, a: int, digit: int, place: int, width: int) -> None:
    said, work, top, usual = re.fullmatch(r"(.*?):(.*;)([^;]*);([^;]*)", text).groups()
    assert said == "".join(f"{c}{d}" for c, d in zip("ABCD", str(a)[::-1], strict=False)) + f"*{digit}" + "0" * place
    step = r"([A-D])(\d)\*(\d)=(\d\d)\+(\d)=(\d\d)([a-h])(\d)"
    carry = 0
    for at, (p, x, y, product, plus, total, q, out) in enumerate(re.findall(step, work)):
        assert (p, x, q) == ("ABCD"[at], str(a)[::-1][at], "abcdefgh"[at + place])
        assert int(y) == digit and int(product) == int(x) * digit and int(plus) == carry
        assert int(total) == int(product) + carry and out == total[1]
        carry = int(total[0])
    assert at + 1 == len(str(a))
    columns = re.sub(step, r"\7\8", work) + top
    assert len(re.findall("[a-h]", columns)) == width and number_of(columns) == a * digit * 10**place
    check_usual(usual, a * digit * 10**place)


def check_usual(text: str, number: int) -> None:
    assert text == "".join(f"{c}{d}" for c, d in zip("hgfedcba"[-len(str(number)) :], str(number), strict=True)) + (
        f"={number}"
    )


def test_traces_are_arithmetically_right():
    rng = random.Random(4)
    for a, b in PAIRS + [draw(rng, s) for s in ("train", "dev", "test") for _ in range(60)]:
        question = problem(a, b)
        digits = [int(d) for d in reversed(str(b))]
        places, width = [i for i, d in enumerate(digits) if d], len(str(a)) + len(str(b))
        assert question.threads == (len(places) if len(places) > 1 else 0) and question.answer == str(a * b)
        if not question.threads:
            (text,) = question.items
            place = places[0] if places else 0
            assert text[0] == "="
            check_product(text[1:], a, digits[place], place, width)
            continue
        head, threads, join = question.items
        outlines = re.findall(r"<Outline>(\d):(\d+)</Outline>", head)
        assert outlines == [(str(t), str(digits[p] * 10**p)) for t, p in enumerate(places, 1)]
        assert head.startswith("=<Parallel><Outlines>") and head.endswith("</Outline></Outlines>")
        assert [t for t, _ in threads] == [t for t, _ in outlines]
        for (_, text), place in zip(threads, places, strict=True):
            check_product(text, a, digits[place], place, width)
        columns, usual = re.fullmatch(r"</Parallel>(.*);(.*)", join).groups()
        found = re.findall(r"(\d+)([a-h])(\d)('*)", columns)
        assert "".join("".join(x) for x in found) == columns and [c for _, c, *_ in found] == list("abcdefgh"[:width])
        carry = 0
        for at, (column, _, digit, marks) in enumerate(found):
            assert column == "".join(str(a * digits[p] * 10**p // 10**at % 10) for p in places)
            carry, left = divmod(sum(map(int, column)) + carry, 10)
            assert (int(digit), len(marks)) == (left, carry)
        check_usual(usual, a * b)


def test_drills_are_joins():
    rng = random.Random(7)
    for _ in range(100):
        given, said = drill(rng)
        numbers = [number_of(t) for t in re.findall(r":([^<]*)<", given)] or [number_of(given)]
        places = len(re.findall(r"[a-h]\d", given)) // len(numbers)
        assert said.endswith(f"={sum(numbers) % 10**places}") and ("</Parallel>" in given) == (len(numbers) > 1)


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
        assert line["family"] == f"{len(str(a))}x{len(str(b))}"


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


@pytest.fixture(scope="module")
def tiny():
    return tiny_llama("eager", len(vocabulary()), positions=1024, bos=1, eos=2)


def dense_logits(model, row):
    mask = torch.zeros(row.num_tokens, row.num_tokens).masked_fill_(~row.mask.dense(), torch.finfo(torch.float32).min)
    with torch.no_grad():
        return model(
            input_ids=row.input_ids[None], position_ids=row.position_ids[None], attention_mask=mask[None, None]
        ).logits[0]


@pytest.mark.parametrize("way", ["forked", "sequential", "plain"])
def test_the_layout_is_what_the_engine_shows(tiny, way):
    """Each row that the model writes, in each way of running: the same tokens before it, the same logits."""
    kind = "plain" if way == "plain" else "forked"
    strategy = {"forked": ab.ThreadWeaver(), "sequential": ab.Sequential(ab.ThreadWeaver()), "plain": None}[way]
    tokenizer = make_tokenizer()
    questions = [problem(*pair) for pair in ((738, 406), (47, 36), (80, 7))]
    lessons = [lesson_of(q, tokenizer) for q in questions]
    logits = [dense_logits(tiny, x.row) for x in lessons]
    recorder, teacher = Recorder(), Teacher([(x.row, getattr(x, kind)) for x in lessons])
    with_fork_attention = LlamaForCausalLM._from_config(tiny.config, attn_implementation="anabranch").eval()
    with_fork_attention.load_state_dict(tiny.state_dict())
    engine = ab.Engine(with_fork_attention, tokenizer, num_pages=400, page_size=8)
    results = engine.generate(
        [q.prompt for q in questions], strategy=strategy, logits_processor=[recorder, teacher], max_new_tokens=600
    )
    assert_nothing_held(engine)
    seen = set()
    for context, scores in recorder.seen:
        number, row = teacher.row[context]
        seen.add((number, row))
        torch.testing.assert_close(scores, logits[number][row], atol=2e-4, rtol=2e-4)
    assert seen == {(n, row) for n, x in enumerate(lessons) for row in x.row.mask.previous[getattr(x, kind)].tolist()}
    for question, x, result in zip(questions, lessons, results, strict=True):
        assert result.malformed == () and result.text.endswith(f"={question.answer}")
        flat = [*result.prompt_token_ids, *result.token_ids]
        assert all(tuple(flat[: n + 1]) in teacher.row for n in range(len(flat)))
        assert len(flat) == x.row.position_ids.max() + 1
        if way != "plain":
            assert result.metrics.num_threads == question.threads
            for child in result.tree.children:
                at = [
                    teacher.row[tuple(flat[: child.start]) + child.token_ids[: n + 1]]
                    for n in range(len(child.token_ids))
                ]
                positions = x.row.position_ids[[row for _, row in at]].tolist()
                assert positions == list(range(child.start, child.stop))


def test_what_carries_loss():
    tokenizer = make_tokenizer()
    question = problem(47, 36)
    x = lesson_of(question, tokenizer)
    ids, previous = x.row.input_ids.tolist(), x.row.mask.previous.tolist()
    learnt = (x.row.labels != IGNORE).tolist()
    spelled = tokenizer.convert_ids_to_tokens(ids)
    header = spelled.index("<Thread>") - 1  # the line break that the runtime inserts
    assert all(learnt[header + i] and x.plain[header + i] and not x.forked[header + i] for i in range(4))
    second = [i for i, token in enumerate(spelled) if token == "2" and spelled[previous[i]] == "\n"]
    assert len(second) == 2 and len({int(x.row.position_ids[i]) for i in second}) == 2  # alone, and behind thread 1
    alone = min(second, key=lambda i: x.row.position_ids[i])
    assert x.row.position_ids[alone] == x.row.position_ids[header] + 3 and not learnt[alone]
    first = next(i for i, up in enumerate(previous) if up == alone + 1)  # behind "2:"
    assert spelled[first] == "A7" and x.forked[first] and not x.plain[first]
    assert not any(learnt[: len("<47*36")]) and learnt[len("<47*36")]
    assert torch.equal(x.row.labels != IGNORE, x.forked | x.plain)


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
        lesson([1], items, tokenizer)
    with pytest.raises(ValueError, match="prompt_ids is empty"):
        lesson([], ["="], tokenizer)
    with pytest.raises(ValueError, match="join='reprefill'"):
        concat = dataclasses.replace(ab.ThreadWeaver(), join="concat", next_header=None)
        lesson([1], ["="], tokenizer, concat)


def test_pieces_serve_in_place_of_a_tokenizer():
    tokenizer, question = make_tokenizer(), problem(47, 36)
    pieces = {token: i for i, token in enumerate(vocabulary())}
    one, other = (lesson([1], question.items, way, eos_id=2) for way in (pieces, tokenizer))
    assert one.row.as_dict() | {"recorded": 0} == other.row.as_dict() | {"recorded": 0}
    assert torch.equal(one.forked, other.forked)


# ------------------------------------------------------------------------------------------------ the packaged model


@pytest.fixture(scope="module")
def packaged():
    model, tokenizer = ab.models.load("multiplication", device="cpu")
    return ab.Engine(model, tokenizer, num_pages=400)


def test_the_packaged_model_loads_offline(packaged, monkeypatch):
    folder = ab.models.path("multiplication")
    assert folder.is_relative_to(Path(ab.__file__).parent)
    assert sum(file.stat().st_size for file in folder.iterdir()) < 8 << 20
    assert packaged.model.dtype == torch.float32
    monkeypatch.setattr(catalogue, "__file__", "/nowhere/models/catalogue.py")
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
