"""What an operator sees from outside: metrics that agree with what was done, and a log without secrets."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
from fwdllama_server import journal
from prometheus_client.parser import text_string_to_metric_families

if TYPE_CHECKING:
    from .conftest import Aggregator

ROUND = {"probes": 8, "most": 8, "probes_per_task": 4}


def figures(aggregator: Aggregator) -> dict[tuple[str, ...], float]:
    text = aggregator.admin("GET", "/metrics").text
    return {(s.name, *s.labels.values()): s.value for family in text_string_to_metric_families(text) for s in family.samples}


def test_metrics_agree_with_what_was_done(aggregator: Aggregator) -> None:
    aggregator.create("toy", rounds=10, round=ROUND, evaluation={"every": 1000})
    aggregator.create("other")
    aggregator.admin("POST", "/v1/runs/other/pause")
    member, gone = aggregator.member(), aggregator.member("gone")
    for _ in range(4):  # version 0 is scored, a round of two tasks, and one task of the next
        member.work("toy")
    task = member.check_in("toy")["task"]
    member.deliver(task, {**member.result(task), "loss": -1.0})
    aggregator.admin("DELETE", f"/v1/devices/{gone.device}")
    found = figures(aggregator)
    assert found["fwdllama_runs", "open"] == found["fwdllama_runs", "paused"] == 1
    assert found["fwdllama_runs", "finished"] == 0
    assert found["fwdllama_run_version", "toy"] == 1
    assert found["fwdllama_run_probes_total", "toy"] == 8
    assert found["fwdllama_run_results_total", "toy"] == 4
    assert found["fwdllama_run_refused_results_total", "toy"] == 1
    assert (found["fwdllama_round_probes", "toy"], found["fwdllama_round_wanted_probes", "toy"]) == (4, 8)
    assert ("fwdllama_round_probes", "other") not in found
    assert [found["fwdllama_devices", state] for state in ("enrolled", "active", "revoked")] == [1, 1, 1]
    assert found["fwdllama_http_requests_total", "PUT", "/v1/tasks/{task}/result", "200"] == 4
    assert found["fwdllama_http_requests_total", "PUT", "/v1/tasks/{task}/result", "422"] == 1
    assert found["fwdllama_http_request_seconds_count", "/v1/tasks/{task}/result"] == 5
    assert aggregator.client.get("/no/such/place").status_code == 404
    assert figures(aggregator)["fwdllama_http_requests_total", "GET", "unmatched", "404"] == 1


def test_metrics_are_open_to_this_machine_only_unless_told(aggregator: Aggregator) -> None:
    from fwdllama_server.app import create_app
    from starlette.testclient import TestClient

    here = TestClient(create_app(aggregator.context), client=("127.0.0.1", 1))
    there = TestClient(create_app(aggregator.context), client=("192.0.2.1", 1))
    assert here.get("/metrics").status_code == 200
    assert there.get("/metrics").status_code == 401
    assert here.get("/metrics", headers={"x-forwarded-for": "192.0.2.1"}).status_code == 401
    aggregator.context.public_metrics = True
    assert there.get("/metrics").status_code == 200


@pytest.fixture(params=["text", "json"])
def log(request: pytest.FixtureRequest) -> Iterator[tuple[str, io.StringIO]]:
    """The log of a test, and the format it is in."""
    loggers = [logging.getLogger(name) for name in journal.LOGGERS]
    before = [(logger, logger.level, list(logger.handlers), logger.propagate) for logger in loggers]
    stream = io.StringIO()
    journal.set_up(request.param, stream)
    yield request.param, stream
    for logger, level, handlers, propagate in before:
        logger.setLevel(level)
        logger.handlers[:], logger.propagate = handlers, propagate


def test_log_of_a_whole_session_tells_everything_but_secrets(aggregator: Aggregator, log: tuple[str, io.StringIO]) -> None:
    format_, stream = log
    secrets: list[str] = [aggregator.context.secrets.admin, aggregator.context.secrets.device.hex(), "in-the-query"]
    aggregator.create(rounds=2, round=ROUND, evaluation={"every": 1000})
    member = aggregator.member("my phone")
    plain = member.send

    def send(method: str, target: str, body: Any = None, **changed: str) -> Any:
        answer = plain(method, target, body, **changed)
        secrets.append(answer.request.headers["x-fwdllama-signature"])
        return answer

    member.send = send  # type: ignore[method-assign]
    for _ in range(4):
        member.work("toy")
    task = member.check_in("toy")["task"]
    member.deliver(task, {**member.result(task), "loss": -1.0})
    member.send("GET", "/v1/runs?token=in-the-query")
    aggregator.client.get("/v1/tokens", headers={"authorization": "Bearer in-the-query"})
    secrets += [aggregator.enrolment, member.key.hex()]
    text = stream.getvalue()
    assert [secret for secret in secrets if secret in text] == []
    if format_ == "json":
        lines = [json.loads(line) for line in text.splitlines()]
        requests = [line for line in lines if line["event"] == "request"]
        delivered = next(line for line in requests if line["route"] == "/v1/tasks/{task}/result")
        assert (delivered["method"], delivered["status"], delivered["device"]) == ("PUT", 200, member.device)
        assert delivered["ms"] > 0
        closed = next(line for line in lines if line["event"] == "round-closed")
        assert (closed["run"], closed["round"], closed["n_probes"]) == ("toy", 0, 8)
        assert any(line["event"] == "result-refused" and line["device"] == member.device for line in lines)
        assert any(line.get("status") == 401 and "device" not in line for line in requests)
    else:
        assert ' INFO device-enrolled device=' in text
        assert 'name="my phone"' in text
        assert " INFO round-closed run=toy round=0 " in text


def test_line_of_the_log_stays_one_line_whatever_is_in_it(log: tuple[str, io.StringIO]) -> None:
    logging.getLogger("fwdllama.server").info("said", extra={"facts": {"name": "a\nb=c \x1b[2J", "none": None, "list": [1, 2]}})
    (line,) = log[1].getvalue().splitlines()
    assert "\x1b" not in line
