"""`--preset`, `--nice` and the limits of battery, heat and memory, as a user gives them."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from .conftest import SMALL, Run

PROGRAM = "import sys; from fwdllama.cli.main import run; sys.exit(run(sys.argv[1:]))"


def script(folder: Path, name: str, text: str) -> None:
    path = folder / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.fixture
def phone(tmp_path: Path) -> dict[str, str]:
    """The environment of a phone whose battery is at `battery` percent, a file, and which logs its wake lock."""
    if Path("/sys/class/power_supply").is_dir() and list(Path("/sys/class/power_supply").glob("*")):
        pytest.skip("this machine has a battery of its own")
    (tmp_path / "battery").write_text("80")
    says = '{"percentage": %s, "plugged": "UNPLUGGED", "temperature": 30}'
    script(tmp_path, "termux-battery-status", f"printf '{says}' $(cat {tmp_path}/battery)")
    for name in ("termux-wake-lock", "termux-wake-unlock"):
        script(tmp_path, name, f"echo {name} >> {tmp_path}/log")
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def test_a_preset_is_said_and_kept_and_what_is_given_wins(tmp_path: Path, model: Path, data: Path, phone: dict[str, str]) -> None:
    """In a process of its own, because nobody can take a nice level back."""
    command = ["train", "--model", model, "--data", data, "--out", "a.gguf", *SMALL, "--preset", "phone-8gb", "--min-battery", "0.5", "--json"]
    done = subprocess.run([sys.executable, "-c", PROGRAM, *map(str, command)], capture_output=True, text=True, env=phone, check=False)
    assert done.returncode == 0, done.stderr
    said = done.stderr.splitlines()[0]
    assert said.startswith("preset phone-8gb: --mmap --no-repack --kv-type f16 --n-batch 256 --nice 10 --max-temperature 80; given: --threads 1 ")
    assert "--min-battery 0.5" in said
    kept = json.loads((tmp_path / "a-run/run.json").read_text())["device"]
    assert kept == {"min_battery": 0.5, "max_temperature": 80.0, "nice": 10}
    engine = json.loads((tmp_path / "a-run/config.json").read_text())["engine"]
    assert (engine["mmap"], engine["repack"], engine["n_batch"], engine["n_threads"]) == (True, False, 256, 1)
    assert (tmp_path / "log").read_text().split() == ["termux-wake-lock", "termux-wake-unlock"]


def test_a_run_on_a_low_battery_rests_is_stopped_by_ctrl_c_and_goes_on(tmp_path: Path, model: Path, data: Path, phone: dict[str, str]) -> None:
    (tmp_path / "battery").write_text("7")
    command = ["train", "--model", model, "--data", data, "--out", "a.gguf", *SMALL]
    with subprocess.Popen([sys.executable, "-c", PROGRAM, *map(str, command)], stderr=subprocess.PIPE, text=True, env=phone) as child:
        assert child.stderr is not None
        assert child.stderr.readline() == "resting: the battery is at 7%, below 30%; training goes on by itself when that has changed\n"
        time.sleep(0.1)
        child.send_signal(signal.SIGINT)
        _, rest = child.communicate(timeout=60)
    assert (child.returncode, rest) == (130, "")
    assert not (tmp_path / "a-run").exists(), "it rested before anything was begun"
    (tmp_path / "battery").write_text("70")
    shell = shlex.join([sys.executable, "-c", PROGRAM, *map(str, command)])
    assert subprocess.run(shell, shell=True, env=phone, check=False, capture_output=True).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--min-battery", "30"], "--min-battery is 30, but must be between 0 and 1."),
        (["--max-temperature", "400"], "--max-temperature is 400, but must be degrees Celsius between 0 and 150."),
        (["--nice", "20"], "Invalid value for '--nice': 20 is not in the range 0<=x<=19. See `fwdllama train --help`."),
        (["--preset", "phone"], "'phone' is not one of 'phone-8gb', 'phone-6gb', 'laptop'. See `fwdllama train --help`."),
        (["--n-batch", "0"], "--n-batch: Input should be greater than or equal to 1 (got 0)."),
    ],
)
def test_what_cannot_be_is_a_usage_error(run: Run, model: Path, data: Path, arguments: list[str], sentence: str) -> None:
    result = run("train", "--model", model, "--data", data, "--out", "a.gguf", *arguments)
    assert result.code == 2
    assert result.error.endswith(sentence)
    assert not Path("a-run").exists()


def test_limits_of_a_resumed_run_are_those_it_was_started_with_unless_others_are_given(run: Run, adapter: Path) -> None:
    facts = adapter.parent / "adapter-run" / "run.json"
    told = json.loads(facts.read_text())
    facts.write_text(json.dumps({**told, "device": {"min_battery": 7}}))
    assert run("resume", "adapter-run").error == "--min-battery is 7, but must be between 0 and 1."
    assert run("resume", "adapter-run", "--min-battery", 0, "--steps", 1).code == 0
