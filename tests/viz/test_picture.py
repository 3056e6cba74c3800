"""The live picture of a generation in a terminal: what it tells, and that it stays within its lines."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from engine_kit import byte_tokenizer, make_engine
from rich.console import Console

from anabranch.strategies import Aspects
from anabranch.viz import terminal as display
from anabranch.viz.story import Block, Branch, Story, from_node


def story_of(prompt: str = "Why?", count: int = 4) -> Iterator[tuple[Story, object]]:
    """The story so far and the event that was told last, event by event."""
    engine = make_engine("llama", byte_tokenizer(), num_pages=256, page_size=4)
    story = Story(engine)
    aspects = Aspects(headers=tuple(f"\n\nWay {i}:" for i in range(count)), intro_tokens=6, aspect_tokens=9)
    for event in engine.stream(prompt, strategy=aspects, max_new_tokens=40):
        story.take(event)
        yield story, event


def test_the_story_ends_as_the_result_says():
    *_, (story, _) = story_of()
    tree = story.result.tree
    block = next(part for part in story.trunk.parts if isinstance(part, Block))
    assert [kid.id for kid in block.children] == [node.id for node in tree.children] and block.mode == "concat"
    assert [kid.title for kid in block.children] == ["Way 0", "Way 1", "Way 2", "Way 3"]
    assert story.sampled == story.result.metrics.sampled_tokens
    peak = story.result.metrics.tokens_logical_peak
    assert 0.9 * peak <= story.peak.logical <= peak  # it looks at each event, the engine at each step
    drawn = from_node(tree)
    again = next(part for part in drawn.parts if isinstance(part, Block))
    assert [kid.text for kid in again.children] == [node.text for node in tree.children]
    whole = "".join(p if isinstance(p, str) else "".join(k.text for k in p.children) for p in drawn.parts)
    assert whole == tree.text


@pytest.mark.parametrize(("width", "height"), [(80, 24), (100, 35), (60, 15), (200, 50)])
def test_the_live_picture_never_leaves_the_terminal(width, height):
    console = Console(width=width, height=height, force_terminal=True, color_system=None)
    seen = 0
    for story, _ in story_of():
        options = console.options.update(height=height)
        lines = console.render_lines(display.Picture(story, []), options, pad=False)
        if width >= 80:
            assert len(lines) <= height
        assert all(sum(len(s.text) for s in line) <= width for line in lines)
        seen += 1
    assert seen > 40


def test_panels_stand_in_rows_of_equal_length():
    assert [display.columns(n, 100) for n in (1, 2, 3, 4, 5, 8)] == [1, 2, 3, 4, 3, 4]
    assert [display.columns(n, 80) for n in (2, 3, 4, 6)] == [2, 3, 2, 3]
    assert display.columns(4, 30) == 1


def test_a_long_title_is_cut_and_a_fork_inside_a_branch_is_told():
    inner = Block([Branch("0.0.0"), Branch("0.0.1")])
    story = Story()
    story.trunk.parts = [Block([Branch("0.0", ["text", inner], inserted="x" * 90)])]
    console = Console(width=40, color_system=None, record=True, file=open(os.devnull, "w"))
    console.print(display.Picture(story, live=False))
    text = console.export_text()
    assert "…" in text and "2 threads of its own" in text


def test_what_a_model_writes_cannot_steer_the_terminal():
    story = Story()
    story.trunk.parts = ["one\x1b[2J\x07two\n\x9b31mthree\tfour"]
    console = Console(width=60, color_system=None, record=True, file=open(os.devnull, "w"))
    console.print(display.Picture(story, live=False))
    text = console.export_text()
    assert not set(text) & set("\x1b\x07\x9b\t") and "two" in text and "four" in text
