"""Group Think: who sees what at which step, token for token, against a dense computation written apart from it."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from engine_kit import EOS, assert_nothing_held, byte_tokenizer
from live_kit import FAMILIES, Recorder, dense, engine
from transformers import LogitsProcessor

import anabranch as ab
from anabranch.records.trace import Trace
from anabranch.strategies import Strategy

PROMPT = "Hello there"
SAMPLED = dict(do_sample=True, seed=4)


def generate(eng, strategy, prompt=PROMPT, **options):
    result = eng.generate(prompt, strategy=strategy, **{**SAMPLED, **options})
    assert_nothing_held(eng)
    return result


@dataclass
class Written:
    """All tokens of a Group Think run by the paper's rules, and what each row sees."""

    result: ab.Result
    headers: tuple[str, ...]
    room: int
    same_step: str

    def __post_init__(self) -> None:
        prompt = self.result.prompt_token_ids
        self.tokens = [(token, i) for i, token in enumerate(prompt)]
        self.sees = [dict.fromkeys(range(i + 1), 0) for i in range(len(prompt))]
        written: list[tuple[int, int, int, int]] = []  # worker, step, number, index
        for worker, kid in enumerate(self.result.tree.children):
            header = len(self.headers[worker].encode())
            ids = [t for run in kid.runs for t in run.token_ids]
            for number, token in enumerate(ids):
                # The header is computed in the first step, then one token a step.
                written.append((worker, max(1, number - header + 2), number, len(self.tokens)))
                self.tokens.append((token, len(prompt) + worker * self.room + number))
        self.contexts: dict[tuple[int, ...], int] = {}
        for worker, step, number, index in written:
            seen = list(range(len(prompt)))
            for other, then, at, where in written:
                if other == worker:
                    if at <= number:
                        seen.append(where)
                elif then < step or (then == step and self.sees_same(worker, other)):
                    seen.append(where)
            self.sees.append(dict.fromkeys(seen, 0))
            own = [w for o, _, a, w in written if o == worker and a <= number]
            self.contexts[(*prompt, *(self.tokens[i][0] for i in own))] = index

    def sees_same(self, worker: int, other: int) -> bool:
        return self.same_step == "all" or (self.same_step == "before" and other < worker)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("same_step", ["all", "before", "none"])
def test_every_row_equals_a_dense_recomputation(family, same_step):
    headers = ("\nA:", "\nBob says:", "\nC.")
    recorder = Recorder()
    strategy = ab.GroupThink(3, tokens=9, headers=headers, room=50, same_step=same_step)
    result = generate(engine(family), strategy, logits_processor=[recorder])
    written = Written(result, headers, 50, same_step)
    logits = dense(family, written.tokens, written.sees)
    compared = 0
    for context, scores in recorder.seen:
        if context in written.contexts:
            expected = logits[written.contexts[context]]
            assert float((scores - expected).norm() / expected.norm()) < 2e-5
            compared += 1
    assert compared >= 3 * 6


def test_the_tree_token_for_token():
    """Positions, turns, texts and costs of a run that is written down here."""
    result = generate(engine(), ab.GroupThink(2, tokens=5, headers=("\nA:", "\nBcd:"), room=40))
    first, second = result.tree.children
    start = len(PROMPT)
    assert (first.start, first.stop, second.start, second.stop) == (start, start + 8, start + 40, start + 50)
    assert first.turns == ((1, 3), (2, 1), (3, 1), (4, 1), (5, 1)) and second.turns == ((1, 5), *first.turns[1:])
    assert [s.others for s in first.sights] == [("0.1",)] and not first.sights[0].lined_up
    assert result.token_ids == (*first.token_ids, *second.token_ids)
    assert result.answers == [first.text[3:], second.text[5:]]
    assert result.metrics.total_tokens == 18 and result.metrics.critical_path_tokens == 10
    assert result.metrics.max_concurrency == 2
    # The prompt, then a forward a turn.
    assert result.metrics.steps == 1 + 5 and result.metrics.rows == start + 8 + 2 * 4


@pytest.mark.parametrize("same_step", ["all", "before", "none"])
def test_the_same_seed_gives_the_same_tree_anywhere(same_step):
    """Alone, in small chunks, in a batch of 16, and with so few pages that prompts push one another out."""
    strategy = ab.GroupThink(3, tokens=10, room=64, same_step=same_step, conclusion="\nSo")
    options = dict(max_new_tokens=16, do_sample=True)
    alone = engine().generate(PROMPT, strategy=strategy, seed=4, **options)
    assert engine(max_rows=20).generate(PROMPT, strategy=strategy, seed=4, **options).tree.runs[0] == alone.tree.runs[0]
    prompts = [f"{PROMPT[: 4 + i]} {i}" for i in range(15)] + [PROMPT]
    many = engine().generate(prompts, strategy=strategy, seed=[*range(10, 25), 4], **options)
    assert many[-1].tree == alone.tree
    short = engine(num_pages=60)
    few = short.generate(prompts, strategy=strategy, seed=[*range(10, 25), 4], **options)
    assert sum(r.metrics.preemptions for r in few) > 0
    assert [r.tree for r in few] == [r.tree for r in many]
    assert_nothing_held(short)


def test_max_threads_and_batch_company_change_nothing():
    strategy = ab.GroupThink(4, tokens=6, room=30)
    alone = generate(engine(), strategy)
    limited = engine(max_threads=1).generate([PROMPT, "Other"], strategy=strategy, **SAMPLED | {"seed": [4, 5]})
    assert limited[0].tree == alone.tree


def test_shared_positions():
    result = generate(engine(), ab.GroupThink(3, tokens=4, room=None))
    assert {kid.start for kid in result.tree.children} == {len(PROMPT)}


def test_a_workers_eos_is_not_shown():
    class End(LogitsProcessor):
        def __call__(self, ids, scores):
            scores[:, EOS] = -torch.inf
            header = byte_tokenizer().encode("\nBob:", add_special_tokens=False)
            if ids[0, len(PROMPT) :].tolist()[:5] == header and ids.shape[1] >= len(PROMPT) + 5 + 3:
                scores[:] = -torch.inf
                scores[:, EOS] = 0
            return scores

    result = generate(engine(), ab.GroupThink(2, tokens=6, room=40), logits_processor=[End()])
    ann, bob = result.tree.children
    assert bob.ended == "eos" and EOS not in bob.token_ids and len(bob.token_ids) == 5 + 3
    assert sum(n for _, n in bob.turns) == 8 and ann.ended == "length" and len(ann.token_ids) == 5 + 6


@pytest.mark.parametrize("same_step", ["all", "before", "none"])
def test_replay_and_saved_traces(same_step, tmp_path):
    strategy = ab.GroupThink(3, tokens=8, room=64, same_step=same_step, conclusion="\nSo")
    result = generate(engine("qwen3"), strategy, logprobs=True, max_new_tokens=14)
    result.trace().save(tmp_path / "trace.json")
    trace = Trace.from_dict(result.trace().as_dict())
    assert trace.tree == result.tree
    eng = engine("qwen3")
    pairs = list(ab.engine.logprob_pairs(result, ab.replay(trace, eng)))
    assert len(pairs) >= result.metrics.sampled_tokens and max(abs(a - b) for a, b in pairs) < 1e-4
    assert_nothing_held(eng)


@pytest.mark.parametrize("same_step", ["before", "none"])
def test_a_training_row_shows_a_model_the_same(same_step):
    """Every sampled token had the probability that one training forward over the trace gives it."""
    strategy = ab.GroupThink(3, tokens=7, room=32, same_step=same_step, conclusion="\nSo")
    eng = engine()
    result = generate(eng, strategy, logprobs=True, max_new_tokens=12)
    layout = ab.training.from_trace(result)
    packed = ab.training.Layout.pack([layout, ab.training.Layout.from_dict(layout.as_dict())])
    for row in (layout, packed):
        logprobs = row.logprobs(eng.model)
        assert len(logprobs) == result.metrics.sampled_tokens * (1 + (row is packed))
        torch.testing.assert_close(logprobs.detach(), row.recorded[row.learnt], atol=1e-4, rtol=0)
    everything = layout.batch(logits="all")
    assert everything["shift_labels"].shape[1] >= layout.num_tokens


def test_rows_of_one_step_that_see_one_another_have_no_training_row():
    result = generate(engine(), ab.GroupThink(2, tokens=3))
    with pytest.raises(ValueError, match="has no causal order"):
        ab.training.from_trace(result)


class TestBadInput:
    @pytest.mark.parametrize(
        "options,match",
        [
            (dict(workers=0), "workers"),
            (dict(workers=2.5), "workers"),
            (dict(tokens=0), "tokens"),
            (dict(room=0), "room"),
            (dict(headers=("a",)), "one for each of the 4"),
            (dict(headers=("a", "b", "c", "")), "may not be empty"),
            (dict(same_step="some"), "same_step"),
            (dict(conclusion=""), "conclusion is empty"),
        ],
    )
    def test_options(self, options, match):
        with pytest.raises((ValueError, TypeError), match=match):
            ab.GroupThink(**options)

    def raises(self, match, strategy, **options):
        eng = engine(**options)
        with pytest.raises(ValueError, match=match):
            eng.generate(PROMPT, strategy=strategy, **SAMPLED)
        assert_nothing_held(eng)
        assert eng.generate(PROMPT, max_new_tokens=2).token_ids

    def test_a_room_that_the_header_fills(self):
        self.raises("room=5 is taken by the header", ab.GroupThink(2, room=5))

    def test_fewer_rows_than_workers(self):
        self.raises("max_rows=3: 4 threads", ab.GroupThink(4, tokens=3), max_rows=3)

    def test_too_few_pages(self):
        self.raises("num_pages=8", ab.GroupThink(4, tokens=20), num_pages=8)

    def test_one_after_another(self):
        self.raises("Sequential", ab.Sequential(ab.GroupThink(2, tokens=3)))

    def test_a_workers_error_frees_everything(self):
        @dataclass(frozen=True)
        class Fails(Strategy):
            def run(self, trunk):
                kids = trunk.fork(2)
                kids[0].see(kids[1])
                yield [kid.decode(3) for kid in kids]
                raise ValueError("on purpose")

        self.raises("on purpose", Fails())

    def test_see(self):
        calls = {
            "pass the threads to be seen": lambda a, b: a.see(3),
            "each once": lambda a, b: a.see([b, b]),
            "other threads of the same prompt": lambda a, b: a.see(a),
            "same_step='x'": lambda a, b: a.see(b, same_step="x"),
            "lined_up=True for": lambda a, b: a.see(b, lined_up=True),
        }

        @dataclass(frozen=True)
        class Asks(Strategy):
            def run(self, trunk):
                a, b = trunk.fork(2)
                for match, call in calls.items():
                    with pytest.raises((ValueError, TypeError), match=match):
                        call(a, b)
                yield [kid.decode(2) for kid in (a, b)]

        generate(engine(), Asks())

    @pytest.mark.parametrize("what,match", [("join", "mode='concat' splices"), ("cut", "has seen what would go")])
    def test_what_others_saw_stays(self, what, match):
        @dataclass(frozen=True)
        class Asks(Strategy):
            def run(self, trunk):
                a, b = trunk.fork(2)
                a.see(b)
                yield b.decode(3)
                yield a.decode(3)
                yield trunk.join([a, b]) if what == "join" else b.truncate(b.length - 2)

        self.raises(match, Asks())


def test_a_killed_thread_is_out_of_sight():
    """Its pages are free at once; those that saw it go on, and cannot be pushed out any more."""

    @dataclass(frozen=True)
    class Kills(Strategy):
        def run(self, trunk):
            a, b = trunk.fork(2)
            a.see(b)
            first = b.decode(3)
            yield [a.decode(3), first]
            b.kill()
            yield a.decode(4)

    result = generate(engine(), Kills())
    assert result.tree.children[0].turns[-1][0] >= 6 and result.tree.children[1].fate == "killed"
