"""A device's way to its aggregator: signed requests over HTTP, retried only where that can help.

A connection that fails, an answer 429 or one of the server's own failures (5xx) is tried again, with growing pauses that differ from device
to device so that thousands do not come back in step; anything else that is refused would be refused again. Every attempt is signed
anew, because a nonce counts once, and every request may be sent twice: results are counted once, and a task that nobody answers expires.
"""

from __future__ import annotations

import email.utils
import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import httpx
from pydantic import TypeAdapter, ValidationError
from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_delay, wait_random_exponential

from fwdllama.errors import FederationError, Refused, Stopped, Unreachable, UsageError
from fwdllama.federation.connection import checked_url
from fwdllama.federation.identity import Identity
from fwdllama.federation.message import Assignment, CheckIn, Delivery, Enrolled, Enrolment, Receipt, Run
from fwdllama.federation.signature import TIME
from fwdllama.federation.spool import Pending
from fwdllama.federation.store import Store

PAUSE = wait_random_exponential(multiplier=0.5, max=30.0)  # seconds, uniform from 0 to 0.5, 1, 2, 4 ... 30
SKEW_WORTH_CORRECTING_S = 1.0
MAX_BLOB_BYTES = 4 << 30
PATIENCE_S = 30.0  # for which a request is tried again
T = TypeVar("T")


def slept(seconds: float) -> bool:
    """Sleep to the end."""
    time.sleep(seconds)
    return True


class Client:
    """The requests a device makes. `patience_s` is how long one is tried again; 0: never, as for simulated devices.

    `sleep(seconds)` returns False when the wait was cut short because the user wants to stop; then `Stopped` is raised.
    """

    def __init__(
        self,
        url: str,
        http: httpx.Client,
        identity: Identity | None = None,
        *,
        patience_s: float | None = None,  # None: PATIENCE_S
        sleep: Callable[[float], bool] = slept,
        now: Callable[[], float] = time.time,
    ) -> None:
        self.url, self.http, self.identity = checked_url(url), http, identity
        self.patience_s, self.sleep, self.now = PATIENCE_S if patience_s is None else patience_s, sleep, now
        self.offset_s = 0.0  # the aggregator's clock less ours
        self.contact_s: float | None = None  # when it last answered, by our clock
        self.n_sent_bytes = 0  # bodies
        self._clock_corrected = False  # by the last answer

    def enrol(self, name: str, token: str, store: Store) -> Identity:
        """Become a device. Not repeated once it may have arrived: a token may be good for one use only.

        Raises:
            Refused: the token is not accepted.
            Unreachable: no aggregator answers.
        """
        try:
            bearer = {"authorization": f"Bearer {token.strip()}".encode("ascii").decode()}
        except UnicodeEncodeError as error:
            raise UsageError("The enrolment token contains characters that no token has; copy it again.") from error
        body = _body(Enrolment(name=name))
        answer = self._retrying(lambda: self._send("POST", "/v1/devices", body, bearer, once=True))
        self.identity = Identity.enrolled(store, self.url, self._read(Enrolled, answer))
        return self.identity

    def runs(self) -> list[Run]:
        """All runs."""
        return self._read(list[Run], self._request("GET", "/v1/runs"))

    def run(self, run: str) -> Run:
        """One run, by id or name."""
        return self._read(Run, self._request("GET", f"/v1/runs/{run}"))

    def check_in(self, run: str, checkin: CheckIn) -> Assignment:
        """Say how the device is; the answer is a task, or when to come back."""
        return self._read(Assignment, self._request("POST", f"/v1/runs/{run}/checkin", _body(checkin)))

    def deliver(self, pending: Pending, checkin: CheckIn | None) -> Receipt:
        """Bring a result and, where the device goes on, check in at once."""
        body = _body(Delivery(result=pending.result, checkin=checkin))
        return self._read(Receipt, self._request("PUT", f"/v1/tasks/{pending.task}/result", body))

    def ledger_page(self, run: str, first: int) -> bytes:
        """Whole frames from entry `first` on, some or all of them; none where `first` is the next that will be written."""
        return self._request("GET", f"/v1/runs/{run}/ledger?from={first}").content

    def blob(self, sha256: str, store: Store) -> bytes:
        """The bytes with that digest. What was received before an interruption, of the network or of this process, is not sent again.

        Raises:
            FederationError: what arrived has another digest; nothing of it is kept.
        """
        part = f"{sha256}.part"
        for attempt in range(2):
            resumed = bool(store.read(part))
            self._retrying(lambda: self._receive(sha256, part, store))
            data = store.read(part) or b""
            store.remove(part)
            found = hashlib.sha256(data).hexdigest()
            if found == sha256:
                return data
            if not resumed or attempt:
                break
        raise FederationError(f"{self.url} sent {len(data)} bytes with SHA-256 {found}, but {sha256} was asked for; nothing of it was kept.")

    def _receive(self, sha256: str, part: str, store: Store) -> None:
        have = len(store.read(part) or b"")
        more = {"range": f"bytes={have}-"} if have else {}
        with self._answer("GET", f"/v1/blobs/sha256:{sha256}", b"", more, stream=True) as answer:
            if answer.status_code == 416:  # all of it is there already, or more than all; the digest tells
                return
            self._check(answer)
            if have and answer.status_code != 206:
                store.remove(part)
                have = 0
            for chunk in answer.iter_bytes():
                have += len(chunk)
                if have > MAX_BLOB_BYTES:
                    raise FederationError(f"{self.url} sends more than {MAX_BLOB_BYTES >> 30} GiB as blob {sha256}; none is so large.")
                store.append(part, chunk)

    def _request(self, method: str, target: str, body: bytes = b"") -> httpx.Response:
        """A signed request and its good answer, tried for `patience_s`; where the clocks differ, once more with the other's time."""

        def attempt() -> httpx.Response:
            try:
                return self._send(method, target, body)
            except Refused as error:
                if error.status != 401 or not self._clock_corrected:
                    raise
                return self._send(method, target, body)

        return self._retrying(attempt)

    def _retrying(self, attempt: Callable[[], T]) -> T:
        retrying = Retrying(
            retry=retry_if_exception_type(Unreachable), wait=_pause, stop=stop_after_delay(self.patience_s), sleep=self._sleep, reraise=True
        )
        return retrying(attempt)

    def _sleep(self, seconds: float) -> None:
        if not self.sleep(seconds):
            raise Stopped(f"Stopped while {self.url} was waited for.")

    def _send(self, method: str, target: str, body: bytes, more: dict[str, str] | None = None, *, once: bool = False) -> httpx.Response:
        with self._answer(method, target, body, more or {}, once=once) as answer:
            self._check(answer)
            return answer

    @contextmanager
    def _answer(
        self, method: str, target: str, body: bytes, more: dict[str, str], *, stream: bool = False, once: bool = False
    ) -> Iterator[httpx.Response]:
        """An answer, whatever its status; every failure of the network on the way becomes a sentence."""
        request = self.http.build_request(method, self.url + target, content=body or None, headers=more)
        if self.identity is not None and "authorization" not in request.headers:
            sent = request.url.raw_path.decode("ascii")
            request.headers.update(self.identity.signed(method, sent, body, self.now() + self.offset_s))
        if body:
            request.headers["content-type"] = "application/json"
        self.n_sent_bytes += len(body)
        try:
            answer = self.http.send(request, stream=stream)
            try:
                self.contact_s = self.now()
                yield answer
            finally:
                answer.close()
        except httpx.TransportError as error:
            raise self._unreached(error, once=once) from error

    def _unreached(self, error: httpx.TransportError, *, once: bool) -> FederationError:
        reason = " ".join(str(error).split()) or type(error).__name__
        if "CERTIFICATE" in reason or "SSL" in reason:
            return FederationError(f"{self.url} cannot be trusted ({reason}); check the address, or give its certificate with --ca-file.")
        arrived = not isinstance(error, httpx.ConnectError | httpx.ConnectTimeout)
        if once and arrived:
            sentence = f"{self.url} did not answer the enrolment ({reason}); it may have used up the token: try again, or ask for another."
            return FederationError(sentence)
        return Unreachable(f"{self.url} cannot be reached ({reason}); is the aggregator running, and the address right?")

    def _check(self, answer: httpx.Response) -> None:
        """Raise what an answer that is not good means."""
        self._clock_corrected = answer.status_code == 401 and self._correct_clock(answer)
        if answer.is_success:
            return
        detail = _detail(answer)
        if answer.status_code == 429 or answer.status_code >= 500:
            words = detail or "without a reason"
            raise Unreachable(f"{self.url} answered {answer.status_code}: {words}", _retry_after(answer.headers.get("retry-after"), self.now()))
        if detail is None:
            raise Refused(f"{self.url} answered {answer.status_code} as no aggregator does; check the address.", answer.status_code)
        raise Refused(detail, answer.status_code)

    def _correct_clock(self, answer: httpx.Response) -> bool:
        """Take the aggregator's time from a refusal; whether ours was so far off that it may have been the cause."""
        try:
            offset = float(answer.headers[TIME]) - self.now()
        except (KeyError, ValueError):
            return False
        wrong = abs(offset - self.offset_s) > SKEW_WORTH_CORRECTING_S
        self.offset_s = offset
        return wrong

    def _read(self, kind: type[T], answer: httpx.Response) -> T:
        try:
            return TypeAdapter(kind).validate_json(answer.content)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"]) or "its answer"
            raise FederationError(
                f"{self.url} answered {answer.request.url.path} with something else than expected ({place}: {first['msg']}). "
                "Is it an aggregator, and of this version of fwdllama?"
            ) from error


def _body(message: Any) -> bytes:
    """JSON without spaces and without what is None; losses that are no number travel as NaN, so that the aggregator may say which."""
    return json.dumps(message.model_dump(mode="python", exclude_none=True), separators=(",", ":")).encode()


def _pause(state: RetryCallState) -> float:
    """What the aggregator asked for and a little more, or a random pause that grows."""
    error = state.outcome.exception() if state.outcome else None
    asked = error.retry_after_s if isinstance(error, Unreachable) else None
    return float(PAUSE(state)) if asked is None else asked + 0.1 * float(PAUSE(state))


def _retry_after(value: str | None, now_s: float) -> float | None:
    """Seconds of a Retry-After header, a number or a date; None where there is none that can be read."""
    if value is None:
        return None
    try:
        return min(3600.0, max(0.0, float(value)))
    except ValueError:
        try:
            return min(3600.0, max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - now_s))
        except ValueError:
            return None


def _detail(answer: httpx.Response) -> str | None:
    """The sentence of a refusal; None where the answer is none of an aggregator's."""
    try:
        detail = json.loads(answer.read())["detail"]
    except (ValueError, KeyError, TypeError, httpx.TransportError):
        return None
    return detail if isinstance(detail, str) else None
