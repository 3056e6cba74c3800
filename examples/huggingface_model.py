"""Fork and join with any Hugging Face decoder, in a loop of one's own. Nothing of the model is patched.

    python examples/huggingface_model.py

Takes SmolLM2-135M-Instruct where it is installed (see `anabranch.models`), else a tiny random model.
"""

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import anabranch as ab

QUESTION = (
    "A river that crosses a flat plain hardly ever flows straight. It winds from side to side in great loops, eats "
    "into one bank and leaves sand on the other, and now and then cuts a loop off. Why do rivers bend?"
)
BRANCHES = ["The first reason is that", "Another reason is that", "Finally,"]
TOKENS = 16  # a branch


def load():
    """(model, encode, decode). With a checkpoint of your own:
    AutoModelForCausalLM.from_pretrained(path, attn_implementation="anabranch")."""
    try:
        model, tokenizer = ab.models.load("smollm2", dtype=torch.float32, device="cpu")
        return model, lambda text: tokenizer(text)["input_ids"], tokenizer.decode
    except ab.models.ModelUnavailable as error:
        print(f"({error}\n Going on with a tiny random model: its answers are noise.)\n")
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                         num_attention_heads=2, num_key_value_heads=1)  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, attn_implementation="anabranch").eval()
    return model, lambda text: list(text.encode("ascii")), lambda ids: "".join(map(chr, ids))


@torch.no_grad()
def main() -> None:
    model, encode, decode = load()
    cache = ab.TreeCache.for_model(model, num_pages=256)

    def forward(tokens: dict) -> list[int]:
        """One packed forward: branch → its new tokens. Returns the most likely next token of each branch."""
        step = cache.step({branch: len(ids) for branch, ids in tokens.items()})
        ids = torch.tensor([i for new in tokens.values() for i in new], device=cache.device)
        logits = model(input_ids=ids[None], position_ids=step.position_ids[None], tree_step=step, use_cache=False,
                       logits_to_keep=step.last_rows).logits[0]  # fmt: skip
        return logits.argmax(-1).tolist()

    # 1. Prefill the prompt, once for all branches.
    prompt = f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
    trunk = cache.branch()
    forward({trunk: encode(prompt)})

    # 2. Fork: no keys or values are copied. Each branch gets a beginning of its own; all go in one forward.
    branches = cache.fork(trunk, len(BRANCHES))
    texts = [encode(start) for start in BRANCHES]
    following = forward(dict(zip(branches, texts, strict=True)))

    # 3. Decode all branches together: one packed forward a step, one row a branch.
    for _ in range(TOKENS):
        for text, token in zip(texts, following, strict=True):
            text.append(token)
        following = forward({branch: text[-1:] for branch, text in zip(branches, texts, strict=True)})
    for text in texts:
        print(f"  branch: {decode(text)!r}")
    print(f"  {cache.usage()}")

    # 4. Join: the branches' tokens become the trunk's context, in order, without a copy. Then the trunk goes on.
    cache.join(trunk, branches, mode="concat")
    answer = encode(" In short,")
    (token,) = forward({trunk: answer})
    for _ in range(TOKENS):
        answer.append(token)
        (token,) = forward({trunk: [token]})
    print(f"  trunk, after the join: {decode(answer)!r}")
    print(f"  {cache.usage()}")
    cache.release(trunk)


if __name__ == "__main__":
    main()
