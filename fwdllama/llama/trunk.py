"""Trunk and top: what lies below the first adapted layer is computed once an example and kept.

Nothing below layer k depends on theta. The trunk (layers 0 to k - 1) runs over an example's tokens once; the values that enter layer k are
fed to the top (layers k to the end) as if they were embeddings, once for the prompt and again in every probe. Both are files cut from the
model, made once and kept in the cache folder. Where memory is short, the trunk is not loaded beside the top: `fwdllama.llama.staging`.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fwdllama.llama.binding import ggml, layout_is_known
from fwdllama.llama.context import ContextOptions, States, Tokens
from fwdllama.llama.embedding import Embeddings
from fwdllama.llama.half import rounded
from fwdllama.llama.model import ModelOptions
from fwdllama.llama.slice import Slice
from gguf_tools.errors import FileError
from gguf_tools.model import read_model_info
from gguf_tools.split import extract_layers

log = logging.getLogger("fwdllama.llama")

UNUSED_S = 3600  # after which a top that only its shortlist tells from another is put out


class Below(Protocol):
    """What gives the values that enter layer `first`; it may compute them, or have them kept."""

    first: int

    def states(self, prompts: Sequence[Tokens], behind: Sequence[Tokens]) -> list[States]:
        """Inputs of layer `first` for every token of prompts[i] followed by behind[i], float32 (n_tokens, n_embd)."""

    @property
    def decode_s(self) -> float:
        """Seconds spent inside the model."""

    @property
    def n_decoded(self) -> int:
        """Tokens that it computed."""


@dataclass(frozen=True)
class Parts:
    """A model, the file of its layers from `first` on, and where the file of those below may be.

    The top gives the logits of `shortlist`, token ids in ascending order; None: of all.
    """

    model: Path
    first: int
    trunk: Path
    top: Path
    shortlist: NDArray[np.int32] | None = field(default=None, compare=False)  # the top's name tells it


def cut(
    model_path: Path, sha256: str, first: int, cache: Path, *, trunk: bool = True, shortlist: NDArray[np.int32] | None = None
) -> Parts | None:
    """The parts of a model below and from layer `first` on, made now or found in `cache`; None where it cannot be cut.

    Without `trunk` only the top is made. Position-dependent architectures, and builds whose tensors we cannot read, compute every layer
    in every probe instead. Tops for other shortlists are removed, once nobody has asked for them for a while.
    """
    if first == 0 or ggml() is None or not layout_is_known():
        return None
    folder = cache / "parts"
    stem = f"{sha256[:16]}-from-{first}"
    own = "" if shortlist is None else f"-of-{hashlib.blake2b(shortlist.astype('<i4').tobytes(), digest_size=8).hexdigest()}"
    parts = Parts(model_path, first, folder / f"{sha256[:16]}-below-{first}.gguf", folder / f"{stem}{own}.gguf", shortlist)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if trunk and not parts.trunk.exists():
            extract_layers(model_path, parts.trunk, 0, first, vocabulary="none", force=True)
        if not parts.top.exists():
            tokens = None if shortlist is None else shortlist.tolist()
            extract_layers(model_path, parts.top, first, read_model_info(model_path).n_layers, vocabulary="none", shortlist=tokens, force=True)
        if own:
            os.utime(parts.top)
            for other in folder.glob(f"{stem}-of-*.gguf"):
                if other.stat().st_mtime < time.time() - UNUSED_S:
                    other.unlink(missing_ok=True)
    except (FileError, OSError) as error:
        log.warning("every probe computes all layers: %s", error)
        return None
    return parts


class Trunk:
    """The lower layers, loaded, and a context that runs them over a few sequences. Close it before nothing else depends on it.

    With `half`, values are rounded as they are where they are kept on disk in half precision.
    """

    def __init__(self, parts: Parts, options: ContextOptions, weights: ModelOptions, n_seq: int, *, half: bool = False) -> None:
        self.first, self._half = parts.first, half
        self._embeddings = Embeddings(parts.model)
        try:
            self._slice = Slice(parts.trunk, options, weights, n_seq)
        except BaseException:
            self._embeddings.close()
            raise

    @property
    def decode_s(self) -> float:
        """Seconds spent inside the model."""
        return self._slice.context.decode_s

    @property
    def n_decoded(self) -> int:
        """Tokens that it computed."""
        return self._slice.context.n_decoded

    def states(self, prompts: Sequence[Tokens], behind: Sequence[Tokens]) -> list[States]:
        """Inputs of layer k for every token of prompts[i] followed by behind[i], float32 (n_tokens, n_embd).

        Prompts that begin alike share the work. Sequences beyond the context's are taken in turns.

        Raises:
            EngineError: this model does not show the values.
        """
        found: list[States] = []
        n_seq = self._slice.context.options.n_seq
        for start in range(0, len(prompts), n_seq):
            some = slice(start, start + n_seq)
            inputs = [self._embeddings.rows(np.concatenate(pair)) for pair in zip(prompts[some], behind[some], strict=True)]
            found += self._slice.passed(prompts[some], inputs)
        return [rounded(states) for states in found] if self._half else found

    def close(self) -> None:
        """Free context, weights and file. Safe to call twice."""
        self._slice.close()
        self._embeddings.close()

