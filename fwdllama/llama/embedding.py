"""What enters the first layer for a token: rows of the embedding matrix, read from the model's file as they are asked for.

The matrix itself need not be in memory: a batch looks up a few thousand rows of it. They are made into numbers by ggml's own functions,
so that they are to the bit what llama.cpp would look up.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import numpy as np
from gguf.constants import GGML_QUANT_SIZES
from numpy.typing import NDArray

from fwdllama.errors import EngineError
from fwdllama.llama.binding import TypeTraits, ggml
from gguf_tools.header import MODEL_LIMITS, parse_header
from gguf_tools.mapping import mapped

NAME = "token_embd.weight"
# Architectures whose graph multiplies what it looked up, but not what it is given, by the root of n_embd.
SCALED = frozenset({"gemma3"})


class Embeddings:
    """Rows of a GGUF's `token_embd.weight`. Close it in the end."""

    def __init__(self, path: Path) -> None:
        """Open the file.

        Raises:
            FileError: the file is no GGUF.
            EngineError: this build of llama.cpp does not make rows of this type into numbers.
        """
        with mapped(path) as data:
            header = parse_header(data, str(path), MODEL_LIMITS)
            entry = header.tensors[NAME]
            architecture = header.text("general.architecture")
        self.n_vocab, self.n_embd = entry.shape
        self._offset, self._row_bytes = entry.offset, entry.size_bytes // self.n_vocab
        self._scale = np.sqrt(np.float32(self.n_embd)) if architecture in SCALED else None
        library = ggml()
        if library is None:
            raise EngineError("this build's tensors cannot be read.")
        self._to_float = None
        if entry.type.name != "F32":
            traits = TypeTraits.from_address(library.ggml_get_type_traits(int(entry.type)))
            if (traits.type_name or b"").decode().upper() != entry.type.name or (traits.blck_size, traits.type_size) != GGML_QUANT_SIZES[entry.type]:
                raise EngineError(f"this build's description of the type {entry.type.name} has another layout.")
            if not traits.to_float:
                raise EngineError(f"this build cannot make {entry.type.name} into numbers.")
            self._to_float = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)(traits.to_float)
        self._file = os.open(path, os.O_RDONLY)

    def rows(self, tokens: NDArray[np.int32]) -> NDArray[np.float32]:
        """What enters layer 0 for each token, (n_tokens, n_embd)."""
        wanted, places = np.unique(tokens, return_inverse=True)
        found = np.empty((len(wanted), self.n_embd), np.float32)
        for row, token in zip(found, wanted.tolist(), strict=True):
            if not 0 <= token < self.n_vocab:
                raise EngineError(f"token {token} is not one of the vocabulary's {self.n_vocab}.")
            raw = os.pread(self._file, self._row_bytes, self._offset + token * self._row_bytes)
            if self._to_float is None:
                row[:] = np.frombuffer(raw, np.float32)
            else:
                self._to_float(raw, row.ctypes.data, self.n_embd)
        if self._scale is not None:
            found *= self._scale
        return found[places]

    def close(self) -> None:
        """Close the file. Safe to call twice."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
