"""K and V that are put aside on the host come back bit for bit, behind whatever the branch still shares."""

from __future__ import annotations

import pytest
import torch

import anabranch as ab
from anabranch.errors import DeadBranch

SHAPE = dict(num_layers=2, num_kv_heads=2, head_dim=16, num_pages=24, page_size=4)
KINDS = {
    "float32": {},
    "bfloat16": {"dtype": torch.bfloat16},
    "int8": {"kv_format": "int8"},
    "fp8": {"kv_format": "fp8"},
    "V in K": {"v_in_k": True, "v_head_dim": 8, "num_kv_heads": 1},
    "two head_dims": {"v_head_dim": 8},
    "float64": {"dtype": torch.float64},
}


def make(kind: str) -> ab.TreeCache:
    return ab.TreeCache(**SHAPE | KINDS[kind])


def write(cache: ab.TreeCache, rows: dict, positions=None) -> None:
    step = cache.step(rows, positions)
    for layer in range(cache.num_layers):
        k = torch.randn(step.num_rows, cache.num_kv_heads, cache.head_dim).to(cache.dtype)
        v = torch.randn(step.num_rows, cache.num_kv_heads, cache.v_head_dim).to(cache.dtype)
        cache.write(layer, k, None if cache.v_in_k else v, step)


def contents(cache: ab.TreeCache, branch) -> list[torch.Tensor]:
    """Everything that is kept of it, as it is kept."""
    return cache.put_aside(branch, branch.length).planes


@pytest.mark.parametrize("kind", KINDS)
def test_what_comes_back_is_bit_for_bit_what_went(kind):
    torch.manual_seed(0)
    cache = make(kind)
    trunk = cache.branch()
    write(cache, {trunk: 6})
    fork, other = cache.fork(trunk, 2)
    write(cache, {fork: 7, other: 3}, {fork: torch.tensor([9, 8, 20, 21, 7, 7, 30])})
    before, positions, others = contents(cache, fork), cache.positions(fork), contents(cache, other)
    aside = cache.put_aside(fork, fork.length)
    assert aside.length == 13 and aside.num_bytes > 0 and torch.equal(aside.positions, positions)
    cache.release(fork)
    write(cache, {other: 30})  # somebody else uses the pages
    cache.truncate(other, 9)
    cache.truncate(trunk, 5)  # and some of what was shared has gone
    back = cache.fork(trunk, 1)[0]
    for begin, end in ((5, 9), (9, 13)):  # in two steps
        write(cache, {back: end - begin}, {back: aside.positions[begin:end]})
        cache.put_back(back, aside, begin)
    assert all(torch.equal(a, b) for a, b in zip(contents(cache, back), before, strict=True))
    assert torch.equal(cache.positions(back), positions)
    assert all(torch.equal(a[:9], b) for a, b in zip(contents(cache, other), others, strict=True))
    cache.check()


def test_what_was_cut_does_not_come_back():
    cache = make("float32")
    branch = cache.branch()
    write(cache, {branch: 8})
    aside = cache.put_aside(branch, 6)
    aside.cut(4)
    aside.cut(5)
    assert aside.length == 4
    again = cache.branch()
    write(cache, {again: 5})
    with pytest.raises(ValueError, match="tokens 0 … 5: expected some of the 4"):
        cache.put_back(again, aside, 0)


def test_bad_input():
    cache = make("float32")
    branch = cache.branch()
    write(cache, {branch: 4})
    for length in (-1, 5, 10**30):
        with pytest.raises(ValueError, match="put_aside: length: expected 0 … 4"):
            cache.put_aside(branch, length)
    with pytest.raises(ValueError, match="whole number"):
        cache.put_aside(branch, 1.5)
    aside = cache.put_aside(branch, 4)
    fork = cache.fork(branch, 1)[0]
    before = contents(cache, branch)
    with pytest.raises(ValueError, match="behind the 4 that the branch was forked with"):
        cache.put_back(fork, aside, 2)  # others would see it
    assert all(torch.equal(a, b) for a, b in zip(contents(cache, branch), before, strict=True))
    with pytest.raises(ValueError, match="another cache"):
        make("float32").put_back(branch, aside, 0)
    cache.release(branch)
    for call in (lambda: cache.put_aside(branch, 2), lambda: cache.put_back(branch, aside, 0)):
        with pytest.raises(DeadBranch):
            call()
