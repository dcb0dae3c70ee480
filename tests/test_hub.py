"""Fetching from a hub: a real server on this machine, which speaks the part of the protocol that downloads need."""

from __future__ import annotations

import hashlib
import json
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from fwdllama.download import Progress
from fwdllama.errors import ModelError
from fwdllama.models import fetch, list_models, resolve


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Hub(ThreadingHTTPServer):
    """A hub with one repository, `owner/repo`, with one file, `model.gguf`."""

    commit = "c" * 40

    def __init__(self, gguf: bytes, promised_sha256: str) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.gguf, self.promised_sha256 = gguf, promised_sha256


class HubHandler(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        if self.path.startswith("/api/models/owner/repo"):
            lfs = {"sha256": self.server.promised_sha256, "size": len(self.server.gguf), "pointerSize": 130}
            siblings = [{"rfilename": "model.gguf", "size": len(self.server.gguf), "lfs": lfs}]
            info = {"id": "owner/repo", "sha": Hub.commit, "siblings": siblings, "cardData": {"license": "mit"}}
            self.answer(200, json.dumps(info).encode(), "application/json")
        elif self.path == f"/owner/repo/resolve/{Hub.commit}/model.gguf":
            self.answer(200, self.server.gguf, "application/octet-stream")
        else:
            self.answer(404, b"{}", "application/json")

    do_HEAD = do_GET

    def answer(self, status: int, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Repo-Commit", Hub.commit)
        self.send_header("ETag", f'"{self.server.promised_sha256}"')
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


@pytest.fixture
def serve_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[bytes, str], None]]:
    pytest.importorskip("huggingface_hub", reason="needs the extra `hub`")
    hubs: list[Hub] = []

    def serve(gguf: bytes, promised_sha256: str) -> None:
        hub = Hub(gguf, promised_sha256)
        hubs.append(hub)
        threading.Thread(target=hub.serve_forever, args=(0.02,), daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{hub.server_port}")

    yield serve
    for hub in hubs:
        hub.shutdown()
        hub.server_close()


def test_hub_file_is_verified_listed_and_resolved(serve_hub: Callable[[bytes, str], None], tmp_path: Path) -> None:
    serve_hub(b"GGUF and so on", sha256(b"GGUF and so on"))
    events: list[Progress] = []
    path = fetch("hf:owner/repo/model.gguf", cache_dir=tmp_path, progress=events.append)
    assert path.read_bytes() == b"GGUF and so on"
    assert resolve("hf:owner/repo/model.gguf", cache_dir=tmp_path) == path
    assert events[0].text.startswith("hf:owner/repo/model.gguf: licence mit, see ")
    entry = list_models(cache_dir=tmp_path)[-1]
    assert (entry.name, entry.licence, entry.fetched) == ("hf:owner/repo/model.gguf", "mit", {"": path})
    assert not (path.parent / "incomplete").exists()


def test_hub_file_with_another_digest_is_refused(serve_hub: Callable[[bytes, str], None], tmp_path: Path) -> None:
    serve_hub(b"GGUF and so on", "0" * 64)
    with pytest.raises(ModelError, match=r"has SHA-256 [0-9a-f]{64}, but the hub promised 0{64}\.$"):
        fetch("hf:owner/repo/model.gguf", cache_dir=tmp_path)
    assert not list(tmp_path.rglob("*.gguf"))


def test_hub_file_that_does_not_exist_names_those_that_do(
    serve_hub: Callable[[bytes, str], None], tmp_path: Path
) -> None:
    serve_hub(b"GGUF", sha256(b"GGUF"))
    with pytest.raises(ModelError, match=r"the repository has no such file; its GGUF files are model\.gguf\.$"):
        fetch("hf:owner/repo/other.gguf", cache_dir=tmp_path)


def test_unreachable_hub_is_a_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub", reason="needs the extra `hub`")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ModelError, match=r"^hf:owner/repo: the Hugging Face hub could not deliver it \(.+\)\. Check"):
        fetch("hf:owner/repo/model.gguf", cache_dir=tmp_path)


def test_missing_hub_extra_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # how Python itself marks a module as not importable
    with pytest.raises(ModelError, match=r"needs huggingface-hub; install it with `pip install 'fwdllama\[hub\]'`"):
        fetch("hf:owner/repo/model.gguf", cache_dir=tmp_path)
