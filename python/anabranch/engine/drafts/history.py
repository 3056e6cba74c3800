"""Where runs of tokens stand in what the threads of a request have written."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from anabranch.engine.request import Request
    from anabranch.engine.thread_kv import EngineThread

LONGEST = 3  # tokens of the runs that are looked up
KEPT = 16  # places remembered of a run, the newest
COMPARED = 32  # tokens by which places are compared, at most


class Place(NamedTuple):
    """Behind token `end` − 1 of a thread's own tokens."""

    thread: EngineThread
    end: int


class History:
    """The runs of one to `LONGEST` tokens in a request's threads, those that have left included."""

    def __init__(self) -> None:
        self._places: dict[tuple[int, ...], list[Place]] = {}
        self._seen: dict[EngineThread, int] = {}

    def update(self, request: Request) -> None:
        """Take in what was written since."""
        for thread in request.threads:
            own = thread.own
            seen = min(self._seen.get(thread, 0), len(own))
            if seen == len(own):
                continue
            head = thread.prefix[-LONGEST + 1 :]
            first = max(0, seen - LONGEST + 1)
            window = [*head, *own[first:]] if first == 0 else own[first:]
            offset = first - len(head) if first == 0 else first
            for end in range(seen + 1, len(own) + 1):
                place = Place(thread, end)
                for n in range(1, LONGEST + 1):
                    start = end - n - offset
                    if start < 0:
                        break
                    places = self._places.setdefault(tuple(window[start : end - offset]), [])
                    places.append(place)
                    if len(places) > KEPT:
                        del places[0]
            self._seen[thread] = len(own)

    def behind(self, thread: EngineThread) -> Iterator[tuple[Place, int]]:
        """Places where the thread's last tokens stand, those with more of them first, the newer first among equals;
        with how many tokens are the same there (`COMPARED` at most)."""
        tail = _tail(thread, len(thread.own))
        found: dict[Place, int] = {}
        for n in range(min(LONGEST, len(tail)), 0, -1):
            for place in reversed(self._places.get(tuple(tail[-n:]), ())):
                if place not in found and place.end < len(place.thread.own):
                    same = _same(tail, _tail(place.thread, place.end))
                    if same >= n:  # what stood there may have been cut off meanwhile
                        found[place] = same
            if found:
                break
        return iter(sorted(found.items(), key=lambda item: -item[1]))


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


def _tail(thread: EngineThread, end: int) -> list[int]:
    """The context up to own token `end`, its last `COMPARED` tokens."""
    own = thread.own[max(0, end - COMPARED) : end]
    missing = COMPARED - len(own)
    return [*thread.prefix[len(thread.prefix) - missing :], *own] if missing < len(thread.prefix) else [
        *thread.prefix, *own
    ]  # fmt: skip


def _same(one: list[int], other: list[int]) -> int:
    """Tokens that two runs end with alike."""
    count = 0
    for a, b in zip(reversed(one), reversed(other), strict=False):
        if a != b:
            break
        count += 1
    return count
