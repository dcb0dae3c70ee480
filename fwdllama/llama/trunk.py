"""Trunk and top: what lies below the first adapted layer is computed once an example and kept.

Nothing below layer k depends on theta. The trunk (layers 0 to k, the last one only because its input is what we want) runs over an
example's tokens once; its values at the entrance of layer k are fed to the top (layers k to the end) as if they were embeddings,
once for the prompt and again in every probe. Both are files cut from the model, made once and kept in the cache folder.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fwdllama.errors import EngineError
from fwdllama.llama.binding import TensorHead, ggml, layout_is_known
from fwdllama.llama.context import Context, ContextOptions, Tokens
from fwdllama.llama.model import Model, ModelOptions
from fwdllama.llama.prompts import plan
from gguf_tools.errors import FileError
from gguf_tools.split import extract_layers

log = logging.getLogger("fwdllama.llama")

States = NDArray[np.float32]  # (n_tokens, n_embd), the values that enter layer k


@dataclass(frozen=True)
class Parts:
    """Files of a model cut at layer `first`."""

    trunk: Path
    top: Path
    first: int


def cut(model_path: Path, sha256: str, first: int, cache: Path) -> Parts | None:
    """The parts of a model below and from layer `first` on, made now or found in `cache`; None where it cannot be cut.

    Position-dependent architectures, and builds whose tensors we cannot read, compute every layer in every probe instead.
    """
    if first == 0 or ggml() is None or not layout_is_known():
        return None
    folder = cache / "parts"
    parts = Parts(folder / f"{sha256[:16]}-0-{first}.gguf", folder / f"{sha256[:16]}-{first}-end.gguf", first)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not parts.trunk.exists():
            extract_layers(model_path, parts.trunk, 0, first + 1, force=True)
        if not parts.top.exists():
            from gguf_tools.model import read_model_info

            extract_layers(model_path, parts.top, first, read_model_info(model_path).n_layers, force=True)
    except (FileError, OSError) as error:
        log.warning("every probe computes all layers: %s", error)
        return None
    return parts


class Trunk:
    """The lower layers, and a context that runs them over a few sequences. Close it before nothing else depends on it."""

    def __init__(self, parts: Parts, options: ContextOptions, model_options: ModelOptions, n_seq: int) -> None:
        self.first = parts.first
        self.model = Model(parts.trunk, model_options)
        self._seen: list[States] = []
        wanted = f"l_out-{parts.first - 1}".encode()
        library = ggml()
        assert library is not None

        def look(node: int, ask: bool, _user_data: object) -> bool:
            if library.ggml_get_name(node) != wanted:
                return not ask
            if not ask:
                head = TensorHead.from_address(node)
                values = np.empty((head.ne[1], head.ne[0]), np.float32)
                library.ggml_backend_tensor_get(node, values.ctypes.data, 0, values.nbytes)
                self._seen.append(values)
            return True

        try:
            self.context = Context(self.model, replace(options, n_seq=n_seq, n_outputs=1), eval_callback=look)
        except BaseException:
            self.model.close()
            raise

    def states(self, prompts: list[Tokens], behind: list[Tokens]) -> list[States]:
        """Inputs of layer k for every token of prompts[i] followed by behind[i], float32 (n_tokens, n_embd).

        Prompts that begin alike share the work. Sequences beyond the context's are taken in turns.

        Raises:
            EngineError: this model does not show the values.
        """
        found: list[States] = []
        n_seq = self.context.options.n_seq
        for start in range(0, len(prompts), n_seq):
            found += self._together(prompts[start : start + n_seq], behind[start : start + n_seq])
        return found

    def _together(self, prompts: list[Tokens], behind: list[Tokens]) -> list[States]:
        made: dict[int, States] = {}
        self.context.clear()
        for row, leader, n in plan(prompts, range(len(prompts))):
            if n:
                self.context.copy(leader, row)
                self.context.forget(row, n)
            rest = self._decoded(row, n, np.concatenate([prompts[row][n:], behind[row]]))
            made[row] = np.concatenate([made[leader][:n], rest]) if n else rest
        return [made[row] for row in range(len(prompts))]

    def _decoded(self, sequence: int, start: int, tokens: Tokens) -> States:
        self._seen = []
        step = self.context.n_batch
        for begin in range(0, len(tokens), step):
            piece = tokens[begin : begin + step]
            positions = np.arange(start + begin, start + begin + len(piece), dtype=np.int32)
            self.context.decode(piece, positions, np.full(len(piece), sequence, np.int32), np.zeros(len(piece), np.int8))
        states = np.concatenate(self._seen) if self._seen else np.empty((0, 0), np.float32)
        if states.shape != (len(tokens), self.model.n_embd):
            raise EngineError(
                f"the values that enter layer {self.first} were not seen in the graph; use --no-trunk for this model."
            )
        return states

    def close(self) -> None:
        """Free context and weights. Safe to call twice."""
        self.context.close()
        self.model.close()
