"""Everything that is open while a run goes on, put together the same way for a new run and a resumed one.

Whatever can be refused is refused before the model is loaded.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fwdllama.batches import EncodedUnits, RollingBatches, grouped
from fwdllama.calibration import Calibration, calibrate, measure
from fwdllama.checkpoint import RunDirectory, State
from fwdllama.config import TrainConfig
from fwdllama.hooks import Hooks
from fwdllama.layout import ACTIVATION_EXAMPLES, informed, is_cut, space_of
from fwdllama.llama.model import Model, ModelOptions, Tokenizer
from fwdllama.llama.oracle import LlamaOracle
from fwdllama.llama.scoring import ScoreOracle
from fwdllama.llama.states import StateStore
from fwdllama.llama.trunk import Below
from fwdllama.lower import Lower, parts_of
from fwdllama.machine import check_memory, default_threads
from fwdllama.material import Source, material
from fwdllama.memory import Shape, to_load, training, training_options
from fwdllama.models import default_cache_dir
from fwdllama.oracle import LossOracle
from fwdllama.progress import Clock
from fwdllama.retention import retained
from fwdllama.space import Space
from fwdllama.surroundings import peak_memory_bytes
from fwdllama.trainer import Trainer
from fwdllama.types import Encoded
from gguf_tools.adapter import BASE_KEY, Adapter, write_adapter
from gguf_tools.model import ModelInfo, file_sha256, read_model_info
from gguf_tools.plan import CELLS

CALIBRATION_UNITS = 2  # of the first batch
EPS_GUESS = 0.008  # where the search for eps begins, with activation-informed A


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
    below: Below | None  # what gives the values that enter the first trained layer; None where all layers are computed

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
        first = [row if row is not None and row.unit is not None and row.unit < CALIBRATION_UNITS else None for row in rows]
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
        hooks = self.hooks
        trainer = Trainer(
            self.config, self.losses, self.batches, self.held_out, run, theta, clock, hooks.on_progress, hooks.stop, hooks.rest
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
        if isinstance(self.below, StateStore):
            self.below.remove()
        return Outcome(state, skipped, out, calibration)


@contextmanager
def opened(
    config: TrainConfig, model_path: Path, source: Source, hooks: Hooks, a: dict[str, Any] | None = None, *, endless: bool = False
) -> Iterator[Session]:
    """Load data and model, lay out the space, choose A (or take `a`), and close everything in order at the end.

    An `endless` session may draw any batch, whatever the budget says.
    """
    info = read_model_info(model_path)
    space = space_of(config, info)
    dataset = source.load()
    engine = config.engine
    with ExitStack() as resources:
        weights = ModelOptions(mmap=engine.mmap, repack=engine.repack, n_gpu_layers=engine.n_gpu_layers)
        check_memory(model_path, training(info, config, Shape(config.batch.n_ctx or CELLS, 1, 1)).peak.items)
        sha256 = file_sha256(model_path, default_cache_dir())
        apart = is_cut(config, info, space.first_layer)
        words = resources.enter_context(Tokenizer(model_path) if apart else Model(model_path, weights))
        made = material(config, dataset, str(source.path), words)
        parts = parts_of(config, model_path, sha256, space.first_layer, made.shortlist)
        options = training_options(config, made.shape, engine.n_threads or default_threads())
        check_memory(model_path, to_load(info, config, made.shape))
        data_sha256 = file_sha256(source.path)
        sampled = made.sample[:ACTIVATION_EXAMPLES] if a is None and config.space.init == "activation" else []
        below = None
        if parts:
            lower = Lower(config, parts, f"{sha256} {data_sha256}", options, weights, made.shape)
            below = resources.enter_context(lower.opened(made, sampled, hooks, endless=endless))
            model = resources.enter_context(Model(parts.top, weights, needs_vocabulary=False))
        else:
            model = words if isinstance(words, Model) else resources.enter_context(Model(model_path, weights))
        if a is not None:
            space = replace(space, a=a)
        elif sampled:
            space = informed(space, config, sha256, model, options, sampled, below, hooks.on_event)
        pool = retained(config, made.batches, options, weights, sha256=sha256, first=below.first if below else 0, data_sha256=data_sha256)
        oracle = resources.enter_context(
            LlamaOracle(
                model,
                space,
                config.space.scope,
                options,
                trunk=below,
                shortlist=parts.shortlist if parts else None,
                pool=pool,
                n_places=config.n_places,
            )
        )
        losses: LossOracle = ScoreOracle(oracle) if config.estimator.objective == "f1" else oracle
        hooks.on_event(
            f"{space.n_params:,} trained numbers in {len(space.matrices)} matrices of layers {space.first_layer}-{space.last_layer}, "
            f"rewritten by {oracle.adapter.writing}"
        )
        yield Session(
            config=config,
            info=info,
            model_path=model_path,
            sha256=sha256,
            oracle=oracle,
            space=space,
            batches=made.batches,
            units=made.units,
            held_out=made.held_out,
            invocation=made.invocation,
            hooks=hooks,
            data_sha256=data_sha256,
            left_out=dict(dataset.skipped),
            losses=losses,
            below=below,
        )


def settings_of(config: TrainConfig) -> dict[str, Any]:
    """What of a configuration decides what is learned."""
    return config.model_dump(mode="json", exclude={"budget", "engine"})
