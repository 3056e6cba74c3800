"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import secrets
from contextlib import suppress

__all__ = ["write_whole"]


def write_whole(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` as UTF-8; a file already there is replaced only once the new one lies whole beside it.

    Lone surrogates, which no encoding has, become "?". What is no file (a pipe, /dev/stdout) is written to directly.

    >>> write_whole("trace.json", "{}")

    Raises:
        OSError: nothing can be written there, or not all of it (a full disk). The old file is then as it was, and
            nothing else is left behind.
    """
    data = text.encode("utf-8", errors="replace")
    place = os.path.realpath(path)  # behind a link it is the file that is replaced
    try:
        if os.path.exists(place) and not os.path.isfile(place):
            with open(place, "wb") as stream:
                stream.write(data)
            return
        partial = f"{place}.{secrets.token_hex(4)}.partial"
        try:
            with open(partial, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            with suppress(OSError):
                os.chmod(partial, os.stat(place).st_mode & 0o777)
            os.replace(partial, place)
        except BaseException:
            with suppress(OSError):
                os.unlink(partial)
            raise
    except OSError as error:
        why = f"cannot be written ({error.strerror}); what was there is unchanged"
        raise type(error)(error.errno, why, os.fspath(path)) from None
