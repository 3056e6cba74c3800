"""Mistakes in the engine: joins, cuts, the clock, seeds, pre-emption."""

from __future__ import annotations

from entry import Mutant

ENGINE = "python/anabranch/engine/"
THREADS = "python/anabranch/threads/"
ORDER = "tests/engine/test_engine_order.py"
ROOM = "tests/engine/test_preemption_order.py"
BOTH = "tests/engine/test_engine_order.py tests/engine/test_naive_engine.py"
ASIDE = "tests/engine/test_sharing.py::test_what_cannot_be_computed_again_makes_room_and_comes_back"
SHORT = "tests/engine/test_short_of_pages.py"
LIVE_ORDER = "tests/engine/test_sharing.py::test_live_threads_enter_in_the_order_of_all"
EARLIER = "tests/engine/test_sharing.py::test_no_live_thread_enters_before_one_of_an_earlier_request"
NEAR = "tests/engine/test_engine_order.py tests/engine/test_engine.py tests/engine/test_engine_limits.py"

MUTANTS = [
    Mutant(
        "re-prefill adopts the first child though the trunk has gone on", f"{THREADS}joins/reprefill.py",
        "if same and _spliceable(thread, children[0]) and thread.goes_on_as(children[0]) and op.headers[0] is None:",
        "if same and _spliceable(thread, children[0]) and op.headers[0] is None:", ORDER,
    ),
    Mutant(
        "a child is not put aside after its parent was cut", f"{ENGINE}request.py",
        "            child.kv.fixed = True  # what it shares", "            pass  # what it shares", ORDER,
    ),
    Mutant(
        "a parent that wrote anew is taken for unchanged", f"{THREADS}state.py",
        "return self.length == len(child.prefix) and not child.severed and not child.seen",
        "return self.length == len(child.prefix) and not child.seen", ORDER,
    ),
    Mutant(
        "an op does not wait for its issue time", f"{THREADS}ops/base.py",
        "        thread.reach(op.issued)\n        thread.queue.remove(op)",
        "        thread.queue.popleft()", ORDER,
    ),
    Mutant(
        "a decode does not wait for its issue time", f"{THREADS}ops/decode.py",
        "            thread.reach(op.issued)\n", "", ORDER,
    ),
    Mutant(
        "a join takes the last child's depth", f"{THREADS}ops/join.py",
        "thread.reach(child.clock)", "thread.clock = child.clock", ORDER,
    ),
    Mutant(
        "a kill is not waited for", f"{THREADS}books.py",
        "        thread.reach(self.clock())\n", "", ORDER,
    ),
    Mutant(
        "until() asks at time 0", f"{THREADS}books.py", "return self._asked.clock", "return 0", ORDER,
    ),
    Mutant(
        "a seed by order of birth", f"{ENGINE}request.py",
        "random_stream(self.seed, path)", "random_stream(self.seed, (len(self.threads),))", ORDER,
    ),
    Mutant(
        "pre-emption takes the worst victim", f"{ENGINE}scheduler.py",
        "if best_key is None or key > best_key:", "if best_key is None or key < best_key:", ORDER,
    ),
    Mutant(
        "a killed child stays in a join that waits", f"{THREADS}books.py",
        "if (isinstance(op, JoinOp) and thread.handle in op.children) or (", "if (", ORDER,
    ),
    Mutant(
        "until() that kills its own thread", f"{THREADS}ops/decode.py",
        "if reason is not None and not op.done:", "if reason is not None:", ORDER,
    ),
    Mutant(
        "until() that kills another of the same step", f"{ENGINE}stepper.py",
        "if not thread.alive or thread.request not in self.loop.calls:",
        "if thread.request not in self.loop.calls:", ORDER,
    ),
    Mutant(
        "positions go on from the last segment", f"{THREADS}state.py",
        "max([self.start, *(max(s.positions()) + 1 for s in self.segments)])",
        "max(self.segments[-1].positions()) + 1 if self.segments else self.start", ORDER,
    ),
    Mutant(
        "positions of a joined child counted on from its first", f"{THREADS}state.py",
        "        if self.spliced is None:\n            return range",
        "        if True:\n            return range", BOTH,
    ),
    Mutant(
        "an empty child moves the position", f"{THREADS}state.py",
        "            self.own.extend(child.own)\n            self.position = max(",
        "            self.own.extend(child.own)\n        self.position = max(", ORDER,
    ),
    Mutant(
        "a cut header keeps its length", f"{THREADS}state.py",
        "        self.header_length = min(self.header_length, len(self.own))\n", "", ORDER,
    ),
    Mutant(
        "a whole thread is given a step of its own", f"{ENGINE}scheduler.py",
        "for s in stuck) and not w.in_cache]", "for s in stuck)]", ROOM,
    ),
    Mutant(
        "pages are too few though one that came back without a row goes on", f"{ENGINE}scheduler.py",
        "if not others and any(w.in_cache for w in wanted):", "if False:", ROOM,
    ),
    Mutant(
        "a join forgets what a child sampled", f"{THREADS}ops/join.py",
        "            thread.path_sampled = max(thread.path_sampled, child.path_sampled)\n", "", BOTH,
    ),
    Mutant(
        "a fresh thread's limit begins anew", f"{THREADS}books.py",
        "thread.clock, thread.path_sampled = self.clock(), parent.path_sampled",
        "thread.clock = self.clock()", BOTH,
    ),
    Mutant(
        "a fresh thread begins at time 0", f"{THREADS}books.py",
        "thread.clock, thread.path_sampled = self.clock(), parent.path_sampled",
        "thread.path_sampled = parent.path_sampled",
        "tests/engine/test_engine_order.py::test_who_sees_a_spawned_thread_waits_until_that_came_to_be",
    ),
    Mutant(
        "a prompt of a fresh thread is on the critical path", f"{THREADS}books.py",
        "            thread.clock = clock  # a fresh thread's", "            pass  # a fresh thread's", BOTH,
    ),
    Mutant(
        "a header that is replaced stays", f"{THREADS}joins/reprefill.py",
        "own = header + own[child.header_length :]", "own = header + own", BOTH,
    ),
    Mutant(
        "a summary keeps one token more", f"{THREADS}joins/summary.py",
        'host.cut(thread, op.keep, f"join: keep={op.keep}")',
        'host.cut(thread, min(op.keep + 1, thread.length), "")', BOTH,
    ),
    Mutant(
        "children of a joined child live on", f"{THREADS}joins/common.py",
        '        host.end(child, "killed")', "        pass", BOTH,
    ),
    Mutant(
        "an EOS before a stop id", f"{THREADS}ops/decode.py",
        "    if token in op.stop_ids:\n", "    if token in op.stop_ids - sampler.eos_ids:\n",
        "tests/strategies/test_protocol.py::test_which_of_several_things_that_end_a_decode_at_once_is_named",
    ),
    Mutant(
        "fresh threads of several turns are one block", f"{THREADS}books.py",
        "if parent.spawned_at == self.tasks.turn:", "if parent.spawned_at >= 0:", BOTH,
    ),
    Mutant(
        "what was put aside stays there", f"{ENGINE}rebuild.py",
        "            self.cache.put_back(branch, aside, begin)", "            pass", ASIDE,
    ),
    Mutant(
        "what comes back shares what its parent has forgotten", f"{ENGINE}thread_kv.py",
        "return 0 if self.alone else min(thread.forked_at, self.shared)",
        "return 0 if self.alone else thread.forked_at",
        ASIDE,
    ),
    Mutant(
        "what comes back is all a branch's own", f"{ENGINE}rebuild.py",
        "            self.cache.share(self.kv.held, before)\n", "", ASIDE,
    ),
    Mutant(
        "scores of rows that only make room are taken", f"{ENGINE}logits.py",
        "if chunk.branch is not kv.branch or chunk.kept:", "if chunk.branch is not kv.branch:", ASIDE,
    ),
    Mutant(
        "what was cut comes back", f"{ENGINE}thread_kv.py",
        "            self.aside.cut(length)", "            pass", ASIDE,
    ),
    Mutant(
        "a cut on the way back loses what was shared", f"{ENGINE}thread_kv.py",
        "            self.make_room(cache)\n        elif", "            self.release(cache)\n        elif", ASIDE,
    ),
    Mutant(
        "a second chunk of what comes back begins with the first one's positions", f"{ENGINE}scheduler.py",
        "torch.tensor(chunk.positions[chunk.done : chunk.done + n], device", "torch.tensor(chunk.positions[:n], device",
        ASIDE,
    ),
    Mutant(
        "a donor's prompt is taken whole", f"{ENGINE}thread_kv.py",
        "shared = min(len(mine), len(theirs)) if same is None else same", "shared = min(len(mine), len(theirs))", BOTH,
    ),
    Mutant(
        "a fork opened late holds what its parent wrote since", f"{ENGINE}rebuild.py",
        "        cache.truncate(fork, length)", "        pass",
        "tests/engine/test_engine_order.py::"
        "test_a_fork_that_comes_back_begins_where_it_was_forked_though_its_parent_has_gone_on",
    ),
    Mutant(
        "logits outlive a cut", f"{ENGINE}request.py", "        kv.logits = None\n", "", BOTH,
        equivalent="a cut thread is shorter than its logits were made for (logits_at), and they are written anew",
    ),
    Mutant(
        "a sibling that a waiting thread sees counts as idle", f"{ENGINE}relations.py",
        "if kv.branch is None and kv.aside is None:\n            left +=", "if False:\n            left +=", SHORT,
    ),
    Mutant(
        "who cannot fit waits as long as others come", f"{ENGINE}scheduler.py",
        "if left and (self._only is not None or not spent):", "if left:", SHORT,
    ),
    Mutant(
        "live threads enter before older ones that wait outside", f"{ENGINE}scheduler.py",
        "(first_outside is not None and closed[0].thread.age > first_outside.thread.age)", "False", LIVE_ORDER,
    ),
    Mutant(
        "live threads that are to enter take the turn of those inside", f"{ENGINE}scheduler.py",
        "request in later and kv.branch is not None", "False", LIVE_ORDER,
    ),
    Mutant(
        "who is to enter with a single token does so before all others", f"{ENGINE}scheduler.py",
        "runs = {kv: pending[kv] > 1 or kv.branch is None for kv in wanted}",
        "runs = {kv: pending[kv] > 1 for kv in wanted}", EARLIER,
    ),
    Mutant(
        "what is computed once more counts as getting on", f"{ENGINE}stepper.py",
        "if chunk.branch is kv.branch and length > kv.reached:", "if True:", SHORT,
    ),
    Mutant(
        "requests in circles end at once", f"{ENGINE}loop.py",
        "if self._made_way or not self.scheduler.make_way():", "if True:", SHORT,
    ),
    Mutant(
        "requests in circles make way again and again", f"{ENGINE}loop.py",
        "if self._made_way or not self.scheduler.make_way():", "if not self.scheduler.make_way():", SHORT,
    ),
]  # fmt: skip
