"""Draws the pictures of the concepts page: ``python docs/pictures/draw.py`` (masks need anabranch, matplotlib)."""

from __future__ import annotations

from html import escape
from pathlib import Path

HERE = Path(__file__).resolve().parent
TRUNK, LEFT, RIGHT, LAST, PLAIN = "#4c78a8", "#e4893b", "#54a24b", "#b279a2", "#c9ced6"
CELL, HEIGHT, FONT = 22, 30, "font-family='Helvetica,Arial,sans-serif'"


class Drawing:
    """A white SVG canvas that collects shapes."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.size, self.title = (width, height), title
        self.parts: list[str] = []

    def text(self, x: float, y: float, words: str, size: int = 14, anchor: str = "start", bold: bool = False) -> None:
        weight = " font-weight='bold'" if bold else ""
        self.parts.append(
            f"<text x='{x}' y='{y}' {FONT} font-size='{size}' text-anchor='{anchor}' fill='#222'{weight}>"
            f"{escape(words)}</text>"
        )

    def page(self, x: float, y: float, colors: list[str], slots: int = 4) -> float:
        """A page of ``slots`` token slots, the first ones filled; returns the x of its right edge."""
        for i in range(slots):
            fill = colors[i] if i < len(colors) else "#fff"
            self.parts.append(
                f"<rect x='{x + i * CELL}' y='{y}' width='{CELL}' height='{HEIGHT}' fill='{fill}' stroke='#fff'/>"
            )
        self.box(x, y, slots * CELL, HEIGHT)
        return x + slots * CELL

    def box(self, x: float, y: float, w: float, h: float, fill: str = "none", words: str = "") -> None:
        self.parts.append(
            f"<rect x='{x}' y='{y}' width='{w}' height='{h}' rx='3' fill='{fill}' stroke='#333' stroke-width='1.5'/>"
        )
        if words:
            self.text(x + w / 2, y + h / 2 + 5, words, anchor="middle")

    def arrow(self, x1: float, y1: float, x2: float, y2: float) -> None:
        self.parts.append(
            f"<line x1='{x1}' y1='{y1}' x2='{x2}' y2='{y2}' stroke='#555' stroke-width='1.5' marker-end='url(#tip)'/>"
        )

    def svg(self) -> str:
        w, h = self.size
        tip = (
            "<defs><marker id='tip' viewBox='0 0 8 8' refX='7' refY='4' markerWidth='7' markerHeight='7' "
            "orient='auto'><path d='M0 0L8 4L0 8z' fill='#555'/></marker></defs>"
        )
        return (
            f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {w} {h}' width='{w}' height='{h}' role='img'>\n"
            f"<title>{escape(self.title)}</title>\n{tip}\n<rect width='{w}' height='{h}' rx='8' fill='#fff'/>\n"
            + "\n".join(self.parts)
            + "\n</svg>\n"
        )


def spans() -> Drawing:
    d = Drawing(640, 250, "A trunk of one span and two branches, each a list of two spans")
    d.text(20, 30, "A span is a run of tokens in pages; a branch is a list of spans.", 15)
    d.page(d.page(170, 60, [TRUNK] * 4), 60, [TRUNK] * 4)
    d.text(20, 80, "span 0: prompt")
    d.page(170, 110, [LEFT] * 3)
    d.text(20, 130, "span 1: answer A")
    d.page(170, 160, [RIGHT] * 2)
    d.text(20, 180, "span 2: answer B")
    d.text(400, 80, "branch A sees spans 0, 1", bold=True)
    d.text(400, 130, "branch B sees spans 0, 2", bold=True)
    d.text(20, 230, "The prompt is stored once, and attention reads it once per step for both branches.")
    return d


def fork() -> Drawing:
    d = Drawing(640, 250, "A fork adds branches that point to the same pages")
    d.text(20, 30, "fork(trunk, 2): metadata only, no KV is copied", 15)
    for x, words in ((40, "trunk"),):
        d.box(x, 65, 100, 34, PLAIN, words)
    for y, words in ((120, "child A"), (175, "child B")):
        d.box(40, y, 100, 34, PLAIN, words)
    right = d.page(320, 115, [TRUNK] * 4)
    d.page(right + 8, 115, [TRUNK] * 2)
    for y in (82, 137, 192):
        d.arrow(144, y, 312, 130 + (y - 137) / 8)
    d.text(320, 170, "full page")
    d.text(right + 8, 170, "tail page, 2 of 4 slots")
    d.text(20, 235, "Both pages now have three holders.")
    return d


def copy_on_write() -> Drawing:
    d = Drawing(640, 300, "The first write into a shared tail page copies that one page")
    d.text(20, 30, "step({A: 1, B: 1}) after the trunk was released: one page is copied", 15)
    d.text(20, 80, "before")
    right = d.page(130, 60, [TRUNK] * 4)
    d.page(right + 8, 60, [TRUNK] * 2)
    d.text(right + 110, 80, "held by A and B")
    d.text(20, 160, "child A")
    d.arrow(84, 156, 124, 156)
    d.page(130, 140, [TRUNK] * 4)
    d.page(right + 8, 140, [TRUNK, TRUNK, LEFT])
    d.text(right + 110, 160, "its own copy of the tail page")
    d.text(20, 230, "child B")
    d.arrow(76, 222, 124, 166)
    d.page(right + 8, 210, [TRUNK, TRUNK, RIGHT])
    d.text(right + 110, 230, "last holder: writes in place")
    d.text(20, 280, "Full pages stay shared. All copies of a step, all layers, K and V, are one call.")
    return d


def join() -> Drawing:
    d = Drawing(640, 270, "A join appends the children's own spans to the trunk's list")
    d.text(20, 30, 'join(trunk, [A, B], "concat"): the page lists are spliced', 15)
    d.text(20, 80, "before: trunk, A, B")
    d.box(200, 60, 110, 34, TRUNK, "prompt")
    d.box(340, 60, 110, 34, LEFT, "own part of A")
    d.box(480, 60, 110, 34, RIGHT, "own part of B")
    d.text(20, 160, "after: trunk")
    x = 200
    for color, words in ((TRUNK, "prompt"), (LEFT, "A"), (RIGHT, "B"), (LAST, "next tokens")):
        d.box(x, 140, 100, 34, color, words)
        x += 100
    d.text(200, 196, "position 0 …", 12)
    d.text(300, 196, "p …", 12)
    d.text(400, 196, "p … (same start)", 12)
    d.text(500, 196, "after the longest", 12)
    d.text(20, 245, "Nothing is moved or computed again. A and B keep their positions, which may overlap.")
    return d


def plan() -> Drawing:
    d = Drawing(640, 330, "A plan cuts spans into work items and merges their partial results")
    d.text(20, 30, "plan: (range of a span) × (rows that see it) × (KV head)", 15)
    d.text(110, 64, "prompt, first half", 12, "middle")
    d.text(260, 64, "prompt, second half", 12, "middle")
    d.text(385, 64, "A", 12, "middle")
    d.text(475, 64, "B", 12, "middle")
    d.box(40, 75, 140, 80, TRUNK, "item 0")
    d.box(190, 75, 140, 80, TRUNK, "item 1")
    d.box(350, 75, 70, 35, LEFT, "item 2")
    d.box(440, 120, 70, 35, RIGHT, "item 3")
    d.text(535, 97, "row of A")
    d.text(535, 142, "row of B")
    for x in (110, 260, 385, 475):
        d.arrow(x, 160, x, 205)
    for x in (50, 200, 325, 415):
        d.box(x, 210, 120 if x < 300 else 80, 30, PLAIN, "m, l, acc" if x < 300 else "partial")
    for x in (110, 260, 365, 455):
        d.arrow(x, 244, 300 + (x - 280) / 8, 272)
    d.box(190, 276, 220, 34, LAST, "merge by log-sum-exp")
    return d


def subtree() -> Drawing:
    d = Drawing(640, 330, "An item that holds a subtree: seven short spans, four rows, and which rows see which span")
    d.text(20, 30, "an item that holds a subtree: each short span for the rows below it", 15)
    d.text(20, 62, "the tree", 13, bold=True)
    d.text(300, 62, "its item: spans in preorder, rows in the order of leaves", 13, bold=True)
    width, height = 38, 32
    where = {"r": (130, 84), "a": (70, 144), "b": (190, 144)}
    where |= {name: (40 + 60 * i, 204) for i, name in enumerate("cdef")}
    colors = {"r": TRUNK, "a": LEFT, "b": RIGHT}
    for above, below in ("ra", "rb", "ac", "ad", "be", "bf"):
        (x1, y1), (x2, y2) = where[above], where[below]
        d.arrow(x1, y1 + 15, x2, y2 - 17)
    for name, (x, y) in where.items():
        d.box(x - 19, y - 15, width, 30, colors.get(name, PLAIN), name)
    for i in range(4):
        d.text(40 + 60 * i, 240, f"row {i}", 12, "middle")
    seen = {"r": (0, 4), "a": (0, 2), "c": (0, 1), "d": (1, 2), "b": (2, 4), "e": (2, 3), "f": (3, 4)}
    for i, name in enumerate(seen):
        first, last = seen[name]
        x = 350 + i * width
        d.text(x + width / 2, 84, name, 13, "middle")
        for row in range(4):
            d.box(x, 94 + row * height, width, height, colors.get(name, PLAIN) if first <= row < last else "#fff")
    for row in range(4):
        d.text(300, 115 + row * height, f"row {row}", 12)
    d.text(
        20, 275, "Only the coloured products are computed. As items of their own the spans would give each row three"
    )
    d.text(20, 296, "partial results to be written, read and merged; so each row has one, and here it is the output.")
    return d


def mask_pictures() -> None:
    from anabranch import BranchMask

    BranchMask.from_tree([4, 3, 3], [-1, 0, 0]).plot(HERE / "mask_tree.svg")
    BranchMask.from_context([4, 3, 3, 3], [[], [0], [0], [0, 1, 2]]).plot(HERE / "mask_join.svg")


DRAWINGS = {f.__name__: f for f in (spans, fork, copy_on_write, join, plan, subtree)}

if __name__ == "__main__":
    for name, drawing in DRAWINGS.items():
        (HERE / f"{name}.svg").write_text(drawing().svg(), encoding="utf-8")
    mask_pictures()
