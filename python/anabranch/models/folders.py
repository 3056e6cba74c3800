"""Where converted models are kept, and how one is put there exactly once."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


class ModelUnavailable(RuntimeError):
    """A model's files are not on this machine; the message has the command that brings them."""


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without Transformers' bar for loading weights: a line in every program's output, for a second's work."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


# ------------------------------------------------------------------------------------------------ the cache folder


def install_once(folder: Path, fill: Callable[[Path], None]) -> None:
    """Make `folder` with what `fill` writes, whole or not at all; a second process waits for the first."""
    from filelock import FileLock

    cache = folder.parent
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / f".{folder.name}.lock"):
        if folder.is_dir():  # another process was faster
            return
        for leftover in cache.glob(f".{folder.name}-*.partial"):  # of a process that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", suffix=".partial", dir=cache))
        try:
            fill(partial)
            for made in (partial, *partial.iterdir()):  # tempfile and safetensors make private ones
                made.chmod(0o755 if made.is_dir() else 0o644)
            partial.rename(folder)
        except BaseException:  # Ctrl-C too
            shutil.rmtree(partial, ignore_errors=True)
            raise


@contextmanager
def progress(title: str) -> Iterator[Callable[[str, int], Callable[[int], None]]]:
    """Yields ``track(stage, total) -> done(amount)``: one bar a stage, on stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    console.print(title)
    with Progress(
        TextColumn("  {task.description:<10}"), BarColumn(), DownloadColumn(), TimeElapsedColumn(), console=console
    ) as bars:

        def track(stage: str, total: int) -> Callable[[int], None]:
            task = bars.add_task(stage, total=total)
            return lambda amount: bars.advance(task, amount)

        yield track
