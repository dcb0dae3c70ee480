"""A run directory is whole after any crash: the step before or the step itself, never something in between."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fwdllama.checkpoint import RunDirectory, genesis_of, read_facts, read_metrics
from fwdllama.errors import ResourceError, RunError
from fwdllama.ledger import Entry, read_ledger, replay

FACTS: dict[str, Any] = {"identity": {"base model": "abc", "n_params": 40}, "files": {"model": "m.gguf"}}
INITIAL = np.zeros(40, np.float32)


def entry(step: int) -> Entry:
    rng = np.random.default_rng(step)
    return Entry(step, rng.integers(0, 2**63, 3).astype(np.uint64), rng.standard_normal(3).astype(np.float32))


def theta_after(n_steps: int) -> NDArray[np.float32]:
    return replay(INITIAL, [entry(step) for step in range(n_steps)])


def row(step: int, **more: Any) -> dict[str, Any]:
    return {"step": step, "loss": 1.0 / (step + 1), **more}


def record(run: RunDirectory, *, snapshot: bool = False, metrics: dict[str, Any] | None = None, **state: Any) -> None:
    step = run.state.step
    after = replace(run.state, n_probes=3 * (step + 1), **state)
    run.record(entry(step), theta_after(step + 1), after, metrics or row(step), snapshot=snapshot)


def new_run(path: Path, n_steps: int = 0) -> RunDirectory:
    run = RunDirectory.create(path, '{"seed": 0}', FACTS, b"adapter")
    for step in range(n_steps):
        record(run, snapshot=step % 2 == 1)
    return run


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps, to be copied."""
    path = tmp_path_factory.mktemp("saved") / "run"
    new_run(path, 4).close()
    return path


def copy_of(saved: Path, path: Path) -> Path:
    return Path(shutil.copytree(saved, path))


def assert_at(path: Path, n_steps: int) -> None:
    """The run opens at `n_steps`, agrees with itself, and goes on as any other would."""
    with RunDirectory.open(path) as run:
        assert (run.state.step, run.state.n_probes, run.ledger.n_steps) == (n_steps, 3 * n_steps, n_steps)
        assert run.state.ledger == run.ledger.last.hex()
        assert [metrics["step"] for metrics in run.metrics()] == list(range(n_steps))
        assert np.array_equal(run.theta(INITIAL), theta_after(n_steps))
        record(run, snapshot=True)
    done = range(n_steps + 1)
    genesis = genesis_of(read_facts(path))
    assert [e.payload() for e in read_ledger(path / "ledger.bin", genesis)] == [entry(i).payload() for i in done]
    with RunDirectory.open(path) as run:
        assert np.array_equal(run.theta(INITIAL), theta_after(n_steps + 1))
        assert read_metrics(path) == [row(step) for step in done]


def test_a_run_is_found_again_as_it_was_left(tmp_path: Path) -> None:
    with new_run(tmp_path / "deep" / "run", 3) as run:
        left = run.state
    assert (tmp_path / "deep" / "run" / "config.json").read_text() == '{"seed": 0}'
    assert (tmp_path / "deep" / "run" / "initial.gguf").read_bytes() == b"adapter"
    facts = read_facts(tmp_path / "deep" / "run")
    assert facts.items() >= FACTS.items()
    with RunDirectory.open(tmp_path / "deep" / "run") as run:
        assert run.state == left
        assert (left.step, left.n_probes) == (3, 9)
        run.save(replace(run.state, finished="done", best_loss=1.5))
        assert (run.state.finished, run.state.best_loss, run.state.ledger) == ("done", 1.5, left.ledger)
    assert_at(tmp_path / "deep" / "run", 3)


def test_theta_after_any_step_is_the_ledgers_replay_with_and_without_a_snapshot(saved: Path, tmp_path: Path) -> None:
    with RunDirectory.open(copy_of(saved, tmp_path / "run")) as run:
        for _ in range(2):
            for step in range(5):
                assert np.array_equal(run.theta(INITIAL, step), theta_after(step))
            (tmp_path / "run" / "snapshot.npz").unlink(missing_ok=True)


def test_a_snapshot_of_the_same_ledger_saves_the_replay(saved: Path, tmp_path: Path) -> None:
    with RunDirectory.open(copy_of(saved, tmp_path / "run")) as run:
        marked = {**np.load(tmp_path / "run" / "snapshot.npz")}
        np.savez(tmp_path / "run" / "snapshot.npz", **{**marked, "theta": marked["theta"] + np.float32(1)})
        assert np.array_equal(run.theta(INITIAL), theta_after(4) + np.float32(1))


@pytest.mark.parametrize("change", [{"step": 3}, {"ledger": np.zeros(32, np.uint8)}, {"theta": np.ones(7, np.float32)}])
def test_a_snapshot_of_anything_else_is_ignored(saved: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    with RunDirectory.open(copy_of(saved, tmp_path / "run")) as run:
        held = {**np.load(tmp_path / "run" / "snapshot.npz"), "theta": np.ones(40, np.float32)}
        np.savez(tmp_path / "run" / "snapshot.npz", **{**held, **change})
        assert np.array_equal(run.theta(INITIAL), theta_after(4))


@pytest.mark.parametrize("content", [b"", b"no zip", b"PK\x03\x04", "cut", "flipped", "without theta"])
def test_a_damaged_snapshot_is_ignored_because_it_only_saves_time(saved: Path, tmp_path: Path, content: bytes | str) -> None:
    with RunDirectory.open(copy_of(saved, tmp_path / "run")) as run:
        path = tmp_path / "run" / "snapshot.npz"
        whole = path.read_bytes()
        if content == "without theta":
            np.savez(path, step=4)
        elif content == "flipped":
            middle = whole.index(theta_after(4).tobytes())
            path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
        else:
            path.write_bytes(content if isinstance(content, bytes) else whole[: len(whole) // 2])
        assert np.array_equal(run.theta(INITIAL), theta_after(4))


OTHER = "import sys, pathlib, fwdllama.checkpoint as c; c.RunDirectory.open(pathlib.Path(sys.argv[1]))"


def test_one_run_takes_one_process(tmp_path: Path) -> None:
    with new_run(tmp_path / "run", 1):
        with pytest.raises(RunError, match=r"run is in use by another process; one run takes one process\.$"):
            RunDirectory.open(tmp_path / "run")
        other = subprocess.run(
            [sys.executable, "-c", OTHER, str(tmp_path / "run")],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])},
            timeout=60,
        )
        assert "RunError" in other.stderr
        assert "is in use by another process" in other.stderr
    assert_at(tmp_path / "run", 1)
    run = RunDirectory.open(tmp_path / "run")
    run.close()
    run.close()


def test_a_failed_opening_lets_others_in(tmp_path: Path) -> None:
    new_run(tmp_path / "run", 1).close()
    state = (tmp_path / "run" / "state.json").read_text()
    (tmp_path / "run" / "state.json").write_text("damage")
    with pytest.raises(RunError):
        RunDirectory.open(tmp_path / "run")
    (tmp_path / "run" / "state.json").write_text(state)
    assert_at(tmp_path / "run", 1)


def test_a_directory_with_something_in_it_is_not_made_a_run(tmp_path: Path) -> None:
    new_run(tmp_path / "run").close()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").touch()
    for path, name in ((tmp_path / "run", "config.json|run.json"), (tmp_path / "notes", "mine.txt")):
        with pytest.raises(RunError, match=rf"is not empty \(({name})\): continue it with `fwdllama resume .*`, or choose"):
            new_run(path)
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"file is a file; a run needs a folder of its own\.$"):
        new_run(tmp_path / "file")
    with pytest.raises(ResourceError, match=r"run cannot be made a run directory: Not a directory\.$"):
        new_run(tmp_path / "file" / "run")
    assert [p.name for p in (tmp_path / "notes").iterdir()] == ["mine.txt"]


def test_what_is_no_run_directory_is_said_to_be_none(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(RunError, match=r"is not a run directory: it has no run\.json\. Start one with `fwdllama train"):
            RunDirectory.open(path)


DAMAGE: dict[str, list[Any]] = {
    "run.json": [b"", b"{}", b"[]", b"7", b"\xff", b'{"identity": {}, "initial_adapter_sha256": 1', b"null"],
    "state.json": [
        b"",
        b"{}",
        b"[]",
        b"null",
        b"\xff",
        b'{"step": 9}',
        b'{"stride": 1}',
        b'{"step": "two"}',
        b'{"step": 1.5}',
        b'{"step": -1}',
    ],
    "metrics.jsonl": [b"\n", b"no json\n", b"[]\n", b"{}\n", b"\xff\n", b'{"step": "two"}\n', b"\x00\x00\n", b"7\n"],
    "ledger.bin": [b"", b"FWDLEDG1", b"nothing" * 20],
}


@pytest.mark.parametrize(("name", "content"), [(name, content) for name, all_ in DAMAGE.items() for content in all_])
def test_a_damaged_file_is_named_in_a_sentence(saved: Path, tmp_path: Path, name: str, content: bytes) -> None:
    copy_of(saved, tmp_path / "run")
    (tmp_path / "run" / name).write_bytes(content)
    with pytest.raises(RunError, match=rf"{name}.*(damaged|does not contain|is not a ledger).*\.$"):
        RunDirectory.open(tmp_path / "run")


@pytest.mark.parametrize("name", ["state.json", "ledger.bin"])
def test_a_missing_file_is_named_in_a_sentence(saved: Path, tmp_path: Path, name: str) -> None:
    copy_of(saved, tmp_path / "run")
    (tmp_path / "run" / name).unlink()
    with pytest.raises(RunError, match=name):
        RunDirectory.open(tmp_path / "run")


def test_files_of_two_runs_are_not_mixed(tmp_path: Path) -> None:
    new_run(tmp_path / "run", 2).close()
    with RunDirectory.create(tmp_path / "other", "{}", {"identity": {"base model": "def"}}, b"adapter") as other:
        record(other)
    shutil.copy(tmp_path / "other" / "ledger.bin", tmp_path / "run")
    with pytest.raises(RunError, match=r"ledger\.bin belongs to another model or configuration"):
        RunDirectory.open(tmp_path / "run")
    shutil.copy(tmp_path / "run" / "state.json", tmp_path / "other")
    with pytest.raises(RunError, match=r"state\.json is at step 2, which ledger\.bin does not contain"):
        RunDirectory.open(tmp_path / "other")


def test_the_genesis_follows_from_identity_and_initial_adapter_alone() -> None:
    facts = {**FACTS, "initial_adapter_sha256": "00"}
    assert genesis_of(facts) == genesis_of({**facts, "files": {}})
    assert genesis_of(facts) != genesis_of({**facts, "initial_adapter_sha256": "01"})
    assert genesis_of(facts) != genesis_of({**facts, "identity": {}})


def test_metrics_are_lines_of_json_and_a_torn_last_one_is_left_out(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []
    new_run(tmp_path / "run", 2).close()
    file = tmp_path / "run" / "metrics.jsonl"
    assert [json.loads(line) for line in file.read_text().splitlines()] == [row(0), row(1)]
    file.write_text(file.read_text() + '{"step": 2, "lo')
    assert read_metrics(tmp_path / "run") == [row(0), row(1)]


def test_the_state_on_disk_is_the_state(tmp_path: Path) -> None:
    with new_run(tmp_path / "run", 1) as run:
        assert json.loads((tmp_path / "run" / "state.json").read_text()) == asdict(run.state)
