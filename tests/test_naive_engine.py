"""The engine against a naive second one (naive_engine.py): random programs give the same tree, tokens and metrics.

pytest tests/test_naive_engine.py -m slow            # 100,000 of them
"""

from __future__ import annotations

import random
from collections import Counter
from functools import cache

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
import torch

import anabranch as ab
from anabranch.strategies import Sequential
from engine_kit import SIZES, assert_nothing_held
from naive_engine import Run
from programs_of_threads import Everything

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 \n.,:;é漢"
PIECES = [*LETTERS, *(a + b for a in "aeiou" for b in "bcdnst "), "  "][:97]


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """97 pieces, some of several characters; a text's characters are its tokens."""
    inner = Tokenizer(models.WordLevel(vocab={piece: i for i, piece in enumerate(PIECES)}, unk_token=PIECES[0]))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner)


@cache
def make(attention: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    small = dict(vocab_size=97, hidden_size=16, intermediate_size=24, num_attention_heads=2, num_key_value_heads=1)
    config = LlamaConfig(**SIZES | small | dict(bos_token_id=None, eos_token_id=None, pad_token_id=None))
    return LlamaForCausalLM._from_config(config, attn_implementation=attention).eval()


def per_token(runs, nodes) -> list[tuple]:
    """(kind, source, token, position) of each token of some runs; of a spliced run, the source's own runs tell."""
    found = []
    for run in runs:
        inner = per_token(nodes[run.source].runs, nodes) if run.spliced else []
        at = [p for *_, p in inner] or range(run.position, run.position + len(run.token_ids))
        assert run.position == at[0]
        found += [(run.kind, run.source, token, p) for token, p in zip(run.token_ids, at, strict=False)]
    return found


def assert_same(result: ab.Result, naive: Run, logprobs: dict[int, float], several: bool = False) -> None:
    """Tree, tokens, positions, fates, text, answers and metrics of the engine are the naive one's."""
    threads = {thread.id: thread for thread in naive.threads}
    nodes = {node.id: node for node in result.tree.walk()}
    for node in result.tree.walk():
        thread = threads.pop(node.id)
        own = thread._context[thread._shared :]
        mine = [(k, s, naive.ids[i], naive.positions[i]) for i, (k, s, _) in zip(own, thread._labels, strict=True)]
        gone = [(k, s, naive.ids[i], naive.positions[i]) for k, s, i in thread._forgotten]
        ours = per_token(node.runs, nodes)
        assert [(k, t, p) for k, _, t, p in ours] == [(k, t, p) for k, _, t, p in mine], node.id
        assert all(a == b or a.startswith(f"{b}.") for (_, a, *_), (_, b, *_) in zip(ours, mine, strict=True))
        assert Counter((r.kind, t) for r in node.forgotten for t in r.token_ids) == Counter((k, t) for k, _, t, _ in gone)
        start = naive.positions[own[0]] if own else thread._position
        assert (node.start, node.stop, node.forked_at) == (start, thread._position, thread._shared), node.id
        assert (node.role, node.fate, node.text) == (thread.role, thread.fate, thread.text), node.id
        assert node.ended == (thread.ended.reason if thread.ended else None), node.id
        assert node.token_ids == thread.token_ids
        assert [kid.id for kid in node.children] == [kid.id for block in thread._blocks for kid in block]
        told = [p for r in node.runs for p in r.logprobs or [None] * len(r.token_ids)]
        for i, logprob in zip(own, told, strict=True):
            assert logprob is None or abs(logprob - logprobs[i]) < 1e-3
    assert not any(thread._born and thread.fate != "killed" for thread in threads.values())
    assert_same_metrics(result.metrics, naive, several)
    assert result.token_ids == naive.trunk.token_ids and result.answers == naive.main.value
    assert sorted(result.malformed) == sorted(naive.malformed)


def assert_same_metrics(metrics: ab.Metrics, naive: Run, several: bool) -> None:
    total = naive.sampled + naive.inserted
    blocks = sorted(len(block) for thread in naive.threads for block in thread._blocks)
    assert (metrics.sampled_tokens, metrics.inserted_tokens) == (naive.sampled, naive.inserted)
    assert (metrics.total_tokens, metrics.prompt_tokens) == (total, len(naive.prompt))
    assert (metrics.num_forks, metrics.num_threads, sorted(metrics.threads_per_block)) == (len(blocks), sum(blocks), blocks)
    assert metrics.trigger_rate == (len(blocks) > 0) and metrics.format_correctness == (not naive.malformed)
    assert metrics.parallel_ratio == pytest.approx((total - naive.in_trunk) / total if total else 0)
    assert metrics.critical_path_tokens == naive.critical
