"""Training repeats to the bit, and goes on after any interruption as if there had been none."""

from __future__ import annotations

from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fwdllama.checkpoint import RunDirectory
from tests.test_trainer import INITIAL, METHODS, N_PROBES, CrashError, Oracle, config, trained

TIMES = ("elapsed_s", "decode_s", "tokens_per_s", "decode_fraction")


def result(path: Path) -> dict[str, Any]:
    """All that a run leaves but times."""
    with RunDirectory.open(path) as run:
        rows = [{k: v for k, v in row.items() if k not in TIMES} for row in run.metrics()]
        state = {k: v for k, v in asdict(run.state).items() if k not in TIMES}
        return {"state": state, "rows": rows, "theta": run.theta(INITIAL).tobytes(), "ledger": run.ledger.last}


@pytest.mark.parametrize("method", METHODS)
def test_two_runs_of_a_seed_are_bit_identical_and_of_two_seeds_are_not(tmp_path: Path, method: str) -> None:
    settings = config(**METHODS[method])
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        trained(tmp_path / name, settings.model_copy(update={"seed": seed}))
    assert result(tmp_path / "a") == result(tmp_path / "b")
    assert (tmp_path / "a" / "ledger.bin").read_bytes() == (tmp_path / "b" / "ledger.bin").read_bytes()
    assert result(tmp_path / "a")["ledger"] != result(tmp_path / "c")["ledger"]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("unbroken")
    for method, sections in METHODS.items():
        trained(folder / method, config(**sections))
    return {method: result(folder / method) for method in METHODS}


folders = count()


@settings(max_examples=25)
@given(st.sampled_from(list(METHODS)), st.lists(st.tuples(st.booleans(), st.integers(1, 90)), max_size=3))
@example("aligned", [(False, 17)])
@example("all three", [(True, 40), (True, 45)])
@example("variance", [(True, 1), (True, 70), (False, 20)])
@example("default", [(True, 20), (True, 19), (True, 21)])
def test_a_run_interrupted_anywhere_and_resumed_is_the_unbroken_one(
    tmp_path_factory: pytest.TempPathFactory, unbroken: dict[str, Any], method: str, ends: list[tuple[bool, int]]
) -> None:
    """Every process but the last ends at its n-th loss, killed or asked to stop after its n-th probe."""
    path = tmp_path_factory.getbasetemp() / f"broken-{next(folders)}"
    settings = config(**METHODS[method])
    for killed, n in ends:
        if killed:
            try:
                trained(path, settings, Oracle(crash_at=n))
            except CrashError:
                continue
        else:
            calls = count()
            trained(path, settings, stop=lambda calls=calls, n=n: next(calls) >= n)
    trained(path, settings)
    assert result(path) == unbroken[method]


def test_asked_to_stop_a_trainer_records_no_part_of_a_step(tmp_path: Path) -> None:
    assert trained(tmp_path / "run", config(), stop=lambda: True).step == 0
    calls = count()
    state = trained(tmp_path / "run", config(), stop=lambda: next(calls) > 20)
    assert (state.step, state.n_probes, state.finished) == (1, N_PROBES[0], None)
