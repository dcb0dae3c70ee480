"""A tiny model, adapters for it, and the server around them on a real socket."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import pytest
from fwdllama_server.graceful import GracefulServer
from fwdllama_server.inference.app import Service, make_app
from fwdllama_server.inference.edition import Edition, make_edition
from fwdllama_server.inference.engine import Engine, open_engine
from fwdllama_server.inference.exchange import Asked, Event, Failed, Finished, Piece, Request, Started
from fwdllama_server.listen import listening, url_of

from gguf_tools.adapter import Adapter, adapter_bytes
from gguf_tools.model import ModelInfo, read_model_info
from gguf_tools.synth import write_tiny_llama

INVOCATION = (61, 13)  # ":\n" in the tiny model's vocabulary
SEED_PROMPT = "Say it\n\n### Answer:\n"


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("served") / "tiny.gguf")


@pytest.fixture(scope="session")
def info(base: Path) -> ModelInfo:
    return read_model_info(base)


AdapterOf = Callable[..., bytes]


@pytest.fixture(scope="session")
def adapter_of(info: ModelInfo) -> AdapterOf:
    """The file of an adapter with random numbers from a seed, large enough to change every answer."""

    def made(seed: int, *, scope: str = "answer", rank: int = 4, invocation: tuple[int, ...] = INVOCATION, **metadata: str) -> bytes:
        rng = np.random.default_rng(seed)
        tensors = {}
        for name, (shape, _) in info.tensors.items():
            if name.endswith(("attn_q.weight", "attn_v.weight", "ffn_up.weight")):
                a = rng.standard_normal((rank, shape[1])).astype(np.float32)
                tensors[name] = (a / np.float32(8), rng.standard_normal((shape[0], rank)).astype(np.float32))
        given = {f"fwdllama.{key}": value for key, value in metadata.items()}
        if scope == "all":
            return adapter_bytes(Adapter("llama", 4.0, tensors, metadata=given))
        return adapter_bytes(Adapter("llama", 4.0, tensors, "answer", invocation, given))

    return made


EditionOf = Callable[..., Edition]


@pytest.fixture(scope="session")
def edition_of(info: ModelInfo, adapter_of: AdapterOf) -> EditionOf:
    def made(seed: int, **options: object) -> Edition:
        return make_edition(adapter_of(seed, **options), f"adapter {seed}", info, version=seed, digest=f"{seed:064x}")

    return made


@dataclass
class Outcome:
    """What became of a request, as its events tell it."""

    started: Started | None
    texts: list[str]
    ends: dict[int, Finished]
    failed: Failed | None

    @property
    def text(self) -> str:
        return self.texts[0]


class Asking:
    """A request whose events are kept; `on_piece` is called in the engine's thread, at the first text."""

    def __init__(self, asked: Sequence[Asked], *, tuned: bool, on_piece: Callable[[], None] | None = None) -> None:
        self._events: SimpleQueue[Event] = SimpleQueue()
        self._on_piece = on_piece
        self.request = Request(asked, tuned, self._emit)

    def _emit(self, event: Event) -> None:
        self._events.put(event)
        if isinstance(event, Piece) and self._on_piece is not None:
            act, self._on_piece = self._on_piece, None
            act()

    def cancel(self) -> None:
        self.request.cancelled = True

    def outcome(self) -> Outcome:
        outcome = Outcome(None, ["" for _ in self.request.asked], {}, None)
        while len(outcome.ends) < len(outcome.texts) and outcome.failed is None:
            event = self._events.get(timeout=20)
            if isinstance(event, Started):
                assert outcome.started is None
                outcome.started = event
            elif isinstance(event, Piece):
                outcome.texts[event.index] += event.text
            elif isinstance(event, Finished):
                outcome.ends[event.index] = event
            else:
                outcome.failed = event
        return outcome


def answer(engine: Engine, *asked: Asked, tuned: bool = False) -> Outcome:
    asking = Asking(asked, tuned=tuned)
    assert engine.submit(asking.request)
    return asking.outcome()


def wait_for(condition: Callable[[], object]) -> None:
    """Until it is true, or fail."""
    for _ in range(2000):
        if condition():
            return
        threading.Event().wait(0.005)
    pytest.fail("it has not become true within 10 s")


def put_on(engine: Engine, edition: Edition) -> None:
    engine.offer(edition)
    wait_for(lambda: engine.current is not None and engine.current[0] is edition)


@pytest.fixture(scope="module")
def engine(base: Path) -> Iterator[Engine]:
    with open_engine(base, n_ctx=512, n_threads=1) as opened:
        yield opened


@dataclass
class Served:
    """A server that runs, and the engine in it."""

    url: str
    engine: Engine


@contextmanager
def serving(engine: Engine, *, key: str | None = None, origins: tuple[str, ...] = ()) -> Iterator[Served]:
    app = make_app(Service(engine, "tiny", "tiny:run", key, origins))
    with serving_app(app) as url:
        yield Served(url, engine)


@contextmanager
def serving_app(app: object) -> Iterator[str]:
    server = GracefulServer(app, drain_s=5)
    with listening("127.0.0.1", 0) as opened:
        thread = threading.Thread(target=server.serve_on, args=(opened,))
        thread.start()
        try:
            wait_for(lambda: server.started)
            yield url_of(opened, tls=False)
        finally:
            server.stop()
            thread.join()
