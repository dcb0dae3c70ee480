"""A real aggregator on a real socket, that tests stop and start, and simulated devices that drive the real loop."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import httpx
import pytest

from fwdllama.federation.client import Client
from fwdllama.federation.connection import connection
from fwdllama.federation.device import Device, Listener
from fwdllama.federation.identity import Identity
from fwdllama.federation.spec import RunSpec
from fwdllama.federation.store import MemoryStore, Store
from fwdllama.federation.toy import BASE, toy_run
from fwdllama.federation.worker import Worker, quadratic_worker
from fwdllama.guard import Guard


class Serving:
    """An aggregator in a folder, on a port that stays the same."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = int(free.getsockname()[1])
        self.url = f"http://127.0.0.1:{self.port}"
        self.later_s = 0.0  # how far the aggregator's clock is ahead
        self.http = httpx.Client(base_url=self.url)
        self.start()

    def start(self) -> None:
        import uvicorn
        from fwdllama_server.app import create_app
        from fwdllama_server.limits import Limits
        from fwdllama_server.opening import opened

        self.context = opened(self.folder, limits=Limits(newcomers_per_s=1000.0, requests_per_s=1000.0))
        self.context.now = lambda: time.time() + self.later_s
        config = uvicorn.Config(create_app(self.context), host="127.0.0.1", port=self.port, log_level="error", timeout_graceful_shutdown=1)
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join()
        self.context.store.close()

    def admin(self, method: str, target: str, body: Any = None) -> Any:
        """What an administrator's request is answered."""
        answer = self.http.request(method, target, json=body, headers={"authorization": f"Bearer {self.context.secrets.admin}"})
        assert answer.is_success, answer.text
        return answer.json() if answer.content else None

    def create(self, name: str, n_params: int = 64, **spec: Any) -> RunSpec:
        """A run of the toy; rounds of four tasks of ten probes unless told otherwise."""
        usual = {"rounds": 3, "round": {"probes": 40, "most": 40, "probes_per_task": 10}, "evaluation": {"devices": 1}}
        made, initial = toy_run(name, n_params, **{**usual, **spec})
        key = {"authorization": f"Bearer {self.context.secrets.admin}"}
        assert self.http.put(f"/v1/blobs/sha256:{made.initial}", content=initial, headers=key).status_code == 201
        self.admin("POST", "/v1/runs", made.model_dump(mode="json"))
        return made

    def token(self, uses: int | None = None) -> str:
        return str(self.admin("POST", "/v1/tokens", {"name": "tests", "uses": uses})["token"])


@pytest.fixture(scope="session")
def _server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    pytest.importorskip("fastapi", reason="the aggregator is in the extra `server`")
    level = logging.getLogger("fwdllama").level
    serving = Serving(tmp_path_factory.mktemp("aggregator"))
    yield serving
    serving.stop()
    serving.http.close()
    logging.getLogger("fwdllama").setLevel(level)


@pytest.fixture
def serving(_server: Serving) -> Iterator[Serving]:
    """The aggregator, its clock right."""
    _server.later_s = 0.0
    yield _server
    _server.later_s = 0.0


Made = Callable[..., Device]


@pytest.fixture
def simulated(serving: Serving) -> Iterator[Made]:
    """Makes enrolled simulated devices of a run; what they say is in `said`."""
    http = connection(n_connections=16)
    token = serving.token()

    def make(
        run: str,
        store: Store | None = None,
        *,
        seed: int = 1,
        guard: Guard | None = None,
        base: str = BASE,
        tell: list[str] | None = None,
        hire: Callable[[RunSpec, bytes], AbstractContextManager[Worker]] | None = None,
        listener: Listener | None = None,
        **more: Any,
    ) -> Device:
        store = store or MemoryStore()
        client = Client(serving.url, http, Identity.load(store, serving.url), patience_s=0.0)
        hire = hire or (lambda spec, initial: nullcontext(quadratic_worker(spec, seed=seed)))
        listener = listener or Listener(on_event=(tell if tell is not None else []).append)
        device = Device(client, store, base, 24, hire, run_name=run, guard=guard, listener=listener, **more)
        device.enrol(f"simulated {seed}", token)
        return device

    yield make
    http.close()
