from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fwdllama.cli.interrupt import Interrupt
from fwdllama.cli.train import stoppable
from fwdllama.config import BudgetConfig

from .conftest import SMALL, Run

N_STEPS = 50  # more than fit between a line of stderr and the signal that answers it


def test_a_run_stopped_by_ctrl_c_says_how_to_go_on_and_ends_as_the_unbroken_one(
    train: Run, run: Run, model: Path, data: Path
) -> None:
    unbroken = train("--run", "unbroken", "--steps", N_STEPS, "--json").json
    files = ["--model", str(model), "--data", str(data), "--out", "stopped.gguf"]
    command = ["train", *files, *SMALL, "--steps", str(N_STEPS), "--json"]
    program = f"import sys; from fwdllama.cli.main import run; sys.exit(run({command!r}))"
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        assert child.stderr is not None
        said = []
        for line in child.stderr:
            said.append(line)
            if line.startswith("step 2:"):
                child.send_signal(signal.SIGINT)
                break
        out, rest = child.communicate(timeout=60)
    assert child.returncode == 130, "".join([*said, rest])
    assert "stopping after this probe; press Ctrl-C again to end at once" in rest
    assert "go on with: fwdllama resume stopped-run" in rest
    stopped = json.loads(out)
    assert stopped["finished"] is None
    assert stopped["adapter"] is None
    assert 2 <= stopped["steps"] < N_STEPS
    assert not Path("stopped.gguf").exists()
    resumed = run("resume", "stopped-run", "--json").json
    assert resumed["steps"] == N_STEPS
    assert resumed["ledger_sha256"] == unbroken["ledger_sha256"]
    assert resumed["adapter"]["path"] == str(Path("stopped.gguf").absolute())


def test_resuming_a_finished_run_changes_nothing_and_writes_its_adapter(run: Run, adapter: Path) -> None:
    before, ledger = adapter.read_bytes(), (adapter.parent / "adapter-run" / "ledger.bin").read_bytes()
    result = run("resume", "adapter-run", "--out", "again/again.gguf")
    assert result.code == 0
    assert (adapter.parent / "again" / "again.gguf").read_bytes() == before
    assert (adapter.parent / "adapter-run" / "ledger.bin").read_bytes() == ledger


@pytest.mark.parametrize(("option", "value"), [("--steps", 3), ("--probes", 10)])
def test_a_finished_run_is_trained_on_by_what_is_given(run: Run, adapter: Path, option: str, value: int) -> None:
    before = json.loads((adapter.parent / "adapter-run" / "state.json").read_text())
    found = run("resume", "adapter-run", option, value, "--json").json
    if option == "--steps":
        assert found["steps"] == before["step"] + value
    else:
        assert found["probes"] >= before["n_probes"] + value
    assert found["finished"] == "the budget is used up"


def test_seconds_are_counted_from_where_the_run_is(run: Run, adapter: Path) -> None:
    before = json.loads((adapter.parent / "adapter-run" / "state.json").read_text())["elapsed_s"]
    found = run("resume", "adapter-run", "--seconds", 0.3, "--json").json
    assert found["elapsed_s"] >= before + 0.3
    assert found["steps"] > 2


def test_a_resumed_run_can_be_scored_and_reported(run: Run, adapter: Path, dev: Path) -> None:
    found = run("resume", "adapter-run", "--eval-data", dev, "--report", "r.html", "--json").json
    assert found["scores"]["n_questions"] == 9
    assert Path("r.html").read_text().startswith("<!")


def test_first_ctrl_c_asks_and_second_one_ends() -> None:
    said: list[str] = []
    before = signal.getsignal(signal.SIGINT)
    with Interrupt(said.append) as interrupt:
        interrupt.armed = True
        assert not interrupt.stop()
        signal.raise_signal(signal.SIGINT)
        assert said == [], "a handler that writes may interrupt another write"
        assert interrupt.stop()
        assert interrupt.stop()
        assert said == ["stopping after this probe; press Ctrl-C again to end at once"]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_before_the_first_probe_ends_at_once() -> None:
    with Interrupt(lambda text: None), pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_ending_at_once_says_how_to_go_on_where_there_is_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    budget = BudgetConfig(steps=1)
    for name, sentence in (("started", "fwdllama resume started"), ("absent", "")):
        if sentence:
            (tmp_path / name).mkdir()
            (tmp_path / name / "run.json").touch()
        with pytest.raises(KeyboardInterrupt), stoppable(Path(name), budget, {}):
            raise KeyboardInterrupt
        err = capsys.readouterr().err
        assert sentence in err
        assert bool(err) is bool(sentence)
