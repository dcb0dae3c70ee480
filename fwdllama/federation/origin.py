"""What a run's versions start from: the initial adapter file, and the space that its tensors lay out.

The aggregator knows no model, so the space follows from the adapter's own names and shapes, in the order that training uses.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fwdllama.errors import AdapterError
from fwdllama.federation.spec import RunSpec
from fwdllama.space import MODULES, Space, build_space
from gguf_tools.adapter import BASE_KEY, Adapter, adapter_bytes, read_adapter
from gguf_tools.errors import FileError

RUN_KEY, VERSION_KEY, LEDGER_KEY = "fwdllama.run.name", "fwdllama.run.version", "fwdllama.run.ledger"


@dataclass(frozen=True)
class Origin:
    """A run's beginning; `theta` is that of version 0."""

    spec: RunSpec
    adapter: Adapter
    space: Space

    @property
    def theta(self) -> NDArray[np.float32]:
        """Float32 (n_params,)."""
        return self.space.initial_theta()

    def file(self, theta: NDArray[np.float32], version: int, head: bytes) -> bytes:
        """The adapter of a version as a GGUF file; head: the ledger's hash there."""
        facts = {RUN_KEY: self.spec.name, VERSION_KEY: str(version), LEDGER_KEY: head.hex()}
        made = replace(self.adapter, tensors=self.space.tensors(theta), metadata={**self.adapter.metadata, **facts})
        return adapter_bytes(made)


def origin_of(spec: RunSpec, initial: bytes) -> Origin:
    """Read and check the initial adapter of a run.

    Raises:
        AdapterError: it is unfit, of another base, or does not lay out `spec.n_params` numbers as the run's space does.
    """
    with tempfile.TemporaryDirectory(prefix="fwdllama-") as folder:
        path = Path(folder) / "initial.gguf"
        path.write_bytes(initial)
        try:
            adapter = read_adapter(path)
        except FileError as error:
            raise AdapterError(f"the initial adapter is unfit: {str(error).removeprefix(str(path)).lstrip(': ')}") from error
    wanted = spec.train.space
    if adapter.metadata.get(BASE_KEY) != spec.base.sha256:
        raise AdapterError(f"the initial adapter is for base {adapter.metadata.get(BASE_KEY, 'of no name')}, but the run's is {spec.base.sha256}.")
    if adapter.scope != wanted.scope or adapter.alpha != wanted.alpha:
        raise AdapterError(
            f"the initial adapter has scope {adapter.scope} and alpha {adapter.alpha:g}, the run {wanted.scope} and {wanted.alpha:g}."
        )
    layers = sorted({int(name.split(".")[1]) for name in adapter.tensors if name.startswith("blk.")})
    if not layers:
        raise AdapterError("the initial adapter adapts no layer (a tensor named blk.N. ...).")
    shapes = {name: (b.shape[0], a.shape[1]) for name, (a, b) in adapter.tensors.items()}
    space = build_space(
        shapes,
        layers[-1] + 1,
        modules=[m for m in wanted.modules if m in MODULES],
        layers=(layers[0], layers[-1]),
        rank=wanted.rank,
        alpha=wanted.alpha,
        train=wanted.train,
        seed=spec.train.seed,
    )
    ranks = set(adapter.ranks.values())
    if len(space.matrices) != len(adapter.tensors) or space.n_params != spec.n_params or ranks != {wanted.rank}:
        raise AdapterError(
            f"the initial adapter holds {len(adapter.tensors)} matrices of rank {sorted(ranks)} for {space.n_params} trained numbers; "
            f"the run has {len(space.matrices)} of rank {wanted.rank} for {spec.n_params}."
        )
    space = replace(space, a={name: pair[0] for name, pair in adapter.tensors.items()})
    moved = sum(int(np.count_nonzero(b)) for _, b in adapter.tensors.values())
    if moved:
        raise AdapterError(f"the initial adapter's B must be zero, but {moved} of its numbers are not.")
    return Origin(spec, adapter, space)
