"""Answers as clients read them: whole, and in pieces as they are written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from anabranch.records import events
from anabranch.records.result import Node, Result


class Trimmer:
    """A text that ends in front of the first stop string, handed out as soon as no stop string can begin in it."""

    def __init__(self, stops: Sequence[str]):
        self.stops, self.done = list(stops), False
        self._held = ""
        self._window = max((len(s) for s in stops), default=1) - 1

    def push(self, text: str) -> str:
        """What may be told now that `text` has come."""
        if self.done:
            return ""
        self._held += text
        found = min((at for s in self.stops if (at := self._held.find(s)) >= 0), default=-1)
        if found >= 0:
            told, self._held, self.done = self._held[:found], "", True
            return told
        cut = max(0, len(self._held) - self._window)
        told, self._held = self._held[:cut], self._held[cut:]
        return told

    def rest(self) -> str:
        told, self._held = self._held, ""
        return told


def finish_reason(result: Result, stopped: bool) -> str:
    """OpenAI's word for how an answer ended."""
    return "length" if result.tree.ended in ("length", "budget") and not stopped else "stop"


def usage(results: Sequence[Result], prompts: int) -> dict[str, Any]:
    """Token counts of a request; ``prompts``: how many different ones it had, each counted once."""
    cached = sum(r.metrics.cached_tokens for r in results)
    prompt = sum(r.metrics.prompt_tokens for r in results[:: max(1, len(results) // max(prompts, 1))])
    completion = sum(r.metrics.total_tokens for r in results)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": min(cached, prompt)},
        "critical_path_tokens": max((r.metrics.critical_path_tokens for r in results), default=0),
        "threads": sum(r.metrics.num_threads for r in results),
    }


def text_of(result: Result, stops: Sequence[str]) -> tuple[str, bool]:
    """``(the answer in front of its first stop string, whether there was one)``."""
    trimmer = Trimmer(stops)
    text = trimmer.push(result.text or "") + trimmer.rest()
    return text, trimmer.done


def logprobs_of(node: Node) -> tuple[list[int], list[float]]:
    """Token ids of an answer's own tokens and their log-probabilities, as far as they were recorded."""
    ids: list[int] = []
    values: list[float] = []
    for run in node.runs:
        if run.kind == "prompt":
            continue
        ids += run.token_ids
        values += [0.0 if lp is None else lp for lp in run.logprobs or [0.0] * len(run.token_ids)]
    return ids, values


class Follower:
    """What a client that knows nothing of threads is told: the trunk's text, children's where it took them back.

    Text once told stays told. An answer that a join rewrote is told whole at the end (``rewritten``).
    """

    def __init__(self, stops: Sequence[str]):
        self._trimmer = Trimmer(stops)
        self._texts: dict[str, list[str]] = {}
        self.sent = ""
        self.rewritten = False

    @property
    def stopped(self) -> bool:
        return self._trimmer.done

    def take(self, event: events.Event) -> str:
        """What becomes certain of the answer by an event."""
        text = ""
        if isinstance(event, events.Token):
            self._texts.setdefault(event.thread, []).append(event.text or "")
            text = (event.text or "") if event.thread == "0" else ""
        elif isinstance(event, events.Join):
            theirs = "".join("".join(self._texts.pop(child, ())) for child in event.children)
            if event.mode in ("concat", "reprefill"):
                self._texts.setdefault(event.thread, []).append(theirs)
                text = theirs if event.thread == "0" else ""
            elif event.thread == "0" and event.mode == "summary":
                self.rewritten = True
        elif isinstance(event, events.Become):
            self._texts[event.thread] = list(self._texts.get(event.source, ()))
        return self._told(self._trimmer.push(text)) if text else ""

    def finish(self, result: Result) -> str:
        """The rest of the answer."""
        whole, _ = text_of(result, self._trimmer.stops)
        if whole.startswith(self.sent):
            return self._told(whole[len(self.sent) :])
        self.rewritten = True
        return ""

    def _told(self, text: str) -> str:
        self.sent += text
        return text
