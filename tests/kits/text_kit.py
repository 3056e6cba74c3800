"""Tokenizers of every shape that text goes through, made here, and texts in many scripts."""

from __future__ import annotations

from functools import cache

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    ByT5Tokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizer,
    PreTrainedTokenizerFast,
)

import anabranch as ab

WORDS = ("the", "he", "llo", "in", "on", "Pros", "Cons", "ok", "and", "and so")
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;!?-'"
TAGS = ("<Thread>", "</Thread>")
BOS, EOS = "<s>", "</s>"
SPECIAL = {"bos_token": BOS, "eos_token": EOS, "unk_token": "<unk>"}

TEXTS = (
    "Où est l'été? Żółć, naïve façade",
    "書籍龍門ok",
    "漢字漢字漢字 𠮷野家 龘",
    "👩‍👩‍👧‍👦❤️👍🏽 ok🇫🇷",
    "नमस्ते दुनिया",
    "வணக்கம் உலகம்",
    "മലയാളം അക്ഷരം",
    "ภาษาไทยไม่มีช่องว่าง",
    "ພາສາລາວ",
    "مرحبا بالعالم",
    "שלום עולם",
    "𝒜𝔅ℂ∑∫√𝟘",
    "e\u0301 o\u0308\u0323 x\u0302",
    "\r\none\ttwo\n\n\tthree\r",
    "  two  spaces   ",
    " a ok",
    "plain words, it's 1.5 : no?",
)


def _bytes_first(merges: list[tuple[str, str]], vocab: dict[str, int], pieces: list[list[str]]) -> None:
    """Merges, left to right, that make one token of each list of pieces."""
    for first, *rest in pieces:
        for piece in rest:
            if (first, piece) not in merges:
                merges.append((first, piece))
            first += piece
            vocab.setdefault(first, len(vocab))


def _wrapped(tokenizer: Tokenizer, **options) -> PreTrainedTokenizerFast:
    options = {**SPECIAL, "clean_up_tokenization_spaces": False, "extra_special_tokens": list(TAGS), **options}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)


def byte_level(prefix: bool = False, ignore_merges: bool = False) -> PreTrainedTokenizerFast:
    """GPT-2's shape; its merges join bytes across characters, as trained ones do."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab, merges = {token: i for i, token in enumerate(["<unk>", BOS, EOS, *alphabet])}, []

    def spelled(text: str) -> list[str]:
        return list(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)[0][0])

    _bytes_first(merges, vocab, [spelled(w) for w in (*WORDS[:9], " the", " ok", "\n\n", "é")])
    for text in ("漢", "ไท", "👍"):  # a lead byte with the next one, and a continuation with a lead
        whole = spelled(text)
        _bytes_first(merges, vocab, [whole[:2], whole[-1:] + spelled("字")[:1]])
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    tokenizer.decoder = decoders.ByteLevel()
    return _wrapped(tokenizer)


def byte_fallback(variant: str = "prepend") -> PreTrainedTokenizerFast:
    """Llama 2's shape: words, characters, bytes for all else; a dummy space by a normalizer or by Metaspace."""
    vocab: dict[str, int] = {"<unk>": 0, BOS: 1, EOS: 2} | {f"<0x{i:02X}>": 3 + i for i in range(256)}
    for char in "▁" + LETTERS + "éü漢字":
        vocab.setdefault(char, len(vocab))
    merges: list[tuple[str, str]] = []
    _bytes_first(merges, vocab, [list(w.replace(" ", "▁")) for w in (*WORDS, *(f" {w}" for w in WORDS), "  ")])
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    end = [decoders.ByteFallback(), decoders.Fuse()]
    if variant == "prepend":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), *end, decoders.Strip(" ", 1, 0)])
    elif variant == "gemma":  # no dummy space at all
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), *end])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=variant, split=False)
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), *end, decoders.Strip(" ", 1, 0)])
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 1)])
    return _wrapped(tokenizer)


def unigram(scheme: str, bytes_: bool = True) -> PreTrainedTokenizerFast:
    """T5's and newer SentencePiece models' shape."""
    pieces = [("<unk>", 0.0), (BOS, 0.0), (EOS, 0.0)]
    pieces += [(f"<0x{i:02X}>", -20.0) for i in range(256)] if bytes_ else []
    pieces += [(c, -8.0) for c in dict.fromkeys("▁" + LETTERS + "éü漢字")]
    pieces += [(w.replace(" ", "▁"), -6.0) for w in (*WORDS, *(f" {w}" for w in WORDS)) if len(w) > 1]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=bytes_))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme)
    last = decoders.Metaspace("▁", prepend_scheme=scheme)
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), last]) if bytes_ else last
    return _wrapped(tokenizer)


def word_piece(clean_up: bool = False) -> PreTrainedTokenizerFast:
    words = [*WORDS[:9], *LETTERS, *(f"##{w}" for w in WORDS[:9]), *(f"##{c}" for c in LETTERS), "漢", "字"]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(["<unk>", BOS, EOS, *words]))}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece("##", cleanup=clean_up)
    return _wrapped(tokenizer, clean_up_tokenization_spaces=clean_up)


def word_ends() -> PreTrainedTokenizerFast:
    """The first GPT's shape: a token says that it ends a word, and the decoder puts a space behind it, but not the
    last."""
    vocab: dict[str, int] = {"<unk>": 0, BOS: 1, EOS: 2}
    for char in LETTERS:
        vocab[char], vocab[f"{char}</w>"] = len(vocab), len(vocab) + 1
    merges: list[tuple[str, str]] = []
    _bytes_first(merges, vocab, [[*w[:-1], f"{w[-1]}</w>"] for w in WORDS[:9]])
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.BPEDecoder("</w>")
    return _wrapped(tokenizer)


def characters() -> PreTrainedTokenizerFast:
    """One token a character, for the characters of the texts alone."""
    known = dict.fromkeys("".join(TEXTS) + LETTERS + " \n")
    tokenizer = Tokenizer(models.WordLevel({t: i for i, t in enumerate(["<unk>", BOS, EOS, *known])}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return _wrapped(tokenizer)


def whole_words() -> PreTrainedTokenizerFast:
    """One token a word; no decoder, so words are joined by spaces."""
    words = dict.fromkeys(w for text in TEXTS for w in text.split())
    tokenizer = Tokenizer(models.WordLevel({t: i for i, t in enumerate(["<unk>", BOS, EOS, *words])}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _wrapped(tokenizer)


class Slow(PreTrainedTokenizer):
    """A tokenizer in Python, without the Rust library: single bytes, as the first GPT-2 had them."""

    def __init__(self, **options):
        super().__init__(**{**SPECIAL, "extra_special_tokens": list(TAGS), **options})

    @property
    def vocab_size(self) -> int:
        return 256

    def get_vocab(self) -> dict[str, int]:
        return {f"<{i:02x}>": i for i in range(256)} | self.added_tokens_encoder

    def _tokenize(self, text: str, **_) -> list[str]:
        return [f"<{byte:02x}>" for byte in text.encode()]

    def _convert_token_to_id(self, token: str) -> int:
        return int(token[1:3], 16)

    def _convert_id_to_token(self, index: int) -> str:
        return f"<{index:02x}>"

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        own = self.added_tokens_encoder
        return b"".join(t.encode() if t in own else bytes([int(t[1:3], 16)]) for t in tokens).decode(errors="replace")


class Stripped(Slow):
    """One whose decoding drops the spaces at both ends, as that of several older ones in Python does."""

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return super().convert_tokens_to_string(tokens).strip(" ")


BUILDERS = {
    "byte-level": byte_level,
    "byte-level, prefix": lambda: byte_level(prefix=True),
    "byte fallback, prepend": byte_fallback,
    "byte fallback, first": lambda: byte_fallback("first"),
    "byte fallback, always": lambda: byte_fallback("always"),
    "byte fallback, gemma": lambda: byte_fallback("gemma"),
    "unigram, first": lambda: unigram("first"),
    "unigram, always": lambda: unigram("always"),
    "unigram, never": lambda: unigram("never"),
    "unigram, no bytes": lambda: unigram("always", bytes_=False),
    "word piece": word_piece,
    "word piece, clean": lambda: word_piece(clean_up=True),
    "word ends": word_ends,
    "characters": characters,
    "whole words": whole_words,
    "slow bytes": Slow,
    "slow, strips": Stripped,
    "slow, drops what is broken": lambda: ByT5Tokenizer(extra_ids=0, extra_special_tokens=list(TAGS)),
}


@cache
def made(name: str):
    return BUILDERS[name]()


def decode(tokenizer, ids):
    return tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)


def own_decoding(tokenizer, before, ids) -> str:
    """The definition, word for word: all of it decoded, without the longest decoded beginning of what stands before."""
    whole = decode(tokenizer, [*before, *ids])
    for size in range(len(before), 0, -1):
        if whole.startswith(lead := decode(tokenizer, before[:size])):
            return whole[len(lead) :]
    return whole


@cache
def model_for(size: int):
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=size, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=2048, bos_token_id=1, eos_token_id=2,
        pad_token_id=None, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def engine_for(tokenizer, **options) -> ab.Engine:
    return ab.Engine(model_for(len(tokenizer)), tokenizer, num_pages=256, page_size=8, **options)
