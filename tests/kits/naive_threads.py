"""The naive engine's threads: what a strategy asks of them is queued here, and done in naive_engine.py.

The same methods as `anabranch.strategies.api.thread.Thread`, written from their documentation alone.
"""

from __future__ import annotations

from collections import deque
from math import inf

import numpy as np

from anabranch.strategies.api.awaitable import ThreadGone


class Later:
    """Something to wait for; `at`: the event at which it was done, `order`: how many others were done before."""

    def __init__(self):
        self.done, self.value, self.at, self.order = False, None, 0, inf

    def finish(self, run, value, at):
        if not self.done:
            self.done, self.value, self.at, self.order = True, value, at, run.tick()


class Op(Later):
    def __init__(self, thread, do, **data):
        super().__init__()
        self.thread, self.do, self.token_ids = thread, do, []
        self.__dict__.update(data)
        self.issued = thread._run.now
        thread._queue.append(self)

    @property
    def text(self):
        return self.thread._run.text(self.token_ids)


class Thread:
    """What a strategy asks things of; see `anabranch.strategies.api.thread.Thread`."""

    def __init__(self, run, parent, path, role):
        self._run, self.parent, self.path, self.role = run, parent, path, role
        self.id, self.alive, self.ended, self.fate = ".".join(map(str, path)), True, None, None
        self._queue, self._waiting, self._next_child, self._born = deque(), [], 0, role != "fork"
        self._context, self._labels, self._forgotten = [], [], []  # labels: of its own tokens, (kind, source, header)
        self._parent_length = 0  # when it came to be
        # Of a thread that sees others while they write, or is seen: the turn in which each own token was computed, as
        # far as that has been; (own token from which on, whom, of the same turn) of each `see`; the event at its turn.
        self._turns, self._views, self._turn_at = None, [], 0
        self._shared = self._forked = self._prompt = self._position = self._start = self._sampled = self._at = 0
        self._blocks, self._turn, self._written = [], None, []  # written: ids that were sampled or given
        stream = np.random.SeedSequence(entropy=run.seed, spawn_key=path)
        self._stream = np.random.Generator(np.random.PCG64(stream))
        run.threads.append(self)

    length = property(lambda self: len(self._context))
    _own = property(lambda self: self._context[self._shared :])
    context = property(lambda self: tuple(self._run.ids[i] for i in self._context))
    token_ids = property(lambda self: self.context[self._shared + self._prompt :])
    text = property(lambda self: self._run.text(self.token_ids))
    prompt = property(lambda self: self._run.prompt)

    def _child(self, role):
        self._next_child += 1
        return Thread(self._run, self, (*self.path, self._next_child - 1), role)

    def _tokens(self, value):
        return self._run.encode(value) if isinstance(value, str) else list(value)

    def _op(self, do, **data):
        if not self.alive:
            raise ThreadGone(do)
        return Op(self, do, **data)

    def decode(self, max_new_tokens=None, *, stop=(), sampling=None, until=None, stats=False):
        stops = [stop] if isinstance(stop, (str, int)) else list(stop)
        assert not stats, "not by this engine"
        return self._op("decode", most=max_new_tokens, stops=stops, sampling=sampling or {}, until=until, limit=None)

    def insert(self, text_or_ids):
        return self._op("insert", ids=self._tokens(text_or_ids), kind="inserted", header=False)

    def score(self, text_or_ids):
        return self._op("score", ids=self._tokens(text_or_ids))

    def fork(self, headers, *, sees=()):
        heads = [None] * headers if isinstance(headers, int) else list(headers)
        kids = [self._child("fork") for _ in heads]
        self._op("fork", kids=list(kids), sees=[s if isinstance(s, tuple) else (s, None) for s in sees])
        for kid, head in zip(kids, heads, strict=True):
            if head:
                kid._op("insert", ids=self._tokens(head), kind="inserted", header=True)
        return kids

    def see(self, others, *, same_step="all"):
        self._run.see(self, [others] if isinstance(others, Thread) else list(others), same_step)

    def spawn(self, prompt):
        kid = self._child("fresh")
        kid._at, kid._sampled, kid._parent_length = self._run.now, self._sampled, self.length
        if self._turn != self._run.turn:  # fresh threads of one turn of the strategy are one block
            self._blocks.append([])
            self._turn = self._run.turn
        self._blocks[-1].append(kid)
        kid._op("insert", ids=self._tokens(prompt), kind="prompt", header=False)
        return kid

    def join(self, kids, mode="concat", *, text=None, keep=None, headers=None):
        kids = [kids] if isinstance(kids, Thread) else list(kids)
        if not all(kid.alive for kid in kids):
            raise ThreadGone("join")
        heads = [None if h is None else self._tokens(h) for h in headers or [None] * len(kids)]
        op = self._op("join", kids=kids, mode=mode, ids=self._tokens(text or []), keep=keep, headers=heads)
        if mode == "discard":
            self._queue.remove(op)
            for kid in kids:
                self._run.kill(kid, "discarded")
            op.finish(self._run, None, op.issued)
        return op

    def truncate(self, length):
        return self._op("truncate", length=length)

    def rstrip(self):
        blank = 0
        while blank < len(self._labels) and self._labels[-1 - blank][0] == "sampled":
            token = self._run.ids[self._context[-1 - blank]]
            if token not in self._run.eos and (self._run.pieces is None or self._run.pieces[token].strip()):
                break
            blank += 1
        return self.truncate(self.length - blank)

    def kill(self):
        self._run.kill(self, "killed")

    def start(self, generator):
        return self._run.start(generator, self._run.now)

    def malformed(self, why):
        self._run.malformed.append(f"thread {self.id}: {why}")
