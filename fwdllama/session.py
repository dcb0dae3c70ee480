"""Everything that is open while a run goes on, put together the same way for a new run and a resumed one.

Whatever can be refused is refused before the model is loaded.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fwdllama.batches import EncodedUnits, RollingBatches, grouped, groups_of, shuffled
from fwdllama.calibration import Calibration, calibrate, measure
from fwdllama.checkpoint import RunDirectory, State
from fwdllama.config import TrainConfig
from fwdllama.encode import Encoder, model_template
from fwdllama.layout import informed, space_of
from fwdllama.llama.model import Model, ModelOptions
from fwdllama.llama.oracle import LlamaOracle
from fwdllama.llama.scoring import ScoreOracle
from fwdllama.llama.trunk import Trunk, cut
from fwdllama.machine import check_memory, default_threads
from fwdllama.memory import MIN_OUTPUTS, Shape, to_load, training, training_options
from fwdllama.models import default_cache_dir
from fwdllama.oracle import LossOracle
from fwdllama.space import Space
from fwdllama.surroundings import peak_memory_bytes
from fwdllama.tasks import Kind
from fwdllama.tasks.load import load_dataset, split_by_group
from fwdllama.trainer import Clock, Progress, Trainer
from fwdllama.types import Dataset, Encoded
from gguf_tools.adapter import BASE_KEY, Adapter, write_adapter
from gguf_tools.model import ModelInfo, file_sha256, read_model_info
from gguf_tools.plan import CELLS, whole_cells

FIT = 0.7  # the context is the smallest multiple of 256 tokens that so much of the data fits
CALIBRATION_UNITS = 2  # of the first batch
EPS_GUESS = 0.008  # where the search for eps begins, with activation-informed A
HELD_OUT_FRACTION = 0.1


@dataclass(frozen=True)
class Source:
    """Where a run's examples come from: a file, and how it is read."""

    path: Path
    kind: Kind | None = None  # None: told from the content
    labels: dict[str, str] | None = None
    limit: int | None = None

    def load(self) -> Dataset:
        """Read it.

        Raises:
            DataError: it cannot be used.
        """
        return load_dataset(self.path, kind=self.kind or "auto", labels=self.labels, limit=self.limit)


@dataclass
class Hooks:
    """What a caller wants to hear of and may do while a run goes on."""

    on_event: Callable[[str], None] = lambda text: None  # one line about set-up
    on_progress: Callable[[Progress], None] = lambda progress: None
    stop: Callable[[], bool] = lambda: False


@dataclass(frozen=True)
class Outcome:
    """What a run left behind: its last state, what was skipped, and where the adapter was written (None: interrupted)."""

    state: State
    skipped: dict[str, int]
    adapter: Path | None
    calibration: Calibration | None


@dataclass
class Session:
    """Everything that is open while a run goes on."""

    config: TrainConfig
    info: ModelInfo  # of the whole model
    model: Model  # the whole, or its top
    model_path: Path
    sha256: str
    oracle: LlamaOracle
    space: Space
    batches: RollingBatches
    units: EncodedUnits
    held_out: list[Encoded | None]
    invocation: tuple[int, ...]
    hooks: Hooks
    data_sha256: str
    left_out: dict[str, int]  # while the data was read
    losses: LossOracle  # what is trained on: the oracle's likelihoods, or scores made with it

    def identity(self) -> dict[str, Any]:
        """What makes this run this run; resuming checks it, the ledger's genesis hashes it."""
        return {
            "base model": self.sha256,
            "data": self.data_sha256,
            "configuration": settings_of(self.config),
            "context": self.units.n_ctx,
            "n_params": self.space.n_params,
        }

    def load_first_batch(self) -> None:
        """Load as much of the first batch as calibration needs, so that the first probe need not wait for all of it."""
        self.losses.load(self._first_rows())

    def _first_rows(self) -> list[Encoded | None]:
        rows, _ = self.batches.batch(0)
        first = [row if i % self.batches.n_slots < CALIBRATION_UNITS else None for i, row in enumerate(rows)]
        return [*[None] * len(self.held_out), *first]

    def calibrated(self, theta: np.ndarray[Any, np.dtype[np.float32]]) -> Calibration:
        """Noise, slope and eps, measured on what `load_first_batch` loaded."""
        groups = grouped(self._first_rows(), self.config.estimator.examples_per_probe, 0)
        self.hooks.on_event("measuring slopes and rounding noise")
        found = calibrate(
            self.losses, theta, groups, seed=self.config.seed, first_guess=EPS_GUESS, eps=self.config.estimator.eps
        )
        self.hooks.on_event(
            f"eps {found.eps:.2g}: a probe changes the loss by {found.slope_rms * found.eps:.2g} nats, rounding by {found.noise:.1g}"
        )
        return found

    def timed(self, theta: np.ndarray[Any, np.dtype[np.float32]]) -> Calibration:
        """The calibration, with the speed of probes."""
        found = self.calibrated(theta)
        groups = grouped(self._first_rows(), self.config.estimator.examples_per_probe, 0)
        began = time.perf_counter()
        measure(self.losses, theta, groups, found.eps, self.config.seed, 16)
        return replace(found, probes_per_s=3 * 16 / (time.perf_counter() - began))  # three points each

    def adapter(self, theta: np.ndarray[Any, np.dtype[np.float32]], metadata: dict[str, str]) -> Adapter:
        """The adapter at theta, as it is written to a file."""
        scope = self.config.space.scope
        return Adapter(
            architecture=self.info.architecture,
            alpha=self.space.alpha,
            tensors=self.space.tensors(theta),
            scope=scope,
            invocation_tokens=self.invocation if scope == "answer" else (),
            metadata={
                BASE_KEY: self.sha256,
                "fwdllama.base.name": self.info.name,
                "fwdllama.template": self.config.template,
                **metadata,
            },
        )

    def finish(
        self, run: RunDirectory, theta: np.ndarray[Any, np.dtype[np.float32]], out: Path, calibration: Calibration | None
    ) -> Outcome:
        """Train, then write the adapter of the best held-out loss."""
        clock = Clock(
            decode_s=lambda: self.oracle.decode_s,
            n_tokens=lambda: self.oracle.n_decoded,
            peak_memory_bytes=peak_memory_bytes,
        )
        trainer = Trainer(
            self.config, self.losses, self.batches, self.held_out, run, theta, clock, self.hooks.on_progress, self.hooks.stop
        )
        state = trainer.run()
        skipped = {**self.left_out, **self.units.skipped}
        if state.finished is None:
            return Outcome(state, skipped, None, calibration)
        best = state.best_step if self.held_out else state.step
        theta = run.theta(self.space.initial_theta(), best)
        final = self.adapter(theta, {"fwdllama.run.ledger": run.ledger.last.hex(), "fwdllama.run.step": str(best)})
        out.parent.mkdir(parents=True, exist_ok=True)
        write_adapter(out, final)
        return Outcome(state, skipped, out, calibration)


@contextmanager
def opened(
    config: TrainConfig, model_path: Path, source: Source, hooks: Hooks, a: dict[str, Any] | None = None
) -> Iterator[Session]:
    """Load data and model, lay out the space, choose A (or take `a`), and close everything in order at the end."""
    info = read_model_info(model_path)
    space = space_of(config, info)
    dataset = source.load()
    train_set, watched = split_by_group(dataset, _held_out_share(config, dataset), config.seed)
    engine = config.engine
    with ExitStack() as resources:
        options = ModelOptions(mmap=engine.mmap, repack=engine.repack, n_gpu_layers=engine.n_gpu_layers)
        check_memory(model_path, training(info, config, Shape(config.batch.n_ctx or CELLS, 1, 1)).peak.items)
        sha256 = file_sha256(model_path, default_cache_dir())
        cuttable = engine.trunk and config.estimator.objective == "nll"
        parts = cut(model_path, sha256, space.first_layer, default_cache_dir()) if cuttable else None
        model = resources.enter_context(Model(parts.top if parts else model_path, options))
        encoder = Encoder(model, model_template(model, config.template, dataset.kind))
        size = config.batch.per_unit
        groups, watched_groups = groups_of(train_set.examples, size), groups_of(watched.examples, size)
        unit_size = max(len(group) for group in (*groups, *watched_groups))
        sample = [encoder.example(groups[i][0]) for i in shuffled(config.seed, 0, len(groups))[:64]]
        n_ctx = config.batch.n_ctx or _fitting([e.n_tokens for e in sample], info.context_length)
        n_outputs = max(MIN_OUTPUTS, *(len(e.target) for e in sample))
        n_outputs = min(n_outputs, config.engine.n_batch - len(encoder.invocation))
        units = EncodedUnits(groups, encoder.example, n_ctx, str(source.path), n_outputs)
        n_rows = config.batch.units * size
        batches = RollingBatches(
            units,
            unit_size=unit_size,
            n_slots=max(1, n_rows // unit_size),
            fresh=max(1, config.batch.fresh * size // unit_size),
            seed=config.seed,
        )
        held_out = _held_out_rows(EncodedUnits(watched_groups, encoder.example, n_ctx, str(source.path), n_outputs), config)
        n_seq = len(held_out) + batches.n_slots * unit_size
        shape = Shape(n_ctx, n_seq, unit_size, n_outputs)
        context_options = training_options(config, shape, engine.n_threads or default_threads())
        check_memory(model_path, to_load(info, config, shape))
        trunk = None
        if parts:
            trunk = Trunk(parts, context_options, options, unit_size)
            resources.callback(trunk.close)
        if a is not None:
            space = replace(space, a=a)
        elif config.space.init == "activation":
            fitting = [e for e in sample if e.n_tokens <= n_ctx] or [e for e in batches.batch(0)[0] if e is not None]
            space = informed(space, config, sha256, model, context_options, fitting, trunk, hooks.on_event)
        oracle = resources.enter_context(LlamaOracle(model, space, config.space.scope, context_options, trunk=trunk, n_places=config.n_places))
        losses: LossOracle = ScoreOracle(oracle) if config.estimator.objective == "f1" else oracle
        hooks.on_event(
            f"{space.n_params:,} trained numbers in {len(space.matrices)} matrices of layers {space.first_layer}-{space.last_layer}, "
            f"rewritten by {oracle.adapter.writing}"
        )
        yield Session(
            config=config,
            info=info,
            model=model,
            model_path=model_path,
            sha256=sha256,
            oracle=oracle,
            space=space,
            batches=batches,
            units=units,
            held_out=held_out,
            invocation=encoder.invocation,
            hooks=hooks,
            data_sha256=file_sha256(source.path),
            left_out=dict(dataset.skipped),
            losses=losses,
        )


def settings_of(config: TrainConfig) -> dict[str, Any]:
    """What of a configuration decides what is learned."""
    return config.model_dump(mode="json", exclude={"budget", "engine"})


def _fitting(lengths: list[int], most: int) -> int:
    """The smallest multiple of llama.cpp's cell granularity that FIT of the examples fit."""
    wanted = sorted(lengths)[int(FIT * (len(lengths) - 1))]
    return min(most, whole_cells(wanted))


def _held_out_share(config: TrainConfig, dataset: Dataset) -> float:
    """Enough for the watched examples, and never more than a tenth of the data."""
    return min(HELD_OUT_FRACTION, 4 * config.batch.held_out / max(1, len(dataset.examples)))


def _held_out_rows(units: EncodedUnits, config: TrainConfig) -> list[Encoded | None]:
    """Rows of watched examples, whole units, from as many paragraphs as possible."""
    rows: list[Encoded | None] = []
    n = 0
    for index in shuffled(config.seed, 1, len(units)):
        unit = units[int(index)]
        if unit and n < config.batch.held_out:
            rows += [replace(example, unit=-1000 - int(index)) for example in unit]
            n += len(unit)
    return rows


