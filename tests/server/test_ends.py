"""How runs end, and what may arrive while and after they do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from fwdllama_server.registry import Registry
from fwdllama_server.state import run_named, slot_seeds

if TYPE_CHECKING:
    from .conftest import Aggregator, Member

ROUND = {"probes": 8, "most": 8, "probes_per_task": 4}
NEVER = {"every": 1000}


def progress(aggregator: Aggregator) -> dict[str, Any]:
    return aggregator.admin("GET", "/v1/runs/toy/progress").json()


def scored(aggregator: Aggregator, *names: str) -> list[Member]:
    """Devices, of which version 0 was scored."""
    members = [aggregator.member(name) for name in names]
    for member in members:
        member.work("toy")
    return members


def test_stale_result_does_not_take_a_step_beyond_the_budget(aggregator: Aggregator) -> None:
    aggregator.create(rounds=1, round={**ROUND, "staleness": 3}, evaluation=NEVER)
    slow, quick = scored(aggregator, "slow", "quick")
    task = slow.check_in("toy")["task"]
    late = slow.result(task)
    for _ in range(2):
        quick.work("toy")
    assert progress(aggregator)["version"] == 1
    answer = slow.deliver(task, late)
    assert (answer.status_code, answer.json()["detail"]) == (410, "late: the budget of run toy is used up.")
    after = progress(aggregator)
    assert (after["version"], after["n_wasted"]) == (1, 4)


def test_roll_back_of_a_used_up_budget_takes_no_further_step(aggregator: Aggregator) -> None:
    aggregator.create(rounds=2, round=ROUND, evaluation={"every": 1000, "devices": 2})
    (member,) = scored(aggregator, "a")
    for _ in range(4):
        member.work("toy")
    assert progress(aggregator)["version"] == 2
    assert aggregator.admin("POST", "/v1/runs/toy/rollback", {"version": 1}).status_code == 200
    assert member.check_in("toy")["task"]["kind"] == "evaluate"
    assert (progress(aggregator)["version"], progress(aggregator)["wanted"]) == (3, 0)


@pytest.mark.parametrize("how", ["finish", "rollback"])
def test_what_an_administrator_cuts_off_is_waste(aggregator: Aggregator, how: str) -> None:
    aggregator.create(rounds=9, round={"probes": 12, "most": 12, "probes_per_task": 4}, evaluation=NEVER)
    first, second = scored(aggregator, "a", "b")
    for _ in range(3):
        first.work("toy")
    first.work("toy")
    task = second.check_in("toy")["task"]
    assert aggregator.admin("POST", f"/v1/runs/toy/{how}", {"version": 0} if how == "rollback" else None).status_code == 200
    assert progress(aggregator)["n_wasted"] == 8
    assert second.deliver(task).status_code == (409 if how == "rollback" else 410)
    assert progress(aggregator)["n_wasted"] == 8


def test_seeds_behind_a_step_and_behind_a_roll_back_are_the_same_for_every_worker(aggregator: Aggregator) -> None:
    aggregator.create(rounds=9, train={"step": {"candidates": 3}}, round=ROUND, evaluation=NEVER)
    (member,) = scored(aggregator, "a")
    store, known = aggregator.context.store, aggregator.context.registry

    def seeds(registry: Registry) -> list[int]:
        return store.view(lambda c: slot_seeds(registry, c, run := run_named(c, registry, "toy"), run.row.version, 0))

    found = []
    for _ in range(2):
        member.work("toy")
        member.work("toy")
        found.append(seeds(known))
        assert seeds(Registry()) == found[-1]
    aggregator.admin("POST", "/v1/runs/toy/rollback", {"version": 1})
    found.append(seeds(known))
    assert seeds(Registry()) == found[-1] == member.check_in("toy")["task"]["seeds"]
    assert len({tuple(x) for x in found}) == 3


def test_worker_that_starts_behind_a_snapshot_does_not_replay_the_whole_ledger(aggregator: Aggregator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fwdllama_server.state.SNAPSHOT_EVERY", 3)
    aggregator.create(rounds=9, round=ROUND, evaluation=NEVER)
    (member,) = scored(aggregator, "a")
    for _ in range(6):
        member.work("toy")
    read: list[tuple[int, int]] = []
    from fwdllama_server import registry

    before = registry.ledger_entries
    monkeypatch.setattr(registry, "ledger_entries", lambda c, run, first, stop: read.append((first, stop)) or before(c, run, first, stop))
    held = aggregator.context.store.view(lambda c: (fresh := Registry()).held(c, run_named(c, fresh, "toy").id, 3))
    assert np.array_equal(held.theta, member.theta("toy")[0])
    assert read == [(3, 3)]


def test_device_without_held_out_examples_says_so_once_and_another_scores(aggregator: Aggregator) -> None:
    aggregator.create(rounds=9, round=ROUND, evaluation={"every": 1, "devices": 1})
    bare, full = aggregator.member("bare"), aggregator.member("full")
    task = bare.check_in("toy")["task"]
    assert task["kind"] == "evaluate"
    none = {"kind": "evaluate", "theta_digest": task["theta_digest"], "loss": 0.0, "n_examples": 0, "n_tokens": 0}
    assert bare.deliver(task, none).status_code == 200
    assert bare.work("toy")["task"]["kind"] == "train", "it is not asked again"
    assert full.work("toy")["task"]["kind"] == "evaluate", "it took nobody's place"
    while progress(aggregator)["version"] == 0:
        full.work("toy")
    assert bare.check_in("toy")["task"]["kind"] == "train", "it is of no panel"
    assert full.work("toy")["task"]["kind"] == "evaluate"
    scores = [v["held_out_loss"] for v in aggregator.admin("GET", "/v1/runs/toy/versions").json()]
    assert len(scores) == 2
    assert min(scores) > 0.0


def test_a_copy_goes_to_a_device_again_whose_lease_passed_and_counts_once(aggregator: Aggregator) -> None:
    shape = {"probes": 4, "most": 4, "probes_per_task": 4, "copies": 3, "lease_s": 10.0}
    aggregator.create(rounds=2, round=shape, aggregation={"rule": "median"}, evaluation={"every": 1000, "devices": 3})
    lost, second, third = scored(aggregator, "a", "b", "c")
    first = lost.check_in("toy")["task"]
    second.work("toy")
    third.work("toy")
    aggregator.clock.at += 11
    again = lost.check_in("toy")["task"]
    assert (again["seeds"], again["task"] == first["task"]) == (first["seeds"], False)
    assert lost.deliver(again).status_code == 200
    assert progress(aggregator)["version"] == 1


def test_a_device_cannot_be_two_of_the_copies(aggregator: Aggregator) -> None:
    shape = {"probes": 4, "most": 4, "probes_per_task": 4, "copies": 3, "lease_s": 10.0}
    aggregator.create(rounds=2, round=shape, aggregation={"rule": "median"}, evaluation=NEVER)
    (member,) = scored(aggregator, "a")
    first = member.check_in("toy")["task"]
    aggregator.clock.at += 11
    again = member.check_in("toy")["task"]
    assert member.deliver(first).status_code == 200
    answer = member.deliver(again)
    assert (answer.status_code, answer.json()["detail"]) == (
        410,
        "late: the lease ended and this device has delivered slot 0 of round 0 already.",
    )


def test_what_is_due_of_one_run_is_done_though_that_of_another_fails(aggregator: Aggregator) -> None:
    from fwdllama_server.delivery import tick
    from fwdllama_server.schema import runs

    aggregator.create("broken", round=ROUND)
    aggregator.create("toy", round={**ROUND, "deadline_s": 5.0})
    context = aggregator.context
    context.store.submit(lambda c: c.execute(runs.update().where(runs.c.name == "broken").values(spec="{}")).rowcount).result()
    context.registry = Registry()
    aggregator.clock.at += 6
    context.store.submit(lambda c: tick(c, context.registry, context.now())).result()
    assert progress(aggregator)["deadline"] == aggregator.clock.at + 5.0
