"""An aggregator in processes of its own, as a user starts it; killed and started again as often as a measurement wants.

eval knows the server by its protocol only, so what is looked up in its database afterwards is looked up with SQL.
"""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from fwdllama.federation.spec import RunSpec

from ..measure import BenchError
from .wire import Answer, Identity, Lost, Wire, asked

HOST = "127.0.0.1"
START_S = 60.0
ENROLLING = 32  # at once
SERVE = """
import json, signal, socket, sys
from pathlib import Path
import uvicorn
from fwdllama_server.app import create_app
from fwdllama_server.limits import Limits
from fwdllama_server.opening import opened
given = json.loads(sys.argv[1])
at = socket.socket()
at.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
if given["shared"]:
    at.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
at.bind((given["host"], given["port"]))
signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn raises it again after its shutdown, which would leave out what follows
context = opened(Path(given["folder"]), database=given["database"], limits=Limits(**given["limits"]))
uvicorn.Server(uvicorn.Config(create_app(context), access_log=False, log_level="warning")).run(sockets=[at])
context.store.close()
"""


def command(folder: Path, port: int, *, database: str | None, shared: bool) -> list[str]:
    """What starts one worker of the aggregator of `folder`; with `shared` it does not have the port for itself."""
    limits = {"newcomers_per_s": 1e6, "requests_per_s": 1e6}  # all simulated devices come from one address
    given = {"folder": str(folder), "host": HOST, "port": port, "database": database, "limits": limits, "shared": shared}
    return [sys.executable, "-c", SERVE, json.dumps(given)]


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as found:
        found.bind((HOST, 0))
        port: int = found.getsockname()[1]
        return port


class Aggregator:
    """The aggregator of a folder, with one worker or several. Its processes do not outlive the block it is used in."""

    def __init__(self, folder: Path, *, database: str | None = None, workers: int = 1) -> None:
        self.folder, self.database, self.port = folder, database, free_port()
        self._workers: list[subprocess.Popen[bytes]] = []
        self._shared = workers > 1
        folder.mkdir(parents=True, exist_ok=True)
        for worker in range(workers):
            self._workers.append(self._spawned())
            self._wait(worker)  # one after the other: the first makes the tables

    def _spawned(self) -> subprocess.Popen[bytes]:
        with open(self.folder / "log", "ab") as log:
            return subprocess.Popen(
                command(self.folder / "aggregator", self.port, database=self.database, shared=self._shared),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def _wait(self, worker: int) -> None:
        """Wait until the aggregator answers; of several workers any may.

        Raises:
            BenchError: it does not, or the worker died.
        """
        until = time.monotonic() + START_S
        while time.monotonic() < until and self._workers[worker].poll() is None:
            try:
                if asked(HOST, self.port, "GET", "/health", answer_s=5.0).status == 200:
                    return
            except Lost:
                time.sleep(0.02)
        said = (self.folder / "log").read_text(errors="replace").strip().splitlines()
        raise BenchError(f"the aggregator did not start: {said[-1] if said else 'it said nothing'}")

    def kill(self, worker: int = 0) -> None:
        """End a worker as a power cut would."""
        self._workers[worker].kill()
        self._workers[worker].wait()

    def restart(self, worker: int = 0) -> None:
        """Start a worker that was killed."""
        self._workers[worker] = self._spawned()
        self._wait(worker)

    def rss_bytes(self) -> int:
        """Memory of all workers together."""
        return sum(int(psutil.Process(worker.pid).memory_info().rss) for worker in self._workers)

    def cpu_s(self) -> float:
        """Processor time that the workers have used."""
        times = [psutil.Process(worker.pid).cpu_times() for worker in self._workers]
        return float(sum(t.user + t.system for t in times))

    @property
    def admin_headers(self) -> dict[str, str]:
        """What an administrator's request carries."""
        return {"authorization": f"Bearer {(self.folder / 'aggregator' / 'admin.key').read_text().strip()}"}

    def admin(self, method: str, target: str, body: Any = None, *, raw: bytes = b"") -> Answer:
        """An administrator's request.

        Raises:
            BenchError: it was refused, or not answered.
        """
        data = raw if body is None else json.dumps(body).encode()
        try:
            answer = asked(HOST, self.port, method, target, data, self.admin_headers)
        except Lost as error:
            raise BenchError(f"the aggregator does not answer: {error}") from error
        if answer.status >= 400:
            raise BenchError(f"{method} {target}: {answer.status} {answer.body.decode(errors='replace')}")
        return answer

    @property
    def url(self) -> str:
        """Of its database, for SQLAlchemy."""
        return self.database or f"sqlite:///{self.folder / 'aggregator' / 'aggregator.sqlite'}"

    def create(self, spec: RunSpec, initial: bytes) -> dict[str, Any]:
        """Start a run."""
        self.admin("PUT", f"/v1/blobs/sha256:{spec.initial}", raw=initial)
        created: dict[str, Any] = self.admin("POST", "/v1/runs", spec.model_dump(mode="json")).json
        return created

    def enrolled(self, n: int) -> list[Identity]:
        """Enrol `n` devices."""
        token = self.admin("POST", "/v1/tokens", {"name": "bench"}).json["token"]
        return asyncio.run(_enrolled(self.port, token, n))

    def stop(self) -> None:
        """End all workers in order."""
        for worker in self._workers:
            if worker.poll() is None:
                worker.send_signal(signal.SIGTERM)
        for worker in self._workers:
            try:
                worker.wait(20)
            except subprocess.TimeoutExpired:
                worker.kill()
                worker.wait()

    def __enter__(self) -> Aggregator:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()


async def _enrolled(port: int, token: str, n: int) -> list[Identity]:
    found: list[Identity] = []

    async def enrol(numbers: Sequence[int]) -> None:
        async with Wire(HOST, port) as wire:
            for number in numbers:
                body = json.dumps({"name": f"simulated {number}"}).encode()
                answer = await wire.request("POST", "/v1/devices", body, {"authorization": f"Bearer {token}"})
                if answer.status != 201:
                    raise BenchError(f"device {number} was not enrolled: {answer.status} {answer.body.decode(errors='replace')}")
                found.append(Identity(answer.json["device"], bytes.fromhex(answer.json["key"])))

    await asyncio.gather(*(enrol(range(part, n, ENROLLING)) for part in range(min(ENROLLING, n))))
    return found
