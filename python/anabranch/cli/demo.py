"""``anabranch demo``: which of the two to show; and the one for models that were not taught to fork.

Those answer from several sides: the live cache is forked in mid-answer, one branch a lead-in, and joined by splicing.
Models that decide themselves are shown in `anabranch.cli.adaptive`.
"""

from __future__ import annotations

import functools
import json
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anabranch.cli.common import FAILED, USAGE, Mistake, check_save, load_model
from anabranch.viz.console import consoles, plain_terminal

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from anabranch.records.result import Result
    from anabranch.viz.story import Story

DECIDING = ("multiplication", "smollm2-adaptive")  # models of ours that were taught to fork
QUESTION = "Should I learn to play the piano as an adult?"
# Lead-ins, not titles: a small model goes on with a sentence behind them, but behind a title likes to leave a blank
# line, which ends the branch.
HEADERS = (
    "On the one hand,",
    "On the other hand,",
    "For example,",
    "A common mistake is",
    "Most importantly,",
    "In practice,",
    "Over time,",
    "For a beginner,",
)
CONCLUSION = "In conclusion,"
INTRO_TOKENS, CONCLUSION_TOKENS = 48, 72  # at most
SAMPLING = {"do_sample": True, "temperature": 0.5, "top_p": 0.9}


@dataclass(frozen=True)
class Options:
    """What the command line asked for."""

    prompt: str
    model: str = "smollm2"
    sequential: bool = False
    as_json: bool = False
    seed: int = 0
    max_new_tokens: int = 200
    branch_tokens: int = 40
    save: Path | None = None
    headers: tuple[str, ...] = HEADERS[:4]
    compare: bool = True
    dtype: str = "auto"
    strategy: str | None = None  # shown instead of the lead-ins


def headers(branches: int | None, own: list[str] | None) -> tuple[str, ...]:
    """The lead-ins of the branches, from --branches and --header."""
    if own:
        if branches is not None and branches != len(own):
            raise Mistake(f"--branches {branches} with {len(own)} --header: leave --branches out", USAGE)
        if not all(h.strip() for h in own):
            raise Mistake("--header is empty: give each branch the words that it begins with", USAGE)
        return tuple(h.strip() for h in own)
    count = 4 if branches is None else branches
    if count > len(HEADERS):
        raise Mistake(
            f"--branches {count}: there are {len(HEADERS)} lead-ins; give your own with --header, once a branch", USAGE
        )
    return HEADERS[:count]


def choose(
    *, prompt: str | None, model: str | None, branches: int | None, header: list[str] | None, sequential: bool,
    seed: int, max_new_tokens: int | None, branch_tokens: int, compare: bool, save: Path | None, dtype: str,
    as_json: bool, strategy: str | None = None, port: int | None = None,
) -> None:  # fmt: skip
    """Lead-ins where they are asked for, or where the model does not know the tags; else the model decides.

    port: None shows it in the terminal, a number in a browser (0: a free port).
    """
    check_save(save)
    if port is not None and (as_json or save is not None):
        raise Mistake("--web with --json or --save: leave those out; `anabranch generate` has them, too", USAGE)
    show = run if port is None else functools.partial(_show_in_browser, port)
    leads = headers(branches, header)
    wanted = branches is not None or bool(header)
    if strategy is not None:
        if wanted or sequential:
            raise Mistake(
                "--strategy with --branches, --header or --sequential: leave those out; options go as in "
                "'self-consistency(n=4)', and 'sequential(NAME)' runs its threads one after another",
                USAGE,
            )
        _named(strategy)
        show(
            Options(
                prompt=QUESTION if prompt is None else prompt, model=model or "smollm2", as_json=as_json, seed=seed,
                max_new_tokens=max_new_tokens or 200, branch_tokens=branch_tokens, save=save, compare=False,
                dtype=dtype, strategy=strategy,
            )
        )  # fmt: skip
        return
    if wanted and model in DECIDING:
        raise Mistake(f"--branches and --header with --model {model}: this model decides itself; leave them out", USAGE)
    if wanted or (model is not None and not _decides(model)):
        show(
            Options(
                prompt=QUESTION if prompt is None else prompt, model=model or "smollm2", sequential=sequential,
                as_json=as_json, seed=seed, max_new_tokens=max_new_tokens or 200, branch_tokens=branch_tokens,
                save=save, compare=compare, dtype=dtype, headers=leads,
            )
        )  # fmt: skip
        return
    from anabranch.cli import adaptive

    if port is not None:
        adaptive.show_in_browser(
            adaptive.cases(prompt, model), port, sequential=sequential, seed=seed, dtype=dtype,
            max_new_tokens=max_new_tokens or 1024,
        )  # fmt: skip
        return
    adaptive.run(
        adaptive.cases(prompt, model), sequential=sequential, as_json=as_json, seed=seed, compare=compare, save=save,
        max_new_tokens=max_new_tokens or 1024, dtype=dtype,
    )  # fmt: skip


def _named(strategy: str) -> Any:
    """A strategy by name, with its options."""
    from anabranch.strategies import registry

    try:
        return registry.parse(strategy)
    except ValueError as error:
        raise Mistake(f"--strategy: {error}", USAGE) from None


def _decides(model: str) -> bool:
    """Whether this model's tokenizer has the tags; a folder's is looked at, the rest is known."""
    if model in DECIDING:
        return True
    file = Path(model).expanduser() / "tokenizer.json"
    if not file.is_file():
        return False
    from tokenizers import Tokenizer

    from anabranch.cli.evaluate import strategy_for

    return strategy_for(Tokenizer.from_file(str(file))) is not None


def _show_in_browser(port: int, options: Options) -> None:
    """The demo with lead-ins, on the live page."""
    from anabranch.cli import web

    _check_prompt(options)

    def shown(tokenizer: Any) -> list[Any]:
        from anabranch.serve.demo import Shown

        _check_template(options, tokenizer)
        return [
            Shown(options.prompt, _chat(options), {"strategy": _strategy(options), **_sampling(options, tokenizer)})
        ]

    web.run(options.model, options.dtype, port, shown)


def _check_prompt(options: Options) -> None:
    if not options.prompt.strip():
        raise Mistake("PROMPT is empty: ask something, or leave it out for a question of ours", USAGE)


def _check_template(options: Options, tokenizer: Any) -> None:
    from anabranch.text.prompts import takes_chats

    if not takes_chats(tokenizer):
        raise Mistake(
            f"--model {options.model!r}: its tokenizer has no chat template, and the demo asks a question; "
            "use `anabranch generate --raw` for a base model",
            FAILED,
        )


def run(options: Options) -> None:
    """The demo with lead-ins."""
    _check_prompt(options)
    out, err = consoles()
    quiet = options.as_json
    live = not quiet and not plain_terminal(out)
    engine, dtype = _engine(options, out if live else None)
    story, context = _follow(engine, options, out, live, quiet, dtype)
    result = story.result
    assert result is not None
    comparison = None
    if not quiet:
        from anabranch.viz import card as score

        score.show(out, result, engine.cache.page_size, story.peak)
    if options.save is not None:
        result.trace().save(options.save)
        if not quiet:
            out.print(f"\ntrace saved; look at it with: anabranch view {options.save}", style="dim", soft_wrap=True)
    if options.compare:
        comparison = _compare(engine, result, context, options, out if live else None)
        if comparison is None:
            why = "One branch alone" if result.tree.children else "The answer ended before it could fork"
            (err if quiet else out).print(f"\n{why}, so there is nothing to compare.", style="dim")
        elif not quiet:
            from anabranch.viz import card as score

            score.show_comparison(out, comparison, dtype)
    if quiet:
        from anabranch.viz import card as score

        report = score.as_json(
            result, model=options.model, dtype=dtype, prompt=options.prompt, comparison=comparison, command="demo"
        )
        print(json.dumps(report, ensure_ascii=False, default=str))


def _engine(options: Options, console: Console | None) -> tuple[Any, str]:
    if console is not None:
        from anabranch import models

        if options.model in models.names():
            models.path(options.model)  # its bar and our spinner must not draw at the same time
    with console.status("loading the model …") if console is not None else nullcontext():
        import anabranch as ab

        model, tokenizer, dtype = load_model(options.model, options.dtype)
        _check_template(options, tokenizer)
        pages = _pages(options, tokenizer) if options.strategy is None else None
        return ab.Engine(model, tokenizer, num_pages=pages), str(dtype).removeprefix("torch.")


def _pages(options: Options, tokenizer: Any) -> int:
    """Pages of 16 tokens for all that may be written, with room for a header of one token a byte."""
    from anabranch.text.prompts import Text

    ids = Text(tokenizer, len(tokenizer)).prompt_ids(_chat(options))
    trunk = len(ids) + INTRO_TOKENS + CONCLUSION_TOKENS + len(CONCLUSION) + 2
    branches = sum(len(h.encode()) + 2 + _most(options) for h in options.headers)
    return (trunk + branches) // 16 + 4 * len(options.headers) + 8


def _most(options: Options) -> int:
    """Tokens of a branch at most: it may finish its sentence."""
    return options.branch_tokens + max(1, options.branch_tokens // 2)


def _chat(options: Options) -> list[dict[str, str]]:
    return [{"role": "user", "content": options.prompt}]


class EndOfThought:
    """A stopping criterion: a paragraph ends at a blank line, or with its sentence once it has `enough` tokens.

    Strategies limit a branch by tokens alone, which cuts in mid-sentence; a demo is to be read.
    """

    def __init__(self, tokenizer: Any, enough: int):
        from anabranch.text.tokens import Tokens

        self.tokens, self.enough = Tokens(tokenizer), enough

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        return input_ids.new_tensor([self.ends(row) for row in input_ids.tolist()]).bool()

    def ends(self, ids: list[int]) -> bool:
        """Whether a thread with this context is to stop here."""
        last = self._end_of(ids, 3).rstrip(" ")
        if last.endswith("\n\n"):
            return True
        # A lead-in begins with a blank line, so one among the last `enough` tokens means that there were fewer since.
        return last.endswith((".", "!", "?")) and "\n\n" not in self._end_of(ids, self.enough)

    def _end_of(self, ids: list[int], count: int) -> str:
        """Text of the last `count` tokens, as it reads there."""
        begin = max(0, len(ids) - count)
        return self.tokens.reading(ids[begin:], self.tokens.place(reversed(ids[:begin])))


def _strategy(options: Options) -> Any:
    from anabranch.strategies import Aspects, Sequential

    if options.strategy is not None:
        return _named(options.strategy)
    aspects = Aspects(
        headers=tuple(f"\n\n{h}" for h in options.headers),
        conclusion=f"\n\n{CONCLUSION}",
        aspect_tokens=_most(options),
        intro_tokens=INTRO_TOKENS,
        conclusion_tokens=CONCLUSION_TOKENS,
    )
    return Sequential(aspects) if options.sequential else aspects


def _follow(
    engine: Any, options: Options, console: Console, live: bool, quiet: bool, dtype: str
) -> tuple[Story, list[int]]:
    """Run it, drawing; returns the story with its result, and the token ids before the fork (none without one)."""
    from anabranch.viz.terminal import tell

    sampling = _sampling(options, engine.tokenizer)
    stream = engine.stream(_chat(options), strategy=_strategy(options), logprobs=options.save is not None, **sampling)
    story = tell(engine, stream, console, _heading(options, dtype), live, quiet)
    assert story.result is not None
    result = story.result
    tree = result.tree
    if not tree.children:
        return story, []
    before = tree.children[0].forked_at - len(result.prompt_token_ids)
    return story, [*result.prompt_token_ids, *result.token_ids[:before]]


def _sampling(options: Options, tokenizer: Any) -> dict[str, Any]:
    sampling: dict[str, Any] = {"seed": options.seed, "max_new_tokens": options.max_new_tokens, **SAMPLING}
    if options.strategy is None:
        sampling["stopping_criteria"] = [EndOfThought(tokenizer, options.branch_tokens)]
    return sampling


def _heading(options: Options, dtype: str) -> list[RenderableType]:
    from rich.text import Text

    name = "SmolLM2-135M-Instruct" if options.model == "smollm2" else options.model
    how = options.strategy or (
        "one branch after another" if options.sequential else f"{len(options.headers)} branches at once"
    )
    title = Text.assemble(("anabranch", "bold"), (f"  {name}, {dtype}, {how}", "dim"))
    return [title, Text.assemble(("Q ", "bold cyan"), (options.prompt, "bold")), Text("")]


def _compare(engine: Any, result: Result, context: list[int], options: Options, console: Console | None) -> Any:
    from anabranch.cli.compare import compare

    kids = result.tree.children
    if len(kids) < 2 or not context:
        return None
    from anabranch.viz.card import written

    longest = max(map(written, kids))
    with console.status("the same fork through model.generate …") if console is not None else nullcontext():
        return compare(engine, context, len(kids), longest)
