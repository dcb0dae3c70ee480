"""`gguf plan`: memory before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from .conftest import Run


def test_items_add_up_to_the_peak_and_to_what_is_printed(run: Run, model: Path) -> None:
    found = run("gguf", "plan", model, "--memory", "64GB", "--json").json
    for task in ("eval", "train"):
        peak = next(phase for phase in found[task]["phases"] if phase["name"] == found[task]["peak_phase"])
        assert sum(item["size_bytes"] for item in peak["items"]) == peak["total_bytes"] == found[task]["peak_bytes"]
        assert found[task]["peak_bytes"] == max(phase["total_bytes"] for phase in found[task]["phases"])
        assert peak["items"][0]["size_bytes"] > 20 << 20  # an interpreter with its libraries
    [fit] = found["fits"]
    assert fit["memory_bytes"] == 64 << 30
    assert fit["eval"] == {"fits": True, "options": [], "peak_bytes": found["eval"]["peak_bytes"], "mapped_bytes": 0}
    shown = run("gguf", "plan", model, "--memory", "64GB").out
    assert "KV cache of the model, 8 x 1024 tokens in f16" in shown
    assert "eval fits in 64GB: yes, as it is (" in shown


def test_without_memory_this_machine_and_two_phones_are_compared(run: Run, model: Path) -> None:
    found = run("gguf", "plan", model, "--json").json
    assert [fit["memory"] for fit in found["fits"]] == ["this machine", "8GB", "6GB"]


def test_a_memory_that_nothing_fits_is_said_with_what_would(run: Run, model: Path) -> None:
    shown = run("gguf", "plan", model, "--memory", "1MB")
    assert shown.code == 0
    assert "train fits in 1MB: no; the smallest setting, --" in shown.out


def test_options_reach_the_plan(run: Run, model: Path) -> None:
    words = ("--ctx", 512, "--batch", 2, "--kv", "q8_0", "--mmap", "--no-repack", "--from-layer", 1, "--held-out", 3, "--memory", "8GB")
    found = run("gguf", "plan", model, *words, "--json").json
    names = [item["name"] for item in found["train"]["phases"][-1]["items"]]
    assert "KV cache of layers 1 to 2, 15 x 512 tokens in q8_0" in names
    assert "weights of layers 1 to 2, mapped from the file" in names


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--memory", "much"], "--memory is 'much', but must be a size such as 8GB or 700MB."),
        (["--memory", "0GB"], "--memory is '0GB', but must be a size such as 8GB or 700MB."),
        (["--kv", "f8"], "the KV cache type 'f8' is not one of f16, f32, q8_0, q5_1, q5_0, q4_1, q4_0."),
        (["--from-layer", "3"], "--from-layer is 3, but {model} has layers 0 to 2."),
        (["--scope", "some"], "--scope is 'some', but must be answer or all."),
    ],
)
def test_what_cannot_be_planned_is_refused(run: Run, model: Path, words: list[str], sentence: str) -> None:
    result = run("gguf", "plan", model, *words)
    assert result.code == 2
    assert result.error == sentence.format(model=model)
    assert result.out == ""
