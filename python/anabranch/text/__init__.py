"""Between text and token ids: prompts and chats in, text out piece by piece, exact for every kind of tokenizer."""

from anabranch.text.prompts import Prompt, Text, check_template, split_prompts, takes_chats
from anabranch.text.tokens import Reader, Stops, Tokens

__all__ = ["Prompt", "Reader", "Stops", "Text", "Tokens", "check_template", "split_prompts", "takes_chats"]
