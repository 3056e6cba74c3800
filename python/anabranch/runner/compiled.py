"""Steps through a compiled forward: ``Engine(compile="auto" | True | False)``.

The first steps run as they are, so nobody's first token waits for a compiler. Then the forward is compiled, and before
it serves anybody it is run beside the eager one over a small tree of its own (a prefill, decoding, both mixed, a single
row, a join). A model that compiles to something else stays eager, as does one that cannot be traced.

``"auto"`` compiles where an engine has worked so long that the wait is a small part of it, then times both and keeps
the compiled forward only where it is faster: nothing is believed about a machine that was not measured on it.
"""

from __future__ import annotations

import copy
import statistics
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from anabranch._cache_folder import cache_folder
from anabranch.backends.control_groups import available_memory
from anabranch.backends.threads import torch_on_one
from anabranch.errors import OutOfPages
from anabranch.hf.probe import is_compiled
from anabranch.kv.cache import TreeCache
from anabranch.kv.step import Step
from anabranch.runner.compile_times import expected_seconds, note_seconds
from anabranch.runner.eager import forward
from anabranch.runner.linear import serves
from anabranch.runner.model_state import ModelState, Untouched
from anabranch.runner.ranks import sharded
from anabranch.runner.tracing import Graphs, compiler_problem

__all__ = ["CompiledForward", "unfit_to_compile"]

AFTER = 3  # steps that run as they are before compile=True compiles
# Seconds of forwards before "auto" compiles, at most. Whether an engine will live long is not known, so it waits until
# its work has cost about what compiling will: then it never costs more than twice what knowing would have.
AUTO_SECONDS = 120.0
AUTO_GAIN = 0.95  # most of eager's time that a compiled step may take for "auto" to keep it
USUAL, USUAL_SECONDS = 16, 3.0  # a step of 1, 2, … so many tokens is recorded at once, as long as that takes no longer
# Rows of a step that reads prompts, beyond which it runs as it is. What is compiled is for one thread, as few rows need
# it: SmolLM2's forward of 100, 184 and 256 rows takes 0.9 of eager's time, of 400 rows 1.09 (2 cores, Zen 4).
MOST_READ = 256
MOST_CHANGES = 3  # times that a model may change under its compiled forward before it stays eager
QUIET_SECONDS = 3.0  # a wait for the compiler that is longer is told
# Largest ‖compiled − eager‖ / ‖eager‖ of a row's scores. Rounding alone stays below by a factor of ten and more.
BOUNDS = {torch.float32: 2e-4, torch.float16: 2e-2, torch.bfloat16: 8e-2}
AS_MUCH = 3.0  # times what rounding alone makes of a row: it is so much larger where a row is beyond the bound …
MOST = 0.5  # … but no more than that


def unfit_to_compile(model: Any, device: torch.device, batch_invariant: bool = False) -> str | None:
    """Why steps of this model cannot be compiled, with the remedy; None when they can."""
    if batch_invariant:
        return "batch_invariant=True computes every row in one fixed way, and a compiler chooses its own by the rows"
    if sharded(model):
        return "the model is shared out among processes, which would have to compile at the same step"
    if device.type != "cpu":
        return f"the model is on {device}, and compiled steps have run on CPUs alone so far; see cuda_graphs"
    if is_compiled(model):
        return "the model is compiled by torch.compile already; pass the model itself"
    return compiler_problem()


class CompiledForward:
    """A model's forward, compiled as soon as that may pay: ``forward(model, ids, step, keep)`` → scores.

    Args:
        model, cache: the model, and the cache that its steps are of.
        backend: the attention backend.
        setting: compile: True, False or "auto".
        own_linear: as for `Engine`.
        linear: a context for forwards that run as they are (`linear_context`).
        unfit: why the forward cannot be compiled (`unfit_to_compile`); None when it can.

    Attributes:
        on: whether steps are compiled now.
        reason: in words, why they are, or are not.
    """

    def __init__(
        self,
        model: Any,
        cache: TreeCache,
        backend: str,
        setting: bool | str,
        own_linear: bool | None,
        linear: AbstractContextManager[Any],
        unfit: str | None = None,
    ) -> None:
        self.setting = setting
        self.on = False
        self._cache, self._backend, self._own_linear, self._linear = cache, backend, own_linear, linear
        self._graphs: Graphs | None = None
        self._usual = False  # whether the usual steps are to be recorded
        self._state: ModelState | None = None
        self._untouched: Untouched | None = None
        # The same in every compiled step, since torch.compile makes code for a number of threads: where our kernel has
        # the linear layers of few rows, what is left is small, and those of many rows take all threads (`linear_rows`).
        self._on_one = serves(linear, 1)
        self._steps, self._seconds, self._changes = 0, 0.0, 0
        self._off = setting is False or unfit is not None
        self._said: set[str] = set()
        self._waits = 0.0  # seconds of forwards
        waits = "compiles behind the first steps"
        if not self._off and setting is not True:
            self._waits = min(AUTO_SECONDS, expected_seconds(model, backend) or AUTO_SECONDS)
            waits = f"compiles after {self._waits:.0f} s of work"
        self.reason = "compile=False" if setting is False else unfit or waits

    def __bool__(self) -> bool:
        return self.on

    def __repr__(self) -> str:
        return f"<{'compiled' if self.on else 'eager'}: {self.reason}>"

    @property
    def replays(self) -> int:
        """Steps of the present compiled forward that were replayed without torch (`recorded`)."""
        return 0 if self._graphs is None else self._graphs.recordings.replays

    @property
    def compilations(self) -> int:
        """Graphs that the present compiled forward consists of; those that a step could not use are not counted."""
        return 0 if self._graphs is None else self._graphs.compiled

    def __call__(self, model: Any, ids: Tensor, step: Step, keep: Tensor) -> Tensor:
        """Scores [len(keep), vocabulary] of the rows `keep` of a step; ids: int64 [rows] on the cache's device."""
        if self._off:
            return self.eager(model, ids, step, keep)
        if self.on and not (self._untouched and self._untouched(model)):
            assert self._state is not None and self._graphs is not None
            if not self._state.same(model):
                self._changed("modules, parameters or adapters of the model changed")
            elif self._state.covered():
                self._say("modules have forward hooks, or a forward that was replaced; steps are eager while they do")
                return self.eager(model, ids, step, keep)
            else:  # something that torch.compile's own guards judge, which replayed steps do not ask
                self._graphs.recordings.forget()
                self._untouched = Untouched(model)
        if self.on and keep.shape[0] < step.num_rows > MOST_READ:
            return self.eager(model, ids, step, keep)
        if not self.on and not (self._due() and self._compile(model)):
            begin = time.perf_counter()
            scores = self.eager(model, ids, step, keep)
            self._steps, self._seconds = self._steps + 1, self._seconds + time.perf_counter() - begin
            return scores
        return self._compiled(model, ids, step, keep)

    # ---------------------------------------------------------------------------------------- both ways

    def eager(self, model: Any, ids: Tensor, step: Step, keep: Tensor) -> Tensor:
        """The same, as it is."""
        return self._as_it_is(model, ids, step, keep, self._backend)

    def _as_it_is(self, model: Any, ids: Tensor, step: Step, keep: Tensor, backend: str) -> Tensor:
        with torch_on_one(serves(self._linear, step.num_rows)), self._linear:
            return forward(model, ids, step, backend, keep)

    def _compiled(self, model: Any, ids: Tensor, step: Step, keep: Tensor) -> Tensor:
        graphs = self._graphs
        assert graphs is not None
        strays = graphs.strays
        try:
            with torch_on_one(self._on_one):
                scores = graphs(model, ids, step, keep)
        except torch._dynamo.exc.TorchDynamoException as error:  # type: ignore[attr-defined]
            # Raised while a graph is made, before one runs: nothing of the step was written.
            self._give_up(f"a step fits no graph, and the model cannot be traced again: {_line(error)}")
            return self.eager(model, ids, step, keep)
        if graphs.strays != strays:
            self._changed("something that the compiled forward relied on changed")
        return scores

    @property
    def to_record(self) -> bool:
        """Whether it is time for `record_usual`: behind a compilation, where everybody has waited anyway."""
        return self._usual and self.on

    def record_usual(self, model: Any, most: int) -> None:
        """Record the steps that will come most often, and not among requests later; call it when no step of the cache
        is under way. most: rows that a step may have."""
        assert self.to_record and self._graphs is not None
        self._usual = False
        begin, recordings = time.perf_counter(), self._graphs.recordings
        after, recordings.after = recordings.after, 1
        try:
            for rows in range(1, min(USUAL, most) + 1):
                branches = [self._cache.branch() for _ in range(rows)]
                try:
                    self(model, *_packed(model, self._cache, dict.fromkeys(branches, 1)))
                finally:
                    for branch in branches:
                        self._cache.release(branch)
                if not self.on or recordings.problem is not None or time.perf_counter() - begin > USUAL_SECONDS:
                    break
        except OutOfPages:
            pass  # those left are recorded when they come
        finally:
            recordings.after = after

    # ---------------------------------------------------------------------------------------- when

    def _due(self) -> bool:
        return self._steps >= AFTER and self._seconds >= self._waits

    def _changed(self, what: str) -> None:
        """Forget the graphs; new ones are made after a few steps, unless that happens again and again."""
        self._graphs, self._state, self.on, self._steps = None, None, False, 0
        self._changes += 1
        if self._changes > MOST_CHANGES:
            self._give_up(f"{what}, {self._changes} times by now")
        else:
            self.reason = f"{what}; compiles again after a few steps"

    def _give_up(self, why: str) -> None:
        self._graphs, self._state, self.on, self._off = None, None, False, True
        self.reason = why
        self._say(why)

    def _say(self, why: str) -> None:
        if self.setting is True and why not in self._said:
            self._said.add(why)
            warnings.warn(f"anabranch: steps run eagerly, not compiled: {why}", stacklevel=2)

    # ---------------------------------------------------------------------------------------- compiling

    def _compile(self, model: Any) -> bool:
        """Compile, compare and, for "auto", time; whether steps are compiled from now on."""
        if is_compiled(model):
            self._give_up("the model is compiled by torch.compile already")
            return False
        state = ModelState(model)
        if state.covered():
            self._say("modules have forward hooks; steps are eager while they do")
            self.reason = "modules have forward hooks"
            return False
        graphs = Graphs(self._backend, self._own_linear)
        graphs.warming = True
        begin = time.perf_counter()
        try:
            with _told(type(model).__name__):
                wrong = self._differs(model, graphs)
        except Exception as error:  # whatever breaks in a compiler, in it or in what it runs
            self._give_up(f"{type(model).__name__} cannot be compiled: {_line(error)}")
            return False
        finally:
            graphs.warming = False
        if wrong is None and not graphs.compiled:
            wrong = "torch.compile is switched off (TORCHDYNAMO_DISABLE or TORCH_COMPILE_DISABLE)"
        spent = time.perf_counter() - begin
        if wrong is None:
            note_seconds(model, self._backend, spent)
        if wrong is None and self.setting != True:  # noqa: E712 (a string)
            ratios = self._ratios(model, graphs)
            told = ", ".join(f"{ratio:.2f} for {rows}" for rows, ratio in ratios.items())
            if statistics.geometric_mean(ratios.values()) > AUTO_GAIN:
                wrong = f"a compiled step is not faster here (times of eager's, by rows: {told})"
        if wrong is not None:
            self._give_up(wrong)
            return False
        self._usual = True
        self._graphs, self._state, self._untouched, self.on = graphs, state, Untouched(model), True
        self.reason = f"{graphs.compiled} graphs in {spent:.1f} s, as eager within rounding"
        return True

    def _differs(self, model: Any, graphs: Graphs) -> str | None:
        """In words, where the compiled forward computes something else than the eager one.

        Some models make much of a rounding: in 16 bits SmolLM2 with our adapter has scores of single rows that are 15 %
        from those in float32, eager, and 2 % compiled. So where a row is beyond the bound, what else is the same but
        for rounding (torch's linear layers, the reference attention, a copy in float32 where there is memory for one)
        tells how far apart that row's scores may be.
        """

        def compiled(*given: Any) -> Tensor:
            with torch_on_one(self._on_one):
                return graphs(model, *given)

        want = _tried(model, lambda *given: self.eager(model, *given))
        bound, rounding = BOUNDS.get(self._cache.dtype, BOUNDS[torch.float32]), None
        for i, (what, got) in enumerate(_tried(model, compiled)):
            error = _errors(got, want[i][1])
            if bool((error <= bound).all()):
                continue
            rounding = rounding or [
                _tried(model, lambda ids, step, keep: forward(model, ids, step, self._backend, keep)),
                _tried(model, lambda ids, step, keep: self._as_it_is(model, ids, step, keep, "reference")),
                *self._in_float32(model),
            ]
            noise = torch.stack([_errors(other[i][1], want[i][1]) for other in rounding]).amax(0)
            allowed = (AS_MUCH * noise).clamp(bound, MOST)
            if not bool((error <= allowed).all()):
                worst = int((error / allowed).nan_to_num(torch.inf).argmax())
                return (
                    f"{type(model).__name__} compiles to something else than it computes eagerly: scores of {what} "
                    f"differ by {error[worst]:.1e} of their size, {allowed[worst]:.0e} is allowed"
                )
        return None

    def _in_float32(self, model: Any) -> list[list[tuple[str, Tensor]]]:
        """The trial's scores by a 16-bit model's copy in float32; none where that would take half the memory left."""
        takes, available = 4 * sum(p.numel() for p in model.parameters()), available_memory()
        if self._cache.dtype == torch.float32 or available is None or takes > available // 2:
            return []
        wide = copy.deepcopy(model).float()
        return [_tried(wide, lambda ids, step, keep: forward(wide, ids, step, self._backend, keep))]

    def _ratios(self, model: Any, graphs: Graphs) -> dict[int, float]:
        """Time of a compiled decode step over an eager one's, by rows; medians of turns."""
        found: dict[int, float] = {}
        for rows in (1, 16):
            cache = TreeCache.for_model(model, num_pages=4 * rows + 16, page_size=16)
            trunk = cache.branch()
            self.eager(model, *_packed(model, cache, {trunk: 24}))
            kids = cache.fork(trunk, rows)
            times: list[float] = []
            for _ in range(9):
                taken = []
                for compiled in (True, False):
                    given = _packed(model, cache, dict.fromkeys(kids, 1))
                    begin = time.perf_counter()
                    if compiled:
                        with torch_on_one(self._on_one):
                            graphs(model, *given)
                    else:
                        self.eager(model, *given)
                    taken.append(time.perf_counter() - begin)
                times.append(taken[0] / taken[1])
            found[rows] = statistics.median(times)
        return found


# ------------------------------------------------------------------------------------------------ the check


def _packed(model: Any, cache: TreeCache, rows: dict[Any, int], keep: list[int] | None = None) -> tuple[Any, ...]:
    """(ids, step, keep) of a step with so many rows; ids as any, the same each time."""
    step = cache.step(rows)
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    ids = (torch.arange(step.num_rows) * 7919 + 31 * step.num_rows + 5) % vocabulary
    return ids.to(cache.device), step, step.last_rows if keep is None else torch.tensor(keep, device=cache.device)


def _trial(model: Any, cache: TreeCache) -> Iterator[tuple[Any, ...]]:
    """A small tree's steps, each (what, ids, step, keep); each is to be run before the next is asked for."""
    # No two sizes of the first step are alike: torch.compile would take what is equal once to be equal always.
    trunk, other = cache.branch(), cache.branch()
    yield "a prefill", *_packed(model, cache, {trunk: 7, other: 4}, [3, 6, 10])
    kids = cache.fork(trunk, 3)
    yield "decoding", *_packed(model, cache, {kids[2]: 1, other: 1, kids[0]: 1, kids[1]: 1})
    yield "prefill and decoding", *_packed(model, cache, {kids[0]: 3, other: 1, kids[1]: 2})
    yield "a single row", *_packed(model, cache, {other: 1})
    cache.join(trunk, kids[:2])
    yield "rows behind a join", *_packed(model, cache, {trunk: 2, kids[2]: 1}, [1])
    yield "a single row behind a join", *_packed(model, cache, {trunk: 1})
    # Linear layers of many rows are torch's, and its first call takes several times as long as those that follow.
    yield "many rows", *_packed(model, cache, {cache.branch(): 15 for _ in range(10)})


def _tried(model: Any, run: Callable[..., Tensor]) -> list[tuple[str, Tensor]]:
    """(what, float64 scores) of each step of a trial, which `run` computes from (ids, step, keep)."""
    trial = _trial(model, TreeCache.for_model(model, num_pages=96, page_size=4))
    return [(what, run(*given).double()) for what, *given in trial]


def _errors(got: Tensor, want: Tensor) -> Tensor:
    """The relative error of each row; infinite where shapes, infinities or NaNs are not the same."""
    if got.shape != want.shape or not torch.equal(got.isfinite(), want.isfinite()):
        return want.new_full(want.shape[:1], torch.inf)
    got, want = (torch.where(want.isfinite(), x, 0.0) for x in (got, want))
    return (got - want).norm(dim=-1) / want.norm(dim=-1).clamp_min(1e-30)


# ------------------------------------------------------------------------------------------------ words


class _told:
    """Says on stderr, once, that a compiler is at work, where it takes longer than a moment."""

    def __init__(self, model: str) -> None:
        self._timer = threading.Timer(QUIET_SECONDS, self._say, [model])
        self._timer.daemon = True

    def _say(self, model: str) -> None:
        from rich.console import Console

        Console(stderr=True, highlight=False).print(
            f"anabranch: compiling the forward of {model}; what is compiled is kept in {cache_folder() / 'compiled'}",
            markup=False,
            soft_wrap=True,
        )

    def __enter__(self) -> None:
        self._timer.start()

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()


def _line(error: BaseException) -> str:
    """An exception as one line; of what torch.compile wrapped, the exception within."""
    error = getattr(error, "inner_exception", None) or error
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])
