"""New prompts made from the caller's: what is asked in it, and another request in its place."""

from __future__ import annotations

import re
from typing import Any

from anabranch.strategies.api.thread import Thread


def question_of(trunk: Thread, who: str) -> str:
    """What a prompt asks: a chat's last user message, a text as it stands, the text of token ids.

    who: the strategy's name, for the error that tells of a chat without a question.
    """
    prompt = trunk.prompt
    if isinstance(prompt, str):
        return prompt.strip()
    if isinstance(prompt[0], dict):
        last = next((m for m in reversed(prompt) if m["role"] == "user"), None)
        if last is None:
            raise ValueError(f"{who}: the chat holds no message of the user, so no question")
        return str(last["content"]).strip()
    trunk.encode("")  # says so when there is no tokenizer
    return trunk.text_of(prompt).strip()


def ask(trunk: Thread, request: str, begin: str = "") -> list[int]:
    """Token ids of a new prompt: `request` in the question's place, and how its answer begins.

    A chat keeps what stands before its last user message; a text or token ids give a text.
    """
    prompt = trunk.prompt
    if isinstance(prompt, str) or not isinstance(prompt[0], dict):
        return trunk.encode_prompt(f"{request}\n\n{begin}" if begin else request)
    at = max(i for i, message in enumerate(prompt) if message["role"] == "user")
    chat = [*prompt[:at], {**prompt[at], "content": request}]
    ids = trunk.encode_prompt(chat)
    return [*ids, *trunk.encode(begin, ids)] if begin else ids


def fill(request: str, **values: Any) -> str:
    """`request` with the {names} filled in; other braces, and those in the values, stay as they are."""
    return re.sub(r"\{(\w+)\}", lambda match: str(values.get(match.group(1), match.group(0))), request)


def check_fills(strategy: Any, field: str, names: tuple[str, ...]) -> None:
    """ValueError unless a request of a strategy is a text that holds each {name} of `names`."""
    request, kind = getattr(strategy, field), type(strategy).__name__
    if not isinstance(request, str):
        raise ValueError(f"{kind}: {field}={request!r}; pass a text")
    for name in names:
        if f"{{{name}}}" not in request:
            raise ValueError(f"{kind}: {field} does not hold {{{name}}}; put it where that goes")
