"""Shared by the engine's tests: tiny random models, a byte tokenizer, a dense recomputation of any tree."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import anabranch as ab
from anabranch.engine import Result
from anabranch.records.result import Node
from anabranch.strategies import Strategy, gather

VOCAB, BOS, EOS, PAD = 260, 257, 258, 256
SIZES = dict(
    vocab_size=VOCAB,
    hidden_size=48,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=2048,
    bos_token_id=BOS,
    eos_token_id=EOS,
    pad_token_id=PAD,
    initializer_range=0.3,
    tie_word_embeddings=False,
)
FAMILIES = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}


@cache
def _weights(family: str):
    torch.manual_seed(3)
    config, kind = FAMILIES[family]
    return kind._from_config(config(**SIZES), attn_implementation="eager").eval()


def make_model(family: str = "llama"):
    """A model of its own for one test (the weights are the same each time)."""
    return copy.deepcopy(_weights(family))


def make_engine(
    family: str = "llama", tokenizer=None, num_pages: int = 256, page_size: int = 4, **options
) -> ab.Engine:
    return ab.Engine(make_model(family), tokenizer, num_pages=num_pages, page_size=page_size, **options)


@cache
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte (ids 0–255), so that characters are cut in the middle."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(["<pad>", "<bos>", "<eos>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[a]{% endif %}"
    )
    return tokenizer


class Recorder(LogitsProcessor):
    """A logits processor that changes nothing and keeps (context, scores) of every token about to be sampled."""

    def __init__(self) -> None:
        self.seen: list[tuple[tuple[int, ...], torch.Tensor]] = []

    def __call__(self, input_ids, scores):
        assert input_ids.shape[0] == 1
        self.seen.append((tuple(input_ids[0].tolist()), scores[0].cpu().clone()))
        return scores


@dataclass(frozen=True)
class Does(Strategy):
    """A strategy from a generator function of the trunk."""

    program: Callable[..., Any]

    def run(self, trunk):
        return (yield from self.program(trunk))


@dataclass(frozen=True)
class Nested(Strategy):
    """Forks in mid-answer, forks a fork, joins both levels by concat, goes on, and forks again."""

    def run(self, trunk):
        yield trunk.decode(6)
        kids = trunk.fork([[20, 21], [30], [40, 41, 42]])
        yield [kid.decode(n) for kid, n in zip(kids, (5, 9, 3), strict=True)]
        inner = kids[0].fork([[60], [61, 62]])
        yield [kid.decode(4) for kid in inner]
        kids[0].join(inner)
        kids[0].insert([63])
        yield kids[0].decode(3)
        trunk.join(kids)
        trunk.insert([50, 51])
        yield trunk.decode(5)
        again = trunk.fork(2)
        yield gather(again[0].decode(4, sampling={"do_sample": True}), again[1].decode(6, sampling={"do_sample": True}))
        trunk.join(again)
        trunk.insert([70])
        yield trunk.decode(4)


class Dense:
    """Every token of a tree once, and which others it sees: under that mask, eager attention is the oracle."""

    def __init__(self, result: Result, family: str):
        self.ids: list[int] = []
        self.positions: list[int] = []
        self.sees: list[list[int]] = []  # of each token: indices of its whole context, itself last
        self.own: dict[str, list[int]] = {}
        self._grow(result.tree, [])
        size = len(self.ids)
        mask = torch.full((size, size), torch.finfo(torch.float32).min)
        for row, seen in enumerate(self.sees):
            mask[row, seen] = 0
        with torch.no_grad():
            self.logits = _weights(family)(
                input_ids=torch.tensor([self.ids]),
                position_ids=torch.tensor([self.positions]),
                attention_mask=mask[None, None],
            ).logits[0]
        self.by_context = {tuple(self.ids[i] for i in seen): self.logits[row] for row, seen in enumerate(self.sees)}

    def _grow(self, node: Node, before: list[int]) -> None:
        context = list(before)
        forks = {k.id: k for k in node.children}
        pending = dict(forks)

        def visit() -> None:
            for name, kid in list(pending.items()):
                if kid.role == "fresh" or kid.forked_at == len(context):
                    del pending[name]
                    seen = [i for other, count in kid.sees for i in self.own[other][:count]]
                    self._grow(kid, [] if kid.role == "fresh" else context + seen)

        visit()
        for run in node.runs:
            if run.spliced:
                context += self.own[run.source]
                visit()
                continue
            for i, token in enumerate(run.token_ids):
                context.append(len(self.ids))
                self.ids.append(token)
                self.positions.append(run.position + i)
                self.sees.append(list(context))
                visit()
        self.own[node.id] = context[len(before) :]


def assert_dense(result: Result, recorder: Recorder, family: str, tolerance: float = 2e-4) -> int:
    """Every recorded row of scores equals the dense recomputation of its context; how many were compared."""
    dense = Dense(result, family)
    for context, scores in recorder.seen:
        expected = dense.by_context[context]
        torch.testing.assert_close(scores, expected, atol=tolerance, rtol=tolerance)
    return len(recorder.seen)


def assert_nothing_held(engine: ab.Engine) -> None:
    engine.cache.check()
    usage = engine.cache.usage()
    assert (usage.pages_free, usage.tokens_logical, usage.tokens_physical) == (usage.pages_total, 0, 0)
