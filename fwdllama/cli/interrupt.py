"""Ctrl-C while a run goes on: the first press asks it to stop where nothing is lost, the second ends it at once.

Ending at once loses at most the step in progress too, because every step is on disk before the next one begins; but a
stop that was asked for also says how to go on.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any


class Interrupt:
    """Takes SIGINT over inside a `with` block of the main thread.

    `requested` becomes true at the first press, once `armed`. Before that, while a model loads, there is nothing worth
    waiting for: the first press ends the program. The handler itself writes nothing, because it may run in the middle
    of another write.
    """

    def __init__(self, tell: Callable[[str], None]) -> None:
        self.tell = tell
        self.armed = self.requested = self._told = False
        self._before: Any = None

    def stop(self) -> bool:
        """Whether to stop; says so the first time."""
        if self.requested and not self._told:
            self._told = True
            self.tell("stopping after this probe; press Ctrl-C again to end at once")
        return self.requested

    def __enter__(self) -> Interrupt:
        self._before = signal.signal(signal.SIGINT, self._pressed)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _pressed(self, number: int, frame: FrameType | None) -> None:
        if self.requested or not self.armed:
            raise KeyboardInterrupt
        self.requested = True
