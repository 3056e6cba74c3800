"""Train a small model, from nothing, to fork: training shows it exactly what the engine will show it.

    python examples/train_branches.py            # a few minutes on 2 cores
    python examples/train_branches.py --quick    # a few steps, to see that it runs

The task: every letter of every word becomes the next one of the alphabet ("ab de" → "bc ef"). With several words the
model is taught to fork in ThreadWeaver's format, one thread a word; with a single word it just answers. It decides.
"""

import argparse
import random
import time

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import anabranch as ab
from anabranch import training

FORMAT = ab.ThreadWeaver()
LETTERS = "abcdefghij"
VOCABULARY = ["<pad>", "<eos>", *FORMAT.tags, "\n", ":", " ", "=", *"1234", *LETTERS]
IDS = {piece: i for i, piece in enumerate(VOCABULARY)}
FORMAT = ab.ThreadWeaver(pieces=IDS)  # no tokenizer: the format's texts are spelled with these


def encode(text: str) -> list[int]:
    ids = []
    while text:
        piece = max((p for p in VOCABULARY if text.startswith(p)), key=len)
        ids.append(IDS[piece])
        text = text[len(piece) :]
    return ids


def decode(ids) -> str:
    return "".join(VOCABULARY[i] for i in ids)


def following(word: str) -> str:
    return "".join(LETTERS[(LETTERS.index(c) + 1) % len(LETTERS)] for c in word)


def problem(rng: random.Random) -> list[str]:
    return ["".join(rng.choices(LETTERS, k=2)) for _ in range(rng.randint(1, 3))]


def example(words: list[str]) -> training.Layout:
    """What the engine would show the model, were it to solve this problem: one packed row."""
    prompt = encode(" ".join(words) + "=")
    if len(words) == 1:
        return training.threadweaver(prompt, [encode(following(words[0]) + "<eos>")])
    outlines = "".join(f"<Outline>{i}: {word}</Outline>\n" for i, word in enumerate(words, 1))
    threads = training.Block(
        threads=[encode(f" {following(word)}</Thread>") for word in words],
        headers=[encode(FORMAT.header.replace("{id}", str(i + 1))) for i in range(len(words))],
        next_headers=[encode(FORMAT.next_header.replace("{id}", str(i + 1))) for i in range(len(words))],
        after=encode(FORMAT.after),
    )
    answer = "</Parallel>" + " ".join(map(following, words)) + "<eos>"
    return training.threadweaver(
        prompt, [encode(f"<Parallel>\n<Outlines>\n{outlines}</Outlines>"), threads, encode(answer)]
    )


def curve(losses: list[float], width: int = 60) -> str:
    """The loss as a line of blocks."""
    n = max(1, len(losses) // width)
    means = [sum(losses[i : i + n]) / len(losses[i : i + n]) for i in range(0, len(losses), n)]
    top = max(means)
    return "".join("▁▂▃▄▅▆▇█"[min(7, int(8 * m / top))] for m in means) + f"  {means[0]:.2f} → {means[-1]:.2f}"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("--quick", action="store_true", help="a few steps only")
    options.add_argument("--steps", type=int, default=500)
    options.add_argument("--picture", metavar="FILE", help="write the mask of one row here (png, svg, pdf)")
    options = options.parse_args()
    steps, batch_size, width = (12, 4, 32) if options.quick else (options.steps, 16, 96)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(VOCABULARY), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=3,
        num_attention_heads=width // 16, num_key_value_heads=width // 32, head_dim=16, max_position_embeddings=512,
        pad_token_id=0, bos_token_id=None, eos_token_id=IDS["<eos>"], tie_word_embeddings=True,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, attn_implementation="anabranch")

    # 1. One row, as the model will see it: the prompt, the outlines, each thread alone, and again behind its siblings.
    row = example(["ab", "de", "hj"])
    print(decode(row.input_ids), "\n")
    row.mask.show()
    if options.picture:
        row.mask.plot(options.picture, title="one training row")

    # 2. Train. Several rows are packed in one; nothing of the model is patched.
    rng, losses, begin = random.Random(0), [], time.time()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    collate = training.BranchCollator(logits="needed")
    for step in range(steps):
        batch = collate([example(problem(rng)) for _ in range(batch_size)])
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        if (step + 1) % max(1, steps // 8) == 0:
            print(f"step {step + 1:4}  loss {losses[-1]:.3f}  {time.time() - begin:4.0f} s", flush=True)
    print("\nloss  " + curve(losses), "\n")

    # 3. Let the engine run it: the model forks where it was taught to, and stays alone where one word is all there is.
    model.eval()
    engine = ab.Engine(model, num_pages=512)
    held_out = [problem(random.Random(f"held out {i}")) for i in range(4 if options.quick else 40)]
    prompts = [encode(" ".join(words) + "=") for words in held_out]
    results = engine.generate(prompts, strategy=FORMAT, max_new_tokens=120)
    right = forked = 0
    for words, result in zip(held_out, results, strict=True):
        right += decode(result.token_ids).endswith(" ".join(map(following, words)) + "<eos>")
        forked += result.metrics.num_threads == (len(words) if len(words) > 1 else 0)
    print(f"held-out problems: {forked} of {len(results)} forked as they should, {right} answered right")
    longest = max(results, key=lambda result: result.metrics.num_threads)
    print(decode(longest.prompt_token_ids), decode(longest.token_ids), sep="")

    # 4. What the engine showed the model and what training would show it are the same: its scores agree.
    layout = training.from_trace(longest)
    with torch.no_grad():
        logprobs = layout.logprobs(model)
    print(f"\n{len(logprobs)} sampled tokens; mean log-probability in a training forward {float(logprobs.mean()):.4f}")


if __name__ == "__main__":
    main()
