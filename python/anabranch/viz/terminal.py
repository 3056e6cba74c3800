"""Drawing a `Story`: live in a terminal, whole on paper, as lines into a pipe."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from anabranch.viz.console import printable
from anabranch.viz.story import Block, Branch, Story

if TYPE_CHECKING:
    from rich.console import ConsoleOptions, RenderResult

PALETTE = ("cyan", "magenta", "green", "yellow", "blue", "red")
MIN_COLUMN = 23  # characters of a branch's panel; narrower ones read badly, so they go into rows of several
MAX_COLUMNS = 4
TRUNK, FLOW = "bold", "dim"


def color(branch: Branch) -> str:
    """The same branch has the same colour everywhere."""
    return PALETTE[int(branch.id.rpartition(".")[2]) % len(PALETTE)]


def columns(count: int, width: int) -> int:
    """Panels side by side: as many as fit, in rows of equal length (4 in 80 columns: two rows of two)."""
    fit = max(1, min(count, MAX_COLUMNS, width // MIN_COLUMN))
    return math.ceil(count / math.ceil(count / fit))


def wrapped(console: Console, text: str, width: int, style: str = "", tail: int | None = None) -> list[Text]:
    """Lines of at most `width`; with `tail` the last ones only, as a window that follows the writing."""
    clean = printable(text.strip()).expandtabs(4)
    while "\n\n\n" in clean:
        clean = clean.replace("\n\n\n", "\n\n")
    lines = list(Text(clean, style=style).wrap(console, max(8, width)))
    return lines if tail is None else lines[max(0, len(lines) - tail) :]


def _streams(count: int, wide: int, width: int, joining: bool) -> Text:
    """The fork (or the join) as a river: one channel above the middle of each panel of a row."""
    each = width // wide
    line = [" "] * width
    middles = [each * i + each // 2 for i in range(wide)]
    for at in range(min(1, middles[0]), middles[-1] + 1):
        line[at] = "─"
    for i, at in enumerate(middles):
        last = i == len(middles) - 1
        line[at] = ("┘" if joining else "┐") if last else ("┴" if joining else "┬")
    line[1] = "├" if middles[0] != 1 else line[1]
    return Text("".join(line).rstrip(), style=FLOW)


def _panel(console: Console, branch: Branch, width: int, height: int | None) -> Panel:
    inner = width - 4
    body = branch.text[len(branch.inserted) :] if branch.inserted else branch.text
    shade = color(branch)
    lines = wrapped(console, body, inner, tail=None if height is None else height - 2)
    done = branch.end is not None
    parts: list[RenderableType] = [Text("\n").join(lines)]
    for part in branch.parts:
        if isinstance(part, Block):
            parts.append(Text(f"⑂ {len(part.children)} threads of its own", style=FLOW))
    mark = {None: "", "joined": " ✓", "discarded": " ✗", "killed": " ✗"}[branch.end]
    title = printable(" ".join(branch.title.split()))
    title = title if len(title) <= width - 6 else title[: width - 7] + "…"
    return Panel(
        Group(*parts),
        title=Text(title, style=f"bold {shade}"),
        subtitle=Text(f"{branch.tokens} tokens{mark}", style=FLOW),
        title_align="left",
        subtitle_align="right",
        border_style=f"dim {shade}" if done else shade,
        width=width,
        height=height,
        padding=(0, 1),
    )


def _block(console: Console, block: Block, width: int, height: int | None) -> list[RenderableType]:
    """The panels of one fork; `height`: of each panel."""
    wide = columns(len(block.children), width)
    each = width // wide
    rows: list[RenderableType] = [_streams(len(block.children), wide, width, joining=False)]
    for at in range(0, len(block.children), wide):
        kids = block.children[at : at + wide]
        grid = Table.grid(padding=0)
        for _ in kids:
            grid.add_column(width=each)
        tallest = height
        if tallest is None:  # all of a row end on the same line
            tallest = 2 + max(
                len(wrapped(console, k.text[len(k.inserted) :], each - 4)) + any(isinstance(p, Block) for p in k.parts)
                for k in kids
            )
        grid.add_row(*(_panel(console, kid, each, tallest) for kid in kids))
        rows.append(grid)
    if block.mode is not None:
        rows.append(_streams(len(block.children), wide, width, joining=True))
    return rows


def _trunk_lines(console: Console, text: str, width: int, tail: int | None) -> list[RenderableType]:
    lines = wrapped(console, text, width - 2, tail=tail)
    return [Text("● " if i == 0 and tail is None else "│ ", style=FLOW) + line for i, line in enumerate(lines)]


def _fit(lines: list[RenderableType], room: int) -> list[RenderableType]:
    if len(lines) <= room:
        return lines
    return [Text("│ …", style=FLOW), *lines[len(lines) - max(1, room - 1) :]]


class Picture:
    """A rich renderable: the story as it is when it is drawn; `live` keeps it within the terminal's height."""

    def __init__(self, story: Story, heading: list[RenderableType] | None = None, live: bool = True):
        self.story, self.heading, self.live = story, heading or [], live

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = min(options.max_width, 160)
        if not self.live:
            yield from self._whole(console, width)
            return
        height = (options.height or console.height) - 1
        yield from self._within(console, width, height)

    def _whole(self, console: Console, width: int) -> Iterator[RenderableType]:
        for part in self.story.trunk.parts:
            if isinstance(part, Block):
                yield from _block(console, part, width, None)
            else:
                yield from _trunk_lines(console, part, width, None)

    def _within(self, console: Console, width: int, height: int) -> Iterator[RenderableType]:
        parts = self.story.trunk.parts
        status = [Text(""), self._status(width)]
        blocks = [p for p in parts if isinstance(p, Block)]
        last = blocks[-1] if blocks else None
        where = max(i for i, p in enumerate(parts) if p is last) if last is not None else len(parts)
        before = "".join(p for p in parts[:where] if isinstance(p, str))
        behind = "".join(p for p in parts[where + 1 :] if isinstance(p, str)) if last is not None else ""
        options = console.options.update(width=width)
        heading = sum(len(console.render_lines(h, options, pad=False)) for h in self.heading)
        room = height - heading - len(status)
        first = _trunk_lines(console, before, width, None)
        after = _trunk_lines(console, behind, width, None) if behind else []
        yield from self.heading
        if last is None:
            yield from _fit(first, room)
        else:
            wide = columns(len(last.children), width)
            rows = math.ceil(len(last.children) / wide)
            first = _fit(first, max(2, room // 4))
            kept = 0 if last.mode is None else max(4, min(8, room // 4))  # the conclusion's, once there is one
            after = _fit(after, kept)
            panel = min(18, (room - len(first) - kept - 1 - (last.mode is not None)) // rows)
            yield from first
            yield from _block(console, last, width, max(3, panel))
            yield from after
        yield from status

    def _status(self, width: int) -> Text:
        story, p = self.story, self.story.pages
        rate = story.sampled / story.seconds if story.seconds > 0.3 else 0.0
        pieces = [f"{story.sampled} tokens"]
        if rate:
            pieces[0] += f", {rate:.0f}/s"
        if p.used:
            pieces.append(f"{p.logical} seen, {p.physical} held in the cache ({p.sharing:.1f}×)")
            pieces.append(f"{p.used} pages, {p.copied} copied")
        text = Text("  ")
        for piece in pieces:
            if len(text) + len(piece) + 3 > width:
                break
            text.append(("" if len(text) == 2 else " · ") + piece, style=FLOW)
        return text


@contextmanager
def follow(console: Console, story: Story, heading: list[RenderableType]) -> Iterator[None]:
    """Draw `story` in place while the block runs; what was drawn is gone afterwards."""
    live = Live(
        Picture(story, heading), console=console, refresh_per_second=8, transient=True, vertical_overflow="crop"
    )
    with live:
        yield


def tell(engine: Any, stream: Any, console: Console, heading: list[RenderableType], live: bool, quiet: bool) -> Story:
    """Follow a generation's events to their end: drawn in place, as lines, or (`quiet`) not at all; the whole story.

    stream: of one prompt. Ctrl-C ends the generation and says what was written and what is still held.
    """
    story = Story(engine)
    lines = None if live or quiet else Lines(console, story)
    if lines is not None:
        for part in heading[:-1]:
            console.print(part)
    try:
        with follow(console, story, heading) if live else nullcontext():
            for event in stream:
                story.take(event)
                if lines is not None:
                    lines.take(event)
    except KeyboardInterrupt:
        engine.abort()
        used = engine.cache.usage()
        raise KeyboardInterrupt(
            f"{story.sampled} tokens were written, {used.pages_total - used.pages_free} pages are still held"
        ) from None
    finally:
        stream.close()
    if live:
        for part in heading:
            console.print(part)
        console.print(Picture(story, live=False))
    assert story.result is not None
    return story


class Lines:
    """The same for a pipe or a log: one line when something happens, each thread's text once, when it is whole."""

    def __init__(self, console: Console, story: Story):
        self.console, self.story, self._shown = console, story, {"0": 0}

    def take(self, event: Any) -> None:
        """Call it after the story took the event."""
        name = type(event).__name__
        if name == "Fork":
            self._show(event.thread)
            if event.role != "fresh":
                seen = self.story.pages.physical
                self._print(f"fork   {event.thread} -> {' '.join(event.children)} (sharing {seen} tokens of context)")
        elif name == "Join":
            for child in event.children:
                self._show(child)
            how = f"({event.mode}, now {event.length} tokens)"
            self._print(f"join   {event.thread} <- {' '.join(event.children)} {how}")
        elif name == "Discard":
            self._show(event.thread)
            self._print(f"end    {event.thread} ({event.reason})")
        elif name == "Finish":
            self._show("0")

    def _show(self, name: str) -> None:
        text = self.story.branches[name].text
        new, self._shown[name] = text[self._shown.get(name, 0) :], len(text)
        if new.strip():
            self._print(f"{name:<6} {printable(' '.join(new.split()))}")

    def _print(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)
