"""Other commands of this program, as processes that end with the one that started them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import IO

from fwdllama.errors import RunError

PROGRAM = "from fwdllama.cli.main import main; main()"
PATIENCE_S = 15.0  # for a process that was asked to end


class Player:
    """One command: its standard output is read here, its standard error is kept in a file."""

    def __init__(self, log: Path, *words: object) -> None:
        self.words, self.log = [str(word) for word in words], log
        self._errors: IO[str] = log.open("w")
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *self.words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            start_new_session=True,  # Ctrl-C is for the one who started it, who then ends all in order
        )

    def line(self) -> str:
        """The next line of its output.

        Raises:
            RunError: it ended; its last words.
        """
        assert self.process.stdout is not None
        text = self.process.stdout.readline()
        if not text:
            self.process.wait()
            raise self.failure()
        return text

    def failure(self) -> RunError:
        """Why it ended."""
        last = (self.log.read_text().strip().splitlines() or ["it said nothing"])[-1]
        return RunError(f"`fwdllama {self.words[0]}` ended with {self.process.returncode}: {last.removeprefix('error: ')} (all of it: {self.log})")

    def end(self) -> None:
        """Ask it to end, and wait; kill it, where it does not."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(PATIENCE_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()
        self._errors.close()


class Troupe:
    """Processes that are ended, the last one first, when the context is left."""

    def __init__(self) -> None:
        self.players: list[Player] = []

    def play(self, log: Path, *words: object) -> Player:
        """Start a command."""
        self.players.append(Player(log, *words))
        return self.players[-1]

    def __enter__(self) -> Troupe:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for player in reversed(self.players):
            player.end()
