"""A network that can be cut: bytes between devices and aggregator stand still, connections neither break nor are answered."""

from __future__ import annotations

import asyncio
import threading
from types import TracebackType

from .aggregator import HOST, free_port

CHUNK_BYTES = 1 << 16


class Proxy:
    """Forwards connections to a port, in a thread; used as a block."""

    def __init__(self, to_port: int) -> None:
        self.to_port, self.port = to_port, free_port()
        self.n_bytes = 0  # that devices sent
        self._loop = asyncio.new_event_loop()
        self._passing = asyncio.Event()
        self._passing.set()
        self._thread = threading.Thread(target=self._serve, name="proxy", daemon=True)
        self._up = threading.Event()

    def cut(self) -> None:
        """Let nothing through any more."""
        self._loop.call_soon_threadsafe(self._passing.clear)

    def mend(self) -> None:
        """Let everything through again, what has waited first."""
        self._loop.call_soon_threadsafe(self._passing.set)

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._forward, HOST, self.port))
        self._up.set()
        self._loop.run_forever()
        server.close()
        tasks = asyncio.all_tasks(self._loop)
        for task in tasks:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*tasks, server.wait_closed(), return_exceptions=True))
        self._loop.close()

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there, back = await asyncio.open_connection(HOST, self.to_port)
        except OSError:  # the aggregator is not there; neither is the proxy then
            writer.close()
            return
        await asyncio.gather(self._pipe(reader, back, counted=True), self._pipe(there, writer))

    async def _pipe(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, counted: bool = False) -> None:
        try:
            while data := await reader.read(CHUNK_BYTES):
                await self._passing.wait()
                self.n_bytes += len(data) if counted else 0
                writer.write(data)
                await writer.drain()
        except OSError:  # either side is gone; the other is told by closing
            pass
        finally:
            writer.close()

    def __enter__(self) -> Proxy:
        self._thread.start()
        self._up.wait()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
