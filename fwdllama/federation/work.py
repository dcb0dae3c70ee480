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

from fwdllama.config import EngineConfig
from fwdllama.errors import AdapterError, FederationError
from fwdllama.federation.origin import origin_of
from fwdllama.federation.spec import RunSpec
from fwdllama.federation.worker import OracleWorker
from fwdllama.fitting import SHARED, fitted
from fwdllama.hooks import Hooks
from fwdllama.layout import space_of
from fwdllama.material import Source
from fwdllama.session import opened
from fwdllama.setting import Change
from gguf_tools.model import read_model_info
from gguf_tools.validate import check_adapter


@dataclass(frozen=True)
class Workplace:
    """What a device brings: its model, its data, and how its engine runs (names of `fwdllama.config.EngineConfig`)."""

    model: Path
    source: Source
    engine: Mapping[str, Any] = field(default_factory=dict)
    memory_bytes: int | None = None  # to stay within; None: whatever it needs
    kept: frozenset[Change] = frozenset()  # what of the engine may not be changed for that
    hooks: Hooks = field(default_factory=Hooks)

    @contextmanager
    def hired(self, spec: RunSpec, initial: bytes) -> Iterator[OracleWorker]:
        """Load everything for a run whose initial adapter is the file `initial`, and close it in the end.

        Raises:
            FileError: the adapter is damaged, or does not fit the model.
            FwdllamaError: data or model cannot be used for this run; nothing was loaded where that could be told before.
        """
        disk = {"keep_prompts_bytes": EngineConfig().keep_prompts_bytes}  # never as much as a run asks for
        config = spec.train.model_copy(update={"engine": spec.train.engine.model_copy(update={**disk, **self.engine})})
        if self.memory_bytes is not None:
            config = fitted(config, self.model, self.source, self.memory_bytes, kept=SHARED | self.kept, on_event=self.hooks.on_event)
        info = read_model_info(self.model)
        check_adapter(initial, f"the initial adapter of run {spec.name!r}", info)
        origin = origin_of(spec, initial)
        if origin.space.matrices != space_of(config, info).matrices:
            raise AdapterError(
                f"the initial adapter of run {spec.name!r} adapts other matrices than its configuration trains in {info.name or 'this model'}; "
                "the run was made for another model, or by another version of fwdllama."
            )
        adapter = origin.adapter
        with opened(config, self.model, self.source, self.hooks, a=origin.space.initial_a(), endless=True) as session:
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
                origin.theta,
                n_tokens=lambda: session.oracle.n_decoded,
            )


def _few(tokens: tuple[int, ...]) -> str:
    return ", ".join(str(token) for token in tokens[:8]) or "(none)"
