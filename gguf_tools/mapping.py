"""A file as memory, and every way of not being one as a sentence."""

from __future__ import annotations

import mmap
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager

from gguf_tools.errors import FileError


@contextmanager
def mapped(path: str | os.PathLike[str]) -> Iterator[mmap.mmap]:
    """The bytes of a regular, non-empty file, mapped for reading; numpy views on them must be gone at the end.

    Raises:
        FileError: it is missing, a directory, a device, empty or unreadable.
    """
    try:
        try:
            info = os.stat(path)
        except ValueError as error:  # a zero byte in the path
            raise FileError(f"{path!r}: is not a path: {error}.") from None
        if stat.S_ISDIR(info.st_mode):
            raise FileError(f"{path}: is a directory, but a GGUF file was expected.")
        if not stat.S_ISREG(info.st_mode):
            raise FileError(f"{path}: is not a regular file.")
        if info.st_size == 0:
            raise FileError(f"{path}: is empty, but a GGUF file was expected.")
        with open(path, "rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise FileError(f"{path}: does not exist.") from None
    except OSError as error:
        raise FileError(f"{path}: cannot be read: {error.strerror or error}.") from None
    with data:
        yield data


def forget(data: mmap.mmap | bytes, start: int, n_bytes: int) -> None:
    """Give the memory of bytes that were looked at back, whole pages of it; they can be read again from the file.

    Otherwise a pass over a large file counts as that much memory of the process until the system needs it elsewhere. Nothing happens where the
    platform has no such call, or `data` is no mapping.
    """
    if isinstance(data, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        first, end = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, (start + n_bytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if end > first:
            data.madvise(mmap.MADV_DONTNEED, first, end - first)
