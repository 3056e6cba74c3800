"""ThreadWeaver by hand in ten model families: token for token, position for position, every row's scores exact.

A row's oracle is the model's own eager forward, with Transformers' own masks, over the row's whole context as one flat
sequence: that is what the format promises at every point.
"""

from __future__ import annotations

import pytest
import torch
from engine_kit import EOS, VOCAB, assert_nothing_held
from hf_kit import FAMILIES, build
from threadweaver_kit import TAGS, Polite, by_the_rules, tag_tokenizer
from threadweaver_kit import ids as bytes_and_tags
from transformers import LogitsProcessor

import anabranch as ab
from anabranch.strategies import ThreadWeaver

TEN = [family for family in FAMILIES if family != "llama-mha" and "deepseek" not in family]
# Ids of a small vocabulary: the tags, then what headers, outlines and answers are spelled with.
PIECES = {piece: 3 + i for i, piece in enumerate([*TAGS, "<eos>", *"\n:12 .abcdefq"])}


def ids(text: str) -> tuple[int, ...]:
    out, at = [], 0
    while at < len(text):
        piece = next(p for p in sorted(PIECES, key=len, reverse=True) if text.startswith(p, at))
        out.append(PIECES[piece])
        at += len(piece)
    return tuple(out)


# Two prompts: one block of two threads; two blocks, the second of one thread, and threads of unlike lengths. The
# windows of the families with sliding layers are 6 tokens: far shorter than any context here.
HEAD = "aa<Parallel><Outlines><Outline>1: a</Outline><Outline>2: b</Outline></Outlines>"
JOINED = "\n<Thread>\n1: cad</Thread><Thread>\n2: fb.ed</Thread>\n"
MORE = "</Parallel>ab<Parallel><Outlines><Outline>2.1:c</Outline></Outlines>"
LINES = [
    ("q", HEAD),
    ("q" + HEAD + "\n<Thread>\n1:", " cad</Thread>"),
    ("q" + HEAD + "\n<Thread>\n2:", " fb.ed</Thread>"),
    ("q" + HEAD + JOINED, "</Parallel>. ab<eos>"),
    ("qqq", HEAD),
    ("qqq" + HEAD + "\n<Thread>\n1:", " c</Thread>"),
    ("qqq" + HEAD + "\n<Thread>\n2:", " fff fff</Thread>"),
    ("qqq" + HEAD + "\n<Thread>\n1: c</Thread><Thread>\n2: fff fff</Thread>\n", MORE),
]
SECOND = "qqq" + HEAD + "\n<Thread>\n1: c</Thread><Thread>\n2: fff fff</Thread>\n" + MORE
LINES += [
    (SECOND + "\n<Thread>\n2.1:", "dd</Thread>"),
    (SECOND + "\n<Thread>\n2.1:dd</Thread>\n", "</Parallel>.<eos>"),
]
ANSWERS = {
    "q": (HEAD + JOINED + "</Parallel>. ab<eos>", ["\n<Thread>\n1: cad</Thread>", "\n<Thread>\n2: fb.ed</Thread>"]),
    "qqq": (
        SECOND[3:] + "\n<Thread>\n2.1:dd</Thread>\n</Parallel>.<eos>",
        ["\n<Thread>\n1: c</Thread>", "\n<Thread>\n2: fff fff</Thread>", "\n<Thread>\n2.1:dd</Thread>"],
    ),
}


class Hand(LogitsProcessor):
    """Makes the model say what is written, and keeps the scores it had: context → scores."""

    def __init__(self) -> None:
        self.next: dict[tuple[int, ...], int] = {}
        self.seen: dict[tuple[int, ...], torch.Tensor] = {}
        for before, says in LINES:
            context = ids(before)
            for token in ids(says):
                assert self.next.setdefault(context, token) == token, "the script contradicts itself"
                context += (token,)

    def __call__(self, input_ids, scores):
        context = tuple(input_ids[0].tolist())
        assert context not in self.seen, "asked twice"
        self.seen[context] = scores[0].clone()
        return torch.full_like(scores, -torch.inf).index_fill(-1, torch.tensor(self.next[context]), 0.0)


@pytest.mark.parametrize("family", TEN)
def test_traces_by_hand_in_ten_families(family):
    config_class, options = FAMILIES[family]
    model, eager = build(config_class, **options), build(config_class, attn="eager", **options)
    engine = ab.Engine(model, num_pages=160, page_size=4, max_rows=24)
    strategy = ThreadWeaver(pieces=PIECES)
    prompts = [list(ids(p)) for p in ANSWERS]
    shared = dict(strategy=strategy, max_new_tokens=150, eos_token_id=PIECES["<eos>"], top_k=0)
    trees = []
    for sampling in ({}, {"do_sample": True, "temperature": 0.7}):
        for batch in ([prompts[0]], prompts):
            hand = Hand()
            results = engine.generate(batch, logits_processor=[hand], seed=11, **shared, **sampling)
            assert_nothing_held(engine)
            compared = 0
            for result, (answer, threads) in zip(results, ANSWERS.values(), strict=False):
                assert result.token_ids == ids(answer) and result.malformed == ()
                flat = [*result.prompt_token_ids, *ids(answer)]
                assert [t for run in result.tree.runs for t in run.token_ids] == flat
                places = [run.position + i for run in result.tree.runs for i in range(len(run.token_ids))]
                assert places == list(range(len(flat)))  # dense: the threads one behind another
                assert [kid.token_ids for kid in result.tree.children] == [ids(t) for t in threads]
                contexts = [flat]
                for kid in result.tree.children:
                    assert kid.start == kid.forked_at and kid.stop == kid.start + len(kid.token_ids)
                    contexts.append([*flat[: kid.forked_at], *kid.token_ids])
                compared += exact(eager, contexts, hand.seen, len(result.prompt_token_ids))
            assert compared == len(hand.seen) == sum(r.metrics.sampled_tokens for r in results)
            trees.append([r.tree for r in results])
    assert trees[0] == trees[1][:1] and trees[2] == trees[3][:1]


def exact(eager, contexts: list[list[int]], seen: dict[tuple[int, ...], torch.Tensor], prompt: int) -> int:
    """Compare the scores of every recorded prefix of `contexts`; how many there were."""
    compared: set[tuple[int, ...]] = set()
    for context in contexts:
        with torch.no_grad():
            logits = eager(torch.tensor([context]), use_cache=False).logits[0]
        for length in range(prompt, len(context)):
            key = tuple(context[:length])
            if key in seen and key not in compared:
                compared.add(key)
                torch.testing.assert_close(seen[key], logits[length - 1], atol=2e-4, rtol=2e-4)
    return len(compared)


@pytest.mark.parametrize("family", TEN)
def test_what_a_model_draws_itself_is_what_the_bare_rules_draw(family):
    """Sampled by the seed, not by the script: nothing but whole eager forwards of flat contexts gives the same answer,
    for the prompt alone and beside another."""
    config_class, options = FAMILIES[family]
    options = options | {"vocab_size": VOCAB}
    eager = build(config_class, attn="eager", **options)
    prompt = list(bytes_and_tags("why"))
    answer, threads = by_the_rules(eager, prompt, 6)
    engine = ab.Engine(build(config_class, **options), tag_tokenizer(), num_pages=400, page_size=4)
    call = dict(
        strategy=ThreadWeaver(), logits_processor=[Polite()], max_new_tokens=300, top_k=0, do_sample=True,
        eos_token_id=EOS,
    )  # fmt: skip
    alone = engine.generate(prompt, seed=6, **call)
    beside = engine.generate([list(bytes_and_tags("so")), prompt], seed=[1, 6], **call)[1]
    assert list(alone.token_ids) == answer and [list(k.token_ids) for k in alone.tree.children] == threads
    assert len(threads) >= 4 and alone.malformed == () and beside.tree == alone.tree
    assert_nothing_held(engine)
