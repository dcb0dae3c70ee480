"""A context: a KV cache of several sequences and the decode that fills it.

`kv_unified=False` gives every sequence its own stream of cells, which keeps attention exact and cheap for many sequences; its
price is that one micro-batch holds equally many tokens of each sequence, so callers pad answers to one width.
"""

from __future__ import annotations

import ctypes
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fwdllama.errors import EngineError, ResourceError
from fwdllama.llama.binding import llama
from fwdllama.llama.model import Model

KV_TYPES = ("f16", "f32", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")  # bf16 has no name in llama_cpp
Tokens = NDArray[np.int32]
States = NDArray[np.float32]  # (n_tokens, n_embd), the values that enter or leave a layer


@dataclass(frozen=True)
class ContextOptions:
    """Sizes and types of a context.

    n_ctx_seq: cells of each sequence. n_outputs: the most logits rows one decode may ask for; it sizes the compute buffer.
    """

    n_ctx_seq: int
    n_seq: int
    n_outputs: int
    n_batch: int = 512
    n_threads: int = 2
    kv_type: str = "f16"
    flash: bool = True


class Context:
    """One llama.cpp context. Times its decodes: `decode_s` and `n_decoded` grow with every call."""

    def __init__(self, model: Model, options: ContextOptions, *, eval_callback: Any = None) -> None:
        lib = llama()
        self.model, self.options = model, options
        most = lib.llama_max_parallel_sequences()
        if options.n_seq > most:
            raise ResourceError(
                f"a context of {options.n_seq} sequences is asked for, but llama.cpp holds at most {most}: a batch and its held-out examples "
                "are one sequence each. Use a smaller batch or fewer held-out examples."
            )
        parameters = lib.llama_context_default_params()
        parameters.n_ctx = options.n_ctx_seq * options.n_seq
        parameters.n_batch = parameters.n_ubatch = options.n_batch
        parameters.n_seq_max = options.n_seq
        parameters.n_outputs_max = max(options.n_outputs, options.n_seq)  # fewer than sequences aborts the process
        parameters.n_threads = parameters.n_threads_batch = options.n_threads
        parameters.kv_unified = False
        parameters.flash_attn_type = 1 if options.flash else 0
        parameters.type_k = parameters.type_v = getattr(lib, f"GGML_TYPE_{options.kv_type.upper()}")
        parameters.no_perf = True
        parameters.swa_full = True  # sliding-window caches cannot forget an answer and keep the prompt otherwise
        if eval_callback is not None:
            self._callback = parameters.cb_eval = lib.ggml_backend_sched_eval_callback(eval_callback)
        self.handle = lib.llama_init_from_model(model.handle, parameters)
        if not self.handle:
            raise ResourceError(
                f"llama.cpp cannot create a context of {options.n_seq} x {options.n_ctx_seq} tokens for {model.info.path}: "
                "most likely memory is short. Use a smaller --batch or --ctx."
            )
        self.memory = lib.llama_get_memory(self.handle)
        self.decode_s, self.n_decoded = 0.0, 0
        self._is_copying = False
        n = self.n_batch = lib.llama_n_batch(self.handle)  # at most n_ctx, whatever was asked for
        self._token, self._pos = np.zeros(n, np.int32), np.zeros(n, np.int32)
        self._seq, self._n_seq_id = np.zeros(n, np.int32), np.ones(n, np.int32)
        self._wants = np.zeros(n, np.int8)
        starts = self._seq.ctypes.data + 4 * np.arange(n, dtype=np.uint64)
        self._seq_rows = np.ascontiguousarray(starts.astype(np.uint64))
        self._batch = lib.llama_batch(
            0,
            self._token.ctypes.data_as(ctypes.POINTER(lib.llama_token)),
            None,
            self._pos.ctypes.data_as(ctypes.POINTER(lib.llama_pos)),
            self._n_seq_id.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)),
            ctypes.cast(self._seq_rows.ctypes.data, ctypes.POINTER(ctypes.POINTER(lib.llama_seq_id))),
            self._wants.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)),
        )

    def decode(
        self,
        tokens: Tokens | NDArray[np.float32],  # (n,) token ids, or (n, n_embd) inputs of the first layer
        positions: Tokens,  # (n,)
        sequences: Tokens,  # (n,)
        wants: NDArray[np.int8],  # (n,) 1 where logits are asked for
    ) -> NDArray[np.float32] | None:
        """Run the model once over up to n_batch tokens; returns a view (n_wanted, n_vocab) of the logits, valid until the next call.

        Raises:
            EngineError: llama.cpp refused the batch.
        """
        n = len(tokens)
        n_wanted = int(wants.sum())
        if tokens.shape != ((n,) if tokens.dtype == np.int32 else (n, self.model.n_embd)):
            raise EngineError(
                f"a decode takes token ids, int32 (n,), or inputs, float32 (n, {self.model.n_embd}), "
                f"not {tokens.dtype} {tokens.shape}."
            )
        if n > self.n_batch or n_wanted > self.options.n_outputs:
            raise EngineError(
                f"a decode of {n} tokens and {n_wanted} outputs exceeds the context's {self.n_batch} and {self.options.n_outputs}."
            )
        batch = self._batch
        embedded = None
        if tokens.dtype == np.int32:
            self._token[:n] = tokens
            batch.token = self._token.ctypes.data_as(ctypes.POINTER(llama().llama_token))
            batch.embd = None
        else:
            embedded = np.ascontiguousarray(tokens, np.float32)
            batch.token = None
            batch.embd = embedded.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        self._pos[:n], self._seq[:n], self._wants[:n] = positions, sequences, wants
        batch.n_tokens = n
        begun = time.perf_counter()
        status = llama().llama_decode(self.handle, batch)
        logits = llama().llama_get_logits(self.handle) if status == 0 and n_wanted else None
        self.decode_s += time.perf_counter() - begun
        self.n_decoded += n
        self._is_copying = False
        if status != 0:
            reason = {1: "no room in the KV cache", 2: "aborted", -1: "invalid batch"}.get(status, "internal error")
            raise EngineError(f"llama_decode failed with {status} ({reason}) on {n} tokens.")
        if logits is None:
            return None
        address = ctypes.cast(logits, ctypes.c_void_p).value
        assert address
        data = (ctypes.c_float * (n_wanted * self.model.n_vocab)).from_address(address)
        return np.ctypeslib.as_array(data).reshape(n_wanted, self.model.n_vocab)

    def forget(self, sequence: int, start: int) -> None:
        """Drop the cells of `sequence` from position `start` on.

        Raises:
            EngineError: this architecture's memory cannot be cut.
        """
        if not llama().llama_memory_seq_rm(self.memory, sequence, start, -1):
            raise EngineError(f"{self.model.info.path}: this architecture's KV cache cannot drop an answer and keep its prompt.")

    def copy(self, source: int, target: int) -> None:
        """Make `target` hold what `source` holds.

        llama.cpp moves the numbers before its next decode only; `restore` waits for that, `saved` must not come before it.
        """
        llama().llama_memory_seq_cp(self.memory, source, target, -1, -1)
        self._is_copying = True

    def saved(self, sequence: int) -> NDArray[np.uint8]:
        """What `sequence` holds, as bytes that `restore` takes.

        Raises:
            EngineError: llama.cpp cannot tell.
        """
        size = llama().llama_state_seq_get_size(self.handle, sequence)
        state = np.empty(size, np.uint8)
        if llama().llama_state_seq_get_data(self.handle, _bytes(state), size, sequence) != size:
            raise EngineError(f"{self.model.info.path}: llama.cpp cannot save what a sequence of this architecture's KV cache holds.")
        return state

    def restore(self, sequence: int, state: NDArray[np.uint8]) -> None:
        """Make `sequence` hold what was saved, of this or another sequence of such a context; nothing at all where `state` is empty.

        Raises:
            EngineError: llama.cpp does not take it; the sequence may then hold anything.
        """
        self.forget(sequence, 0)
        if self._is_copying:  # of what may be in this sequence's cells still
            nowhere, one = np.full(1, sequence, np.int32), np.zeros(1, np.int8)
            self.decode(np.zeros((1, self.model.n_embd), np.float32), np.zeros(1, np.int32), nowhere, one)
            self.forget(sequence, 0)
        if len(state) and llama().llama_state_seq_set_data(self.handle, _bytes(state), len(state), sequence) != len(state):
            raise EngineError(f"{self.model.info.path}: llama.cpp does not take back what was saved of a sequence.")

    def clear(self) -> None:
        """Forget every sequence."""
        llama().llama_memory_clear(self.memory, False)

    def close(self) -> None:
        """Free the context. Safe to call twice."""
        if self.handle:
            llama().llama_free(self.handle)
            self.handle = None

    def __enter__(self) -> Context:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _bytes(values: NDArray[np.uint8]) -> Any:
    return values.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
