"""Text, token by token: what tokens read as, which tokens a text takes, and where a stop string ends it."""

from __future__ import annotations

import random

import pytest
from text_kit import BUILDERS, LETTERS, TEXTS, characters, decode, made, own_decoding

from anabranch.text.prompts import Text
from anabranch.text.tokens import BROKEN, Reader, Stops, Tokens

EVERY = sorted(BUILDERS)
WITH_BYTES = [name for name in EVERY if "byte" in name or "unigram, " in name or "drops" in name]
WITH_BYTES.remove("unigram, no bytes")


def some_ids(tokenizer, rng: random.Random, kind: int) -> list[int]:
    """Token ids of text in several scripts (kind 0), with a few ids put among them (1), or any ids at all (2)."""
    ids = tokenizer("".join(rng.sample(TEXTS, 2)), add_special_tokens=False)["input_ids"]
    anything = [rng.randrange(len(tokenizer)) for _ in range(30)]
    if kind == 1:
        for token in anything[:3]:
            ids.insert(rng.randrange(len(ids) + 1), token)
    return anything if kind == 2 or len(ids) < 2 else ids


@pytest.mark.parametrize("name", EVERY)
def test_pieces_are_the_tokenizers_own_decoding_after_every_token(name):
    tokenizer, rng = made(name), random.Random(name)
    tokens = Tokens(tokenizer)
    for trial in range(60):
        ids = some_ids(tokenizer, rng, trial % 3)
        cut = rng.randrange(1, len(ids))  # anywhere: inside characters and inside runs of bytes as well
        before, ids = ids[:cut], ids[cut : cut + rng.randrange(1, 40)]
        reader, told = Reader(tokens, tokens.place(reversed(before))), ""
        for i, token in enumerate(ids):
            told += reader.push([token])
            want = own_decoding(tokenizer, before, ids[: i + 1])
            assert reader.text == told + reader.rest() == want
        assert tokens.reading(ids, tokens.place(reversed(before))) == want  # all at once


@pytest.mark.parametrize("name", EVERY)
def test_what_was_told_stays_true_whatever_follows(name):
    tokenizer, rng = made(name), random.Random(name)
    tokens = Tokens(tokenizer)
    for trial in range(60):
        ids = some_ids(tokenizer, rng, trial % 3)
        reader, told = Reader(tokens, tokens.place(())), ""
        for i, token in enumerate(ids):
            told += reader.push([token])
            assert decode(tokenizer, ids).startswith(told), tokenizer.convert_ids_to_tokens(ids[: i + 1])


@pytest.mark.parametrize("name", [n for n in EVERY if n not in ("word ends", "whole words")])
def test_characters_are_told_as_soon_as_they_are_whole(name):
    tokenizer = made(name)
    tokens = Tokens(tokenizer)
    if tokens.by_runs:  # there a run of bytes can still be garbled, so it is told with the token behind it
        ids, late = tokenizer("he 龘", add_special_tokens=False)["input_ids"], tokenizer("he")["input_ids"][-1:]
    else:
        ids, late = tokenizer("he and 漢字 llo", add_special_tokens=False)["input_ids"], []
    reader = Reader(tokens, tokens.place(()))
    reader.push(ids + late)
    assert not reader.holds


@pytest.mark.parametrize("name", WITH_BYTES)
def test_the_cost_of_a_token_does_not_grow_with_the_text(name):
    class Counted:
        def __init__(self, inner):
            self.inner, self.decoded = inner, 0

        def __call__(self, *args, **options):
            return self.inner(*args, **options)

        def __getattr__(self, attribute):
            return getattr(self.inner, attribute)

        def decode(self, ids, **options):
            self.decoded += len(ids)
            return self.inner.decode(ids, **options)

    ids = made(name)("ພາສາລາວ" * 40, add_special_tokens=False)["input_ids"]
    costs = []
    for ids_ in (ids[: len(ids) // 2], ids):
        tokenizer = Counted(made(name))
        tokens = Tokens(tokenizer)
        reader = Reader(tokens, tokens.place(()))
        for token in ids_:
            reader.push([token])
            reader.whole()
        assert reader.text
        costs.append(tokenizer.decoded)
    assert costs[1] < 2.5 * costs[0] and costs[1] < 250 * len(ids)


# ------------------------------------------------------------------------------------------------ stop strings

STOPS = ("漢字漢字漢字", "é", "ไทย", "👩‍👩", "\n\n", " ok", "llo", "字 ", "ລາ", "ക്ഷ", "s, i", "💥", "o", "words", "字")


@pytest.mark.parametrize("name", EVERY)
def test_a_stop_string_is_found_with_the_token_with_which_the_text_first_holds_it(name):
    tokenizer, rng = made(name), random.Random(name)
    tokens = Tokens(tokenizer)
    found = 0
    for trial in range(50):
        ids = some_ids(tokenizer, rng, trial % 2)
        cut = rng.randrange(1, len(ids))
        before, ids = ids[:cut], ids[cut:]
        strings = rng.sample(STOPS, 4)
        reader, stops = Reader(tokens, tokens.place(reversed(before))), Stops(strings)
        for i, token in enumerate(ids):
            text = own_decoding(tokenizer, before, ids[: i + 1])
            hit = stops.find(reader.push([token]), reader.whole())
            assert (hit is not None) == any(s in text for s in strings), (strings, text)
            if hit is not None:
                assert hit == next(s for s in strings if s in text)
                assert not text.endswith(BROKEN) or text[text.index(hit) + len(hit) :].strip(BROKEN) == ""
                found += 1
                break
    assert found > 3


def test_strings_that_end_in_front_are_not_found_and_those_that_begin_there_are():
    stops = Stops(("ab", "bcd", "x"), before="..ab")
    assert stops.find("", "") is None and stops.find("c", "") is None and stops.find("", "d") == "bcd"
    assert Stops(("x",), before="x").find("y", "") is None


def test_half_a_character_is_no_match_and_is_never_told():
    tokens = Tokens(made("slow bytes"))
    reader, stops = Reader(tokens, tokens.place(())), Stops((BROKEN, "é"))
    for byte in "漢é".encode()[:-1]:
        told = reader.push([byte])
        assert BROKEN not in told and stops.find(told, reader.whole()) is None
    assert stops.find(reader.push([0xA9]), reader.whole()) == "é"


# ------------------------------------------------------------------------------------------------ text → ids

ADDED = ("llo", "\nPros:", " a ok", "\n\nOn the one hand,", "漢字", "  x", "é", "\t", "1.", "ไท", "\n<Thread>\n1:")
INEXACT = ("whole words", "unigram, no bytes", "characters", "slow, strips")
EXACT = [n for n in EVERY if not n.startswith("wo") and n not in INEXACT]


@pytest.mark.parametrize("name", EXACT)
def test_text_goes_on_exactly(name):
    tokenizer = made(name)
    tokens = Tokens(tokenizer)
    for front in ("he", "he.\n", "one ", "漢", "x<Thread>"):
        before = tokenizer(front, add_special_tokens=False)["input_ids"]
        for text in ADDED:
            ids = tokens.encode(text, tokens.place(reversed(before)))
            assert own_decoding(tokenizer, before, ids) == text, (front, text, tokenizer.convert_ids_to_tokens(ids))
            assert decode(tokenizer, [*before, *ids]) == decode(tokenizer, before) + text


def test_what_a_tokenizer_cannot_write_comes_as_near_as_it_can():
    pieces, words = Tokens(made("word piece")), Tokens(made("whole words"))
    place = pieces.place(reversed(made("word piece")("he")["input_ids"]))
    assert pieces.reading(pieces.encode("llo", place), place) == "llo"  # ##llo
    assert pieces.reading(pieces.encode(" llo", place), place) == " llo"
    assert pieces.reading(pieces.encode("\n\nPros ok", place), place) == " Pros ok"
    assert words.reading(words.encode("\nwords,", words.place(())), words.place(())) == "words,"


def test_a_text_of_its_own_is_what_the_tokenizer_makes_of_it():
    tokenizer = made("byte fallback, prepend")
    assert Tokens(tokenizer).encode("llo") == tokenizer("llo", add_special_tokens=False)["input_ids"]
    assert Tokens(tokenizer).encode("") == []


def test_a_tokenizer_without_the_usual_letters_needs_no_anchor():
    tokens = Tokens(characters())
    ids = tokens.encode("漢字")
    assert tokens.anchor and tokens.reading(ids, tokens.place(())) == "漢字" and set("a:") <= set(LETTERS)


# ------------------------------------------------------------------------------------------------ rules on top


@pytest.mark.parametrize("name", WITH_BYTES)
def test_a_prompt_that_ends_inside_a_character(name):
    tokenizer = made(name)
    text = Text(tokenizer, len(tokenizer))
    ids = tokenizer("he書龘", add_special_tokens=False)["input_ids"]
    for cut in range(2, len(ids)):
        before, after = ids[:cut], ids[cut:]
        assert text.text(after, reversed(before)) in ("龘", "書龘")  # the whole character, nothing of the one before
        assert text.text([], reversed(before)) == ""


def test_a_final_end_of_sequence_is_no_text_and_one_in_the_middle_is():
    tokenizer = made("byte fallback, prepend")
    text = Text(tokenizer, len(tokenizer), frozenset([2]))
    reader, ok = text.reader([1]), tokenizer.convert_tokens_to_ids("ok")
    assert [reader.push([t]) for t in (ok, 2, 2, ok, 2)] == ["ok", "", "", "</s></s>ok", ""]
    assert reader.rest() == "" and reader.holds and reader.drop(1) and not reader.holds and not reader.drop(1)


def test_what_is_held_can_be_taken_back():
    tokens = Tokens(made("byte-level"))
    ids = made("byte-level")("ok書")["input_ids"]
    reader = Reader(tokens, tokens.place(reversed(ids[:1])), {2})
    assert reader.push(ids[1:-1]) == "" and reader.text == BROKEN
    assert not reader.drop(len(ids)) and reader.drop(1) and reader.push(ids[-2:]) == "書"


def test_white_space_at_the_end_may_take_several_tokens_a_character():
    for name in ("byte fallback, prepend", "byte-level", "slow bytes"):
        tokenizer = made(name)
        text = Text(tokenizer, len(tokenizer), frozenset([2] if name != "slow bytes" else []))
        blank = tokenizer("ok\u3000\n \u00a0", add_special_tokens=False)["input_ids"]
        kept = tokenizer("ok", add_special_tokens=False)["input_ids"]
        assert text.blank_at_end(blank) == len(blank) - len(kept), name
        assert text.blank_at_end(tokenizer("書", add_special_tokens=False)["input_ids"]) == 0
    assert Text(None, 9, frozenset([2])).blank_at_end([3, 2, 2]) == 2
