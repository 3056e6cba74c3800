"""Dependency graphs as models write them, made fit to be worked off."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def repaired(needs: Mapping[str, Sequence[str]]) -> tuple[dict[str, list[str]], list[tuple[str, str, str]]]:
    """A graph without circles out of any: of each node those it depends on, and what was left out as (node, dependency,
    why).

    Dependencies are looked at in order, and each that would close a circle with those before it is left out.

    >>> repaired({"1": ["2"], "2": ["1", "7"]})
    ({'1': ['2'], '2': []}, [('2', '1', 'which depends on it'), ('2', '7', 'which there is not')])
    """
    graph: dict[str, list[str]] = {name: [] for name in needs}
    left_out: list[tuple[str, str, str]] = []
    for name, wanted in needs.items():
        for need in dict.fromkeys(wanted):
            if need == name:
                left_out.append((name, need, "which is itself"))
            elif need not in graph:
                left_out.append((name, need, "which there is not"))
            elif _reaches(graph, need, name):
                left_out.append((name, need, "which depends on it"))
            else:
                graph[name].append(need)
    return graph, left_out


def in_order(graph: Mapping[str, Sequence[str]]) -> list[str]:
    """The nodes of a graph without circles, each behind all that it depends on; else as they are given.

    >>> in_order({"3": ["1"], "1": [], "2": []})
    ['1', '3', '2']
    """
    found: dict[str, None] = {}
    left = list(graph)[::-1]
    while left:
        if waiting := [need for need in graph[left[-1]] if need not in found]:
            left += reversed(waiting)
        else:
            found[left.pop()] = None
    return list(found)


def _reaches(graph: Mapping[str, Sequence[str]], begin: str, end: str) -> bool:
    seen, left = {begin}, [begin]
    while left:
        for need in graph[left.pop()]:
            if need == end:
                return True
            if need not in seen:
                seen.add(need)
                left.append(need)
    return False
