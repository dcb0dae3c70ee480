"""Functions and commands in processes of their own: their results, memory, time and deaths."""

from __future__ import annotations

import math
import os

import pytest
from fwdllama_eval.bench.child import Command, in_child, run
from fwdllama_eval.bench.measure import Bench, BenchError


def test_a_function_in_a_child_returns_fails_or_dies() -> None:
    assert in_child(math.sqrt, 16.0) == 4.0
    with pytest.raises(BenchError, match="invalid literal for int"):
        in_child(int, "x")
    with pytest.raises(BenchError, match="_exit died with exit code 3 and without a result"):
        in_child(os._exit, 3)


def test_a_command_that_fails_gives_its_last_words(bench: Bench) -> None:
    with pytest.raises(BenchError, match=r"`fwdllama train --model absent` ended with 2: error: Missing option"):
        run(bench, "train", "--model", "absent")


def test_a_command_has_its_own_memory_and_time(bench: Bench) -> None:
    ran = run(bench, "--version")
    assert ran.stdout.startswith("fwdllama ")
    assert 0.0 < ran.wall_s < 60.0
    assert 1 << 20 < ran.peak_bytes < 1 << 30


def test_a_command_is_killed_at_its_moment_or_was_done_before(bench: Bench) -> None:
    with Command(bench, "--version") as killed:
        assert killed.killed_after(0.0)
    with Command(bench, "--version") as done:
        assert not done.killed_after(60.0)
