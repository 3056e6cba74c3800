"""Where the threads of a request have written something like a thread's last tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from anabranch.engine.request import Request
    from anabranch.engine.thread_kv import EngineThread

KEPT = 16  # places remembered of a run, the newest
COMPARED = 16  # last tokens by which places are compared
FADING = 0.8  # what a token counts that is one further back
ANY = -1  # stands for whatever token is there

Key = tuple[int, ...]


class Place(NamedTuple):
    """Behind token `end` − 1 of a thread's own tokens."""

    thread: EngineThread
    end: int


class History:
    """Where the threads of a request, those that have left included, hold the same few tokens as at a given end.

    The same: the last two, or the two before the last, whatever that is (so a thread that goes along another's text
    with other numbers in it stays beside it), or the last one.
    """

    def __init__(self) -> None:
        self._places: dict[Key, list[Place]] = {}
        self._seen: dict[EngineThread, int] = {}

    def update(self, request: Request) -> None:
        """Take in what was written since."""
        for thread in request.threads:
            own = thread.own
            seen = min(self._seen.get(thread, 0), len(own))
            for end in range(seen + 1, len(own) + 1):
                for key in _keys(_tail(thread, end, 3)):
                    places = self._places.setdefault(key, [])
                    places.append(Place(thread, end))
                    if len(places) > KEPT:
                        del places[0]
            self._seen[thread] = len(own)

    def behind(self, thread: EngineThread) -> list[Place]:
        """Places that the thread's end is like, the most alike first, the newer first among equals."""
        tail = _tail(thread, len(thread.own), COMPARED)
        found: dict[Place, float] = {}
        for key in _keys(tail[-3:]):
            for place in reversed(self._places.get(key, ())):
                if place not in found and place.end < len(place.thread.own):
                    found[place] = _likeness(tail, _tail(place.thread, place.end, COMPARED))
        return sorted(found, key=lambda place: -found[place])


class Histories:
    """One `History` a request; gone once that is finished."""

    def __init__(self) -> None:
        self._of: dict[Request, History] = {}

    def of(self, request: Request) -> History:
        """The request's, up to date."""
        history = self._of.get(request)
        if history is None:
            self._of = {other: kept for other, kept in self._of.items() if not other.finished}
            history = self._of[request] = History()
        history.update(request)
        return history

    def clear(self) -> None:
        self._of.clear()


def _keys(tail: list[int]) -> list[Key]:
    """What is looked up of an end, given its last three tokens (fewer at the beginning)."""
    keys: list[Key] = [(tail[-1],)]
    if len(tail) > 1:
        keys.append((tail[-2], tail[-1]))
    if len(tail) > 2:
        keys.append((tail[-3], tail[-2], ANY))
    return keys


def _tail(thread: EngineThread, end: int, most: int) -> list[int]:
    """The last `most` tokens of the context up to own token `end`."""
    own = thread.own[max(0, end - most) : end]
    missing = min(most - len(own), len(thread.prefix))
    return [*thread.prefix[len(thread.prefix) - missing :], *own] if missing else own


def _likeness(one: list[int], other: list[int]) -> float:
    """How much two ends have in common, token beside token from the last on, which counts most."""
    weight, total = 1.0, 0.0
    for a, b in zip(reversed(one), reversed(other), strict=False):
        if a == b:
            total += weight
        weight *= FADING
    return total
