"""The next token of each thread, by Transformers' own rules: GenerationConfig, LogitsProcessors, StoppingCriteria.

Many threads are sampled in one vectorised pass; only the uniform draw comes from the thread's own random stream, which
depends on the seed and the thread's path in the tree and on nothing else.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from math import nan
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import logits_process as lp

from ..strategies.ops import TokenStats

# Processors that look at the scores alone: one call serves all threads. Any other sees each thread's own tokens.
_CONTEXT_FREE = (
    lp.TemperatureLogitsWarper,
    lp.TopKLogitsWarper,
    lp.TopPLogitsWarper,
    lp.MinPLogitsWarper,
    lp.TypicalLogitsWarper,
    lp.EpsilonLogitsWarper,
    lp.EtaLogitsWarper,
    lp.SuppressTokensLogitsProcessor,
    lp.InfNanRemoveLogitsProcessor,
    lp.LogitNormalization,
)

# Processors that look at how long a context is, not at what is in it.
_LENGTH_ONLY = (
    lp.MinLengthLogitsProcessor,
    lp.MinNewTokensLengthLogitsProcessor,
    lp.SuppressTokensAtBeginLogitsProcessor,
    lp.ForcedBOSTokenLogitsProcessor,
    lp.ExponentialDecayLengthPenalty,
)

# Of the context-free ones, those that treat all tokens alike: they may be shown the likeliest few alone.
_AMONG_CANDIDATES = (
    lp.TemperatureLogitsWarper,
    lp.TopKLogitsWarper,
    lp.TopPLogitsWarper,
    lp.MinPLogitsWarper,
    lp.TypicalLogitsWarper,
    lp.EpsilonLogitsWarper,
    lp.EtaLogitsWarper,
)

# GenerationConfig fields that ask for another kind of decoding, with the value that means "off", and what to do
# instead.
_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "num_beams": ((None, 1), "beam search is not available"),
    "num_return_sequences": ((None, 1), "use strategy=ab.SelfConsistency(n=…) for several samples"),
    "guidance_scale": ((None, 1, 1.0), "classifier-free guidance is not available"),
    "penalty_alpha": ((None, 0, 0.0), "contrastive search is not available"),
    "dola_layers": ((None,), "DoLa decoding is not available"),
    "prompt_lookup_num_tokens": ((None,), "assisted decoding is not available"),
    "constraints": ((None,), "constrained beam search is not available"),
    "force_words_ids": ((None,), "constrained beam search is not available"),
    "use_mtp": ((None, False), "multi-token prediction is not available"),
    "forced_eos_token_id": ((None,), "have the strategy insert() it"),
    "return_dict_in_generate": ((None, False), "the Result holds everything"),
    "output_scores": ((None, False), "use decode(stats=True)"),
    "output_logits": ((None, False), "use decode(stats=True)"),
    "output_attentions": ((None, False), "there are no attention weights over a tree"),
    "output_hidden_states": ((None, False), "call the model itself with tree_step"),
    "token_healing": ((None, False), "token healing is not available"),
    "max_time": ((None,), "use Engine.abort() or leave the stream"),
}


def random_stream(seed: int, path: tuple[int, ...]) -> np.random.Generator:
    """A thread's own uniform stream; numpy's SeedSequence makes streams of different paths independent."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(entropy=seed, spawn_key=path)))


class Sampler:
    """One GenerationConfig, ready to use: `choose` a token for many threads, `stops` for one."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        config: GenerationConfig,
        extra: LogitsProcessorList,
        criteria: StoppingCriteriaList,
    ):
        for name, (off, remedy) in _REFUSED.items():
            if getattr(config, name, None) not in off:
                raise ValueError(
                    f"generation_config: {name}={getattr(config, name)!r} is not honoured by this engine; {remedy}"
                )
        self.model, self.config, self.extra = model, config, extra
        self.greedy = not config.do_sample
        model._prepare_special_tokens(config, device=model.device)
        eos = config._eos_token_tensor
        self.eos_ids: frozenset[int] = frozenset() if eos is None else frozenset(eos.tolist())
        self.criteria = StoppingCriteriaList(criteria)
        strings = () if config.stop_strings is None else config.stop_strings
        self.stop_strings = (strings,) if isinstance(strings, str) else tuple(strings)  # the request looks for them
        if self.stop_strings and tokenizer is None:
            raise ValueError("generation_config: stop_strings needs a tokenizer; pass Engine(model, tokenizer)")
        if not all(self.stop_strings):
            raise ValueError("generation_config: stop_strings holds an empty string; leave it out")
        self._made: dict[int, tuple[LogitsProcessorList, LogitsProcessorList, int | None]] = {}
        lead, rest, _ = self._lists(1)
        kinds = {type(p) for p in (*lead, *rest)}
        # What the processors look at besides the scores: nothing, how long a context is, or its tokens.
        self.context_free = kinds <= set(_CONTEXT_FREE)
        self._length_only = kinds <= {*_CONTEXT_FREE, *_LENGTH_ONLY}

    def _processors(self, prompt_length: int) -> LogitsProcessorList:
        # The list `generate` would build, in its order; every option of GenerationConfig means the same here.
        return self.model._get_logits_processor(
            generation_config=self.config,
            input_ids_seq_length=prompt_length,
            logits_processor=self.extra,
            device=self.model.device,
            model_kwargs={},
        )

    def _lists(self, prompt_length: int) -> tuple[LogitsProcessorList, LogitsProcessorList, int | None]:
        """``(first, rest, k)``: where k is given, all that `rest` looks at is the k highest scores (ties aside)."""
        if prompt_length not in self._made:
            processors = self._processors(prompt_length)
            at = next((i for i, p in enumerate(processors) if type(p) is lp.TopKLogitsWarper), None)
            k, begin = None, len(processors)
            if at is not None and all(type(p) in _AMONG_CANDIDATES for p in processors[at:]):
                k, begin = processors[at].top_k, at
                while begin and type(processors[begin - 1]) is lp.TemperatureLogitsWarper:
                    begin -= 1
            self._made[prompt_length] = (
                LogitsProcessorList(processors[:begin]),
                LogitsProcessorList(processors[begin:]),
                k,
            )
        return self._made[prompt_length]

    def choose(
        self,
        logits: torch.Tensor,
        contexts: Sequence[Callable[[], list[int]]],
        lengths: Sequence[int],
        prompt_lengths: Sequence[int],
        streams: Sequence[np.random.Generator],
    ) -> list[int]:
        """One token a row of `logits` [rows, vocabulary] (float32, left unchanged).

        contexts[i]() gives thread i's whole token sequence (asked for only by processors that look at it), lengths[i]
        long; prompt_lengths[i] is what ``min_new_tokens`` and its like count from; streams[i] draws one uniform when
        sampling.
        """
        if self.context_free:
            return self._choose(logits, None, 1, streams)
        # Contexts of one length go through the processors together; a caller's own processors get one at a time.
        groups: dict[Any, list[int]] = {}
        for i, key in enumerate(zip(lengths, prompt_lengths, strict=True)):
            groups.setdefault((key, i) if self.extra else key, []).append(i)
        chosen = [0] * len(lengths)
        for rows in groups.values():
            if self._length_only:
                ids = torch.zeros(1, 1, dtype=torch.long, device=logits.device).expand(len(rows), lengths[rows[0]])
            else:
                ids = torch.tensor([contexts[i]() for i in rows], dtype=torch.long, device=logits.device)
            part = logits if len(rows) == len(lengths) else logits[rows]
            for i, token in zip(
                rows, self._choose(part, ids, prompt_lengths[rows[0]], [streams[i] for i in rows]), strict=True
            ):
                chosen[i] = token
        return chosen

    def _choose(self, logits: torch.Tensor, ids: Any, prompt_length: int, streams: Sequence[Any]) -> list[int]:
        first, rest, k = self._lists(prompt_length)
        scores = first(ids, logits.clone()) if first else logits
        if self.greedy:
            return scores.argmax(-1).tolist()
        if k is not None:
            found = self._among_top(scores, rest, k, streams)
            if found is not None:
                return found
            scores = rest(ids, scores.clone())
        return _draw(scores, streams).tolist()

    @staticmethod
    def _among_top(
        scores: torch.Tensor, rest: LogitsProcessorList, k: int, streams: Sequence[np.random.Generator]
    ) -> list[int] | None:
        """The same draw from the same distribution, over the few highest scores instead of the whole vocabulary.

        A top-k warper leaves nothing below the k-th score, and what runs after it is not touched by what is gone.
        Scores tied with the k-th stay in (Transformers' rule), so a few more than k are looked at; None when not all of
        the ties can be seen that way.
        """
        size = scores.shape[-1]
        k = min(k, size)
        seen = min(k + 32, size)
        values, ids = scores.topk(seen, dim=-1)
        if seen < size and bool((values[:, -1] >= values[:, k - 1]).any()):
            return None
        ids, order = ids.sort(dim=-1)  # by token, as over the whole vocabulary
        few = rest(None, values.gather(-1, order))  # type: ignore[arg-type]
        return ids.gather(-1, _draw(few, streams)[:, None])[:, 0].tolist()

    def stops(self, context: Callable[[], list[int]]) -> bool:
        """Whether criteria given to generate() end a thread here."""
        if not self.criteria:
            return False
        ids = torch.tensor([context()], dtype=torch.long, device=self.model.device)
        return bool(self.criteria(ids, None).any())  # type: ignore[arg-type]


def _draw(scores: torch.Tensor, streams: Sequence[np.random.Generator]) -> torch.Tensor:
    """Index drawn from softmax(scores[i]) by streams[i]'s next uniform; int64 [rows].

    Inverse transform sampling, in float64, so that the draw is exact over a large vocabulary. What has probability zero
    leaves the cumulated sum where it was and is never the first to pass the draw.
    """
    cdf = torch.softmax(scores, -1).cumsum(-1, dtype=torch.float64)
    draws = torch.tensor([s.random() for s in streams], dtype=torch.float64, device=scores.device)
    found = torch.searchsorted(cdf, draws[:, None] * cdf[:, -1:], right=True)
    return found.clamp_(max=scores.shape[-1] - 1)[:, 0]


class Samplers:
    """The samplers of one call: one for the call's config, one for each set of fields that a strategy overrides."""

    def __init__(self, model: Any, tokenizer: Any, config: GenerationConfig, extra: Any = None, criteria: Any = None):
        self._args = (model, tokenizer)
        self._config = config
        self._extra, self._criteria = LogitsProcessorList(extra or []), StoppingCriteriaList(criteria or [])
        self._made: dict[tuple[tuple[str, Any], ...], Sampler] = {}
        self.settings: dict[str, Any] = {k: v for k, v in config.to_diff_dict().items() if k != "transformers_version"}
        self.base = self.get(())

    def get(self, overrides: tuple[tuple[str, Any], ...]) -> Sampler:
        key = overrides if _hashable(overrides) else tuple((k, repr(v)) for k, v in overrides)
        if key not in self._made:
            config = copy.deepcopy(self._config)
            for name, value in overrides:
                if name in ("max_new_tokens", "max_length") or not hasattr(config, name):
                    raise ValueError(
                        f"sampling: {name!r} is not a sampling field of GenerationConfig; "
                        "pass e.g. do_sample, temperature, top_p"
                    )
                setattr(config, name, value)
            if overrides:
                config.validate()
            self._made[key] = Sampler(*self._args, config, self._extra, self._criteria)
        return self._made[key]


def _hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


def prepare_config(
    model: Any, config: GenerationConfig | None, max_new_tokens: int | None, kwargs: dict[str, Any]
) -> GenerationConfig:
    """The config `model.generate` would arrive at, with ``max_new_tokens`` always settled (256 when nobody says)."""
    if max_new_tokens is not None and (not isinstance(max_new_tokens, int) or max_new_tokens < 1):
        raise ValueError(f"max_new_tokens={max_new_tokens!r}; pass a whole number of at least 1")
    if config is not None and not isinstance(config, GenerationConfig):
        raise TypeError(f"generation_config: got {type(config).__name__}; pass a transformers.GenerationConfig")
    if "max_length" in kwargs or (config is not None and config.max_length and not config.max_new_tokens):
        raise ValueError("max_length: counts the prompt, which threads share; pass max_new_tokens instead")
    if config is not None and kwargs:
        config = copy.deepcopy(config)
        unknown = config.update(**kwargs)
        kwargs = {}
    else:
        unknown = {}
    prepared, left = model._prepare_generation_config(config, **kwargs)
    unknown = unknown | {k: v for k, v in left.items() if not hasattr(prepared, k)}
    if unknown:
        raise ValueError(f"generate: unknown argument {sorted(unknown)[0]!r}; it takes the fields of GenerationConfig")
    if max_new_tokens is not None:
        prepared.max_new_tokens = max_new_tokens
    elif prepared.max_new_tokens is None:
        prepared.max_new_tokens = 256
    if prepared.max_new_tokens < 1:
        raise ValueError(
            f"generation_config: max_new_tokens={prepared.max_new_tokens}; pass a whole number of at least 1"
        )
    return prepared


def token_logprobs(logits: torch.Tensor, tokens: Sequence[int]) -> list[float]:
    """Log-probability of one token a row of raw `logits` [rows, vocabulary], float32."""
    chosen = logits.gather(-1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0]
    return (chosen - logits.logsumexp(-1)).tolist()


def token_stats(logits: torch.Tensor, tokens: Sequence[int], asked: Sequence[int]) -> list[TokenStats]:
    """`TokenStats` of each row of raw `logits` [rows, vocabulary], float32.

    asked[i]: k of row i's top-k mean; 0: its log-probability alone, which costs a quarter.
    """
    total = logits.logsumexp(-1)
    chosen = logits.gather(-1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0] - total
    stats = [TokenStats(logprob, nan, nan) for logprob in chosen.tolist()]  # one wait for the device, not one a row
    full = [i for i, k in enumerate(asked) if k]
    if full:
        rows = logits[full] if len(full) < len(tokens) else logits
        logp = rows - total[full, None]
        # −Σ p · log p; a score of −inf adds 0 to it, not NaN.
        entropy = (-torch.where(logp.isneginf(), 0.0, logp.exp() * logp).sum(-1)).tolist()
        best = logp.topk(min(max(asked), logp.shape[-1]), dim=-1).values.cpu()
        for at, i in enumerate(full):
            stats[i] = TokenStats(stats[i].logprob, entropy[at], float(best[at, : asked[i]].mean()))
    return stats
