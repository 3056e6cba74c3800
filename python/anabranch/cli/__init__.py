"""The command line: ``anabranch demo · generate · eval · compare · strategies · view · bench · doctor``.

Nothing here imports torch or Transformers before a command needs them, so that ``anabranch --help`` answers at once.
"""

from __future__ import annotations

__all__ = ["main"]


def main() -> None:
    """Entry point of ``anabranch`` and ``python -m anabranch``; exits with the command's code."""
    from anabranch.cli.app import app

    app(prog_name="anabranch")
