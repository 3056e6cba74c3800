"""``models.load("smollm2-adaptive")``: SmolLM2-135M-Instruct with our adapter, which decides itself whether to fork.

The adapter lies in the package (``data/smollm2_adaptive``): LoRA matrices of every linear layer, in peft's names, and
eight embedding rows for ThreadWeaver's control tags, which take over special tokens that no ordinary text uses. It is
merged into the weights of ``"smollm2"`` once, into an ordinary Transformers folder; peft is not needed. How it was
trained, and on what: ``training/adaptive`` in the repository.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

DATA = Path(__file__).parents[1] / "data" / "smollm2_adaptive"
TAG_ROWS = "base_model.model.model.embed_tokens.tags"  # [8, hidden]: instead of the rows `tag_ids` of the config


def version() -> str:
    """Of the adapter, by its content: a new one is merged into a new folder."""
    return hashlib.sha256((DATA / "adapter_model.safetensors").read_bytes()).hexdigest()[:8]


def merge(base: Path, adapter: Path, folder: Path) -> None:
    """Write `base` (a Transformers folder) with the adapter in its weights and the tags in its tokenizer to `folder`.

    Raises ValueError when the adapter does not fit the base model.
    """
    from safetensors.torch import load_file, save_file

    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    weights = load_file(base / "model.safetensors")
    delta = load_file(adapter / "adapter_model.safetensors")
    scale = config["lora_alpha"] / config["r"]
    embedding = weights["model.embed_tokens.weight"]
    tags: dict[str, int] = config["tag_ids"]
    embedding[torch.tensor(list(tags.values()))] = delta.pop(TAG_ROWS).to(embedding.dtype)
    for name in [n for n in delta if n.endswith(".lora_A.weight")]:
        a, b = delta.pop(name).float(), delta.pop(name.replace(".lora_A.", ".lora_B.")).float()
        target = name.removeprefix("base_model.model.").replace(".lora_A.weight", ".weight")
        if target not in weights or weights[target].shape != (b.shape[0], a.shape[1]):
            raise ValueError(f"adapter: {name} does not fit {target} of the base model")
        weights[target] = (weights[target].float() + scale * (b @ a)).to(weights[target].dtype)
    if delta:
        raise ValueError(f"adapter: nothing to do with {', '.join(sorted(delta)[:4])}")
    shutil.copy(base / "config.json", folder)
    shutil.copy(base / "generation_config.json", folder)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer(base, tags, config["chat_template"]).save_pretrained(folder)


def tokenizer(base: Path, tags: dict[str, int], chat_template: str) -> Any:
    """The base model's tokenizer with `tags` (text to id) in place of the special tokens of these ids."""
    from transformers import AutoTokenizer

    stock = AutoTokenizer.from_pretrained(base, local_files_only=True)
    names = {str(stock.convert_ids_to_tokens(i)): tag for tag, i in tags.items()}
    with tempfile.TemporaryDirectory() as temporary:
        stock.save_pretrained(temporary)
        for file in Path(temporary).glob("*.json"):
            data = _renamed(json.loads(file.read_text(encoding="utf-8")), names)
            file.write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")
        made = AutoTokenizer.from_pretrained(temporary, local_files_only=True)
    made.chat_template = chat_template
    found = {tag: made.convert_tokens_to_ids(tag) for tag in tags}
    if found != tags:
        raise ValueError(f"adapter: the tags became {found}, not {tags}")
    return made


def _renamed(data: Any, names: dict[str, str]) -> Any:
    """The same JSON with special tokens renamed, as keys and as values."""
    if isinstance(data, dict):
        return {names.get(k, k): _renamed(v, names) for k, v in data.items()}
    if isinstance(data, list):
        return [_renamed(v, names) for v in data]
    return names.get(data, data) if isinstance(data, str) else data
