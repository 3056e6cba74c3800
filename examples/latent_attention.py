"""DeepSeek's attention over a tree, with K and V of all heads and as latents with absorbed products.

    python examples/latent_attention.py

The model is DeepSeek V3's architecture, small and random. A prompt is read, three branches continue it side by side
and are joined: once over a cache of expanded heads, once over one of latents. Scores agree to rounding; the latents
take a fraction of the memory.
"""

import torch
from transformers import AutoModelForCausalLM, DeepseekV3Config

import anabranch as ab

torch.manual_seed(0)
config = DeepseekV3Config(
    vocab_size=512, hidden_size=256, intermediate_size=512, moe_intermediate_size=128, num_hidden_layers=3,
    num_attention_heads=16, num_key_value_heads=16, n_routed_experts=8, num_experts_per_tok=2, n_group=2, topk_group=1,
    first_k_dense_replace=1, q_lora_rank=96, kv_lora_rank=64, qk_rope_head_dim=16, qk_nope_head_dim=32, v_head_dim=32,
    initializer_range=0.1,
)  # fmt: skip
model = AutoModelForCausalLM.from_config(config, attn_implementation="anabranch").eval()
prompt = torch.randint(3, 512, (40,))


@torch.no_grad()
def run(latent: bool) -> torch.Tensor:
    """The scores of every row of one prompt, three branches of four tokens, and the joined trunk's next token."""
    cache = ab.TreeCache.for_model(model, num_pages=64, latent=latent)
    rows = []

    def forward(ids: torch.Tensor, counts: dict[ab.Branch, int]) -> None:
        step = cache.step(counts)
        more = {"cache": ab.hf.latents_of(step)} if latent else {}
        logits = model(
            input_ids=ids[None], position_ids=step.position_ids[None], tree_step=step, use_cache=False, **more
        ).logits[0]  # fmt: skip
        rows.append(logits)

    trunk = cache.branch()
    forward(prompt, {trunk: len(prompt)})
    children = cache.fork(trunk, 3)
    for t in range(4):
        forward(torch.tensor([10 + t, 20 + t, 30 + t]), dict.fromkeys(children, 1))
    cache.join(trunk, children)
    forward(torch.tensor([7]), {trunk: 1})
    numbers = cache.num_kv_heads * (cache.head_dim + (0 if cache.v_in_k else cache.v_head_dim))
    print(f"{'latents' if latent else 'expanded heads':>15}: {numbers} numbers a token and layer, {cache}")
    return torch.cat(rows)


expanded, latents = run(False), run(True)
print(f"largest difference of a score: {(expanded - latents).abs().max():.1e} (of {expanded.abs().max():.1f})")
assert torch.allclose(expanded, latents, atol=1e-3)

# The engine, with any strategy: the same tokens either way.
engines = [ab.Engine(model, num_pages=64, latent=latent) for latent in (False, True)]
answers = [engine.generate(prompt.tolist(), max_new_tokens=16).token_ids for engine in engines]
print(f"greedy continuation: {answers[0]}")
assert answers[0] == answers[1]
