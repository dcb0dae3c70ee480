"""What a federated run starts from, found with the engine on the operator's machine: the adapter's A and the distance of probes.

The aggregator knows neither models nor data, so both are settled before it hears of the run, on public examples.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fwdllama.config import EngineConfig, TrainConfig
from fwdllama.errors import UsageError
from fwdllama.federation.spec import RunSpec
from fwdllama.hooks import Hooks
from fwdllama.material import Source
from fwdllama.session import Session, opened
from gguf_tools.adapter import adapter_bytes


def check_shape(config: TrainConfig, name: str, **fields: Any) -> None:
    """Find out whether the rest of a specification can be, before the engine computes its own part.

    Raises:
        UsageError: it cannot; the first problem in one sentence.
    """
    nothing = "0" * 64
    base = {"sha256": nothing, "name": "", "architecture": ""}
    _spec(config, name, base=base, eps=1.0, initial=nothing, n_params=1, **fields)


def found(config: TrainConfig, model_path: Path, source: Source, name: str, hooks: Hooks, **fields: Any) -> tuple[RunSpec, bytes]:
    """The specification of a new run and its initial adapter file. fields: `round`, `aggregation`, `evaluation`, `public` of `RunSpec`.

    Raises:
        NoiseError: the slopes drown in the model's rounding.
        FwdllamaError: anything else that a user can mend.
        FileError: the model's file is unfit.
    """
    check_shape(config, name, **fields)
    config = _for_devices(config)
    with opened(config, model_path, source, hooks) as session:
        session.load_first_batch()
        theta = session.space.initial_theta()
        eps = session.calibrated(theta).eps
        initial = adapter_bytes(session.adapter(theta, {}))
        base = {"sha256": session.sha256, "name": session.info.name[:200], "architecture": session.info.architecture}
        spec = _spec(
            _shared(config, session),
            name,
            base=base,
            eps=eps,
            initial=hashlib.sha256(initial).hexdigest(),
            n_params=session.space.n_params,
            **fields,
        )
    return spec, initial


def _shared(config: TrainConfig, session: Session) -> TrainConfig:
    """The configuration without what is this machine's own, and with the layers that were chosen here for everybody."""
    space = config.space.model_copy(update={"layers": (session.space.first_layer, session.space.last_layer)})
    return config.model_copy(update={"space": space, "engine": EngineConfig(kv_type=config.engine.kv_type)})


def _for_devices(config: TrainConfig) -> TrainConfig:
    """The configuration as devices can keep to it.

    They measure whole answers only, because every probe travels and a result has one mean square, and against the whole vocabulary, or each would
    compute losses of its own kind. Their steps are rounds, all alike.
    """
    estimator = config.estimator.model_copy(update={"first_rounds": 0, "vocabulary": "whole"})
    return config.model_copy(update={"estimator": estimator, "step": config.step.model_copy(update={"warmup": False})})


def _spec(config: TrainConfig, name: str, **fields: Any) -> RunSpec:
    try:
        return RunSpec.model_validate({"name": name, "train": config.model_dump(mode="json"), **fields})
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "the run"
        given = "" if isinstance(first["input"], dict) else f" (got {first['input']!r})"
        raise UsageError(f"{place}: {first['msg'].removeprefix('Value error, ')}{given}.") from error
