"""From the arguments of `generate`, `stream` or `add` to requests: every check happens here, before anything runs."""

from __future__ import annotations

import json
import threading
import time
from typing import Any

from anabranch._check import seeds_of, told, whole
from anabranch.engine.call import Call
from anabranch.engine.drafting import draft_of
from anabranch.engine.drafts import check_draft
from anabranch.engine.fit import check_model, check_rotation
from anabranch.engine.options import prepare_config
from anabranch.engine.request import Request
from anabranch.engine.sampling import Samplers
from anabranch.kv.cache import TreeCache
from anabranch.strategies import Plain, Strategy
from anabranch.strategies.plain import is_plain
from anabranch.text.prompts import Text, check_template, split_prompts
from anabranch.text.tokens import Tokens

_KEPT_SAMPLERS = 16


class Preparation:
    """Makes an engine's calls; any Python thread may ask, one at a time."""

    def __init__(self, engine: Any):
        self._engine = engine
        self._tokens = Tokens(engine.tokenizer)
        self._samplers: dict[Any, Samplers] = {}  # of calls with equal settings, the last used last
        self._one_at_a_time = threading.RLock()

    def call(
        self,
        prompt: Any,
        strategy: Any,
        config: Any,
        seed: Any,
        max_new_tokens: Any,
        kwargs: dict[str, Any],
        listened: bool = False,
    ) -> tuple[Call, bool]:
        """Check everything and set up the call; nothing in the cache changes here. listened: somebody reads events."""
        with self._one_at_a_time:
            return self._prepared(prompt, strategy, config, seed, max_new_tokens, kwargs, listened)

    def _prepared(
        self,
        prompt: Any,
        strategy: Any,
        config: Any,
        seed: Any,
        max_new_tokens: Any,
        kwargs: dict[str, Any],
        listened: bool,
    ) -> tuple[Call, bool]:
        engine = self._engine
        strategy = Plain() if strategy is None else strategy
        if not isinstance(strategy, Strategy):
            raise TypeError(
                f"strategy: got {strategy!r}; pass an instance of a Strategy, such as ab.SelfConsistency(n=8), or None"
            )
        if engine.ranks is not None:
            engine.ranks.check_model(engine.model)
        limit = check_model(engine.model, engine.cache)
        priority = whole(kwargs.pop("priority", 0), "priority", -100, 100)
        deadline = _deadline(kwargs.pop("deadline", None))
        extra, criteria = (kwargs.pop(name, None) for name in ("logits_processor", "stopping_criteria"))
        budget = kwargs.pop("max_total_tokens", None)
        if budget is not None:
            budget = whole(budget, "max_total_tokens", 1, hint=", or None")
        logprobs = kwargs.pop("logprobs", False)
        if not isinstance(logprobs, bool):
            raise ValueError(
                f"logprobs={logprobs!r}; pass True to record each sampled token's log-probability, or False"
            )
        template = check_template(kwargs.pop("chat_template_kwargs", None))
        plain = is_plain(strategy)
        if (draft := draft_of(strategy)) is not None:
            check_draft(draft.draft, engine)
        prepared = prepare_config(engine.model, config, max_new_tokens, kwargs, samples=not plain)
        samplers = self._samplers_for(prepared, extra, criteria)
        if self._tokens.tokenizer is not engine.tokenizer:
            self._tokens = Tokens(engine.tokenizer)
        text = Text(engine.tokenizer, engine.vocab_size, samplers.base.eos_ids, self._tokens)
        prompts, many = split_prompts(prompt)
        seeds = seeds_of(seed, len(prompts))
        ids = [text.prompt_ids(p, f"prompt[{i}]" if many else "prompt", template) for i, p in enumerate(prompts)]
        # Without anything that could end it early, plain decoding writes all it may; its last token needs no place.
        base = samplers.base
        endless = plain and not budget and not base.eos_ids and not base.criteria and not base.stop_strings
        _check_room(engine.cache, ids, prepared.max_new_tokens - 1 if endless else 0, many)
        _check_positions(ids, limit, many)
        check_rotation(engine.model, ids, prepared.max_new_tokens, engine.max_rows, many)
        call = Call(engine.cache, priority, deadline)
        requests = [
            Request(
                i,
                tokens,
                strategy,
                s,
                cache=engine.cache,
                text=text,
                samplers=samplers,
                max_total_tokens=budget,
                max_new_tokens=prepared.max_new_tokens,
                logprobs=logprobs,
                position_limit=limit,
                prefixes=engine.prefixes,
                emit=call.emit if listened else None,
                prompt=prompts[i],
                template=template,
                draft=draft,
            )
            for i, (tokens, s) in enumerate(zip(ids, seeds, strict=True))
        ]
        if requests[0].kv_segments:
            engine.segments.require(engine.model, strategy, requests[0].kv_segments)
        call.holds(requests)
        return call, many

    def _samplers_for(self, config: Any, extra: Any, criteria: Any) -> Samplers:
        """Calls with equal settings share their samplers, so that their threads are sampled together. What a caller
        brings along, and a watermark, may keep a state of its own."""
        engine = self._engine
        if extra or criteria or config.watermarking_config is not None:
            return Samplers(engine.model, engine.tokenizer, config, extra, criteria)
        key = (id(engine.model), id(engine.tokenizer), json.dumps(config.to_dict(), sort_keys=True, default=repr))
        found = self._samplers.pop(key, None)
        if found is None:
            found = Samplers(engine.model, engine.tokenizer, config)
        self._samplers[key] = found
        while len(self._samplers) > _KEPT_SAMPLERS:
            del self._samplers[next(iter(self._samplers))]
        return found


def _check_room(cache: TreeCache, ids: list[list[int]], more: int, many: bool) -> None:
    """ValueError for a prompt that, with `more` tokens behind it, can never fit in the cache."""
    pages, size = cache.num_pages, cache.page_size
    for i, tokens in enumerate(ids):
        if len(tokens) + more > pages * size:
            what = f"{len(tokens)} tokens" + (f" and {more} more" if more else "")
            raise ValueError(
                f"prompt{f'[{i}]' if many else ''}: {what} can never fit in num_pages={pages} of {size} tokens; "
                f"make the engine with num_pages of at least {-(-(len(tokens) + more) // size) + (not more)}"
                + (", or use a smaller max_new_tokens" if more else "")
            )


def _deadline(seconds: Any) -> float | None:
    """Seconds from now, on the monotonic clock."""
    if seconds is None:
        return None
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not seconds > 0:
        raise ValueError(f"deadline={told(seconds)}; pass seconds > 0, or None for no deadline")
    return time.monotonic() + float(seconds)


def _check_positions(ids: list[list[int]], limit: int | None, many: bool) -> None:
    """ValueError for a prompt that is longer than the positions which the model has embeddings for."""
    for i, tokens in enumerate(ids):
        if limit is not None and len(tokens) > limit:
            raise ValueError(
                f"prompt{f'[{i}]' if many else ''}: {len(tokens)} tokens, but the model has embeddings for {limit} "
                "positions; shorten it, or use a model with a longer context"
            )
