"""uvicorn, stopped as a user expects: at the first signal running requests may finish, at a second one they may not; both are a success."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

log = logging.getLogger("fwdllama.server")  # whoever runs a server decides what of it is shown


class GracefulServer(uvicorn.Server):
    """Serves an ASGI application; `drain_s` is how long running requests have once it is told to stop."""

    def __init__(self, app: Any, *, drain_s: int, cert: Path | None = None, key: Path | None = None) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=drain_s,
                ssl_certfile=cert,
                ssl_keyfile=key,
                ws="none",
            )
        )
        self._drain_s = drain_s

    def serve_on(self, opened: Any) -> None:
        """Serve on a listening socket until SIGTERM, SIGINT or `stop`."""
        self.run(sockets=[opened])

    def stop(self) -> None:
        """As the first signal; from any thread."""
        self.should_exit = True

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Take SIGTERM and SIGINT over. uvicorn would raise them again at the end, and the exit code would tell of a failure."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal stops, another one ends at once."""
        self.force_exit = self.should_exit
        self.should_exit = True

    async def shutdown(self, sockets: Any = None) -> None:
        """Let running requests finish."""
        if self.server_state.tasks:
            log.info("stopping: %d requests may finish within %d s; press Ctrl-C to end at once", len(self.server_state.tasks), self._drain_s)
        await super().shutdown(sockets)
