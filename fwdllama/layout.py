"""The space that a configuration means for a given model, and the A that its examples suggest.

Everything that needs both a configuration and a model's shapes is here, so that training, the benchmarks and the planner mean the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace

from fwdllama.config import TrainConfig, layer_band
from fwdllama.llama.activation import activation_a, cached_rows, module_inputs, store_rows
from fwdllama.llama.context import ContextOptions
from fwdllama.llama.model import Model
from fwdllama.llama.trunk import Below
from fwdllama.models import default_cache_dir
from fwdllama.space import Space, build_space
from fwdllama.types import Encoded
from gguf_tools.model import ModelInfo
from gguf_tools.split import can_be_cut

ACTIVATION_EXAMPLES = 40  # any 40; the 8 shortest, about 80 answer tokens, gave a much worse A (LOG.md)


def space_of(config: TrainConfig, info: ModelInfo) -> Space:
    """Which matrices of the model are trained, with a random A.

    Raises:
        UsageError: a layer or a module that the model does not have.
    """
    wanted = config.space
    return build_space(
        {name: (shape[0], shape[1]) for name, (shape, _) in info.tensors.items() if len(shape) == 2},
        info.n_layers,
        modules=wanted.modules,
        layers=wanted.layers or layer_band(info.n_layers),
        rank=wanted.rank,
        alpha=wanted.alpha,
        train=wanted.train,
        seed=config.seed,
    )


def is_cut(config: TrainConfig, info: ModelInfo, first: int) -> bool:
    """Whether the layers below `first` are to be computed once an example, apart from those above, and the model's file allows it."""
    return config.engine.trunk and config.estimator.objective == "nll" and first > 0 and can_be_cut(info, first)


def informed(
    space: Space,
    config: TrainConfig,
    sha256: str,  # of the whole model
    model: Model,  # the whole, or its top
    options: ContextOptions,
    examples: Sequence[Encoded],
    trunk: Below | None,
    on_event: Callable[[str], None],
) -> Space:
    """`space` with the A that the adapted modules' inputs suggest, chosen now or found in the cache folder."""
    sample = list(examples[:ACTIVATION_EXAMPLES])
    names = [m.name for m in space.matrices]
    seen = [(e.prompt, e.invocation, e.target) for e in sample]
    key = hashlib.sha256(repr((sha256, seen, names, config.space.rank, config.space.scope)).encode()).hexdigest()[:32]
    path = default_cache_dir() / "activations" / f"{key}.npz"
    a = cached_rows(path, names)
    if a is None:
        on_event(f"choosing A from what the adapted modules see in {len(sample)} examples (kept for the next run)")
        a = activation_a(module_inputs(model, options, sample, names, config.space.scope, trunk), space.rank)
        store_rows(path, a)
    return replace(space, a=a)
