"""The command line run as a user runs it, in this process, on a model and data small enough to train in a second."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fwdllama.cli import main
from gguf_tools.synth import write_tiny_llama
from tests.questions import squad

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


@contextmanager
def own_place(folder: Path) -> Iterator[None]:
    """Work in this folder, which has the cache too; afterwards everything, and the logging, is as before."""
    loggers = [logging.getLogger(name) for name in ("fwdllama", main.LLAMA_LOGGER)]
    before = [(logger, logger.level, list(logger.handlers)) for logger in loggers]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FWDLLAMA_CACHE", str(folder / "cache"))
        patch.chdir(folder)
        yield
    for logger, level, handlers in before:
        logger.setLevel(level)
        logger.handlers[:] = handlers


@pytest.fixture(autouse=True)
def _own_place(tmp_path: Path) -> Iterator[None]:
    with own_place(tmp_path):
        yield


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


@pytest.fixture(scope="session")
def trained(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an adapter trained on `data`, and its run directory."""
    folder = tmp_path_factory.mktemp("cli-trained")
    (folder / "train.json").write_text(json.dumps(squad(12)))
    with own_place(folder):
        assert main.run(["train", "--model", str(model), "--data", "train.json", "--out", "adapter.gguf", *SMALL]) == 0
    return folder


@pytest.fixture
def adapter(trained: Path, data: Path, tmp_path: Path) -> Path:
    """A trained adapter, with its data and its run directory beside it, as if it had been trained here."""
    shutil.copy(trained / "adapter.gguf", tmp_path)
    shutil.copytree(trained / "adapter-run", tmp_path / "adapter-run")
    facts = tmp_path / "adapter-run" / "run.json"
    facts.write_text(facts.read_text().replace(str(trained), str(data.parent)))
    return tmp_path / "adapter.gguf"
