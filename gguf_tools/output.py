"""Files that appear whole or not at all, and that never take another file's place unasked."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from gguf_tools.errors import FileError

Progress = Callable[[int, int], None]  # how much of a work is done, of how much: bytes or tensors


@contextmanager
def new_file(path: str | os.PathLike[str], *, force: bool = False) -> Iterator[Path]:
    """`replacing`, for a file that must not be there yet; `force` says that it may.

    Raises:
        FileError: the path exists and `force` is not given, its folder is missing, or it cannot be written.
    """
    if not force and os.path.lexists(path):
        raise FileError(f"{path}: already exists; give another name, or --force to replace it.")
    if not Path(os.path.realpath(path)).parent.is_dir():
        raise FileError(f"{path}: the folder {Path(path).parent} does not exist; create it first.")
    with replacing(path) as temporary:
        yield temporary


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends well, and vanishes when it does not.

    The block must create the file. It is flushed to disk before it is renamed, and the folder after, so that a crash
    leaves the old file or the new one. A link is followed: the file it points to is replaced.

    Raises:
        FileError: the path is a directory, or cannot be written (permission, disk full), also where the block finds
        out.
    """
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise FileError(f"{path}: is a directory, but a file to write was expected.")
    temporary = target.with_name(f".{target.name[:80]}.{secrets.token_hex(6)}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
        _sync_folder(target.parent)
    except OSError as error:
        raise FileError(f"{path}: cannot be written: {error.strerror or error}.") from error
    finally:
        temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make a rename durable, where folders can be opened (not on Windows)."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
