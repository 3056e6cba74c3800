"""Whether an answer's control tags stand in their order."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from anabranch.strategies.api.thread import Thread


def check_shape(trunk: Thread, ids: Mapping[str, int], shape: str, nested: bool = False) -> None:
    """Count the answer as malformed unless its control tags, all in a row, match the regular expression `shape`.

    ids: the token id of each tag. nested: blocks in threads of blocks are well-formed too. A prompt may explain the
    format, or begin a block that the answer goes on with: so either the answer's tags match, or those of the whole
    context.
    """
    tag_of = {token: tag for tag, token in ids.items()}
    answer, everything = ([tag_of[t] for t in tokens if t in tag_of] for tokens in (trunk.token_ids, trunk.context))
    if not any(_fits("".join(tags), shape, nested) for tags in (answer, everything)):
        trunk.malformed(f"its tags are {brief_list(answer)}")


def _fits(tags: str, shape: str, nested: bool) -> bool:
    """Whether tags in a row are a well-formed answer's."""
    whole = None
    while nested and whole != tags:
        whole, tags = tags, re.sub(shape, "", tags)
    return re.fullmatch(shape, tags) is not None


def brief_list(items: Sequence[str], most: int = 12) -> str:
    """What a model wrote, for a message."""
    return " ".join(items[:most]) + (f" … ({len(items)})" if len(items) > most else "")
