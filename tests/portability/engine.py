"""What llama.cpp computes on tiny models: what must be alike on every machine, because a base model is named by its file's digest, and what need not.

Kernels of different processors add in different orders, so losses differ in their last digits; a device sends losses, and nothing is derived
from them twice.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fwdllama.llama.context import ContextOptions
from fwdllama.llama.model import Model
from fwdllama.llama.oracle import LlamaOracle
from fwdllama.space import build_space
from fwdllama.types import Encoded
from gguf_tools.quantize import quantize_model
from gguf_tools.split import extract_layers
from gguf_tools.synth import write_tiny_llama
from tests.portability.contract import numbers

SIZES: Mapping[str, Any] = {"n_layers": 2, "n_embd": 256, "n_head": 4, "n_head_kv": 2, "n_ff": 512}


def _quantised(source: str, target: str) -> bytes:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        quantize_model(write_tiny_llama(folder / "from.gguf", type=source, **SIZES), folder / "to.gguf", target, n_threads=1)
        return (folder / "to.gguf").read_bytes()


def _top() -> bytes:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        extract_layers(write_tiny_llama(folder / "whole.gguf", type="Q8_0", **SIZES), folder / "top.gguf", 1, 2)
        return (folder / "top.gguf").read_bytes()


def _tokens() -> bytes:
    with tempfile.TemporaryDirectory() as name, Model(write_tiny_llama(Path(name) / "m.gguf")) as model:
        return repr([model.tokenize(text) for text in ("Who wrote it?", "Ångström 42 \u4e2d\u6587 \U0001f600\n\n")]).encode()


def losses(kind: str, seed: int = 0) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Losses (4,) of four examples at a theta that is not zero."""
    with tempfile.TemporaryDirectory() as name, Model(write_tiny_llama(Path(name) / "m.gguf", type=kind, seed=seed, **SIZES)) as model:
        shapes: Mapping[str, Any] = {key: shape for key, (shape, _) in model.info.tensors.items()}
        space = build_space(shapes, 2, modules=["q", "v", "down"], layers=None, rank=4, alpha=8.0, train="b", seed=3)
        options = ContextOptions(64, n_seq=4, n_outputs=64, n_batch=128, n_threads=1, kv_type="f32", flash=False)
        with LlamaOracle(model, space, "answer", options) as oracle:
            oracle.load([Encoded(str(i), tuple(range(20 + i, 32 + i)), (7, 8), tuple(range(40, 45))) for i in range(4)])
            oracle.write(numbers(5, space.n_params) * np.float32(0.02))
            return oracle.losses()


ENGINE: Mapping[str, Callable[[], bytes]] = {
    "base requantised from Q4_1 to Q8_0": partial(_quantised, "Q4_1", "Q8_0"),
    "base requantised from F16 to Q8_0": partial(_quantised, "F16", "Q8_0"),
    "upper layers of a base": _top,
    "tokens of texts": _tokens,
}

ENGINE_PRIVATE: Mapping[str, Callable[[], bytes]] = {
    "base requantised from F16 to Q4_0": partial(_quantised, "F16", "Q4_0"),  # fused multiply-adds round where x86-64's do not
    "base requantised from F16 to Q4_K": partial(_quantised, "F16", "Q4_K_M"),
    **{f"losses of a {kind} base": (lambda kind=kind: losses(kind).tobytes()) for kind in ("F32", "F16", "Q8_0", "Q4_0")},  # type: ignore[misc]
}
