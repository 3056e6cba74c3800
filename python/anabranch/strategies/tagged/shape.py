"""Whether an answer's control tags stand in their order."""

from __future__ import annotations

import re
from collections.abc import Mapping

from anabranch.strategies.api.thread import Thread


def check_shape(trunk: Thread, ids: Mapping[str, int], shape: str) -> None:
    """Count the answer as malformed unless its control tags, all in a row, match the regular expression `shape`.

    ids: the token id of each tag. A prompt may explain the format, or begin a block that the answer goes on with: so
    either the answer's tags match, or those of the whole context.
    """
    tag_of = {token: tag for tag, token in ids.items()}
    answer, everything = ([tag_of[t] for t in tokens if t in tag_of] for tokens in (trunk.token_ids, trunk.context))
    if not any(re.fullmatch(shape, "".join(tags)) for tags in (answer, everything)):
        told = " ".join(answer[:12]) + (f" … ({len(answer)})" if len(answer) > 12 else "")
        trunk.malformed(f"its tags are {told}")
