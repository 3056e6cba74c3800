"""An engine over several processes: rank 0 decides and samples, all others compute along.

Rank 0 alone runs strategies, scheduling and sampling, and so nothing in them has to come out alike elsewhere: neither
times of arrival, deadlines and Python threads, nor the last bits of scores. The others are told what happened to the
tree (`anabranch.kv.mirror`), which gives them the same slots and plans, and run the same forward over their own heads.
Their scores are not used. A number for the slots of each step goes along; where it differs, everything stops.
"""

from __future__ import annotations

import atexit
import os
import pickle
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor

from anabranch.errors import RankLost
from anabranch.hf.probe import described, own_precision, text_config
from anabranch.kv.cache import TreeCache, free_pages
from anabranch.kv.mirror import RecordedCache, Replay, check_of
from anabranch.kv.model import shape_for
from anabranch.kv.step import Step
from anabranch.records.events import Event, Finish
from anabranch.runner.compiled import CompiledForward
from anabranch.runner.modes import evaluating
from anabranch.runner.ranks import RankGroup

__all__ = ["Ranks"]


def _check_heads(model: Any) -> None:
    """ValueError for a model whose heads cannot be shared out evenly; before a forward of it fails."""
    size = torch.distributed.get_world_size()
    config = text_config(model)
    for name in ("num_key_value_heads", "num_attention_heads"):
        heads = getattr(config, name, None)
        if isinstance(heads, int) and heads % size:
            raise ValueError(
                f"model: its {heads} {'KV' if 'key' in name else 'query'} heads cannot be shared out evenly among "
                f"{size} processes; start a number of them that divides {heads}"
            )


class Ranks:
    """This process's part in an engine over several. group: see `RankGroup`."""

    def __init__(self, model: Any, timeout: float):
        _check_heads(model)
        self.group = RankGroup(model, timeout)
        self._model = model
        self._one_at_a_time = threading.RLock()
        self._closed = False
        self._cache: TreeCache | None = None
        self._forward: CompiledForward | None = None
        self._replay: Replay | None = None
        atexit.register(self.close)  # runs before `leave`, which was registered earlier

    @property
    def leads(self) -> bool:
        return self.group.leads

    def make_cache(self, model: Any, num_pages: int | None, page_size: int, kv_format: Any) -> TreeCache:
        """The same in every process, and of the same size."""
        kind = RecordedCache if self.leads else TreeCache
        if num_pages is None:
            shape = shape_for(model)
            pages = free_pages(shape, page_size, shape.dtype, shape.device, kv_format)
            if shape.device.type == "cpu":  # the processes of a machine share its memory
                pages //= int(os.environ.get("LOCAL_WORLD_SIZE", self.group.size))
            num_pages = self.group.least(max(1, pages))
        cache = kind.for_model(model, num_pages=num_pages, page_size=page_size, kv_format=kv_format)
        self.group.agree(
            num_pages=num_pages, page_size=page_size, num_layers=cache.num_layers, num_kv_heads=cache.num_kv_heads,
            head_dim=cache.head_dim, dtype=cache.dtype, kv_format=cache.kv_format.name,
        )  # fmt: skip
        self._cache = cache
        with suppress(ValueError):  # asks the model by a forward, which all have to run
            cache.require_rotary()
        return cache

    def forward(self, model: Any, cache: TreeCache, *args: Any, **kwargs: Any) -> CompiledForward:
        """What computes a step's scores here."""
        if self.leads:
            return LedForward(self, model, cache, *args, **kwargs)
        self._forward, self._replay = CompiledForward(model, cache, *args, **kwargs), Replay(cache)
        return self._forward

    def check_model(self, model: Any) -> None:
        """ValueError if the model has to be looked at anew, which one process cannot do alone."""
        if not described(model):
            raise ValueError(
                "model: its dtype, device, attention or rotary embeddings changed since the engine was made; under "
                "tensor parallelism make a new Engine then, in every process"
            )

    # ---------------------------------------------------------------------------------------- rank 0

    @contextmanager
    def led(self, ids: Tensor, step: Step, keep: Tensor) -> Iterator[None]:
        """A forward of rank 0 goes inside: the others run it too."""
        with self._one_at_a_time:
            if self._closed:
                raise RankLost(
                    "the engine was closed, and the other processes have gone; make a new one in all of them"
                )
            self.group.send(("forward", self._taken(), ids.tolist(), keep.tolist(), check_of(step)))
            with self.group.at_work("a forward failed here, or in another process"):
                yield

    @contextmanager
    def telling(self, begins: bool) -> Iterator[list[Any]]:
        """See `Engine._told`."""
        outcome: list[Any] = []
        try:
            yield outcome
        except GeneratorExit:  # a stream that was left
            self._answer([], None)
            raise
        except BaseException as error:
            self._answer(None, error)
            raise
        if not begins:
            self._answer(outcome[0], None)

    def _answer(self, outcome: Any, error: BaseException | None) -> None:
        """What a call of generate or stream came to: the others' call of the same ends with it."""
        if self.group.lost is not None or self._closed:
            return
        with self._one_at_a_time:
            try:
                pickle.loads(pickle.dumps((outcome, error)))
            except Exception as problem:  # a strategy's own answers, an exception of one's own
                told = f"rank 0 has {'an error' if error else 'results'} that cannot be sent: {error or problem}"
                outcome, error = None, RuntimeError(told)
            self.group.send(("answer", self._taken(), outcome, error))

    def close(self) -> None:
        """Let the others go; once."""
        with self._one_at_a_time:
            if self.leads and not self._closed and self.group.lost is None:
                self._closed = True
                with suppress(RankLost):
                    self.group.send(("close", self._taken()))

    def _taken(self) -> list[Any]:
        assert isinstance(self._cache, RecordedCache)
        return self._cache.take()

    # ---------------------------------------------------------------------------------------- the others

    def refuse(self, what: str) -> None:
        """RuntimeError on a rank other than 0."""
        if not self.leads:
            raise RuntimeError(
                f"{what}: this is rank {self.group.rank} of {self.group.size}, and requests come in on rank 0; call "
                "engine.follow() here (or the same engine.generate(…) in every process)"
            )

    def follow(self, one_call: bool = False) -> Any:
        """Compute along until rank 0 closes the engine; `one_call`: until its next call of generate or stream has
        ended, whose results come back. Raises what that call raised there, and `RankLost`."""
        assert self._replay is not None
        with ExitStack() as stack:
            for block in (evaluating(self._model), torch.inference_mode(), own_precision(self._model.device)):
                stack.enter_context(block)
            while True:
                kind, calls, *message = self.group.receive()
                with self.group.at_work("what rank 0 did to the tree cannot be done here"):
                    step = self._replay.do(calls)
                if kind == "forward":
                    self._run(step, *message)
                elif kind == "close":
                    if one_call:
                        raise RankLost("rank 0 closed the engine, and this process called generate or stream")
                    return None
                elif one_call:
                    results, error = message
                    if error is not None:
                        raise error
                    return results

    def finishes(self) -> Iterator[Event]:
        """What `Engine.stream` gives in a process that follows: its last events alone."""
        for i, result in enumerate(self.follow(one_call=True)):
            yield Finish(i, result)

    def _run(self, step: Step | None, ids: list[int], keep: list[int], check: int) -> None:
        assert self._forward is not None
        with self.group.at_work("a forward failed here, or in another process"):
            if step is None or check_of(step) != check:
                raise RuntimeError("this process and rank 0 have different slots for the same rows")
            device = step.cache.device
            self._forward.eager(self._model, torch.tensor(ids, device=device), step, torch.tensor(keep, device=device))


class LedForward(CompiledForward):
    """Rank 0's forward."""

    def __init__(self, ranks: Ranks, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._ranks = ranks

    def eager(self, model: Any, ids: Tensor, step: Step, keep: Tensor) -> Tensor:
        with self._ranks.led(ids, step, keep):
            return super().eager(model, ids, step, keep)
