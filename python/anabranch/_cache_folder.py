"""The package's folder for what takes long to make and can be made again: converted models, compiled forwards."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """``$ANABRANCH_CACHE``, else ``$XDG_CACHE_HOME/anabranch``, else ``~/.cache/anabranch``."""
    own, xdg = os.environ.get("ANABRANCH_CACHE"), os.environ.get("XDG_CACHE_HOME")
    if own:
        return Path(own).expanduser()
    return (Path(xdg).expanduser() if xdg else Path.home() / ".cache") / "anabranch"
