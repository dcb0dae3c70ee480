"""Requests are signed and retried where that can help, and every failure is one sentence."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from fwdllama.errors import FederationError, Refused, Stopped, Unreachable, UsageError
from fwdllama.federation.client import Client
from fwdllama.federation.connection import checked_url, connection, unprotected
from fwdllama.federation.message import CheckIn, EvaluateResult, TrainResult, Wait
from fwdllama.federation.signature import DEVICE, NONCE, SIGNATURE, TIME, signature
from fwdllama.federation.spool import Pending
from fwdllama.federation.store import FolderStore, MemoryStore
from fwdllama.federation.toy import BASE
from tests.federation.made import URL, Archive, client, refusal

WAIT = b'{"wait":{"least_s":1,"most_s":2,"reason":"nothing to do"}}'
CHECKIN = CheckIn(base=BASE, examples=3)


class Script:
    """Answers one after the other, the last for ever; keeps what was asked."""

    def __init__(self, *answers: httpx.Response | Exception) -> None:
        self.answers, self.requests = list(answers), list[httpx.Request]()

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer


class Pauses:
    """Sleeps that take no time, remembered."""

    def __init__(self) -> None:
        self.taken: list[float] = []

    def __call__(self, seconds: float) -> bool:
        self.taken.append(seconds)
        return True


def test_requests_are_signed_over_method_target_body_nonce_and_time() -> None:
    script = Script(httpx.Response(200, content=WAIT))
    assert client(script).check_in("r1", CHECKIN).wait == Wait(least_s=1, most_s=2, reason="nothing to do")
    (request,) = script.requests
    held = request.headers
    expected = signature(bytes.fromhex("11" * 32), "POST", "/v1/runs/r1/checkin", request.content, int(held[NONCE]), float(held[TIME]))
    assert (held[DEVICE], held[SIGNATURE]) == ("d1", expected)
    assert request.content == b'{"base":"' + BASE.encode() + b'","examples":3}'


@pytest.mark.parametrize("failure", [refusal(503), refusal(500), refusal(429), httpx.ConnectError("refused"), httpx.ReadTimeout("slow")])
def test_what_may_pass_is_tried_again_signed_anew(failure: Any) -> None:
    script, pauses = Script(failure, failure, httpx.Response(200, content=WAIT)), Pauses()
    client(script, sleep=pauses).check_in("r1", CHECKIN)
    nonces = [int(request.headers[NONCE]) for request in script.requests]
    assert len(nonces) == 3
    assert nonces == sorted(set(nonces))
    assert len(pauses.taken) == 2


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 410, 413, 422])
def test_what_was_refused_is_not_tried_again(status: int) -> None:
    script = Script(refusal(status, "because."))
    with pytest.raises(Refused, match=r"^because\.$") as caught:
        client(script).check_in("r1", CHECKIN)
    assert caught.value.status == status
    assert len(script.requests) == 1


def test_a_retry_after_is_waited_for() -> None:
    script, pauses = Script(refusal(429, "slower.", retry_after="7"), httpx.Response(200, content=WAIT)), Pauses()
    client(script, sleep=pauses).check_in("r1", CHECKIN)
    assert 7 <= pauses.taken[0] < 11


def test_pauses_differ_and_grow() -> None:
    pauses = Pauses()
    moment = iter(range(1000))
    script = Script(*[httpx.ConnectError("no")] * 11, httpx.Response(200, content=WAIT))
    client(script, sleep=pauses, now=lambda: next(moment)).check_in("r1", CHECKIN)
    assert len(set(pauses.taken)) == 11
    assert max(pauses.taken[:2]) <= 1.0
    assert max(pauses.taken) <= 30.0


def test_without_patience_one_attempt_is_made() -> None:
    script = Script(httpx.ConnectError("[Errno 111] Connection refused"))
    with pytest.raises(Unreachable) as caught:
        client(script, patience_s=0).runs()
    assert str(caught.value) == f"{URL} cannot be reached ([Errno 111] Connection refused); is the aggregator running, and the address right?"
    assert len(script.requests) == 1


def test_waiting_ends_when_the_user_wants_to_stop() -> None:
    with pytest.raises(Stopped):
        client(Script(refusal(503)), sleep=lambda seconds: False).runs()


def test_a_wrong_clock_is_corrected_from_the_refusal() -> None:
    ours = time.time() - 86_400
    script = Script(refusal(401, "your clock is wrong.", x_fwdllama_time=f"{time.time():.3f}"), httpx.Response(200, content=b"[]"))
    asking = client(script, now=lambda: ours)
    assert asking.runs() == []
    assert abs(float(script.requests[1].headers[TIME]) - time.time()) < 5
    asking.runs()
    assert len(script.requests) == 3  # corrected once and for all


def test_a_device_that_is_refused_with_the_right_time_asks_once() -> None:
    script = Script(refusal(401, "this device was revoked.", x_fwdllama_time=f"{time.time():.3f}"))
    with pytest.raises(Refused, match="revoked"):
        client(script).runs()
    assert len(script.requests) == 1


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (httpx.Response(404, text="<h1>Not found</h1>"), f"{URL} answered 404 as no aggregator does; check the address."),
        (httpx.Response(302, headers={"location": "/login"}), f"{URL} answered 302 as no aggregator does; check the address."),
        (
            httpx.Response(200, text="<h1>Welcome</h1>"),
            f"{URL} answered /v1/runs with something else than expected (its answer: Invalid JSON: expected value at line 1 column 1). "
            "Is it an aggregator, and of this version of fwdllama?",
        ),
    ],
)
def test_another_kind_of_server_is_told(answer: httpx.Response, sentence: str) -> None:
    with pytest.raises(FederationError) as caught:
        client(Script(answer)).runs()
    assert str(caught.value) == sentence


@pytest.mark.parametrize("url", ["example.org", "ftp://example.org", "http://", "http://host/path", "http://u:p@host", "http://host:port", "http://h?q"])
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(UsageError, match="is not an aggregator's address"):
        checked_url(url)


def test_addresses_lose_what_means_nothing() -> None:
    assert checked_url("http://Host:8080/") == "http://host:8080"
    assert checked_url("https://[::1]:1") == "https://[::1]:1"


def test_requests_in_the_clear_beyond_this_machine_are_known() -> None:
    assert [url for url in ("http://h", "https://h", "http://127.0.0.1:1", "http://localhost", "http://[::1]:1") if unprotected(url)] == ["http://h"]


def test_a_file_without_certificates_is_refused(tmp_path: Any) -> None:
    (tmp_path / "ca.pem").write_text("no certificate")
    with pytest.raises(UsageError, match=r"ca\.pem: no certificates can be read from it"):
        connection(tmp_path / "ca.pem")


def test_enrolment_sends_the_token_and_keeps_the_key() -> None:
    script, store = Script(httpx.Response(201, json={"device": "d7", "key": "22" * 32})), MemoryStore()
    asking = Client(URL, httpx.Client(transport=httpx.MockTransport(script)))
    identity = asking.enrol("phone", " secret-token\n", store)
    assert script.requests[0].headers["authorization"] == "Bearer secret-token"
    assert (identity.device, identity.key) == ("d7", bytes.fromhex("22" * 32))
    assert DEVICE not in script.requests[0].headers


def test_an_enrolment_that_may_have_arrived_is_not_repeated() -> None:
    script = Script(httpx.ReadTimeout("timed out"))
    asking = Client(URL, httpx.Client(transport=httpx.MockTransport(script)), sleep=lambda seconds: True)
    with pytest.raises(FederationError) as caught:
        asking.enrol("phone", "secret-token", MemoryStore())
    assert str(caught.value) == (
        f"{URL} did not answer the enrolment (timed out); it may have used up the token: try again, or ask for another."
    )
    assert len(script.requests) == 1


DATA = bytes(range(256)) * 4096
SHA256 = hashlib.sha256(DATA).hexdigest()


class Cut(httpx.SyncByteStream):
    """Some bytes, and then the connection is lost."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def __iter__(self) -> Any:
        yield self.data
        raise httpx.ReadError("connection lost")


def served(cuts: list[int], data: bytes = DATA, *, ranges: bool = True) -> tuple[Callable[[httpx.Request], httpx.Response], list[str | None]]:
    """A blob whose first transfers end after `cuts` bytes each, and the ranges that were asked for."""
    asked: list[str | None] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request.headers.get("range"))
        start = int((asked[-1] or "bytes=0-").removeprefix("bytes=").rstrip("-")) if ranges else 0
        if start >= len(data):
            return refusal(416)
        status = 206 if start else 200
        if len(asked) <= len(cuts):
            return httpx.Response(status, stream=Cut(data[start : start + cuts[len(asked) - 1]]))
        return httpx.Response(status, content=data[start:])

    return answer, asked


def test_a_download_goes_on_where_the_network_broke_off(tmp_path: Any) -> None:
    answer, asked = served([300_000, 100_000])
    with FolderStore(tmp_path) as store:
        assert client(answer).blob(SHA256, store) == DATA
        assert asked == [None, "bytes=300000-", "bytes=400000-"]
        assert not list(tmp_path.glob("*.part"))


def test_a_download_goes_on_after_a_restart_and_when_nothing_is_missing() -> None:
    for have in (1, len(DATA)):
        answer, asked = served([])
        store = MemoryStore()
        store.write(f"{SHA256}.part", DATA[:have])
        assert client(answer).blob(SHA256, store) == DATA
        assert asked == [f"bytes={have}-"]


def test_a_server_without_ranges_sends_all_again() -> None:
    answer, asked = served([300_000], ranges=False)
    assert client(answer).blob(SHA256, MemoryStore()) == DATA
    assert asked == [None, "bytes=300000-"]


def test_a_resumed_download_that_does_not_fit_together_begins_anew_once() -> None:
    answer, asked = served([])
    store = MemoryStore()
    store.write(f"{SHA256}.part", b"something else")
    assert client(answer).blob(SHA256, store) == DATA
    assert asked == ["bytes=14-", None]


def test_bytes_with_another_digest_are_not_kept() -> None:
    answer, _ = served([], b"something else")
    store = MemoryStore()
    with pytest.raises(FederationError) as caught:
        client(answer).blob(SHA256, store)
    found = hashlib.sha256(b"something else").hexdigest()
    assert str(caught.value) == f"{URL} sent 14 bytes with SHA-256 {found}, but {SHA256} was asked for; nothing of it was kept."
    assert list(store.values) == ["device.json", "nonce"] or not store.values


def test_an_upload_costs_at_most_32_bytes_a_probe_and_1_kb_with_headers() -> None:
    losses = tuple(2.3456789 + i / 7 for i in range(20))
    short = tuple(float(f"{loss:.7g}") for loss in losses)
    result = TrainResult(theta_digest="ab" * 32, plus=short, minus=short[:2], examples=(4, 4), loss=short[0], n_tokens=123_456)
    script = Script(httpx.Response(200, json={}))
    checkin = CheckIn(base=BASE, examples=4000, memory_bytes=3_456_789_012, battery=0.87, charging=False)
    http = connection()
    http.close()
    asking = client(script)
    asking.http.headers = http.headers
    asking.deliver(Pending("r1", "t" * 22, result), checkin)
    (request,) = script.requests
    head = len(f"PUT {request.url.raw_path.decode()} HTTP/1.1\r\n") + sum(len(k) + len(v) + 4 for k, v in request.headers.raw) + 2
    assert len(request.content) / 20 <= 32
    assert head + len(request.content) <= 1024


def test_losses_that_are_no_number_travel_as_what_they_are() -> None:
    script = Script(httpx.Response(200, json={}))
    client(script).deliver(Pending("r1", "t1", EvaluateResult(theta_digest="ab" * 32, loss=float("nan"), n_examples=1, n_tokens=1)), None)
    assert b'"loss":NaN' in script.requests[0].content


def test_the_archive_of_these_tests_speaks_the_protocol() -> None:
    archive = Archive([])
    assert client(archive.answer).run("r1").spec == archive.spec
