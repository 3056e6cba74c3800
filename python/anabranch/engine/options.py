"""Which options of Transformers' GenerationConfig and `generate` mean something here; the rest is refused, not dropped.

Every field of GenerationConfig is in one of four groups. `HONOURED`: means what it means to ``model.generate``.
`REFUSED`: asks for another kind of decoding, whoever sets it. `ONLY_GENERATE`: steers the inside or the return value of
``model.generate``; refused in a call, and without effect where the model's own generation_config has it. `INERT`:
describes the config, or an encoder.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from transformers import GenerationConfig

from anabranch._check import whole

HONOURED = frozenset(
    """
    max_new_tokens min_length min_new_tokens stop_strings do_sample temperature top_k top_p min_p top_h typical_p
    epsilon_cutoff eta_cutoff repetition_penalty no_repeat_ngram_size bad_words_ids renormalize_logits
    forced_bos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
    sequence_bias watermarking_config pad_token_id bos_token_id eos_token_id
    """.split()
)

_BEAMS = "only beam search looks at it, and beam search is a strategy: strategy=ab.BeamSearch(…) takes it"
_ASSISTANT = "assisted decoding is not available; leave it out"
_CACHE = "the engine has a cache of its own, Engine(num_pages=…); leave it out"

# Field: values that mean "off", and what to do instead.
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "max_length": ((None,), "it counts the prompt, which threads share; pass max_new_tokens instead"),
    "num_beams": ((None, 1), "beam search is a strategy: pass strategy=ab.BeamSearch(width=…)"),
    "num_beam_groups": ((None, 1), _BEAMS),
    "diversity_penalty": ((None, 0, 0.0), _BEAMS),
    "num_return_sequences": (
        (None, 1),
        "use strategy=ab.SelfConsistency(n=…) for several samples, ab.BeamSearch for several beams",
    ),
    "guidance_scale": ((None, 1, 1.0), "classifier-free guidance is not available; pass guidance_scale=1"),
    "penalty_alpha": ((None, 0, 0.0), "contrastive search is not available; pass penalty_alpha=0"),
    "dola_layers": ((None,), "DoLa decoding is not available; leave it out"),
    "prompt_lookup_num_tokens": ((None,), _ASSISTANT),
    "constraints": ((None,), "constrained beam search is not available; use logits_processor"),
    "force_words_ids": ((None,), "constrained beam search is not available; use logits_processor"),
    "use_mtp": ((None, False), "multi-token prediction is not available; pass use_mtp=False"),
    "forced_eos_token_id": ((None,), "have the strategy insert() it"),
    "encoder_repetition_penalty": ((None, 1, 1.0), "there is no encoder; use repetition_penalty"),
    "encoder_no_repeat_ngram_size": ((None, 0), "there is no encoder; use no_repeat_ngram_size"),
    "token_healing": ((None, False), "token healing is not available; pass token_healing=False"),
    "max_time": ((None,), "use Engine.abort() or leave the stream"),
}

ONLY_GENERATE: dict[str, tuple[tuple[Any, ...], str]] = {
    "return_dict_in_generate": ((None, False), "the Result holds everything"),
    "output_scores": ((None, False), "use decode(stats=True), or logprobs=True"),
    "output_logits": ((None, False), "use decode(stats=True), or logprobs=True"),
    "output_attentions": ((None, False), "there are no attention weights over a tree"),
    "output_hidden_states": ((None, False), "call the model itself with tree_step"),
    "early_stopping": ((None, False), _BEAMS),
    "length_penalty": ((None, 1, 1.0), _BEAMS),
    "low_memory": ((None, False), "contrastive search is not available; leave it out"),
    "use_cache": ((None, True), "the engine always works with its own cache; leave it out"),
    "cache_implementation": ((None,), _CACHE),
    "cache_config": ((None,), _CACHE),
    "max_cache_len": ((None,), _CACHE),
    "prefill_chunk_size": ((None,), "use Engine(max_rows=…)"),
    "continuous_batching_config": ((None,), "threads share their forwards as it is; see Engine(max_threads=…)"),
    "compile_config": ((None,), "compile the model yourself, before Engine(model)"),
    "disable_compile": ((None, False, True), "the engine does not compile"),
    "is_assistant": ((None, False), _ASSISTANT),
    "num_assistant_tokens": ((None, 20), _ASSISTANT),
    "num_assistant_tokens_schedule": ((None, "constant"), _ASSISTANT),
    "assistant_confidence_threshold": ((None, 0.4), _ASSISTANT),
    "assistant_early_exit": ((None,), _ASSISTANT),
    "assistant_lookbehind": ((None, 10), _ASSISTANT),
    "assistant_ensemble_weight": ((None,), _ASSISTANT),
    "target_lookbehind": ((None, 10), _ASSISTANT),
    "max_matching_ngram_size": ((None, 2), _ASSISTANT),
    "speculation_type": ((None,), _ASSISTANT),
}

INERT = frozenset({"decoder_start_token_id", "transformers_version", "_from_model_config"})

# Keywords of `generate` that are no fields of GenerationConfig.
_KEYWORDS = {
    "prefix_allowed_tokens_fn": "pass logits_processor=[PrefixConstrainedLogitsProcessor(fn, num_beams=1)]",
    "assistant_model": "assisted decoding is not available",
    "assistant_tokenizer": "assisted decoding is not available",
    "streamer": "use Engine.stream()",
    "negative_prompt_ids": "classifier-free guidance is not available",
    "negative_prompt_attention_mask": "classifier-free guidance is not available",
    "synced_gpus": "an engine runs on one device",
    "custom_generate": "write a Strategy instead",
    "inputs": "pass the prompt's ids as the first argument",
    "input_ids": "pass the prompt's ids as the first argument",
    "inputs_embeds": "prompts are text or token ids",
    "attention_mask": "prompts are not padded; pass each one's own ids",
    "position_ids": "positions follow from the tree",
    "past_key_values": "the engine has a cache of its own",
    "tokenizer": "pass it to Engine(model, tokenizer)",
}

# What only sampling looks at, with the values that change nothing.
_SAMPLING: dict[str, tuple[Any, ...]] = {
    "temperature": (None, 1, 1.0),
    "top_k": (None, 0, 50),
    "top_p": (None, 1, 1.0),
    "min_p": (None,),
    "top_h": (None,),
    "typical_p": (None, 1, 1.0),
    "epsilon_cutoff": (None, 0, 0.0),
    "eta_cutoff": (None, 0, 0.0),
}


def refuse(config: GenerationConfig, asked: Iterable[str]) -> None:
    """ValueError for an option of `config` that is not honoured; `asked`: fields that the caller himself set."""
    asked = frozenset(asked)
    for name, (off, remedy) in {**REFUSED, **ONLY_GENERATE}.items():
        value = getattr(config, name, None)
        if not any(value is o or (type(value) is type(o) and value == o) or _same(value, o) for o in off) and (
            name in REFUSED or name in asked
        ):
            raise ValueError(f"generation_config: {name}={value!r} is not honoured by this engine; {remedy}")


def refuse_unsampled(config: GenerationConfig, asked: Iterable[str]) -> None:
    """ValueError for an option of sampling, set by the caller himself, where nothing samples."""
    if config.do_sample:
        return
    for name in asked:
        if name in _SAMPLING and not any(_same(getattr(config, name), off) for off in _SAMPLING[name]):
            raise ValueError(
                f"generation_config: {name}={getattr(config, name)!r} has no effect without sampling; "
                "pass do_sample=True, or leave it out"
            )


def _same(value: Any, off: Any) -> bool:
    if value is None or off is None or isinstance(value, bool) or isinstance(off, bool):
        return value is off
    return isinstance(value, (int, float, str)) and value == off


def prepare_config(
    model: Any,
    config: GenerationConfig | None,
    max_new_tokens: int | None,
    kwargs: dict[str, Any],
    samples: bool = True,
) -> GenerationConfig:
    """The config `model.generate` would arrive at, with ``max_new_tokens`` always settled (256 when nobody says).

    samples: whether something other than the config may ask for sampling (a strategy for some of its threads).

    Raises ValueError for an option that is not honoured, with the remedy.
    """
    if max_new_tokens is not None:
        max_new_tokens = whole(max_new_tokens, "max_new_tokens", 1)
    if config is not None and not isinstance(config, GenerationConfig):
        raise TypeError(f"generation_config: got {type(config).__name__}; pass a transformers.GenerationConfig")
    for name, remedy in _KEYWORDS.items():
        if kwargs.get(name) is not None:
            raise ValueError(f"generate: {name} is not an argument of this engine; {remedy}")
    kwargs = {name: value for name, value in kwargs.items() if name not in _KEYWORDS}
    own, given = model.generation_config, {} if config is None else config.to_dict()
    asked = {*kwargs, *(k for k, v in given.items() if v is not None and v != getattr(own, k, None))}
    if kwargs.get("max_length") is not None or (config is not None and config.max_length and not config.max_new_tokens):
        raise ValueError("max_length: counts the prompt, which threads share; pass max_new_tokens instead")
    if config is not None and kwargs:
        config = copy.deepcopy(config)
        unknown: dict[str, Any] = config.update(**kwargs)  # type: ignore[no-untyped-call]
        kwargs = {}
    else:
        unknown = {}
    prepared: GenerationConfig
    prepared, left = model._prepare_generation_config(config, **kwargs)
    unknown = unknown | {k: v for k, v in left.items() if not hasattr(prepared, k)}
    if unknown:
        raise ValueError(f"generate: unknown argument {sorted(unknown)[0]!r}; it takes the fields of GenerationConfig")
    prepared.max_length = None  # the model's own, or one beside max_new_tokens, which goes before it
    if max_new_tokens is not None:
        prepared.max_new_tokens = max_new_tokens
    elif prepared.max_new_tokens is None:
        prepared.max_new_tokens = 256
    prepared.max_new_tokens = whole(prepared.max_new_tokens, "generation_config: max_new_tokens", 1)
    refuse(prepared, asked)
    if not samples:
        refuse_unsampled(prepared, asked)
    return prepared
