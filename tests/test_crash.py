"""Whatever write of a step a crash or a full disk stops, the step before or the step itself is on disk, and goes on."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fwdllama.checkpoint import RunDirectory, write_atomically
from fwdllama.errors import ResourceError, RunError
from tests.test_checkpoint import FACTS, INITIAL, assert_at, entry, new_run, record, row, theta_after

KILLED = """
import os, shutil, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from fwdllama.checkpoint import RunDirectory
from tests.test_checkpoint import record
root = Path(sys.argv[1])
events = []
def watch(event, args):
    if not events or not args or str(root) not in str(args[0]):
        return
    if event == "os.rename" or event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR):
        events[0] -= 1
        if not events[0]:
            os._exit(9)
sys.addaudithook(watch)
for n in range(1, 30):
    shutil.copytree(root / "before", root / str(n))
    if (child := os.fork()) == 0:
        with RunDirectory.open(root / str(n)) as run:
            events.append(n)
            record(run, snapshot=True)
            os._exit(0)
    if os.waitpid(child, 0)[1] == 0:
        print(n)
        break
"""


def test_a_process_killed_before_any_of_a_steps_writes_leaves_the_step_before_or_the_step(tmp_path: Path) -> None:
    new_run(tmp_path / "before", 2).close()
    arguments = [sys.executable, "-c", KILLED, str(tmp_path), str(Path(__file__).resolve().parents[1])]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True, timeout=60)
    n_writes = int(done.stdout) - 1
    assert n_writes >= 6  # ledger, metrics, two each for state and snapshot
    reached = [json.loads((tmp_path / str(n) / "state.json").read_text())["step"] for n in range(1, n_writes + 2)]
    assert reached == sorted(reached)
    assert (reached[0], reached[-1]) == (2, 3)
    for n, n_steps in enumerate(reached, start=1):
        assert_at(tmp_path / str(n), n_steps)


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("torn") / "run"
    new_run(path, 2).close()
    return path


@pytest.fixture(scope="module")
def three_steps(two_steps: Path) -> Path:
    path = two_steps.with_name("three")
    shutil.copytree(two_steps, path)
    with RunDirectory.open(path) as run:
        record(run, snapshot=True)
    return path


N_FRAME = 12 + 3 * 12 + 32
N_ROW = len(json.dumps(row(2))) + 1


@settings(max_examples=30)
@given(st.integers(0, N_FRAME), st.just(0))
@example(N_FRAME, 0)
@example(N_FRAME, 1)
@example(N_FRAME, N_ROW - 1)
@example(N_FRAME, N_ROW)
def test_a_torn_write_leaves_the_step_before(
    two_steps: Path, three_steps: Path, n_of_ledger: int, n_of_metrics: int
) -> None:
    """All that is written of the third step is some bytes of its frame, or all of them and some of its metrics."""
    path = two_steps.with_name("torn")
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(two_steps, path)
    for name, n in (("ledger.bin", n_of_ledger), ("metrics.jsonl", n_of_metrics)):
        before = (two_steps / name).stat().st_size
        assert (three_steps / name).stat().st_size == before + {"ledger.bin": N_FRAME, "metrics.jsonl": N_ROW}[name]
        (path / name).write_bytes((three_steps / name).read_bytes()[: before + n])
    assert_at(path, 2)


@contextmanager
def files_limited_to(size_bytes: int) -> Iterator[None]:
    """Every write beyond that fails, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(("limit", "reached"), [(250, 2), (1_000, 2), (6_000, 2), (24_000, 3)])
def test_a_full_disk_loses_nothing_whichever_write_it_stops(tmp_path: Path, limit: int, reached: int) -> None:
    """The files of a step are made so large that the limit meets the ledger, the metrics, the state or the snapshot."""
    run = RunDirectory.create(tmp_path / "run", "{}", FACTS, b"adapter")
    for _ in range(2):
        record(run)
    big = np.zeros(8_000, np.float32)
    after = replace(run.state, n_probes=9, finished="x" * 10_000)
    with files_limited_to(limit), pytest.raises(ResourceError) as caught:
        run.record(entry(2), big, after, row(2, note="x" * 3_000), snapshot=True)
    assert "File too large" in str(caught.value)
    assert str(tmp_path / "run") in str(caught.value)
    run.close()
    if reached == 3:
        with RunDirectory.open(tmp_path / "run") as run:
            assert (run.state.step, run.state.finished) == (3, "x" * 10_000)
            assert np.array_equal(run.theta(INITIAL), theta_after(3))
    else:
        assert_at(tmp_path / "run", reached)
    assert [p.name for p in (tmp_path / "run").iterdir() if p.name.startswith(".") and p.name != ".lock"] == []


def test_a_step_that_a_full_disk_stopped_can_be_recorded_once_there_is_room(tmp_path: Path) -> None:
    with new_run(tmp_path / "run", 2) as run:
        with files_limited_to(250), pytest.raises(ResourceError, match=r"step 2 cannot be written \(File too large\)"):
            record(run)
        record(run)
    assert_at(tmp_path / "run", 3)


def test_an_atomic_write_leaves_the_old_content_or_the_new(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")
    with (
        files_limited_to(5),
        pytest.raises(ResourceError, match=r"file cannot be written: File too large\. What was there"),
    ):
        write_atomically(path, b"newer and longer")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("file", b"old")]
    with pytest.raises(ResourceError, match="No such file or directory"):
        write_atomically(tmp_path / "nowhere" / "file", b"")


def test_a_run_whose_creation_was_cut_short_can_be_created_again(tmp_path: Path) -> None:
    with files_limited_to(12), pytest.raises(ResourceError):
        new_run(tmp_path / "run")
    assert not (tmp_path / "run" / "run.json").exists()
    new_run(tmp_path / "run", 2).close()
    assert_at(tmp_path / "run", 2)


def test_a_ledger_with_steps_is_never_taken_for_a_creation_that_was_cut_short(tmp_path: Path) -> None:
    new_run(tmp_path / "run", 1).close()
    (tmp_path / "run" / "run.json").unlink()
    for name in ("metrics.jsonl", "snapshot.npz", "state.json"):
        (tmp_path / "run" / name).unlink(missing_ok=True)
    ledger = (tmp_path / "run" / "ledger.bin").read_bytes()
    with pytest.raises(RunError, match="is not empty"):
        new_run(tmp_path / "run")
    assert (tmp_path / "run" / "ledger.bin").read_bytes() == ledger
