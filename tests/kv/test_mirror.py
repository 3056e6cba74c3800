"""A tree redone from its calls: the same slots, copies and contexts as the cache that was recorded."""

from __future__ import annotations

import pickle
import random

import pytest
import torch

import anabranch as ab
from anabranch.kv.mirror import RecordedCache, Replay, check_of

SHAPE = dict(num_layers=1, num_kv_heads=1, head_dim=8, page_size=4)


def contexts(step):
    found = step.plan.contexts()
    return [None if x is None else torch.as_tensor(x).tolist() for x in vars(found).values()] if vars(found) else found


def change(cache: RecordedCache, branches: list, rng: random.Random):
    """One call, as they come; the step it made, if any."""
    kind = rng.choice(
        ["branch", "fork", "fork", "step", "step", "step", "join", "share", "truncate", "release", "keep"]
    )
    alive = [b for b in branches if b.alive]
    if kind == "branch" or not alive:
        branches.append(cache.branch())
        return None
    one = rng.choice(alive)
    if kind == "fork":
        branches.extend(cache.fork(one, rng.randint(1, 3)))
    elif kind == "step":
        rows = {b: rng.randint(1, 6) for b in rng.sample(alive, min(len(alive), 3))}
        places = {b: torch.arange(n) + b.position + 2 for b, n in rows.items()} if rng.random() < 0.3 else None
        views = {one: [ab.Read(b, 0, b.length) for b in alive if b is not one and b.length][:2]}
        return cache.step(rows, places, views if one in rows and rng.random() < 0.4 else None)
    elif kind == "join":
        cache.join(one, [rng.choice(alive)], rng.choice(["concat", "discard"]))
    elif kind == "share":
        cache.share(one, rng.choice(alive), rng.choice([None, 1]))
    elif kind == "truncate":
        cache.truncate(one, rng.randint(0, one.length))
    elif kind == "release":
        cache.release(one)
    elif rng.random() < 0.2:
        cache.keep(one)
    return None


@pytest.mark.parametrize("seed", range(12))
def test_any_calls_done_again_give_the_same_tree(seed: int) -> None:
    """Those that raised (no pages, strangers, dead branches) changed nothing, and are not told."""
    rng = random.Random(seed)
    cache, other = RecordedCache(num_pages=40, **SHAPE), ab.TreeCache(num_pages=40, **SHAPE)
    replay, branches, raised, steps = Replay(other), [], 0, 0
    for _ in range(200):
        step = None
        try:
            step = change(cache, branches, rng)
        except (ValueError, RuntimeError):
            raised += 1
            for kept in [b for b in branches if b.alive][:2]:
                cache.release(kept)
        again = replay.do(pickle.loads(pickle.dumps(cache.take())))
        assert (step is None) == (again is None)
        if step is not None:
            steps += 1
            assert check_of(step) == check_of(again)
            assert torch.equal(step.slots, again.slots) and torch.equal(step.position_ids, again.position_ids)
            assert contexts(step) == contexts(again)
        assert cache.usage() == other.usage()
    cache.check()
    other.check()
    assert raised > 3 and steps > 20


def test_another_size_shows() -> None:
    """Caches that hand out other slots have other checks; so a forward is refused instead of mixed up."""
    cache, other = RecordedCache(num_pages=40, **SHAPE), ab.TreeCache(num_pages=40, **SHAPE)
    other.step({other.branch(): 5})  # something that the first never did
    trunk = cache.branch()
    step = cache.step({trunk: 3})
    assert check_of(step) != check_of(Replay(other).do(cache.take()))
    assert cache.take() == []


def test_what_is_put_aside_is_so_in_each_process_and_comes_back():
    """K and V are another process's own: it puts aside, puts back and drops what is there."""
    leader, follower = RecordedCache(**SHAPE, num_pages=16), ab.TreeCache(**SHAPE, num_pages=16)
    replay, rng = Replay(follower), torch.Generator().manual_seed(0)

    def write(rows):
        for step in (leader.step(rows), replay.do(leader.take())):
            k, v = torch.randn(2, step.num_rows, 1, 8, generator=rng)
            step.cache.write(0, k, v, step)

    trunk = leader.branch()
    write({trunk: 6})
    (fork,) = leader.fork(trunk)
    write({fork: 5})
    replay.do(leader.take())
    theirs = replay._branches[fork.serial]
    before = follower.read(theirs, 0)
    aside = leader.put_aside(fork, 11)
    leader.release(fork)
    write({trunk: 20})
    leader.truncate(trunk, 6)
    (back,) = leader.fork(trunk)
    write({back: 5})
    leader.put_back(back, aside, 6)
    replay.do(leader.take())
    assert all(map(torch.equal, follower.read(replay._branches[back.serial], 0), before))
    assert replay._asides
    del aside
    replay.do(leader.take())
    assert not replay._asides
