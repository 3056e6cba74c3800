"""The engine against a naive second one (naive_engine.py): random programs give the same tree, tokens and metrics.

pytest tests/test_naive_engine.py -m slow            # 100,000 of them
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable
from functools import cache

import pytest
import torch
from engine_kit import SIZES, Nested, assert_nothing_held
from naive_engine import Run
from programs_of_threads import Everything
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import anabranch as ab
from anabranch.engine import Discard, Finish, Fork, Join, Token
from anabranch.strategies import Aspects, Sequential

SHORT, LONG = 1000, 10**5
SHOWN = (9, 11)  # found a mistake once

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 \n.,:;é漢"
PIECES = [*LETTERS, *(a + b for a in "aeiou" for b in "bcdnst "), "  "][:97]


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """97 pieces, some of several characters; a text's characters are its tokens."""
    inner = Tokenizer(models.WordLevel(vocab={piece: i for i, piece in enumerate(PIECES)}, unk_token=PIECES[0]))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner)


@cache
def make(attention: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    small = dict(vocab_size=97, hidden_size=16, intermediate_size=24, num_attention_heads=2, num_key_value_heads=1)
    config = LlamaConfig(**SIZES | small | dict(bos_token_id=None, eos_token_id=None, pad_token_id=None))
    return LlamaForCausalLM._from_config(config, attn_implementation=attention).eval()


def per_token(runs, nodes) -> list[tuple]:
    """(kind, source, token, position) of each token of some runs; of a spliced run, the source's own runs tell."""
    found = []
    for run in runs:
        inner = per_token(nodes[run.source].runs, nodes) if run.spliced else []
        at = [p for *_, p in inner] or range(run.position, run.position + len(run.token_ids))
        assert run.position == at[0]
        found += [(run.kind, run.source, token, p) for token, p in zip(run.token_ids, at, strict=False)]
    return found


def assert_same(result: ab.Result, naive: Run, limited: bool = False) -> None:
    """Tree, tokens, positions, fates, text, answers, scores and metrics of the engine are the naive one's; `limited`:
    threads had to wait for one another's turn, which the naive account knows nothing of."""
    logprobs = naive.check()
    threads = {thread.id: thread for thread in naive.threads}
    nodes = {node.id: node for node in result.tree.walk()}
    for node in nodes.values():
        thread = threads.pop(node.id)
        own = thread._context[thread._shared :]
        mine = [(k, s, naive.ids[i], naive.positions[i]) for i, (k, s, _) in zip(own, thread._labels, strict=True)]
        ours = per_token(node.runs, nodes)
        assert [(k, t, p) for k, _, t, p in ours] == [(k, t, p) for k, _, t, p in mine], node.id
        # (What an adopted child had joined keeps the name of whoever wrote it.)
        assert all(a == b or a.startswith(f"{b}.") for (_, a, *_), (_, b, *_) in zip(ours, mine, strict=True))
        gone = Counter((kind, naive.ids[i]) for kind, _, i in thread._forgotten)
        assert Counter((run.kind, t) for run in node.forgotten for t in run.token_ids) == gone, node.id
        start = naive.positions[own[0]] if own else thread._position
        assert (node.start, node.stop, node.forked_at) == (start, thread._position, thread._shared), node.id
        assert (node.role, node.fate, node.text) == (thread.role, thread.fate, thread.text), node.id
        assert node.ended == (thread.ended.reason if thread.ended else None), node.id
        assert node.token_ids == thread.token_ids, node.id
        assert [kid.id for kid in node.children] == [kid.id for block in thread._blocks for kid in block], node.id
        told = [p for run in node.runs for p in run.logprobs or [None] * len(run.token_ids)]
        for i, logprob, (kind, *_) in zip(own, told, ours, strict=True):
            assert (logprob is not None) == (kind != "joined" and i in logprobs), node.id
            assert logprob is None or logprob == pytest.approx(logprobs[i], abs=1e-3), node.id
    assert all(not t._born or t.parent.fate == "killed" for t in threads.values())  # never in the tree
    assert result.token_ids == naive.trunk.token_ids and result.text == naive.trunk.text
    assert result.answers == naive.main.value and sorted(result.malformed) == sorted(naive.malformed)

    metrics, total = result.metrics, naive.sampled + naive.inserted
    blocks = sorted(len(block) for thread in naive.threads for block in thread._blocks if thread.id in nodes)
    assert (metrics.sampled_tokens, metrics.inserted_tokens) == (naive.sampled, naive.inserted)
    assert (metrics.total_tokens, metrics.prompt_tokens) == (total, len(naive.prompt))
    assert (metrics.num_forks, metrics.num_threads) == (len(blocks), sum(blocks))
    assert sorted(metrics.threads_per_block) == blocks and metrics.trigger_rate == (len(blocks) > 0)
    assert metrics.format_correctness == (not naive.malformed)
    assert metrics.parallel_ratio == pytest.approx((total - naive.in_trunk) / total if total else 0)
    assert naive.seen <= metrics.longest_context <= naive.longest_context
    assert metrics.critical_path_tokens == naive.critical or (limited and metrics.critical_path_tokens > naive.critical)


def assert_same_story(told: list, result: ab.Result, naive: Run) -> None:
    """What a stream told of one prompt is what happened."""
    for thread in naive.threads:
        tokens = [t for e in told if isinstance(e, Token) and e.thread == thread.id for t in e.token_ids]
        assert tokens == thread._written, thread.id
    ends = {thread.id: thread.fate for thread in naive.threads[1:]}
    assert {e.thread: e.reason for e in told if isinstance(e, Discard)} == {
        name: fate for name, fate in ends.items() if fate != "joined"
    }
    assert {kid for e in told if isinstance(e, Join) for kid in e.children} == {
        k for k, f in ends.items() if f == "joined"
    }
    assert {kid for e in told if isinstance(e, Fork) for kid in e.children} == {n.id for n in result.tree.walk()} - {
        "0"
    }


class Problem:
    """One call of the engine: a random program for each of its prompts, and an engine of random sizes."""

    def __init__(self, number: int):
        self.rng = rng = random.Random(number)
        many = rng.choice([1, 12, 40, 60])
        self.prompts = [[rng.randrange(97) for _ in range(rng.randint(1, 12))] for _ in range(many)]
        self.seeds = [rng.randrange(99) for _ in self.prompts]
        self.races = rng.random() < 0.25  # one thread at a time, so that everything that races has one outcome
        self.strategy = Everything(number, races=self.races)
        self.budget = rng.choice([None, 3, 12, 30]) if self.races else None
        self.most, self.eos = rng.choice([6, 20, 200]), rng.choice([None, [3, 80]])
        self.size, self.stream = rng.choice([1, 2, 3, 4, 8, 32]), rng.random() < 0.3
        self.limit = rng.choice([None, None, 1, 2, 5]) if not self.races else None
        self.pages = rng.choice([20, 60, 150, 4000]) * (1 + many // 8) // self.size + rng.randint(3, 8)
        self.rows = rng.choice([3, 16, 64, 512, 512])

    def run(self) -> tuple[list[ab.Result], list, int]:
        """The engine's results, what its stream told, and how often it needed more pages."""
        options = dict(max_new_tokens=self.most, max_total_tokens=self.budget, eos_token_id=self.eos, logprobs=True)
        strategy = Sequential(self.strategy) if self.races else self.strategy
        for grown in range(10):
            engine = ab.Engine(make("anabranch"), tokenizer(), num_pages=self.pages << grown, page_size=self.size,
                               max_rows=self.rows, max_threads=self.limit)  # fmt: skip
            call = engine.stream if self.stream else engine.generate
            try:
                told = call(self.prompts, strategy=strategy, seed=self.seeds, do_sample=False, **options)
                told = list(told)
            except ValueError as error:
                assert "num_pages" in str(error), error
            else:
                break
            finally:
                assert_nothing_held(engine)
        if not self.stream:
            return told, [], grown
        ends = {e.prompt: e.result for e in told if isinstance(e, Finish)}
        return [ends[i] for i in range(len(self.prompts))], told, grown

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
            seen["pre-empted"] += result.metrics.preemptions > 0
            seen["killed"] += any(node.ended == "killed" for node in result.tree.walk())
            seen["budget"] += any(node.ended == "budget" for node in result.tree.walk())
            for node in result.tree.walk():
                seen.update(f"{a.do} {a.mode or ''}".strip() for a in node.log)
        seen.update(programs=len(results), calls=1, stream=bool(told), grown=grown)


def programs(numbers: Iterable[int], least: int) -> Counter:
    """Compare random problems until so many programs were run; what there was to see."""
    seen: Counter = Counter()
    for number in numbers:
        try:
            Problem(number).compare(seen)
        except Exception as error:
            raise AssertionError(f"problem {number} (Problem({number}).compare(Counter()) shows it again)") from error
        if seen["programs"] >= least:
            break
    return seen


def assert_all_seen(seen: Counter, programs: int) -> None:
    """Everything that there is to compare did occur, again and again."""
    wanted = ["insert", "sample", "fork", "spawn", "truncate", "kill killed", "kill discarded", "join concat"]
    wanted += ["join reprefill", "join summary", "pre-empted", "killed", "budget"]
    assert seen["programs"] >= programs and min(seen[name] for name in wanted) >= programs // 50, seen
    assert seen["stream"] > 0 < seen["grown"], seen


def test_random_programs_run_as_by_the_naive_engine():
    assert_all_seen(programs([*SHOWN, *range(10**6)], SHORT), SHORT)


@pytest.mark.slow
def test_a_hundred_thousand_random_programs():
    seen = programs(range(10**6, 10**9), LONG)
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
