"""What is asked of every refusal of a hostile file: one sentence that names the file, at once, and in little memory."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from gguf_tools.errors import FileError
from tests.stopwatch import quick


def check_refusal(read: Callable[[Path], object], path: Path, sentence: str) -> None:
    """`read` refuses `path` with a sentence that matches, within 100 ms of CPU time and 50 MB of Python's memory."""

    def refusal() -> str:
        with pytest.raises(FileError, match=sentence) as caught:
            read(path)
        return str(caught.value)

    message = quick(refusal, within_s=0.1)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert len(message) < len(str(path)) + 300
    assert peak_bytes(refusal) < 50e6


def peak_bytes(action: Callable[[], object]) -> int:
    """Most memory that Python allocated at a time while `action` ran."""
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
