"""``python -m anabranch``: the command line."""

from __future__ import annotations

from anabranch.cli import main

if __name__ == "__main__":
    main()
