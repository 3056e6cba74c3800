"""Machine code of NVIDIA GPUs as ``cuobjdump -sass`` prints it: instructions, their stall counts, basic blocks, loops.

An instruction is 128 bits, printed as two words. Bits 105–108 are its stall count: the cycles a warp waits at least
before it issues its next instruction. Their sum over the instructions of a path is a floor of the path's issue cycles
for one warp; what it waits for memory, for other pipelines or for other warps comes on top.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

__all__ = ["Block", "Instruction", "Loop", "best_path", "blocks_of", "functions", "loops_of"]

LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;\s*/\* 0x([0-9a-f]{16}) \*/")
SECOND = re.compile(r"^\s*/\* 0x([0-9a-f]{16}) \*/")
ENDS = {"EXIT", "RET", "BRX", "JMP", "JMX", "KILL", "BPT"}  # without a predicate nothing follows them
TARGET = re.compile(r"0x([0-9a-f]+)\s*$")


@dataclass(frozen=True)
class Instruction:
    address: int
    predicate: str  # "@!P0" or ""
    name: str  # with its modifiers: LDGSTS.E.BYPASS.LTC128B.128
    operands: str
    stall: int
    waits: int  # barriers 0–5 that it waits for, a bit each

    @property
    def kind(self) -> str:
        return self.name.split(".")[0]

    @property
    def target(self) -> int | None:
        """Where a branch goes; None for what is no branch, and for calls, which come back."""
        if self.kind != "BRA":
            return None
        found = TARGET.search(self.operands)
        return int(found.group(1), 16) if found else None

    @property
    def never(self) -> bool:
        """Whether it only fills an issue slot: its predicate is never true."""
        return self.predicate == "@!PT"


def functions(text: str) -> dict[str, list[Instruction]]:
    """Every function of a dump: its symbol and its instructions in order of address."""
    found: dict[str, list[Instruction]] = {}
    for part in re.split(r"^\s*Function : ", text, flags=re.MULTILINE)[1:]:
        lines = part.splitlines()
        code: list[Instruction] = []
        for line, after in itertools.pairwise(lines):
            first, second = LINE.match(line), SECOND.match(after)
            if first is None or second is None:
                continue
            words = first.group(2).split(None, 1)
            predicate = words[0] if words[0].startswith("@") else ""
            rest = words[1] if predicate else first.group(2)
            name, _, operands = rest.partition(" ")
            control = int(second.group(1), 16) >> 41  # bit 105 of the instruction
            code.append(
                Instruction(int(first.group(1), 16), predicate, name, operands, control & 15, control >> 11 & 63)
            )
        found[lines[0].strip()] = code
    return found


@dataclass
class Block:
    """Instructions that run one after another, always all of them (but for what is predicated)."""

    index: int
    code: list[Instruction]
    to: list[int] = field(default_factory=list)

    def count(self, *kinds: str) -> int:
        return sum(i.kind in kinds for i in self.code)

    @property
    def stalls(self) -> int:
        return sum(i.stall for i in self.code)


def blocks_of(code: list[Instruction]) -> list[Block]:
    """A function's basic blocks and what may follow each."""
    starts = {code[0].address} if code else set()
    for i, instruction in enumerate(code):
        target = instruction.target
        if target is not None:
            starts.add(target)
        if (target is not None or instruction.kind in ENDS) and i + 1 < len(code):
            starts.add(code[i + 1].address)
    blocks: list[Block] = []
    for instruction in code:
        if instruction.address in starts:
            blocks.append(Block(len(blocks), []))
        blocks[-1].code.append(instruction)
    at = {block.code[0].address: block.index for block in blocks}
    for block in blocks:
        last = block.code[-1]
        if last.target in at:
            block.to.append(at[last.target])  # type: ignore[index]
        always = not last.predicate and last.name != "BRA.DIV" and (last.kind in ENDS or last.target is not None)
        # A conditional branch may name its condition among the operands: BRA UP0, 0x10, BRA.DIV UR4, 0x10.
        if last.kind == "BRA" and "," in last.operands:
            always = False
        if not always and block.index + 1 < len(blocks):
            block.to.append(block.index + 1)
    # Where a jump through a table goes is not printed: to what nothing else leads to, until the next such jump.
    reached = {0, *(to for block in blocks for to in block.to)}
    table: Block | None = None
    for block in blocks:
        if table is not None and block.index not in reached:
            table.to.append(block.index)
        if block.code[-1].kind == "BRX":
            table = block
    return blocks


@dataclass(frozen=True)
class Loop:
    head: int
    blocks: frozenset[int]
    back: frozenset[int]  # blocks that jump to the head


def loops_of(blocks: list[Block]) -> list[Loop]:
    """Natural loops, one a head, outer ones first."""
    above = _dominators(blocks)
    before: dict[int, list[int]] = {block.index: [] for block in blocks}
    for block in blocks:
        for to in block.to:
            before[to].append(block.index)
    tails: dict[int, set[int]] = {}
    for block in blocks:
        for to in block.to:
            if to in above.get(block.index, ()):
                tails.setdefault(to, set()).add(block.index)
    found = []
    for head, back in tails.items():
        inside, waiting = {head}, list(back)
        while waiting:
            index = waiting.pop()
            if index not in inside:
                inside.add(index)
                waiting.extend(b for b in before[index] if b in above)
        found.append(Loop(head, frozenset(inside), frozenset(back)))
    return sorted(found, key=lambda loop: -len(loop.blocks))


def _dominators(blocks: list[Block]) -> dict[int, set[int]]:
    """For every block that can be reached: the blocks that every way to it goes through."""
    order: list[int] = []
    seen, stack = {0}, [(0, iter(blocks[0].to))]
    while stack:
        index, rest = stack[-1]
        following = next((n for n in rest if n not in seen), None)
        if following is None:
            order.append(index)
            stack.pop()
        else:
            seen.add(following)
            stack.append((following, iter(blocks[following].to)))
    order.reverse()
    before: dict[int, list[int]] = {index: [] for index in order}
    for index in order:
        for to in blocks[index].to:
            before[to].append(index)
    above = {index: set(order) for index in order}
    above[0] = {0}
    changed = True
    while changed:
        changed = False
        for index in order[1:]:
            new = set.intersection(*(above[b] for b in before[index])) | {index}
            if new != above[index]:
                above[index], changed = new, True
    return above


def best_path(
    blocks: list[Block], loop: Loop, inner: Iterable[Loop], value: Callable[[Block], int]
) -> list[tuple[Block, Loop | None]]:
    """One way through a loop's body: of the greatest value, and of those the one of the fewest stalls.

    A loop inside counts as one step, which is all of its blocks once. Returns blocks in order, each with the innermost
    loop of ``inner`` that holds it.
    """
    inside = [x for x in inner if x.head != loop.head and x.blocks < loop.blocks]
    outermost = [x for x in inside if not any(x.blocks < y.blocks for y in inside)]
    owner = {index: x for x in outermost for index in x.blocks}

    def node(index: int) -> int:
        return owner[index].head if index in owner else index

    def members(index: int) -> list[Block]:
        return [blocks[i] for i in sorted(owner[index].blocks)] if index in owner else [blocks[index]]

    def following(index: int) -> set[int]:
        to = {node(n) for block in members(index) for n in block.to if n in loop.blocks}
        return to - {index, loop.head}

    @functools.cache
    def best(index: int) -> tuple[tuple[int, int], tuple[int, ...]] | None:
        own = members(index)
        score = (sum(map(value, own)), -sum(block.stalls for block in own))
        ends = any(block.index in loop.back for block in own)
        options = [found for n in following(index) if (found := best(n)) is not None]
        if not options and not ends:
            return None
        rest = max(options, default=((0, 0), ()))
        if ends:
            rest = max(rest, ((0, 0), ()))
        return (score[0] + rest[0][0], score[1] + rest[0][1]), (index, *rest[1])

    found = best(node(loop.head))
    return [] if found is None else [(block, owner.get(block.index)) for n in found[1] for block in members(n)]
