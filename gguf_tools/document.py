"""JSON files of other programs, read whole, within bounds, and refused in one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gguf_tools.errors import FileError

_MAX_BYTES = 1 << 26  # the largest tokenizer.json in circulation has 34 MB


def read_bytes(path: Path, n_most: int) -> bytes:
    """A file's content.

    Raises:
        FileError: it is missing, no regular file, unreadable, or longer than `n_most` bytes.
    """
    if path.exists() and not path.is_file():
        raise FileError(f"{path}: is not a regular file.")
    try:
        size = path.stat().st_size
        if size > n_most:
            raise FileError(f"{path}: has {size} bytes, but at most {n_most} are accepted.")
        return path.read_bytes()
    except FileNotFoundError:
        raise FileError(f"{path}: does not exist.") from None
    except OSError as error:
        raise FileError(f"{path}: cannot be read: {error.strerror or error}.") from None


def parse_object(data: bytes, label: str) -> dict[str, Any]:
    """The JSON object in `data`; no key may occur twice, because readers would differ in which one they believe.

    Raises:
        FileError: it is something else; `label` begins the sentence.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) != len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in values if keys.count(key) > 1)
            raise FileError(f"{label}: the key {twice!r:.80} occurs twice.")
        return values

    try:
        content = json.loads(data, object_pairs_hook=unique)
    except FileError:
        raise
    except RecursionError:
        raise FileError(f"{label}: is nested too deeply.") from None
    except ValueError as error:  # also what is not UTF-8, and integers of thousands of digits
        raise FileError(f"{label}: is not JSON: {' '.join(str(error).split())[:120]}.") from None
    if not isinstance(content, dict):
        raise FileError(f"{label}: is a JSON {type(content).__name__}, but must be an object.")
    return content


def read_object(path: Path) -> dict[str, Any]:
    """`parse_object` of a file."""
    return parse_object(read_bytes(path, _MAX_BYTES), str(path))


def read_object_if_there(path: Path) -> dict[str, Any]:
    """`read_object`, empty where there is no such file."""
    return read_object(path) if path.exists() else {}
