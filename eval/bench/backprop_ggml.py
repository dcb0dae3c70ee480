"""llama.cpp's own optimiser on the same quantised file: back-propagation without a second framework, to compare with.

It minimises the loss of every token of whole windows, questions included, because ggml's cross entropy takes a label for each position and
its gradient knows no mask; the adapter is on everywhere, scope `all`. Only what needs no change of llama.cpp is used: B of an adapter that
was loaded as usual, marked as parameters. Gradients pass through attention only if a window is one micro-batch.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fwdllama.errors import EngineError
from fwdllama.llama.adapter import LoadedAdapter, Values
from fwdllama.llama.binding import ggml, llama
from fwdllama.llama.context import Context, ContextOptions
from fwdllama.llama.model import Model, ModelOptions
from fwdllama.types import Encoded
from gguf_tools.adapter import read_adapter
from gguf_tools.plan import CELLS, whole_cells

I32, ADAMW = 26, 0  # GGML_TYPE_I32, GGML_OPT_OPTIMIZER_TYPE_ADAMW
Windows = NDArray[np.int32]  # (n, n_ctx + 1): each predicts its own next tokens

_SYMBOLS: dict[str, tuple[Any, list[Any]]] = {
    "ggml_set_param": (None, [ctypes.c_void_p]),
    "ggml_opt_dataset_init": (ctypes.c_void_p, [ctypes.c_int, ctypes.c_int, *[ctypes.c_int64] * 4]),
    "ggml_opt_dataset_data": (ctypes.c_void_p, [ctypes.c_void_p]),
    "ggml_opt_dataset_labels": (ctypes.c_void_p, [ctypes.c_void_p]),
    "ggml_opt_dataset_free": (None, [ctypes.c_void_p]),
}


class Rates(ctypes.Structure):
    """`struct ggml_opt_optimizer_params`: AdamW's numbers, then SGD's."""

    _fields_ = tuple((name, ctypes.c_float) for name in ("alpha", "beta1", "beta2", "eps", "wd", "sgd_alpha", "sgd_wd"))


class Params(ctypes.Structure):
    """`struct llama_opt_params`; llama_cpp's own lacks the last member."""

    _fields_ = (
        ("n_ctx_train", ctypes.c_uint32),
        ("param_filter", ctypes.c_void_p),
        ("param_filter_ud", ctypes.c_void_p),
        ("get_opt_pars", ctypes.c_void_p),
        ("get_opt_pars_ud", ctypes.c_void_p),
        ("optimizer_type", ctypes.c_int),
    )


def windows(examples: Sequence[Encoded], n_ctx: int) -> Windows:
    """Whole examples one behind the other, prompt and answer, cut into windows; a rest that fills none is left out.

    >>> windows([Encoded("a", (1, 2), (3,), (4, 5)), Encoded("b", (6,), (7,), (8, 9))], 3).tolist()
    [[1, 2, 3, 4], [4, 5, 6, 7]]
    """
    tokens = np.array([token for e in examples for token in (*e.prompt, *e.invocation, *e.target)], np.int32)
    n = (len(tokens) - 1) // n_ctx
    return np.stack([tokens[i * n_ctx : (i + 1) * n_ctx + 1] for i in range(n)]) if n else np.zeros((0, n_ctx + 1), np.int32)


class Optimiser:
    """A model, an adapter whose B is trained, and AdamW over one window a step. Use as a context manager."""

    def __init__(self, path: Path, initial: Path, n_ctx: int, rate: float, n_threads: int) -> None:
        """`initial` is the adapter to start from.

        Raises:
            EngineError: this build hides what is needed, adapters cannot be written in place, or llama.cpp would make windows longer.
        """
        if whole_cells(n_ctx) != n_ctx:
            raise EngineError(f"windows of {n_ctx} tokens are not what llama.cpp makes of them; take a multiple of {CELLS}.")
        library, lib = ggml(), llama()
        lacking = [name for name in _SYMBOLS if not hasattr(library, name)]
        if library is None or lacking or not hasattr(library, "ggml_opt_get_constant_optimizer_params"):
            raise EngineError(f"this build of llama.cpp lacks {', '.join(lacking) or 'its optimiser'}.")
        for name, (result, arguments) in _SYMBOLS.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
        self.library, self.n_ctx = library, n_ctx
        self.model = Model(path, ModelOptions(mmap=False, repack=False))  # rearranged weights have no backward pass
        self.initial = read_adapter(initial)
        self.adapter = LoadedAdapter(self.model, self.initial, writing="in-place")
        options = ContextOptions(n_ctx, 1, n_outputs=n_ctx, n_batch=n_ctx, n_threads=n_threads, kv_type="f32", flash=False)
        self.context = Context(self.model, options)
        self.adapter.attach(self.context, True)
        for name, address in self.adapter.addresses.items():
            if name.endswith(".lora_b"):
                library.ggml_set_param(address)
        self.rates = Rates(rate, 0.9, 0.999, 1e-8, 0.0, 0.0, 0.0)
        constant = ctypes.cast(library.ggml_opt_get_constant_optimizer_params, ctypes.c_void_p)
        nothing = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_void_p)(lambda tensor, user: False)
        self._nothing = nothing  # none of the model's own tensors; kept for as long as llama.cpp may call it
        params = Params(
            n_ctx, ctypes.cast(nothing, ctypes.c_void_p), None, constant, ctypes.cast(ctypes.pointer(self.rates), ctypes.c_void_p), ADAMW
        )
        # By its address, because llama_cpp's own argument types are of its own shorter struct.
        init = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, Params)(ctypes.cast(lib.llama_opt_init, ctypes.c_void_p).value or 0)
        init(self.context.handle, self.model.handle, params)
        self.dataset = library.ggml_opt_dataset_init(I32, I32, n_ctx, n_ctx, 1, 1)

    def step(self, window: NDArray[np.int32]) -> None:
        """One step of AdamW on a window (n_ctx + 1,)."""
        for tensor, values in ((self.library.ggml_opt_dataset_data, window[:-1]), (self.library.ggml_opt_dataset_labels, window[1:])):
            whole = np.ascontiguousarray(values, np.int32)
            ctypes.memmove(self.library.ggml_get_data(tensor(self.dataset)), whole.ctypes.data, whole.nbytes)
        llama().llama_opt_epoch(self.context.handle, self.dataset, None, None, 1, None, None)

    def values(self) -> Values:
        """The trained numbers as they are now, copied."""
        found = {}
        for name, (_, b) in self.initial.tensors.items():
            held = np.empty(b.shape, np.float32)
            self.library.ggml_backend_tensor_get(self.adapter.addresses[f"{name}.lora_b"], held.ctypes.data, 0, held.nbytes)
            found[f"{name}.lora_b"] = held
        return found

    def close(self) -> None:
        """Free everything. Safe to call twice."""
        if self.dataset:
            self.library.ggml_opt_dataset_free(self.dataset)
            self.dataset = None
        self.adapter.close()
        self.context.close()
        self.model.close()

    def __enter__(self) -> Optimiser:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def trained(
    path: Path, initial: Path, data: Windows, rate: float, n_threads: int, *, seconds: float, n_kept: int
) -> list[tuple[float, int, Values]]:
    """(seconds, steps, B) at about `n_kept` moments of a training of `seconds`, the beginning and the end among them.

    The learning rate falls linearly to a twentieth, as in torch's training.
    """
    with Optimiser(path, initial, data.shape[1] - 1, rate, n_threads) as optimiser:
        kept = [(0.0, 0, optimiser.values())]
        begun, n = time.perf_counter(), 0
        while (elapsed := time.perf_counter() - begun) < seconds:
            optimiser.rates.alpha = rate * (1 - 0.95 * elapsed / seconds)
            optimiser.step(data[n % len(data)])
            n += 1
            elapsed = time.perf_counter() - begun
            if elapsed >= min(seconds, len(kept) * seconds / n_kept):
                kept.append((elapsed, n, optimiser.values()))
        return kept
