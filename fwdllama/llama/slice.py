"""Consecutive layers of a model, and what leaves the last of them for every token.

A slice is a file without vocabulary that is fed what enters its first layer, and asked for the outputs of every token, so that llama.cpp computes
its last layer for all of them. Each sequence is decoded alone, in pieces of the same size wherever it stands, because kernels differ by the number
of rows they are given: what leaves a layer is the same to the last bit, however the layers below it were cut into slices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from fwdllama.errors import EngineError
from fwdllama.llama.binding import TensorHead, ggml
from fwdllama.llama.context import Context, ContextOptions, States, Tokens
from fwdllama.llama.model import Model, ModelOptions
from fwdllama.llama.prompts import plan


class Slice:
    """Layers of one file, and a context of `n_seq` sequences that runs them. Close it in the end."""

    def __init__(self, path: Path, options: ContextOptions, weights: ModelOptions, n_seq: int, *, layers: int | None = None) -> None:
        """`layers` of the file are wanted, all where it is None; others above them may follow.

        Raises:
            EngineError: this build of llama.cpp does not let us look.
        """
        library = ggml()
        if library is None:
            raise EngineError("this build's tensors cannot be read.")
        self.model = Model(path, weights, needs_vocabulary=False)
        self._seen: list[States] = []
        last = (self.model.n_layers if layers is None else layers) - 1
        self._asked = 1 if last == self.model.n_layers - 1 else 0  # the last layer of a file is computed for outputs only
        wanted = f"l_out-{last}".encode()

        def look(node: int, ask: bool, _user_data: object) -> bool:
            if library.ggml_get_name(node) != wanted:
                return not ask
            if not ask:
                head = TensorHead.from_address(node)
                values = np.empty((head.ne[1], head.ne[0]), np.float32)
                library.ggml_backend_tensor_get(node, values.ctypes.data, 0, values.nbytes)
                self._seen.append(values)
            return True

        n_outputs = options.n_batch if self._asked else 1
        try:
            self.context = Context(self.model, replace(options, n_seq=n_seq, n_outputs=n_outputs), eval_callback=look)
        except BaseException:
            self.model.close()
            raise

    def passed(self, prompts: Sequence[Tokens], inputs: Sequence[States]) -> list[States]:
        """What leaves the slice, for at most n_seq sequences that it is given (n_tokens, n_embd) each.

        `prompts` are the tokens that a sequence begins with; what sequences that begin alike have in common is computed once.

        Raises:
            EngineError: the values were not seen.
        """
        made: dict[int, States] = {}
        self.context.clear()
        for row, leader, n in plan(prompts, range(len(prompts))):
            if n:
                self.context.copy(leader, row)
                self.context.forget(row, n)
            rest = self._decoded(row, n, inputs[row][n:])
            made[row] = np.concatenate([made[leader][:n], rest]) if n else rest
        return [made[row] for row in range(len(prompts))]

    def _decoded(self, sequence: int, start: int, inputs: States) -> States:
        self._seen = []
        step = self.context.n_batch
        for begin in range(0, len(inputs), step):
            piece = inputs[begin : begin + step]
            positions = np.arange(start + begin, start + begin + len(piece), dtype=np.int32)
            self.context.decode(piece, positions, np.full(len(piece), sequence, np.int32), np.full(len(piece), self._asked, np.int8))
        states = np.concatenate(self._seen) if self._seen else np.empty((0, 0), np.float32)
        self._seen = []
        if states.shape != inputs.shape:
            raise EngineError(f"the values that leave layers of {self.model.info.path} were not seen in the graph; use --no-trunk for this model.")
        return states

    def close(self) -> None:
        """Free context and weights. Safe to call twice."""
        self.context.close()
        self.model.close()
