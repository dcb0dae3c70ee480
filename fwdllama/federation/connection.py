"""Where an aggregator is, the token that lets a device in, and what requests travel through."""

from __future__ import annotations

import ssl
from pathlib import Path

import httpx

from fwdllama import __version__
from fwdllama.errors import ResourceError, UsageError

TIMEOUT = httpx.Timeout(30.0, connect=10.0)


def checked_url(url: str) -> str:
    """The address of an aggregator without a trailing slash.

    Raises:
        UsageError: it is none.
    """
    try:
        parts = httpx.URL(url)
    except httpx.InvalidURL:
        parts = httpx.URL("")
    only = httpx.URL(scheme=parts.scheme, host=parts.host, port=parts.port)
    if parts.scheme not in ("http", "https") or not parts.host or str(parts).rstrip("/") != str(only).rstrip("/"):
        raise UsageError(f"{url!r} is not an aggregator's address; it looks like http://192.168.1.5:8080 or https://example.org.")
    return str(only).rstrip("/")


def unprotected(url: str) -> bool:
    """Whether requests travel in the clear beyond this machine."""
    parts = httpx.URL(url)
    return parts.scheme == "http" and parts.host not in ("localhost", "127.0.0.1", "::1")


def connection(ca_file: Path | None = None, *, n_connections: int = 2) -> httpx.Client:
    """What requests travel through; simulated devices share one.

    Raises:
        UsageError: `ca_file` holds no certificates.
    """
    try:
        verify: ssl.SSLContext | bool = ssl.create_default_context(cafile=str(ca_file)) if ca_file else True
    except (OSError, ssl.SSLError) as error:
        raise UsageError(f"{ca_file}: no certificates can be read from it ({error}); --ca-file takes a PEM file.") from error
    limits = httpx.Limits(max_connections=n_connections, max_keepalive_connections=n_connections)
    headers = {"user-agent": f"fwdllama/{__version__}", "accept-encoding": "identity"}
    return httpx.Client(timeout=TIMEOUT, verify=verify, limits=limits, headers=headers)


def read_token(path: Path) -> str:
    """The enrolment token in a file.

    Raises:
        ResourceError: it cannot be read.
        UsageError: it is empty.
    """
    try:
        token = path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ResourceError(f"{path}: the enrolment token cannot be read ({error}).") from error
    if not token:
        raise UsageError(f"{path} is empty, but should hold an enrolment token.")
    return token
