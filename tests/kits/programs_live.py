"""Strategies at random whose threads see one another live, and are killed, cut and joined one by one on the way."""

from __future__ import annotations

import random
from dataclasses import dataclass

from anabranch.strategies import Strategy


@dataclass(frozen=True)
class Sharing(Strategy):
    """Threads that see one another, of which some leave while others go on that have seen them.

    Between their turns they stand idle while something else is written, and needs pages: so who has to leave the cache
    comes back when those that it saw have gone. Nothing depends on the order in which threads run.
    """

    program: int
    vocabulary: int = 97
    busy: int = 24  # tokens of the prompts of what is written in between

    def run(self, trunk):
        yield from _Sharing(self, trunk).run()


class _Sharing:
    def __init__(self, how: Sharing, trunk):
        self.how, self.trunk = how, trunk
        self.draw = random.Random(f"sharing {how.program}/{trunk.context[0]}")
        self.threads: list = []  # those that may see one another
        self.views: dict = {}  # thread → all that it has ever had in view
        self.hosts: list = []  # plain threads whose forks are among them

    def ids(self, least, most):
        return [self.draw.randrange(self.how.vocabulary) for _ in range(self.draw.randint(least, most))]

    def chance(self, often):
        return self.draw.random() < often

    def run(self):
        draw, trunk = self.draw, self.trunk
        yield trunk.decode(draw.randint(1, 3))
        if self.chance(0.3):  # what it joins before it is live is spliced
            kids = trunk.fork([self.ids(1, 2) for _ in range(2)])
            yield [kid.decode(draw.randint(1, 4)) for kid in kids]
            trunk.join(kids)
            yield trunk.insert(self.ids(1, 2))
        self.threads += trunk.fork([self.ids(1, 3) for _ in range(draw.randint(1, 3))])
        self.threads += [trunk.spawn(self.ids(1, 9)) for _ in range(draw.randint(0, 2))]
        if self.chance(0.5):
            host = trunk.fork([self.ids(1, 2)])[0]
            yield host.decode(draw.randint(1, 3))  # when its forks come to be must not depend on others
            self.threads += host.fork([self.ids(1, 2) for _ in range(draw.randint(1, 2))])
            self.hosts.append(host)
        if self.chance(0.3):
            self.threads.append(trunk)
        if self.chance(0.4):
            yield self.threads
        for often in (1.0, 0.5, 0.5, 0.3):
            self.look(often)
            yield from self.write()
            if self.chance(0.7):
                yield from self.elsewhere()
            yield from self.change()
        yield from self.end()

    def look(self, often):
        for thread in self.threads:
            others = [t for t in self.threads if t is not thread]
            if others and self.chance(often):
                seen = self.draw.sample(others, self.draw.randint(1, len(others)))
                lined_up = thread.role == "fresh" and self.chance(0.3)
                thread.see(seen, lined_up=lined_up, same_step=self.draw.choice(["all", "before", "none"]))
                self.views.setdefault(thread, set()).update(seen)

    def write(self):
        sampled = {"do_sample": True, "top_k": 0} if self.chance(0.5) else {}
        some = self.draw.sample(self.threads, self.draw.randint(1, len(self.threads))) if self.threads else []
        if self.chance(0.5):
            yield from self.at_its_own_pace(some, sampled)
        else:
            yield [thread.decode(self.draw.randint(1, 5), sampling=sampled) for thread in some]
        some = [thread for thread in some if thread.alive]
        if some and self.chance(0.4):
            self.draw.choice(some).insert(self.ids(1, 2))
        if some and self.chance(0.2):
            self.draw.choice(some).skip(self.draw.randint(1, 5))

    def at_its_own_pace(self, some, sampled):
        """One of them kills, in the middle of what all write, another one, which goes with what it has by then."""
        mortal = [t for t in self.threads if t is not self.trunk and t not in some]
        mortal = [t for t in mortal if not any(_comes_from(one, t) for one in some)]  # nor anybody who writes
        at = self.draw.randint(1, 4)
        gone = self.draw.choice(mortal) if mortal else None
        if gone is not None:
            yield gone  # or its fork might come to be before it is killed or never, as pages allow

        def until(op):
            if gone is not None and gone.alive and len(op.token_ids) == at:
                gone.kill()
            return False

        yield [thread.decode(5, sampling=sampled, until=until if i == 0 else None) for i, thread in enumerate(some)]
        self.forget_gone()

    def elsewhere(self):
        """Something that none of them sees, long enough to need their pages."""
        other = self.trunk.spawn(self.ids(1, self.how.busy))
        yield other.decode(self.draw.randint(1, 6))
        self.trunk.join(other, "discard")

    def change(self):
        """One of them leaves, or forgets."""
        what = self.draw.choice(["kill", "join", "join", "cut", "host", "fork", "nothing"])
        mine = [t for t in self.threads if t is not self.trunk and t.parent is self.trunk]
        if what == "kill" and len(self.threads) > 1:
            gone = self.draw.choice([t for t in self.threads if t is not self.trunk] or [None])
            if gone is not None:
                gone.kill()
        elif what == "join" and mine and (self.trunk not in self.threads or self.chance(0.5)):
            kids = self.draw.sample(mine, self.draw.randint(1, min(2, len(mine))))
            mode = self.draw.choice(["reprefill", "summary"])
            join = self.trunk.join(kids, mode, **({"text": self.ids(1, 2)} if mode == "summary" else {}))
            self.trunk.insert(self.ids(1, 2))
            if self.chance(0.5):
                yield join
        elif what == "cut":
            alone = [t for t in self.threads if not any(t in self.views.get(o, ()) for o in self.threads if o is not t)]
            for thread in self.draw.sample(alone, min(1, len(alone))):
                kept = self.draw.randint(0, len(thread.token_ids)) if thread is not self.trunk else None
                if kept is not None:
                    yield thread.truncate(thread.length - len(thread.token_ids) + kept)
                thread.insert(self.ids(1, 3))
        elif what == "host" and self.hosts:
            host = self.hosts.pop()
            if self.chance(0.5):
                host.kill()
            else:
                yield self.threads
                self.trunk.join(host, self.draw.choice(["concat", "reprefill"]) if self.plain() else "reprefill")
                self.trunk.insert(self.ids(1, 2))
        elif what == "fork" and self.threads:
            thread = self.draw.choice(self.threads)
            thread.insert(self.ids(1, 1))
            self.threads += thread.fork([self.ids(1, 2)])
            yield thread
        yield [t for t in (self.trunk, *self.threads) if t.alive]
        self.forget_gone()

    def plain(self):
        return self.trunk not in self.threads and not any(self.trunk in seen for seen in self.views.values())

    def forget_gone(self):
        self.threads = [t for t in self.threads if t.alive]
        self.hosts = [t for t in self.hosts if t.alive]

    def end(self):
        mine = [t for t in self.threads if t.parent is self.trunk]
        if mine and self.chance(0.7):
            self.trunk.join(mine, self.draw.choice(["reprefill", "discard"]))
        self.trunk.insert(self.ids(1, 2))
        yield self.trunk.decode(2)


def _comes_from(thread, other):
    """Whether `thread` is a child of `other`, or a child's child."""
    while thread.parent is not None:
        thread = thread.parent
        if thread is other:
            return True
    return False
