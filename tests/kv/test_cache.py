"""TreeCache against its naive twin: copy-on-write, joins, truncation, accounts, and every kind of bad input."""

from __future__ import annotations

import mmap
import platform
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from programs import Twins

import anabranch as ab


class CacheMachine(RuleBasedStateMachine):
    """Hypothesis drives both caches; after each rule they must agree to the bit and the books must balance."""

    @initialize(
        page_size=st.sampled_from([1, 2, 3, 4, 16]), pages=st.sampled_from([24, 400]), seed=st.integers(0, 2**16)
    )
    def start(self, page_size: int, pages: int, seed: int) -> None:
        self.twins = Twins(num_pages=pages, page_size=page_size, layers=2, heads=1, dim=8, seed=seed)
        self.twins.branch()

    def pick(self, data: st.DataObject) -> tuple:
        return self.twins.pairs[data.draw(st.integers(0, len(self.twins.pairs) - 1))]

    @rule()
    def branch(self) -> None:
        if len(self.twins.pairs) < 10:
            self.twins.branch()

    @rule(data=st.data(), n=st.integers(1, 3))
    def fork(self, data: st.DataObject, n: int) -> None:
        if len(self.twins.pairs) < 10:
            self.twins.fork(self.pick(data), n)

    @precondition(lambda self: self.twins.pairs)
    @rule(data=st.data())
    def step(self, data: st.DataObject) -> None:
        count = len(self.twins.pairs)
        chosen = data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=count, unique=True))
        rows = {i: data.draw(st.integers(1, 7)) for i in chosen}
        where = {i: data.draw(st.lists(st.integers(0, 50), min_size=n, max_size=n)) for i, n in rows.items() if n == 3}
        before = self.twins.cache.usage()
        try:
            self.twins.step(rows, where)
        except ab.OutOfPages:
            assert self.twins.cache.usage() == before
            # Shortage is real: even without any copy the new tokens need more pages than are free.
            assert sum(rows.values()) + len(rows) > before.pages_free

    @precondition(lambda self: any(self.twins.kids_of(p) for p in self.twins.pairs))
    @rule(data=st.data())
    def join(self, data: st.DataObject) -> None:
        trunk = data.draw(st.sampled_from([p for p in self.twins.pairs if self.twins.kids_of(p)]))
        kids = data.draw(st.permutations(self.twins.kids_of(trunk)))
        self.twins.join(trunk, kids[: data.draw(st.integers(1, len(kids)))])

    @precondition(lambda self: self.twins.sharers())
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        pair, sibling = data.draw(st.sampled_from(self.twins.sharers()))
        own = sibling[1].length - sibling[1].own
        self.twins.share(pair, sibling, data.draw(st.one_of(st.just(own), st.integers(0, own))))

    @rule(data=st.data())
    def truncate(self, data: st.DataObject) -> None:
        pair = self.pick(data)
        self.twins.truncate(pair, data.draw(st.integers(0, pair[1].length)))

    @precondition(lambda self: len(self.twins.pairs) > 1)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.twins.release(self.pick(data))

    @invariant()
    def agree(self) -> None:
        if hasattr(self, "twins"):
            self.twins.compare()

    def teardown(self) -> None:
        if hasattr(self, "twins"):
            for pair in list(self.twins.pairs):
                self.twins.release(pair)
            assert self.twins.cache.usage().pages_free == self.twins.cache.num_pages
            self.twins.cache.check()


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def random_programs(operations: int, seed: int) -> None:
    """Many short-lived random programs; agreement is checked every few operations, the books after every one."""
    done = 0
    while done < operations:
        seed += 1
        twins = Twins(num_pages=4000, page_size=(1, 2, 3, 5, 8, 16)[seed % 6], layers=1, heads=1, dim=4, seed=seed)
        for i in range(250):
            twins.random_change()
            twins.cache.check()
            if i % 10 == 0:
                twins.compare()
        twins.compare()
        for pair in list(twins.pairs):
            twins.release(pair)
        assert twins.cache.usage().pages_free == 4000 and twins.cache.usage().tokens_physical == 0
        done += 250


def test_ten_thousand_operations() -> None:
    random_programs(10_000, seed=0)


@pytest.mark.slow
def test_a_million_operations() -> None:
    random_programs(1_000_000, seed=10**6)


def make(**kwargs: object) -> tuple[ab.TreeCache, ab.Branch]:
    cache = ab.TreeCache(
        **{"num_layers": 2, "num_kv_heads": 2, "head_dim": 32, "num_pages": 64, "page_size": 16, **kwargs}
    )
    return cache, cache.branch()


def fill(cache: ab.TreeCache, step: ab.Step) -> None:
    for layer in range(cache.num_layers):
        kv = torch.randn(2, step.num_rows, cache.num_kv_heads, cache.head_dim, dtype=cache.dtype)
        cache.write(layer, kv[0], kv[1], step)


def test_kept_pages_are_those_that_a_fork_takes() -> None:
    """Each once, however many tokens and spans lie in it; not those that somebody else holds already."""
    cache, kept = make(page_size=4)
    fill(cache, cache.step({kept: 14}))
    forks = cache.fork(kept, 4)
    for fork, length in zip(forks, (3, 6, 7, 13), strict=True):  # the context is cut into spans there
        cache.truncate(fork, length)
    cache.keep(kept)
    for held in (4, 2, 2, 1, 0):  # pages that the others hold
        for length in range(15):
            free, told = cache.usage().pages_free, cache.kept_pages(kept, length)
            fork = cache.fork(kept, 1)[0]
            cache.truncate(fork, length)
            assert told == free - cache.usage().pages_free == max(0, (length + 3) // 4 - held)
            cache.release(fork)
        if forks:
            cache.release(forks.pop())


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc")
@pytest.mark.parametrize("kv_format", ["auto", "int8"])
def test_memory_is_handed_out_at_once_where_asked(kv_format: str) -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE

    cache = ab.TreeCache(8, 2, 64, num_pages=2000, page_size=16, kv_format=kv_format)
    branch = cache.branch()
    step = cache.step({branch: 40})
    k, v = (torch.randn(40, 2, 64, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    cache.write(3, k, v, step)
    before = [x.clone() for x in cache.read(branch, 3)]
    total = 8 * 2000 * 16 * 2 * 2 * (64 if kv_format == "int8" else 256)
    had = resident()
    assert cache.populate() or platform.release() < "5.14"
    assert resident() - had > 0.8 * total or kv_format == "auto"  # these are not empty, but NaN: conftest.py
    assert all(map(torch.equal, before, cache.read(branch, 3)))


def test_more_memory_than_there_is_is_not_claimed(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = ab.TreeCache(2, 2, 64, num_pages=100, page_size=16)
    takes = 2 * 2 * 100 * 2 * 16 * 64 * 4
    monkeypatch.setattr("anabranch.kv.cache.available_memory", lambda: takes - 1)
    with pytest.raises(MemoryError, match=r"num_pages=100 \(of 16 tokens\) take 0\.0 GB, .*; pass a smaller num_pages"):
        cache.populate()
    for enough in (takes, None):
        monkeypatch.setattr("anabranch.kv.cache.available_memory", lambda enough=enough: enough)
        cache.populate()


def test_fork_copies_nothing_and_the_last_holder_writes_in_place() -> None:
    cache, trunk = make()
    fill(cache, cache.step({trunk: 20}))
    kids = cache.fork(trunk, 3)
    assert cache.usage().pages_copied == 0 and cache.usage().pages_free == 62
    cache.release(trunk)
    fill(cache, cache.step({k: 1 for k in kids}))
    assert cache.usage().pages_copied == 2  # two copy the shared tail page, the third has it to itself
    assert cache.usage().pages_free == 60
    assert cache.usage().tokens_physical == 16 + 3 * 5


def test_fork_on_a_page_boundary_copies_nothing_ever() -> None:
    cache, trunk = make()
    fill(cache, cache.step({trunk: 32}))
    kids = cache.fork(trunk, 4)
    fill(cache, cache.step({k: 3 for k in kids}))
    assert cache.usage().pages_copied == 0 and cache.usage().tokens_physical == 32 + 4 * 3


def test_memory_is_prefix_plus_branches_plus_at_most_a_page_each() -> None:
    cache, trunk = make(num_pages=400)
    fill(cache, cache.step({trunk: 1001}))
    kids = cache.fork(trunk, 16)
    for _ in range(40):
        fill(cache, cache.step({k: 1 for k in kids}))
    assert cache.usage().tokens_physical <= 1001 + 16 * 40 + 16 * 16


def test_a_page_that_a_step_frees_is_not_written_in_that_step() -> None:
    """Two branches leave a shared tail page, which nobody holds then; the next copy of the same step goes elsewhere."""
    twins = Twins(num_pages=12, page_size=8, heads=1, dim=4)
    a = twins.branch()
    twins.step({0: 6})
    twins.truncate(twins.fork(a, 1)[0], 4)
    x = twins.branch()
    twins.step({2: 3})
    twins.fork(x, 1)
    step, _ = twins.step({0: 1, 1: 1, 2: 1, 3: 1})  # Twins checks the reservations
    sources, destinations, _ = step._core.copies().tolist()
    assert sources[0] == sources[1] and sources[2] not in sources[:2] and not set(sources) & set(destinations)
    twins.compare()


def test_join_is_a_splice() -> None:
    cache, trunk = make()
    fill(cache, cache.step({trunk: 18}))
    kids = cache.fork(trunk, 2)
    fill(cache, cache.step({kids[0]: 3, kids[1]: 5}))
    expected = [torch.cat([cache.read(trunk, 1)[i], *(cache.read(k, 1)[i][18:] for k in kids)]) for i in (0, 1)]
    copied = cache.usage().pages_copied
    cache.join(trunk, kids)
    assert trunk.length == 26 and trunk.position == 23
    assert not kids[0].alive and cache.usage().pages_copied == copied
    assert all(torch.equal(a, b) for a, b in zip(cache.read(trunk, 1), expected, strict=True))
    assert cache.positions(trunk)[18:].tolist() == [18, 19, 20, 18, 19, 20, 21, 22]


def test_a_sibling_is_shared_without_a_copy_and_joined_once() -> None:
    cache, trunk = make()
    fill(cache, cache.step({trunk: 18}))
    one, two, both = cache.fork(trunk, 3)
    fill(cache, cache.step({one: 3, two: 5}))
    before = cache.usage()
    expected = torch.cat([cache.read(trunk, 1)[0], cache.read(two, 1)[0][18:], cache.read(one, 1)[0][18:20]])
    cache.share(both, two)
    cache.share(both, one, 2)
    assert (both.length, both.position) == (25, 23) and torch.equal(cache.read(both, 1)[0], expected)
    assert cache.usage().tokens_physical == before.tokens_physical and cache.usage().pages_free == before.pages_free
    fill(cache, cache.step({one: 1, both: 2}))  # one goes on; what it writes now is not seen
    assert cache.positions(both).tolist() == [*range(18), *range(18, 23), 18, 19, 23, 24]
    cache.join(trunk, [one, two, both])
    assert cache.positions(trunk)[18:].tolist() == [18, 19, 20, 21, *range(18, 23), 23, 24]
    cache.check()


def test_only_a_sibling_that_is_not_seen_yet_is_shared() -> None:
    cache, trunk = make()
    fill(cache, cache.step({trunk: 4}))
    kid, other = cache.fork(trunk, 2)
    cousin = cache.fork(other)[0]
    for call, match in (
        (lambda: cache.share(kid, trunk), "not forked from one branch"),
        (lambda: cache.share(kid, cousin), "not forked from one branch"),
        (lambda: cache.share(kid, kid), "not forked from one branch"),
        (lambda: cache.share(trunk, trunk), "not forked from one branch"),
        (lambda: cache.share(kid, other, 1), "count must be from 0 to 0"),
        (lambda: cache.share(kid, other, "1"), "share: count must be a whole number"),
        (lambda: cache.share(kid, make()[1]), "another cache"),
    ):
        unchanged(cache, ValueError, match, call)
    fill(cache, cache.step({other: 3}))
    cache.share(kid, other)
    unchanged(cache, ValueError, "already", lambda: cache.share(kid, other, 1))
    fill(cache, cache.step({kid: 1}))
    unchanged(cache, ValueError, "1 tokens of its own", lambda: cache.share(kid, other))
    third = cache.fork(trunk)[0]
    cache.release(other)
    unchanged(cache, ab.DeadBranch, "released", lambda: cache.share(third, other))


def test_one_plan_serves_while_the_topology_stays() -> None:
    cache, trunk = make(num_layers=1)
    fill(cache, cache.step({trunk: 40}))
    kids = cache.fork(trunk, 3)
    from anabranch.plan.tile_config import TileConfig

    for _ in range(30):
        step = cache.step({k: 1 for k in kids})
        fill(cache, step)
        step.plan.arrays(2, TileConfig(64, 128, 4))
    built, advanced = cache.plan_stats()
    assert built == 1 and advanced == 29


# -- bad input: each raises by name, and nothing changes ---------------------------------------------------------------


def unchanged(cache: ab.TreeCache, error: type[Exception], match: str, call) -> None:  # type: ignore[no-untyped-def]
    before = cache.usage()
    with pytest.raises(error, match=match):
        call()
    assert cache.usage() == before
    cache.check()


def test_out_of_pages_is_found_before_anything_changes() -> None:
    cache, trunk = make(num_pages=4)
    fill(cache, cache.step({trunk: 20}))
    kids = cache.fork(trunk, 3)
    unchanged(cache, ab.OutOfPages, "3 needed, 2 of 4 free.*num_pages", lambda: cache.step({k: 1 for k in kids}))
    assert all(k.length == 20 for k in kids)
    fill(cache, cache.step({kids[0]: 1, kids[1]: 1}))
    unchanged(cache, ab.OutOfPages, "out of pages", lambda: cache.step({kids[2]: 1}))


def test_dead_and_foreign_branches() -> None:
    cache, trunk = make()
    _, stranger = make()
    fill(cache, cache.step({trunk: 4}))
    kid = cache.fork(trunk, 1)[0]
    grandkid = cache.fork(kid, 1)[0]
    dead = cache.fork(trunk, 1)[0]
    cache.release(dead)
    for call in (
        lambda: cache.step({dead: 1}),
        lambda: cache.fork(dead, 2),
        lambda: cache.truncate(dead, 0),
        lambda: cache.release(dead),
        lambda: cache.read(dead, 0),
        lambda: cache.join(trunk, [dead]),
        lambda: cache.join(trunk, [kid, dead]),
        lambda: cache.join(trunk, [dead], mode="discard"),
        lambda: dead.length,
    ):
        unchanged(cache, ab.DeadBranch, "released or joined", call)
    for call in (
        lambda: cache.step({stranger: 1}),
        lambda: cache.fork(stranger, 2),
        lambda: cache.join(trunk, [stranger]),
        lambda: cache.truncate(stranger, 0),
        lambda: cache.release(stranger),
        lambda: cache.read(stranger, 0),
    ):
        unchanged(cache, ValueError, "another cache", call)
    unchanged(cache, ValueError, "not forked from the trunk", lambda: cache.join(trunk, [grandkid]))
    unchanged(cache, ValueError, "not forked from the trunk", lambda: cache.join(trunk, [trunk]))
    unchanged(cache, ValueError, "twice", lambda: cache.join(trunk, [kid, kid]))
    unchanged(cache, ValueError, "mode", lambda: cache.join(trunk, [kid], mode="splice"))
    unchanged(cache, ValueError, "Engine", lambda: cache.join(trunk, [kid], mode="reprefill"))
    assert kid.alive and grandkid.alive and stranger.alive


def test_steps_that_make_no_sense() -> None:
    cache, trunk = make()
    unchanged(cache, ValueError, "no rows", lambda: cache.step({}))
    unchanged(cache, ValueError, "at least 1, got 0", lambda: cache.step({trunk: 0}))
    unchanged(cache, TypeError, "integer", lambda: cache.step({trunk: "3"}))
    unchanged(cache, TypeError, "branches", lambda: cache.step({"trunk": 3}))
    unchanged(cache, ValueError, r"shape \[3\]", lambda: cache.step({trunk: 3}, {trunk: torch.arange(2)}))
    unchanged(cache, ValueError, "negative", lambda: cache.step({trunk: 1}, {trunk: torch.tensor([-1])}))
    unchanged(cache, ValueError, "integers", lambda: cache.step({trunk: 1}, {trunk: torch.tensor([1.0])}))
    unchanged(cache, ValueError, "2\\^31", lambda: cache.step({trunk: 1}, {trunk: torch.tensor([2**31])}))
    unchanged(cache, ValueError, "2\\^31", lambda: cache.step({trunk: 1}, {trunk: torch.tensor([2**31 - 1])}))
    unchanged(cache, ValueError, "2\\^31", lambda: cache.step({trunk: 2}, {trunk: torch.tensor([2**31 - 1, 4])}))
    unchanged(
        cache,
        ValueError,
        "no rows in this step",
        lambda: cache.step({trunk: 1}, {cache.fork(trunk)[0]: torch.tensor([0])}),
    )
    unchanged(cache, ValueError, "from 0 to 0", lambda: cache.truncate(trunk, 1))
    unchanged(cache, ValueError, "length", lambda: cache.truncate(trunk, -1))
    unchanged(cache, ValueError, "n must be", lambda: cache.fork(trunk, 0))


def test_the_last_position_there_is() -> None:
    cache, trunk = make()
    cache.step({trunk: 2}, {trunk: torch.tensor([2**31 - 2, 7])})
    cache.step({trunk: 1})  # goes on from 7
    assert cache.positions(trunk).tolist() == [2**31 - 2, 7, 8]


def test_writes_that_do_not_fit() -> None:
    cache, trunk = make()
    other, _ = make()
    step = cache.step({trunk: 5})
    k = torch.zeros(5, 2, 32)
    bad = {
        r"expected shape \[5, 2, 32\].*got shape \[4, 2, 32\]": lambda: cache.write(0, k[:4], k, step),
        "v: expected shape": lambda: cache.write(0, k, k[:, :1], step),
        "dtype": lambda: cache.write(0, k.half(), k.half(), step),
        "contiguous": lambda: cache.write(0, k, torch.zeros(2, 5, 32).transpose(0, 1), step),
        "layer: must be from 0 to 1, got 2": lambda: cache.write(2, k, k, step),
        "layer: must be from 0 to 1, got -1": lambda: cache.write(-1, k, k, step),
        "another cache": lambda: other.write(0, k, k, step),
        "device": lambda: cache.write(0, k.to("meta"), k.to("meta"), step),
        "got list": lambda: cache.write(0, k.tolist(), k, step),
    }
    for match, call in bad.items():
        unchanged(cache, ValueError, match, call)
    cache.write(0, k, k, step)
    unchanged(cache, ValueError, "already written", lambda: cache.write(0, k, k, step))
    fill(cache, cache.step({trunk: 1}))
    unchanged(cache, ValueError, "moved on", lambda: cache.write(1, k, k, step))


def test_caches_that_cannot_be() -> None:
    for name in ("num_layers", "num_kv_heads", "head_dim", "num_pages", "page_size"):
        with pytest.raises(ValueError, match=name):
            make(**{name: 0})
    with pytest.raises(ValueError, match="head_dim 8192"):
        make(head_dim=8192)
    with pytest.raises(ValueError, match="int32"):
        make(dtype=torch.int32)
    with pytest.raises(ValueError, match="2\\^31"):
        make(num_pages=2**31, page_size=16)
