"""The stopwatch of the tests lets a slow action fail, and only a slow one."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator

import pytest

from tests.stopwatch import quick

BAR_S = 0.01


def busy(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_an_action_that_is_always_slow_fails_with_all_times() -> None:
    with pytest.raises(pytest.fail.Exception, match=r"took 0\.0\d\d, 0\.0\d\d, 0\.0\d\d s of CPU time, but must take less than 0\.01 s in one run\."):
        quick(lambda: busy(BAR_S), within_s=BAR_S, n_runs=3)


def test_an_action_that_was_held_up_is_run_again_until_it_is_quick() -> None:
    waits: Iterator[float] = iter((2 * BAR_S, BAR_S, 0.0, 2 * BAR_S))
    quick(lambda: busy(next(waits)), within_s=BAR_S)
    assert list(waits) == [2 * BAR_S]


def test_time_spent_waiting_is_not_the_actions() -> None:
    assert quick(lambda: time.sleep(2 * BAR_S), within_s=BAR_S, n_runs=1) is None


@pytest.mark.parametrize("collecting", [True, False])
def test_nothing_is_collected_meanwhile_and_the_collector_is_as_before(collecting: bool) -> None:
    before = gc.isenabled()
    try:
        (gc.enable if collecting else gc.disable)()
        assert quick(gc.isenabled, within_s=1) is False
        with pytest.raises(ZeroDivisionError):
            quick(lambda: 1 // 0, within_s=1)
        assert gc.isenabled() is collecting
    finally:
        (gc.enable if before else gc.disable)()
