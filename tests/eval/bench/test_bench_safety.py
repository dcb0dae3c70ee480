"""Runs that are killed: when, and that what is resumed is the same to the byte."""

from __future__ import annotations

from fwdllama_eval.bench import directions, safety
from fwdllama_eval.bench.measure import Bench
from hypothesis import given
from hypothesis import strategies as st

from .conftest import values

SMALL = ("--units", "2", "--per-unit", "2", "--fresh", "1", "--held-out", "4", "--rounds", "2", "--threads", "1")


@given(n=st.integers(1, 30), seed=st.integers(0, 1000), span=st.floats(0.1, 1e4))
def test_kills_are_spread_over_the_whole_span(n: int, seed: int, span: float) -> None:
    moments = safety.kill_moments(n, seed, span)
    assert moments == safety.kill_moments(n, seed, span)
    parts = sorted(moments)
    assert all(part / n * span <= moment <= (part + 1) / n * span for part, moment in enumerate(parts))


def test_killed_run_that_is_resumed_equals_the_unbroken_one(bench: Bench) -> None:
    found = safety.kill(bench, n_kills=2, small=("--steps", "3", *SMALL)).figures
    assert found["identical"] is True
    assert found["kills"] == len(found["moments"]) == 2


def test_a_single_byte_makes_runs_differ(bench: Bench) -> None:
    folder = bench.fresh("run")
    directions.watched(values(1), bench.model, bench.train_data, folder)
    before = safety.digests(folder)
    ledger = folder / "run" / "ledger.bin"
    ledger.write_bytes(ledger.read_bytes()[:-1] + b"\0")
    assert safety.digests(folder)["ledger"] != before["ledger"]
    assert safety.digests(folder)["adapter"] == before["adapter"]
