"""`DraftTree`: the same tokens as without drafts, whatever is guessed, in fewer steps where the guesses are good."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch
from draft_kit import Guesses, Known, drafted
from engine_kit import (
    EOS,
    SIZES,
    VOCAB,
    Nested,
    Recorder,
    assert_dense,
    assert_nothing_held,
    byte_tokenizer,
    make_engine,
)
from programs_of_threads import Anything, Everything
from transformers import LlamaConfig, LlamaForCausalLM

import anabranch as ab
from anabranch.engine.drafts import Ahead, Draft, Odds, Pace, least_chance
from anabranch.strategies import EntropyFork, Plain, SelfConsistency, Sequential, Strategy, first

PROMPT = [5, 6, 7, 8, 5, 6, 7, 8, 5, 6]
KINDS = ("random", "right", "wrong", "second", "mixed")


def tiny_model(vocabulary: int = VOCAB, seed: int = 0, spread: float = 0.3) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    small = dict(
        vocab_size=vocabulary, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, initializer_range=spread,
    )  # fmt: skip
    if vocabulary < VOCAB:
        small |= dict(bos_token_id=None, eos_token_id=None, pad_token_id=None)
    return LlamaForCausalLM._from_config(LlamaConfig(**SIZES | small), attn_implementation="anabranch").eval()


def compare(engine, strategy, guesses, known, monkeypatch, prompt=PROMPT, settings=None, **options):
    """The same trees with drafts as without; both results, plain first."""
    many = isinstance(prompt[0], list)
    plain = known.watching(monkeypatch, lambda: engine.generate(prompt, strategy=strategy, **options))
    wrapped = drafted(strategy, guesses, **(settings or {}))
    with_drafts = engine.generate(prompt, strategy=wrapped, **options)
    for one, other in zip(plain if many else [plain], with_drafts if many else [with_drafts], strict=True):
        assert other.tree == one.tree
        assert other.answers == one.answers and other.malformed == one.malformed
        for name in ("sampled_tokens", "inserted_tokens", "critical_path_tokens", "total_tokens", "longest_context"):
            assert other.metrics[name] == one.metrics[name], name
        logs = [[node.log for node in result.tree.walk()] for result in (one, other)]
        if not wrapped.in_step:  # children that kill themselves do so in any order
            logs = [[sorted(map(repr, log)) for log in part] for part in logs]
        assert logs[0] == logs[1]
        assert 0 <= other.metrics.accepted_tokens <= other.metrics.draft_tokens
        assert other.metrics.accepted_tokens <= other.metrics.sampled_tokens
    assert_nothing_held(engine)
    return plain, with_drafts


@pytest.mark.parametrize(("family", "kind"), [*(("llama", kind) for kind in KINDS), ("qwen3", "mixed")])
def test_same_tokens_whatever_is_guessed(family, kind, monkeypatch):
    engine, known = make_engine(family), Known()
    guesses = Guesses(kind, known, VOCAB)
    saved = 0
    strategies = (None, Nested(), Sequential(Nested()), SelfConsistency(3), EntropyFork(3.0, 3, min_confidence=4.0))
    for seed, strategy in enumerate(strategies):
        plain, with_drafts = compare(
            engine, strategy, guesses, known, monkeypatch, seed=seed, max_new_tokens=30, eos_token_id=None,
            do_sample=bool(seed % 2), logprobs=True,
        )  # fmt: skip
        saved += plain.metrics.steps - with_drafts.metrics.steps
        assert with_drafts.metrics.draft_tokens > 0
        if kind == "wrong":
            assert with_drafts.metrics.accepted_tokens == 0
        if kind == "right" and strategy is None:
            assert with_drafts.metrics.steps <= 8  # 30 tokens, 5 and then 7 a step
            assert with_drafts.metrics.accepted_tokens == with_drafts.metrics.draft_tokens
    assert guesses.closed == len(strategies)
    assert saved >= {"right": 30, "second": 20, "mixed": 10, "random": 0, "wrong": 0}[kind], saved


def test_random_programs(monkeypatch):
    engine = ab.Engine(tiny_model(), byte_tokenizer(), num_pages=4000, page_size=4)
    accepted = 0
    for number in range(16):
        rng, known = random.Random(number), Known()
        strategy = rng.choice([Anything(number), Everything(number, VOCAB - 4)])
        if rng.random() < 0.2:
            strategy = Sequential(strategy)
        prompts = [[rng.randrange(200) for _ in range(rng.randint(1, 20))] for _ in range(rng.choice([1, 1, 2, 5]))]
        options = dict(
            seed=[rng.randrange(1000) for _ in prompts],
            max_new_tokens=rng.randint(8, 40),
            eos_token_id=rng.choice([None, EOS, [EOS, *range(30)]]),
            do_sample=rng.random() < 0.5,
            repetition_penalty=rng.choice([1.0, 1.3]),
            min_new_tokens=rng.choice([None, 5]),
            logprobs=rng.random() < 0.5,
        )
        guesses = Guesses(rng.choice(["mixed", "second", "random", "right"]), known, VOCAB, number)
        _, with_drafts = compare(engine, strategy, guesses, known, monkeypatch, prompt=prompts, **options)
        accepted += sum(result.metrics.accepted_tokens for result in with_drafts)
        for draft in ("ngram", "siblings"):
            again = engine.generate(prompts, strategy=ab.DraftTree(strategy, draft), **options)
            assert [result.tree for result in again] == [result.tree for result in with_drafts], (number, draft)
    assert accepted > 200


def test_pages_short(monkeypatch):
    """Drafts go first, then threads as without drafts: the same trees, and an end."""
    roomy = ab.Engine(tiny_model(), byte_tokenizer(), num_pages=4000, page_size=4)
    preempted = accepted = 0
    for number in range(8):
        rng, known = random.Random(number), Known()
        strategy = rng.choice([Anything(number), SelfConsistency(4, max_new_tokens=20)])
        prompts = [[rng.randrange(200) for _ in range(rng.randint(1, 20))] for _ in range(3)]
        options = dict(seed=number, max_new_tokens=30, eos_token_id=None, do_sample=True)
        plain = known.watching(monkeypatch, lambda s=strategy, p=prompts, o=options: roomy.generate(p, strategy=s, **o))
        peak = max(result.metrics.tokens_physical_peak for result in plain)
        size = rng.choice([1, 2, 4])
        tight = ab.Engine(
            tiny_model(), byte_tokenizer(), num_pages=peak // 2 // size + 12, page_size=size,
            max_rows=rng.choice([3, 16, 512]), max_threads=rng.choice([None, 2]),
        )  # fmt: skip
        for settings in ({}, {"in_step": True}):
            wrapped = drafted(strategy, Guesses("mixed", known, VOCAB, number), **settings)
            results = tight.generate(prompts, strategy=wrapped, **options)
            assert [result.tree for result in results] == [result.tree for result in plain]
            assert_nothing_held(tight)
            preempted += sum(result.metrics.preemptions for result in results)
            accepted += sum(result.metrics.accepted_tokens for result in results)
    assert preempted > 5 and accepted > 50


def test_no_pages_for_drafts(monkeypatch):
    """A prompt that fits to the page is served as without drafts, which get what is left over."""
    known, size = Known(), 4
    model = tiny_model()
    roomy = ab.Engine(model, num_pages=100, page_size=size)
    options = dict(max_new_tokens=20, eos_token_id=None)
    plain = known.watching(monkeypatch, lambda: roomy.generate(PROMPT, **options))
    tight = ab.Engine(model, num_pages=-(-(len(PROMPT) + 19) // size), page_size=size)
    result = tight.generate(PROMPT, strategy=drafted(None, Guesses("right", known, VOCAB)), **options)
    assert result.tree == plain.tree and result.metrics.preemptions == 0
    assert_nothing_held(tight)


@pytest.mark.parametrize("tokens", [1, 2, 3, 11])
@pytest.mark.parametrize("limit", ["of the decode", "max_new_tokens", "max_total_tokens"])
def test_right_guesses_take_no_row_that_plain_decoding_does_not(limit, tokens, monkeypatch):
    """The token that a limit ends with leads to nothing, so it is not guessed: nobody needs the scores behind it."""

    class Limited(Strategy):
        def run(self, trunk):
            yield trunk.decode(tokens if limit == "of the decode" else None)

    engine, known = make_engine(prefix_cache=False), Known()
    options = {"max_new_tokens": 40} | ({} if limit == "of the decode" else {limit: tokens})
    guesses = Guesses("right", known, VOCAB)
    plain, with_drafts = compare(engine, Limited(), guesses, known, monkeypatch, eos_token_id=None, **options)
    assert plain.metrics.sampled_tokens == tokens
    assert with_drafts.metrics.rows == plain.metrics.rows == len(PROMPT) + tokens - 1
    drafts = with_drafts.metrics  # of each step all tokens but the last were guessed
    assert drafts.draft_tokens == drafts.accepted_tokens == tokens - drafts.steps and drafts.steps <= 2


@pytest.mark.parametrize("budget", [1, 7, 23, 40])
def test_budget_to_the_token(budget, monkeypatch):
    """A budget over all threads is spent in the same order: they stay in step."""
    engine, known = make_engine(tokenizer=byte_tokenizer()), Known()
    for kind in ("right", "mixed", "second"):
        plain, _ = compare(
            engine, SelfConsistency(4, vote=len), Guesses(kind, known, VOCAB), known, monkeypatch,
            max_new_tokens=30, eos_token_id=list(range(20)), max_total_tokens=budget,
        )  # fmt: skip
        assert plain.metrics.sampled_tokens <= budget


def test_who_is_first(monkeypatch):
    """Where it matters who is done first, threads stay in step; else a right guess gets its thread ahead."""

    class Race(Strategy):
        def run(self, trunk):
            kids = trunk.fork([[10], [20, 21], [30]])
            decodes = [kid.decode(n) for kid, n in zip(kids, (9, 6, 8), strict=True)]
            at, _ = yield first(*decodes)
            for i, kid in enumerate(kids):
                if i != at:
                    kid.kill()
            trunk.join(kids[at])
            return at

    engine, known = make_engine(), Known()

    class Favourite(Guesses):
        def propose(self, asks):
            return [self._right(ask) if ask.thread.id == "0.0" else [] for ask in asks]

    plain, with_drafts = compare(
        engine, Race(), Favourite("right", known, VOCAB), known, monkeypatch, eos_token_id=None
    )
    assert plain.answers == 1 and with_drafts.metrics.accepted_tokens > 0
    for number in range(8):
        strategy = Everything(number, VOCAB - 4, races=True)
        compare(
            ab.Engine(tiny_model(), byte_tokenizer(), num_pages=2000), strategy, Guesses("mixed", known, VOCAB), known,
            monkeypatch, settings={"in_step": True}, max_new_tokens=20, eos_token_id=None,
        )  # fmt: skip


def test_processors_see_the_same(monkeypatch):
    """A caller's processor is called once a token with the context of plain decoding; its rows are the dense ones."""
    engine, known, seen = make_engine(), Known(), []
    for strategy in (Nested(), drafted(Nested(), Guesses("mixed", known, VOCAB))):
        recorder = Recorder()
        result = known.watching(
            monkeypatch,
            lambda s=strategy, r=recorder: engine.generate(PROMPT, strategy=s, logits_processor=[r], eos_token_id=None),
        )
        assert_dense(result, recorder, "llama")
        seen.append(Counter(context for context, _ in recorder.seen))
    assert seen[0] == seen[1] and result.metrics.accepted_tokens > 0


def test_stops_and_until(monkeypatch):
    """Guesses beyond a stop, an EOS or a limit are not taken; `until` and `stats` see one token after another."""
    tokenizer = byte_tokenizer()
    engine, known, calls = make_engine(tokenizer=tokenizer), Known(), []

    class Stopping(Strategy):
        def run(self, trunk):
            free = yield trunk.decode(30, stats=True)
            text = tokenizer.decode(free.token_ids[8:10])
            yield trunk.truncate(len(PROMPT))
            lengths = []
            one = yield trunk.decode(30, until=lambda d: lengths.append(len(d.token_ids)) or len(lengths) == 5, stats=3)
            yield trunk.truncate(len(PROMPT))
            two = yield trunk.decode(30, stop=free.token_ids[6])
            yield trunk.truncate(len(PROMPT))
            three = yield trunk.decode(30, stop=text)
            yield trunk.decode(2)
            calls.append(lengths)
            return [end._replace(stats=()) if hasattr(end, "_replace") else (end.reason, end.token_ids, end.stop)
                    for end in (free, one, two, three)]  # fmt: skip

    for kind in ("right", "mixed", "second"):
        guesses = Guesses(kind, known, VOCAB)
        _, with_drafts = compare(engine, Stopping(), guesses, known, monkeypatch, eos_token_id=None, max_new_tokens=200)
        assert with_drafts.metrics.accepted_tokens > 20
    assert all(lengths == [1, 2, 3, 4, 5] for lengths in calls)
    end = Known()
    plain, with_drafts = compare(
        engine, None, Guesses("right", end, VOCAB), end, monkeypatch, eos_token_id=list(range(60, 120))
    )
    assert plain.tree.ended == with_drafts.tree.ended == "eos"


def test_events(monkeypatch):
    """In step, a stream tells the same; else the same of each thread."""
    engine, known = make_engine(tokenizer=byte_tokenizer()), Known()
    options = dict(eos_token_id=None, max_new_tokens=60)
    told = []
    known.watching(monkeypatch, lambda: engine.generate(PROMPT, strategy=Nested(), **options))
    guesses = Guesses("mixed", known, VOCAB)
    for strategy in (Nested(), drafted(Nested(), guesses, in_step=True), drafted(Nested(), guesses)):
        told.append([event for event in engine.stream(PROMPT, strategy=strategy, **options)][:-1])
    assert told[0] == told[1]
    of_thread = [Counter(map(repr, events)) for events in told]
    assert of_thread[0] == of_thread[2]
    assert_nothing_held(engine)


def test_trace_is_replayed(monkeypatch, tmp_path):
    engine, known = make_engine(), Known()
    _, result = compare(engine, Nested(), Guesses("mixed", known, VOCAB), known, monkeypatch, eos_token_id=None)
    result.trace().save(tmp_path / "a.json")
    trace = ab.records.trace.load(tmp_path / "a.json")
    assert trace.metrics.accepted_tokens == result.metrics.accepted_tokens > 0
    assert ab.replay(trace, engine).tree == result.tree


def test_bit_identical_when_batch_invariant(monkeypatch):
    engine, known = make_engine(batch_invariant=True), Known()
    plain, with_drafts = compare(
        engine, SelfConsistency(3), Guesses("mixed", known, VOCAB), known, monkeypatch, logprobs=True,
        max_new_tokens=20, eos_token_id=None,
    )  # fmt: skip
    assert with_drafts.metrics.accepted_tokens > 0
    for one, other in zip(plain.tree.walk(), with_drafts.tree.walk(), strict=True):
        assert [run.logprobs for run in one.runs] == [run.logprobs for run in other.runs]


@pytest.mark.parametrize("guess", [1, 2])
def test_distribution(guess):
    """Pairs of sampled tokens follow the model's own distribution, whatever token is always guessed."""
    size, many = 8, 3000
    model = tiny_model(size, spread=0.6)
    engine = ab.Engine(model, num_pages=20_000, page_size=4, max_rows=16_000)

    class Always:
        def propose(self, asks):
            return [[[guess] * ask.length] for ask in asks]

        def close(self):
            pass

    prompt = [1, 2, 3]

    class Pairs(Strategy):
        def run(self, trunk):
            kids = trunk.fork([[4]] * many)
            ends = yield [kid.decode(2, sampling={"do_sample": True, "top_k": 0}) for kid in kids]
            return [end.token_ids for end in ends]

    result = engine.generate(prompt, strategy=ab.DraftTree(Pairs(), Always()), seed=11)
    assert result.metrics.accepted_tokens > 0
    with torch.inference_mode():
        rows = torch.tensor([[*prompt, 4, a] for a in range(size)])
        eager = LlamaForCausalLM._from_config(model.config, attn_implementation="eager").eval()
        eager.load_state_dict(model.state_dict())
        logits = eager(rows).logits.double()
    probability = torch.softmax(logits[0, 3], -1)[:, None] * torch.softmax(logits[:, 4], -1)
    counts = torch.zeros(size, size, dtype=torch.float64)
    for pair in result.answers:
        counts[pair] += 1

    def distance(counts):
        return float(((counts - many * probability) ** 2 / (many * probability)).sum())

    assert distance(counts) < 110  # χ² with 63 degrees of freedom: more in 1 of 4,000
    # The test can fail: had every tenth token been the guess because it was one, it would.
    biased = 0.9 * counts
    biased[guess] += 0.1 * counts.sum(0)
    assert distance(biased) > 110


@pytest.mark.parametrize("same", [True, False])
def test_draft_model(same, monkeypatch):
    """A model that guesses; the very same model guesses every token, sampled ones by the same draws."""
    engine, known = make_engine(), Known()
    draft = make_engine().model if same else tiny_model()
    for sampled in (False, True):
        for strategy in (None, Nested(), SelfConsistency(4)):
            plain, with_drafts = compare(
                engine, strategy, draft, known, monkeypatch, max_new_tokens=40, do_sample=sampled, eos_token_id=None
            )
            if same and strategy is None:
                assert with_drafts.metrics.steps < 10
            if same and strategy is not None:
                assert with_drafts.metrics.steps < 0.7 * plain.metrics.steps
    many = [[*PROMPT, i] for i in range(5)]
    plain = engine.generate(many, max_new_tokens=20, eos_token_id=None)
    again = engine.generate(many, strategy=ab.DraftTree(None, draft), max_new_tokens=20, eos_token_id=None)
    assert [r.tree for r in plain] == [r.tree for r in again]


def test_draft_model_without_room(monkeypatch):
    """A draft model whose cache is too small guesses for some threads, or none; nothing else changes."""
    known, draft = Known(), tiny_model()
    engine = ab.Engine(tiny_model(seed=1), num_pages=60, page_size=2, max_rows=7)
    compare(engine, SelfConsistency(6), draft, known, monkeypatch, max_new_tokens=12, eos_token_id=None)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_proposer_that_raises(error, monkeypatch):
    engine, known = make_engine(), Known()

    class Raises(Guesses):
        def propose(self, asks):
            if self.asked > 3:
                raise error("no idea")
            return super().propose(asks)

    with pytest.raises(error):
        engine.generate(PROMPT, strategy=drafted(Nested(), Raises("random", known, VOCAB)), eos_token_id=None)
    assert_nothing_held(engine)
    stream = engine.stream(PROMPT, strategy=drafted(Nested(), Guesses("random", known, VOCAB)), eos_token_id=None)
    for _ in range(9):
        next(stream)
    engine.abort()
    assert_nothing_held(engine)
    compare(engine, Nested(), Guesses("mixed", known, VOCAB), known, monkeypatch, eos_token_id=None)


def test_bad_input():
    engine = make_engine()
    with pytest.raises(ValueError, match="draft='sibling' is unknown; did you mean 'siblings'"):
        ab.DraftTree(draft="sibling")
    with pytest.raises(ValueError, match="draft='ngram2' is unknown; did you mean 'ngram'"):
        ab.DraftTree(draft="ngram2")
    with pytest.raises(TypeError, match=r"draft=7.*; pass one of 'ngram', 'siblings', a Hugging Face"):
        ab.DraftTree(draft=7)
    with pytest.raises(TypeError, match="is not a Strategy"):
        ab.DraftTree("ngram")
    with pytest.raises(ValueError, match="length"):
        ab.DraftTree(length=0)
    with pytest.raises(ValueError, match="in_step"):
        ab.DraftTree(in_step=1)
    with pytest.raises(ValueError, match="vocabulary of 64 tokens, the engine's model one of 260"):
        engine.generate(PROMPT, strategy=ab.DraftTree(draft=tiny_model(64)))
    with pytest.raises(ValueError, match=r"draft is on meta, the engine's model on cpu; move it there"):
        engine.generate(PROMPT, strategy=ab.Sequential(ab.DraftTree(draft=tiny_model().to("meta"))))

    class Short:
        def propose(self, asks):
            return []

        def close(self):
            pass

    with pytest.raises(ValueError, match=r"Short.propose\(\) gave paths for 0 threads where 1"):
        engine.generate(PROMPT, strategy=ab.DraftTree(draft=Short()))
    assert_nothing_held(engine)


def test_wrappers():
    """Plain decoding is plain in any wrapping, and Sequential keeps its meaning on both sides."""
    engine = make_engine()
    full = dict(max_new_tokens=engine.cache.num_pages * engine.cache.page_size, eos_token_id=None)
    for strategy in (ab.DraftTree(), Sequential(ab.DraftTree()), ab.DraftTree(Sequential(Plain()))):
        with pytest.raises(ValueError, match="can never fit"):
            engine.generate([1, 2, 3], strategy=strategy, **full)
    one, other = ab.DraftTree(Sequential(Nested())), Sequential(ab.DraftTree(Nested()))
    assert one.sequential and other.sequential and not ab.DraftTree(Nested()).sequential
    results = [engine.generate(PROMPT, strategy=s, eos_token_id=None) for s in (one, other, Sequential(Nested()))]
    assert results[0].tree == results[1].tree == results[2].tree
    assert len({r.metrics.critical_path_tokens for r in results}) == 1
    assert repr(one) == "DraftTree(Sequential(strategy=Nested()), draft='ngram', length=8, width=4)"


def test_draft_tree_merges_paths():
    draft = Draft([[1, 2, 3], [1, 2, 4, 5], [1, 2], [], [1, 2, 3], [9]], [3, 3, 3])
    assert [(path, [node.depth for node in added]) for path, added in draft.paths] == [
        ([1, 2, 3], [1, 2, 3]),
        ([1, 2, 4], [3]),
        ([9], [1]),
    ]
    assert (draft.size, draft.rows) == (5, 3 + 4 + 2)
    assert len(list(draft.root.walk())) == 5
    draft.shorten(7)
    assert [path for path, _ in draft.paths] == [[1, 2, 3], [1, 2, 4]] and set(draft.root.children) == {1}
    draft.shorten(2)
    assert [path for path, _ in draft.paths] == [[1, 2]] and len(list(draft.root.walk())) == 2
    draft.shorten(0)
    assert not draft.paths and not draft.root.children


def test_pace_backs_off_and_comes_back():
    pace, drafted_steps = Pace(8), 0
    for _ in range(100):
        if length := pace.next_length():
            drafted_steps += 1
            pace.told(length, 0)
    assert drafted_steps < 16
    while not (length := pace.next_length()):
        pass
    assert length == 1
    for expected in (2, 4, 8, 8):
        pace.told(length, length)
        length = pace.next_length()
        assert length == expected


def verified(odds, paths, lengths, tokens):
    """Odds are told of a draft of `paths` behind which `tokens` were chosen."""
    draft = Draft(paths, lengths)
    ahead = Ahead(None, draft, draft.root)
    for token in tokens:
        node = ahead.node.children.get(token)
        if node is None:
            break
        ahead.node, ahead.first = node, ahead.first + node.main
    odds.told(ahead, ahead.node.depth < len(tokens))


def test_guesses_worth_their_rows():
    """The chance that a row needs, and which paths have it."""
    assert least_chance(0, "cpu", 8) == least_chance(None, "cuda", 8) == 0
    assert (
        least_chance(0.25, "cuda", 4) == 0.5 and 0 < least_chance(None, "cpu", 1) < least_chance(None, "cpu", 16) < 0.5
    )
    assert Odds().lengths(5, 3, 0.0) == (5, 5, 5)  # rows are free
    good, beside, bad = Odds(), Odds(), Odds()
    for _ in range(40):
        verified(good, [[1, 2, 3, 4], [5]], (4, 1), [1, 2, 3, 4])
        verified(beside, [[1, 2, 3, 4], [5, 6, 7]], (4, 3), [5, 6, 7])
        verified(bad, [[1, 2, 3, 4], [5]], (4, 1), [9])
    assert good.lengths(4, 3, 0.1) == (4,)  # the other paths never came true
    assert beside.lengths(4, 2, 0.1) == (1, 4)  # the second path came true whenever the first did not
    asked = [bad.lengths(4, 3, 0.1) for _ in range(64)]
    assert asked.count((1,)) == 4 and asked.count(()) == 60  # tried again at times
    for _ in range(60):
        verified(bad, [[1, 2]], (2,), [1, 2])
    assert bad.lengths(2, 1, 0.1) == (2,)  # what was long ago counts little


def test_rows_that_cost_are_left_out_and_no_token_changes():
    class Wrong:
        def propose(self, asks):
            return [[[(ask.context[-1] + 1 + i) % 200 + 3] * 3 for i in range(4)] for ask in asks]

        def close(self):
            pass

    rows = {}
    for cost in (0, None, 0.5):
        engine = make_engine()
        strategy = ab.DraftTree(ab.SelfConsistency(4, vote=None), Wrong(), row_cost=cost)
        result = engine.generate(PROMPT, strategy=strategy, seed=3, max_new_tokens=30, min_new_tokens=30)
        plain = make_engine().generate(PROMPT, strategy=strategy.strategy, seed=3, max_new_tokens=30, min_new_tokens=30)
        assert result.tree == plain.tree
        rows[cost] = result.metrics.rows
    assert rows[0] > rows[None] > rows[0.5]
    for bad in (-1, "cheap", float("nan"), True):
        with pytest.raises(ValueError, match="row_cost"):
            ab.DraftTree(row_cost=bad)
