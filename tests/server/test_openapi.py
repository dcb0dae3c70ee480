"""The interface against its own OpenAPI document, by schemathesis: every check, as administrator and as a device."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
import uvicorn
from fwdllama_server.app import create_app
from fwdllama_server.limits import Limits
from fwdllama_server.opening import opened
from schemathesis import GenerationMode

from fwdllama.federation.signature import headers

pytestmark = pytest.mark.api


class Key:
    """How schemathesis authenticates an administrator; it leaves it out where it tests for that."""

    key: str

    def get(self, case: Any, context: Any) -> str:
        """The key."""
        return self.key

    def set(self, case: Any, data: str, context: Any) -> None:
        """Put it into the request."""
        case.headers = {**(case.headers or {}), "Authorization": f"Bearer {data}"}


class Signer:
    """A requests authentication: a device's signature of exactly what is sent."""

    def __init__(self, device: str, key: bytes) -> None:
        self.device, self.key, self.nonce = device, key, 0

    def __call__(self, request: Any) -> Any:
        self.nonce += 1
        body = request.body or b""
        body = body.encode() if isinstance(body, str) else body
        request.headers.update(headers(self.device, self.key, request.method, request.path_url, body, self.nonce, time.time()))
        return request


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str, Signer]]:
    """A real server with a run that was worked on, an administrator and a device."""
    import httpx

    from fwdllama.federation.toy import toy_run

    context = opened(Path(tmp_path_factory.mktemp("api")) / "aggregator", limits=Limits(newcomers_per_s=1e6, requests_per_s=1e6))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(create_app(context), port=port, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    base = f"http://127.0.0.1:{port}"
    key = {"authorization": f"Bearer {context.secrets.admin}"}
    spec, initial = toy_run("toy")
    assert httpx.put(f"{base}/v1/blobs/sha256:{spec.initial}", content=initial, headers=key).status_code == 201
    assert httpx.post(f"{base}/v1/runs", json=spec.model_dump(mode="json"), headers=key).status_code == 201
    token = httpx.post(f"{base}/v1/tokens", json={}, headers=key).json()["token"]
    device = httpx.post(f"{base}/v1/devices", json={"name": "phone"}, headers={"authorization": f"Bearer {token}"}).json()
    yield base, context.secrets.admin, Signer(device["device"], bytes.fromhex(device["key"]))
    server.should_exit = True
    thread.join()
    context.store.close()


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["valid", "invalid"])
@pytest.mark.parametrize("who", ["administrator", "device"])
def test_every_check_of_schemathesis_passes(url: tuple[str, str, Signer], who: str, mode: GenerationMode) -> None:
    base, key, signer = url
    schema = schemathesis.openapi.from_url(f"{base}/openapi.json")
    signing = {"auth": signer} if who == "device" else {}
    if who == "administrator":
        schema.auth()(type("Administrator", (Key,), {"key": key}))
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis.errors import Unsatisfiable

    failures: list[str] = []
    for found in schema.get_all_operations():
        operation = found.ok()
        if operation.path == "/v1/events":  # an endless stream; it has tests of its own
            continue

        @given(case=operation.as_strategy(generation_mode=mode))
        @settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate], database=None)
        def conforms(case: Any) -> None:
            case.call_and_validate(timeout=20, **signing)

        try:
            conforms()
        except Unsatisfiable:
            continue  # nothing about it can be invalid
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            failures.append(f"{operation.method.upper()} {operation.path}: {error}")
    assert not failures, "\n\n".join(failures)
