"""`PrefixCache` by itself, on a `TreeCache` without a model: which tokens stay, and which pages they hold."""

from __future__ import annotations

import pytest
import torch

import anabranch as ab
from anabranch.kv.prefix import PrefixCache

SIZE = 4  # tokens of a page


@pytest.fixture
def cache():
    return ab.TreeCache(1, 1, 16, 8, SIZE)


@pytest.fixture
def prefixes(cache):
    return PrefixCache(cache)


def written(cache, tokens):
    """A branch whose key of a token is that token."""
    branch = cache.branch()
    step = cache.step({branch: len(tokens)})
    rows = torch.tensor(tokens, dtype=torch.float32)[:, None, None].expand(-1, 1, 16).contiguous()
    cache.write(0, rows, rows, step)
    return branch


def found(cache, prefixes, tokens):
    """The tokens that whoever begins with `tokens` is given, read from the cache."""
    branch = prefixes.fork(tokens, len(tokens))
    if branch is None:
        return []
    read = cache.read(branch, 0)[0][:, 0, 0].tolist()
    cache.release(branch)
    return read


@pytest.mark.parametrize(("length", "kept"), [(7, 4), (8, 8), (9, 0)])
def test_a_limit_is_the_longest_context_that_is_kept(cache, prefixes, length, kept):
    """One of exactly so many tokens is kept and found; a longer one leaves nothing, not even its beginning."""
    prefixes.limit = 8
    tokens = list(range(20, 20 + length))
    prefixes.keep(written(cache, tokens), tokens)
    assert found(cache, prefixes, tokens[:8]) == tokens[:kept]
    assert cache.usage().pages_kept == -(-length // SIZE) * (length <= 8)
    cache.check()


@pytest.mark.parametrize("length", [3, 4, 5, 8])
def test_what_a_branch_holds_behind_its_tokens_is_given_back(cache, prefixes, length):
    """A branch may be kept for its beginning alone: only the pages of that stay, whether or not others begin alike."""
    tokens = list(range(20, 35))
    prefixes.keep(written(cache, tokens), tokens[:length])
    pages = -(-length // SIZE)
    assert cache.usage().pages_kept == pages
    fork = cache.step({cache.branch(): (cache.num_pages - pages) * SIZE})  # all others, with nothing given up for them
    assert fork.num_rows == (cache.num_pages - pages) * SIZE and cache.usage().pages_kept == pages
    assert found(cache, prefixes, tokens) == tokens[: length if length < SIZE else length - length % SIZE]
    cache.check()


@pytest.mark.parametrize("length", [9, 11, 12])
@pytest.mark.parametrize("missing", [0, 1, 2, 3])
def test_a_shortage_takes_as_many_pages_as_are_missing(cache, prefixes, length, missing):
    """From the end of what is kept, where a page that is filled in part counts as one; the rest is still found."""
    tokens = list(range(20, 20 + length))
    prefixes.keep(written(cache, tokens), tokens)
    free = cache.usage().pages_free - cache.usage().pages_kept
    assert prefixes.reclaim(free + missing)
    assert cache.usage().pages_kept == 3 - missing
    assert found(cache, prefixes, tokens) == tokens[: min(length // SIZE, 3 - missing) * SIZE]
    cache.check()


def test_work_on_the_heap_grows_with_what_is_kept_alone(monkeypatch):
    """Contexts that are kept, and found again, one after another: each entry of the heap is looked at a few times."""
    looked = 0
    real = PrefixCache._stale

    def counted(entry):
        nonlocal looked
        looked += 1
        return real(entry)

    monkeypatch.setattr(PrefixCache, "_stale", staticmethod(counted))
    cache = ab.TreeCache(1, 1, 16, 4000, SIZE)
    prefixes = PrefixCache(cache)
    count = 3000
    for i in range(count):
        tokens = [i, 1, 2]
        branch = cache.branch()
        cache.step({branch: 3})
        prefixes.keep(branch, tokens)
        cache.release(prefixes.fork(tokens, 3))
    assert cache.usage().pages_kept == count
    assert looked < 10 * count
