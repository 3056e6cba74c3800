"""The draft model's trainer: its words, and the model over the whole vocabulary that it ends with."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("reasoning_gym", reason="two families of problems are reasoning-gym's")

from training.adaptive.text import tokenizer as adaptive_tokenizer
from training.drafts import train
from training.from_nothing import logits_of, make_model

import anabranch as ab


@pytest.fixture(scope="module")
def made():
    """The tokenizer, the words of a dozen problems, these, and a model that was taught one of them."""
    tokenizer = adaptive_tokenizer()
    rows = list(itertools.islice(train.lessons("dev", 0, tokenizer), 12))
    words = train.Words({t for row, _ in rows for t in row.input_ids.tolist()}, tokenizer)
    torch.manual_seed(0)
    model = make_model(words, SimpleNamespace(width=64, layers=2, heads=2, hidden=96))
    forking = [made for made in rows if made[0].mask.num_segments > 3]
    known = min(forking, key=lambda made: made[0].num_tokens)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    untaught = train.check(model, [(words.of(known[0]), known[1])])
    for _ in range(250):
        logits, targets = logits_of(model, words.of(known[0]))
        loss = torch.nn.functional.cross_entropy(logits, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if loss.item() < 0.03:
            break
    assert untaught["guessed"] < 0.2
    return tokenizer, words, rows, model, known


def test_a_row_in_words_is_the_same_row(made):
    _, words, rows, *_ = made
    for row, _ in rows:
        short = words.of(row)
        assert [words.ids[i] for i in short.input_ids] == row.input_ids.tolist() and row in words
        assert torch.equal(short.learnt, row.learnt) and torch.equal(short.position_ids, row.position_ids)
    few = train.Words(set(rows[0][0].input_ids.tolist()), made[0])
    assert any(row not in few for row, _ in rows)


def test_the_whole_vocabulary_scores_words_alike_and_all_others_low(made):
    tokenizer, words, _, model, (row, _) = made
    whole = train.with_the_whole_vocabulary(model, words, [words.of(row)], len(tokenizer), 4096)
    others = torch.ones(len(tokenizer), dtype=torch.bool)
    others[torch.tensor(words.ids)] = False
    with torch.no_grad():
        small, targets = logits_of(model, words.of(row))
        large, all_targets = logits_of(whole, row)
    assert [words.ids[i] for i in targets] == all_targets.tolist()
    torch.testing.assert_close(large[:, torch.tensor(words.ids)], small)
    assert (large[:, others].amax(1) < small.amax(1)).float().mean() > 0.9
    assert whole.config.max_position_embeddings == 4096 and whole.config.eos_token_id == tokenizer.eos_token_id


def test_what_was_taught_is_guessed(made):
    """By the check, and by the runtime's draft tree."""
    tokenizer, words, _, model, (row, forked) = made
    share = train.check(model, [(words.of(row), forked)])
    assert share["guessed"] > 0.7 and share["guessed"] > share["four_in_a_row"] > 0.02
    draft = train.with_the_whole_vocabulary(model, words, [words.of(row)], len(tokenizer), 2048)
    prompt = row.input_ids[: int(row.learnt[0])].tolist()
    engine = ab.Engine(draft, tokenizer, num_pages=400)
    plain = engine.generate(prompt, strategy=ab.ThreadWeaver(), max_new_tokens=300)
    guessed = engine.generate(prompt, strategy=ab.DraftTree(ab.ThreadWeaver(), draft, width=1), max_new_tokens=300)
    assert guessed.tree == plain.tree
    assert guessed.metrics.steps * 2 < plain.metrics.steps
