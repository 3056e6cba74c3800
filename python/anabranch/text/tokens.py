"""Between token ids and text, exactly and in small steps: the only place that decodes or encodes.

**What a run of tokens reads as** depends on what stands in front of it (a dummy space, a space between words) and
sometimes on what follows (the bytes of one character in several tokens; byte-fallback decoders read a run of byte
tokens as a whole). With ``decode(ids) = tokenizer.decode(ids, skip_special_tokens=False,
clean_up_tokenization_spaces=False)``, the text of `ids` behind `before` is

    decode(before + ids)  without the longest  decode(before[:j])  that it begins with.

j is ``len(before)``, unless `before` ends inside a character that `ids` complete: then the whole character belongs to
`ids`. A final end-of-sequence token is no text.

`Tokens` knows a tokenizer, `Reader` follows a text that grows, `Stops` looks for strings in it. None of them looks
further back than to the last token behind which nothing can change any more (`Tokens.closes`), so a token costs a few
decodes of short runs however long the text is.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import groupby
from typing import Any, NamedTuple

BROKEN = "\ufffd"  # what bytes read as that are no character (yet)
_LONGEST = 4  # bytes of a character, so tokens that it may take
# Texts to read behind, or to encode behind, that most vocabularies hold and that rarely merge with what follows.
_ANCHORS = ("a", "\n", ".", "0", ":", "x", "the")
# Characters that hardly any vocabulary has: their last bytes are 0x80 and 0xBF, the two ends of what may continue one.
_RARE = (("\U00013000", "\U0001303f"), ("\U000f0000", "\U000f003f"))


class Place(NamedTuple):
    """Where a text goes on: `head`, tokens to decode in front (nothing changes behind them), then `open` ones."""

    head: list[int]
    open: list[int]


class Tokens:
    """What the tokens of one tokenizer read as, and which tokens a text takes."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self._closes: dict[int, bool] = {}
        self._pieces: dict[int, str] = {}

    # ---------------------------------------------------------------------------------------- ids → text

    def decode(self, ids: Sequence[int]) -> str:
        """Text of whole sequences, special tokens shown."""
        if not len(ids):
            return ""
        if not self._spelled_apart:
            return self._decode(ids, skip=False)
        parts: list[str] = []
        for special, group in groupby(ids, key=self._spelled_apart.__contains__):
            run = list(group)
            if special:
                parts += self.tokenizer.convert_ids_to_tokens(run)
            elif parts:  # not the beginning of a text, so no dummy space is dropped
                front = self._encode("a")
                parts.append(_behind(self._decode([*front, *run], skip=True), self._decode(front, skip=True)))
            else:
                parts.append(self._decode(run, skip=True))
        return "".join(parts)

    def _decode(self, ids: Sequence[int], skip: bool) -> str:
        text = self.tokenizer.decode(list(ids), skip_special_tokens=skip, clean_up_tokenization_spaces=False)
        return text if isinstance(text, str) else "".join(text)

    @cached_property
    def _spelled_apart(self) -> frozenset[int]:
        """Special tokens, where they have to be decoded apart from the text between them; empty for most tokenizers.

        mistral-common's SentencePiece tokenizers give raw pieces instead of text when special tokens are to be shown.
        """
        ids, special = self._encode("a b"), frozenset(getattr(self.tokenizer, "all_special_ids", ()))
        if not ids or special & set(ids) or self._decode(ids, skip=False) == self._decode(ids, skip=True):
            return frozenset()
        return special

    def added(self, head: Sequence[int], ids: Sequence[int]) -> str:
        """What `ids` add to the text of `head`."""
        return _behind(self.decode([*head, *ids]), self.decode(head))

    def piece(self, token: int) -> str:
        """Text of one token in the middle of a text (remembered)."""
        if token not in self._pieces:
            self._pieces[token] = self.run([token])
        return self._pieces[token]

    def run(self, ids: Sequence[int]) -> str:
        """Text of some tokens in the middle of a text."""
        return self.added(self.anchor, ids)

    def closes(self, token: int) -> bool:
        """Whether nothing in front of the end of this token can change any more, whatever follows (remembered).

        False for a token that ends inside a character, and for one that may be part of a run read as a whole.
        """
        found = self._closes.get(token)
        if found is None:
            found = not self._broken(token) and self.settled([*self.anchor, token])
            self._closes[token] = found
        return found

    def _broken(self, token: int) -> bool:
        """Whether a token holds a part of a character (alone it reads as `BROKEN`, or as nothing)."""
        return not self.piece(token) or BROKEN in self.piece(token)

    def settled(self, ids: Sequence[int]) -> bool:
        """Whether the text of `ids`, which begin where nothing can change, stays as it is whatever follows."""
        text = self.decode(ids)
        if not self._probes:  # a space that reads as nothing may yet show: some decoders strip the end
            return not text.endswith(BROKEN) and text != self.decode(ids[:-1])
        return text != "" and all(self.decode([*ids, *probe]) == text + alone for probe, alone in self._probes)

    def place(self, backwards: Iterable[int]) -> Place:
        """Where a text goes on behind some tokens, given from the last one backwards; reads no more than it must."""
        open_: list[int] = []
        for token in backwards:
            if self.closes(token):
                return Place([*self.anchor, token], open_[::-1])
            open_.append(token)
        return Place([], open_[::-1])

    def reading(self, ids: Sequence[int], place: Place) -> str:
        """Text of `ids` at a place."""
        reader = Reader(self, place)
        reader.push(ids)
        return reader.text

    @cached_property
    def anchor(self) -> list[int]:
        """Tokens to decode in front, so that what follows does not begin a text; [] where nothing fits."""
        for text in _ANCHORS:
            ids = self._encode(text)
            if text.strip() and ids and self.decode(ids).strip().casefold() == text:
                return ids
        return []

    @cached_property
    def by_runs(self) -> bool:
        """Whether byte tokens are read a run at a time: one that is no character garbles the whole run."""
        return any(self.run([*char, *byte]) != self.run(char) + self.run(byte) for byte, char in self._bytes)

    @cached_property
    def _bytes(self) -> list[tuple[list[int], list[int]]]:
        """(a token that continues a character, the tokens of a whole one), for the lowest and the highest such byte."""
        for pair in _RARE:
            found = []
            for char in pair:
                ids = self._encode(char)
                at = next((i for i, token in enumerate(ids) if self._broken(token)), None)
                if at is not None and self._broken(ids[-1]) and self.run(ids[at:]) == char:
                    found.append((ids[-1:], ids[at:]))
            if len(found) == len(pair):
                return found
        return []

    @cached_property
    def _probes(self) -> list[tuple[list[int], str]]:
        """What may follow: one to three bytes that continue a character; each with its own text."""
        probes = [byte * times for byte, _ in self._bytes for times in (1, 2, 3)]
        return [(probe, self.run(probe)) for probe in probes]

    # ---------------------------------------------------------------------------------------- text → ids

    def encode(self, text: str, place: Place | None = None) -> list[int]:
        """Token ids of `text`, no special tokens added: as a text of its own, or as it goes on at `place`.

        There, the ids are those that read exactly `text` in that place: without the dummy space that many tokenizers
        put in front of whatever they encode. For a tokenizer that cannot write `text` (it drops case or line breaks),
        the nearest.
        """
        if not text:
            return []
        return self._encode(text) if place is None else self._going_on(text, place)

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _going_on(self, text: str, place: Place) -> list[int]:
        spellings = list(self._spellings(text))
        middle = Place(self.anchor, [])
        for where in (place, middle):  # inside a character nothing may read right; then the middle of a text counts
            for ids in spellings:
                if self.reading(ids, where) == text:
                    return ids
        # Some tokenizers put the dummy space behind each special token as well: piece by piece, then.
        for token in spellings[0]:
            front, found, rest = text.partition(self.piece(token)) if token in self._special else ("", "", "")
            if found:
                behind = Place([*self.anchor, token], [])
                return [*self.encode(front, place), token, *self.encode(rest, behind)]
        return min(spellings, key=lambda ids: _difference(self.reading(ids, middle), text))

    def _spellings(self, text: str) -> Iterator[list[int]]:
        """`text` encoded as it is, and as what is left of longer texts that end with it."""
        yield self._encode(text)
        for anchor in _ANCHORS:
            front, both = self._encode(anchor), self._encode(anchor + text)
            if front and both[: len(front)] == front:
                yield both[len(front) :]

    @cached_property
    def _special(self) -> frozenset[int]:
        try:
            added = self.tokenizer.get_added_vocab().values()
        except (AttributeError, NotImplementedError):
            added = ()
        return frozenset((*added, *getattr(self.tokenizer, "all_special_ids", ())))


class Reader:
    """The text of tokens that come one after another behind a place, told as soon as nothing can change it any more.

    The pieces that `push` gives and `rest` at the end, joined, are `text`. Held back are: a character that is not whole
    yet, a run of bytes that is read as a whole, and an end-of-sequence token, which is text only if something follows.
    """

    def __init__(self, tokens: Tokens, place: Place, eos_ids: Collection[int] = ()):
        self._tokens, self._eos_ids = tokens, eos_ids
        self._head, self._open = place.head, list(place.open)
        self._before = len(self._open)  # open tokens that stand in front of the first one pushed
        self._ends: list[int] = []
        self._told: list[str] = []
        self._whole, self._whole_text = 0, ""  # so many open tokens end with a whole character, and their text

    @property
    def text(self) -> str:
        """Text of all tokens so far."""
        return "".join(self._told) + self.rest()

    @property
    def holds(self) -> bool:
        """Whether some token's text has not been given yet."""
        return len(self._open) > self._before or bool(self._ends)

    def push(self, token_ids: Iterable[int]) -> str:
        """Add tokens; the text that is certain now and was not given before."""
        tokens, open_ = self._tokens, self._open
        seen = len(open_)
        for token in token_ids:
            if token in self._eos_ids:
                self._ends.append(token)
            else:
                open_ += [*self._ends, token]
                self._ends.clear()
        if len(open_) == seen:
            return ""
        closing = next((i for i in range(len(open_) - 1, seen - 1, -1) if tokens.closes(open_[i])), -1)
        settled = closing + 1
        if settled < len(open_) and not tokens.by_runs and tokens.settled([*self._head, *open_]):
            settled = len(open_)
        if not settled:
            return ""
        text = self._own(tokens.added(self._head, open_[:settled]))
        self._head = [*tokens.anchor, *open_[max(closing, 0) : settled]]
        del open_[:settled]
        self._before, self._whole, self._whole_text = 0, 0, ""
        self._told.append(text)
        return text

    def rest(self) -> str:
        """Text of the tokens held back, if nothing follows them."""
        if len(self._open) == self._before:
            return ""
        return self._own(self._tokens.added(self._head, self._open))

    def whole(self) -> str:
        """Text of the tokens held back as it stands, up to its last whole character."""
        if self._before and not self._whole:
            for size in range(self._before, max(0, self._before - _LONGEST), -1):
                text = self._tokens.added(self._head, self._open[:size])
                if not text.endswith(BROKEN):
                    self._whole, self._whole_text = size, text
                    break
        new = self._open[self._whole :]
        # Whole characters behind whole characters read as both alone. More tokens than a character has bytes without
        # one: the run is broken, and reads as nothing until it ends.
        if new and not (self._tokens.by_runs and len(new) > _LONGEST):
            text = self._whole_text + self._tokens.added(self._head, new)
            if self._tokens.by_runs and BROKEN not in text:
                self._whole, self._whole_text = len(self._open), text
            return self._own(text.rstrip(BROKEN))
        return self._own(self._whole_text)

    def drop(self, count: int) -> bool:
        """Take back the last `count` tokens; False, and nothing happens, when some of their text was given already."""
        held = [*self._open[self._before :], *self._ends]
        if count > len(held):
            return False
        kept = len(held) - count
        del self._open[self._before + kept :]
        del self._ends[max(0, kept - (len(self._open) - self._before)) :]
        self._whole, self._whole_text = 0, ""
        return True

    def _own(self, text: str) -> str:
        """The part of the open tokens' text that is not of those in front: see the module's docstring."""
        for size in range(self._before, 0, -1):
            lead = self._tokens.added(self._head, self._open[:size])
            if text.startswith(lead):
                return text[len(lead) :]
        return text


class Stops:
    """Looks for strings in a text that grows: each is found with the token with which the text first holds it."""

    def __init__(self, strings: Sequence[str], before: str = ""):
        """before: text in front, in which a string may begin (but not end)."""
        self._strings = tuple(strings)
        self._keep = max(map(len, self._strings)) - 1
        self._tail = before[len(before) - self._keep :] if self._keep < len(before) else before

    def find(self, told: str, open_: str) -> str | None:
        """The first of the strings that the text holds now. `told`: what is new and certain, `open_`: what may change.

        Strings that ended in what was certain before are not found again.
        """
        tail, text = self._tail, self._tail + told
        self._tail = text[max(0, len(text) - self._keep) :]
        text += open_
        return next((s for s in self._strings if text.find(s, max(0, len(tail) - len(s) + 1)) >= 0), None)


def _behind(whole: str, head: str) -> str:
    """`whole` without `head`, or without what it shares with it where the decoder rewrites the end of `head`."""
    if whole.startswith(head):
        return whole[len(head) :]
    return whole[next((i for i, (a, b) in enumerate(zip(whole, head, strict=False)) if a != b), len(whole)) :]


def _difference(got: str, wanted: str) -> tuple[bool, bool]:
    """How far two texts are apart that are not equal: other words, or another beginning of the first."""
    words = [text.casefold().split() for text in (got, wanted)]
    return words[0] != words[1], got[:1].isspace() != wanted[:1].isspace()
