"""Requests that join and leave between two steps: handles, order, errors of one alone, many threads, and a soak."""

from __future__ import annotations

import random
import threading
import time
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from engine_kit import EOS, SIZES, Nested, assert_nothing_held, byte_tokenizer, make_engine
from programs_of_threads import Anything
from soak_kit import STATM, LongRun
from transformers import LlamaConfig, LlamaForCausalLM

import anabranch as ab
from anabranch.engine import Finish, Token
from anabranch.strategies import SelfConsistency, Sequential, Strategy

PROMPT = [5, 6, 7, 8, 9, 10, 11]
FREE = dict(eos_token_id=None, max_new_tokens=12)


def drain(engine: ab.Engine, most: int = 10_000) -> int:
    """Step until nothing is left; how many steps that took."""
    for steps in range(1, most):
        if not engine.step():
            return steps
    raise AssertionError("it does not come to an end")


def until_full(op):
    raise LookupError("in an until")


def boom_at(length):
    def processor(input_ids, scores):
        if input_ids.shape[1] >= length:
            raise ArithmeticError("in a processor")
        return torch.zeros(1, dtype=torch.bool) if scores is None else scores  # as a criterion, as a processor

    return processor


@dataclass(frozen=True)
class Breaks(Strategy):
    at: int = 3

    def run(self, trunk):
        yield trunk.decode(self.at)
        kids = trunk.fork(2)
        yield [kid.decode(2) for kid in kids]
        raise LookupError("in a strategy")


@dataclass(frozen=True)
class BreaksInUntil(Strategy):
    def run(self, trunk):
        yield trunk.decode(6, until=until_full)


@dataclass(frozen=True)
class BreaksAtOnce(Strategy):
    def run(self, trunk):
        raise LookupError("at once")
        yield


@dataclass(frozen=True)
class BreaksAtItsEnd(Strategy):
    """Its generator objects to being closed."""

    def run(self, trunk):
        try:
            yield trunk.decode(9)
        finally:
            raise LookupError("while it is closed")


@dataclass(frozen=True)
class Hangs(Strategy):
    def run(self, trunk):
        from anabranch.strategies.api.awaitable import Awaitable

        yield trunk.decode(2)
        yield Awaitable()


BROKEN = {
    "strategy": (dict(strategy=Breaks()), LookupError),
    "until": (dict(strategy=BreaksInUntil()), LookupError),
    "at once": (dict(strategy=BreaksAtOnce()), LookupError),
    "hangs": (dict(strategy=Hangs()), RuntimeError),
    "processor": (dict(logits_processor=[boom_at(9)]), ArithmeticError),
    "criterion": (dict(stopping_criteria=[boom_at(9)]), ArithmeticError),
    "no choice": (dict(bad_words_ids=[[i] for i in range(260)]), ValueError),
    "does not fit": (dict(strategy=SelfConsistency(2), max_new_tokens=250), ValueError),
}


# ------------------------------------------------------------------------------------------------ handles


def test_a_handle_gives_what_generate_gives():
    engine = make_engine(tokenizer=byte_tokenizer())
    expected = make_engine(tokenizer=byte_tokenizer()).generate("abc", Nested(), seed=3, max_new_tokens=60)
    handle = engine.add("abc", Nested(), seed=3, max_new_tokens=60)
    assert not handle.done and "running" in repr(handle)
    assert engine.step() is True
    result = handle.result()
    assert handle.done and "done" in repr(handle)
    assert (result.tree, result.text) == (expected.tree, expected.text) and handle.result() is result
    events = list(handle)
    assert events == list(handle.events()) and isinstance(events[-1], Finish) and events[-1].result is result
    streamed = list(make_engine(tokenizer=byte_tokenizer()).stream("abc", Nested(), seed=3, max_new_tokens=60))
    assert events[:-1] == streamed[:-1]
    assert engine.step() is False
    assert_nothing_held(engine)


def test_requests_join_and_leave_between_any_two_steps():
    engine, alone = make_engine(num_pages=600), make_engine(num_pages=600)
    prompts = [[i, *range(40, 50 + i)] for i in range(6)]
    strategies = [None, Nested(), SelfConsistency(3), Sequential(Nested()), None, Nested()]
    options = [FREE | dict(max_new_tokens=5 + 3 * i, seed=i, do_sample=i == 4) for i in range(6)]
    expected = [alone.generate(p, s, **o) for p, s, o in zip(prompts, strategies, options, strict=True)]
    handles = []
    for prompt, strategy, option in zip(prompts, strategies, options, strict=True):
        handles.append(engine.add(prompt, strategy, **option))
        for _ in range(3):
            engine.step()
    drain(engine)
    for handle, one in zip(handles, expected, strict=True):
        assert handle.done and handle.result().tree == one.tree
        assert handle.result().metrics.critical_path_tokens == one.metrics.critical_path_tokens
        assert handle.result().metrics.rows == one.metrics.rows
    assert_nothing_held(engine)


def test_a_step_serves_all_that_are_there():
    engine = make_engine()
    handles = [engine.add(PROMPT, seed=i, **FREE) for i in range(5)]
    steps = drain(engine)
    assert steps == 12 and all(h.result().metrics.steps == 12 for h in handles)


def test_requests_of_their_own_settings():
    """Configs, processors, seeds, budgets and log-probabilities of one are no one else's."""
    engine = make_engine()
    seen = []

    def watch(input_ids, scores):
        seen.append(tuple(input_ids.shape))
        return scores

    settings = [
        dict(max_new_tokens=3, eos_token_id=None),
        dict(do_sample=True, temperature=2.0, seed=5, **FREE),
        dict(do_sample=True, temperature=2.0, seed=6, **FREE),
        dict(logits_processor=[watch], **FREE),
        dict(logprobs=True, repetition_penalty=1.7, **FREE),
        dict(suppress_tokens=list(range(100)), **FREE),
        dict(max_total_tokens=7, **FREE),
    ]
    alone = [make_engine().generate(PROMPT, **s) for s in settings]
    seen.clear()
    together = [h.result() for h in [engine.add(PROMPT, **s) for s in settings]]
    assert [r.tree for r in together] == [r.tree for r in alone]
    assert seen == [(1, n) for n in range(7, 19)]
    assert together[4].tree.runs[-1].logprobs and not together[1].tree.runs[-1].logprobs
    assert len({r.token_ids for r in together[:6]}) == 6


def test_abort_in_any_state():
    engine = make_engine()
    never = engine.add(PROMPT, **FREE)
    never.abort()
    assert never.done and never.result().tree.fate == "killed" and never.result().token_ids == ()
    other = engine.add([1, 2, 3], **FREE)
    for steps in range(1, 14):
        handle = engine.add(PROMPT, Nested(), **FREE)
        for _ in range(steps):
            engine.step()
        handle.abort()
        handle.abort()
        assert handle.done and handle.result().tree.fate in ("killed", "finished")
        engine.cache.check()
    assert other.result().tree == make_engine().generate([1, 2, 3], **FREE).tree
    assert_nothing_held(engine)


def test_engine_abort_ends_all_waiting_or_not():
    engine = make_engine(num_pages=12)
    handles = [engine.add([i] * 20, **FREE) for i in range(6)]
    engine.step()
    engine.abort()
    assert all(h.done and h.result().tree.fate == "killed" for h in handles)
    assert sum(len(h.result().token_ids) for h in handles) > 0
    assert_nothing_held(engine) or not engine.step()


def test_results_in_time_and_deadlines():
    engine = make_engine(num_pages=2000)
    handle = engine.add(PROMPT, eos_token_id=None, max_new_tokens=1000)
    with pytest.raises(TimeoutError, match="timeout=0"):
        handle.result(timeout=0)
    assert not handle.done
    late = engine.add(PROMPT, eos_token_id=None, max_new_tokens=1500, deadline=0.2)
    with pytest.raises(ab.DeadlineExceeded, match="deadline") as error:
        late.result()
    (partial,) = error.value.results
    assert partial.tree.fate == "killed" and 0 < len(partial.token_ids) < 1500
    with pytest.raises(TimeoutError):
        engine.generate([PROMPT, PROMPT], eos_token_id=None, max_new_tokens=1500, deadline=0.1)
    handle.abort()
    waiting = engine.add(PROMPT, deadline=0.01)
    time.sleep(0.02)
    engine.step()
    with pytest.raises(ab.DeadlineExceeded):
        waiting.result()
    assert_nothing_held(engine)


def test_a_full_queue_says_so():
    engine = make_engine(max_queue=2)
    first = [engine.add(PROMPT, **FREE), engine.add(PROMPT, **FREE)]
    with pytest.raises(ab.QueueFull, match="max_queue=2"):
        engine.add(PROMPT, **FREE)
    assert engine.generate(PROMPT, **FREE).tree == first[0].result().tree  # a caller that waits is not refused
    assert engine.add(PROMPT, **FREE).result().tree == first[1].result().tree
    assert_nothing_held(engine)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(prompt=[PROMPT, PROMPT]), "add takes one prompt"),
        (dict(prompt=PROMPT, priority=1.5), "priority=1.5"),
        (dict(prompt=PROMPT, priority=101), "priority=101.*from -100 to 100"),
        (dict(prompt=PROMPT, deadline=0), "deadline=0; pass seconds > 0"),
        (dict(prompt=PROMPT, deadline="soon"), "deadline='soon'"),
        (dict(prompt=PROMPT, num_beams=3), "num_beams"),
        (dict(prompt=[0] * 5000), "can never fit"),
    ],
)
def test_bad_input_is_refused_before_it_is_added(arguments, message):
    engine = make_engine()
    with pytest.raises(ValueError, match=message):
        engine.add(**arguments)
    assert engine.step() is False
    for wrong in (0, 1.5, "9"):
        with pytest.raises(ValueError, match="max_queue"):
            make_engine(max_queue=wrong)
    handle = engine.add(PROMPT, **FREE)
    with pytest.raises(ValueError, match="timeout=-1"):
        handle.result(timeout=-1)


# ------------------------------------------------------------------------------------------------ errors of one


@pytest.mark.parametrize("name", BROKEN)
def test_an_error_ends_its_own_request_alone(name):
    arguments, kind = BROKEN[name]
    engine = make_engine(num_pages=50)
    good = [dict(strategy=Nested(), seed=1, **FREE), dict(do_sample=True, seed=2, **FREE), FREE]
    expected = [make_engine().generate(PROMPT, **g) for g in good]
    before = [engine.add(PROMPT, **g) for g in good]
    engine.step()
    broken = engine.add(PROMPT, **(FREE | arguments))
    after = [engine.add(PROMPT, **g) for g in good]
    drain(engine)
    with pytest.raises(kind):
        broken.result()
    assert broken.done and "failed" in repr(broken)
    with pytest.raises(kind):
        list(broken.events())
    for handles in (before, after):
        assert [h.result().tree for h in handles] == [r.tree for r in expected]
    assert_nothing_held(engine)


@pytest.mark.parametrize("name", BROKEN)
def test_an_error_in_generate_comes_out_and_leaves_the_others(name):
    arguments, kind = BROKEN[name]
    engine = make_engine(num_pages=50)
    other = engine.add(PROMPT, Nested(), seed=1, **FREE)
    engine.step()
    with pytest.raises(kind):
        engine.generate([PROMPT, [1, 2, 3, 4]], **(FREE | arguments))
    assert not engine.loop.waiting and len(engine.loop.active) <= 1  # all of that call is gone
    assert other.result().tree == make_engine().generate(PROMPT, Nested(), seed=1, **FREE).tree
    assert_nothing_held(engine)


def test_an_error_of_one_of_many_that_are_sampled_together():
    """Equal settings are sampled in one pass; a context that leaves no token fails alone, and no draw is lost."""
    words = [[7], *([7, i] for i in range(260))]  # nothing may follow a 7
    options = dict(bad_words_ids=words, do_sample=True, temperature=1.2, top_k=0, seed=3, **FREE)
    engine = make_engine()
    handles = [engine.add([1, 2, last], **options) for last in (3, 7, 4)]
    with pytest.raises(ValueError, match="no token can be chosen"):
        handles[1].result()
    for handle, last in ((handles[0], 3), (handles[2], 4)):
        assert handle.result().tree == make_engine().generate([1, 2, last], **options).tree
    assert_nothing_held(engine)


def test_a_generator_that_objects_to_its_end():
    engine = make_engine()
    handle, other = engine.add(PROMPT, BreaksAtItsEnd(), **FREE), engine.add(PROMPT, **FREE)
    engine.step()
    handle.abort()
    with pytest.raises(LookupError, match="while it is closed"):
        handle.result()
    assert other.result().tree == make_engine().generate(PROMPT, **FREE).tree
    assert_nothing_held(engine)


def test_scores_that_are_no_numbers_end_those_who_have_them():
    engine = make_engine()
    with torch.no_grad():
        engine.model.get_input_embeddings().weight[200] = float("nan")
    good, bad = engine.add(PROMPT, **FREE), engine.add([1, 200, 3], **FREE)
    with pytest.raises(ValueError, match="returned NaN scores in step 1 for prompt 0, thread 0, position 2"):
        bad.result()
    assert good.result().tree == make_engine().generate(PROMPT, **FREE).tree
    assert_nothing_held(engine)


def test_a_forward_that_fails_fails_for_those_in_it():
    engine = make_engine()
    failing = [False]

    def hook(module, args):
        if failing[0]:
            raise MemoryError("no memory")

    engine.model.model.layers[1].register_forward_pre_hook(hook)
    handles = [engine.add(PROMPT, Nested(), **FREE), engine.add([1, 2], **FREE)]
    engine.step()
    failing[0] = True
    engine.step()
    failing[0] = False
    for handle in handles:
        with pytest.raises(MemoryError):
            handle.result()
    assert engine.generate(PROMPT, **FREE).tree == make_engine().generate(PROMPT, **FREE).tree
    assert_nothing_held(engine)


def test_an_error_that_is_nobody_s_ends_all_and_not_the_engine(monkeypatch):
    engine, stop = make_engine(), threading.Event()
    handles = [engine.add(PROMPT, **FREE) for _ in range(2)]
    with monkeypatch.context() as broken:
        broken.setattr("anabranch.engine.scheduler.Scheduler.choose", lambda *args: 1 / 0)
        server = threading.Thread(target=engine.serve, args=(stop,))
        server.start()
        for handle in handles:
            with pytest.raises(ZeroDivisionError):
                handle.result(timeout=60)
    assert engine.add(PROMPT, **FREE).result(timeout=60).tree == make_engine().generate(PROMPT, **FREE).tree
    stop.set()
    server.join(30)
    assert_nothing_held(engine)


@pytest.mark.parametrize("where", ["first layer", "last layer", "processor", "strategy"])
def test_ctrl_c_in_a_step_leaves_the_others_whole(where):
    """At any moment: rows that were reserved are given back, whether or not all layers have written theirs, and a
    uniform that was drawn is drawn once."""
    options = dict(do_sample=True, temperature=1.3, top_k=0, seed=4, **FREE)
    expected = make_engine().generate(PROMPT, Nested(), **options)
    for moment in range(1, 9):
        engine, calls = make_engine(), [0]

        def interrupt(*args, calls=calls, moment=moment):
            calls[0] += 1
            if calls[0] == moment:
                raise KeyboardInterrupt
            return args[1] if where == "processor" else None

        other = engine.add(PROMPT, Nested(), **options)
        extra = {}
        if "layer" in where:
            engine.model.model.layers[where == "last layer"].register_forward_hook(interrupt)
        elif where == "processor":
            extra = dict(logits_processor=[interrupt])
        else:

            @dataclass(frozen=True)
            class Typed(Strategy):
                def run(self, trunk, interrupt=interrupt):
                    for _ in range(10):
                        yield trunk.decode(1)
                        interrupt()

            extra = dict(strategy=Typed())
        with pytest.raises(KeyboardInterrupt):
            engine.generate([1, 2, 3], **(FREE | extra))
        assert other.result().tree == expected.tree, moment
        assert_nothing_held(engine)


def test_ctrl_c_between_the_tokens_of_two_threads_draws_none_anew():
    """Tokens of a step that were drawn and not yet given are drawn by the same uniforms in the next."""
    options = dict(do_sample=True, temperature=1.3, top_k=0, seed=4, **FREE)
    expected = make_engine().generate(PROMPT, Nested(), logits_processor=[lambda ids, scores: scores], **options)
    for moment in range(7, 22, 2):
        calls = [0]

        def interrupt(ids, scores, calls=calls, moment=moment):
            calls[0] += 1
            if calls[0] == moment:
                raise KeyboardInterrupt
            return scores

        engine = make_engine()
        handle = engine.add(PROMPT, Nested(), logits_processor=[interrupt], **options)
        with pytest.raises(KeyboardInterrupt):
            while engine.step():
                pass
        assert handle.result().tree == expected.tree, moment
        assert_nothing_held(engine)


# ------------------------------------------------------------------------------------------------ who comes first


def order_of_ends(engine, handles):
    ended = []
    while engine.step() or len(ended) < len(handles):
        ended += [i for i, h in enumerate(handles) if h.done and i not in ended]
    return ended


def test_priorities_begin_first():
    engine = make_engine(num_pages=8)  # one at a time
    handles = [engine.add([i, *range(60, 75)], priority=p, **FREE) for i, p in enumerate([0, 0, 2, 1])]
    assert order_of_ends(engine, handles) == [2, 3, 0, 1]
    assert_nothing_held(engine)


def test_a_low_priority_waits_for_a_bounded_number(monkeypatch):
    monkeypatch.setattr("anabranch.engine.loop.HEAD_START", 3)
    engine = make_engine(num_pages=8)
    low = engine.add([1, *range(60, 75)], **FREE)
    before = 0
    for i in range(12):  # others of a higher priority keep coming
        high = engine.add([i, *range(60, 75)], priority=1, **FREE)
        while not high.done and not low.done:
            engine.step()
        if low.done:
            break
        before += 1
    assert before == 2  # numbers 1 and 2 go before 0, number 3 does not
    engine.abort()


def test_a_large_request_is_not_passed_for_ever():
    """Small ones keep coming; the large one gets its room when those inside have left."""
    engine = make_engine(num_pages=12)
    small = [engine.add([i, 1, 2], **FREE) for i in range(2)]
    engine.step()
    large = engine.add(list(range(36)), **FREE)
    served = 0
    for i in range(100):
        if large.done:
            break
        small.append(engine.add([i, 3, 4], **FREE))
        engine.step()
        served = sum(h.done for h in small)
    assert large.done and served <= 2
    drain(engine)
    assert_nothing_held(engine)


def test_decoding_leaves_a_row_for_prompts():
    engine = make_engine(max_rows=3)
    running = [engine.add([i], eos_token_id=None, max_new_tokens=60) for i in range(3)]
    engine.step()
    late = engine.add(list(range(10)), max_new_tokens=1, eos_token_id=None)
    while not late.done:
        engine.step()
    assert not any(h.done for h in running)
    engine.abort()


def test_room_is_counted_in_pages_that_are_needed():
    engine = make_engine(num_pages=20)
    handles = [engine.add([i] * 30, **FREE) for i in range(5)]
    engine.step()
    assert len(engine.loop.active) == 2 and len(engine.loop.waiting) == 3  # 8 pages each, and one each to grow
    expected = [make_engine().generate([i] * 30, **FREE).tree for i in range(5)]
    assert [h.result().tree for h in handles] == expected
    assert_nothing_held(engine)


# ------------------------------------------------------------------------------------------------ many threads


def test_many_python_threads():
    engine = make_engine(num_pages=300)
    expected = {i: make_engine().generate([i, 2, 3], Nested(), seed=i, **FREE).tree for i in range(12)}
    wrong, threads = [], []

    def client(i):
        try:
            for turn in range(3):
                if (i + turn) % 3 == 0:
                    tree = engine.generate([i, 2, 3], Nested(), seed=i, **FREE).tree
                elif (i + turn) % 3 == 1:
                    tree = engine.add([i, 2, 3], Nested(), seed=i, **FREE).result(timeout=60).tree
                else:
                    *_, last = engine.stream([i, 2, 3], Nested(), seed=i, **FREE)
                    tree = last.result.tree
                if tree != expected[i]:
                    wrong.append(i)
                doomed = engine.add([i, 9], Nested(), **FREE)
                doomed.abort()
                if not doomed.done:
                    wrong.append("abort")
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=client, args=(i,)) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not wrong and not any(t.is_alive() for t in threads)
    assert_nothing_held(engine)


def test_one_thread_serves_and_others_wait():
    engine, stop = make_engine(), threading.Event()
    server = threading.Thread(target=engine.serve, args=(stop,))
    server.start()
    handles = [engine.add(PROMPT, Nested(), seed=i, **FREE) for i in range(3)]
    trees = [h.result(timeout=60).tree for h in handles]
    stop.set()
    server.join(30)
    assert not server.is_alive()
    assert trees == [make_engine().generate(PROMPT, Nested(), seed=i, **FREE).tree for i in range(3)]


def test_calls_from_inside_a_step():
    """A strategy that generates has a loop of its own; one that waits for its own engine is told so."""
    engine = make_engine()
    inner = make_engine().generate([1, 2, 3], **FREE)

    @dataclass(frozen=True)
    class Asks(Strategy):
        def run(self, trunk):
            yield trunk.decode(3)
            return engine.generate([1, 2, 3], **FREE).token_ids

    @dataclass(frozen=True)
    class Waits(Strategy):
        def run(self, trunk):
            yield trunk.decode(3)
            engine.add([1, 2, 3], **FREE).result()

    @dataclass(frozen=True)
    class Steps(Strategy):
        def run(self, trunk):
            yield trunk.decode(3)
            engine.step()

    other = engine.add(PROMPT, Nested(), **FREE)
    assert engine.generate(PROMPT, Asks(), **FREE).answers == inner.token_ids
    for wrong in (Waits(), Steps()):
        with pytest.raises(RuntimeError, match="inside a step"):
            engine.generate(PROMPT, wrong, **FREE)
    assert other.result().tree == make_engine().generate(PROMPT, Nested(), **FREE).tree
    drain(engine)
    assert_nothing_held(engine)


def test_a_stream_beside_calls_of_its_reader():
    engine = make_engine()
    expected = make_engine().generate(PROMPT, Nested(), **FREE).tree
    for event in engine.stream(PROMPT, Nested(), **FREE):
        if isinstance(event, Token) and not event.inserted:
            assert engine.generate([1, 2], max_new_tokens=2, eos_token_id=None).tree.fate == "finished"
        elif isinstance(event, Finish):
            assert event.result.tree == expected
    assert_nothing_held(engine)


# ------------------------------------------------------------------------------------------------ a soak


@cache
def tiny_model():
    torch.manual_seed(0)
    small = dict(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1
    )
    return LlamaForCausalLM._from_config(LlamaConfig(**SIZES | small), attn_implementation="anabranch").eval()


def soak(number: int, clients: int) -> dict[str, int]:
    """Arrivals, cancellations, errors and shortages at random; every answer is the one it gives alone."""
    rng = random.Random(number)
    model = tiny_model()
    alone = ab.Engine(model, num_pages=4000, page_size=4, compile=False)
    size = rng.choice([1, 2, 4, 16])
    engine = ab.Engine(
        model,
        num_pages=rng.randint(90, 220) // size + 4,
        page_size=size,
        max_rows=rng.choice([3, 8, 64]),
        max_threads=rng.choice([None, None, 4]),
        compile=False,  # what a compiler keeps grows with every engine
    )
    seen = dict.fromkeys(("answers", "aborted", "failed", "too small", "late", "preempted"), 0)
    there: list[tuple[ab.Handle, dict, str]] = []
    arrived = 0
    while arrived < clients or there:
        if arrived < clients and rng.random() < 0.7:
            arrived += 1
            fate = rng.choice(["", "", "", "abort", "break", "late"])
            strategy = rng.choice([None, Nested(), SelfConsistency(rng.randint(1, 5)), Anything(rng.randrange(10**6))])
            if strategy is not None and rng.random() < 0.2:
                strategy = Sequential(strategy)
            if fate == "break":
                strategy = rng.choice([Breaks(rng.randint(1, 9)), BreaksInUntil(), BreaksAtOnce()])
            arguments = dict(
                prompt=[rng.randrange(200) for _ in range(rng.randint(1, 30))],
                strategy=strategy,
                seed=rng.randrange(1000),
                max_new_tokens=rng.randint(1, 30),
                eos_token_id=rng.choice([None, EOS]),
                do_sample=rng.random() < 0.5,
            )
            if arguments["do_sample"]:
                arguments["temperature"] = rng.choice([0.7, 1.0])
            when = dict(priority=rng.choice([0, 0, 1, -1]), deadline=0.001 if fate == "late" else None)
            there.append((engine.add(**arguments, **when), arguments, fate))
        engine.step()
        if rng.random() < 0.05:
            engine.cache.check()
        for entry in list(there):
            handle, arguments, fate = entry
            if fate == "abort" and rng.random() < 0.1:
                handle.abort()
                assert handle.done
            if not handle.done:
                continue
            there.remove(entry)
            try:
                result = handle.result(timeout=0)
            except ab.DeadlineExceeded:
                assert fate == "late"
                seen["late"] += 1
            except LookupError:
                assert fate == "break"
                seen["failed"] += 1
            except ValueError as error:
                assert "num_pages" in str(error)
                seen["too small"] += 1
            else:
                seen["preempted"] += result.metrics.preemptions > 0
                if result.tree.fate == "killed":
                    assert fate == "abort"
                    seen["aborted"] += 1
                else:
                    seen["answers"] += 1
                    assert result.tree == alone.generate(**arguments).tree, (number, arguments)
    assert not engine.step()
    assert_nothing_held(engine)
    return seen


def total(many: list[dict[str, int]]) -> dict[str, int]:
    return {name: sum(seen[name] for seen in many) for name in many[0]}


def test_a_soak():
    seen = total([soak(number, 14) for number in range(4)])
    assert min(seen[name] for name in ("answers", "aborted", "failed", "late", "preempted")) > 0, seen


@pytest.mark.slow
def test_a_long_soak():
    seen = total([soak(number, 100) for number in range(100, 200)])
    assert min(seen.values()) > 50, seen


@pytest.mark.slow
@pytest.mark.skipif(not STATM.exists(), reason="reads /proc")
def test_an_hour_of_soaks():
    """Memory stays flat. soak_kit says how to make it shorter, or gentler to others."""
    run, seen = LongRun(), []
    while run.going:
        seen.append(soak(1000 + len(seen), 100))
        run.note()
        time.sleep(run.owed())
    print(f"{len(seen)} engines, {100 * len(seen)} requests, {run.spent:.0f} s: {total(seen)}; MB: {run.sizes}")
    assert run.grown() < 32 and run.files[-1] <= run.files[len(run.files) // 4]
