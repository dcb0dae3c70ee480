"""Enrolment tokens: counted, expiring, revoked; and the administrator's key."""

from __future__ import annotations

import ast
import inspect
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa
from fwdllama_server import auth
from fwdllama_server.auth import Secrets
from fwdllama_server.schema import metadata

from fwdllama.errors import ResourceError

if TYPE_CHECKING:
    from .conftest import Aggregator


def token(aggregator: Aggregator, **body: Any) -> dict[str, Any]:
    return aggregator.admin("POST", "/v1/tokens", {"name": "mine", **body}).json()


def enrol(aggregator: Aggregator, given: str | None) -> tuple[int, str]:
    header = {} if given is None else {"authorization": f"Bearer {given}"}
    answer = aggregator.client.post("/v1/devices", json={"name": "phone"}, headers=header)
    return answer.status_code, answer.json().get("detail", "")


def test_token_of_two_uses_enrols_two_devices(aggregator: Aggregator) -> None:
    made = token(aggregator, uses=2)
    assert [enrol(aggregator, made["token"])[0] for _ in range(2)] == [201, 201]
    assert enrol(aggregator, made["token"]) == (401, "the enrolment token 'mine' is used up.")
    assert aggregator.admin("GET", "/v1/tokens").json()[0]["uses_left"] == 0


def test_token_without_a_count_enrols_many(aggregator: Aggregator) -> None:
    made = token(aggregator)
    assert {enrol(aggregator, made["token"])[0] for _ in range(5)} == {201}


def test_token_expires_at_its_time(aggregator: Aggregator) -> None:
    made = token(aggregator, expires_s=60)
    aggregator.clock.at += 59.9
    assert enrol(aggregator, made["token"])[0] == 201
    aggregator.clock.at += 0.1
    assert enrol(aggregator, made["token"]) == (401, "the enrolment token 'mine' has expired.")


def test_revoked_token_enrols_nobody(aggregator: Aggregator) -> None:
    made = token(aggregator)
    assert aggregator.admin("DELETE", f"/v1/tokens/{made['id']}").status_code == 204
    assert enrol(aggregator, made["token"]) == (401, "the enrolment token 'mine' was revoked.")
    missing = aggregator.admin("DELETE", "/v1/tokens/nosuch")
    assert (missing.status_code, missing.json()["detail"]) == (404, "there is no token nosuch.")


def test_unknown_token_enrols_nobody(aggregator: Aggregator) -> None:
    for given in (None, "", "wrong"):
        assert enrol(aggregator, given) == (401, "the enrolment token is not known here.")


def test_name_with_control_characters_is_refused(aggregator: Aggregator) -> None:
    made = token(aggregator)
    for name in ("a\0b", "a\x1b[2J", ""):
        answer = aggregator.client.post("/v1/devices", json={"name": name}, headers={"authorization": f"Bearer {made['token']}"})
        assert answer.status_code == 422
        assert answer.json()["detail"].startswith("body.name: String should")


def test_administration_needs_the_key(aggregator: Aggregator) -> None:
    sentence = "this needs the administrator's key: Authorization: Bearer KEY."
    closed = ("GET /v1/tokens", "POST /v1/tokens", "GET /v1/devices", "GET /v1/audit", "GET /v1/events", "GET /metrics")
    for method, target in (line.split() for line in closed):
        for header in ({}, {"authorization": "Bearer wrong"}, {"authorization": f"Basic {aggregator.context.secrets.admin}"}):
            answer = aggregator.client.request(method, target, headers=header, json={} if method == "POST" else None)
            assert (answer.status_code, answer.json()["detail"]) == (401, sentence), target


def test_token_and_keys_are_not_in_the_database(aggregator: Aggregator) -> None:
    made = token(aggregator)
    member = aggregator.member()
    member.send("GET", "/v1/runs")
    secrets = [made["token"], member.key.hex(), aggregator.context.secrets.admin, aggregator.context.secrets.device.hex(), aggregator.enrolment]

    def everything(connection: sa.Connection) -> str:
        return repr([connection.execute(sa.select(table)).all() for table in metadata.sorted_tables])

    held = aggregator.context.store.view(everything)
    assert "mine" in held
    assert [s for s in secrets if s in held or bytes(s, "ascii").hex() in held] == []


def test_secrets_are_made_once_and_readable_by_their_owner_only(tmp_path: Path) -> None:
    made = Secrets.at(tmp_path)
    assert Secrets.at(tmp_path) == made
    assert {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {"device.secret": 0o600, "admin.key": 0o600}
    assert made.admin != made.device.hex()


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660])
def test_secret_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    Secrets.at(tmp_path)
    path = tmp_path / "admin.key"
    os.chmod(path, mode)
    with pytest.raises(ResourceError) as refused:
        Secrets.at(tmp_path)
    assert str(refused.value) == f"{path} can be read by others; it must have mode 0600: chmod 600 {path}"


@pytest.mark.parametrize("content", ["", "abc\n", "z" * 64, "\xff" * 64])
def test_damaged_secret_is_refused(tmp_path: Path, content: str) -> None:
    Secrets.at(tmp_path)
    path = tmp_path / "device.secret"
    path.write_text(content)
    with pytest.raises(ResourceError) as refused:
        Secrets.at(tmp_path)
    assert str(refused.value) == f"{path} must hold 64 hex digits; put it back from a backup, or remove it for a new one."


def test_secrets_are_compared_in_constant_time() -> None:
    """No function that holds what a client gave beside what is right uses an operator on them."""
    for function in (auth.is_admin, auth.verified):
        compared = [node for node in ast.walk(ast.parse(inspect.getsource(function))) if isinstance(node, ast.Compare)]
        compared = [node for node in compared if not isinstance(node.ops[0], ast.Is | ast.IsNot)]
        names = {name.id for node in compared for name in ast.walk(node) if isinstance(name, ast.Name)}
        assert not names & {"token", "given", "expected", "known"}
        assert "hmac.compare_digest" in inspect.getsource(function)
