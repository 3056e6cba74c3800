"""The next token of each thread, by Transformers' own rules: GenerationConfig, LogitsProcessors, StoppingCriteria.

Many threads are sampled in one vectorised pass; only the uniform draw comes from the thread's own random stream, which
depends on the seed and the thread's path in the tree and on nothing else.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import inf, nan
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import logits_process as lp
from transformers.generation.stopping_criteria import ConfidenceCriteria

from anabranch.engine.options import refuse, refuse_unsampled
from anabranch.runner import scores as vocabulary
from anabranch.strategies.api.ops import TokenStats

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


def random_stream(seed: int, path: tuple[int, ...]) -> np.random.Generator:
    """A thread's own uniform stream; numpy's SeedSequence makes streams of different paths independent."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(entropy=seed, spawn_key=path)))


_Lists = tuple[LogitsProcessorList, LogitsProcessorList, int | None]


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
        self._made: dict[int, _Lists] = {}
        lead, rest, k = self._lists(1)
        kinds = {type(p) for p in (*lead, *rest)}
        # What the processors look at besides the scores: nothing, how long a context is, or its tokens.
        self.context_free = kinds <= set(_CONTEXT_FREE)
        self._length_only = kinds <= {*_CONTEXT_FREE, *_LENGTH_ONLY}
        # Nothing but small operators is left to torch, apart from processors that come first.
        self.by_kernels = self.greedy or k is not None or _mass(rest) is not None

    def _processors(self, prompt_length: int) -> LogitsProcessorList:
        # The list `generate` would build, in its order; every option of GenerationConfig means the same here.
        processors: LogitsProcessorList = self.model._get_logits_processor(
            generation_config=self.config,
            input_ids_seq_length=prompt_length,
            logits_processor=self.extra,
            device=self.model.device,
            model_kwargs={},
        )
        return processors

    def _lists(self, prompt_length: int) -> _Lists:
        if prompt_length not in self._made:
            self._made[prompt_length] = _parted(self._processors(prompt_length))
        return self._made[prompt_length]

    def choose(
        self,
        logits: torch.Tensor,
        contexts: Sequence[Callable[[], list[int]]],
        lengths: Sequence[int],
        prompt_lengths: Sequence[int],
        streams: Sequence[np.random.Generator],
        where: Callable[[int], str] = "row {}".format,
    ) -> list[int]:
        """One token a row of `logits` [rows, vocabulary] (float32, float16 or bfloat16; left unchanged).

        contexts[i]() gives thread i's whole token sequence (asked for only by processors that look at it), lengths[i]
        long; prompt_lengths[i] is what ``min_new_tokens`` and its like count from; streams[i] draws one uniform when
        sampling; where(i) names thread i in errors.

        Raises ValueError when no token can be chosen: every score is −inf, or one is NaN or +inf.
        """
        if self.context_free:
            return self._choose(logits, None, 1, streams, where)
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
            found = self._choose(
                part,
                ids,
                prompt_lengths[rows[0]],
                [streams[i] for i in rows],
                lambda at, rows=rows: where(rows[at]),  # type: ignore[misc]
            )
            for i, token in zip(rows, found, strict=True):
                chosen[i] = token
        return chosen

    def _choose(
        self, logits: torch.Tensor, ids: Any, prompt_length: int, streams: Sequence[Any], where: Callable[[int], str]
    ) -> list[int]:
        first, rest, k = self._lists(prompt_length)
        banned = _banned(first, None if ids is None else ids.shape[-1], logits.shape[-1])
        if banned is None:
            scores = first(ids, logits.to(torch.float32, copy=True))
            if scores.shape != logits.shape:
                raise _wrong_shape(first, scores.shape, logits.shape)
            best, found = self._pick(scores, ids, rest, k, streams)
        else:
            with _without(logits, banned) as scores:
                best, found = self._pick(scores, ids, rest, k, streams)
        # One wait for the device, not two: a row without a choice shows in the tokens.
        tokens = torch.where(best.isfinite(), found, -1).tolist()
        if -1 in tokens:
            after = first if k is not None else (*first, *rest)
            raise _no_choice(float(best[tokens.index(-1)]), after, where(tokens.index(-1)))
        return tokens

    def processed(
        self, scores: torch.Tensor, context: Callable[[], list[int]], prompt_length: int, where: str
    ) -> torch.Tensor:
        """`scores` [1, vocabulary] of the token behind ``context()`` as all logits processors leave them.

        Raises ValueError for a NaN or +inf; that every score is −inf is no error.
        """
        first, rest, _ = self._lists(prompt_length)
        ids = torch.tensor([context()] if first or rest else [[]], dtype=torch.long, device=scores.device)
        before = scores.shape
        scores = rest(ids, first(ids, scores))  # type: ignore[arg-type]
        if scores.shape != before:
            raise _wrong_shape([*first, *rest], scores.shape, before)
        best = float(scores.amax(-1))
        if best != best or best == torch.inf:
            raise _no_choice(best, [*first, *rest], where)
        return scores

    def _pick(
        self, scores: torch.Tensor, ids: Any, rest: LogitsProcessorList, k: int | None, streams: Sequence[Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Each row's best score and chosen token."""
        if self.greedy:
            return vocabulary.best(scores)
        uniform = torch.tensor([s.random() for s in streams], dtype=torch.float64, device=scores.device)
        how = _mass(rest)
        if how is None or not vocabulary.takes(scores):
            return self._by_torch(scores, ids, rest, k, uniform)
        best, tokens = vocabulary.draw(scores, *how, uniform)
        for row in (tokens < 0).nonzero()[:, 0].tolist():
            one = slice(row, row + 1)
            best[row], tokens[row] = (x[0] for x in self._by_torch(scores[one], None, rest, k, uniform[one]))
        return best, tokens

    def _by_torch(
        self, scores: torch.Tensor, ids: Any, rest: LogitsProcessorList, k: int | None, uniform: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The same for any processors, by torch's operators."""
        scores = scores.float()
        if k is not None:
            return scores.amax(-1), self._among_top(scores, rest, k, uniform)
        cut = rest(ids, scores.clone()) if rest else scores
        return cut.amax(-1), _draw(cut, uniform)

    @staticmethod
    def _among_top(scores: torch.Tensor, rest: LogitsProcessorList, k: int, uniform: torch.Tensor) -> torch.Tensor:
        """The same draw from the same distribution, over the few highest scores instead of the whole vocabulary.

        A top-k warper leaves nothing below the k-th score, and what runs after it is not touched by what is gone.
        Scores tied with the k-th stay in (Transformers' rule), so a few more than k are looked at; a row whose ties
        cannot all be seen that way is drawn over the whole vocabulary, whatever the other rows need.
        """
        size = scores.shape[-1]
        k = min(k, size)
        seen = min(k + 32, size)
        values, ids = scores.topk(seen, dim=-1)
        ids, order = ids.sort(dim=-1)  # by token, as over the whole vocabulary
        found = _draw(rest(None, values.gather(-1, order)), uniform)  # type: ignore[arg-type]
        tokens = ids.gather(-1, found[:, None])[:, 0]
        if seen < size:
            for row in (values[:, -1] >= values[:, k - 1]).nonzero()[:, 0].tolist():
                one = slice(row, row + 1)
                tokens[row] = _draw(rest(None, scores[one].clone()), uniform[one])[0]  # type: ignore[arg-type]
        return tokens

    def stops(self, context: Callable[[], list[int]]) -> bool:
        """Whether criteria given to generate() end a thread here."""
        if not self.criteria:
            return False
        ids = torch.tensor([context()], dtype=torch.long, device=self.model.device)
        return bool(self.criteria(ids, None).any())


def _parted(processors: LogitsProcessorList) -> _Lists:
    """``(first, rest, k)``: where k is given, all that `rest` looks at is the k highest scores (ties aside); elsewhere
    `_mass` knows what it does, or it is empty."""
    k, begin = None, len(processors)
    at = next((i for i, p in enumerate(processors) if type(p) is lp.TopKLogitsWarper), None)
    if at is None:
        while begin and _mass(processors[begin - 1 :]) is not None:
            begin -= 1
    elif all(type(p) in _AMONG_CANDIDATES for p in processors[at:]):
        k, begin = processors[at].top_k, at
        while begin and type(processors[begin - 1]) is lp.TemperatureLogitsWarper:
            begin -= 1
    return LogitsProcessorList(processors[:begin]), LogitsProcessorList(processors[begin:]), k


def _mass(processors: Sequence[Any]) -> tuple[float, int, float] | None:
    """``(temperature, top_k, top_p)`` of processors that do nothing but divide by the first, keep so many highest
    scores (0: all) and then the likeliest tokens that hold the last (1.0: all); None for any others."""
    temperature, top_k, top_p, left = 1.0, 0, 1.0, list(processors)
    if left and type(left[0]) is lp.TemperatureLogitsWarper:
        temperature = float(left.pop(0).temperature)
    if left and type(left[0]) is lp.TopKLogitsWarper:
        highest = left.pop(0)
        if highest.filter_value != -inf:
            return None
        top_k = highest.top_k
    if left and type(left[0]) is lp.TopPLogitsWarper:
        nucleus = left.pop(0)
        if nucleus.filter_value != -inf or nucleus.min_tokens_to_keep != 1:
            return None
        top_p = float(nucleus.top_p)
    return None if left else (temperature, top_k, top_p)


def _banned(processors: Sequence[Any], length: int | None, size: int) -> list[int] | None:
    """The tokens that processors take out of contexts of `length` tokens; None where one does more than that.

    size: of the vocabulary. They are few as a rule, while each of these processors copies all scores several times.
    """
    banned: set[int] = set()
    for p in processors:
        if type(p) is lp.SuppressTokensLogitsProcessor:
            banned.update(p.suppress_tokens.tolist())
        elif length is None:
            return None
        elif type(p) is lp.MinLengthLogitsProcessor:
            banned.update(p.eos_token_id.tolist() if length < p.min_length else ())
        elif type(p) is lp.MinNewTokensLengthLogitsProcessor:
            short = length - p.prompt_length_to_skip < p.min_new_tokens
            banned.update(p.eos_token_id.tolist() if short else ())
        elif type(p) is lp.SuppressTokensAtBeginLogitsProcessor:
            banned.update(p.begin_suppress_tokens.tolist() if length == p.begin_index else ())
        else:
            return None
    return sorted(token for token in banned if 0 <= token < size)


@contextmanager
def _without(logits: torch.Tensor, banned: list[int]) -> Iterator[torch.Tensor]:
    """The scores with −inf for some tokens: `logits` themselves, as they were before when the block is left."""
    if not banned:
        yield logits
        return
    if logits.is_inference() and not torch.is_inference_mode_enabled():
        logits = logits.clone()
    columns = torch.tensor(banned, device=logits.device)
    before = logits.index_select(1, columns)
    logits.index_fill_(1, columns, -inf)
    try:
        yield logits
    finally:
        logits.index_copy_(1, columns, before)


def _draw(scores: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Index drawn from softmax(scores[i]) by uniform[i] (float64 [rows]); int64 [rows].

    Inverse transform sampling, in float64, so that the draw is exact over a large vocabulary. What has probability zero
    leaves the cumulated sum where it was and is never the first to pass the draw.
    """
    cdf = torch.softmax(scores.float(), -1).cumsum(-1, dtype=torch.float64)
    found = torch.searchsorted(cdf, uniform[:, None] * cdf[:, -1:], right=True)
    return found.clamp_(max=scores.shape[-1] - 1)[:, 0]


def gumbel(scores: torch.Tensor, stream: np.random.Generator) -> torch.Tensor:
    """Gumbel noise [vocabulary]: the k highest of log-probabilities plus noise are a sample without replacement."""
    uniform = torch.from_numpy(stream.random(scores.shape[-1])).to(scores.device)
    return -(-uniform.clamp_min(1e-300).log()).log().to(scores.dtype)


def _wrong_shape(processors: Sequence[Any], after: Sequence[int], before: Sequence[int]) -> ValueError:
    return ValueError(
        f"logits_processor: {_names(processors)} made scores of shape {list(after)} from {list(before)}; a processor "
        "returns one score for each token of the vocabulary"
    )


def _no_choice(best: float, processors: Sequence[Any], where: str) -> ValueError:
    """The error for a row whose highest score is no number."""
    after = f" after {_names(processors)}" if processors else ""
    what = "every score is −inf" if best < 0 else f"a score is {best}"
    return ValueError(
        f"no token can be chosen for {where}: {what}{after}; a logits processor must leave at least one token with a "
        "finite score (a grammar that is through leaves EOS); remove_invalid_values=True replaces NaN and +inf"
    )


def _names(processors: Sequence[Any]) -> str:
    return ", ".join(type(p).__name__ if not hasattr(p, "__name__") else p.__name__ for p in processors)


def _listed(name: str, value: Any) -> list[Any]:
    """A caller's processors or criteria, checked."""
    if value is None:
        return []
    if not isinstance(value, (list, tuple)) or not all(callable(x) for x in value):
        raise ValueError(f"{name}={value!r}; pass a list of them, as to model.generate")
    return list(value)


class Samplers:
    """The samplers of one call: one for the call's config, one for each set of fields that a strategy overrides."""

    def __init__(self, model: Any, tokenizer: Any, config: GenerationConfig, extra: Any = None, criteria: Any = None):
        self._args = (model, tokenizer)
        self._config = config
        self._extra = LogitsProcessorList(_listed("logits_processor", extra))
        self._criteria = StoppingCriteriaList(_listed("stopping_criteria", criteria))
        if any(isinstance(c, ConfidenceCriteria) for c in self._criteria):
            raise ValueError(
                "stopping_criteria: ConfidenceCriteria reads scores, which criteria are not given here; "
                "use decode(stats=True, until=…) in a strategy"
            )
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
                asked = [name for name, _ in overrides]
                refuse(config, asked)
                refuse_unsampled(config, asked)
            self._made[key] = Sampler(*self._args, config, self._extra, self._criteria)
        return self._made[key]


def _hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


def token_logprobs(logits: torch.Tensor, tokens: Sequence[int]) -> list[float]:
    """Log-probability of one token a row of raw `logits` [rows, vocabulary]."""
    chosen = logits.gather(-1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0]
    return (chosen - vocabulary.logsumexp(logits)).tolist()


def token_stats(logits: torch.Tensor, tokens: Sequence[int], asked: Sequence[int]) -> list[TokenStats]:
    """`TokenStats` of each row of raw `logits` [rows, vocabulary].

    asked[i]: k of row i's top-k mean; 0: its log-probability alone, which costs a quarter.
    """
    total = vocabulary.logsumexp(logits)
    chosen = logits.gather(-1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0] - total
    stats = [TokenStats(logprob, nan, nan) for logprob in chosen.tolist()]  # one wait for the device, not one a row
    full = [i for i, k in enumerate(asked) if k]
    if full:
        rows = (logits[full] if len(full) < len(tokens) else logits).float()
        logp = rows - total[full, None]
        # −Σ p · log p; a score of −inf adds 0 to it, not NaN.
        entropy = (-torch.where(logp.isneginf(), 0.0, logp.exp() * logp).sum(-1)).tolist()
        best = logp.topk(min(max(2, *asked), logp.shape[-1]), dim=-1).values.cpu()
        margins = (best[:, 0].exp() - best[:, 1:2].exp().sum(-1)).tolist()
        for at, i in enumerate(full):
            stats[i] = TokenStats(stats[i].logprob, entropy[at], float(best[at, : asked[i]].mean()), margins[at])
    return stats
