"""What vLLM calls at the start of each of its processes. Light: no kernel, model or tensor is touched.

vLLM keeps one place for a backend from outside, the member CUSTOM of its table; whoever registers last has it. Its CPU
platform never asks for that member: there every choice becomes CPU_ATTN. So both members look again when their path is
asked for, at the moment a backend is chosen: CPU_ATTN gives ours where CUSTOM was chosen, and CUSTOM is an error where
another plugin has taken it or this version of vLLM was not tested. Who chooses another backend sees nothing of this.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

from anabranch.integrations.vllm import versions

PATH = "anabranch.integrations.vllm.backend.TreeAttentionBackend"
#: below "vllm", whose handlers and level it shares
logger = logging.getLogger("vllm.anabranch")


def register() -> None:
    """Make ``--attention-backend CUSTOM`` choose anabranch's backend. Idempotent.

    Never raises: a vLLM that is not understood, or another plugin in the same place, is an error for those alone who
    choose CUSTOM.
    """
    try:
        from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

        custom, cpu = AttentionBackendEnum.CUSTOM, AttentionBackendEnum.CPU_ATTN
        ask_custom, ask_cpu = custom.get_path, cpu.get_path
        if getattr(ask_custom, "of_anabranch", False):
            return
        if not custom.is_overridden():
            register_backend(custom, PATH)
    except (ImportError, AttributeError) as error:
        logger.warning("anabranch registers no attention backend with this vLLM (%s): %s", _version(), error)
        return

    @functools.wraps(ask_custom)
    def path_of_custom(include_classname: bool = True) -> str:
        _check_claim(ask_custom())
        return str(ask_custom(include_classname))

    @functools.wraps(ask_cpu)
    def path_of_cpu(include_classname: bool = True) -> str:
        return path_of_custom(include_classname) if _custom_is_chosen(custom) else str(ask_cpu(include_classname))

    path_of_custom.of_anabranch = True  # type: ignore[attr-defined]
    custom.get_path, cpu.get_path = path_of_custom, path_of_cpu


def _version() -> str:
    try:
        import vllm

        return str(vllm.__version__)
    except (ImportError, AttributeError):
        return "unknown"


def _check_claim(path: str) -> None:
    """Raise ValueError unless the class at `path` is ours and this vLLM is one it was tested with."""
    if path != PATH:
        raise ValueError(
            f"--attention-backend CUSTOM: two installed plugins want it, {path} and anabranch ({PATH}); name the one "
            "that is to be loaded, VLLM_PLUGINS=anabranch for anabranch's, or uninstall the other"
        )
    reason = versions.refusal(_version())
    if reason is not None:
        raise ValueError(f"--attention-backend CUSTOM: {reason}")


def _custom_is_chosen(custom: Any) -> bool:
    """Whether CUSTOM was chosen for the model that is being loaded on a CPU."""
    from vllm.config import get_current_vllm_config_or_none

    config = get_current_vllm_config_or_none()
    if config is None:
        return False
    chosen, per_kind = config.attention_config.backend, config.attention_config.backend_per_kind
    kinds = [kind for kind, backend in per_kind.items() if (backend is custom) != (chosen is custom)]
    if kinds:  # the platform does not say for which kind of layer it asks
        raise ValueError(
            f"attention_config.backend_per_kind: on a CPU, CUSTOM is for all kinds of layers or for none, but "
            f"{', '.join(kinds)} differ from the others; give --attention-backend CUSTOM alone"
        )
    return chosen is custom
