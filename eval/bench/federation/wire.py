"""HTTP/1.1 on one kept connection, as little of it as an aggregator speaks: a load generator must cost less than what it loads."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from fwdllama.federation.signature import headers as signed_headers

ANSWER_S = 60.0  # within which an aggregator that lives answers


class Lost(Exception):
    """No answer came: whether the request arrived is not known."""


@dataclass(frozen=True)
class Answer:
    """What came back. `sent_bytes`: of the whole request, with its headers."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    sent_bytes: int

    @property
    def json(self) -> Any:
        """The body, read."""
        return json.loads(self.body)


@dataclass
class Identity:
    """What a device keeps: its name, key and last nonce. Nonces follow the clock, so that one that was killed need not remember its own."""

    device: str
    key: bytes
    nonce: int = 0

    def signed(self, method: str, target: str, body: bytes) -> dict[str, str]:
        """The headers of one request."""
        self.nonce = max(self.nonce + 1, time.time_ns() // 1000)
        return signed_headers(self.device, self.key, method, target, body, self.nonce, time.time())


class Wire:
    """A connection, opened when needed and again when lost."""

    def __init__(self, host: str, port: int, *, answer_s: float = ANSWER_S) -> None:
        self.host, self.port, self.answer_s = host, port, answer_s
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def request(self, method: str, target: str, body: bytes = b"", headers: Mapping[str, str] | None = None) -> Answer:
        """Send a request and wait for the answer.

        Raises:
            Lost: none came.
        """
        lines = [f"{method} {target} HTTP/1.1", f"host: {self.host}", f"content-length: {len(body)}", "content-type: application/json"]
        lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
        data = "\r\n".join([*lines, "", ""]).encode() + body
        try:
            async with asyncio.timeout(self.answer_s):
                return await self._exchange(data)
        except (OSError, asyncio.IncompleteReadError, TimeoutError) as error:
            await self.close(lost=True)
            raise Lost(f"{method} {target}: {type(error).__name__} {error}") from error
        except asyncio.CancelledError:  # between request and answer: the connection cannot be used again
            await self.close(lost=True)
            raise

    async def _exchange(self, data: bytes) -> Answer:
        if self._streams is None or self._streams[0].at_eof():
            await self.close()
            self._streams = await asyncio.open_connection(self.host, self.port)
        reader, writer = self._streams
        writer.write(data)
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        found = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:] if line)}
        body = await reader.readexactly(int(found.get("content-length", "0")))
        if found.get("connection") == "close":
            await self.close()
        return Answer(int(head[0].split(" ", 2)[1]), found, body, len(data))

    async def signed(self, identity: Identity, method: str, target: str, body: bytes = b"") -> Answer:
        """A device's request."""
        return await self.request(method, target, body, identity.signed(method, target, body))

    async def close(self, *, lost: bool = False) -> None:
        """Let go of the connection; of a lost one, without sending what still waits."""
        if self._streams is None:
            return
        writer = self._streams[1]
        self._streams = None
        if lost:
            writer.transport.abort()
        writer.close()
        with contextlib.suppress(OSError):  # the other side may be gone
            await writer.wait_closed()

    async def __aenter__(self) -> Wire:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()


def asked(
    host: str,
    port: int,
    method: str,
    target: str,
    body: bytes = b"",
    headers: Mapping[str, str] | None = None,
    *,
    answer_s: float = ANSWER_S,
) -> Answer:
    """One request on a connection of its own.

    Raises:
        Lost: no answer came.
    """

    async def ask() -> Answer:
        async with Wire(host, port, answer_s=answer_s) as wire:
            return await wire.request(method, target, body, headers)

    return asyncio.run(ask())
