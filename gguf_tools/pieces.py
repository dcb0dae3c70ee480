"""Bytes of a tensor, read from its file or made up, a few megabytes at a time in one buffer."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from io import FileIO
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gguf_tools.errors import FileError
from gguf_tools.header import TensorEntry

PIECE_BYTES = 1 << 22


class Source:
    """A model's file, open for reading. Close it in the end.

    Raises:
        FileError: it cannot be read; so do the iterators.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = path
        self._buffer = np.empty(PIECE_BYTES, np.uint8)
        try:
            self._file = FileIO(os.fspath(path))
        except OSError as error:
            raise unreadable(path, error) from error

    def whole(self, entry: TensorEntry) -> Iterator[NDArray[np.uint8]]:
        """All of a tensor."""
        yield from self._range(entry.offset, entry.size_bytes)

    def rows(self, entry: TensorEntry, rows: Sequence[int]) -> Iterator[NDArray[np.uint8]]:
        """Rows of a tensor, in the order given."""
        row_bytes = entry.size_bytes // entry.shape[0]
        begin = 0
        for end in range(1, len(rows) + 1):
            if end == len(rows) or rows[end] != rows[end - 1] + 1:  # neighbours are read at once
                yield from self._range(entry.offset + rows[begin] * row_bytes, (end - begin) * row_bytes)
                begin = end

    def _range(self, offset: int, n_bytes: int) -> Iterator[NDArray[np.uint8]]:
        done = 0
        while done < n_bytes:
            piece = self._buffer[: n_bytes - done]
            try:
                self._file.seek(offset + done)
                n = self._file.readinto(piece.data)
            except OSError as error:
                raise unreadable(self.path, error) from error
            if not n:
                raise FileError(f"{self.path}: ended at byte {offset + done} while it was copied; was it changed meanwhile?")
            yield piece[:n]
            done += n

    def close(self) -> None:
        """Safe to call twice."""
        self._file.close()


def zeros(shape: tuple[int, ...]) -> Iterator[NDArray[Any]]:
    """A float32 tensor of zeros."""
    yield np.zeros(shape, np.float32)


def unreadable(path: str | os.PathLike[str], error: OSError) -> FileError:
    """What to say where a model's file cannot be read."""
    return FileError(f"{path}: cannot be read: {error.strerror or error}.")
