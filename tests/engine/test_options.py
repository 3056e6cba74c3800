"""Options of `generate`: each is honoured or refused; scores that leave no token; counts from a thread's own prompt."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from engine_kit import EOS, assert_nothing_held, make_engine, make_model
from transformers import CompileConfig, GenerationConfig, LogitsProcessor, LogitsProcessorList, MaxLengthCriteria
from transformers.generation import logits_process as lp
from transformers.generation.stopping_criteria import ConfidenceCriteria, StoppingCriteriaList

import anabranch as ab
from anabranch.engine import options
from anabranch.engine.sampling import Sampler, random_stream, token_stats
from anabranch.strategies import Strategy

PROMPT = list(range(5, 15))


# ------------------------------------------------------------------------------------------- the table of options

# A value of each refused field that is not "off".
ASKED = {
    "num_beams": 2, "num_beam_groups": 2, "diversity_penalty": 0.5, "num_return_sequences": 2, "guidance_scale": 2.0,
    "penalty_alpha": 0.5, "dola_layers": "high", "prompt_lookup_num_tokens": 3, "constraints": [1],
    "force_words_ids": [[1]], "use_mtp": True, "forced_eos_token_id": 3, "encoder_repetition_penalty": 2.0,
    "encoder_no_repeat_ngram_size": 2, "token_healing": True, "max_time": 1.0, "max_length": 40,
    "return_dict_in_generate": True, "output_scores": True, "output_logits": True, "output_attentions": True,
    "output_hidden_states": True, "early_stopping": True, "length_penalty": 2.0, "low_memory": True,
    "use_cache": False, "cache_implementation": "static", "cache_config": {"a": 1}, "max_cache_len": 99,
    "prefill_chunk_size": 9, "continuous_batching_config": {"a": 1}, "compile_config": CompileConfig(),
    "is_assistant": True, "num_assistant_tokens": 5, "num_assistant_tokens_schedule": "heuristic",
    "assistant_confidence_threshold": 0.9, "assistant_early_exit": 1, "assistant_lookbehind": 3,
    "assistant_ensemble_weight": 0.5, "target_lookbehind": 3, "max_matching_ngram_size": 4, "speculation_type": "x",
}  # fmt: skip


def test_every_field_of_generation_config_is_in_one_group():
    groups = Counter([*options.HONOURED, *options.REFUSED, *options.ONLY_GENERATE, *options.INERT])
    fields = {*GenerationConfig().to_dict(), *vars(GenerationConfig())}
    assert not [name for name, n in groups.items() if n > 1]
    assert not {name for name in fields if not name.startswith("_")} - set(groups), "a new field: honour or refuse it"


@pytest.mark.parametrize("name", sorted({*options.REFUSED, *options.ONLY_GENERATE} - {"disable_compile"}))
def test_refused_in_a_call_with_the_remedy(name):
    engine = make_engine(num_pages=32)
    with pytest.raises(ValueError, match=name):
        engine.generate(PROMPT, max_new_tokens=2, **{name: ASKED[name]})
    assert_nothing_held(engine)
    (off, *_), _ = {**options.REFUSED, **options.ONLY_GENERATE}[name]
    engine.generate(PROMPT, max_new_tokens=2, **{name: off})


@pytest.mark.parametrize("name", sorted(options.ONLY_GENERATE))
def test_the_models_own_settings_of_generate_have_no_effect(name):
    engine = make_engine(num_pages=32)
    expected = engine.generate(PROMPT, max_new_tokens=4).token_ids
    setattr(engine.model.generation_config, name, ASKED.get(name, True))
    assert engine.generate(PROMPT, max_new_tokens=4).token_ids == expected
    again = copy.deepcopy(engine.model.generation_config)  # the usual way to change something else
    again.max_new_tokens = 4
    assert engine.generate(PROMPT, generation_config=again).token_ids == expected


def test_the_models_own_length_does_not_count():
    engine = make_engine(num_pages=32)
    engine.model.generation_config.max_length = 12
    assert len(engine.generate(PROMPT, max_new_tokens=6, eos_token_id=None).token_ids) == 6


@pytest.mark.parametrize("name", sorted(options._KEYWORDS))
def test_keywords_of_generate_say_the_remedy(name):
    with pytest.raises(ValueError, match=f"generate: {name} is not an argument of this engine; ."):
        make_engine(num_pages=32).generate(PROMPT, **{name: object()})


def test_sampling_options_without_sampling():
    engine = make_engine(num_pages=64)
    for name, value in dict(temperature=0.5, top_k=3, top_p=0.5, min_p=0.2, typical_p=0.5).items():
        with pytest.raises(ValueError, match=f"{name}=.* has no effect without sampling; pass do_sample=True"):
            engine.generate(PROMPT, max_new_tokens=2, **{name: value})
        engine.generate(PROMPT, max_new_tokens=2, do_sample=True, **{name: value})
    engine.generate(PROMPT, ab.SelfConsistency(2, vote=None), max_new_tokens=2, top_k=3)  # it samples by itself
    engine.generate(PROMPT, max_new_tokens=2, temperature=1.0, top_p=1.0)


def test_lists_are_lists():
    engine = make_engine(num_pages=32)
    processor = lp.TemperatureLogitsWarper(2.0)
    for name in ("logits_processor", "stopping_criteria"):
        for value in (processor, [3], "x"):
            with pytest.raises(ValueError, match=f"{name}=.*pass a list"):
                engine.generate(PROMPT, **{name: value})
    with pytest.raises(ValueError, match="ConfidenceCriteria reads scores"):
        engine.generate(PROMPT, stopping_criteria=[ConfidenceCriteria(0.5)])
    criteria = StoppingCriteriaList([MaxLengthCriteria(13)])
    assert len(engine.generate(PROMPT, stopping_criteria=criteria, eos_token_id=None).token_ids) == 3


# ------------------------------------------------------------------------------------------- no token is left


class After(LogitsProcessor):
    """From a context length on, every score is `value` (or one is)."""

    def __init__(self, length: int, value: float, one: bool = False) -> None:
        self.length, self.value, self.one = length, value, one

    def __call__(self, input_ids, scores):
        if input_ids.shape[1] < self.length:
            return scores
        scores = scores.clone()
        scores[:, 3 if self.one else slice(None)] = self.value
        return scores


@pytest.mark.parametrize("how", [{}, dict(do_sample=True), dict(do_sample=True, top_k=0)], ids=str)
@pytest.mark.parametrize(
    ("value", "one", "said"),
    [
        (-torch.inf, False, "every score is −inf"),
        (torch.nan, True, "a score is nan"),
        (torch.inf, True, "a score is inf"),
    ],
)
def test_scores_that_leave_no_token_are_an_error(how, value, one, said):
    engine = make_engine(num_pages=64)
    expected = engine.generate([PROMPT, PROMPT[:4]], max_new_tokens=6, eos_token_id=None, **how)
    for prompts in ([PROMPT, PROMPT[:4]], [PROMPT[:4], PROMPT]):
        at = prompts.index(PROMPT)
        with pytest.raises(ValueError, match=rf"prompt {at}, thread 0, position 13: {said} after After.*processor"):
            engine.generate(
                prompts, max_new_tokens=6, eos_token_id=None, logits_processor=[After(13, value, one)], **how
            )
        assert_nothing_held(engine)
    again = engine.generate([PROMPT, PROMPT[:4]], max_new_tokens=6, eos_token_id=None, **how)
    assert [r.token_ids for r in again] == [r.token_ids for r in expected]


@pytest.mark.parametrize(("value", "said"), [(torch.inf, r"\+inf"), (torch.nan, "NaN"), (-torch.inf, "only −inf")])
def test_scores_of_the_model_itself(value, said):
    engine = make_engine(num_pages=64)
    engine.model.lm_head.register_forward_hook(lambda module, args, output: torch.full_like(output, value))
    with pytest.raises(ValueError, match=f"returned {said} scores in step 1 for prompt 0, thread 0, position 9"):
        engine.generate(PROMPT, max_new_tokens=3)
    assert_nothing_held(engine)
    if value > 0 or value != value:  # Transformers' own remedy works here too
        result = engine.generate(PROMPT, max_new_tokens=3, remove_invalid_values=True, eos_token_id=None)
        assert len(result.token_ids) == 3


def test_scores_of_another_shape():
    with pytest.raises(ValueError, match=r"logits_processor: .*made scores of shape"):
        make_engine(num_pages=32).generate(PROMPT, logits_processor=[lambda ids, scores: scores[:, :-1]])


# ------------------------------------------------------------------------------------------- ties


def test_a_draw_sees_every_tie_with_the_kth_score():
    """Transformers keeps all scores that equal the k-th; so do we, however many, whatever the next row has."""
    config = GenerationConfig(do_sample=True, top_k=5)
    sampler = Sampler(make_model(), None, config, LogitsProcessorList(), StoppingCriteriaList())
    tied, plain = torch.full((260,), -5.0), torch.linspace(0, 9, 260)
    tied[:200] = 1.0

    class Fixed:
        def __init__(self, value: float) -> None:
            self.value = value

        def random(self) -> float:
            return self.value

    def choose(rows, draws):
        n = len(rows)
        return sampler.choose(torch.stack(rows), [list] * n, [1] * n, [1] * n, [Fixed(d) for d in draws])

    assert choose([tied], [0.999]) == [199] and choose([tied], [0.5]) == [100] and choose([tied], [0.0]) == [0]
    draws = [random_stream(3, (i,)).random() for i in range(40)]
    alone = [choose([plain], [d])[0] for d in draws]
    assert choose([plain, tied] * 40, [d for d in draws for _ in range(2)])[::2] == alone
    few = torch.softmax(plain[-5:], -1).double().cumsum(-1)
    assert alone == [255 + int(np.searchsorted((few / few[-1]).numpy(), d, side="right")) for d in draws]


# ------------------------------------------------------------------------------------------- a caller's own warpers


@pytest.mark.parametrize("kept", [1, 2, 3])
def test_a_nucleus_keeps_as_many_tokens_as_it_was_told_to(kept):
    """However little their mass: a caller's warper may ask for several."""
    nucleus = LogitsProcessorList([lp.TopPLogitsWarper(1e-3, min_tokens_to_keep=kept)])
    sampler = Sampler(make_model(), None, GenerationConfig(do_sample=True, top_k=0), nucleus, StoppingCriteriaList())
    row = torch.full((260,), -9.0)
    row[[40, 90, 200]] = torch.tensor([1.0, 3.0, 2.0])
    streams = [random_stream(3, (i,)) for i in range(64)]
    found = sampler.choose(row.expand(64, -1).clone(), [list] * 64, [1] * 64, [1] * 64, streams)
    assert set(found) == {*[90, 200, 40][:kept]}


# ------------------------------------------------------------------------------------------- how sure the model was


def test_statistics_of_a_model_that_rules_tokens_out():
    """A score of −inf is a probability of 0, which adds nothing to an entropy; each row has its own k."""
    logits = torch.full((4, 300), -torch.inf)
    logits[:, [7, 20, 30, 299]] = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    nothing, one, two, three = token_stats(logits, [7, 20, 30, 299], [0, 1, 2, 3])
    for stat, p in ((nothing, 0.4), (one, 0.3), (two, 0.2), (three, 0.1)):
        assert stat.logprob == pytest.approx(np.log(p), abs=1e-5)
    for stat, likeliest in ((one, [0.4]), (two, [0.4, 0.3]), (three, [0.4, 0.3, 0.2])):
        assert stat.entropy == pytest.approx(-sum(p * np.log(p) for p in (0.4, 0.3, 0.2, 0.1)), abs=1e-5)
        assert stat.topk_logprob == pytest.approx(np.mean(np.log(likeliest)), abs=1e-5)
        assert stat.margin == pytest.approx(0.1, abs=1e-5)
    assert np.isnan(nothing.entropy)


# ------------------------------------------------------------------------------------------- whose prompt counts


class Eager(LogitsProcessor):
    """A model that would stop at once."""

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        scores[:, EOS] += 50
        return scores


# Every option whose processor is given a prompt's length, or looks at how long the whole is.
COUNTING = {
    "min_new_tokens": dict(min_new_tokens=6),
    "min_length": dict(min_length=14),
    "begin_suppress_tokens": dict(begin_suppress_tokens=[EOS]),
    "exponential_decay_length_penalty": dict(exponential_decay_length_penalty=(3, 1.7), min_new_tokens=2),
}


def generated(model, prompt, ids, n, **kwargs):
    """What `model.generate` writes behind `ids`, of which `prompt` are the prompt: processors as for that prompt."""
    config, _ = model._prepare_generation_config(None, **kwargs)
    model._prepare_special_tokens(config, device=model.device)
    processors = model._get_logits_processor(
        generation_config=config, input_ids_seq_length=prompt, logits_processor=LogitsProcessorList([Eager()]),
        device=model.device, model_kwargs={},
    )  # fmt: skip
    ids = list(ids)
    begin = len(ids)
    while len(ids) < begin + n and (len(ids) == begin or ids[-1] != EOS):
        row = torch.tensor([ids])
        with torch.no_grad():
            scores = model(row).logits[:, -1].float()
        ids.append(int(processors(row, scores).argmax()))
    return ids[begin:]


@dataclass(frozen=True)
class Spawns(Strategy):
    prompt: tuple[int, ...]

    def run(self, trunk):
        kid = trunk.spawn(list(self.prompt))
        first = yield kid.decode(12)
        grandkid = kid.fork(1)[0]
        second = yield grandkid.decode(12)
        return first, second


@pytest.mark.parametrize("name", COUNTING)
@pytest.mark.parametrize(("trunk", "own"), [(17, 5), (5, 17), (8, 8)])
def test_a_spawned_thread_counts_from_its_own_prompt(name, trunk, own):
    engine = make_engine(num_pages=64)
    prompt = tuple(range(30, 30 + own))
    result = engine.generate(
        list(range(5, 5 + trunk)), Spawns(prompt), max_new_tokens=30, logits_processor=[Eager()], **COUNTING[name]
    )
    first, second = result.answers
    expected = generated(make_model(), own, prompt, 12, **COUNTING[name])
    assert list(first.token_ids) == expected
    assert list(second.token_ids) == generated(make_model(), own, [*prompt, *expected], 12, **COUNTING[name])


@pytest.mark.parametrize("name", COUNTING)
def test_model_generate_agrees_about_a_spawned_prompt(name):
    prompt = tuple(range(30, 35))
    engine, model = make_engine(num_pages=64), make_model()
    result = engine.generate(
        list(range(5, 25)), Spawns(prompt), max_new_tokens=30, logits_processor=[Eager()], **COUNTING[name]
    )
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, logits_processor=LogitsProcessorList([Eager()]),
        **COUNTING[name],
    )  # fmt: skip
    assert list(result.answers[0].token_ids) == out[0, 5:].tolist()


@dataclass(frozen=True)
class Everything(Strategy):
    """Decodes behind forks, inserted text, joins and a truncation; returns (context, what was written) of each."""

    def run(self, trunk):
        seen = []

        def note(thread, ended):
            n = len(ended.token_ids)
            seen.append((thread.context[: len(thread.context) - n], list(ended.token_ids)))

        note(trunk, (yield trunk.decode(3)))
        trunk.insert([60, 61])
        note(trunk, (yield trunk.decode(4)))
        kids = trunk.fork([[70], [71, 72]])
        for kid in kids:
            note(kid, (yield kid.decode(5)))
        trunk.join(kids, "reprefill")
        trunk.insert([80])
        note(trunk, (yield trunk.decode(4)))
        trunk.truncate(12)
        trunk.insert([81])
        note(trunk, (yield trunk.decode(4)))
        return seen


@pytest.mark.parametrize("pages", [64, 12])
@pytest.mark.parametrize("name", COUNTING)
def test_all_that_continues_a_prompt_counts_from_it(name, pages):
    """A fork's tokens, inserted ones and joined ones are behind the prompt, as they are to `generate` on that text."""
    engine = make_engine(num_pages=pages)
    prompts = [PROMPT, PROMPT[::-1]]
    results = engine.generate(prompts, Everything(), max_new_tokens=60, logits_processor=[Eager()], **COUNTING[name])
    for result in results:
        assert len(result.answers) == 6
        for context, written in result.answers:
            assert written == generated(make_model(), len(PROMPT), context, len(written), **COUNTING[name])
            assert written[-1] == EOS or len(written) in (3, 4, 5)


@pytest.mark.parametrize(("name", "prompt"), [("min_new_tokens", 0), ("min_length", 3)])
def test_a_minimum_keeps_an_end_away_for_just_so_many(name, prompt):
    plain = make_engine().generate([5, 6, 7], eos_token_id=None, max_new_tokens=12, do_sample=False).token_ids
    at = next(i for i in range(3, 12) if plain[i] not in plain[:i])
    options = dict(eos_token_id=plain[at], max_new_tokens=12, do_sample=False)
    assert make_engine().generate([5, 6, 7], **{name: prompt + at}, **options).token_ids == plain[: at + 1]
    assert make_engine().generate([5, 6, 7], **{name: prompt + at + 1}, **options).token_ids[at] != plain[at]


@dataclass(frozen=True)
class SameLength(Strategy):
    """A thread with a prompt of 5 tokens is as long as its trunk, whose own are 8, when both go on."""

    def run(self, trunk):
        kid = trunk.spawn([30, 31, 32, 33, 34])
        begun = yield kid.decode(3)
        rest = yield [trunk.decode(12), kid.decode(12)]
        return [len(ended.token_ids) for ended in (begun, *rest)]


def test_threads_of_one_length_count_each_from_its_own_prompt():
    engine = make_engine(num_pages=64)
    engine.model.lm_head.register_forward_hook(  # it would stop at once
        lambda module, args, output: output + 50 * (torch.arange(output.shape[-1]) == EOS)
    )
    result = engine.generate(PROMPT[:8], SameLength(), max_new_tokens=30, min_new_tokens=6, do_sample=False)
    assert result.answers == [3, 7, 4]  # 6 that do not end, and EOS
