"""The commands and their options; what they do is in one file each. Imports nothing heavy."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from anabranch import __version__
from anabranch.cli.common import USAGE, Mistake, command
from anabranch.cli.comparing import commands as comparing
from anabranch.cli.options import (
    Compile,
    DebugOption,
    Dtype,
    DtypeOption,
    JsonOption,
    ModelOption,
    SaveOption,
    SeedOption,
)
from anabranch.cli.options import examples as _examples
from anabranch.cli.options import flag as _flag

app = typer.Typer(
    add_completion=True,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""Fork a language model in mid-answer, let it think in several branches at once, and join them again.

[bold]Start here:[/bold]  anabranch demo

Branches share one paged, copy-on-write KV cache: what they have in common is computed once and lies in memory once.""",
    epilog="Exit codes: 0 done · 1 failed, with the reason · 2 wrong usage · 130 interrupted (Ctrl-C). "
    "`anabranch COMMAND --help` has examples.",
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"anabranch {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, _flag("--version", "-V", callback=_version, is_eager=True, help="Print it.")] = False,
    debug: DebugOption = False,
) -> None:
    pass


@app.command(
    epilog=_examples(
        "anabranch demo",
        "anabranch demo '7308 * 4406'",
        "anabranch demo '7308 * 4406' --sequential",
        "anabranch demo 'Robert buys 7 tiles at 38 cents each and a bag for 5 cents. Eva buys 4 shells at 46 cents "
        "each and a bag for 8 cents. What does everyone owe, in cents?'",
        "anabranch demo --model smollm2 'Is it a good idea to work from home?' --branches 3",
        "anabranch demo --strategy 'self-consistency(n=3)' 'What is the capital of France?'",
        "anabranch demo '7308 * 4406' --save trace.json && anabranch view trace.json",
        "anabranch demo --json | jq '.problems[].metrics'",
    ),
)
@command
def demo(
    prompt: Annotated[
        str | None, typer.Argument(help="A question. Left out: a few of ours.", show_default=False)
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model", "-m", metavar="NAME", show_default="by the prompt",
            help="multiplication (in the package), smollm2-adaptive, smollm2, or a Transformers folder.",
        ),
    ] = None,
    branches: Annotated[
        int | None,
        typer.Option(
            "--branches", "-n", metavar="N", min=1, max=8, show_default="4",
            help="Models that do not decide themselves: how many, with our lead-ins.",
        ),
    ] = None,
    header: Annotated[
        list[str] | None,
        typer.Option(
            "--header", "--headers", metavar="TEXT", help="The same: words a branch begins with, once for each branch."
        ),
    ] = None,
    sequential: Annotated[
        bool, _flag("--sequential", help="The same threads one after another: the fair baseline.")
    ] = False,
    strategy: Annotated[
        str | None,
        typer.Option(
            "--strategy", "-s", metavar="NAME",
            help="Show this one instead (see `anabranch strategies`), with options as in 'beam-search(width=3)'.",
        ),
    ] = None,
    seed: SeedOption = 0,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, show_default="1024; 200 for lead-ins",
            help="Most tokens sampled one after another, from the first to the last.",
        ),
    ] = None,
    branch_tokens: Annotated[
        int,
        typer.Option(
            metavar="N", min=1, help="Lead-ins: enough for a branch; it ends with its sentence, at most half more."
        ),
    ] = 40,
    compare: Annotated[
        bool, _flag("--compare/--no-compare", help="Time it once more: forked and sequential (lead-ins: generate).")
    ] = True,
    web: Annotated[bool, _flag("--web", help="Show the tree as it grows, in a browser.")] = False,
    port: Annotated[
        int, typer.Option(metavar="N", min=0, max=65535, show_default="a free one", help="Of the page of --web.")
    ] = 0,
    save: SaveOption = None,
    dtype: DtypeOption = Dtype.auto,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:  # fmt: skip
    """Watch a model decide whether to fork, into how many threads, work them at once, and join them.

    Without a prompt: problems with independent parts and without, for the multiplication model of the package and for
    SmolLM2 with our adapter. Each ends with a score card: threads chosen, tokens and critical path, wall clock forked
    and sequential, the answer checked, what deciding cost.

    A model that was not taught to fork (--model smollm2) answers from several sides instead: its live cache is forked
    in mid-answer, one branch a lead-in, and joined by splicing.
    """
    from anabranch.cli import demo as body

    body.choose(
        prompt=prompt, model=model, branches=branches, header=header, sequential=sequential, seed=seed,
        max_new_tokens=max_new_tokens, branch_tokens=branch_tokens, compare=compare, save=save, dtype=dtype.value,
        as_json=json, strategy=strategy, port=port if web else None,
    )  # fmt: skip


@app.command(
    "eval",
    epilog=_examples(
        "anabranch eval --model multiplication --problems training/multiplication/problems.jsonl --timed 40",
        "anabranch eval --model smollm2-adaptive --problems training/adaptive/problems.jsonl --limit 60",
        "anabranch eval --model smollm2 --problems my.jsonl --mode plain --json",
    ),
)
@command
def evaluate(
    problems: Annotated[
        Path,
        typer.Option(
            "--problems", "-p", metavar="FILE", show_default=False,
            help='One {"prompt", "answer"} a line; "threads" (0 = no fork) and "family" if you like.',
        ),
    ],
    model: ModelOption = "multiplication",
    mode: Annotated[
        list[str] | None,
        typer.Option("--mode", metavar="MODE", help="forked, sequential or plain; may be repeated. Default: all."),
    ] = None,
    limit: Annotated[int | None, typer.Option(metavar="N", min=1, help="So many, evenly spaced.")] = None,
    batch: Annotated[int, typer.Option(metavar="N", min=1, help="Problems at a time, for accuracy.")] = 16,
    timed: Annotated[
        int, typer.Option(metavar="N", min=0, help="Problems to time one by one, forked and sequential in turns.")
    ] = 0,
    max_new_tokens: Annotated[
        int, typer.Option(metavar="N", min=1, help="Most tokens sampled one after another.")
    ] = 1024,
    seed: SeedOption = 0,
    save: Annotated[Path | None, typer.Option("--save", metavar="FILE", help="Write the report here, as JSON.")] = None,
    dtype: DtypeOption = Dtype.auto,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:  # fmt: skip
    """Measure a model on problems with known answers: forked, forced sequential and plain.

    Accuracy with 95 % intervals, threads, malformed answers, token speed-up and, with --timed, wall clock. Greedy.
    """
    from anabranch.cli import evaluate as body

    body.run(
        body.Options(
            problems=problems, model=model, modes=tuple(mode or ()), limit=limit, batch=batch, timed=timed,
            max_new_tokens=max_new_tokens, seed=seed, as_json=json, save=save, dtype=dtype.value,
        )
    )  # fmt: skip


@app.command(
    epilog=_examples(
        "anabranch generate 'Name three rivers.'",
        "anabranch generate 'What is 17 + 25?' --strategy self-consistency -n 8 --vote number",
        "anabranch generate '7308 * 4406' --model multiplication --strategy threadweaver -o thread_tokens=200",
        "anabranch generate 'Why is the sky blue?' --strategy 'sequential(aspects)' --save trace.json",
        "cat question.txt | anabranch generate - --stream",
        "anabranch generate 'Once upon a time' --raw --model ./my-model",
        "anabranch generate 'Name three rivers.' --url http://localhost:8000/v1 --model ./my-model",
    ),
)
@command
def generate(
    prompt: Annotated[str, typer.Argument(help="The prompt; - reads it from standard input.")],
    model: ModelOption = "smollm2",
    strategy: Annotated[
        str,
        typer.Option(
            "--strategy",
            "-s",
            metavar="NAME",
            help="Who forks, and when: a name that `anabranch strategies` lists, also as 'name(option=value)'.",
        ),
    ] = "none",
    strategy_option: Annotated[
        list[str] | None,
        typer.Option("--strategy-option", "-o", metavar="KEY=VALUE", help="Of the strategy; may be repeated."),
    ] = None,
    n: Annotated[
        int | None,
        typer.Option("-n", "--branches", metavar="N", min=1, help="Branches of the strategy: its n, paths or workers."),
    ] = None,
    vote: Annotated[
        str | None,
        typer.Option(
            metavar="WHAT",
            help="Strategies that vote, such as self-consistency: number, boxed, letter, line or a pattern. Default: "
            "the likeliest branch wins.",
        ),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(
            "--temperature", "-t", metavar="T", min=0.0, help="0 is greedy. Default: the model's own settings."
        ),
    ] = None,
    top_p: Annotated[float | None, typer.Option(metavar="P", min=0.0, max=1.0, help="Nucleus sampling.")] = None,
    seed: SeedOption = 0,
    max_new_tokens: Annotated[
        int, typer.Option(metavar="N", min=1, help="Most tokens sampled one after another.")
    ] = 256,
    chat: Annotated[
        bool | None,
        _flag("--chat/--raw", help="Through the chat template (default where there is one), or as is."),
    ] = None,
    template_kwargs: Annotated[
        str | None,
        typer.Option(metavar="JSON", help='For the chat template, e.g. {"enable_thinking": false}.'),
    ] = None,
    stream: Annotated[bool, _flag("--stream", help="Show the answer as it is written.")] = False,
    save: SaveOption = None,
    url: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Of a vLLM, SGLang or llama.cpp server, such as http://host:8000/v1: it runs the model, --model names "
            "the tokenizer.",
        ),
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(metavar="KEY", envvar="ANABRANCH_API_KEY", help="For --url.", show_envvar=True)
    ] = None,
    num_pages: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Pages of the cache. Default: by free memory.")
    ] = None,
    page_size: Annotated[int, typer.Option(metavar="N", min=1, help="Tokens a page.")] = 16,
    backend: Annotated[
        str, typer.Option(metavar="NAME", help="Attention backend: auto, cpu, triton, reference.")
    ] = "auto",
    dtype: DtypeOption = Dtype.auto,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Answer a prompt: plainly, or by any strategy that `anabranch strategies` lists.

    The answer goes to standard output, a line about its cost to standard error.
    """
    from anabranch.cli import generate as body

    body.run(
        body.Options(
            prompt=prompt, model=model, url=url, api_key=api_key,
            strategy=strategy, strategy_options=tuple(strategy_option or ()), n=n,
            vote=vote, temperature=temperature, top_p=top_p,
            seed=seed, max_new_tokens=max_new_tokens, chat=chat, template_kwargs=template_kwargs, stream=stream,
            as_json=json, save=save, num_pages=num_pages, page_size=page_size, backend=backend, dtype=dtype.value,
        )
    )  # fmt: skip


@app.command(
    epilog=_examples(
        "anabranch demo --save trace.json && anabranch view trace.json",
        "anabranch view trace.json --html out.html",
        "anabranch view trace.json --perfetto out.json   (for ui.perfetto.dev)",
        "anabranch view trace.json --replay --html out.html   (confidence of every token, whatever was recorded)",
    ),
)
@command
def view(
    trace: Annotated[Path, typer.Argument(help="A file that --save wrote.", show_default=False)],
    html: Annotated[
        Path | None,
        typer.Option("--html", metavar="FILE", help="Write one self-contained page: timeline, texts, contexts."),
    ] = None,
    perfetto: Annotated[
        Path | None,
        typer.Option("--perfetto", metavar="FILE", help="Write Chrome trace events, which Perfetto opens."),
    ] = None,
    replay: Annotated[
        bool,
        _flag("--replay", help="Feed its tokens through the model again: must give the same tree; scores every token."),
    ] = False,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", metavar="NAME", help="Of --replay.", show_default="the one that wrote it"),
    ] = None,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Show a saved trace: the tree with its texts and what it cost, in the terminal or as a page for a browser.

    The page (--html) is one file that needs no network: a timeline with one lane a thread, forks and joins as arrows,
    tokens coloured by confidence, and the context that any thread saw.
    """
    from anabranch.cli import view as body

    body.run(trace, json, replay, model, html, perfetto)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    epilog=_examples(
        "anabranch bench --quick",
        "anabranch bench --builtin --json",
        "anabranch bench attention --only headline --heads 32/8   (in a checkout)",
    ),
)
@command
def bench(
    context: typer.Context,
    quick: Annotated[bool, _flag("--quick", help="Fewer and smaller: a minute or two.")] = False,
    builtin: Annotated[bool, _flag("--builtin", help="The small measurement, in a checkout too.")] = False,
    predict: Annotated[bool, _flag("--predict", help="What a model of GPUs expects; nothing is measured.")] = False,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Measure this machine: tree attention beside ordinary attention.

    In a checkout this is `python -m benchmarks` with the arguments given (its own page: `python -m benchmarks --help`).
    An installed package measures one telling shape: 16 branches of 128 tokens on a shared prefix of 4,096, in one call
    and branch by branch through SDPA, checked before it is timed.
    """
    from anabranch.cli import bench as body

    if predict:
        body.predict(as_json=json, arguments=list(context.args))
    else:
        body.run(quick=quick, builtin=builtin, as_json=json, arguments=list(context.args))


@app.command(
    epilog=_examples(
        "anabranch serve --model smollm2 --port 8000",
        "anabranch serve --model ./my-model --host 0.0.0.0 --api-key secret --api-key another",
        "anabranch serve --model ./my-model --upstream http://cluster:8000/v1",
        "anabranch serve --model ./my-model --tp 2   (two processes share the model)",
        'curl localhost:8000/v1/completions -d \'{"model": "smollm2", "prompt": "Rivers", "strategy": '
        '"self-consistency", "strategy_options": {"n": 4}}\' -H \'Content-Type: application/json\'',
    ),
)
@command
def serve(
    model: ModelOption = "smollm2",
    host: Annotated[str, typer.Option(metavar="HOST", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(metavar="N", min=1, max=65535, help="Port to listen on.")] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY", help="Opens the server; may be repeated. Default: ANABRANCH_API_KEY, else none."),
    ] = None,
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="What clients call the model.", show_default="as --model")
    ] = None,
    upstream: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Run strategies on this server instead; --model names its tokenizer."),
    ] = None,
    upstream_key: Annotated[str | None, typer.Option(metavar="KEY", help="For --upstream.")] = None,
    strategy: Annotated[
        list[str] | None,
        typer.Option("--strategy", "-s", metavar="NAME", help="Allow these strategies alone; may be repeated."),
    ] = None,
    max_requests: Annotated[
        int, typer.Option(metavar="N", min=1, help="Prompts under way or waiting; more get 429.")
    ] = 256,
    max_tokens: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Most tokens that a request may ask for.")
    ] = None,
    max_body: Annotated[int, typer.Option(metavar="BYTES", min=1, help="Of a request; larger ones get 413.")] = 8388608,
    num_pages: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Pages of the cache. Default: by free memory.")
    ] = None,
    page_size: Annotated[int, typer.Option(metavar="N", min=1, help="Tokens a page.")] = 16,
    backend: Annotated[
        str, typer.Option(metavar="NAME", help="Attention backend: auto, cpu, triton, cuda, reference.")
    ] = "auto",
    dtype: DtypeOption = Dtype.auto,
    compile: Annotated[
        Compile,
        typer.Option(help="auto: behind two minutes of work at most, if it pays; now: before anybody is served."),
    ] = Compile.auto,
    tp: Annotated[
        int, typer.Option(metavar="N", min=1, help="Processes that share the model, each with some of its heads.")
    ] = 1,
    grace: Annotated[
        int, typer.Option(metavar="S", min=0, help="Seconds that answers under way have to finish at the end.")
    ] = 30,
    debug: DebugOption = False,
) -> None:
    """Serve a model over OpenAI's HTTP API, with a strategy by request.

    /v1/completions, /v1/chat/completions, /v1/models, /tokenize, /health, /metrics, /version; at / a page that shows
    running trees. Ours in a request: strategy, strategy_options, priority, timeout, stream_options.threads.
    """
    from anabranch.cli import serve as body

    body.run(
        body.Options(
            model=model, host=host, port=port, api_keys=tuple(api_key or ()), name=name, upstream=upstream,
            upstream_key=upstream_key, strategies=tuple(strategy or ()), max_requests=max_requests,
            max_tokens=max_tokens, max_body=max_body, num_pages=num_pages, page_size=page_size, backend=backend,
            dtype=dtype.value, compile=compile.value, grace=grace, tp=tp,
        )
    )  # fmt: skip


@app.command(
    epilog=_examples(
        "anabranch doctor",
        "anabranch doctor --json | jq .backends",
    ),
)
@command
def doctor(json: JsonOption = False, debug: DebugOption = False) -> None:
    """What works here, what does not and how to mend it: versions, hardware, backends, models; with a self-test.

    Exit code 1 when something that should work on this machine does not.
    """
    from anabranch.cli import doctor as body

    body.run(json)


app.add_typer(comparing)

__all__ = ["USAGE", "Mistake", "app"]
