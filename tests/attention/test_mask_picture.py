"""Pictures of a mask: what they show is counted against the dense one."""

from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console

from anabranch.attention import mask_plot as mask_picture
from anabranch.attention.mask import BranchMask

MASK = BranchMask.from_context([4, 3, 0, 5, 2], [[], [0], [0], [0], [0, 1, 3]])


@pytest.mark.parametrize("cells", [14, 100, 7, 3, 1])
def test_coverage_is_the_mean_of_the_dense_mask(cells):
    context, own = mask_picture.coverage(MASK, cells)
    dense, segment = MASK.dense().double(), MASK.segment_ids
    same = (segment[:, None] == segment[None, :]).double()
    n = min(cells, 14)
    fine = torch.repeat_interleave(torch.repeat_interleave(torch.stack([dense * (1 - same), dense * same]), n, 1), n, 2)
    want = fine.reshape(2, n, 14, n, 14).mean((2, 4))  # each cell as 14 × 14 pieces of a token by a token
    torch.testing.assert_close(torch.tensor(context), want[0])
    torch.testing.assert_close(torch.tensor(own), want[1])


def drawn(mask: BranchMask, **options) -> list[str]:
    out = io.StringIO()
    mask.show(console=Console(file=out, width=200), **options)
    return out.getvalue().splitlines()


def test_show_has_a_character_for_every_two_rows():
    lines = drawn(MASK, labels=["prompt", "a", "none", "b", "join"])
    assert len(lines) == 8 and lines[-1].startswith("14 tokens, 5 segments")
    for i, line in enumerate(lines[:-1]):
        for j, character in enumerate(line[:14]):
            top, bottom = MASK.dense()[2 * i : 2 * i + 2, j].tolist()
            assert (character in "█▀") == top and (character in "█▄") == bottom, (i, j)
    assert lines[0].endswith("prompt") and lines[2].endswith("a") and lines[6].endswith("join")
    assert "one cell = 2 tokens" in drawn(MASK, width=7)[-1]


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_plot_writes_an_image(tmp_path, kind):
    pytest.importorskip("matplotlib")
    path = tmp_path / f"mask.{kind}"
    MASK.show(path, labels=list("pa-bj"), title="fork and join")
    assert path.stat().st_size > 1000
    BranchMask.pack([MASK] * 200).plot(path, cells=64, size=2, dpi=50)
    assert path.stat().st_size > 500


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: MASK.show(width=0), "width: must be at least 1"),
        (lambda: MASK.show(labels=["a"]), "labels: expected 5, one a segment, got 1"),
        (lambda: MASK.plot("mask.png", labels=["a"]), "labels: expected 5, one a segment, got 1"),
    ],
)
def test_what_does_not_fit_is_told(draw, message):
    with pytest.raises(ValueError, match=message):
        draw()
