"""An adapter in memory whose numbers change between two decodes.

Three ways, chosen by a self-test at start and logged: writing the adapter's own ggml tensors in place (0.2 ms for 60 tensors, and
the compute graph is kept); reloading it from memory through `fmemopen` (about 10 ms, and graphs are rebuilt); reloading it from a
temporary file, where the C library has no `fmemopen`. All three give bit-identical losses.
"""

from __future__ import annotations

import ctypes
import logging
import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fwdllama.errors import EngineError
from fwdllama.llama.binding import TensorHead, ggml, layout_is_known, llama
from fwdllama.llama.context import Context, ContextOptions
from fwdllama.llama.model import Model
from gguf_tools.adapter import Adapter, adapter_bytes, write_adapter

log = logging.getLogger("fwdllama.llama")
Writing = Literal["in-place", "memory-file", "temp-file"]
Values = dict[str, NDArray[np.float32]]  # "blk.0.attn_q.weight.lora_b" -> (n_out, rank)


class LoadedAdapter:
    """An adapter that llama.cpp holds; `update` replaces some of its tensors, `attach` switches it on in a context."""

    def __init__(self, model: Model, adapter: Adapter, *, writing: Writing | None = None) -> None:
        self.model, self._adapter = model, adapter
        self._contexts: list[tuple[Context, bool]] = []
        self._targets: dict[str, NDArray[np.float32] | int] = {}
        self.addresses: dict[str, int] = {}  # of the tensors whose numbers are this process's own memory
        self.handle, self.writing = self._load(writing)
        log.info("adapter of %d matrices is rewritten by: %s", len(adapter.tensors), self.writing)

    @property
    def rank(self) -> int:
        """The largest of its matrices'."""
        return max(self._adapter.ranks.values(), default=0)

    def _load(self, wanted: Writing | None) -> tuple[int, Writing]:
        attempts: list[tuple[Writing, Callable[[], int]]] = [
            ("in-place", self._load_in_place),
            ("memory-file", self._load_memory_file),
            ("temp-file", self._load_temp_file),
        ]
        reasons = []
        for name, load in attempts:
            if wanted in (None, name):
                try:
                    return load(), name
                except EngineError as error:
                    reasons.append(f"{name}: {error}")
                    log.warning("adapters cannot be rewritten by %s: %s", name, error)
        raise EngineError("the adapter cannot be loaded: " + "; ".join(reasons))

    def _load_memory_file(self) -> int:
        libc = ctypes.CDLL(None)
        if not hasattr(libc, "fmemopen"):
            raise EngineError("the C library has no fmemopen.")
        libc.fmemopen.restype, libc.fmemopen.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
        libc.fclose.argtypes = [ctypes.c_void_p]
        image = adapter_bytes(self._adapter)
        stream = libc.fmemopen(image, len(image), b"rb")
        if not stream:
            raise EngineError("fmemopen failed.")
        try:
            handle = llama().llama_adapter_lora_init_from_file_ptr(self.model.handle, stream)
        finally:
            libc.fclose(stream)
        return self._checked(handle)

    def _load_temp_file(self) -> int:
        descriptor, path = tempfile.mkstemp(suffix=".gguf")
        os.close(descriptor)
        try:
            write_adapter(Path(path), self._adapter)
            return self._checked(llama().llama_adapter_lora_init(self.model.handle, path.encode()))
        finally:
            os.unlink(path)

    def _checked(self, handle: int | None) -> int:
        if not handle:
            raise EngineError("llama.cpp refused the adapter; run with --debug to see its own words.")
        return handle

    def _load_in_place(self) -> int:
        if not layout_is_known():
            raise EngineError("this build's struct ggml_tensor has another layout.")
        try:
            handle = self._load_memory_file()
        except EngineError:
            handle = self._load_temp_file()
        try:
            self._capture(handle)
        except EngineError:
            self._targets, self.addresses = {}, {}
            llama().llama_adapter_lora_free(handle)
            raise
        return handle

    def _capture(self, handle: int) -> None:
        """Find the adapter's tensors by watching one tiny evaluation ask for its nodes, and check every guard."""
        library = ggml()
        assert library is not None
        found: dict[str, int] = {}

        def look(node: int, ask: bool, _user_data: object) -> bool:
            source = TensorHead.from_address(node).src[0] if ask else None
            if source:
                name = library.ggml_get_name(source)
                if name and name.endswith((b".lora_a", b".lora_b")):
                    found[name.decode()] = source
            return not ask  # never ask for a node's data: the graph stays whole

        scout_options = ContextOptions(n_ctx_seq=64, n_seq=1, n_outputs=1, n_batch=8, n_threads=1)
        with Context(self.model, scout_options, eval_callback=look) as scout:
            _attach(scout, handle, True)
            row = np.arange(2, dtype=np.int32)
            scout.decode(row + 1, row, np.zeros(2, np.int32), np.array([0, 1], np.int8))
            _attach(scout, handle, False)
        loaded = {f"{n}.lora_{x}": v for n, pair in self._adapter.tensors.items() for x, v in zip("ab", pair, strict=True)}
        if found.keys() != loaded.keys():
            raise EngineError(f"{len(loaded.keys() - found.keys())} of {len(loaded)} adapter tensors were not seen in the graph.")
        for name, address in found.items():
            head = TensorHead.from_address(address)
            values = loaded[name]
            same_name = head.name == library.ggml_get_name(address)
            if not same_name or head.type != 0 or library.ggml_nbytes(address) != values.nbytes:
                raise EngineError(f"the mirror of {name} does not agree with ggml.")
            held = np.empty_like(values)
            library.ggml_backend_tensor_get(address, held.ctypes.data, 0, held.nbytes)
            if not np.array_equal(held, values):
                raise EngineError(f"{name} in memory is not what was loaded.")
            if library.ggml_backend_buffer_is_host(head.buffer):
                data = (ctypes.c_float * values.size).from_address(library.ggml_get_data(address))
                self._targets[name] = np.ctypeslib.as_array(data).reshape(values.shape)
                self.addresses[name] = address
            else:
                self._targets[name] = address

    def update(self, values: Values) -> None:
        """Replace the named tensors; shapes must be those of the adapter.

        Raises:
            EngineError: a number is not finite; the adapter stays as it was.
        """
        check_finite(values)
        if self.writing == "in-place":
            for name, new in values.items():
                target = self._targets[name]
                if isinstance(target, np.ndarray):
                    target[:] = new
                else:
                    whole = np.ascontiguousarray(new)
                    ggml().ggml_backend_tensor_set(target, whole.ctypes.data, 0, whole.nbytes)  # type: ignore[union-attr]
            return
        tensors = dict(self._adapter.tensors)
        for name, new in values.items():
            weight, part = name.rsplit(".lora_", 1)
            a, b = tensors[weight]
            tensors[weight] = (new.copy(), b) if part == "a" else (a, new.copy())
        before, old = self._adapter, self.handle
        self._adapter = replace(before, tensors=tensors)
        try:
            self.handle = self._load_memory_file() if self.writing == "memory-file" else self._load_temp_file()
        except BaseException:
            self._adapter = before
            raise
        for context, on in self._contexts:  # this replaces the whole set, so the old one is off before it is freed
            if context.handle:
                _attach(context, self.handle, on)
        llama().llama_adapter_lora_free(old)

    def attach(self, context: Context, on: bool) -> None:
        """Switch the adapter on or off for every later decode of `context`."""
        self._contexts = [(c, o) for c, o in self._contexts if c is not context] + [(context, on)]
        _attach(context, self.handle, on)

    def close(self) -> None:
        """Detach from every context that is still open and free. Must come before the model is closed; safe to call twice."""
        for context, on in self._contexts:
            if on and context.handle:
                _attach(context, self.handle, False)
        self._contexts = []
        self._targets, self.addresses = {}, {}
        if self.handle:
            llama().llama_adapter_lora_free(self.handle)
            self.handle = 0


def check_finite(values: Values) -> None:
    """llama.cpp computes with anything.

    Raises:
        EngineError: a number is not finite.
    """
    for name, new in values.items():
        if not np.isfinite(new).all():
            raise EngineError(f"{name} would hold numbers that are not finite: the steps before have diverged.")


def _attach(context: Context, handle: int, on: bool) -> None:
    lib = llama()
    handles = (lib.llama_adapter_lora_p_ctypes * 1)(handle)
    scales = (ctypes.c_float * 1)(1.0)
    if lib.llama_set_adapters_lora(context.handle, handles, 1 if on else 0, scales) != 0:
        raise EngineError("llama.cpp refused to switch the adapter.")
