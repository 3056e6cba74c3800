"""What the backend does not take, each with a sentence. vLLM's CPU platform checks nothing of this itself."""

from __future__ import annotations

import os
from typing import Any

import torch

#: element types of K and V's pages as vLLM names them, besides "auto"
PLAIN = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
#: by device type, the anabranch backend whose kernels run
KERNELS = {"cpu": "cpu", "cuda": "triton"}
MAX_HEAD_SIZE = 256


def refuse(reason: str, remedy: str = "leave out --attention-backend CUSTOM for this model") -> None:
    raise ValueError(f"--attention-backend CUSTOM (anabranch): {reason}; {remedy}")


def check_layer(
    *,
    head_size: int,
    dtype: torch.dtype,
    device_type: str,
    alibi_slopes: Any,
    kv_cache_dtype: str,
    attn_type: str,
    kv_sharing_target_layer_name: str | None,
    more: dict[str, Any],
) -> None:
    """Raise ValueError where the backend cannot do what a layer asks for.

    Args:
        dtype: of Q, K and V. device_type: "cpu", "cuda", …
        alibi_slopes, kv_cache_dtype, attn_type, kv_sharing_target_layer_name: as vLLM gives them to an implementation.
        more: what else it gives, by name.
    """
    if device_type not in KERNELS:
        refuse(f"it has kernels for CPUs and for CUDA or ROCm GPUs, not for device type {device_type!r}")
    if dtype not in PLAIN.values():
        refuse(f"it takes float32, float16 and bfloat16, not {dtype}", "pass --dtype bfloat16 or float32")
    if not 1 <= head_size <= MAX_HEAD_SIZE:
        refuse(f"it takes head sizes up to {MAX_HEAD_SIZE}, not {head_size}")
    if alibi_slopes is not None:
        refuse("ALiBi is not supported")
    if attn_type != "decoder":
        refuse(f"it serves decoders, not attention of type {str(getattr(attn_type, 'value', attn_type))!r}")
    if kv_sharing_target_layer_name is not None:
        refuse(f"layers that use another layer's K and V ({kv_sharing_target_layer_name}) are not supported")
    if kv_cache_dtype != "auto" and PLAIN.get(kv_cache_dtype) != dtype:
        refuse(
            f"K and V kept as {kv_cache_dtype} are not supported, only as the model's own {dtype}",
            "leave out --kv-cache-dtype",
        )
    asked = [name for name, value in more.items() if not _is_off(value)]
    if asked:
        refuse(f"it does not know what the model's layers ask for with {', '.join(asked)}")


def check_model(config: Any) -> None:
    """Raise ValueError where a ``VllmConfig`` asks for what the backend cannot do, or was never tried with."""
    parallel, model, attention = config.parallel_config, config.model_config, config.attention_config
    unsupported = {
        "speculative decoding was not tried": config.speculative_config is not None,
        "KV connectors were not tried": config.kv_transfer_config is not None,
        "context parallelism is not supported": _more_than_one(parallel, "decode_context_parallel_size")
        or _more_than_one(parallel, "prefill_context_parallel_size"),
        "attention to later tokens (of images, say) is not supported": getattr(model, "is_mm_prefix_lm", False)
        or getattr(attention, "use_non_causal", False),
        "windows that keep a prefix visible are not supported": getattr(model, "rswa_window", None) is not None,
        "batch invariance (VLLM_BATCH_INVARIANT) is not supported": _is_set("VLLM_BATCH_INVARIANT"),
    }
    for reason, asked in unsupported.items():
        if asked:
            refuse(reason, "leave it out, or leave out --attention-backend CUSTOM")


def _is_off(value: Any) -> bool:
    """Whether an option is one of the values that vLLM's layers give for "not wanted"."""
    return value is None or value is False or (isinstance(value, int) and value == -1)


def _more_than_one(parallel: Any, name: str) -> bool:
    return int(getattr(parallel, name, 1) or 1) > 1


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "").strip().lower() in ("1", "true")
