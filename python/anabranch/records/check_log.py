"""Whether the logs of a tree can be followed at all: they speak of threads that are there, in an order that can be."""

from __future__ import annotations

from collections.abc import Sequence

from anabranch.records.actions import Action
from anabranch.records.history import size
from anabranch.records.joins import JOINS
from anabranch.records.result import Node

_WITH_CHILDREN = ("fork", "spawn", "join", "kill")


def check_log(tree: Node) -> None:
    """ValueError, which names the thread and the entry, for a tree whose logs do not tell how it came to be."""
    nodes: dict[str, Node] = {}
    for node in tree.walk():
        if node.id in nodes:
            raise ValueError(f"trace: there are two threads {node.id}")
        nodes[node.id] = node
    if tree.id != "0" or tree.role != "trunk":
        raise ValueError(f"trace: its tree begins with thread {tree.id} ({tree.role}), not with the trunk, 0")
    for node in nodes.values():
        for child in node.children:
            parent, _, number = child.id.rpartition(".")
            if parent != node.id or not (number.isascii() and number.isdecimal() and str(int(number)) == number):
                raise ValueError(f"trace: thread {child.id!r} is no name for a child of thread {node.id}")
            if child.role == "trunk":
                raise ValueError(f"trace: thread {child.id} is a trunk, but a child of thread {node.id}")
        _check_entries(node, nodes)
        _check_live(node, nodes)


def _check_entries(node: Node, nodes: dict[str, Node]) -> None:
    kids = {child.id: child for child in node.children}
    there: set[str] = set()  # that have come to be, and neither joined nor killed
    killed: set[str] = set()  # before they came to be
    for i, action in enumerate(node.log):
        at = f"trace: log[{i}] of thread {node.id}"
        if (action.do in _WITH_CHILDREN) != bool(action.children):
            raise ValueError(f"{at}: {action.do} of {len(action.children)} threads")
        if len(set(action.children)) < len(action.children):
            raise ValueError(f"{at}: {action.do} of the same thread twice")
        if action.do in ("fork", "spawn"):
            for name in action.children:
                if name not in kids:
                    raise ValueError(f"{at}: {action.do} of {name!r}, which is no child")
                if name in there or (kids[name].role == "fork") != (action.do == "fork"):
                    raise ValueError(f"{at}: {action.do} of {name!r}, which is there already, or came otherwise")
            _check_birth(action, kids, there, at)
            there.update(name for name in action.children if name not in killed)
        elif action.do == "join":
            for name in action.children:
                if name not in kids:
                    raise ValueError(f"{at}: join of {name!r}, which is no child")
                if name not in there:
                    raise ValueError(f"{at}: join of {name!r}, which is not there")
            if action.mode is not None and JOINS[action.mode].at_once:
                raise ValueError(f"{at}: join by {action.mode!r}, which is told as a kill")
            there.difference_update(action.children)
        elif action.do == "kill":
            killed.update(name for name in action.children if name not in there)
            there.difference_update(action.children)
        elif action.do == "truncate" and action.length is None:
            raise ValueError(f"{at}: truncate to no length")
        elif action.do == "skip" and action.position is None:
            raise ValueError(f"{at}: skip to no position")


def _check_birth(action: Action, kids: dict[str, Node], there: set[str], at: str) -> None:
    """Of a fork or a spawn."""
    names = list(action.children)
    first = int(names[0].rpartition(".")[2])
    if [int(name.rpartition(".")[2]) for name in names] != list(range(first, first + len(names))):
        raise ValueError(f"{at}: {action.do} of {names}, which do not follow one another")
    if action.do == "spawn":
        if len(names) > 1:
            raise ValueError(f"{at}: spawn of {len(names)} threads")
        return
    if len(action.headers) != len(names):
        raise ValueError(f"{at}: not one header a child")
    if action.segments and len(action.segments) != len(names):
        raise ValueError(f"{at}: not one segment a child")
    sees = kids[names[0]].sees
    if any(kids[name].sees != sees for name in names):
        raise ValueError(f"{at}: its children do not see the same")
    if action.logged and len(action.logged) != len(sees):
        raise ValueError(f"{at}: logged of {len(action.logged)} threads, but its children see {len(sees)}")
    for j, (other, count) in enumerate(sees):
        if other not in there or kids[other].role != "fork":
            raise ValueError(f"{at}: its children see {other!r}, which is no fork that is there")
        if action.logged and action.logged[j] > len(kids[other].log):
            raise ValueError(f"{at}: its children see {other!r} after log[{action.logged[j]}], which it has not")
        if count > size(kids[other].runs) + size(kids[other].forgotten):
            raise ValueError(f"{at}: its children see {count} tokens of {other!r}, which never held so many")


def _check_live(node: Node, nodes: dict[str, Node]) -> None:
    """What a thread saw live, and in which turns it was computed."""
    written = size(node.runs) + size(node.forgotten)
    parts: Sequence[Node | Action] = (*node.log, node)
    for i, part in enumerate(parts):
        at = f"trace: thread {node.id}" if part is node else f"trace: log[{i}] of thread {node.id}"
        held = size(node.runs) if part is node else written
        turns = [turn for turn, _ in part.turns]
        if turns != sorted(set(turns)) or any(count < 1 for _, count in part.turns):
            raise ValueError(f"{at}: turns do not rise from one to the next, or hold no token")
        if (told := sum(count for _, count in part.turns)) > held:
            raise ValueError(f"{at}: turns of {told} tokens, but it held {held}")
        begins = [sight.begin for sight in part.sights]
        if begins != sorted(begins):
            raise ValueError(f"{at}: sights do not follow one another")
        for sight in part.sights:
            for other in sight.others:
                if other not in nodes:
                    raise ValueError(f"{at}: thread {node.id} saw thread {other!r}, which is not in the tree")
                if other == node.id:
                    raise ValueError(f"{at}: it saw itself")
