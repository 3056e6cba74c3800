"""A second engine, as plain as can be: what the strategy protocol means, with no cache, no pages, no packing.

Threads (naive_threads.py) run one after another, in the order of `Sequential`. A thread is a list of numbers into one
record of all tokens that were ever written; each token knows its position and all that it saw. One eager forward over
the whole record, under the mask that this gives, is what the model says of every token. Time is an account of events,
each after some others; the critical path is the longest way through it.

With `follow` (a `Result` of the real engine), sampled tokens are taken from there, and `check` then compares each with
the model's scores: so two tokens with almost equal scores, which rounding may tell apart either way, are no difference.
"""

from __future__ import annotations

from collections import deque
from inspect import isgenerator
from itertools import takewhile
from math import inf

import torch
from naive_threads import Later, Thread

from anabranch.strategies import first
from anabranch.strategies.api.awaitable import ThreadGone
from anabranch.strategies.api.ops import Ended

COMBINED, FIRST = type(first(None)), first(None).kind


class Run:
    """One prompt's answer; `main`, `trunk`, `threads` and the record of tokens are there when it is made."""

    def __init__(self, model, prompt, strategy, seed=0, *, pieces=None, eos=(), max_new_tokens=256, follow=None,
                 max_total_tokens=None, do_sample=False, draws=True):  # fmt: skip
        self.model, self.prompt, self.seed, self.pieces, self.eos = model, prompt, seed, pieces, set(eos)
        self.most, self.budget, self.do_sample = max_new_tokens, max_total_tokens or inf, do_sample
        self.draws = draws  # False: who is followed draws by streams of its own, so any token may be drawn
        self.ids, self.positions, self.sees = [], [], []  # the record: of each token
        self.chosen, self.scored = [], []  # (token's number, whose scores, uniform, temperature); (number, whose)
        self.events = [(0, ())]  # (tokens, numbers of the events that it had to wait for)
        self.now = self.turn = self.ticks = self.sampled = self.inserted = self.in_trunk = self.seen = (
            self.longest_context
        ) = 0
        self.threads, self.tasks, self.malformed = [], [], []
        self.live, self.live_turn = [], 0  # threads that see one another advance in turns, together
        self.following = None
        if follow is not None:
            logs = {
                node.id: [t for a in node.log if a.do == "sample" for t in a.token_ids] for node in follow.tree.walk()
            }
            self.following = {name: deque(tokens) for name, tokens in logs.items()}
        self.trunk = Thread(self, None, (0,), "trunk")
        self.write(self.trunk, list(prompt), "prompt")
        self.trunk._prompt, self.trunk._at, self.trunk._written = len(prompt), 0, []
        self.main = self.start(strategy.run(self.trunk), 0)
        while self.step() or not (self.main.done and not self.trunk._queue):
            pass
        ends = self.main.at, self.trunk._at
        for thread in self.threads[1:]:
            self.kill(thread, "discarded")
        self.trunk.fate = "finished"
        self.critical = self.sampled + self.inserted if getattr(strategy, "sequential", False) else self.longest(ends)

    # -------------------------------------------------------------------------------------------- records

    def tick(self):
        self.ticks += 1
        return self.ticks

    def event(self, *after, tokens=0):
        self.events.append((tokens, after))
        return len(self.events) - 1

    def longest(self, ends):
        """The most tokens on a way that leads to one of some events."""
        most = []
        for tokens, after in self.events:
            most.append(tokens + max((most[i] for i in after), default=0))
        return max(most[end] for end in ends)

    def text(self, ids):
        ids = list(ids)
        while ids and ids[-1] in self.eos:
            ids.pop()
        return None if self.pieces is None else "".join(self.pieces[i] for i in ids)

    def encode(self, text):
        return [self.pieces.index(c) for c in text]

    def write(self, thread, ids, kind, source=None, header=False):
        for token in ids:
            thread._context.append(len(self.ids))
            thread._labels.append((kind, source, header))
            self.ids.append(token)
            self.positions.append(thread._position)
            self.sees.append(tuple(thread._context) if thread._turns is None else None)  # None: until its turn
            thread._position += 1
        thread._written += ids if kind != "joined" else []
        self.longest_context = max(self.longest_context, thread.length)
        counted = len(ids) if kind in ("sampled", "inserted") else 0
        self.sampled += len(ids) * (kind == "sampled")
        self.inserted += len(ids) * (kind == "inserted")
        self.in_trunk += counted * (thread is self.trunk)
        thread._at = self.event(thread._at, tokens=counted)

    def logits(self):
        size = len(self.ids)
        mask = torch.full((size, size), torch.finfo(torch.float32).min)
        for row, seen in enumerate(self.sees):
            mask[row, list(seen or ())] = 0  # (nobody looks at what a live thread wrote and never computed)
        ids, positions = torch.tensor([self.ids]), torch.tensor([self.positions])
        with torch.inference_mode():
            return self.model(input_ids=ids, position_ids=positions, attention_mask=mask[None, None]).logits[0].float()

    def before(self, thread):
        """Whose scores are a thread's next token's: of the last token, when it saw all of the context."""
        last = thread._context[-1]
        if thread._turns is None and self.sees[last] != tuple(thread._context):
            raise ValueError(f"thread {thread.id} has nothing to go on from")
        return last

    def allowed(self, row, token, uniform, temperature, tolerance):
        """Whether scores `row` give `token` by the rules, give or take some rounding."""
        if uniform is None:
            return bool(row[token] >= row.max() - tolerance)
        if not self.draws:
            return True
        cdf = torch.softmax(row / temperature, -1).double().cumsum(-1)
        return bool((cdf[token - 1] if token else 0.0) - tolerance <= uniform <= cdf[token] + tolerance)

    def check(self, tolerance=1e-4):
        """Compare every sampled token with the model's scores; log-probabilities of those and of what was scored."""
        logits = self.logits()
        logprobs = logits.log_softmax(-1)
        for at, last, uniform, temperature in self.chosen:
            assert self.allowed(logits[last], self.ids[at], uniform, temperature, tolerance), (at, self.ids[at])
        assert self.following is None or not any(self.following.values()), "the engine sampled more"
        pairs = [(at, last) for at, last, *_ in self.chosen] + self.scored
        return {at: float(logprobs[last, self.ids[at]]) for at, last in pairs}

    # -------------------------------------------------------------------------------------------- tasks

    def start(self, generator, at):
        task = Later()
        task.generator, task.at, task.wait = generator, at, None
        task.beside = bool(self.tasks)
        self.tasks.append(task)
        return task

    def awaited(self, item):
        """What was yielded, as a list of parts to wait for, or one."""
        if isinstance(item, Thread):
            wait = Later()
            if item._queue and item.alive:
                item._waiting.append(wait)
                wait.thread = item
            else:
                wait.finish(self, item, item._at)
            return wait
        if isinstance(item, COMBINED):
            parts = [self.awaited(i) for i in item.items]
            return (FIRST, parts) if item.kind is FIRST else (None, parts)
        if isinstance(item, (list, tuple)):
            return (None, [self.awaited(i) for i in item])
        return self.start(item, self.now) if isgenerator(item) else item

    def outcome(self, wait):
        """(value, event, order) of what was waited for; None while it is not done."""
        if isinstance(wait, Later):
            return (wait.value, wait.at, wait.order) if wait.done else None
        kind, parts = wait
        found = [self.outcome(part) for part in parts]
        if kind is FIRST:
            done = [(order, i, value, at) for i, f in enumerate(found) if f for value, at, order in [f]]
            return next(((i, value), at, order) for order, i, value, at in [min(done)]) if done else None
        if None in found:
            return None
        orders = [order for _, _, order in found]
        return [value for value, _, _ in found], self.event(0, *(at for _, at, _ in found)), max(orders, default=0)

    def resume(self):
        """Resume one generator that can go on; whether there was one."""
        for task in self.tasks:
            found = None if task.done else (None, task.at, 0) if task.wait is None else self.outcome(task.wait)
            if found is None:
                continue
            self.turn += 1
            task.at = self.now = self.event(task.at, found[1])
            try:
                task.wait = self.awaited(task.generator.send(found[0]))
            except StopIteration as stop:
                task.finish(self, stop.value, task.at)
            except ThreadGone:
                if not task.beside:
                    raise
                task.finish(self, None, task.at)
            return True
        return False

    # -------------------------------------------------------------------------------------------- the queues

    def step(self):
        """Whatever needs no token, then one token for the first thread in order; whether anything happened."""
        moved = False
        while self.resume() or any([self.settle(thread) for thread in list(self.threads)]):
            moved = True
        line = [t for t in self.threads if t._queue and t._born and t._queue[0].do == "decode"]
        later = [t for t in line if t._turns is not None and self.sees[t._context[-1]] is None]
        line = [t for t in line if t not in later]
        if later and not line:
            self.take_turn()
            return True
        if not line or (self.main.done and not self.trunk._queue):
            assert moved or self.main.done, "nothing is left to do, but the strategy still waits"
            return moved
        chosen = min(line, key=lambda t: (*t.path, inf))
        for thread in [chosen] if chosen._turns is None else [t for t in line if t._turns is not None]:
            if thread.alive:
                self.token(thread)  # of those that advance together, all
        return True

    def waits(self, op):
        if op.do == "fork":
            return any(not s._born or (s._queue if n is None else len(s._own) < n) for s, n in op.sees)
        return op.do == "join" and any(kid._queue or not kid._born for kid in op.kids if kid.alive)

    def next(self, thread):
        """The op that a thread may do now: the first, or a fork right behind forks that wait for what they see."""
        forks = takewhile(lambda op: op.do == "fork", thread._queue)
        return next((op for op in forks if not self.waits(op)), thread._queue[0])

    def settle(self, thread):
        """Do the first op of a thread's queue unless it needs a token or other threads first; whether it was done."""
        if not thread._queue or not thread._born or self.waits(op := self.next(thread)):
            return False
        if op.do != "decode" or op.limit is None:
            thread._at = self.event(thread._at, op.issued)
        if op.do == "decode":
            if op.limit is None:
                left = self.most - thread._sampled
                op.limit = left if op.most is None else min(left, op.most)
            if op.limit > 0 and self.sampled < self.budget:
                return False
            self.end(op, "length" if op.limit <= 0 else "budget")
            return True
        getattr(self, f"do_{op.do}")(thread, op)
        thread._queue.remove(op)
        op.finish(self, op.value, thread._at)
        self.drained(thread)
        return True

    def drained(self, thread):
        if not thread._queue:
            for wait in thread._waiting:
                wait.finish(self, thread, thread._at)
            thread._waiting = []

    def end(self, op, reason, stop=None):
        op.thread._queue.popleft()
        op.thread.ended = Ended(reason, tuple(op.token_ids), op.text, stop)
        op.finish(self, op.thread.ended, op.thread._at)
        self.drained(op.thread)

    def token(self, thread):
        op, last, token = thread._queue[0], self.before(thread), None
        options = {"do_sample": self.do_sample, "temperature": 1.0} | op.sampling
        uniform = thread._stream.random() if options["do_sample"] else None
        if self.following is not None:
            assert self.following.get(thread.id), f"the engine sampled less in thread {thread.id}"
            token = self.following[thread.id].popleft()
        else:
            row = self.logits()[last]
            if uniform is None:
                token = int(row.argmax())
            else:
                cdf = torch.softmax(row / options["temperature"], -1).double().cumsum(-1)
                token = int((cdf <= uniform * cdf[-1]).sum())
        self.chosen.append((len(self.ids), last, uniform, options["temperature"]))
        self.write(thread, [token], "sampled")
        thread._sampled += 1
        self.seen = max(self.seen, thread.length)
        op.token_ids.append(token)
        whole = "" if self.pieces is None else "".join(self.pieces[i] for i in op.token_ids)
        self.now = thread._at  # of what an until() may ask for
        found = next((s for s in op.stops if isinstance(s, str) and s in whole), None)
        if token in [s for s in op.stops if isinstance(s, int)]:
            self.end(op, "stop", token)
        elif token in self.eos:
            self.end(op, "eos")
        elif found is not None:
            self.end(op, "stop", found)
        elif op.until is not None and op.until(op) and not op.done:
            self.end(op, "until")
        elif not op.done and len(op.token_ids) >= op.limit:
            self.end(op, "length")
        elif not op.done and self.sampled >= self.budget:
            self.end(op, "budget")

    # -------------------------------------------------------------------------------------------- live sharing

    def see(self, thread, others, same_step):
        for one in (thread, *others):
            if one._turns is None:
                one._turns, one._turn_at = [0] * len(one._own), one._at
                self.live.append(one)
        thread._views.append((len(thread._turns), others, same_step))

    def take_turn(self):
        """Each computes what it has written since the last turn, and sees what its view shows by then."""
        self.live_turn += 1
        members = [t for t in self.live if t.alive and t._born]
        before, new = {t: t._at for t in members}, {t: range(len(t._turns), len(t._own)) for t in members}
        for thread in members:
            thread._turns += [self.live_turn] * len(new[thread])
        for thread in members:
            for n in new[thread]:
                seen = dict.fromkeys(thread._context[: thread._shared + n + 1])
                for other, last in self.in_view(thread, n):
                    own = other._own
                    seen |= dict.fromkeys(own[i] for i, turn in enumerate(other._turns) if turn <= last)
                self.sees[thread._own[n]] = tuple(seen)
            if new[thread]:
                for other, last in self.in_view(thread, new[thread][-1]):
                    at = before[other] if last == self.live_turn else other._turn_at
                    thread._at = self.event(thread._at, at)
        for thread, at in before.items():
            thread._turn_at = at

    def in_view(self, thread, number):
        """Whom an own token of this turn sees, and up to which turn."""
        view = next((view for view in reversed(thread._views) if view[0] <= number), (0, (), "none"))
        for other in view[1]:
            if other.alive and other._born:
                same = view[2] == "all" or (view[2] == "before" and other.path < thread.path)
                yield other, self.live_turn if same else self.live_turn - 1

    # -------------------------------------------------------------------------------------------- each op

    def do_insert(self, thread, op):
        self.write(thread, op.ids, op.kind, header=op.header)
        if op.kind == "prompt":
            thread._prompt = len(op.ids)

    def do_score(self, thread, op):
        for token in op.ids:
            self.scored.append((len(self.ids), self.before(thread)))
            self.write(thread, [token], "inserted")
        op.value = [at for at, _ in self.scored[len(self.scored) - len(op.ids) :]]
        if op.ids:
            self.seen = max(self.seen, thread.length - 1)  # what the last one leads to need not be known

    def do_fork(self, thread, op):
        at = len(thread._blocks)
        while op.sees and at and (last := thread._blocks[at - 1][0])._parent_length == thread.length:
            if last.path < op.kids[0].path:
                break
            at -= 1  # asked for later, and done before
        thread._blocks.insert(at, op.kids)
        thread._turn, op.value = None, op.kids
        seen = [number for other, n in op.sees for number in other._own[:n]]
        others = [other for other, _ in op.sees]
        for kid in op.kids:
            kid._context, kid._forked = [*thread._context, *seen], thread.length
            kid._shared, kid._parent_length = kid.length, thread.length
            kid._position = kid._start = max(thread._position, *(self.positions[i] + 1 for i in seen), 0)
            kid._at = self.event(thread._at, *(other._at for other in others)) if others else thread._at
            kid._sampled, kid._born = max([thread._sampled, *(other._sampled for other in others)]), True

    def do_truncate(self, thread, op):
        self.cut(thread, op.length)

    def do_join(self, thread, op):
        pairs = [(kid, header) for kid, header in zip(op.kids, op.headers, strict=True) if kid.alive]
        thread._at = self.event(thread._at, *(kid._at for kid in op.kids))
        thread._sampled = max([thread._sampled, *(kid._sampled for kid, _ in pairs)])
        if op.keep is not None:
            self.cut(thread, op.keep)
        for i, (kid, header) in enumerate(pairs):
            for block in kid._blocks:
                for child in block:
                    self.kill(child, "killed")
            own, labels = kid._context[kid._shared + kid._prompt :], kid._labels[kid._prompt :]
            follows = kid.role == "fork" and thread._context == kid._context[: kid._shared]
            follows = follows and thread._turns is None and kid._turns is None
            if op.mode == "concat" or (op.mode == "reprefill" and i == 0 and follows and header is None):
                thread._context += own
                self.longest_context = max(self.longest_context, thread.length)
                thread._labels += [("joined", kid.id, False)] * len(own)
                thread._position = max(thread._position, *(self.positions[i] + 1 for i in own), 0)
            elif op.mode == "reprefill":
                kept = [self.ids[i] for i, label in zip(own, labels, strict=True) if header is None or not label[2]]
                self.write(thread, [*(header or []), *kept], "joined", kid.id)
            self.leave(kid, "joined")
        self.write(thread, op.ids, "inserted")

    def cut(self, thread, length):
        least = thread._shared + thread._prompt
        if not least <= length <= thread.length:
            raise ValueError(f"truncate: {length} of thread {thread.id}")
        for at, label in zip(thread._context[length:], thread._labels[length - thread._shared :], strict=True):
            thread._forgotten.append((*label[:2], at))
        if length < thread.length:
            del thread._context[length:], thread._labels[length - thread._shared :]
            own = thread._context[thread._shared :]
            thread._position = max(thread._start, *(self.positions[i] + 1 for i in own), 0)

    def kill(self, thread, fate):
        if not thread.alive:
            return
        thread._at = self.event(thread._at, self.now)
        for op in thread.parent._queue if thread.parent is not None else ():
            if op.do == "fork" and any(other is thread for other, _ in op.sees):  # does without it, from now on
                op.sees = [(other, n) for other, n in op.sees if other is not thread]
                op.issued = self.event(op.issued, thread._at)
        for kid in [kid for block in thread._blocks for kid in block]:
            self.kill(kid, fate)
        queue, thread._queue = list(thread._queue), deque()
        for op in queue:
            if op.do == "decode":
                thread.ended = op.value = Ended("killed", tuple(op.token_ids), op.text)
            for kid in op.kids if op.do == "fork" else ():
                self.kill(kid, fate)
            op.finish(self, op.value, thread._at)
        self.leave(thread, fate)

    def leave(self, thread, fate):
        thread.alive, thread.fate = False, fate
        self.drained(thread)
