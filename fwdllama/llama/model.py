"""A base model in memory: its handle, its vocabulary, and nothing that is specific to one context."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from fwdllama.errors import ModelError
from fwdllama.llama.binding import llama
from fwdllama.types import Segment
from gguf_tools.model import ModelInfo, read_model_info


@dataclass(frozen=True)
class ModelOptions:
    """How the weights are held.

    `mmap=False` with `repack=True` is fastest; `mmap=True` with `repack=False` is smallest, because repacked copies come on top of
    the mapped file.
    """

    mmap: bool = False
    repack: bool = True
    n_gpu_layers: int = 0


class Tokenizer:
    """A model's vocabulary alone, a few megabytes. Use as a context manager."""

    def __init__(self, path: Path) -> None:
        parameters = llama().llama_model_default_params()
        parameters.vocab_only = True
        self._load(path, read_model_info(path), parameters)

    def _load(self, path: Path, info: ModelInfo, parameters: Any) -> None:
        self.info = info
        lib = llama()
        self.handle = lib.llama_model_load_from_file(str(path).encode(), parameters)
        if not self.handle:
            raise ModelError(
                f"{path}: llama.cpp cannot load this model (architecture {info.architecture!r}). "
                "Run with --debug to see its own words."
            )
        self.vocab = lib.llama_model_get_vocab(self.handle)
        self.has_texts: bool = lib.llama_vocab_type(self.vocab) != lib.LLAMA_VOCAB_TYPE_NONE
        self._controls: dict[int, bool] = {}  # asking for the text of every token of a data set would take as long as tokenising it
        self.n_vocab: int = lib.llama_vocab_n_tokens(self.vocab)
        self.adds_bos: bool = bool(lib.llama_vocab_get_add_bos(self.vocab))
        self.bos: int = lib.llama_vocab_bos(self.vocab)
        # End of text, and end of a chat turn. llama.cpp guesses the latter from token names in no fixed order; our reader does not.
        self.end: int = lib.llama_vocab_eos(self.vocab)
        self.end_of_turn: int = info.eot_token if info.eot_token is not None else self.end

    def tokenize(self, text: str, *, special: bool = False) -> list[int]:
        """Tokens of `text`, without BOS. Control tokens are recognised only where `special`."""
        self._check_texts()
        raw = text.encode()
        tokens = (llama().llama_token * (len(raw) + 8))()
        n = llama().llama_tokenize(self.vocab, raw, len(raw), tokens, len(tokens), False, special)
        if n < 0:
            raise ModelError(f"{self.info.path}: the tokenizer needs {-n} tokens for {len(raw)} bytes of text.")
        return list(tokens[:n])

    def encode(self, segments: tuple[Segment, ...]) -> list[int]:
        """Tokens of a prompt's segments, user text and control text apart."""
        return [token for segment in segments for token in self.tokenize(segment.text, special=segment.special)]

    def piece(self, token: int) -> bytes:
        """The bytes that `token` stands for; empty for control tokens."""
        self._check_texts()
        room = ctypes.create_string_buffer(256)
        n = llama().llama_token_to_piece(self.vocab, token, room, len(room), 0, False)
        return room.raw[: max(n, 0)]

    def _check_texts(self) -> None:
        """Refuse what llama.cpp would end the process for."""
        if not self.has_texts:
            raise ModelError(f"{self.info.path}: is a part without vocabulary, which knows no texts of tokens; use the whole model for them.")

    def is_control(self, token: int) -> bool:
        """Whether `token` stands for no text."""
        if token not in self._controls:
            self._controls[token] = not self.piece(token)
        return self._controls[token]

    def is_end(self, token: int) -> bool:
        """Whether `token` ends a generation."""
        return bool(llama().llama_vocab_is_eog(self.vocab, token))

    def close(self) -> None:
        """Free what was loaded. Safe to call twice."""
        if self.handle:
            llama().llama_model_free(self.handle)
            self.handle = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class Model(Tokenizer):
    """Weights and vocabulary. Contexts and adapters must be closed before it.

    Without `needs_vocabulary` it may be a part of a model that has none: it computes with token ids or layer inputs, and refuses text.
    """

    def __init__(self, path: Path, options: ModelOptions = ModelOptions(), *, needs_vocabulary: bool = True) -> None:
        self.options = options
        lib = llama()
        parameters = lib.llama_model_default_params()
        parameters.load_mode = lib.LLAMA_LOAD_MODE_MMAP if options.mmap else lib.LLAMA_LOAD_MODE_NONE
        parameters.use_extra_bufts = options.repack
        parameters.n_gpu_layers = options.n_gpu_layers
        self._load(path, read_model_info(path, needs_vocabulary=needs_vocabulary), parameters)
        if lib.llama_model_has_encoder(self.handle) or lib.llama_model_is_recurrent(self.handle):
            self.close()
            raise ModelError(
                f"{path}: architecture {self.info.architecture!r} is not a decoder-only transformer; "
                "only those keep a prompt's KV cache apart from the answer."
            )
        self.n_embd: int = lib.llama_model_n_embd(self.handle)
        self.n_layers: int = lib.llama_model_n_layer(self.handle)
