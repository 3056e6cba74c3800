"""Problems answered and judged, one at a time or several in the same steps."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from anabranch.errors import RemoteError
from anabranch.evaluation.comparison.items import Item
from anabranch.evaluation.comparison.store import Key, Row
from anabranch.strategies import Plain, Strategy
from anabranch.text.prompts import as_message, takes_chats

__all__ = ["Window", "prompt_hash"]


@dataclass
class _Begun:
    key: Key
    item: Item
    handle: Any


class Window:
    """Up to `size` answers under way; ``with Window(…)`` ends what is left of them, whatever happens.

    engine: an `Engine`, or, for size 1, anything with its `generate`.
    """

    def __init__(self, engine: Any, size: int, max_new_tokens: int):
        if size > 1 and not hasattr(engine, "add"):
            raise ValueError(f"batch={size}: {type(engine).__name__} answers one problem at a time; pass batch=1")
        self.engine, self.size, self.max_new_tokens = engine, size, max_new_tokens
        self._chats = takes_chats(engine.tokenizer)
        self._rows: list[Row] = []
        self._under_way: list[_Begun] = []

    def __enter__(self) -> Window:
        return self

    def __exit__(self, *_: object) -> None:
        for begun in self._under_way:
            begun.handle.abort()

    def begin(self, key: Key, item: Item, strategy: Strategy) -> None:
        """Ask one more problem."""
        asked = as_message(item.prompt, self._chats)
        seed = int.from_bytes(hashlib.sha256(f"{key.seed}/{key.problem}".encode()).digest()[:4], "big")
        options = {
            "strategy": None if isinstance(strategy, Plain) else strategy, "seed": seed,
            "max_new_tokens": self.max_new_tokens, "do_sample": False,
        }  # fmt: skip
        try:
            if self.size > 1:
                self._under_way.append(_Begun(key, item, self.engine.add(asked, **options)))
            else:
                self._rows.append(_judged(key, item, self.engine.generate(asked, **options)))
        except Exception as error:
            if isinstance(error, RemoteError):  # raises again where the server is gone: no problem's fault
                self.engine.generate(asked, max_new_tokens=1)
            self._rows.append(_failed(key, item, error))

    def finished(self, all_of_them: bool = False) -> Iterator[Row]:
        """Results, as soon as there is no room for one more (or until nothing is under way)."""
        yield from self._rows
        self._rows.clear()
        while len(self._under_way) >= (1 if all_of_them else self.size):
            while not any(begun.handle.done for begun in self._under_way):
                self.engine.step()
            for begun in [begun for begun in self._under_way if begun.handle.done]:
                self._under_way.remove(begun)
                try:
                    row = _judged(begun.key, begun.item, begun.handle.result())
                except Exception as error:
                    row = _failed(begun.key, begun.item, error)
                yield row


def _judged(key: Key, item: Item, result: Any) -> Row:
    facts: dict[str, Any] = {
        "prompt_sha256": prompt_hash(item.prompt), "expected": item.answer, "text": result.text or "",
        "malformed": bool(result.malformed), "metrics": result.metrics.as_dict(),
    }  # fmt: skip
    try:
        return Row(key, **facts, score=float(item.score(result.text or "")))
    except Exception as error:
        return Row(key, **facts, error=f"verifier: {type(error).__name__}: {error}")


def _failed(key: Key, item: Item, error: Exception) -> Row:
    why = f"generation: {type(error).__name__}: {error}"
    return Row(key, prompt_hash(item.prompt), item.answer, error=why)


def prompt_hash(prompt: Any) -> str:
    """What tells problems of one number and another text apart."""
    return hashlib.sha256(json.dumps(prompt, ensure_ascii=False, sort_keys=True).encode("utf-8", "replace")).hexdigest()
