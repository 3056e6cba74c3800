"""`AsyncEngine`: tasks, streams, cancellation in any state, closing, event loops of several threads."""

from __future__ import annotations

import asyncio
import random
import threading
from dataclasses import dataclass

import pytest
from engine_kit import Nested, assert_nothing_held, byte_tokenizer, make_engine, make_model

import anabranch as ab
from anabranch.engine import Finish, Fork, Token
from anabranch.strategies import SelfConsistency, Strategy

PROMPT = [5, 6, 7, 8, 9, 10, 11]
FREE = dict(eos_token_id=None, max_new_tokens=12)
LONG = dict(eos_token_id=None, max_new_tokens=1500)


def make(tokenizer=None, num_pages=600, page_size=4, **options) -> ab.AsyncEngine:
    return ab.AsyncEngine(make_model(), tokenizer, num_pages=num_pages, page_size=page_size, **options)


def run(program, **options):
    """`program(engine)` in an event loop of its own; afterwards nothing is held and no thread is left."""

    async def main():
        async with make(**options) as engine:
            found = await asyncio.wait_for(program(engine), 100)
        assert_nothing_held(engine)
        return found

    before = threading.active_count()
    found = asyncio.run(main())
    assert threading.active_count() <= before + 1
    return found


@dataclass(frozen=True)
class Breaks(Strategy):
    def run(self, trunk):
        yield trunk.decode(3)
        raise LookupError("in a strategy")


def test_many_tasks_share_the_steps():
    async def program(engine):
        tasks = [engine.generate([i, 2, 3], Nested(), seed=i, **FREE) for i in range(6)]
        both = engine.generate([PROMPT, [1]], SelfConsistency(2), seed=[1, 2], **FREE)
        return await asyncio.gather(*tasks, both)

    *results, both = run(program)
    engine = make_engine(num_pages=600)
    for i, result in enumerate(results):
        assert result.tree == engine.generate([i, 2, 3], Nested(), seed=i, **FREE).tree
    assert [r.tree for r in both] == [
        r.tree for r in engine.generate([PROMPT, [1]], SelfConsistency(2), seed=[1, 2], **FREE)
    ]


def test_a_stream_tells_what_the_engine_s_own_tells():
    async def program(engine):
        async def read(i):
            return [event async for event in engine.stream("abc", Nested(), seed=i, max_new_tokens=50)]

        return await asyncio.gather(*(read(i) for i in range(3)))

    engine = make_engine(tokenizer=byte_tokenizer())
    for i, events in enumerate(run(program, tokenizer=byte_tokenizer())):
        expected = list(engine.stream("abc", Nested(), seed=i, max_new_tokens=50))
        assert events[:-1] == expected[:-1] and events[-1].result.tree == expected[-1].result.tree
        assert isinstance(events[-1], Finish)


def test_a_cancelled_task_ends_its_request():
    async def program(engine):
        other = asyncio.create_task(engine.generate(PROMPT, Nested(), **FREE))
        for wait in (0, 0.01, 0.1):
            task = asyncio.create_task(engine.generate(PROMPT, SelfConsistency(3), **LONG))
            await asyncio.sleep(wait)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(engine.generate(PROMPT, **LONG), 0.05)
        result = await other
        while engine.engine.loop.busy:
            await asyncio.sleep(0.01)
        assert_nothing_held(engine)
        return result

    assert run(program).tree == make_engine().generate(PROMPT, Nested(), **FREE).tree


def test_leaving_a_stream_ends_its_request():
    async def program(engine):
        async for event in engine.stream(PROMPT, Nested(), **LONG):
            if isinstance(event, Fork):
                break
        stream = engine.stream(PROMPT, **LONG)
        assert isinstance(await anext(stream), Token)
        await stream.aclose()
        while engine.engine.loop.busy:  # the one that was left is closed when it is collected
            await asyncio.sleep(0.01)
        assert_nothing_held(engine)

    run(program)


def test_errors_come_to_whom_they_belong():
    async def program(engine):
        good = asyncio.create_task(engine.generate(PROMPT, Nested(), **FREE))
        with pytest.raises(LookupError, match="in a strategy"):
            await engine.generate(PROMPT, Breaks(), **FREE)
        with pytest.raises(LookupError, match="in a strategy"):
            async for _ in engine.stream(PROMPT, Breaks(), **FREE):
                pass
        with pytest.raises(ValueError, match="num_beams"):
            await engine.generate(PROMPT, num_beams=2)
        with pytest.raises(ab.DeadlineExceeded):
            await engine.generate(PROMPT, deadline=0.05, **LONG)
        return await good

    assert run(program).tree == make_engine().generate(PROMPT, Nested(), **FREE).tree


def test_a_full_queue_is_told_and_nothing_is_added():
    async def program(engine):
        running = asyncio.create_task(engine.generate(list(range(30)), **(FREE | dict(max_new_tokens=60))))
        while not engine.engine.loop.active:
            await asyncio.sleep(0.005)
        with pytest.raises(ab.QueueFull):
            await engine.generate([[i] * 30 for i in range(3)], **FREE)
        return await running

    assert len(run(program, num_pages=30, max_queue=2).token_ids) == 60


def test_abort_and_close_give_what_there_was():
    async def aborting(engine):
        tasks = [asyncio.create_task(engine.generate([i], **LONG)) for i in range(3)]
        while len(engine.engine.loop.active) < 3:
            await asyncio.sleep(0.005)
        await engine.abort()
        results = await asyncio.gather(*tasks)
        assert all(r.tree.fate == "killed" and len(r.token_ids) < 1500 for r in results)
        return await engine.generate(PROMPT, **FREE)

    assert run(aborting).tree == make_engine().generate(PROMPT, **FREE).tree

    async def closing():
        engine = make()
        task = asyncio.create_task(engine.generate(PROMPT, **LONG))
        while not engine.engine.loop.active:
            await asyncio.sleep(0.005)
        await engine.close()
        await engine.close()
        assert (await task).tree.fate == "killed"
        assert_nothing_held(engine)
        with pytest.raises(RuntimeError, match="closed"):
            await engine.generate(PROMPT, **FREE)
        with pytest.raises(RuntimeError, match="closed"):
            async with engine:
                pass

    asyncio.run(closing())


def test_event_loops_of_several_threads_and_plain_threads_too():
    engine = make()
    expected = {i: make_engine().generate([i, 2], Nested(), seed=i, **FREE).tree for i in range(6)}
    wrong = []

    def client(i):
        async def ask():
            return await asyncio.gather(*(engine.generate([i, 2], Nested(), seed=i, **FREE) for _ in range(2)))

        try:
            results = asyncio.run(ask()) if i % 2 else [engine.engine.generate([i, 2], Nested(), seed=i, **FREE)]
            wrong.extend(i for r in results if r.tree != expected[i])
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=client, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(100)
    assert not wrong and not any(t.is_alive() for t in threads)
    asyncio.run(engine.close())
    assert_nothing_held(engine)


def test_an_event_loop_that_is_gone_leaves_nothing():
    engine = make()
    loop = asyncio.new_event_loop()
    task = loop.create_task(engine.generate(PROMPT, **LONG))
    while not engine.engine.loop.active:
        loop.run_until_complete(asyncio.sleep(0.005))
    stream = engine.stream(PROMPT, **LONG)
    assert isinstance(loop.run_until_complete(anext(stream)), Token)
    loop.stop()
    loop.close()
    result = asyncio.run(engine.generate([1, 2], **FREE))
    assert result.tree == make_engine().generate([1, 2], **FREE).tree
    asyncio.run(engine.close())
    assert_nothing_held(engine)
    assert not task.done()


def test_a_soak_of_tasks():
    async def program(engine):
        rng = random.Random(3)
        alone = make_engine(num_pages=600)

        async def client(i):
            await asyncio.sleep(rng.random())
            options = dict(seed=i, eos_token_id=None, max_new_tokens=rng.randint(2, 20))
            strategy = rng.choice([None, Nested(), SelfConsistency(2), Breaks()])
            task = asyncio.create_task(engine.generate([i, 5, 6], strategy, **options))
            if rng.random() < 0.3:
                await asyncio.sleep(rng.random() / 10)
                task.cancel()
            try:
                result = await task
            except asyncio.CancelledError:
                return "cancelled"
            except LookupError:
                return "broken"
            return (i, strategy, options, result.tree)

        found = await asyncio.gather(*(client(i) for i in range(40)))
        answers = [f for f in found if isinstance(f, tuple)]
        for i, strategy, options, tree in answers:
            assert alone.generate([i, 5, 6], strategy, **options).tree == tree
        return len(answers), found.count("cancelled"), found.count("broken")

    assert min(run(program, num_pages=40)) > 0
