"""Whether a run will see its prompts again, and the pool that keeps them then.

In the cache folder, not in the run's: a resumed run, one with other settings of training and a device that comes back find there what an earlier one
computed, and one limit holds for all of them.
"""

from __future__ import annotations

import math
from dataclasses import asdict

from fwdllama.batches import RollingBatches
from fwdllama.config import TrainConfig
from fwdllama.llama.binding import llama
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
    if limit is None or config.space.scope == "all" or batches.n_slots + batches.fresh * most_steps(config, batches) <= n_units:
        return None
    identity = {
        "base": sha256,
        "first": first,
        "context": asdict(options),
        "weights": asdict(weights),
        "data": data_sha256,
        # Kernels differ between releases and between machines, and a cache folder may be carried from one to another.
        "engine": [llama().__version__, llama().llama_print_system_info().decode()],
    }
    return PromptPool(default_cache_dir() / "prompts", identity, limit, Return(n_units, config.budget.seconds))


def most_steps(config: TrainConfig, batches: RollingBatches) -> float:
    """The steps that a budget of steps or probes leaves room for; infinitely many where only time is limited."""
    estimator, budget = config.estimator, config.budget
    n_groups = math.ceil(batches.n_slots * batches.unit_size / estimator.examples_per_probe)
    n_rounds = estimator.rounds if config.pacing.kind == "fixed" else min(4, config.pacing.max_rounds)
    steps = math.inf if budget.steps is None else budget.steps
    return steps if budget.probes is None else min(steps, math.ceil(budget.probes / (n_rounds * n_groups)))
