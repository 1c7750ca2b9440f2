"""Writing a file completely or not at all."""

import os
from contextlib import contextmanager, suppress
from typing import IO, Iterator


@contextmanager
def atomic_write(path: str, mode: str = "wb") -> Iterator[IO]:
    """Opens a temporary file. It replaces `path` when its content is safely on the disk.

    A crash or an exception at any moment leaves the earlier content of `path`.
    """
    temporary = f"{path}.tmp"
    try:
        with open(temporary, mode) as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.remove(temporary)
        raise
    folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
    try:
        with suppress(OSError):  # Some network file systems cannot sync a folder.
            os.fsync(folder)
    finally:
        os.close(folder)
