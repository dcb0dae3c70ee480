"""`fwdllama serve` from its first line to exit code 0, and the commands that speak to it."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

from fwdllama.federation.toy import toy_run

from .commands import Served, invoked, refusal, served

pytestmark = pytest.mark.service


@pytest.fixture
def aggregator(serving: Served) -> Served:
    """Another's runs may be in it."""
    return serving


def admin(aggregator: Served) -> httpx.Client:
    key = Path(aggregator.facts["key_file"]).read_text().strip()
    return httpx.Client(base_url=aggregator.facts["url"], headers={"authorization": f"Bearer {key}"})


def create(aggregator: Served, name: str) -> bytes:
    spec, initial = toy_run(name)
    with admin(aggregator) as client:
        assert client.put(f"/v1/blobs/sha256:{spec.initial}", content=initial).status_code == 201
        assert client.post("/v1/runs", json=spec.model_dump(mode="json")).status_code == 201
        return client.get(f"/v1/runs/{name}/versions/0/adapter.gguf").content


def test_first_start_makes_a_token_that_enrols(aggregator: Served) -> None:
    with httpx.Client(base_url=aggregator.facts["url"]) as client:
        header = {"authorization": f"Bearer {aggregator.facts['token']}"}
        assert client.post("/v1/devices", json={"name": "phone"}, headers=header).status_code == 201
        assert client.get("/ready").json() == {"status": "ready"}


def test_tokens_and_devices_are_made_listed_and_revoked(aggregator: Served) -> None:
    made = json.loads(invoked("token", "create", "--uses", 1, "--expires", 60, "--name", "one", "--json", *aggregator.connection).stdout)
    plain = invoked("token", "create", *aggregator.connection)
    assert f"fwdllama join {aggregator.facts['url']} --token {plain.stdout.strip()} --model M.gguf --data mine.json" in plain.stderr
    listed = json.loads(invoked("token", "list", "--json", *aggregator.connection).stdout)
    assert (made["id"], 1) in [(token["id"], token["uses_left"]) for token in listed]
    assert {token["token"] for token in listed} == {None}
    assert invoked("token", "revoke", made["id"], *aggregator.connection).stderr == f"token {made['id']} is revoked\n"
    header = {"authorization": f"Bearer {plain.stdout.strip()}"}
    device = httpx.post(f"{aggregator.facts['url']}/v1/devices", json={"name": "tablet"}, headers=header).json()["device"]
    assert "tablet" in invoked("device", "list", *aggregator.connection).stdout
    assert invoked("device", "revoke", device, *aggregator.connection).exit_code == 0
    devices = json.loads(invoked("device", "list", "--json", *aggregator.connection).stdout)
    assert next(d for d in devices if d["device"] == device)["revoked_at"] is not None
    assert refusal("device", "revoke", "nosuch", *aggregator.connection) == f"{aggregator.facts['url']}: there is no device nosuch."
    assert refusal("device", "revoke", "../x", *aggregator.connection) == "'../x' is no name: letters, digits, '-', '_' and '.', at most 64."


def test_runs_are_steered_and_exported(aggregator: Served, tmp_path: Path) -> None:
    data = create(aggregator, "steered")
    where = aggregator.connection
    assert invoked("run", "pause", "steered", *where).stdout == "run steered is paused (by an administrator), at version 0\n"
    assert invoked("run", "resume", "steered", *where).stdout == "run steered is open, at version 0\n"
    assert "steered" in invoked("run", "list", *where).stdout
    assert json.loads(invoked("run", "show", "steered", "--json", *where).stdout)["progress"]["wanted"] == 80
    assert "0 of 80 probes" in invoked("run", "show", "steered", *where).stdout
    sentence = "version 0 is not earlier than version 0, at which run steered is; there is none."
    assert refusal("run", "rollback", "steered", "--version", 0, *where) == f"{aggregator.facts['url']}: {sentence}"
    out = tmp_path / "adapter.gguf"
    assert invoked("run", "export", "steered", "--out", out, *where).stdout == f"{out}\n"
    assert out.read_bytes() == data
    assert refusal("run", "export", "steered", "--out", out, *where) == f"{out}: already exists; give another name, or --force to replace it."
    assert invoked("run", "finish", "steered", *where).stdout == "run steered is finished (by an administrator), at version 0\n"
    with admin(aggregator) as client:
        n_records = len(client.get("/v1/audit").json())
    assert invoked("audit", "verify", *where).stdout.startswith(f"{n_records} records follow")


def test_export_that_broke_off_goes_on_where_it_stopped(aggregator: Served, tmp_path: Path) -> None:
    data = create(aggregator, "resumed")
    out, part = tmp_path / "a.gguf", tmp_path / ".a.gguf.part"
    etag = f'"{hashlib.sha256(data).hexdigest()}"'
    for begun, tag in ((data[:100], etag), (data, etag), (b"x" * 100, '"another"')):
        part.write_bytes(begun)
        part.with_suffix(".etag").write_text(tag)
        assert invoked("run", "export", "resumed", "--out", out, "--force", *aggregator.connection).exit_code == 0
        assert out.read_bytes() == data
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a.gguf"]
    part.write_bytes(b"x" * 100)  # not what came before
    part.with_suffix(".etag").write_text(etag)
    assert "nothing was kept. Run the command again." in refusal("run", "export", "resumed", "--out", out, "--force", *aggregator.connection)
    assert out.read_bytes() == data


def test_wrong_key_url_or_nobody_there_is_one_sentence(aggregator: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FWDLLAMA_ADMIN_KEY", raising=False)
    url = aggregator.facts["url"]
    assert refusal("run", "list", "--url", url).startswith("aggregator/admin.key: the administrator's key cannot be read (No such file")
    monkeypatch.setenv("FWDLLAMA_ADMIN_KEY", "wrong")
    assert refusal("run", "list", "--url", url) == f"{url}: this needs the administrator's key: Authorization: Bearer KEY."
    assert refusal("run", "list", "--url", "ftp://x") == "--url is 'ftp://x', but must begin with http:// or https://."
    sentence = refusal("run", "list", "--url", "http://127.0.0.1:1")
    assert sentence.startswith("http://127.0.0.1:1 cannot be reached: ")
    assert sentence.endswith("Is the aggregator running there?")


def test_signal_ends_streams_and_closes_the_database_and_the_next_start_goes_on_over_tls(tmp_path: Path) -> None:
    with served(tmp_path / "aggregator") as aggregator:
        create(aggregator, "toy")
        streamed: list[str] = []

        def follow() -> None:
            with admin(aggregator) as client, client.stream("GET", "/v1/events?after=0", timeout=30) as answer:
                streamed.extend(answer.iter_lines())
                streamed.append("ended")

        following = threading.Thread(target=follow)
        following.start()
        until = time.monotonic() + 10
        while "event: run-created" not in streamed and time.monotonic() < until:
            time.sleep(0.02)
        assert aggregator.stop(signal.SIGTERM) == 0
        following.join(10)
        assert streamed[-1] == "ended"
    assert not (tmp_path / "aggregator" / "aggregator.sqlite-wal").exists()
    certificate, key = certified(tmp_path)
    with served(tmp_path / "aggregator", "--tls-cert", certificate, "--tls-key", key) as again:
        assert again.facts["token"] is None  # made once
        assert again.facts["url"].startswith("https://")
        secret = Path(again.facts["key_file"]).read_text().strip()
        trusted = ssl.create_default_context(cafile=str(certificate))
        answer = httpx.get(f"{again.facts['url']}/v1/runs", headers={"authorization": f"Bearer {secret}"}, verify=trusted)
        assert [run["spec"]["name"] for run in answer.json()] == ["toy"]
        assert again.stop(signal.SIGINT) == 0
    assert "Traceback" not in again.log.read_text()


def certified(folder: Path) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 that only this test trusts, and its key."""
    if shutil.which("openssl") is None:
        pytest.skip("makes a certificate with openssl")
    certificate, key = folder / "cert.pem", folder / "key.pem"
    made = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "1", "-subj", "/CN=127.0.0.1"]
    made += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(made, check=True, capture_output=True)
    return certificate, key


def test_what_cannot_be_served_is_one_sentence(tmp_path: Path) -> None:
    def sentence(*options: object) -> str:
        return refusal("serve", tmp_path / "aggregator", *options)

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert sentence("--port", port) == f"127.0.0.1:{port} cannot be listened on: Address already in use. Choose another --port."
    others = (
        "can be reached by others, who could read keys on their way: give --tls-cert and --tls-key, "
        "--behind-proxy where a proxy does that, or --insecure."
    )
    assert sentence("--host", "0.0.0.0") == f"--host 0.0.0.0 {others}"
    assert sentence("--host", "no.such.host.invalid", "--insecure").startswith("--host no.such.host.invalid: is no address of this machine: ")
    assert sentence("--tls-cert", "c.pem") == "--tls-cert and --tls-key belong together; give both."
    assert sentence("--tls-cert", "c.pem", "--tls-key", "k.pem") == "--tls-cert c.pem and --tls-key k.pem cannot be used: No such file or directory."
    assert sentence("--workers", 2) == "--workers 2 needs PostgreSQL: give --database postgresql://..., or leave --workers out."
    assert not (tmp_path / "aggregator").exists()  # nothing was made
    assert sentence("--port", 0, "--database", "nonsense") == "--database is no URL; it must be such as postgresql://user:password@host/name."


def test_second_ctrl_c_does_not_wait_but_a_second_sigterm_does(tmp_path: Path) -> None:
    from fwdllama_server.serving import Server, Setting

    setting = Setting(tmp_path / "aggregator")
    context = setting.open()
    told = Server(setting, context)
    told.handle_exit(signal.SIGTERM, None)
    told.handle_exit(signal.SIGTERM, None)
    assert (told.should_exit, told.force_exit, context.stopping) == (True, False, True)
    told.handle_exit(signal.SIGINT, None)
    assert told.force_exit
    context.store.close()


def test_serving_imports_no_engine() -> None:
    program = "import sys, fwdllama_server.workers, fwdllama_server.cli.serve; print(sorted({'llama_cpp', 'httpx'} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == "[]"


def test_aggregator_that_makes_runs_and_adapters_has_no_engine_in_its_process(tmp_path: Path) -> None:
    program = """
import sys
from pathlib import Path
from fwdllama_server.app import create_app
from fwdllama_server.opening import opened
from fwdllama.federation.toy import toy_run
from starlette.testclient import TestClient
context = opened(Path(sys.argv[1]))
spec, initial = toy_run("toy")
with TestClient(create_app(context), headers={"authorization": f"Bearer {context.secrets.admin}"}) as client:
    codes = [client.put(f"/v1/blobs/sha256:{spec.initial}", content=initial).status_code]
    codes += [client.post("/v1/runs", json=spec.model_dump(mode="json")).status_code]
    codes += [client.get("/v1/runs/toy/versions/latest/adapter.gguf").status_code]
context.store.close()
print(codes, sorted(name for name in sys.modules if name.startswith(("llama_cpp", "fwdllama.llama"))))
"""
    found = subprocess.check_output([sys.executable, "-c", program, str(tmp_path / "aggregator")], text=True)
    assert found.strip() == "[201, 201, 200] []"


def test_claimed_address_is_believed_behind_a_proxy_only(tmp_path: Path) -> None:
    from fwdllama_server.serving import Server, Setting

    for proxies in (None, "127.0.0.1"):
        setting = Setting(tmp_path / "aggregator", proxies=proxies)
        context = setting.open()
        config = Server(setting, context).config
        config.load()
        context.store.close()
        assert (type(config.loaded_app).__name__ == "ProxyHeadersMiddleware") == (proxies is not None)
