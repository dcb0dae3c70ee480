"""A run without a model: one small matrix, for tests and simulations of the protocol."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from fwdllama.config import make_config
from fwdllama.federation.spec import RunSpec
from gguf_tools.adapter import BASE_KEY, Adapter, adapter_bytes

BASE = hashlib.sha256(b"toy").hexdigest()
MATRIX = "blk.0.attn_q.weight"


def toy_run(
    name: str, n_params: int = 64, *, rounds: int = 8, eps: float = 0.01, train: dict[str, Any] | None = None, **spec: Any
) -> tuple[RunSpec, bytes]:
    """A run over n_params numbers and its initial adapter file; `spec` are other fields of RunSpec, `train` of its configuration.

    Steps suit a loss like 1/2 |theta - centre|^2, whose curvature is of the size that slopes of such a loss tell.
    """
    space = {"modules": ["q"], "layers": [0, 0], "rank": 1, "alpha": 1.0, "init": "random", "scope": "all"}
    given = {"space": space, "budget": {"steps": rounds}}
    config = make_config({**given, **(train or {})})
    pair = (np.ones((1, 2), np.float32), np.zeros((n_params, 1), np.float32))
    initial = adapter_bytes(Adapter("llama", 1.0, {MATRIX: pair}, metadata={BASE_KEY: BASE}))
    fields = {
        "name": name,
        "base": {"sha256": BASE, "name": "toy", "architecture": "llama"},
        "train": config.model_dump(mode="json"),
        "eps": eps,
        "initial": hashlib.sha256(initial).hexdigest(),
        "n_params": n_params,
        **spec,
    }
    return RunSpec.model_validate(fields), initial
