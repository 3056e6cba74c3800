"""Trains a draft model for the adapted SmolLM2 from nothing, on one core:

    python -m training.drafts.train --out runs/drafts --minutes 15 --autocast
    python -m benchmarks drafts --model smollm2-adaptive --draft-model runs/drafts/draft

It learns what the adapted model learnt, the same problems in the same layout: there a token's ancestors are just what
`DraftTree` shows a draft model, its thread's context as a flat row. It has words for the tokens of these problems alone
while it is trained, which is a fiftieth of the vocabulary; what is saved at the end has all of it, as a draft model
must. Every line of log.jsonl is a check on dev problems: how many tokens of a forked run it would have guessed.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from anabranch.training import IGNORE, Layout
from training.adaptive.families import problems
from training.adaptive.text import lesson_of
from training.adaptive.text import tokenizer as adaptive_tokenizer
from training.adaptive.wider import ALL
from training.from_nothing import Clock, logits_of, make_model, options, train

UNLIKELY = -30.0  # about the score of a token that the draft model has no word for


class Words:
    """The tokens that a draft model is trained on, as numbers from 0."""

    def __init__(self, ids: set[int], tokenizer: Any) -> None:
        special = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
        self.ids = sorted(ids | set(special))
        self.number = {token: i for i, token in enumerate(self.ids)}
        self.bos_token_id, self.eos_token_id, self.pad_token_id = (self.number[token] for token in special)

    def __len__(self) -> int:
        return len(self.ids)

    def __contains__(self, row: Layout) -> bool:
        return all(token in self.number for token in row.input_ids.tolist())

    def of(self, row: Layout) -> Layout:
        """The same row in these numbers, with loss where it has some."""
        numbers = torch.tensor([self.number[token] for token in row.input_ids.tolist()])
        return replace(row, input_ids=numbers, labels=torch.where(row.labels != IGNORE, numbers, IGNORE))


def lessons(split: str, seed: int, tokenizer: Any) -> Iterator[tuple[Layout, torch.Tensor]]:
    """Rows without end, and which of their tokens a forked run writes."""
    for problem in problems(split, seed, ALL, drills=0.1 if split == "train" else 0.0, makers=ALL):
        made = lesson_of(problem, tokenizer)
        yield made.row, made.forked


def batches(rows: list[Layout], tokens: int, rng: random.Random) -> Iterator[list[Layout]]:
    """Endless batches of about so many tokens, pass after pass in another order."""
    batch: list[Layout] = []
    while True:
        for row in rng.sample(rows, len(rows)):
            batch.append(row)
            if sum(x.num_tokens for x in batch) >= tokens:
                yield batch
                batch = []


@torch.no_grad()
def check(model: Any, dev: list[tuple[Layout, torch.Tensor]]) -> dict[str, Any]:
    """Share of the tokens of forked runs that the model finds likeliest, and of runs of four such tokens."""
    model.eval()
    right: list[bool] = []
    runs: list[bool] = []
    for row, forked in dev:
        logits, targets = logits_of(model, row)
        good = (logits.argmax(-1) == targets)[forked[row.learnt]].tolist()
        right += good
        runs += [all(good[i : i + 4]) for i in range(len(good) - 3)]
    model.train()
    return {"guessed": round(sum(right) / len(right), 4), "four_in_a_row": round(sum(runs) / len(runs), 4)}


@torch.no_grad()
def with_the_whole_vocabulary(model: Any, words: Words, dev: list[Layout], vocabulary: int, longest: int) -> Any:
    """The model over all tokens of the target model. One that it has no word for reads as the mean of those it has, and
    is scored low: what the last layer gives for `dev`, times its row of the head, comes as near to `UNLIKELY` as can be
    (a head has no bias)."""
    batches = [row.batch() for row in dev]
    keys = ("input_ids", "position_ids", "branch_mask")
    last = [model.model(**{k: batch[k] for k in keys}, use_cache=False).last_hidden_state[0] for batch in batches]
    hidden = torch.cat(last)
    low = torch.linalg.lstsq(hidden, torch.full((len(hidden), 1), UNLIKELY)).solution[:, 0]
    config = type(model.config).from_dict({
        **model.config.to_dict(), "vocab_size": vocabulary, "max_position_embeddings": longest,
        **{name: words.ids[getattr(words, name)] for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
    })  # fmt: skip
    whole = type(model)._from_config(config, attn_implementation="anabranch")
    weights = model.state_dict()
    fillers = {
        "model.embed_tokens.weight": weights["model.embed_tokens.weight"].mean(0),
        "lm_head.weight": low,
    }
    for name, filler in fillers.items():
        every = filler.repeat(vocabulary, 1)
        every[torch.tensor(words.ids)] = weights[name]
        weights[name] = every
    whole.load_state_dict(weights)
    return whole.eval()


def main() -> None:
    parser = options(__doc__, minutes=30.0, decay=0.5, ramp=0.0, every=180.0)
    parser.set_defaults(layers=2)
    parser.add_argument("--tokens", type=int, default=3000, help="of a batch")
    parser.add_argument("--count", type=int, default=6000, help="training problems")
    parser.add_argument("--autocast", action="store_true", help="matrix products in bfloat16, for CPUs that have them")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer = adaptive_tokenizer()
    made = [row for row, _ in itertools.islice(lessons("train", 1, tokenizer), args.count)]
    words = Words({token for row in made for token in row.input_ids.tolist()}, tokenizer)
    rows = [words.of(row) for row in made]
    held_out = itertools.islice(((r, f) for r, f in lessons("dev", 0, tokenizer) if r in words), 48)
    dev = [(words.of(row), forked) for row, forked in held_out]
    print(f"{len(rows)} problems of {sum(r.num_tokens for r in rows)} tokens, {len(words)} different ones", flush=True)
    model = make_model(words, args)
    train(
        model,
        batches(rows, args.tokens, random.Random(args.seed)),
        args,
        Clock(args),
        counts=lambda tokens, seen: {"tokens": tokens, "problems": seen},
        check=lambda: check(model, dev),
        autocast=args.autocast,
    )
    whole = with_the_whole_vocabulary(model, words, [row for row, _ in dev], len(tokenizer), 8192)
    whole.save_pretrained(args.out / "draft")
    tokenizer.save_pretrained(args.out / "draft")


if __name__ == "__main__":
    main()
