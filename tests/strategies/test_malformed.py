"""Models that break each tag-driven format in every way there is: no crash, no hang, no page lost, all counted."""

from __future__ import annotations

import pytest
from formats_kit import FORMATS
from malformed_kit import assert_survives

import anabranch as ab
from anabranch.strategies import Strategy, Tagged

MANY = 10_000


def survived(name: str, runs: int, seed: int = 0, **options) -> None:
    form = FORMATS[name]
    told = assert_survives(
        form.strategy, form.habits, runs, seed=seed, limits=form.limits, prompt=form.prompt, **options
    )
    print(name, dict(told.most_common()))
    assert told["generations"] == runs
    assert told["forked"] > runs / 10 and told["malformed"] > runs / 10, told


@pytest.mark.parametrize("name", FORMATS)
def test_malformed_generations_are_survived(name):
    survived(name, 40)


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_ten_thousand_malformed_generations_are_survived(name):
    survived(name, MANY, seed=1, num_pages=160_000)  # one in 10,000 has blocks of a thousand in a block of a thousand


def test_every_tag_driven_system_is_there():
    """A new format is to be broken, too."""
    there = {type(form.strategy) for form in FORMATS.values()} | {Tagged}
    exported = [getattr(ab.strategies, name) for name in ab.strategies.__all__]
    strategies = [kind for kind in exported if isinstance(kind, type) and issubclass(kind, Strategy)]
    assert {kind for kind in strategies if ".tagged." in kind.__module__} | {ab.APR, ab.AsyncThink} <= there
