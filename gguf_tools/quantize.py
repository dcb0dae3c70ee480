"""Make one GGUF model from another through llama.cpp: requantise it, or keep only some of its layers.

llama.cpp is imported when a function is called, not with the module. It aborts on files it does not expect, so the
source is read by us first, and the result too, before it takes the target's place.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from gguf import LlamaFileType

from gguf_tools.errors import FileError
from gguf_tools.header import MODEL_LIMITS, Array, parse_header
from gguf_tools.mapping import mapped
from gguf_tools.model import ModelInfo, read_model_info
from gguf_tools.output import replacing

# What llama.cpp makes without an importance matrix, by the name that people use.
_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q5_1", "Q5_0", "Q4_K_M", "Q4_K_S", "Q4_1", "Q4_0",
          "IQ4_NL", "IQ4_XS", "Q3_K_L", "Q3_K_M", "Q3_K_S", "Q2_K")  # fmt: skip

# After how many layers an architecture repeats itself (sliding windows, layers without rotation): only a multiple of
# that can be cut off the front without changing what the remaining layers compute. Architectures not listed are not
# known.
_PERIODS = {"llama": 1, "qwen2": 1, "qwen3": 1, "gemma": 1, "gemma2": 2, "gemma3": 6, "smollm3": 4}
# llama.cpp scales attention differently for the model of this many layers, and would not for a part of it.
_SPECIAL_DEPTHS = {"gemma2": 46, "gemma3": 62}

_log_lock = threading.Lock()


def quantize_model(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    type: str,
    *,
    allow_requantize: bool = True,
    n_threads: int | None = None,
) -> ModelInfo:
    """Write `source` with its matrices as `type` (`Q8_0`, `Q4_0`, `Q4_K_M`, ...) to `target`, and return what that is.

    `allow_requantize` lets an already quantised source be quantised again, which loses a little more than starting
    from F16. `n_threads` of None takes all processors. The target appears only when it is complete.

    Raises:
        FileError: the type is unknown, the source is not a model, or llama.cpp refuses, with its reason.
    """
    name = type.upper()
    if name not in _TYPES:
        raise FileError(f"quantisation type {type!r} is unknown; these can be made: {', '.join(_TYPES)}.")
    read_model_info(source)
    ftype = LlamaFileType["ALL_F32" if name == "F32" else f"MOSTLY_{name}"]
    return _quantize(source, target, f"cannot be quantised to {name}", ftype=int(ftype),
                     allow_requantize=allow_requantize, nthread=n_threads or 0)  # fmt: skip


def extract_layers(source: str | os.PathLike[str], target: str | os.PathLike[str], first: int, last: int) -> ModelInfo:
    """Write a model of layers `first` to `last` - 1 alone, numbered from 0, unchanged, with embeddings and output.

    Fed the values that enter layer `first`, the layers up to the end give the logits of the whole model.

    Raises:
        FileError: there are no such layers, they would not compute the same in another place, or llama.cpp refuses.
    """
    info = read_model_info(source)
    if not 0 <= first < last <= info.n_layers:
        raise FileError(f"{source}: has layers 0 to {info.n_layers - 1}, but {first} to {last - 1} were asked for.")
    _check_movable(source, info, first, whole=last - first == info.n_layers)
    pruned = [i for i in range(info.n_layers) if not first <= i < last]
    layers = (ctypes.c_int32 * (len(pruned) + 1))(*pruned, -1)
    what = f"its layers {first} to {last - 1} cannot be extracted"
    return _quantize(source, target, what, only_copy=True, prune_layers=layers)


def can_be_cut(info: ModelInfo, first: int) -> bool:
    """Whether `extract_layers` can make a part of this model that begins at layer `first`."""
    try:
        stamp = os.stat(info.path)
    except OSError as error:
        raise FileError(f"{info.path}: cannot be read: {error.strerror or error}.") from None
    period = _period_or_none(info.path, (stamp.st_size, stamp.st_mtime_ns))
    return first == 0 or (period is not None and first % period == 0)


@lru_cache(maxsize=4)  # searching for a setting that fits asks hundreds of times
def _period_or_none(path: Path, stamp: tuple[int, int]) -> int | None:
    """`_period`, None where there is none; `stamp` tells another file of the same name apart."""
    try:
        return _period(path, read_model_info(path))
    except FileError:
        return None


def _check_movable(source: str | os.PathLike[str], info: ModelInfo, first: int, *, whole: bool) -> None:
    """Refuse a part whose layers depend on their number; llama.cpp would silently compute something else."""
    if whole:
        return
    period = _period(source, info)
    if first % period:
        raise FileError(f"{source}: layers of {info.architecture} repeat every {period}, so a part cannot begin at {first}.")


def _period(source: str | os.PathLike[str], info: ModelInfo) -> int:
    """After how many layers the model repeats itself.

    Raises:
        FileError: it does not, or not in a way that is known.
    """
    architecture = info.architecture
    period = _PERIODS.get(architecture)
    if period is None:
        raise FileError(
            f"{source}: layers of the architecture {architecture!r} may depend on their position; "
            f"they can be extracted from {', '.join(_PERIODS)}."
        )
    if info.n_layers == _SPECIAL_DEPTHS.get(architecture):
        raise FileError(f"{source}: a {architecture} model of {info.n_layers} layers computes differently in part.")
    with mapped(source) as data:
        header = parse_header(data, str(source), MODEL_LIMITS)
        for key, (_, value) in header.values.items():
            if key.startswith(f"{architecture}.") and isinstance(value, Array) and value.count == info.n_layers:
                raise FileError(f"{source}: {key} has a value for each layer, which llama.cpp cannot cut to a part.")
        pattern = f"{architecture}.attention.sliding_window_pattern"
        if period > 1 and pattern in header.values:
            period = header.number(pattern) or 1
    return period


def _quantize(source: str | os.PathLike[str], target: str | os.PathLike[str], what: str, **options: Any) -> ModelInfo:
    """Run llama_model_quantize with `options` set in its parameters; `what` begins the sentence of its failure."""
    import llama_cpp

    if os.path.realpath(source) == os.path.realpath(target):
        raise FileError(f"{target}: is the source as well; the result needs another path.")
    with replacing(target) as temporary:
        temporary.touch()  # so that an unwritable folder is named by the system, not as an "iostream error"
        with _captured_log(llama_cpp) as log:
            llama_cpp.llama_backend_init()
            params = llama_cpp.llama_model_quantize_default_params()
            for option, value in options.items():
                setattr(params, option, value)
            status = llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(temporary), ctypes.byref(params))
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
def _captured_log(llama_cpp: Any) -> Iterator[list[str]]:
    """Collect llama.cpp's log, one for the whole process, instead of printing it; the old receiver comes back."""
    lines: list[str] = []

    @llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
    def receive(level: int, text: bytes, user_data: ctypes.c_void_p) -> None:
        lines.append(text.decode("utf-8", "replace"))

    with _log_lock:
        previous, user_data = llama_cpp.llama_log_callback(), ctypes.c_void_p()
        llama_cpp.llama_log_get(ctypes.byref(previous), ctypes.byref(user_data))
        llama_cpp.llama_log_set(receive, ctypes.c_void_p(0))
        try:
            yield lines
        finally:
            llama_cpp.llama_log_set(previous, user_data)
