"""The documentation: paths and links it names exist, its code runs, its pictures are what their script draws."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import torch
from engine_kit import make_model

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*(ROOT / "docs").rglob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"])
FOLDERS = ("python", "csrc", "kernels", "tests", "docs", "examples", "benchmarks", "training")
PATH = re.compile(rf"`((?:{'|'.join(FOLDERS)})/[\w./-]*)`")
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_named_paths_and_links_exist(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    missing = [path for path in PATH.findall(text) if not (ROOT / path).exists()]
    for link in LINK.findall(text):
        target = page.parent / link
        if "://" not in link and not target.exists() and not target.with_name(target.name + ".md").exists():
            missing.append(link)
    assert not missing, f"{name_of(page)} names what is not there: {missing}"


@pytest.mark.parametrize("page", ["start", "guides/own_loop", "guides/own_pages", "guides/writing_a_strategy"])
def test_code_of_a_page_runs(page: str, tmp_path: Path) -> None:
    """With a tiny random model where the page loads one."""
    make_model("llama").save_pretrained(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8"), re.S)
    assert blocks
    names: dict = {"__name__": "page", "path": tmp_path, "prompt_ids": torch.arange(3, 40)}
    for block in blocks:
        exec(compile(block, page, "exec", dont_inherit=True), names)  # without this file's __future__
    if page == "guides/own_loop":
        assert names["trunk"].length == 37 + 4 * 32 and not names["children"][0].alive
    if page == "guides/own_pages":
        assert names["out"].shape == (2, 8, 64) and names["plan"].unique_tokens == 48 + 7 + 12


def test_pictures_are_those_of_the_script() -> None:
    spec = importlib.util.spec_from_file_location("draw", ROOT / "docs" / "pictures" / "draw.py")
    draw = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(draw)
    for name, drawing in draw.DRAWINGS.items():
        assert (draw.HERE / f"{name}.svg").read_text(encoding="utf-8") == drawing().svg(), (
            f"run docs/pictures/draw.py: {name}"
        )
