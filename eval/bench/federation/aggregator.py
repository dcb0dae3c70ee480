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

from ..child import PROGRAM
from ..measure import BenchError
from .wire import Answer, Identity, Lost, Wire, asked

HOST = "127.0.0.1"
START_S, STOP_S = 60.0, 40.0
MOST_STARTS = 10
ENROLLING = 32  # at once
SPAWNED = "spawn_main"  # in the command line of a worker that a supervisor started


def words(folder: Path, port: int, *, database: str | None, workers: int) -> list[object]:
    """The command that serves the aggregator of `folder`. Its rates are high because all simulated devices come from one address."""
    where = () if database is None else ("--database", database)
    many = () if workers == 1 else ("--workers", workers)
    return ["serve", folder, "--port", port, *where, *many, "--requests-per-s", "1e6", "--newcomers-per-s", "1e6"]


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as found:
        found.bind((HOST, 0))
        port: int = found.getsockname()[1]
        return port


class Aggregator:
    """The aggregator of a folder, with one worker or several. Its processes do not outlive the block it is used in."""

    def __init__(self, folder: Path, *, database: str | None = None, workers: int = 1) -> None:
        self.folder, self.database, self.n_workers, self.port = folder, database, workers, free_port()
        folder.mkdir(parents=True, exist_ok=True)
        self._process = self._spawned()
        self._wait()

    def _spawned(self) -> subprocess.Popen[bytes]:
        given = words(self.folder / "aggregator", self.port, database=self.database, workers=self.n_workers)
        with open(self.folder / "log", "ab") as log:
            return subprocess.Popen([sys.executable, "-c", PROGRAM, *map(str, given)], stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def _wait(self) -> None:
        """Wait until the aggregator answers; of several workers any may.

        Raises:
            BenchError: it does not, or it ended.
        """
        until = time.monotonic() + START_S
        while time.monotonic() < until and self._process.poll() is None:
            try:
                if asked(HOST, self.port, "GET", "/health", answer_s=5.0).status == 200:
                    return
            except Lost:
                time.sleep(0.02)
        self.kill()
        said = (self.folder / "log").read_text(errors="replace").strip().splitlines()
        raise BenchError(f"the aggregator did not start: {said[-1] if said else 'it said nothing'}")

    def _workers(self) -> list[psutil.Process]:
        """The processes that answer requests, which the first one started where there are several."""
        if self._process.poll() is not None:
            return []
        first = psutil.Process(self._process.pid)
        return [first] if self.n_workers == 1 else [p for p in first.children() if _spawned(p)]

    def kill(self) -> None:
        """End all its processes as a power cut would."""
        for worker in self._workers():
            worker.kill()
        self._process.kill()
        self._process.wait()

    def kill_worker(self, which: int) -> None:
        """End one of several workers; another takes its place."""
        workers = self._workers()
        if workers:
            workers[which % len(workers)].kill()

    def restart(self) -> None:
        """Start it where it has ended, and wait until it answers; it ends too when its workers die faster than they start."""
        for _ in range(MOST_STARTS):
            if self._process.poll() is not None:
                self._process = self._spawned()
            try:
                self._wait()
                return
            except BenchError:
                if self._process.poll() is None:  # it runs and does not answer
                    raise
        raise BenchError(f"the aggregator ended {MOST_STARTS} times as soon as it started.")

    def rss_bytes(self) -> int:
        """Memory of all workers together."""
        return sum(int(worker.memory_info().rss) for worker in self._workers())

    def cpu_s(self) -> float:
        """Processor time that the workers have used."""
        times = [worker.cpu_times() for worker in self._workers()]
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
        """End it in order."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self.kill()

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


def _spawned(process: psutil.Process) -> bool:
    """Whether it is a worker; one that was killed and not yet waited for is none."""
    try:
        return SPAWNED in " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return False
