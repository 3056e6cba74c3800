"""Rows that read other branches beside their own, under position offsets or where the tokens were written."""

from __future__ import annotations

import pytest
import torch
from programs import backends_here
from views_kit import Views, grown

import anabranch as ab

OPTIONS = [{}, {"softcap": 3.0}, {"window": 7}, {"softcap": 3.0, "window": 11}]


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


def close(bound: float):
    def check(out, want, lse, want_lse):
        assert out.shape == want.shape and lse.shape == want_lse.shape
        assert relative(out, want) <= bound
        torch.testing.assert_close(lse.double(), want_lse, atol=bound * 10, rtol=bound * 10)

    return check


@pytest.mark.parametrize("backend", backends_here())
@pytest.mark.parametrize("seed", range(12))
def test_every_backend_equals_keys_that_are_turned(seed: int, backend: str) -> None:
    if backend == "triton" and seed >= 4:
        pytest.skip("the interpreter is slow: 4 of 12")
    problem = grown(
        seed, interleaved=seed % 2 == 1, pairs=(8, 8, 4, 5)[seed % 4], page_size=(4, 16, 1)[seed % 3],
        group=(1, 3, 4)[seed % 3], **OPTIONS[seed % 4],
    )  # fmt: skip
    sinks = torch.linspace(-1, 2, 2 * problem.group) if seed % 3 == 0 else None
    for _ in range(2 if backend == "triton" else 6):
        step, views = problem.grow(turning=seed % 4 != 3, most=(1, 4)[seed % 2])
        problem.attend(step, views, backend, close(1e-5), [backend], sinks)
    problem.cache.check()


@pytest.mark.parametrize("dtype,bound", [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)], ids=str)
def test_half_precision(dtype: torch.dtype, bound: float) -> None:
    problem = grown(3, dtype=dtype, dim=32)
    for _ in range(4):
        step, views = problem.grow(turning=True)
        problem.attend(step, views, "auto", close(bound), ["cpu", "reference"])


def test_batch_invariant_plans_take_views() -> None:
    problem = grown(5)
    problem.cache.batch_invariant = True
    for _ in range(4):
        step, views = problem.grow(turning=True)
        problem.attend(step, views, "cpu", close(1e-5), ["cpu"])


def test_plans_that_lie_on_a_device() -> None:
    """As on a GPU: arrays are copied there once a topology, and advanced there where they can be."""
    problem = grown(6)
    problem.cache.planner.on_host = False
    for turning in (True, False, True):
        step, views = problem.grow(turning)
        problem.attend(step, views, "cpu", close(1e-5), ["cpu"])
        for _ in range(2):  # plain decode steps in between
            problem.attend(problem.cache.step(dict.fromkeys(problem.branches, 1)), {}, "cpu", close(1e-5), ["cpu"])


def test_workers_that_see_one_another_read_everything_once() -> None:
    """Without offsets, rows that see the same are one run: as if they shared a branch."""
    problem = grown(0, page_size=3)  # the trunk's 9 tokens fill their pages, so no fork copies one
    kids = problem.branches[1:3]
    views = {kid: [ab.Read(other, 9) for other in kids if other is not kid] for kid in kids}
    step = problem.cache.step({kid: 1 for kid in kids}, views=views)
    problem.attend(step, {kid: [v] for kid, v in views.items()}, "cpu", close(1e-5), ["cpu"])
    arrays = next(iter(step.plan._arrays.values()))
    assert arrays.num_runs == 1 and arrays.kv_tokens == 9 + 3 + 1 + 2


def test_a_token_that_is_read_twice_counts_once() -> None:
    """Seen in one's own context, by an earlier read or under another offset already: the first time counts."""
    problem = grown(0, page_size=3)  # the trunk's 9 tokens fill their pages, so no fork copies one
    trunk, a, b, other, _ = problem.branches
    for reads in (
        [ab.Read(b, 0)],
        [ab.Read(b, 0, None, 5)],
        [ab.Read(other, 0, 4), ab.Read(other, 2)],
        [ab.Read(other, 1, 4, 7), ab.Read(other, 0, None, -3), ab.Read(other)],
        [ab.Read(trunk), ab.Read(b, 4), ab.Read(b, 8, 11, 2)],
    ):
        step = problem.cache.step({a: 2, b: 1}, views={a: reads})
        problem.attend(step, {a: [reads] * 2}, "cpu", close(1e-5), ["cpu", "reference"])


def test_rows_that_are_read_see_nothing_behind_them() -> None:
    """A branch with several new tokens, which an earlier branch of the batch reads in front of what both share."""
    problem = grown(0, page_size=3)
    a, b = problem.branches[1:3]
    for reads in ([ab.Read(b, 9)], [ab.Read(b, b.length + 5), ab.Read(b, 9, b.length + 5)]):
        step = problem.cache.step({a: 1, b: 4}, views={a: reads})
        problem.attend(step, {a: [reads]}, "cpu", close(1e-5), ["cpu", "reference"])


def test_a_plan_of_views_is_never_advanced() -> None:
    """The next step of the same branches, without views, is planned anew."""
    problem = grown(1)
    kids = problem.branches[1:3]
    for views in ({kids[0]: [ab.Read(kids[1], 9)]}, {}, {kids[1]: [ab.Read(kids[0], 9, 10)]}, {}, {}):
        step = problem.cache.step({kid: 1 for kid in kids}, views=views)
        problem.attend(step, {kid: [v] for kid, v in views.items()}, "cpu", close(1e-5), ["cpu"])


class TestBadInput:
    def refused(self, error, match, views, cache=None, rows=1):
        problem = grown(0)
        a, b = problem.branches[1:3]
        before = problem.cache.usage()
        with pytest.raises(error, match=match):
            (cache or problem.cache).step({a: rows}, views=views(a, b))
        assert problem.cache.usage() == before
        problem.cache.check()

    def test_not_a_dict(self):
        self.refused(TypeError, "views: expected a dict", lambda a, b: [ab.Read(b)])

    def test_not_a_read(self):
        self.refused(TypeError, "expected a Read", lambda a, b: {a: [[(b, 1)]]})
        self.refused(TypeError, "list of Read", lambda a, b: {a: ab.Read(b)})

    def test_a_branch_without_rows(self):
        self.refused(ValueError, "has no rows in this step", lambda a, b: {b: [ab.Read(a)]})

    def test_lists_that_do_not_fit_the_rows(self):
        self.refused(ValueError, "2 lists for the 3 rows", lambda a, b: {a: [[ab.Read(b)], []]}, rows=3)

    def test_more_than_there_is(self):
        self.refused(ValueError, "tokens 0 to 99 of branch", lambda a, b: {a: [ab.Read(b, 0, 99)]})
        self.refused(ValueError, "tokens 99 to", lambda a, b: {a: [ab.Read(b, 99)]})

    def test_lengths_and_offsets_that_are_none(self):
        self.refused(ValueError, "whole numbers", lambda a, b: {a: [ab.Read(b, -1)]})
        self.refused(ValueError, "whole numbers", lambda a, b: {a: [ab.Read(b, 0, 1, 0.5)]})
        self.refused(ValueError, r"below 2\^31", lambda a, b: {a: [ab.Read(b, 0, 1, 2**40)]})

    def test_another_caches_branch(self):
        self.refused(ValueError, "belongs to another cache", lambda a, b: {a: [ab.Read(Views(0).branch(), 0)]})

    def test_a_dead_branch(self):
        problem = grown(0)
        a, b = problem.branches[1:3]
        problem.cache.release(b)
        with pytest.raises(ab.DeadBranch):
            problem.cache.step({a: 1}, views={a: [ab.Read(b)]})

    def test_an_offset_where_nobody_knows_the_rotation(self):
        cache = ab.TreeCache(1, 2, 16, num_pages=8)
        a, b = cache.branch(), cache.branch()
        cache.step({b: 2})
        with pytest.raises(ValueError, match="does not know how its keys were rotated"):
            cache.step({a: 1}, views={a: [ab.Read(b, 0, 2, 5)]})
        assert a.length == 0

    def test_a_step_is_stale_once_what_it_reads_has_moved_on(self):
        problem = grown(0)
        a, b = problem.branches[1:3]
        step = problem.cache.step({a: 1}, views={a: [ab.Read(b)]})
        problem.cache.truncate(b, 3)
        k = torch.zeros(1, 2, 16)
        with pytest.raises(ValueError, match="a branch that it reads"):
            problem.cache.write(0, k, k, step)

    def test_rotary(self):
        with pytest.raises(ValueError, match="do not fit in head_dim"):
            ab.TreeCache(1, 2, 16, num_pages=8, rotary=ab.Rotary(torch.ones(9)))
        with pytest.raises(ValueError, match="one a layer"):
            ab.TreeCache(2, 2, 16, num_pages=8, rotary=[None])
        with pytest.raises(ValueError, match="frequencies"):
            ab.Rotary(torch.ones(3, dtype=torch.int64))
