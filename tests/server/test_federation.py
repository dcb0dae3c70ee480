"""Rounds over HTTP: from enrolment to the last version."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

from fwdllama.federation.message import theta_digest

if TYPE_CHECKING:
    from .conftest import Aggregator

ROUND = {"probes": 40, "most": 80, "probes_per_task": 10}


def test_two_devices_take_a_run_to_its_end(aggregator: Aggregator) -> None:
    aggregator.create(rounds=6, train={"step": {"lr": 0.15, "final_lr": 1.0}}, round=ROUND, evaluation={"every": 2, "devices": 2})
    members = [aggregator.member("a"), aggregator.member("b")]
    for _ in range(60):
        given = [member.work("toy") for member in members]
        aggregator.clock.at += 1
        if all(g["wait"] and g["wait"]["finished"] for g in given):
            break
    run = aggregator.admin("GET", "/v1/runs/toy").json()
    assert (run["status"], run["version"]) == ("finished", 6)
    theta, entries = members[0].theta("toy")
    assert [len(e.seeds) for e in entries] == [40] * 6
    assert theta_digest(theta) == run["theta_digest"]
    versions = aggregator.admin("GET", "/v1/runs/toy/versions").json()
    held_out = [v["held_out_loss"] for v in versions if v["held_out_loss"] is not None]
    assert len(held_out) == 4
    assert held_out[-1] < 0.8 * held_out[0]
    best = aggregator.admin("GET", "/v1/runs/toy/versions/best").json()
    assert best["held_out_loss"] == min(held_out)


def test_the_adapter_of_a_version_is_the_replay_of_its_ledger(aggregator: Aggregator, tmp_path) -> None:
    from gguf_tools.adapter import read_adapter

    aggregator.create(rounds=2, round=ROUND)
    member = aggregator.member()
    for _ in range(20):
        member.work("toy")
    answer = aggregator.admin("GET", "/v1/runs/toy/versions/2/adapter.gguf")
    assert answer.headers["etag"] == f'"{hashlib.sha256(answer.content).hexdigest()}"'
    path = tmp_path / "adapter.gguf"
    path.write_bytes(answer.content)
    (_, b), = read_adapter(path).tensors.values()
    theta, _ = member.theta("toy")
    assert np.array_equal(b.ravel(), theta)


def test_a_roll_back_appends_an_entry_and_takes_later_versions_out_of_the_race(aggregator: Aggregator) -> None:
    aggregator.create(rounds=9, train={"step": {"lr": 0.15, "final_lr": 1.0}}, round=ROUND, evaluation={"every": 2, "devices": 1})
    member = aggregator.member()
    while aggregator.admin("GET", "/v1/runs/toy").json()["version"] < 6:
        member.work("toy")
    member.work("toy")
    before = aggregator.admin("GET", "/v1/runs/toy/versions").json()
    assert aggregator.admin("GET", "/v1/runs/toy/versions/best").json()["version"] == 6
    run = aggregator.admin("POST", "/v1/runs/toy/rollback", {"version": 3}).json()
    assert (run["version"], run["theta_digest"]) == (7, before[3]["theta_digest"])
    assert aggregator.admin("GET", "/v1/runs/toy/versions/best").json()["version"] == 2, "the best of those that are left"
    theta, entries = member.theta("toy")
    assert theta_digest(theta) == run["theta_digest"]
    assert entries[-1].restores == 3
    again = aggregator.admin("POST", "/v1/runs/toy/rollback", {"version": 7})
    assert (again.status_code, again.json()["detail"]) == (
        409,
        "version 7 is not earlier than version 7, at which run toy is; give one of 0 to 6.",
    )
    while aggregator.admin("GET", "/v1/runs/toy").json()["status"] == "open":
        member.work("toy")
        aggregator.clock.at += 1
    theta, entries = member.theta("toy")
    assert theta_digest(theta) == aggregator.admin("GET", "/v1/runs/toy").json()["theta_digest"]
    assert [entry.step for entry in entries] == list(range(9))


def test_a_device_cannot_make_its_score_weigh_more_by_claiming_examples(aggregator: Aggregator) -> None:
    aggregator.create(rounds=1, round=ROUND, evaluation={"every": 1, "devices": 3})
    members = [aggregator.member(name) for name in "abc"]
    for member, (loss, n) in zip(members, ((2.0, 8), (2.0, 8), (0.0, 1 << 24)), strict=True):
        task = member.check_in("toy")["task"]
        assert task["kind"] == "evaluate"
        result = {"kind": "evaluate", "theta_digest": task["theta_digest"], "loss": loss, "n_examples": n, "n_tokens": 1}
        assert member.deliver(task, result).status_code == 200
    (version,) = aggregator.admin("GET", "/v1/runs/toy/versions").json()
    assert version["held_out_loss"] == 2.0 * 16 / (16 + 32)
