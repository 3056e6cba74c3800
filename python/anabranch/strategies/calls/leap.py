"""LeaP (arXiv 2505.07787): paths that from time to time tell one another, in short, what they have found."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

from anabranch._check import whole_fields
from anabranch.strategies.api.cutting import cut_at
from anabranch.strategies.api.strategy import Strategy
from anabranch.strategies.api.thread import Thread
from anabranch.strategies.api.voting import Vote, answer_in, check_vote, majority

OPEN, CLOSE = "<summarize>", "</summarize>"
ASK = (
    "Alright, let's take a step back and summarize what we've figured out so far briefly. <summarize> In short, my "
    "current conclusions are that"
)
COMMENT = (
    " <comment> {peers} </comment>\n\nHmm, it seems that my peers have given me some comments, so let me check if "
    "anyone's conclusions are different from mine before I continue my own reasoning."
)
ALONE = " <comment> No comments </comment>\n\nHmm, there are no comments, so let's continue reasoning."
FINAL = "\n\nOh, I think I have found the final answer.\n\n**Final Answer** \\boxed{"


@dataclass(frozen=True, kw_only=True)
class LeaP(Strategy):
    """Learning from peers: `paths` sampled paths that share short summaries, then a vote.

    Every `turn_tokens` tokens a path that is still thinking is cut back to its last whole paragraph and asked for a
    summary, ``<summarize>…</summarize>``; then the summaries of `peers` others are inserted as ``<comment>…</comment>``
    and it goes on. A path ends with ``</think>`` or EOS; one that is not through after `turns` turns is made to say its
    answer. The trunk becomes the path that won; ``result.answers`` lists what each path answered, in order.

    router: whose summaries a path gets: "dispersed", the least similar to its own, as released by default; "clustered",
        the most similar; None: everybody's, whatever `peers` says.
    summary_tokens: most tokens of a summary, and of an answer that a path is made to say.
    request: what a summary is asked with; the released code draws it from a list. comment: holds ``{peers}``.
    vote: how an answer is read, as in `SelfConsistency`.

    A summary that is cut by its limit is closed with ``... </summarize>``, and counted as malformed.

    >>> engine.generate(prompt, strategy=ab.LeaP(paths=3, turns=2, turn_tokens=32, summary_tokens=16)).answers
    """

    paths: int = 4
    turns: int = 5
    turn_tokens: int = 2048
    summary_tokens: int = 256
    peers: int = 2
    router: str | None = "dispersed"
    request: str = ASK
    comment: str = COMMENT
    final: str = FINAL
    vote: Vote = "boxed"

    def __post_init__(self) -> None:
        whole_fields(self, ("paths", "turns", "turn_tokens", "summary_tokens", "peers"))
        check_vote("LeaP", self.vote)
        if self.vote is None:
            raise ValueError('LeaP: vote=None; say how an answer is read, such as "boxed" or "number"')
        if self.router not in ("dispersed", "clustered", None):
            raise ValueError(f"LeaP: router={self.router!r}; pass 'dispersed', 'clustered' or None")
        for field, part in (("request", OPEN), ("comment", "{peers}")):
            if part not in getattr(self, field):
                raise ValueError(f"LeaP: {field} does not hold {part}; put it where that goes")

    def run(self, trunk: Thread) -> Generator[Any, Any, list[Any]]:
        kids = trunk.fork(self.paths)
        thinking = list(kids)
        for turn in range(self.turns):
            ends = yield [self._decode(kid, self.turn_tokens, "</think>") for kid in thinking]
            # One that was given no token has used up the answer's own limit.
            thinking = [
                kid for kid, end in zip(thinking, ends, strict=True) if end.reason == "length" and end.token_ids
            ]
            if thinking and turn < self.turns - 1:
                summaries = yield [self._summary(kid) for kid in thinking]
                for i, kid in enumerate(thinking):
                    kid.insert(self._comment(i, summaries))
        for kid in thinking:
            kid.insert(self.final)
        yield [self._decode(kid, self.summary_tokens) for kid in thinking]
        answers = [answer_in(kid.text, self.vote, "LeaP") for kid in kids]
        winner = kids[majority(answers, self.vote)]
        if losers := [kid for kid in kids if kid is not winner]:
            trunk.join(losers, "discard")
        trunk.join(winner)
        return answers

    @staticmethod
    def _decode(kid: Thread, tokens: int, *stop: str) -> Any:
        return kid.decode(tokens, stop=stop, sampling={"do_sample": True})

    def _summary(self, kid: Thread) -> Generator[Any, Any, str]:
        """Have a path summarize what it has; the summary."""
        text = kid.text_of(kid.token_ids)
        if (at := text.rfind("\n\n")) >= 0:
            length, left = cut_at(kid, at)
            kid.truncate(length)
            kid.insert(f"{left}\n\n{self.request}")
        else:
            kid.insert(f"\n\n{self.request}")
        end = yield self._decode(kid, self.summary_tokens, CLOSE, "</think>")
        if end.stop != CLOSE:
            kid.malformed(f"a summary ended by {end.stop or end.reason} without {CLOSE}; closed")
            if end.reason == "eos":
                kid.truncate(kid.length - 1)
            elif end.stop == "</think>":
                own = kid.text_of(kid.token_ids)
                yield kid.truncate(cut_at(kid, own.rindex("</think>")).length)
            yield kid.insert(f"... {CLOSE}")
        return kid.text_of(kid.token_ids).rpartition(OPEN)[2].partition(CLOSE)[0].strip()

    def _comment(self, own: int, summaries: Sequence[str]) -> str:
        """What a path is told of the others."""
        others = [i for i in range(len(summaries)) if i != own]
        if not others:
            return ALONE
        if self.router is not None:
            sign = 1 if self.router == "dispersed" else -1
            others.sort(key=lambda i: sign * similarity(summaries[own], summaries[i]))
            others = others[: self.peers]
        told = "\n".join(f'Peer {n}: "{summaries[i]}"' for n, i in enumerate(others, 1))
        return self.comment.replace("{peers}", told)


def similarity(one: str, other: str) -> float:
    """Twice the longest common subsequence over both lengths: 1 − the normalised distance by insertions and deletions.

    By bit-parallel dynamic programming over Python's long integers: a row of the table is one number.
    """
    if not one and not other:
        return 1.0
    places: dict[str, int] = {}
    for i, char in enumerate(one):
        places[char] = places.get(char, 0) | 1 << i
    full = (1 << len(one)) - 1
    row = full
    for char in other:
        met = row & places.get(char, 0)
        row = ((row + met) | (row - met)) & full
    return 2 * (len(one) - row.bit_count()) / (len(one) + len(other))
