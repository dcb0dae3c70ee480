"""Signed requests: HMAC-SHA256 over method, path with query, body hash, nonce and time, with the device's own key.

A nonce is a number that only ever grows for a device, so that remembering the last one refuses every replay. The time must agree
with the aggregator's within `MAX_SKEW_S`; a refusal tells the aggregator's time, so that a phone with a wrong clock can correct itself.
"""

from __future__ import annotations

import hashlib
import hmac

MAX_SKEW_S = 300.0
DEVICE, NONCE, TIME, SIGNATURE = "x-fwdllama-device", "x-fwdllama-nonce", "x-fwdllama-time", "x-fwdllama-signature"


def device_key(secret: bytes, device: str) -> bytes:
    """The key of a device, derived from the aggregator's secret, so that no device's key is stored anywhere but on the device."""
    return hmac.digest(secret, b"device\n" + device.encode(), "sha256")


def signature(key: bytes, method: str, target: str, body: bytes, nonce: int, time_s: float) -> str:
    """Hex signature of a request; target is path and query as sent, time_s seconds since 1970 (compared to the millisecond).

    >>> signature(bytes(32), "GET", "/v1/runs", b"", 7, 1.5)[:16]
    '889f9f3a6a7a1e1f'
    """
    text = "\n".join((method.upper(), target, hashlib.sha256(body).hexdigest(), str(nonce), f"{time_s:.3f}"))
    return hmac.new(key, text.encode(), "sha256").hexdigest()


def headers(device: str, key: bytes, method: str, target: str, body: bytes, nonce: int, time_s: float) -> dict[str, str]:
    """The four headers of a signed request."""
    return {
        DEVICE: device,
        NONCE: str(nonce),
        TIME: f"{time_s:.3f}",
        SIGNATURE: signature(key, method, target, body, nonce, time_s),
    }
