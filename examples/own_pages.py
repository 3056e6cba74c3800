"""The kernels alone: a decoding loop with a page pool and block tables of its own.

    python examples/own_pages.py

Sixteen sequences share a 512-token prompt because their tables name the same pages. Nothing is declared:
`Plan.from_block_tables` finds the sharing, and one plan serves every layer of a step. The model here is a random
attention layer; put yours in its place.
"""

import time

import torch

import anabranch as ab

LAYERS, HEADS, KV_HEADS, DIM, PAGE = 4, 16, 4, 64, 16
PROMPT, SEQUENCES, STEPS = 512, 16, 8

torch.manual_seed(0)
prompt_pages = PROMPT // PAGE
num_pages = prompt_pages + SEQUENCES  # one page of its own for each sequence
k_pages = torch.randn(LAYERS, num_pages, PAGE, KV_HEADS, DIM)
v_pages = torch.randn(LAYERS, num_pages, PAGE, KV_HEADS, DIM)

# Row b: the prompt's pages, then a page of its own.
tables = torch.cat(
    [torch.arange(prompt_pages).expand(SEQUENCES, -1), prompt_pages + torch.arange(SEQUENCES)[:, None]], dim=1
)

begin = time.perf_counter()
for t in range(STEPS):
    lengths = torch.full((SEQUENCES,), PROMPT + t + 1)
    plan = ab.Plan.from_block_tables(tables, lengths, PAGE)
    hidden = torch.randn(SEQUENCES, HEADS, DIM)
    for layer in range(LAYERS):
        # Your model's K and V of the new tokens go to the slot behind each sequence's end.
        k_pages[layer, tables[:, -1], t] = torch.randn(SEQUENCES, KV_HEADS, DIM)
        v_pages[layer, tables[:, -1], t] = torch.randn(SEQUENCES, KV_HEADS, DIM)
        hidden = ab.paged_tree_attention(hidden, k_pages[layer], v_pages[layer], plan)
print(f"{plan}: {int(lengths.sum())} tokens in {SEQUENCES} contexts, {plan.unique_tokens} to read")
print(f"{STEPS} steps of {LAYERS} layers in {time.perf_counter() - begin:.3f} s")

# The same row, computed the plain way.
last = LAYERS - 1
k, v = (x[last, tables[3]].flatten(0, 1)[: PROMPT + STEPS] for x in (k_pages, v_pages))
q = torch.randn(SEQUENCES, HEADS, DIM)
ours = ab.paged_tree_attention(q, k_pages[last], v_pages[last], plan)[3]
theirs = torch.nn.functional.scaled_dot_product_attention(
    q[3, :, None], k.transpose(0, 1), v.transpose(0, 1), enable_gqa=True
)[:, 0]
print(f"largest difference from a dense computation: {(ours - theirs).abs().max():.1e}")
assert torch.allclose(ours, theirs, atol=1e-5)
