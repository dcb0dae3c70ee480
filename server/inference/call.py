"""One HTTP request on its way through the engine: from the event loop to the engine's thread and back."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from typing import Any, TypeVar

from fastapi import Request as HttpRequest
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from .engine import MAX_WAITING, Engine
from .exchange import Asked, Event, Failed, Finished, FinishReason, Piece, Request, Started
from .fault import Fault
from .form import Form, Json, event
from .schema import Usage

log = logging.getLogger("fwdllama.inference")
T = TypeVar("T")


class Call:
    """Answers that were asked for by one HTTP request. Whoever made it must `cancel` it in the end; that is harmless once it is done."""

    def __init__(self, engine: Engine, asked: Sequence[Asked], *, tuned: bool) -> None:
        self.asked = asked
        self._begun = time.perf_counter()
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._n_new = [0] * len(asked)
        loop = asyncio.get_running_loop()

        def emit(happened: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is there to be told
                loop.call_soon_threadsafe(self._events.put_nowait, happened)

        self._request = Request(asked, tuned, emit)
        if not engine.submit(self._request):
            raise Fault(429, f"{MAX_WAITING} answers are waiting already; try again in a few seconds.", code="queue_full")

    def cancel(self) -> None:
        """Generate no more of it."""
        self._request.cancelled = True

    async def started(self) -> Started:
        """Wait until it is its turn.

        Raises:
            Fault: it is not answered.
        """
        first = await self._next()
        assert isinstance(first, Started)
        return first

    async def parts(self) -> AsyncIterator[Piece | Finished]:
        """Text, and the end of each answer, as they come.

        Raises:
            Fault: it goes no further.
        """
        n_left = len(self.asked)
        while n_left:
            part = await self._next()
            assert isinstance(part, (Piece, Finished))
            if isinstance(part, Finished):
                self._n_new[part.index] = part.n_new
                n_left -= 1
            yield part

    async def _next(self) -> Event:
        happened = await self._events.get()
        if isinstance(happened, Failed):
            raise Fault(503 if happened.missing else 500, happened.message, code="no_adapter" if happened.missing else None)
        return happened

    def usage(self) -> Usage:
        """Tokens read and generated. Several answers to one prompt count it each: each is computed anew."""
        n_prompt = sum(len(asked.tokens) for asked in self.asked)
        return Usage(prompt_tokens=n_prompt, completion_tokens=sum(self._n_new), total_tokens=n_prompt + sum(self._n_new))

    async def whole(self, form: Form, before: Sequence[str]) -> Json:
        """The complete response; `before` is put before each answer's text."""
        texts = list(before)
        reasons: list[FinishReason] = ["length"] * len(self.asked)
        async for part in self.parts():
            if isinstance(part, Piece):
                texts[part.index] += part.text
            else:
                reasons[part.index] = part.reason
        self._log(form)
        return form.whole(list(zip(texts, reasons, strict=True)), self.usage())

    async def stream(self, form: Form, before: Sequence[str]) -> AsyncIterator[bytes]:
        """The response as server-sent events."""
        for index, text in enumerate(before):
            opening = form.opening(index)
            if opening is not None:
                yield event(opening)
            if text:
                yield event(form.piece(index, text))
        try:
            async for part in self.parts():
                yield event(form.piece(part.index, part.text) if isinstance(part, Piece) else form.closing(part.index, part.reason))
        except Fault as fault:
            yield event(fault.body())
            return
        if form.with_usage:
            yield event(form.usage(self.usage()))
        self._log(form)
        yield event("[DONE]")

    def _log(self, form: Form) -> None:
        elapsed_s = time.perf_counter() - self._begun
        usage = self.usage()
        log.info(
            "%s answered with %s: %d tokens read, %d written in %.1f s",
            form.model, form.fingerprint, usage.prompt_tokens, usage.completion_tokens, elapsed_s,
        )  # fmt: skip


class EventStream(StreamingResponse):
    """Server-sent events that cancel their call when they end, however they end."""

    def __init__(self, call: Call, form: Form, before: Sequence[str], headers: dict[str, str]) -> None:
        super().__init__(call.stream(form, before), media_type="text/event-stream", headers={**headers, "Cache-Control": "no-store"})
        self._call = call

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send them."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._call.cancel()


async def unless_gone(request: HttpRequest, work: Coroutine[Any, Any, T]) -> T | None:
    """What `work` gives, or None as soon as the client has gone: it is cancelled then."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        for task in (working, leaving):
            task.cancel()
