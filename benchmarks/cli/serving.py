"""Commands that measure engines under load: arrivals, fleets, vLLM."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import torch
import typer

from .. import report_load
from .app import app
from .options import ClockOption, Dtype, Dtypes, Json, Peer, Plot, Quick, Rounds, Threads, console, finish, start


@app.command("serve")
def serve_command(
    quick: Quick = False,
    rate: Annotated[list[float] | None, typer.Option(help="Requests a second; may be repeated.")] = None,
    requests: Annotated[int, typer.Option(min=1, help="Requests of each load.")] = 32,
    case: Annotated[list[str] | None, typer.Option(help="plain, 4 branches, 8 share a beginning. All if none.")] = None,
    dtype: Annotated[Dtype, typer.Option()] = Dtype.bfloat16,
    peer: Peer = None,
    compile_peer: Annotated[bool, typer.Option("--compile-peer", help="Let vLLM compile the model.")] = False,
    contender: Annotated[
        list[str] | None,
        typer.Option(help="anabranch, no_prefix_cache, vllm, continuous, generate; may be repeated. All if none."),
    ] = None,
    threads: Threads = None, json: Json = None, plot: Plot = None,
) -> None:  # fmt: skip
    """Requests that arrive at random: our engine with and without its prefix cache, vLLM, Transformers."""
    from .. import serve

    for option, given, known in (("--case", case, serve.CASES), ("--contender", contender, serve.TITLES)):
        for name in given or ():
            if name not in known:
                raise typer.BadParameter(f"{name!r}: expected one of {', '.join(known)}", param_hint=option)
    store = start(threads, json)
    count = min(requests, 8) if quick else requests
    with console.status("serving") as status:
        for entry in serve.run(
            quick, dtype.value, rate or ([1.0] if quick else [0.5, 2.0]), count, case or (), peer, compile_peer,
            status.update, contender or (),
        ):  # fmt: skip
            store.put("serve", ("contender", "answers", "rate", "dtype", "requests"), entry)
    console.print(report_load.serve_table(store.data))
    finish(store, plot)


@app.command("fleet")
def fleet_command(
    replicas: Annotated[int, typer.Option(min=2, help="Simulated replicas.")] = 4,
    requests: Annotated[int, typer.Option(min=2, help="Of the run on two real engines.")] = 24,
    branches: Annotated[int, typer.Option(min=1, help="Of each request.")] = 4,
    tokens: Annotated[int, typer.Option(min=2, help="Of each branch.")] = 24,
    shared: Annotated[int, typer.Option(min=1, help="Tokens that prompts of a group begin with.")] = 256,
    pages: Annotated[int, typer.Option(min=1, help="Of each replica, 16 tokens each.")] = 2048,
    model: Annotated[str, typer.Option(help="A model by name.")] = "smollm2",
    dtype: Annotated[Dtype, typer.Option()] = Dtype.float32,
    threads: Threads = None, clock: ClockOption = "wall", json: Json = None, plot: Plot = None,
) -> None:  # fmt: skip
    """A simulation from measured costs of steps: branches held, routing by prefix, where forks stop to pay."""
    import anabranch as ab

    from .. import fleet, fleet_real

    store = start(threads, json, clock)
    with console.status("loading the model") as status:
        loaded, tokenizer = ab.models.load(model, dtype=getattr(torch, dtype.value))
        engines = [ab.Engine(loaded, tokenizer, num_pages=pages, compile=False) for _ in range(2)]
        load = fleet.Load(1.0, requests, shared=shared, branches=branches, new=tokens)
        store.set("fleet", {"model": model, **fleet_real.run(engines, load, replicas, status.update)})
    console.print(report_load.fleet_table(store.data), soft_wrap=True)
    finish(store, plot)


@app.command("vllm-backend")
def vllm_backend_command(
    python: Annotated[Path, typer.Option(help="The Python of an environment with vLLM.", exists=True)],
    quick: Quick = False,
    case: Annotated[list[str] | None, typer.Option(help="May be repeated; default: all.")] = None,
    dtype: Dtypes = None, rounds: Rounds = 5,
    block_size: Annotated[int, typer.Option(min=1, help="Tokens a block of vLLM's cache.")] = 128,
    new_tokens: Annotated[int, typer.Option(min=2)] = 48, threads: Threads = None, clock: ClockOption = "wall",
    json: Json = None,
) -> None:  # fmt: skip
    """vLLM with our attention backend and with its own, in turns: tokens a second while decoding."""
    from .. import vllm_backend

    for name in case or ():
        if name not in vllm_backend.CASES:
            known = ", ".join(vllm_backend.CASES)
            raise typer.BadParameter(f"{name!r}: expected one of {known}", param_hint="--case")
    store = start(threads, json, clock)
    for entry in vllm_backend.run(
        python, [d.value for d in dtype or [Dtype.float32, Dtype.bfloat16]], case, block_size, new_tokens, rounds,
        torch.get_num_threads(), quick, clock,
    ):  # fmt: skip
        store.put("vllm_backend", ("case", "dtype", "block_size", "threads"), entry)
        console.print(vllm_backend.line(entry))
    finish(store, None)


@app.command("remote")
def remote_command(
    python: Annotated[Path | None, typer.Option(help="A Python with vLLM, whose server is started.")] = None,
    url: Annotated[str | None, typer.Option(help="A server of smollm2-adaptive that runs already.")] = None,
    problems: Annotated[int, typer.Option(min=1, help="That the model answers by threads.")] = 16,
    rounds: Rounds = 4,
    threads: Annotated[int | None, typer.Option(min=1, help="Of the server that is started.")] = None,
    dtype: Annotated[Dtype, typer.Option()] = Dtype.float32, json: Json = None,
) -> None:  # fmt: skip
    """Threads on a server beside the same threads one after another, through a RemoteEngine, in turns."""
    import anabranch as ab

    from .. import remote
    from ..vllm_server import vllm_server

    if (python is None) == (url is None):
        raise typer.BadParameter("pass one of the two: --python starts a server, --url names one", param_hint="--url")
    folder = ab.models.path("smollm2-adaptive")
    store = start(None, json)
    _, tokenizer = ab.models.load("smollm2-adaptive")
    with nullcontext(url) if python is None else vllm_server(python, folder, dtype.value, threads=threads) as address:
        assert address is not None
        with ab.RemoteEngine(address, tokenizer) as engine:
            for entry in remote.run(engine, problems, rounds, report=console.print):
                entry |= {"model": "smollm2-adaptive", "dtype": dtype.value, "server_threads": threads}
                store.put("remote", ("model", "dtype", "strategy", "server_threads"), entry)
    spread = entry["ratios"]
    console.print(
        f"{entry['problems']} problems: × {entry['ratio']} in all; by problem × {spread['median']} "
        f"({spread['least']} – {spread['most']}); {entry['same_tokens']} with the same tokens"
    )
    finish(store, None)
