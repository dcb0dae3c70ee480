"""Watching for a new adapter: an aggregator's versions, or a local file.

A thread asks again and again, checks what is new, and offers it to the engine. Nothing that goes wrong here stops the server: an aggregator
that is away, a key that it refuses or an adapter that does not fit is said once, and what is on stays on.
"""

from __future__ import annotations

import hashlib
import logging
import os
import random
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import httpx

from fwdllama.errors import AdapterError, DataError, FwdllamaError, UsageError
from gguf_tools.errors import FileError
from gguf_tools.header import ADAPTER_LIMITS
from gguf_tools.model import ModelInfo

from .edition import Edition, make_edition

log = logging.getLogger("fwdllama.inference")

LONGEST_WAIT_S = 60.0  # between attempts to reach an aggregator that is away
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


class Away(Exception):
    """There is no adapter to be had at the moment; the message is one sentence without its full stop."""


class Source(Protocol):
    """Where adapters come from."""

    name: str

    def poll(self) -> Edition | None:
        """The newest one where it is another than at the last call, else None.

        Raises:
            Away: it cannot be asked.
            FileError, AdapterError: what it has cannot be used; not said again before it has something else.
        """

    def close(self) -> None:
        """Let go of what it holds."""


class FileSource:
    """A local file, read again when it changes."""

    def __init__(self, path: Path, base: ModelInfo) -> None:
        self.name = str(path)
        self._path, self._base = path, base
        self._stamp: tuple[int, int, int] | None = None

    def poll(self) -> Edition | None:
        """See `Source`."""
        try:
            found = os.stat(self._path)
            stamp = (found.st_ino, found.st_mtime_ns, found.st_size)
            if stamp == self._stamp:
                return None
            if found.st_size > ADAPTER_LIMITS.file_bytes:
                raise FileError(f"{self._path}: has {found.st_size} bytes, which no adapter has.")
            data = self._path.read_bytes()
        except OSError as error:
            raise Away(f"{self._path}: cannot be read: {error.strerror or error}") from error
        self._stamp = stamp
        return make_edition(data, str(self._path), self._base)

    def close(self) -> None:
        """See `Source`."""


class AggregatorSource:
    """The versions of a run: `latest`, `best`, or one by its number."""

    def __init__(
        self,
        url: str,
        run: str,
        which: str,
        base: ModelInfo,
        *,
        key: str | None = None,
        max_bytes: int = ADAPTER_LIMITS.file_bytes,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        """Prepare to ask; nothing is sent yet.

        Raises:
            UsageError: the URL, the run's name or the version is none.
        """
        if not re.fullmatch(r"https?://[^/\s?#@]+(/[^\s?#]*)?", url):
            raise UsageError(f"{url!r} is not the URL of an aggregator, such as http://127.0.0.1:8080.")
        if not _NAME.fullmatch(run):
            raise UsageError(f"--run {run!r} is not the name of a run: letters, digits, '.', '_' and '-'.")
        if which not in ("latest", "best") and not which.isdecimal():
            raise UsageError(f"--follow {which!r} must be latest, best or the number of a version.")
        self.name = f"{url.rstrip('/')} ({run}, {which if not which.isdecimal() else f'version {which}'})"
        self._which, self._base, self._max_bytes = which, base, max_bytes
        self._etag: str | None = None
        self._client = httpx.Client(
            base_url=f"{url.rstrip('/')}/v1/runs/{run}/versions/",
            headers={"Accept-Encoding": "identity", **({"Authorization": f"Bearer {key}"} if key else {})},
            timeout=httpx.Timeout(30.0, connect=10.0),
            transport=transport,
        )

    def poll(self) -> Edition | None:
        """See `Source`."""
        try:
            fetched = self._fetch()
            if fetched is None:
                return None
            data, etag, number = fetched
            described = self._described(number)
        except httpx.HTTPError as error:
            raise Away(f"{self.name}: cannot be reached: {str(error) or type(error).__name__}".rstrip(".")) from error
        if described.get("adapter_sha256") not in (None, hashlib.sha256(data).hexdigest()):
            raise Away(f"{self.name}: the file and the description of version {number} do not agree")
        self._etag = etag
        digest = described.get("theta_digest")
        if not isinstance(digest, str):
            raise AdapterError(f"{self.name}: describes version {number} without its theta_digest.")
        return make_edition(data, f"version {number} of {self.name}", self._base, version=number, digest=digest)

    def _fetch(self) -> tuple[bytes, str | None, int] | None:
        """The adapter's file, its ETag and its version; None where it is still the last one."""
        headers = {"If-None-Match": self._etag} if self._etag else {}
        with self._client.stream("GET", f"{self._which}/adapter.gguf", headers=headers) as response:
            if response.status_code == 304:
                return None
            self._check(response)
            etag, number = response.headers.get("ETag"), response.headers.get("X-Fwdllama-Version", "")
            if not number.isdecimal():
                raise Away(f"{self.name}: does not say which version it sends; is it an aggregator?")
            data = bytearray()
            for piece in response.iter_bytes():
                data += piece
                if len(data) > self._max_bytes:
                    self._etag = etag
                    raise AdapterError(f"{self.name}: sends more than {self._max_bytes} bytes, which no adapter has.")
        promised = (etag or "").strip('"')
        found = hashlib.sha256(data).hexdigest()
        if _SHA256.fullmatch(promised) and promised != found:
            raise Away(f"{self.name}: sent a file with SHA-256 {found[:12]}, but promised {promised[:12]}")
        return bytes(data), etag, int(number)

    def _described(self, number: int) -> dict[str, object]:
        """The version's entry in the registry, of which a newer aggregator may know more than we do."""
        response = self._client.get(str(number))
        self._check(response)
        try:
            described = response.json()
        except ValueError as error:
            raise Away(f"{self.name}: describes its version in something else than JSON") from error
        return described if isinstance(described, dict) else {}

    def _check(self, response: httpx.Response) -> None:
        status = response.status_code
        if status == 200:
            return
        meaning = {
            401: "asks for a key; give one with --key-file",
            403: "refuses the key of --key-file",
            404: "has no such run, or no such version of it yet",
        }
        raise Away(f"{self.name}: {meaning.get(status, 'cannot answer')} (status {status})")

    def close(self) -> None:
        """See `Source`."""
        self._client.close()


class Follower:
    """A thread that polls a source and gives what is new to `offer`. Use as a context manager."""

    def __init__(self, source: Source, offer: Callable[[Edition], None], *, poll_s: float) -> None:
        self._source, self._offer, self._poll_s = source, offer, poll_s
        self._trouble = ""
        self._n_failed = 0
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="follower", daemon=True)

    def _run(self) -> None:
        while not self._ending.is_set():
            try:
                self.poll()
            except RuntimeError:  # what httpx says of a client that was closed under it
                if not self._ending.is_set():
                    raise
            wait_s = min(self._poll_s * 2**self._n_failed, max(LONGEST_WAIT_S, self._poll_s)) if self._n_failed else self._poll_s
            self._ending.wait(wait_s * random.uniform(0.8, 1.0))  # many servers must not come back to an aggregator in step

    def poll(self) -> None:
        """Ask once; says what goes wrong unless it was said the last time."""
        try:
            edition = self._source.poll()
        except Away as trouble:
            self._n_failed = min(self._n_failed + 1, 16)
            if str(trouble) != self._trouble:
                log.warning("%s; trying again", trouble)
            self._trouble = str(trouble)
            return
        except (FileError, FwdllamaError) as refusal:
            log.warning("a new adapter was refused, and what is on stays on: %s", refusal)
            edition = None
        if self._trouble:
            log.info("%s: is there again", self._source.name)
        self._trouble, self._n_failed = "", 0
        if edition is not None:
            self._offer(edition)

    def __enter__(self) -> Follower:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._source.close()  # ends a request that is under way
        self._thread.join(5.0)


def read_key(path: Path) -> str:
    """The key in a file: its only line.

    Raises:
        DataError: it cannot be read, or holds no key.
    """
    try:
        key = path.read_text(encoding="ascii").strip()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: holds something else than a key in ASCII (byte {error.start}).") from error
    if len(key) < 16 or not key.isprintable() or " " in key:
        raise DataError(f"{path}: must hold one key of at least 16 characters, such as `openssl rand -hex 32` prints.")
    if path.stat().st_mode & 0o077:
        log.warning("%s can be read by other users of this machine; chmod 600 it", path)
    return key
