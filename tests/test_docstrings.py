"""Every public class and function shows an example in its docstring, and the examples run."""

from __future__ import annotations

import ast
import asyncio
import doctest
import inspect
import re
from functools import cache
from pathlib import Path

import pytest
import torch
from malformed_kit import tiny_engine

import anabranch as ab

TAG = re.compile(r"</?[A-Za-z][\w ]*>")
# What an example needs that is not here.
ELSEWHERE = {
    "RemoteEngine": "a server",
    "SegmentVectors": "a checkpoint of ParaThinker's",
    "DecodeGraph": "a GPU",
}
# Made by others and described by their attributes: an example would only show one being printed.
RECORDS = {"Branch"}


def shown() -> list[str]:
    public = {name: getattr(ab, name) for name in ab.__all__}
    return sorted(
        name
        for name, what in public.items()
        if callable(what) and not (inspect.isclass(what) and issubclass(what, BaseException)) and name not in RECORDS
    )


@cache
def tags() -> tuple[str, ...]:
    """Every control tag that a strategy of ours names, in its source: one token each."""
    folder = Path(ab.__file__).parent / "strategies"
    found = {tag for file in sorted(folder.rglob("*.py")) for tag in TAG.findall(file.read_text(encoding="utf-8"))}
    numbered = {f"<{slash}think{i}>" for i in range(1, 7) for slash in ("", "/")}
    return tuple(sorted(found | numbered))


@pytest.mark.parametrize("name", shown())
def test_the_example_of_a_public_name_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    examples = doctest.DocTestParser().get_examples(inspect.getdoc(getattr(ab, name)) or "")
    if name in ELSEWHERE:
        assert examples or "Example::" in (inspect.getdoc(getattr(ab, name)) or "")
        pytest.skip(f"needs {ELSEWHERE[name]}")
    assert examples, f"{name}: its docstring shows no example (>>> …)"
    torch.manual_seed(0)
    engine = tiny_engine(tags(), num_pages=2000)
    names = {
        "ab": ab, "torch": torch, "asyncio": asyncio, "engine": engine, "model": engine.model,
        "tokenizer": engine.tokenizer, "prompt": "Is the sea salty?\n", "prompts": ["ab", "cd"],
    }  # fmt: skip
    if name == "Read":
        cache_ = ab.TreeCache(num_layers=1, num_kv_heads=1, head_dim=8, num_pages=8, rotary=ab.Rotary(torch.ones(4)))
        me, you = cache_.branch(), cache_.branch()
        cache_.write(0, torch.zeros(5, 1, 8), torch.zeros(5, 1, 8), cache_.step({me: 2, you: 3}))
        names |= {"cache": cache_, "me": me, "you": you}
    if name == "replay":
        monkeypatch.chdir(tmp_path)
        names["result"] = engine.generate(names["prompt"], max_new_tokens=8, logprobs=True)
        ab.trace.save(names["result"], "trace.json")
    for example in examples:
        value = run(example.source, names)
        if example.want:
            assert repr(value) == example.want.strip(), example.source


def run(source: str, names: dict) -> object:
    """The value of an expression, None of a statement; `await` works, as in a notebook."""
    tree = ast.parse(source)
    expression = len(tree.body) == 1 and isinstance(tree.body[0], ast.Expr)
    mode, flags = "eval" if expression else "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
    code = compile(source, "example", mode, flags, dont_inherit=True)
    value = eval(code, names)
    return asyncio.run(value) if inspect.iscoroutine(value) else value
