"""Workers that read each other's tokens while they write (Group Think, Hsu et al. 2025, arXiv 2505.11107).

    python examples/group_think.py

All of them write into one branch. Each has a range of positions of its own, so to the model every worker's text is one
run; and a step gives every worker a row, which sees whatever anybody wrote before it:

                 A B C  A B C      one column a token, in the order it was written
    step 1  A    █ · ·
            B    █ █ ·
            C    █ █ █
    step 2  A    █ █ █  █ · ·
            B    █ █ █  █ █ ·
            C    █ █ █  █ █ █

That is one chunk of rows on one branch: what they share is read once a step, and nothing is ever copied or joined.
Takes SmolLM2-135M-Instruct where it is installed, else a tiny random model. Neither was trained for this, so the text
is no better for it; what the example shows is the loop, and it ends by computing all scores the slow way.
"""

import torch
from huggingface_model import QUESTION, load

import anabranch as ab

HEADERS = ["\nAnn:", "\nBob:", "\nCyd:"]
TOKENS, ROOM = 16, 32  # a worker writes; positions kept for it


@torch.no_grad()
def main() -> None:
    model, encode, decode = load()
    cache = ab.TreeCache.for_model(model, num_pages=256)
    branch = cache.branch()
    fed: list[tuple[int, int]] = []  # every token in the order it was written, and its position

    def run(rows: list[tuple[int, int]], branch: ab.Branch) -> torch.Tensor:
        """One forward over (token, position) of every row: [rows, vocabulary]."""
        ids, positions = (torch.tensor(column, device=cache.device) for column in zip(*rows, strict=True))
        step = cache.step({branch: len(rows)}, {branch: positions})
        options = dict(position_ids=positions[None], tree_step=step, use_cache=False)
        return model(input_ids=ids[None], **options).logits[0]

    def write(runs: list[tuple[int, list[int]]]) -> torch.Tensor:
        """Goes on with tokens, each run from its position. Returns the scores behind every run, [runs, vocabulary]."""
        rows = [(token, at + i) for at, tokens in runs for i, token in enumerate(tokens)]
        fed.extend(rows)
        ends = torch.tensor([len(tokens) for _, tokens in runs]).cumsum(0) - 1
        return run(rows, branch)[ends]

    prompt = encode(f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n")
    write([(0, prompt)])

    # Everybody's header, then one token each a step. Rows are in the order of the workers.
    starts = [len(prompt) + ROOM * i for i in range(len(HEADERS))]
    texts = [encode(header) for header in HEADERS]
    scores = [write(list(zip(starts, texts, strict=True)))]
    for _ in range(TOKENS):
        for text, token in zip(texts, scores[-1].argmax(-1).tolist(), strict=True):
            text.append(token)
        ends = [at + len(text) - 1 for at, text in zip(starts, texts, strict=True)]
        scores.append(write([(at, text[-1:]) for at, text in zip(ends, texts, strict=True)]))
    for text in texts:
        print(f"  {decode(text)!r}")
    print(f"  {cache.usage()}")

    # The slow way: all tokens as they were written, in one pass.
    every = run(fed, cache.branch())
    torch.testing.assert_close(torch.cat(scores[1:]), every[-TOKENS * len(HEADERS) :], rtol=1e-3, atol=1e-3)
    print("every row saw all that had been written before it")


if __name__ == "__main__":
    main()
