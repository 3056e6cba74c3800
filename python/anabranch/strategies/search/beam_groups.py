"""Diverse beam search: groups of beams that choose one after another, each away from what those before it chose."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from anabranch.strategies.api.thread import Thread
from anabranch.strategies.search.beams import Beam, no_room, rank, require, score
from anabranch.strategies.search.pool import Pool, answer_of

if TYPE_CHECKING:
    from anabranch.strategies.search.beam_search import BeamSearch


@dataclass
class Group:
    """One group: its running beams, best first, and its finished texts with their scores, best first."""

    running: list[Beam]
    done: list[Beam] = field(default_factory=list)
    over: bool = False


def search_in_groups(strategy: BeamSearch, trunk: Thread) -> Generator[Any, Any, list[Any]]:
    """Transformers' group beam search, whose rules for ending are those of its former beam search.

    A group is over when it has as many finished texts as beams and (unless early_stopping) the best candidate of this
    step, an ending one included, is no better than the worst of them. Texts still running at the end compete as they
    stand. One thing is left out: there, the padding of a group that is over counts as a token it chose.
    """
    size = strategy.width // strategy.num_beam_groups
    wanted = max(2, 1 + len(trunk.eos_ids)) * size
    pool = Pool(trunk, strategy.width)
    groups = [Group([Beam(0.0, pool.threads[g * size])]) for g in range(strategy.num_beam_groups)]
    limit: int | None = None
    length = 0
    while not all(group.over for group in groups) and length != limit:
        # The forward of all groups; what a group is asked again below is there already.
        first = yield [b.thread.candidates(1, sampling=strategy.overrides) for g in groups for b in g.running]
        limit = strategy.limit(first[0].left) if limit is None else limit
        if no_room(first, strategy.width):
            break
        length += 1
        taken: Counter[int] = Counter()
        moves: list[tuple[Group, list[Any], list[Any]]] = []
        for group in (g for g in groups if not g.over):
            bias = {token: -strategy.diversity_penalty * count for token, count in taken.items()}
            found = yield [
                b.thread.candidates(
                    wanted, sampling=strategy.overrides, bias=bias if strategy.diversity_penalty else None
                )
                for b in group.running
            ]
            ranked = rank(group.running, found, wanted)
            # A limit of length ends all of them together, later.
            ending = {
                i for i, c in enumerate(ranked) if c.token in trunk.eos_ids or (c.ends and found[c.beam].left > 1)
            }
            going = [c for i, c in enumerate(ranked) if i not in ending][:size]
            if going:  # what stands behind the last that goes on was never looked at
                ending = {i for i in ending if i < ranked.index(going[-1]) or len(going) < size}
            taken.update(c.token for c in going)
            best: list[Any] = [(b.score, b, None) for b in group.done]
            for c in (ranked[i] for i in sorted(ending) if i < size):
                best = sorted(
                    [*best, (score(c.score, length, strategy.length_penalty), group.running[c.beam], c)],
                    key=lambda x: -x[0],
                )
                best = best[:size]
            moves.append((group, going, best))
            worst = best[-1][0] if len(best) == size else None
            reach = limit if strategy.early_stopping == "never" and strategy.length_penalty > 0 else length
            group.over = not going or (
                worst is not None
                and (strategy.early_stopping is True or worst >= score(ranked[0].score, reach, strategy.length_penalty))
            )
        yield from _move(pool, groups, moves)
    for group in groups:
        if not group.over:
            group.done += [
                Beam(score(b.score, max(1, length), strategy.length_penalty), b.thread) for b in group.running
            ]
            group.done = sorted(group.done, key=lambda b: -b.score)[:size]
    best = sorted((b for group in groups for b in group.done), key=lambda b: -b.score)
    require(best)
    answers = [answer_of(b.thread) for b in best[: strategy.num_return_sequences]]
    yield from pool.settle(best[0].thread)
    return answers


def _move(pool: Pool, groups: list[Group], moves: list[Any]) -> Generator[Any, Any, None]:
    """Give every text that goes on, or has just ended, a thread, and every such thread its token."""
    moved = [group for group, _, _ in moves]
    kept = [b.thread for _, _, best in moves for _, b, c in best if c is None]
    kept += [b.thread for g in groups if g not in moved for b in g.done]
    sources, tokens = [], []
    for group, going, best in moves:
        new = [(b.thread, c.token) for _, b, c in best if c is not None]
        sources += [group.running[c.beam].thread for c in going] + [thread for thread, _ in new]
        tokens += [c.token for c in going] + [token for _, token in new]
    threads = yield from pool.copies(sources, kept)
    yield [thread.choose(token) for thread, token in zip(threads, tokens, strict=True)]
    at = iter(threads)
    for group, going, best in moves:
        group.running = [Beam(c.score, next(at)) for c in going]
        group.done = [b if c is None else Beam(total, next(at)) for total, b, c in best]
        if group.over:
            group.running = []
