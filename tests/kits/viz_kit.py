"""What the tests of the viewer share: traces of a tiny model."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from engine_kit import byte_tokenizer, make_engine

from anabranch.engine import Result
from anabranch.strategies import Strategy


@dataclass(frozen=True)
class Wide(Strategy):
    """`count` threads that fork once more, half of them discarded; the rest joined, every third computed again."""

    count: int = 4
    tokens: int = 6

    def run(self, trunk):
        yield trunk.decode(5)
        kids = trunk.fork([f"{i}:" for i in range(self.count)])
        yield [kid.decode(self.tokens + i % 5, sampling={"do_sample": True}) for i, kid in enumerate(kids)]
        inner = [kid.fork(1)[0] for kid in kids]
        yield [kid.decode(4) for kid in inner]
        for i, (kid, child) in enumerate(zip(kids, inner, strict=True)):
            kid.join([child], "concat" if i % 3 else "reprefill")
        yield kids
        half = max(1, self.count // 2)
        trunk.join(kids[half:], "discard")
        trunk.join(kids[:half])
        trunk.insert("é<b>&")
        yield trunk.decode(4)
        trunk.truncate(trunk.length - 2)
        yield trunk.decode(3)


@cache
def wide(count: int = 4, tokens: int = 6, prompt: str = "</script><b>né</b>", logprobs: bool = True) -> Result:
    engine: Any = make_engine(tokenizer=byte_tokenizer(), num_pages=20 * count + 200, page_size=16)
    return engine.generate(
        prompt, strategy=Wide(count, tokens), seed=1, max_new_tokens=400, eos_token_id=None, logprobs=logprobs
    )
