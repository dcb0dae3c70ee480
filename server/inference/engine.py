"""The thread that owns a model, its context and its adapters, and answers requests that are queued to it.

Nothing else calls into llama.cpp while it runs, but for the vocabulary, which never changes. A request is given the adapter that is current
when its first answer begins, and keeps it for all of them; see `adapters` for how one edition follows another.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from queue import Empty, SimpleQueue

from fwdllama.llama.context import Context
from fwdllama.llama.model import Model
from fwdllama.machine import check_memory, default_threads
from fwdllama.memory import engine_options, evaluation
from gguf_tools.model import read_model_info

from .adapters import Adapters, Held
from .edition import Edition
from .exchange import Failed, Request, Started
from .slots import TOGETHER, TOGETHER_OTHERWISE, Slots

log = logging.getLogger("fwdllama.inference")

MAX_WAITING = 64  # answers in the queue; who comes later is told to try again
PLANNED_RANK = 64  # of an adapter that is not known yet, for the memory plan
DEFAULT_CTX = 2048  # tokens a sequence; more only where asked for, because of the KV cache

_STOPPING = "the server is stopping."


class Engine:
    """Made by `open_engine`. Methods may be called from any thread."""

    def __init__(self, model: Model, context: Context, *, together: int) -> None:
        self.model = model
        self.n_ctx = context.options.n_ctx_seq
        self.n_parallel = context.options.n_seq
        self.crash: BaseException | None = None  # what ended the thread before it was asked to
        self._adapters = Adapters(model, context)
        self._slots = Slots(model, context, self._adapters, together=together)
        self._inbox: SimpleQueue[Request | Edition | None] = SimpleQueue()
        self._waiting: deque[tuple[Request, int]] = deque()
        self._held: dict[Request, tuple[Held | None, int]] = {}  # what a started request runs on, and answers left
        self._counting = threading.Lock()
        self._n_answers = 0  # asked for and not ended
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether requests are answered."""
        return self._thread.is_alive() and not self._stopping

    @property
    def current(self) -> tuple[Edition, float] | None:
        """The edition that the next request is answered with, and since when, in seconds since 1970."""
        held = self._adapters.current
        return None if held is None else (held.edition, held.since)

    def submit(self, request: Request) -> bool:
        """Queue a request; False where too many answers wait already."""
        with self._counting:
            if self._n_answers + len(request.asked) > self.n_parallel + MAX_WAITING:
                return False
            self._n_answers += len(request.asked)
        self._inbox.put(request)
        if self._stopping:  # perhaps nobody reads it any more
            request.emit(Failed(_STOPPING))
        return True

    def offer(self, edition: Edition) -> None:
        """Answer later requests with `edition`."""
        self._inbox.put(edition)

    def wait(self) -> None:
        """Return when the thread has ended."""
        self._thread.join()

    def close(self) -> None:
        """End the thread, after the decode that it is in; requests that still run fail. Safe to call twice."""
        self._stopping = True
        self._inbox.put(None)
        self.wait()

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._receive()
                self._drop_cancelled()
                self._adapters.advance()
                self._begin()
                for answer in self._slots.step():
                    self._ended(answer.request)
        except BaseException as error:  # noqa: BLE001 - whatever it is, who waits must be told, and the server must end
            self.crash = error
            log.critical("the engine has failed: %s: %s", type(error).__name__, error)
        finally:
            self._stopping = True
            for request in {*self._held, *(request for request, _ in self._waiting), *self._unread()}:
                request.emit(Failed(_STOPPING if self.crash is None else "the engine has failed."))
            self._adapters.close()

    def _receive(self) -> None:
        """Take what was queued, waiting for it where there is nothing to do."""
        idle = not self._waiting and not self._slots.answers()
        while True:
            try:
                order = self._inbox.get(block=idle)
            except Empty:
                return
            idle = False
            if isinstance(order, Request):
                self._waiting.extend((order, index) for index in range(len(order.asked)))
            elif order is not None:
                self._adapters.offer(order)

    def _unread(self) -> Iterator[Request]:
        while True:
            try:
                order = self._inbox.get(block=False)
            except Empty:
                return
            if isinstance(order, Request):
                yield order

    def _drop_cancelled(self) -> None:
        for answer in self._slots.answers():
            if answer.request.cancelled:
                self._slots.remove(answer)
                self._ended(answer.request)
        kept = [(request, index) for request, index in self._waiting if not request.cancelled]
        for request, _ in self._waiting:
            if request.cancelled:
                self._ended(request)
        self._waiting = deque(kept)

    def _begin(self) -> None:
        """Put waiting answers into free sequences, in the order in which they were asked for."""
        while self._waiting and self._slots.n_free:
            request, index = self._waiting[0]
            if request not in self._held and not self._start(request):
                continue
            self._waiting.popleft()
            held, _ = self._held[request]
            on_from = held.edition.first_on(request.asked[index].tokens) if held is not None else None
            self._slots.put(request, index, held, on_from)

    def _start(self, request: Request) -> bool:
        """Choose what a request runs on; False where that is not there, and the request is dropped."""
        held = self._adapters.current if request.tuned else None
        if request.tuned and held is None:
            request.emit(Failed("no version of the adapter has arrived yet.", missing=True))
            request.cancelled = True
            self._drop_cancelled()
            return False
        if held is not None:
            held.n_users += 1
        self._held[request] = held, len(request.asked)
        edition = held.edition if held is not None else None
        on = tuple(edition is not None and edition.first_on(asked.tokens) is not None for asked in request.asked)
        request.emit(Started(edition, on))
        return True

    def _ended(self, request: Request) -> None:
        """Count one answer of a request as done; the last one lets go of the adapter."""
        with self._counting:
            self._n_answers -= 1
        if request in self._held:
            held, n_left = self._held[request]
            self._held[request] = held, n_left - 1
            if n_left == 1:
                del self._held[request]
                if held is not None:
                    held.n_users -= 1


@contextmanager
def open_engine(
    model_path: Path, *, n_ctx: int | None = None, n_parallel: int = 4, n_threads: int | None = None, together: int | None = None
) -> Iterator[Engine]:
    """A model that answers `n_parallel` prompts at a time, of up to `n_ctx` tokens each with their answers.

    `together` None is what is fastest for the model's type, see `slots`.

    Raises:
        FileError: the model's file is damaged.
        ModelError: llama.cpp cannot use it.
        ResourceError: there is too little memory.
    """
    info = read_model_info(model_path)
    n_ctx = min(n_ctx or DEFAULT_CTX, info.context_length)
    options = engine_options(batch=n_parallel, n_ctx=n_ctx, n_threads=n_threads or default_threads())
    with ExitStack() as resources:
        model = resources.enter_context(Model(model_path))
        check_memory(model_path, evaluation(info, options, model.options, lora_rank=PLANNED_RANK).peak.items)
        context = resources.enter_context(Context(model, options))
        engine = Engine(model, context, together=together or TOGETHER.get(info.quantisation.upper(), TOGETHER_OTHERWISE))
        resources.callback(engine.close)
        yield engine
