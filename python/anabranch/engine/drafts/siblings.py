"""Drafts out of siblings: threads of one answer write alike, so their tokens are each other's best guesses."""

from __future__ import annotations

from anabranch.engine.drafts.history import Place
from anabranch.engine.drafts.ngram import NGramDrafts
from anabranch.engine.thread_kv import EngineThread


class SiblingDrafts(NGramDrafts):
    """Guesses that a thread goes on as any thread of the same answer did behind something like its last tokens,
    finished or not."""

    def visible(self, thread: EngineThread, place: Place) -> int:
        return len(place.thread.own)
