"""The operator's commands run as a user runs them: in this process, or as a server in another."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
from typer.testing import CliRunner, Result

GROUPS = ("audit", "backup", "device", "run", "serve", "token")
PROGRAM = "import typer; from {module} import register; app = typer.Typer(); app.callback()(lambda: None); register(app); app()"


def invoked(*arguments: object) -> Result:
    """A command line in this process; `exception` is what `fwdllama` would print as its one line."""
    app = typer.Typer()
    app.callback()(lambda: None)
    for group in GROUPS:
        importlib.import_module(f"fwdllama_server.cli.{group}").register(app)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refusal(*arguments: object) -> str:
    """The sentence of a command line that is refused."""
    result = invoked(*arguments)
    assert result.exit_code != 0, result.output
    return str(result.exception)


@dataclass
class Served:
    """An aggregator in a process of its own."""

    process: subprocess.Popen[str]
    facts: dict[str, Any]
    log: Path

    @property
    def connection(self) -> tuple[str, ...]:
        """The options that reach it."""
        return ("--url", self.facts["url"], "--key-file", self.facts["key_file"])

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and wait for the exit code."""
        self.process.send_signal(number)
        return self.process.wait(30)


@contextmanager
def served(folder: Path, *options: object) -> Iterator[Served]:
    """`fwdllama serve FOLDER --port 0 --json` with more options, once it says where it is."""
    program = PROGRAM.format(module="fwdllama_server.cli.serve")
    command = [sys.executable, "-c", program, "serve", folder, "--port", "0", "--json", "--newcomers-per-s", "1000", *options]
    log = folder.with_suffix(".log")
    with log.open("w") as stderr:
        process = subprocess.Popen([str(word) for word in command], stdout=subprocess.PIPE, stderr=stderr, text=True, env=dict(os.environ))
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, log.read_text()
        yield Served(process, json.loads(line), log)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()  # type: ignore[union-attr]
