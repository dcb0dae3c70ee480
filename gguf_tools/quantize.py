"""Make one GGUF model from another through llama.cpp's quantiser.

llama.cpp is imported when a function is called, not with the module. It aborts on files and on requests that it does not expect, so
the source and the recipe are checked by us first, and the result too, before it takes the target's place.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGMLQuantizationType
from gguf.quants import quant_shape_to_byte_shape
from numpy.typing import NDArray

from gguf_tools.errors import FileError
from gguf_tools.imatrix import Importance, check_importance, read_imatrix
from gguf_tools.library import llama_cpp
from gguf_tools.model import ModelInfo, read_model_info
from gguf_tools.output import Progress, new_file
from gguf_tools.recipe import Recipe, file_type, tensor_overrides

Path_ = str | os.PathLike[str]

# Rows of one tensor that the quantiser holds at a time. Its own 8 GiB would take 2.1 GB for the embeddings of LLaMA 3.
_BUFFER_BYTES = 1 << 28
_TENSOR = re.compile(r"\[\s*(\d+)/\s*(\d+)\]")

_log_lock = threading.Lock()


def quantize_model(
    source: Path_,
    target: Path_,
    type: str | Recipe,
    *,
    allow_requantize: bool = True,
    n_threads: int | None = None,
    progress: Progress | None = None,
    force: bool = False,
) -> ModelInfo:
    """Write `source` with its matrices as `type` (`Q8_0`, `int4`, `Q4_K_M`, ..., or a `Recipe`) to `target`; returns what that is.

    `allow_requantize` lets an already quantised source be quantised again, which loses a little more than starting from F16.
    `n_threads` of None takes all processors. `progress` is called before each tensor; what it raises ends the work. The target
    appears only when it is complete.

    Raises:
        FileError: the recipe does not fit the model, the source is no model, `target` exists without `force`, or llama.cpp refuses,
            with its reason.
    """
    recipe = Recipe(type) if isinstance(type, str) else type
    ftype = file_type(recipe)
    info = read_model_info(source)
    importance = read_imatrix(recipe.imatrix) if recipe.imatrix is not None else {}
    if recipe.imatrix is not None:
        check_importance(importance, info, str(recipe.imatrix))
    overrides = tensor_overrides(recipe, info, frozenset(importance))
    return _run(
        source, target, f"cannot be quantised to {ftype.name.removeprefix('MOSTLY_').removeprefix('ALL_')}",
        progress=progress, force=force, ftype=int(ftype), allow_requantize=allow_requantize, nthread=n_threads or 0,
        pure=recipe.pure, **_overrides(overrides), **_importance(importance),
    )  # fmt: skip


def _overrides(types: list[tuple[str, GGMLQuantizationType]]) -> dict[str, Any]:
    """Exact types of single tensors as llama.cpp wants them: regular expressions, ended by an empty entry."""
    if not types:
        return {}
    entries = (llama_cpp().llama_model_tensor_override * (len(types) + 1))()
    for entry, (name, kind) in zip(entries, types, strict=False):
        entry.pattern, entry.type = f"^{re.escape(name)}$".encode(), int(kind)
    return {"tt_overrides": entries}


def _importance(values: Importance) -> dict[str, Any]:
    if not values:
        return {}
    entries = (llama_cpp().llama_model_imatrix_data * (len(values) + 1))()
    for entry, (name, numbers) in zip(entries, values.items(), strict=False):
        entry.name, entry.size = name.encode(), numbers.size
        entry.data = numbers.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    return {"imatrix": entries}


def _run(
    source: Path_, target: Path_, what: str, *, progress: Progress | None = None, force: bool = False, **options: Any
) -> ModelInfo:
    """Run llama_model_quantize with `options` set in its parameters; `what` begins the sentence of its failure."""
    if os.path.realpath(source) == os.path.realpath(target):
        raise FileError(f"{target}: is the source as well; the result needs another path.")
    with new_file(target, force=force) as temporary:
        temporary.touch()  # so that an unwritable folder is named by the system, not as an "iostream error"
        library = llama_cpp()
        with _captured_log(library, progress) as log:
            library.llama_backend_init()
            params = library.llama_model_quantize_default_params()
            params.max_buf_size = _BUFFER_BYTES
            for option, value in options.items():
                setattr(params, option, value)
            status = library.llama_model_quantize(os.fsencode(source), os.fsencode(temporary), ctypes.byref(params))
        if status != 0:
            raise FileError(f"{source}: {what}: {_reason(log)}")
        try:
            read_model_info(temporary)
        except FileError as error:
            raise FileError(f"{source}: {what}: llama.cpp wrote a damaged file ({error})") from error
    return read_model_info(target)


def _reason(log: list[str]) -> str:
    """The last thing llama.cpp said when it gave up, without the name of its function."""
    for text in reversed("".join(log).splitlines()):
        if "failed to quantize:" in text:
            reason = text.partition("failed to quantize:")[2].strip().rstrip(".")
            return "the result could not be written; is the disk full?" if "iostream error" in reason else reason
    return "llama.cpp gave no reason"


@contextmanager
def _captured_log(library: Any, progress: Progress | None) -> Iterator[list[str]]:
    """Collect llama.cpp's log, one for the whole process, instead of printing it; the old receiver comes back.

    Each tensor begins with a line `[ 12/ 272] ...`, which is the only place where Python runs during the work. C code cannot be left
    by an exception: after one, files may grow no more, which llama.cpp notices when it writes the next tensor.
    """
    lines: list[str] = []
    raised: list[BaseException] = []
    restore: list[Callable[[], None]] = []

    def stop(error: BaseException) -> None:
        if not raised:
            raised.append(error)
            restore.append(_forbid_growth())

    @library.llama_log_callback  # type: ignore[untyped-decorator]
    def receive(level: int, text: bytes, user_data: ctypes.c_void_p) -> None:
        if raised:
            return
        try:
            lines.append(text.decode("utf-8", "replace"))
            tensor = _TENSOR.match(lines[-1])
            if tensor and progress:
                progress(int(tensor[1]), int(tensor[2]))
        except BaseException as error:  # noqa: BLE001 - raised again when llama.cpp has returned
            stop(error)

    with _log_lock, _interrupted_by(stop):
        previous, user_data = library.llama_log_callback(), ctypes.c_void_p()
        library.llama_log_get(ctypes.byref(previous), ctypes.byref(user_data))
        library.llama_log_set(receive, ctypes.c_void_p(0))
        try:
            yield lines
        finally:
            library.llama_log_set(previous, user_data)
            for undo in restore:
                undo()
    if raised:
        raise raised[0]


@contextmanager
def _interrupted_by(stop: Callable[[BaseException], None]) -> Iterator[None]:
    """Ctrl-C as a call of `stop`: raised on the way into a callback, KeyboardInterrupt would be printed and forgotten."""
    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, lambda number, frame: stop(KeyboardInterrupt()))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _forbid_growth() -> Callable[[], None]:
    """Make this process's next write to a file fail (Python ignores the signal that comes with it); returns how to undo it."""
    try:
        import resource
    except ImportError:  # Windows: the work goes on to its end
        return lambda: None
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@functools.cache
def _ggml() -> Any:
    """The library of ggml, which has the quantisers that the `gguf` package lacks (all with 256 values a block)."""
    folder = Path(llama_cpp().__file__).parent / "lib"
    for path in sorted(folder.glob("*ggml-base*")):
        library = ctypes.CDLL(str(path))
        function = getattr(library, "ggml_quantize_chunk", None)
        if function is not None:
            function.restype = ctypes.c_size_t
            function.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]
            return library
    raise FileError(f"{folder}: holds no ggml-base library with ggml_quantize_chunk; install llama-cpp-python 0.3.36.")


def quantize_rows(
    values: NDArray[np.float32],  # (n_rows, n_in), n_in whole blocks of the type
    kind: GGMLQuantizationType,  # of recipe.TENSOR_TYPES, and none of recipe.NEEDS_IMPORTANCE
) -> NDArray[np.uint8]:  # (n_rows, bytes of a row)
    """Rows in a tensor type, as llama.cpp's quantiser makes them without an importance matrix."""
    source = np.ascontiguousarray(values, np.float32)
    result = np.empty(quant_shape_to_byte_shape(source.shape, kind), np.uint8)
    written = _ggml().ggml_quantize_chunk(int(kind), source.ctypes.data, result.ctypes.data, 0, *source.shape, None)
    assert written == result.nbytes
    return result
