"""Best of n, DeepConf, probing, pruning, re-forking and trees of thoughts, on scripted models and random ones."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from engine_kit import EOS, Recorder, assert_dense, assert_nothing_held, byte_tokenizer, make_engine
from strategies_kit import ids
from transformers import LogitsProcessor

import anabranch as ab
from anabranch.strategies.search.confidence import Confidence, percentile
from anabranch.strategies.search.slim_sc import letters_alike


class Plays(LogitsProcessor):
    """Behind "?" every branch draws a part, a letter of `parts`, and then writes that part's text, then EOS. Behind a
    text of `asides`, wherever it stands, it answers that instead; {} there is the part's letter."""

    def __init__(self, parts: dict[str, str], asides: dict[str, str] | None = None):
        self.parts, self.asides = parts, asides or {}

    def __call__(self, input_ids, scores):
        out = torch.full_like(scores, -torch.inf)
        for row, context in enumerate(input_ids.tolist()):
            text = byte_tokenizer().decode(context)
            own = text[text.index("?") + 1 :]
            if not own:
                out[row, list(ids("".join(self.parts)))] = 0
                continue
            asked = next((a for a in self.asides if a in own), None)
            if asked is None:
                whole, said = own[0] + self.parts[own[0]], own
            else:
                whole, said = self.asides[asked].replace("{}", own[0]), own[own.rindex(asked) + len(asked) :]
            assert whole.startswith(said), (whole, said)
            out[row, ids(whole[len(said)])[0] if len(whole) > len(said) else EOS] = 0
        return out


def play(strategy, parts, asides=None, prompt="?", **options):
    engine = make_engine(tokenizer=byte_tokenizer(), num_pages=options.pop("num_pages", 2000))
    try:
        return engine.generate(
            prompt,
            strategy=strategy,
            logits_processor=[Plays(parts, asides)],
            **({"max_new_tokens": 200, "top_k": 0} | options),
        )
    finally:
        assert_nothing_held(engine)


# ------------------------------------------------------------------------------------------------ best of n


PARTS = {"a": "pple 1", "b": "ee 22", "c": "at 333"}


def test_best_of_n_keeps_what_the_scorer_likes():
    result = play(ab.BestOfN(n=8, scorer=len, temperature=None), PARTS)
    assert {text[0] for text in result.answers} == set(PARTS) and len(result.answers) == 8
    assert result.text == max(result.answers, key=len)
    assert play(ab.BestOfN(n=8, scorer=lambda text: -len(text), temperature=None), PARTS).text == "bee 22"
    told = []

    def everything(text, prompt, token_ids):
        told.append((text, prompt, token_ids))
        return text.startswith("c")

    result = play(ab.BestOfN(n=8, scorer=everything, temperature=None), PARTS)
    assert result.text == "cat 333" and told[0] == (result.answers[0], "?", result.tree.children[0].token_ids)


@pytest.mark.parametrize("name", ["logprob", "logprob_sum", "confidence"])
def test_best_of_n_by_name(name):
    engine = make_engine()
    options = dict(max_new_tokens=8, eos_token_id=None, logprobs=True, seed=3)
    result = engine.generate([1, 2, 3], strategy=ab.BestOfN(n=5, scorer=name), **options)
    sums = []
    for kid in result.tree.children:
        with torch.no_grad():
            raw = engine_logp([1, 2, 3, *kid.token_ids])[2:-1]
        picked = raw.gather(-1, torch.tensor(kid.token_ids)[:, None]).sum()
        sums.append(float(-raw.topk(20).values.mean() if name == "confidence" else picked))
    assert result.token_ids == result.tree.children[max(range(5), key=lambda i: sums[i])].token_ids
    assert_nothing_held(engine)


def engine_logp(tokens):
    from engine_kit import make_model

    with torch.no_grad():
        return make_model()(torch.tensor([tokens])).logits[0].float().log_softmax(-1)


def test_a_scorer_that_fails_is_named_and_nothing_is_lost():
    def grumpy(text):
        if text.startswith("b"):
            raise RuntimeError("no bees")
        return 1.0

    with pytest.raises(ab.ScorerFailed, match="BestOfN: scorer grumpy raised RuntimeError: no bees, for branch") as e:
        play(ab.BestOfN(n=8, scorer=grumpy, temperature=None), PARTS)
    assert len(e.value.texts) == 8 and isinstance(e.value.__cause__, RuntimeError)
    for value in (None, float("nan"), "many"):
        with pytest.raises(ab.ScorerFailed, match=r"scorer <lambda> returned .*finite number"):
            play(ab.BestOfN(n=2, scorer=lambda text, v=value: v), PARTS)
    with pytest.raises(ab.ScorerFailed, match="TreeOfThoughts: scorer grumpy"):
        play(ab.TreeOfThoughts(scorer=grumpy, propose=6, temperature=None), PARTS)
    with pytest.raises(ab.ScorerFailed, match="SlimSC: scorer <lambda>"):
        play(ab.SlimSC(n=3, similarity=lambda a, b: 1 / 0, boundary=" ", vote="number"), PARTS)
    with pytest.raises(ab.ScorerFailed, match="STEP: scorer <lambda>"):
        play(ab.STEP(n=3, scorer=lambda hidden: [], temperature=None), PARTS)


# ------------------------------------------------------------------------------------------------ DeepConf


def test_percentile_is_numpys():
    pick = np.random.default_rng(0)
    for _ in range(50):
        values = pick.normal(size=pick.integers(1, 30)).tolist()
        percent = float(pick.uniform(0, 100))
        assert percentile(values, percent) == pytest.approx(float(np.percentile(values, percent)))


def lowest_group(confidences, window):
    """By the released code."""
    if len(confidences) < window:
        return round(sum(confidences) / len(confidences), 3)
    return min(round(sum(confidences[i : i + window]) / window, 3) for i in range(len(confidences) - window + 1))


@pytest.mark.parametrize("keep", [0.9, 0.5, 0.1])
def test_deepconf_ends_traces_that_fall_under_the_bar(keep):
    engine = make_engine(tokenizer=byte_tokenizer(), num_pages=2000)
    strategy = ab.DeepConf(
        n=14, warmup=6, window=6, keep=keep, k=5, temperature=1.0, top_p=None, vote=lambda text: len(text) % 3
    )
    result = engine.generate("abc", strategy=strategy, max_new_tokens=25, seed=1)
    assert_nothing_held(engine)
    kids = result.tree.children
    traces = []
    for kid in kids:
        logp = engine_logp([*ids("abc"), *kid.token_ids])[2:-1]
        traces.append([round(-float(row.topk(5).values.mean()), 3) for row in logp])
    lowest = [lowest_group(trace, 6) for trace in traces]
    bar = float(np.percentile(lowest[:6], 100 * (1 - keep)))
    weights = {}
    for i, (kid, trace) in enumerate(zip(kids, traces, strict=True)):
        groups = [round(sum(trace[at : at + 6]) / 6, 3) for at in range(len(trace) - 5)]
        fell = kid.ended == "until"
        if i < 6:
            assert not fell
        elif fell:  # at the first whole group under the bar, and its pages were free from then on
            assert kid.fate == "killed" and groups[-1] < bar + 2e-3 and all(g >= bar - 2e-3 for g in groups[:-1])
            assert result.answers[i] is None
        else:
            assert all(g >= bar - 2e-3 for g in groups[:-1])
        if lowest[i] >= bar and not fell:
            weights[result.answers[i]] = weights.get(result.answers[i], 0) + lowest[i]
    assert keep == 0.9 or any(kid.ended == "until" for kid in kids)
    winner = next(i for i, kid in enumerate(kids) if kid.fate == "joined")
    assert result.answers[winner] == max(weights, key=lambda a: weights[a])
    same = [i for i in range(14) if result.answers[i] == result.answers[winner] and lowest[i] >= bar]
    assert lowest[winner] == pytest.approx(max(lowest[i] for i in same), abs=2e-3)


@pytest.mark.parametrize("measure", ["lowest", "mean", "tail", "bottom"])
def test_deepconf_offline_filters_and_weighs(measure):
    engine = make_engine(tokenizer=byte_tokenizer(), num_pages=2000)
    strategy = ab.DeepConf(
        n=8, mode="offline", window=4, keep=0.5, k=5, measure=measure, temperature=1.0, top_p=None,
        vote=lambda text: len(text) % 2,
    )  # fmt: skip
    result = engine.generate("abc", strategy=strategy, max_new_tokens=20, seed=2)
    assert all(kid.ended in ("length", "eos") for kid in result.tree.children) and None not in result.answers
    values = []
    for kid in result.tree.children:
        logp = engine_logp([*ids("abc"), *kid.token_ids])[2:-1]
        trace = [round(-float(row.topk(5).values.mean()), 3) for row in logp]
        groups = sorted(sum(trace[at : at + 4]) / 4 for at in range(len(trace) - 3)) or [sum(trace) / len(trace)]
        values.append(
            {
                "lowest": groups[0],
                "mean": sum(trace) / len(trace),
                "tail": sum(trace[-4:]) / len(trace[-4:]),
                "bottom": sum(groups[: max(1, len(groups) // 10)]) / max(1, len(groups) // 10),
            }[measure]
        )
    bar = np.percentile(values, 50)
    weights = {}
    for answer, value in zip(result.answers, values, strict=True):
        weights[answer] = weights.get(answer, 0) + (value if value >= bar else 0)
    winner = next(i for i, kid in enumerate(result.tree.children) if kid.fate == "joined")
    assert result.answers[winner] == max(weights, key=lambda a: weights[a]) and values[winner] >= bar - 2e-3


def test_deepconf_without_answers_or_a_second_phase():
    result = play(ab.DeepConf(n=3, temperature=None, vote="number"), {"a": "x", "b": "y"})
    assert result.answers == [None] * 3 and result.text in ("ax", "by")
    trace = Confidence(3)
    assert (trace.lowest, trace.group, trace.tail) == (0.0, None, 0.0)


# ------------------------------------------------------------------------------------------------ Parallel-Probe


PROBED = dict(every=4, probe="ANS:", probe_tokens=3, vote="number", temperature=None, top_p=None)


def test_a_stable_consensus_stops_all_branches():
    parts = {"a": "." * 90, "b": "," * 90}
    strategy = ab.ParallelProbe(n=4, stable=3, warmup=2, deviations=9, **PROBED)
    result = play(strategy, parts, {"ANS:": " 7"})
    assert result.answers == ["7"] * 4 and result.text[:12] == result.text[0] + parts[result.text[0]][:11]
    assert result.text[12:] == "ANS: 7"  # three rounds of four tokens, then the probe and its answer
    probes = [probe for kid in result.tree.children for probe in kid.children]
    assert len(probes) == 4 * 3 and {probe.fate for probe in probes} == {"discarded"}
    assert [node.fate for node in result.tree.children].count("joined") == 1
    longer = play(ab.ParallelProbe(n=4, stable=3, warmup=6, deviations=9, **PROBED), parts, {"ANS:": " 7"})
    assert len(longer.text) == 4 * 7 + len("ANS: 7")  # the first asking is no round


class Dissent(Plays):
    """Part a says 1 when asked, the others 2."""

    def __call__(self, input_ids, scores):
        texts = [byte_tokenizer().decode(context) for context in input_ids.tolist()]
        self.asides = {"ANS:": "1" if "?a" in texts[0] else "2"}
        return super().__call__(input_ids, scores)


def test_deviants_are_pruned_and_an_ended_branch_answers_for_itself():
    engine = make_engine(tokenizer=byte_tokenizer(), num_pages=2000)
    parts = {"a": "." * 60, "b": "," * 60, "c": ";" * 10 + " 2"}
    strategy = ab.ParallelProbe(n=8, stable=50, warmup=1, deviations=2, least=2, **PROBED)
    result = engine.generate(
        "?", strategy=strategy, logits_processor=[Dissent(parts)], max_new_tokens=40, seed=6, top_k=0
    )
    assert_nothing_held(engine)
    kinds = [kid.text[0] for kid in result.tree.children]
    assert set(kinds) == {"a", "b", "c"} and kinds.count("a") < 4
    for kid, answer in zip(result.tree.children, result.answers, strict=True):
        assert (kid.fate == "killed") == (kid.text[0] == "a")
        assert answer == ("1" if kid.text[0] == "a" else "2")
        if kid.text[0] == "a":
            assert len(kid.token_ids) == 4 * 3  # asked three times; the last two are rounds against the majority
        if kid.text[0] == "c":
            assert kid.text.endswith(" 2") and len(kid.children) == 3
    assert result.text[0] in "bc"


# ------------------------------------------------------------------------------------------------ Slim-SC, STEP


def test_chains_that_repeat_another_are_pruned():
    parts = {"a": "dd one and two|so 3", "b": "dd one and two|so 3", "c": "ompletely else, really|so 4"}
    strategy = ab.SlimSC(n=8, threshold=0.8, boundary="|", vote="number", temperature=None, top_p=None)
    result = play(strategy, parts, seed=4)
    kinds = [kid.text[0] for kid in result.tree.children]
    assert set(kinds) == set("abc")
    left = [kid for kid in result.tree.children if kid.fate != "killed"]
    assert {kid.text[0] for kid in left} in ({"a", "c"}, {"b", "c"}) and len(left) == 2
    for kid, answer in zip(result.tree.children, result.answers, strict=True):
        assert answer == (None if kid.fate == "killed" else kid.text[-1])
        assert kid.fate != "killed" or kid.text.endswith("|")
    nobody = play(ab.SlimSC(n=8, threshold=1.5, boundary="|", vote="number", temperature=None), parts, seed=4)
    assert None not in nobody.answers
    late = play(ab.SlimSC(n=8, warmup=5, boundary="|", vote="number", temperature=None, top_p=None), parts, seed=4)
    assert None not in late.answers
    alike = play(ab.SlimSC(n=4, similarity=lambda a, b: 1, boundary="|", vote="number", temperature=None), parts)
    assert sum(answer is not None for answer in alike.answers) == 1


class Chain:
    def __init__(self):
        self.alive = True

    def kill(self):
        self.alive = False


@pytest.mark.parametrize(
    "thoughts,writing,killed,why",
    [
        ([["x"], ["x"]], [0, 1], 1, "of two that are as diverse the later one goes"),
        ([["x", "x"], ["y", "x"]], [0], 0, "the chain whose own thoughts are more alike goes"),
        ([["y", "x"], ["x", "x"]], [0, 1], 1, "whichever of the two wrote"),
        ([["x"], ["x"]], [0], 0, "a chain that has come to its end keeps its vote: the one that writes goes"),
        ([["x", "z"], ["y", "x"]], [0], None, "only the newest thought is compared"),
    ],
)
def test_which_of_two_chains_goes(thoughts, writing, killed, why):
    """A thought that is just as alike as the threshold says counts."""
    strategy = ab.SlimSC(n=2, similarity=lambda a, b: 0.7 if a == b else 0.1, threshold=0.7, vote="number")
    chains = [Chain(), Chain()]
    strategy._drop_alike(chains, thoughts, writing)
    assert [chain.alive for chain in chains] == [killed != 0, killed != 1], why


def test_likeness_of_letters():
    assert letters_alike("So x = 3.", "so  X = 3.") == pytest.approx(1.0)
    assert letters_alike("abc", "xyz") == 0 and letters_alike("", "") == 1 and letters_alike("", "a") == 0
    assert 0.3 < letters_alike("the sum is 12", "the sum is 15 then") < 1


def test_step_prunes_by_hidden_states():
    engine = make_engine(tokenizer=byte_tokenizer(), num_pages=2000)
    seen = []

    def scorer(hidden):
        seen.append(hidden)
        return hidden[0]

    strategy = ab.STEP(scorer=scorer, n=5, prune=1, least=3, step_tokens=5, temperature=1.0, top_p=None)
    result = engine.generate("abc", strategy=strategy, max_new_tokens=20, eos_token_id=None, seed=4)
    assert_nothing_held(engine)
    assert len(seen[0]) == 48 and [kid.fate for kid in result.tree.children].count("killed") == 2
    lengths = sorted(len(kid.token_ids) for kid in result.tree.children)
    assert lengths == [5, 10, 20, 20, 20]
    scores = [[] for _ in range(5)]
    from engine_kit import make_model

    for kid, own in zip(result.tree.children, scores, strict=True):
        for end in range(5, len(kid.token_ids) + 1, 5):
            with torch.no_grad():
                inner = make_model().model(torch.tensor([[*ids("abc"), *kid.token_ids[:end]]])).last_hidden_state
            own.append(float(inner[0, -1, 0]))
    first = min(range(5), key=lambda i: scores[i][0])
    assert len(result.tree.children[first].token_ids) == 5
    best = max((i for i in range(5) if len(scores[i]) == 4), key=lambda i: sum(scores[i]) / 4)
    assert result.tree.children[best].fate == "joined" and result.text == result.answers[best]


# ------------------------------------------------------------------------------------------------ pools and thoughts


def test_the_worst_take_the_place_of_the_best():
    engine = make_engine(tokenizer=byte_tokenizer(), num_pages=2000)
    order = {}
    strategy = ab.PruneRefork(n=6, every=4, swap=2, scorer=lambda text: order.setdefault(text, -ord(text[0])))
    result = engine.generate("abc", strategy=strategy, max_new_tokens=12, eos_token_id=None, seed=5)
    assert_nothing_held(engine)
    kids = result.tree.children
    assert len(kids) == 6 and result.metrics.sampled_tokens == 6 * 12
    firsts = [kid.forgotten[0].token_ids[0] if kid.forgotten else kid.token_ids[0] for kid in kids]
    assert sum(bool(kid.forgotten) for kid in kids) >= 2
    texts = {kid.id: kid.text for kid in kids}
    worst = sorted(range(6), key=lambda i: (order_of(firsts[i]), -i))[:2]
    assert all(kids[i].forgotten[0].token_ids[0] == firsts[i] for i in worst)
    assert all(len(kid.token_ids) == 12 for kid in kids) and result.text in texts.values()
    assert result.answers == [kid.text for kid in kids]
    ab.replay(result, engine)


def order_of(token):
    return -ord(byte_tokenizer().decode([token])[0])


def test_refork_keeps_a_full_pool_and_votes():
    parts = {"a": "...... 1", "b": ",,,,,, 2"}
    strategy = ab.PruneRefork(n=4, every=3, swap=2, scorer=lambda t: t[0] == "b", vote="number", temperature=None)
    result = play(strategy, parts, seed=1)
    assert result.answers == ["2"] * 4 and result.text == "b,,,,,, 2"


def test_a_tree_of_thoughts_keeps_the_best_of_each_level():
    parts = {"a": "1\nxx\nyy\nend", "b": "2.\nxxx\nyy\nend", "c": "3..\nxxx\ny\nend"}
    strategy = ab.TreeOfThoughts(depth=2, propose=8, keep=2, scorer=len, temperature=None)
    result = play(strategy, parts)
    assert result.text == "c" + parts["c"]  # the trunk writes on behind the best state
    assert [a.count("\n") for a in result.answers] == [2, 2] and result.answers[0] == "c3..\nxxx\n"
    assert {node.role for node in result.tree.children} == {"fork"}


class Judge(Plays):
    """Part b is judged well."""

    def __call__(self, input_ids, scores):
        if "Good?" not in (text := byte_tokenizer().decode(input_ids[0].tolist())):
            return super().__call__(input_ids, scores)
        raise AssertionError(f"nothing is sampled behind the question: {text}")


def test_the_model_judges_its_own_thoughts():
    engine = make_engine(tokenizer=byte_tokenizer(), num_pages=2000)
    parts = {"a": "1\nend", "b": "2\nend", "c": "3\nend"}
    strategy = ab.TreeOfThoughts(depth=1, propose=8, keep=1, question="Good?", yes="y", no="n", temperature=None)
    result = engine.generate("?", strategy=strategy, logits_processor=[Judge(parts)], max_new_tokens=30, top_k=0)
    assert_nothing_held(engine)
    values = {}
    for kid in result.tree.children:
        state = kid.text.partition("\n")[0] + "\n"
        logp = engine_logp(list(ids("?" + state + "Good?")))[-1]
        yes, no = (float(logp[ids(word)[0]].exp()) for word in ("y", "n"))
        values[state] = yes / (yes + no)
    assert result.answers == [max(values, key=lambda state: values[state])]
    assert result.text == result.answers[0] + "end"


def test_beams_of_steps():
    parts = {"a": "1\nxx\nyy", "b": "22\nxxx\ny", "c": "3\nx\nyyyy"}
    strategy = ab.StepBeamSearch(width=2, samples=4, scorer=len, temperature=None)
    result = play(strategy, parts)
    assert result.text == "b" + parts["b"] and result.answers[0] == result.text and len(result.answers) == 2
    cut = play(ab.StepBeamSearch(width=2, samples=4, scorer=len, max_steps=1, temperature=None), parts)
    assert cut.text == "b22\n"


# ------------------------------------------------------------------------------------------------ company, bad input


STRATEGIES = [
    ab.BestOfN(n=3),
    ab.DeepConf(n=6, warmup=3, window=5, vote="number", keep=0.5),
    ab.ParallelProbe(n=4, stable=2, warmup=1, deviations=1, least=2, **PROBED),
    ab.SlimSC(n=4, boundary=("a", "e", "5"), threshold=0.1, vote="number"),
    ab.STEP(scorer=lambda hidden: hidden[0], n=4, step_tokens=5),
    ab.PruneRefork(n=4, every=4, swap=2),
    ab.TreeOfThoughts(depth=2, thought_tokens=4, question="OK?"),
    ab.StepBeamSearch(width=2, samples=2, step_tokens=4, max_steps=3),
]


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda s: type(s).__name__)
def test_same_seed_same_tree_in_any_company(strategy):
    prompts = [f"hi {i}" for i in range(16)]
    roomy = make_engine(tokenizer=byte_tokenizer(), num_pages=4000)
    options = dict(strategy=strategy, max_new_tokens=14)
    recorder = Recorder()
    alone = roomy.generate(prompts[0], seed=7, **options)
    watched = roomy.generate(prompts[0], seed=7, logits_processor=[recorder], **options)
    assert watched.tree == alone.tree
    together = roomy.generate(prompts, seed=[7, *range(15)], **options)
    assert together[0].tree == alone.tree
    few = make_engine(tokenizer=byte_tokenizer(), num_pages=13, max_rows=9)
    tight = few.generate(prompts[:2], seed=[7, 0], **options)
    assert [r.tree for r in tight] == [r.tree for r in together[:2]] and sum(r.metrics.preemptions for r in tight) > 0
    assert ab.replay(alone, roomy).tree.token_ids == alone.token_ids
    for engine in (roomy, few):
        assert_nothing_held(engine)
    for context, scores in recorder.seen[:: max(1, len(recorder.seen) // 6)]:  # rows behind forks, densely again
        with torch.no_grad():
            expected = engine_logits(list(context))
        torch.testing.assert_close(scores, expected, atol=3e-4, rtol=3e-4)


def engine_logits(tokens):
    from engine_kit import make_model

    with torch.no_grad():
        return make_model()(torch.tensor([tokens])).logits[0, -1].float()


def test_every_row_of_a_best_of_n_is_the_dense_one():
    engine, recorder = make_engine(), Recorder()
    result = engine.generate([1, 2, 3, 4, 5], strategy=ab.BestOfN(n=4), max_new_tokens=9, logits_processor=[recorder])
    assert assert_dense(result, recorder, "llama") > 20


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ab.BestOfN(n=0), "BestOfN: n=0"),
        (lambda: ab.BestOfN(scorer="logprop"), "scorer='logprop'; did you mean 'logprob'"),
        (lambda: ab.BestOfN(scorer=7), "scorer=7; pass a function"),
        (lambda: ab.DeepConf(n=0), "DeepConf: n=0"),
        (lambda: ab.DeepConf(mode="ofline"), "did you mean 'offline'"),
        (lambda: ab.DeepConf(measure="tail"), "measure='tail' online"),
        (lambda: ab.DeepConf(mode="offline", measure="tial"), "did you mean 'tail'"),
        (lambda: ab.DeepConf(keep=0), "keep=0"),
        (lambda: ab.DeepConf(vote=None), "vote=None"),
        (lambda: ab.ParallelProbe(n=0), "ParallelProbe: n=0"),
        (lambda: ab.ParallelProbe(share=2), "share=2"),
        (lambda: ab.ParallelProbe(probe=""), "probe is empty"),
        (lambda: ab.SlimSC(n=0), "SlimSC: n=0"),
        (lambda: ab.SlimSC(prune="divers"), "did you mean 'diversity'"),
        (lambda: ab.SlimSC(similarity=3), "similarity=3"),
        (lambda: ab.STEP(scorer="x"), "STEP: scorer='x'"),
        (lambda: ab.PruneRefork(n=4, swap=3), "swap=3 of n=4"),
        (lambda: ab.TreeOfThoughts(keep=0), "TreeOfThoughts: keep=0"),
        (lambda: ab.TreeOfThoughts(question=""), "question, yes and no"),
        (lambda: ab.StepBeamSearch(width=0), "StepBeamSearch: width=0"),
    ],
)
def test_bad_fields(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()


@pytest.mark.parametrize("strategy", [s for s in STRATEGIES if not isinstance(s, (ab.BestOfN, ab.PruneRefork))])
def test_without_a_tokenizer_it_works_or_says_why(strategy):
    engine = make_engine()
    try:
        engine.generate([1, 2, 3], strategy=strategy, max_new_tokens=10)
    except ValueError as error:
        assert "tokenizer" in str(error)
    assert_nothing_held(engine)


def test_the_entropy_fork_by_margin():
    engine = make_engine()
    options = dict(max_new_tokens=20, eos_token_id=None)
    plain = engine.generate([5, 6, 7], **options).token_ids
    top = engine_logp([5, 6, 7, *plain])[2:-1].exp().topk(2).values
    margins = (top[:, 0] - top[:, 1]).tolist()
    margin = sorted(margins)[1]  # one token alone has less
    result = engine.generate([5, 6, 7], strategy=ab.EntropyFork(threshold=None, margin=margin, n=3), **options)
    assert {kid.forked_at for kid in result.tree.children} == {3 + margins.index(min(margins))}
    with pytest.raises(ValueError, match="threshold=None and margin=None"):
        ab.EntropyFork(threshold=None)
    assert_nothing_held(engine)


@pytest.mark.parametrize("name", ["beam_search", "best_of_n", "deepconf", "parallel_probe", "pruning", "thoughts"])
def test_the_code_of_its_page_runs(name):
    engine = make_engine(tokenizer=byte_tokenizer(), num_pages=2000)
    page = Path(__file__).resolve().parents[2] / "docs" / "systems" / f"{name}.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.S)
    assert blocks
    for block in blocks:
        names = {"ab": ab, "engine": engine, "prompt": "What is 2 + 3?"}
        exec(block, names)
        assert names["result"].text is not None
        assert_nothing_held(engine)


def test_a_server_and_a_story_tell_what_became_of_a_thread():
    pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
    from anabranch.serve.answers import Follower
    from anabranch.viz.story import Story

    engine = make_engine(tokenizer=byte_tokenizer())
    strategy = ab.PruneRefork(n=4, every=3, swap=2)
    telling, story = Follower(()), Story()
    told = ""
    for event in engine.stream("abc", strategy=strategy, max_new_tokens=9, seed=3):
        told += telling.take(event)
        story.take(event)
    told += telling.finish(story.result)
    assert told == story.result.text and not telling.rewritten
    winner = next(kid for kid in story.result.tree.children if kid.fate == "joined")
    assert story.branches[winner.id].text == winner.text
    assert_nothing_held(engine)
