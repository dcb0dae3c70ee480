"""What a hostile or broken device may send, and the sentence that each thing is refused with; nothing of it counts."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from .conftest import Aggregator, Member

ROUND = {"probes": 8, "most": 8, "probes_per_task": 4}
DIGEST = "0" * 64


@pytest.fixture
def member(aggregator: Aggregator) -> Member:
    aggregator.create(round=ROUND, evaluation={"every": 1000})
    found = aggregator.member()
    found.work("toy")  # version 0 is scored
    return found


def refused(aggregator: Aggregator, member: Member, **changed: Any) -> str:
    """The sentence that a result with changed fields is refused with (422), after finding that it did not count."""
    task = member.check_in("toy")["task"]
    before = aggregator.admin("GET", "/v1/runs/toy/progress").json()
    body = json.dumps({"result": {**member.result(task), **changed}})  # NaN and Infinity too, as Python writes them
    member.nonce += 1
    from fwdllama.federation.signature import headers

    target = f"/v1/tasks/{task['task']}/result"
    header = headers(member.device, member.key, "PUT", target, body.encode(), member.nonce, member.clock())
    answer = member.client.put(target, content=body, headers={**header, "content-type": "application/json"})
    assert answer.status_code == 422, answer.text
    after = aggregator.admin("GET", "/v1/runs/toy/progress").json()
    assert (after["probes"], after["n_results"]) == (before["probes"], before["n_results"])
    return answer.json()["detail"]


def test_loss_out_of_range_is_refused(aggregator: Aggregator, member: Member) -> None:
    for loss in (float("nan"), float("inf"), float("-inf"), -0.001, 50.001, 1e300):
        for place, changed in (("plus[1]", {"plus": [1.0, loss, 1.0, 1.0]}), ("minus[0]", {"minus": [loss]}), ("loss[0]", {"loss": loss})):
            assert refused(aggregator, member, **changed) == f"{place} is {loss!r}, but a loss must be between 0 and 50 nats."


def test_malformed_result_is_one_sentence(aggregator: Aggregator, member: Member) -> None:
    wrong: tuple[tuple[dict[str, Any], str], ...] = (
        ({"plus": [1.0] * 3}, "plus holds 3 losses, but the task has 4 seeds."),
        ({"plus": [1.0] * 5}, "plus holds 5 losses, but the task has 4 seeds."),
        ({"minus": [1.0, 1.0]}, "minus holds 2 losses, but must hold 1 (one-sided)."),
        ({"minus": []}, "minus holds 0 losses, but must hold 1 (one-sided)."),
        ({"examples": []}, "examples must count the examples of 1 to 4 groups, each at least 1; it holds 0 counts."),
        ({"examples": [1] * 5}, "examples must count the examples of 1 to 4 groups, each at least 1; it holds 5 counts."),
        ({"examples": [0]}, "examples must count the examples of 1 to 4 groups, each at least 1; it holds 1 counts."),
        ({"theta_digest": DIGEST}, "the result was computed at 000000000000, but version 0 is "),
        ({"n_tokens": -1}, "body.result.train.n_tokens: Input should be greater than or equal to 0 (got '-1')."),
        ({"more": 1}, "body.result.train.more: Extra inputs are not permitted (got '1')."),
        ({"plus": [1.0] * 4097}, "body.result.train.plus: Tuple should have at most 4096 items after validation, not 4097"),
    )
    for changed, sentence in wrong:
        assert refused(aggregator, member, **changed).startswith(sentence)


def test_evaluation_in_place_of_training_is_refused(aggregator: Aggregator, member: Member) -> None:
    task = member.check_in("toy")["task"]
    evaluation = {"kind": "evaluate", "theta_digest": task["theta_digest"], "loss": 0.0, "n_examples": 1, "n_tokens": 1}
    answer = member.deliver(task, evaluation)
    assert (answer.status_code, answer.json()["detail"]) == (422, f"task {task['task']} asks to train, but the result is of kind 'evaluate'.")


def test_task_of_another_device_is_unknown_to_this_one(aggregator: Aggregator, member: Member) -> None:
    rival = aggregator.member("rival")
    task = member.check_in("toy")["task"]
    answer = rival.deliver(task, member.result(task))
    assert (answer.status_code, answer.json()["detail"]) == (404, f"device {rival.device} has no task {task['task']}.")
    assert member.deliver(task).status_code == 200


def test_second_different_result_is_refused_and_the_same_again_is_not_counted(aggregator: Aggregator, member: Member) -> None:
    task = member.check_in("toy")["task"]
    result = member.result(task)
    assert member.deliver(task, result).json()["duplicate"] is False
    assert member.deliver(task, result).json()["duplicate"] is True
    answer = member.deliver(task, {**result, "loss": 1.0})
    assert (answer.status_code, answer.json()["detail"]) == (409, f"another result of task {task['task']} was accepted before.")
    assert aggregator.admin("GET", "/v1/runs/toy/progress").json()["probes"] == 4


def test_stale_result_of_a_wrong_version_is_refused_too(aggregator: Aggregator) -> None:
    aggregator.create(round={**ROUND, "staleness": 4}, evaluation={"every": 1000})
    slow, quick = aggregator.member("slow"), aggregator.member("quick")
    slow.work("toy")
    quick.work("toy")
    task = slow.check_in("toy")["task"]
    late = slow.result(task)
    for _ in range(2):
        quick.work("toy")
    assert aggregator.admin("GET", "/v1/runs/toy/progress").json()["version"] == 1
    wrong = slow.deliver(task, {**late, "theta_digest": DIGEST})
    assert wrong.status_code == 422
    assert wrong.json()["detail"].startswith("the result was computed at 000000000000, but version 0 is ")
    assert slow.deliver(task, late).status_code == 200


def test_refusals_are_counted_and_told(aggregator: Aggregator, member: Member) -> None:
    sentence = refused(aggregator, member, plus=[1.0])
    assert aggregator.admin("GET", "/v1/devices").json()[0]["n_refused"] == 1
    events = aggregator.admin("GET", "/v1/events?after=0&limit=100").text
    assert "event: result-refused" in events
    assert sentence in events


def test_device_that_asks_again_is_given_the_same_task_and_cannot_take_them_all(aggregator: Aggregator, member: Member) -> None:
    given = [member.check_in("toy")["task"] for _ in range(5)]
    assert len({(task["task"], tuple(task["seeds"])) for task in given}) == 1
    aggregator.clock.at += 30
    assert member.check_in("toy")["task"]["lease_s"] == 90.0
    rival = aggregator.member("rival")
    rival.work("toy")  # scores version 0 too
    assert rival.check_in("toy")["task"]["seeds"] != given[0]["seeds"]


def test_slot_of_a_refused_result_is_given_to_the_next_device(aggregator: Aggregator, member: Member) -> None:
    rival = aggregator.member("rival")
    rival.work("toy")
    task = member.check_in("toy")["task"]
    assert member.deliver(task, {**member.result(task), "loss": -1.0}).status_code == 422
    assert rival.check_in("toy")["task"]["seeds"] == task["seeds"]
