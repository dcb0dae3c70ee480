"""`fwdllama join` as a user runs it: one sentence for whatever is wrong, and a process that may be killed at any moment."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fwdllama.cli.watch import Watch
from fwdllama.config import make_config
from fwdllama.federation.device import Status
from fwdllama.federation.spec import RunSpec
from fwdllama.hooks import Hooks
from fwdllama.material import Source
from fwdllama.session import opened
from gguf_tools.adapter import adapter_bytes
from gguf_tools.model import file_sha256
from gguf_tools.synth import write_tiny_llama
from tests.cli.conftest import Run
from tests.federation.conftest import Serving

TRAIN = {
    "space": {"layers": [1, 2]},
    "estimator": {"rounds": 2},
    "batch": {"units": 2, "per_unit": 2, "fresh": 1, "held_out": 2},
    "budget": {"steps": 40},
    "engine": {"n_threads": 1},
}


@pytest.fixture
def serving(tmp_path: Path) -> Iterator[Serving]:
    pytest.importorskip("fastapi", reason="the aggregator is in the extra `server`")
    found = Serving(tmp_path / "aggregator")
    yield found
    found.stop()
    found.http.close()


def create(serving: Serving, model: Path, data: Path, name: str = "tiny") -> None:
    """A run for the tiny model, of 40 rounds of two tasks."""
    config = make_config(TRAIN)
    with opened(config, model, Source(data), Hooks()) as session:
        initial = adapter_bytes(session.adapter(session.space.initial_theta(), {}))
        n_params = session.space.n_params
    sha256 = hashlib.sha256(initial).hexdigest()
    key = {"authorization": f"Bearer {serving.context.secrets.admin}"}
    assert serving.http.put(f"/v1/blobs/sha256:{sha256}", content=initial, headers=key).status_code == 201
    spec = RunSpec.model_validate(
        {
            "name": name,
            "base": {"sha256": file_sha256(model), "name": "tiny", "architecture": "llama"},
            "train": config.model_dump(mode="json"),
            "eps": 0.01,
            "initial": sha256,
            "n_params": n_params,
            "round": {"probes": 8, "most": 8, "probes_per_task": 4, "lease_s": 2.0},
            "evaluation": {"devices": 1},
        }
    )
    serving.admin("POST", "/v1/runs", spec.model_dump(mode="json"))


def test_a_device_enrols_works_and_goes_on_without_its_token(run: Run, serving: Serving, model: Path, data: Path, tmp_path: Path) -> None:
    create(serving, model, data)
    place = ["--model", model, "--data", data, "--folder", tmp_path / "device", "--threads", 1, "--min-battery", 0, "--once"]
    first = run("join", serving.url, "--token", serving.token(uses=1), *place, "--name", "phone")
    assert first.code == 0, first.err
    assert f"enrolled at {serving.url} as d" in first.err
    assert "task 1 of version 0 delivered: loss" in first.err
    second = run("join", serving.url, *place, "--json")
    assert second.code == 0, second.err
    rows = [json.loads(line) for line in second.out.splitlines()]
    assert rows[-1]["event"] == "one task was done"
    assert [row["n_tasks"] for row in rows if "n_tasks" in row][-1] == 1
    devices = serving.admin("GET", "/v1/devices")
    assert [(device["name"], device["n_results"]) for device in devices] == [("phone", 2)]


@pytest.mark.service
def test_a_device_killed_at_any_moment_goes_on_and_nothing_is_counted_twice(
    serving: Serving, model: Path, data: Path, tmp_path: Path
) -> None:
    create(serving, model, data)
    program = "import sys; from fwdllama.cli.main import run; sys.exit(run(sys.argv[1:]))"
    command = [sys.executable, "-c", program, "join", serving.url, "--model", model, "--data", data, "--folder", tmp_path / "device"]
    options = ["--threads", "1", "--min-battery", "0", "--json"]
    environment = {**os.environ, "FWDLLAMA_TOKEN": serving.token(), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    output = tmp_path / "out"
    for life in range(2):
        with output.open("ab") as out, subprocess.Popen([*map(str, command), *options], stdout=out, stderr=out, env=environment) as process:
            before = serving.admin("GET", "/v1/runs/tiny/progress")["n_results"]
            end = time.monotonic() + 60
            while serving.admin("GET", "/v1/runs/tiny/progress")["n_results"] < before + 5 + life:
                assert process.poll() is None, output.read_text()
                assert time.monotonic() < end, output.read_text()
                time.sleep(0.005)
            process.send_signal(signal.SIGKILL)
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert sum(row.get("event", "").startswith("enrolled") for row in rows) == 1
    progress = serving.admin("GET", "/v1/runs/tiny/progress")
    run = serving.admin("GET", "/v1/runs/tiny")
    assert run["version"] >= 4
    assert progress["n_refused"] == 0
    per_version = [version["n_probes"] for version in serving.admin("GET", "/v1/runs/tiny/versions")][1:]
    assert set(per_version) == {8}


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("aggregator", "'aggregator' is not an aggregator's address; it looks like http://192.168.1.5:8080 or https://example.org."),
        ("ftp://host", "'ftp://host' is not an aggregator's address; it looks like http://192.168.1.5:8080 or https://example.org."),
    ],
)
def test_a_wrong_address_is_a_usage_error(run: Run, model: Path, data: Path, url: str, sentence: str) -> None:
    found = run("join", url, "--model", model, "--data", data, "--token", "t")
    assert (found.code, found.error) == (2, sentence)


def test_an_address_where_nobody_answers(run: Run, model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fwdllama.federation.client.PATIENCE_S", 0.0)
    found = run("join", "http://127.0.0.1:9", "--model", model, "--data", data, "--token", "t", "--folder", tmp_path / "d")
    assert found.code == 1
    assert found.error == "http://127.0.0.1:9 cannot be reached ([Errno 111] Connection refused); is the aggregator running, and the address right?"


def test_wrong_tokens_models_and_data_are_sentences(run: Run, serving: Serving, model: Path, data: Path, tmp_path: Path) -> None:
    create(serving, model, data)
    place = ["--model", model, "--folder", tmp_path / "device"]
    assert run("join", serving.url, "--data", data, *place).error == (
        f"This device is not known to {serving.url}; give the enrolment token that its operator has, with --token."
    )
    assert "token" in run("join", serving.url, "--data", data, *place, "--token", "wrong").error
    (tmp_path / "empty").write_text("\n")
    assert run("join", serving.url, "--data", data, *place, "--token-file", tmp_path / "empty").error == (
        f"{tmp_path / 'empty'} is empty, but should hold an enrolment token."
    )
    both = run("join", serving.url, "--data", data, *place, "--token", "a", "--token-file", tmp_path / "empty")
    assert (both.code, both.error) == (2, "--token (or FWDLLAMA_TOKEN) and --token-file were both given; give one.")
    assert "the file is empty" in run("join", serving.url, "--data", tmp_path / "empty", *place).error
    assert "none.json" in run("join", serving.url, "--data", tmp_path / "none.json", *place).error
    other = write_tiny_llama(tmp_path / "other.gguf", type="Q8_0", seed=3)
    (tmp_path / "token").write_text(serving.token() + "\n")
    found = run("join", serving.url, "--model", other, "--data", data, "--folder", tmp_path / "device", "--token-file", tmp_path / "token")
    assert found.error == (
        f"Run 'tiny' is for tiny, SHA-256 {file_sha256(model)}, but this model's SHA-256 is {file_sha256(other)}; give that file with --model."
    )
    named = run("join", serving.url, "--data", data, *place, "--run", "other")
    assert named.error == f"{serving.url} has no run 'other'; it has tiny (open)."
    limit = run("join", serving.url, "--data", data, *place, "--min-battery", 30)
    assert (limit.code, limit.error) == (2, "--min-battery is 30, but must be between 0 and 1.")


def test_the_display_tells_what_the_device_does() -> None:
    import io

    from rich.console import Console

    now = 1000.0
    console = Console(file=io.StringIO(), width=100, force_terminal=True, legacy_windows=False)
    watch = Watch(console=console, now=lambda: now)

    def shown(status: Status) -> str:
        watch.status(status)
        with console.capture() as captured:
            console.print(watch.panel())
        return captured.get()

    common: dict[str, Any] = {"run": "tiny", "version": 7, "n_tasks": 3, "n_probes": 60, "loss": 2.5, "contact_s": 988.0}
    with watch:
        text = shown(Status(doing="waiting", reason="all probes are given out", until_s=1065.0, n_refused=1, **common))
        for part in ("tiny, version 7", "waiting, 1:05 left: all probes are given out", "3 tasks, 60 probes, 1 not counted", "2.500", "0:12 ago"):
            assert part in text
        assert "working: 5 of 20 probes" in shown(Status(doing="working", task_probes=5, task_wanted=20, **common))
