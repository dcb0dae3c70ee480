"""A follower brings what is new and good, says once what is not, and outlives an aggregator that is away."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from fastapi import FastAPI, Request, Response
from fwdllama_server.inference.edition import Edition
from fwdllama_server.inference.follow import AggregatorSource, Away, FileSource, Follower, read_key

from fwdllama.errors import AdapterError, DataError, UsageError
from gguf_tools.errors import FileError
from gguf_tools.model import ModelInfo
from tests.server.inference.conftest import serving_app, wait_for

AdapterOf = Callable[..., bytes]


@dataclass
class Versions:
    """A run's versions, served as an aggregator does; what a test changes is changed at once."""

    files: dict[int, bytes] = field(default_factory=dict)
    best: int = 1
    key: str | None = None
    lie: dict[str, object] = field(default_factory=dict)  # fields of a description, where they are not the truth
    etag: str | None = None  # as above
    named: str | None = None  # the header with the version, as above
    seen: list[tuple[str, int]] = field(default_factory=list)  # (path behind versions/, status)

    def number(self, which: str) -> int:
        return max(self.files, default=0) if which == "latest" else self.best if which == "best" else int(which)

    def app(self) -> FastAPI:
        app = FastAPI()

        def found(request: Request, which: str) -> tuple[int, int]:
            status = 200 if self.key is None or request.headers.get("authorization") == f"Bearer {self.key}" else 401
            number = self.number(which)
            return number, status if number in self.files or status != 200 else 404

        @app.get("/v1/runs/demo/versions/{which}")
        def describe(which: str, request: Request) -> Response:
            number, status = found(request, which)
            self.seen.append((which, status))
            if status != 200:
                return Response(status_code=status)
            told = {"version": number, "theta_digest": f"{number:064x}", "adapter_sha256": hashlib.sha256(self.files[number]).hexdigest()}
            return Response(json.dumps({**told, **self.lie}), media_type="application/json")

        @app.get("/v1/runs/demo/versions/{which}/adapter.gguf")
        def file(which: str, request: Request) -> Response:
            number, status = found(request, which)
            etag = self.etag or (f'"{hashlib.sha256(self.files[number]).hexdigest()}"' if status == 200 else "")
            if status == 200 and request.headers.get("if-none-match") == etag:
                status = 304
            self.seen.append((f"{which}/adapter.gguf", status))
            headers = {"ETag": etag, "X-Fwdllama-Version": self.named or str(number)} if status in (200, 304) else None
            return Response(self.files[number] if status == 200 else b"", status, headers)

        return app


@pytest.fixture(scope="module")
def running() -> Iterator[tuple[Versions, str]]:
    """One server for all tests: starting and stopping it takes longer than most of them."""
    served = Versions()
    with serving_app(served.app()) as url:
        yield served, url


@pytest.fixture
def versions(running: tuple[Versions, str], adapter_of: AdapterOf) -> Versions:
    served, _ = running
    vars(served).update(vars(Versions({1: adapter_of(1)})))
    return served


@pytest.fixture
def url(running: tuple[Versions, str], versions: Versions) -> str:
    return running[1]


@pytest.fixture
def source(url: str, info: ModelInfo) -> Iterator[AggregatorSource]:
    opened = AggregatorSource(url, "demo", "latest", info)
    yield opened
    opened.close()


def test_each_new_version_comes_once(source: AggregatorSource, versions: Versions, adapter_of: AdapterOf) -> None:
    first = source.poll()
    assert first is not None
    assert (first.version, first.digest, first.sha256) == (1, f"{1:064x}", hashlib.sha256(versions.files[1]).hexdigest())
    assert source.poll() is None
    versions.files[2] = adapter_of(2)
    second = source.poll()
    assert second is not None
    assert second.version == 2
    assert versions.seen == [
        ("latest/adapter.gguf", 200), ("1", 200), ("latest/adapter.gguf", 304), ("latest/adapter.gguf", 200), ("2", 200)
    ]  # fmt: skip


def test_best_and_a_number_are_followed_instead(url: str, info: ModelInfo, versions: Versions, adapter_of: AdapterOf) -> None:
    versions.files |= {2: adapter_of(2), 3: adapter_of(3)}
    best, third = AggregatorSource(url + "/", "demo", "best", info), AggregatorSource(url, "demo", "3", info)
    assert [edition and edition.version for edition in (best.poll(), third.poll())] == [1, 3]
    versions.best = 2
    assert [edition and edition.version for edition in (best.poll(), third.poll())] == [2, None]
    best.close()
    third.close()


def test_a_bad_adapter_is_refused_once_and_not_fetched_again(source: AggregatorSource, versions: Versions, adapter_of: AdapterOf) -> None:
    versions.files[2] = versions.files[1][:-3000]
    with pytest.raises(FileError, match=r"^version 2 of http://.* \(demo, latest\): is truncated"):
        source.poll()
    assert source.poll() is None
    versions.files[3] = adapter_of(3)
    edition = source.poll()
    assert edition is not None
    assert edition.version == 3


def test_bytes_that_are_not_those_promised_are_never_used(source: AggregatorSource, versions: Versions) -> None:
    versions.etag = '"' + "0" * 64 + '"'
    with pytest.raises(Away, match=r"sent a file with SHA-256 [0-9a-f]{12}, but promised 000000000000$"):
        source.poll()
    versions.etag = None
    versions.lie = {"adapter_sha256": "0" * 64}
    with pytest.raises(Away, match=r"the file and the description of version 1 do not agree$"):
        source.poll()
    versions.named = "newest"
    with pytest.raises(Away, match=r"does not say which version it sends; is it an aggregator\?$"):
        source.poll()
    versions.named, versions.lie = None, {"theta_digest": 2}
    with pytest.raises(AdapterError, match=r"describes version 1 without its theta_digest\.$"):
        source.poll()


def test_a_key_is_sent_and_its_lack_is_said(source: AggregatorSource, url: str, info: ModelInfo, versions: Versions) -> None:
    versions.key = "k" * 20
    with pytest.raises(Away, match=r"asks for a key; give one with --key-file \(status 401\)$"):
        source.poll()
    keyed = AggregatorSource(url, "demo", "latest", info, key="k" * 20)
    assert keyed.poll() is not None
    keyed.close()


def test_too_large_a_file_is_not_read_to_its_end(url: str, info: ModelInfo) -> None:
    small = AggregatorSource(url, "demo", "latest", info, max_bytes=1000)
    with pytest.raises(AdapterError, match=r"sends more than 1000 bytes, which no adapter has\.$"):
        small.poll()
    assert small.poll() is None, "nor asked for again"
    small.close()


@pytest.mark.parametrize(
    ("url", "run", "which", "sentence"),
    [
        ("localhost:8080", "demo", "latest", "'localhost:8080' is not the URL of an aggregator, such as http://127.0.0.1:8080."),
        ("http://u:p@host", "demo", "latest", "'http://u:p@host' is not the URL of an aggregator, such as http://127.0.0.1:8080."),
        ("http://host", "a/b", "latest", "--run 'a/b' is not the name of a run: letters, digits, '.', '_' and '-'."),
        ("http://host", "demo", "newest", "--follow 'newest' must be latest, best or the number of a version."),
    ],
)
def test_what_cannot_be_followed_is_a_usage_error(info: ModelInfo, url: str, run: str, which: str, sentence: str) -> None:
    with pytest.raises(UsageError) as caught:
        AggregatorSource(url, run, which, info)
    assert str(caught.value) == sentence


def test_an_aggregator_that_is_away_is_said_once_and_its_return_too(
    versions: Versions, info: ModelInfo, adapter_of: AdapterOf, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "fwdllama.inference")
    offered: list[Edition] = []
    with serving_app(versions.app()) as url:
        source = AggregatorSource(url, "demo", "latest", info)
        follower = Follower(source, offered.append, poll_s=5)
        follower.poll()
    follower.poll()
    follower.poll()
    assert [edition.version for edition in offered] == [1]
    assert [record.message for record in caplog.records] == [f"{url} (demo, latest): cannot be reached: [Errno 111] Connection refused; trying again"]
    caplog.clear()
    source.close()
    with serving_app(versions.app()) as url:
        source = AggregatorSource(url, "demo", "latest", info)
        follower._source = source
        follower.poll()
        follower.poll()
        source.close()
    assert [record.message for record in caplog.records] == [f"{url} (demo, latest): is there again"]


def test_a_follower_offers_what_comes_and_ends_when_told(url: str, info: ModelInfo, versions: Versions, adapter_of: AdapterOf) -> None:
    offered: list[Edition] = []
    follower = Follower(AggregatorSource(url, "demo", "latest", info), offered.append, poll_s=0.02)
    with follower:
        wait_for(lambda: len(offered) == 1)
        versions.files[2] = adapter_of(2)
        wait_for(lambda: len(offered) == 2)
        versions.files[3] = b"GGUF"
        versions.files[4] = adapter_of(4)
        wait_for(lambda: len(offered) == 3)
    assert not follower._thread.is_alive()
    assert [edition.version for edition in offered] == [1, 2, 4]


def test_a_file_is_read_again_when_it_changes(tmp_path: Path, info: ModelInfo, adapter_of: AdapterOf) -> None:
    path = tmp_path / "a.gguf"
    source = FileSource(path, info)
    with pytest.raises(Away, match=r"a\.gguf: cannot be read: No such file or directory$"):
        source.poll()
    path.write_bytes(adapter_of(1))
    first = source.poll()
    assert first is not None
    assert (first.version, first.digest) == (None, None)
    assert source.poll() is None
    path.write_bytes(b"GGUF")
    with pytest.raises(FileError, match=r"a\.gguf: "):
        source.poll()
    assert source.poll() is None
    other = tmp_path / "b.gguf"
    other.write_bytes(adapter_of(2))
    os.replace(other, path)
    second = source.poll()
    assert second is not None
    assert second.sha256 != first.sha256
    source.close()


def test_a_key_file_holds_one_key_that_others_cannot_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "key"
    path.write_text("k" * 32 + "\n")
    path.chmod(0o600)
    assert read_key(path) == "k" * 32
    assert caplog.records == []
    path.chmod(0o644)
    read_key(path)
    assert [record.message for record in caplog.records] == [f"{path} can be read by other users of this machine; chmod 600 it"]
    for content in ("short", "two keys " * 4, ""):
        path.write_text(content)
        with pytest.raises(DataError, match=r"must hold one key of at least 16 characters, such as `openssl rand -hex 32` prints\.$"):
            read_key(path)
    with pytest.raises(DataError, match="cannot be read: No such file"):
        read_key(tmp_path / "none")
