"""Specifications, ledgers and an aggregator's read-only half, small enough to test a device's parts one by one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np
from numpy.typing import NDArray

from fwdllama.federation.client import Client
from fwdllama.federation.identity import Identity
from fwdllama.federation.message import Enrolled, Run, Snapshot, theta_digest
from fwdllama.federation.spec import RunSpec
from fwdllama.federation.store import MemoryStore, Store
from fwdllama.federation.toy import toy_run
from fwdllama.ledger import Entry, chained, digest, replay, restoring

URL = "http://aggregator.test:8080"


def spec(n_params: int = 40, **changed: Any) -> RunSpec:
    """A toy run of few examples, its rounds of ten probes."""
    train = {"batch": {"units": 4, "per_unit": 3, "fresh": 2}, **changed.pop("train", {})}
    return toy_run("made", n_params, train=train, **{"round": {"probes": 10, "most": 10}, **changed})[0]


def entry(step: int, n: int = 3, seed: int = 0) -> Entry:
    random = np.random.Generator(np.random.PCG64([seed, step]))
    return Entry(step, random.integers(0, 1 << 63, n).astype(np.uint64), random.standard_normal(n).astype(np.float32) / 10)


def ledger_of(restores: list[int | None], n: int = 3) -> list[Entry]:
    """One entry for each item: a step, or one that restores the step given."""
    return [entry(i, n) if r is None else restoring(i, r) for i, r in enumerate(restores)]


@dataclass
class Archive:
    """Answers what catching up asks of an aggregator, with `page` entries a page, and counts what it sends."""

    entries: list[Entry]
    spec: RunSpec = field(default_factory=spec)
    page: int = 2
    snapshot_at: int | None = None
    spoil: Callable[[bytes], bytes] = lambda data: data
    asked: list[str] = field(default_factory=list)

    @property
    def initial(self) -> NDArray[np.float32]:
        return np.zeros(self.spec.n_params, np.float32)

    def theta(self, version: int) -> NDArray[np.float32]:
        return replay(self.initial, self.entries[:version])

    def digest(self, version: int) -> str:
        return theta_digest(self.theta(version))

    def frames(self, first: int, stop: int) -> bytes:
        last = digest(self.spec.genesis(), self.entries[:first])
        data = b""
        for item in self.entries[first:stop]:
            last = chained(last, item.payload())
            data += item.payload() + last
        return data

    def run(self) -> Run:
        n = len(self.entries)
        blob = None if self.snapshot_at is None else self.theta(self.snapshot_at).tobytes()
        snapshot = blob and Snapshot(version=self.snapshot_at or 0, sha256=hashlib.sha256(blob).hexdigest(), size_bytes=len(blob))
        return Run(
            run="r1",
            status="open",
            spec=self.spec,
            genesis=self.spec.genesis().hex(),
            version=n,
            theta_digest=self.digest(n),
            ledger_bytes=len(self.frames(0, n)),
            snapshot=snapshot or None,
        )

    def answer(self, request: httpx.Request) -> httpx.Response:
        self.asked.append(request.url.raw_path.decode())
        path = request.url.path
        if path == "/v1/runs/r1":
            return httpx.Response(200, content=self.run().model_dump_json())
        if path == "/v1/runs/r1/ledger":
            first = int(request.url.params["from"])
            if first > len(self.entries):
                return httpx.Response(422, json={"detail": f"the ledger has {len(self.entries)} entries, not {first}."})
            return httpx.Response(200, content=self.spoil(self.frames(first, first + self.page)))
        if path.startswith("/v1/blobs/sha256:") and self.snapshot_at is not None:
            return httpx.Response(200, content=self.theta(self.snapshot_at).tobytes())
        return httpx.Response(404, json={"detail": f"there is no {path}."})


def client(answer: Callable[[httpx.Request], httpx.Response], store: Store | None = None, **options: Any) -> Client:
    """An enrolled device's client whose requests `answer` gets instead of a network."""
    store = store or MemoryStore()
    identity = Identity.load(store, URL) or Identity.enrolled(store, URL, Enrolled(device="d1", key="11" * 32))
    http = httpx.Client(transport=httpx.MockTransport(answer))
    return Client(URL, http, identity, **{"sleep": lambda seconds: True, **options})


def refusal(status: int, detail: str = "no.", **headers: str) -> httpx.Response:
    return httpx.Response(status, content=json.dumps({"detail": detail}), headers={key.replace("_", "-"): value for key, value in headers.items()})
