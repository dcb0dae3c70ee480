"""A minimal user of llama.cpp's low-level API, to see what it makes of the files that are written here."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
from numpy.typing import NDArray


class Llama:
    """A model and a context of 128 tokens on one thread, with at most one adapter; `exact` keeps attention in F32."""

    def __init__(self, path: Path, adapter: Path | None = None, *, exact: bool = False) -> None:
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        assert self.model, f"llama.cpp does not load {path}"
        self.vocab = llama_cpp.llama_model_get_vocab(self.model)
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = 128
        params.n_threads = params.n_threads_batch = 1
        if exact:  # otherwise keys and values are rounded to F16: 1.5e-3 in logits of deviation 1
            params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
            params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        self.adapter = None
        if adapter is not None:
            self.adapter = llama_cpp.llama_adapter_lora_init(self.model, str(adapter).encode())
            assert self.adapter, f"llama.cpp does not load {adapter}"
            adapters = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(self.adapter)
            assert llama_cpp.llama_set_adapters_lora(self.context, adapters, 1, (ctypes.c_float * 1)(1.0)) == 0

    def tokenise(self, text: str, *, special: bool = False) -> list[int]:
        raw = text.encode()
        out = (llama_cpp.llama_token * (len(raw) + 8))()
        n = llama_cpp.llama_tokenize(self.vocab, raw, len(raw), out, len(out), False, special)
        return list(out[:n])

    def text(self, tokens: Sequence[int]) -> str:
        out, raw = (ctypes.c_char * 64)(), b""
        for token in tokens:
            n = llama_cpp.llama_token_to_piece(self.vocab, token, out, 64, 0, True)
            raw += out.raw[:n]
        return raw.decode()

    def logits(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """The logits after each token: (n_tokens, n_vocab)."""
        batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = token, i, 1, 0, 1
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        assert llama_cpp.llama_decode(self.context, batch) == 0
        llama_cpp.llama_batch_free(batch)
        n_vocab = llama_cpp.llama_vocab_n_tokens(self.vocab)
        pointer = llama_cpp.llama_get_logits(self.context)
        return np.ctypeslib.as_array(pointer, (len(tokens), n_vocab)).copy()

    def close(self) -> None:
        llama_cpp.llama_free(self.context)
        if self.adapter is not None:
            llama_cpp.llama_adapter_lora_free(self.adapter)
        llama_cpp.llama_model_free(self.model)


class Opener:
    """Opens models and closes them at the end of the test."""

    def __init__(self) -> None:
        self.opened: list[Llama] = []

    def __call__(self, path: Path, adapter: Path | None = None, *, exact: bool = False) -> Llama:
        self.opened.append(Llama(path, adapter, exact=exact))
        return self.opened[-1]


@pytest.fixture
def open_llama() -> Iterator[Opener]:
    """Call it with a model's path, and an adapter's, for a `Llama`."""
    llama_cpp.llama_backend_init()
    quiet = llama_cpp.llama_log_callback(lambda level, text, user_data: None)
    before, user_data = llama_cpp.llama_log_callback(), ctypes.c_void_p()
    llama_cpp.llama_log_get(ctypes.byref(before), ctypes.byref(user_data))
    llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
    opener = Opener()
    yield opener
    for llama in opener.opened:
        llama.close()
    llama_cpp.llama_log_set(before, user_data)
