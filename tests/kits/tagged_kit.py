"""What the tests of all tag-driven formats share: a tokenizer with the tags, scripts for the model, exact traces."""

from __future__ import annotations

from functools import cache

import torch
from engine_kit import EOS, Recorder, assert_dense, assert_nothing_held, make_engine
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LogitsProcessor, PreTrainedTokenizerFast

import anabranch as ab
from anabranch.training import from_trace


@cache
def tag_tokenizer(tags: tuple[str, ...], size: int | None = EOS + 1) -> PreTrainedTokenizerFast:
    """One token a byte, and one a tag, then pad, bos, eos; `size` in all (control bytes are left out), None: as many as
    it takes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    alphabet = alphabet[: None if size is None else size - 3 - len(tags)]
    inner = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([*tags, "<pad>", "<bos>", "<eos>"])
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")


class Script(LogitsProcessor):
    """Makes the model say what is written: `lines` are (all that stands before, what it then says).

    A context that no line leads to is a KeyError: the format does not lead there. Siblings whose headers are alike have
    one context, and so say the same.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, *lines: tuple[str, str]):
        self.next: dict[tuple[int, ...], int] = {}
        for before, says in lines:
            context = tuple(tokenizer(before, add_special_tokens=False)["input_ids"])
            for token in tokenizer(says, add_special_tokens=False)["input_ids"]:
                assert self.next.setdefault(context, token) == token, "the script contradicts itself"
                context += (token,)

    def __call__(self, input_ids, scores):
        token = self.next[tuple(input_ids[0].tolist())]
        return torch.full_like(scores, -torch.inf).index_fill(-1, torch.tensor(token), 0.0)


class Stage:
    """A format's tokenizer and engines, and plays on them."""

    def __init__(self, tags: tuple[str, ...]):
        self.tokenizer = tag_tokenizer(tuple(tags))

    def ids(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def text(self, ids) -> str:
        return self.tokenizer.decode(list(ids))

    def engine(self, **options) -> ab.Engine:
        return make_engine(tokenizer=self.tokenizer, **({"num_pages": 900} | options))

    def play(self, prompt: str, *lines: tuple[str, str], strategy, engine=None, exact: bool = True, **options):
        """Generate from a script; with `exact` the scores of every row are compared with a dense recomputation, and the
        recorded log-probabilities with one training forward over the trace."""
        engine, recorder = engine or self.engine(), Recorder()
        processors = [recorder, Script(self.tokenizer, *lines)]
        options = {"max_new_tokens": 3000, "logprobs": True} | options
        result = engine.generate(prompt, strategy=strategy, logits_processor=processors, **options)
        assert_nothing_held(engine)
        if exact:
            assert assert_dense(result, recorder, "llama") == result.metrics.sampled_tokens
            assert_trained_as_seen(result, engine.model)
        return result

    def placed(self, result) -> list[tuple[str, int]]:
        """What the trunk holds, prompt included: runs of text that stand on consecutive positions, with the first."""
        nodes = {node.id: node for node in result.tree.walk()}

        def positions(node):
            for run in node.runs:
                if run.spliced:
                    inner = list(positions(nodes[run.source]))
                    yield from inner[: len(run.token_ids)]
                else:
                    yield from ((t, run.position + i) for i, t in enumerate(run.token_ids))

        found: list[tuple[list[int], int]] = []
        for token, position in positions(result.tree):
            if not found or position != found[-1][1] + len(found[-1][0]):
                found.append(([], position))
            found[-1][0].append(token)
        return [(self.text(tokens), first) for tokens, first in found]


def assert_trained_as_seen(result, model) -> None:
    """One training forward over the trace's layout gives every sampled token the log-probability that was recorded."""
    layout = from_trace(result)
    assert len(layout.learnt) == result.metrics.sampled_tokens
    with torch.no_grad():
        torch.testing.assert_close(layout.logprobs(model), layout.recorded[layout.learnt], atol=2e-4, rtol=2e-4)
