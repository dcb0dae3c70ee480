"""`model`, `doctor` and `calibrate`: what is there, and whether it will do."""

from __future__ import annotations

from pathlib import Path

import pytest

from fwdllama.calibration import Calibration
from fwdllama.cli.calibrate import advice
from fwdllama.registry import REGISTRY

from .conftest import Run


def test_models_are_listed_for_people_and_programs(run: Run) -> None:
    shown, found = run("model", "list"), run("model", "list", "--json").json
    assert [row["name"] for row in found] == list(REGISTRY)
    assert all(row["fetched"] == {} for row in found)
    for name in REGISTRY:
        assert name in shown.out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["some.gguf"], "some.gguf: only smollm2-135m, gemma3-270m or hf:owner/repo/file.gguf can be fetched"),
        (["smollm2-135m", "--variant", "int3"], "smollm2-135m has no variant 'int3'; choose int8 or fp16 or int4."),
        (["hf:owner"], "hf:owner: write hf:owner/repo/file.gguf."),
    ],
)
def test_what_cannot_be_fetched_is_refused_without_a_download(run: Run, arguments: list[str], sentence: str) -> None:
    result = run("model", "fetch", *arguments)
    assert result.code == 2
    assert sentence in result.error
    assert result.out == ""


def test_doctor_says_what_is_missing_and_fails_for_it(run: Run) -> None:
    result = run("doctor")
    assert result.code == 1
    assert "fwdllama model fetch smollm2-135m" in result.out
    checks = {check["name"]: check for check in run("doctor", "--json").json}
    assert checks["python"]["ok"] is True
    assert checks["models"]["ok"] is False


def test_calibration_is_shown_with_its_units_and_advice(run: Run, model: Path, data: Path) -> None:
    arguments = ("calibrate", "--model", model, "--data", data, "--layers", "1-2", "--threads", 1, "--held-out", 4)
    found = run(*arguments, "--json").json
    assert found["eps"] > 0
    assert found["snr"] >= 1
    assert found["probes_per_s"] > 0
    shown = run(*arguments)
    for name in ("noise floor", "slope", "curvature", "eps", "speed", "advice"):
        assert any(line.startswith(name) for line in shown.out.splitlines())
    assert "probes a second" in shown.out


def test_an_eps_below_the_noise_floor_is_refused(run: Run, model: Path, data: Path) -> None:
    result = run("calibrate", "--model", model, "--data", data, "--layers", "1-2", "--threads", 1, "--eps", 1e-12)
    assert result.code == 1
    assert "eps 1e-12 is below the noise floor" in result.error
    assert result.out == ""


@pytest.mark.parametrize(
    ("snr", "curvature", "words"),
    [(1.5, 1.0, "hardly stand above the rounding"), (6.0, 1e6, "bends more than it slopes"), (6.0, 1.0, "stand clear")],
)
def test_advice_follows_noise_then_curvature(snr: float, curvature: float, words: str) -> None:
    assert words in advice(Calibration(eps=0.01, noise=0.01, slope_rms=6.0, curvature=curvature, snr=snr))
