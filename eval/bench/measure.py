"""What a bench item is: a measurement that gives figures, and the bars that some of them must reach.

A bar that is missed is a result like any other. Only a measurement that could not be made is a failure.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from fwdllama.errors import FwdllamaError, UsageError

TRAIN_FILE, DEV_FILE = "squad-train-4000.json.gz", "squad-dev-sample.json.gz"
MARK = ".fwdllama-bench"  # in a folder that a bench made, and may empty

Figures = Mapping[str, Any]  # plain values, as JSON holds them
Need = Literal["data", "fp16", "int8", "int4", "torch", "server", "postgresql"]


class BenchError(FwdllamaError):
    """A measurement could not be made."""


@dataclass(frozen=True)
class Bar:
    """What a figure must reach; with relation "is" it must be exactly `limit`."""

    figure: str
    relation: Literal[">=", "<=", "is"]
    limit: float | bool

    def met(self, figures: Figures) -> bool:
        """Whether it does; a figure that is missing or not a number does not.

        >>> Bar("f1", ">=", 45).met({"f1": 45.0}), Bar("f1", ">=", 45).met({"f1": None})
        (True, False)
        """
        value = figures.get(self.figure)
        if self.relation == "is" or isinstance(value, bool):
            return self.relation == "is" and value == self.limit and type(value) is type(self.limit)
        if not isinstance(value, int | float) or not math.isfinite(value):
            return False
        return value >= self.limit if self.relation == ">=" else value <= self.limit

    def __str__(self) -> str:
        limit = ("yes" if self.limit else "no") if isinstance(self.limit, bool) else f"{self.limit:g}"
        return f"{self.figure} {self.relation} {limit}"


@dataclass(frozen=True)
class Measured:
    """The figures of an item, and the command line that they came from."""

    figures: Figures
    command: str


@dataclass(frozen=True)
class Bench:
    """What all items share. `work` keeps run directories, so that later items can use those of earlier ones."""

    model: str  # a name of the registry, or a path
    data: Path | None  # the folder of the SQuAD files
    work: Path
    scale: float = 1.0  # of every time that is spent on training

    @property
    def train_data(self) -> Path:
        """Questions to train on."""
        return self._file(TRAIN_FILE)

    @property
    def dev_data(self) -> Path:
        """Questions to score."""
        return self._file(DEV_FILE)

    def _file(self, name: str) -> Path:
        if self.data is None:
            raise BenchError(f"{name} is needed, but there is no folder of data; give --data-dir.")
        return self.data / name

    def seconds(self, seconds: float) -> float:
        """Seconds of training, scaled."""
        return seconds * self.scale

    def questions(self, n: int) -> int:
        """Questions to score; fewer only where training is shortened, so that a trial of the bench is short too."""
        return n if self.scale >= 1 else max(16, round(n * self.scale))

    def fresh(self, name: str) -> Path:
        """An empty folder in the work folder, in the place of an earlier one of the name."""
        folder = self.work / name
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
        return folder


@dataclass(frozen=True)
class Item:
    """One measurement. `shown` names the figures that a table has room for, `minutes` is a guess on two cores."""

    name: str
    what: str
    bars: tuple[Bar, ...]
    shown: tuple[str, ...]
    needs: tuple[Need, ...]
    minutes: float
    measure: Callable[[Bench], Measured]
    model: bool = True  # whether the bench's base model is needed

    @property
    def bar(self) -> str:
        """All bars in words."""
        return ", ".join(map(str, self.bars))

    def met(self, figures: Figures) -> bool:
        """Whether every bar is."""
        return all(bar.met(figures) for bar in self.bars)

    def lacking(self, bench: Bench) -> str | None:
        """Why it cannot be measured here, in one sentence; None where it can."""
        return next((reason for need in (*(["model"] if self.model else []), *self.needs) if (reason := lacking(bench, need))), None)


def lacking(bench: Bench, need: str) -> str | None:
    """Why a need is not met here; None where it is."""
    return _REASONS[need](bench)


def variant_of(model: str, variant: str) -> str | None:
    """The name of a variant of a model; None where it has none.

    >>> variant_of("smollm2-135m", "int4"), variant_of("some/file.gguf", "int4")
    ('smollm2-135m:int4', None)
    """
    from fwdllama.registry import REGISTRY

    name = model.partition(":")[0]
    return f"{name}:{variant}" if name in REGISTRY and variant in REGISTRY[name].variants else None


def _model_lacking(name: str) -> str | None:
    from fwdllama.models import resolve

    try:
        resolve(name)
    except FwdllamaError as error:
        return str(error)
    return None


def _variant_lacking(bench: Bench, variant: str) -> str | None:
    name = variant_of(bench.model, variant)
    return f"{bench.model} has no {variant.upper()} variant." if name is None else _model_lacking(name)


def _data_lacking(bench: Bench) -> str | None:
    if bench.data is None:
        return f"{TRAIN_FILE} and {DEV_FILE} were not found; name their folder with --data-dir or FWDLLAMA_DATA."
    missing = [name for name in (TRAIN_FILE, DEV_FILE) if not (bench.data / name).is_file()]
    return f"{bench.data} has no {missing[0]}." if missing else None


def _torch_lacking(bench: Bench) -> str | None:
    return None if find_spec("torch") else "torch is not installed; `pip install 'fwdllama[bench]'` brings it."


def _server_lacking(bench: Bench) -> str | None:
    return None if find_spec("uvicorn") else "the aggregator is not installed; `pip install 'fwdllama[server]'` brings it."


def _postgresql_lacking(bench: Bench) -> str | None:
    from .federation.postgresql import binaries

    if not find_spec("psycopg"):
        return "psycopg is not installed; `pip install 'fwdllama[postgresql]'` brings it."
    return None if binaries() else "there is no PostgreSQL here; on Debian `apt-get install postgresql` brings it."


_REASONS: Mapping[str, Callable[[Bench], str | None]] = {
    "model": lambda bench: _model_lacking(bench.model),
    "fp16": lambda bench: _variant_lacking(bench, "fp16"),
    "int8": lambda bench: _variant_lacking(bench, "int8"),
    "int4": lambda bench: _variant_lacking(bench, "int4"),
    "data": _data_lacking,
    "torch": _torch_lacking,
    "server": _server_lacking,
    "postgresql": _postgresql_lacking,
}


def prepare_work(folder: Path) -> None:
    """Make the work folder, or take that of an earlier bench.

    Raises:
        UsageError: it is something else.
    """
    if folder.exists() and not (folder / MARK).exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} is not an earlier bench's folder, and run directories would go there; name another --out.")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARK).touch()
