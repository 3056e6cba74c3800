"""Text as the engine gives it: streams, results, trees, inserted text and stop strings say the same."""

from __future__ import annotations

import random

import pytest
import torch
from engine_kit import Does, assert_nothing_held
from text_kit import BUILDERS, TEXTS, engine_for, made, own_decoding
from transformers import LogitsProcessor

import anabranch as ab
from anabranch.engine import Finish, Join, Token

SHAPES = ("byte-level", "byte fallback, prepend", "unigram, always", "word piece", "word ends", "slow bytes")


class Script(LogitsProcessor):
    """Makes a thread whose context is the beginning of `line` go on with it, and every other one write `other`."""

    def __init__(self, line, other=2):
        self.line, self.other = list(line), other

    def __call__(self, input_ids, scores):
        context, size = input_ids[0].tolist(), input_ids.shape[1]
        scores = torch.full_like(scores, -1e4)
        scores[:, self.line[size] if context == self.line[:size] and size < len(self.line) else self.other] = 0.0
        return scores


def streamed(engine, prompt, **options):
    """(events, result, text that the stream told of each thread)."""
    events = list(engine.stream(prompt, **options))
    assert_nothing_held(engine)
    told: dict[str, str] = {}
    for event in events:
        if isinstance(event, Token):
            told[event.thread] = told.get(event.thread, "") + event.text
    (result,) = (e.result for e in events if isinstance(e, Finish))
    return events, result, told


def check(engine, tokenizer, result, told):
    """Stream = result = tree = the tokenizer's own decoding, of a trunk that only wrote."""
    ids = list(result.token_ids)
    while ids and ids[-1] == 2:
        ids.pop()
    want = own_decoding(tokenizer, list(result.prompt_token_ids), ids)
    assert told.get("0", "") == result.text == result.tree.text == want
    return want


@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_stream_result_and_tree_are_the_tokenizers_own_decoding(name):
    tokenizer, rng = made(name), random.Random(name)
    engine = engine_for(tokenizer)
    for text in rng.sample(TEXTS, 4):
        prompt, whole = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in ("the he", "the he" + text))
        answer = whole[len(prompt) :] or whole
        script = Script([*prompt, *answer, 2])
        for most in (len(answer) + 1, rng.randrange(1, len(answer) + 1)):  # to its end, and cut somewhere
            _, result, told = streamed(engine, prompt, max_new_tokens=most, logits_processor=[script], eos_token_id=2)
            assert list(result.token_ids) == [*answer, 2][:most]
            check(engine, tokenizer, result, told)
    for seed in range(2):  # whatever the model writes
        _, result, told = streamed(
            engine, prompt[:2], max_new_tokens=40, seed=seed, do_sample=True, eos_token_id=2, temperature=3.0
        )
        check(engine, tokenizer, result, told)


def test_a_final_eos_is_not_streamed():
    tokenizer = made("byte-level")
    prompt, answer = tokenizer("he")["input_ids"], tokenizer(" ok")["input_ids"]
    events, result, told = streamed(
        engine_for(tokenizer), prompt, max_new_tokens=9, logits_processor=[Script([*prompt, *answer, 2])]
    )
    assert result.tree.ended == "eos" and result.token_ids == (*answer, 2)
    assert told == {"0": " ok"} and [e.token_ids for e in events if isinstance(e, Token)][-1] == (2,)


def test_the_first_word_keeps_its_space_in_every_account():
    tokenizer = made("byte fallback, prepend")
    prompt, whole = (tokenizer(t)["input_ids"] for t in ("he", "he a ok"))
    options = dict(max_new_tokens=9, logits_processor=[Script([*prompt, *whole[len(prompt) :], 2])])
    _, result, told = streamed(engine_for(tokenizer), prompt, strategy=ab.SelfConsistency(n=2), **options)
    assert result.text == result.tree.text == told["0.0"] == " a ok" and result.answers == [" a ok"] * 2
    assert result.trace().text == ab.trace.Trace.from_dict(result.trace().as_dict()).tree.text == " a ok"


@pytest.mark.parametrize("name", SHAPES)
def test_text_goes_on_where_it_is_put(name):
    tokenizer = made(name)
    line, header, later, summary = (
        (" on", " Pros", " and", " ok") if name.startswith("word") else ("llo", "\nPros:", "\nCons:", " 漢")
    )
    texts = {}

    def body(trunk):
        trunk.insert(line)
        scored = yield trunk.score(line)
        texts["scored"] = len(scored)
        kids = trunk.fork([header, header])
        yield [kid.decode(2) for kid in kids]
        texts["kids"] = [kid.text for kid in kids]
        yield trunk.join(kids, "reprefill", headers=[None, later])
        texts["joined"] = trunk.text
        kid = trunk.fork([header])[0]
        length = trunk.length
        yield trunk.join(kid, "summary", text=summary, keep=length)
        trunk.insert(line)
        yield trunk.decode(1)

    engine = engine_for(tokenizer)
    writes = Script([], tokenizer("he ok", add_special_tokens=False)["input_ids"][-1])
    events, result, told = streamed(
        engine, "the he", strategy=Does(body), max_new_tokens=6, eos_token_id=None, logits_processor=[writes]
    )
    written = texts["kids"][0].removeprefix(header)
    assert texts["kids"] == [header + written] * 2 and written and texts["scored"] >= 1
    assert texts["joined"] == line + line + header + written + later + written
    assert result.text == texts["joined"] + summary + line + written[: len(written) // 2]
    for node in result.tree.walk():
        if node.id in told and node.id != "0":
            assert told[node.id] == node.text
    again = ab.replay(result, engine_for(tokenizer))
    assert again.text == result.text and [n.text for n in again.tree.walk()] == [n.text for n in result.tree.walk()]
    joined = next(i for i, e in enumerate(events) if isinstance(e, Join))
    before = "".join(e.text for e in events[:joined] if isinstance(e, Token) and e.thread == "0")
    assert before == line + line


def test_text_waits_for_what_it_stands_behind():
    """What `insert` is given goes on behind what a decode in front of it has yet to write."""
    tokenizer = made("word ends")  # the space between two words hangs on the token before
    prompt, inner = tokenizer("the")["input_ids"], tokenizer.convert_tokens_to_ids("a")

    def body(trunk):
        trunk.decode(1)
        trunk.insert("b")
        yield trunk

    engine = engine_for(tokenizer)
    result = engine.generate(
        prompt, strategy=Does(body), logits_processor=[Script([*prompt, inner])], max_new_tokens=3, eos_token_id=None
    )
    assert result.text == " ab"


@pytest.mark.parametrize("name", ["byte-level", "byte fallback, prepend", "slow bytes", "unigram, always"])
def test_a_character_shared_by_two_decodes_is_told_once_and_whole(name):
    tokenizer = made(name)
    prompt, ids = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in ("he", "he龘𠮷 ok"))
    ids = ids[len(prompt) :]

    def body(trunk):
        for _ in ids:
            yield trunk.decode(1)

    script = [Script([*prompt, *ids])]
    options = dict(max_new_tokens=len(ids), logits_processor=script, eos_token_id=None)
    _, result, told = streamed(engine_for(tokenizer), prompt, strategy=Does(body), **options)
    assert result.text == told["0"] == "龘𠮷 ok"
    for cut in range(1, len(ids)):  # the same, with the prompt ending there
        front = [*prompt, *ids[:cut]]
        options = dict(max_new_tokens=len(ids) - cut, logits_processor=script, eos_token_id=None)
        _, result, told = streamed(engine_for(tokenizer), front, **options)
        assert result.text == told.get("0", "") == own_decoding(tokenizer, front, ids[cut:])


@pytest.mark.parametrize("name", ["byte-level", "byte fallback, prepend", "slow bytes"])
def test_what_a_trunk_held_is_told_before_its_children_come_back(name):
    tokenizer = made(name)
    prompt, first = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in ("he", "he龘\n"))
    first, (x,) = first[len(prompt) :], tokenizer("\nx", add_special_tokens=False)["input_ids"][-1:]

    def body(trunk):
        yield trunk.decode(len(first))
        kids = trunk.fork(2)
        yield [kid.decode(1) for kid in kids]
        trunk.join(kids)
        trunk.insert("\n")
        yield trunk.decode(1)

    script = [Script([*prompt, *first], x)]
    options = dict(logits_processor=script, max_new_tokens=40, eos_token_id=None)
    events, result, told = streamed(engine_for(tokenizer), prompt, strategy=Does(body), **options)
    joined = next(i for i, e in enumerate(events) if isinstance(e, Join))
    before = "".join(e.text for e in events[:joined] if isinstance(e, Token) and e.thread == "0")
    assert before == "龘\n" and told["0.0"] == told["0.1"] == "x"
    assert result.text == "龘\nxx\nx" and told["0"] == "龘\n\nx"


def test_what_is_cut_off_before_it_was_told_never_is():
    tokenizer = made("byte fallback, prepend")
    prompt, ids = tokenizer("he")["input_ids"], tokenizer("he ok\n")["input_ids"]

    def body(trunk):
        end = yield trunk.decode(9)
        assert end.reason == "eos" and end.text == trunk.text == " ok\n"
        trunk.rstrip()
        trunk.insert(" on")
        yield trunk

    script = Script([*ids, 2])
    _, result, told = streamed(engine_for(tokenizer), prompt, strategy=Does(body), logits_processor=[script])
    assert result.text == told["0"] == " ok on"


# ------------------------------------------------------------------------------------------------ stop strings


@pytest.mark.parametrize("stop", ["漢字漢字漢字", "é", "字 o", "ok"])
@pytest.mark.parametrize("name", ["byte-level", "byte fallback, prepend", "slow bytes", "unigram, never", "characters"])
@pytest.mark.parametrize("how", ["decode", "config"])
def test_a_stop_string_ends_it_with_the_token_that_completes_it(name, stop, how):
    tokenizer = made(name)
    prompt, ids = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in ("he", "he漢字漢é字漢字漢字漢字 ok"))
    ids = ids[len(prompt) :]
    ends = []

    def body(trunk):
        ends.append((yield trunk.decode(stop=[stop, "never"] if how == "decode" else ())))

    options = {"stop_strings": ["never", stop]} if how == "config" else {}
    _, result, told = streamed(
        engine_for(tokenizer), prompt, strategy=Does(body), logits_processor=[Script([*prompt, *ids])],
        max_new_tokens=len(ids), eos_token_id=None, **options,
    )  # fmt: skip
    size = next(n for n in range(1, len(ids) + 1) if stop in own_decoding(tokenizer, prompt, ids[:n]))
    assert len(result.token_ids) == size and (ends[0].reason, ends[0].stop) == ("stop", stop)
    assert told["0"] == ends[0].text == result.text and stop in result.text


def test_a_decodes_stops_look_at_what_it_samples_and_the_configs_at_all_of_the_text():
    tokenizer = made("byte-level")
    prompt, ids = tokenizer("漢")["input_ids"], tokenizer("字 and 漢字 on")["input_ids"]

    def body(trunk):
        yield trunk.decode(stop="漢字")

    script = [Script([*prompt, *ids])]
    options = dict(logits_processor=script, max_new_tokens=len(ids), eos_token_id=None)
    assert engine_for(tokenizer).generate(prompt, strategy=Does(body), **options).text == "字 and 漢字"
    assert engine_for(tokenizer).generate(prompt, stop_strings="漢字", **options).text == "字"
    with pytest.raises(ValueError, match="stop_strings holds an empty string"):
        engine_for(tokenizer).generate(prompt, stop_strings=["x", ""])


def test_until_reads_the_text_so_far():
    tokenizer = made("byte fallback, prepend")
    prompt, ids = (tokenizer(t)["input_ids"] for t in ("he", "he a 龘 ok"))
    seen = []

    def body(trunk):
        yield trunk.decode(until=lambda d: seen.append(d.text))

    options = dict(strategy=Does(body), logits_processor=[Script(ids)], max_new_tokens=len(ids) - len(prompt))
    engine_for(tokenizer).generate(prompt, **options)
    assert seen == [own_decoding(tokenizer, prompt, ids[len(prompt) : n]) for n in range(len(prompt) + 1, len(ids) + 1)]


# ------------------------------------------------------------------------------------------------ formats


def test_a_tagged_format_is_written_without_dummy_spaces():
    tokenizer = made("byte fallback, prepend")
    form = ab.strategies.Tagged(
        tags=("<Thread>", "</Thread>"), trigger="</Thread>", opening="<Thread>", outline=r"(\d)\.", stop="</Thread>",
        header="\n<Thread>\n{id}:", next_header="<Thread>\n{id}:", unclosed="\n</Thread>", after="\nand",
        closing="\nok", shape=".*", max_blocks=1,
    )  # fmt: skip
    prompt = tokenizer("he")["input_ids"]
    plan = tokenizer.convert_tokens_to_ids(["<Thread>", "1", ".", "2", ".", "</Thread>"])
    options = dict(logits_processor=[Script([*prompt, *plan])], max_new_tokens=20)
    _, result, told = streamed(engine_for(tokenizer), prompt, strategy=form, **options)
    block = "\n<Thread>\n1:\n</Thread><Thread>\n2:\n</Thread>\nok"
    assert result.text == "<Thread>1.2.</Thread>" + block
    assert told["0.0"] == "\n<Thread>\n1:\n</Thread>" and result.tree.children[0].text == told["0.0"]


@pytest.mark.parametrize("name", ["unigram, always", "byte fallback, prepend"])
def test_a_decode_keeps_its_text_when_its_thread_decodes_again(name):
    """These tokenizers read the first of some tokens without its space: a decode's text is read where it stands."""
    tokenizer = made(name)
    prompt = tokenizer("he")["input_ids"]
    line = tokenizer("he a ok")["input_ids"]

    def body(trunk):
        first = trunk.decode(len(line) - len(prompt) - 1)
        ended = yield first
        yield trunk.decode(1)
        return first.text, ended.text

    engine = engine_for(tokenizer)
    options = dict(strategy=Does(body), max_new_tokens=9, logits_processor=[Script(line)])
    kept, text = engine.generate(prompt, **options).answers
    assert kept == text and text.startswith(" ")
