"""Importance matrices: how large the inputs of each matrix are, so that quantisation spends its bits where they count.

Both formats of llama.cpp's `imatrix` tool are read: GGUF files with `<tensor>.in_sum2` and `<tensor>.counts`, and the older binary
one without a header, which anything that is no GGUF file is taken for.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping

import numpy as np
from gguf.constants import GGMLQuantizationType
from numpy.typing import NDArray

from gguf_tools.errors import FileError
from gguf_tools.header import Buffer, Limits, TensorEntry, parse_header
from gguf_tools.mapping import mapped
from gguf_tools.model import ModelInfo

Importance = Mapping[str, NDArray[np.float32]]  # tensor name -> mean square of each input, (n_in,) or (n_experts * n_in,)

_LIMITS = Limits(n_keys=1_000, n_tensors=100_000, header_bytes=1 << 26, file_bytes=1 << 32)


def read_imatrix(path: str | os.PathLike[str]) -> dict[str, NDArray[np.float32]]:
    """The mean square of each input of each tensor.

    Raises:
        FileError: the file is damaged, of another kind, or holds numbers that are no mean squares.
    """
    with mapped(path) as data, np.errstate(invalid="ignore"):  # dividing a signalling NaN would warn; it is refused below
        found = _gguf(data, str(path)) if data[:4] == b"GGUF" else _legacy(data, str(path))
    for name, values in found.items():
        if not (np.isfinite(values).all() and (values >= 0).all()):
            raise FileError(f"{path}: the importance of {name} holds a value that is negative or not finite.")
    return found


def check_importance(importance: Importance, info: ModelInfo, label: str) -> None:
    """Refuse importance of another model; tensors that this one lacks are ignored, as long as it has some of them.

    Raises:
        FileError: no tensor, or one of another size.
    """
    known = importance.keys() & info.tensors.keys()
    if not known:
        raise FileError(f"{label}: names no tensor of {info.path}. Was it made for another model?")
    for name in known:
        shape = info.tensors[name][0]
        wanted = shape[-1] * (shape[0] if len(shape) == 3 else 1)
        if importance[name].size != wanted:
            raise FileError(
                f"{label}: has {importance[name].size} values for {name}, but {info.path} needs {wanted}. Was it made for another model?"
            )


def _gguf(data: Buffer, label: str) -> dict[str, NDArray[np.float32]]:
    header = parse_header(data, label, _LIMITS)
    names = [name.removesuffix(".in_sum2") for name in header.tensors if name.endswith(".in_sum2")]
    if not names:
        raise FileError(f"{label}: is no importance matrix: it holds no tensor named *.in_sum2.")

    def read(name: str) -> NDArray[np.float32]:
        entry: TensorEntry | None = header.tensors.get(name)
        if entry is None:
            raise FileError(f"{label}: has no tensor {name}, which an importance matrix needs.")
        if entry.type != GGMLQuantizationType.F32:
            raise FileError(f"{label}: {name} is of type {entry.type.name}, but must be F32.")
        return np.frombuffer(data[entry.offset : entry.offset + entry.size_bytes], "<f4")

    found = {}
    for name in names:
        sums, counts = read(f"{name}.in_sum2"), read(f"{name}.counts")
        if sums.size % counts.size:
            raise FileError(f"{label}: {name}.in_sum2 has {sums.size} values, which are not whole rows for {counts.size} counts.")
        rows, each = sums.reshape(counts.size, -1), np.maximum(counts, 1)[:, None]
        # An expert that no token reached says nothing about its inputs.
        found[name] = np.where(counts[:, None] > 0, rows / each, np.float32(1)).astype(np.float32).ravel()
    return found


def _legacy(data: Buffer, label: str) -> dict[str, NDArray[np.float32]]:
    at = 0

    def take(n_bytes: int, what: str) -> bytes:
        nonlocal at
        if n_bytes > len(data) - at:
            raise FileError(
                f"{label}: is no importance matrix, or truncated: {what} at byte {at} needs {n_bytes} bytes, but {len(data) - at} are left."
            )
        at += n_bytes
        return data[at - n_bytes : at]

    def count(what: str, most: int) -> int:
        (value,) = struct.unpack("<i", take(4, what))
        if not 1 <= value <= most:
            raise FileError(f"{label}: is no importance matrix, or damaged: {what} is {value}, but must be 1 to {most}.")
        return int(value)

    found = {}
    for _ in range(count("the number of entries", 100_000)):
        raw = take(count("the length of a name", 1024), "a name")
        if not raw.isascii() or not (name := raw.decode().rstrip("\0")).isprintable():
            raise FileError(f"{label}: is no importance matrix, or damaged: a tensor is named {raw!r:.80}.")
        (n_calls,) = struct.unpack("<i", take(4, f"the calls of {name}"))
        n_values = count(f"the number of values of {name}", 1 << 28)
        values = np.frombuffer(take(4 * n_values, f"the values of {name}"), "<f4")
        found[name] = (values / max(n_calls, 1)).astype(np.float32)
    return found
