"""Mistakes in the engine: joins, cuts, the clock, seeds, pre-emption."""

from __future__ import annotations

from run import Mutant

ENGINE = "python/anabranch/engine/"
ORDER = "tests/engine/test_engine_order.py"
BOTH = "tests/engine/test_engine_order.py tests/engine/test_naive_engine.py"
NEAR = "tests/engine/test_engine_order.py tests/engine/test_engine.py tests/engine/test_engine_limits.py"

MUTANTS = [
    Mutant(
        "re-prefill adopts the first child though the trunk has gone on", f"{ENGINE}joins.py",
        'if op.kids[0].role == "fork" and continues(thread, op.kids[0]) and op.headers[0] is None:',
        'if op.kids[0].role == "fork" and op.headers[0] is None:', ORDER,
    ),
    Mutant(
        "a child is not pinned while its parent is cut", f"{ENGINE}joins.py",
        "child._live.severed = child._live.pinned = True", "child._live.severed = True", ORDER,
    ),
    Mutant(
        "a parent that wrote anew is taken for unchanged", f"{ENGINE}joins.py",
        "return thread.length == len(kid._prefix) and not kid._live.severed",
        "return thread.length == len(kid._prefix)", ORDER,
    ),
    Mutant(
        "an op does not wait for its issue time", f"{ENGINE}request.py",
        "        thread._depth = max(thread._depth, op.issued)\n        thread._ops.popleft()",
        "        thread._ops.popleft()", ORDER,
    ),
    Mutant(
        "a decode does not wait for its issue time", f"{ENGINE}request.py",
        "[-8:])[-8:])\n            thread._depth = max(thread._depth, op.issued)", "[-8:])[-8:])", BOTH,
    ),
    Mutant(
        "a join takes the last child's depth", f"{ENGINE}joins.py",
        "thread._depth = max(thread._depth, kid._depth)", "thread._depth = kid._depth", ORDER,
    ),
    Mutant(
        "a kill is not waited for", f"{ENGINE}request.py",
        "            return\n        thread._depth = max(thread._depth, self.clock())\n", "            return\n", ORDER,
    ),
    Mutant(
        "until() asks at time 0", f"{ENGINE}request.py", "return self._asked._depth", "return 0", ORDER,
    ),
    Mutant(
        "a seed by order of birth", f"{ENGINE}request.py",
        "random_stream(self.seed, path)", "random_stream(self.seed, (len(self.threads),))", ORDER,
    ),
    Mutant(
        "pre-emption takes the worst victim", f"{ENGINE}loop.py",
        "if best_key is None or key > best_key:", "if best_key is None or key < best_key:", ORDER,
    ),
    Mutant(
        "a killed child stays in a join that waits", f"{ENGINE}request.py",
        "if isinstance(op, Join) and thread in op.kids:", "if False:", ORDER,
    ),
    Mutant(
        "until() that kills its own thread", f"{ENGINE}request.py",
        "if reason is not None and not op.done:", "if reason is not None:", ORDER,
    ),
    Mutant(
        "until() that kills another of the same step", f"{ENGINE}loop.py",
        "                if not thread.alive:\n                    continue\n", "", ORDER,
    ),
    Mutant(
        "positions go on from the last segment", f"{ENGINE}thread_state.py",
        "max([thread._start, *(max(positions(s)) + 1 for s in thread._segments)])",
        "max(positions(thread._segments[-1])) + 1 if thread._segments else thread._start", ORDER,
    ),
    Mutant(
        "positions of a joined child counted on from its first", f"{ENGINE}thread_state.py",
        "    if segment.spliced is None:\n        return range", "    if True:\n        return range", BOTH,
    ),
    Mutant(
        "an empty child moves the position", f"{ENGINE}joins.py",
        "            thread._own.extend(kid._own)\n            thread._position = max(",
        "            thread._own.extend(kid._own)\n        thread._position = max(", ORDER,
    ),
    Mutant(
        "a cut header keeps its length", f"{ENGINE}thread_state.py",
        "    thread._header_length = min(thread._header_length, len(thread._own))\n", "", ORDER,
    ),
    Mutant(
        "a whole thread is given a step of its own", f"{ENGINE}loop.py",
        "if w not in stuck and not w.in_cache]", "if w not in stuck]", BOTH,
    ),
    Mutant(
        "a join forgets what a child sampled", f"{ENGINE}joins.py",
        "        thread._path_sampled = max(thread._path_sampled, kid._path_sampled)\n", "", BOTH,
    ),
    Mutant(
        "a fresh thread's limit begins anew", f"{ENGINE}request.py",
        "thread._depth, thread._path_sampled = self.clock(), parent._path_sampled",
        "thread._depth = self.clock()", BOTH,
    ),
    Mutant(
        "a fresh thread begins at time 0", f"{ENGINE}request.py",
        "thread._depth, thread._path_sampled = self.clock(), parent._path_sampled",
        "thread._path_sampled = parent._path_sampled", BOTH,
    ),
    Mutant(
        "a prompt of a fresh thread is on the critical path", f"{ENGINE}request.py",
        "            thread._depth = depth  # a fresh thread's", "            pass  # a fresh thread's", BOTH,
    ),
    Mutant(
        "a header that is replaced stays", f"{ENGINE}joins.py",
        "own = header + own[kid._header_length :]", "own = header + own", BOTH,
    ),
    Mutant(
        "a summary keeps one token more", f"{ENGINE}joins.py",
        'truncate(request.cache, thread, op.keep, f"join: keep={op.keep}")',
        'truncate(request.cache, thread, min(op.keep + 1, thread.length), "")', BOTH,
    ),
    Mutant(
        "children of a joined child live on", f"{ENGINE}joins.py",
        '            request.kill(child, "killed")', "            pass", BOTH,
    ),
    Mutant(
        "an EOS before a stop id", f"{ENGINE}request.py",
        "        if token in op.stop_ids:\n", "        if token in op.stop_ids - sampler.eos_ids:\n", BOTH,
    ),
    Mutant(
        "fresh threads of several turns are one block", f"{ENGINE}request.py",
        "if parent._spawned_at == self.tasks.turn:", "if parent._spawned_at >= 0:", BOTH,
    ),
    Mutant(
        "a donor's prompt is taken whole", f"{ENGINE}thread_state.py",
        "shared = min(len(mine), len(theirs)) if same is None else same", "shared = min(len(mine), len(theirs))", BOTH,
    ),
    Mutant(
        "a fork opened late holds what its parent wrote since", f"{ENGINE}thread_state.py",
        "                cache.truncate(self.branch, len(thread._prefix))", "                pass", NEAR,
    ),
    Mutant(
        "scores outlive a cut", f"{ENGINE}joins.py", "    live.scores = None\n", "", BOTH,
        equivalent="a cut thread is shorter than its scores were made for (scores_at), and they are written anew",
    ),
]  # fmt: skip
