"""An aggregator in a folder of the test, over a clock that the test moves, and devices that sign as real ones do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fwdllama_server.app import create_app
from fwdllama_server.context import Context
from fwdllama_server.limits import Limits
from fwdllama_server.opening import opened
from starlette.testclient import TestClient

from fwdllama.federation.signature import headers
from fwdllama.federation.toy import BASE, toy_run
from fwdllama.ledger import Entry, read_page, replay

from .commands import Served, served

CENTRE = 0.5  # where the toy's loss is least, in every coordinate


@dataclass
class Clock:
    """Seconds that pass when told."""

    at: float = 1_800_000_000.0

    def __call__(self) -> float:
        return self.at


@dataclass
class Member:
    """An enrolled device: 1/2 |theta - centre|^2 is its loss."""

    client: TestClient
    clock: Clock
    device: str
    key: bytes
    nonce: int = 0
    held: dict[str, Any] = field(default_factory=dict)

    def send(self, method: str, target: str, body: Any = None, **changed: str) -> Any:
        """A signed request; `changed` replaces headers."""
        self.nonce += 1
        content = b"" if body is None else json.dumps(body).encode()
        signed = headers(self.device, self.key, method, target, content, self.nonce, self.clock())
        return self.client.request(method, target, content=content, headers={**signed, "content-type": "application/json", **changed})

    def check_in(self, run: str, **more: Any) -> dict[str, Any]:
        """The assignment."""
        answer = self.send("POST", f"/v1/runs/{run}/checkin", {"base": BASE, **more})
        assert answer.status_code == 200, answer.text
        return answer.json()

    def theta(self, run: str) -> tuple[np.ndarray, list[Entry]]:
        """The newest theta, by replay of the whole ledger."""
        about = self.send("GET", f"/v1/runs/{run}").json()
        entries: list[Entry] = []
        last = bytes.fromhex(about["genesis"])
        while len(entries) < about["version"]:
            page = self.send("GET", f"/v1/runs/{run}/ledger?from={len(entries)}").content
            more, last = read_page(page, last, len(entries), "the page")
            entries += more
        return replay(np.zeros(about["spec"]["n_params"], np.float32), entries), entries

    def result(self, task: dict[str, Any], scale: float = 1.0) -> dict[str, Any]:
        """An honest result (scale 1)."""
        from fwdllama.direction import direction

        theta, _ = self.theta(task["run"])
        loss = float(0.5 * np.sum((theta - CENTRE) ** 2))
        if task["kind"] == "evaluate":
            return {"kind": "evaluate", "theta_digest": task["theta_digest"], "loss": loss, "n_examples": 8, "n_tokens": 80}
        eps = 0.01
        plus = [scale * float(0.5 * np.sum((theta + eps * direction(seed, theta.size) - CENTRE) ** 2)) for seed in task["seeds"]]
        return {
            "kind": "train",
            "theta_digest": task["theta_digest"],
            "plus": plus,
            "minus": [loss],
            "examples": [4],
            "loss": loss,
            "n_tokens": 100,
        }

    def deliver(self, task: dict[str, Any], result: dict[str, Any] | None = None) -> Any:
        """Deliver a result, by default an honest one."""
        return self.send("PUT", f"/v1/tasks/{task['task']}/result", {"result": result or self.result(task)})

    def work(self, run: str) -> dict[str, Any]:
        """One check-in, with the task done if there is one; the assignment."""
        given = self.check_in(run)
        if given["task"]:
            answer = self.deliver(given["task"])
            assert answer.status_code == 200, answer.text
        return given


@dataclass
class Aggregator:
    """An aggregator, its clock, and the ways in."""

    context: Context
    client: TestClient
    clock: Clock
    enrolment: str = ""

    def admin(self, method: str, target: str, body: Any = None, **more: Any) -> Any:
        """A request with the administrator's key."""
        return self.client.request(method, target, json=body, headers={"authorization": f"Bearer {self.context.secrets.admin}"}, **more)

    def create(self, name: str = "toy", n_params: int = 64, **spec: Any) -> dict[str, Any]:
        """A run of the toy."""
        made, initial = toy_run(name, n_params, **spec)
        key = {"authorization": f"Bearer {self.context.secrets.admin}"}
        assert self.client.put(f"/v1/blobs/sha256:{made.initial}", content=initial, headers=key).status_code == 201
        answer = self.admin("POST", "/v1/runs", made.model_dump(mode="json"))
        assert answer.status_code == 201, answer.text
        return answer.json()

    def member(self, name: str = "phone") -> Member:
        """A newly enrolled device."""
        if not self.enrolment:
            self.enrolment = self.admin("POST", "/v1/tokens", {"name": "tests"}).json()["token"]
        answer = self.client.post("/v1/devices", json={"name": name}, headers={"authorization": f"Bearer {self.enrolment}"})
        assert answer.status_code == 201, answer.text
        return Member(self.client, self.clock, answer.json()["device"], bytes.fromhex(answer.json()["key"]))


@pytest.fixture(scope="session")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a new aggregator, to be copied: its tables take a fifth of a second to make."""
    folder = tmp_path_factory.mktemp("empty") / "aggregator"
    opened(folder).store.close()
    return folder


@pytest.fixture(scope="session")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """An aggregator in a process of its own, for all tests that only speak to one."""
    with served(tmp_path_factory.mktemp("serving") / "aggregator") as found:
        yield found


@pytest.fixture
def aggregator(tmp_path: Path, empty: Path) -> Iterator[Aggregator]:
    """A new aggregator."""
    clock = Clock()
    shutil.copytree(empty, tmp_path / "aggregator")
    context = opened(tmp_path / "aggregator", limits=Limits(newcomers_per_s=1000.0, requests_per_s=1000.0))
    context.now = clock
    with TestClient(create_app(context)) as client:
        yield Aggregator(context, client, clock)
    context.store.close()
