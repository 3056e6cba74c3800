"""Compiled steps without Python between their kernels: recorded once, then made again, as a CUDA graph is on a GPU.

Inductor's code for a forward is a list of kernel calls, a few hundred a step, and for few rows calling them takes
longer than many of them run. Their arguments are addresses and sizes, which for one number of rows are always the same.
So inductor's own code runs once with other objects under the names that it uses (`Recorder`): memory comes from an
arena that stays, and each call is made and noted. A `Recorded` step then makes the noted calls from C++
(csrc/cpu/recording.hpp) with that step's inputs and plan.

Nothing is guessed: where there is a name that is not known here, a tensor that is neither weight, input nor of the
arena, or an op that is not ours, there is no recording. Before one serves anybody it runs over memory full of NaN and
has to give, bit for bit, what the step gave that it was recorded from.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from anabranch.backends import cpu, threads
from anabranch.kv.cache import TreeCache
from anabranch.kv.step import Step
from anabranch.ops.tree import unobserved
from anabranch.runner.arena import Arena
from anabranch.runner.recorder import Address, Recorder, in_place_of, inner_code

__all__ = ["Recordings"]

# The step of a kind (so many rows, so many scores) that is recorded. Recording SmolLM2's takes some 75 ms more than the
# step, and each replay saves 9 ms: of prompts, of any length, few kinds come so often that it would pay at once.
_AFTER = 8
_MOST_READ = 64  # rows of a recorded step that reads prompts: longer ones earn too little
_AGAIN = 100  # steps of a kind before it is recorded again
_MOST = 128  # kinds that are kept
_SPARE = 4  # blocks of memory for scores that wait for the next step
_MOST_PROBLEMS = 4  # kinds that could not be recorded, before no other is tried
_MOST_CHANGES = 8  # times that a model may change under its recordings

_OUT = 1  # the base of what holds the scores; those of ids, positions and keep follow


class Recorded:
    """One step's calls, for any step of as many rows and scores over the same cache."""

    def __init__(self, recorder: Recorder, cache: TreeCache, inputs: Sequence[Tensor], scores: Tensor) -> None:
        """scores: what the recorded step gave; raises ValueError where the calls cannot be made again."""
        from anabranch import _cpu

        if recorder.problem is None and recorder.runs != 1:
            raise ValueError("the compiled forward is not one piece of code")
        if recorder.problem is not None:
            raise ValueError(recorder.problem)
        if sorted(recorder.layers) != list(range(cache.num_layers)):
            raise ValueError("not every layer of the cache has attention once")
        block = recorder.arena.block_of(scores.data_ptr())
        if block is None:
            raise ValueError("the scores are not of the compiled code's own making")
        self._group, self._cache, self._constants = recorder.group, cache, recorder.constants
        self._bytes, self._dtype = block.nbytes, scores.dtype
        self._whole = block.nbytes // scores.element_size() * scores.element_size()  # bytes of whole scores
        self._offset = (scores.data_ptr() - block.ctypes.data) // scores.element_size()
        self._shape, self._stride = scores.shape, scores.stride()
        ranges = [(block.ctypes.data, block.nbytes), *((x.data_ptr(), x.numel() * x.element_size()) for x in inputs)]
        self._calls = _cpu.Recording()
        for method, args in recorder.calls:
            getattr(self._calls, method)(*_placed(args, ranges))

    def __call__(self, inputs: Sequence[Tensor], step: Step, outputs: Arena) -> Tensor:
        """Scores of a step that was not used yet; inputs: as the recorded step's. Memory comes from `outputs`."""
        step.plan.require_unused()
        scores = self.run(inputs, step, outputs)
        step.plan.replayed()
        return scores

    def run(self, inputs: Sequence[Tensor], step: Step, outputs: Arena) -> Tensor:
        cache = self._cache
        arrays = cpu.plan_arrays(step.plan, self._group, cache.num_kv_heads, cache.dtype)
        out = torch.from_numpy(outputs.take(self._bytes))
        self._calls.run(
            [0, *(x.data_ptr() for x in (out, *inputs))], (*arrays.addresses, arrays.strip), arrays.num_items,
            arrays.num_merge, step.plan.slots.data_ptr(), threads.count(),
        )  # fmt: skip
        return out[: self._whole].view(self._dtype).as_strided(self._shape, self._stride, self._offset)


def _placed(x: Any, ranges: Sequence[tuple[int, int]]) -> Any:
    """Arguments of a call with a place (base, offset) for each address: bases[base] + offset; base 0 is 0."""
    if isinstance(x, Address):
        for base, (begin, size) in enumerate(ranges, _OUT):
            if begin <= x < begin + size:
                return (base, x - begin)
        return (0, int(x))
    if type(x) in (list, tuple):
        return type(x)(_placed(y, ranges) for y in x)
    return x


class Recordings:
    """The recorded steps of a compiled model. Whoever runs them says when the model may have changed (`forget`).

    Attributes:
        problem: why no step is recorded, in words; None as long as steps are.
        replays: steps that were replayed.
        after: the step of a kind that is recorded.
    """

    def __init__(self) -> None:
        self.problem: str | None = None
        self.replays = 0
        self._codes: list[Any] = []
        self._recorded: dict[tuple[int, int], Recorded] = {}  # by rows and scores; the one used last is the last
        self._seen: Counter[tuple[int, int]] = Counter()
        self._failed = self._forgotten = 0
        self.after = _AFTER
        self._arena, self._outputs = Arena(), Arena(_SPARE)
        self._cache: TreeCache | None = None

    def __len__(self) -> int:
        return len(self._recorded)

    def add(self, compiled: Any) -> None:
        """A compiled graph that steps will run."""
        code = inner_code(compiled)
        if code is None:
            self.problem = "this version of torch keeps its compiled code in another place"
        else:
            self._codes.append(code)

    def forget(self) -> None:
        """Drop what was recorded; steps are recorded again as they come."""
        if self._recorded:
            self._forgotten += 1
            if self._forgotten > _MOST_CHANGES:
                self.problem = f"the model changed {self._forgotten} times"
        self._clear()

    def _clear(self) -> None:
        self._recorded.clear()
        self._seen.clear()

    def __call__(
        self, model: Any, ids: Tensor, positions: Tensor, step: Step, keep: Tensor, run: Callable[[], Tensor]
    ) -> Tensor:
        """Scores of a step: replayed where one like it was recorded, else ``run()``."""
        inputs = (ids, positions, keep)
        if self.problem is not None or not _fits(step, inputs):
            return run()
        if keep.shape[0] < step.num_rows > _MOST_READ:
            return run()
        if step.cache is not self._cache:
            self._clear()
            self._cache = step.cache
        key = (step.num_rows, keep.shape[0])
        recorded = self._recorded.pop(key, None)
        if recorded is not None:
            self._recorded[key] = recorded
            scores = recorded(inputs, step, self._outputs)
            self.replays += 1
            return scores
        self._seen[key] += 1
        return run() if self._seen[key] < self.after else self._record(model, key, inputs, step, run)

    def _record(
        self, model: Any, key: tuple[int, int], inputs: Sequence[Tensor], step: Step, run: Callable[[], Tensor]
    ) -> Tensor:
        weights = [*model.parameters(), *model.buffers()]
        recorder = Recorder(step, inputs, weights, self._arena)
        with in_place_of(self._codes, recorder):
            scores = run()
        want = scores.clone()  # where nothing is used again
        self._seen[key] = -_AGAIN  # steps until it is tried anew, should it fail or be dropped
        try:
            recorded = Recorded(recorder, step.cache, inputs, scores)
            written = _Written(step)
            self._arena.poison()
            if not (_same_bits(recorded.run(inputs, step, self._outputs), want) and written.same()):
                written.restore()
                raise ValueError("recorded calls compute something else than the step that they were recorded from")
        except ValueError as error:
            self._failed += 1
            if self._failed >= _MOST_PROBLEMS:
                self.problem = str(error)
            return want
        self._recorded[key] = recorded
        if len(self._recorded) > _MOST:
            del self._recorded[next(iter(self._recorded))]
        return want


class _Written:
    """What a step has put into its cache."""

    def __init__(self, step: Step) -> None:
        cache, slots = step.cache, step.plan.slots.long()
        scales = [x for x in map(cache.kv_scales, range(cache.num_layers)) if x is not None]
        pages = [of(layer) for of in (cache.k_pages, cache.v_pages) for layer in range(cache.num_layers)]
        pages += [x for pair in scales for x in pair]
        # As bytes: rows of pages may be of a type that torch does not index.
        self._pages = [x if x.dtype == torch.float32 else x.view(torch.uint8) for x in pages]
        self._at = (slots // cache.page_size, slots % cache.page_size)
        self._values = [x[self._at] for x in self._pages]

    def same(self) -> bool:
        """Whether that still lies there, bit for bit."""
        return all(_same_bits(x[self._at], value) for x, value in zip(self._pages, self._values, strict=True))

    def restore(self) -> None:
        for x, value in zip(self._pages, self._values, strict=True):
            x[self._at] = value


def _fits(step: Step, inputs: Sequence[Tensor]) -> bool:
    """Whether a step is one that may be replayed: over its own branches, watched by nobody, without gradients."""
    return (
        not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and unobserved(*inputs)
        and step.cache.device.type == "cpu"
        and not step.plan.turned
        and all(x.is_contiguous() for x in inputs)
    )


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
