"""Whether a trunk and a top, one after the other, are the model that they were cut from, to the bit."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fwdllama.errors import EngineError
from fwdllama.llama.binding import ggml, layout_is_known
from fwdllama.llama.context import Context, ContextOptions, Tokens
from fwdllama.llama.embedding import Embeddings
from fwdllama.llama.model import Model, ModelOptions
from fwdllama.llama.slice import Slice


@dataclass(frozen=True)
class Seam:
    """What a comparison found: over how many logits, how many differ, and by how much at most."""

    n_tokens: int
    n_logits: int
    n_different: int
    largest_difference: float

    @property
    def whole(self) -> bool:
        """Whether every logit is equal to the bit."""
        return self.n_different == 0


def compare(model: Path, trunk: Path, top: Path, at: int, *, n_tokens: int = 64, n_threads: int = 2, seed: int = 0) -> Seam:
    """Logits of random tokens from `model`, and from trunk and top as it was cut at layer `at`; the three are loaded one after another.

    Raises:
        EngineError: this build of llama.cpp does not show the values that enter a layer.
    """
    if ggml() is None or not layout_is_known():
        raise EngineError("this build's tensors cannot be read, so trunk and top cannot be compared with the whole.")
    options = ContextOptions(n_ctx_seq=max(n_tokens, 64), n_seq=1, n_outputs=n_tokens, n_batch=max(n_tokens, 64), n_threads=n_threads)
    with Model(model) as whole:
        tokens = np.random.default_rng(seed).integers(0, whole.n_vocab, n_tokens, dtype=np.int32)
        wanted = _logits(whole, options, tokens)
    with closing(Embeddings(trunk)) as embeddings, closing(Slice(trunk, options, ModelOptions(), 1, layers=at)) as lower:
        (states,) = lower.passed([tokens], [embeddings.rows(tokens)])
    with Model(top) as upper:
        found = _logits(upper, options, states)
    different = wanted.view(np.uint32) != found.view(np.uint32)
    return Seam(n_tokens, wanted.size, int(different.sum()), float(np.abs(wanted - found).max()))


def _logits(model: Model, options: ContextOptions, inputs: Tokens | NDArray[np.float32]) -> NDArray[np.float32]:
    """The logits after each of `inputs`, (n_tokens, n_vocab)."""
    n = len(inputs)
    with Context(model, options) as context:
        logits = context.decode(inputs, np.arange(n, dtype=np.int32), np.zeros(n, np.int32), np.ones(n, np.int8))
        assert logits is not None
        return logits.copy()
