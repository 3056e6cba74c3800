"""vLLM beside this checkout: the Python of its environment, with our package and entry point on ``PYTHONPATH``.

Where anabranch is installed in that environment none of this is needed. A checkout is not, and vLLM finds plugins by
what is installed: so a folder is made that looks like an installation.
"""

from __future__ import annotations

import os
from pathlib import Path

import anabranch

ENTRY_POINTS = "[vllm.general_plugins]\nanabranch = anabranch.integrations.vllm:register\n"


def site(folder: Path) -> Path:
    """`folder`, made to hold the package (a link) and what tells Python that it is installed."""
    about = folder / "anabranch-0.dist-info"
    about.mkdir(parents=True, exist_ok=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: anabranch\nVersion: 0\n")
    (about / "entry_points.txt").write_text(ENTRY_POINTS)
    package = folder / "anabranch"
    if not package.exists():
        package.symlink_to(Path(anabranch.__file__).resolve().parent, target_is_directory=True)
    return folder


def environment(folder: Path, **more: str) -> dict[str, str]:
    """The variables of a process of vLLM's that is to find the package in `folder`."""
    return {**os.environ, "PYTHONPATH": str(site(folder)), "HF_HUB_OFFLINE": "1", **more}
