"""The same seed gives the same tree alone, in a batch of 16 and after pre-emptions, for every strategy there is."""

from __future__ import annotations

import pytest
from engine_kit import assert_nothing_held
from formats_kit import FORMATS
from malformed_kit import Habits, Malformed, tiny_engine

import anabranch as ab
from anabranch.strategies import Sequential, registry


def by_length(text: str) -> float:
    return float(len(text))


# Small numbers, so that tiny answers get to the interesting part; whatever is not here runs with its defaults.
SMALL = {
    "aspects": dict(headers=("\nA", "\nB"), conclusion="\nC", intro_tokens=5, aspect_tokens=8),
    "best-of-n": dict(n=3, scorer=by_length, max_new_tokens=12),
    "beam-search": dict(width=3, max_new_tokens=10),
    "deepconf": dict(n=4, warmup=2, window=4, vote="number"),
    "draft-tree": dict(strategy=ab.SelfConsistency(3), draft="siblings"),
    "entropy-fork": dict(threshold=0.1, n=2, max_forks=2),
    "group-think": dict(workers=2, tokens=12, room=40),
    "hogwild": dict(tokens=12, check_every=6),
    "leap": dict(paths=2, turns=2, turn_tokens=8, summary_tokens=5, request="<summarize>", comment="{peers}", final="=",
                 vote="number"),
    "pacore": dict(rounds=(2,), request="{question}:{references}"),
    "parallel-probe": dict(n=3, every=6, probe="=", probe_tokens=3, warmup=1, stable=2),
    "prune-refork": dict(n=4, every=6, swap=1),
    "self-consistency": dict(n=3),
    "sequential": dict(strategy=ab.SelfConsistency(3)),
    "skeleton-of-thought": dict(skeleton_request="{question}1.", point_request="{question}{number}{point}"),
    "slim-sc": dict(n=3, boundary="b", vote="number"),
    "step": dict(n=3, scorer=lambda hidden: hidden[0], step_tokens=5, stop="b"),
    "step-beam-search": dict(width=2, samples=2, step_tokens=5, stop="b"),
    "tree-of-thoughts": dict(depth=2, propose=2, keep=1, thought_tokens=6, question="?"),
}  # fmt: skip
LETTERS = Habits((), [], [], {}, words="12. \nab")


def _case(name: str):
    """A strategy by its name, what its model says, and a prompt for each number."""
    kind = registry.find(name)
    form = next((form for form in FORMATS.values() if type(form.strategy) is kind), None)
    if form is not None:
        good = Habits(**{**vars(form.habits), "scripts": form.habits.scripts[: form.good], "rare": ()})
        return form.strategy, good, form.prompt
    return registry.build(name, SMALL.get(name)), LETTERS, "{:04d}q"


@pytest.mark.parametrize("name", registry.names())
def test_the_same_seed_gives_the_same_tree(name):
    strategy, habits, prompt = _case(name)
    prompts, seeds = [prompt.format(i) for i in range(16)], list(range(16))
    options = {
        "strategy": strategy,
        "logits_processor": [Malformed(habits, scripted=1, usual=1, ends=0.01, choices=2)],
        "max_new_tokens": 24,
        "do_sample": True,
    }

    def generate(engine, prompts, seeds):
        found = engine.generate(prompts, seed=seeds, **options)
        assert_nothing_held(engine)
        return found

    together = generate(tiny_engine(habits.tokens, prefix_cache=False), prompts, seeds)
    alone = [generate(tiny_engine(habits.tokens, prefix_cache=False), [prompts[i]], [i])[0] for i in range(0, 16, 8)]
    for one, other in zip(together[::8], alone, strict=True):
        assert (one.tree, one.malformed) == (other.tree, other.malformed)
    pages, scarce = max(result.metrics.pages_peak for result in alone), []
    while not sum(result.metrics.preemptions for result in scarce):
        assert pages < 3000, "never pre-empted"
        try:
            scarce = generate(tiny_engine(habits.tokens, num_pages=pages, prefix_cache=False), prompts, seeds)
        except ValueError as error:  # one that was not run alone takes more
            assert "num_pages" in str(error)
        pages += 1 + pages // 4  # where there is room for one at a time nobody has to leave
    for one, other in zip(together, scarce, strict=True):
        assert (one.tree, one.malformed) == (other.tree, other.malformed)
    forks = not isinstance(strategy, (ab.strategies.Plain, Sequential)) and name != "beam-search"
    assert not forks or any(len(list(result.tree.walk())) > 1 for result in together)
