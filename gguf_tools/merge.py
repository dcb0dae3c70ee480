"""An adapter added into its base model: W + (alpha / rank) B A, row by row, so that memory is a few megabytes whatever the model.

A merged matrix is rounded to its type again, and in four bits that rounding can be larger than what the adapter changed. So both are
measured while merging, and the result says how they compare.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from numpy.typing import NDArray

from gguf_tools.adapter import INVOCATION_KEY, adapter_pair, scale_of
from gguf_tools.errors import FileError
from gguf_tools.header import MODEL_LIMITS, Header, TensorEntry, parse_header
from gguf_tools.mapping import mapped
from gguf_tools.model import read_model_info
from gguf_tools.output import Progress
from gguf_tools.quantize import quantize_rows
from gguf_tools.recipe import NEEDS_IMPORTANCE, check_rows, file_type_of, is_matrix, tensor_type
from gguf_tools.stream import OutTensor, metadata_of, row_slices, write_streamed
from gguf_tools.validate import adapter_alpha, base_names, check_adapter

SAME = "same"


@dataclass
class Merged:
    """What a merge did. `change` and `error` are root mean squares over all adapted weights: of what the adapter added, and of how far
    the stored weights are from the exact sums.
    """

    path: Path
    names: tuple[str, ...]
    change: float = 0.0
    error: float = 0.0


def merge_adapter(
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    type: str = SAME,
    everywhere: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> Merged:
    """Write `base` with `adapter` added to its weights to `target`.

    With type `same` the matrices that the adapter changes keep their type, and all others their bytes; with a tensor type (`F16`,
    `Q8_0`, `int4`) all matrices are stored as that. An adapter of scope `answer` is on only from its invocation tokens on, merged
    weights always: that is another model than the one trained, and only made with `everywhere`.

    Raises:
        FileError: the adapter does not fit the base, its scope forbids merging, the type cannot be made or does not fit a tensor, or
            `target` cannot be written.
    """
    info = read_model_info(base)
    if len({os.path.realpath(path) for path in (base, adapter, target)}) < 3:
        raise FileError(f"{target}: is the base or the adapter as well; the result needs another path.")
    wanted = None if type.lower() == SAME else tensor_type(type)
    with ExitStack() as stack:
        model = parse_header(stack.enter_context(mapped(base)), str(base), MODEL_LIMITS)
        lora = check_adapter(stack.enter_context(mapped(adapter)), str(adapter), info)
        if INVOCATION_KEY in lora.values and not everywhere:
            raise FileError(
                f"{adapter}: is on only from the answer on (scope 'answer'), but merged weights are on for the whole prompt too, which is "
                "another model than the one that was trained; --everywhere merges it all the same."
            )
        names = frozenset(base_names(lora))
        types = {name: _stored_type(name, entry, wanted, name in names) for name, entry in model.tensors.items()}
        for name, entry in model.tensors.items():
            if types[name] != entry.type or name in names:
                _check(f"{base}: {name}", entry, types[name])
        # Read, not mapped: pages of a mapped file would count as this program's memory.
        file = stack.enter_context(open(base, "rb"))
        merged = Merged(Path(target), tuple(sorted(names)))
        sums = np.zeros(3)  # of squared changes, of squared errors, of weights
        tensors = [
            OutTensor(name, entry.shape, types[name],
                      partial(_pieces, file, entry, types[name], _delta(lora, name) if name in names else None, sums))
            for name, entry in model.tensors.items()
        ]  # fmt: skip
        own = () if wanted is None else ("general.file_type",)
        writer = metadata_of(model, without=own)
        if wanted is not None:
            writer.add_file_type(file_type_of(wanted))
        write_streamed(target, writer, tensors, force=force, progress=progress)
        merged.change, merged.error = (math.sqrt(total / sums[2]) for total in sums[:2])
    return merged


def _stored_type(
    name: str, entry: TensorEntry, wanted: GGMLQuantizationType | None, adapted: bool
) -> GGMLQuantizationType:
    return wanted if wanted is not None and (adapted or is_matrix(name, entry.shape)) else entry.type


def _check(where: str, entry: TensorEntry, kind: GGMLQuantizationType) -> None:
    """Refuse what cannot be computed, before anything is written."""
    check_rows(where, entry.shape, kind)
    if kind in NEEDS_IMPORTANCE:
        raise FileError(f"{where} cannot be stored as {kind.name} without importance data; choose another type, such as Q8_0 or F16.")
    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[entry.type][1]), np.uint8), entry.type)
        tensor_type(kind.name)
    except NotImplementedError:
        raise FileError(f"{where} is of type {entry.type.name}, which the gguf package cannot turn into numbers.") from None


def _delta(lora: Header, name: str) -> Callable[[], tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """A and B of a tensor, read when called; B is scaled as llama.cpp scales it, where an alpha of 0 stands for the rank."""
    alpha = adapter_alpha(lora)

    def read() -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        a, b = adapter_pair(lora, name)
        return a, b * np.float32(scale_of(alpha, a.shape[0]))

    return read


def _pieces(
    file: BinaryIO,
    entry: TensorEntry,
    kind: GGMLQuantizationType,
    delta: Callable[[], tuple[NDArray[np.float32], NDArray[np.float32]]] | None,
    sums: NDArray[np.float64],
) -> Iterator[NDArray[Any]]:
    """A tensor's bytes in type `kind`, a few rows at a time; of adapted ones `sums` is kept."""
    low_rank = delta() if delta is not None else None
    n_bytes = entry.size_bytes // math.prod(entry.shape[:-1])
    file.seek(entry.offset)
    for start, end in row_slices(entry.shape):
        raw = np.fromfile(file, np.uint8, (end - start) * n_bytes).reshape(end - start, n_bytes)
        if low_rank is None and kind == entry.type:
            yield raw.reshape(-1)
            continue
        values = dequantize(raw, entry.type)
        if low_rank is None:
            yield quantize_rows(values, kind).reshape(-1)
            continue
        a, b = low_rank
        change = b[start:end] @ a
        values = values + change
        stored = quantize_rows(values, kind)
        sums += (_squares(change), _squares(dequantize(stored, kind) - values), values.size)
        yield stored.reshape(-1)


def _squares(values: NDArray[np.float32]) -> float:
    return float(np.einsum("ij,ij->", values, values, dtype=np.float64))
