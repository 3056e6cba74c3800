"""``anabranch generate``: one prompt through the engine."""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anabranch.cli.common import USAGE, Mistake, check_save, load_model, load_tokenizer
from anabranch.viz.console import consoles, plain_terminal, printable

COUNTS = ("n", "paths", "workers", "width")  # how strategies call the number of their branches


@dataclass(frozen=True)
class Options:
    """What the command line asked for; None leaves a default alone."""

    prompt: str
    model: str = "smollm2"
    strategy: str = "none"
    strategy_options: tuple[str, ...] = ()
    n: int | None = None
    vote: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int = 0
    max_new_tokens: int = 256
    chat: bool | None = None
    template_kwargs: str | None = None
    stream: bool = False
    as_json: bool = False
    save: Path | None = None
    num_pages: int | None = None
    page_size: int = 16
    backend: str = "auto"
    dtype: str = "auto"
    url: str | None = None
    api_key: str | None = None


def run(options: Options) -> None:
    """The whole command."""
    _check(options)
    template = _template(options.template_kwargs)
    strategy = _strategy(options)
    prompt = _read(options.prompt)
    out, err = consoles()
    interactive = not options.as_json and not plain_terminal(err)
    if interactive:
        from anabranch import models

        if options.model in models.names():
            models.path(options.model)  # its bar and our spinner must not draw at the same time
    with err.status("loading the model …") if interactive else nullcontext():
        import anabranch as ab
        from anabranch.text.prompts import takes_chats

        model: Any = None
        dtype: Any = "the server's"
        if options.url is None:
            model, tokenizer, dtype = load_model(options.model, options.dtype)
        else:
            tokenizer = load_tokenizer(options.model)
        chat = takes_chats(tokenizer) if options.chat is None else options.chat
        if template and not chat:
            raise Mistake("--template-kwargs is for a chat template, and this prompt goes through none", USAGE)
        engine: Any
        if options.url is not None:
            engine = ab.RemoteEngine(options.url, tokenizer, options.api_key)
        else:
            engine = ab.Engine(
                model, tokenizer, num_pages=options.num_pages, page_size=options.page_size, backend=options.backend
            )
    asked: Any = [{"role": "user", "content": prompt}] if chat else prompt
    call = {
        "strategy": strategy,
        "seed": options.seed,
        "max_new_tokens": options.max_new_tokens,
        **({"chat_template_kwargs": template} if template else {}),
        **_sampling(options),
        **({"logprobs": True} if options.save is not None else {}),  # `view` colours by them
    }
    try:
        if options.stream and not options.as_json:
            result = _stream(engine, asked, call, out, options)
        else:
            with err.status("writing …") if interactive else nullcontext():
                result = engine.generate(asked, **call)
    except KeyboardInterrupt:
        engine.abort()
        raise
    if options.save is not None:
        result.trace().save(options.save)
    if options.as_json:
        from anabranch.viz.card import as_json

        report = as_json(
            result, model=options.model, dtype=str(dtype).removeprefix("torch."), prompt=prompt, comparison=None,
            command="generate",
        )  # fmt: skip
        print(json.dumps(report, ensure_ascii=False, default=str))
        return
    if not options.stream:
        text = (result.text or "").strip()
        print(printable(text) if out.is_terminal else text)
        if options.vote is not None and isinstance(result.answers, list):
            answers = ", ".join(str(a) for a in result.answers)
            err.print(f"answers: {answers}", style="dim", markup=False)
    m = result.metrics
    parts = [f"{m.total_tokens} tokens in {m.wall_seconds:.2f} s ({m.total_tokens / m.wall_seconds:.1f}/s)"]
    if m.num_threads:
        parts.append(f"{m.num_threads} threads, {m.token_speedup:.2f}× in tokens, cache shared {m.sharing:.2f}×")
    err.print(" · ".join(parts), style="dim")


def _check(options: Options) -> None:
    names = ("auto", "cpu", "triton", "cuda", "reference")
    if options.backend not in names:
        raise Mistake(f"--backend {options.backend!r}: expected one of {', '.join(names)}", USAGE)
    check_save(options.save)


def _template(text: str | None) -> dict[str, Any]:
    """What the chat template takes besides the message, from JSON."""
    if text is None:
        return {}
    try:
        given = json.loads(text)
    except json.JSONDecodeError as error:
        raise Mistake(f"--template-kwargs {text!r}: not JSON ({error})", USAGE) from None
    if not isinstance(given, dict):
        raise Mistake(f"--template-kwargs {text!r}: expected an object, e.g. '{{\"enable_thinking\": false}}'", USAGE)
    return given


def _read(prompt: str) -> str:
    text = sys.stdin.read() if prompt == "-" else prompt
    if not text.strip():
        raise Mistake("PROMPT is empty" + (" (nothing came on standard input)" if prompt == "-" else ""), USAGE)
    return text.rstrip("\n") if prompt == "-" else text


def _strategy(options: Options) -> Any:
    """The strategy with its options; None for plain decoding."""
    from anabranch.strategies import Plain, registry

    try:
        name, inside = registry.take_apart(options.strategy)
        given = {**inside, **_given(options)}
        if registry.find(name) is Plain:
            for flag, value in (("-n", options.n), ("--vote", options.vote)):
                if value is not None:
                    raise Mistake(f"{flag} needs a strategy; add --strategy self-consistency, for one", USAGE)
            return registry.build(name, given) if given else None
        return registry.build(name, _with_short_options(options, name, given))
    except ValueError as error:
        raise Mistake(f"--strategy: {error}", USAGE) from None


def _with_short_options(options: Options, name: str, given: dict[str, Any]) -> dict[str, Any]:
    """What -n, --vote, --temperature and --top-p mean to a strategy; an option of its own name goes first."""
    from anabranch.strategies import Aspects, registry

    known = [option.name for option in registry.describe(name).options]
    if registry.find(name) is Aspects and "headers" not in given:
        from anabranch.cli.demo import CONCLUSION, headers

        leads = tuple(f"\n\n{h}" for h in headers(options.n, None))
        return {"headers": leads, "conclusion": f"\n\n{CONCLUSION}", **given}
    if options.n is not None:
        count = next((field for field in COUNTS if field in known), None)
        if count is None:
            raise Mistake(f"-n is for strategies with {', '.join(COUNTS)}; {name} has none of them", USAGE)
        given.setdefault(count, options.n)
    if options.vote is not None:
        if "vote" not in known:
            raise Mistake(f"--vote is for strategies that vote, such as self-consistency; {name} does not", USAGE)
        given.setdefault("vote", options.vote)
    for field in ("temperature", "top_p"):
        if getattr(options, field) is not None and field in known:
            given.setdefault(field, getattr(options, field))
    if given.get("temperature") in (0, "0", "0.0"):
        raise Mistake(f"--temperature 0 makes all branches of {name} the same; pass one above 0", USAGE)
    return given


def _given(options: Options) -> dict[str, Any]:
    """--strategy-option KEY=VALUE as a mapping."""
    given: dict[str, Any] = {}
    for option in options.strategy_options:
        key, equals, value = option.partition("=")
        if not equals or not key.strip():
            raise Mistake(f"--strategy-option {option!r}: expected KEY=VALUE, as in n=4", USAGE)
        if key.strip() in given:
            raise Mistake(f"--strategy-option {key.strip()}: given twice", USAGE)
        given[key.strip()] = value
    return given


def _sampling(options: Options) -> dict[str, Any]:
    if options.temperature is None and options.top_p is None:
        return {}
    if options.temperature == 0.0:
        return {"do_sample": False}
    chosen = {"temperature": options.temperature, "top_p": options.top_p}
    return {"do_sample": True} | {k: v for k, v in chosen.items() if v is not None}


def _stream(engine: Any, prompt: Any, call: dict[str, Any], out: Any, options: Options) -> Any:
    """Plain decoding: the text as it comes. With a strategy: the tree, live in a terminal, as lines elsewhere."""
    from anabranch.records.events import Token
    from anabranch.viz.story import Story
    from anabranch.viz.terminal import Lines, Picture, follow

    story, plain = Story(engine), call["strategy"] is None
    live = not plain and not plain_terminal(out)
    lines = None if plain or live else Lines(out, story)
    stream = engine.stream(prompt, **call)
    try:
        with ExitStack() as stack:
            if live:
                stack.enter_context(follow(out, story, []))
            for event in stream:
                story.take(event)
                if plain and isinstance(event, Token) and event.text:
                    print(printable(event.text) if out.is_terminal else event.text, end="", flush=True)
                elif lines is not None:
                    lines.take(event)
    finally:
        stream.close()
        if plain:
            print()
    if live:
        out.print(Picture(story, live=False))
    assert story.result is not None
    if any(node.fate == "discarded" for node in story.result.tree.walk()):  # the picture does not say which one won
        out.print(f"\n{printable((story.result.text or '').strip())}", markup=False, soft_wrap=True)
    return story.result
