"""A request is its device's or it is refused: every part is signed, and none is accepted twice."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fwdllama.federation.signature import DEVICE, MAX_SKEW_S, NONCE, SIGNATURE, TIME, headers
from fwdllama.federation.toy import BASE

if TYPE_CHECKING:
    from .conftest import Aggregator, Member

WRONG = "the signature does not match the request and the device's key."
BODY = b'{"base": "%s"}' % BASE.encode()


def signed(member: Member, method: str = "POST", target: str = "/v1/runs/toy/checkin", body: bytes = BODY, **more: Any) -> dict[str, str]:
    member.nonce += 1
    at = more.get("at", member.clock())
    return {**headers(member.device, member.key, method, target, body, more.get("nonce", member.nonce), at), "content-type": "application/json"}


def sent(
    aggregator: Aggregator, header: dict[str, str], method: str = "POST", target: str = "/v1/runs/toy/checkin", body: bytes = BODY
) -> tuple[int, str]:
    answer = aggregator.client.request(method, target, content=body, headers=header)
    return answer.status_code, "" if answer.status_code < 400 else answer.json()["detail"]


def test_changed_part_of_a_request_breaks_its_signature(aggregator: Aggregator) -> None:
    aggregator.create()
    aggregator.create("other")
    member, rival = aggregator.member("a"), aggregator.member("b")
    good = signed(member)
    assert sent(aggregator, good, body=BODY.replace(b"}", b" }")) == (401, WRONG)
    assert sent(aggregator, good, target="/v1/runs/other/checkin") == (401, WRONG)
    assert sent(aggregator, good, target="/v1/runs/toy/checkin?x=1") == (401, WRONG)
    assert sent(aggregator, {**good, NONCE: str(member.nonce + 1)}) == (401, WRONG)
    assert sent(aggregator, {**good, TIME: f"{member.clock() + 1:.3f}"}) == (401, WRONG)
    assert sent(aggregator, {**good, DEVICE: rival.device}) == (401, WRONG)
    assert sent(aggregator, {**good, SIGNATURE: "0" * 64}) == (401, WRONG)
    for_ledger = signed(member, "GET", "/v1/runs/toy/ledger?from=0", b"")
    assert sent(aggregator, for_ledger, "GET", "/v1/runs/toy/ledger?from=0&x=", b"") == (401, WRONG)
    assert sent(aggregator, for_ledger, "GET", "/v1/runs/toy/ledger", b"") == (401, WRONG)
    for_runs = signed(member, "POST", "/v1/runs/toy", b"")
    assert sent(aggregator, for_runs, "GET", "/v1/runs/toy", b"") == (401, WRONG)
    assert sent(aggregator, good)[0] == 200  # as it was signed


def test_host_header_does_not_choose_the_path_that_was_signed(aggregator: Aggregator) -> None:
    aggregator.create()
    member = aggregator.member()
    innocent = signed(member, "GET", "/v1/runs/toy", b"")
    assert sent(aggregator, {**innocent, "host": "x/v1/runs/toy#"}, "GET", "/v1/runs", b"") == (401, WRONG)


def test_replayed_request_is_refused(aggregator: Aggregator) -> None:
    aggregator.create()
    member = aggregator.member()
    first = signed(member)
    second = signed(member)
    assert sent(aggregator, second)[0] == 200
    sentence = "the nonce {} was used before; it must grow with every request."
    assert sent(aggregator, second) == (401, sentence.format(2))
    assert sent(aggregator, first) == (401, sentence.format(1))


def test_refused_request_uses_no_nonce_up(aggregator: Aggregator) -> None:
    aggregator.create()
    member = aggregator.member()
    header = signed(member)
    assert sent(aggregator, {**header, SIGNATURE: "0" * 64})[0] == 401
    assert sent(aggregator, header)[0] == 200


def test_request_of_another_time_is_refused_with_the_right_time(aggregator: Aggregator) -> None:
    aggregator.create()
    member = aggregator.member()
    for off in (-MAX_SKEW_S - 1, MAX_SKEW_S + 1, float("nan"), float("inf")):
        answer = aggregator.client.post("/v1/runs/toy/checkin", content=BODY, headers=signed(member, at=member.clock() + off))
        assert answer.status_code == 401
        assert answer.json()["detail"] == f"the request's time differs by {off:.0f} s from the aggregator's; at most 300 are allowed."
        assert float(answer.headers["x-fwdllama-time"]) == member.clock()


def test_malformed_header_is_one_sentence(aggregator: Aggregator) -> None:
    aggregator.create()
    member = aggregator.member()
    for name, value, sentence in (
        (NONCE, "x", f"{NONCE} must be a whole number and {TIME} seconds since 1970."),
        (NONCE, "9" * 5000, f"{NONCE} must be a whole number and {TIME} seconds since 1970."),
        (NONCE, "0", f"{NONCE} is 0, but must be between 1 and 2**63 - 1."),
        (NONCE, str(1 << 63), f"{NONCE} is {1 << 63}, but must be between 1 and 2**63 - 1."),
        (TIME, "noon", f"{NONCE} must be a whole number and {TIME} seconds since 1970."),
    ):
        assert sent(aggregator, {**signed(member), name: value}) == (401, sentence)


def test_unsigned_request_is_refused(aggregator: Aggregator) -> None:
    aggregator.create()
    sentence = f"this needs a signed request (header {DEVICE} and three others) or an administrator's key."
    assert sent(aggregator, {"content-type": "application/json"}) == (401, sentence)


def test_revoked_device_is_refused_at_once(aggregator: Aggregator) -> None:
    aggregator.create()
    member = aggregator.member()
    task = member.check_in("toy")["task"]
    result = member.result(task)
    assert aggregator.admin("DELETE", f"/v1/devices/{member.device}").status_code == 204
    answer = member.deliver(task, result)
    assert (answer.status_code, answer.json()["detail"]) == (401, f"device {member.device} was revoked.")
    assert aggregator.admin("GET", "/v1/runs/toy/progress").json()["n_results"] == 0


def test_device_of_another_aggregator_is_not_enrolled_here(aggregator: Aggregator) -> None:
    from fwdllama.federation.signature import device_key

    aggregator.create()
    member = aggregator.member()
    member.device, member.key = "dother", device_key(aggregator.context.secrets.device, "dother")
    assert sent(aggregator, signed(member)) == (401, "device dother is not enrolled here.")
