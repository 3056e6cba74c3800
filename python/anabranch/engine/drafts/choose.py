"""From the name, model or object that a `DraftTree` was given to what guesses, checked before anything runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from anabranch import hf
from anabranch.engine.drafts.base import Proposer
from anabranch.engine.drafts.model import ModelDrafts
from anabranch.engine.drafts.ngram import NGramDrafts
from anabranch.engine.drafts.siblings import SiblingDrafts
from anabranch.runner.ranks import sharded

if TYPE_CHECKING:
    from anabranch.engine.engine import Engine

NAMED = {"ngram": NGramDrafts, "siblings": SiblingDrafts}


def check_draft(draft: Any, engine: Engine) -> None:
    """ValueError for a draft model that cannot guess for the engine's: another vocabulary, device, or no decoder."""
    if isinstance(draft, str) or hasattr(draft, "propose"):
        return
    if sharded(draft):
        raise ValueError(
            "DraftTree: draft is shared out among processes, and rank 0 alone guesses; load it whole, on rank 0"
        )
    rows = int(draft.get_input_embeddings().weight.shape[0])
    if rows != engine.vocab_size:
        raise ValueError(
            f"DraftTree: draft has a vocabulary of {rows} tokens, the engine's model one of {engine.vocab_size}; "
            "pass a small model of the same family, with the same tokenizer"
        )
    device = torch.device(draft.device)
    if device.type != engine.cache.device.type or (device.index or 0) != (engine.cache.device.index or 0):
        raise ValueError(
            f"DraftTree: draft is on {device}, the engine's model on {engine.cache.device}; "
            f"move it there (draft.to({str(engine.cache.device)!r}))"
        )
    try:
        hf.enable(draft)
    except (TypeError, ValueError) as error:
        raise type(error)(f"DraftTree: draft cannot run over a tree: {error}") from error


def proposer_for(draft: Any, engine: Engine) -> Proposer:
    """What guesses, for a draft that `check_draft` let pass."""
    if isinstance(draft, str):
        return NAMED[draft]()
    if hasattr(draft, "propose"):
        proposer: Proposer = draft
        return proposer
    return ModelDrafts(draft, engine.cache.num_pages, engine.cache.page_size, engine.max_rows)
