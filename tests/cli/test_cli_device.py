"""`--preset`, `--nice` and the limits of battery, heat and memory, as a user gives them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fwdllama.checkpoint import State
from fwdllama.cli.summary import Wanted
from fwdllama.cli.train import end
from fwdllama.errors import ResourceError
from fwdllama.session import Outcome

from .conftest import SMALL, Run

PROGRAM = "import sys; from fwdllama.cli.main import run; sys.exit(run(sys.argv[1:]))"


def script(folder: Path, name: str, text: str) -> None:
    path = folder / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.fixture
def phone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A phone whose battery is at `battery` percent, a file, and which logs its wake lock."""
    if list(Path("/sys/class/power_supply").glob("*")):
        pytest.skip("this machine has a battery of its own")
    (tmp_path / "battery").write_text("80")
    says = '{"percentage": %s, "plugged": "UNPLUGGED", "temperature": 30}'
    script(tmp_path, "termux-battery-status", f"printf '{says}' $(cat {tmp_path}/battery)")
    for name in ("termux-wake-lock", "termux-wake-unlock"):
        script(tmp_path, name, f"echo {name} >> {tmp_path}/log")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")


@pytest.mark.usefixtures("phone")
def test_a_preset_is_said_and_kept_and_what_is_given_wins(train: Run, tmp_path: Path) -> None:
    result = train("--preset", "phone-8gb", "--min-battery", "0.5", "--nice", 0)
    assert result.code == 0, result.err
    said = result.err.splitlines()[0]
    assert said == (
        "preset phone-8gb: --mmap --no-repack --kv-type f16 --n-batch 256 --max-temperature 80 --memory-budget 3072MB; "
        "given: --threads 1 --nice 0 --min-battery 0.5"
    )
    kept = json.loads((tmp_path / "adapter-run/run.json").read_text())["device"]
    assert kept == {"min_battery": 0.5, "max_temperature": 80.0, "nice": 0}
    engine = json.loads((tmp_path / "adapter-run/config.json").read_text())["engine"]
    assert (engine["mmap"], engine["repack"], engine["n_batch"], engine["n_threads"]) == (True, False, 256, 1)
    assert (tmp_path / "log").read_text().split() == ["termux-wake-lock", "termux-wake-unlock"]


def test_nice_gives_way_and_never_takes_back() -> None:
    """In a process of its own, because nobody can take it back."""
    program = """
import os
from fwdllama.cli.device import considerate
os.setpriority(os.PRIO_PROCESS, 0, 15)
for nice in (None, 0, 12, 17):
    with considerate({"nice": nice}, print):
        print(os.getpriority(os.PRIO_PROCESS, 0))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    level = int(done.stdout.split()[0])  # tests may be run with less priority than 15
    assert done.stdout.split() == [str(n) for n in (level, level, level, max(level, 17))], done.stderr


@pytest.mark.usefixtures("phone")
def test_a_run_on_a_low_battery_rests_before_anything_is_begun_and_ctrl_c_ends_it(model: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "battery").write_text("7")
    command = [sys.executable, "-c", PROGRAM, "train", "--model", model, "--data", data, "--out", "a.gguf", *SMALL]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen([*map(str, command)], stderr=subprocess.PIPE, text=True, env=environment) as child:
        assert child.stderr is not None
        assert child.stderr.readline() == "resting: the battery is at 7%, below 30%; training goes on by itself when that has changed\n"
        child.send_signal(signal.SIGINT)
        _, rest = child.communicate(timeout=60)
    assert (child.returncode, rest) == (130, "")
    assert not (tmp_path / "a-run").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--min-battery", "30"], "--min-battery is 30, but must be between 0 and 1."),
        (["--max-temperature", "400"], "--max-temperature is 400, but must be degrees Celsius between 0 and 150."),
        (["--nice", "20"], "Invalid value for '--nice': Input should be less than or equal to 19. See `fwdllama train --help`."),
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


def test_a_run_that_its_device_forbids_is_a_failure_that_says_how_to_go_on(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outcome = Outcome(State(step=2), {}, None, None)
    with pytest.raises(ResourceError) as caught:
        end(adapter.parent / "adapter-run", outcome, Wanted(), "only 40.0 MiB of memory are free")
    assert str(caught.value) == (
        "only 40.0 MiB of memory are free, so training stopped before the system would have ended it. Close other programs, then go on as above."
    )
    assert "go on with: fwdllama resume adapter-run" in capsys.readouterr().err
