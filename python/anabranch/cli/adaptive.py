"""``anabranch demo`` with a model that decides itself: whether to fork, into how many threads, and how to go on."""

from __future__ import annotations

import json
import re
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from anabranch.cli.common import Mistake, load_model
from anabranch.viz.console import consoles, machine_note, plain_terminal

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from rich.console import Console, RenderableType

    from anabranch.viz.story import Story

PRODUCT = re.compile(r"\s*(\d{1,4})\s*[*x×]\s*(\d{1,4})\s*=?\s*")


@dataclass(frozen=True)
class Case:
    """A question, and its answer where it is known."""

    model: str
    prompt: str
    answer: str | None = None
    about: str = ""


# What `anabranch demo` shows when it is not asked for anything: for each model a problem with parts and one without.
SHOWN = (
    Case("multiplication", "7308 * 4406", "32199048", "three digits of the multiplier are not zero: three threads"),
    Case("multiplication", "7308 * 4000", "29232000", "one digit is: nothing to do side by side"),
    Case(
        "smollm2-adaptive",
        "Laura buys 7 oranges at 38 cents each and a bag for 5 cents. Hugo buys 4 bottles at 46 cents each and a bag "
        "for 8 cents. Nora buys 9 pencils at 17 cents each and a bag for 3 cents. Max buys 6 shells at 23 cents each "
        "and a bag for 6 cents. How many cents does each of them pay?",
        "Laura 271, Hugo 192, Nora 156, Max 144",
        "four people who do not depend on one another",
    ),
    Case(
        "smollm2-adaptive",
        "Maria has 35 tickets. Then 7 more come. Next 8 are given away. After that 6 are won. How many tickets are "
        "there in the end?",
        "40",
        "four sentences, but each step needs the one before",
    ),
)


@dataclass
class Timing:
    """Seconds of one whole answer, best of `rounds` in turns, without a display."""

    rounds: int
    forked: float
    sequential: float

    @property
    def speedup(self) -> float:
        return self.sequential / self.forked


@dataclass
class Told:
    """A case with what came of it."""

    case: Case
    story: Story
    right: bool | None
    timing: Timing | None = None  # None as well where nothing forked: both ways are then the same

    @property
    def forked(self) -> bool:
        assert self.story.result is not None
        return self.story.result.metrics.num_threads > 0


def cases(prompt: str | None, model: str | None) -> list[Case]:
    """What to show; `model` None: chosen by the prompt."""
    if prompt is None:
        return [c for c in SHOWN if model in (None, c.model)] or [Case(model or "", SHOWN[2].prompt)]
    if not prompt.strip():
        raise Mistake("PROMPT is empty: ask something, or leave it out for questions of ours", 2)
    found = PRODUCT.fullmatch(prompt)
    if found is not None and model in (None, "multiplication"):
        return [Case("multiplication", prompt.strip(), str(int(found[1]) * int(found[2])))]
    if model == "multiplication":
        raise Mistake(
            f"PROMPT {prompt!r}: the multiplication model reads a product of two numbers of up to four digits, such as "
            "'7308 * 4406', and nothing else",
            2,
        )
    return [Case(model or "smollm2-adaptive", prompt)]


def run(
    shown: Sequence[Case], *, sequential: bool, as_json: bool, max_new_tokens: int, seed: int, compare: bool,
    save: Path | None, dtype: str,
) -> None:  # fmt: skip
    """The whole command."""
    out, err = consoles()
    live = not as_json and not plain_terminal(out)
    told: list[Told] = []
    missing: list[str] = []
    engines: dict[str, tuple[Any, str]] = {}
    for case in shown:
        if case.model in missing:
            continue
        try:
            engine, kind = engines.get(case.model) or _engine(case.model, dtype)
        except Exception as error:
            from anabranch import models

            rest = any(c.model not in (*missing, case.model) for c in shown)
            if not isinstance(error, models.ModelUnavailable) or not (told or rest):
                raise
            missing.append(case.model)
            (err if as_json else out).print(f"\n{case.model} is left out: {error}", style="yellow", markup=False)
            continue
        engines[case.model] = engine, kind
        if told and not as_json:
            out.print()
        first = not told
        one = _tell(
            engine, case, out, live, as_json, kind, sequential, max_new_tokens, seed, save is not None and first
        )
        told.append(one)
        if save is not None and first:
            assert one.story.result is not None
            one.story.result.trace().save(save)
        if compare and one.forked:
            one.timing = _time(engine, case, max_new_tokens, seed)
        if not as_json:
            out.print(_card(one))
            if save is not None and first:
                out.print(f"trace saved; look at it with: anabranch view {save}", style="dim", soft_wrap=True)
    if as_json:
        print(json.dumps(_report(told, sequential), ensure_ascii=False, default=str))
    elif told:
        kinds = ", ".join(sorted({kind for _, kind in engines.values()}))
        out.print(f"\n{machine_note()}; {kinds}", style="dim")


def show_in_browser(
    shown: Sequence[Case], port: int, *, sequential: bool, max_new_tokens: int, seed: int, dtype: str
) -> None:
    """The cases of the first one's model, on the live page."""
    from anabranch.cli import web

    name = shown[0].model

    def of(tokenizer: Any) -> list[Any]:
        from anabranch.serve.demo import Shown

        _check_tags(name, tokenizer)
        options = {
            "strategy": _strategy(sequential), "max_new_tokens": max_new_tokens, "seed": seed, "do_sample": False,
        }  # fmt: skip
        return [Shown(case.prompt, _asked(tokenizer, case), options) for case in shown if case.model == name]

    web.run(name, dtype, port, of)


def _check_tags(name: str, tokenizer: Any) -> None:
    from anabranch.cli.evaluate import strategy_for

    if strategy_for(tokenizer) is None:
        raise Mistake(f"--model {name!r}: ThreadWeaver's tags are not single tokens of its vocabulary")


def _engine(name: str, dtype: str) -> tuple[Any, str]:
    import anabranch as ab

    model, tokenizer, kind = load_model(name, dtype)
    _check_tags(name, tokenizer)
    return ab.Engine(model, tokenizer), str(kind).removeprefix("torch.")


def _asked(tokenizer: Any, case: Case) -> Any:
    from anabranch.text.prompts import as_message, takes_chats

    return as_message(case.prompt, takes_chats(tokenizer))


def _strategy(sequential: bool) -> Any:
    import anabranch as ab

    return ab.Sequential(ab.ThreadWeaver()) if sequential else ab.ThreadWeaver()


def _tell(
    engine: Any,
    case: Case,
    console: Console,
    live: bool,
    quiet: bool,
    kind: str,
    sequential: bool,
    most: int,
    seed: int,
    logprobs: bool,
) -> Told:
    """Run it once, drawing."""
    from anabranch.evaluation.evaluate import is_right
    from anabranch.viz.terminal import tell

    stream = engine.stream(
        _asked(engine.tokenizer, case),
        strategy=_strategy(sequential),
        max_new_tokens=most,
        seed=seed,
        do_sample=False,
        logprobs=logprobs,
    )
    story = tell(engine, stream, console, _heading(case, kind, sequential), live, quiet)
    assert story.result is not None
    right = None if case.answer is None else is_right(story.result.text or "", case.answer)
    return Told(case, story, right)


def _heading(case: Case, kind: str, sequential: bool) -> list[RenderableType]:
    from rich.text import Text

    how = "its threads one after another" if sequential else "its threads at once"
    title = Text.assemble(("anabranch", "bold"), (f"  {case.model}, {kind}; the model decides, {how}", "dim"))
    question = Text.assemble(("Q ", "bold cyan"), (case.prompt, "bold"))
    return [title, question, Text("")]


def _time(engine: Any, case: Case, most: int, seed: int, patience: float = 4.0) -> Timing:
    """Forked and sequential in turns, after a warm-up that is not counted: two rounds, three where they are short."""

    def run(sequential: bool, most: int) -> float:
        start = time.perf_counter()
        engine.generate(
            _asked(engine.tokenizer, case),
            strategy=_strategy(sequential),
            max_new_tokens=most,
            seed=seed,
            do_sample=False,
        )
        return time.perf_counter() - start

    best = {False: float("inf"), True: float("inf")}
    for sequential in best:
        run(sequential, min(most, 8))
    begin, rounds = time.perf_counter(), 0
    while rounds < 2 or (rounds < 3 and time.perf_counter() - begin < patience):
        for sequential in sorted(best, reverse=rounds % 2 == 1):
            best[sequential] = min(best[sequential], run(sequential, most))
        rounds += 1
    return Timing(rounds, best[False], best[True])


def _card(told: Told) -> RenderableType:
    from rich.table import Table

    assert told.story.result is not None
    m = told.story.result.metrics
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", justify="right", min_width=16)
    table.add_column(style="bold", justify="right", no_wrap=True)
    table.add_column(style="dim")
    table.add_row("")
    table.add_row("threads chosen", str(m.num_threads), told.case.about or "by the model")
    if told.right is not None:
        mark = "[green]right[/green]" if told.right else f"[red]wrong[/red], expected {told.case.answer}"
        table.add_row("answer", mark, "")
    table.add_row("tokens", str(m.total_tokens), f"{m.critical_path_tokens} on the critical path")
    p = told.story.peak
    if told.forked:
        table.add_row("token speed-up", f"{m.token_speedup:.2f}×", "tokens ÷ critical path")
        if (t := told.timing) is not None:
            seconds = f"{t.forked:.2f} s forked, {t.sequential:.2f} s sequential"
            table.add_row("wall clock", f"{t.speedup:.2f}×", f"{seconds}; best of {t.rounds} rounds in turns")
        shared = f"at the fullest: {p.logical} tokens seen, {p.physical} held"
        table.add_row("cache shared", f"{p.sharing:.2f}×", shared)
    else:
        table.add_row("speed-up", "–", "it did not fork, so there is nothing to compare")
    table.add_row("deciding", f"{100 * m.overhead:.1f} %", "of the time: strategy, forks, joins, planning")
    return table


def _report(told: Sequence[Told], sequential: bool) -> dict[str, Any]:
    """``--json``: one entry a problem; metrics by their names in `anabranch.records.metrics`."""
    entries = []
    for one in told:
        result = one.story.result
        assert result is not None
        entries.append({
            "model": one.case.model, "prompt": one.case.prompt, "expected": one.case.answer, "right": one.right,
            "text": result.text, "threads": result.metrics.num_threads, "metrics": result.metrics.as_dict(),
            "overhead": result.metrics.overhead, "malformed": list(result.malformed),
            "forked": one.forked,
            "timing": {**asdict(one.timing), "speedup": one.timing.speedup} if one.timing else None,
        })  # fmt: skip
    return {
        "schema": "anabranch.demo", "version": 2, "sequential": sequential, "problems": entries,
        "machine": {"note": machine_note()},
    }  # fmt: skip
