"""What engines are compared by that ran the same random program as the naive one: a tiny model, its letters, and every
account of a result."""

from __future__ import annotations

from collections import Counter
from functools import cache

import pytest
import torch
from engine_kit import SIZES
from naive_engine import Run
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import anabranch as ab
from anabranch.engine import Discard, Fork, Join, Token

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


def assert_same(result: ab.Result, naive: Run, limited: bool = False) -> None:
    """Tree, tokens, positions, fates, text, answers, scores and metrics of the engine are the naive one's; `limited`:
    threads had to wait for one another's turn, which the naive account knows nothing of."""
    logprobs = naive.check()
    threads = {thread.id: thread for thread in naive.threads}
    nodes = {node.id: node for node in result.tree.walk()}
    for node in nodes.values():
        thread = threads.pop(node.id)
        own = thread._context[thread._shared :]
        mine = [(k, s, naive.ids[i], naive.positions[i]) for i, (k, s, _) in zip(own, thread._labels, strict=True)]
        ours = per_token(node.runs, nodes)
        assert [(k, t, p) for k, _, t, p in ours] == [(k, t, p) for k, _, t, p in mine], node.id
        # (What an adopted child had joined keeps the name of whoever wrote it.)
        assert all(a == b or a.startswith(f"{b}.") for (_, a, *_), (_, b, *_) in zip(ours, mine, strict=True))
        gone = Counter((kind, naive.ids[i]) for kind, _, i in thread._forgotten)
        assert Counter((run.kind, t) for run in node.forgotten for t in run.token_ids) == gone, node.id
        start = naive.positions[own[0]] if own else thread._position
        assert (node.start, node.stop, node.forked_at) == (start, thread._position, thread._forked), node.id
        assert (node.role, node.fate, node.text) == (thread.role, thread.fate, thread.text), node.id
        assert node.ended == (thread.ended.reason if thread.ended else None), node.id
        assert node.token_ids == thread.token_ids, node.id
        assert [kid.id for kid in node.children] == [kid.id for block in thread._blocks for kid in block], node.id
        told = [p for run in node.runs for p in run.logprobs or [None] * len(run.token_ids)]
        for i, logprob, (kind, *_) in zip(own, told, ours, strict=True):
            assert (logprob is not None) == (kind != "joined" and i in logprobs), node.id
            assert logprob is None or logprob == pytest.approx(logprobs[i], abs=1e-3), node.id
    assert all(not t._born or t.parent.fate == "killed" for t in threads.values())  # never in the tree
    assert result.token_ids == naive.trunk.token_ids and result.text == naive.trunk.text
    assert result.answers == naive.main.value and sorted(result.malformed) == sorted(naive.malformed)

    metrics, total = result.metrics, naive.sampled + naive.inserted
    blocks = sorted(len(block) for thread in naive.threads for block in thread._blocks if thread.id in nodes)
    assert (metrics.sampled_tokens, metrics.inserted_tokens) == (naive.sampled, naive.inserted)
    assert (metrics.total_tokens, metrics.prompt_tokens) == (total, len(naive.prompt))
    assert (metrics.num_forks, metrics.num_threads) == (len(blocks), sum(blocks))
    assert sorted(metrics.threads_per_block) == blocks and metrics.trigger_rate == (len(blocks) > 0)
    assert metrics.format_correctness == (not naive.malformed)
    assert metrics.parallel_ratio == pytest.approx((total - naive.in_trunk) / total if total else 0)
    assert naive.seen <= metrics.longest_context <= naive.longest_context
    assert metrics.critical_path_tokens == naive.critical or (limited and metrics.critical_path_tokens > naive.critical)


def assert_same_story(told: list, result: ab.Result, naive: Run) -> None:
    """What a stream told of one prompt is what happened."""
    for thread in naive.threads:
        tokens = [t for e in told if isinstance(e, Token) and e.thread == thread.id for t in e.token_ids]
        assert tokens == thread._written, thread.id
    ends = {thread.id: thread.fate for thread in naive.threads[1:]}
    assert {e.thread: e.reason for e in told if isinstance(e, Discard)} == {
        name: fate for name, fate in ends.items() if fate != "joined"
    }
    assert {kid for e in told if isinstance(e, Join) for kid in e.children} == {
        k for k, f in ends.items() if f == "joined"
    }
    assert {kid for e in told if isinstance(e, Fork) for kid in e.children} == {n.id for n in result.tree.walk()} - {
        "0"
    }
