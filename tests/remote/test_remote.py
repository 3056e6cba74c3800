"""A remote engine against a server on a real socket: trees as a local engine's, and nothing lost when it fails."""

from __future__ import annotations

import asyncio
import threading
import time
from dataclasses import dataclass

import httpx
import pytest
from completions_server import completions_server
from engine_kit import byte_tokenizer, make_engine, make_model

import anabranch as ab
from anabranch.strategies import Strategy


@dataclass(frozen=True)
class Busy(Strategy):
    """Forks, spawns, kills, cuts, scores, waits for the first, joins by tokens."""

    def run(self, trunk):
        yield trunk.decode(5)
        kids = trunk.fork(["a:", "b:", None])
        ends = yield [kid.decode(4 + i, stop=["e"]) for i, kid in enumerate(kids)]
        trunk.join(kids[:2], "reprefill")
        kids[2].kill()
        trunk.insert(" so ")
        yield trunk.decode(3)
        spawned = [trunk.spawn("q" * (i + 1)) for i in range(3)]
        yield [kid.decode(3 + i) for i, kid in enumerate(spawned)]
        logprobs = yield spawned[0].score("xyz")
        trunk.join(spawned, "summary", text="sum", keep=trunk.length - 2)
        end = yield trunk.decode(6, until=lambda d: len(d.token_ids) == 4)
        return [e.reason for e in ends], [round(x, 3) for x in logprobs], end.reason


@dataclass(frozen=True)
class Greedy(Strategy):
    """Threads of one prompt, one of them kept as it stands."""

    def run(self, trunk):
        kids = trunk.fork(["a", "b", "cc"])
        yield [kid.decode() for kid in kids]
        trunk.join(kids[:2], "discard")
        trunk.join(kids[2:], "reprefill")


STRATEGIES = [
    None, Busy(), Greedy(), ab.SkeletonOfThought(), ab.Sequential(Busy()),
]  # fmt: skip


@pytest.fixture(scope="module")
def parts():
    return make_model(), byte_tokenizer()


@dataclass(frozen=True)
class Once(Strategy):
    """One decode of many tokens, which something other than its limit ends."""

    stop: tuple = ()
    until: object = None

    def run(self, trunk):
        yield trunk.decode(300, stop=list(self.stop), until=self.until)


def facts(result):
    return [
        (n.id, n.role, n.token_ids, n.text, n.start, n.stop, n.forked_at, n.ended, n.fate, len(n.children))
        for n in result.tree.walk()
    ]


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
@pytest.mark.parametrize("kind", ["vllm", "llama.cpp"])
def test_the_same_tree_as_a_local_engine(parts, strategy, kind):
    if kind == "llama.cpp" and "Busy" in str(strategy):
        pytest.skip("scores tokens, which llama.cpp does not")
    model, tokenizer = parts
    local = make_engine(tokenizer=tokenizer, num_pages=2000)
    prompts = ["one river", "two"]
    expected = local.generate(prompts, strategy=strategy, max_new_tokens=24)
    with completions_server(model, tokenizer, kind=kind) as (url, state), ab.RemoteEngine(url, tokenizer) as engine:
        found = engine.generate(prompts, strategy=strategy, max_new_tokens=24)
        assert engine.server.dialect.name == kind
    for mine, theirs in zip(found, expected, strict=True):
        assert facts(mine) == facts(theirs)
        assert mine.text == theirs.text and mine.answers == theirs.answers and mine.malformed == theirs.malformed
        for name in ("sampled_tokens", "inserted_tokens", "critical_path_tokens", "parallel_ratio", "num_threads",
                     "threads_per_block", "prompt_tokens", "longest_context"):  # fmt: skip
            assert mine.metrics[name] == theirs.metrics[name], name
    assert state.running == 0


def test_threads_run_at_once_and_sequential_ones_do_not(parts):
    model, tokenizer = parts
    for strategy, most in ((ab.SelfConsistency(4, vote=None), 4), (ab.Sequential(ab.SelfConsistency(4, vote=None)), 1)):
        with completions_server(model, tokenizer) as (url, state), ab.RemoteEngine(url, tokenizer) as engine:
            state.faults.together = most
            engine.generate("p", strategy=strategy, max_new_tokens=8)
            assert state.most_running == most


def test_events_and_cached_tokens(parts):
    model, tokenizer = parts
    with completions_server(model, tokenizer) as (url, _), ab.RemoteEngine(url, tokenizer) as engine:
        events = list(engine.stream("one river", strategy=ab.SelfConsistency(2, vote=None), max_new_tokens=6))
        result = events[-1].result
        told = {}
        for event in events[:-1]:
            if type(event).__name__ == "Token":
                told.setdefault(event.thread, []).extend(event.token_ids)
        assert told["0.0"] == list(result.tree.children[0].token_ids)


@pytest.mark.parametrize("always", [False, True], ids=["usage at the end", "usage with every event"])
def test_cached_tokens_count_once_a_request(parts, always):
    model, tokenizer = parts
    with completions_server(model, tokenizer) as (url, state), ab.RemoteEngine(url, tokenizer) as engine:
        state.faults.usage_always = always
        result = engine.generate("one river", strategy=ab.SelfConsistency(2, vote=None), max_new_tokens=6)
        cached = [len(r["prompt"]) // 4 * 4 for r in state.requests]
        assert result.metrics.cached_tokens == sum(cached) > 0 and len(cached) == 2


def test_sampling_follows_the_seed_and_logprobs_are_recorded(parts):
    model, tokenizer = parts
    with completions_server(model, tokenizer) as (url, state), ab.RemoteEngine(url, tokenizer) as engine:
        once, again, other = (
            engine.generate(
                "p", strategy=ab.SelfConsistency(3, vote=None, temperature=1.5), do_sample=True, seed=seed,
                logprobs=True, max_new_tokens=8,
            )
            for seed in (1, 1, 2)
        )  # fmt: skip
        texts = [[kid.token_ids for kid in r.tree.children] for r in (once, again, other)]
        assert texts[0] == texts[1] != texts[2] and len(set(texts[0])) == 3
        runs = [run for kid in once.tree.children for run in kid.runs if run.kind == "sampled"]
        assert all(lp is not None and lp <= 0 for run in runs for lp in run.logprobs)
        assert all(r["top_k"] == 50 and r["temperature"] == 1.5 for r in state.requests)


def test_statistics_as_far_as_a_server_tells_them(parts):
    model, tokenizer = parts
    seen = []

    @dataclass(frozen=True)
    class Look(Strategy):
        def run(self, trunk):
            end = yield trunk.decode(3, stats=5)
            seen.extend(end.stats)
            with pytest.raises(ab.RemoteError, match="entropy"):
                _ = end.stats[0].entropy

    with completions_server(model, tokenizer) as (url, _), ab.RemoteEngine(url, tokenizer) as engine:
        engine.generate("p", strategy=Look())
    local = []

    @dataclass(frozen=True)
    class Here(Strategy):
        def run(self, trunk):
            local.extend((yield trunk.decode(3, stats=5)).stats)

    make_engine(tokenizer=tokenizer).generate("p", strategy=Here())
    for mine, theirs in zip(seen, local, strict=True):
        assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-4)
        assert mine.topk_logprob == pytest.approx(theirs.topk_logprob, abs=1e-4)


# ------------------------------------------------------------------------------------------------ what ends a decode


def wait_for_the_end(state):
    """Until the server has nothing more to do."""
    deadline = time.monotonic() + 60
    while state.running and time.monotonic() < deadline:
        time.sleep(0.01)


@pytest.mark.parametrize("how", ["eos", "stop"])
def test_a_server_ends_a_decode_by_itself_at_the_ids_that_end_it(parts, how):
    model, tokenizer = parts
    with completions_server(model, tokenizer) as (url, state), ab.RemoteEngine(url, tokenizer) as engine:
        free = engine.generate("one river", max_new_tokens=12, eos_token_id=-1).token_ids
        last, state.sampled = free[9], 0
        if how == "eos":
            result = engine.generate("one river", max_new_tokens=300, eos_token_id=last)
        else:
            result = engine.generate("one river", Once(stop=(last,)), eos_token_id=-1)
        assert result.token_ids == free[: free.index(last) + 1] and result.tree.ended == how
        assert state.sampled == len(result.token_ids) and state.given_up == 0


@pytest.mark.parametrize("kind", ["vllm", "llama.cpp"])
def test_what_a_server_cannot_know_to_be_the_end_is_given_up_there(parts, kind):
    model, tokenizer = parts
    with completions_server(model, tokenizer, kind=kind) as (url, state), ab.RemoteEngine(url, tokenizer) as engine:
        state.faults.delay = 0.01
        strategy = Once(until=lambda decode: len(decode.token_ids) == 3)
        result = engine.generate("p", strategy=strategy, max_new_tokens=300, eos_token_id=-1)
        assert len(result.token_ids) == 3 and result.tree.ended == "until"
        wait_for_the_end(state)
        assert state.given_up == 1 and state.sampled < 300


# ------------------------------------------------------------------------------------------------ a server that fails


@pytest.mark.parametrize("polite", [False, True], ids=["dropped", "ended without an end"])
def test_a_busy_server_is_asked_again_and_a_broken_stream_is_continued(parts, polite):
    model, tokenizer = parts
    expected = make_engine(tokenizer=tokenizer).generate("p", strategy=Greedy(), max_new_tokens=9)
    with completions_server(model, tokenizer) as (url, state), ab.RemoteEngine(url, tokenizer, retries=3) as engine:
        engine.connection.backoff = 0.01
        assert engine.server.model == "tiny"
        state.faults.busy, state.faults.cut_after, state.faults.polite = 2, 2, polite
        found = engine.generate("p", strategy=Greedy(), max_new_tokens=9)
        assert facts(found) == facts(expected) and state.faults.cuts == 2


def test_the_rest_of_a_broken_stream_is_drawn_with_other_numbers_and_the_same_each_time(parts):
    model, tokenizer = parts
    told = []
    for _ in range(2):
        with completions_server(model, tokenizer) as (url, state), ab.RemoteEngine(url, tokenizer, retries=3) as engine:
            state.faults.cut_after, state.faults.polite = 3, True
            result = engine.generate("p", do_sample=True, seed=1, max_new_tokens=12, eos_token_id=-1)
        asked = state.requests
        assert [(len(r["prompt"]), r["max_tokens"]) for r in asked] == [(1 + 2 * i, 12 - 2 * i) for i in range(4)]
        seeds = [r["seed"] for r in asked]
        assert len(set(seeds)) == 4
        told.append((seeds, result.token_ids))
    assert told[0] == told[1]


@pytest.mark.parametrize(
    ("faults", "options", "message"),
    [
        ({"busy": 99}, {}, "answers 503: overloaded"),
        ({"cut_after": 99}, {}, "connection was lost 2 times"),
        ({"model": "other"}, {}, "answers with the model 'other'"),
        ({"cut_context": 3}, {}, "read 3 tokens of a context of 9"),
        ({"missing": ("return_token_ids",)}, {}, "does not know the field 'return_token_ids'"),
        ({"shift_tokens": 1}, {}, "tokenizer: the server's gives other token ids"),
        ({"tokens_at_end": 1}, {}, "tokenizer: the server's gives other token ids"),
        ({"tokens_at_end": -1}, {}, "tokenizer: the server's gives other token ids"),
        ({}, {"api_key": "wrong"}, "refuses the API key"),
        ({}, {"model": "tinny"}, "no such model; the nearest are tiny"),
    ],
    ids=lambda x: str(x)[:30],
)
def test_what_a_server_does_wrong_is_said(parts, faults, options, message):
    model, tokenizer = parts
    with completions_server(model, tokenizer, api_key="right") as (url, state):
        for name, value in faults.items():
            setattr(state.faults, name, value)
        engine = ab.RemoteEngine(url, tokenizer, **{"api_key": "right", "retries": 1, **options})
        engine.connection.backoff = 0.01
        with engine, pytest.raises(ab.RemoteError, match=message):
            engine.generate("one river", strategy=ab.SelfConsistency(2, vote=None), max_new_tokens=30)
        wait_for_the_end(state)
        assert state.running == 0  # whatever else was under way has been ended there


def test_a_server_that_is_not_there(parts):
    with ab.RemoteEngine("http://127.0.0.1:9/v1", parts[1], retries=1) as engine:
        engine.connection.backoff = 0.01
        with pytest.raises(ab.RemoteError, match=r"cannot be reached after 2 attempts.*check that it runs"):
            engine.generate("p")


def test_leaving_a_stream_and_aborting_end_the_work_on_the_server(parts):
    model, tokenizer = parts
    with completions_server(model, tokenizer) as (url, state), ab.RemoteEngine(url, tokenizer) as engine:
        state.faults.delay = 0.01
        for event in engine.stream("p", strategy=ab.SelfConsistency(3, vote=None), max_new_tokens=400, eos_token_id=-1):
            if type(event).__name__ == "Token":
                break
        timer = threading.Timer(0.3, engine.abort)
        timer.start()
        result = engine.generate("p", max_new_tokens=400, eos_token_id=-1)
        assert result.tree.fate == "killed" and 0 < len(result.token_ids) < 400
        wait_for_the_end(state)
        assert state.running == 0


# ------------------------------------------------------------------------------------------------ what is refused


class Concat(Strategy):
    def run(self, trunk):
        trunk.join(trunk.fork(["a", "b"]), "concat")
        trunk.insert("c")
        yield trunk.decode(3)


class Needy(Concat):
    needs = ("concat joins",)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strategy": Concat()}, r"join mode='concat': a server keeps no KV.*use mode='reprefill'"),
        ({"strategy": Needy()}, "Needy needs concat joins, which a server does not give"),
        ({"strategy": "ab"}, "pass an instance of a Strategy"),
        ({"typical_p": 0.5}, "typical_p=0.5 cannot be sent to a server"),
        ({"temperature": 0.5}, "has no effect without sampling"),
        ({"logits_processor": [None]}, "logits_processor: runs where the model runs"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"seed": -1}, "seed=-1"),
        ({"prompt": "x" * 600}, "the server takes 512"),
        ({"prompt": ""}, "prompt is empty"),
    ],
)
def test_refused_before_the_first_token(parts, arguments, message):
    model, tokenizer = parts
    with completions_server(model, tokenizer) as (url, state), ab.RemoteEngine(url, tokenizer) as engine:
        with pytest.raises((ValueError, TypeError), match=message):
            engine.generate(**{"prompt": "p", **arguments})
        assert not state.requests


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "host:8000"}, "url='host:8000'"),
        ({"tokenizer": None}, "tokenizer"),
        ({"timeout": 0}, "timeout=0"),
        ({"retries": -1}, "retries"),
        ({"max_concurrency": 0}, "max_concurrency"),
    ],
)
def test_bad_arguments(parts, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        ab.RemoteEngine(**{"url": "http://127.0.0.1:9/v1", "tokenizer": parts[1], **options})


def test_the_context_of_the_server_ends_a_thread(parts):
    model, tokenizer = parts
    with completions_server(model, tokenizer, max_length=20) as (url, _), ab.RemoteEngine(url, tokenizer) as engine:
        result = engine.generate("one river", max_new_tokens=100, eos_token_id=-1)
        assert result.tree.ended == "length" and len(result.token_ids) == 11 + 1


def test_a_line_ends_where_the_format_says():
    """Not at U+2028 or U+0085 in a text, and not where a piece of the answer ends."""
    from anabranch.remote.http import _lines

    async def lines():
        text = 'data: {"a": "x\u2028y\x85z"}\r\n\ndata: [DONE]'.encode()

        async def pieces():
            for at in range(0, len(text), 3):
                yield text[at : at + 3]

        return [line.strip() async for line in _lines(httpx.Response(200, content=pieces()))]

    assert asyncio.run(lines()) == ['data: {"a": "x\u2028y\x85z"}', "", "data: [DONE]"]
