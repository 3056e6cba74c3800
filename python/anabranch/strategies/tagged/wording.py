"""A format's words in a model's tokens: what its texts are spelled with, what an answer in it says."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from anabranch.strategies.api.thread import Thread
from anabranch.strategies.tagged.pieces import Pieces
from anabranch.strategies.tagged.shape import brief_list, check_shape

if TYPE_CHECKING:
    from anabranch.strategies.tagged.tagged import Tagged


class Wording:
    """One format as one model's tokens; ValueError, with the remedy, where a tag is not one token."""

    def __init__(self, form: Tagged, trunk: Thread):
        self.form = form
        self.coder: Any = trunk if form.pieces is None else Pieces(dict(form.pieces))
        self.ids: dict[str, int] = self.coder.tag_ids(form.tags)
        self.opening = self.ids[form.opening]
        # Behind a thread's own text; pieces read the same everywhere.
        self.unclosed = form.unclosed if form.pieces is None else self.coder.encode(form.unclosed)

    def behind(self, tag: str, text: str) -> list[int]:
        """Ids of `text` as it reads right behind a tag: some tokenizers begin a text otherwise than they go on."""
        ids: list[int] = self.coder.encode(text, (self.ids[tag],))
        return ids

    def outlines(self, thread: Thread, since: int) -> list[str] | None:
        """The ids that a block is to have; None, and told, where what the model wrote fits no block."""
        form, context = self.form, thread.context
        first = since if form.own_opening else 0
        at = next((i for i in range(len(context) - 1, first - 1, -1) if context[i] == self.opening), None)
        names = [] if at is None else re.findall(form.outline, self.coder.text_of(context[at:]))
        names = [n if isinstance(n, str) else n[0] for n in names]  # of several groups the first is the id
        then = "kept as plain text" if form.misfit == "text" else "ended there"
        if not names:
            thread.malformed(f"{form.trigger} without any outline id; {then}")
            return None
        if form.max_outlines is not None and len(names) > form.max_outlines:
            thread.malformed(f"{len(names)} outlines, more than {form.max_outlines}; {then}")
            return None
        if len(set(names)) < len(names):
            thread.malformed(
                f"duplicate outline ids in {brief_list(names)}; {'dropped' if form.repeats == 'drop' else 'kept'}"
            )
        return list(dict.fromkeys(names)) if form.repeats == "drop" else names

    def check_shape(self, trunk: Thread) -> None:
        """Tell of an answer whose tags are not those of a well-formed one."""
        check_shape(trunk, self.ids, self.form.shape, self.form.nested)


def brief(text: str, most: int = 20) -> str:
    """What a model wrote, for a message."""
    return text if len(text) <= most else f"{text[:most]}…"
