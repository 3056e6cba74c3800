"""Runs strategies × tasks × models, one problem at a time, into a result store."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from anabranch._check import whole
from anabranch.evaluation.comparison.answering import Window, prompt_hash
from anabranch.evaluation.comparison.items import Item
from anabranch.evaluation.comparison.store import Key, Row, Store
from anabranch.evaluation.comparison.tasks import Task
from anabranch.strategies import Strategy, registry

__all__ = ["Budget", "Outcome", "Skipped", "compare", "read_budget"]


@dataclass(frozen=True)
class Budget:
    """A limit, looked at before each problem: of tokens written or of seconds."""

    tokens: int | None = None
    seconds: float | None = None

    def share(self, used_tokens: int, used_seconds: float, parts: int) -> Budget:
        """An equal part of what is left."""
        return Budget(
            None if self.tokens is None else used_tokens + max(0, self.tokens - used_tokens) // parts,
            None if self.seconds is None else used_seconds + max(0.0, self.seconds - used_seconds) / parts,
        )

    def spent(self, tokens: int, seconds: float) -> bool:
        return (self.tokens is not None and tokens >= self.tokens) or (
            self.seconds is not None and seconds >= self.seconds
        )


def read_budget(text: str) -> Budget:
    """A budget from text: ``20000tok``, ``20ktok``, ``300s``, ``5min``.

    Raises:
        ValueError: it is none of these.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(k?tok(?:ens?)?|s|sec|min|h)\s*", text, re.IGNORECASE)
    if match is None or not float(match[1]):
        raise ValueError(f"budget {text!r}; expected tokens or time, such as 20000tok or 300s")
    number, unit = float(match[1]), match[2].lower()
    if "tok" in unit:
        return Budget(tokens=int(number * (1000 if unit.startswith("k") else 1)))
    return Budget(seconds=number * {"s": 1, "sec": 1, "min": 60, "h": 3600}[unit])


@dataclass(frozen=True)
class Skipped:
    """A combination that cannot be: ``what`` is a strategy or a task."""

    model: str
    what: str
    why: str


@dataclass
class Outcome:
    """How a call of `compare` went. ``new``: results of this call; ``there``: those that the store had already.

    ``stopped``: None, or why it ended early ("budget"). ``settings``: the keys of its results have it.
    """

    settings: str
    new: int = 0
    there: int = 0
    stopped: str | None = None
    skipped: list[Skipped] = field(default_factory=list)
    keys: list[Key] = field(default_factory=list)


def compare(
    engines: Mapping[str, Callable[[], Any]],
    strategies: Sequence[str],
    tasks: Sequence[Task],
    store: Store,
    *,
    problems: int = 8,
    seeds: Sequence[int] = (0,),
    budget: Budget | None = None,
    max_new_tokens: int = 256,
    batch: int = 1,
    facts: Mapping[str, Any] | None = None,
    report: Callable[[str, int, int], None] = lambda where, done, total: None,
) -> Outcome:
    """Run every strategy on every task with every model, as far as the budget goes; the results are in `store`.

    A seed draws a task's problems, and what is sampled. Problems are answered one at a time, all strategies on one
    before the next, so that a run that was cut short compares like with like. What the store has is not run again.
    A problem whose verifier or generation raises is kept as an error, and the run goes on.

    engines: what makes the engine of each model; called when its turn comes, and only if something is left to do.
    strategies: as `anabranch.strategies.registry.parse` reads them. budget: of this call; models share it.
    max_new_tokens: most tokens sampled one after another.
    batch: answers under way at a time, which share the engine's steps (it must have `Engine.add`): several times as
        many in the same time, but their seconds are those of company, and a run that is killed loses as many. Results
        with another `batch` are other results. facts: kept with the run (the machine, say).
    report(where, done, total): called before each problem and at the end.

    >>> with Store("results.sqlite") as store:
    ...     compare({"tiny": lambda: engine}, ["plain", "self-consistency(n=4)"], [find_task("multiplication")], store)

    Raises:
        ValueError: an unknown strategy, nothing to run, or a store that has other problems under the same name.
        OSError: the store cannot be written; what is in it is safe.
        RemoteError: the server of a `RemoteEngine` cannot be reached.
    """
    if not engines or not strategies or not tasks or problems < 1 or not seeds:
        raise ValueError("compare: pass at least one model, one strategy, one task, one problem and one seed")
    built = {registry.spelled(text): registry.parse(text) for text in strategies}
    whole(batch, "compare: batch", 1)
    company = {"batch": batch} if batch > 1 else {}
    settings = json.dumps({"max_new_tokens": max_new_tokens, "do_sample": False, **company}, sort_keys=True)
    outcome, begun = Outcome(settings), time.perf_counter()
    items = {(task.name, seed): task.items(problems, seed) for task in tasks for seed in seeds}
    there = store.prompts()
    plans = {model: _plan(model, built, tasks, seeds, items, settings) for model in engines}
    for plan in plans.values():
        _check_prompts(plan, there, store)
    total = sum(map(len, plans.values()))
    outcome.there = sum(key in there for plan in plans.values() for key, _ in plan)
    done, tokens = outcome.there, 0
    hashes = {f"{name}, seed {seed}": prompt_hash([i.prompt for i in some]) for (name, seed), some in items.items()}
    store.begin({
        "versions": _versions(), "models": list(engines), "strategies": {n: repr(s) for n, s in built.items()},
        "tasks": [task.name for task in tasks], "problems": problems, "seeds": list(seeds),
        "settings": json.loads(settings), "prompts_sha256": hashes,
        "budget": None if budget is None else vars(budget), **(facts or {}),
    })  # fmt: skip

    def keep(row: Row) -> None:
        nonlocal tokens, done
        store.add(row)
        tokens += (row.metrics or {}).get("total_tokens", 0)
        outcome.new += 1
        done += 1

    for index, (model, plan) in enumerate(plans.items()):
        outcome.keys += [key for key, _ in plan]
        left = [(key, item) for key, item in plan if key not in there]
        if not left:
            continue
        limit = budget and budget.share(tokens, time.perf_counter() - begun, len(plans) - index)
        engine = engines[model]()
        skips = _misfits(model, engine, built, tasks, items)
        outcome.skipped += skips
        out = {skip.what for skip in skips}
        window = Window(engine, batch, max_new_tokens)
        with window:
            for key, item in left:
                if key.strategy in out or key.task in out:
                    total -= 1
                    continue
                if limit is not None and limit.spent(tokens, time.perf_counter() - begun):
                    outcome.stopped = "budget"
                    break
                report(f"{model}, {key.task}, {key.strategy}", done, total)
                window.begin(key, item, built[key.strategy])
                for row in window.finished():
                    keep(row)
            for row in window.finished(all_of_them=True):
                keep(row)
    report("done", done, total)
    return outcome


def _plan(
    model: str, built: Mapping[str, Strategy], tasks: Sequence[Task], seeds: Sequence[int],
    items: Mapping[tuple[str, int], Sequence[Item]], settings: str,
) -> list[tuple[Key, Item]]:  # fmt: skip
    """Every problem of a model, all strategies on one before the next, and a problem of every task in turn."""
    most = max(map(len, items.values()))
    return [
        (Key(model, strategy, task.name, seed, number, settings), items[task.name, seed][number])
        for seed in seeds
        for number in range(most)
        for task in tasks
        if number < len(items[task.name, seed])
        for strategy in built
    ]


def _check_prompts(plan: Sequence[tuple[Key, Item]], there: Mapping[Key, str], store: Store) -> None:
    for key, item in plan:
        if key in there and there[key] != prompt_hash(item.prompt):
            raise ValueError(
                f"store {store.path!r}: problem {key.problem} of task {key.task!r}, seed {key.seed}, is not the one "
                "that the task gives now (another version of it, or another file); name another store"
            )


def _misfits(
    model: str, engine: Any, built: Mapping[str, Strategy], tasks: Sequence[Task],
    items: Mapping[tuple[str, int], Sequence[Item]],
) -> list[Skipped]:  # fmt: skip
    """Strategies whose tags the model does not know, and tasks that its vocabulary cannot spell."""
    tokenizer, found = engine.tokenizer, []
    vocabulary = tokenizer.get_vocab() if hasattr(tokenizer, "get_vocab") else None
    for name, strategy in built.items():
        tags = getattr(_innermost(strategy), "tags", ())
        if vocabulary is not None and (missing := [tag for tag in tags if tag not in vocabulary]):
            found.append(Skipped(model, name, f"{missing[0]} is no token of the model's vocabulary"))
    unknown = getattr(tokenizer, "unk_token_id", None)
    for task in tasks:
        prompt = next(item.prompt for (name, _), some in items.items() if name == task.name for item in some)
        if unknown is not None and isinstance(prompt, str) and unknown in tokenizer(prompt)["input_ids"]:
            found.append(Skipped(model, task.name, "the model's vocabulary cannot spell its prompts"))
    return found


def _innermost(strategy: Strategy) -> Strategy:
    while isinstance(inner := getattr(strategy, "strategy", None), Strategy):
        strategy = inner
    return strategy


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for package in ("anabranch", "torch", "transformers", "reasoning-gym", "math-verify", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found
