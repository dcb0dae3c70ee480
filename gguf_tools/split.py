"""A model cut in two: the trunk, which computes what enters layer k, and the top, from layer k to the logits.

Both are models that llama.cpp loads. The trunk keeps layer k as its last one, although only what enters it is wanted: llama.cpp
computes the last layer of a model only where logits are asked for, all others for every token.
"""

from __future__ import annotations

import ctypes
import os
from functools import lru_cache
from pathlib import Path

from gguf_tools.errors import FileError
from gguf_tools.header import MODEL_LIMITS, Array, parse_header
from gguf_tools.mapping import mapped
from gguf_tools.model import ModelInfo, read_model_info
from gguf_tools.output import Progress, new_file
from gguf_tools.quantize import Path_, run_quantizer

# After how many layers an architecture repeats itself (sliding windows, layers without rotation): only a multiple of
# that can be cut off the front without changing what the remaining layers compute. Architectures not listed are not
# known.
_PERIODS = {"llama": 1, "qwen2": 1, "qwen3": 1, "gemma": 1, "gemma2": 2, "gemma3": 6, "smollm3": 4}
# llama.cpp scales attention differently for the model of this many layers, and would not for a part of it.
_SPECIAL_DEPTHS = {"gemma2": 46, "gemma3": 62}


def split_model(
    source: Path_, at: int, trunk: Path_, top: Path_, *, progress: Progress | None = None, force: bool = False
) -> tuple[ModelInfo, ModelInfo]:
    """Write layers 0 to `at` to `trunk` and layers `at` to the last, numbered from 0, to `top`, each complete or not at all.

    Fed the values that enter the trunk's last layer, the top gives the logits of the whole model.

    Raises:
        FileError: there is no such layer, the layers would not compute the same elsewhere, or a path cannot be written.
    """
    info = read_model_info(source)
    if not 1 <= at < info.n_layers:
        raise FileError(f"{source}: has layers 0 to {info.n_layers - 1}, so it can be cut at 1 to {info.n_layers - 1}, not at {at}.")
    _check_movable(source, info, at, whole=False)
    if len({os.path.realpath(path) for path in (source, trunk, top)}) < 3:
        raise FileError(f"{trunk} and {top}: model, trunk and top need three different paths.")
    with new_file(trunk, force=force) as lower, new_file(top, force=force) as upper:
        lower.touch()  # so that a path that cannot be written is named as it was given, and before any work
        upper.touch()
        extract_layers(source, lower, 0, at + 1, progress=progress, force=True)
        extract_layers(source, upper, at, info.n_layers, progress=progress, force=True)
    return read_model_info(trunk), read_model_info(top)


def extract_layers(
    source: Path_, target: Path_, first: int, last: int, *, progress: Progress | None = None, force: bool = False
) -> ModelInfo:
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
    return run_quantizer(source, target, what, progress=progress, force=force, only_copy=True, prune_layers=layers)


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


def _check_movable(source: Path_, info: ModelInfo, first: int, *, whole: bool) -> None:
    """Refuse a part whose layers depend on their number; llama.cpp would silently compute something else."""
    if whole:
        return
    period = _period(source, info)
    if first % period:
        raise FileError(f"{source}: layers of {info.architecture} repeat every {period}, so a part cannot begin at {first}.")


def _period(source: Path_, info: ModelInfo) -> int:
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
