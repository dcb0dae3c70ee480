"""Whether a run will see its prompts again, and the pool that keeps them then.

In the cache folder, not in the run's: a resumed run, one with other settings of training and a device that comes back find there what an earlier one
computed, and one limit holds for all of them.
"""

from __future__ import annotations

from dataclasses import asdict

from fwdllama.batches import RollingBatches
from fwdllama.config import TrainConfig
from fwdllama.llama.binding import build
from fwdllama.llama.context import ContextOptions
from fwdllama.llama.model import ModelOptions
from fwdllama.llama.pool import PromptPool, Return
from fwdllama.models import default_cache_dir


def retained(
    config: TrainConfig,
    batches: RollingBatches,
    options: ContextOptions,
    weights: ModelOptions,
    *,
    sha256: str,  # of the whole model
    first: int,  # of the layers that the context runs
    data_sha256: str,
) -> PromptPool | None:
    """The pool of a run; None where prompts depend on theta, nothing may be kept, or the budget ends before a unit returns."""
    limit, n_units = config.engine.keep_prompts_bytes, len(batches.units)
    last = config.last_batch(batches.n_slots)
    few = last is not None and batches.n_slots + batches.fresh * last <= n_units
    if limit is None or config.space.scope == "all" or few:
        return None
    identity = {
        "base": sha256,
        "first": first,
        "half": config.half,
        "context": asdict(options),
        "weights": asdict(weights),
        "data": data_sha256,
        "engine": build(),  # a cache folder may be carried from one machine to another
    }
    return PromptPool(default_cache_dir() / "prompts", identity, limit, Return(n_units, config.budget.seconds))
