"""Which guesses are worth their rows: how often an answer's guesses came true so far, against what a row costs."""

from __future__ import annotations

from dataclasses import dataclass

from anabranch.engine.drafts.tree import Ahead

MEMORY = 64  # guesses that a chance is judged by; older ones count ever less
EXPLORED = 16  # of so many drafts that are left out, one is made all the same: what is written changes
FIRST, BESIDE = 0.6, 0.12  # chances of a guess that nothing is known of: on the first path, on another
#: What a row more costs on a CPU, as a part of a step of one row: from 1 to 64 rows 1/30 and 1/32 of SmolLM2's compiled
#: step in bfloat16 and float32 (benchmarks/results/epyc-zen5-2-cores.json).
CPU_ROW_COST = 1 / 32


def least_chance(row_cost: float | None, device: str, rows: int) -> float:
    """The chance of coming true that a guess needs in a step of so many rows of its own; row_cost: as of `DraftTree`.

    With a step of R rows as long as 1 + c·R, g guesses a row of which each comes true with chance p make an answer take
    (1 + c·R·(1 + g)) / (1 + p·g) of the time: less than without them where p > c·R / (1 + c·R).
    """
    if row_cost is None:
        row_cost = CPU_ROW_COST if device == "cpu" else 0.0
    return row_cost * rows / (1 + row_cost * rows)


@dataclass
class Chance:
    """How often something came true."""

    hits: float
    tries: float

    @property
    def value(self) -> float:
        return self.hits / self.tries

    def told(self, hit: bool) -> None:
        if self.tries >= MEMORY:
            self.hits, self.tries = self.hits / 2, self.tries / 2
        self.hits, self.tries = self.hits + hit, self.tries + 1


class Odds:
    """Of one answer: of its first paths' tokens by depth, of its other paths by rank."""

    def __init__(self) -> None:
        self._first: list[Chance] = []  # of a token whose predecessors came true
        self._beside: list[Chance] = []  # of a path's first token
        self._behind = Chance(1.5, 2.5)  # of a further token of such a path
        self._left_out = 0

    def lengths(self, length: int, width: int, least: float) -> tuple[int, ...]:
        """Tokens of each path of a draft: of at most `width` paths of at most `length`, what comes true with a chance
        of at least `least` per row; empty where nothing is worth a row."""
        if least <= 0:
            return (length,) * width
        first, chance = 0, 1.0
        while first < length and (chance := chance * self._at(self._first, first, FIRST).value) >= least:
            first += 1
        beside: list[int] = []
        while len(beside) + 1 < width:
            begins, goes_on = self._at(self._beside, len(beside), BESIDE).value, self._behind.value
            # (The row of the thread's last token is computed again for a path beside the first.)
            worth = [begins * sum(goes_on**i for i in range(n)) / (n + 1) for n in range(1, length + 1)]
            best = max(range(length), key=worth.__getitem__)
            if worth[best] < least:
                break
            beside.append(best + 1)
        if not first and not beside:
            self._left_out += 1
            if self._left_out % EXPLORED:
                return ()
        return (max(first, 1), *beside)

    def told(self, ahead: Ahead, failed: bool) -> None:
        """A draft was verified; failed: the token behind its last one that came true was another than guessed."""
        paths, last = ahead.draft.paths, ahead.node
        left = failed or not last.main  # the first path, by then
        for depth in range(min(ahead.first + left, len(paths[0][0]))):
            self._at(self._first, depth, FIRST).told(depth < ahead.first)
        for rank, (_, added) in enumerate(paths[1:]):
            hit = last.path == rank + 1
            self._at(self._beside, rank, BESIDE).told(hit)
            if hit:
                further = last.depth - added[0].depth
                for n in range(min(further + failed, len(added) - 1)):
                    self._behind.told(n < further)

    @staticmethod
    def _at(chances: list[Chance], index: int, prior: float) -> Chance:
        while len(chances) <= index:
            chances.append(Chance(2 * prior, 2))
        return chances[index]
