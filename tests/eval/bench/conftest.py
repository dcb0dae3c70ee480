"""What the bench measures with here: a tiny model, data of two dozen questions, and items whose figures are given."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fwdllama_eval.bench.measure import DEV_FILE, TRAIN_FILE, Bar, Bench, Item, Measured

from gguf_tools.synth import write_tiny_llama
from tests.questions import squad


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("bench-model") / "tiny.gguf")


@pytest.fixture
def bench(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """The model, its data, and a cache of their own."""
    monkeypatch.setenv("FWDLLAMA_CACHE", str(tmp_path / "cache"))
    data, work = tmp_path / "data", tmp_path / "work"
    data.mkdir()
    work.mkdir()
    (data / TRAIN_FILE).write_text(json.dumps(squad(12, n_words=12, n_questions=2)))
    (data / DEV_FILE).write_text(json.dumps(squad(4, n_words=12, n_questions=2, seed=2)))
    return Bench(str(model), data, work)


def item(name: str, measure: Callable[[Bench], Measured], *bars: Bar, needs: tuple[Any, ...] = ()) -> Item:
    return Item(name, f"about {name}", bars, tuple(bar.figure for bar in bars), needs, 1, measure)


def gives(**figures: Any) -> Callable[[Bench], Measured]:
    return lambda bench: Measured(figures, "fwdllama something")


def values(steps: int) -> dict[str, Any]:
    """A configuration of few and small steps, by one thread."""
    return {
        "budget": {"steps": steps},
        "estimator": {"rounds": 2},
        "batch": {"units": 4, "per_unit": 2, "fresh": 1, "held_out": 4, "evaluate_every": 1},
        "step": {"accept": False},
        "engine": {"n_threads": 1},
    }
