"""Hugging Face decoders, built small and random, and fork/join programs over them with a dense oracle.

The oracle of the tree runs keeps every token ever written in one list, with what it may see, and recomputes all of them
in one dense, eager forward. It shares nothing with the cache but the program.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import anabranch as ab

VOCAB = 97
SMALL = {
    "vocab_size": VOCAB, "hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "initializer_range": 0.15,
}  # fmt: skip
WINDOW = 6  # small enough to hide most of each context
MIXED = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
# Multi-head latent attention: keys of 24 numbers and values of 20, made of latents of 32 and 8.
LATENT = {
    "num_key_value_heads": 4, "kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 20,
    "q_lora_rank": 24, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "n_group": 1,
    "topk_group": 1, "moe_intermediate_size": 32, "first_k_dense_replace": 1,
}  # fmt: skip
FAMILIES = {
    "llama": ("LlamaConfig", {}),
    "llama-mha": ("LlamaConfig", {"num_key_value_heads": 4, "head_dim": 64}),
    "qwen2": ("Qwen2Config", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}),
    "qwen3": ("Qwen3Config", {"head_dim": 48}),
    "mistral": ("MistralConfig", {"sliding_window": WINDOW}),
    "gemma2": ("Gemma2Config", MIXED | {"head_dim": 32, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 2.0}),
    "gemma3": ("Gemma3TextConfig", MIXED | {"head_dim": 32, "query_pre_attn_scalar": 24}),
    "gpt-oss": ("GptOssConfig", MIXED | {
        "head_dim": 32, "num_local_experts": 4, "num_experts_per_tok": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }),
    "phi3": ("Phi3Config", {"sliding_window": WINDOW}),
    "olmo2": ("Olmo2Config", {}),
    "granite": ("GraniteConfig", {
        "attention_multiplier": 0.3, "residual_multiplier": 0.7, "embedding_multiplier": 2.0, "logits_scaling": 2.0,
    }),
    "deepseek-v2": ("DeepseekV2Config", LATENT | {"q_lora_rank": None}),
    "deepseek-v3": ("DeepseekV3Config", LATENT | {"n_group": 2}),
}  # fmt: skip


def build(config_class: str, seed: int = 0, attn: str = "anabranch", **options) -> nn.Module:
    torch.manual_seed(seed)
    config = getattr(transformers, config_class)(**SMALL | options)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attn).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("sinks"):  # near zero as initialised: too small to be missed
            nn.init.normal_(parameter, std=2.0)
    return model


@dataclass
class Oracle:
    """Every token ever written: its id, position, and the earlier tokens it sees (indices, in context order)."""

    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    sees: list[list[int]] = field(default_factory=list)

    def append(self, context: list[int], token: int, position: int) -> None:
        self.ids.append(token)
        self.positions.append(position)
        context.append(len(self.ids) - 1)
        self.sees.append(list(context))

    def logits(self, eager: nn.Module) -> torch.Tensor:
        """[tokens, vocab], in one dense forward with the whole history as its mask."""
        count = len(self.ids)
        visible = torch.zeros(count, count, dtype=torch.bool)
        for row, seen in enumerate(self.sees):
            visible[row, seen] = True
        device = next(eager.parameters()).device
        position, visible = torch.tensor(self.positions, device=device), visible.to(device)
        masks = {}
        window = getattr(eager.config, "sliding_window", None)
        for kind in ("full_attention", "sliding_attention"):
            if kind == "sliding_attention" and window:
                visible = visible & (position[:, None] - position[None, :] < window)
            masks[kind] = torch.where(visible, 0.0, torch.finfo(torch.float32).min)[None, None]
        if getattr(eager.config, "layer_types", None):
            mask = masks
        else:  # one kind for all layers
            mask = masks["sliding_attention" if window else "full_attention"]
        with torch.no_grad():
            return eager(
                input_ids=torch.tensor([self.ids], device=device), position_ids=position[None], attention_mask=mask,
                use_cache=False,
            ).logits[0]  # fmt: skip


class Run:
    """A fork/join program, carried out by the cache and the oracle side by side."""

    def __init__(self, model: nn.Module, backend: str, seed: int) -> None:
        self.model, self.backend, self.random = model, backend, random.Random(seed)
        self.cache = ab.TreeCache.for_model(model, num_pages=128, page_size=4)
        self.oracle = Oracle()
        self.contexts: dict[ab.Branch, list[int]] = {}
        self.forked_at: dict[ab.Branch, int] = {}
        self.got: list[torch.Tensor] = []

    def branch(self) -> ab.Branch:
        branch = self.cache.branch()
        self.contexts[branch] = []
        return branch

    def fork(self, branch: ab.Branch, n: int) -> list[ab.Branch]:
        kids = self.cache.fork(branch, n)
        for kid in kids:
            self.contexts[kid] = list(self.contexts[branch])
            self.forked_at[kid] = len(self.contexts[branch])
        return kids

    def step(self, rows: dict[ab.Branch, int], positions: dict[ab.Branch, list[int]] | None = None) -> ab.Step:
        given = {branch: torch.tensor(p) for branch, p in (positions or {}).items()}
        step = self.cache.step(rows, positions=given or None)
        ids = [self.random.randrange(3, VOCAB) for _ in range(step.num_rows)]
        with torch.no_grad():
            logits = self.model(
                input_ids=torch.tensor([ids], device=self.cache.device), position_ids=step.position_ids[None],
                tree_step=step, use_cache=False, tree_backend=self.backend,
            ).logits  # fmt: skip
        assert logits.shape == (1, step.num_rows, VOCAB)
        self.got.append(logits[0])
        for branch in rows:
            part = step.rows[branch]
            for token, position in zip(ids[part], step.position_ids[part].tolist(), strict=True):
                self.oracle.append(self.contexts[branch], token, position)
        return step

    def join(self, trunk: ab.Branch, kids: list[ab.Branch]) -> None:
        self.cache.join(trunk, kids, mode="concat")
        for kid in kids:
            self.contexts[trunk] += self.contexts.pop(kid)[self.forked_at[kid] :]

    def truncate(self, branch: ab.Branch, length: int) -> None:
        self.cache.truncate(branch, length)
        del self.contexts[branch][length:]


def program(run: Run) -> None:
    """Prefill, fork, packed decode, nested fork, truncate, mixed prefill and decode, nested and outer concat joins."""
    pick = run.random.randint
    trunk = run.branch()
    run.step({trunk: pick(9, 14)})
    a, b, c = run.fork(trunk, 3)
    for _ in range(pick(2, 5)):
        run.step({c: 1, a: 1, trunk: 1, b: 1})
    a1, a2 = run.fork(a, 2)
    run.step({a1: pick(1, 3), b: pick(3, 5), a2: 1})
    run.truncate(b, run.forked_at[b] + 1)
    other = run.branch()
    run.step({c: 1, other: pick(5, 8), b: 1, a2: 2, a1: 1})
    run.join(a, [a2, a1])
    run.step({a: 2, other: 1, b: 1})
    run.step({c: 2}, positions={c: [c.position + 3, c.position + 4]})  # a position leap inside a branch
    run.join(trunk, [b, a, c])  # each kid's positions start again where the trunk was forked
    run.step({trunk: pick(4, 6)})
    run.step({trunk: 1, other: 1})
    run.truncate(trunk, len(run.contexts[trunk]) - 3)
    run.step({trunk: 1, other: 1})
    assert trunk.length == len(run.contexts[trunk])


def assert_close(got: torch.Tensor, want: torch.Tensor, bound: float = 2e-5) -> None:
    """Every row's relative error."""
    error = (got - want).norm(dim=-1) / want.norm(dim=-1)
    worst = int(error.argmax())
    assert error[worst] < bound, f"row {worst} of {len(error)} differs by {float(error[worst]):.1e}"


# Every model type of Transformers' AutoModelForCausalLM that builds small and can run over a tree.
EVERY_FAMILY = """
afmoe apertus apertus1p5_text arcee aria_text axk1 beam bitnet cohere cohere2 cohere2_moe ctrl cwm deepseek_v2
deepseek_v3 ernie4_5 ernie4_5_moe exaone exaone4 exaone_moe flex_olmo flint fuyu gemma gemma2 gemma3_text glm glm4
glm4_moe glm4_moe_lite gpt-sw3 gpt2 gpt_bigcode gpt_neox gpt_oss granite granite_swa granitemoe granitemoe_swa
granitemoeshared helium hunyuan_v1_dense hunyuan_v1_moe hy_v3 hyperclovax internlm3 iquestcoder jais2 jetmoe kolibri1
laguna lfm2 llama longcat_flash mellum minicpm3 minimax_m2 minimax_m3_vl_text ministral ministral3 mistral mixtral
modernbert-decoder moshi nanochat olmo olmo2 olmo3 opt persimmon phi phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_moe
sarvam_mla sarvam_moe seed_oss smollm3 solar_open starcoder2 vaultgemma youtu
""".split()
_LATENT = "axk1 deepseek_v2 deepseek_v3 glm4_moe_lite longcat_flash minicpm3 sarvam_mla youtu".split()
_SAME = {  # one size under the names of several families, and a window wherever there can be one
    "sliding_window": WINDOW, "use_sliding_window": True, "max_window_layers": 1, "num_experts": 4,
    "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32, "n_layer": 3, "n_head": 4, "n_embd": 128, "ffn_dim": 96,
    "word_embed_proj_dim": 128,
}  # fmt: skip


def build_type(model_type: str, attn: str, seed: int = 0) -> nn.Module:
    """A small random model of one of `EVERY_FAMILY`; LookupError where this Transformers has none of it."""
    if model_type not in CONFIG_MAPPING:
        raise LookupError(f"this Transformers has no {model_type}")
    latent = LATENT | {"head_dim": 8} if model_type in _LATENT else {}  # (its rotated part)
    for options in (SMALL | _SAME | {"head_dim": 32} | latent, SMALL | _SAME | latent, SMALL):
        try:
            config = CONFIG_MAPPING[model_type](**options)
            torch.manual_seed(seed)
            return AutoModelForCausalLM.from_config(config, attn_implementation=attn).eval()
        except Exception as error:  # whatever a configuration says of options that it does not take
            failure = error
    raise failure


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tensors this small gain nothing from more, and lose much on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
