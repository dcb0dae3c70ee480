"""The layers below the trained ones, as a configuration wants them: beside the top all the while, or staged before it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from fwdllama.config import TrainConfig
from fwdllama.errors import EngineError, UsageError
from fwdllama.formats import size
from fwdllama.hooks import Hooks
from fwdllama.llama.binding import build
from fwdllama.llama.context import ContextOptions
from fwdllama.llama.model import ModelOptions
from fwdllama.llama.staging import Stage
from fwdllama.llama.states import StateStore, Unit
from fwdllama.llama.trunk import Below, Parts, Trunk, cut
from fwdllama.material import Material
from fwdllama.memory import Shape
from fwdllama.models import default_cache_dir
from fwdllama.shortlist import Shortlist
from fwdllama.types import Encoded
from gguf_tools.model import read_model_info
from gguf_tools.split import slices


def parts_of(config: TrainConfig, model_path: Path, sha256: str, first: int, shortlist: Shortlist | None = None) -> Parts | None:
    """The model's parts, with the logits of `shortlist` alone (None: of all tokens); None where every probe computes all layers.

    Raises:
        FileError: the run is to be staged, and the model cannot be cut.
        UsageError: it is to be staged, and nothing is below.
        EngineError: it is to be staged, and this build of llama.cpp cannot.
    """
    engine = config.engine
    if not engine.trunk or config.estimator.objective != "nll":
        return None
    staged = engine.stage_layers is not None
    if staged and first == 0:
        raise UsageError(
            f"{model_path}: training begins at layer 0, so there is nothing below to compute before it; train higher --layers, "
            "or leave --stage-layers out."
        )
    if staged:
        slices(read_model_info(model_path), first, first)
    parts = cut(model_path, sha256, first, default_cache_dir(), trunk=not staged, shortlist=shortlist)
    if staged and parts is None:
        raise EngineError(
            f"{model_path} cannot be cut at layer {first} with this build of llama.cpp or in this cache folder, so training cannot be staged."
        )
    return parts


@dataclass(frozen=True)
class Lower:
    """What the lower layers are computed from. `origin` names the model and the data, for what is kept of them."""

    config: TrainConfig
    parts: Parts
    origin: str
    options: ContextOptions
    weights: ModelOptions
    shape: Shape

    @contextmanager
    def opened(self, material: Material, sampled: Sequence[Encoded], hooks: Hooks, *, endless: bool = False) -> Iterator[Below]:
        """What gives the values that enter the top, for the units that the budget's batches hold (`endless`: all) and for `sampled` examples alone.

        Raises:
            ResourceError: there is no room on disk.
            Stopped: on request, while lower layers were computed.
        """
        if self.config.engine.stage_layers is None:
            with closing(Trunk(self.parts, self.options, self.weights, self.shape.unit_size, half=self.config.half)) as trunk:
                yield trunk
            return
        info = read_model_info(self.parts.model)
        stage = Stage(
            self.parts.model,
            slices(info, self.parts.first, self.config.engine.stage_layers),
            self.options,
            self.weights,
            self.shape.unit_size,
        )
        with StateStore(self._folder, self.parts.first, info.n_embd, half=self.config.half) as store:
            drawn = material.batches.through(None if endless else self.config.last_batch(material.batches.n_slots))
            units = [Unit.of(unit) for unit in (*material.watched(), *drawn, *([e] for e in sampled))]
            missing = store.missing(units)
            if missing:
                kept, most = stage.needed_bytes(missing, half=self.config.half)
                n_tokens = sum(unit.n_tokens for unit in missing)
                n_slices = len(stage.boundaries) - 1
                hooks.on_event(
                    f"first pass: {n_tokens:,} tokens through layers 0 to {self.parts.first - 1} in {n_slices} slice{'s' if n_slices > 1 else ''}; "
                    f"{size(most)} on disk at most, {size(kept)} of it until training ends ({self._folder})"
                )

                def stop() -> bool:
                    hooks.rest()
                    return hooks.stop()

                stage.run(store, units, half=self.config.half, on_progress=hooks.on_staged, stop=stop)
            yield store

    @property
    def _folder(self) -> Path:
        """Where values are kept that are the same to the bit: by model, data, layer, and all that kernels depend on."""
        options, weights = self.options, self.weights
        sizes = options.n_ctx_seq, options.n_batch, options.kv_type, options.flash
        of = (self.origin, self.parts.first, self.config.half, sizes, weights, build())
        return default_cache_dir() / "states" / hashlib.blake2b(repr(of).encode(), digest_size=16).hexdigest()
