"""Other processes, where everything that loads a model happens: `fwdllama` commands, and functions of ours.

Three reasons. The kernel counts what a process held before it became another program into its peak memory, so whoever starts one
must be small. Idle threads of llama.cpp and of torch wait by spinning, and would slow each other down. And an engine that aborts
costs one item, not all.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, ParamSpec, TypeVar

from fwdllama.surroundings import peak_memory_bytes

from .limit import limited
from .measure import Bench, BenchError

PROGRAM = "from fwdllama.cli.main import main; main()"
LOG = "commands.log"  # in the work folder: every command and what it said

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Ran:
    """A command that ended well. `limit` says by which means its memory was limited, `group_bytes` what those counted at most."""

    command: str
    stdout: str
    wall_s: float
    peak_bytes: int
    limit: str | None = None
    group_bytes: int | None = None

    @property
    def json(self) -> Any:
        """The object that it printed."""
        return json.loads(self.stdout)


class Command:
    """A `fwdllama` command in a process of its own, which does not outlive the block it is used in."""

    def __init__(self, bench: Bench, *words: object, piped: bool = False, limit_bytes: int | None = None) -> None:
        """`piped`: stderr is for reading from `process.stderr`; otherwise it goes to the log. `limit_bytes`: a hard limit of memory."""
        self.line = line_of(words)
        self._log = bench.work / LOG
        self._resources = ExitStack()
        self.limit = None if limit_bytes is None else self._resources.enter_context(limited(limit_bytes))
        self._stdout = self._resources.enter_context(tempfile.TemporaryFile("w+"))  # noqa: SIM115 - closed with the block
        with open(self._log, "a") as log:
            log.write(f"$ {self.line}\n")
            log.flush()
            self._said_from = log.tell()
            self.begun = time.monotonic()
            self.process = subprocess.Popen(
                [*(self.limit.words if self.limit else ()), sys.executable, "-c", PROGRAM, *map(str, words)],
                stdin=subprocess.DEVNULL,
                stdout=self._stdout,
                stderr=subprocess.PIPE if piped else log,
                text=True,
            )

    def said(self) -> str:
        """What it has written to its output so far; the place where it writes on is not moved."""
        return os.pread(self._stdout.fileno(), 1 << 20, 0).decode(errors="replace")

    def killed_after(self, seconds: float) -> bool:
        """Kill it `seconds` after its start, as a machine that loses power would; False where it was done before.

        Raises:
            BenchError: it failed.
        """
        try:
            self.process.wait(max(0.0, self.begun + seconds - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            return True
        self._check()
        return False

    def finished(self) -> Ran:
        """Wait for its end.

        Raises:
            BenchError: it failed.
        """
        _, status, usage = os.wait4(self.process.pid, 0)
        wall_s = time.monotonic() - self.begun
        self.process.returncode = os.waitstatus_to_exitcode(status)
        self._check()
        self._stdout.seek(0)
        peak = usage.ru_maxrss if sys.platform == "darwin" else usage.ru_maxrss * 1024
        if self.limit is None:
            return Ran(self.line, self._stdout.read(), wall_s, peak)
        return Ran(self.line, self._stdout.read(), wall_s, peak, self.limit.means, self.limit.peak_bytes())

    def _check(self) -> None:
        if self.process.returncode != 0:
            limit = f" under a hard limit of {self.limit}, which killed {self.limit.n_killed()}" if self.limit else ""
            raise BenchError(f"`{self.line}` ended with {self.process.returncode}{limit}: {self._last_words()}")

    def _last_words(self) -> str:
        with open(self._log, "rb") as log:
            log.seek(self._said_from)
            lines = log.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing."

    def __enter__(self) -> Command:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        if self.process.stderr is not None:
            self.process.stderr.close()
        self._resources.close()


def line_of(words: Sequence[object]) -> str:
    """A `fwdllama` command as one would type it."""
    return shlex.join(["fwdllama", *map(str, words)])


def run(bench: Bench, *words: object, limit_bytes: int | None = None) -> Ran:
    """Run a `fwdllama` command to its end, with `limit_bytes` under a hard limit of memory.

    Raises:
        BenchError: it failed, or memory cannot be limited here.
    """
    with Command(bench, *words, limit_bytes=limit_bytes) as command:
        return command.finished()


def in_child(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """What a function of a module returns when it is called in a new process; it and its values travel by pickle.

    Raises:
        BenchError: it raised something, whose traceback is the message, or the process died.
    """
    return peak_of(function, *args, **kwargs)[0]


def peak_of(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> tuple[R, int]:
    """What `in_child` returns, and the bytes that the process held at most.

    Raises:
        BenchError: as `in_child`.
    """
    context = get_context("spawn")  # not fork, which would copy whatever threads and locks there are here
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_call, args=(sending, function, args, kwargs), daemon=True)
    process.start()
    sending.close()
    try:
        try:
            failed, value, peak_bytes = receiving.recv()
        except EOFError:
            process.join()
            raise BenchError(f"{function.__name__} died with exit code {process.exitcode} and without a result.") from None
        process.join()
    except BaseException:
        process.kill()
        process.join()
        raise
    finally:
        receiving.close()
    if failed:
        raise BenchError(str(value))
    result: R = value
    return result, peak_bytes


def _call(sending: Connection, function: Callable[..., object], args: tuple[object, ...], kwargs: dict[str, object]) -> None:
    try:
        value = function(*args, **kwargs)
    except Exception as error:  # noqa: BLE001 - it is raised again on the other side
        sending.send((True, f"{error}\n{traceback.format_exc()}", 0))
    else:
        sending.send((False, value, _own_peak_bytes()))


def _own_peak_bytes() -> int:
    """The most that this process held since it became this program; `getrusage` would count what started it too."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), peak_memory_bytes())


def read_state(run_path: Path) -> dict[str, Any]:
    """The state of a run that no process is in."""
    state: dict[str, Any] = json.loads((run_path / "state.json").read_text())
    return state
