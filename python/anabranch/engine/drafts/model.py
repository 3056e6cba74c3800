"""A small model that guesses: it writes on from each thread's tokens, over a tree cache of its own."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch

from anabranch.engine.drafts.base import Ask
from anabranch.engine.thread_kv import EngineThread
from anabranch.errors import OutOfPages
from anabranch.hf.probe import own_precision
from anabranch.kv.cache import TreeCache
from anabranch.kv.step import Branch
from anabranch.runner.eager import forward
from anabranch.runner.linear import linear_context
from anabranch.runner.modes import evaluating

MOST_TOKENS = 2**16  # that its cache holds


class ModelDrafts:
    """A path of what the model finds likeliest; where it could take another first token, paths of that token alone.

    A decode that samples is guessed at with the very draws that its next tokens will be chosen by: where the two
    models' distributions are alike, so are the tokens. The model reads a thread's context as a flat row. In its cache
    threads share what they begin with; a thread for which there are no pages left is not guessed at.
    """

    def __init__(self, model: Any, num_pages: int, page_size: int, max_rows: int):
        self._model, self._max_rows = model, max_rows
        self.cache = TreeCache.for_model(model, min(num_pages, -(-MOST_TOKENS // page_size)), page_size)
        self._linear = linear_context(model)
        self._held: dict[EngineThread, tuple[Branch, list[int]]] = {}  # a thread's branch, and the tokens in it

    def propose(self, asks: Sequence[Ask]) -> list[list[list[int]]]:
        self._forget()
        paths: dict[int, list[list[int]]] = {}
        with ExitStack() as stack:
            for block in (evaluating(self._model), torch.inference_mode(), own_precision(self.cache.device)):
                stack.enter_context(block)
            stack.enter_context(self._linear)
            writing = {i: _Writing(ask) for i, ask in enumerate(asks)}
            while writing:
                writing, scores = self._read(asks, writing)
                if scores is None:
                    break
                for i, tokens in zip(writing, self._choose(asks, writing, scores), strict=True):
                    state = writing[i]
                    if not state.path and asks[i].width > 1:
                        state.others = [t for t in tokens[1:] if t != tokens[0]]
                    state.path.append(tokens[0])
                    paths[i] = [state.path, *([other] for other in state.others[: asks[i].width - 1])]
                writing = {i: state for i, state in writing.items() if len(state.path) < asks[i].length}
        return [paths.get(i, []) for i in range(len(asks))]

    # ---------------------------------------------------------------------------------------- its cache

    def _forget(self) -> None:
        """Release what belongs to threads that have left."""
        for thread in [t for t in self._held if not t.alive or t.request.finished]:
            self._release(thread)

    def _release(self, thread: EngineThread) -> None:
        branch, _ = self._held.pop(thread)
        self.cache.release(branch)

    def _branch(self, thread: EngineThread, tokens: list[int]) -> tuple[Branch, list[int]]:
        """The thread's branch, cut to what still holds and is needed; a new one begins with its nearest relation's."""
        if thread not in self._held:
            relation = thread.parent
            while relation is not None and relation not in self._held:
                relation = relation.parent
            if relation is None:
                self._held[thread] = self.cache.branch(), []
            else:
                branch, known = self._held[relation]
                self._held[thread] = self.cache.fork(branch)[0], list(known)
        branch, known = self._held[thread]
        same = min(len(known), len(tokens) - 1)  # the last one's scores have to be computed
        if known[:same] != tokens[:same]:
            same = next(i for i in range(same) if known[i] != tokens[i])
        if same < len(known):
            self.cache.truncate(branch, same)
            del known[same:]
        return branch, known

    def _read(
        self, asks: Sequence[Ask], writing: dict[int, _Writing]
    ) -> tuple[dict[int, _Writing], torch.Tensor | None]:
        """Bring contexts and guesses so far into the cache; who of `writing` could be served, with the next token's
        scores of each, [rows, vocabulary], float32."""
        found: dict[int, torch.Tensor] = {}
        waiting = dict(writing)
        while waiting:
            rows: dict[Branch, int] = {}
            ids: list[int] = []
            parts: list[tuple[int, list[int], list[int]]] = []
            for i, state in waiting.items():
                room = self._max_rows - len(ids)
                if room <= 0:
                    break
                tokens = [*state.context, *state.path]
                branch, known = self._branch(asks[i].thread, tokens)
                new = tokens[len(known) : len(known) + room]
                rows[branch] = len(new)
                ids += new
                parts.append((i, known, new))
            try:
                step = self.cache.step(rows)
            except OutOfPages:
                i = parts[-1][0]
                self._release(asks[i].thread)
                del waiting[i]
                continue
            scores = forward(self._model, torch.tensor(ids, device=self.cache.device), step, keep=step.last_rows)
            for at, (i, known, new) in enumerate(parts):
                known += new
                if len(known) == len(waiting[i].context) + len(waiting[i].path):
                    found[i] = scores[at].float()
                    del waiting[i]
        served = {i: state for i, state in writing.items() if i in found}
        return served, torch.stack([found[i] for i in served]) if served else None

    # ---------------------------------------------------------------------------------------- its tokens

    def _choose(self, asks: Sequence[Ask], writing: dict[int, _Writing], scores: torch.Tensor) -> list[list[int]]:
        """For each of `writing` its next token, and others that are likely."""
        most = max(asks[i].width for i in writing)
        likely: list[list[int]] = scores.topk(min(most, scores.shape[-1])).indices.tolist()
        for at, (i, state) in enumerate(writing.items()):
            sampler = asks[i].thread.running.sampler
            if sampler.greedy or sampler.extra:  # a caller's processors see what is sampled, not what is guessed
                continue
            whole = [*state.context, *state.path]
            begun = [asks[i].thread.counted_from]
            likely[at][:0] = sampler.choose(scores[at : at + 1], [whole.copy], [len(whole)], begun, [state.stream])
        return likely

    def close(self) -> None:
        for thread in list(self._held):
            self._release(thread)


class _Writing:
    """A guess being written."""

    def __init__(self, ask: Ask):
        self.context = ask.context
        self.path: list[int] = []
        self.others: list[int] = []
        self.stream: np.random.Generator = copy.deepcopy(ask.thread.stream)  # the thread's own stays where it is
