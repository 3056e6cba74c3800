"""Strategies by name, and their options from text."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, Literal

import pytest

from anabranch import strategies
from anabranch.strategies import registry
from anabranch.strategies.api.strategy import Strategy
from anabranch.strategies.api.thread import Thread


@dataclass(frozen=True)
class Everything(Strategy):
    """Options of all kinds.

    count, most: whole numbers. mode: one of two;
        by name.
    """

    count: int
    share: float = 0.5
    flag: bool = False
    mode: Literal["a", "b"] = "a"
    words: tuple[str, ...] = ()
    stop: str | tuple[str, ...] = "x"
    most: int | None = None
    scorer: Callable[[str], float] | str | None = None
    inner: Strategy | None = None

    def run(self, trunk: Thread) -> Generator[Any, Any, Any]:
        yield trunk.decode()


def scorer(text: str) -> float:
    return float(len(text))


def everything(**options: str) -> Everything:
    strategy = registry.build(f"{__name__}:Everything", options)
    assert type(strategy).__name__ == "Everything"
    return strategy  # type: ignore[return-value]


def test_all_that_the_package_exports_is_there_under_any_spelling() -> None:
    """Nobody has to add a strategy to a second list."""
    exported = [getattr(strategies, name) for name in strategies.__all__]
    concrete = {
        c for c in exported
        if isinstance(c, type) and issubclass(c, Strategy) and c not in (Strategy, strategies.Tagged)
    }  # fmt: skip
    assert {registry.find(name) for name in registry.names()} == concrete
    for spelled in ("self-consistency", "self_consistency", "SelfConsistency", "SELFCONSISTENCY"):
        assert registry.find(spelled) is strategies.SelfConsistency
    assert registry.build("none") == strategies.Plain()
    assert registry.names() == sorted(registry.names())


def test_options_are_read_by_their_types() -> None:
    every = everything(
        count="3", share="1e-2", flag="true", mode="b", words="one|two", stop=".", most="none",
        scorer=f"{__name__}:scorer", inner="self-consistency(n=2)",
    )  # fmt: skip
    assert (every.count, every.share, every.flag, every.mode) == (3, 0.01, True, "b")
    assert (every.words, every.stop, every.most) == (("one", "two"), ".", None)
    assert every.scorer is not None and every.scorer("abc") == 3.0  # type: ignore[operator]
    assert every.inner == strategies.SelfConsistency(n=2)
    assert everything(count="1", words="one").words == ("one",)
    assert everything(count="1", stop=r"'\n'|'a|b'").stop == ("\n", "a|b")
    assert everything(count="1", stop="it's").stop == "it's"
    assert everything(count="1", scorer="Answer:(.*)").scorer == "Answer:(.*)"
    assert registry.build("self-consistency", {"n": 3}) == strategies.SelfConsistency(n=3)  # values as they are


def test_a_strategy_in_one_text() -> None:
    assert registry.parse("sequential(self-consistency(n=4, vote=number))") == strategies.Sequential(
        strategies.SelfConsistency(n=4, vote="number")
    )
    assert registry.parse(" Thread_Weaver(thread-tokens=9) ") == strategies.ThreadWeaver(thread_tokens=9)
    assert registry.parse("aspects(headers='One, two'|'Three')").headers == ("One, two", "Three")  # type: ignore[attr-defined]
    assert registry.split("a(x=1,y='p,q'),b, c(d(e,f))") == ["a(x=1,y='p,q')", "b", "c(d(e,f))"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("selfconsistancy", "did you mean self-consistency"),
        ("zzz", "no strategy 'zzz'; expected one of "),
        ("self-consistency(temprature=1)", "no option 'temprature'; did you mean temperature"),
        ("self-consistency(n=many)", "n='many'; expected int"),
        ("self-consistency(n=0)", "n=0; pass a whole number of at least 1"),
        ("self-consistency(n=1, n=2)", "'n' is given twice"),
        ("self-consistency(early_stop=perhaps)", "expected true | false"),
        ("self-consistency(4, 5)", "is not option=value"),
        ("plain(n=1)", "it takes none"),
        ("sequential", "needs strategy=…"),
        ("sequential(plain", "expected a name, or name"),
        ("aspects(headers='a)", "not closed"),
        ("nowhere:Class", "cannot import"),
        ("os:sep", "is no Strategy class"),
        ("builtins:dict", "is no Strategy"),
        ("", "expected a name"),
    ],
)
def test_mistakes_name_what_came_and_what_is_there(text: str, message: str) -> None:
    with pytest.raises(ValueError) as error:
        registry.parse(text)
    assert message in str(error.value)


def test_what_a_listing_says() -> None:
    info = registry.describe("self_consistency")
    assert (info.name, info.class_name) == ("self-consistency", "SelfConsistency")
    assert "vote" in info.join and info.when and info.forks and info.summary
    n, vote, temperature = info.options[:3]
    assert (n.name, n.kind, n.default, n.required) == ("n", "int", "8", False)
    assert vote.kind.endswith("text | none") and vote.help.startswith("what an answer is")
    assert temperature.kind == "float | none"
    assert registry.describe("sequential").options[0].required

    every = registry.describe(f"{__name__}:Everything")  # no line of its own: from its docstring
    assert every.summary == "Options of all kinds."
    helps = {option.name: option.help for option in every.options}
    assert helps["count"] == helps["most"] == "whole numbers."
    assert helps["mode"] == "one of two; by name."
    assert {o.name: o.kind for o in every.options}["words"] == "list of text"


def test_ones_own_strategy_under_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registered", {})
    registry.register("my-own", Everything)
    assert "my-own" in registry.names()
    assert registry.parse("My_Own(count=2)") == Everything(count=2)
    for name in ("my-own", "self-consistency", "-"):
        with pytest.raises(ValueError, match="pass another name"):
            registry.register(name, Everything)
    with pytest.raises(TypeError, match="subclass"):
        registry.register("other", 3)  # type: ignore[arg-type]
