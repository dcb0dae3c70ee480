"""Who a device is: the name and key it was given when it enrolled, and a nonce that only grows, also across crashes and wrong clocks.

Nonces are microseconds of the device's clock, or one more than the last. Writing every one of them to disk would cost a sync a request;
instead a ceiling is written that is ahead of them by a minute, and after a restart nonces begin above it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from pydantic import ValidationError

from fwdllama.errors import RunError
from fwdllama.federation.message import Enrolled
from fwdllama.federation.signature import headers
from fwdllama.federation.store import Store

AHEAD = 60_000_000  # nonces, a minute of them at most, between two writes
_WHO, _NONCE = "device.json", "nonce"


@dataclass
class Identity:
    """A device's credentials in its store. `load` or `enrolled` make one."""

    store: Store
    url: str
    device: str
    key: bytes
    last: int = 0  # nonce
    _ceiling: int = 0

    @classmethod
    def load(cls, store: Store, url: str) -> Identity | None:
        """The identity that the store holds; None where the device has not enrolled.

        Raises:
            RunError: it is damaged, or of another aggregator.
        """
        data = store.read(_WHO)
        if data is None:
            return None
        try:
            held = json.loads(data)
            known = Enrolled(device=held["device"], key=held["key"])
            was = str(held["url"])
            ceiling = int(store.read(_NONCE) or b"0")
        except (ValueError, KeyError, TypeError, ValidationError) as error:
            raise RunError(f"The device's {_WHO} or {_NONCE} is damaged. Remove the device's folder and enrol again with a token.") from error
        if was != url:
            raise RunError(f"This folder belongs to a device of {was}, not of {url}. Give the device of each aggregator its own --folder.")
        return cls(store, url, known.device, bytes.fromhex(known.key), last=ceiling, _ceiling=ceiling)

    @classmethod
    def enrolled(cls, store: Store, url: str, answer: Enrolled) -> Identity:
        """Keep what an aggregator answered."""
        store.remove(_NONCE)
        store.write(_WHO, json.dumps({"url": url, "device": answer.device, "key": answer.key}).encode())
        return cls(store, url, answer.device, bytes.fromhex(answer.key))

    def nonce(self, time_s: float) -> int:
        """A number above all that this device ever used."""
        self.last = max(self.last + 1, int(time_s * 1e6))
        if self.last > self._ceiling:
            self._ceiling = self.last + AHEAD
            self.store.write(_NONCE, str(self._ceiling).encode())
        return self.last

    def signed(self, method: str, target: str, body: bytes, time_s: float) -> dict[str, str]:
        """The headers that sign a request; `time_s` is the aggregator's time as far as it is known."""
        return headers(self.device, self.key, method, target, body, self.nonce(time_s), time_s)
