"""What the tests of the field's systems share: tokenizers with tags, scripts, babble, exactness of every row."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from functools import cache

import torch
from engine_kit import EOS, Dense, Recorder, assert_nothing_held, make_engine
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LogitsProcessor, PreTrainedTokenizerFast

import anabranch as ab
from anabranch import training


@cache
def tokenizer_with(*pieces: str) -> PreTrainedTokenizerFast:
    """One token a byte, and one for each of `pieces`, within the tiny models' vocabulary (rare bytes make room)."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[: 256 - len(pieces)]
    inner = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(
        [*(AddedToken(p, normalized=False, special=True) for p in pieces), "<pad>", "<bos>", "<eos>"]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")
    assert tokenizer.eos_token_id == EOS
    return tokenizer


def ids(text: str, *pieces: str) -> tuple[int, ...]:
    return tuple(tokenizer_with(*pieces)(text, add_special_tokens=False)["input_ids"])


class Script(LogitsProcessor):
    """Makes the model say what is written: `lines` are (all that stands before, what it then says).

    Two lines with the same beginning leave the choice between their tokens to the sampler.
    """

    def __init__(self, *lines: tuple[str, str], pieces: tuple[str, ...] = ()):
        self.next: dict[tuple[int, ...], set[int]] = {}
        for before, says in lines:
            context = ids(before, *pieces)
            for token in ids(says, *pieces):
                self.next.setdefault(context, set()).add(token)
                context += (token,)

    def __call__(self, input_ids, scores):
        allowed = self.next[tuple(input_ids[0].tolist())]  # a KeyError: a context that the format does not lead to
        return _only(scores, sorted(allowed))


class Babble(LogitsProcessor):
    """A model that half knows a format: behind each piece it mostly says what `usual` lists, else any, seldom EOS.

    Its context leaves it a few tokens, its sampler chooses: so the seed matters, and so do the model's scores.
    """

    def __init__(self, pieces: Sequence[str], usual: Mapping[str, Sequence[str]], wild: float = 0.1, eos: float = 0.02):
        self.tokenizer = tokenizer_with(*pieces)
        one = {
            p: self.tokenizer.convert_tokens_to_ids(p) if p in pieces else ids(p, *pieces)[0]
            for p in self._all(pieces, usual)
        }
        self.usual = {one[p]: [one[n] for n in following] for p, following in usual.items()}
        self.any, self.wild, self.eos = sorted(one.values()), wild, eos

    @staticmethod
    def _all(pieces, usual):
        return dict.fromkeys([*pieces, *usual, *(n for following in usual.values() for n in following)])

    def __call__(self, input_ids, scores):
        out = []
        for row, context in enumerate(input_ids.tolist()):
            rng = random.Random(f"{context[-5:]} {len(context)}")
            known = self.usual.get(context[-1], [])
            pool = known if known and rng.random() > self.wild else self.any
            allowed = [EOS] if rng.random() < self.eos else sorted({rng.choice(pool) for _ in range(2)})
            out.append(_only(scores[row : row + 1], allowed))
        return torch.cat(out)


def _only(scores, allowed):
    index = torch.tensor(list(allowed), device=scores.device)
    return torch.full_like(scores, -torch.inf).index_copy(-1, index, scores[:, index])


def engine_with(*pieces: str, **options) -> ab.Engine:
    return make_engine(tokenizer=tokenizer_with(*pieces), **({"num_pages": 900} | options))


def play(strategy, prompt, *lines, pieces=(), engine=None, **options):
    """Generate from a script; (result, rows compared with a dense recomputation). Nothing is held afterwards."""
    recorder = Recorder()
    engine = engine or engine_with(*pieces)
    result = engine.generate(
        prompt,
        strategy=strategy,
        logits_processor=[recorder, Script(*lines, pieces=tuple(pieces))],
        **({"max_new_tokens": 1500, "seed": 0} | options),
    )
    assert_nothing_held(engine)
    return result, assert_rows(result, recorder)


def assert_rows(result, recorder, family: str = "llama") -> int:
    """Rows of scores, of all contexts that stand in the final tree, against dense ones; how many there were."""
    dense, compared = Dense(result, family), 0
    for context, scores in recorder.seen:
        if context in dense.by_context:  # not what a rewriting join has deleted; `assert_training_parity` sees it
            torch.testing.assert_close(scores, dense.by_context[context], atol=2e-4, rtol=2e-4)
            compared += 1
    return compared


def assert_training_parity(strategy, prompt, *lines, pieces=(), **options):
    """Log-probabilities recorded while generating equal those of one training forward over the trace."""
    engine = engine_with(*pieces)
    result = engine.generate(
        prompt,
        strategy=strategy,
        logits_processor=[Script(*lines, pieces=tuple(pieces))],
        logprobs=True,
        **({"max_new_tokens": 1500, "seed": 0} | options),
    )
    layout = training.from_trace(result.trace())
    assert len(layout.learnt) == result.metrics.sampled_tokens
    recorded = layout.recorded[layout.learnt]
    assert not recorded.isnan().any()
    with torch.no_grad():
        torch.testing.assert_close(recorded, layout.logprobs(engine.model), atol=2e-4, rtol=0)
    return result


def assert_same_everywhere(strategy, prompts, processor, *pieces, pages: int, engine: dict | None = None, **options):
    """The same seed gives the same tree alone, in a batch, and after pre-emptions; `engine`: its options."""
    given = engine or {}
    call = {"do_sample": True, "max_new_tokens": 60} | options
    engine = engine_with(*pieces, **given)
    seeds = list(range(len(prompts)))
    alone = [
        engine.generate(p, strategy=strategy, seed=s, logits_processor=[processor], **call)
        for p, s in zip(prompts, seeds, strict=True)
    ]
    together = engine.generate(prompts, strategy=strategy, seed=seeds, logits_processor=[processor], **call)
    cramped = engine_with(*pieces, num_pages=pages, **given)
    squeezed = cramped.generate(prompts, strategy=strategy, seed=seeds, logits_processor=[processor], **call)
    assert sum(r.metrics.preemptions for r in squeezed) > 0
    for one, other, third in zip(alone, together, squeezed, strict=True):
        assert one.tree == other.tree == third.tree and one.malformed == other.malformed == third.malformed
    assert_nothing_held(engine)
    assert_nothing_held(cramped)
    return alone


def survive(strategy, prompt, processor, *pieces, count: int, seed: int = 0, batch: int = 50, **options):
    """So many generations of a model that babbles: none crashes or hangs, no page is lost; the results."""
    engine = engine_with(*pieces, num_pages=4000)
    call = {"do_sample": True, "max_new_tokens": 50} | options
    results = []
    for begin in range(0, count, batch):
        n = min(batch, count - begin)
        seeds = list(range(seed + begin, seed + begin + n))
        prompts = [prompt(s) if callable(prompt) else prompt for s in seeds]
        results += engine.generate(prompts, strategy=strategy, seed=seeds, logits_processor=[processor], **call)
        assert_nothing_held(engine)
    return results
