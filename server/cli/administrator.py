"""The administrator's side of the HTTP interface: requests with the key, refusals as sentences, downloads that go on where they stopped."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer

from fwdllama.errors import RunError, UsageError

KEY_VARIABLE = "FWDLLAMA_ADMIN_KEY"
Url = Annotated[str, typer.Option("--url", help="Where the aggregator is.", metavar="URL", envvar="FWDLLAMA_URL")]
KeyFile = Annotated[
    Path | None,
    typer.Option("--key-file", help=f"File with the administrator's key. Default: {KEY_VARIABLE}, else aggregator/admin.key.", metavar="FILE"),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
DEFAULT_URL = "http://127.0.0.1:8470"
DEFAULT_KEY_FILE = Path("aggregator/admin.key")


def admin_key(file: Path | None) -> str:
    """The administrator's key: of the file, the environment, or the aggregator's folder here.

    Raises:
        UsageError: there is none.
    """
    if file is None and (key := os.environ.get(KEY_VARIABLE, "").strip()):
        return key
    path = file or DEFAULT_KEY_FILE
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise UsageError(f"{path}: the administrator's key cannot be read ({why}); give --key-file FILE, or set {KEY_VARIABLE}.") from error


def name(text: str) -> str:
    """A name or id as part of a path.

    Raises:
        UsageError: it cannot be one.
    """
    if _NAME.fullmatch(text) is None:
        raise UsageError(f"{text!r} is no name: letters, digits, '-', '_' and '.', at most 64.")
    return text


class Administrator:
    """An open connection to an aggregator. Close it, or use `administrator`."""

    def __init__(self, client: httpx.Client) -> None:
        self.client = client

    def ask(self, method: str, path: str, *, missing: bool = False, **more: Any) -> Any:
        """The answer's JSON (None where it has none); with `missing` also None where there is no such thing.

        Raises:
            RunError: refused, with the aggregator's own sentence, or not to be reached.
        """
        try:
            answer = self.client.request(method, path, **more)
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error
        if missing and answer.status_code == 404:
            return None
        self._check(answer)
        try:
            return answer.json() if answer.content else None
        except ValueError:
            raise RunError(f"{self.client.base_url} answered {method} {path} with something else than JSON; is it an aggregator?") from None

    def octets(self, path: str) -> bytes:
        """The answer as it is.

        Raises:
            RunError: refused, with the aggregator's own sentence, or not to be reached.
        """
        try:
            answer = self.client.get(path)
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error
        self._check(answer)
        return answer.content

    def pages(self, path: str, cursor: str, next_: str, size: int = 1000) -> Iterator[Any]:
        """The items of a list that comes in pages: parameter `cursor` names the place, an item's field `next_` the place it is at."""
        at: Any = None
        while True:
            page = self.ask("GET", path, params={"limit": size, **({} if at is None else {cursor: at})})
            yield from page
            if len(page) < size:
                return
            at = page[-1][next_] if cursor == "after" else page[-1][next_] + 1

    def download(self, path: str, target: Path) -> dict[str, str]:
        """Fetch a file that is named by its hash, going on where an earlier attempt stopped; returns the answer's headers.

        Raises:
            RunError: refused, broken off, or not what its hash says.
        """
        part = target.with_name(f".{target.name}.part")
        digest_file = part.with_suffix(".etag")
        had = part.stat().st_size if part.exists() and digest_file.exists() else 0
        asked = {"range": f"bytes={had}-", "if-range": digest_file.read_text()} if had else {}
        try:
            with self.client.stream("GET", path, headers=asked) as answer:
                if answer.status_code == 416:  # all of it is here
                    headers = dict(answer.headers)
                else:
                    if answer.status_code not in (200, 206):
                        answer.read()
                    self._check(answer)
                    headers = dict(answer.headers)
                    digest_file.write_text(headers.get("etag", ""))
                    with part.open("ab" if answer.status_code == 206 else "wb") as file:
                        for block in answer.iter_bytes(1 << 20):
                            file.write(block)
        except httpx.HTTPError as error:
            raise RunError(f"{self._unreachable(error)} What came is kept; the same command goes on from there.") from error
        wanted, found = headers.get("etag", "").strip('"'), hashlib.sha256(part.read_bytes()).hexdigest()
        digest_file.unlink(missing_ok=True)
        if found != wanted:
            part.unlink()
            raise RunError(f"{path}: what came has SHA-256 {found}, but {wanted} was promised; nothing was kept. Run the command again.")
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        part.replace(target)
        return headers

    def _check(self, answer: httpx.Response) -> None:
        if answer.is_success:
            return
        try:
            sentence = str(answer.json()["detail"])
        except (ValueError, KeyError, TypeError):
            sentence = f"status {answer.status_code} without a reason; is it an aggregator?"
        raise RunError(f"{self.client.base_url}: {sentence}")

    def _unreachable(self, error: httpx.HTTPError) -> RunError:
        return RunError(f"{self.client.base_url} cannot be reached: {str(error) or type(error).__name__}. Is the aggregator running there?")


@contextmanager
def administrator(url: str, key_file: Path | None) -> Iterator[Administrator]:
    """A connection with the administrator's key.

    Raises:
        UsageError: the URL or the key cannot be.
    """
    if not url.startswith(("http://", "https://")):
        raise UsageError(f"--url is {url!r}, but must begin with http:// or https://.")
    headers = {"authorization": f"Bearer {admin_key(key_file)}"}
    with httpx.Client(base_url=url.rstrip("/"), headers=headers, timeout=httpx.Timeout(60.0, connect=10.0)) as client:
        yield Administrator(client)
