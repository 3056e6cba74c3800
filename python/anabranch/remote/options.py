"""Generation options that a completions server knows, under Transformers' names; the rest is refused, not dropped."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import GenerationConfig

from anabranch._check import told, whole

# Field of GenerationConfig: the name that vLLM, SGLang and most others give it.
SENT = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
}
_OURS = ("max_new_tokens", "do_sample", "stop_strings", "eos_token_id", "pad_token_id", "bos_token_id")
_SAMPLED = ("temperature", "top_k", "top_p", "min_p")
_DEFAULTS = {"temperature": 1.0, "top_k": 50, "top_p": 1.0}  # what Transformers samples with when nobody says
_OFF: dict[str, tuple[Any, ...]] = {"repetition_penalty": (None, 1, 1.0), "min_p": (None, 0, 0.0)}


@dataclass(frozen=True)
class RemoteSampling:
    """What a decode samples by: `fields` of the request, and what ends it."""

    fields: tuple[tuple[str, Any], ...]
    eos_ids: frozenset[int]
    stop_strings: tuple[str, ...] = ()

    def stops(self, context: Callable[[], list[int]]) -> bool:
        """Stopping criteria run where the model runs, so there are none."""
        return False


def default_config(tokenizer: Any) -> GenerationConfig:
    """Greedy, to the tokenizer's EOS."""
    config: GenerationConfig = GenerationConfig.from_dict({"eos_token_id": getattr(tokenizer, "eos_token_id", None)})
    return config


def prepare(base: GenerationConfig, config: Any, max_new_tokens: int | None, kwargs: Mapping[str, Any]) -> Any:
    """The config of a call: `base`, changed by `config`, then by `kwargs`; ``max_new_tokens`` is always settled.

    Raises ValueError for an option that cannot be sent, TypeError for a config that is none.
    """
    if config is not None and not isinstance(config, GenerationConfig):
        raise TypeError(f"generation_config: got {told(config)}; pass a transformers.GenerationConfig")
    for name in ("logits_processor", "stopping_criteria"):
        if kwargs.get(name) is not None:
            raise ValueError(f"{name}: runs where the model runs, so a remote engine cannot use it; use a local Engine")
    asked = {k: v for k, v in ({} if config is None else config.to_diff_dict()).items() if k != "transformers_version"}
    asked |= {k: v for k, v in kwargs.items() if v is not None}
    for name, value in asked.items():
        if name not in SENT and name not in _OURS:
            raise ValueError(
                f"generation_config: {name}={value!r} cannot be sent to a server; it takes "
                f"{', '.join([*_OURS, *SENT])}; leave it out, or use a local Engine"
            )
    prepared = copy.deepcopy(base)
    for name, value in asked.items():
        setattr(prepared, name, value)
    most = max_new_tokens if max_new_tokens is not None else prepared.max_new_tokens
    prepared.max_new_tokens = whole(256 if most is None else most, "max_new_tokens", 1)
    if not prepared.do_sample:
        for name in _SAMPLED:
            if asked.get(name) is not None:
                raise ValueError(
                    f"generation_config: {name}={asked[name]!r} has no effect without sampling; pass do_sample=True, "
                    "or leave it out"
                )
    return prepared


def sampling(config: GenerationConfig, overrides: tuple[tuple[str, Any], ...], known: frozenset[str]) -> RemoteSampling:
    """What a decode samples by; ValueError for an override, or a field, that the server does not know."""
    config = copy.deepcopy(config)
    for name, value in overrides:
        if name not in SENT and name not in _OURS:
            raise ValueError(
                f"sampling: {name}={value!r} cannot be sent to a server; leave it out, or use a local Engine"
            )
        setattr(config, name, value)
    fields: dict[str, Any] = {}
    if config.do_sample:
        for name in _SAMPLED:
            value = getattr(config, name, None)
            value = _DEFAULTS.get(name) if value is None else value
            if value is not None and value not in _OFF.get(name, ()):
                fields[SENT[name]] = value
    else:
        fields["temperature"] = 0.0
    penalty = config.repetition_penalty
    if penalty not in _OFF["repetition_penalty"]:
        fields[SENT["repetition_penalty"]] = penalty
    for name in fields:
        if name not in known and name not in ("temperature", "top_p"):
            raise ValueError(f"generation_config: this server does not know {name}; leave it out")
    eos = config.eos_token_id
    eos_ids = frozenset([eos] if isinstance(eos, int) else eos or ())
    strings = config.stop_strings or ()
    strings = (strings,) if isinstance(strings, str) else tuple(strings)
    if not all(strings):
        raise ValueError("generation_config: stop_strings holds an empty string; leave it out")
    return RemoteSampling(tuple(sorted(fields.items())), eos_ids, strings)
