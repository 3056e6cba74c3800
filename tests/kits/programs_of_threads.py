"""Strategies at random: what any of them may ask of the loop, in any order."""

from __future__ import annotations

import random
from dataclasses import dataclass

from anabranch.strategies import Strategy, first


@dataclass(frozen=True)
class Anything(Strategy):
    """A random program of forks, joins of every mode, truncations, kills and spawns."""

    program: int

    def work(self, thread, rng, depth):
        for _ in range(rng.randint(1, 3)):
            yield thread.decode(rng.randint(1, 5), sampling={"do_sample": rng.random() < 0.5})
            segments = thread.host.state(thread).segments
            if rng.random() < 0.2 and len(thread.token_ids) > 2 and not segments[-1].spliced:
                thread.truncate(thread.length - rng.randint(1, min(2, len(segments[-1].token_ids))))
                thread.insert([rng.randrange(200)])
            if depth < 2 and rng.random() < 0.7:
                if rng.random() < 0.2:
                    kid = thread.spawn([rng.randrange(200) for _ in range(3)])
                    yield self.work(kid, rng, 2)
                    yield thread.join(kid, "summary", text=[rng.randrange(200)])
                    continue
                kids = thread.fork(
                    [[rng.randrange(200) for _ in range(rng.randint(1, 3))] for _ in range(rng.randint(1, 4))]
                )
                seeds = [random.Random(rng.random()) for _ in kids]
                yield [self.work(kid, r, depth + 1) for kid, r in zip(kids, seeds, strict=True)]
                if rng.random() < 0.2:
                    kids.pop(rng.randrange(len(kids))).kill()
                mode = rng.choice(["concat", "concat", "reprefill", "discard"])
                if kids:
                    thread.join(kids, mode)
                thread.insert([rng.randrange(200)])
        yield thread  # what is still queued when run() returns may or may not happen, depending on the pages

    def run(self, trunk):
        yield from self.work(trunk, random.Random(self.program), 0)
        yield trunk.decode(3)


@dataclass(frozen=True)
class Everything(Strategy):
    """A random program of all that a thread can be asked, in odd orders: much of it is queued, and waited for later.

    Whatever order the threads run in, the tokens are the same, unless `races`: then who is done first, and who is
    killed in mid-decode, depends on that order (which `Sequential` settles). `sees`: how often children of one parent
    are followed by some that see them.
    """

    program: int
    vocabulary: int = 97
    races: bool = False
    sees: float = 0.0
    splices: bool = True  # whether joins may splice KV, which a server cannot

    def run(self, trunk):
        rng = random.Random(f"{self.program}/{trunk.context[0]}")
        worker = _Worker(rng, self)
        yield from worker.work(trunk, rng, 0)
        yield trunk
        if rng.random() < 0.8:
            trunk.insert(worker.ids(rng, 1))
            worker.asked.append(trunk.decode(3))
            yield trunk
        return [op.value for op in worker.asked]


@dataclass(frozen=True)
class Watching(Strategy):
    """A random program of threads that see one another while they write: forks, spawned ones, perhaps the trunk."""

    program: int
    vocabulary: int = 97

    def run(self, trunk):
        draw = random.Random(f"{self.program}/{trunk.context[0]}")
        ids = lambda least, most: [draw.randrange(self.vocabulary) for _ in range(draw.randint(least, most))]  # noqa: E731
        sampled = lambda: {"do_sample": True, "top_k": 0} if draw.random() < 0.5 else {}  # noqa: E731
        asked = [trunk.decode(draw.randint(1, 3))]
        yield trunk
        kids = trunk.fork([ids(1, 3) for _ in range(draw.randint(1, 3))])
        fresh = [trunk.spawn(ids(1, 9)) for _ in range(draw.randint(0, 2))]
        if draw.random() < 0.5:
            yield [*kids, *fresh]  # what they begin with is computed plainly
        threads = [*kids, *fresh, *([trunk] if draw.random() < 0.5 else [])]
        for often in (1.0, 0.5, 0.3):
            for thread in threads:
                others = [t for t in threads if t is not thread]
                if others and draw.random() < often:
                    seen = draw.sample(others, draw.randint(1, len(others)))
                    thread.see(seen, same_step=draw.choice(["all", "before", "none"]))
            some = draw.sample(threads, draw.randint(1, len(threads)))
            asked += [thread.decode(draw.randint(1, 5), sampling=sampled()) for thread in some]
            yield some
            if draw.random() < 0.4:
                draw.choice(threads).insert(ids(1, 2))
            if draw.random() < 0.2 and len(threads) > 2:
                gone = draw.choice([t for t in threads if t is not trunk])
                threads.remove(gone)
                gone.kill()
        kids = [t for t in threads if t is not trunk]
        yield kids
        if kids:
            trunk.join(kids, draw.choice(["reprefill", "discard"]))
        trunk.insert(ids(1, 2))
        asked.append(trunk.decode(2))
        yield trunk
        return [op.value for op in asked]


class _Worker:
    def __init__(self, rng, how):
        self.how, self.vocabulary, self.races = how, how.vocabulary, how.races
        self.sights = random.Random(f"{how.program}/sights") if how.sees else None
        self.asked = []  # the decodes of the strategy's own generator, in order

    def ids(self, rng, least=0, most=3):
        return [rng.randrange(self.vocabulary) for _ in range(rng.randint(least, most))]

    def decode(self, thread, rng):
        stop = rng.choice([(), (), (), rng.randrange(self.vocabulary), ["ab", "é"], ["e", 5, 17], ["a", "b", "c d"]])
        sampling = (
            {"do_sample": True, "top_k": 0, "temperature": rng.choice([0.7, 1.0, 1.5])} if rng.random() < 0.5 else {}
        )
        wanted = rng.randint(1, 5)
        until = rng.choice([None, None, lambda op: len(op.token_ids) == wanted, lambda op: "a" in op.text])
        return thread.decode(rng.choice([1, 2, 3, 5, 7]), stop=stop, sampling=sampling, until=until)

    def queued(self, thread, rng):
        """A few things for a thread to do, none of them waited for; it can go on from its end afterwards."""
        for _ in range(rng.randint(0, 3)):
            self.one(thread, rng)

    def one(self, thread, rng):
        what = rng.choice(["decode", "decode", "insert", "score", "malformed"])
        if what == "malformed":
            if rng.random() < 0.2:
                thread.malformed("at random")
        elif what == "decode":
            self.asked.append(self.decode(thread, rng))
        else:
            getattr(thread, what)(self.ids(rng))

    def cut(self, thread, rng):
        """Forget some, wherever that is: its last tokens, what children share, joined siblings; then go on."""
        yield thread.insert([])  # (a fork whose parent has yet to get to it has no length)
        if rng.random() < 0.1:
            yield thread.rstrip()
        own = len(thread.token_ids)
        gone = own if rng.random() < 0.1 else rng.randint(0, min(own, rng.choice([2, 2, 9])))
        thread.truncate(thread.length - gone)
        thread.insert(self.ids(rng, 1) if rng.random() < 0.5 else [rng.randrange(self.vocabulary)] * max(1, gone))

    def children(self, thread, rng, depth):
        """Fork or spawn, give them work, go on beside them, and take some of them back."""
        if rng.random() < 0.2:
            shared = [rng.randrange(self.vocabulary) for _ in range(rng.randint(1, 20))]
            yield thread.insert([])
            kids = [thread.spawn([*shared[: rng.randint(1, 20)], *self.ids(rng)]) for _ in range(rng.randint(1, 3))]
        else:
            headers = [rng.choice([None, [], self.ids(rng, 1)]) for _ in range(rng.randint(1, 4))]
            kids = thread.fork(len(headers) if rng.random() < 0.2 else headers)
        tasks, busy = [], []
        for kid in kids:
            if rng.random() < 0.05:
                self.queued(kid, rng)
                kid.kill()  # before it has begun
            elif depth < 2 and rng.random() < 0.5:
                inner = random.Random(rng.random())
                tasks.append(thread.start(_Worker(inner, self.how).work(kid, inner, depth + 1)))
                busy.append(kid)
            else:
                self.queued(kid, rng)
        onlookers, seen = self.onlookers(thread, [kid for kid in kids if kid not in busy])
        kids += onlookers
        for _ in range(rng.randint(0, 2)):
            yield from self.go_on(thread, rng, depth)
        if rng.random() < 0.15 and not tasks:
            gone = yield kids.pop(rng.randrange(len(kids)))
            if gone in seen:  # else it would depend on the order of threads whether those that see it come first
                yield onlookers
            gone.kill()
        yield from self.take_back(thread, kids, tasks, rng)

    def onlookers(self, thread, others):
        """Forks that see some of those before them, which are never cut back: all they write, or its beginning."""
        draw, others = self.sights, [kid for kid in others if kid.alive and kid.role == "fork"]
        if draw is None or not others or draw.random() > self.how.sees:
            return [], []
        seen = draw.sample(others, draw.randint(1, len(others)))
        kids = thread.fork([self.ids(draw, 1) for _ in range(draw.randint(1, 2))], sees=seen)
        for kid in kids:
            self.queued(kid, draw)
        return kids, seen

    def mortals(self, thread, rng):
        """Children that end themselves in mid-decode while a join waits for them, or just before."""
        kids = thread.fork(rng.randint(1, 4))
        for kid in kids:
            self.queued(kid, rng)
            if rng.random() < 0.5:
                wanted = rng.randint(1, 4)
                until = lambda op, wanted=wanted: len(op.token_ids) == wanted and op.thread.kill()  # noqa: E731
                self.asked.append(kid.decode(3, until=until))
                self.queued(kid, rng)
        if rng.random() < 0.5:
            yield kids
            kids = [kid for kid in kids if kid.alive] or thread.fork(1)
        mode = rng.choice(["concat", "reprefill", "summary"])
        mode = mode if self.how.splices else mode.replace("concat", "reprefill")
        thread.join(kids, mode, **({"text": self.ids(rng)} if mode == "summary" else {}))
        thread.insert(self.ids(rng, 1))

    def race(self, thread, rng):
        """Fork, and when one is done kill another, whatever that has written by then."""
        kids = thread.fork(rng.randint(2, 4))
        yield [kid.insert(self.ids(rng)) for kid in kids]
        for kid in kids:
            self.asked.append(self.decode(kid, rng))
        yield first(*kids)
        kids.pop(rng.randrange(len(kids))).kill()
        if rng.random() < 0.5:
            yield first(*kids)
        mode = rng.choice(["concat", "reprefill", "discard"])
        thread.join(kids, mode if self.how.splices else mode.replace("concat", "reprefill"))
        thread.insert(self.ids(rng, 1))

    def go_on(self, thread, rng, depth):
        what = rng.choice(["one", "one", "cut", "children", "wait"])
        if what == "one":
            self.one(thread, rng)
        elif what == "wait":
            yield thread
        elif what == "cut":
            yield from self.cut(thread, rng)
        elif depth < 2:
            yield from self.children(thread, rng, depth + 1)

    def take_back(self, thread, kids, tasks, rng):
        if rng.random() < 0.2 and tasks:
            yield first(*tasks)
        yield tasks  # (what their threads have queued may still be under way)
        if rng.random() < 0.3:  # who is not taken back has done its work when the parent goes
            yield kids
            kids = [kid for kid in kids if kid.alive]
            kids = rng.sample(kids, rng.randint(0, len(kids)))
        kids = [kid for kid in kids if kid.alive]
        if not kids:
            return
        mode = rng.choice(["concat", "concat", "reprefill", "reprefill", "summary", "discard"])
        if mode == "concat" and (not self.how.splices or any(kid.role == "fresh" for kid in kids)):
            mode = "reprefill"
        options = {}
        if mode == "summary":
            options["text"] = self.ids(rng)
            if rng.random() < 0.5:
                yield thread.insert([])
                options["keep"] = thread.length - rng.randint(0, len(thread.token_ids))
        elif mode == "reprefill" and rng.random() < 0.3:
            options["headers"] = [rng.choice([None, self.ids(rng)]) for _ in kids]
        elif mode == "discard":
            yield kids
        join = thread.join(kids, mode, **options)
        if rng.random() < 0.3:
            yield join
        if rng.random() < 0.8 or mode != "discard":
            thread.insert(self.ids(rng, 1))

    def work(self, thread, rng, depth):
        for _ in range(rng.randint(1, 4 - depth)):
            self.one(thread, rng)
            if rng.random() < 0.4:
                yield thread
            if rng.random() < 0.2:
                yield from self.cut(thread, rng)
            if self.races and rng.random() < 0.5:
                yield from self.race(thread, rng)
            if rng.random() < 0.1:
                yield from self.mortals(thread, rng)
            if depth < 2 and rng.random() < 0.7:
                yield from self.children(thread, rng, depth)


@dataclass(frozen=True)
class Sights(Strategy):
    """A random program of forks that see siblings, stand apart, skip positions and join, with cuts anywhere.

    segments: forks are given KV segments up to so many. cuts: what children share, see or wrote may be forgotten, or go
    before those that see it; without, all of a thread can be computed again from what its request holds. Nothing
    depends on the order in which threads run.
    """

    program: int
    vocabulary: int = 97
    segments: int = 0
    cuts: bool = True

    @property
    def kv_segments(self):
        return self.segments + 1 if self.segments else 0

    def run(self, trunk):
        rng = random.Random(f"sights {self.program}/{trunk.context[0]}")
        yield trunk.decode(rng.randint(1, 6))
        for _ in range(rng.randint(1, 3)):
            yield from self.block(trunk, rng, 0)
            trunk.insert(self.ids(rng))
            yield trunk.decode(rng.randint(1, 4))
            yield from self.cut(trunk, rng)

    def ids(self, rng, most=3):
        return [rng.randrange(self.vocabulary) for _ in range(rng.randint(1, most))]

    def write(self, thread, rng):
        """Some tokens, with gaps and steps back in their positions."""
        for _ in range(rng.randint(1, 3)):
            yield thread.decode(rng.randint(1, 5), sampling={"do_sample": rng.random() < 0.5})
            if rng.random() < 0.3:
                yield thread.skip(rng.choice([-1, 1, 2, 7]) if thread.position > 8 else 3)
            if rng.random() < 0.3:
                yield from self.cut(thread, rng)
            if rng.random() < 0.4:
                thread.insert(self.ids(rng))

    def cut(self, thread, rng):
        """Forget some own tokens, down into what was joined, and go on."""
        own = len(thread.token_ids) if self.cuts else len(thread.host.state(thread).last_sampled)
        if own:
            yield thread.truncate(thread.length - rng.randint(0, min(own, rng.choice([1, 2, 12]))))
        thread.insert(self.ids(rng))

    def grow(self, kid, rng, depth):
        yield from self.write(kid, rng)
        if depth < 1 and rng.random() < 0.3:
            yield from self.block(kid, rng, depth + 1)
            kid.insert(self.ids(rng))
            yield from self.write(kid, rng)
        yield kid

    def block(self, thread, rng, depth):
        kids = []
        for _ in range(rng.randint(1, 3)):
            done = [kid for kid in kids if kid.alive]
            seen = rng.sample(done, rng.randint(0, min(2, len(done)))) if rng.random() < 0.8 else []
            count = rng.randint(1, 3)
            more = {"segments": [rng.randint(0, self.segments) for _ in range(count)]} if self.segments else {}
            sees = [(other, rng.choice([None, rng.randint(0, len(other.token_ids))])) for other in seen]
            new = thread.fork([self.ids(rng) for _ in range(count)], sees=sees, apart=rng.choice([0, 0, 5]), **more)
            if rng.random() < 0.3:  # the thread itself goes on beside its children
                yield new[0].insert([])
                thread.insert(self.ids(rng))
                if self.cuts and rng.random() < 0.5:
                    yield from self.cut_back(thread, rng)
            yield [thread.start(self.grow(kid, random.Random(rng.random()), depth)) for kid in new]
            kids += new
            if self.cuts and rng.random() < 0.2:
                kids.pop(rng.randrange(len(kids))).kill()
        yield from self.take_back(thread, [kid for kid in kids if kid.alive], rng)

    def cut_back(self, thread, rng):
        """Forget what came last, which children may share."""
        yield thread.truncate(thread.length - rng.randint(0, min(3, len(thread.token_ids))))
        thread.insert(self.ids(rng))

    def take_back(self, thread, kids, rng):
        rng.shuffle(kids)
        while kids:
            some = [kids.pop() for _ in range(rng.randint(1, len(kids)) if self.cuts else len(kids))]
            mode = rng.choice(["concat", "concat", "concat", "reprefill", "summary", "discard"])
            yield thread.join(some, mode, **({"text": self.ids(rng)} if mode == "summary" else {}))
            if rng.random() < 0.4:
                yield from self.cut(thread, rng)
