"""How a Hogwild! answer ends: the trunk takes what was written, and asks for the answer if none was found."""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from anabranch.strategies.live.room import Room


def gather(room: Room) -> Generator[Any, Any, None]:
    """The trunk takes the history, then what is unfinished."""
    texts, encode = room.texts, room.trunk.encode
    current = [w.thread for w in room.workers if all(w.thread is not step for step, _ in room.history)]
    blocks = [*room.history, *((thread, encode(room.mark)) for thread in current)]
    headers: list[list[int]] = []
    before: list[int] = []
    for i, (thread, end) in enumerate(blocks):
        if i == len(room.history) and texts.in_progress:
            before = [*before, *encode(texts.in_progress)]
        opening = room.first.get(thread, [])  # of a later step it is not a prompt, but the thread's own
        headers.append([*before, *opening])
        before = end
    kids = [thread for thread, _ in blocks]
    yield room.trunk.join(kids, "reprefill", headers=[header or None for header in headers])


def finish(room: Room) -> Generator[Any, Any, str | None]:
    """Ask for the answer, greedily, behind all that was written."""
    question = room.mark.strip() + room.texts.finisher
    ids, limit = room.trunk.encode(question, room.trunk.context), room.how.finisher_tokens
    asks = room.trunk
    if room.common is not room.trunk:
        asks = room.trunk.spawn([*room.common.context, *room.trunk.token_ids, *ids])
    room.trunk.insert(ids)
    end = yield asks.decode(limit, sampling={"do_sample": False})
    if asks is not room.trunk:
        yield asks.rstrip()
        yield room.trunk.join(asks, "reprefill")
    return room.how.found(question + (end.text or ""))
