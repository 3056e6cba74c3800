"""PASTA (Jin et al. 2025, arXiv 2502.11517): promises that threads keep while the main text goes on, until it syncs."""

from __future__ import annotations

import re
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

from anabranch._check import whole_fields
from anabranch.strategies.api.strategy import Strategy
from anabranch.strategies.api.thread import Thread

Program = Generator[Any, Any, Any]
_SYNC, _OPEN, _CLOSE = "<sync/>", "<async>", "</async>"


@dataclass(frozen=True, kw_only=True)
class PASTA(Strategy):
    r"""PASTA's language, in plain text::

        Rivers bend <promise topic="why" tokens="30"/> and <promise topic="where"/> so we say:<sync/>
        <async>…</async><async>…</async> …

    A ``<promise …/>`` starts a thread, which writes its ``<async>`` with all before it in sight, while the main text
    goes on, blind to it. At ``<sync/>`` the main text waits, and takes the threads' texts over in the promises' order:
    their KV is spliced, nothing is computed again, and they stay blind to one another. Two promises in a row run at the
    same time.

    positions: "promised": ``tokens="n"`` leaves room: what follows the promise stands n positions further on, and the
        thread's text fills the gap, so that all stands as if written in one piece. After a sync the text goes on behind
        the furthest. "dense": lengths are not looked at.
    async_tokens: most tokens sampled in a thread; None leaves the answer's own limit. most_tokens: a longer promise is
        cut to it, and any to what the answer's limit leaves. max_threads: a promise beyond so many that are open is
        plain text.
    after: inserted behind the threads of a sync, so that the text has a token to go on from.

    What breaks the format is counted (``result.malformed``) and repaired: a length that is no number is none; a thread
    that ends without ``</async>`` is closed; a ``<sync/>`` with nothing to wait for is plain text; promises still open
    at the end are waited for and their texts appended.

    >>> engine.generate(prompt, strategy=ab.PASTA(async_tokens=64), max_new_tokens=256).text
    """

    promise: str = r"<promise\b[^<>]*/>"
    positions: str = "promised"
    async_tokens: int | None = None
    most_tokens: int = 1000
    max_threads: int = 32
    after: str = "\n"

    needs = ("concat joins", "positions of its own")

    def __post_init__(self) -> None:
        if self.positions not in ("promised", "dense"):
            raise ValueError(f"PASTA: positions={self.positions!r}; pass 'promised' or 'dense'")
        if not isinstance(self.after, str) or not self.after:
            raise ValueError(f"PASTA: after={self.after!r}; behind the threads the text needs a token to go on from")
        try:
            re.compile(self.promise)
        except re.error as error:
            raise ValueError(f"PASTA: promise={self.promise!r} is no regular expression: {error}") from None
        whole_fields(self, ("async_tokens", "most_tokens", "max_threads"), optional=("async_tokens",))

    def run(self, trunk: Thread) -> Program:
        trunk.encode("")  # says so when there is no tokenizer
        return self._write(trunk)

    def _write(self, trunk: Thread) -> Program:
        open_: list[tuple[Thread, Any]] = []  # threads, and what closes each
        furthest = trunk.position + trunk.tokens_left  # no promise reaches beyond what the answer may take up
        while (end := (yield trunk.decode(stop="/>"))).reason == "stop":
            text = end.text or ""
            promises = list(re.finditer(self.promise, text))
            if text.endswith(_SYNC):
                if open_:
                    yield from self._sync(trunk, open_)
                    open_ = []
                else:
                    trunk.malformed(f"{_SYNC} with nothing to wait for; kept as plain text")
            elif promises and promises[-1].end() == len(text):
                if len(open_) == self.max_threads:
                    trunk.malformed(f"more than {self.max_threads} promises open; kept as plain text")
                    continue
                (kid,) = trunk.fork([_OPEN])
                open_.append((kid, trunk.start(self._keep(kid))))
                room = min(self._length(trunk, promises[-1].group()), furthest - trunk.position)
                if room > 0:
                    trunk.skip(room)
        if open_:
            trunk.malformed(f"{len(open_)} promises without {_SYNC}; waited for at the end")
            if end.reason == "eos":
                trunk.truncate(trunk.length - 1)
            yield from self._sync(trunk, open_)

    def _length(self, trunk: Thread, promise: str) -> int:
        """Positions that a promise asks for; 0: it does not say."""
        said = re.search(r"""\btokens\s*=\s*["']?([^"'\s/>]*)""", promise)
        if said is None or self.positions == "dense":
            return 0
        number = said[1]
        if not re.fullmatch(r"[0-9]{1,9}", number) or int(number) > self.most_tokens:
            long = number.isdecimal()
            trunk.malformed(f"a promise of {number[:20]!r} tokens; {'cut' if long else 'taken for none'}")
            return self.most_tokens if long else 0
        return int(number)

    def _keep(self, kid: Thread) -> Program:
        """A promise's thread, to its end."""
        end = yield kid.decode(self.async_tokens, stop=_CLOSE)
        if end.stop != _CLOSE:
            kid.malformed(f"ended by {end.reason} without {_CLOSE}; closed")
            if end.reason == "eos":
                kid.truncate(kid.length - 1)
            yield kid.insert(_CLOSE)

    def _sync(self, trunk: Thread, open_: list[tuple[Thread, Any]]) -> Program:
        yield [closed for _, closed in open_]
        yield trunk.join([kid for kid, _ in open_])
        yield trunk.insert(self.after)
