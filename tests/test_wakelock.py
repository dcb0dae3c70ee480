"""A phone is kept awake while work goes on, by the commands that Termux has for it; what they cannot do is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from fwdllama.wakelock import LOCK, UNLOCK, awake


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of commands, which is all of the path but for what a shell needs."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return folder


def command(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)


def test_the_lock_is_held_while_work_goes_on_and_let_go_whatever_ends_it(commands: Path, tmp_path: Path) -> None:
    said: list[str] = []
    for name in (LOCK, UNLOCK):
        command(commands, name, f"echo {name} >> {tmp_path}/log")
    with awake(said.append):
        assert (tmp_path / "log").read_text().split() == [LOCK]
    assert (tmp_path / "log").read_text().split() == [LOCK, UNLOCK]
    with pytest.raises(KeyboardInterrupt), awake(said.append):
        raise KeyboardInterrupt
    assert (tmp_path / "log").read_text().split() == [LOCK, UNLOCK] * 2
    assert said == []


def test_where_there_is_no_such_command_nothing_is_done_or_said(commands: Path) -> None:
    said: list[str] = []
    with awake(said.append):
        pass
    assert said == []


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("echo Failed to acquire wake lock >&2", "Failed to acquire wake lock"),
        ("exit 3", "termux-wake-lock failed with 3"),
    ],
)
def test_a_lock_that_cannot_be_had_is_told_and_work_goes_on(commands: Path, tmp_path: Path, text: str, problem: str) -> None:
    said: list[str] = []
    command(commands, LOCK, text)
    command(commands, UNLOCK, f"touch {tmp_path}/unlocked")
    with awake(said.append):
        pass
    assert said == [f"warning: no wake lock ({problem}), so Android may stop this when the screen is dark; keep it on"]
    assert not (tmp_path / "unlocked").exists()
