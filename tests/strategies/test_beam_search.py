"""Beam search: Transformers' own, token for token; groups, budgets, company, pre-emption."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import pytest
import torch
from engine_kit import Dense, Recorder, assert_nothing_held, byte_tokenizer, make_engine, make_model
from hf_kit import FAMILIES, VOCAB, build
from transformers import LogitsProcessor

import anabranch as ab
from anabranch.engine import logprob_pairs
from anabranch.strategies import Strategy

PROMPT = [5, 6, 7, 8, 9, 10, 11]


def trimmed(sequence, eos):
    """A row of Transformers' output without its padding."""
    end = next((i + 1 for i, token in enumerate(sequence) if token in eos), len(sequence))
    return tuple(sequence[:end])


def draw(pick):
    """A prompt and options of a random search: (prompt, width, what the strategy takes, what the call takes)."""
    prompt = [pick.randrange(3, VOCAB) for _ in range(pick.randint(1, 9))]
    width = pick.randint(2, 6)
    search = {
        "length_penalty": pick.choice([1.0, 0.0, -1.0, 2.0, 0.6]),
        "early_stopping": pick.choice([True, False, "never"]),
        "num_return_sequences": pick.randint(1, width),
    }
    call = {
        "max_new_tokens": pick.randint(1, 18),
        "eos_token_id": pick.sample(range(3, VOCAB), pick.choice([1, 2, 3, 12, 30])),
    }
    if pick.random() < 0.4:
        call["repetition_penalty"] = pick.choice([1.3, 0.8])
    if pick.random() < 0.3:
        call["no_repeat_ngram_size"] = 2
    if pick.random() < 0.3:
        call["min_new_tokens"] = pick.randint(1, 5)
    if pick.random() < 0.3:
        call["bad_words_ids"] = [[5], [7, 9]]
    return prompt, width, search, call


def disagreements(family, seed, count):
    config, options = FAMILIES[family]
    theirs = build(config, attn="eager", **options)
    engine = ab.Engine(build(config, **options), num_pages=512, page_size=4)
    pick = random.Random(seed)
    found = []
    for _ in range(count):
        prompt, width, search, call = draw(pick)
        with torch.no_grad():
            rows = theirs.generate(
                torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), num_beams=width,
                do_sample=False, pad_token_id=0, **search, **call,
            )[:, len(prompt) :].tolist()  # fmt: skip
        expected = [trimmed(row, call["eos_token_id"]) for row in rows]
        result = engine.generate(prompt, strategy=ab.BeamSearch(width=width, **search), **call)
        if result.answers != expected or result.token_ids != expected[0]:
            found.append((width, search, call, expected, result.answers))
        assert_nothing_held(engine)
    return found


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt-oss", "mistral", "granite"])
def test_it_is_the_beam_search_of_transformers(family):
    assert disagreements(family, seed=len(family), count=8) == []


def test_width_one_decodes_plainly():
    engine = make_engine()
    plain = engine.generate(PROMPT, max_new_tokens=12)
    assert engine.generate(PROMPT, strategy=ab.BeamSearch(width=1), max_new_tokens=12).token_ids == plain.token_ids


def test_a_limit_of_its_own_and_stop_strings():
    engine = make_engine(tokenizer=byte_tokenizer())
    free = engine.generate("abc", strategy=ab.BeamSearch(width=3), max_new_tokens=8)
    short = engine.generate("abc", strategy=ab.BeamSearch(width=3, max_new_tokens=8), max_new_tokens=20)
    assert short.token_ids == free.token_ids and len(free.token_ids) == 8
    theirs = make_model()
    stop = next(c for c in free.text if c.isascii() and c.isprintable())
    rows = theirs.generate(
        torch.tensor([byte_tokenizer()("abc")["input_ids"]]), num_beams=3, max_new_tokens=8, stop_strings=[stop],
        tokenizer=byte_tokenizer(), do_sample=False,
    )  # fmt: skip
    stopped = engine.generate("abc", strategy=ab.BeamSearch(width=3), max_new_tokens=8, stop_strings=[stop])
    assert list(stopped.token_ids) == [t for t in rows[0, 3:].tolist() if t != 256]


@pytest.mark.parametrize(
    ("search", "limit", "length"),
    [
        (dict(early_stopping=False), 12, 1),
        (dict(early_stopping=True), 12, 1),
        (dict(early_stopping="never"), 12, 8),
        (dict(early_stopping="never"), 3, 1),
        (dict(early_stopping="never", length_penalty=0.0), 12, 1),
    ],
)
def test_never_stops_where_a_running_text_may_still_become_better(search, limit, length):
    """At once two texts end, at −0.1 and −0.2, and one is left at −0.6. It costs nothing from there on, so at its
    present length it is behind, but over 8 tokens it comes to −0.075: only by the longest it may get can that be told,
    if texts are judged by their length at all."""
    ends, long = (200, 201), 100

    def scores_of(input_ids, scores):
        out = torch.full_like(scores, -torch.inf)
        for row, context in enumerate(input_ids.tolist()):
            written = context[len(PROMPT) :]
            if not written:
                out[row, [*ends, long]] = torch.tensor([-0.1, -0.2, -0.6], dtype=scores.dtype)
            else:
                out[row, ends[0] if len(written) == 7 else long] = 0.0
        return out

    strategy = ab.BeamSearch(width=2, **search)
    options = dict(max_new_tokens=limit, eos_token_id=list(ends), logits_processor=[scores_of])
    engine = make_engine()
    assert engine.generate(PROMPT, strategy=strategy, **options).token_ids == (*[long] * (length - 1), ends[0])
    assert_nothing_held(engine)


# ------------------------------------------------------------------------------------------------ groups


class Hypotheses(list):
    """The finished texts of one group, by Transformers 4's rules: (score, tokens), at most `size`."""

    def __init__(self, size):
        super().__init__()
        self.size = size

    def add(self, score, tokens):
        if len(self) < self.size or score > min(self)[0]:
            self.append((score, tokens))
            if len(self) > self.size:
                self.remove(min(self))


def grouped(model, prompt, width, groups, penalty, eos, limit, length_penalty, early):
    """Group beam search as Transformers 4 has it, densely recomputed; without the padding of groups that are over."""
    size = width // groups
    beams = [[(0.0, ())] for _ in range(groups)]
    done, over = [Hypotheses(size) for _ in range(groups)], [False] * groups
    for length in range(1, limit + 1):
        taken = torch.zeros(VOCAB)
        for g in range(groups):
            if over[g]:
                continue
            ways = []
            for total, tokens in beams[g]:
                with torch.no_grad():
                    logp = model(torch.tensor([[*prompt, *tokens]])).logits[0, -1].float().log_softmax(-1)
                logp = logp - penalty * taken
                ways += [(total + float(logp[t]), (*tokens, t)) for t in range(VOCAB)]
            ways = sorted(ways, key=lambda way: -way[0])[: max(2, 1 + len(eos)) * size]
            following = []
            for at, (total, tokens) in enumerate(ways):
                if tokens[-1] in eos:
                    if at < size:
                        done[g].add(total / length**length_penalty, tokens)
                else:
                    following.append((total, tokens))
                if len(following) == size:
                    break
            beams[g] = following
            for _, tokens in following:
                taken[tokens[-1]] += 1
            if len(done[g]) == size:
                reach = limit if early == "never" and length_penalty > 0 else length
                over[g] = early is True or min(done[g])[0] >= ways[0][0] / reach**length_penalty
        if all(over):
            break
    for g in range(groups):
        if not over[g]:
            for total, tokens in beams[g]:
                done[g].add(total / length**length_penalty, tokens)
    return [tokens for _, tokens in sorted((d for g in done for d in g), key=lambda d: -d[0])]


@pytest.mark.parametrize("seed", range(4))
def test_groups_keep_away_from_one_another_as_in_transformers_4(seed):
    pick = random.Random(seed)
    model = build("LlamaConfig", attn="eager")
    engine = ab.Engine(build("LlamaConfig"), num_pages=512, page_size=4)
    for _ in range(3):
        prompt = [pick.randrange(3, VOCAB) for _ in range(4)]
        groups, limit = pick.choice([2, 3]), pick.randint(2, 7)
        width, penalty = groups * pick.randint(1, 2), pick.choice([0.5, 2.0])
        early, length_penalty = pick.choice([True, False, "never"]), pick.choice([0.0, 1.0, -1.0])
        eos = pick.sample(range(3, VOCAB), pick.choice([1, 3, 10]))
        expected = grouped(model, prompt, width, groups, penalty, eos, limit, length_penalty, early)
        strategy = ab.BeamSearch(
            width=width, num_beam_groups=groups, diversity_penalty=penalty, early_stopping=early,
            length_penalty=length_penalty, num_return_sequences=width,
        )  # fmt: skip
        result = engine.generate(prompt, strategy=strategy, max_new_tokens=limit, eos_token_id=eos)
        assert result.answers == expected[:width] and result.token_ids == expected[0]
        assert_nothing_held(engine)


# ------------------------------------------------------------------------------------------------ sampled beams


def test_sampled_beams_are_drawn_without_replacement():
    engine = make_engine()
    strategy = ab.BeamSearch(width=3, do_sample=True, sampling={"temperature": 2.0, "top_k": 0})
    results = [engine.generate(PROMPT, strategy=strategy, seed=s, max_new_tokens=1) for s in range(60)]
    assert len({r.token_ids for r in results}) > 5
    again = engine.generate(PROMPT, strategy=strategy, seed=7, max_new_tokens=1)
    assert again.tree == results[7].tree

    @dataclass(frozen=True)
    class Drawn(Strategy):
        def run(self, trunk):
            found = []
            for _ in range(300):
                found.append((yield trunk.candidates(2, sampling={"do_sample": True, "top_k": 3})))
            return found

    found = engine.generate(PROMPT, strategy=Drawn(), max_new_tokens=2).answers
    with torch.no_grad():
        p = make_model()(torch.tensor([PROMPT])).logits[0, -1].softmax(-1)
    top = p.topk(3)
    share = top.values / top.values.sum()
    firsts = [f.token_ids[0] for f in found]
    assert all(len(set(f.token_ids)) == 2 and set(f.token_ids) <= set(top.indices.tolist()) for f in found)
    for token, expected in zip(top.indices.tolist(), share.tolist(), strict=True):
        spread = (expected * (1 - expected) / 300) ** 0.5
        assert abs(firsts.count(token) / 300 - expected) < 4 * spread + 0.01


# ------------------------------------------------------------------------------------------------ company and traces


SEARCHES = [
    ab.BeamSearch(width=4, num_return_sequences=3),
    ab.BeamSearch(width=4, num_beam_groups=2, diversity_penalty=1.0),
    ab.BeamSearch(width=3, do_sample=True),
]


@pytest.mark.parametrize("strategy", SEARCHES, ids=["plain", "groups", "sampled"])
def test_alone_in_a_batch_in_turn_and_after_a_pre_emption(strategy):
    prompts = [[20 + i, 3, 4 + i] for i in range(16)]
    roomy = make_engine(num_pages=2000)
    options = dict(max_new_tokens=10, eos_token_id=[258, 135, 41])
    alone = [roomy.generate(p, strategy=strategy, seed=i, **options) for i, p in enumerate(prompts)]
    together = roomy.generate(prompts, strategy=strategy, seed=list(range(16)), **options)
    assert [r.tree for r in together] == [r.tree for r in alone]
    few = make_engine(num_pages=10, max_rows=7)
    tight = few.generate(prompts[:3], strategy=strategy, seed=[0, 1, 2], **options)
    assert [r.tree for r in tight] == [r.tree for r in alone[:3]]
    assert sum(r.metrics.preemptions for r in tight) > 0
    in_turn = roomy.generate(prompts[0], strategy=ab.Sequential(strategy), seed=0, **options)
    assert in_turn.tree == alone[0].tree
    for engine in (roomy, few):
        assert_nothing_held(engine)


def test_logits_metrics_and_replay():
    engine, recorder = make_engine(), Recorder()
    strategy = ab.BeamSearch(width=4)
    options = dict(max_new_tokens=12, logprobs=True, eos_token_id=None)
    result = engine.generate(PROMPT, strategy=strategy, logits_processor=[recorder], **options)
    seen = {context: scores for context, scores in recorder.seen}
    contexts = list(seen)
    with torch.no_grad():
        for context in contexts:
            expected = make_model()(torch.tensor([context])).logits[0, -1].log_softmax(-1)
            torch.testing.assert_close(seen[context], expected, atol=2e-4, rtol=2e-4)
    assert len(contexts) == 1 + 4 * 11  # every beam's row, and each once
    assert Dense(result, "llama").ids  # the tree holds together
    metrics = result.metrics
    assert metrics.sampled_tokens == metrics.total_tokens == 4 * 12 and metrics.max_concurrency == 4
    assert metrics.critical_path_tokens == 12
    assert metrics.rows == len(PROMPT) + 4 * 11  # not a row is computed twice
    again = ab.replay(result, engine)
    assert max(abs(a - b) for a, b in logprob_pairs(result, again)) < 1e-4
    assert_nothing_held(engine)


def test_beams_share_their_pages():
    engine = make_engine(page_size=4)
    result = engine.generate([1] * 40, strategy=ab.BeamSearch(width=4), max_new_tokens=20)
    assert result.metrics.tokens_physical_peak < 40 + 4 * 20 and result.metrics.sharing > 2.0
    assert result.metrics.pages_copied <= 4 * 20  # at most the page that a beam writes on


def test_a_budget_ends_the_search_with_the_best_so_far():
    engine = make_engine()
    for budget in range(1, 40, 3):
        result = engine.generate(
            PROMPT, strategy=ab.BeamSearch(width=3), max_new_tokens=12, max_total_tokens=budget, eos_token_id=[41, 135]
        )
        assert result.metrics.sampled_tokens <= budget
        assert_nothing_held(engine)


def test_a_grammar_that_leaves_nothing():
    """Beams without a continuation fall out; where none is left and none has ended, the processors are named."""

    class Only(LogitsProcessor):
        def __init__(self, follow):
            self.follow = follow

        def __call__(self, input_ids, scores):
            mask = torch.full_like(scores, -torch.inf)
            for row, last in enumerate(input_ids[:, -1].tolist()):
                mask[row, self.follow.get(last, [])] = 0
            return scores + mask

    engine = make_engine()
    options = dict(strategy=ab.BeamSearch(width=4), max_new_tokens=8)
    dead_ends = Only({11: [20, 21, 22], 20: [30], 30: [258], 21: [31]})
    result = engine.generate(PROMPT, logits_processor=[dead_ends], **options)
    assert result.token_ids == (20, 30, 258) and result.answers == [(20, 30, 258)]
    for groups in (1, 2):
        strategy = ab.BeamSearch(width=4, num_beam_groups=groups)
        with pytest.raises(ValueError, match="no token can follow any beam"):
            engine.generate(PROMPT, strategy=strategy, logits_processor=[Only({11: [20]})], max_new_tokens=8)
        assert_nothing_held(engine)
    with pytest.raises(ValueError, match="a score is nan"):
        engine.generate(PROMPT, logits_processor=[lambda ids, scores: scores * torch.nan], **options)
    with pytest.raises(ValueError, match="made scores of shape"):
        engine.generate(PROMPT, logits_processor=[lambda ids, scores: scores[:, :5]], **options)
    assert_nothing_held(engine)


def test_the_call_may_ask_for_sampled_beams():
    engine = make_engine()
    options = dict(max_new_tokens=6, do_sample=True, seed=3)
    by_call = engine.generate(PROMPT, strategy=ab.BeamSearch(width=3), **options)
    assert by_call.tree == engine.generate(PROMPT, strategy=ab.BeamSearch(width=3, do_sample=True), **options).tree
    sure = engine.generate(PROMPT, strategy=ab.BeamSearch(width=3, do_sample=False), **options)
    assert sure.tree == engine.generate(PROMPT, strategy=ab.BeamSearch(width=3), max_new_tokens=6).tree != by_call.tree


def test_a_search_is_told_as_it_happens():
    engine = make_engine()
    events = list(engine.stream(PROMPT, strategy=ab.BeamSearch(width=3), max_new_tokens=10))
    written = {"0": ()} | {f"0.{i}": () for i in range(9)}
    for event in events:
        if isinstance(event, ab.records.Become):
            written[event.thread] = written[event.source]
        elif isinstance(event, ab.records.Token):
            written[event.thread] += event.token_ids
    assert any(isinstance(event, ab.records.Become) for event in events)
    result = events[-1].result
    winner = next(kid for kid in result.tree.children if kid.fate == "joined")
    assert written[winner.id] == result.token_ids


# ------------------------------------------------------------------------------------------------ bad fields


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(width=0), "BeamSearch: width=0"),
        (dict(width=3, num_return_sequences=4), "num_return_sequences=4 of width=3"),
        (dict(width=4, num_beam_groups=3), "num_beam_groups=3 does not divide width=4"),
        (dict(diversity_penalty=1.0), "diversity_penalty needs num_beam_groups"),
        (dict(early_stopping="sometimes"), "early_stopping='sometimes'"),
        (dict(early_stopping=1), "early_stopping=1"),
        (dict(length_penalty=float("nan")), "BeamSearch: length_penalty"),
        (dict(num_beam_groups=2, do_sample=True), "do_sample=True with num_beam_groups"),
    ],
)
def test_a_beam_search_checks_its_fields(change, message):
    with pytest.raises(ValueError, match=message):
        ab.BeamSearch(**change)
    assert replace(ab.BeamSearch(), width=5) == eval("ab." + repr(ab.BeamSearch(width=5)))
