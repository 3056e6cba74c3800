"""Nodes of a Countdown search, as the models of APR write them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class State:
    """A node's state, as it is written."""

    target: str
    numbers: str
    operations: tuple[str, ...]


def begin_at(node: str, state: State) -> str:
    """The prompt of a search that begins at `node`."""
    operations = list(state.operations)
    return f"Moving to Node #{node}\nCurrent State: {state.target}:[{state.numbers}], Operations: {operations}"


def states_of(text: str, nodes: Sequence[str]) -> list[State | None]:
    """The state of each of `nodes`, None where `text` does not tell it."""
    moved: dict[str, State] = {}
    generated: dict[str, tuple[str, str, str]] = {}
    for node, target, numbers, operations in re.findall(
        r"Moving to Node #([\d,]+)\s*?\n[^\n]*?Current State: *(-?\d+):\[([-\d., ]*)\], Operations: *\[([^\n]*)\]", text
    ):
        moved[node] = State(target, numbers, tuple(re.findall(r"'([^']*)'", operations)))
    for node, target, numbers, operation in re.findall(
        r"Generated Node #([\d,]+): *(-?\d+):\[([-\d., ]*)\] *Operation: *([^\n]*)", text
    ):
        generated.setdefault(node, (target, numbers, operation.strip()))

    def state(node: str) -> State | None:
        ancestors: list[str] = []  # from the node up to one whose operations are written out
        while node not in moved:
            if node not in generated:
                return None
            ancestors.append(node)
            node = node.rpartition(",")[0]
        known = moved[node]
        for child in reversed(ancestors):
            target, numbers, operation = generated[child]
            known = State(target, numbers, (*known.operations, operation))
        return known

    return [state(node.strip()) for node in nodes]
