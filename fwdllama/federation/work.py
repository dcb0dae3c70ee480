"""A worker with a real model and a device's own data.

The run says what is trained and how; how llama.cpp runs is the device's own choice. A comes from the run's initial adapter, which is checked like
any adapter from elsewhere before a number of it is used.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fwdllama.errors import AdapterError, FederationError
from fwdllama.federation.spec import RunSpec
from fwdllama.federation.worker import OracleWorker
from fwdllama.layout import space_of
from fwdllama.session import Hooks, Source, opened
from fwdllama.space import Space
from gguf_tools.adapter import Adapter, adapter_of
from gguf_tools.model import ModelInfo, read_model_info
from gguf_tools.validate import check_adapter


@dataclass(frozen=True)
class Workplace:
    """What a device brings: its model, its data, and how its engine runs (names of `fwdllama.config.EngineConfig`)."""

    model: Path
    source: Source
    engine: Mapping[str, Any] = field(default_factory=dict)
    hooks: Hooks = field(default_factory=Hooks)

    @contextmanager
    def hired(self, spec: RunSpec, initial: bytes) -> Iterator[OracleWorker]:
        """Load everything for a run whose initial adapter is the file `initial`, and close it in the end.

        Raises:
            FileError: the adapter is damaged, or does not fit the model.
            FwdllamaError: data or model cannot be used for this run; nothing was loaded where that could be told before.
        """
        config = spec.train.model_copy(update={"engine": spec.train.engine.model_copy(update=dict(self.engine))})
        info = read_model_info(self.model)
        label = f"the initial adapter of run {spec.name!r}"
        adapter = adapter_of(check_adapter(initial, label, info))
        _check_fits(adapter, space_of(config, info), spec, info)
        a = {name: pair[0] for name, pair in adapter.tensors.items()}
        with opened(config, self.model, self.source, self.hooks, a=a) as session:
            if adapter.scope == "answer" and session.invocation != adapter.invocation_tokens:
                raise FederationError(
                    f"run {spec.name!r} asks its questions in another form: its answers begin behind the tokens {_few(adapter.invocation_tokens)}, "
                    f"those of {self.source.path} behind {_few(session.invocation)}. The data must be of the kind that the run is for."
                )
            yield OracleWorker(
                spec,
                session.losses,
                session.batches,
                session.held_out,
                session.space.theta(adapter.tensors),
                n_tokens=lambda: session.oracle.n_decoded,
            )


def _check_fits(adapter: Adapter, space: Space, spec: RunSpec, info: ModelInfo) -> None:
    """Compare the adapter and the run's specification with the space that this model gives.

    Raises:
        AdapterError: they differ.
    """
    label = f"the initial adapter of run {spec.name!r}"
    names = {matrix.name for matrix in space.matrices}
    different = sorted(names ^ set(adapter.tensors))
    if different:
        which = "lacks" if different[0] in names else "has, against the run's configuration,"
        raise AdapterError(f"{label} {which} {different[0]}; it was not made for this run.")
    for name, rank in adapter.ranks.items():
        if rank != space.rank:
            raise AdapterError(f"{label}: {name} has rank {rank}, but the run trains rank {space.rank}.")
    if adapter.scope != spec.train.space.scope or adapter.alpha != space.alpha:
        raise AdapterError(
            f"{label} has scope {adapter.scope} and alpha {adapter.alpha:g}, "
            f"but the run trains scope {spec.train.space.scope} and alpha {space.alpha:g}."
        )
    if space.n_params != spec.n_params:
        raise AdapterError(
            f"run {spec.name!r} trains {spec.n_params:,} numbers, but its configuration gives {space.n_params:,} for {info.name or 'this model'}."
        )


def _few(tokens: tuple[int, ...]) -> str:
    return ", ".join(str(token) for token in tokens[:8]) or "(none)"
