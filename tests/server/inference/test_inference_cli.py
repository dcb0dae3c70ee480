"""`fwdllama serve-model` as a user runs it: what it refuses, and how it starts, follows and stops."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import typer
from fwdllama_server.inference.cli import register

from fwdllama.errors import DataError, FwdllamaError, ResourceError, UsageError
from gguf_tools.errors import FileError

PROGRAM = """
import sys
import typer
from fwdllama.cli import main
from fwdllama_server.inference.cli import register
main._load_plugins = register
sys.exit(main.run(["serve-model", *sys.argv[1:]]))
"""


def run(*arguments: object) -> None:
    app = typer.Typer(pretty_exceptions_enable=False)
    register(app)
    app([str(argument) for argument in arguments], standalone_mode=False)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["http://host"], "a URL and --run go together: the run's adapter is followed."),
        (["--run", "r"], "a URL and --run go together: the run's adapter is followed."),
        (["http://host", "--run", "r", "--adapter", "a.gguf"], "a URL and --adapter are both given, but the adapter comes from one of them."),
        (["--tls-cert", "c.pem"], "--tls-cert and --tls-key go together."),
        (
            ["--host", "0.0.0.0", "--tls-cert", "c", "--tls-key", "k"],
            "--host 0.0.0.0 can be reached from other machines, so it needs --api-key-file; "
            "give --insecure if a proxy or a closed network takes care of that.",
        ),
        (["host:80", "--run", "r"], "'host:80' is not the URL of an aggregator, such as http://127.0.0.1:8080."),
    ],
)
def test_options_that_cannot_work_are_refused(base: Path, arguments: list[str], sentence: str) -> None:
    with pytest.raises(UsageError) as caught:
        run("--model", base, *arguments)
    assert str(caught.value) == sentence


def test_files_that_are_wrong_at_the_start_end_it(base: Path, tmp_path: Path) -> None:
    def refused(*arguments: object) -> str:
        with pytest.raises((FwdllamaError, FileError)) as caught:
            run("--model", base, "--port", 0, *arguments)
        assert isinstance(caught.value, (DataError, FileError, ResourceError))
        return str(caught.value)

    (tmp_path / "bad.gguf").write_bytes(b"GGUF")
    assert refused("--adapter", tmp_path / "bad.gguf").startswith(f"{tmp_path}/bad.gguf: ")
    assert refused("--adapter", tmp_path / "none.gguf") == f"{tmp_path}/none.gguf: cannot be read: No such file or directory."
    assert refused("--api-key-file", tmp_path / "none") == f"{tmp_path}/none: cannot be read: No such file or directory."
    no_certificate = refused("--tls-cert", tmp_path / "c.pem", "--tls-key", tmp_path / "k.pem")
    assert no_certificate == f"{tmp_path}/c.pem: cannot be read: No such file or directory."


Started = tuple[subprocess.Popen[str], str]


@pytest.fixture
def started(base: Path, tmp_path: Path, adapter_of: Callable[..., bytes]) -> Iterator[Started]:
    """The program, serving a file, and its URL."""
    (tmp_path / "a.gguf").write_bytes(adapter_of(1))
    options = {"--model": base, "--adapter": tmp_path / "a.gguf", "--port": 0, "--poll": 0.1, "--threads": 1}
    command = [sys.executable, "-c", PROGRAM, *(str(word) for pair in options.items() for word in pair)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(["", *sys.path])}
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        line = process.stderr.readline()
        assert line.startswith("info: tiny and tiny:a at http://127.0.0.1:"), line
        yield process, line.split(" at ")[1].split("/v1")[0]
        process.kill()


def test_it_says_what_is_on_and_at_sigterm_a_running_answer_finishes(started: Started, tmp_path: Path, adapter_of: Callable[..., bytes]) -> None:
    process, url = started
    assert process.stderr is not None
    assert process.stderr.readline().startswith("info: adapter sha256:")

    def replace(content: bytes) -> None:
        (tmp_path / "b.gguf").write_bytes(content)
        os.replace(tmp_path / "b.gguf", tmp_path / "a.gguf")

    replace(adapter_of(2))
    assert process.stderr.readline().endswith(" is on from the next request on\n")
    replace(b"GGUF")
    assert process.stderr.readline().startswith(f"warning: a new adapter was refused, and what is on stays on: {tmp_path}/a.gguf: ")
    body = {"model": "tiny", "prompt": "a", "max_tokens": 1500, "temperature": 0, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body) as response:
        pieces = response.iter_text()
        text = next(pieces)
        process.send_signal(signal.SIGTERM)
        text += "".join(pieces)
    assert text.endswith("data: [DONE]\n\n")
    assert text.count('"finish_reason":"length"') == 1
    out, err = process.communicate(timeout=10)
    assert (process.returncode, out) == (0, "")
    first, second = err.splitlines()
    assert first == "info: stopping: 1 requests may finish within 30 s; press Ctrl-C to end at once"
    assert second.startswith("info: tiny answered with base: 1 tokens read, 1500 written in ")
