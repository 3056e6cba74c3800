"""MedVerse (arXiv 2602.07529): a plan whose steps name those that they depend on; each starts once these are done."""

from __future__ import annotations

import re
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any

from anabranch._check import whole_fields
from anabranch.strategies.api.strategy import Strategy
from anabranch.strategies.api.thread import Thread
from anabranch.strategies.tagged.graph import in_order, repaired
from anabranch.strategies.tagged.wording import brief

Program = Generator[Any, Any, Any]


@dataclass(frozen=True, kw_only=True)
class MedVerse(Strategy):
    r"""MedVerse's format, to the token::

        <Plan>
        <Outline> Transient Step 1: A -> B; Dependency: [] </Outline>
        <Outline> Transient Step 2: A -> C; Dependency: [] </Outline>
        <Outline> Transient Step 3: B -> D; Dependency: [1] </Outline>
        </Plan>
        <Execution>
        <Step> Transient Step 1: A -> B
        …</Step><Step> Transient Step 2: A -> C
        …</Step><Step> Transient Step 3: B -> D
        …</Step></Execution>
        <Conclusion>
        … </Conclusion>

    The model writes the plan; the runtime opens the execution, each step and the conclusion. A step starts as soon as
    the steps that it depends on are done. It sees the plan and these steps, whose KV it shares, and begins behind the
    furthest of them; what it does not depend on stays unseen. The conclusion sees all steps, in the plan's order, and
    stands behind the furthest.

    sees: "dependencies": the steps that it names; "ancestors": also those that they depend on, and so on.
    order: "graph": as above; "at once": all steps start together, blind to each other, as in the released engine (which
        so departs from the masks that it was trained with).
    max_steps: a plan with more is kept as plain text. step_tokens: most tokens sampled in a step; None leaves the
        answer's own limit.

    What breaks the format is counted (``result.malformed``) and repaired: a step that comes twice is dropped; a
    dependency on itself, on a step that the plan lacks, or one that closes a circle is left out; a plan without steps,
    or without ``<Plan>``, is plain text; a step that ends without ``</Step>`` is closed.

    >>> engine.generate(prompt, strategy=ab.MedVerse(step_tokens=64), max_new_tokens=256).text
    """

    tags: tuple[str, ...] = (
        "<Plan>",
        "</Plan>",
        "<Outline>",
        "</Outline>",
        "<Execution>",
        "</Execution>",
        "<Step>",
        "</Step>",
        "<Conclusion>",
        "</Conclusion>",
    )
    outline: str = r"Transient\s+Step\s+(\d+)\s*:\s*([^;\n<]+?)\s*;\s*Dependency\s*:\s*\[([^\]\n<]*)\]"
    execution: str = "\n<Execution>\n"
    header: str = "<Step> Transient Step {id}: {what}\n"
    conclusion: str = "</Execution>\n<Conclusion>\n"
    sees: str = "dependencies"
    order: str = "graph"
    max_steps: int = 64
    step_tokens: int | None = None

    needs = ("concat joins",)

    def __post_init__(self) -> None:
        object.__setattr__(self, "tags", tuple(self.tags))
        for field, allowed in (("sees", ("dependencies", "ancestors")), ("order", ("graph", "at once"))):
            if getattr(self, field) not in allowed:
                raise ValueError(f"MedVerse: {field}={getattr(self, field)!r}; pass {' or '.join(map(repr, allowed))}")
        whole_fields(self, ("max_steps", "step_tokens"), optional=("step_tokens",))
        if "</Plan>" not in self.tags or "</Step>" not in self.tags or "<Plan>" not in self.tags:
            raise ValueError(f"MedVerse: tags={self.tags} lack <Plan>, </Plan> or </Step>, which it looks for")
        try:
            groups = re.compile(self.outline).groups
        except re.error as error:
            raise ValueError(f"MedVerse: outline={self.outline!r} is no regular expression: {error}") from None
        if groups != 3:
            raise ValueError(f"MedVerse: outline={self.outline!r}; its groups: step, what it does, dependencies")

    def run(self, trunk: Thread) -> Program:
        return self._write(trunk, trunk.tag_ids(self.tags))  # an unfit tokenizer is told before anything runs

    def _write(self, trunk: Thread, ids: Mapping[str, int]) -> Program:
        while (yield trunk.decode(stop=ids["</Plan>"])).stop == ids["</Plan>"]:
            if (steps := self._plan(trunk, ids["<Plan>"])) is not None:
                yield from self._execute(trunk, steps, ids["</Step>"])
        yield trunk

    def _plan(self, trunk: Thread, opening: int) -> dict[str, tuple[str, list[str]]] | None:
        """The steps of the plan just closed: of each, what it does and what it depends on."""
        context = trunk.context
        at = next((i for i in range(len(context) - 1, -1, -1) if context[i] == opening), None)
        found = [] if at is None else re.findall(self.outline, trunk.text_of(context[at:]), re.IGNORECASE)
        if not found or len(found) > self.max_steps:
            trunk.malformed(f"</Plan> with {len(found)} steps; kept as plain text")
            return None
        named: dict[str, tuple[str, list[str]]] = {}
        for name, what, needs in found:
            if name in named:
                trunk.malformed(f"step {brief(name)} comes twice; dropped")
            named.setdefault(name, (what, [need for part in needs.split(",") if (need := part.strip())]))
        graph, left_out = repaired({name: needs for name, (_, needs) in named.items()})
        for name, need, why in left_out:
            trunk.malformed(f"step {brief(name)} depends on {brief(need)}, {why}; left out")
        return {name: (what, graph[name]) for name, (what, _) in named.items()}

    def _execute(self, trunk: Thread, steps: Mapping[str, tuple[str, list[str]]], stop: int) -> Program:
        """All steps, each as soon as those before it are done, and the conclusion's opening."""
        trunk.insert(self.execution)
        threads: dict[str, Thread] = {}
        for name in in_order({name: needs for name, (_, needs) in steps.items()}):
            seen = [] if self.order == "at once" else [threads[n] for n in self._visible(steps, name)]
            header = self.header.replace("{id}", name).replace("{what}", steps[name][0])
            (threads[name],) = trunk.fork([header], sees=seen)
        yield [self._step(threads[name], stop) for name in steps]
        yield trunk.join([threads[name] for name in steps])
        yield trunk.insert(self.conclusion)

    def _step(self, thread: Thread, stop: int) -> Program:
        end = yield thread.decode(self.step_tokens, stop=stop)
        if end.stop != stop:
            thread.malformed(f"ended by {end.reason} without </Step>; closed")
            if end.reason == "eos":
                thread.truncate(thread.length - 1)
            yield thread.insert("</Step>")

    def _visible(self, steps: Mapping[str, tuple[str, list[str]]], name: str) -> list[str]:
        """The steps that a step sees, in the plan's order."""
        seen, left = set[str](), list(steps[name][1])
        while left:
            need = left.pop()
            if need not in seen:
                seen.add(need)
                left += steps[need][1] if self.sees == "ancestors" else []
        return [other for other in steps if other in seen]
