"""llama.cpp's shared libraries: loaded once, checked once, quiet.

`llama-cpp-python` wraps libllama but not ggml, so the few ggml functions that in-place adapters need are bound here. Builds with
the same package name and another LoRA API are in circulation, hence the check of symbols before anything else.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import sys
from pathlib import Path
from typing import Any

from fwdllama.errors import EngineError
from gguf_tools.library import llama_cpp as loaded

log = logging.getLogger("fwdllama.llama")
engine_log = logging.getLogger("fwdllama.llama.cpp")  # llama.cpp's own words, apart so that they can be silenced

TESTED_VERSION = "0.3.36"

_LLAMA_SYMBOLS = (
    "llama_model_load_from_file",
    "llama_init_from_model",
    "llama_decode",
    "llama_get_logits",
    "llama_memory_seq_rm",
    "llama_memory_seq_cp",
    "llama_adapter_lora_init",
    "llama_adapter_lora_init_from_file_ptr",
    "llama_adapter_lora_free",
    "llama_set_adapters_lora",
)
_GGML_SYMBOLS = {
    "ggml_get_name": (ctypes.c_char_p, [ctypes.c_void_p]),
    "ggml_get_data": (ctypes.c_void_p, [ctypes.c_void_p]),
    "ggml_nbytes": (ctypes.c_size_t, [ctypes.c_void_p]),
    "ggml_tensor_overhead": (ctypes.c_size_t, []),
    "ggml_backend_tensor_set": (None, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]),
    "ggml_backend_tensor_get": (None, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]),
    "ggml_backend_buffer_is_host": (ctypes.c_bool, [ctypes.c_void_p]),
    "ggml_get_type_traits": (ctypes.c_void_p, [ctypes.c_int]),
}

# llama.cpp's own log level -> ours. 5 means "continues the line before".
_LEVELS = {1: logging.DEBUG, 2: logging.DEBUG, 3: logging.WARNING, 4: logging.ERROR, 5: logging.DEBUG}


class TensorHead(ctypes.Structure):
    """Mirror of `struct ggml_tensor` (ggml.h) up to its name. Never trusted before `layout_is_known` said so."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * 10),
        ("view_src", ctypes.c_void_p),
        ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char * 64),
        ("extra", ctypes.c_void_p),
        ("padding", ctypes.c_char * 8),
    )


class TypeTraits(ctypes.Structure):
    """Mirror of `struct ggml_type_traits` (ggml.h). Its name and sizes must be compared with what is known of the type."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.c_void_p),
        ("from_float_ref", ctypes.c_void_p),
    )


_OBJECT_HEADER_BYTES = 32  # sizeof(struct ggml_object), which ggml_tensor_overhead() includes


@functools.cache
def llama() -> Any:
    """The `llama_cpp` module, backend initialised and its log routed to `logging`.

    Raises:
        EngineError: it is not installed, or it lacks a function that training needs.
    """
    try:
        llama_cpp = loaded()
    except (ImportError, OSError, RuntimeError) as error:
        raise EngineError(f"llama-cpp-python cannot be loaded ({error}). Install version {TESTED_VERSION}.") from error
    missing = [name for name in _LLAMA_SYMBOLS if not hasattr(llama_cpp, name)]
    if missing:
        raise EngineError(
            f"llama-cpp-python {llama_cpp.__version__} at {llama_cpp.__file__} lacks {', '.join(missing)}. "
            f"Install version {TESTED_VERSION} of llama-cpp-python."
        )
    llama_cpp.llama_log_set(_log_callback(llama_cpp), ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    return llama_cpp


@functools.cache
def _log_callback(llama_cpp: Any) -> Any:
    def write(level: int, text: bytes, _user_data: object) -> None:
        expected = b"dummy tokens" in text  # a part without vocabulary has no others
        engine_log.log(logging.DEBUG if expected else _LEVELS.get(level, logging.DEBUG), "%s", text.decode(errors="replace").rstrip())

    return llama_cpp.llama_log_callback(write)


@functools.cache
def ggml() -> Any | None:
    """`libggml-base` with typed functions, or None where the installed build hides them (in-place writing is then off)."""
    folder = Path(llama().__file__).parent / "lib"
    endings = {"darwin": "dylib", "win32": "dll"}
    found = sorted(folder.glob(f"*ggml-base*.{endings.get(sys.platform, 'so')}"))
    if not found:
        return None
    library = ctypes.CDLL(str(found[0]))
    for name, (result, arguments) in _GGML_SYMBOLS.items():
        function = getattr(library, name, None)
        if function is None:
            log.warning("%s lacks %s: adapters will be reloaded instead of rewritten in place", found[0], name)
            return None
        function.restype, function.argtypes = result, arguments
    return library


def build() -> list[str]:
    """The release of llama.cpp and what it was compiled for. Kernels differ between both, so what was computed is kept for one of each."""
    return [llama().__version__, llama().llama_print_system_info().decode()]


def layout_is_known() -> bool:
    """Whether `TensorHead` has the size of this build's `struct ggml_tensor`."""
    library = ggml()
    return library is not None and library.ggml_tensor_overhead() == ctypes.sizeof(TensorHead) + _OBJECT_HEADER_BYTES


def missing_symbols() -> list[str]:
    """What this build lacks for training; empty when all is well. For `fwdllama doctor`.

    Raises:
        EngineError: llama-cpp-python cannot be loaded at all.
    """
    library = ggml()
    return [] if library is not None else sorted(_GGML_SYMBOLS)
