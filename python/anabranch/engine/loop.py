"""The loop: one packed forward a step for all runnable threads of all requests, prefilling and decoding mixed.

It outlives a call: requests join and leave between any two steps. What goes wrong with one of them (in its strategy, a
logits processor, an ``until``) ends its own call and no other.
"""

from __future__ import annotations

import threading
import time
from bisect import insort
from collections.abc import Callable, Iterable
from itertools import count
from typing import Any

from anabranch import hf
from anabranch.engine.call import Call
from anabranch.engine.request import Request
from anabranch.engine.scheduler import NothingMoves, Scheduler
from anabranch.engine.stepper import Stepper, Touching
from anabranch.engine.turns import Turns
from anabranch.errors import DeadlineExceeded, QueueFull
from anabranch.records import events
from anabranch.runner.modes import Evaluation
from anabranch.runner.weights import fingerprint
from anabranch.threads.results import build_result

# A request of priority p goes before those that came up to p times so many requests earlier. So whatever comes later,
# only finitely many go before one that waits: nobody starves (see scheduler.py).
HEAD_START = 100

PATIENCE = 3  # steps in which nothing is done, before it is said that nothing ever will be
# And, at least and for each time that everybody enters the cache and is computed again, in which nobody gets on.
BARREN, ROUNDS = 1000, 20


class Loop:
    """The requests of an engine, and what carries them on. Methods without an underscore may be called from any Python
    thread; the others run inside a turn (see `Turns`)."""

    def __init__(self, engine: Any):
        self.engine, self.cache = engine, engine.cache
        self.active: list[Request] = []  # those that have begun, by their order
        self.waiting: list[Request] = []  # those that have not, likewise
        self.scheduler = Scheduler(self.cache, self.active)
        self.stepper = Stepper(self, engine, self.scheduler)
        self.turns = Turns()
        self.work = threading.Event()  # set when there may be something to do
        self.calls: dict[Request, Call] = {}  # whose each request is, until it has ended
        self._arrivals = count()
        self._door = threading.RLock()  # of `waiting`, which others add to during a step
        self._driving = threading.Lock()  # held by the thread that steps until its own call is done
        self._sleepers: set[threading.Event] = set()  # of threads that wait while another one drives
        self._to_end = False  # whether some call was aborted or has a deadline
        self.touched: Request | None = None  # whose strategy or processors are running
        self._evaluation = Evaluation()
        self._computed_with: object = None  # the model's fingerprint when its prefixes were computed
        self._idle = 0  # steps behind one another in which nothing was done at all
        self._barren = 0  # and in which nobody got on
        self._made_way = False  # whether the others have left the cache to the first request since
        self._settled = True  # whether all that could happen without a forward has happened behind the last one

    # ---------------------------------------------------------------------------------------- coming and going

    def submit(self, call: Call, limited: bool = False) -> None:
        """Take a call's requests in; they begin with the next step that has room. limited: `max_queue` holds."""
        most = self.engine.max_queue
        with self._door:
            if limited and most is not None and len(self.waiting) + len(call.requests) > most:
                raise QueueFull(
                    f"{len(self.waiting)} requests wait to begin, and the engine takes max_queue={most}; try again "
                    "when some have begun, or make the engine with a larger max_queue"
                )
            for request in call.requests:
                number = next(self._arrivals)
                request.order = (number - call.priority * HEAD_START, number)
                request.started = time.perf_counter()
                self.calls[request] = call
                insort(self.waiting, request, key=lambda r: r.order)
        self._evaluation.look_again()
        self._to_end = self._to_end or call.deadline is not None
        self.work.set()

    def abort(self, calls: Iterable[Call], drop: bool = False, wait: bool = True) -> None:
        """End calls, with what there was so far; at once, or behind the step that is under way.

        drop: nobody wants what there was. wait: return when they have ended (not inside a step: there is no waiting).
        """
        for call in calls:
            call.aborted, call.dropped = True, call.dropped or drop
        self._to_end = True
        self.work.set()
        if wait and not self.turns.mine:
            with self.turns.between():
                self._end_what_is_over()

    def abort_all(self) -> None:
        with self._door:
            calls = list(dict.fromkeys(self.calls.values()))
        self.abort(calls)

    def wait(self, call: Call, ready: Callable[[], bool], until: float | None = None) -> bool:
        """Return True as soon as ``ready()``, False at `until` (monotonic clock). Where no other thread drives the
        loop, this one does."""
        if ready():
            return True
        if self.turns.mine:
            raise RuntimeError(
                "waiting for a request inside a step (in a strategy, a logits processor or an until) would never end; "
                "use engine.generate() there, which works through its own prompts alone"
            )
        sleeper = threading.Event()
        call.sleep(sleeper)
        self._sleepers.add(sleeper)
        try:
            while not ready():
                left = None if until is None else until - time.monotonic()
                if left is not None and left <= 0:
                    return False
                if self._driving.acquire(blocking=False):
                    try:
                        while not ready() and (until is None or time.monotonic() < until):
                            self.step()
                    finally:
                        self._driving.release()
                else:
                    sleeper.wait(left)
                    sleeper.clear()
            return True
        finally:
            call.wake(sleeper)
            self._sleepers.discard(sleeper)
            if not self._driving.locked():  # somebody else has to go on with it
                for other in list(self._sleepers)[:1]:
                    other.set()

    @property
    def busy(self) -> bool:
        """Whether anything is left to do."""
        return bool(self.active or self.waiting)

    # ---------------------------------------------------------------------------------------- a step

    def step(self) -> bool:
        """One packed forward for whoever is there; whether anything is left to do."""
        with self.turns.step(), self._evaluation.of(self.engine.model):
            try:
                self._end_what_is_over()
                settled, self._settled = self._settled, False
                new = self._take_up()
                self._settle(new if settled else self.active)
                self._end_what_is_over()
                if self.active:
                    did, gains = self.scheduler.did, self.scheduler.gains
                    self.stepper.step()
                    self._watch(
                        got_on=self._settle(self.active) or gains != self.scheduler.gains,
                        idle=did == self.scheduler.did,
                    )
                self._settled = True
                self._end_what_is_over()
            except Exception as error:  # nobody in particular is to blame: nobody can go on
                for request in list(self.active):
                    self.fail(request, error)
            except BaseException as error:  # Ctrl-C: who was being touched may be in any state, all others are whole
                if self.touched is not None:
                    self.fail(self.touched, error)
                raise
            finally:
                self.touched = None
                if not self.active:
                    self.stepper.drafting.close()
                    if self.engine.graphs is not None:
                        self.engine.graphs.rest()
        for call in dict.fromkeys(self.calls.get(request) for request in list(self.active)):
            if call is not None:
                call.tell()
        return self.busy

    def _take_up(self) -> list[Request]:
        """Begin with waiting requests, in order, as far as they fit; none passes one that waits for room."""
        self.scheduler.limits(self.engine.max_rows, self.engine.max_threads)
        begun: list[Request] = []
        while True:
            with self._door:
                if not self.waiting or (self.active and not self.scheduler.has_room(self.waiting[0])):
                    return begun
                request = self.waiting.pop(0)
                insort(self.active, request, key=lambda r: r.order)
            begun.append(request)
            with Touching(self, request):
                if len(begun) == 1:
                    self._look_at_model()
                if request.prefixes is not None:
                    request.epoch = request.prefixes.epoch
                request.start_strategy()

    def _look_at_model(self) -> None:
        """What may have changed since the last requests began."""
        model, prefixes = self.engine.model, self.engine.prefixes
        rules = self.scheduler.rope_rules = hf.describe(model).rope_rules
        if prefixes is None:
            return
        # Beyond such a limit keys depend on the longest sequence of the forward that wrote them.
        prefixes.limit = min((rule.limit for rule in rules), default=None)
        now = (fingerprint(model, derived=not rules), rules)  # such embeddings rewrite their frequencies
        if now != self._computed_with:
            prefixes.clear()
            self._computed_with = now

    def _settle(self, requests: Iterable[Request]) -> bool:
        """Let strategies and queues go on until nothing moves; hand over what is answered. Whether anything moved."""
        moved = False
        for request in list(requests):
            if request not in self.calls:
                continue
            begin = time.perf_counter()
            with Touching(self, request):
                moved = request.advance() or moved
                request.spent.seconds["strategy"] += time.perf_counter() - begin
                if request.over:
                    self._finish(request, "finished")
            moved = moved or request not in self.calls
        return moved

    def _watch(self, got_on: bool, idle: bool) -> None:
        """See to it that requests which do not get on end."""
        if got_on:
            self._idle = self._barren = 0
            self._made_way = False
            return
        self._idle = self._idle + 1 if idle else 0
        self._barren += 1
        if self._idle > PATIENCE:
            self._give_up()
        elif self._in_circles():
            if self._made_way or not self.scheduler.make_way():
                self._give_up()
            else:
                self._made_way, self._barren = True, 0

    def _in_circles(self) -> bool:
        """Whether threads have pushed one another out for longer than any order of theirs takes."""
        if self._barren <= BARREN:
            return False
        threads = [thread for request in self.active for thread in request.threads]
        forwards = sum(thread.length for thread in threads) // int(self.engine.max_rows)
        return self._barren > BARREN + ROUNDS * (len(threads) + forwards)

    def _give_up(self) -> None:
        """Nobody has got on for some steps, so nobody ever will: end the first that waits, for the others may wait for
        its room."""
        self._idle = self._barren = 0
        self._made_way = False
        for request in self.active[:1]:
            name, waiting = type(request.strategy).__name__, request.tasks.describe_wait()
            error = NothingMoves(f"{name}: its threads wait for one another for ever, and run() for {waiting}")
            self.fail(request, error)

    def _finish(self, request: Request, fate: str) -> None:
        self._conclude(request, fate)
        self._remove(request)

    def _conclude(self, request: Request, fate: str) -> None:
        """Its answer, as it stands."""
        call = self.calls[request]
        for thread in request.threads[1:]:
            request.end(thread, "discarded" if fate == "finished" else "killed")
        request.finished, request.trunk.fate = True, fate
        request.narrator.tell_rest(request.trunk)
        more = {**call.peaks.as_metrics(), "cached_tokens": request.cached_tokens}
        result = build_result(request, self._info(request), more)
        for thread in request.threads:
            thread.kv.leave(self.cache)
        request.release()
        call.results[request.index] = result
        if request.narrator.emit:
            request.narrator.emit(events.Finish(request.index, result))

    def _info(self, request: Request) -> dict[str, Any]:
        model = self.engine.model
        return {
            "model": getattr(model.config, "_name_or_path", "") or type(model).__name__,
            "config": dict(request.samplers.settings),
        }

    # ---------------------------------------------------------------------------------------- other ends

    def _end_what_is_over(self) -> None:
        """End calls that were aborted, or are too late."""
        if not self._to_end:
            return
        with self._door:
            calls = dict.fromkeys(self.calls.values())
        self._to_end = any(call.deadline is not None for call in calls)
        try:
            for call in calls:
                self._end_if_over(call)
        except BaseException:
            self._to_end = True  # the rest, the next time
            raise

    def _end_if_over(self, call: Call) -> None:
        late = call.deadline is not None and time.monotonic() >= call.deadline
        if call.dropped:
            for request in list(call.left):
                self._drop(request)
        elif call.aborted or late:
            for request in list(call.left):
                with Touching(self, request):
                    self._conclude(request, "killed")
            if not call.aborted and call.error is None:
                call.error = DeadlineExceeded(
                    "deadline: it passed before the answer was complete; give more time, a smaller "
                    "max_new_tokens or a higher priority (the error's results hold what there was so far)",
                    call.outcome(),
                )
            for request in list(call.left):
                self._remove(request)

    def fail(self, request: Request, error: BaseException) -> None:
        """End a request's call with an error."""
        call = self.calls.get(request)
        if call is None:
            return  # it has ended meanwhile
        if not isinstance(error, Exception):
            error = RuntimeError(f"interrupted by {type(error).__name__} in the middle of a step")
        call.error = call.error or error
        for other in list(call.left):
            self._drop(other)

    def _drop(self, request: Request) -> None:
        try:
            request.release()
        except Exception as error:  # its strategy has something to say to being ended: all pages are free by then
            call = self.calls[request]
            call.error = call.error or error
        self._remove(request)

    def _remove(self, request: Request) -> None:
        with self._door:
            call = self.calls.pop(request)
            for those in (self.active, self.waiting):
                if request in those:
                    those.remove(request)
        del call.left[request]
        if call.ended:
            call.tell()
