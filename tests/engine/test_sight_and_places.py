"""What a fork sees of its siblings, and where tokens stand: exact, in the trace, replayed, and after pre-emptions."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from engine_kit import Recorder, assert_dense, assert_nothing_held, byte_tokenizer, make_engine
from programs_of_threads import Sights
from tagged_kit import assert_trained_as_seen

import anabranch as ab
from anabranch.strategies import Strategy


@dataclass(frozen=True)
class Graph(Strategy):
    """Steps that see steps: 3 sees 1, 4 sees 2 and then 1, 5 sees 3 and 4, and one of them forks and joins inside."""

    discard: bool = False

    def run(self, trunk):
        yield trunk.decode(5)
        one, two = trunk.fork(["a:", "bb:"])
        yield [one.decode(4), self.inner(two)]
        (three,) = trunk.fork(["c:"], sees=[one])
        (four,) = trunk.fork(["d:"], sees=[two, one])
        yield [three.decode(9), four.decode(3)]
        (five,) = trunk.fork(["e:"], sees=[three, four])
        yield five.decode(4)
        if self.discard:
            trunk.join(two, "discard")
            yield five.decode(3)
            trunk.join([one, three, four, five])
        else:
            trunk.join([two, five, one, three, four])
        trunk.insert("=")
        yield trunk.decode(6)

    @staticmethod
    def inner(thread):
        yield thread.decode(2)
        kids = thread.fork(["x", "yy"])
        yield [kid.decode(3) for kid in kids]
        thread.join(kids)
        thread.insert("/")
        yield thread.decode(2)


@dataclass(frozen=True)
class Places(Strategy):
    """Positions left out and given twice, in a trunk and in threads, before a fork and behind a join."""

    def run(self, trunk):
        yield trunk.decode(3)
        trunk.skip(20)
        yield trunk.decode(3)
        trunk.insert("\n")
        trunk.skip(-1)
        kids = trunk.fork(["a", "b"])
        for kid in kids:
            kid.decode(2)
            kid.skip(4)
            kid.insert("::")
            kid.decode(2)
        trunk.skip(7)
        trunk.insert("meanwhile")
        yield kids
        yield trunk.join(kids)
        trunk.skip(-3)
        trunk.insert("=")
        yield trunk.decode(4)


OPTIONS = {"max_new_tokens": 200, "eos_token_id": None, "logprobs": True}


def run(strategy, prompt="Why?", **options):
    recorder, engine = Recorder(), make_engine(tokenizer=byte_tokenizer(), **({"num_pages": 400} | options))
    result = engine.generate(prompt, strategy=strategy, logits_processor=[recorder], **OPTIONS)
    assert_nothing_held(engine)
    if "family" in options:
        assert assert_dense(result, recorder, options["family"]) == result.metrics.sampled_tokens
        assert_trained_as_seen(result, engine.model)
    return result


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("strategy", [Graph(), Places()], ids=["sight", "places"])
def test_every_row_is_that_of_a_dense_recomputation(strategy, family):
    run(strategy, family=family)


def test_a_step_stands_behind_the_furthest_that_it_sees_and_nothing_is_computed_again():
    result = run(Graph())
    one, two, three, four, five = result.tree.children
    base = 4 + 5
    assert (one.start, two.start) == (base, base) and two.stop > one.stop
    assert three.start == one.stop and four.start == two.stop and five.start == max(three.stop, four.stop)
    assert four.sees == (("0.1", len(two.token_ids)), ("0.0", len(one.token_ids)))
    assert all(kid.forked_at == base for kid in result.tree.children)
    equals = next(r for r in result.tree.runs if r.kind == "inserted")
    assert equals.position == five.stop
    assert result.metrics.rows == 4 + result.metrics.total_tokens - 1
    # The longest chain: 2, its inner block, 4 (or 1 and 3), 5, the end.
    chains = (len(one.token_ids) + len(three.token_ids), result.metrics.critical_path_tokens)
    assert chains[1] < result.metrics.total_tokens


def test_positions_as_asked_for():
    result = run(Places())
    # From 4 on three tokens, a gap of 20, three tokens and a newline, whose position the first header shares.
    starts = [(run.kind, run.position) for run in result.tree.runs]
    assert starts[:4] == [("prompt", 0), ("sampled", 4), ("sampled", 27), ("inserted", 30)]
    assert {kid.start for kid in result.tree.children} == {30}
    kid = result.tree.children[0]
    assert [run.position for run in kid.runs] == [30, 31, 37, 39] and kid.stop == 41
    assert starts[4] == ("inserted", 37)  # "meanwhile", to 45, further than both threads
    assert starts[-2] == ("inserted", 46 - 3)


@pytest.mark.parametrize("pages", [22, 26, 32])
@pytest.mark.parametrize("strategy", [Graph(), Graph(discard=True), Places()], ids=["sight", "killed", "places"])
def test_pre_empted_threads_come_back_the_same(strategy, pages):
    prompts = ["Why?", "How?", "When", "Is it"]
    whole = make_engine(tokenizer=byte_tokenizer(), num_pages=900).generate(prompts, strategy=strategy, **OPTIONS)
    engine = make_engine(tokenizer=byte_tokenizer(), num_pages=pages)
    scarce = engine.generate(prompts, strategy=strategy, **OPTIONS)
    assert_nothing_held(engine)
    assert sum(result.metrics.preemptions for result in scarce) > 0
    for one, two in zip(whole, scarce, strict=True):
        assert one.tree == two.tree
        for a, b in ab.engine.logprob_pairs(one, two):
            assert abs(a - b) < 1e-3


def least_pages(prompt, strategy, **options):
    """In which it runs alone."""
    low, high = 2, make_engine(num_pages=600).generate(prompt, strategy=strategy, **options).metrics.pages_peak
    while low < high:
        middle = (low + 2 * high) // 3
        try:
            make_engine(num_pages=middle).generate(prompt, strategy=strategy, **options)
            high = middle
        except ValueError:
            low = middle + 1
    return low


def test_what_runs_alone_runs_beside_others():
    """Requests that each need all the pages there are end together in these, with the same trees."""
    options, preempted = {"max_new_tokens": 40, "eos_token_id": None}, 0
    for program in range(4):
        strategy = Sights(program, cuts=False)
        prompts = [[5, 6, 7, program], [9, program, 3], [program, 8]]
        pages = max(least_pages(prompt, strategy, **options) for prompt in prompts)
        whole = [make_engine(num_pages=600).generate(prompt, strategy=strategy, **options) for prompt in prompts]
        for more in (0, 2):
            engine = make_engine(num_pages=pages + more)
            scarce = engine.generate(prompts, strategy=strategy, **options)
            assert_nothing_held(engine)
            preempted += sum(result.metrics.preemptions for result in scarce)
            assert [result.tree for result in scarce] == [result.tree for result in whole], program
    assert preempted > 20


@pytest.mark.parametrize("strategy", [Graph(), Graph(discard=True), Places()], ids=["sight", "killed", "places"])
def test_a_trace_replays(strategy, tmp_path):
    result = run(strategy)
    ab.records.trace.save(result, tmp_path / "trace.json")
    again = ab.replay(ab.records.trace.load(tmp_path / "trace.json"), make_engine(tokenizer=byte_tokenizer()))
    assert max(abs(a - b) for a, b in ab.engine.logprob_pairs(result, again)) < 1e-3


def test_one_after_another_gives_the_same_tree():
    assert run(ab.Sequential(Graph())).tree == run(Graph()).tree


def refused(program, match):
    class Wrong(Strategy):
        def run(self, trunk):
            yield trunk.decode(2)
            yield from program(trunk)

    engine = make_engine(tokenizer=byte_tokenizer())
    with pytest.raises(ValueError, match=match):
        engine.generate("p", strategy=Wrong(), **OPTIONS)
    assert_nothing_held(engine)


def test_what_cannot_be_seen_or_skipped_is_told():
    def kids(trunk, sees):
        one, two = trunk.fork(2)
        yield [one.decode(3), two.decode(3)]
        yield trunk.fork(["x"], sees=sees(trunk, one, two))

    for sees, match in (
        (lambda trunk, one, two: [trunk], "pass forks of"),
        (lambda trunk, one, two: [one, one], "holds a thread twice"),
        (lambda trunk, one, two: [trunk.spawn("y")], "pass forks of"),
        (lambda trunk, one, two: ["0.0"], r"fork: sees\[0\]='0.0'; pass a thread"),
        (lambda trunk, one, two: [(one, -1)], r"fork: sees\[0\]: tokens=-1"),
        (lambda trunk, one, two: [two.kill() or two], r"sees\[0\]: thread 0.1 was killed"),
    ):
        refused(lambda trunk, sees=sees: kids(trunk, sees), match)

    def cut(trunk):
        (one,) = trunk.fork(1)
        yield one.decode(3)
        yield trunk.fork(["x"], sees=[one])[0].decode(1)
        yield one.truncate(one.length - 1)

    refused(cut, "thread 0.1 sees what thread 0.0 has written behind")

    def below(trunk):
        yield trunk.skip(-99)

    refused(below, "skip: count=-99; thread 0 is on position 3")

    def blind(trunk):
        (one,) = trunk.fork(1)
        yield one.decode(3)
        yield trunk.fork(1, sees=[one])[0].decode(1)

    refused(blind, "nothing to go on from")


def test_a_killed_thread_is_not_waited_for():
    class Impatient(Strategy):
        def run(self, trunk):
            yield trunk.decode(2)
            one, two = trunk.fork(2)
            one.decode(3)
            two.decode(50)
            (three,) = trunk.fork(["x"], sees=[one, two])
            yield one
            two.kill()
            yield three.decode(2)
            yield trunk.join([one, three])

    result = run(Impatient())
    assert result.tree.children[2].sees == (("0.0", 3),)


def test_a_cache_of_ones_own_shares_siblings():
    """Attention over shared siblings, in the kernels that this machine has."""
    from programs import Twins, backends_here

    twins = Twins(num_pages=60, page_size=4)
    trunk = twins.branch()
    twins.step({0: 6})
    one, two, both = twins.fork(trunk, 3)
    twins.step({1: 5, 2: 3})
    twins.share(both, two, 3)
    twins.share(both, one, 4)
    step, twin = twins.step({0: 1, 1: 1, 2: 2, 3: 3})
    q = twins.randn(step.num_rows, 4, 32)
    expected, _ = twins.naive.attention(q, 0, twin)
    for backend in backends_here():
        out = ab.tree_attention(q, twins.cache, 0, step, backend=backend)
        torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)
