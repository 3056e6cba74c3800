"""The engine against a naive second one (naive_engine.py): random programs give the same tree, tokens and metrics,
in whatever way requests come, whatever earlier ones have left in the prefix cache, and whoever guesses their tokens.

pytest tests/engine/test_naive_engine.py -m slow            # 100,000 of them
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable

import pytest
from engine_kit import Nested, assert_nothing_held
from naive_engine import Run
from naive_problems import PIECES, assert_same, assert_same_story, make, tokenizer
from programs_of_threads import Everything, Watching

import anabranch as ab
from anabranch.engine import Finish
from anabranch.strategies import Aspects, Sequential

SHORT, LONG = 1000, 10**5
SIZES, LARGE_SIZES = (1, 12, 40, 60), (1, 12, 160, 240)  # programs of a call; of many calls, larger ones take less time
SHOWN = (9, 11)  # found a mistake once


class Problem:
    """One call of the engine: a random program for each of its prompts, and an engine of random sizes."""

    def __init__(self, number: int, sizes: tuple[int, ...] = SIZES):
        self.rng = rng = random.Random(number)
        many = rng.choice(sizes)
        self.prompts = [[rng.randrange(97) for _ in range(rng.randint(1, 12))] for _ in range(many)]
        self.seeds = [rng.randrange(99) for _ in self.prompts]
        self.races = rng.random() < 0.25  # one thread at a time, so that everything that races has one outcome
        more = self.more = random.Random(f"{number}/more")
        plain = number in SHOWN  # as they were when they did
        self.strategy = Everything(number, races=self.races, sees=0.0 if plain else more.choice([0.0, 0.4]))
        self.live = not plain and not self.races and more.random() < 0.15
        if self.live:
            self.strategy = Watching(number)
        # How requests come: in one call, in a second one that finds what the first has left, or one after another
        # beside some that are aborted; and who guesses their tokens.
        self.coming = "call" if plain else more.choice(["call", "call", "call", "again", "arrivals"])
        self.draft = None if plain else more.choice([None, None, "ngram", "siblings"])
        self.budget = rng.choice([None, 3, 12, 30]) if self.races else None
        self.most, self.eos = rng.choice([6, 20, 200]), rng.choice([None, [3, 80]])
        self.size, self.stream = rng.choice([1, 2, 3, 4, 8, 32]), rng.random() < 0.3
        self.limit = rng.choice([None, None, 1, 2, 5]) if not self.races else None
        self.pages = rng.choice([20, 60, 150, 4000]) * (1 + many // 8) // self.size + rng.randint(3, 8)
        self.rows = rng.choice([3, 16, 64, 512, 512])
        more_at_once = 1 + many // 80  # else most steps of a large call look at hundreds who wait
        self.rows *= more_at_once
        self.limit = self.limit and self.limit * more_at_once
        if self.live:  # a turn of more tokens than rows would take several
            self.rows, self.limit = max(64, self.rows), None

    def run(self) -> tuple[list[ab.Result], list, int]:
        """The engine's results, what its stream told, and how often it needed more pages."""
        options = dict(max_new_tokens=self.most, max_total_tokens=self.budget, eos_token_id=self.eos, logprobs=True)
        strategy = Sequential(self.strategy) if self.races else self.strategy
        if self.draft is not None:
            strategy = ab.DraftTree(strategy, draft=self.draft, length=self.more.randint(1, 6), width=2)
        for grown in range(10):
            engine = ab.Engine(make("anabranch"), tokenizer(), num_pages=self.pages << grown, page_size=self.size,
                               max_rows=self.rows, max_threads=self.limit)  # fmt: skip
            try:
                return *self.ask(engine, dict(strategy=strategy, do_sample=False, **options)), grown
            except ValueError as error:
                assert "num_pages" in str(error), error
            finally:
                assert_nothing_held(engine)
        raise AssertionError("no number of pages is enough")

    def ask(self, engine: ab.Engine, options: dict) -> tuple[list[ab.Result], list]:
        if self.coming == "arrivals":
            return self.added(engine, options), []
        if self.coming == "again":
            engine.generate(self.prompts, seed=self.seeds, **options)
        if not self.stream:
            return engine.generate(self.prompts, seed=self.seeds, **options), []
        told = list(engine.stream(self.prompts, seed=self.seeds, **options))
        ends = {e.prompt: e.result for e in told if isinstance(e, Finish)}
        return [ends[i] for i in range(len(self.prompts))], told

    def added(self, engine: ab.Engine, options: dict) -> list[ab.Result]:
        """Requests that come while others are under way; strangers among them, which leave before their end."""
        handles, strangers = [], []
        while engine.step() or len(handles) < len(self.prompts):
            for _ in range(self.more.choice([0, 0, 1, 3])):
                if len(handles) < len(self.prompts):
                    at, priority = len(handles), self.more.choice([0, 0, 1, -1])
                    handles.append(engine.add(self.prompts[at], seed=self.seeds[at], priority=priority, **options))
            if self.more.random() < 0.1:
                strangers.append(engine.add(self.more.choice(self.prompts), seed=1, **options))
            if strangers and self.more.random() < 0.2:
                strangers.pop(self.more.randrange(len(strangers))).abort()
        return [handle.result() for handle in handles]

    def compare(self, seen: Counter) -> None:
        results, told, grown = self.run()
        for i, (prompt, seed, result) in enumerate(zip(self.prompts, self.seeds, results, strict=True)):
            naive = Run(
                make("eager"), prompt, Sequential(self.strategy) if self.races else self.strategy, seed, pieces=PIECES,
                eos=self.eos or (), max_new_tokens=self.most, max_total_tokens=self.budget, follow=result,
            )  # fmt: skip
            assert_same(result, naive, self.limit is not None)
            if told:
                assert_same_story([e for e in told if e.prompt == i], result, naive)
            seen["live"] += self.live
            seen["sees"] += any(node.sees for node in result.tree.walk())
            seen["accepted"] += result.metrics.accepted_tokens > 0
            seen["found"] += result.metrics.cached_tokens > 0
            seen[self.coming] += 1
            seen["pre-empted"] += result.metrics.preemptions > 0
            seen["killed"] += any(node.ended == "killed" for node in result.tree.walk())
            seen["budget"] += any(node.ended == "budget" for node in result.tree.walk())
            for node in result.tree.walk():
                seen.update(f"{a.do} {a.mode or ''}".strip() for a in node.log)
        seen.update(programs=len(results), calls=1, stream=bool(told), grown=grown)


def programs(numbers: Iterable[int], least: int, sizes: tuple[int, ...] = SIZES) -> Counter:
    """Compare random problems until so many programs were run; what there was to see."""
    seen: Counter = Counter()
    for number in numbers:
        try:
            Problem(number, sizes).compare(seen)
        except Exception as error:
            again = f"Problem({number}, {sizes}).compare(Counter())"
            raise AssertionError(f"problem {number} ({again} shows it again)") from error
        if seen["programs"] >= least:
            break
    return seen


def assert_all_seen(seen: Counter, programs: int) -> None:
    """Everything that there is to compare did occur, again and again."""
    wanted = ["insert", "sample", "fork", "spawn", "truncate", "kill killed", "kill discarded", "join concat"]
    wanted += ["join reprefill", "join summary", "pre-empted", "killed", "budget"]
    wanted += ["sees", "accepted", "found", "again", "arrivals", "live"]
    assert seen["programs"] >= programs and min(seen[name] for name in wanted) >= programs // 50, seen
    assert seen["stream"] > 0 < seen["grown"], seen


def test_random_programs_run_as_by_the_naive_engine():
    assert_all_seen(programs([*SHOWN, *range(10**6)], SHORT), SHORT)


@pytest.mark.slow
def test_a_hundred_thousand_random_programs():
    seen = programs(range(10**6, 10**9), LONG, LARGE_SIZES)
    print(seen)
    assert_all_seen(seen, LONG)


@pytest.mark.parametrize(
    "strategy",
    [
        Nested(),
        Sequential(Nested()),
        Everything(3),
        Aspects(([1], [2, 3]), [4], after=(), intro_tokens=9, aspect_tokens=5, aspect_stop=()),
    ],
    ids=lambda strategy: type(strategy).__name__,
)
def test_the_naive_engine_by_itself_writes_the_same(strategy):
    for seed in (0, 1):
        options = dict(max_new_tokens=40, do_sample=bool(seed))
        result = ab.Engine(make("anabranch"), tokenizer(), num_pages=300, page_size=4).generate(
            [5, 6, 7], strategy=strategy, seed=seed, top_k=0 if seed else None, eos_token_id=None, **options
        )
        naive = Run(make("eager"), [5, 6, 7], strategy, seed, pieces=PIECES, **options)
        assert naive.main.value == result.answers
        assert {t.id: t.token_ids for t in naive.threads} == {n.id: n.token_ids for n in result.tree.walk()}
        assert naive.critical == result.metrics.critical_path_tokens


def test_what_the_naive_engine_is_there_to_notice_is_noticed():
    """A token that the scores do not give, one position off, one token more in sight: each shows."""
    problem = Problem(1)
    result = problem.run()[0][0]

    def run() -> Run:
        options = dict(pieces=PIECES, eos=problem.eos or (), max_new_tokens=problem.most)
        return Run(make("eager"), problem.prompts[0], problem.strategy, problem.seeds[0], follow=result, **options)

    run().check()
    for spoil in (
        lambda naive, at, last: naive.ids.__setitem__(at, (naive.ids[at] + 1) % 97),
        lambda naive, at, last: naive.positions.__setitem__(last, naive.positions[last] + 5),
        lambda naive, at, last: naive.sees.__setitem__(last, naive.sees[last][1:]),
    ):
        noticed = 0
        for i in range(len(run().chosen)):
            naive = run()
            spoil(naive, *naive.chosen[i][:2])
            try:
                naive.check()
            except AssertionError:
                noticed += 1
        assert noticed > 0
