"""A decoding loop of one's own with fork and join: a small attention model in plain PyTorch over a TreeCache.

    python examples/fork_and_join.py

The model is random; what the example shows is the loop. It ends by computing one branch the slow way to show that
every fork and join was exact.
"""

import torch
from torch import nn

import anabranch as ab


class Layer(nn.Module):
    def __init__(self, width: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.dim = heads, kv_heads, width // heads
        self.qkv = nn.Linear(width, (heads + 2 * kv_heads) * self.dim)
        self.out = nn.Linear(width, width)

    def split(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        qkv = self.qkv(x).view(len(x), -1, self.dim)
        q, k, v = qkv.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        return q.contiguous(), k.contiguous(), v.contiguous()


class Model(nn.Module):
    def __init__(self, vocab: int = 100, width: int = 128, layers: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        self.where = nn.Embedding(512, width)
        self.head = nn.Linear(width, vocab)
        self.layers = nn.ModuleList(Layer(width, 8, 2) for _ in range(layers))

    def forward(self, ids: torch.Tensor, cache: ab.TreeCache, step: ab.Step) -> torch.Tensor:
        """ids [rows] → logits [branches, vocab], one row for the last token of each branch."""
        x = self.embed(ids) + self.where(step.position_ids)
        for i, layer in enumerate(self.layers):
            q, k, v = layer.split(x)
            cache.write(i, k, v, step)
            x = x + layer.out(ab.tree_attention(q, cache, i, step).flatten(1))
        return self.head(x[step.last_rows])


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    model = Model()
    cache = ab.TreeCache(num_layers=3, num_kv_heads=2, head_dim=16, num_pages=64)

    # Prefill.
    trunk = cache.branch()
    prompt = torch.randint(100, (37,))
    logits = model(prompt, cache, cache.step({trunk: len(prompt)}))

    # Fork: three branches begin with the three likeliest tokens. Nothing is copied here.
    kids = cache.fork(trunk, 3)
    tokens = logits[0].topk(3).indices
    written = {kid: [] for kid in kids}
    for _ in range(10):
        for kid, token in zip(kids, tokens, strict=True):
            written[kid].append(int(token))
        logits = model(tokens, cache, cache.step({kid: 1 for kid in kids}))
        tokens = logits.argmax(-1)
    print("branches:", *written.values(), sep="\n  ")
    print(cache)

    # Join: the trunk now sees all three, side by side; no KV moves.
    own = [token for kid in kids for token in written[kid]]
    cache.join(trunk, kids)
    logits = model(torch.tensor([7]), cache, cache.step({trunk: 1}))
    print(trunk, cache.usage(), sep="\n")

    # The slow way: one more cache, the joined context fed token by token with the mask that the fork implies.
    slow = ab.TreeCache(num_layers=3, num_kv_heads=2, head_dim=16, num_pages=64)
    base = slow.branch()
    model(prompt, slow, slow.step({base: len(prompt)}))
    for i in range(3):
        thread = slow.fork(base)[0]
        for t in range(10):
            model(torch.tensor([own[10 * i + t]]), slow, slow.step({thread: 1}))
        for layer in range(3):
            ours, theirs = cache.read(trunk, layer), slow.read(thread, layer)
            for a, b in zip(ours, theirs, strict=True):
                torch.testing.assert_close(a[37 + 10 * i : 47 + 10 * i], b[37:], rtol=1e-4, atol=1e-5)
    print("every branch is what it would have been alone")


if __name__ == "__main__":
    main()
