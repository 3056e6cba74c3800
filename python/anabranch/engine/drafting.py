"""Speculative decoding in the loop: rows for guessed tokens beside a step's own, and how threads walk along them.

A `DraftTree` is a wish of a request; whoever has none pays nothing. Before a step each thread that will be given a
token may be given a tree of guesses (`Drafting.reserve`). The first path's rows stand behind the thread's own in its
branch; each further path is a fork of that branch, which lives for the step. The scores behind all of them are kept
(`Ahead`), and the loop goes on as ever: it samples threads whose scores are there. After each token the thread moves
to the scores behind it where that token was guessed (`Drafting.follow`), or what its branch has too much is cut. So a
thread's context never holds a token that was not chosen, and everything that looks at tokens sees one after another.

Nothing stands ahead when the next step's rows are chosen, but for requests whose threads stay in step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from anabranch import hf
from anabranch.engine.chunk import PrefillChunk
from anabranch.engine.drafts import Ahead, Ask, Draft, Odds, Pace, Proposer, least_chance, proposer_for
from anabranch.engine.logits import Head
from anabranch.engine.thread_kv import EngineThread, ThreadKV
from anabranch.errors import OutOfPages
from anabranch.strategies.draft.draft_tree import DraftTree
from anabranch.strategies.plain import layers

if TYPE_CHECKING:
    import torch

    from anabranch.engine.engine import Engine
    from anabranch.engine.request import Request
    from anabranch.engine.scheduler import Scheduler
    from anabranch.kv.step import Branch, Step

Entry = tuple[ThreadKV, PrefillChunk, int]


def draft_of(strategy: Any) -> DraftTree | None:
    """The `DraftTree` that a strategy is, or that it wraps."""
    return next((layer for layer in layers(strategy) if isinstance(layer, DraftTree)), None)


class Drafting:
    """The drafts of one loop."""

    def __init__(self, engine: Engine, scheduler: Scheduler):
        self.engine, self.scheduler, self.cache = engine, scheduler, engine.cache
        self._rope_rules = hf.describe(engine.model).rope_rules
        self._proposers: dict[Any, Proposer] = {}  # by draft: its name, or the id of a model or proposer
        self._paces: WeakKeyDictionary[EngineThread, Pace] = WeakKeyDictionary()
        self._odds: WeakKeyDictionary[Request, Odds] = WeakKeyDictionary()
        self._held = False  # whether some thread that could be given a token waits for others of its request
        self._drafts: list[tuple[ThreadKV, Draft]] = []  # of the step under way
        self._sides: list[Branch] = []  # forks for their paths beside the first

    # ---------------------------------------------------------------------------------------- before a step

    def level(self, ready: list[EngineThread]) -> list[EngineThread]:
        """Those of `ready` that may be given a token before the next forward.

        Where the threads of a request stay in step, who stands ahead waits for those that have scores of their own (a
        thread that was just forked), and for the next forward where some thread needs one: as without drafts.
        """
        self._held = False
        requests = dict.fromkeys(thread.request for thread in ready if thread.request.draft is not None)
        waiting: set[EngineThread] = set()
        for request in filter(_in_step, requests):
            threads = [thread for thread in ready if thread.request is request]
            ahead = [thread for thread in threads if thread.kv.ahead is not None]
            if len(ahead) < len(threads) or any(kv.ahead is None for kv in self.scheduler.wanted(request)):
                waiting.update(ahead)
        self._held = bool(waiting)
        return [thread for thread in ready if thread not in waiting] if waiting else ready

    def reserve(self, entries: list[Entry]) -> tuple[Step | None, list[Entry]] | None:
        """Reserve a step's rows with guesses beside them; None where there are none, or no pages for them: then the
        scheduler reserves what it chose. (None, []) where there is no room for a step while threads are held that could
        be given a token: they go first."""
        self.end_step()
        if self._held and self._pages(entries) > self.cache.usage().pages_free:
            return None, []
        asks = list(self._asks(entries))
        if not asks:
            return None
        room = self.scheduler.max_rows - sum(n for _, _, n in entries)
        drafted = self._with_drafts(entries, self._proposed(asks, room))
        if not self._drafts:
            return None
        if self._pages(drafted) <= self.cache.usage().pages_free:
            try:
                return self.scheduler.step(drafted), drafted
            except OutOfPages:
                pass
        self.end_step()  # in a shortage drafts are the first to go
        return None

    def _pages(self, entries: Sequence[Entry]) -> int:
        """Pages that so many rows may take, at most."""
        return sum(n // self.cache.page_size + 2 for _, _, n in entries)

    def _asks(self, entries: Sequence[Entry]) -> Iterator[Ask]:
        """Of whose next tokens a guess is wanted: threads that are whole with this step and then decode."""
        for kv, chunk, n in entries:
            thread = kv.thread
            settings = thread.request.draft
            if settings is None or thread.live is not None or kv.ahead is not None or kv.rebuilding or chunk.left != n:
                continue
            decode = thread.decode
            if decode is None or not thread.queue or thread.queue[0] is not decode.op or decode.op.done:
                continue
            if chunk.branch.length + n != thread.length or thread not in self.scheduler.decoding[thread.request]:
                continue
            length = self._pace(thread, settings.length).next_length()
            # The last token that a decode is given needs no scores behind it, and no row.
            length = min(length, decode.limit - len(decode.op.token_ids) - 1)
            if thread.request.max_total_tokens is not None:
                length = min(length, thread.request.max_total_tokens - thread.request.sampled - 1)
            for rule in self._rope_rules:  # which would rotate a longer sequence otherwise
                while length > 0 and rule.is_long(thread.position + length) != rule.is_long(thread.position):
                    length -= 1
            if length > 0 and (lengths := self._worth(thread.request, length, len(entries))):
                yield Ask(thread, lengths)

    def _worth(self, request: Request, length: int, rows: int) -> tuple[int, ...]:
        """Tokens of each path of a draft that are worth their rows, beside so many threads' own."""
        settings = request.draft
        assert settings is not None
        least = least_chance(settings.row_cost, self.cache.device.type, rows)
        return self._odds.setdefault(request, Odds()).lengths(length, settings.width, least)

    def _pace(self, thread: EngineThread, most: int) -> Pace:
        if thread not in self._paces:
            self._paces[thread] = Pace(most)
        return self._paces[thread]

    def _proposed(self, asks: Sequence[Ask], room: int) -> dict[ThreadKV, Draft]:
        """The drafts of those who are given one; together they take no more than `room` rows."""
        groups: dict[Any, list[Ask]] = {}
        for ask in asks:
            draft = ask.request.draft.draft  # type: ignore[union-attr]
            groups.setdefault(draft if isinstance(draft, str) else id(draft), []).append(ask)
        vocabulary = self.engine.vocab_size
        drafts: dict[ThreadKV, Draft] = {}
        for key, group in groups.items():
            if key not in self._proposers:
                self._proposers[key] = proposer_for(group[0].request.draft.draft, self.engine)  # type: ignore[union-attr]
            proposed = self._proposers[key].propose(group)
            if len(proposed) != len(group):
                raise ValueError(
                    f"DraftTree: draft: {type(self._proposers[key]).__name__}.propose() gave paths for "
                    f"{len(proposed)} threads where {len(group)} were asked about; return a list of paths for each"
                )
            for ask, paths in zip(group, proposed, strict=True):
                draft = Draft([_known(path, vocabulary) for path in paths], ask.lengths)
                draft.shorten(room)
                if draft.paths:
                    drafts[ask.thread.kv] = draft
                    room -= draft.rows
        return drafts

    def _with_drafts(self, entries: Sequence[Entry], drafts: dict[ThreadKV, Draft]) -> list[Entry]:
        """The step's rows with those of drafts: the first path behind the thread's own rows, each other on a fork."""
        own: list[Entry] = []
        sides: list[Entry] = []
        for kv, chunk, n in entries:
            draft = drafts.get(kv)
            if draft is None:
                own.append((kv, chunk, n))
                continue
            self._drafts.append((kv, draft))
            left, position = chunk.token_ids[chunk.done :], chunk.position + chunk.done
            for i, (path, added) in enumerate(draft.paths):
                if i:
                    self._sides += self.cache.fork(chunk.branch)
                branch = self._sides[-1] if i else chunk.branch
                rows = PrefillChunk(branch, [*left, *path], position, drafted=len(path), guesses=added)
                (sides if i else own).append((kv, rows, rows.left))
        return [*own, *sides]

    # ---------------------------------------------------------------------------------------- its forward

    def heads(self, entries: Sequence[Entry], before: int) -> list[Head]:
        """Rows of the step whose logits drafts need, behind `before` others."""
        found: list[Head] = []
        end = 0
        for kv, chunk, n in entries:
            end += n
            for i, node in enumerate(chunk.guesses):  # a path's last tokens: what it shares with another is there
                node.at = before + len(found)
                found.append(Head(kv, kv.thread.length - 1 + node.depth, end - len(chunk.guesses) + i))
        return found

    def keep(self, logits: torch.Tensor) -> None:
        """The step's logits are here: its threads stand at the roots of their drafts."""
        for kv, draft in self._drafts:
            kv.ahead = Ahead(logits, draft, draft.root)
            kv.thread.request.spent.drafted += draft.size
        self.end_step()

    def end_step(self) -> None:
        """Forks that a step's paths had are of no more use, whether it came about or not."""
        for branch in self._sides:
            self.cache.release(branch)
        self._sides, self._drafts = [], []

    # ---------------------------------------------------------------------------------------- after each token

    def follow(self, thread: EngineThread, token: int) -> None:
        """A thread that may stand ahead was given `token`: go on along its draft, or be as if there had been none."""
        kv = thread.kv
        ahead = kv.ahead
        if ahead is None:
            return
        node = ahead.node.children.get(token)
        keep: int | None = thread.length - 1  # so much of the branch is right
        if node is not None:
            thread.request.spent.accepted += 1
            ahead.node, ahead.first = node, ahead.first + node.main
        if node is None or not thread.alive or thread.running.op.done:
            self._paces[thread].told(len(ahead.draft.paths[0][0]), ahead.node.depth)
            self._odds[thread.request].told(ahead, failed=node is None)
            kv.ahead = None
        else:
            kv.logits, kv.logits_at = (ahead.logits, node.at), thread.length
            if node.main:
                keep = None
        if keep is not None and kv.branch is not None and kv.branch.length > keep:
            self.cache.truncate(kv.branch, keep)

    def close(self) -> None:
        """Give back what drafts hold beyond their threads."""
        self.end_step()
        proposers, self._proposers = self._proposers, {}
        for proposer in proposers.values():
            proposer.close()


def _in_step(request: Request) -> bool:
    """Whether its threads get their tokens in step, since it may matter who is first."""
    assert request.draft is not None
    return request.draft.in_step or request.max_total_tokens is not None or request.tasks.racing


def _known(path: Sequence[int], vocabulary: int) -> list[int]:
    """A path up to the first id that is no token."""
    end = next((i for i, token in enumerate(path) if not 0 <= token < vocabulary), len(path))
    return [int(token) for token in path[:end]]
