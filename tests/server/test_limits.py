"""What is too large or comes too often is refused before it costs anything."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from fwdllama_server.app import create_app
from fwdllama_server.limits import Limits
from fwdllama_server.opening import opened
from starlette.testclient import TestClient

if TYPE_CHECKING:
    from .conftest import Aggregator

BODY_BYTES = 4096


@pytest.fixture
def small(tmp_path: Path, empty: Path) -> Iterator[Aggregator]:
    """An aggregator with low limits."""
    from .conftest import Aggregator, Clock

    clock = Clock()
    shutil.copytree(empty, tmp_path / "small")
    context = opened(tmp_path / "small", limits=Limits(body_bytes=BODY_BYTES, requests_per_s=1.0, newcomers_per_s=0.5, devices=3))
    context.now = clock
    with TestClient(create_app(context)) as client:
        yield Aggregator(context, client, clock)
    context.store.close()


def chunks(n_bytes: int) -> Iterator[bytes]:
    for _ in range(n_bytes // 512):
        yield b" " * 512


def test_body_over_the_limit_is_refused_by_its_claimed_length(small: Aggregator) -> None:
    answer = small.client.post("/v1/tokens", content=b" " * (BODY_BYTES + 1), headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["detail"]) == (413, "the body is larger than 4096 bytes.")


def test_body_of_an_impossible_length_is_refused(small: Aggregator) -> None:
    for length in ("-1", "many", "9" * 5000):
        answer = small.client.post("/v1/tokens", content=b"{}", headers={"content-length": length})
        assert answer.status_code == 413


def test_body_over_the_limit_is_refused_though_it_claims_no_length(small: Aggregator) -> None:
    for target in ("/v1/tokens", "/v1/devices", "/v1/runs/x/checkin"):
        answer = small.client.post(target, content=chunks(2 * BODY_BYTES), headers={"content-type": "application/json"})
        assert (answer.status_code, answer.json()["detail"]) == (413, "the body is larger than 4096 bytes.")


def test_upload_of_an_adapter_has_a_limit_of_its_own(small: Aggregator) -> None:
    import hashlib

    data = b"x" * (4 * BODY_BYTES)
    assert small.admin("PUT", f"/v1/blobs/sha256:{hashlib.sha256(data).hexdigest()}", content=data).status_code == 201
    assert small.client.put(f"/v1/blobs/sha256:{'0' * 64}", content=data).status_code == 401


def test_device_that_asks_too_often_is_told_when_to_come_back(small: Aggregator) -> None:
    member = small.member()
    codes = [member.send("GET", "/v1/runs").status_code for _ in range(11)]
    assert codes == [200] * 10 + [429]
    answer = member.send("GET", "/v1/runs")
    assert answer.json()["detail"] == "more than 1 requests a second; come back in 1.0 s."
    small.clock.at += float(answer.headers["retry-after"])
    assert member.send("GET", "/v1/runs").status_code == 200


def test_guessing_keys_is_slowed_down(small: Aggregator) -> None:
    answers = [small.client.get("/v1/tokens", headers={"authorization": f"Bearer {i}"}) for i in range(6)]
    assert [a.status_code for a in answers] == [401] * 5 + [429]
    assert int(answers[-1].headers["retry-after"]) == 3
    small.clock.at += 3
    assert small.client.get("/v1/tokens", headers={"authorization": "Bearer x"}).status_code == 401


def test_more_devices_than_allowed_are_refused(small: Aggregator) -> None:
    for _ in range(3):
        small.member()
    answer = small.client.post("/v1/devices", json={"name": "x"}, headers={"authorization": f"Bearer {small.enrolment}"})
    assert (answer.status_code, answer.json()["detail"]) == (429, "there are 3 devices already, which is the limit.")


def test_range_of_thousands_of_digits_is_no_error(small: Aggregator) -> None:
    made = small.create()
    target = f"/v1/blobs/sha256:{made['spec']['initial']}"
    key = {"authorization": f"Bearer {small.context.secrets.admin}"}
    assert small.client.get(target, headers={**key, "range": f"bytes={'9' * 5000}-"}).status_code == 200
    assert small.client.get(target, headers={**key, "range": "bytes=999999999-"}).status_code == 416
