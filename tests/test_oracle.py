"""The quadratic fake is a real oracle with known losses and gradients, and the method stands without llama.cpp."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from fwdllama.errors import DataError
from fwdllama.oracle import LossOracle, QuadraticOracle
from fwdllama.types import Encoded

CENTRES = np.array([[0.0, 0.0], [1.0, -2.0], [4.0, 4.0]])
CURVATURE = np.array([1.0, 3.0])
METHOD = "direction", "space", "estimator", "step", "pacing", "sampler", "ledger", "loss", "oracle", "errors", "types"


def loaded(*first_tokens: int) -> QuadraticOracle:
    oracle = QuadraticOracle(CENTRES, CURVATURE)
    oracle.load([Encoded(str(i), (i,), (), (0,)) for i in first_tokens])
    return oracle


def test_the_quadratic_oracle_is_a_loss_oracle() -> None:
    oracle: LossOracle = loaded(0)
    assert oracle.losses().dtype == np.float64


def test_losses_are_half_the_curved_square_of_the_distance_to_the_examples_centre() -> None:
    oracle = loaded(0, 1, 2)
    oracle.write(np.array([2.0, 1.0], np.float32))
    assert oracle.losses().tolist() == [0.5 * (4 + 3 * 1), 0.5 * (1 + 3 * 9), 0.5 * (4 + 3 * 9)]


def test_rows_are_answered_in_the_order_asked_and_may_repeat() -> None:
    oracle = loaded(0, 1, 2)
    oracle.write(np.array([2.0, 1.0], np.float32))
    every = oracle.losses().tolist()
    assert oracle.losses([2, 0, 2]).tolist() == [every[2], every[0], every[2]]


def test_an_examples_first_prompt_token_picks_its_centre_in_turn() -> None:
    oracle = loaded(2, 4)
    oracle.write(np.array([4.0, 4.0], np.float32))
    assert oracle.losses().tolist() == [0.0, 0.5 * (9 + 3 * 36)]


def test_a_row_left_empty_has_no_loss() -> None:
    oracle = loaded(0)
    oracle.load([Encoded("a", (1,), (), (0,)), None, Encoded("b", (2,), (), (0,))])
    assert oracle.losses().tolist() == oracle.losses([0, 2]).tolist() == [0.5 * (1 + 3 * 4), 0.5 * (16 + 3 * 16)]
    with pytest.raises(DataError, match=r"^row 1 of the batch is empty\.$"):
        oracle.losses([0, 1])


def test_a_batch_replaces_the_one_before() -> None:
    oracle = loaded(0, 1)
    oracle.load([Encoded("x", (2,), (), (0,))])
    assert len(oracle.losses()) == 1


def test_the_gradient_is_what_a_small_central_difference_gives() -> None:
    oracle = loaded(1, 2)
    theta = np.array([0.5, 0.25], np.float32)
    for i in range(2):
        side = np.eye(2, dtype=np.float32)[i] * np.float32(0.25)
        oracle.write(theta + side)
        plus = oracle.losses()
        oracle.write(theta - side)
        minus = oracle.losses()
        oracle.write(theta)
        assert [oracle.gradient(row)[i] for row in range(2)] == ((plus - minus) / 0.5).tolist()


def test_evaluations_are_counted_by_example() -> None:
    oracle = loaded(0, 1, 2)
    oracle.losses()
    oracle.losses([1])
    assert oracle.n_evaluations == 4


def imported(modules: tuple[str, ...]) -> bool:
    """Whether llama_cpp is loaded in a fresh interpreter that imported `modules`."""
    code = f"import sys\nimport {', '.join(modules)}\nsys.exit('llama_cpp' in sys.modules)"
    return subprocess.run([sys.executable, "-c", code], check=False).returncode != 0


def test_the_method_does_not_import_llama_cpp() -> None:
    assert not imported(tuple(f"fwdllama.{name}" for name in METHOD))


def test_that_test_would_notice() -> None:
    assert imported(("fwdllama.oracle", "llama_cpp"))
