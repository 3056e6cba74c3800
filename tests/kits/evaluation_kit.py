"""What several test files share of test_evaluation."""

from __future__ import annotations

from types import SimpleNamespace

from anabranch.strategies import Sequential


class Canned:
    """An engine whose answers are known: (text, threads, malformed, total, critical) by prompt."""

    tokenizer = SimpleNamespace(chat_template=None)

    def __init__(self, answers, sequential):
        self.answers, self.sequential, self.calls = answers, sequential, []

    def generate(self, prompts, strategy=None, **how):
        self.calls.append((prompts, strategy, how))
        many = isinstance(prompts, list)
        table = self.sequential if isinstance(strategy, Sequential) else self.answers
        results = [self._result(table[p]) for p in (prompts if many else [prompts])]
        return results if many else results[0]

    @staticmethod
    def _result(row):
        text, threads, malformed, total, critical = row
        seconds = {"decode": 0.9, "plan": 0.02, "strategy": 0.01}
        m = SimpleNamespace(
            num_threads=threads, total_tokens=total, critical_path_tokens=critical, seconds=seconds,
            overhead_seconds=0.03,
        )  # fmt: skip
        return SimpleNamespace(text=text, malformed=["x"] * malformed, metrics=m)
