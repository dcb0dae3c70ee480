"""The one import of `llama_cpp`.

CPython 3.13 calls Android `android` where it was `linux` before, and llama-cpp-python 0.3.36 knows no such platform: it refuses to look for
its library. What it would find there is what it finds on Linux.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def llama_cpp() -> Any:
    """The module `llama_cpp`.

    Raises:
        ImportError, OSError, RuntimeError: it is not installed, or cannot be loaded here.
    """
    with _known_platform():
        import llama_cpp
    return llama_cpp


@contextmanager
def _known_platform() -> Iterator[None]:
    name = sys.platform
    if name == "android":
        sys.platform = "linux"
    try:
        yield
    finally:
        sys.platform = name
