"""The tokenizer: numbers below 100, signs and the phrases of APR's format, one token each."""

from __future__ import annotations

import re

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

NUMBERS = range(100)
SPECIAL = ("<pad>", "<eos>", "<unk>")
PHRASES = (
    "Sub Call Budget: ", "Moving to Node #", "\nCurrent State: ", "], Operations: [",
    "\nExploring Operation: ", ", Resulting Numbers: [", "\nGenerated Node #0,", "] Operation: ",
    "<Calling Sub Searches>", "\n<Start Sub Search ", " at level 1> Moving to Node #0,", "\n<End Calling Sub Searches>",
    "<Sub Searches>", "\n<No Solution in Sub Search ", "\n<Goal Reached in Sub Search ", " at level 1 at Node #0,",
    "\n<End Sub Searches>", "\nNo solution found.", "No solution found.", "Goal Reached",
    ", ", ": ", ":[",
)  # fmt: skip
SIGNS = "+-*/=:,'[]>\n "


def vocabulary() -> list[str]:
    """All tokens, in the order of their ids."""
    return [*SPECIAL, *PHRASES, *SIGNS, *map(str, NUMBERS)]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Exact: what it encodes it decodes again. Nothing stands in front of a prompt, just as of a called search's."""
    ids = {token: i for i, token in enumerate(vocabulary())}
    inner = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    longest_first = "|".join(re.escape(p) for p in sorted(PHRASES, key=len, reverse=True))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(rf"{longest_first}|\d+|[\s\S]"), "isolated")
    inner.decoder = decoders.Fuse()
    inner.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )
