"""The tokenizer: digits, a place with its digit (and carry marks), signs, and ThreadWeaver's tags, one token each."""

from __future__ import annotations

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from anabranch.strategies import ThreadWeaver
from training.multiplication.traces import OPERAND, PLACES

SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")


def vocabulary() -> list[str]:
    """All tokens, in the order of their ids."""
    placed = [f"{place}{digit}" for place in OPERAND for digit in range(10)]
    placed += [f"{place}{digit}{chr(39) * carry}" for carry in range(4) for place in PLACES for digit in range(10)]
    return [*SPECIAL, *ThreadWeaver().tags, *"0123456789*+=:;\n", *placed]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Spaces and thousands commas are dropped, ``x`` and ``×`` read as ``*``; a prompt begins with ``<bos>``."""
    ids = {token: i for i, token in enumerate(vocabulary())}
    inner = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    inner.normalizer = normalizers.Sequence(
        [normalizers.Replace(Regex(r"[ \t,_]"), ""), normalizers.Replace(Regex(r"[xX×·]"), "*")]
    )
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[A-D][0-9]|[a-h][0-9]'{0,3}|[\s\S]"), "isolated")
    inner.decoder = decoders.Fuse()
    tags = [*SPECIAL, *ThreadWeaver().tags]
    inner.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in tags])
    inner.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", ids["<bos>"])])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )
