"""The command line run as a user runs it, in this process, on a model and data small enough to train in a second."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fwdllama.cli import main
from gguf_tools.synth import write_tiny_llama

# Two steps of few probes, in the model's upper layers, by one thread.
SMALL = [
    "--layers",
    "1-2",
    "--units",
    "2",
    "--per-unit",
    "2",
    "--fresh",
    "1",
    "--held-out",
    "4",
    "--rounds",
    "2",
    "--threads",
    "1",
    "--steps",
    "2",
]


@dataclass(frozen=True)
class Result:
    """What a command line gave."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The last line of stderr, which must be the error."""
        line = self.err.splitlines()[-1]
        assert line.startswith("error: "), self.err
        return line.removeprefix("error: ")

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Run = Callable[..., Result]


@pytest.fixture(autouse=True)
def _own_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cache and a folder of its own, and the logging of before afterwards."""
    monkeypatch.setenv("FWDLLAMA_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    loggers = [logging.getLogger(name) for name in ("fwdllama", main.LLAMA_LOGGER)]
    before = [(logger, logger.level, list(logger.handlers)) for logger in loggers]
    yield
    for logger, level, handlers in before:
        logger.setLevel(level)
        logger.handlers[:] = handlers


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def run_(*arguments: object) -> Result:
        capsys.readouterr()
        code = main.run([str(argument) for argument in arguments])
        return Result(code, *capsys.readouterr())

    return run_


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("cli-model") / "tiny.gguf", type="Q8_0")


def squad(n_paragraphs: int, *, n_words: int = 8, seed: int = 1) -> dict[str, Any]:
    """Three questions a paragraph, each for its own word of it."""
    rng = random.Random(seed)

    def words(n: int) -> list[str]:
        return ["".join(rng.choices("abcdefgh", k=3)) for _ in range(n)]

    paragraphs = []
    for p in range(n_paragraphs):
        context = words(n_words)
        qas = [
            {"id": f"{p}-{q}", "question": " ".join(words(2)), "answers": [{"text": context[q], "answer_start": 4 * q}]}
            for q in range(3)
        ]
        paragraphs.append({"context": " ".join(context), "qas": qas})
    return {"version": "1.1", "data": [{"title": "made", "paragraphs": paragraphs}]}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "train.json"
    path.write_text(json.dumps(squad(12)))
    return path


@pytest.fixture
def dev(tmp_path: Path) -> Path:
    path = tmp_path / "dev.json"
    path.write_text(json.dumps(squad(3, seed=2)))
    return path


@pytest.fixture
def train(run: Run, model: Path, data: Path) -> Run:
    """`fwdllama train` on the small model and data, with more arguments, which win over the defaults."""

    def train_(*arguments: object) -> Result:
        given = [str(argument) for argument in arguments]
        defaults = ["--model", str(model), "--data", str(data), "--out", "adapter.gguf", *SMALL]
        return run("train", *defaults, *given)

    return train_


@pytest.fixture
def adapter(train: Run, tmp_path: Path) -> Path:
    """A trained adapter, with its run directory beside it."""
    assert train().code == 0
    return tmp_path / "adapter.gguf"
