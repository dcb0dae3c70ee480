"""What this machine gives: memory and threads, and whether a model with its context will fit."""

from __future__ import annotations

import math
from pathlib import Path

import psutil

from fwdllama.doctor import big_cores, cgroup_limit_bytes, usable_cores
from fwdllama.errors import ResourceError
from fwdllama.formats import size
from fwdllama.llama.context import ContextOptions
from gguf_tools.model import ModelInfo

CELLS = 256  # llama.cpp rounds the cells of a sequence up to a multiple of this
BASE_BYTES = 32 << 20  # graphs, vocabulary and Python's share, as measured with the smallest models


def available_bytes() -> int:
    """Memory that this process can still take: the machine's, or what its control group leaves of a lower limit."""
    available = psutil.virtual_memory().available
    limit = cgroup_limit_bytes(Path("/proc"), Path("/sys"))
    if limit is None:
        return int(available)
    return int(min(available, max(0, limit - psutil.Process().memory_info().rss)))


def kv_bytes(info: ModelInfo, options: ContextOptions) -> int:
    """Bytes of a context's KV cache."""
    cells = math.ceil(options.n_ctx_seq / CELLS) * CELLS
    return options.n_seq * cells * info.kv_bytes_per_token(options.kv_type, options.kv_type)


def compute_bytes(info: ModelInfo, options: ContextOptions) -> int:
    """Estimate of a context's buffers: the activations of one micro-batch, and logits on both sides of their copy.

    llama.cpp reuses most activations at once, so a layer's worst moment counts: three values of the widest matrix and
    eight of the embedding a token.
    """
    in_layers = [shape[0] for name, (shape, _) in info.tensors.items() if name.startswith("blk.")]
    widest = max(in_layers, default=info.n_embd)
    activations = options.n_batch * (8 * info.n_embd + 3 * widest) * 4
    return activations + 2 * options.n_outputs * info.n_vocab * 4 + BASE_BYTES


def check_memory(
    info: ModelInfo,
    options: ContextOptions,
    *,
    loaded: bool = False,
    doubled: bool = False,
    available: int | None = None,
) -> None:
    """Compare what a model and one context need with what is available (None: what this machine says).

    `loaded`: the weights are in memory already. `doubled`: they are mapped and repacked too, which holds them twice.

    Raises:
        ResourceError: it will not fit; the message has both numbers.
    """
    weights = 0 if loaded else info.size_bytes * (2 if doubled else 1)
    kv, compute = kv_bytes(info, options), compute_bytes(info, options)
    needed = weights + kv + compute
    has = available_bytes() if available is None else available
    if needed > has:
        of_weights = "" if loaded else f"weights {size(weights)}, "
        raise ResourceError(
            f"{info.path} needs about {size(needed)} of memory ({of_weights}KV cache of {options.n_seq} x "
            f"{options.n_ctx_seq} tokens {size(kv)}, computing {size(compute)}), but {size(has)} are available. "
            "Use a smaller --batch or --ctx, or a smaller model."
        )


def default_threads() -> int:
    """One thread a physical core that may be used, fast ones only where cores differ: a decode waits for the last."""
    usable = usable_cores()
    fast = [core for core in big_cores(Path("/sys")) if core in usable]
    physical = psutil.cpu_count(logical=False) or len(usable)
    return max(1, min(len(usable), physical, len(fast) or len(usable)))
